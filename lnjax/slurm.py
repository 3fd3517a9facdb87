"""`--slurm nodes=2 …`: one sbatch script for any config, from launch/job.sbatch. No jax."""

import re
import shlex
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lnjax.config import Job, nearest
from lnjax.distributed import PORTS
from lnjax.errors import ConfigError, LnjaxError, Stopped
from lnjax.flags import ENVIRONMENT, XLA_FLAGS, as_text, jaxlib_version, known, meant_for
from lnjax.schema import VllmConfig

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "launch" / "job.sbatch"
SERVER_PORT = 8100
"""Of the first rollout server of a node; the next ones follow."""
WAIT_S = 30
"""From the end of the first process of a run to the end of the last: longer than a watchdog takes to hear of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """Keys of --slurm."""

    nodes: int = field(metadata={"help": "Of the learner: whole ones."})
    gpus_per_node: int = field(default=8, metadata={"help": "0 for a run on CPUs."})
    processes_per_node: int = field(default=1, metadata={"help": "Learner processes that share a node's GPUs equally."})
    rollout_nodes: int = field(
        default=0, metadata={"help": "More nodes, for vLLM servers: as many as their GPUs hold."}
    )
    partition: str = field(default="", metadata={"help": "Empty: the cluster's default."})
    account: str = field(default="", metadata={"help": "Empty: the user's default."})
    time: str = field(default="", metadata={"help": "D-HH:MM:SS or HH:MM:SS; empty: the partition's limit."})
    container: str = field(
        default="", metadata={"help": "Image for pyxis/enroot, with Python and lnjax's packages in it."}
    )
    lead_s: int = field(
        default=60, metadata={"help": "Warning before the time limit: a step and a checkpoint must fit."}
    )
    requeue: int = field(
        default=5,
        metadata={"help": "Failures in a row, without a new checkpoint between, after which the job starts again."},
    )


class Script(string.Template):
    delimiter = "@"


def parse_options(words: Sequence[str]) -> SlurmOptions:
    """From `key=value` words. Raises ConfigError."""
    kinds: dict[str, Any] = {f.name: f.type for f in fields(SlurmOptions)}
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in kinds:
            what = f"--slurm {word!r}: expected key=value" if not equals else f"unknown key in --slurm {word!r}"
            raise ConfigError(f"{what}{nearest(key, list(kinds))}; keys are {', '.join(kinds)}")
        if kinds[key] is int and not value.isdigit():
            raise ConfigError(f"--slurm {key}={value}: expected a whole number")
        found[key] = int(value) if kinds[key] is int else value
    if "nodes" not in found:
        raise ConfigError("--slurm needs nodes=N: how many nodes the learner gets")
    options = SlurmOptions(**found)
    for key in ("nodes", "processes_per_node", "lead_s"):
        if getattr(options, key) < 1:
            raise ConfigError(f"--slurm {key}={getattr(options, key)}: must be at least 1")
    if options.gpus_per_node % options.processes_per_node:
        raise ConfigError(
            f"--slurm processes_per_node={options.processes_per_node} does not divide gpus_per_node={options.gpus_per_node}"
        )
    if options.time and not re.fullmatch(r"(\d+-)?\d{1,2}(:\d\d){0,2}", options.time):
        raise ConfigError(f"--slurm time={options.time}: expected D-HH:MM:SS or HH:MM:SS")
    return options


def render(job: Job, options: SlurmOptions, *, flags: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """The script. Raises ConfigError where config and options do not fit."""
    if not TEMPLATE.is_file():
        raise ConfigError(f"{TEMPLATE} is missing; --slurm works from a checkout of lnjax")
    o, run_dir = options, job.run_dir.absolute()
    for path in (ROOT, run_dir):
        if not re.fullmatch(r"[\w./+=@%-]+", str(path)):
            raise ConfigError(f"{str(path)!r}: sbatch takes no blanks or signs in paths; choose another folder")
    gpus = [f"#SBATCH --gpus-per-node={o.gpus_per_node}"] if o.gpus_per_node else []
    named = [f"#SBATCH --{k}={getattr(o, k)}" for k in ("partition", "account", "time") if getattr(o, k)]
    mounts = f"{ROOT}:{ROOT},{run_dir}:{run_dir}"
    container = f" --container-image={o.container} --container-mounts={mounts} --container-workdir={ROOT}"
    python = "python" if o.container else sys.executable
    servers, more = _servers(job, o, run_dir=run_dir, python=python, container=container if o.container else "")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if flags:
        exports.append(f'export XLA_FLAGS="{as_text(flags)} ${{XLA_FLAGS:-}}"')
    words = ["-m", "lnjax.launch", "--config", job.name, *["--proxy"] * job.proxy]
    words += ["--run-dir", str(run_dir), *job.overrides]
    return Script(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=job.config.name,
        all_nodes=o.nodes + o.rollout_nodes,
        nodes=o.nodes,
        processes_per_node=o.processes_per_node,
        tasks=o.nodes * o.processes_per_node,
        directives="\n".join([*gpus, *named]) or "#",
        root=ROOT,
        logs=run_dir / "logs",
        checkpoints=run_dir / "checkpoints",
        lead_s=o.lead_s,
        first_port=PORTS.start,
        num_ports=len(PORTS),
        exports="\n".join(exports),
        servers=servers,
        wait_s=WAIT_S,
        container=container if o.container else "",
        learner=shlex.join([python, *words]) + more,
        stopped=Stopped.exit_code,
        user_error=LnjaxError.exit_code,
        requeue=o.requeue,
    )


def _servers(job: Job, o: SlurmOptions, *, run_dir: Path, python: str, container: str) -> tuple[str, str]:
    """(shell lines that start the rollout servers, what they add to the learner's command line)."""
    engine = job.config.engine
    if not o.rollout_nodes:
        return "", ""
    if not isinstance(engine, VllmConfig):
        raise ConfigError(f"--slurm rollout_nodes={o.rollout_nodes}: {job.config.name} samples in the learner (engine)")
    if o.gpus_per_node < engine.tensor_parallel:
        raise ConfigError(
            f"--slurm gpus_per_node={o.gpus_per_node}: a rollout server needs engine.tensor_parallel={engine.tensor_parallel}"
        )
    each, width = o.gpus_per_node // engine.tensor_parallel, engine.tensor_parallel
    publish = engine.publish_dir or str(run_dir / "weights")
    command = [python, "-m", "lnjax.serve", "--config", job.name, *job.overrides, "--engine.publish-dir", publish]
    task = (
        f"hosts=($LNJAX_ROLLOUT_HOSTS); exec {shlex.join(command)} --engine.host ${{hosts[$SLURM_NODEID]}} "
        f"--port $(({SERVER_PORT} + SLURM_LOCALID)) "
        f"--engine.gpus $(seq $((SLURM_LOCALID * {width})) $((SLURM_LOCALID * {width} + {width - 1})))"
    )
    lines = f"""
# Rollout servers on the last nodes; they wait for the learner's first weights.
export LNJAX_SERVER_KEY=${{LNJAX_SERVER_KEY:-$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')}}
LNJAX_ROLLOUT_HOSTS= LNJAX_ROLLOUT_ADDRESSES=
for node in "${{nodes[@]:{o.nodes}}}"; do
  LNJAX_ROLLOUT_HOSTS+="$(address "$node") "
  for i in $(seq 0 {each - 1}); do
    LNJAX_ROLLOUT_ADDRESSES+="http://$(address "$node"):$(({SERVER_PORT} + i)) "
  done
done
export LNJAX_ROLLOUT_HOSTS
srun --overlap --cpu-bind=none --nodes={o.rollout_nodes} --ntasks-per-node={each} --relative={o.nodes} --kill-on-bad-exit=0 \\
  --open-mode=append --output="$log.server-%t.log"{container} bash -c {shlex.quote(task)} &
"""
    added = f" --engine.num-servers 0 --engine.publish-dir {shlex.quote(publish)}"
    return lines, added + " --engine.addresses $LNJAX_ROLLOUT_ADDRESSES"


def submit(job: Job, *, options: SlurmOptions, print_only: bool) -> str:
    """Write RUN_DIR/job.sbatch and submit it; what to tell the user. With `print_only`, only the script."""
    platform, version = "gpu" if options.gpus_per_node else "cpu", jaxlib_version()
    flags = known(meant_for(XLA_FLAGS, platform=platform, jaxlib=version))
    text = render(job, options, flags=flags, environment=meant_for(ENVIRONMENT, platform=platform, jaxlib=version))
    if print_only:
        return text
    script = job.run_dir.absolute() / "job.sbatch"
    (script.parent / "logs").mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(f"sbatch is not installed here; {script} is written, submit it on a login node") from error
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().split(";")[0]
    return f"submitted {script} as job {number}; logs in {script.parent}/logs/{number}.*"

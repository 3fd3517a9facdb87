"""From `--config NAME --any.key value` to one validated RunConfig; its hash; its file in the run folder. No jax."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tyro

from lnjax.errors import ConfigError
from lnjax.proxy import proxy
from lnjax.schema import OnlineConfig, PreferenceConfig, RunConfig, VllmConfig
from lnjax.stages import STAGES, check_stages

MARKS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
FREE_ON_RESUME = (
    *(f"{name}.steps" for name in STAGES),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.export_hf"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),  # a checkpoint restores on any mesh
    "profile",
    *("cluster.start_deadline_s", "cluster.heartbeat_s", "cluster.step_deadline_s"),
)
"""Keys a resumed run may change."""
USAGE = (
    "usage: python -m lnjax.launch --config NAME [--run-dir DIR] [--dry-run] [--proxy] [--slurm nodes=N ... [--print]] "
    "[--any.key value ...] [--help]"
)


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for."""

    config: RunConfig
    run_dir: Path
    dry_run: bool
    name: str
    """As given: a name or a path."""
    overrides: tuple[str, ...]
    """`--key value` words, as given."""
    slurm: tuple[str, ...] | None
    """`key=value` words after --slurm; None: run here."""
    print_only: bool
    """Show the SLURM script instead of submitting it."""
    proxy: bool
    """The config is one made small by lnjax.proxy, for 8 virtual CPU devices."""


def config_names() -> list[str]:
    """Configs that can be named: every module in the package `configs`."""
    folder = _configs_folder()
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def read_config(name: str) -> Any:
    """What `configs/NAME.py`, or a path to a .py file with a function config(), returns. Raises ConfigError with the nearest
    name."""
    path = Path(name) if name.endswith(".py") else _configs_folder() / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"no config {name!r}{nearest(name, config_names())}; there are {', '.join(config_names())}")
    found = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ConfigError(f"{path}: no function config(); it must return a RunConfig")
    return module.config()


def load_config(name: str) -> RunConfig:
    """The config of one run by its name. Raises ConfigError for another kind, and as `read_config` does."""
    config = read_config(name)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{name}: config() returned {type(config).__name__}, expected RunConfig")
    return config


def parse(argv: Sequence[str]) -> Job:
    """The job of a command line. Raises ConfigError for an unknown key, a wrong type or values that do not fit."""
    name, run_dir, flags, rest = None, None, set(), []
    slurm: list[str] | None = None
    words = [w for word in argv for w in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])]
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("--dry-run", "--print", "--proxy"):
            flags.add(word)
        elif word == "--slurm":
            slurm = slurm or []
            while position + 1 < len(words) and not words[position + 1].startswith("--"):
                position += 1
                slurm.append(words[position])
        elif word in ("--config", "--run-dir"):
            position += 1
            if position == len(words):
                raise ConfigError(f"{word} needs a value. {USAGE}")
            if word == "--config":
                name = words[position]
            else:
                run_dir = Path(words[position])
        else:
            rest.append(word)
        position += 1
    if name is None:
        if "--help" in rest or "-h" in rest:
            print(f"{USAGE}\n\nconfigs: {', '.join(config_names())}\n--config NAME --help explains every key of NAME.")
            sys.exit(0)
        raise ConfigError(f"--config is missing; there are {', '.join(config_names())}. {USAGE}")
    config = load_config(name)
    config = override(proxy(config) if "--proxy" in flags else config, rest)
    validate(config)
    if "--print" in flags and slurm is None:
        raise ConfigError("--print shows what --slurm would submit; give --slurm nodes=N too")
    return Job(
        config,
        run_dir or Path("runs") / config.name,
        dry_run="--dry-run" in flags,
        name=name,
        overrides=tuple(rest),
        slurm=None if slurm is None else tuple(slurm),
        print_only="--print" in flags,
        proxy="--proxy" in flags,
    )


def override(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """The config with `--key value` pairs applied; `--help` prints every key and exits."""
    if "--help" in words or "-h" in words:
        tyro.cli(
            RunConfig, default=config, args=["--help"], config=MARKS, prog="python -m lnjax.launch", description=USAGE
        )
    known = _settable(config)
    pairs: list[tuple[str, list[str]]] = []
    position = 0
    while position < len(words):
        word = words[position]
        key = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides are --key value")
        if key not in known:
            _unknown(key, known, config)
        if position + 1 == len(words):
            raise ConfigError(f"--{key} needs a value")
        end = position + 2
        while known[key].startswith("tuple") and end < len(words) and not words[end].startswith("--"):
            end += 1
        pairs.append((key, list(words[position + 1 : end])))
        position = end
    for key, values in pairs:  # one by one, so that an error can name its key
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                config = tyro.cli(
                    RunConfig,
                    default=config,
                    args=[f"--{key.replace('_', '-')}", *values],
                    config=MARKS,
                    use_underscores=False,
                )
        except SystemExit as error:
            value = " ".join(values)
            raise ConfigError(f"--{key} {value}: expected {known[key]}, got {value!r}") from error
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_hash(config: RunConfig) -> str:
    """12 hex digits of the resolved values."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def render(config: RunConfig) -> str:
    """One line a section."""
    lines: list[str] = []

    def walk(name: str, value: Any) -> None:
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        plain = [f"{k}={v}" for k, v in fields if not dataclasses.is_dataclass(v)]
        if plain:
            lines.append(f"{name:18} {' '.join(plain)}")
        for key, inner in fields:
            if key == "spec" and inner is not None:
                lines.append(
                    f"{'model.spec':18} {len(inner.blocks)} blocks d_model={inner.d_model} heads={inner.num_heads}x"
                    f"{inner.head_dim} vocab={inner.vocab_size}"
                )
            elif dataclasses.is_dataclass(inner):
                walk(f"{name}.{key}".removeprefix("run."), inner)

    walk("run", config)
    return "\n".join(lines)


def check_run_dir(config: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError when the folder holds a run of another config; touches nothing."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    try:
        before = flat(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); use another --run-dir") from error
    after = flat(json.loads(json.dumps(to_dict(config))))
    changed = [
        f"{k} was {before.get(k)!r}, is {after.get(k)!r}"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k) and k not in FREE_ON_RESUME
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{run_dir} holds a run of another config ({'; '.join(changed[:3])}{more}); use another --run-dir, or the "
            "same values to resume it"
        )


def save_config(config: RunConfig, run_dir: Path) -> None:
    """Write RUN_DIR/config.json, whole."""
    path = run_dir / "config.json"
    temporary = path.with_name(path.name + ".tmp")
    body = {"hash": config_hash(config), "config": to_dict(config)}
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of nested dicts; lists are leaves."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return found


def validate(c: RunConfig) -> None:
    """Arithmetic that must close before anything is built. Raises ConfigError naming the keys."""
    check_stages(c)
    if c.model.source == "random" and c.model.tokenizer == "same":
        raise ConfigError("model.source=random brings no tokenizer; set model.tokenizer")
    _positive(c, {"engine.max_len", "reward.num_workers", "reward.deadline_s", "checkpoint.keep"})
    _positive(c, {"record.groups", "record.samples", "record.tokens"})
    if c.reward.judge:
        _positive(c, {"reward.judge.deadline_s", "reward.judge.concurrency"})
        address = c.reward.judge.address
        if c.reward.judge.retries < 0 or not (address.startswith(("http://", "https://")) or address == "rule"):
            raise ConfigError(
                f"reward.judge.address={address!r}, retries={c.reward.judge.retries}; expected "
                "http://host:port or `rule`, and no negative number"
            )
    _positive(c, {"cluster.start_deadline_s", "cluster.heartbeat_s", "cluster.step_deadline_s"})
    if isinstance(c.engine, VllmConfig):
        _validate_vllm(c, c.engine)
    else:
        _positive(c, {"engine.num_slots", "engine.decode_chunk", "engine.prefill_rows", "engine.prefill_multiple"})
    if c.sft:
        _positive(c, {"sft.steps", "sft.batch_rows", "sft.pack.row_tokens", "sft.pack.microbatch_rows"})
        _positive(c, {"sft.pack.max_segments", "sft.optimizer.learning_rate"})
        _divides("sft.pack.microbatch_rows", c.sft.pack.microbatch_rows, "sft.batch_rows", c.sft.batch_rows)
    for name in ("preference", "reward_model"):
        if getattr(c, name):
            keys = ("steps", "batch_size", "pack.row_tokens", "pack.microbatch_rows", "optimizer.learning_rate")
            _positive(c, {f"{name}.{key}" for key in keys})
    if c.preference:
        _positive(c, {"preference.beta", "preference.eta"})
        if isinstance(c.preference.data, OnlineConfig):
            _validate_online(c, c.preference, c.preference.data)
    if c.grpo:
        _validate_grpo(c)
    if c.eval:
        _positive(c, {"eval.num_samples", "eval.sampling.max_new_tokens"})
        if c.eval.prompts.num_prompts < 1:
            raise ConfigError("eval.prompts.num_prompts must be at least 1: how many held-out prompts are scored")
        _fits_engine(c, "eval", c.eval.prompts.max_prompt_tokens + c.eval.sampling.max_new_tokens)
        _sampling("eval.sampling", c.eval.sampling)


def _validate_vllm(c: RunConfig, e: VllmConfig) -> None:
    _positive(c, {"engine.tensor_parallel", "engine.max_sequences", "engine.keep_versions", "engine.max_restarts"})
    _positive(c, {f"engine.{name}_deadline_s" for name in ("start", "swap", "request", "probe")})
    if bool(e.addresses) == bool(e.num_servers):
        raise ConfigError(
            f"engine.num_servers={e.num_servers} with {len(e.addresses)} engine.addresses; either start servers here "
            "(num_servers) or attach to running ones (addresses, num_servers 0)"
        )
    if e.addresses and not e.publish_dir:
        raise ConfigError("engine.publish_dir is needed with engine.addresses: the folder their servers were given")
    if e.parity_limit <= 1:
        raise ConfigError(f"engine.parity_limit={e.parity_limit} must be above 1, which is exact agreement")


def _validate_grpo(c: RunConfig) -> None:
    g = c.grpo
    assert g
    _positive(c, {"grpo.steps", "grpo.prompts_per_step", "grpo.updates_per_step", "grpo.sampling.max_new_tokens"})
    _positive(c, {"grpo.pack.row_tokens", "grpo.pack.microbatch_rows", "grpo.pack.max_segments"})
    _positive(c, {"grpo.optimizer.learning_rate", "grpo.sampling.temperature"})
    _divides("grpo.updates_per_step", g.updates_per_step, "grpo.prompts_per_step", g.prompts_per_step)
    if g.max_staleness < 0 or (g.max_staleness > 0 and g.loss.importance_cap <= 0):
        raise ConfigError(
            f"grpo.max_staleness={g.max_staleness}, grpo.loss.importance_cap={g.loss.importance_cap:g}; stale tokens need a "
            "positive cap on their importance weights (2 is usual)"
        )
    if g.curriculum:
        _positive(c, {"grpo.curriculum.sigma", "grpo.curriculum.bins", "grpo.curriculum.drop_at"})
        if g.curriculum.batches < 0:
            raise ConfigError(f"grpo.curriculum.batches={g.curriculum.batches} must be positive, or 0 for all prompts")
    if g.samples_per_prompt < 2:
        raise ConfigError("grpo.samples_per_prompt must be at least 2: advantages compare the samples of a prompt")
    longest = g.prompts.max_prompt_tokens + g.sampling.max_new_tokens
    _fits_engine(c, "grpo", longest)
    if longest > g.pack.row_tokens:
        raise ConfigError(
            f"grpo.prompts.max_prompt_tokens + grpo.sampling.max_new_tokens = {longest}, but grpo.pack.row_tokens is "
            f"{g.pack.row_tokens}; the longest sequence must fit a row"
        )
    _sampling("grpo.sampling", g.sampling)
    if g.sampling.top_p < 1 or g.sampling.top_k > 0:
        raise ConfigError(
            "grpo.sampling.top_p must be 1 and top_k 0: the learner scores tokens under the whole distribution, so a "
            "truncated sampler would be another policy"
        )


def _validate_online(c: RunConfig, p: PreferenceConfig, online: OnlineConfig) -> None:
    """Of preferences whose answers the policy samples."""
    _positive(c, {"preference.data.sampling.max_new_tokens"})
    _sampling("preference.data.sampling", online.sampling)
    asked, new = online.prompts.max_prompt_tokens, online.sampling.max_new_tokens
    _fits_engine(c, "preference.data", asked + new)
    if p.loss == "dpo" or online.samples_per_prompt < 2:
        raise ConfigError(
            f"preference.loss={p.loss} with {online.samples_per_prompt} samples a prompt; answers sampled on the way need "
            "an rpo loss and at least 2"
        )
    if (size := asked - 1 + online.samples_per_prompt * (new + 1)) > p.pack.row_tokens:
        raise ConfigError(
            f"preference.pack.row_tokens={p.pack.row_tokens}: the longest prompt and its {online.samples_per_prompt} "
            f"answers have {size} tokens and must fit a row"
        )


def _sampling(name: str, s: Any) -> None:
    if s.temperature < 0 or not 0 < s.top_p <= 1 or s.top_k < 0:
        raise ConfigError(
            f"{name}: temperature={s.temperature}, top_p={s.top_p}, top_k={s.top_k}; expected temperature >= 0, "
            "0 < top_p <= 1, top_k >= 0"
        )


def _fits_engine(c: RunConfig, stage: str, longest: int) -> None:
    if longest > c.engine.max_len:
        raise ConfigError(
            f"{stage}.prompts.max_prompt_tokens + {stage}.sampling.max_new_tokens = {longest}, but engine.max_len is "
            f"{c.engine.max_len}; raise --engine.max-len"
        )


def _positive(c: RunConfig, keys: set[str]) -> None:
    for key in sorted(keys):
        value: Any = c
        for part in key.split("."):
            value = getattr(value, part)
        if value <= 0:
            raise ConfigError(f"{key}={value} must be positive")


def _divides(name: str, value: int, whole: str, total: int) -> None:
    if total % value:
        raise ConfigError(f"{name}={value} does not divide {whole}={total}")


def _configs_folder() -> Path:
    import configs  # noqa: PLC0415

    return Path(configs.__path__[0])


def _settable(config: RunConfig) -> dict[str, str]:
    """{dotted key: type as text} of what the command line may set."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner) and field.name != "spec":
                walk(f"{prefix}{field.name}.", inner)
            elif field.name != "spec" and inner is not None:
                kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
                found[prefix + field.name] = kind.replace("typing.", "")
                if kind == "Literal":
                    found[prefix + field.name] = str(field.type).replace("typing.", "")

    walk("", config)
    return found


def _unknown(key: str, known: Mapping[str, str], config: RunConfig) -> NoReturn:
    stage = key.split(".")[0]
    if hasattr(config, stage) and getattr(config, stage) is None:
        raise ConfigError(f"unknown key --{key}: {config.name} has no {stage} stage")
    raise ConfigError(f"unknown key --{key}{nearest(key, list(known))}; --help lists all")


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f", did you mean {close[0]}?" if close else ""

"""python -m lnjax.serve --config NAME --port N [--any.key value]: become a vLLM server of that config's fleet.

For servers that the learner does not start itself: other hosts, other SLURM steps. Set engine.publish_dir to the folder that
the learner publishes to, and the environment variable LNJAX_SERVER_KEY to the key that it uses. The learner attaches with
`--engine.addresses http://HOST:PORT … --engine.num-servers 0`. Without a GPU it serves on the CPU.
"""

import os
import sys
from pathlib import Path

from lnjax.checkpoint.load import read_spec
from lnjax.config import parse
from lnjax.errors import ConfigError, LnjaxError
from lnjax.models.hf import hf_config
from lnjax.rollout.server import KEY, model_folder, serve_command, serve_environment, write_model
from lnjax.schema import RunConfig, VllmConfig

USAGE = "usage: python -m lnjax.serve --config NAME --port N [--any.key value ...]"


def command_of(c: RunConfig, *, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server. Raises ConfigError for what it lacks."""
    engine = c.engine
    if not isinstance(engine, VllmConfig):
        raise ConfigError(f"{c.name} samples with the embedded engine; lnjax.serve needs a config whose engine is vLLM")
    if not engine.publish_dir:
        raise ConfigError(
            "engine.publish_dir is empty; give the folder that the learner publishes to (--engine.publish-dir)"
        )
    if not os.environ.get(KEY):
        raise ConfigError(f"{KEY} is not set; export the same secret for servers and learner (any long random text)")
    root = Path(engine.publish_dir).absolute()
    spec = c.model.spec or read_spec(c.model.source)
    write_model(model_folder(root), config=hf_config(spec, dtype=engine.dtype))
    command = serve_command(engine, model=model_folder(root), port=port)
    return command, serve_environment(engine, index=0, root=root, key=os.environ[KEY])


def main(argv: list[str]) -> int:
    """Does not return where the server starts: this process becomes it."""
    try:
        words = list(argv)
        if "--port" not in words or not words[words.index("--port") + 1 :][:1]:
            raise ConfigError(f"--port is missing. {USAGE}")
        at = words.index("--port")
        port = words[at + 1]
        if not port.isdigit():
            raise ConfigError(f"--port {port}: expected a number")
        job = parse(words[:at] + words[at + 2 :])
        command, environment = command_of(job.config, port=int(port))
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

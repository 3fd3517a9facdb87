"""python -m lnjax.plan --config NAME [--nodes N] [--hardware h100] [--json PATH] [--mean-tokens N] [--disk-gbs X]
                      [--any.key value]
python -m lnjax.plan --calibrate [--json PATH]

What a run needs and takes on GPUs that need not be here. Without --nodes the config's own mesh and servers are planned; with
it the fastest layout that fits N nodes. The learner's program of the plan is compiled for the target, all blocks of it.
  --mean-tokens  average completion; without it every completion is as long as allowed
  --disk-gbs     GB/s of one node to the shared file system (assumed: 5)
  --calibrate    measure two rates on this machine, predict memory and step time of three small runs, run them"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from lnjax.config import parse
from lnjax.errors import ConfigError, LnjaxError


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this door, words for the config)."""
    words = _Words(prog="python -m lnjax.plan", add_help=False, allow_abbrev=False)
    words.add_argument("--hardware", default="h100")
    words.add_argument("--nodes", type=int, default=0)
    words.add_argument("--json", type=Path)
    words.add_argument("--mean-tokens", type=int, default=0)
    words.add_argument("--disk-gbs", type=float, default=5.0)
    words.add_argument("--calibrate", action="store_true")
    return words.parse_known_args(list(argv))


def plan(options: argparse.Namespace, rest: list[str], console: Console) -> dict[str, Any]:
    """Print the plan and return it."""
    from lnjax.planner.hardware import hardware  # noqa: PLC0415 - what imports jax waits until the command line is read

    if options.nodes < 0 or options.mean_tokens < 0:
        raise ConfigError("--nodes and --mean-tokens must be positive")
    hw = hardware(options.hardware)
    c = parse(rest).config
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan needs no device, and must not take one
    from lnjax.checkpoint.load import read_spec  # noqa: PLC0415
    from lnjax.planner.report import make_plan, show, with_disk  # noqa: PLC0415

    spec = c.model.spec or read_spec(c.model.source)
    with console.status("planning") as status:
        found = make_plan(
            c, spec, with_disk(hw, options.disk_gbs), nodes=options.nodes, mean_tokens=options.mean_tokens,
            note=_Progress(status, console),
        )  # fmt: skip
    show(c, found, console)
    return found


class _Progress:
    """A line that changes on a terminal; a new one every half minute elsewhere."""

    def __init__(self, status: Any, console: Console):
        self._status, self._console, self._last = status, console, float("-inf")

    def __call__(self, text: str) -> None:
        self._status.update(text)
        if not self._console.is_terminal and time.monotonic() - self._last > 30:
            self._console.print(text, highlight=False)
            self._last = time.monotonic()


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 for a plan that fits, 1 for one that does not, 2 for what the user can fix."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0
    try:
        console = Console(soft_wrap=False)
        options, rest = read(argv)
        if options.calibrate:
            from lnjax.planner.calibrate import calibrate  # noqa: PLC0415

            with console.status("calibrating") as status:
                found = calibrate(console, note=_Progress(status, console))
        else:
            found = plan(options, rest, console)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            console.print(f"wrote {options.json}", highlight=False)
        return 0 if found["fits"] else 1
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

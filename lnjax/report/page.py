"""One self-contained page about one or several runs: page.html, .css and .js with their data."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lnjax.errors import DataError
from lnjax.report.read import Lines, describe, read_config, read_run

ROLLOUT_BYTES = 3_000_000
"""Room for rollouts in a page; where more are recorded, every second, third, … group is shown."""


def write_page(run_dirs: Sequence[Path], *, out: Path, parent: Path | None = None) -> Path:
    """Raises DataError naming a broken line of a run. `parent`: a run to compare configs with."""
    runs = [read_run(x) for x in run_dirs]
    against = read_config(parent) if parent else {}
    if parent and not against:
        raise DataError(f"{parent / 'config.json'}: no config of a run; give the folder of a run")
    data = {
        "runs": [describe(run) | {"rollouts": thin(run.rollouts, room=ROLLOUT_BYTES // len(runs))} for run in runs],
        "parent": parent and {"name": parent.resolve().name, "config": against},
    }
    out.write_text(fill(data), encoding="utf-8")
    return out


def thin(groups: Lines, *, room: int) -> Lines:
    """Every k-th group, with the smallest k whose JSON has room (bytes)."""
    sizes = [len(_dump(x)) for x in groups]
    every = 1
    while sum(sizes[::every]) > room and every <= len(sizes):
        every += 1
    return groups[::every] if every <= len(sizes) else []


def fill(data: Any) -> str:
    """The page. Nothing in the data can end its script element, and the page runs no script but its own."""
    page, style, script = (
        (Path(__file__).parent / f"page.{x}").read_text(encoding="utf-8") for x in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("@HASH@", f"sha256-{digest}").replace("@STYLE@", style).replace("@SCRIPT@", script)
    return page.replace("@DATA@", _dump(data))


def _dump(value: Any) -> str:
    """Compact JSON, in ASCII and without the characters of markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

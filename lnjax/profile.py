"""Where the time of some steps went: a trace for XProf in RUN_DIR/profile, and a table on the terminal."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lnjax.errors import ConfigError

SCOPES = ("attention", "ffn", "embed", "head", "optimizer")
"""Names that the model and the update give their parts (jax.named_scope)."""
HOLDERS = ("while", "call", "conditional", "async")
"""Operations whose time is that of what they hold."""
ROWS = 12
PROFILING = "--xla_gpu_enable_command_buffer="
"""Of XLA_FLAGS, before jax is imported: a captured CUDA graph is one operation to the trace."""


def parse_steps(text: str) -> range:
    """`steps=5..8` or `steps=5`: steps 5 to 8 of every stage; empty: none. Raises ConfigError."""
    if not text:
        return range(0)
    found = re.fullmatch(r"steps=(\d+)(?:\.\.(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"profile={text!r}: expected steps=FIRST..LAST, for example --profile steps=5..8")
    return range(first, last + 1)


class Profile:
    """`begin(name, step)` as each step begins, `close` at the end; traces the steps asked for."""

    def __init__(self, steps: range, folder: Path):
        self._steps, self._folder, self._name = steps, folder, ""

    def begin(self, name: str, step: int) -> None:
        if self._name and (step not in self._steps or name != self._name):
            self.close()
        if not self._name and step in self._steps:
            import jax  # noqa: PLC0415 - the flag above comes first

            self._name = name
            jax.profiler.start_trace(str(self._folder / name))

    def close(self) -> None:
        if not self._name:
            return
        import jax  # noqa: PLC0415

        jax.effects_barrier()
        jax.profiler.stop_trace()
        folder, self._name = self._folder / self._name, ""
        Console(soft_wrap=True).print(table(folder))


def table(folder: Path) -> Table:
    """Seconds on the device by part of the model and by operation, of the newest trace in `folder`."""
    by_part, by_operation = seconds(folder)
    total = sum(by_operation.values()) or 1.0
    shown = Table("where the time went", "s", "share", title=f"trace in {folder} (open with xprof)")
    for counts in (by_part, by_operation):
        for name, spent in counts.most_common(ROWS):
            shown.add_row(name, f"{spent:.4f}", f"{spent / total:.1%}")
        shown.add_section()
    return shown


def seconds(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """(by part and pass, where the trace names them; by operation without its number). Overlapping ones count in full."""
    newest = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda p: p.stat().st_mtime)
    by_part: Counter[str] = Counter()
    by_operation: Counter[str] = Counter()
    for event in json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]:
        args: dict[str, Any] = event.get("args") or {}
        name = re.sub(r"[._]\d+(?=$|[._])|\.clone", "", args.get("hlo_op", ""))
        if event.get("ph") != "X" or not name or name.startswith(HOLDERS):
            continue
        by_operation[name] += event["dur"] / 1e6
        where = next((str(v) for k, v in args.items() if str(v).startswith("jit(")), "")
        if where:
            part = next((s for s in SCOPES if s in where.split("/") or f"({s})" in where), "rest")
            by_part[f"{part}, {'backward' if 'transpose(' in where else 'forward'}"] += event["dur"] / 1e6
    return by_part, by_operation

"""What a run writes for people: metrics.jsonl, TensorBoard, a live table, progress lines, summary.json."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table
from tensorboardX import SummaryWriter

from lnjax.errors import CheckpointError

SILENT_S = 3.0  # a wait shorter than this shows nothing
LINE_EVERY_S, LONGEST_PAUSE_S = 2.0, 30.0  # between lines, which come more slowly the longer it takes
TABLE_ROWS = 12

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = 0


def _hear(event: str, duration_secs: float, **kwargs: Any) -> None:
    global _compiled
    _compiled += event == COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_hear)

COLUMNS: dict[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "reward": ("reward", ".3f"),
    "sampler_kl": ("KL sampler", ".1e"),
    "kl_ref": ("KL ref", ".1e"),
    "entropy": ("entropy", ".3f"),
    "completion_tokens_mean": ("length", ".1f"),
    "unfinished": ("cut off", ".2f"),
    "grad_norm": ("grad norm", ".3f"),
    "learning_rate": ("lr", ".2e"),
}
"""Shown where a stage logs them: key -> (heading, format)."""


class JsonLines:
    """A file of one JSON object a line, each flushed. Where it does not write it only counts."""

    def __init__(self, path: Path, *, keep: int, writes: bool):
        """An existing file keeps its first `keep` lines. Raises CheckpointError when they are not there."""
        self.kept = _keep_lines(path, keep) if writes else []
        self.lines = keep
        self._file = open(path if writes else os.devnull, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self.lines += 1

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """One JSON line a step, flushed; opening an existing file keeps its first `keep_lines` lines.

    Every process counts lines and seconds; only the one that `writes` touches files and the terminal.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_lines: int = 0,
        quiet: bool = False,
        writes: bool = True,
        phases: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ):
        """`phases` hears of every phase."""
        self._file = JsonLines(run_dir / "metrics.jsonl", keep=keep_lines, writes=writes)
        self._phases_to = phases
        quiet = quiet or not writes
        kept = self._file.kept
        self.seconds: dict[str, float] = {}
        """Seconds by phase over the whole run, resumed parts included."""
        self.tokens: dict[str, int] = {}
        """Token counts over the whole run, by key ending in `_tokens`."""
        for line in kept:
            self._count(line)
        self._phases: dict[str, float] = {}
        self._compiled = _compiled
        first = min((line["step"] for line in kept[-1:]), default=0)
        self._board = SummaryWriter(str(run_dir / "tb"), purge_step=first + 1 if kept else None, write_to_disk=writes)
        self._rows: list[tuple[str, int, Mapping[str, Any]]] = []
        self._durations: list[float] = []
        self._last = time.monotonic()
        self._quiet = quiet
        self._console = Console(soft_wrap=True)
        self._live = (
            Live(console=self._console, auto_refresh=False) if self._console.is_terminal and not quiet else None
        )
        if self._live:
            self._live.start()

    @property
    def lines(self) -> int:
        return self._file.lines

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside towards the next logged line."""
        start = time.monotonic()
        try:
            with self._phases_to(name):
                yield
        finally:
            self.spent(name, time.monotonic() - start)

    def spent(self, name: str, seconds: float) -> None:
        """Count seconds measured elsewhere."""
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def log(self, stage: str, *, step: int, values: Mapping[str, Any], total_steps: int = 0) -> None:
        """Write one line {"stage", "step", **values, "time": {phase: seconds, "compiled": programs}}; all but "time" is
        reproducible. Programs that were compiled since the last line; after warm-up there should be none."""
        times = {f"{k}_s": round(v, 4) for k, v in self._phases.items()} | {"compiled": _compiled - self._compiled}
        self._compiled = _compiled
        self._phases.clear()
        line = {"stage": stage, "step": step, **{k: _number(v) for k, v in values.items()}, "time": times}
        self._file.write(line)
        self._count(line)
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(f"{stage}/{key}", value, step)
        now = time.monotonic()
        self._durations = [*self._durations[-19:], now - self._last]
        self._last = now
        if not self._quiet:
            self._show(line, total_steps)

    def note(self, text: str) -> None:
        """One line for the reader of the terminal."""
        if not self._quiet:
            self._console.print(text, highlight=False)

    def close(self) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        self._board.close()

    def _count(self, line: Mapping[str, Any]) -> None:
        for key, value in line.get("time", {}).items():
            if key.endswith("_s"):
                name = f"{line['stage']}.{key.removesuffix('_s')}"
                self.seconds[name] = self.seconds.get(name, 0.0) + value
        for key, value in line.items():
            if key.endswith("_tokens"):
                name = f"{line['stage']}.{key}"
                self.tokens[name] = self.tokens.get(name, 0) + int(value)

    def _show(self, line: Mapping[str, Any], total_steps: int) -> None:
        stage, step = line["stage"], line["step"]
        cells = {title: format(line[key], spec) for key, (title, spec) in COLUMNS.items() if line.get(key) is not None}
        for phase, seconds in line["time"].items():
            tokens = line.get(phase.removesuffix("_s") + "_tokens")
            if tokens and seconds > 0:
                cells[f"{phase.removesuffix('_s')} tok/s"] = f"{tokens / seconds:,.0f}"
        if total_steps:
            left = (total_steps - step) * sorted(self._durations)[len(self._durations) // 2]
            cells["ETA"] = clock(left)
        if stage == "eval":
            cells = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in line.items() if k in EVAL_COLUMNS}
        name = f"{step}/{total_steps}" if total_steps else str(step)
        if self._live is None or stage == "eval":
            body = "  ".join(f"{k} {v}" for k, v in cells.items())
            self._console.print(f"{stage} {name}  {body}", highlight=False)
            return
        if self._rows and self._rows[-1][0] != stage:
            self._rows.clear()
        self._rows = [*self._rows[-TABLE_ROWS + 1 :], (stage, step, cells)]
        table = Table(title=f"{stage} {name}", title_justify="left")
        table.add_column("step", justify="right")
        for title in cells:
            table.add_column(title, justify="right")
        for _, row_step, row in self._rows:
            table.add_row(str(row_step), *(row.get(title, "") for title in cells))
        self._live.update(table, refresh=True)


EVAL_COLUMNS = ("after", "mean", "low", "high", "num_prompts")


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _number(value: Any) -> Any:
    """A JSON value: NaN and infinities become null."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _keep_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """Cut the file after `count` lines and return them; the rest belongs to steps that will be done again."""
    if not path.exists():
        if count:
            raise CheckpointError(
                f"{path} is missing, but the checkpoint was taken after {count} of its lines; restore the file or use "
                "another --run-dir"
            )
        return []
    with open(path, "rb+") as file:
        kept = []
        for _ in range(count):
            line = file.readline()
            try:
                kept.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{path}:{len(kept) + 1}: not a whole JSON line, but the checkpoint was taken after {count} lines; "
                    "restore the file or use another --run-dir"
                ) from error
        file.truncate(file.tell())
    return kept


@contextmanager
def progress(label: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Silent for the first seconds, then lines of process 0 on stderr with share, rate and ETA."""
    start = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        pause = min(max(LINE_EVERY_S, (now - start) / 3), LONGEST_PAUSE_S)
        if now - start < SILENT_S or now - shown < pause or jax.process_index() > 0:
            return
        shown = now
        rate = done / (now - start)
        left = clock((total - done) / rate) if rate > 0 else "?"
        share = 100 * done / total if total else 100.0
        print(f"{label}: {share:.0f} %  {_amount(rate, unit)}/s  ETA {left}", file=sys.stderr, flush=True)

    yield advance


def _amount(count: float, unit: str) -> str:
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.1f} {prefix}{unit}"
    return f"{count:.1f} {unit}"


def peak_memory_bytes() -> dict[str, int]:
    """Peak resident memory of this process, and of each local device that reports one."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    for device in jax.local_devices():
        stats = device.memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            peaks[f"device_{device.id}"] = int(stats["peak_bytes_in_use"])
    return peaks


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

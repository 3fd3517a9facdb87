"""What a run folder says about the run, as plain JSON values for the page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnjax.config import flat
from lnjax.errors import DataError

Lines = list[dict[str, Any]]
POINTS = 2000
"""Most steps of a stage in one page; of more, every second, third, … is shown."""
SUMMARY = ("name", "config_hash", "parameters", "device", "mesh", "seconds", "tokens")


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder."""

    name: str
    metrics: Lines
    rollouts: Lines
    config: dict[str, str]
    """Dotted keys."""
    summary: dict[str, Any]
    """Empty where the run has not ended."""
    parent: tuple[str, dict[str, str]] | None
    """Folder name and config of the run that this one's weights came from, where it is still there."""
    notes: list[str]


def read_run(run_dir: Path) -> Run:
    """Raises DataError naming file and line."""
    notes: list[str] = []
    metrics = read_lines(run_dir / "metrics.jsonl", notes=notes)
    if not metrics:
        raise DataError(f"{run_dir / 'metrics.jsonl'}: no lines yet; the run has not done a step")
    record = run_dir / "rollouts.jsonl"
    rollouts = read_lines(record, notes=notes, needs=("question", "prompt", "rollouts")) if record.is_file() else []
    config = read_config(run_dir)
    parent, source = None, config.get("model.source", "")
    if source and (Path(source) / "config.json").is_file():
        found = read_config(Path(source))  # a folder in Hugging Face format has a config.json too, of another kind
        parent = (Path(source).name, found) if found else None
    name, summary = run_dir.resolve().name, _json(run_dir / "summary.json")
    return Run(name, metrics, rollouts, config, summary, parent, notes)


def read_lines(path: Path, *, notes: list[str], needs: Sequence[str] = ()) -> Lines:
    """The objects of a file that a run writes, each with `stage`, `step` and what it `needs`.

    A last line without its end is still being written: it is left out and noted. Raises DataError for any other fault.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; give the folder of a run")
    lines: Lines = []
    raw = path.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(raw, start=1):
        if number == len(raw) and not text.endswith(b"\n"):
            notes.append(f"{path.name}:{number} is not whole yet and left out")
            break
        try:
            line = json.loads(text, parse_constant=lambda _: None)  # NaN, which is no JSON
        except ValueError as error:  # bad UTF-8 as well
            raise DataError(f"{path}:{number}: not valid JSON ({error}); fix or remove the line") from error
        missing = [k for k in ("stage", "step", *needs) if not isinstance(line, dict) or k not in line]
        if missing or not isinstance(line["step"], int):
            raise DataError(
                f"{path}:{number}: expected an object with {', '.join(('stage', 'step', *needs))}, got {text[:60]!r}"
            )
        lines.append(line)
    return lines


def read_config(run_dir: Path) -> dict[str, str]:
    """{dotted key: value as text} of RUN_DIR/config.json; empty where there is none of a run."""
    return {k: _text(v) for k, v in flat(_json(run_dir / "config.json").get("config", {})).items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def describe(run: Run) -> dict[str, Any]:
    """All of a run but its rollouts, for the page."""
    names = list(dict.fromkeys(x["stage"] for x in run.metrics))
    stages = {name: _columns([x for x in run.metrics if x["stage"] == name]) for name in names if name != "eval"}
    parts = sorted({k for group in run.rollouts for x in group["rollouts"] for k in x["parts"]})
    return {
        "name": run.name,
        "notes": run.notes,
        "evals": [{k: _short(v) for k, v in x.items()} for x in run.metrics if x["stage"] == "eval"],
        "stages": stages,
        "parts": parts,
        "summary": {k: run.summary[k] for k in SUMMARY if k in run.summary},
        "config": run.config,
        "parent": run.parent and {"name": run.parent[0], "config": run.parent[1]},
        "recorded": len(run.rollouts),
    }


def _columns(lines: Lines) -> dict[str, Any]:
    """{"steps", "columns": {key: values}, "every"}: numbers of a stage, null where a step has none; with seconds by phase as
    `time.PHASE` and tokens a second as `rate.PHASE`."""
    every = math.ceil(len(lines) / POINTS)
    rows = [_numbers(x) for x in lines[(len(lines) - 1) % every :: every]]
    keys = list(dict.fromkeys(k for row in rows for k in row))
    columns = {k: [row.get(k) for row in rows] for k in keys if k != "step"}
    return {"steps": [row["step"] for row in rows], "columns": columns, "every": every}


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: _short(v) for k, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for key, seconds in line.get("time", {}).items():
        phase = key.removesuffix("_s")
        found[f"time.{phase}" if phase != key else key] = seconds
        if seconds > 0 and line.get(f"{phase}_tokens"):
            found[f"rate.{phase}"] = _short(line[f"{phase}_tokens"] / seconds)
    return found


def _short(value: Any) -> Any:
    """A number to eight digits; what is no number in JSON is null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"

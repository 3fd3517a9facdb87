"""What a run writes for people."""

import json

import jax
import numpy as np
import pytest

from lnjax.errors import CheckpointError, DataError
from lnjax.metrics import MetricsLog, clock, write_json
from lnjax.report.curve import plot_run


def lines_of(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_values_and_the_seconds_of_each_phase(tmp_path):
    log = MetricsLog(tmp_path, quiet=True)
    with log.phase("update"):
        pass
    log.log("sft", step=1, values={"loss": 2.5, "update_tokens": 7, "bad": float("nan")})
    log.log("sft", step=2, values={"loss": 2.0, "update_tokens": 5})
    log.close()
    first, second = lines_of(tmp_path)
    assert {k: v for k, v in first.items() if k != "time"} == {
        "stage": "sft",
        "step": 1,
        "loss": 2.5,
        "update_tokens": 7,
        "bad": None,
    }
    assert list(first["time"]) == ["update_s", "compiled"]
    assert second["time"] == {"compiled": 0}
    assert log.tokens == {"sft.update_tokens": 12}


def test_a_line_counts_the_programs_compiled_since_the_last(tmp_path):
    log = MetricsLog(tmp_path, quiet=True)
    double = jax.jit(lambda x: x * 2.0)
    for step, shape in enumerate(((3,), (3,), (5,)), 1):
        double(np.ones(shape))
        log.log("sft", step=step, values={})
    log.close()
    assert [x["time"]["compiled"] for x in lines_of(tmp_path)] == [1, 0, 1]
    assert log.seconds == {}


def test_reopening_keeps_the_lines_of_the_checkpoint_and_no_more(tmp_path):
    log = MetricsLog(tmp_path, quiet=True)
    for step in range(1, 6):
        log.log("sft", step=step, values={"update_tokens": 10})
    log.close()
    again = MetricsLog(tmp_path, keep_lines=3, quiet=True)
    assert again.tokens == {"sft.update_tokens": 30}
    again.log("sft", step=4, values={})
    again.close()
    assert [x["step"] for x in lines_of(tmp_path)] == [1, 2, 3, 4]


def test_a_torn_last_line_is_dropped_but_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "time": {}}\n{"stage": "s')
    MetricsLog(tmp_path, keep_lines=1, quiet=True).close()
    assert len(lines_of(tmp_path)) == 1
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: not a whole JSON line"):
        MetricsLog(tmp_path, keep_lines=2, quiet=True)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_clock_reads_as_hours_minutes_seconds():
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_the_curve_is_drawn_from_metrics_alone(tmp_path):
    with pytest.raises(DataError, match=r"metrics.jsonl: missing"):
        plot_run(tmp_path)
    rows = [{"stage": "eval", "step": 0, "after": "init", "mean": 0.1, "low": 0.0, "high": 0.2, "num_prompts": 9}]
    rows += [{"stage": "sft", "step": i, "loss": 3.0 / i} for i in range(1, 20)]
    rows += [{"stage": "grpo", "step": i, "reward": i / 20} for i in range(1, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    picture = plot_run(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000

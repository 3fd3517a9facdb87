"""What one H100 should reach (random weights, by the project's own bench), a row a test; a row below its target fails with its
figure. The commands are those of BUILD.md: python -m lnjax.bench CASE --shape SHAPE --arms none."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import fleet

pytestmark = [pytest.mark.gpus(1), pytest.mark.timeout(300)]


def speed(row):
    return row["ours_tokens_per_s"] / 1e3


def milliseconds(row):
    return 1e3 * row["ours_s"]


TARGETS = {  # (case, shape, item): its figure, unit (of milliseconds at most so many), target in bfloat16, in FP8
    ("sft-dense", "1b", "step"): (speed, "k tokens/s", 45.0, 50.0),
    ("sft-dense", "3b", "step"): (speed, "k tokens/s", 20.0, 25.0),
    ("sft-dense", "8b-lora", "step"): (speed, "k tokens/s", 16.0, 21.0),
    ("logprob", "8b", "pass"): (speed, "k tokens/s", 30.0, 40.0),
    ("ops", "layer-4096", "layer both"): (milliseconds, "ms", 35.0, 22.6),
    ("ops", "layer-4096", "head both"): (milliseconds, "ms", 50.0, None),
    ("ops", "layer-4096", "attention"): (lambda row: row["ours_flops"] / 1e12, "TFLOP/s", 550.0, None),
    ("decode", "8b", "batch 1"): (lambda row: 1e3 / row["ours_tokens_per_s"], "ms", 7.0, None),
    ("decode", "8b", "batch 256"): (speed, "k tokens/s", 8.0, None),
}
CASES = [(key, matmul) for key, (*_, low) in TARGETS.items() for matmul in (("xla", "fp8") if low else ("xla",))]


@functools.cache
def bench(case, shape, matmul):
    """{item: its row}."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "lnjax.bench", case, "--shape", shape, "--matmul", matmul, "--arms", "none"]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        subprocess.run([*command, "--rounds", "3", "--json", out], check=True, cwd=fleet.ROOT, env=environment)
        return {row["item"]: row for row in json.loads(out.read_text())}


@pytest.mark.parametrize(("key", "matmul"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_row_reaches_its_target(key, matmul):
    figure, unit, wide, narrow = TARGETS[key]
    found, target = figure(bench(*key[:2], matmul)[key[2]]), narrow if matmul == "fp8" else wide
    print(f"{' '.join(key)}, {matmul}: {found:.1f} {unit} (target {target})")
    assert found <= target if unit == "ms" else found >= target, f"{found:.1f} {unit}, target {target}"

"""Rollouts beside updates: the same as one after the other where nothing may be stale, and never staler than allowed."""

import dataclasses
import json
import time

import pytest

from lnjax import source, train
from lnjax.alive import Notice, Watchdog
from lnjax.config import load_config
from lnjax.distributed import Place
from lnjax.rollout.embedded import EmbeddedEngine

pytestmark = pytest.mark.slow


def run(folder, *, steps=6, max_staleness=0):
    c = load_config("tiny_grpo")
    assert c.grpo
    grpo = dataclasses.replace(c.grpo, steps=steps, max_staleness=max_staleness)
    watchdog, notice = Watchdog(Place(), run_dir=folder, c=c.cluster), Notice(Place())
    try:
        train.run(dataclasses.replace(c, sft=None, eval=None, grpo=grpo), folder, watchdog=watchdog, notice=notice)
    finally:
        notice.close()
        watchdog.close(0)
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def test_staleness_zero_gives_the_same_metrics_with_and_without_the_queue(tmp_path, monkeypatch):
    direct = run(tmp_path / "direct")
    inner, asked = source.RolloutSource.__init__, []

    def queued(self, *words, **named):
        asked.append(1)
        inner(self, *words, **named, background=True)

    monkeypatch.setattr(source.RolloutSource, "__init__", queued)
    assert without_times(run(tmp_path / "queued")) == without_times(direct)
    assert asked


@pytest.mark.parametrize(("sample_s", "update_s"), [(0.15, 0.0), (0.0, 0.3)], ids=["slow servers", "slow learner"])
def test_no_token_is_staler_than_allowed_whoever_is_slow(tmp_path, monkeypatch, sample_s, update_s):
    generate, load = EmbeddedEngine.generate, EmbeddedEngine.load_weights

    def slow_generate(self, *words, **named):
        time.sleep(sample_s)
        return generate(self, *words, **named)

    def slow_load(self, *words):
        time.sleep(update_s)
        return load(self, *words)

    monkeypatch.setattr(EmbeddedEngine, "generate", slow_generate)
    monkeypatch.setattr(EmbeddedEngine, "load_weights", slow_load)
    lines = run(tmp_path / "run", steps=12, max_staleness=2)
    stale = [x["staleness_max"] for x in lines]
    assert [x["step"] for x in lines] == list(range(1, 13))
    assert max(stale) <= 2
    assert max(stale) >= 1  # it did run ahead
    assert [x["prompts_taken"] for x in lines] == [8 * i for i in range(1, 13)]


def test_what_sampling_raises_reaches_the_learner(tmp_path, monkeypatch):
    def broken(self, *words, **named):
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(EmbeddedEngine, "generate", broken)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run(tmp_path / "run", max_staleness=1)

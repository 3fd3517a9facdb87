"""The bench: same work on both sides, or no time."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from lnjax.bench.__main__ import difference, main, markdown
from lnjax.bench.ours import Work, train
from lnjax.bench.shapes import conversations, packed, shape
from lnjax.errors import ConfigError
from lnjax.schema import OpsConfig
from tests.fleet import ROOT, build_environment


def test_another_loss_is_no_comparison():
    ours = {"loss": 2.0, "grad_norm": 1.0}
    assert difference(ours, {"loss": 2.00001, "grad_norm": 1.0}, dtype="float32", arm="default") < 1e-4
    with pytest.raises(ConfigError, match=r"default does not do the same work: loss differs by 0\.05"):
        difference(ours, {"loss": 2.1, "grad_norm": 1.0}, dtype="float32", arm="default")
    with pytest.raises(ConfigError, match="grad_norm"):
        difference(ours, {"loss": 2.0, "grad_norm": 1.1}, dtype="float32", arm="default")
    with pytest.raises(ConfigError, match="greedy tokens"):
        difference({"tokens": [[1, 2]]}, {"tokens": [[1, 3]]}, dtype="float32", arm="default")


def test_the_work_is_the_same_every_time_and_ragged():
    s = shape("micro")
    first, again = (conversations(s, seed=3, dense=False) for _ in range(2))
    assert first == again
    sizes = [len(x.token_ids) for batch in first for x in batch]
    assert len(set(sizes)) > 10
    assert max(sizes) <= s.row_tokens
    dense = packed(s, conversations(s, seed=3, dense=True)[0]).batch()
    assert np.asarray(dense.segment_ids_BT == 1).all()


def test_an_unknown_shape_names_those_that_there_are(capsys):
    assert main(["sft", "--shape", "huge", "--arms", "none"]) == 2
    assert "no shape 'huge'; use one of micro, tiny, smollm2" in capsys.readouterr().err


def test_an_arm_that_is_not_there_is_named(capsys):
    assert main(["grpo", "--shape", "micro", "--arms", "vllm"]) == 2
    assert "grpo has no arm 'vllm'; use --arms default or none" in capsys.readouterr().err
    assert main(["sft", "--shape", "micro", "--python", "no/such/python"]) == 2
    assert "no no/such/python; build it with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shape_with_adapters_has_no_arms_and_trains_over_frozen_weights(capsys, tmp_path):
    assert main(["sft", "--shape", "8b-lora", "--python", sys.executable]) == 2
    assert "8b-lora trains adapters, which no arm does; use --arms none" in capsys.readouterr().err
    s = dataclasses.replace(shape("micro"), lora_rank=4, dtype="bfloat16")
    w = Work(s, OpsConfig(), tmp_path, dense=False, shared=False)
    model = w.model()
    adapters, frozen = w.start(model)
    assert set(adapters) == {"lora"}
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    plain = dataclasses.replace(w, shape=dataclasses.replace(s, lora_rank=0))
    assert train(w).first["loss"] == train(plain).first["loss"]


def run(*words):
    command = [sys.executable, "-m", "lnjax.bench", *words, "--shape", "micro", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_packing_and_sharing_are_timed_over_the_same_tokens(tmp_path):
    run("packing", "--json", str(tmp_path / "rows.json"))
    rows = {r["item"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    tokens = {name: r["ours_tokens_per_s"] * r["ours_s"] for name, r in rows.items()}
    assert [*tokens] == ["packed", "padded", "prompts shared", "prompts alone"]
    assert tokens["packed"] == pytest.approx(tokens["padded"])
    assert tokens["prompts shared"] == pytest.approx(tokens["prompts alone"]) == pytest.approx(2 * 2 * (16 + 8))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft", "sft-dense", "logprob", "decode", "grpo", "ops", "sync"])
def test_both_sides_agree_and_are_timed(tmp_path, case):
    build_environment()
    both = "default,steelman"
    arms = {"sft": both, "sync": both, "decode": "default,vllm"}.get(case, "default")  # compiling takes a minute
    out, chart = tmp_path / "rows.json", tmp_path / "chart.svg"
    text = run(case, "--arms", arms, "--json", str(out), "--chart", str(chart))
    rows = json.loads(out.read_text())
    assert {r["arm"] for r in rows} == set(arms.split(","))
    for r in rows:
        assert r["ours_s"] > 0
        assert r["theirs_s"] > 0
        assert r["loss_difference"] <= 0.02
        assert f"| {r['arm']} |" in text
    assert markdown(rows) in text
    assert chart.stat().st_size > 1000

"""Preference losses, reward models and merging: closed forms by hand, data in the published schemas, whole small runs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax import passrate
from lnjax.build import build_scores
from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.load import read_spec
from lnjax.checkpoint.safetensors import SafetensorsFolder
from lnjax.convert import main as convert
from lnjax.data.preferences import RATINGS, arithmetic_pairs, build_comparisons, pack_comparisons
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import ConfigError, DataError
from lnjax.launch import main as launch
from lnjax.learn.preference import bradley_terry_loss, preference_loss, regression_loss, rpo_distance
from lnjax.models.reward import RewardModel
from lnjax.schema import (
    OptimizerConfig,
    PackConfig,
    PreferenceConfig,
    PreferenceDataConfig,
    RewardConfig,
    ScorerConfig,
)
from lnjax.types import PackedBatch, PreferenceBatch
from tests.specs import llama, nemotron
from tests.test_train import run


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def preference(loss="dpo", *, beta=0.5, eta=1.0):
    return PreferenceConfig(
        data=PreferenceDataConfig(source="arithmetic"), loss=loss, beta=beta, eta=eta, steps=1, batch_size=1,
        pack=PackConfig(row_tokens=8, microbatch_rows=1), optimizer=OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip


def batch(*, answers, ref, scores, real=(1.0, 0.0)):
    """One row of two comparisons, the second of them empty unless `real` says so."""
    zeros = jnp.zeros((1, len(answers)), jnp.int32)
    mask = jnp.asarray([[float(a > 0) for a in answers]])
    scores = jnp.asarray([scores], jnp.float32)
    return PreferenceBatch(
        packed=PackedBatch(zeros, zeros, zeros, mask),
        answer_BT=jnp.asarray([answers], jnp.int32),
        last_BPK=jnp.zeros(scores.shape[:3], jnp.int32),
        scores_BPKA=scores,
        real_BP=jnp.asarray([real], jnp.float32),
        ref_logprobs_BT=jnp.asarray([ref], jnp.float32),
    )


LOGPROBS = jnp.asarray([[0.0, -1.0, -2.0, -3.0, -4.0]])
PAIR = batch(answers=[0, 1, 1, 2, 2], ref=[9.0, -1.5, -2.5, -2.0, -4.5], scores=[[[3.0], [1.0]], [[7.0], [0.0]]])
"""Log ratios: 0.5 + 0.5 = 1 for the better answer, -1 + 0.5 = -0.5 for the worse. With beta 0.5 the gap is 0.75."""


def test_dpo_is_minus_log_sigmoid_of_the_implicit_gap_and_leaves_empty_places_out():
    out = preference_loss(LOGPROBS, PAIR, c=preference())
    close(out.total, -math.log(sigmoid(0.75)))
    close(out.count, 1.0)
    close([out.metrics[k] for k in ("tokens", "accuracy", "margin", "best")], [1.0, 1.0, 0.75, 0.5])


def test_dpo_of_the_reference_itself_is_ln_2():
    same = preference_loss(PAIR.ref_logprobs_BT, PAIR, c=preference())
    close(same.total, math.log(2))


def test_the_three_distances_of_rpo_for_a_pair():
    # eta 0.25 makes of the rewards 3 and 1 a gap of 0.5
    p, q = sigmoid(0.75), sigmoid(0.5)
    expected = {
        "rpo_squared": (0.75 - 0.5) ** 2,
        "rpo_forward_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        "rpo_backward_kl": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
    }
    for kind, value in expected.items():
        close(preference_loss(LOGPROBS, PAIR, c=preference(kind, eta=0.25)).total, value)


@pytest.mark.parametrize("kind", ["rpo_squared", "rpo_forward_kl", "rpo_backward_kl"])
def test_rpo_vanishes_where_the_gaps_agree_whatever_the_level(kind):
    implicit = jnp.asarray([[[1.0, 0.0, -2.0]]])
    close(rpo_distance(implicit, implicit + 5.0, kind=kind), [[0.0]])


def test_rpo_of_three_answers():
    implicit, rewards = jnp.asarray([[[1.0, 0.0, 0.0]]]), jnp.asarray([[[0.0, 0.0, 2.0]]])
    close(rpo_distance(implicit, rewards, kind="rpo_squared"), [[(1 + 9 + 4) / 3]])  # gaps 1-0, 1+2, 0+2
    e = math.e
    p, q = np.array([e, 1, 1]) / (e + 2), np.array([1, 1, e * e]) / (2 + e * e)
    close(rpo_distance(implicit, rewards, kind="rpo_forward_kl"), [[(p * np.log(p / q)).sum()]])
    close(rpo_distance(implicit, rewards, kind="rpo_backward_kl"), [[(q * np.log(q / p)).sum()]])


def test_bradley_terry_and_regression_losses():
    scores = jnp.asarray([[[[2.0], [0.5]], [[9.0], [9.0]]]])
    out = bradley_terry_loss(scores, PAIR)
    close([out.total, out.count], [-math.log(sigmoid(1.5)), 1.0])
    rated = batch(answers=[0, 1, 2], ref=[0, 0, 0], scores=[[[4.0, 2.0]], [[1.0, 1.0]]], real=(1.0, 1.0))
    out = regression_loss(jnp.asarray([[[[3.0, 4.0]], [[1.0, 0.0]]]]), rated)
    close([out.total, out.count], [(1 + 4) / 2 + (0 + 1) / 2, 2.0])


HELPSTEER2 = [
    {"prompt": "a?\n\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc?", "response": "poor", **dict.fromkeys(RATINGS, 1)},
    {"prompt": "a?\n\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc?", "response": "good", **dict.fromkeys(RATINGS, 3)},
    {"prompt": "same", "response": "x", **dict.fromkeys(RATINGS, 2)},
    {"prompt": "same", "response": "y", **dict.fromkeys(RATINGS, 2)},
]
HELPSTEER3 = [
    {"context": [{"role": "user", "content": "q"}], "response1": "no", "response2": "yes", "overall_preference": 3},
    {"context": [{"role": "user", "content": "q"}], "response1": "yes", "response2": "no", "overall_preference": -1},
    {"context": [{"role": "user", "content": "q"}], "response1": "so", "response2": "so", "overall_preference": 0},
]
OURS = [
    {"input": "q", "chosen": "yes", "rejected": "no", "chosen_reward": 4.5, "rejected_reward": -1, "reasoning": "on"}
]


def comparisons(path, rows, *, regression=False, max_tokens=200):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in rows))
    c = PreferenceDataConfig(source=str(path))
    tokenizer = load_tokenizer("arithmetic")
    stream = build_comparisons(c, tokenizer, regression=regression, max_tokens=max_tokens, seed=0)

    def text(sample):
        return tokenizer.decode([i for i, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m])

    return [([text(s) for s in x.samples], x.scores) for x in stream.items], stream.items, tokenizer


def test_helpsteer2_rows_are_paired_by_helpfulness_and_ties_left_out(tmp_path):
    found, items, tokenizer = comparisons(tmp_path / "x.jsonl", HELPSTEER2)
    assert found == [(["good", "poor"], ((3.0,), (1.0,)))]
    whole = tokenizer.decode(items[0].samples[0].token_ids, skip_special=False)
    turns = [x.split("<|end_header_id|>") for x in whole.split("<|start_header_id|>")[1:]]
    assert [(role, text.strip()) for role, text in turns] == [
        ("user", "a?<|eot_id|>"), ("assistant", "b<|eot_id|>"), ("user", "c?<|eot_id|>"), ("assistant", "good<|eot_id|>"),
    ]  # fmt: skip


def test_helpsteer2_rows_are_single_rated_answers_for_regression(tmp_path):
    found, _, _ = comparisons(tmp_path / "x.jsonl", HELPSTEER2, regression=True)
    assert found[:2] == [(["poor"], ((1.0,) * 5,)), (["good"], ((3.0,) * 5,))]
    assert len(found) == 4


def test_helpsteer3_preferences_and_rows_of_our_own(tmp_path):
    found, _, _ = comparisons(tmp_path / "x.jsonl", HELPSTEER3 + OURS)
    assert found == [
        (["yes", "no"], ((3.0,), (0.0,))), (["yes", "no"], ((1.0,), (0.0,))), (["yes", "no"], ((4.5,), (-1.0,))),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":2: not valid JSON"),
        ({**HELPSTEER3[0], "overall_preference": 4}, ":2: overall_preference=4, expected a number from -3 to 3"),
        ({**HELPSTEER3[0], "response2": None}, ":2: key `response2` must be a string"),
        ({**HELPSTEER3[0], "context": []}, ":2: key `input` must be a list of messages"),
        ({**HELPSTEER2[0], "verbosity": "high"}, ":2: verbosity='high', expected a number from 0 to 4"),
        (HELPSTEER2[0], ":2: the next row has another prompt"),
        ({**OURS[0], "rejected": ""}, ":2: empty loss mask"),
        ({**OURS[0], "chosen": "y" * 200}, ":2: 222 tokens, but a packed row holds 200"),
    ],
)
def test_a_bad_row_of_preferences_is_named(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        comparisons(tmp_path / "x.jsonl", [HELPSTEER3[0], row])
    assert f"{tmp_path / 'x.jsonl'}{message}" in str(error.value)


def test_generated_pairs_set_a_right_number_against_a_wrong_one_or_a_sentence():
    rows = [row for _, row in arithmetic_pairs(200, seed=0, split="train")]
    for row in rows:
        right, wrong = (row[k].rpartition("</think>")[2] for k in ("chosen", "rejected"))
        assert right == row["args"]["answer"]
        assert wrong == f"it is {right}." or abs(int(wrong) - int(right)) in (1, 10)
        assert row["chosen"].rpartition("</think>")[0] == row["rejected"].rpartition("</think>")[0]
    sentences = sum(row["rejected"].endswith(".") for row in rows)
    assert 60 < sentences < 140


def test_packed_pairs_share_their_prompt_and_lie_in_one_row(tmp_path):
    _, items, _ = comparisons(tmp_path / "x.jsonl", HELPSTEER3[:2] + OURS)
    batches, where = pack_comparisons(items, c=PackConfig(row_tokens=64, microbatch_rows=1, max_segments=2))
    assert len(where) == len(set(where)) == 3
    for item, (row, place) in zip(items, where, strict=True):
        one = batches[row]
        assert one.real_BP[0, place] == 1
        assert one.scores_BPKA[0, place].tolist() == [list(s) for s in item.scores]
        for k, sample in enumerate(item.samples):
            targets = [i for i, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m]
            own = one.answer_BT[0] == 1 + place * 2 + k
            assert one.packed.tokens_BT[0][own].tolist() == targets
            assert one.packed.tokens_BT[0, one.last_BPK[0, place, k]] == targets[-1]
    assert sum(x.real_BP.sum() for x in batches) == 3


@pytest.mark.slow
@pytest.mark.parametrize("make_spec", [llama, nemotron])
def test_a_reward_model_reads_the_last_token_whatever_else_is_in_the_row(make_model, tmp_path, make_spec):
    _, items, _ = comparisons(tmp_path / "x.jsonl", HELPSTEER3[:2] + OURS)
    judge = RewardModel(make_model(make_spec()), 2)
    params = judge.init_params(judge.decoder.init_params(jax.random.key(0), dtype=jnp.float32))
    assert "head" not in params
    params["reward_head"] = jax.random.normal(jax.random.key(1), params["reward_head"].shape)
    wide, where = pack_comparisons(items, c=PackConfig(row_tokens=160, microbatch_rows=1))
    for item, (row, place) in zip(items, where, strict=True):
        scores = judge.scores(params, wide[row].packed, wide[row].last_BPK)[0, place]
        for k, sample in enumerate(item.samples):
            tokens = jnp.asarray([sample.token_ids])
            positions = jnp.arange(tokens.shape[1])[None]
            trunk = {name: x for name, x in params.items() if name != "reward_head"}
            x = judge.decoder.hidden(trunk, tokens, positions, jnp.ones_like(tokens))
            close(scores[k], params["reward_head"] @ x[0, -1], tol=1e-4)


def small(*more):
    words = ["--sft.steps", "4", "--sft.data.num_examples", "200", "--eval.prompts.num_prompts", "8"]
    return [*words, *more]


def lines_of(folder, stage):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "time"} for x in lines if x["stage"] == stage]


@pytest.mark.slow
def test_dpo_begins_at_ln_2_lowers_its_loss_and_resumes_where_it_was(tmp_path):
    def train(name, steps):
        words = small("--preference.steps", str(steps), "--preference.data.num_comparisons", "100")
        run("--config", "tiny_dpo", "--run-dir", tmp_path / name, *words)
        return lines_of(tmp_path / name, "preference")

    whole = train("whole", 8)
    assert abs(whole[0]["loss"] - math.log(2)) < 1e-5
    assert whole[-1]["loss"] < 0.68
    assert whole[-1]["accuracy"] > 0.6
    assert train("parts", 4) == whole[:4]
    assert train("parts", 8) == whole


ONLINE = """import dataclasses
from configs import quickstart, tiny_rpo
from lnjax.schema import OnlineConfig, SamplingConfig
def config():
    q, base = quickstart.config(), tiny_rpo.config()
    prompts = dataclasses.replace(q.grpo.prompts, num_prompts=64)
    data = OnlineConfig(prompts=prompts, samples_per_prompt=3, sampling=SamplingConfig(max_new_tokens=24))
    pack = dataclasses.replace(base.preference.pack, row_tokens=128)
    preference = dataclasses.replace(base.preference, data=data, batch_size=8, pack=pack)
    return dataclasses.replace(base, name="online", preference=preference, engine=q.engine)
"""


@pytest.mark.slow
def test_online_rpo_samples_with_the_weights_of_the_step_starts_at_the_reference_and_resumes_where_it_was(tmp_path):
    config = tmp_path / "online.py"
    config.write_text(ONLINE)

    def train(name, steps):
        run("--config", config, "--run-dir", tmp_path / name, *small("--preference.steps", str(steps)))
        return lines_of(tmp_path / name, "preference")

    whole = train("whole", 6)
    # all implicit rewards are 0 before the first update: KL(given || uniform) of each group, none of equal rewards
    assert whole[0]["margin"] == 0.0
    assert whole[0]["loss"] >= 0.0
    assert [x["comparisons"] for x in whole] == [8.0] * 6
    assert all({"reward", "unfinished", "mixed_groups"} <= x.keys() for x in whole)
    assert train("parts", 3) == whole[:3]
    assert train("parts", 6) == whole


def test_answers_sampled_on_the_way_need_an_rpo_loss_and_a_row_that_holds_them(tmp_path, capfd):
    config = tmp_path / "online.py"
    config.write_text(ONLINE)
    for words, message in (
        (["--preference.loss", "dpo"], "need an rpo loss"),
        (["--preference.data.samples_per_prompt", "1"], "at least 2"),
        (["--preference.pack.row_tokens", "96"], "must fit a row"),
    ):
        assert launch(["--config", str(config), "--dry-run", *words]) == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_reward_model_learns_is_measured_and_scores_the_rollouts_of_another_run(tmp_path):
    words = small("--reward_model.steps", "30", "--reward_model.data.num_comparisons", "300")
    judge = tmp_path / "judge"
    run("--config", "tiny_reward_model", "--run-dir", judge, *words)
    losses = [x["loss"] for x in lines_of(judge, "reward_model")]
    assert abs(losses[0] - math.log(2)) < 1e-6
    assert losses[-1] < 0.65
    measured = json.loads((judge / "summary.json").read_text())
    assert measured["eval"]["reward_model"] > 0.55
    config = tmp_path / "judged.py"
    config.write_text(
        "import dataclasses\nfrom configs import quickstart, tiny_dpo\n"
        "from lnjax.schema import PackConfig, RewardConfig, ScorerConfig\n"
        "def config():\n    q, base = quickstart.config(), tiny_dpo.config()\n"
        f"    scorer = ScorerConfig(source={str(judge)!r}, pack=PackConfig(row_tokens=128, microbatch_rows=8))\n"
        "    prompts = dataclasses.replace(q.grpo.prompts, verifier='reward_model', num_prompts=64)\n"
        "    grpo = dataclasses.replace(q.grpo, steps=1, prompts=prompts)\n"
        "    return dataclasses.replace(base, name='judged', preference=None, grpo=grpo,\n"
        "        reward=RewardConfig(num_workers=1, model=scorer))\n"
    )
    run("--config", config, "--run-dir", tmp_path / "judged", *small())
    (line,) = lines_of(tmp_path / "judged", "grpo")
    assert math.isfinite(line["score"])
    assert 0 <= line["reward"] <= 1
    rates, words = tmp_path / "rates.jsonl", ["--grpo.prompts.num_prompts", "8", "--samples", "1"]
    where = ["--run-dir", str(tmp_path / "rates"), "--out", str(rates), "--model", str(tmp_path / "judged")]
    assert passrate.main(["--config", str(config), *words, *where]) == 0
    assert all(0 <= json.loads(x)["pass_rate"] <= 1 for x in rates.read_text().splitlines())


def test_a_folder_without_a_reward_model_is_refused(tmp_path):
    scorer = ScorerConfig(source=str(tmp_path), pack=PackConfig(row_tokens=8, microbatch_rows=1))
    built: Any = SimpleNamespace(config=SimpleNamespace(reward=RewardConfig(model=scorer)))
    with pytest.raises(ConfigError, match="no reward model; give the folder of a run"):
        build_scores(built, None)


@pytest.fixture
def two_models(make_model, tmp_path):
    model = make_model(nemotron())
    for name, seed in (("a", 0), ("b", 1)):
        params = model.init_params(jax.random.key(seed), dtype=jnp.float32)
        files = load_tokenizer("arithmetic").save
        save_hf(params, spec=model.spec, folder=tmp_path / name, dtype=jnp.float32, finish=files, shard_bytes=60_000)
    return tmp_path


def test_merging_is_linear_tensor_by_tensor_and_keeps_the_files_of_the_first(two_models, capfd):
    words = [str(two_models / x) for x in ("a", "b", "out")]
    assert convert(["merge", *words, "--weight", "0.25", "--dtype", "float32"]) == 0
    a, b, out = (SafetensorsFolder(Path(x)) for x in words)
    assert sorted(out.names()) == sorted(a.names())
    for name in a.names():
        mixed = np.float32(0.75) * a.read(name, ()) + np.float32(0.25) * b.read(name, ())
        assert (out.read(name, ()) == mixed).all()
    assert {p.name for p in (two_models / "out").iterdir()} == {p.name for p in (two_models / "a").iterdir()}
    assert read_spec(words[2]) == nemotron()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "c", "out", "--weight", "0.5"], "lm_head.weight"),
        (["a", "d", "out", "--weight", "0.5"], "tensor lm_head.weight is [160, 32] in"),
        (["a", "b", "out", "--weight", "1.5"], "--weight 1.5: expected 0"),
        (["a", "b", "out"], "--weight '': expected a number"),
        (["a", "b", "b", "--weight", "0.5"], "exists; choose another folder"),
    ],
)
def test_a_merge_that_cannot_be_is_one_line_and_writes_nothing(two_models, make_model, capfd, words, message):
    for name, change in (("c", {"tied_embeddings": True}), ("d", {"vocab_size": 192})):
        model = make_model(nemotron(**change))
        params = model.init_params(jax.random.key(0), dtype=jnp.float32)
        save_hf(params, spec=model.spec, folder=two_models / name, dtype=jnp.float32, finish=lambda folder: None)
    paths = [str(two_models / x) if len(x) == 1 or x == "out" else x for x in words]
    assert convert(["merge", *paths]) == 2
    assert message in capfd.readouterr().err
    assert not (two_models / "out").exists()
    assert not (two_models / "out.tmp").exists()

"""A reward model behind a server: what is sent, what may come back, that no reward is made up; and a real vLLM's scores."""

import json
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.build import build_scores
from lnjax.checkpoint.safetensors import SafetensorsFolder
from lnjax.checkpoint.store import Checkpoints
from lnjax.convert import main as convert
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import ConfigError, RolloutError
from lnjax.mesh import make_mesh
from lnjax.models.decoder import Compute, Model
from lnjax.models.hf import hf_config
from lnjax.models.reward import RewardModel
from lnjax.ops.select import select_ops
from lnjax.rewards import served
from lnjax.rewards.pool import build_reward
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rollout.server import free_port
from lnjax.schema import ClusterConfig, MeshConfig, OpsConfig, PackConfig, RewardConfig, ScorerConfig
from lnjax.score import LocalScorer, ModelScores
from tests import fleet
from tests.specs import llama, nemotron
from tests.test_judge import Stub


def reply(*rows):
    data = [{"index": i, "object": "pooling", "data": row} for i, row in enumerate(rows)]
    return 200, json.dumps({"object": "list", "data": data}).encode()


def sums(body):
    """Two scores of each sequence: the sum of its ids, and its length."""
    return reply(*([float(sum(ids)), len(ids)] for ids in body["input"]))


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE_S", 0.01)
    made = Stub()
    made.answer = sums
    yield made
    made.server.shutdown()
    made.server.server_close()


def scorer(address, **knobs):
    return served.ServedScorer(ScorerConfig(source=address, **{"deadline_s": 5.0, **knobs}), step_deadline_s=60.0)


def built(c) -> Any:
    return SimpleNamespace(config=SimpleNamespace(reward=RewardConfig(model=c), cluster=ClusterConfig()))


def test_token_ids_go_in_as_they_are_and_scores_come_back_in_order(stub, monkeypatch):
    monkeypatch.setenv(served.KEY, "s3cret")
    sequences = [tuple(range(i, 2 * i)) for i in range(1, 40)]
    scores = scorer(stub.address, served_name="judge").scores(sequences)
    assert scores.tolist() == [[sum(ids), len(ids)] for ids in sequences]
    assert [len(body["input"]) for _, _, body in stub.asked].count(served.BATCH) == 2
    for path, key, body in stub.asked:
        assert (path, key, body["model"]) == ("/pooling", "Bearer s3cret", "judge")
        assert (body["task"], body["use_activation"]) == ("classify", False)
    assert sorted(tuple(ids) for _, _, body in stub.asked for ids in body["input"]) == sorted(sequences)


def test_no_more_requests_than_allowed_are_under_way(stub):
    stub.answer = lambda body: (time.sleep(0.05), sums(body))[1]
    scorer(stub.address, concurrency=2).scores([(1,)] * 100)
    assert stub.at_once == 2
    assert all(body["model"] is None for _, _, body in stub.asked)


def test_rewards_are_the_odds_of_weighted_scores_and_an_unfinished_answer_is_not_asked_about(stub):
    c = ScorerConfig(source=stub.address, weights=(0.5, -1.0))
    with build_reward(RewardConfig(num_workers=1, model=c)) as pool:
        reward = build_scores(built(c), pool)
        assert len(stub.asked) == 1, "checked before anything is sampled"
        requests = [
            ScoreRequest("reward_model", {}, False, "x", finished, token_ids=(3, 1, 4)) for finished in (True, False)
        ]
        done, cut = reward.score(requests)
    assert done.parts["score"] == 0.5 * 8 - 3
    assert done.reward == pytest.approx(1 / (1 + math.exp(-1)))
    assert cut.reward == 0.0
    assert stub.asked[-1][2]["input"] == [[3, 1, 4]]
    assert len(stub.asked) == 2


def test_the_first_score_alone_counts_without_weights_and_others_must_be_as_many(stub):
    reward = build_scores(built(ScorerConfig(source=stub.address)), None)
    assert reward.raw([(5, 6), (7,)]) == [11.0, 7.0]
    assert reward.raw([]) == []
    with pytest.raises(ConfigError, match=r"weights has 3 numbers, the model 2 scores"):
        build_scores(built(ScorerConfig(source=stub.address, weights=(1.0, 1.0, 1.0))), None)


@pytest.mark.parametrize("trouble", [(500, b""), (503, b"busy"), (429, b"slow down"), (408, b"")])
def test_a_busy_server_is_asked_again(stub, trouble):
    replies = iter([trouble, trouble])
    stub.answer = lambda body: next(replies, None) or sums(body)
    assert scorer(stub.address).scores([(1, 2)]).tolist() == [[3.0, 2.0]]
    assert len(stub.asked) == 3


def test_a_server_that_comes_back_within_the_deadline_is_waited_for(monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE_S", 0.05)
    port, made = free_port("127.0.0.1"), []

    def start():
        made.append(Stub(port=port))
        made[0].answer = sums

    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        assert scorer(f"http://127.0.0.1:{port}", deadline_s=20.0).scores([(4,)]).tolist() == [[4.0, 1.0]]
    finally:
        timer.join()
        made[0].server.shutdown()
        made[0].server.server_close()


WRONG = {
    "no json": (200, b"<html>"),
    "not utf-8": (200, b"\xff\xfe"),
    "deep": (200, b"[" * 100_000),
    "no data": (200, b'{"probs": []}'),
    "a list": (200, b"[1]"),
    "no rows": reply(),
    "too few rows": reply([1.0, 2.0]),
    "too many rows": reply(*[[1.0, 2.0]] * 3),
    "out of order": (200, b'{"data": [{"index": 1, "data": [1, 2]}, {"index": 0, "data": [1, 2]}]}'),
    "one score": reply([1.0], [1.0]),
    "three scores": reply([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    "unequal": reply([1.0, 2.0], [1.0]),
    "no score": reply([], []),
    "nan": reply([1.0, 2.0], [math.nan, 2.0]),
    "infinite": reply([1.0, 2.0], [math.inf, 2.0]),
    "null": reply([1.0, 2.0], [None, 2.0]),
    "text": reply([1.0, 2.0], ["3.0", 2.0]),
    "truth": reply([1.0, 2.0], [True, 2.0]),
    "a bare number": reply(1.0, 2.0),
    "a score a token": reply([[1.0, 2.0]], [[1.0, 2.0]]),
    "huge": (200, b'{"data": [{"index": 0, "data": [1, 2]}, {"index": 1, "data": [1, 1' + b"0" * 400 + b"]}]}"),
}


@pytest.mark.parametrize("trouble", WRONG)
def test_what_is_no_score_ends_the_run_and_says_what_was_expected(stub, trouble):
    asker = scorer(stub.address)
    asker.check()
    stub.answer = lambda body: WRONG[trouble]
    with pytest.raises(RolloutError) as caught:
        asker.scores([(1,), (2,)])
    text = str(caught.value)
    assert stub.address in text and "--reward.model.source" in text and "resumes the run" in text
    assert "malformed reply" in text or "expected 2 finite numbers for each of 2 sequences" in text
    assert len(stub.asked) == 2


def test_a_refusal_is_not_sent_again_and_shows_the_server_s_words(stub):
    stub.answer = lambda body: (400, b'{"error": "This model\'s maximum context length is 512"}')
    with pytest.raises(RolloutError, match=r"refused with status 400: .*maximum context length is 512"):
        scorer(stub.address).scores([(1,)])
    assert len(stub.asked) == 1


def test_an_outage_ends_the_run_at_its_deadline_however_many_wait():
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"deadline of 0\.5 s passed, last: ConnectError") as caught:
        scorer(address, deadline_s=0.5, concurrency=2).scores([(1,)] * 200)
    assert time.monotonic() - start < 3
    assert address in str(caught.value)


def test_a_server_that_hangs_ends_the_run_at_its_deadline(stub):
    release = threading.Event()
    stub.answer = lambda body: (release.wait(20), sums(body))[1]
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"deadline of 0\.4 s passed, last: no reply"):
        scorer(stub.address, deadline_s=0.4).scores([(1,)])
    assert time.monotonic() - start < 3
    release.set()


def test_the_first_request_does_not_wait_as_long_as_a_step_may(monkeypatch):
    monkeypatch.setattr(served, "CHECK_S", 0.3)
    address = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(RolloutError, match=r"deadline of 0\.3 s"):
        build_scores(built(ScorerConfig(source=address)), None)


def test_process_0_alone_asks(stub, monkeypatch):
    heard = []
    monkeypatch.setattr(served, "from_first", lambda name, make, deadline_s: heard.append(name) or [[7.0, 1.0]])
    asker = scorer(stub.address)
    assert asker.check() == 2
    assert asker.scores([(1,)]).tolist() == [[7.0, 1.0]]
    assert (heard, stub.asked) == (["reward model"] * 2, [])


def test_an_address_that_is_none_is_a_config_error_and_a_folder_needs_rows(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.model\.source=http://host:port: .*expected http://host:port"):
        scorer("http://host:port")
    judge_run(tmp_path / "run", RewardModel(model_of(llama()), 1))
    with pytest.raises(ConfigError, match=r"needs reward\.model\.pack"):
        build_scores(built(ScorerConfig(source=str(tmp_path / "run"))), None)


def model_of(spec):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return Model(spec, Compute(select_ops(OpsConfig(), mesh=mesh), jnp.dtype("float32")))


def judge_run(folder, model):
    """Parameters with a random head, saved as a run whose last stage is a reward model leaves them."""
    params = model.init_params(model.decoder.init_params(jax.random.key(0), dtype=jnp.float32))
    params["reward_head"] = jax.random.normal(jax.random.key(1), params["reward_head"].shape)
    store = Checkpoints(folder / "checkpoints", keep=1)
    described = {**hf_config(model.decoder.spec, dtype="float32"), "num_labels": model.num_scores}
    store.save({"params": params}, extra={"model": described})
    store.close()
    (folder / "tokenizer").mkdir()
    load_tokenizer("arithmetic").save(folder / "tokenizer")
    return params


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_exported_with_its_head_and_without_the_decoder_s(tmp_path, tied):
    model = RewardModel(model_of(llama(tied_embeddings=tied)), 3)
    params = judge_run(tmp_path / "run", model)
    assert convert(["orbax", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["num_labels"]) == (["LlamaForSequenceClassification"], 3)
    tensors = SafetensorsFolder(tmp_path / "hf")
    assert "lm_head.weight" not in tensors.names()
    whole = (slice(None), slice(None))
    np.testing.assert_array_equal(tensors.read("score.weight", whole), params["reward_head"])
    np.testing.assert_array_equal(tensors.read("model.embed_tokens.weight", whole), params["embed"])


def test_a_reward_model_that_is_no_plain_llama_is_not_exported(tmp_path, capfd):
    judge_run(tmp_path / "run", RewardModel(model_of(nemotron()), 1))
    assert convert(["orbax", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "only one over a plain Llama" in capfd.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_scores", [1, 3])
def test_a_real_vllm_gives_the_scores_that_this_process_gives(tmp_path, num_scores):
    fleet.build_environment()
    model = RewardModel(model_of(fleet.served_llama()), num_scores)
    params = judge_run(tmp_path / "run", model)
    assert convert(["orbax", str(tmp_path / "run"), str(tmp_path / "model"), "--dtype", "float32"]) == 0
    weights = (1.0, -0.5, 2.0)[:num_scores]
    local = LocalScorer(model, params, pack=PackConfig(row_tokens=512, microbatch_rows=2))
    draw = np.random.default_rng(0)
    sequences = [tuple(map(int, draw.integers(3, 128, size))) for size in (1, 2, 5, 17, 64, 65, 200, 500)] * 3
    ours = ModelScores(None, local, weights=weights).raw(sequences)
    assert max(ours) - min(ours) > 1, "scores that a constant would not meet"
    with fleet.serving(tmp_path / "model", "--runner", "pooling", "--max-model-len", "512") as address:
        c = ScorerConfig(source=address, weights=weights, served_name="judge")
        theirs = build_scores(built(c), None).raw(sequences)
        np.testing.assert_allclose(theirs, ours, atol=1e-3)
        with pytest.raises(RolloutError, match=r"refused with status 404.*another.*reward\.model\.served-name"):
            build_scores(built(ScorerConfig(source=address, served_name="another")), None)
        with pytest.raises(RolloutError, match=r"refused with status 400.*512"):
            build_scores(built(c), None).raw([(5,) * 600])

"""The embedded engine: what it samples depends on the prompt and the seed alone, and the learner agrees on its logprobs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax import metrics
from lnjax.errors import ConfigError, RolloutError
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.schema import EmbeddedConfig, MeshConfig
from lnjax.types import Prompt, SamplingParams
from tests.specs import llama, nemotron

CONFIG = EmbeddedConfig(num_slots=8, max_len=64, decode_chunk=4, prefill_rows=8, prefill_multiple=16, dtype="float32")
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=20, stop_token_ids=(2, 7))


def prompts(count):
    rng = np.random.default_rng(0)
    return [
        Prompt(f"p/{i}", tuple(rng.integers(3, 160, int(rng.integers(2, 30))).tolist()), "integer", {})
        for i in range(count)
    ]


def engine_of(model, c=CONFIG, params=None):
    params = model.init_params(jax.random.key(0), dtype=jnp.float32) if params is None else params
    engine = EmbeddedEngine(model, c=c, key=jax.random.key(5))
    engine.load_weights(3, params)
    return engine, params


@pytest.fixture(scope="module")
def wide(make_model):
    """Weights far from uniform, so that a mistake shows."""
    model = make_model(nemotron(initializer_range=0.3))
    return model, *engine_of(model)


@pytest.fixture(scope="module")
def rollouts(wide):
    _, engine, _ = wide
    return engine.generate(prompts(6), num_samples=3, sampling=SAMPLING, seed=11)


def test_groups_come_back_in_order_with_versions_and_whole_endings(rollouts):
    assert [len(g) for g in rollouts] == [3] * 6
    for c in (c for g in rollouts for c in g):
        assert set(c.versions) == {3}
        assert c.finished == (c.token_ids[-1] in (2, 7))
        assert c.finished or len(c.token_ids) == 20
        assert not set(c.token_ids[:-1]) & {2, 7}
        assert all(p <= 0 for p in c.logprobs)
    assert len({c.token_ids for g in rollouts for c in g}) > 12
    assert any(c.finished for g in rollouts for c in g)


def test_the_same_sample_comes_out_whatever_else_is_in_the_batch(wide, rollouts):
    _, engine, _ = wide
    few = engine.generate(prompts(6)[4:5], num_samples=2, sampling=SAMPLING, seed=11)
    assert few == [rollouts[4][:2]]
    shuffled = engine.generate(prompts(6)[::-1], num_samples=3, sampling=SAMPLING, seed=11)
    assert [[c.token_ids for c in g] for g in shuffled[::-1]] == [[c.token_ids for c in g] for g in rollouts]
    assert engine.generate(prompts(6)[4:5], num_samples=2, sampling=SAMPLING, seed=12) != few


def test_the_learner_agrees_with_the_engine_on_every_logprob(wide, rollouts):
    model, _, params = wide
    drifts = []
    score = jax.jit(model.logprobs)
    for prompt, group in zip(prompts(6), rollouts, strict=True):
        for c in group:
            tokens = np.zeros((1, 64), np.int32)
            size = len(prompt.token_ids) + len(c.token_ids)
            tokens[0, :size] = prompt.token_ids + c.token_ids
            positions = np.arange(64, dtype=np.int32)[None]
            out = score(params, tokens, positions, (positions < size).astype(np.int32))
            drifts += (np.asarray(out.logprobs_BT)[0, len(prompt.token_ids) : size] - np.asarray(c.logprobs)).tolist()
    drift = np.asarray(drifts)
    assert np.exp(np.abs(drift)).mean() <= 1.0001
    assert (np.exp(drift) - 1 - drift).mean() < 1e-8


def test_nothing_compiles_after_warm_up(wide):
    _, engine, params = wide
    engine.generate(prompts(6), num_samples=3, sampling=SAMPLING, seed=1)
    before = metrics._compiled
    for seed in range(2, 5):
        engine.load_weights(seed, params)
        engine.generate(prompts(6), num_samples=3, sampling=SAMPLING, seed=seed)
    assert metrics._compiled == before


def test_a_prompt_is_prefilled_once_for_its_whole_group(wide, monkeypatch):
    _, engine, _ = wide
    calls = []
    real = engine._prefill
    monkeypatch.setattr(engine, "_prefill", lambda *a: calls.append(1) or real(*a))
    engine.generate(prompts(6), num_samples=16, sampling=SAMPLING, seed=1)
    assert len(calls) == 1


@pytest.mark.slow
def test_eight_devices_sample_the_same_tokens(make_model, wide, rollouts):
    model = make_model(nemotron(initializer_range=0.3), mesh=MeshConfig(fsdp=4, tensor=2), devices=8)
    engine, _ = engine_of(model)
    got = engine.generate(prompts(6), num_samples=3, sampling=SAMPLING, seed=11)
    assert [[c.token_ids for c in g] for g in got] == [[c.token_ids for c in g] for g in rollouts]


@pytest.mark.parametrize("drafts", [0, 2])
def test_devices_with_slots_of_their_own_exchange_one_number_a_step(make_model, drafts):
    model = make_model(llama(), mesh=MeshConfig(data=8, fsdp=1), devices=8)
    engine, _ = engine_of(model, dataclasses.replace(CONFIG, speculate=drafts))
    program = engine._decode.lower(engine._weights, engine._empty_slots(64), sampling=SAMPLING).compile().as_text()
    moved = [x for x in program.splitlines() if "_run_decode)/while/" in x and "{'data'}" in x]  # within the loop
    assert len(moved) == 1, moved
    assert " all-reduce(" in moved[0]
    assert "s32[] " in moved[0]


@pytest.mark.slow
def test_greedy_decoding_follows_the_most_likely_token(make_model):
    model = make_model(llama(initializer_range=0.3))
    engine, params = engine_of(model)
    greedy = dataclasses.replace(SAMPLING, temperature=0.0, max_new_tokens=6, stop_token_ids=())
    prompt = prompts(1)[0]
    [[got]] = engine.generate([prompt], num_samples=1, sampling=greedy, seed=0)
    ids = list(prompt.token_ids)
    for token in got.token_ids:
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(ids)] = ids
        assert int(model.logits(params, jnp.asarray(padded))[0, len(ids) - 1].argmax()) == token
        ids.append(token)


def test_requests_it_cannot_serve_are_named(make_model):
    model = make_model(llama())
    engine = EmbeddedEngine(model, c=CONFIG, key=jax.random.key(0))
    with pytest.raises(RolloutError, match="before load_weights"):
        engine.generate(prompts(1), num_samples=1, sampling=SAMPLING, seed=0)
    engine, _ = engine_of(model)
    long = Prompt("p/long", (5,) * 50, "integer", {})
    with pytest.raises(RolloutError, match=r"prompt p/long: 50 tokens and 20 new ones make 70, the cache holds 64"):
        engine.generate([long], num_samples=1, sampling=SAMPLING, seed=0)
    wide_mesh = make_model(llama(), mesh=MeshConfig(fsdp=8), devices=8)
    with pytest.raises(ConfigError, match=r"engine.num_slots"):
        EmbeddedEngine(wide_mesh, c=dataclasses.replace(CONFIG, num_slots=6), key=jax.random.key(0))

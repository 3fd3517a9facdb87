"""Speculation changes how fast tokens come, never which: not a greedy one, not the distribution, not a seed's sample."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

from lnjax import metrics
from lnjax.errors import ConfigError
from lnjax.rollout import embedded
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.rollout.speculate import accept, cut, propose
from lnjax.schema import EmbeddedConfig, MeshConfig, uniform_blocks
from lnjax.types import Prompt, SamplingParams
from tests.specs import llama, nemotron

PLAIN = EmbeddedConfig(num_slots=8, max_len=96, decode_chunk=6, prefill_rows=4, prefill_multiple=16, dtype="float32")
DRAFTS = dataclasses.replace(PLAIN, speculate=3, ngram=2)
SAMPLING = SamplingParams(temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=40, stop_token_ids=(2, 7))
GREEDY = dataclasses.replace(SAMPLING, temperature=0.0, top_p=1.0)


def prompts():
    """Three that repeat themselves, three at random."""
    rng = np.random.default_rng(0)
    loops = [rng.integers(3, 16, 4).tolist() * 6 for _ in range(3)]
    random = [rng.integers(3, 16, int(rng.integers(1, 30))).tolist() for _ in range(3)]
    return [Prompt(f"p/{i}", tuple(ids), "integer", {}) for i, ids in enumerate(loops + random)]


def engine_of(model, c, params):
    engine = EmbeddedEngine(model, c=c, key=jax.random.key(5))
    engine.load_weights(3, params)
    return engine


def accepted(engine):
    return engine.report()["speculation"]["accepted_per_step"]


@pytest.fixture(scope="module")
def pair(make_model):
    """(model, weights, engine without drafts, engine with them); 16 tokens, far from uniform."""
    model = make_model(nemotron(vocab_size=16, initializer_range=0.5))
    params = model.init_params(jax.random.key(1), dtype=jnp.float32)
    return model, params, engine_of(model, PLAIN, params), engine_of(model, DRAFTS, params)


def test_a_draft_is_what_followed_the_last_earlier_place_of_the_final_tokens():
    rows = [
        ([1, 2, 3, 9, 1, 2, 4, 5, 6, 1, 2], 11, [4, 5, 6]),  # the last of two places
        ([1, 2, 3, 1, 2, 9, 9, 9, 9, 9, 9], 5, [3, 1, 2]),  # what lies behind the length is not read
        ([8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0], 3, [8, 8, 8]),  # a loop goes on round and round
        ([5, 6, 5, 6, 5, 1, 1, 1, 1, 1, 1], 5, [6, 5, 6]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 5], 11, [-1, -1, -1]),  # no such place
        ([4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4], 2, [-1, -1, -1]),  # too short
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1, [-1, -1, -1]),
    ]
    history, length, want = (jnp.asarray(x) for x in zip(*rows, strict=True))
    assert propose(history, length, count=3, ngram=2).tolist() == want.tolist()
    assert propose(history[:2, :2], length[:2], count=2, ngram=2).tolist() == [[-1, -1]] * 2
    assert propose(jnp.asarray([[7, 1, 7, 2, 7]]), jnp.asarray([5]), count=4, ngram=1).tolist() == [[2, 7, 2, 7]]


def test_drafts_stand_up_to_the_first_that_was_not_sampled():
    tokens = jnp.asarray([[4, 5, 6], [4, 5, 6], [4, 5, 6], [4, 5, 6]])
    assert accept(tokens, jnp.asarray([[4, 5], [4, 9], [9, 5], [-1, -1]])).tolist() == [2, 1, 0, 0]
    assert accept(tokens[:, :1], jnp.zeros((4, 0), jnp.int32)).tolist() == [0] * 4


def test_nothing_is_kept_behind_a_stop_token_or_the_budget():
    tokens = jnp.asarray([[4, 2, 6], [4, 2, 6], [4, 5, 2], [4, 5, 6], [4, 2, 2]])
    num, left = jnp.asarray([3, 1, 2, 3, 3]), jnp.asarray([9, 9, 9, 2, 1])
    kept, ended = cut(tokens, num, stops=jnp.asarray([2, 7]), left_S=left)
    assert kept.tolist() == [2, 1, 2, 2, 1]
    assert ended.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("sampling", [GREEDY, dataclasses.replace(SAMPLING, top_k=8)])
def test_every_sample_of_a_seed_is_that_of_the_engine_without_drafts(pair, sampling):
    _, _, plain, drafts = pair
    want = plain.generate(prompts(), num_samples=5, sampling=sampling, seed=11)
    got = drafts.generate(prompts(), num_samples=5, sampling=sampling, seed=11)
    want, got = ([c for group in x for c in group] for x in (want, got))
    for a, b in zip(want, got, strict=True):
        assert (a.token_ids, a.versions, a.finished) == (b.token_ids, b.versions, b.finished)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert accepted(drafts) > 0
    assert any(c.finished for c in got)
    assert all(c.finished == (c.token_ids[-1] in (2, 7)) for c in got)
    assert all(c.finished or len(c.token_ids) == 40 for c in got)
    assert all(not set(c.token_ids[:-1]) & {2, 7} for c in got)


def test_a_sample_with_drafts_depends_on_its_prompt_and_seed_alone(pair):
    _, _, _, drafts = pair
    whole = drafts.generate(prompts(), num_samples=3, sampling=SAMPLING, seed=4)
    assert drafts.generate(prompts()[1:2], num_samples=2, sampling=SAMPLING, seed=4) == [whole[1][:2]]
    assert drafts.generate(prompts(), num_samples=3, sampling=SAMPLING, seed=5) != whole


def test_accepted_drafts_save_steps_and_budgets_hold_to_the_last_place_of_the_cache(make_model):
    """All weights zero: greedy tokens are all 0, so that every draft of the loop stands."""
    model = make_model(llama())
    params = jax.tree.map(jnp.zeros_like, model.init_params(jax.random.key(0), dtype=jnp.float32))
    engine = engine_of(model, DRAFTS, params)
    prompt = Prompt("p/full", (5,) * 9, "integer", {})
    budget = dataclasses.replace(GREEDY, max_new_tokens=87, stop_token_ids=())
    [[got]] = engine.generate([prompt], num_samples=1, sampling=budget, seed=0)
    assert got.token_ids == (0,) * 87
    assert got.versions == (3,) * 87
    # Three steps of one token until two final zeros have an earlier place, then four tokens a step.
    assert accepted(engine) == pytest.approx(87 / (3 + 84 / 4) - 1)
    [[got]] = engine.generate([prompt], num_samples=1, sampling=dataclasses.replace(budget, max_new_tokens=1), seed=0)
    assert got.token_ids == (0,)


def test_the_learner_agrees_on_every_logprob_of_accepted_tokens(pair):
    model, params, _, drafts = pair
    score = jax.jit(model.logprobs)
    got = drafts.generate(prompts(), num_samples=2, sampling=dataclasses.replace(SAMPLING, top_p=1.0), seed=2)
    for prompt, group in zip(prompts(), got, strict=True):
        for c in group:
            tokens = np.zeros((1, 96), np.int32)
            start, size = len(prompt.token_ids), len(prompt.token_ids) + len(c.token_ids)
            tokens[0, :size] = prompt.token_ids + c.token_ids
            positions = np.arange(96, dtype=np.int32)[None]
            out = score(params, tokens, positions, (positions < size).astype(np.int32))
            np.testing.assert_allclose(np.asarray(out.logprobs_BT)[0, start:size], c.logprobs, atol=1e-4)


def test_nothing_compiles_after_warm_up_with_drafts(pair):
    _, params, _, drafts = pair
    for seed in range(1, 5):  # how far accepted drafts carry decides which cache windows a seed meets
        drafts.generate(prompts(), num_samples=3, sampling=SAMPLING, seed=seed)
    before = metrics._compiled
    for seed in range(5, 8):
        drafts.load_weights(3, params)
        drafts.generate(prompts(), num_samples=3, sampling=SAMPLING, seed=seed)
    assert metrics._compiled == before


@pytest.mark.slow
def test_eight_devices_accept_the_same_drafts(make_model, pair):
    _, params, _, drafts = pair
    want = drafts.generate(prompts(), num_samples=2, sampling=SAMPLING, seed=9)
    model = make_model(nemotron(vocab_size=16, initializer_range=0.5), mesh=MeshConfig(fsdp=4, tensor=2), devices=8)
    engine = engine_of(model, DRAFTS, jax.device_put(params, model.shardings()))
    got = engine.generate(prompts(), num_samples=2, sampling=SAMPLING, seed=9)
    assert [[c.token_ids for c in g] for g in got] == [[c.token_ids for c in g] for g in want]
    assert accepted(engine) > 0


def test_knobs_that_make_no_sense_are_named(make_model):
    model = make_model(llama())
    for change, message in (({"speculate": -1}, "engine.speculate is -1"), ({"ngram": 0}, "engine.ngram is 0")):
        with pytest.raises(ConfigError, match=message):
            EmbeddedEngine(model, c=dataclasses.replace(PLAIN, **change), key=jax.random.key(0))


# The distribution: 20,480 samples of four tokens, against the exact one and against the engine without drafts.

LOOP = Prompt("p/loop", (3, 1, 3, 1, 1, 1, 1, 1), "integer", {})  # what this model says when it is greedy
NUM_SAMPLES, NUM_TOKENS, VOCAB = 20480, 4, 16
MANY = EmbeddedConfig(
    num_slots=1024,
    max_len=16,
    decode_chunk=4,
    prefill_rows=1,
    prefill_multiple=16,
    dtype="float32",
    speculate=3,
    ngram=1,
)
NUCLEUS = SamplingParams(temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=NUM_TOKENS, stop_token_ids=())


def draw(model, params, *, seed, speculate=3):
    """[NUM_SAMPLES, NUM_TOKENS], and the accepted drafts a step."""
    engine = engine_of(model, dataclasses.replace(MANY, speculate=speculate), params)
    [group] = engine.generate([LOOP], num_samples=NUM_SAMPLES, sampling=NUCLEUS, seed=seed)
    return np.asarray([c.token_ids for c in group]), accepted(engine) if speculate else 0.0


def exact_pairs(model, params):
    """[position][V, V]: the exact joint distribution of tokens 0-1, 1-2 and 2-3, nucleus and all, written out in numpy."""
    context = np.stack(np.unravel_index(np.arange(VOCAB**3), (VOCAB,) * 3), axis=1)
    tokens = np.concatenate([np.tile(LOOP.token_ids, (len(context), 1)), context], axis=1)
    logits = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens, jnp.int32)))[:, len(LOOP.token_ids) - 1 :]
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, -1)
    np.put_along_axis(p, order, np.where(ranked.cumsum(-1) - ranked < 0.9, ranked, 0), -1)
    p = (p / p.sum(-1, keepdims=True)).reshape(VOCAB, VOCAB, VOCAB, NUM_TOKENS, VOCAB)
    two = p[0, 0, 0, 0][:, None] * p[:, 0, 0, 1]
    three = two[..., None] * p[:, :, 0, 2]
    four = three[..., None] * p[:, :, :, 3]
    return [two, three.sum(0), four.sum((0, 1))]


def p_values(got, pairs, plain):
    """Of tests that consecutive pairs of tokens are as exact, and as from the engine without drafts; rare pairs as one."""
    out = []
    for i, pair in enumerate(pairs):
        expected = pair.ravel() * NUM_SAMPLES
        often = expected >= 10
        seen, other = (np.bincount(x[:, i] * VOCAB + x[:, i + 1], minlength=VOCAB**2) for x in (got, plain))
        seen, other, expected = (np.append(x[often], x[~often].sum()) for x in (seen, other, expected))
        out.append(chisquare(seen, np.maximum(expected, 1e-6) * seen.sum() / np.maximum(expected, 1e-6).sum())[1])
        both = np.stack([seen, other])
        out.append(chi2_contingency(both[:, both.sum(0) > 0])[1])
    return out


@pytest.fixture(scope="module")
def tiny(make_model):
    model = make_model(llama(vocab_size=VOCAB, initializer_range=0.3))
    params = model.init_params(jax.random.key(1), dtype=jnp.float32)
    plain, _ = draw(model, params, seed=1, speculate=0)
    return model, params, exact_pairs(model, params), plain


def test_samples_with_drafts_follow_the_exact_distribution(tiny):
    model, params, pairs, plain = tiny
    got, stood = draw(model, params, seed=2)
    assert 0.1 < stood < 2  # some drafts stand, some do not
    assert min(p_values(got, pairs, plain)) > 1e-3


def test_the_check_of_the_distribution_catches_drafts_that_always_stand(tiny, monkeypatch):
    model, params, pairs, plain = tiny
    monkeypatch.setattr(embedded, "accept", lambda tokens, draft: jnp.where(draft[:, 0] >= 0, draft.shape[1], 0))
    got, _ = draw(model, params, seed=2)
    assert min(p_values(got, pairs, plain)) < 1e-12


def goes_round(model):
    """Weights of a model as large as `model.spec` that goes round the tokens 8 to 23: its blocks compute and add nothing, the
    head's row of a token is the embedding of the one before."""
    params = model.init_params(jax.random.key(0), dtype=jnp.float32)
    for run in params["runs"].values():
        run["attention"]["o"], run["ffn"]["down"] = (
            jnp.zeros_like(run[a][b]) for a, b in (("attention", "o"), ("ffn", "down"))
        )
    before = jnp.arange(model.spec.vocab_size) - 1
    return params | {"head": params["embed"][before.at[8].set(23)]}


@pytest.mark.slow
def test_a_model_that_goes_round_in_a_loop_is_faster_with_drafts(make_model, capsys):
    """Of a size whose weights are read from memory at every step: what a small one takes is the engine's own time."""
    blocks = uniform_blocks(num_layers=4, num_kv_heads=4, ffn=3072)
    model = make_model(llama(d_model=1024, num_heads=16, head_dim=64, blocks=blocks, tied_embeddings=False))
    params = goes_round(model)
    asked = [Prompt("p/0", tuple(8 + i % 16 for i in range(48)), "integer", {})]
    c = EmbeddedConfig(num_slots=1, max_len=192, decode_chunk=32, prefill_rows=1, dtype="float32")
    engines = {k: engine_of(model, dataclasses.replace(c, speculate=k), params) for k in (0, 4, 8)}
    greedy, times, found = SamplingParams(0.0, 1.0, 0, 128, ()), {k: [] for k in engines}, {}
    for turn in range(4):
        for k, engine in engines.items():
            start = time.perf_counter()
            found[k] = engine.generate(asked, num_samples=1, sampling=greedy, seed=0)
            times[k] += [time.perf_counter() - start] * (turn > 0)
    assert found[4][0][0].token_ids == found[8][0][0].token_ids == found[0][0][0].token_ids
    gains = {k: statistics.median(times[0]) / statistics.median(times[k]) for k in (4, 8)}
    with capsys.disabled():
        print(f"speed-up with drafts of 4 and 8: {gains[4]:.2f}, {gains[8]:.2f}; accepted a step: "
              f"{accepted(engines[4]):.1f}, {accepted(engines[8]):.1f}")  # fmt: skip
    assert accepted(engines[8]) > 3
    assert min(gains.values()) > 1.5

"""Losses and advantages against numbers worked out by hand; the update step's invariants."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lnjax import grpo, sft
from lnjax.config import load_config
from lnjax.errors import TrainingDiverged
from lnjax.grpo import pack_part
from lnjax.health import check_update
from lnjax.learn.advantage import group_advantages, loss_weight
from lnjax.learn.loss import grpo_loss, kl_penalty, policy_loss, sft_loss
from lnjax.learn.optimizer import adamw, clip_scale, init_adam, learning_rate
from lnjax.learn.update import Updater
from lnjax.mesh import put_rows
from lnjax.models import decoder
from lnjax.planner.compiled import abstract_batch
from lnjax.schema import AdvantageConfig, GrpoLossConfig, MeshConfig, OptimizerConfig, PackConfig
from lnjax.types import PackedBatch, RlBatch, Sample
from tests.specs import llama, nemotron

PLAIN = AdvantageConfig(baseline="group_mean", normalize_std=False)


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def test_group_mean_and_leave_one_out_baselines():
    rewards, finished = [1.0, 0.0, 0.0, 0.5], [True] * 4
    close(group_advantages(rewards, finished, c=PLAIN), [0.625, -0.375, -0.375, 0.125])
    loo = dataclasses.replace(PLAIN, baseline="leave_one_out")
    close(group_advantages(rewards, finished, c=loo), [1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3])


def test_std_normalisation_uses_the_peers_and_is_left_out_where_it_is_zero():
    loo = AdvantageConfig(baseline="leave_one_out", normalize_std=True)
    got = group_advantages([1.0, 0.0, 0.0], [True] * 3, c=loo)
    close(got, [1.0, -0.5 / np.std([1.0, 0.0], ddof=1), -0.5 / np.std([1.0, 0.0], ddof=1)])
    close(group_advantages([1.0, 1.0], [True, True], c=loo), [0.0, 0.0])


def test_unfinished_samples_stay_out_of_the_leave_one_out_baseline_and_can_be_filtered():
    loo = AdvantageConfig(baseline="leave_one_out", normalize_std=False)
    close(group_advantages([1.0, 0.0, 0.0], [True, True, False], c=loo), [1.0, -1.0, -0.5])
    filtered = dataclasses.replace(loo, overlong_filter=True)
    close(group_advantages([1.0, 0.0, 0.0], [True, True, False], c=filtered), [1.0, -1.0, 0.0])
    close(group_advantages([1.0, 0.0, 0.0], [True, False, False], c=filtered), [0.0, 0.0, 0.0])


def test_token_weights_of_the_three_aggregations():
    assert loss_weight(num_tokens=4, aggregation="token_mean", max_new_tokens=10) == (1.0, 4.0)
    assert loss_weight(num_tokens=4, aggregation="sequence_mean", max_new_tokens=10) == (0.25, 1.0)
    assert loss_weight(num_tokens=4, aggregation="dr_grpo", max_new_tokens=10) == (0.1, 1.0)


def test_the_three_kl_estimators():
    current, ref = jnp.array([-1.0]), jnp.array([-1.5])
    close(kl_penalty(current, ref, estimator="k1"), [0.5])
    close(kl_penalty(current, ref, estimator="k2"), [0.125])
    close(kl_penalty(current, ref, estimator="k3"), [math.exp(-0.5) - 1 + 0.5])


def test_the_clipped_surrogate_its_higher_bound_and_the_dual_clip():
    c = GrpoLossConfig(clip_low=0.2, clip_high=0.3)
    ratio, advantages = jnp.array([2.0, 1.25, 0.5, 0.5, 5.0]), jnp.array([1.0, 1.0, 1.0, -1.0, -1.0])
    close(policy_loss(ratio, advantages, c), [-1.3, -1.25, -0.5, 0.8, 5.0])
    close(policy_loss(ratio, advantages, dataclasses.replace(c, dual_clip=3.0)), [-1.3, -1.25, -0.5, 0.8, 3.0])


def rl_batch(*, sampler, old, ref, advantages, mask, weights, count, on_policy):
    def row(x):
        return jnp.asarray([x], jnp.float32)

    zeros = jnp.zeros((1, len(mask)), jnp.int32)
    return RlBatch(
        packed=PackedBatch(zeros, zeros, zeros, row(mask)),
        advantages_BT=row(advantages),
        weights_BT=row(weights),
        count_B=jnp.asarray([count], jnp.float32),
        sampler_logprobs_BT=row(sampler),
        old_logprobs_BT=row(old),
        ref_logprobs_BT=row(ref),
        on_policy=jnp.asarray(on_policy),
    )


def test_grpo_loss_off_policy_with_kl_and_truncated_importance_sampling():
    c = GrpoLossConfig(kl_coef=0.1, kl_estimator="k1", importance_cap=1.5)
    logprobs = jnp.array([[0.0, -1.0, -2.0]])
    batch = rl_batch(
        sampler=[0, -2.0, -1.9], old=[0, -1.1, -1.9], ref=[0, -1.5, -2.5], advantages=[0, 1.0, -1.0],
        mask=[0, 1, 1], weights=[0, 1, 1], count=2, on_policy=False,
    )  # fmt: skip
    out = grpo_loss(logprobs, jnp.zeros((1, 3)), batch, c=c)
    first = -math.exp(0.1) * min(1.5, math.exp(0.9)) + 0.1 * 0.5
    second = math.exp(-0.1) * 1.0 + 0.1 * 0.5
    close(out.total, first + second)
    close(out.count, 2.0)
    close(out.metrics["kl_ref"], 1.0)
    close(out.metrics["ratio_max"], math.exp(0.1))


def test_on_policy_the_ratio_is_one_and_the_gradient_is_minus_the_advantage():
    batch = rl_batch(
        sampler=[0, -2.0, -1.9], old=[9, 9, 9], ref=[9, 9, 9], advantages=[0, 1.0, -3.0],
        mask=[0, 1, 1], weights=[0, 1, 1], count=2, on_policy=True,
    )  # fmt: skip

    def loss(logprobs):
        return grpo_loss(logprobs, jnp.zeros((1, 3)), batch, c=GrpoLossConfig()).total

    close(jax.grad(loss)(jnp.array([[0.0, -1.0, -2.0]])), [[0.0, -1.0, 3.0]])


def test_sft_loss_sums_over_loss_tokens_only():
    zeros = jnp.zeros((1, 3), jnp.int32)
    out = sft_loss(
        jnp.array([[-5.0, -1.0, -2.0]]), jnp.ones((1, 3)), PackedBatch(zeros, zeros, zeros, jnp.array([[0.0, 1, 1]]))
    )
    close([out.total, out.count, out.metrics["entropy"]], [3.0, 2.0, 2.0])


def test_schedules():
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", min_learning_rate=0.1, warmup_steps=10)
    rate = learning_rate(cosine, total_steps=110)
    close([rate(0), rate(5), rate(10), rate(60), rate(110)], [0.0, 0.5, 1.0, 0.55, 0.1])
    constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=2), total_steps=9)
    close([constant(0), constant(1), constant(2), constant(99)], [0.0, 0.5, 1.0, 1.0])


def rows(spec, count, length=24, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, spec.vocab_size, (count, length)).astype(np.int32)
    segments = np.where(np.arange(length) < 10, 1, 2) * np.ones((count, 1), int)
    segments[:, -2:] = 0
    positions = np.where(np.arange(length) < 10, np.arange(length), np.arange(length) - 10)
    mask = (rng.random((count, length)) < 0.6) & (positions > 0) & (segments > 0)
    return PackedBatch(
        tokens,
        np.broadcast_to(positions, tokens.shape).astype(np.int32),
        segments.astype(np.int32),
        mask.astype(np.float32),
    )


def split(batch, size):
    return [jax.tree.map(lambda x, i=i: x[i : i + size], batch) for i in range(0, batch.tokens_BT.shape[0], size)]


def updater(model, c=None, steps=10):
    def loss(params, batch):
        out = model.logprobs(params, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        return sft_loss(out.logprobs_BT, out.entropy_BT, batch)

    abstract = model.abstract_params(dtype=jnp.float32)
    c, by_layer = c or OptimizerConfig(learning_rate=1e-2), model.by_layer()
    return Updater(loss, abstract_params=abstract, c=c, total_steps=steps, by_layer=by_layer)


@pytest.mark.slow
def test_any_split_into_microbatches_gives_the_same_gradient(make_model):
    model = make_model(llama())
    params = model.init_params(jax.random.key(0), dtype=jnp.float32)
    batch = rows(llama(), 8)
    up = updater(model)
    whole, sums = up.gradient(params, split(batch, 8))
    for size in (1, 4):
        parts, other = up.gradient(params, split(batch, size))
        close(other.total, sums.total)
        close(other.count, sums.count)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            close(a / sums.count, b / sums.count)


def groups_of(spec, count, *, prompt=12, samples=6, seed=0):
    """Rollout samples: one prompt a group, completions of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        head = tuple(rng.integers(0, spec.vocab_size, prompt).tolist())
        group = []
        for _ in range(samples):
            tail = tuple(rng.integers(0, spec.vocab_size, rng.integers(1, 10)).tolist())
            mask = (0,) * prompt + (1,) * len(tail)
            logprobs = (0.0,) * prompt + tuple(rng.normal(-3, 1, len(tail)).tolist())
            group.append(Sample(head + tail, mask, logprobs, float(rng.normal())))
        found.append(group)
    return found


@pytest.mark.parametrize("make_spec", [llama, nemotron])
@pytest.mark.parametrize("row_tokens", [64, 600])
def test_sharing_prompts_changes_neither_loss_nor_gradient_and_saves_tokens(make_model, make_spec, row_tokens):
    spec = make_spec()
    model, config = make_model(spec), load_config("tiny_grpo").grpo
    loss = dataclasses.replace(config.loss, kl_coef=0.0, importance_cap=2.0)
    params = model.init_params(jax.random.key(0), dtype=jnp.float32)

    def total(params, batch):
        packed = batch.packed
        out = model.logprobs(params, packed.tokens_BT, packed.positions_BT, packed.segment_ids_BT)
        return grpo_loss(out.logprobs_BT, out.entropy_BT, batch, c=loss)

    up = Updater(
        total,
        abstract_params=model.abstract_params(dtype=jnp.float32),
        c=OptimizerConfig(learning_rate=1e-2),
        total_steps=1,
    )
    groups, found = groups_of(spec, 4), {}
    for name, shares in (("shared", True), ("apart", False)):
        rows = PackConfig(row_tokens=row_tokens, microbatch_rows=1, share_prompts=shares)
        batches = pack_part(groups, c=dataclasses.replace(config, loss=loss, pack=rows), first=True)
        grads, sums = up.gradient(params, put_rows(model.compute.ops.mesh, batches))
        used = sum(int((b.packed.segment_ids_BT > 0).sum()) for b in batches)
        found[name] = (jax.tree.map(lambda g, n=sums.count: g / n, grads), sums, used)
    (grads, sums, used), (other_grads, other, apart) = found["shared"], found["apart"]
    close(sums.total / sums.count, other.total / other.count, 1e-5)
    close(sums.metrics["entropy"] / other.metrics["entropy"], 1.0, 1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        close(a, b, 1e-5)
    assert used < 0.65 * apart


def train(model, spec):
    """Losses of four steps and the parameters after them."""
    up = updater(model)
    state = up.init(model.init_params(jax.random.key(0), dtype=jnp.float32), step=0, rng=jax.random.key(1))
    losses = []
    for step in range(4):
        state, stats = up.update(state, put_rows(model.compute.ops.mesh, split(rows(spec, 16, seed=step), 8)))
        losses.append(float(stats["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_one_device(make_model):
    return train(make_model(nemotron()), nemotron())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=4, tensor=2),
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=2, fsdp=1, context=2, tensor=2),
        MeshConfig(data=8, fsdp=1),
    ],
    ids=["fsdp4-tensor2", "fsdp8", "data2-fsdp2-tensor2", "data2-context2-tensor2", "data8"],
)
def test_eight_devices_train_like_one(make_model, mesh, on_one_device):
    losses, params = train(make_model(nemotron(), mesh=mesh, devices=8), nemotron())
    close(on_one_device[0], losses, 1e-5)
    for a, b in zip(jax.tree.leaves(on_one_device[1]), jax.tree.leaves(params), strict=True):
        close(a, b, 1e-3)


def test_replicas_sum_their_gradients_once_an_update(make_model):
    model = make_model(llama(), mesh=MeshConfig(data=8, fsdp=1), devices=8)
    up, batch = updater(model), abstract_batch(model.compute.ops.mesh, stage="sft", rows=8, row_tokens=24)
    programs = up.lower(up.abstract_state(), up.abstract_gradient(batch), batch, accumulate=True)
    found = {name: x.compile().as_text().count("all-reduce(") for name, x in programs.items()}
    assert found["gradient"] == 0
    assert found["apply"] > 0


def test_a_replica_without_a_token_adds_nothing_and_computes_nothing(make_model):
    def gradient(devices):
        """Of two microbatches; the last row is empty."""
        model, batch = make_model(llama(), mesh=MeshConfig(data=devices, fsdp=1), devices=devices), rows(llama(), 4)
        batch = jax.tree.map(lambda x: np.where(np.arange(4)[:, None] < 3, x, 0).astype(x.dtype), batch)
        up, params = updater(model), model.init_params(jax.random.key(0), dtype=jnp.float32)
        return up.gradient(params, put_rows(model.compute.ops.mesh, split(batch, 2)))

    (ours, sums), (theirs, other) = gradient(2), gradient(1)
    close([sums.total, sums.count], [other.total, other.count])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        close(np.asarray(a) / float(sums.count), np.asarray(b) / float(sums.count))
    model = make_model(llama(), mesh=MeshConfig(data=2, fsdp=1), devices=2)
    up, batch = updater(model), abstract_batch(model.compute.ops.mesh, stage="sft", rows=2, row_tokens=24)
    lowered = up.lower(up.abstract_state(), up.abstract_gradient(batch), batch, accumulate=True)["gradient"].as_text()
    case = lowered[lowered.index("stablehlo.case") :]
    assert (
        "dot_general" in case and "dot_general" not in lowered[: lowered.index("stablehlo.case")].split("func.func")[-1]
    )


@pytest.mark.parametrize(
    ("mesh", "devices", "remat"),
    [
        (MeshConfig(fsdp=1), 1, "none"),
        pytest.param(MeshConfig(fsdp=4, tensor=2), 8, "dots", marks=pytest.mark.slow),
    ],
    ids=["one device", "eight devices, remat"],
)
def test_training_without_a_loop_over_layers_is_the_same(make_model, mesh, devices, remat, on_one_device, monkeypatch):
    monkeypatch.setitem(decoder.UNROLL, "cpu", 8)
    model = make_model(nemotron(), mesh=mesh, devices=devices, remat=remat)
    assert "layers" in updater(model).view(model.init_params(jax.random.key(0), dtype=jnp.float32))
    losses, params = train(model, nemotron())
    assert jax.tree.structure(params) == jax.tree.structure(on_one_device[1])
    close(on_one_device[0], losses, 1e-5)
    for a, b in zip(jax.tree.leaves(on_one_device[1]), jax.tree.leaves(params), strict=True):
        close(a, b, 1e-5 if devices == 1 else 1e-3)  # Adam makes much of rounding where a gradient is near 0


def test_remat_policies_change_nothing(make_model):
    batch = split(rows(llama(), 4), 4)
    grads = {}
    for remat in ("none", "dots", "full"):
        model = make_model(llama(), remat=remat)
        params = model.init_params(jax.random.key(0), dtype=jnp.float32)
        grads[remat] = updater(model).gradient(params, batch)[0]
    for other in ("dots", "full"):
        for a, b in zip(jax.tree.leaves(grads["none"]), jax.tree.leaves(grads[other]), strict=True):
            close(a, b, 1e-5)


def test_adamw_is_that_of_optax_and_decays_no_norm():
    c = OptimizerConfig(learning_rate=1e-2, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, mask={"kernel": True, "norm": False}),
    )
    shapes = {"kernel": (3, 4), "norm": (4,)}
    keys = iter(jax.random.split(jax.random.key(0), 20))
    ours = expected = {k: jax.random.normal(next(keys), shape) for k, shape in shapes.items()}
    state, their_state = init_adam(ours), theirs.init(expected)
    for _ in range(4):
        grads = {k: jax.random.normal(next(keys), shape) for k, shape in shapes.items()}
        scale = clip_scale(optax.global_norm(grads), limit=0.5)
        ours, state = adamw(c, ours, state, grads, rate=jnp.float32(1e-2), scale=scale, skip=jnp.bool_(False))
        updates, their_state = theirs.update(grads, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(close, ours, expected)
    assert clip_scale(jnp.float32(9.0), limit=0.0) == 1.0


def test_the_guard_skips_a_poisoned_update_counts_it_and_goes_on(make_model):
    model = make_model(llama())
    up = updater(model, OptimizerConfig(learning_rate=1e-2, spike_factor=3.0))
    state = up.init(model.init_params(jax.random.key(0), dtype=jnp.float32), step=0, rng=jax.random.key(1))
    good = split(rows(llama(), 4), 4)
    poison = [dataclasses.replace(good[0], loss_mask_BT=np.full_like(good[0].loss_mask_BT, np.nan))]
    state, stats = up.update(state, good)
    before = jax.device_get((state.params, state.opt_state))
    state, stats = up.update(state, poison)
    state, stats = up.update(state, poison)
    after = jax.device_get((state.params, state.opt_state))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert (int(state.step), float(stats["skipped"]), float(stats["skipped_in_a_row"])) == (3, 2.0, 2.0)
    values = {k: float(v) for k, v in stats.items()}
    check_update("sft", 3, values, max_skipped_in_a_row=3)
    with pytest.raises(TrainingDiverged, match="sft step 3: 2 updates in a row"):
        check_update("sft", 3, values, max_skipped_in_a_row=2)
    state, stats = up.update(state, good)
    assert float(stats["skipped_in_a_row"]) == 0.0
    assert np.isfinite(float(stats["loss"]))


def test_the_old_state_is_donated(make_model):
    model = make_model(llama())
    up = updater(model)
    state = up.init(model.init_params(jax.random.key(0), dtype=jnp.float32), step=0, rng=jax.random.key(1))
    old = state.params["embed"]
    up.update(state, split(rows(llama(), 4), 4))
    assert old.is_deleted()


def test_bf16_compute_keeps_f32_master_weights(make_model):
    model = make_model(llama(), dtype="bfloat16")
    up = updater(model)
    state = up.init(model.init_params(jax.random.key(0), dtype=jnp.float32), step=0, rng=jax.random.key(1))
    for _ in range(3):
        state, stats = up.update(state, split(rows(llama(), 4), 4))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert float(stats["loss"]) < 5.1


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_no_program_of_an_update_holds_an_array_of_tokens_by_vocabulary(make_model, stage):
    rows, row_tokens, vocabulary = 4, 256, 100_003
    c = load_config("tiny_grpo")
    model = make_model(llama(vocab_size=vocabulary), remat="full")
    loop, part = (grpo, c.grpo) if stage == "grpo" else (sft, c.sft)
    updater = loop.build_updater(model, part, dtype=jnp.float32)
    batch = abstract_batch(model.compute.ops.mesh, stage=stage, rows=rows, row_tokens=row_tokens)
    so_far = updater.abstract_gradient(batch)
    for program in updater.lower(updater.abstract_state(), so_far, batch, accumulate=True).values():
        shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", program.compile().as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        assert largest >= vocabulary * 32  # the embedding was seen
        assert largest < rows * row_tokens * vocabulary / 4

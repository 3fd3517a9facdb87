"""Low-rank adapters: what they compute, what they train, what is kept of them, and where the whole weights come back."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax import sft
from lnjax.build import KEY_INIT
from lnjax.checkpoint.load import load_weights
from lnjax.config import load_config
from lnjax.errors import CheckpointError, ConfigError
from lnjax.fit import state_bytes
from lnjax.mesh import put_rows
from lnjax.models.lora import check_lora
from lnjax.ops.matmul import matmul_fp8, matmul_sharded
from lnjax.schema import LoraConfig, MeshConfig
from tests.specs import llama, nemotron
from tests.test_learn import rows, split
from tests.test_train import LAUNCH, ROOT, environment, final_arrays, metrics, run

F32 = jnp.dtype("float32")
LORA = LoraConfig(rank=4, alpha=12.0)


def close(a, b, tol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def adapted(model, c=LORA):
    return dataclasses.replace(model, lora=c)


def base(model, dtype=F32):
    return model.init_params(jax.random.key(0), dtype=dtype)


def random_adapters(model):
    """Adapters that do something: both factors random."""
    adapters = model.init_adapters(jax.random.key(1), dtype=F32)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    values = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.device_put(jax.tree.unflatten(tree, values), jax.tree.map(lambda x: x.sharding, adapters))


def updater(model):
    c = load_config("tiny_sft").sft
    assert c
    return sft.build_updater(model, c, dtype=F32)


def logprobs(model, params, batch):
    score = jax.jit(lambda p, b: model.logprobs(p, b.tokens_BT, b.positions_BT, b.segment_ids_BT).logprobs_BT)
    return score(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("make_spec", "remat"), [(llama, "none"), (nemotron, "dots"), (llama, "full")])
def test_new_adapters_change_nothing_and_only_they_have_gradients(make_model, make_spec, remat):
    plain = make_model(make_spec(), remat=remat)
    model, params, batch = adapted(plain), base(plain), split(rows(make_spec(), 4), 4)
    adapters = model.init_adapters(jax.random.key(1), dtype=F32)
    _, wanted = updater(plain).gradient(params, batch)
    grads, sums = updater(model).gradient(adapters, batch, params)
    assert float(sums.total) == float(wanted.total)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)


@pytest.mark.slow
def test_the_gradient_of_an_adapter_is_the_kernels_projected(make_model):
    plain = make_model(nemotron())
    model, params, batch = adapted(plain), base(plain), split(rows(nemotron(), 4), 4)
    adapters = random_adapters(model)
    whole, _ = updater(plain).gradient(model.merged(params | adapters), batch)
    grads, _ = updater(model).gradient(adapters, batch, params)
    kernels = [(i, part, name) for i, run in whole["runs"].items() for part, x in run.items() for name in x]
    kernels = [path for path in kernels if path[2] != "norm"]
    assert len(kernels) == 7 + 3 + 4 + 7
    for i, part, name in kernels:
        dw, of, got = (tree["runs"][i][part] for tree in (whole, adapters["lora"], grads["lora"]))
        a, b = of[f"{name}_a"], of[f"{name}_b"]
        scale = float(jnp.abs(dw[name]).max())
        close(got[f"{name}_b"] / scale, 12.0 / 4 * jnp.einsum("nir,nio->nro", a, dw[name]) / scale, 2e-5)
        close(got[f"{name}_a"] / scale, 12.0 / 4 * jnp.einsum("nio,nro->nir", dw[name], b) / scale, 2e-5)


def test_merged_weights_say_the_same_as_base_and_adapters(make_model):
    model, batch = adapted(make_model(llama())), rows(llama(), 4)
    params, adapters = base(model), random_adapters(model)
    ours = logprobs(model, params | adapters, batch)
    close(ours, logprobs(model, model.merged(params | adapters), batch))
    assert float(jnp.abs(ours - logprobs(model, params, batch)).max()) > 0.1
    assert model.merged(params) is params


def test_a_merged_kernel_is_w_plus_alpha_over_rank_times_a_b(make_model):
    model = adapted(make_model(llama()), LoraConfig(rank=2, alpha=6.0, targets=("v",)))
    params, adapters = base(model), random_adapters(model)
    merged, kernels = model.merged(params | adapters), params["runs"]["0"]["attention"]
    factors = adapters["lora"]["runs"]["0"]["attention"]
    assert set(factors) == {"v_a", "v_b"}
    assert set(adapters["lora"]["runs"]["0"]) == {"attention"}
    wanted = np.asarray(kernels["v"]) + 3.0 * np.asarray(factors["v_a"]) @ np.asarray(factors["v_b"])
    close(merged["runs"]["0"]["attention"]["v"], wanted, 1e-6)
    assert merged["runs"]["0"]["attention"]["q"] is kernels["q"]


def train(model, params, *, steps):
    up, mesh = updater(model), model.compute.ops.mesh
    adapters = model.init_adapters(jax.random.key(1), dtype=F32)
    state, losses = up.init(adapters, step=0, rng=jax.random.key(1)), []
    for _ in range(steps):
        state, stats = up.update(state, put_rows(mesh, split(rows(model.spec, 16), 8)), params)
        losses.append(float(stats["loss"]))
    return losses, state.params


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(make_model):
    model = adapted(make_model(llama()))
    params, batch = base(model), rows(llama(), 4)
    before = jax.device_get(params)
    losses, adapters = train(model, params, steps=40)
    assert losses[-1] < losses[0] - 0.3
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True))
    close(logprobs(model, params | adapters, batch), logprobs(model, model.merged(params | adapters), batch))


@pytest.mark.slow
def test_eight_devices_train_adapters_like_one(make_model):
    one = adapted(make_model(nemotron()))
    many = adapted(make_model(nemotron(), mesh=MeshConfig(fsdp=4, tensor=2), devices=8))
    (losses, a), (others, b) = train(one, base(one), steps=3), train(many, base(many), steps=3)
    close(losses, others)
    found = [dict(jax.tree_util.tree_leaves_with_path(x)) for x in (a, b)]
    names = {jax.tree_util.keystr(k): tuple(v.sharding.spec) for k, v in found[1].items()}
    assert names["['lora']['runs']['0']['attention']['q_a']"] == (None, ("fsdp", "context"), None)
    assert names["['lora']['runs']['0']['attention']['q_b']"] == (None, None, "tensor")
    merged = many.merged(base(many) | b)
    for x, y in zip(jax.tree.leaves(one.merged(base(one) | a)), jax.tree.leaves(merged), strict=True):
        close(x, y, 1e-4)
    where = jax.tree.map(lambda x: x.sharding, many.abstract_params(dtype=F32))
    assert jax.tree.map(lambda x: x.sharding, merged) == where


def test_a_bfloat16_base_gives_what_a_float32_base_gives_under_bfloat16_compute(make_model):
    model, batch = adapted(make_model(llama(), dtype="bfloat16")), rows(llama(), 4)
    adapters = random_adapters(model)
    narrow = base(model, dtype=jnp.dtype("bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(model.abstract_frozen())} == {jnp.dtype("bfloat16")}
    wanted = logprobs(model, base(model) | adapters, batch)
    assert np.array_equal(logprobs(model, narrow | adapters, batch), wanted)
    assert {x.dtype for x in jax.tree.leaves(model.merged(narrow | adapters))} == {jnp.dtype("bfloat16")}


def test_fp8_products_are_of_the_base_alone(make_model):
    plain = make_model(llama(), dtype="bfloat16")
    fp8 = functools.partial(matmul_sharded, kernel=matmul_fp8, mesh=plain.compute.ops.mesh)
    ops = dataclasses.replace(plain.compute.ops, matmul=fp8)
    model = adapted(dataclasses.replace(plain, compute=dataclasses.replace(plain.compute, ops=ops)))
    batch = put_rows(model.compute.ops.mesh, split(rows(llama(), 16), 16))
    params = base(model, dtype=jnp.dtype("bfloat16"))
    adapters = model.init_adapters(jax.random.key(1), dtype=F32)
    grads, _ = updater(model).gradient(adapters, batch, params)  # rank 4 is no multiple of 16: FP8 would refuse it
    assert float(jnp.abs(grads["lora"]["runs"]["0"]["ffn"]["up_b"]).max()) > 0


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no kernel 'w1'; the decoder has q, k, v, o, gate, up, down"):
        check_lora(LoraConfig(rank=8, targets=("q", "w1")))
    with pytest.raises(ConfigError, match="rank -1"):
        check_lora(LoraConfig(rank=-1))


def test_a_config_counts_adapters_and_the_base_in_compute_dtype():
    c = load_config("nano8b_sft")
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, lora=LoraConfig(rank=16)))
    # 32 layers: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336
    adapters = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert adapters == 41_943_040
    assert state_bytes(c) == 8_030_261_248 * 2 + adapters * 4 * 4


TINY = ("--config", "tiny_grpo", "--model.lora.rank", "4", "--checkpoint.every", "3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "whole"
    run(*TINY, "--run-dir", folder)
    return folder


@pytest.mark.slow
def test_a_run_trains_adapters_over_both_stages_and_exports_merged_weights(finished, make_model):
    lines = metrics(finished)
    losses = [x["loss"] for x in lines if x["stage"] == "sft"]
    assert losses[-1] < losses[0] - 0.1
    first = next(x for x in lines if x["stage"] == "grpo")
    assert first["sampler_kl"] < 1e-8  # the engine sampled with merged weights, the learner scored unmerged ones
    assert first["prob_error"] <= 1.0001
    c = load_config("tiny_grpo")
    spec = c.model.spec
    assert spec
    kernels = 2 * 4 * (2 * (32 + 64) + 2 * (32 + 32) + 3 * (32 + 64))
    last = finished / "checkpoints" / str(max(int(p.name) for p in (finished / "checkpoints").iterdir()))
    arrays = json.loads((last / "manifest.json").read_text())["arrays"]
    saved = {k: math.prod(v["shape"]) for k, v in arrays.items()}
    assert sum(v for k, v in saved.items() if k.startswith("state/params/")) == kernels
    assert all(k.startswith("state/params/lora/") for k in saved if k.startswith("state/params/"))
    assert sum(saved.values()) < 4 * kernels + 20  # adapters, two moments, the reference
    model = make_model(spec)
    with pytest.raises(CheckpointError, match="RUN_DIR/hf, where they are merged in"):
        load_weights(str(finished), spec=spec, dtype=F32, shardings=model.shardings())
    exported = load_weights(str(finished / "hf"), spec=spec, dtype=F32, shardings=model.shardings())
    key = jax.random.fold_in(jax.random.key(c.seed), KEY_INIT)
    start = model.init_params(key, dtype=jnp.dtype("float32"))
    close(exported["embed"], start["embed"], 1e-3)  # but for bfloat16
    values = final_arrays(finished)
    up_a, up_b = (
        np.frombuffer(values[name], np.float32).reshape(arrays[name]["shape"])
        for name in (f"state/params/lora/runs/0/ffn/up_{x}" for x in "ab")
    )
    product = 32.0 / 4 * up_a @ up_b
    assert np.abs(product).max() > 0.05
    close(exported["runs"]["0"]["ffn"]["up"] - start["runs"]["0"]["ffn"]["up"], product, 2e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path):
    folder = tmp_path / "killed"
    command = [*LAUNCH, *TINY, "--run-dir", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted, end = folder / "checkpoints" / "6", time.monotonic() + 150  # in the middle of GRPO
    while not wanted.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wanted.exists()
    assert not (folder / "summary.json").exists()
    run(*TINY, "--run-dir", folder)
    assert metrics(folder) == metrics(finished)
    assert final_arrays(folder) == final_arrays(finished)

"""Positions split over devices: the context axis and sequence parallelism change nothing but where things lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.errors import ConfigError
from lnjax.learn.loss import sft_loss
from lnjax.mesh import make_mesh
from lnjax.ops.attention import attention_sharded, attention_xla
from lnjax.ops.head import head_xla
from lnjax.ops.matmul import matmul_sharded, matmul_xla
from lnjax.schema import MeshConfig
from lnjax.types import PackedBatch
from tests.specs import llama


def close(a, b, tol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def segments_of(*lengths, total):
    """One row of packed documents, padded with 0."""
    row = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)])
    return np.pad(row, (0, total - len(row)))


def test_attention_over_context_shards_and_its_gradient_equal_one_device():
    length = 1040  # in tiles, several to a shard
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray([segments_of(300, 700, total=length), segments_of(1030, total=length)])
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, tensor=2), devices=jax.devices())

    def ours(q, k, v):
        out = attention_sharded(q, k, v, segments, kernel=attention_xla, mesh=mesh)
        return (out * weight).sum(), out

    def theirs(q, k, v):
        t = jnp.arange(length)
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
        scores = jnp.einsum("btngh,bsnh->bngts", q.reshape(2, length, 2, 2, 8), k) * 8**-0.5
        scores = jnp.where((same & (t[:, None] >= t[None])[None])[:, None, None], scores, -1e30)
        weights = jnp.where((segments > 0)[:, None, None, :, None], jax.nn.softmax(scores, -1), 0)
        out = jnp.einsum("bngts,bsnh->btngh", weights, v).reshape(q.shape)
        return (out * weight).sum(), out

    grads, out = jax.jit(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    wanted, reference = jax.jit(jax.grad(theirs, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    close(out, reference)
    for a, b in zip(grads, wanted, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("logical", [("embed", "heads"), ("heads", "embed")])
@pytest.mark.parametrize("length", [12, 6])
def test_a_product_by_device_and_its_gradients_equal_one_device_s(logical, length):
    """12 positions divide over context and tensor, 6 over context alone."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, 32), (32, 32), (2, length, 32)
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    def run(product):
        out, back = jax.vjp(product, x, w)
        return out, *back(g)

    def sharded(x, w):
        return matmul_sharded(x, w, logical, kernel=matmul_xla, mesh=mesh)

    for ours, theirs in zip(jax.jit(lambda: run(sharded))(), run(matmul_xla), strict=True):
        close(ours, theirs)


def gradient(model, batch):
    params = model.init_params(jax.random.key(0), dtype=jnp.float32)

    def loss(params):
        out = model.logprobs(params, batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        return sft_loss(out.logprobs_BT, out.entropy_BT, batch).total, out.logprobs_BT

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_a_model_on_a_mesh_with_context_has_the_logprobs_and_gradient_of_one_device(make_model):
    spec, rng = llama(tied_embeddings=False), np.random.default_rng(0)
    segments = np.stack([segments_of(9, 13, total=24), segments_of(24, total=24)])
    positions = np.stack([np.r_[0:9, 0:13, 0:2], np.r_[0:24]]).astype(np.int32)
    tokens = rng.integers(0, spec.vocab_size, (2, 24)).astype(np.int32)
    batch = PackedBatch(tokens, positions, segments, ((segments > 0) & (positions > 0)).astype(np.float32))
    grads, logprobs = gradient(make_model(spec), batch)
    split = make_model(spec, mesh=MeshConfig(fsdp=2, context=2, tensor=2), devices=8)
    other, again = gradient(split, batch)
    close(logprobs, again)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        close(a, b)


def test_rows_that_the_context_axis_does_not_divide_are_named():
    mesh = make_mesh(MeshConfig(fsdp=1, context=8), devices=jax.devices())
    with pytest.raises(ConfigError, match=r"packed rows: its positions dimension of 12 does not divide over 8"):
        head_xla(jnp.zeros((1, 12, 8)), jnp.zeros((16, 8)), jnp.zeros((1, 12), jnp.int32), mesh=mesh)

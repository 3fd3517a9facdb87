"""Kernels on the GPU against float32 references on the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.mesh import make_mesh
from lnjax.ops.attention import attention_xla
from lnjax.ops.cudnn import attention_cudnn, check_packed
from lnjax.ops.head import head_xla
from lnjax.ops.matmul import check_products, matmul_fp8
from lnjax.ops.te import attention_te, matmul_te
from lnjax.schema import MeshConfig
from lnjax.types import BRANCH

pytestmark = pytest.mark.gpus(1)


@pytest.fixture(autouse=True)
def cuda():
    if jax.default_backend() != "gpu":
        pytest.fail(
            f"jax runs on {jax.default_backend()} here; set JAX_PLATFORMS=cuda (uv sync --extra cuda13 or cuda12)"
        )


@pytest.fixture
def transformer_engine():
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed (BUILD.md)")


def error(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_fp8_products_are_fp8_and_near():
    check_products("fp8", matmul_fp8)


def test_transformer_engine_passes_the_same_checks(transformer_engine):
    check_products("te", matmul_te)
    check_packed("te", attention_te)


def test_cudnn_passes_its_own_check_and_marks_a_row_it_cannot_be_told_of():
    check_packed("cudnn", attention_cudnn)
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    branches = jnp.where(jnp.arange(128) < 64, 1, 1 + BRANCH)[None]
    assert jnp.isnan(attention_cudnn(x, x, x, branches, branches, jnp.int32(0))).all()


@pytest.mark.parametrize("kernel", [attention_xla, attention_cudnn, attention_te])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [512, 3000])
def test_packed_grouped_query_attention_in_bfloat16_and_its_gradient(kernel, head_dim, length, request):
    if kernel is attention_te:
        request.getfixturevalue("transformer_engine")
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, length, 8, head_dim), (2, length, 2, head_dim), (2, length, 2, head_dim), (2, length, 8, head_dim))
    q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.broadcast_to(1 + jnp.arange(length) // 200, (2, length)).at[1, -40:].set(0)

    def both(kernel, dtype):
        @jax.jit
        def run(q, k, v, g):
            out, back = jax.vjp(lambda q, k, v: kernel(q, k, v, segments, segments, jnp.int32(0)), q, k, v)
            return out, *back(g)

        return run(*(x.astype(dtype) for x in (q, k, v, g)))

    with jax.default_matmul_precision("highest"):
        reference = both(attention_xla, jnp.float32)
    for ours, theirs in zip(both(kernel, jnp.bfloat16), reference, strict=True):
        assert error(ours, theirs) < 0.01


def test_the_head_in_bfloat16_at_the_family_s_vocabulary():
    mesh = make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (2, 512, 1024)), 0.02 * jax.random.normal(keys[1], (128256, 1024))
    targets = jnp.arange(1024).reshape(2, 512)
    run = jax.jit(lambda x, w: head_xla(x, w, targets, mesh=mesh).logprobs_BT)
    with jax.default_matmul_precision("highest"):
        reference = run(x, w)
    assert np.abs(np.asarray(run(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)) - reference)).max() < 0.05

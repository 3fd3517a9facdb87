"""Kernels against plain references."""

import importlib.util
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.errors import ConfigError, KernelUnavailable
from lnjax.mesh import make_mesh
from lnjax.models import decoder
from lnjax.ops import te
from lnjax.ops.attention import _mask, _needed, attention_xla
from lnjax.ops.cudnn import MAX_DOCUMENTS, attention_cudnn, check_packed, documents
from lnjax.ops.head import head_xla
from lnjax.ops.matmul import count_fp8, matmul_fp8, matmul_xla
from lnjax.ops.sample import sample
from lnjax.ops.select import select_ops
from lnjax.ops.te import matmul_te
from lnjax.schema import MeshConfig, OpsConfig
from lnjax.types import BRANCH, SamplingParams


def close(a, b, tol):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def naive_attention(q, k, v, segments):
    """Of every token to those before it in its branch, or in the trunk of its document."""
    group, at = q.shape[2] // k.shape[2], np.arange(q.shape[1])
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    document, branch = segments % BRANCH, segments // BRANCH
    same = (document[:, :, None] == document[:, None]) & (document[:, :, None] > 0) & (at[:, None] >= at[None])[None]
    allowed = (same & ((branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)))[:, None]
    scores = jnp.where(allowed, jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]), -1e30)
    weights = jnp.where(allowed, jax.nn.softmax(scores, axis=-1), 0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("length", [16, 300, 2100])
def test_packed_documents_never_see_each_other_and_padding_is_zero(length, serial):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    segments = np.zeros((2, length), np.int32)
    segments[0, : length // 3], segments[0, length // 3 :] = 1, 2
    segments[1, : length // 2] = 1
    attend = jax.jit(lambda q, k, v: attention_xla(q, k, v, segments, segments, jnp.int32(0), serial=serial))
    out = attend(q, k, v)
    close(out, naive_attention(q, k, v, segments), 2e-5)
    assert not np.asarray(out)[1, length // 2 :].any()
    other = k.copy()
    other[0, : length // 3] += 5.0
    again = attend(q, other, v)
    assert np.array_equal(np.asarray(again)[0, length // 3 :], np.asarray(out)[0, length // 3 :])


def row_of_groups(sizes):
    """Segment ids of a row: for each document its trunk and then its branches, by their sizes."""
    parts = [np.full(n, doc + i * BRANCH) for doc, group in enumerate(sizes, 1) for i, n in enumerate(group)]
    return np.concatenate(parts).astype(np.int32)


def test_tiles_of_other_branches_are_left_out_and_none_that_is_seen():
    rng, block = np.random.default_rng(0), 16
    rows = []
    for _ in range(40):
        row = row_of_groups(rng.integers(1, 40, size=(3, 5)))[:256]
        rows.append(np.pad(row, (0, 256 - len(row))))
    segments, at = jnp.asarray(rows), jnp.arange(256)
    seen = np.asarray(jax.vmap(lambda s: _mask(s, s, at, at))(segments)).reshape(40, 16, block, 16, block).any((2, 4))
    needed = np.asarray(_needed(segments, segments, jnp.int32(0), block))
    assert not (seen & ~needed).any()
    assert needed.sum() < 1.25 * seen.sum()
    aligned = jnp.asarray(row_of_groups([[16] * 9, [16] * 7]))[None]
    rest = _needed(aligned, aligned, jnp.int32(0), block)[0].sum(-1).tolist()
    assert rest == [1] + [2] * 8 + [1] + [2] * 6  # its own tile and that of its trunk


@pytest.mark.parametrize("serial", [False, True])
def test_branches_see_their_trunk_and_themselves_over_many_tiles(serial):
    rng, length = np.random.default_rng(1), 1100
    q = jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32)
    rows = [row_of_groups([[200, 250, 150, 60], [50, 40, 300]]), row_of_groups([[700, 20, 300]])]
    segments = np.stack([np.pad(row, (0, length - len(row))) for row in rows])

    def attend(q):
        return attention_xla(q, q, q, segments, segments, jnp.int32(0), serial=serial)

    out = attend(q)
    weight = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    gradient = jax.grad(lambda q: (attend(q) * weight).sum())(q)
    close(out, naive_attention(q, q, q, segments), 2e-5)
    close(gradient, jax.grad(lambda q: (naive_attention(q, q, q, segments) * weight).sum())(q), 1e-4)


def naive_head(x, w, targets, temperature):
    logits = jnp.einsum("btd,vd->btv", x, w) / temperature
    logprobs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], -(jnp.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2)], ids=["one", "eight"])
@pytest.mark.parametrize("vocab", [160, 5000])
@pytest.mark.parametrize("whole", [True, False], ids=["all", "half"])
def test_the_head_and_its_gradient_equal_the_naive_one(mesh, vocab, whole):
    grid = make_mesh(mesh, devices=jax.devices()[: 1 if mesh == MeshConfig() else 8])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 12, 32)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(vocab, 32)), jnp.float32) * 0.3
    targets = jnp.asarray(rng.integers(0, vocab, (4, 12)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(4, 12)), jnp.float32)

    wanted = jnp.ones((4, 12), int) if whole else jnp.asarray(rng.integers(0, 2, (4, 12)))

    def ours(x, w):
        out = head_xla(x, w, targets, mesh=grid, temperature=0.7, wanted_BT=None if whole else wanted)
        return (out.logprobs_BT * weight).sum(), out

    def theirs(x, w):
        logprobs, entropy = (a * wanted for a in naive_head(x, w, targets, 0.7))
        return (logprobs * weight).sum(), (logprobs, entropy)

    (dx, dw), out = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(x, w)
    (ex, ew), (logprobs, entropy) = jax.grad(theirs, argnums=(0, 1), has_aux=True)(x, w)
    close(out.logprobs_BT, logprobs, 1e-5)
    close(out.entropy_BT, entropy, 2e-5)
    close(dx, ex, 1e-5)
    close(dw, ew, 1e-5)


@pytest.mark.parametrize("length", [12, 521])
def test_unwanted_tokens_with_huge_logits_leave_the_gradient_alone(length):
    """521 is prime: the last chunk is filled up."""
    grid = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    wanted = jnp.arange(length)[None] % 2
    x = jnp.where(wanted[..., None] > 0, 0.01, 300.0) * jnp.ones((1, length, 32))
    w, targets = jnp.ones((160, 32)).at[3].set(2.0), jnp.zeros((1, length), jnp.int32)

    def loss(x, w, wanted_BT):
        return head_xla(x, w, targets, mesh=grid, wanted_BT=wanted_BT).logprobs_BT.sum()

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w, wanted)
    ex, ew = jax.grad(lambda x, w: (naive_head(x, w, targets, 1.0)[0] * wanted).sum(), argnums=(0, 1))(x, w)
    close(dx, ex, 1e-5)
    close(dw, ew, 1e-5)


def test_the_head_at_llama_size_needs_less_than_300_mb_of_temporaries():
    grid = make_mesh(MeshConfig(), devices=jax.devices()[:1])

    def loss(x, w, targets):
        return head_xla(x, w, targets, mesh=grid).logprobs_BT.sum()

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, 8192, 512), "float32"), ((128256, 512), "float32"))]
    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, jax.ShapeDtypeStruct((1, 8192), "int32")).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 300e6


@pytest.mark.slow
def test_the_head_at_llama_size_has_the_naive_gradient():
    grid = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8192, 512)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(128256, 512)), jnp.float32) * 0.05
    targets = jnp.asarray(rng.integers(0, 128256, (1, 8192)), jnp.int32)
    ours = jax.jit(jax.grad(lambda x, w: head_xla(x, w, targets, mesh=grid).logprobs_BT.mean(), argnums=(0, 1)))(x, w)

    @jax.jit
    def piece(x, targets):  # the naive loss, a slice of tokens at a time: [8192, 128256] would not fit beside it
        return jax.grad(lambda x, w: naive_head(x, w, targets, 1.0)[0].sum() / 8192, argnums=(0, 1))(x, w)

    dx, dw = [], 0.0
    for i in range(0, 8192, 512):
        a, b = piece(x[:, i : i + 512], targets[:, i : i + 512])
        dx.append(a)
        dw = dw + b
    dx = jnp.concatenate(dx, 1)
    for got, wanted in ((ours[0], dx), (ours[1], dw)):
        assert float(jnp.abs(got - wanted).max()) <= 1e-5 * max(1.0, float(jnp.abs(wanted).max()))


def draw(logits, count, **knobs):
    sampling = SamplingParams(
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 1, "stop_token_ids": (), **knobs}
    )
    keys = jax.random.split(jax.random.key(0), count)
    tokens, logprobs = jax.jit(lambda x, k: sample(x, k, sampling=sampling))(jnp.tile(logits[None], (count, 1)), keys)
    return np.asarray(tokens), np.asarray(logprobs)


def test_samples_follow_the_softmax_and_carry_its_logprob():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=300) * 2, jnp.float32)
    tokens, logprobs = draw(logits, 20_000, temperature=0.8)
    wanted = np.asarray(jax.nn.softmax(logits / 0.8))
    counts = np.bincount(tokens, minlength=300)
    expected = wanted * 20_000
    chi = ((counts - expected) ** 2 / expected)[expected > 5].sum()
    assert chi < (expected > 5).sum() + 5 * np.sqrt(2 * (expected > 5).sum())
    close(logprobs, np.log(wanted)[tokens], 1e-5)


def test_top_k_and_top_p_cut_the_tail_and_renormalise():
    logits = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.06, 0.04]))
    tokens, logprobs = draw(logits, 500, top_k=2)
    assert set(tokens) == {0, 1}
    close(logprobs, np.log(np.asarray([0.4, 0.3]) / 0.7)[tokens], 1e-5)
    tokens, logprobs = draw(logits, 500, top_p=0.75)
    assert set(tokens) == {0, 1, 2}
    close(logprobs, np.log(np.asarray([0.4, 0.3, 0.2]) / 0.9)[tokens], 1e-5)


def test_temperature_zero_is_greedy():
    tokens, logprobs = draw(jnp.asarray([0.1, 3.0, 2.0]), 4, temperature=0.0)
    assert tokens.tolist() == [1] * 4
    assert logprobs.tolist() == [0.0] * 4


def test_a_mesh_that_does_not_fit_the_devices_is_a_config_error():
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        make_mesh(MeshConfig(data=3, fsdp=1, tensor=1), devices=jax.devices())
    with pytest.raises(ConfigError, match="only one axis may be -1"):
        make_mesh(MeshConfig(data=-1), devices=jax.devices())


def both_passes(matmul, x, w, g):
    out, back = jax.vjp(matmul, x, w)
    return out, *back(g)


def test_fp8_products_are_exact_where_the_numbers_are_and_near_where_they_are_not():
    exact = jnp.asarray(np.random.default_rng(0).choice([-2.0, -1, 0, 0.5, 1], size=(16, 16)), jnp.float32)
    for ours, theirs in zip(
        both_passes(matmul_fp8, exact, exact, exact), both_passes(matmul_xla, exact, exact, exact), strict=True
    ):
        close(ours, theirs, 1e-5)
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, ((2, 64, 48), (48, 32), (2, 64, 32)), strict=True))
    pairs = zip(
        both_passes(matmul_fp8, 1e-4 * x, w, 1e5 * g), both_passes(matmul_xla, 1e-4 * x, w, 1e5 * g), strict=True
    )
    errors = [float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) for ours, theirs in pairs]
    assert errors[0] < 0.045 and max(errors) < 0.07 and min(errors) > 0.02  # 3 bits of mantissa, 2 for gradients


def test_fp8_of_zeros_is_zero_and_of_a_nan_is_seen():
    zeros = jnp.zeros((16, 16))
    assert not np.asarray(matmul_fp8(zeros, zeros)).any()
    assert np.isnan(np.asarray(matmul_fp8(zeros.at[0, 0].set(jnp.nan), zeros))).any()


def test_an_fp8_product_is_kept_for_the_backward_pass_as_what_it_is_cast_to(capsys):
    x, w = jnp.ones((32, 16), jnp.bfloat16), jnp.ones((16, 48), jnp.bfloat16)
    layer = jax.checkpoint(lambda x, w: jnp.sin(matmul_fp8(x, w)).sum(), policy=decoder._keep_dots)
    jax.ad_checkpoint.print_saved_residuals(layer, x, w)
    said = capsys.readouterr().out
    assert "bf16[32,48] named 'product'" in said and "f32[32,48]" not in said


def test_a_dim_that_cublas_does_not_take_in_fp8_is_named():
    with pytest.raises(ValueError, match=r"out dim 24 of \[16, 16\] @ \[16, 24\] is no multiple of 16"):
        matmul_fp8(jnp.zeros((16, 16)), jnp.zeros((16, 24)))


@pytest.mark.parametrize("changes", [{"matmul": "fp8"}, {"attention": "cudnn"}, {"matmul": "te"}, {"attention": "te"}])
def test_a_gpu_s_kernel_without_a_gpu_says_so(changes):
    with pytest.raises(KernelUnavailable, match="needs NVIDIA GPUs, the mesh is of cpu devices"):
        select_ops(OpsConfig(**changes), mesh=make_mesh(MeshConfig()))


def test_fp8_products_of_a_program_are_counted_by_the_types_of_their_operands():
    text = """
      %a = f8e4m3fn[16,16]{1,0} parameter(0)
      %b.1 = f8e5m2[16,16]{0,1} parameter(1)
      %c = bf16[16,16]{1,0} convert(%a)
      %dot.1 = f32[16,16]{1,0} dot(%a, %b.1), lhs_contracting_dims={1}
      %dot.2 = f32[16,16]{1,0} dot(%c, %b.1), lhs_contracting_dims={1}
      %g = (f32[16,16]{1,0}, s8[4]{0}) custom-call(%a, %b.1), custom_call_target="__cublas$lt$matmul$f8"
      %h = (f32[16,16]{1,0}, s8[4]{0}) custom-call(%c, %c), custom_call_target="__cublas$lt$matmul"
      %i = (bf16[16,16]{1,0}, u8[4]{0}) custom-call(%a, %b.1), custom_call_target="te_gemm_v2_ffi"
    """
    assert count_fp8(text) == 3


def test_cudnn_is_told_each_document_of_a_row_and_rows_it_cannot_be_told_of_are_found():
    rows = [[1, 1, 2, 3, 3, 0], [0] * 6, [1] * 6, [1, 0, 2, 0, 0, 0], [2, 2, 1, 1, 0, 0], [1, 1, 1 + BRANCH, 0, 0, 0]]
    lengths, starts, said = documents(jnp.array(rows, jnp.int32))
    assert lengths.shape == (6, MAX_DOCUMENTS) and starts.shape == (6, MAX_DOCUMENTS + 1)
    assert lengths[:3, :4].tolist() == [[2, 1, 2, -1], [-1] * 4, [6, -1, -1, -1]]
    assert starts[:3, :4].tolist() == [[0, 2, 3, -1], [-1] * 4, [0, -1, -1, -1]]
    assert said.tolist() == [True, True, True, False, False, False]
    crowd = jnp.arange(1, MAX_DOCUMENTS + 2)[None]
    assert not documents(crowd)[2].any() and documents(crowd[:, :-1])[2].all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "keys", "message"),
    [
        (jnp.float32, 64, 32, "float32 activations"),
        (jnp.bfloat16, 12, 32, "head_dim 12 is no multiple of 8"),
        (jnp.bfloat16, 64, 64, "mesh.context splits rows"),
    ],
)
def test_what_cudnn_does_not_take_is_named(dtype, head_dim, keys, message):
    q, k = jnp.zeros((1, 32, 2, head_dim), dtype), jnp.zeros((1, keys, 2, head_dim), dtype)
    with pytest.raises(KernelUnavailable, match=message):
        attention_cudnn(q, k, k, jnp.ones((1, 32), jnp.int32), jnp.ones((1, keys), jnp.int32), jnp.int32(0))


def test_an_attention_kernel_that_refuses_or_is_wrong_is_named_before_it_is_used():
    def refuses(*args):
        raise ValueError("no backend")

    def blind(q, k, v, q_segments, k_segments, start):
        return attention_xla(q, k, v, jnp.ones_like(q_segments), jnp.ones_like(k_segments), start)

    check_packed("x", attention_xla)
    for kernel, words in ((refuses, "ops.attention=x: no backend; use"), (blind, "ops.attention=x: relative errors")):
        with pytest.raises(KernelUnavailable, match=words):
            check_packed("x", kernel)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there")
def test_transformer_engine_that_is_not_there_is_named_with_the_way_on():
    with pytest.raises(KernelUnavailable, match=r"Transformer Engine cannot be imported .*--ops.matmul fp8"):
        matmul_te(jnp.zeros((16, 16)), jnp.zeros((16, 16)))


def test_transformer_engine_is_told_each_document_once_across_rows_that_end_in_padding(monkeypatch):
    """Its fused_attn, as it documents lengths and offsets: valid ones are moved to the front, then pair up."""

    def fused_attn(qkv, bias, described, seed, *, scaling_factor, max_segments_per_seq, **kinds):
        lengths, offsets = (np.asarray(x)[0] for x in described)
        lengths, offsets = lengths[lengths > 0], offsets[offsets >= 0]
        assert max_segments_per_seq >= len(lengths) == len(offsets) and bias is seed is None
        q, k, v = (np.asarray(x, np.float32)[0] for x in qkv)
        out = np.full(q.shape, np.nan, np.float32)  # what it leaves in padding is not defined
        for at, n in zip(offsets, lengths, strict=True):
            own = [x[None, at : at + n] for x in (q * scaling_factor * q.shape[-1] ** 0.5, k, v)]
            out[at : at + n] = naive_attention(*own, np.ones((1, n), np.int32))[0]
        return jnp.asarray(out[None], qkv[0].dtype)

    kinds = dict.fromkeys(("AttnBiasType", "AttnMaskType", "QKVLayout", "AttnSoftmaxType"), mock.MagicMock())
    describe = types.SimpleNamespace(from_seqlens_and_offsets=lambda lengths, offsets: (lengths, offsets))
    guest = types.SimpleNamespace(fused_attn=fused_attn, SequenceDescriptor=describe, **kinds)
    monkeypatch.setattr(te, "_guest", lambda: types.SimpleNamespace(attention=guest))
    rows = [[1] * 5 + [2] * 3 + [0] * 4, [1] * 2 + [2] * 9 + [0], [0] * 12, [1] * 12]
    segments = jnp.array(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (4, 12, n, 8), jnp.bfloat16) for key, n in zip(keys, (4, 2, 2), strict=True))
    ours = te.attention_te(q, k, v, segments, segments, jnp.int32(0))
    expected = attention_xla(q, k, v, segments, segments, jnp.int32(0))
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=0.02)

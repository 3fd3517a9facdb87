"""NVIDIA Transformer Engine's kernels (Hopper and later), which are installed apart (BUILD.md) and run on a GPU alone.

Both see the arrays of one device: Transformer Engine's own rules for meshes know other axes than ours.
"""

import contextlib
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import Array

from lnjax.errors import KernelUnavailable
from lnjax.ops.cudnn import by_documents
from lnjax.ops.matmul import E4M3, E5M2, fp8_rows

FOR_GOOD = contextlib.ExitStack()


@functools.cache
def _guest() -> Any:
    """transformer_engine.jax, told for good (backward passes are traced later) that what it sees has no mesh. Raises
    KernelUnavailable where it cannot be had."""
    try:
        names = ("attention", "dense", "quantize", "sharding")
        found = SimpleNamespace(**{n: importlib.import_module(f"transformer_engine.jax.{n}") for n in names})
    except (ImportError, OSError, RuntimeError) as error:
        raise KernelUnavailable(
            f"Transformer Engine cannot be imported ({type(error).__name__}: {error}); install it as BUILD.md says, or use "
            "--ops.matmul fp8 --ops.attention cudnn"
        ) from error
    FOR_GOOD.enter_context(found.sharding.global_shard_guard(found.sharding.MeshResource()))
    return found


def matmul_te(x: Array, w: Array) -> Array:
    """As matmul_fp8: current scaling, e4m3 forward, e5m2 for gradients. Transformer Engine's quantisation also writes the
    transposes that Hopper's FP8 products want; the products are cuBLASLt's. Raises ValueError for dims not of multiples of 16."""
    dense, te = _guest().dense.dense, _guest().quantize
    scaling = te.ScalingMode.CURRENT_TENSOR_SCALING
    quantizers = te.QuantizerFactory.create_set(scaling_mode=scaling, fwd_dtype=E4M3, bwd_dtype=E5M2, is_2x2x=True)
    y = dense(fp8_rows(x, w, option="te"), w, contracting_dims=((1,), (0,)), quantizer_set=quantizers)
    return y.reshape(*x.shape[:-1], w.shape[1])


def attention_te(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_segments_BT: Array, k_segments_BS: Array, start: Array
) -> Array:
    """As attention_cudnn."""
    return by_documents(_thd, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, option="te")


def _thd(q: Array, k: Array, v: Array, lengths: Array, starts: Array) -> Any:
    """All rows as one: with several, documents behind a row's padding are given another's offset."""
    te, (b, t, _, h) = _guest().attention, q.shape
    places = jnp.where(lengths > 0, starts[:, :-1] + t * jnp.arange(b)[:, None], -1).reshape(1, -1)
    lengths, pad = lengths.reshape(1, -1), ((0, 0), (0, 1))
    described = te.SequenceDescriptor.from_seqlens_and_offsets(lengths, jnp.pad(places, pad, constant_values=-1))
    kinds = {"attn_bias_type": te.AttnBiasType.NO_BIAS, "attn_mask_type": te.AttnMaskType.PADDING_CAUSAL_MASK}
    kinds |= {"qkv_layout": te.QKVLayout.THD_THD_THD, "softmax_type": te.AttnSoftmaxType.VANILLA_SOFTMAX}
    numbers = {"scaling_factor": h**-0.5, "dropout_probability": 0.0, "max_segments_per_seq": lengths.size}
    row = tuple(x.reshape(1, b * t, *x.shape[2:]) for x in (q, k, v))
    out = te.fused_attn(row, None, described, None, **kinds, **numbers, is_training=True)
    return out.reshape(q.shape)

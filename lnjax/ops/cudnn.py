"""Packed attention by cuDNN (Hopper and later): each document is a sequence of its own to the kernel.

cuDNN knows no branches: samples must not share a prompt's tokens (`pack.share_prompts=false`).
Legend as in attention.py; M documents of a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lnjax.errors import KernelUnavailable
from lnjax.ops.attention import attention_xla

MAX_DOCUMENTS = 64
"""M: most documents of a row that the kernel is told of."""
HEAD_MULTIPLE, HEAD_MAX = 8, 256
ERROR = 0.02
"""Relative, in bfloat16."""


def documents(segments_BT: Array) -> tuple[Array, Array, Array]:
    """(lengths [B, M], starts [B, M + 1]: int32, -1 where a row has no such document; [B] bool: whether that says all).

    What can be said so: documents 1, 2, … one after the other from the row's first position, padding behind them.
    """
    numbers = jnp.arange(1, MAX_DOCUMENTS + 1)[None, None]
    lengths = (segments_BT[:, :, None] == numbers).sum(1, dtype=jnp.int32)
    ends = jnp.cumsum(lengths, axis=1)
    starts = jnp.concatenate([ends - lengths, ends[:, -1:]], axis=1)
    positions = jnp.arange(segments_BT.shape[1])[None, :, None]
    expected = jnp.where(positions < ends[:, -1:, None], 1 + (positions >= ends[:, None, :]).sum(-1, keepdims=True), 0)
    said = (segments_BT == expected[..., 0]).all(axis=1)
    there = jnp.pad(lengths, ((0, 0), (0, 1))) > 0
    return jnp.where(lengths > 0, lengths, -1), jnp.where(there, starts, -1), said


def by_documents(
    kernel: Callable[..., Any], q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array, *, option: str
) -> Array:
    """As attention_xla, in bfloat16 or float16, by `kernel(q, k, v, lengths, starts)`. A row that `documents` cannot describe is
    all NaN, never silently wrong.

    Raises KernelUnavailable for a head dim or dtype that cuDNN does not take, and for a row split over devices.
    """
    head_dim, name = q_BTNH.shape[-1], f"ops.attention={option}"
    if head_dim % HEAD_MULTIPLE or head_dim > HEAD_MAX:
        raise KernelUnavailable(f"{name}: head_dim {head_dim} is no multiple of {HEAD_MULTIPLE} up to {HEAD_MAX}")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise KernelUnavailable(f"{name}: {q_BTNH.dtype} activations; use --model.compute-dtype bfloat16")
    if q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise KernelUnavailable(f"{name}: mesh.context splits rows; use --ops.attention xla")
    lengths, starts, said = documents(segments_BT)
    real = (segments_BT > 0)[:, :, None, None]
    # What the kernel leaves in padding's gradients is not defined: the selection keeps it out.
    q, k, v = (jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = kernel(q, k, v, lengths, starts)
    out = jnp.where(real, out, jnp.zeros((), out.dtype))
    return jnp.where(said[:, None, None, None], out, jnp.full((), jnp.nan, out.dtype))


def attention_cudnn(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_segments_BT: Array, k_segments_BS: Array, start: Array
) -> Array:
    """As `by_documents` says, by the kernel that JAX has."""
    return by_documents(_fused, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, option="cudnn")


def _fused(q: Array, k: Array, v: Array, lengths: Array, starts: Array) -> Any:
    from jax._src.cudnn import fused_attention_stablehlo as fused  # noqa: PLC0415 - private: the public door takes no offsets

    said = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts, "qkv_layout": "BTNH"}
    return fused.dot_product_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL, **said
    )


def check_packed(option: str, kernel: Callable[..., Array]) -> None:
    """A small packed case on this machine's GPU, forward and backward, against attention_xla. Raises KernelUnavailable."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 256, heads, 64) for heads in (4, 2, 2, 4)]
    q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.where(jnp.arange(256) < 250, 1 + jnp.arange(256) // 90, 0)[None] * jnp.ones((2, 1), jnp.int32)

    def both(kernel, q, k, v, g):
        out, back = jax.vjp(lambda q, k, v: kernel(q, k, v, segments, segments, jnp.int32(0)), q, k, v)
        return out, *back(g)

    reference, tried = (jax.jit(functools.partial(both, f)) for f in (attention_xla, kernel))
    theirs = reference(q, k, v, g)
    try:
        ours = tried(q, k, v, g)
    except (RuntimeError, ValueError) as error:  # how XLA and Transformer Engine refuse
        raise KernelUnavailable(f"ops.attention={option}: {error}; use --ops.attention xla") from error
    errors = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(ours, theirs, strict=True)]
    if not max(errors) < ERROR:
        raise KernelUnavailable(
            f"ops.attention={option}: relative errors {errors} of output and gradients on packed rows, expected below {ERROR}; "
            "use --ops.attention xla"
        )


def compile_without_a_gpu() -> None:
    """For the rest of this process: JAX asks this machine's GPU whether it takes packed rows, the target does."""
    from jax._src.cudnn import fused_attention_stablehlo as fused  # noqa: PLC0415

    fused.check_compute_capability = lambda version: True

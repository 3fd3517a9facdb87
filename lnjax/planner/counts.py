"""Exact counts of a model: parameters, KV cache, FLOPs. Imports no jax."""

import functools
import math
from collections import Counter
from typing import Any

from lnjax.models.spec import param_shapes
from lnjax.schema import ModelSpec


@functools.cache
def num_params(spec: ModelSpec) -> int:
    return sum(_sizes(param_shapes(spec)))


@functools.cache
def block_params(spec: ModelSpec) -> int:
    """Of all blocks: without embedding, final norm and head."""
    return sum(_sizes(param_shapes(spec)["runs"]))


@functools.cache
def largest_kernel(spec: ModelSpec) -> int:
    """Elements of the widest kernel of one layer."""
    ffn = max((b.ffn.width for b in spec.blocks if b.ffn), default=0)
    return max(ffn, spec.num_heads * spec.head_dim, spec.vocab_size) * spec.d_model


@functools.cache
def parts(spec: ModelSpec) -> int:
    """Residual branches: attentions and FFNs."""
    return sum((b.attention is not None) + (b.ffn is not None) for b in spec.blocks)


@functools.cache
def kinds(spec: ModelSpec) -> tuple[tuple[tuple[int, int], int], ...]:
    """Distinct ((kv heads, ffn width), number of blocks); 0 where the part is missing."""
    return tuple(
        Counter(
            (b.attention.num_kv_heads if b.attention else 0, b.ffn.width if b.ffn else 0) for b in spec.blocks
        ).items()
    )


@functools.cache
def num_attention(spec: ModelSpec) -> int:
    """Blocks with attention."""
    return sum(b.attention is not None for b in spec.blocks)


def kv_bytes_per_token(spec: ModelSpec, *, itemsize: int = 2) -> int:
    """Keys and values of one token in all layers."""
    return sum(2 * b.attention.num_kv_heads * spec.head_dim * itemsize for b in spec.blocks if b.attention)


def flops_per_token(spec: ModelSpec, *, context: float) -> float:
    """Forward and backward, nothing recomputed: 6 N_blocks + 6 V d + 6 L (n_h d_h) s for a causal context of s tokens.

    Packed rows: s is the sum of squared lengths over the sum of lengths.
    """
    return matmul_flops_per_token(spec) + 6 * num_attention(spec) * spec.num_heads * spec.head_dim * context


def matmul_flops_per_token(spec: ModelSpec) -> float:
    """The share of `flops_per_token` that does not grow with the context."""
    return 6 * block_params(spec) + 6 * spec.vocab_size * spec.d_model


def _sizes(tree: Any) -> list[int]:
    if isinstance(tree, tuple):
        return [math.prod(tree)]
    return [size for inner in tree.values() for size in _sizes(inner)]

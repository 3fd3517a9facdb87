"""Rotary position embedding (arXiv 2104.09864)."""

import jax.numpy as jnp
from jax import Array

from lnjax.schema import ModelSpec, RopeSpec


def rope_frequencies(rope: RopeSpec, *, head_dim: int) -> Array:
    """Radians per position, [H/2] float32; llama3 scaling as in the Llama 3.1 model card."""
    inv = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.factor == 1.0:
        return inv
    turns = rope.original_max_position * inv / (2 * jnp.pi)  # full turns within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return inv * (keep + (1.0 - keep) / rope.factor)


def rope_tables(spec: ModelSpec, positions_BT: Array) -> tuple[Array, Array]:
    """(cos, sin), each [B, T, 1, H/2] float32."""
    angles = (
        positions_BT.astype(jnp.float32)[..., None]
        * rope_frequencies(spec.rope, head_dim=spec.head_dim)[(None,) * positions_BT.ndim]
    )
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotary embedding, halves convention (as Hugging Face stores q and k)."""
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)

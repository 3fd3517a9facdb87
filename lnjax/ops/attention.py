"""Attention over packed rows: causal inside a segment, nothing across segments, 0 for padding."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

MAX_QUERY_BLOCKS = 16
MIN_QUERY_BLOCK = 512


def attention_xla(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array) -> Array:
    """Grouped-query attention in plain XLA; returns [B, T, N, H] in q's dtype.

    Queries go in blocks, each against the keys up to its end, so that memory is O(T * T / blocks); the scores are
    recomputed in the backward pass. Softmax in float32.
    """
    num_tokens = q_BTNH.shape[1]
    block = max(MIN_QUERY_BLOCK, -(-num_tokens // MAX_QUERY_BLOCKS))
    if num_tokens <= block:
        return _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT, start=0)
    out = []
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        attend = jax.checkpoint(functools.partial(_attend, start=start))
        out.append(
            attend(
                q_BTNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end], segments_BT[:, start:end], segments_BT[:, :end]
            )
        )
    return jnp.concatenate(out, axis=1)


def _attend(q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, *, start: int) -> Array:
    num_queries, num_keys = q.shape[1], k.shape[1]
    rows = start + jnp.arange(num_queries)[:, None]
    causal = rows >= jnp.arange(num_keys)[None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] > 0)
    return attend_masked(q, k, v, same & causal[None])


def attend_masked(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Softmax attention where `mask_BTS` is True; a query that sees no key returns 0."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    q = q_BTNH.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32) * h**-0.5
    mask = mask_BTS[:, None, None]
    scores = jnp.where(mask, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = jnp.where(mask, weights, 0.0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH)
    return out.reshape(b, t, n, h)


def attend_cached(q_SNH: Array, k_SKTH: Array, v_SKTH: Array, num_keys_S: Array) -> Array:
    """One query a slot against the first `num_keys_S` entries of its cache; [S, N, H] in q's dtype."""
    s, n, h = q_SNH.shape
    kv, t = k_SKTH.shape[1:3]
    q = q_SNH.reshape(s, kv, n // kv, h)
    scores = jnp.einsum("skgh,skth->skgt", q, k_SKTH, preferred_element_type=jnp.float32) * h**-0.5
    seen = (jnp.arange(t)[None] < num_keys_S[:, None])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("skgt,skth->skgh", weights.astype(v_SKTH.dtype), v_SKTH).reshape(s, n, h)

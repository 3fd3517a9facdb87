"""Attention over packed rows: causal inside a segment, nothing across segments, 0 for padding.

Legend: B rows, T queries, S keys, K kv heads, G query heads of each, N = K x G, H head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lnjax.mesh import partition, positions_axis

SHORT_ROW = 512
"""Up to here the scores of a whole row are made at once."""
BLOCK = 1024
"""Queries, and keys, of one tile of scores in a longer row."""
NO_SCORE = -1e30


def attention_sharded(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array, *, kernel: Callable[..., Array], mesh: Mesh
) -> Array:
    """`kernel` on every device: its rows, its heads, its share of the queries, all keys of the row."""
    positions = positions_axis(mesh, num_tokens=q_BTNH.shape[1])
    queries, keys = partition("batch", positions, "heads", None), partition("batch", None, "heads", None)
    segments = partition("batch", positions), partition("batch", None)

    def local(q, k, v, q_segments, k_segments):
        start = jax.lax.axis_index("context") * q.shape[1] if positions else jnp.int32(0)
        return kernel(q, k, v, q_segments, k_segments, start)

    run = jax.shard_map(local, mesh=mesh, in_specs=(queries, keys, keys, *segments), out_specs=queries, check_vma=False)
    return run(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT)


def attention_xla(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_segments_BT: Array, k_segments_BS: Array, start: Array
) -> Array:
    """Grouped-query attention in plain XLA; [B, T, N, H] in q's dtype. `start`: position of the first query in its row.

    A row longer than SHORT_ROW goes in tiles with a running softmax (arXiv 2205.14135): memory is that of one tile, tiles
    above the diagonal are left out, and the backward pass makes each tile's scores again. Softmax in float32.
    """
    num_queries, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if num_keys <= SHORT_ROW:
        rows = start + jnp.arange(num_queries)
        mask = _mask(q_segments_BT, k_segments_BS, rows, jnp.arange(num_keys))
        return attend_masked(q_BTNH, k_BSKH, v_BSKH, mask)
    b, t, n, h = q_BTNH.shape
    q = q_BTNH.reshape(b, t, k_BSKH.shape[2], -1, h)
    q, q_segments = _pad(q), _pad(q_segments_BT)
    k, v, k_segments = _pad(k_BSKH), _pad(v_BSKH), _pad(k_segments_BS)
    return _tiled(q, k, v, q_segments, k_segments, start)[:, :t].reshape(b, t, n, h)


def _pad(x: Array) -> Array:
    """Dim 1 filled up with zeros (segment 0: padding) to whole tiles."""
    return jnp.pad(x, [(0, -x.shape[1] % min(BLOCK, x.shape[1]) if i == 1 else 0) for i in range(x.ndim)])


def _mask(q_segments: Array, k_segments: Array, q_rows: Array, k_rows: Array) -> Array:
    """[B, T, S]: True where the query sees the key."""
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] > 0)
    return same & (q_rows[:, None] >= k_rows[None, :])[None]


class _Tiles:
    """The tiles of one row of blocks: what both passes share."""

    def __init__(self, q: Array, k: Array, q_segments: Array, k_segments: Array, start: Array):
        self.rows, self.columns = min(BLOCK, q.shape[1]), min(BLOCK, k.shape[1])
        self.num_rows, self.num_columns = q.shape[1] // self.rows, k.shape[1] // self.columns
        self._q_segments, self._k_segments, self._start = q_segments, k_segments, start
        self._scale = q.shape[-1] ** -0.5

    def queries(self, x: Array, i: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, axis=1)

    def keys(self, x: Array, j: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.columns, self.columns, axis=1)

    def needed(self, i: Array) -> Array:
        """Tiles that hold a key at or before the last query of row of blocks i."""
        last = self._start + (i + 1) * self.rows - 1
        return jnp.minimum(last // self.columns + 1, self.num_columns)

    def scores(self, q: Array, k: Array, i: Array, j: Array) -> Array:
        """[B, K, G, rows, columns] float32, NO_SCORE where masked."""
        q_rows = self._start + i * self.rows + jnp.arange(self.rows)
        k_rows = j * self.columns + jnp.arange(self.columns)
        mask = _mask(self.queries(self._q_segments, i), self.keys(self._k_segments, j), q_rows, k_rows)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * self._scale
        return jnp.where(mask[:, None, None], scores, NO_SCORE)


@jax.custom_vjp
def _tiled(q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, start: Array) -> Array:
    return _tiled_fwd(q, k, v, q_segments, k_segments, start)[0]


def _tiled_fwd(q, k, v, q_segments, k_segments, start):
    tiles = _Tiles(q, k, q_segments, k_segments, start)

    def row(i):
        q_i = tiles.queries(q, i)

        def tile(j, carry):
            out, top, total = carry
            scores = tiles.scores(q_i, tiles.keys(k, j), i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            p = jnp.where(scores > NO_SCORE, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            add = jnp.einsum(
                "bkgts,bskh->bkgth", p.astype(v.dtype), tiles.keys(v, j), preferred_element_type=jnp.float32
            )
            return out * shrink[..., None] + add, new_top, total * shrink + p.sum(-1)

        b, t, kv, g, h = q_i.shape
        init = (jnp.zeros((b, kv, g, t, h)), jnp.full((b, kv, g, t), NO_SCORE), jnp.zeros((b, kv, g, t)))
        out, top, total = jax.lax.fori_loop(0, tiles.needed(i), tile, init)
        total = jnp.maximum(total, 1e-30)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(row, jnp.arange(tiles.num_rows))  # [rows of blocks, B, K, G, rows, ...]
    whole = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(q.shape)
    return whole, (q, k, v, q_segments, k_segments, start, whole, lse)


def _tiled_bwd(residuals, g):
    q, k, v, q_segments, k_segments, start, out, lse = residuals
    tiles, scale = _Tiles(q, k, q_segments, k_segments, start), q.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def row(carry, i):
        q_i, g_i = tiles.queries(q, i), tiles.queries(g, i)
        inner = (g_i.astype(jnp.float32) * tiles.queries(out, i)).sum(-1).transpose(0, 2, 3, 1)

        def tile(j, carry):
            dq, dk, dv = carry
            k_j, v_j = tiles.keys(k, j), tiles.keys(v, j)
            scores = tiles.scores(q_i, k_j, i, j)
            p = jnp.where(scores > NO_SCORE, jnp.exp(scores - lse[i][..., None]), 0.0)
            dp = einsum("btkgh,bskh->bkgts", g_i, v_j)
            ds = (p * (dp - inner[..., None]) * scale).astype(q.dtype)
            dk = _add(dk, einsum("bkgts,btkgh->bskh", ds, q_i), j * tiles.columns)
            dv = _add(dv, einsum("bkgts,btkgh->bskh", p.astype(q.dtype), g_i), j * tiles.columns)
            return dq + einsum("bkgts,bskh->btkgh", ds, k_j), dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, tiles.needed(i), tile, (jnp.zeros(q_i.shape), *carry))
        return (dk, dv), dq.astype(q.dtype)

    (dk, dv), dq = jax.lax.scan(row, (jnp.zeros(k.shape), jnp.zeros(v.shape)), jnp.arange(tiles.num_rows))
    return jnp.moveaxis(dq, 0, 1).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _add(total: Array, part: Array, at: Array) -> Array:
    """`part` added to `total` along dim 1."""
    old = jax.lax.dynamic_slice_in_dim(total, at, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, at, axis=1)


def attend_masked(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """Softmax attention where `mask_BTS` is True; a query that sees no key returns 0."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    q = q_BTNH.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32) * h**-0.5
    mask = mask_BTS[:, None, None]
    scores = jnp.where(mask, scores, NO_SCORE)
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

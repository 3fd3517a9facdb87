"""Attention over packed rows: causal inside a segment, nothing across segments or branches of one, 0 for padding.

Legend: B rows, T queries, S keys, K kv heads, G query heads of each, N = K x G, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lnjax.mesh import by_device, partition, positions_axis
from lnjax.types import BRANCH

BLOCK = 1024
"""Queries, and keys, of one tile of scores; a shorter row is one tile."""
BLOCK_SERIAL = 64
"""The same where sequences and heads go one after the other: a tile that stays in a core's cache."""
NO_SCORE, LOWEST = -1e30, -1e20
"""A masked score; where the running maximum begins. exp(NO_SCORE - anything from LOWEST on) is 0."""


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

    run = by_device(local, mesh=mesh, in_specs=(queries, keys, keys, *segments), out_specs=queries)
    return run(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT)


def attention_xla(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    start: Array,
    *,
    serial: bool = False,
) -> Array:
    """Grouped-query attention in plain XLA; [B, T, N, H] in q's dtype. `start`: position of the first query in its row.

    Tiles with a running softmax (arXiv 2205.14135): memory is that of one tile, tiles above the diagonal and tiles of other
    documents and branches are left out, and the backward pass makes each tile's scores again. Softmax in float32. `serial` (for
    CPUs) takes rows and heads one after the other, so that a row leaves out its own tiles and every product is of two matrices.
    """
    b, t, n, h = q_BTNH.shape
    block = BLOCK_SERIAL if serial else BLOCK
    q = _pad(q_BTNH.reshape(b, t, k_BSKH.shape[2], -1, h), block)
    k, v = _pad(k_BSKH, block), _pad(v_BSKH, block)
    q_segments, k_segments = _pad(q_segments_BT, block), _pad(k_segments_BS, block)
    out = _tiled(q, k, v, q_segments, k_segments, start, block, serial)
    return out[:, :t].reshape(b, t, n, h)


def _pad(x: Array, block: int) -> Array:
    """Dim 1 filled up with zeros (segment 0: padding) to whole tiles."""
    return jnp.pad(x, [(0, -x.shape[1] % min(block, x.shape[1]) if i == 1 else 0) for i in range(x.ndim)])


def _mask(q_segments: Array, k_segments: Array, q_rows: Array, k_rows: Array) -> Array:
    """[T, S]: True where the query sees the key: one before it, of its own branch or of its segment's trunk."""
    trunk = q_segments % BRANCH
    seen = (q_segments[:, None] == k_segments[None, :]) | (trunk[:, None] == k_segments[None, :])
    return seen & (q_segments[:, None] > 0) & (q_rows[:, None] >= k_rows[None, :])


def _needed(q_segments: Array, k_segments: Array, start: Array, block: int) -> Array:
    """[B, T / rows, S / columns]: True for a tile of keys not behind the diagonal of which a query of the tile may see one. By
    the range of documents and branches in each, so some tiles are taken for nothing, and none is left out."""
    rows, columns = (min(block, x.shape[1]) for x in (q_segments, k_segments))
    q, k = q_segments.reshape(len(q_segments), -1, rows), k_segments.reshape(len(k_segments), -1, columns)

    def span(numbers: Array, counted: Array) -> tuple[Array, Array]:
        return jnp.where(counted, numbers, jnp.iinfo(jnp.int32).max).min(-1), jnp.where(counted, numbers, -1).max(-1)

    def meet(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
        (a_low, a_high), (b_low, b_high) = a, b
        return (a_low[:, :, None] <= b_high[:, None]) & (b_low[:, None] <= a_high[:, :, None])

    def along(segments: Array) -> Array:
        """As they follow each other in a row: of each document the trunk, then its branches."""
        return segments % BRANCH * BRANCH + segments // BRANCH

    own = meet(span(along(q), q > 0), span(along(k), k > 0))
    trunk = meet(span(q % BRANCH, q > 0), span(k, (k > 0) & (k < BRANCH)))
    last = start + (1 + jnp.arange(q.shape[1])) * rows - 1
    return (own | trunk) & (jnp.arange(k.shape[1])[None] * columns <= last[:, None])[None]


def _in_order(needed: Array) -> tuple[Array, Array]:
    """(tiles of keys, the needed ones first; how many those are), for each tile of queries."""
    return jnp.argsort(~needed, axis=-1, stable=True), needed.sum(-1)


class _Tiles:
    """The tiles of one row and kv head: what both passes share. q [T, G, H], k and v [S, H]."""

    def __init__(self, q: Array, k: Array, q_segments: Array, k_segments: Array, start: Array, block: int):
        self.rows, self.columns = min(block, q.shape[0]), min(block, k.shape[0])
        self.num_rows = q.shape[0] // self.rows
        self._q_segments, self._k_segments, self._start = q_segments, k_segments, start
        self._scale = q.shape[-1] ** -0.5

    def queries(self, x: Array, i: Array) -> Array:
        """[rows x G, ...] of x [T, G, ...]."""
        part = jax.lax.dynamic_slice_in_dim(x, i * self.rows, self.rows)
        return part.reshape(-1, *x.shape[2:])

    def keys(self, x: Array, j: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.columns, self.columns)

    def scores(self, q: Array, k: Array, i: Array, j: Array) -> Array:
        """[rows x G, columns] float32, NO_SCORE where masked."""
        q_segments = jax.lax.dynamic_slice_in_dim(self._q_segments, i * self.rows, self.rows)
        q_rows = self._start + i * self.rows + jnp.arange(self.rows)
        mask = _mask(q_segments, self.keys(self._k_segments, j), q_rows, j * self.columns + jnp.arange(self.columns))
        scores = _dot(q, k, 1, 1) * self._scale
        return jnp.where(mask[:, None], scores.reshape(self.rows, -1, self.columns), NO_SCORE).reshape(scores.shape)


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    """Product over dim i of a and dim j of b, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _each(f: Callable[..., Any], q_like: tuple, k_like: tuple, by_row: tuple, needed: Array, *, serial: bool) -> Any:
    """f(*arrays of one row and kv head, *_in_order(its tiles)) for all: q_like [B, T, K, G, ...], k_like [B, S, K, ...], by_row
    [B, ...]; results [B, K, ...]. In parallel every row takes the tiles that any row needs."""
    if serial:
        b, _, kv = k_like[0].shape[:3]
        by_row = *by_row, *_in_order(needed)

        def one(at: Array) -> Any:
            row, head = at // kv, at % kv
            return f(*(x[row, :, head] for x in (*q_like, *k_like)), *(x[row] for x in by_row))

        found = jax.lax.map(one, jnp.arange(b * kv))
        return jax.tree.map(lambda x: x.reshape(b, kv, *x.shape[1:]), found)
    q_like, k_like = (tuple(jnp.moveaxis(x, 2, 1) for x in xs) for xs in (q_like, k_like))
    shared = _in_order(needed.any(0))

    def row(*xs: Any) -> Any:
        heads, rest = xs[: len(q_like) + len(k_like)], xs[len(q_like) + len(k_like) :]
        return jax.vmap(lambda *h: f(*h, *rest, *shared))(*heads)

    return jax.vmap(row)(*q_like, *k_like, *by_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _tiled(q, k, v, q_segments, k_segments, start, block: int, serial: bool) -> Array:
    return _tiled_fwd(q, k, v, q_segments, k_segments, start, block, serial)[0]


def _tiled_fwd(q, k, v, q_segments, k_segments, start, block, serial):
    def one(q, k, v, q_segments, k_segments, order, count):
        tiles = _Tiles(q, k, q_segments, k_segments, start, block)

        def row(i):
            q_i = tiles.queries(q, i)

            def tile(n, carry):
                j, (out, top, total) = order[i, n], carry
                scores = tiles.scores(q_i, tiles.keys(k, j), i, j)
                new_top = jnp.maximum(top, scores.max(-1))
                p, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
                add = _dot(p.astype(v.dtype), tiles.keys(v, j), 1, 0)
                return out * shrink[:, None] + add, new_top, total * shrink + p.sum(-1)

            size = q_i.shape[0]
            init = (jnp.zeros(q_i.shape, jnp.float32), jnp.full((size,), LOWEST), jnp.zeros((size,)))
            out, top, total = jax.lax.fori_loop(0, count[i], tile, init)
            total = jnp.maximum(total, 1e-30)
            return (out / total[:, None]).astype(q.dtype), top + jnp.log(total)

        out, lse = jax.lax.map(row, jnp.arange(tiles.num_rows))
        return out.reshape(q.shape), lse

    needed = _needed(q_segments, k_segments, start, block)
    out, lse = _each(one, (q,), (k, v), (q_segments, k_segments), needed, serial=serial)
    out = jnp.moveaxis(out, 1, 2)
    return out, (q, k, v, q_segments, k_segments, start, out, lse)


def _tiled_bwd(block, serial, residuals, g):
    q, k, v, q_segments, k_segments, start, out, lse = residuals
    scale = q.shape[-1] ** -0.5
    inner = (g.astype(jnp.float32) * out).sum(-1)

    def one(q, g, inner, k, v, lse, q_segments, k_segments, order, count):
        tiles = _Tiles(q, k, q_segments, k_segments, start, block)

        def row(carry, i):
            q_i, g_i, inner_i = (tiles.queries(x, i) for x in (q, g, inner))

            def tile(n, carry):
                j, (dq, dk, dv) = order[i, n], carry
                k_j, v_j = tiles.keys(k, j), tiles.keys(v, j)
                p = jnp.exp(tiles.scores(q_i, k_j, i, j) - lse[i][:, None])
                ds = (p * (_dot(g_i, v_j, 1, 1) - inner_i[:, None]) * scale).astype(q.dtype)
                at = j * tiles.columns
                dk, dv = _add(dk, _dot(ds, q_i, 0, 0), at), _add(dv, _dot(p.astype(q.dtype), g_i, 0, 0), at)
                return dq + _dot(ds, k_j, 1, 0), dk, dv

            dq, dk, dv = jax.lax.fori_loop(0, count[i], tile, (jnp.zeros(q_i.shape, jnp.float32), *carry))
            return (dk, dv), dq.astype(q.dtype)

        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(row, (zeros, zeros), jnp.arange(tiles.num_rows))
        return dq.reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype)

    needed = _needed(q_segments, k_segments, start, block)
    arrays = (q, g, inner), (k, v, jnp.moveaxis(lse, 1, 2)), (q_segments, k_segments)
    found = _each(one, *arrays, needed, serial=serial)
    return *(jnp.moveaxis(x, 1, 2) for x in found), None, None, None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _add(total: Array, part: Array, at: Array) -> Array:
    """`part` added to `total` along dim 0."""
    old = jax.lax.dynamic_slice_in_dim(total, at, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, at, 0)


def attend_cached(q_SJNH: Array, k_SKHT: Array, v_SKTH: Array, num_keys_SJ: Array) -> Array:
    """J queries a slot, each against the first `num_keys_SJ` entries of the slot's cache; [S, J, N, H] in q's dtype.

    Both products are of matrices by slot and kv head, M = J x G queries by all keys: the order that XLA:CPU is quick in
    (docs/log.md).
    """
    s, j, n, h = q_SJNH.shape
    kv, t = k_SKHT.shape[1], k_SKHT.shape[3]
    q_SKMH = q_SJNH.reshape(s, j, kv, n // kv, h).swapaxes(1, 2).reshape(s, kv, -1, h)
    scores = jnp.einsum("skmh,skht->skmt", q_SKMH, k_SKHT, preferred_element_type=jnp.float32) * h**-0.5
    seen = (jnp.arange(t)[None, None] < num_keys_SJ[..., None])[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores.reshape(s, kv, j, -1, t), -1e30), axis=-1)
    out_SKMH = jnp.einsum("skmt,skth->skmh", weights.reshape(s, kv, -1, t).astype(v_SKTH.dtype), v_SKTH)
    return out_SKMH.reshape(s, kv, j, -1, h).swapaxes(1, 2).reshape(s, j, n, h)

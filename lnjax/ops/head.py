"""Logprob and entropy of targets under the output head, without a [tokens, vocabulary] array.

Forward: blocks of vocabulary; each adds to a running log-sum-exp (online softmax, arXiv 1805.02867). Backward: the block's
logits are computed again, p = exp(logits - logsumexp), and d logprob / d logits = onehot - p goes straight into the
gradients of hidden states and head. Peak memory is one block of logits.

Tokens that nobody asks for (most of a prompt) are left out: each device puts its wanted ones first and goes through as many
chunks of tokens as hold them.

With W split over the mesh's tensor axis each device runs its own rows of the vocabulary and the sums meet in a psum. The
gradient of the hidden states leaves split over their positions, as the residual stream is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from lnjax.mesh import RULES, axis_size, by_device, check_divisible, inside, partition, platform, positions_axis, psum

LOGITS_BLOCK_BYTES = {"cpu": 64 * 2**20, "gpu": 512 * 2**20}
"""By platform. On a GPU many small blocks wait for memory: each adds to the whole gradient of the hidden states."""
VOCAB = "tensor"
WIDTH = ("fsdp", "context")
assert (RULES["vocab"], RULES["embed"]) == (VOCAB, WIDTH)
CHUNK = {"cpu": 128, "gpu": 8192}
"""Most tokens of a chunk."""
NO_LOGIT, UNSEEN = -1e30, -(2**31)
"""What takes no part in a sum over the vocabulary; the number of no token."""


class HeadOutput(NamedTuple):
    logprobs_BT: Array
    """float32; natural log-probability of each target."""
    entropy_BT: Array
    """float32; entropy of the whole distribution in nats. Carries no gradient."""


def head_xla(
    x_BTD: Array,
    w_VD: Array,
    targets_BT: Array,
    *,
    mesh: Mesh,
    temperature: float = 1.0,
    wanted_BT: Array | None = None,
) -> HeadOutput:
    """x_BTD: hidden states that predict `targets_BT`; w_VD: head (or tied embedding) in the compute dtype; wanted_BT: positive
    where the output is read (None: everywhere), elsewhere it is 0.

    Raises ConfigError for rows that do not divide over the mesh.
    """
    check_divisible(mesh, name="packed rows", shape=targets_BT.shape, logical=("batch", "positions"))
    wanted_BT = jnp.ones_like(targets_BT) if wanted_BT is None else (wanted_BT > 0).astype(jnp.int32)
    logprobs, entropy = _head(x_BTD, w_VD, targets_BT, wanted_BT, mesh, float(temperature))
    return HeadOutput(logprobs, jax.lax.stop_gradient(entropy))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _head(x: Array, w: Array, targets: Array, wanted: Array, mesh: Mesh, temperature: float) -> tuple[Array, Array]:
    logprobs, entropy, _ = _forward(x, w, targets, wanted, mesh=mesh, temperature=temperature)
    return logprobs, entropy


def _head_fwd(x, w, targets, wanted, mesh, temperature):
    logprobs, entropy, lse = _forward(x, w, targets, wanted, mesh=mesh, temperature=temperature)
    return (logprobs, entropy), (x, w, targets, wanted, lse)


def _head_bwd(mesh, temperature, residuals, cotangents):
    x, w, targets, wanted, lse = residuals
    dx, dw = _backward(x, w, targets, wanted, lse, cotangents[0], mesh=mesh, temperature=temperature)
    return dx, dw, None, None


_head.defvjp(_head_fwd, _head_bwd)


def _wanted_first(wanted: Array, *, mesh: Mesh) -> tuple[Array, Array, int]:
    """(order [n] of the tokens, number of chunks that hold the wanted ones, tokens of a chunk)."""
    n = wanted.shape[0]
    chunk = min(n, CHUNK[platform(mesh)])
    before = jnp.cumsum(wanted) - wanted
    place = jnp.where(wanted > 0, before, wanted.sum() + jnp.arange(n) - before)
    return jnp.zeros_like(place).at[place].set(jnp.arange(n)), -(-wanted.sum() // chunk), chunk


def _in_order(x: Array, order: Array, chunk: int) -> Array:
    """x [n, ...] in that order, filled up with zeros to whole chunks."""
    return jnp.pad(x[order], [(0, -x.shape[0] % chunk), *((0, 0),) * (x.ndim - 1)])


def _block_rows(size: int, num_rows: int, *, mesh: Mesh) -> int:
    """Vocabulary rows of one block, each with `size` logits or gradients: equal blocks where the vocabulary divides into as many
    as it takes."""
    most = max(128, LOGITS_BLOCK_BYTES[platform(mesh)] // (4 * size) // 128 * 128)
    blocks = -(-num_rows // most)
    return num_rows // blocks if num_rows % blocks == 0 else most


def _part(w: Array, start: Array, block: int) -> Array:
    """`block` rows of w; a slice of all of them would be a copy."""
    return w if block == len(w) else jax.lax.dynamic_slice_in_dim(w, start, block)


def _logits(x: Array, w: Array, index: Array, *, block: int, temperature: float) -> tuple[Array, Array, Array, Array]:
    """One block: (start row, number of each row [block], logits float32 [n, block], rows of w). A row seen by an earlier block
    has the number UNSEEN and the logit NO_LOGIT."""
    num_rows = w.shape[0]
    nominal = index * block
    start = jnp.minimum(nominal, num_rows - block)  # the last block overlaps the one before it
    rows = _part(w, start, block)
    logits = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32) / temperature
    numbers = start + jnp.arange(block)
    if num_rows % block:
        fresh = numbers >= nominal
        numbers, logits = jnp.where(fresh, numbers, UNSEEN), jnp.where(fresh[None, :], logits, NO_LOGIT)
    return start, numbers, logits, rows


def _forward(x_BTD, w_VD, targets_BT, wanted_BT, *, mesh: Mesh, temperature: float):
    shards = axis_size(mesh, "vocab")

    def local(x_btd, w, targets_bt, wanted_bt):
        order, count, chunk = _wanted_first(wanted_bt.reshape(-1), mesh=mesh)
        x = _in_order(x_btd.reshape(-1, x_btd.shape[-1]), order, chunk)
        targets = _in_order(targets_bt.reshape(-1), order, chunk) - jax.lax.axis_index(VOCAB) * w.shape[0]
        block = _block_rows(max(chunk, w.shape[1]), w.shape[0], mesh=mesh)

        def tokens(number, found):
            x_c, targets_c = (jax.lax.dynamic_slice_in_dim(a, number * chunk, chunk) for a in (x, targets))

            def body(index, carry):
                top, total, weighted, picked = carry
                _, numbers, logits, _ = _logits(x_c, w, index, block=block, temperature=temperature)
                new_top = jnp.maximum(top, logits.max(-1))
                scale = jnp.exp(top - new_top)
                p = jnp.exp(logits - new_top[:, None])
                total = total * scale + p.sum(-1)
                weighted = weighted * scale + (p * logits).sum(-1)
                hit = numbers[None, :] == targets_c[:, None]
                picked = picked + jnp.where(hit, logits, 0.0).sum(-1)
                return new_top, total, weighted, picked

            zeros = jnp.zeros((chunk,), jnp.float32)
            init = (jnp.full((chunk,), NO_LOGIT, jnp.float32), zeros, zeros, zeros)
            top, total, weighted, picked = jax.lax.fori_loop(0, -(-w.shape[0] // block), body, init)
            if shards > 1:
                all_top = jax.lax.pmax(top, VOCAB)
                scale = jnp.exp(top - all_top)
                total, weighted, picked = jax.lax.psum((total * scale, weighted * scale, picked), VOCAB)
                top = all_top
            lse = top + jnp.log(total)
            new = jnp.stack([picked - lse, lse - weighted / total, lse])
            return jax.lax.dynamic_update_slice_in_dim(found, new, number * chunk, 1)

        found = jax.lax.fori_loop(0, count, tokens, jnp.zeros((3, x.shape[0]), jnp.float32))
        found = jnp.zeros((3, order.size)).at[:, order].set(found[:, : order.size])
        logprobs, entropy, lse = found.reshape(3, *targets_bt.shape)
        return logprobs * wanted_bt, entropy * wanted_bt, lse  # unwanted ones' too: exp(logits - 0) overflows

    rows = partition("batch", "positions")
    specs = rows, PartitionSpec(VOCAB), rows, rows
    return by_device(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows, rows))(x_BTD, w_VD, targets_BT, wanted_BT)


def _backward(x_BTD, w_VD, targets_BT, wanted_BT, lse_BT, g_BT, *, mesh: Mesh, temperature: float):
    shards, parts, replicas = axis_size(mesh, "vocab"), axis_size(mesh, "embed"), tuple({"data"} - inside())
    between = positions_axis(mesh, num_tokens=targets_BT.shape[1], between_blocks=True)
    width = WIDTH if w_VD.shape[1] % parts == 0 else None
    apart, along = width is not None and parts > 1, shards > 1 and between == "residual"
    scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)

    def local(x_btd, w, targets_bt, wanted_bt, lse_bt, g_bt):
        order, count, chunk = _wanted_first(wanted_bt.reshape(-1), mesh=mesh)
        arrays = x_btd.reshape(-1, x_btd.shape[-1]), *(a.reshape(-1) for a in (targets_bt, lse_bt, g_bt * wanted_bt))
        x, targets, lse, g = (_in_order(a, order, chunk) for a in arrays)
        g, targets = g / temperature, targets - jax.lax.axis_index(VOCAB) * w.shape[0]
        block = _block_rows(max(chunk, w.shape[1]), w.shape[0], mesh=mesh)

        def tokens(number, carry):
            at = number * chunk
            x_c, targets_c, lse_c, g_c = (jax.lax.dynamic_slice_in_dim(a, at, chunk) for a in (x, targets, lse, g))

            def body(index, carry):
                dx, dw = carry
                start, numbers, logits, rows = _logits(x_c, w, index, block=block, temperature=temperature)
                hit = numbers[None, :] == targets_c[:, None]
                dlogits = (hit - jnp.exp(logits - lse_c[:, None])) * g_c[:, None]
                dlogits = dlogits.astype(x.dtype)
                dx = dx + jnp.einsum("nv,vd->nd", dlogits, rows, preferred_element_type=jnp.float32)
                dw_block = jnp.einsum("nv,nd->vd", dlogits, x_c, preferred_element_type=jnp.float32)
                whole = _part(dw, start, block) + dw_block
                return dx, whole if block == len(w) else jax.lax.dynamic_update_slice_in_dim(dw, whole, start, 0)

            dx, dw = carry
            init = (jnp.zeros(x_c.shape, jnp.float32), dw)
            dx_c, dw = jax.lax.fori_loop(0, -(-w.shape[0] // block), body, init)
            return jax.lax.dynamic_update_slice_in_dim(dx, dx_c, at, 0), dw

        init = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, jnp.float32))
        dx, dw = jax.lax.fori_loop(0, count, tokens, init)
        dx = jnp.zeros((order.size, dx.shape[1])).at[order].set(dx[: order.size]).reshape(x_btd.shape)
        dx = scatter(dx, VOCAB) if along else psum(dx, VOCAB, mesh)
        dw = psum(dw, replicas, mesh)
        dw = scatter(dw, width) if apart else psum(dw, WIDTH, mesh)
        return dx.astype(x.dtype), dw.astype(w.dtype)

    rows = partition("batch", "positions")
    specs = rows, PartitionSpec(VOCAB), *(rows,) * 4
    made = partition("batch", between), PartitionSpec(VOCAB, width)
    return by_device(local, mesh=mesh, in_specs=specs, out_specs=made)(x_BTD, w_VD, targets_BT, wanted_BT, lse_BT, g_BT)

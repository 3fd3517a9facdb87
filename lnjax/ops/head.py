"""Logprob and entropy of targets under the output head, without a [tokens, vocabulary] array.

Forward: blocks of vocabulary; each adds to a running log-sum-exp (online softmax, arXiv 1805.02867). Backward: the block's
logits are computed again, p = exp(logits - logsumexp), and d logprob / d logits = onehot - p goes straight into the
gradients of hidden states and head. Peak memory is one block of logits.

With W split over the mesh's tensor axis each device runs its own rows of the vocabulary and the sums meet in a psum. The
gradient of the hidden states leaves split over their positions, as the residual stream is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from lnjax.mesh import RULES, axis_size, check_divisible, partition, positions_axis

LOGITS_BLOCK_BYTES = {"cpu": 64 * 2**20, "gpu": 512 * 2**20}
"""By platform. On a GPU many small blocks wait for memory: each adds to the whole gradient of the hidden states."""
VOCAB = "tensor"
WIDTH = ("fsdp", "context")
assert (RULES["vocab"], RULES["embed"]) == (VOCAB, WIDTH)


class HeadOutput(NamedTuple):
    logprobs_BT: Array
    """float32; natural log-probability of each target."""
    entropy_BT: Array
    """float32; entropy of the whole distribution in nats. Carries no gradient."""


def head_xla(x_BTD: Array, w_VD: Array, targets_BT: Array, *, mesh: Mesh, temperature: float = 1.0) -> HeadOutput:
    """x_BTD: hidden states that predict `targets_BT`; w_VD: head (or tied embedding) in the compute dtype.

    Raises ConfigError for rows that do not divide over the mesh.
    """
    check_divisible(mesh, name="packed rows", shape=targets_BT.shape, logical=("batch", "positions"))
    logprobs, entropy = _head(x_BTD, w_VD, targets_BT, mesh, float(temperature))
    return HeadOutput(logprobs, jax.lax.stop_gradient(entropy))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _head(x: Array, w: Array, targets: Array, mesh: Mesh, temperature: float) -> tuple[Array, Array]:
    logprobs, entropy, _ = _forward(x, w, targets, mesh=mesh, temperature=temperature)
    return logprobs, entropy


def _head_fwd(x, w, targets, mesh, temperature):
    logprobs, entropy, lse = _forward(x, w, targets, mesh=mesh, temperature=temperature)
    return (logprobs, entropy), (x, w, targets, lse)


def _head_bwd(mesh, temperature, residuals, cotangents):
    x, w, targets, lse = residuals
    dx, dw = _backward(x, w, targets, lse, cotangents[0], mesh=mesh, temperature=temperature)
    return dx, dw, None


_head.defvjp(_head_fwd, _head_bwd)


def _block_rows(num_tokens: int, num_rows: int, *, mesh: Mesh) -> int:
    """Vocabulary rows of one block."""
    rows = LOGITS_BLOCK_BYTES[mesh.devices.flat[0].platform] // (4 * num_tokens) // 128 * 128
    return min(num_rows, max(128, rows))


def _logits(x: Array, w: Array, index: Array, *, block: int, temperature: float) -> tuple[Array, Array, Array]:
    """One block: (start row, logits float32 [n, block] with rows seen by an earlier block at -inf, rows of w)."""
    num_rows = w.shape[0]
    nominal = index * block
    start = jnp.minimum(nominal, num_rows - block)  # the last block overlaps the one before it
    rows = jax.lax.dynamic_slice_in_dim(w, start, block)
    logits = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32) / temperature
    fresh = start + jnp.arange(block) >= nominal
    return start, jnp.where(fresh[None, :], logits, -jnp.inf), rows


def _forward(x_BTD, w_VD, targets_BT, *, mesh: Mesh, temperature: float):
    shards = axis_size(mesh, "vocab")

    def local(x_btd, w, targets_bt):
        shape = targets_bt.shape
        x, targets = x_btd.reshape(-1, x_btd.shape[-1]), targets_bt.reshape(-1)
        targets = targets - jax.lax.axis_index(VOCAB) * w.shape[0]
        block = _block_rows(x.shape[0], w.shape[0], mesh=mesh)

        def body(index, carry):
            top, total, weighted, picked = carry
            start, logits, _ = _logits(x, w, index, block=block, temperature=temperature)
            new_top = jnp.maximum(top, logits.max(-1))
            scale = jnp.exp(top - new_top)
            p = jnp.exp(logits - new_top[:, None])
            total = total * scale + p.sum(-1)
            weighted = weighted * scale + jnp.where(p > 0, p * logits, 0.0).sum(-1)
            hit = (start + jnp.arange(block))[None, :] == targets[:, None]
            picked = jnp.where((hit & (logits > -jnp.inf)).any(-1), jnp.where(hit, logits, 0.0).sum(-1), picked)
            return new_top, total, weighted, picked

        n = x.shape[0]
        zeros = jnp.zeros((n,), jnp.float32)
        init = (jnp.full((n,), -1e30, jnp.float32), zeros, zeros, zeros)
        top, total, weighted, picked = jax.lax.fori_loop(0, -(-w.shape[0] // block), body, init)
        if shards > 1:
            all_top = jax.lax.pmax(top, VOCAB)
            scale = jnp.exp(top - all_top)
            total, weighted, picked = jax.lax.psum((total * scale, weighted * scale, picked), VOCAB)
            top = all_top
        lse = top + jnp.log(total)
        return tuple(a.reshape(shape) for a in (picked - lse, lse - weighted / total, lse))

    rows = partition("batch", "positions")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(VOCAB), rows),
        out_specs=(rows, rows, rows),
        check_vma=False,
    )
    return run(x_BTD, w_VD, targets_BT)


def _backward(x_BTD, w_VD, targets_BT, lse_BT, g_BT, *, mesh: Mesh, temperature: float):
    shards = axis_size(mesh, "vocab")
    between = positions_axis(mesh, num_tokens=targets_BT.shape[1], between_blocks=True)
    width = WIDTH if w_VD.shape[1] % axis_size(mesh, "embed") == 0 else None

    def local(x_btd, w, targets_bt, lse_bt, g_bt):
        x, targets, lse = x_btd.reshape(-1, x_btd.shape[-1]), targets_bt.reshape(-1), lse_bt.reshape(-1)
        g = g_bt.reshape(-1) / temperature
        targets = targets - jax.lax.axis_index(VOCAB) * w.shape[0]
        block = _block_rows(x.shape[0], w.shape[0], mesh=mesh)

        def body(index, carry):
            dx, dw = carry
            start, logits, rows = _logits(x, w, index, block=block, temperature=temperature)
            hit = ((start + jnp.arange(block))[None, :] == targets[:, None]) & (logits > -jnp.inf)
            dlogits = (hit - jnp.exp(logits - lse[:, None])) * g[:, None]
            dlogits = dlogits.astype(x.dtype)
            dx = dx + jnp.einsum("nv,vd->nd", dlogits, rows, preferred_element_type=jnp.float32)
            dw_block = jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_slice_in_dim(dw, start, block)
            return dx, jax.lax.dynamic_update_slice_in_dim(dw, old + dw_block, start, 0)

        init = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, jnp.float32))
        dx, dw = jax.lax.fori_loop(0, -(-w.shape[0] // block), body, init)
        dx = dx.reshape(x_btd.shape)
        if shards > 1 and between == "residual":
            dx = jax.lax.psum_scatter(dx, VOCAB, scatter_dimension=1, tiled=True)
        elif shards > 1:
            dx = jax.lax.psum(dx, VOCAB)
        dw = jax.lax.psum(dw, "data")
        dw = jax.lax.psum_scatter(dw, width, scatter_dimension=1, tiled=True) if width else jax.lax.psum(dw, WIDTH)
        return dx.astype(x.dtype), dw.astype(w.dtype)

    rows = partition("batch", "positions")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(VOCAB), rows, rows, rows),
        out_specs=(partition("batch", between), PartitionSpec(VOCAB, width)),
        check_vma=False,
    )
    return run(x_BTD, w_VD, targets_BT, lse_BT, g_BT)

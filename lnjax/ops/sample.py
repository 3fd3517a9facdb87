"""Drawing one token a slot, and the logprob it had in the distribution drawn from."""

import jax
import jax.numpy as jnp
from jax import Array

from lnjax.types import SamplingParams

LANE = 128


def sample(logits_SV: Array, keys_S: Array, *, sampling: SamplingParams) -> tuple[Array, Array]:
    """(tokens int32 [S], logprobs float32 [S]) from float32 logits.

    Inverse CDF with one uniform a token, in two levels (sums of 128 tokens, then inside one of them), so that neither
    noise nor a running sum over the whole vocabulary is made. Logprobs are of the distribution after temperature, top-k
    and top-p. Temperature 0 takes the most likely token, which then has logprob 0.
    """
    num_slots, vocab = logits_SV.shape
    if sampling.temperature == 0:
        return jnp.argmax(logits_SV, -1).astype(jnp.int32), jnp.zeros((num_slots,), jnp.float32)
    logits = logits_SV / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1:
        logits = jnp.where(logits < _cutoff(logits, sampling=sampling), -jnp.inf, logits)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % LANE))).reshape(num_slots, -1, LANE)
    blocks = weights.sum(-1)
    target = jax.vmap(jax.random.uniform)(keys_S)[:, None] * blocks.sum(-1, keepdims=True)
    block, before = _pick(blocks, target)
    inside = jnp.take_along_axis(weights, block[:, :, None], axis=1)[:, 0]
    lane, _ = _pick(inside, target - before)
    token = (block * LANE + lane).astype(jnp.int32)
    logprob = jnp.take_along_axis(logits, token, axis=1) - top - jnp.log(blocks.sum(-1, keepdims=True))
    return token[:, 0], logprob[:, 0]


def _pick(weights: Array, target: Array) -> tuple[Array, Array]:
    """(first index whose running sum passes target [S, 1], the running sum before it); never an index of weight 0."""
    total = jnp.cumsum(weights, -1)
    last = weights.shape[-1] - 1 - jnp.argmax((weights > 0)[:, ::-1], axis=-1, keepdims=True)
    index = jnp.minimum((total <= target).sum(-1, keepdims=True), last)
    before = jnp.take_along_axis(total, index, 1) - jnp.take_along_axis(weights, index, 1)
    return index, before


def _cutoff(logits: Array, *, sampling: SamplingParams) -> Array:
    """[S, 1]: the smallest logit that top-k and then top-p keep."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    if sampling.top_k > 0:
        ordered = ordered[:, : sampling.top_k]
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.maximum((before < sampling.top_p).sum(-1, keepdims=True), 1)
    return jnp.take_along_axis(ordered, kept - 1, axis=1)

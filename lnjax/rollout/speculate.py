"""Speculative decoding with drafts looked up in the sequence itself (prompt lookup), exact by construction.

A draft d is certain of itself, so speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1) accepts it with
probability p(d) and else draws from p without d, renormalised. Drawing x from p and accepting d where x = d is the same
law, for what is emitted is x in both cases. x is drawn with the key of its own position, so the tokens are those that
the engine samples without drafts, and no rejected probability has to be carried to the next step.

Legend: S slots, T positions, K draft tokens, J = K + 1 tokens a step.
"""

import jax.numpy as jnp
from jax import Array


def propose(history_ST: Array, length_S: Array, *, count: int, ngram: int) -> Array:
    """Draft tokens int32 [S, count]: what followed the last earlier place of each slot's final `ngram` tokens, going round
    where that runs into the end (a loop goes on as a loop). -1, which no sample equals, where there is no such place.

    `length_S` tokens of `history_ST` count, what lies behind them is not read.
    """
    size, width = history_ST.shape
    if width <= ngram:
        return jnp.full((size, count), -1, jnp.int32)
    tail = jnp.take_along_axis(history_ST, jnp.maximum(length_S[:, None] - ngram + jnp.arange(ngram)[None], 0), axis=1)
    starts = width - ngram  # of n-grams with a token after them
    same = jnp.arange(starts)[None] < length_S[:, None] - ngram
    for i in range(ngram):
        same &= history_ST[:, i : i + starts] == tail[:, i : i + 1]
    next_S = starts - 1 - jnp.argmax(same[:, ::-1], axis=1) + ngram
    period = jnp.maximum(length_S - next_S, 1)
    index = next_S[:, None] + jnp.arange(count)[None] % period[:, None]
    draft = jnp.take_along_axis(history_ST, jnp.minimum(index, width - 1), axis=1)
    return jnp.where(same.any(1, keepdims=True), draft, -1)


def accept(tokens_SJ: Array, draft_SK: Array) -> Array:
    """Leading drafts that equal the token sampled in their place, int32 [S]. Token j was sampled given drafts before j, so
    the first accepted + 1 tokens are samples of the model."""
    same = tokens_SJ[:, : draft_SK.shape[1]] == draft_SK
    return jnp.cumprod(same.astype(jnp.int32), axis=1).sum(1)


def cut(tokens_SJ: Array, num_S: Array, *, stops: Array, left_S: Array) -> tuple[Array, Array]:
    """(tokens kept of the first `num_S` [S], whether that ends the sequence [S]): none after a stop token, `left_S` at
    most."""
    stop = (tokens_SJ[..., None] == stops[None, None]).any(-1)
    first = jnp.where(stop.any(1), jnp.argmax(stop, axis=1), tokens_SJ.shape[1])
    kept = jnp.minimum(jnp.minimum(num_S, first + 1), left_S)
    return kept, (kept == first + 1) | (kept == left_S)

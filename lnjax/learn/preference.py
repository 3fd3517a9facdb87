"""Losses of preferences: the policy against rewards (DPO, RPO), and of reward models. Sums over comparisons, with their count.

Legend: B rows, T positions, P comparisons of a row, K answers of a comparison, A scores of an answer. A comparison's implicit
rewards are beta * (log pi(y|x) - log pi_ref(y|x)), logprobs summed over the answer's tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lnjax.learn.loss import LossSum
from lnjax.schema import PreferenceConfig
from lnjax.types import PreferenceBatch


def sequence_sums(values_BT: Array, batch: PreferenceBatch) -> Array:
    """[B, P, K]: sum of the values over each answer's loss tokens."""
    shape = batch.last_BPK.shape
    answers = jnp.arange(1, 1 + shape[1] * shape[2])[None, None]
    own = batch.answer_BT[..., None] == answers
    return jnp.where(own, values_BT[..., None], 0.0).sum(axis=1).reshape(shape)


def preference_loss(logprobs_BT: Array, batch: PreferenceBatch, *, c: PreferenceConfig) -> LossSum:
    """DPO (arXiv 2305.18290 eq. 7): -log sigmoid(implicit reward of the better answer - of the worse); else RPO."""
    implicit = c.beta * sequence_sums(logprobs_BT - batch.ref_logprobs_BT, batch)
    if c.loss == "dpo":
        loss = -jax.nn.log_sigmoid(implicit[..., 0] - implicit[..., 1])
    else:
        loss = rpo_distance(implicit, c.eta * batch.scores_BPKA[..., 0], kind=c.loss)
    return _total(loss, batch, implicit)


def rpo_distance(implicit_BPK: Array, rewards_BPK: Array, *, kind: str) -> Array:
    """[B, P]: reward-aware preference optimisation (arXiv 2502.00203) between implicit rewards and eta * rewards.

    For two answers, as NeMo-Aligner writes them, with the gaps d (implicit) and g (given) and p(x) = (s(x), 1 - s(x)) of the
    sigmoid s: squared (d - g)^2, forward KL(p(d) || p(g)), backward KL(p(g) || p(d)). K answers: the mean of the squares over
    all pairs, and softmax over the answers in place of p, which for two is the same.
    """
    if kind == "rpo_squared":
        error = implicit_BPK - rewards_BPK
        error = error - error.mean(axis=-1, keepdims=True)
        return 2.0 / (error.shape[-1] - 1) * (error * error).sum(axis=-1)
    policy, given = jax.nn.log_softmax(implicit_BPK, axis=-1), jax.nn.log_softmax(rewards_BPK, axis=-1)
    left, right = (policy, given) if kind == "rpo_forward_kl" else (given, policy)
    return (jnp.exp(left) * (left - right)).sum(axis=-1)


def bradley_terry_loss(scores_BPKA: Array, batch: PreferenceBatch) -> LossSum:
    """-log sigmoid(first score of the better answer - of the worse) (Bradley & Terry 1952; arXiv 2203.02155 eq. 1)."""
    scores = scores_BPKA[..., 0]
    return _total(-jax.nn.log_sigmoid(scores[..., 0] - scores[..., 1]), batch, scores)


def regression_loss(scores_BPKA: Array, batch: PreferenceBatch) -> LossSum:
    """Squared error of each answer's ratings, mean over ratings (HelpSteer2, arXiv 2406.08673)."""
    error = scores_BPKA - batch.scores_BPKA
    return _total((error * error).mean(axis=(-2, -1)), batch, scores_BPKA[..., 0])


def _total(loss_BP: Array, batch: PreferenceBatch, values_BPK: Array) -> LossSum:
    """Over real comparisons. Metrics compare a comparison's first answer with its last."""
    real = batch.real_BP
    count = real.sum()
    best, worst = values_BPK[..., 0], values_BPK[..., -1]
    metrics = {
        "tokens": count,  # what the metrics are divided by
        "accuracy": (real * (best > worst)).sum(),
        "margin": (real * (best - worst)).sum(),
        "best": (real * best).sum(),
    }
    return LossSum((real * loss_BP).sum(), count, metrics)

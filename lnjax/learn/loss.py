"""Losses as sums over tokens; the caller divides by a count once, so no split into microbatches changes the result."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lnjax.schema import GrpoLossConfig
from lnjax.types import PackedBatch, RlBatch


class LossSum(NamedTuple):
    total: Array
    """float32 scalar: weighted sum of token losses."""
    count: Array
    """float32 scalar: what the run divides by, once."""
    metrics: dict[str, Array]
    """float32 scalars, summed over tokens; divide by metrics["tokens"]. Keys ending in _max are maxima."""


def sft_loss(logprobs_BT: Array, entropy_BT: Array, batch: PackedBatch) -> LossSum:
    """Token-level cross-entropy in nats: sum of -logprob over loss tokens."""
    mask = batch.loss_mask_BT
    total = -(logprobs_BT * mask).sum()
    return LossSum(total, mask.sum(), {"tokens": mask.sum(), "entropy": (entropy_BT * mask).sum()})


def kl_penalty(logprobs: Array, ref_logprobs: Array, *, estimator: str) -> Array:
    """Schulman's per-token estimators of KL(current || reference): k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d."""
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    return jnp.exp(-d) - 1.0 + d


def policy_loss(ratio: Array, advantages: Array, c: GrpoLossConfig) -> Array:
    """Clipped surrogate per token (PPO, arXiv 1707.06347 eq. 7), with separate bounds and an optional dual clip."""
    clipped = jnp.clip(ratio, 1.0 - c.clip_low, 1.0 + c.clip_high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    if c.dual_clip > 0:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * c.dual_clip), loss)
    return loss


def grpo_loss(logprobs_BT: Array, entropy_BT: Array, batch: RlBatch, *, c: GrpoLossConfig) -> LossSum:
    """GRPO (arXiv 2402.03300 eq. 3) as a weighted sum over tokens."""
    mask, advantages = batch.packed.loss_mask_BT, batch.advantages_BT
    current = jax.lax.stop_gradient(logprobs_BT)
    old = jnp.where(batch.on_policy, current, batch.old_logprobs_BT)
    ratio = jnp.exp(jnp.where(mask > 0, logprobs_BT - old, 0.0))
    per_token = policy_loss(ratio, advantages, c)
    if c.importance_cap > 0:  # truncated importance sampling, old policy over sampler
        gap = jnp.where(mask > 0, old - batch.sampler_logprobs_BT, 0.0)
        per_token = per_token * jnp.minimum(jnp.exp(gap), c.importance_cap)
    metrics: dict[str, Array] = {}
    if c.kl_coef > 0:
        kl = kl_penalty(logprobs_BT, batch.ref_logprobs_BT, estimator=c.kl_estimator)
        kl = jnp.where(mask > 0, kl, 0.0)
        per_token = per_token + c.kl_coef * kl
        metrics["kl_ref"] = kl.sum()
    total = (per_token * batch.weights_BT).sum()
    drift = jnp.where(mask > 0, current - batch.sampler_logprobs_BT, 0.0)
    outside = (ratio < 1.0 - c.clip_low) & (advantages < 0) | (ratio > 1.0 + c.clip_high) & (advantages > 0)
    metrics |= {
        "tokens": mask.sum(),
        "entropy": (entropy_BT * mask).sum(),
        "clip_fraction": (outside * mask).sum(),
        "ratio_max": jnp.where(mask > 0, ratio, 0.0).max(),
        "sampler_kl": ((jnp.exp(drift) - 1.0 - drift) * mask).sum(),  # k3 of KL(sampler || current)
        "prob_error": (jnp.exp(jnp.abs(drift)) * mask).sum(),
    }
    return LossSum(total, batch.count_B.sum(), metrics)


def add_metrics(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Combine two microbatches: sums add, maxima are kept."""
    return {k: jnp.maximum(a[k], b[k]) if k.endswith("_max") else a[k] + b[k] for k in a}


def mean_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Sums over tokens -> means; `tokens` and maxima stay."""
    tokens = jnp.maximum(metrics["tokens"], 1.0)
    return {k: v if k == "tokens" or k.endswith("_max") else v / tokens for k, v in metrics.items()}

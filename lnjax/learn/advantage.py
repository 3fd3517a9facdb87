"""Credit: one scalar per rollout, taken inside its group; and each token's weight in the loss. Host side, float64."""

from collections.abc import Sequence

import numpy as np

from lnjax.schema import AdvantageConfig

SAME = 1e-6
"""Rewards in [0, 1] that spread no further are equal but for rounding (a reward model's, of one text in two places)."""


def group_advantages(rewards_G: Sequence[float], finished_G: Sequence[bool], *, c: AdvantageConfig) -> np.ndarray:
    """Advantages [G] float64 of one group.

    The baseline and the standard deviation come from the valid samples: those that finished when any filter is on or
    the baseline is leave-one-out (as the published run did), else all. Leave-one-out takes both from the *other* valid
    samples (RLOO, arXiv 2402.14740); where fewer than two samples are valid there is nothing to compare and the advantage
    is 0.
    """
    rewards = np.asarray(rewards_G, np.float64)
    finished = np.asarray(finished_G, bool)
    others_only = c.baseline == "leave_one_out"
    valid = finished if c.overlong_filter or others_only else np.ones_like(finished)
    if valid.sum() <= 1:
        return np.zeros_like(rewards)
    advantages = np.zeros_like(rewards)
    for i, reward in enumerate(rewards):
        peers = valid.copy()
        if others_only:
            peers[i] = False
        base = rewards[peers]
        advantages[i] = reward - base.mean()
        if c.normalize_std:
            std = base.std(ddof=1) if len(base) > 1 else 0.0
            if std > SAME:
                advantages[i] /= std
    if c.overlong_filter:
        advantages[~finished] = 0.0
    return advantages


def loss_weight(*, num_tokens: int, aggregation: str, max_new_tokens: int) -> tuple[float, float]:
    """(weight of each of the sequence's loss tokens, the sequence's share of the denominator)."""
    if aggregation == "token_mean":
        return 1.0, float(num_tokens)
    if aggregation == "sequence_mean":
        return 1.0 / num_tokens, 1.0
    return 1.0 / max_new_tokens, 1.0  # dr_grpo

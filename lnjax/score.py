"""Completions to scored groups: tokens in, rewards out."""

import math
from collections.abc import Sequence
from typing import Any

from lnjax.data.tokenizer import Tokenizer
from lnjax.rewards.protocol import ScoreRequest
from lnjax.types import Completion, Prompt, Rollout, RolloutGroup


def score_groups(
    prompts: Sequence[Prompt], completions_PG: Sequence[Sequence[Completion]], *, tokenizer: Tokenizer, reward: Any
) -> list[RolloutGroup]:
    """One group a prompt. A completion that did not finish scores 0."""
    requests = [
        ScoreRequest(
            prompt.verifier, prompt.args, prompt.reasoning, tokenizer.decode(c.token_ids), c.finished, prompt.text
        )
        for prompt, group in zip(prompts, completions_PG, strict=True)
        for c in group
    ]
    scores = iter(reward.score(requests))
    return [
        RolloutGroup(prompt, tuple(Rollout(prompt, c, next(scores)) for c in group))
        for prompt, group in zip(prompts, completions_PG, strict=True)
    ]


def mean_interval(values: Sequence[float], *, weights: Sequence[float] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of values in [0, 1], one a prompt: 95 % normal interval; with weights, of a ratio estimate."""
    weights = weights or [1.0] * len(values)
    average = sum(weights) / len(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    spread = sum((w / average * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    half = 1.96 * math.sqrt(spread / max(1, len(values) - 1) / len(values))
    return mean, max(0.0, mean - half), min(1.0, mean + half)

"""Completions to scored groups: tokens in, rewards out."""

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

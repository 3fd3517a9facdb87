"""Verifiers in a run of several processes: process 0 runs them, the others hear the scores.

Each process could score by itself, but a deadline is a clock's decision: two hosts may disagree on one sample, and the
learners would part without a word.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lnjax.distributed import from_first
from lnjax.rewards.pool import RewardPool
from lnjax.rewards.protocol import ScoreRequest
from lnjax.types import Score


class FirstScores:
    """`score` is collective."""

    def __init__(self, pool: RewardPool, *, deadline_s: float):
        self._pool, self._deadline_s = pool, deadline_s

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        def judge() -> list[dict[str, Any]]:
            return [asdict(score) for score in self._pool.score(requests)]

        return [Score(**x) for x in from_first("scores", judge, deadline_s=self._deadline_s)]

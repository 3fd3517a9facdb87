"""A reward model behind vLLM's pooling API: token ids in, scores out, nothing tokenized again. Imports no jax.

A reward that is silently 0 would teach the policy, so a call that cannot be scored ends the run.
"""

import asyncio
import json
import math
from collections.abc import Sequence

import numpy as np

from lnjax.distributed import from_first
from lnjax.errors import RolloutError
from lnjax.rewards.post import FIRST_PAUSE_S, LONGEST_PAUSE_S, REFUSED, check_address, connect, post
from lnjax.schema import ScorerConfig

KEY = "LNJAX_REWARD_KEY"
"""Environment variable with the bearer key, where the server asks for one."""
BATCH = 16
"""Sequences of one request."""
CHECK_S = 60.0
"""Deadline of the first request, where the config's is not shorter."""


class ServedScorer:
    """Collective: process 0 asks, the others hear the scores (or wait for them, `step_deadline_s` at most).

    Both methods raise RolloutError, which names the server, for an outage, a refusal or a malformed reply.
    """

    def __init__(self, c: ScorerConfig, *, step_deadline_s: float):
        self._c, self._step_deadline_s = c, step_deadline_s
        self._address = check_address(c.source, key="reward.model.source")
        self._num_scores = 0
        """A; 0 until `check` has seen it."""

    def check(self) -> int:
        """A, by one request of one token."""
        (scores,) = self._first([(0,)], deadline_s=min(CHECK_S, self._c.deadline_s))
        self._num_scores = len(scores)
        return self._num_scores

    def scores(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """[N, A] float64 at the last token of each of N > 0 sequences of ids, without an activation."""
        return np.array(self._first(sequences, deadline_s=self._c.deadline_s))

    def _first(self, sequences: Sequence[tuple[int, ...]], *, deadline_s: float) -> list[list[float]]:
        def ask() -> list[list[float]]:
            return asyncio.run(self._ask(sequences, deadline_s=deadline_s))

        return from_first("reward model", ask, deadline_s=self._step_deadline_s)

    async def _ask(self, sequences: Sequence[tuple[int, ...]], *, deadline_s: float) -> list[list[float]]:
        slots, trouble = asyncio.Semaphore(self._c.concurrency), "no reply"
        asked = {"model": self._c.served_name or None, "task": "classify", "use_activation": False}
        async with connect(key=KEY, concurrency=self._c.concurrency) as http:

            async def one(batch: Sequence[tuple[int, ...]]) -> list[list[float]]:
                nonlocal trouble
                pause, body = FIRST_PAUSE_S, {**asked, "input": batch}
                async with slots:
                    while isinstance(reply := await post(http, f"{self._address}/pooling", body), str):
                        trouble = reply
                        if reply.startswith(REFUSED):
                            raise self._error(reply)
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, LONGEST_PAUSE_S)
                return self._read(reply, count=len(batch))

            batches = [sequences[i : i + BATCH] for i in range(0, len(sequences), BATCH)]
            try:
                async with asyncio.timeout(deadline_s):
                    parts = await asyncio.gather(*map(one, batches))
            except TimeoutError as error:
                raise self._error(f"deadline of {deadline_s:g} s passed, last: {trouble}") from error
        return [scores for part in parts for scores in part]

    def _read(self, data: bytes, *, count: int) -> list[list[float]]:
        """The scores in a reply to `count` sequences. Raises RolloutError unless all are there and numbers."""
        try:
            items = json.loads(data)["data"]
            rows, places = [x["data"] for x in items], [x["index"] for x in items]
            width = self._num_scores or len(rows[0])
            numbers = all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row)
            right = places == list(range(count)) and all(len(row) == width > 0 for row in rows) and numbers
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
            raise self._error(f"malformed reply ({type(error).__name__}) {data[:80]!r}") from error
        if not right:
            raise self._error(
                f"expected {self._num_scores or 'one or more'} finite numbers for each of {count} sequences, got {data[:200]!r}"
            )
        return rows

    def _error(self, detail: str) -> RolloutError:
        return RolloutError(
            f"the reward model at {self._address} gives no scores ({detail}); serve it there (vllm serve FOLDER --runner "
            f"pooling), or correct --reward.model.source, --reward.model.served-name or the key in ${KEY}; the same "
            "command resumes the run"
        )

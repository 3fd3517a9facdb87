"""Where the learner gets scored rollouts: sampled when it asks, or by a thread that runs ahead within a bound.

The batch of step k is begun once the weights after step k - 1 - max_staleness are served, so no token is staler than that.
With max_staleness = 0 the thread would wait for every update; then `take` samples by itself.
"""

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from lnjax.build import Built, Resources
from lnjax.data.streams import PromptStream
from lnjax.distributed import from_first
from lnjax.schema import GrpoConfig, SamplingConfig
from lnjax.score import score_groups
from lnjax.types import Prompt, RolloutGroup

POLL_S = 0.2
DECIDE_S = 86_400.0
"""How long another process waits for process 0's: as long as the watchdog lets both live."""
PART_S = 60.0
"""With several processes an error of one must not wait for a batch that the others will not finish."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of one rl_step."""

    rl_step: int
    groups: list[RolloutGroup]
    cursor: Mapping[str, Any]
    """Of the prompts after this batch: what a checkpoint taken after its update keeps."""
    seconds: Mapping[str, float]
    """What sampling and scoring took."""


class RolloutSource:
    """`take` in order, `served` after every change of weights, `close` at the end."""

    def __init__(
        self,
        b: Built,
        r: Resources,
        c: GrpoConfig,
        *,
        prompts: PromptStream,
        first: int,
        background: bool | None = None,
    ):
        """`first`: the first rl_step to take; the weights after step first - 1 are served already."""
        self._b, self._r, self._c, self._prompts = b, r, c, prompts
        self._next, self._served = first, first - 1
        self._change = threading.Condition()
        self._closed = False
        self._ready: queue.Queue[RolloutBatch | BaseException] = queue.Queue()
        self._thread: threading.Thread | None = None
        if c.max_staleness > 0 if background is None else background:
            self._thread = threading.Thread(target=self._produce, name="rollouts", daemon=True)
            self._thread.start()

    def take(self) -> RolloutBatch:
        """The batch of the next rl_step. Raises what sampling or scoring raised."""
        if self._thread is None:
            item: RolloutBatch | BaseException = self._sample(self._next)
            self._next += 1
        else:
            with self._r.log.phase("wait"):
                item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        for name, seconds in item.seconds.items():
            self._r.log.spent(name, seconds)
        return item

    def served(self, rl_step: int) -> None:
        """The weights after `rl_step` are served from now on."""
        with self._change:
            self._served = rl_step
            self._change.notify_all()

    def close(self) -> None:
        """Let the thread end; a batch that it is sampling is finished and thrown away."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread:
            self._thread.join(None if jax.process_count() == 1 else PART_S)

    def _produce(self) -> None:
        try:
            for rl_step in range(self._next, self._c.steps + 1):
                oldest = rl_step - 1 - self._c.max_staleness
                # Process 0 decides for all: they must not part over whether a batch began before the end.
                if not from_first("goes on", partial(self._await, oldest), deadline_s=DECIDE_S):
                    return
                self._ready.put(self._sample(rl_step))
        except BaseException as error:  # raised to the learner by take()
            self._ready.put(error)

    def _await(self, rl_step: int) -> bool:
        """Until the weights after `rl_step` are served; False when it is over."""
        with self._change:
            while self._served < rl_step and not self._closed:
                self._change.wait(POLL_S)
            return not self._closed

    def _sample(self, rl_step: int) -> RolloutBatch:
        c = self._c
        asked = self._prompts.take(c.prompts_per_step)
        cursor = self._prompts.cursor
        groups, seconds = sample_groups(
            self._b, self._r, asked, num_samples=c.samples_per_prompt, sampling=c.sampling, seed=rl_step
        )
        return RolloutBatch(rl_step, groups, cursor, seconds)


def sample_groups(
    b: Built, r: Resources, asked: list[Prompt], *, num_samples: int, sampling: SamplingConfig, seed: int
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """(scored completions of each prompt, seconds of both phases)."""
    start = time.monotonic()
    # P prompts x G completions; every token carries its weight version
    completions_PG = r.engine.generate(asked, num_samples=num_samples, sampling=b.sampling(sampling), seed=seed)
    sampled = time.monotonic()
    # text in, float out; an unfinished completion scores 0
    groups = score_groups(asked, completions_PG, tokenizer=b.tokenizer, reward=r.reward)
    return groups, {"sample": sampled - start, "score": time.monotonic() - sampled}

"""Rollout servers in a run of several processes: process 0 has them, the others take part in publishing and hear the rest.

Nothing here touches a device, so `generate` may run in a thread beside the learner's updates.
"""

from dataclasses import asdict
from typing import Any, Protocol

from lnjax.distributed import from_first
from lnjax.types import Completion, Prompt, RolloutEngine, SamplingParams, WeightVersion


class Publishes(Protocol):
    """What is needed of lnjax.checkpoint.publish.Publisher: collective."""

    def publish(self, number: int, params: Any) -> WeightVersion: ...


class FirstEngine:
    """Implements RolloutEngine around process 0's engine."""

    def __init__(self, engine: RolloutEngine | None, *, publisher: Publishes, deadline_s: float):
        """`engine`: None on the other processes. `deadline_s`: how long they wait for process 0."""
        self._engine, self._publisher, self._deadline_s = engine, publisher, deadline_s

    def load_weights(self, number: int, params: Any) -> WeightVersion:
        engine = self._engine
        if engine is None:
            self._publisher.publish(number, params)

        def load() -> dict[str, Any]:
            assert engine
            return asdict(engine.load_weights(number, params))  # publishes too

        return WeightVersion(**from_first("weights", load, deadline_s=self._deadline_s))

    def generate(
        self, prompts: list[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        def sample() -> list[list[dict[str, Any]]]:
            assert self._engine
            groups = self._engine.generate(prompts, num_samples=num_samples, sampling=sampling, seed=seed)
            return [[asdict(x) for x in group] for group in groups]

        groups = from_first("completions", sample, deadline_s=self._deadline_s)
        return [
            [
                Completion(tuple(x["token_ids"]), tuple(x["logprobs"]), tuple(x["versions"]), x["finished"])
                for x in group
            ]
            for group in groups
        ]

    def report(self) -> dict[str, Any]:
        """Of process 0's engine, on process 0; it writes the summary."""
        return self._engine.report() if self._engine else {}

    def close(self) -> None:
        if self._engine:
            self._engine.close()

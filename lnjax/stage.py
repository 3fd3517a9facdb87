"""Where a stage begins, and how it keeps what it has done: one checkpoint series for the whole run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lnjax.alive import Notice, Watchdog
from lnjax.checkpoint.store import Checkpoints
from lnjax.errors import Stopped
from lnjax.metrics import MetricsLog
from lnjax.profile import Profile
from lnjax.record import RolloutRecord


@dataclass(frozen=True, slots=True)
class Position:
    """Where to start a stage."""

    params: Callable[[], Any]
    """Weights at the start of the stage. Called where they are needed: a resumed stage reads its own."""
    updates: int
    """Optimizer updates of the stages before."""
    step: int
    """Steps of this stage already done."""
    saved: dict[str, Any] | None
    """`extra` of the checkpoint taken inside this stage, or None at its beginning."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's way to the run's checkpoints."""

    name: str
    store: Checkpoints
    log: MetricsLog
    record: RolloutRecord
    every: int
    model: Mapping[str, Any]
    """config.json of the model, so that a checkpoint describes itself."""
    evals: Mapping[str, Any]
    """Evaluations so far; kept with every checkpoint."""
    watchdog: Watchdog
    notice: Notice
    profile: Profile

    def begin(self, step: int) -> None:
        self.profile.begin(self.name, step)
        self.watchdog.at(f"{self.name} step {step}")

    def stop_asked(self) -> bool:
        """Collective, once at the end of every step; all processes get the same answer."""
        return self.notice.reached()

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def save(self, step: int, tree: Mapping[str, Any], *, cursor: Mapping[str, Any], stop: bool) -> None:
        """Checkpoint the tree with the data and metrics cursors, in the background. With `stop`, wait and raise Stopped."""
        with self.log.phase("save"):
            self.store.save(
                dict(tree),
                extra={
                    "model": dict(self.model),
                    "stage": self.name,
                    "step": step,
                    "updates": int(jax.device_get(tree["state"].step)),
                    "metrics_lines": self.log.lines,
                    "rollout_lines": self.record.lines,
                    "cursor": dict(cursor),
                    "evals": dict(self.evals),
                },
            )
            if stop:
                self.store.wait()
                raise Stopped(f"asked to stop; {self.name} step {step} is saved, the same command goes on from there")

    def restore(self, saved: Mapping[str, Any], abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        with self.log.phase("restore"):
            return self.store.restore(saved["number"], dict(abstract))

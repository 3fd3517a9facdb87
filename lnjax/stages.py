"""Which training stages a run has, in what order, and whether they fit together. Imports no jax."""

from typing import Any

from lnjax.errors import ConfigError
from lnjax.schema import RunConfig

STAGES = ("sft", "preference", "grpo", "reward_model")
"""Sections of a RunConfig that train, in the order they have unless the config gives another."""


def stages_of(c: RunConfig) -> list[tuple[str, Any]]:
    """(name, config) of the stages the run has, in order."""
    return [(name, getattr(c, name)) for name in c.stages or STAGES if getattr(c, name) is not None]


def check_stages(c: RunConfig) -> None:
    """Raises ConfigError for a run without a stage, or an order that cannot be."""
    present = [name for name in STAGES if getattr(c, name) is not None]
    if not present:
        raise ConfigError(f"the config has none of {', '.join(STAGES)}; a run needs a stage")
    order = list(c.stages) or present
    if sorted(order) != sorted(present) or "reward_model" in order[:-1]:
        raise ConfigError(f"stages={order}: expected each of {present} once, reward_model last")
    if c.reward_model and c.checkpoint.export_hf:
        raise ConfigError("checkpoint.export_hf must be False: a reward model is read from its run folder")

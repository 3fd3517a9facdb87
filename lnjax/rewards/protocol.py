"""What a verifier is. Imported by worker processes: no jax here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Verifier = Callable[[str, Mapping[str, Any]], Mapping[str, float]]
"""(answer text, the prompt's args) -> parts in [0, 1], `accuracy` among them. May raise or hang: a worker runs it."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One completion to judge."""

    verifier: str
    args: Mapping[str, Any]
    reasoning: bool
    """What the system prompt asked for."""
    text: str
    """The completion, think tags included."""
    finished: bool
    """False when the token budget cut it off: it scores 0 unread."""
    question: str = ""
    """The last user message, for judges."""
    token_ids: tuple[int, ...] = ()
    """Prompt and completion, for a reward model."""

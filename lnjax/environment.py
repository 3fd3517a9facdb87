"""Rollouts of several turns: an environment answers the policy, the policy goes on, until there is nothing to answer.

Token ids in, token ids out: what the policy said stays the ids that it sampled, what the environment says is appended to them,
and the engine continues the whole. Text is read on the way, never encoded again. Around any RolloutEngine this is one itself,
so whatever samples has several turns.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lnjax.calculator import TOOL, calculate
from lnjax.data.chat import tool_turn
from lnjax.data.tokenizer import Tokenizer
from lnjax.rewards.format import answer_of
from lnjax.rewards.tool_call import parse_calls
from lnjax.schema import EnvironmentConfig
from lnjax.types import Completion, Prompt, RolloutEngine, SamplingParams


class Environment(Protocol):
    """A pure function: the same episode gets the same reply in every process, and again after a restart."""

    def reply(self, prompt: Prompt, said: Completion) -> tuple[int, ...] | None:
        """What the environment says to `said.last_turn`: ids from behind the policy's stop token to where it speaks again. At
        least one; None ends the episode."""
        ...


class Calculator:
    """Answers calls of the calculator, in the published format and by the chat template's tool message."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises TemplateError where the template shows no tool messages."""
        self._tokenizer = tokenizer
        self._ids(["0"])

    def reply(self, prompt: Prompt, said: Completion) -> tuple[int, ...] | None:
        """Only what follows the thoughts counts. A malformed call is told so."""
        try:
            calls = parse_calls(answer_of(self._tokenizer.decode(said.last_turn)))
        except (ValueError, RecursionError):
            return self._ids(["error: malformed call"])
        return self._ids([_result(call) for call in calls]) if calls else None

    def _ids(self, results: Sequence[str]) -> tuple[int, ...]:
        # some templates put the tags around it themselves
        form = "{}" if "TOOL_RESPONSE" in self._tokenizer.template else "<TOOL_RESPONSE>[{}]</TOOL_RESPONSE>"
        return tool_turn(self._tokenizer, form.format(json.dumps(results)[1:-1]))


def _result(call: Mapping[str, Any]) -> str:
    match call:
        case {"name": "calculator", "arguments": {"expression": str() as expression, **more}} if not more:
            return calculate(expression)
    return f"error: expected {TOOL['name']} with one argument, expression, a string"


class TurnEngine:
    """Implements RolloutEngine around another.

    Every turn has up to `sampling.max_new_tokens`. An episode that wants a turn beyond `max_turns`, or one that `max_tokens`
    has no room for, ends unfinished.
    """

    def __init__(self, inner: RolloutEngine, environment: Environment, *, c: EnvironmentConfig):
        self._inner, self._environment, self._c = inner, environment, c
        self.load_weights, self.report, self.close = inner.load_weights, inner.report, inner.close

    def generate(
        self, prompts: list[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """P x G episodes. A later turn depends on (seed, prompt id, sample index, turn) and what was said before it."""
        found = self._inner.generate(prompts, num_samples=num_samples, sampling=sampling, seed=seed)
        going, turn = [(i, j) for i in range(len(prompts)) for j in range(num_samples)], 1
        while going:
            ended, going, turn = going, [], turn + 1
            for i, j in ended:
                said = found[i][j]
                if not said.finished or not (heard := self._environment.reply(prompts[i], said)):
                    continue
                found[i][j], n = dataclasses.replace(said, finished=False), len(heard)
                fits = len(said.token_ids) + n + sampling.max_new_tokens <= self._c.max_tokens
                if fits and turn <= self._c.max_turns:
                    going.append((i, j))
                    found[i][j] = _joined(said, Completion(heard, (0.0,) * n, said.versions[-1:] * n, False, (0,) * n))
            asked = [_longer(prompts[i], found[i][j], name=f"{j}/{turn}") for i, j in going]
            turns = self._inner.generate(asked, num_samples=1, sampling=sampling, seed=seed) if asked else []
            for (i, j), [next_turn] in zip(going, turns, strict=True):
                found[i][j] = _joined(found[i][j], next_turn)
        return found


def _longer(prompt: Prompt, said: Completion, *, name: str) -> Prompt:
    """The prompt with the episode so far. An id for each sample and turn, so that no two draw the same."""
    return dataclasses.replace(prompt, id=f"{prompt.id}#{name}", token_ids=prompt.token_ids + said.token_ids)


def _joined(before: Completion, after: Completion) -> Completion:
    ids, logprobs = before.token_ids + after.token_ids, before.logprobs + after.logprobs
    return Completion(ids, logprobs, before.versions + after.versions, after.finished, before.mask + after.mask)

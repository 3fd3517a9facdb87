"""Completions to scored groups: tokens in, rewards out; and a reward model's scores among the verifiers'."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from lnjax.data.preferences import pack_comparisons
from lnjax.data.tokenizer import Tokenizer
from lnjax.mesh import fetch, put_rows
from lnjax.models.reward import RewardModel
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rewards.served import ServedScorer
from lnjax.rewards.verifiers import REWARD_MODEL
from lnjax.schema import PackConfig
from lnjax.types import Comparison, Completion, Prompt, Rollout, RolloutGroup, Sample, Score


class LocalScorer:
    """A reward model in this process, beside `ServedScorer`. Collective."""

    def __init__(self, model: RewardModel, params: Any, *, pack: PackConfig):
        self._params, self._pack, self._none = params, pack, (0.0,) * model.num_scores
        self._mesh, self._scores = model.decoder.compute.ops.mesh, jax.jit(model.scores)

    def scores(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """[N, A] float32 at the last token of each of N > 0 sequences of ids."""
        alone = [Comparison((Sample(ids, (0,) * len(ids)),), (self._none,)) for ids in sequences]
        batches, where = pack_comparisons(alone, c=self._pack)
        parts = [fetch(self._scores(self._params, x.packed, x.last_BPK)) for x in put_rows(self._mesh, batches)]
        scores_BPA = np.concatenate(parts)[:, :, 0]
        return np.stack([scores_BPA[at] for at in where])


class ModelScores:
    """Scores what asks for the verifier `reward_model` by one; `inner` scores the rest. Collective.

    The reward is sigmoid(score), the Bradley-Terry odds against an answer of score 0, so that an unfinished completion or a
    wrong format, which get 0, stay the worst there is. The part `score` is the score itself.
    """

    def __init__(self, inner: Any, scorer: LocalScorer | ServedScorer, *, weights: Sequence[float]):
        self._inner, self._scorer, self._weights = inner, scorer, np.asarray(weights)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        mine = [i for i, x in enumerate(requests) if x.verifier == REWARD_MODEL and x.finished]
        asked = list(requests)
        for i, score in zip(mine, self.raw([requests[i].token_ids for i in mine]), strict=True):
            parts = {"accuracy": 0.5 + 0.5 * math.tanh(score / 2), "score": score}
            asked[i] = dataclasses.replace(requests[i], args={"parts": parts})
        return self._inner.score(asked)

    def raw(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """The weighted score of each sequence, at its last token."""
        return [float(x @ self._weights) for x in self._scorer.scores(sequences)] if sequences else []


def score_groups(
    prompts: Sequence[Prompt], completions_PG: Sequence[Sequence[Completion]], *, tokenizer: Tokenizer, reward: Any
) -> list[RolloutGroup]:
    """One group a prompt. Verifiers read the last turn. A completion that did not finish scores 0."""
    requests = [
        ScoreRequest(
            prompt.verifier,
            prompt.args,
            prompt.reasoning,
            tokenizer.decode(c.last_turn),
            c.finished,
            prompt.text,
            prompt.token_ids + c.token_ids,
        )
        for prompt, group in zip(prompts, completions_PG, strict=True)
        for c in group
    ]
    scores = iter(reward.score(requests))
    return [
        RolloutGroup(prompt, tuple(Rollout(prompt, c, next(scores)) for c in group))
        for prompt, group in zip(prompts, completions_PG, strict=True)
    ]


def describe_groups(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """What the rollouts of a step were like, for the log."""
    rollouts = [x for g in groups for x in g.rollouts]
    count = len(rollouts)
    lengths = [sum(x.completion.mask) for x in rollouts]
    turns = [1 + sum(a < b for a, b in pairwise(x.completion.mask)) for x in rollouts]
    parts = sorted({k for x in rollouts for k in x.score.parts})
    tasks: dict[str, list[float]] = {}
    for group in groups:
        task = str(group.prompt.args.get("task", group.prompt.verifier))
        tasks.setdefault(task, []).extend(x.score.reward for x in group.rollouts)
    by_task = {f"reward/{k}": sum(v) / len(v) for k, v in sorted(tasks.items())} if len(tasks) > 1 else {}
    mixed = sum(len({x.score.reward for x in g.rollouts}) > 1 for g in groups)
    return {
        "reward": sum(x.score.reward for x in rollouts) / count,
        **{k: sum(x.score.parts.get(k, 0.0) for x in rollouts) / count for k in parts},
        **by_task,
        **({"turns_mean": sum(turns) / count} if any(x.completion.spoken for x in rollouts) else {}),
        "mixed_groups": mixed / len(groups),
        "completion_tokens_mean": sum(lengths) / count,
        "completion_tokens_max": max(lengths),
        "unfinished": sum(not x.completion.finished for x in rollouts) / count,
        "verifier_failures": sum(bool(x.score.failure) for x in rollouts),
        "sample_tokens": sum(lengths),
        "prompts": len(groups),
    }


def mean_interval(values: Sequence[float], *, weights: Sequence[float] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of values in [0, 1], one a prompt: 95 % normal interval; with weights that of the ratio estimator."""
    weights = weights or [1.0] * len(values)
    average = sum(weights) / len(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    spread = sum((w / average * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    half = 1.96 * math.sqrt(spread / max(1, len(values) - 1) / len(values))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def figure(values: Sequence[float], *, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Mean and 95 % interval of one value a prompt. Where all agree on 0 or 1, by the rule of three."""
    mean, low, high = mean_interval(values, weights=weights)
    if low == high:
        low, high = max(0.0, mean - 3 / len(values)), min(1.0, mean + 3 / len(values))
    return {"mean": mean, "low": low, "high": high, "num_prompts": len(values)}

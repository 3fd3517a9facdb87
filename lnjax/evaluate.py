"""Held-out evaluation: sample, score, mean with a 95 % interval over prompts.

python -m lnjax.evaluate measures a model on published benchmarks: lnjax/benchmark.py.
"""

import sys
from dataclasses import dataclass
from typing import Any

from lnjax import benchmark
from lnjax.build import Built, Resources
from lnjax.score import mean_interval, score_groups

EVAL_SEED = 2**31  # apart from every rl_step


@dataclass(frozen=True, slots=True)
class EvalResult:
    mean: float
    """Accuracy in [0, 1]: the verifier's verdict before the format factor; 0 for an unfinished completion."""
    low: float
    """Lower end of the 95 % interval (normal, over prompts)."""
    high: float
    reward: float
    """Mean reward, format factor included."""
    num_prompts: int
    unfinished: float
    """Share of completions cut off by the token budget."""


def evaluate(b: Built, r: Resources, *, after: str, step: int, params: dict[str, Any]) -> EvalResult | None:
    """Score the held-out prompts with `params` and log the line; None where the run has no eval."""
    c = b.config.eval
    if c is None:
        return None
    with r.log.phase("evaluate"):
        r.engine.load_weights(step, b.model.merged(r.frozen | params))
        prompts = r.streams["eval"].prompts
        completions = r.engine.generate(
            prompts, num_samples=c.num_samples, sampling=b.sampling(c.sampling), seed=EVAL_SEED
        )
        groups = score_groups(prompts, completions, tokenizer=b.tokenizer, reward=r.reward)
    rollouts = [x for g in groups for x in g.rollouts]
    means = [sum(x.score.parts.get("accuracy", 0.0) for x in g.rollouts) / len(g.rollouts) for g in groups]
    mean, low, high = mean_interval(means)
    result = EvalResult(
        mean=mean,
        low=low,
        high=high,
        reward=sum(x.score.reward for x in rollouts) / len(rollouts),
        num_prompts=len(prompts),
        unfinished=sum(not x.completion.finished for x in rollouts) / len(rollouts),
    )
    values = {
        "after": after,
        "mean": result.mean,
        "low": result.low,
        "high": result.high,
        "reward": result.reward,
        "num_prompts": result.num_prompts,
        "unfinished": result.unfinished,
    }
    r.log.log("eval", step=step, values=values)
    return result


if __name__ == "__main__":
    sys.exit(benchmark.main(sys.argv[1:]))

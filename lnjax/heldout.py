"""Held-out evaluation within a run: sample, score, mean with a 95 % interval over prompts."""

from dataclasses import asdict, dataclass
from typing import Any

from lnjax.build import Built, Resources
from lnjax.score import describe_groups, mean_interval
from lnjax.source import sample_groups

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
        groups, _ = sample_groups(b, r, prompts, num_samples=c.num_samples, sampling=c.sampling, seed=EVAL_SEED)
    means = [sum(x.score.parts.get("accuracy", 0.0) for x in g.rollouts) / len(g.rollouts) for g in groups]
    mean, low, high = mean_interval(means)
    found = describe_groups(groups)
    result = EvalResult(mean, low, high, found["reward"], len(prompts), found["unfinished"])
    r.log.log("eval", step=step, values={"after": after, **asdict(result)})
    return result

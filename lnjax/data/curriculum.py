"""Prompts from easy to hard: progressive batching (arXiv 2505.00949, section 5.1), written down as an order of prompts.

Published: prompts whose pass rate is at least 0.75 are dropped; the batch size is fixed; each batch has a Gaussian target
over pass rates whose centre goes from high rates to low; slots are given out by that target as far as prompts of each rate
are left, what remains goes to the rates with the most left; a batch is shuffled. Chosen here, since not published: the bins,
the width of the Gaussian and how its centre moves. Exactly:

1. A prompt of pass rate r < drop_at is in the bin nearest to r, k / bins (8 samples a prompt give the rates k / 8). A bin
   that no prompt is in from the beginning does not count.
2. Batch b of B wants in bin k a share w_k / sum(w) of its slots, w_k = exp(-(k / bins - centre_b)^2 / (2 sigma^2)), where
   centre_b goes linearly from start (b = 0) to end (b = B - 1) and stays there. Slots are whole: each bin gets the floor of
   its share, the largest fractions one more (ties: the harder bin), and none more than it has left.
3. While slots are free, the bin with the most left gives one (ties: the bin nearer to the centre, then the harder one).
4. Within a bin prompts come in a random order, and the batch is shuffled: draws of the seed and the bin's or batch's number.

With order="random" the kept prompts come in a random order instead, in batches of the same size.

The order holds whole batches until the prompts run out; fewer than a batch's worth at the end are left out. When a run takes
more, the same order begins again. A stream over it has one index for its state, as any other.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from lnjax.errors import ConfigError, DataError
from lnjax.schema import CurriculumConfig
from lnjax.types import Prompt


def curriculum_order(
    rates: Sequence[float], *, batch_size: int, c: CurriculumConfig, seed: int
) -> tuple[list[list[int]], list[int]]:
    """(batches of indices into `rates`, indices dropped as too easy). Deterministic. Every other index at most once."""
    dropped = [i for i, rate in enumerate(rates) if rate >= c.drop_at]
    fit = (len(rates) - len(dropped)) // batch_size
    if c.order == "random":
        kept = [i for i, rate in enumerate(rates) if rate < c.drop_at]
        random.Random(f"curriculum/{seed}/random").shuffle(kept)
        return [kept[b * batch_size : (b + 1) * batch_size] for b in range(fit)], dropped
    bins: dict[int, list[int]] = {}
    for i, rate in enumerate(rates):
        if rate < c.drop_at:
            bins.setdefault(math.floor(rate * c.bins + 0.5), []).append(i)
    for k, pool in bins.items():
        random.Random(f"curriculum/{seed}/bin/{k}").shuffle(pool)
    pools = {k / c.bins: bins[k] for k in sorted(bins)}
    batches = []
    for b in range(fit):
        centre = batch_centre(b, num_batches=fit, c=c)
        left = {rate: len(pool) for rate, pool in pools.items()}
        counts = allocate(left, batch_size=batch_size, centre=centre, sigma=c.sigma)
        batch = [pools[rate].pop() for rate, count in counts.items() for _ in range(count)]
        random.Random(f"curriculum/{seed}/batch/{b}").shuffle(batch)
        batches.append(batch)
    return batches, dropped


def batch_centre(batch: int, *, num_batches: int, c: CurriculumConfig) -> float:
    """Where the target of a batch is centred, as a pass rate; `num_batches` are all that the prompts fill."""
    return c.start + (c.end - c.start) * min(1.0, batch / max(1, (c.batches or num_batches) - 1))


def describe_batch(rates: Sequence[float], *, batch: int, num_batches: int, c: CurriculumConfig) -> dict[str, float]:
    """Target and actual of one batch: the centre, the mean pass rate, and the share of prompts in each bin they are in."""
    bins = Counter(math.floor(rate * c.bins + 0.5) / c.bins for rate in rates)
    target = {"pass_rate_target": batch_centre(batch % num_batches, num_batches=num_batches, c=c)}
    return {
        **(target if c.order == "easy_to_hard" else {}),
        "pass_rate": sum(rates) / len(rates),
        **{f"pass_rate/{k:g}": bins[k] / len(rates) for k in sorted(bins)},
    }


def target_shares(rates: Sequence[float], *, centre: float, sigma: float) -> dict[float, float]:
    """{pass rate of a bin: share of the batch that the Gaussian wants}; they sum to 1."""
    # Distances relative to the nearest bin, so that a narrow Gaussian never underflows to no weight at all.
    nearest = min((rate - centre) ** 2 for rate in rates)
    weights = {r: math.exp(-((r - centre) ** 2 - nearest) / (2 * sigma**2)) for r in rates}
    return {r: weight / sum(weights.values()) for r, weight in weights.items()}


def allocate(left: Mapping[float, int], *, batch_size: int, centre: float, sigma: float) -> dict[float, int]:
    """{pass rate of a bin: slots of one batch} from {pass rate: prompts left}, at least batch_size in all."""
    rates = sorted(left)
    shares = {r: batch_size * w for r, w in target_shares(rates, centre=centre, sigma=sigma).items()}
    wanted = {r: math.floor(shares[r]) for r in rates}
    by_fraction = sorted(rates, key=lambda r: (wanted[r] - shares[r], r))
    for rate in by_fraction[: batch_size - sum(wanted.values())]:
        wanted[rate] += 1
    counts = {r: min(wanted[r], left[r]) for r in rates}
    while sum(counts.values()) < batch_size:
        counts[max(rates, key=lambda r: (left[r] - counts[r], -abs(r - centre), -r))] += 1
    return counts


def order_prompts(prompts: Sequence[Prompt], *, batch_size: int, c: CurriculumConfig, seed: int) -> list[Prompt]:
    """The prompts in the order of the curriculum. Raises DataError for one without a pass rate, ConfigError for too few."""
    rates = []
    for prompt in prompts:
        if prompt.pass_rate is None:
            raise DataError(
                f"{prompt.id}: no pass_rate, which the curriculum sorts by; measure it (share of correct samples of a "
                "reference model) and add the key to each row, or take the curriculum out of the config"
            )
        rates.append(prompt.pass_rate)
    batches, dropped = curriculum_order(rates, batch_size=batch_size, c=c, seed=seed)
    if not batches:
        raise ConfigError(
            f"grpo.curriculum: {len(prompts) - len(dropped)} of {len(prompts)} prompts are below "
            f"drop_at={c.drop_at:g}, fewer than grpo.prompts_per_step={batch_size}; give more or harder prompts"
        )
    return [prompts[i] for batch in batches for i in batch]

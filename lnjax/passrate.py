"""python -m lnjax.passrate --config NAME [--model SOURCE] [--samples 8] [--out FILE.jsonl] [--any.key value]

Measure how often a model answers each of the config's grpo.prompts rightly. FILE (default RUN_DIR/pass_rates.jsonl) gets the
rows of the source with `pass_rate`, so that `--grpo.prompts.source FILE` trains on them by a curriculum; FILE.png beside it
shows the batches which that curriculum makes. SOURCE is whatever --model.source takes; without it the config's own model
answers. The same command goes on where it was stopped.

Published: 8 samples a prompt (arXiv 2505.00949, section 5.1). Chosen: temperature and length are those of grpo.sampling.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl

from lnjax.config import Job
from lnjax.data.curriculum import batch_centre, curriculum_order, target_shares
from lnjax.data.rows import Row
from lnjax.data.streams import build_prompt_stream, prompt_rows
from lnjax.errors import ConfigError
from lnjax.sampler import digest_of, finished_rows, front_door, open_sampler
from lnjax.schema import CurriculumConfig, RunConfig

mpl.use("Agg")
from matplotlib import pyplot as plt

PASSRATE_SEED = 2**31 + 1  # apart from every rl_step and from evaluation


def measure(c: RunConfig, run_dir: Path, *, out: Path, num_samples: int) -> list[Row]:
    """Fill the file, draw the picture; the file's rows. Raises DataError for a file of another model, config or data."""
    g = c.grpo
    if g is None:
        raise ConfigError(f"{c.name} has no grpo stage, whose prompts are what is measured; use a config that has one")
    rows = [row for _, row in prompt_rows(g.prompts)]
    judge = c.reward.judge and c.reward.judge.model
    asked = asdict(g.prompts), asdict(g.sampling), asdict(c.environment)
    config = digest_of(*asked, c.reward.format, judge, c.engine.dtype, c.seed, rows)
    measured = {"model": c.model.source, "config": config, "samples": num_samples}
    finished_rows(out, measured=measured)  # a refusal need not wait for weights
    with open_sampler(c, folder=run_dir / "passrate") as s:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = s.measure(
            build_prompt_stream(g.prompts, s.built.tokenizer).prompts,
            rows,
            out=out,
            config=config,
            num_samples=num_samples,
            sampling=s.built.sampling(g.sampling),
            seed=PASSRATE_SEED,
            chunk=g.prompts_per_step,
        )
    rates, order = [row["pass_rate"] for row in found], g.curriculum or CurriculumConfig()
    picture = out.with_suffix(".png")
    easy = sum(rate >= order.drop_at for rate in rates)
    print(f"{len(rates)} prompts, mean pass rate {sum(rates) / len(rates):.3f}; {easy} at or above {order.drop_at:g}")
    drawn = plot_curriculum(rates, batch_size=g.prompts_per_step, c=order, seed=g.prompts.seed, target=picture)
    print(f"wrote {out}" + (f", {picture}" if drawn else "; too few prompts for one batch of a curriculum"))
    return found


def plot_curriculum(rates: Sequence[float], *, batch_size: int, c: CurriculumConfig, seed: int, target: Path) -> bool:
    """Draw the share of each pass rate in each batch, wanted and given. False when no batch is full."""
    batches, dropped = curriculum_order(rates, batch_size=batch_size, c=c, seed=seed)
    if not batches:
        return False
    nearest = [math.floor(rate * c.bins + 0.5) / c.bins for rate in rates]
    bins = sorted({near for near, rate in zip(nearest, rates, strict=True) if rate < c.drop_at})
    centres = [batch_centre(b, num_batches=len(batches), c=c) for b in range(len(batches))]
    wanted = [target_shares(bins, centre=centre, sigma=c.sigma) for centre in centres]
    given = [{k: sum(nearest[i] == k for i in batch) / batch_size for k in bins} for batch in batches]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, shares, title in ((axes[0], wanted, "target"), (axes[1], given, "actual")):
        values = [[share[k] for share in shares] for k in bins]
        image = axis.imshow(values, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axis.set_yticks(range(len(bins)), [f"{k:.3g}" for k in bins])
        axis.set(title=f"{title}: share of the batch", xlabel="batch", ylabel="pass rate")
        axes[2].plot([sum(k * v for k, v in share.items()) for share in shares], label=title)
    figure.colorbar(image, ax=axes[1])
    axes[2].set(title=f"mean pass rate ({len(dropped)} of {len(rates)} dropped)", xlabel="batch", ylim=(0, 1))
    axes[2].legend(frameon=False)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 for what the user can fix."""

    def work(job: Job, options: argparse.Namespace) -> None:
        measure(
            job.config, job.run_dir, out=options.out or job.run_dir / "pass_rates.jsonl", num_samples=options.samples
        )

    return front_door(work, argv, doc=str(__doc__), samples=8, more=())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

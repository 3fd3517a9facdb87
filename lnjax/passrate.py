"""python -m lnjax.passrate --config NAME [--model SOURCE] [--samples 8] [--out FILE.jsonl] [--any.key value]

Measure how often a model answers each of the config's grpo.prompts rightly. FILE (default RUN_DIR/pass_rates.jsonl) gets the
rows of the source with `pass_rate`, so that `--grpo.prompts.source FILE` trains on them by a curriculum; FILE.png beside it
shows the batches that curriculum makes. SOURCE is whatever --model.source takes; without it the config's own model answers.
The same command goes on where it was stopped.

A prompt's pass rate is the mean accuracy of its samples, before the format factor; one that the token budget cut off counts
as wrong. Published: 8 samples (arXiv 2505.00949, section 5.1). Chosen: temperature and length are those of grpo.sampling.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

from lnjax.data.curriculum import batch_centre, curriculum_order, target_shares
from lnjax.data.rows import Row, read_jsonl
from lnjax.data.streams import build_prompt_stream, prompt_rows
from lnjax.errors import ConfigError, DataError, LnjaxError
from lnjax.metrics import progress
from lnjax.sampler import count_of, open_sampler, read_job
from lnjax.schema import CurriculumConfig, GrpoConfig, RunConfig

mpl.use("Agg")
from matplotlib import pyplot as plt

PASSRATE_SEED = 2**31 + 1  # apart from every rl_step and from evaluation
NUM_SAMPLES = 8
KEYS = ("pass_rate", "measured")
"""Added to a row."""


def measure(c: RunConfig, *, out: Path, folder: Path, num_samples: int) -> list[float]:
    """Fill `out`; the pass rates in the order of the source. Raises DataError for a file of another model, config or data."""
    g = grpo_of(c)
    rows = prompt_rows(g.prompts)
    measured: dict[str, Any] = {"model": c.model.source, "config": settings_hash(c), "samples": num_samples}
    finished_rates(out, rows, measured=measured)  # before weights are read
    with open_sampler(c, folder=folder) as s:
        prompts = build_prompt_stream(g.prompts, s.built.tokenizer).prompts
        measured["weights"] = s.digest
        rates = finished_rates(out, rows, measured=measured)
        sampling = s.built.sampling(g.sampling)
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(out, "ab") as file,
            progress("pass rates", total=len(rows) - len(rates), unit="prompts") as advance,
        ):
            while len(rates) < len(rows):
                part = slice(len(rates), len(rates) + g.prompts_per_step)
                groups = s.groups(prompts[part], num_samples=num_samples, sampling=sampling, seed=PASSRATE_SEED)
                lines = b""
                for group, (_, row) in zip(groups, rows[part], strict=True):
                    rates.append(sum(x.score.parts["accuracy"] for x in group.rollouts) / num_samples)
                    failures = [x.score.failure for x in group.rollouts if x.score.failure]
                    extra = {"pass_rate": rates[-1], "measured": measured | {"failures": failures}}
                    lines += json.dumps({**row, **extra}).encode() + b"\n"
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                advance(len(groups))
    return rates


def grpo_of(c: RunConfig) -> GrpoConfig:
    if c.grpo is None:
        raise ConfigError(f"{c.name} has no grpo stage, whose prompts are what is measured; use a config that has one")
    return c.grpo


def settings_hash(c: RunConfig) -> str:
    """12 hex digits of what a pass rate depends on besides model and prompt."""
    g = grpo_of(c)
    judge = c.reward.judge and c.reward.judge.model
    values = [asdict(g.prompts), asdict(g.sampling), c.reward.format, judge, c.engine.dtype, c.seed]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def finished_rates(out: Path, rows: Sequence[tuple[str, Row]], *, measured: Mapping[str, Any]) -> list[float]:
    """Pass rates already in `out`, which holds a beginning of `rows`. A half-written last line is cut off."""
    data = out.read_bytes() if out.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(out, whole)
    if whole == 0:
        return []
    rates = []
    for where, found in read_jsonl(out):
        before = found.get("measured") or {}
        changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in measured.items() if before.get(k) != v]
        if changed:
            raise DataError(f"{where}: measured otherwise ({'; '.join(changed)}); use another --out")
        source = rows[len(rates)] if len(rates) < len(rows) else ("no row", {})
        if _bare(found) != json.loads(json.dumps(_bare(source[1]))):
            raise DataError(f"{where}: is not {source[0]} of grpo.prompts, whose rows have changed; use another --out")
        rates.append(found["pass_rate"])
    return rates


def _bare(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in KEYS}


def plot_curriculum(rates: Sequence[float], *, batch_size: int, c: CurriculumConfig, seed: int, target: Path) -> bool:
    """Draw the share of each pass rate in each batch, wanted and given. False when no batch is full."""
    batches, dropped = curriculum_order(rates, batch_size=batch_size, c=c, seed=seed)
    if not batches:
        return False
    nearest = [math.floor(rate * c.bins + 0.5) / c.bins for rate in rates]
    bins = sorted({rate for i, rate in enumerate(nearest) if rates[i] < c.drop_at})
    centres = [batch_centre(b, num_batches=len(batches), c=c) for b in range(len(batches))]
    wanted = [target_shares(bins, centre=centre, sigma=c.sigma) for centre in centres]
    given = [{k: sum(nearest[i] == k for i in batch) / batch_size for k in bins} for batch in batches]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, shares, title in ((axes[0], wanted, "target"), (axes[1], given, "actual")):
        values = [[share[k] for share in shares] for k in bins]
        image = axis.imshow(values, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axis.set_yticks(range(len(bins)), [f"{k:.3g}" for k in bins])
        axis.set(title=f"{title}: share of the batch", xlabel="batch", ylabel="pass rate")
    figure.colorbar(image, ax=axes[1])
    for label, shares in (("target", wanted), ("actual", given)):
        axes[2].plot([sum(k * v for k, v in share.items()) for share in shares], label=label)
    axes[2].plot(centres, label="centre", linestyle=":")
    axes[2].set(title=f"mean pass rate ({len(dropped)} of {len(rates)} dropped)", xlabel="batch", ylim=(0, 1))
    axes[2].legend(frameon=False)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def main(argv: Sequence[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(argv) and "--config" not in argv:
        print(__doc__)
        return 0
    try:
        job, options = read_job(argv, ("--samples", "--out"))
        g, out = grpo_of(job.config), Path(options.get("--out", job.run_dir / "pass_rates.jsonl"))
        num_samples = count_of(options, "--samples", default=NUM_SAMPLES)
        rates = measure(job.config, out=out, folder=job.run_dir / "passrate", num_samples=num_samples)
        c, picture = g.curriculum or CurriculumConfig(), out.with_suffix(".png")
        easy = sum(rate >= c.drop_at for rate in rates)
        print(f"{len(rates)} prompts, mean pass rate {sum(rates) / len(rates):.3f}; {easy} at or above {c.drop_at:g}")
        drawn = plot_curriculum(rates, batch_size=g.prompts_per_step, c=c, seed=g.prompts.seed, target=picture)
        print(f"wrote {out}" + (f", {picture}" if drawn else "; too few prompts for one batch of a curriculum"))
        return 0
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

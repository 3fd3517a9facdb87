"""python -m lnjax.evaluate --config NAME [--model SOURCE] --out DIR [--data data/benchmarks] [--tasks gpqa,ifeval,…]
[--samples 16] [--any.key value]

Measure a model on published benchmarks, reasoning on (system prompt `detailed thinking on`, temperature 0.6, top-p 0.95, the
mean of N samples a prompt) beside reasoning off (`detailed thinking off`, greedy, one sample), as the Llama-Nemotron report
does (arXiv 2505.00949, section 7), through the config's engine. A completion may be as long as engine.max_len leaves room for.
The data are local .jsonl files in their published schemas; a missing one is named with its place and format. DIR gets one line
a prompt in TASK_MODE.jsonl, and summary.json; the same command goes on where it was stopped.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lnjax.config import Job
from lnjax.data.benchmarks import BENCHMARKS, read_benchmark
from lnjax.data.rows import SWITCH, to_prompt
from lnjax.errors import ConfigError
from lnjax.metrics import write_json
from lnjax.sampler import Sampler, digest_of, front_door, open_sampler
from lnjax.schema import SamplingConfig
from lnjax.score import mean_interval

SEED = 2**31 + 2  # apart from training, evaluation in a run and pass rates
CHUNK = 64  # prompts between two writes
REWARD_S = 70.0  # above any verifier's own deadline
MODES = {"on": (0.6, 0.95), "off": (0.0, 1.0)}
"""{reasoning: (temperature, top-p)}."""
SOURCE = "Nano 8B, Super 49B, Ultra 253B: on|off, percent; arXiv 2505.00949, tables 3 to 5 (LiveCodeBench 2408-2502; *: part I)"


def work(job: Job, options: argparse.Namespace) -> None:
    """All tasks in both modes; table and summary."""
    tasks = options.tasks.split(",") if options.tasks else list(BENCHMARKS)
    if options.out is None or not set(tasks) <= BENCHMARKS.keys():
        raise ConfigError(
            f"--out {options.out}, --tasks {options.tasks}: expected a folder and some of {[*BENCHMARKS]}"
        )
    rows = {task: read_benchmark(task, Path(options.data or "data/benchmarks")) for task in tasks}
    reward = dataclasses.replace(job.config.reward, deadline_s=REWARD_S)
    c = dataclasses.replace(job.config, reward=reward)
    with open_sampler(c, folder=options.out / "engine") as s:
        results = {
            task: {mode: measure(s, task, mode, rows[task], out=options.out, samples=options.samples) for mode in MODES}
            for task in tasks
        }
    summary = {"model": c.model.source, "weights": s.digest, "paper": SOURCE, "tasks": results}
    write_json(options.out / "summary.json", summary)
    Console(width=max(Console().width, 120)).print(table_of(results))  # a cut table says nothing
    print(f"{SOURCE}\nwrote {options.out}/summary.json")


def measure(s: Sampler, task: str, mode: str, rows: Sequence[Any], *, out: Path, samples: int) -> dict[str, Any]:
    """Mean, 95 % interval over prompts and what else a table wants of one task in one mode."""
    c = s.built.config
    prompts = [
        to_prompt(
            {**row, "reasoning": mode, "system_prompt": SWITCH[mode]},
            where=f"{where}/{mode}",
            tokenizer=s.built.tokenizer,
            max_tokens=c.engine.max_len - 1,
        )
        for where, row in rows
    ]
    longest, (temperature, top_p) = max(len(p.token_ids) for p in prompts), MODES[mode]
    room = SamplingConfig(max_new_tokens=c.engine.max_len - longest, temperature=temperature, top_p=top_p)
    found = s.measure(
        prompts,
        [{"weight": len(row["args"].get("instruction_id_list", "1"))} for _, row in rows],
        out=out / f"{task}_{mode}.jsonl",
        config=digest_of(dataclasses.asdict(room), c.seed, rows),
        num_samples=samples if temperature else 1,
        sampling=s.built.sampling(room),
        seed=SEED,
        chunk=CHUNK,
    )
    interval = mean_interval([r["pass_rate"] for r in found], weights=[r["weight"] for r in found])
    numbers = dict(zip(("mean", "low", "high"), interval, strict=True))
    shares = {k: sum(r[k] for r in found) / len(found) for k in ("unfinished", "tokens")}
    failures = sum(len(r["failures"]) for r in found)
    return numbers | shares | {"prompts": len(found), "samples": found[0]["measured"]["samples"], "failures": failures}


def table_of(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    heads = ("task", "prompts", "on", "off", "cut off", "no verdict", "Nano", "Super", "Ultra")
    table = Table(*heads, title="pass@1, percent (95 % interval)")
    for task, modes in results.items():
        cells = [f"{100 * r['mean']:.1f} ({100 * r['low']:.0f}–{100 * r['high']:.0f})" for r in modes.values()]
        cells.append("|".join(f"{100 * r['unfinished']:.0f}" for r in modes.values()))
        cells.append("|".join(str(r["failures"]) for r in modes.values()))
        table.add_row(task, str(modes["on"]["prompts"]), *cells, *BENCHMARKS[task].paper)
    return table


def main(argv: Sequence[str]) -> int:
    return front_door(work, argv, doc=str(__doc__), samples=16, more=("--data", "--tasks"))

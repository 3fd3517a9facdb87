"""python -m lnjax.evaluate --config NAME [--model SOURCE] [--out DIR] [--data data/benchmarks] [--tasks gpqa,ifeval,...]
[--samples 16] [--any.key value]

Measure a model on published benchmarks, reasoning on (system prompt `detailed thinking on`, temperature 0.6, top-p 0.95, the
mean of N samples a prompt) beside reasoning off (`detailed thinking off`, greedy, one sample), as the Llama-Nemotron report
does (arXiv 2505.00949, section 7), through the config's engine. A completion may be as long as engine.max_len leaves room for
(the report: 32,768). The data are local files in their published schemas; without --tasks, what is missing is a row that names
its place. DIR (default RUN_DIR/evaluate) gets a line a prompt in TASK_MODE.jsonl, summary.json and table.md; the same command
goes on where it was stopped.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lnjax import tasks
from lnjax.config import Job
from lnjax.data.rows import SWITCH, to_prompt
from lnjax.errors import ConfigError, DataError, LnjaxError
from lnjax.metrics import write_json
from lnjax.models.family import family
from lnjax.rewards.sandbox import run_program
from lnjax.sampler import Sampler, digest_of, front_door, open_sampler
from lnjax.schema import EnvironmentConfig, ModelSpec, SamplingConfig
from lnjax.score import figure
from lnjax.types import Prompt

SEED = 2**31 + 2  # apart from training, evaluation in a run and pass rates
CHUNK = 64  # prompts between two writes
MODES = {"on": (0.6, 0.95), "off": (0.0, 1.0)}
"""{reasoning: (temperature, top-p)}."""
SOURCE = "arXiv 2505.00949, tables 3 to 5"


def work(job: Job, options: argparse.Namespace) -> None:
    """All tasks in both modes; table and summary. Raises LnjaxError for what a task asked for by name lacks."""
    names, rows, lacks = options.tasks.split(",") if options.tasks else [*tasks.TASKS], {}, {}
    if not set(names) <= tasks.TASKS.keys():
        raise ConfigError(f"--tasks {options.tasks}: expected some of {','.join(tasks.TASKS)}")
    for name in names:
        try:
            rows[name] = tasks.read_task(name, Path(options.data or "data/benchmarks"))
            if name == "chat" and job.config.reward.judge is None:
                raise ConfigError("chat: the config has no reward.judge; add one")
            if name == "livecodebench":
                run_program("", stdin="", cpu_s=5, deadline_s=60)
        except (LnjaxError, RuntimeError) as error:
            lacks[name] = str(error)
            rows.pop(name, None)
    if lacks and (options.tasks or not rows):
        raise DataError("; ".join(lacks.values()))
    reward = replace(job.config.reward, model=None, judge=job.config.reward.judge if "chat" in rows else None)
    if "livecodebench" in rows:
        reward = replace(reward, deadline_s=max(reward.deadline_s, tasks.CODE_S + 10))
    out = options.out or job.run_dir / "evaluate"
    c = replace(job.config, reward=reward, environment=EnvironmentConfig())  # benchmarks bring no tools that answer
    with open_sampler(c, folder=out / "engine") as s:
        asked = {name: {mode: prompts_of(s, mode, of) for mode in MODES} for name, of in rows.items()}
        found: dict[str, Any] = {name: {"missing": why} for name, why in lacks.items()}
        for name, by in asked.items():
            found[name] = {m: measure(s, (name, m), rows[name], by[m], out=out, samples=options.samples) for m in MODES}
        member = member_of(s.built.model.spec)
    lines = table({name: found[name] for name in names}, member=member)
    write_json(out / "summary.json", {"model": c.model.source, "weights": s.digest, "tasks": found, "table": lines})
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, f"wrote {out}/summary.json, table.md", sep="\n")


def prompts_of(s: Sampler, mode: str, rows: Sequence[Any]) -> list[Prompt]:
    """Raises ConfigError for one that leaves no room to answer."""
    prompts = [
        to_prompt(
            {**row, "reasoning": mode, "system_prompt": SWITCH[mode]},
            where=f"{where}/{mode}",
            tokenizer=s.built.tokenizer,
            max_tokens=sys.maxsize,
        )
        for where, row in rows
    ]
    longest, name = max((len(p.token_ids), p.id) for p in prompts)
    if 2 * longest > (most := s.built.config.engine.max_len):
        raise ConfigError(
            f"{name} has {longest} tokens, more than half of engine.max_len={most}: too little room to answer; raise "
            "--engine.max-len"
        )
    return prompts


def measure(
    s: Sampler, what: tuple[str, str], rows: Sequence[Any], prompts: Sequence[Prompt], *, out: Path, samples: int
) -> dict[str, Any]:
    """Mean, 95 % interval over prompts and what else a table wants of one (task, mode)."""
    c, (temperature, top_p) = s.built.config, MODES[what[1]]
    longest = max(len(p.token_ids) for p in prompts)
    room = SamplingConfig(max_new_tokens=c.engine.max_len - longest, temperature=temperature, top_p=top_p)
    judge = c.reward.judge and c.reward.judge.model
    found = s.measure(
        prompts,
        [{"weight": len(row["args"].get("instruction_id_list", "1"))} for _, row in rows],
        out=out / f"{'_'.join(what)}.jsonl",
        config=digest_of(asdict(room), c.engine.dtype, judge, c.seed, rows),
        num_samples=samples if temperature else 1,
        sampling=s.built.sampling(room),
        seed=SEED,
        chunk=CHUNK,
    )
    numbers: dict[str, Any] = figure([r["pass_rate"] for r in found], weights=[r["weight"] for r in found])
    numbers |= {k: sum(r[k] for r in found) / len(found) for k in ("unfinished", "tokens")}
    return numbers | {"samples": found[0]["measured"]["samples"], "failures": sum(len(r["failures"]) for r in found)}


def member_of(spec: ModelSpec) -> str:
    """The member of the family whose layers these are, or none."""
    same = (x for x in tasks.MEMBERS if (family(x).d_model, family(x).blocks) == (spec.d_model, spec.blocks))
    return next(same, "")


def table(found: Mapping[str, Mapping[str, Any]], *, member: str) -> list[str]:
    """Lines of Markdown: pass@1 with its interval, on beside off, beside the report's numbers for a member of the family."""
    heads = ["task", "prompts", "reasoning on", "reasoning off", "cut off, %", "no verdict"]
    heads += [f"{tasks.MEMBERS[member]} in the report"] if member else []
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, modes in found.items():
        cells = [name, "", f"not measured: {modes.get('missing')}", *[""] * (len(heads) - 3)]
        if "on" in modes:
            both = modes["on"], modes["off"]
            shown = [f"{100 * r['mean']:.1f} ({100 * r['low']:.1f} to {100 * r['high']:.1f})" for r in both]
            shown += [
                ", ".join(f"{100 * r['unfinished']:.0f}" for r in both),
                ", ".join(str(r["failures"]) for r in both),
            ]
            cells = [name, str(both[0]["num_prompts"]), *shown]
            paper = dict(zip(tasks.MEMBERS, tasks.TASKS[name].paper.split(), strict=True))
            cells += [paper[member].replace("|", ", ")] if member else []
        lines.append(f"| {' | '.join(cells)} |")
    note = "pass@1, percent, 95 % interval over prompts; two numbers: on, off"
    return [*lines, note + (f"; report: {SOURCE} (*: another measure, see lnjax/tasks.py)" if member else "")]


def main(argv: Sequence[str]) -> int:
    return front_door(work, argv, doc=str(__doc__), samples=16, more=("--data", "--tasks"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs a recipe: its stages in order, each an ordinary run in RUN_DIR/NAME, then every policy on the same held-out prompts.

The same command goes on after a kill: a stage that has its summary is done, one that has not resumes as any run does.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lnjax import passrate, train
from lnjax.alive import Notice, Watchdog
from lnjax.config import config_hash, save_config
from lnjax.data.streams import build_prompt_stream
from lnjax.errors import ConfigError
from lnjax.heldout import EVAL_SEED
from lnjax.metrics import write_json
from lnjax.recipe import STAGE, RecipeConfig, RecipeEvalConfig, RecipeStage, resolve, resolved
from lnjax.report.page import write_page
from lnjax.rewards.format import OPEN, follows_format
from lnjax.sampler import digest_of, open_sampler
from lnjax.schema import RunConfig
from lnjax.score import figure, score_groups

Figures = dict[str, dict[str, float]]
"""{figure: {mean, low, high, num_prompts}}; low and high are the 95 % interval over prompts."""
HEADINGS = {
    "accuracy_on": "accuracy, reasoning on",
    "accuracy_off": "accuracy, reasoning off",
    "think_on": "thinks when on",
    "think_off": "thinks when off",
    "instructions_strict": "all instructions followed",
    "reward_model": "reward-model score",
}
LOWER_IS_BETTER = ("think_off",)


def check(c: RecipeConfig, run_dir: Path) -> str:
    """Validate what can be without training; a stage that needs what an earlier one has not made yet says so."""
    lines = []
    for stage, run in zip(c.stages, resolved(c, run_dir), strict=True):
        needed = {
            x.split('"')[0].split("/")[0] for x in json.dumps(dataclasses.asdict(stage.run)).split(f'"{STAGE}')[1:]
        }
        missing = [name for name in sorted(needed) if not (run_dir / name / "summary.json").exists()]
        text = f"waits for {', '.join(missing)}" if missing else train.check(run, run_dir / run.name)
        lines.append(f"{run.name}: {text}")
    return "\n".join(lines)


def run(c: RecipeConfig, run_dir: Path, *, watchdog: Watchdog, notice: Notice) -> dict[str, Any]:
    """Returns what it wrote into RUN_DIR/summary.json; the table stands in RUN_DIR/table.md too."""
    if jax.process_count() > 1:
        raise ConfigError(f"{c.name} is a recipe, which runs in one process; start its stages one by one on a cluster")
    runs = resolved(c, run_dir)
    for config in runs:
        _check_same(config, run_dir / config.name)
    made = [(run_dir / config.name / "summary.json").exists() for config in runs]
    if made != sorted(made, reverse=True):
        name = runs[made.index(False)].name
        raise ConfigError(f"{run_dir / name} is not finished, but stages after it are; remove their folders too")
    done = []
    for number, (stage, config) in enumerate(zip(c.stages, runs, strict=True), 1):
        folder = run_dir / config.name
        before = _read(folder / "summary.json")
        print(f"stage {number}/{len(runs)} {config.name}: {'done before' if before else 'running'}", flush=True)
        done.append(before or _do(c, stage, config, folder, watchdog=watchdog, notice=notice))
    measures = resolve(c.eval, {x.name: run_dir / x.name for x in runs}, where=f"eval of {c.name}")
    of = digest_of(dataclasses.asdict(measures), *map(config_hash, runs))
    stages: list[dict[str, Any]] = []
    figures: Figures = {}
    for stage, config, summary in zip(c.stages, runs, done, strict=True):
        earlier, own = figures, {}
        if stage.is_policy:
            print(f"evaluating {config.name}", flush=True)
            with watchdog.phase(f"evaluate {config.name}"):
                figures = evaluate(measures, config, run_dir / config.name, of=of)
        elif stage.does == "pass_rates":
            own = {"pass_rate": summary["pass_rate"]}
        elif "reward_model" in summary["eval"]:
            low, high = summary["eval_interval"]["reward_model"]
            own = {"heldout_pairs": {"mean": summary["eval"]["reward_model"], "low": low, "high": high}}
        raised, dropped = moved(earlier, figures)
        seconds = round(sum(summary["seconds"].values()), 1)
        stages.append({"name": config.name, "does": stage.does, "trains_policy": stage.is_policy, "seconds": seconds})
        stages[-1] |= {"eval": {**figures, **own}, "raised": raised, "dropped": dropped}
    found = {"name": c.name, "stages": stages, "table": table(stages)}
    write_json(run_dir / "summary.json", found)
    (run_dir / "table.md").write_text("\n".join(found["table"]) + "\n", encoding="utf-8")
    write_page([run_dir / s.run.name for s in c.stages if s.does == "train"], out=run_dir / "report.html")
    return found


def evaluate(c: RecipeEvalConfig, config: RunConfig, folder: Path, *, of: str) -> Figures:
    """The figures of the policy that a run left in its folder; kept there in eval.json, where `of` says what they depend on."""
    out = folder / "eval.json"
    before = _read(out)
    if before and before["of"] == of:
        return before["figures"]
    model = dataclasses.replace(config.model, source=str(folder), tokenizer="same")
    found: dict[tuple[str, str], list[tuple[Mapping[str, float], str]]] = {}
    """{(prompts, mode): [(parts of the score, text)]}"""
    with open_sampler(dataclasses.replace(config, model=model, reward=c.reward), folder=folder / "eval") as s:
        tokenizer = s.built.tokenizer
        for name, prompts in c.prompts.items():
            stream = build_prompt_stream(prompts, tokenizer).prompts
            for mode, sampling in (("on", c.on), ("off", c.off)):
                asked = [p for p in stream if p.reasoning == (mode == "on")]
                answers = s.engine.generate(asked, num_samples=1, sampling=s.built.sampling(sampling), seed=EVAL_SEED)
                scored = score_groups(asked, answers, tokenizer=tokenizer, reward=s.reward)
                one = [group.rollouts[0] for group in scored]
                found[name, mode] = [(x.score.parts, tokenizer.decode(x.completion.last_turn)) for x in one]

    def mean(name: str, part: str, *modes: str) -> dict[str, float]:
        return figure([parts.get(part, 0.0) for mode in modes for parts, _ in found[name, mode]])

    texts = {mode: [text for name in c.prompts for _, text in found[name, mode]] for mode in ("on", "off")}
    figures = {
        "accuracy_on": mean("math", "accuracy", "on"),
        "accuracy_off": mean("math", "accuracy", "off"),
        "think_on": figure([float(follows_format(text, reasoning=True)) for text in texts["on"]]),
        "think_off": figure([float(OPEN in text) for text in texts["off"]]),
        "instructions_strict": mean("instructions", "strict", "on", "off"),
        "reward_model": mean("chat", "accuracy", "on", "off"),
    }
    write_json(out, {"of": of, "figures": figures})
    return figures


def moved(before: Figures, after: Figures) -> tuple[list[str], list[str]]:
    """(figures that got better, that got worse) by more than the half width of their interval before."""
    better, worse = [], []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]["mean"]
        if not old["low"] <= new <= old["high"]:
            (worse if (new < old["mean"]) != (name in LOWER_IS_BETTER) else better).append(name)
    return sorted(better), sorted(worse)


def table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a row for each stage that left another policy."""
    lines = [f"| after | {' | '.join(HEADINGS.values())} | dropped |", "| --- " * (len(HEADINGS) + 2) + "|"]
    for stage in stages:
        if stage["trains_policy"]:
            shown: list[Any] = [stage["eval"][k] for k in HEADINGS]
            cells = [f"{x['mean']:.3f} ({x['low']:.3f} to {x['high']:.3f})" for x in shown]
            lines.append(f"| {stage['name']} | {' | '.join(cells)} | {', '.join(stage['dropped']) or 'none'} |")
    return lines


def _do(
    c: RecipeConfig, stage: RecipeStage, config: RunConfig, folder: Path, *, watchdog: Watchdog, notice: Notice
) -> dict[str, Any]:
    """One stage to its end; its summary, which stands in its folder."""
    if stage.does == "train":
        return train.run(config, folder, watchdog=watchdog, notice=notice)
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    with watchdog.phase("pass rates"):
        rows = passrate.measure(config, folder, out=folder / "pass_rates.jsonl", num_samples=c.pass_rate_samples)
    seconds = {"pass_rates": time.monotonic() - start}
    summary = {"name": config.name, "pass_rate": figure([row["pass_rate"] for row in rows]), "seconds": seconds}
    write_json(folder / "summary.json", summary)
    return summary


def _check_same(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError where the folder holds another run: what came after it would be of that one."""
    before = _read(folder / "config.json")
    if before and before.get("hash") != config_hash(config):
        raise ConfigError(
            f"{folder} holds a run of another config; use another --run-dir, or the same values to resume it"
        )


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

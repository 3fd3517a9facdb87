"""A recipe: several runs one after the other, each from what an earlier one left, and how all of them are measured. No jax.

`configs/NAME.py` returns a `RecipeConfig` where it would return a `RunConfig`. A text in a stage's config that begins with
`stage:NAME` stands for the run folder of an earlier stage: `stage:sft` as model.source, `stage:pass_rates/pass_rates.jsonl` as
prompts.source, `stage:reward_model` as reward.model.source.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lnjax.config import config_hash, nearest, override, read_config
from lnjax.errors import ConfigError
from lnjax.schema import ClusterConfig, EvalConfig, PromptConfig, RewardConfig, RunConfig, SamplingConfig
from lnjax.validate import validate

STAGE = "stage:"
USAGE = "usage: python -m lnjax.launch --config {name} [--run-dir DIR] [--dry-run] [--STAGE.any.key value ...]; stages: {stages}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStage:
    run: RunConfig
    """Complete; its name is the stage's and that of its folder."""
    does: Literal["train", "pass_rates"] = "train"
    """`pass_rates` trains nothing: it measures the model on run.grpo.prompts and writes pass_rates.jsonl in its folder."""

    @property
    def is_policy(self) -> bool:
        """Whether it leaves another policy than it found."""
        return self.does == "train" and self.run.reward_model is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEvalConfig:
    """What every policy is measured on, after all stages: held-out prompts that have both modes of the reasoning switch."""

    math: PromptConfig
    """Accuracy, for each mode by itself."""
    instructions: PromptConfig
    """Share of prompts of which every instruction is followed."""
    chat: PromptConfig
    """Reward-model score: the odds that the reward model gives an answer, from 0 to 1."""
    on: SamplingConfig
    """With reasoning on."""
    off: SamplingConfig
    reward: RewardConfig
    """The verifiers, and the trained reward model."""

    @property
    def prompts(self) -> dict[str, PromptConfig]:
        return {"math": self.math, "instructions": self.instructions, "chat": self.chat}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    name: str
    stages: tuple[RecipeStage, ...]
    """In order."""
    pass_rate_samples: int = 8
    """Answers to each prompt (arXiv 2505.00949, section 5.1)."""
    eval: RecipeEvalConfig

    @property
    def cluster(self) -> ClusterConfig:
        """Deadlines of the process."""
        return self.stages[0].run.cluster


@dataclass(frozen=True, slots=True)
class RecipeJob:
    """What a command line that names a recipe asks for."""

    config: RecipeConfig
    run_dir: Path
    dry_run: bool


def parse_recipe(argv: Sequence[str]) -> RecipeJob | None:
    """None where --config does not name a recipe. Raises ConfigError for values that cannot work."""
    words = [w for word in argv for w in (word.split("=", 1) if word.startswith("--") else [word])]
    if "--config" not in words[:-1]:
        return None
    c = read_config(words[words.index("--config") + 1])
    if not isinstance(c, RecipeConfig):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / c.name)
    parser.add_argument("--dry-run", action="store_true")
    options, rest = parser.parse_known_args(words)
    c = override_stages(c, rest)
    check_recipe(c)
    return RecipeJob(c, options.run_dir, options.dry_run)


def override_stages(c: RecipeConfig, words: Sequence[str]) -> RecipeConfig:
    """The recipe with `--STAGE.key value` pairs applied. Raises ConfigError with the nearest name."""
    given: dict[str, list[str]] = {stage.run.name: [] for stage in c.stages}
    usage, name = USAGE.format(name=c.name, stages=", ".join(given)), ""
    for word in words:
        if word.startswith("--"):
            name, _, key = word.removeprefix("--").partition(".")
            name = name.replace("-", "_")
            if name not in given or not key:
                raise ConfigError(f"{word}: a recipe's keys begin with a stage{nearest(name, list(given))}. {usage}")
            word = f"--{key}"
        elif not name:
            raise ConfigError(f"unexpected argument {word!r}. {usage}")
        given[name].append(word)
    runs = [dataclasses.replace(stage, run=override(stage.run, given[stage.run.name])) for stage in c.stages]
    return dataclasses.replace(c, stages=tuple(runs))


def check_recipe(c: RecipeConfig) -> None:
    """What can be checked before anything runs. Raises ConfigError naming the stage."""
    names = [stage.run.name for stage in c.stages]
    if len(set(names)) < len(names) or not any(stage.is_policy for stage in c.stages):
        raise ConfigError(f"{c.name}: stages {names}; expected different names, and one at least that trains a policy")
    runs = resolved(c, Path())
    resolve(c.eval, {name: Path(name) for name in names}, where=f"eval of {c.name}")
    for stage, run in zip(c.stages, runs, strict=True):
        try:
            if stage.does == "pass_rates" and run.grpo is None:
                raise ConfigError("measures pass rates of grpo.prompts, but has no grpo section; add one")
            validate(run)
            if stage.is_policy:
                for prompts in c.eval.prompts.values():
                    for sampling in (c.eval.on, c.eval.off):
                        validate(dataclasses.replace(run, eval=EvalConfig(prompts=prompts, sampling=sampling)))
        except ConfigError as error:
            raise ConfigError(f"stage {run.name} of {c.name}: {error}") from error


def resolved(c: RecipeConfig, run_dir: Path) -> list[RunConfig]:
    """The run of each stage with folders for `stage:NAME`. Raises ConfigError for a stage that is not before it."""
    folders: dict[str, Path] = {}
    runs = []
    for stage in c.stages:
        runs.append(resolve(stage.run, folders, where=f"stage {stage.run.name} of {c.name}"))
        folders[stage.run.name] = run_dir / stage.run.name
    return runs


def resolve[Value](value: Value, folders: Mapping[str, Path], *, where: str) -> Value:
    """The value with folders for every `stage:NAME` in it."""
    found: Any = value
    if isinstance(value, str) and value.startswith(STAGE):
        name, _, rest = value.removeprefix(STAGE).partition("/")
        if name not in folders:
            ways = f"{nearest(name, list(folders))}; there are {list(folders)}"
            raise ConfigError(f"{where}: {value!r} names no earlier stage{ways}")
        found = str(folders[name] / rest)
    elif isinstance(value, tuple):
        found = tuple(resolve(x, folders, where=where) for x in value)
    elif dataclasses.is_dataclass(value):
        inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        found = dataclasses.replace(found, **{k: resolve(x, folders, where=where) for k, x in inner.items()})
    return found


def render_recipe(job: RecipeJob) -> str:
    """One line a stage."""
    lines = [f"recipe {job.config.name} -> {job.run_dir}"]
    for stage in job.config.stages:
        c = stage.run
        lines.append(f"{c.name:14} {stage.does:10} from {c.model.source:18} config {config_hash(c)}")
    return "\n".join(lines)

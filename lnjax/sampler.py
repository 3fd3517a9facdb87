"""A model behind its config's engine and verifiers, without training: what the front doors that only sample share."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lnjax.build import Built, build, build_engine, initial_params
from lnjax.config import Job, parse
from lnjax.data.chat import lint_template
from lnjax.errors import ConfigError
from lnjax.models.fingerprint import fingerprint
from lnjax.rewards.pool import RewardPool, build_reward
from lnjax.schema import RunConfig
from lnjax.score import score_groups
from lnjax.types import Prompt, RolloutEngine, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True)
class Sampler:
    built: Built
    engine: RolloutEngine
    reward: RewardPool
    digest: str
    """Of the weights."""

    def groups(
        self, prompts: Sequence[Prompt], *, num_samples: int, sampling: SamplingParams, seed: int
    ) -> list[RolloutGroup]:
        """Scored completions, one group a prompt."""
        completions = self.engine.generate(list(prompts), num_samples=num_samples, sampling=sampling, seed=seed)
        return score_groups(prompts, completions, tokenizer=self.built.tokenizer, reward=self.reward)


@contextmanager
def open_sampler(c: RunConfig, *, folder: Path) -> Iterator[Sampler]:
    """The engine serves the config's model; `folder` takes what servers write. Raises LnjaxError."""
    b = build(c, folder)
    lint_template(b.tokenizer)
    with build_reward(c.reward) as reward:
        reward.start()
        folder.mkdir(parents=True, exist_ok=True)
        engine, _ = build_engine(b, note=print)
        with closing(engine):
            params = initial_params(b)
            engine.load_weights(0, params)
            yield Sampler(b, engine, reward, fingerprint(params))


def read_job(argv: Sequence[str], names: Sequence[str]) -> tuple[Job, Mapping[str, str]]:
    """The job, its model replaced by `--model`, and the values of `names` among the words. Raises ConfigError."""
    words = [w for word in argv for w in (word.split("=", 1) if word.startswith("--") else [word])]
    found: dict[str, str] = {}
    for name in ("--model", *names):
        while name in words:
            at = words.index(name)
            if at + 1 == len(words):
                raise ConfigError(f"{name} needs a value")
            found[name] = words[at + 1]
            del words[at : at + 2]
    job = parse(words)
    if "--model" not in found:
        return job, found
    model = dataclasses.replace(job.config.model, source=found["--model"], spec=None, tokenizer="same")
    return dataclasses.replace(job, config=dataclasses.replace(job.config, model=model)), found


def count_of(options: Mapping[str, str], name: str, *, default: int) -> int:
    """A positive number. Raises ConfigError."""
    value = options.get(name, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} {value}: expected a number, at least 1")
    return int(value)

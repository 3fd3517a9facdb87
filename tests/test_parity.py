"""The parity oracle: what it lets pass, what it stops, and which cause it names."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lnjax.build import Resources, build
from lnjax.checkpoint.publish import Publisher
from lnjax.config import load_config
from lnjax.errors import RolloutError
from lnjax.grpo import _logprobs_program
from lnjax.parity import Parity
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.schema import EmbeddedConfig, SamplingConfig
from lnjax.types import Completion, Prompt, Rollout, RolloutGroup, Score

NUMBER = 3


class Case:
    """Completions of a tiny model under version 3's weights; version 2's are still published."""

    def __init__(self, folder: Path, *, temperature=1.0):
        config = load_config("tiny_grpo_vllm")
        assert config.grpo and config.model.spec
        grpo = dataclasses.replace(config.grpo, sampling=SamplingConfig(max_new_tokens=24, temperature=temperature))
        spec = dataclasses.replace(config.model.spec, initializer_range=0.2)
        model = dataclasses.replace(config.model, spec=spec, remat="none")
        self.config = dataclasses.replace(config, grpo=grpo, model=model)
        self.b = build(self.config, folder)
        self.publisher = Publisher(
            folder / "weights", spec=spec, mesh=self.b.mesh, dtype=np.dtype(np.float32), keep=3, deadline_s=1.0
        )
        self.weights = {n: self.b.model.init_params(jax.random.key(n), dtype=np.dtype(np.float32)) for n in (2, 3)}
        for number, params in self.weights.items():
            self.publisher.publish(number, params)
        c = EmbeddedConfig(num_slots=8, max_len=64, prefill_rows=8, prefill_multiple=64, dtype="float32")
        self.engine = EmbeddedEngine(self.b.model, c=c, key=jax.random.key(0))
        self.folder = folder
        r = Resources(None, None, self.engine, None, self.publisher, {}, None)  # type: ignore[arg-type]
        self.parity = Parity(
            self.b, r, grpo, logprobs=jax.jit(_logprobs_program(self.b), static_argnames="temperature")
        )
        self.totals = r.parity

    def groups(self, *, number=NUMBER, temperature=None, change=lambda c: c):
        """`change`: what the server says instead of the truth."""
        prompts = [Prompt(f"p/{i}", tuple(range(10 + i, 20 + i)), "none", {}) for i in range(4)]
        self.engine.load_weights(number, self.weights[number])
        grpo = self.config.grpo
        assert grpo
        sampling = self.b.sampling(
            dataclasses.replace(grpo.sampling, temperature=temperature or grpo.sampling.temperature)
        )
        found = self.engine.generate(prompts, num_samples=2, sampling=sampling, seed=1)
        return [
            RolloutGroup(p, tuple(Rollout(p, change(c), Score(0.0)) for c in group))
            for p, group in zip(prompts, found, strict=True)
        ]

    def check(self, groups):
        return self.parity.check(groups, rl_step=7, params=self.weights[NUMBER], updates=NUMBER)


@pytest.fixture(scope="module")
def case_at(tmp_path_factory):
    """case_at(temperature), each built once."""
    return functools.cache(lambda t: Case(tmp_path_factory.mktemp("parity"), temperature=t))


def said(c: Completion, **changes) -> Completion:
    return dataclasses.replace(c, **changes)


def test_what_the_learner_says_too_passes_and_is_counted(case_at):
    case = case_at(1.0)
    values = case.check(case.groups())
    assert values["parity_prob_error"] <= 1.0001
    assert abs(values["parity_kl"]) < 1e-8
    assert values["parity_tokens_checked"] > 20
    assert case.totals["tokens_checked"] >= values["parity_tokens_checked"]


def test_tokens_of_an_older_version_are_scored_under_that_versions_weights(case_at):
    case = case_at(1.0)
    assert case.check(case.groups(number=2))["parity_prob_error"] <= 1.0001


WRONG = {
    "ids differ": ({"change": lambda c: said(c, logprobs=c.logprobs[1:] + c.logprobs[:1])}, 1.0, "token ids differ"),
    "stale weights": (
        {"number": 2, "change": lambda c: said(c, versions=(NUMBER,) * len(c.versions))},
        1.0,
        "digest differs",
    ),
    "raw logprobs": ({"temperature": 1.0}, 0.5, "logprob mode"),
    "stale cache": (
        {"change": lambda c: said(c, logprobs=c.logprobs[:4] + tuple(x - 2.0 for x in c.logprobs[4:]))},
        1.0,
        "a stale KV cache",
    ),
    "a layer": (
        {"change": lambda c: said(c, logprobs=tuple(x - 1.0 - 0.5 * (i % 2) for i, x in enumerate(c.logprobs)))},
        1.0,
        "a layer",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_disagreement_stops_the_run_names_the_cause_and_leaves_what_is_needed_to_look_again(case_at, name):
    how, temperature, cause = WRONG[name]
    case = case_at(temperature)
    groups = case.groups(**how)
    with pytest.raises(RolloutError, match=f"servers and learner disagree.*Likely cause: {cause}"):
        case.check(groups)
    left = json.loads((case.folder / "parity-7.json").read_text())
    assert left["cause"].startswith(cause)
    by_prompt = {g.prompt.id: g for g in groups}
    for sample in left["samples"]:
        ours = [list(x.completion.token_ids) for x in by_prompt[sample["prompt"]].rollouts]
        assert sample["token_ids"] in ours
        assert len(sample["server_logprobs"]) == len(sample["learner_logprobs"]) == len(sample["versions"])

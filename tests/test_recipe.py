"""Recipes: what stages refer to, their order, resuming, the table; the lessons; a whole short one killed and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import _lessons, tiny_recipe
from lnjax import passrate, pipeline, train
from lnjax.alive import Watchdog
from lnjax.data.streams import prompt_rows
from lnjax.distributed import Place
from lnjax.errors import ConfigError
from lnjax.launch import main
from lnjax.recipe import RecipeStage, check_recipe, override_stages, parse_recipe, resolve, resolved
from lnjax.rewards.format import answer_of
from lnjax.rewards.ifeval import followed
from lnjax.schema import PromptConfig
from lnjax.score import figure
from tests.test_train import LAUNCH, ROOT, environment

NAMES = ["sft", "pass_rates", "grpo", "if_rl", "reward_model", "chat_rl"]


def parsed(*words, recipe="tiny_recipe"):
    job = parse_recipe(["--config", recipe, *words])
    assert job is not None
    return job


def test_a_stage_starts_from_the_folder_of_the_one_it_names(tmp_path):
    runs = {run.name: run for run in resolved(tiny_recipe.config(), tmp_path)}
    assert list(runs) == NAMES
    assert runs["sft"].model.source == "random"
    assert runs["grpo"].model.source == str(tmp_path / "sft")
    assert runs["grpo"].grpo.prompts.source == str(tmp_path / "pass_rates" / "pass_rates.jsonl")
    assert runs["if_rl"].model.source == str(tmp_path / "grpo")
    assert runs["chat_rl"].model.source == str(tmp_path / "if_rl")
    assert runs["chat_rl"].reward.model.source == str(tmp_path / "reward_model")


def test_a_reference_is_found_at_any_depth_and_nothing_else_changes():
    folders = {"a": Path("runs/a")}
    value = resolve(("stage:a/x.jsonl", 1, ("stage:a", None)), folders, where="here")
    assert value == ("runs/a/x.jsonl", 1, ("runs/a", None))
    with pytest.raises(ConfigError, match="here: 'stage:aa' names no earlier stage, did you mean a"):
        resolve("stage:aa", folders, where="here")


def test_a_stage_cannot_refer_to_itself_or_to_a_later_one():
    c = tiny_recipe.config()
    with pytest.raises(ConfigError, match="stage pass_rates of tiny_recipe: 'stage:sft' names no earlier stage"):
        check_recipe(dataclasses.replace(c, stages=c.stages[1:]))
    with pytest.raises(ConfigError, match="eval of tiny_recipe: 'stage:reward_model' names no earlier stage"):
        check_recipe(dataclasses.replace(c, stages=c.stages[:3]))


def test_what_cannot_work_is_said_before_anything_runs():
    c = tiny_recipe.config()
    first = c.stages[0]
    with pytest.raises(ConfigError, match="expected different names"):
        check_recipe(dataclasses.replace(c, stages=(first, first)))
    with pytest.raises(ConfigError, match="one at least that trains a policy"):
        check_recipe(dataclasses.replace(c, stages=()))
    no_prompts = RecipeStage(run=first.run, does="pass_rates")
    with pytest.raises(ConfigError, match=r"stage sft of tiny_recipe: measures pass rates of grpo.prompts, but has no"):
        check_recipe(dataclasses.replace(c, stages=(no_prompts, *c.stages[1:])))
    with pytest.raises(ConfigError, match=r"stage grpo of tiny_recipe: grpo.samples_per_prompt must be at least 2"):
        parsed("--grpo.grpo.samples-per-prompt", "1")
    short = dataclasses.replace(c.eval.off, max_new_tokens=10_000)
    with pytest.raises(ConfigError, match=r"stage sft of tiny_recipe: eval.prompts.max_prompt_tokens"):
        check_recipe(dataclasses.replace(c, eval=dataclasses.replace(c.eval, off=short)))


def test_the_command_line_sets_keys_of_a_stage():
    job = parsed("--if-rl.grpo.steps=3", "--sft.sft.steps", "2", "--run-dir", "elsewhere", "--dry-run")
    assert (job.run_dir, job.dry_run) == (Path("elsewhere"), True)
    steps = {s.run.name: s.run for s in job.config.stages}
    assert (steps["if_rl"].grpo.steps, steps["sft"].sft.steps, steps["grpo"].grpo.steps) == (3, 2, 60)
    assert parsed().run_dir == Path("runs/tiny_recipe")
    assert parse_recipe(["--config", "tiny_grpo", "--dry-run"]) is None
    assert parse_recipe(["--help"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grpp.grpo.steps", "3"], "did you mean grpo"),
        (["--proxy"], "a recipe's keys begin with a stage"),
        (["--grpo.grpo.stepz", "3"], "did you mean grpo.steps"),
        (["--grpo.grpo.steps", "many"], "expected int, got 'many'"),
        (["loose"], "unexpected argument 'loose'"),
    ],
)
def test_an_unknown_word_names_the_nearest(words, said, capsys):
    assert main(["--config", "tiny_recipe", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_is_no_config_of_one_run(capsys):
    assert passrate.main(["--config", "tiny_recipe"]) == 2
    assert "returned RecipeConfig, expected RunConfig" in capsys.readouterr().err


def test_figures_have_an_interval_even_where_all_agree():
    assert figure([1.0] * 100) == {"mean": 1.0, "low": 0.97, "high": 1.0, "num_prompts": 100}
    half = figure([0.0, 1.0] * 50)
    assert half["mean"] == 0.5
    assert round(half["low"], 3) == 0.402


def values(**means):
    return {k: {"mean": m, "low": m - 0.05, "high": m + 0.05} for k, m in means.items()}


def test_what_moved_by_more_than_its_interval_is_raised_or_dropped():
    before = values(accuracy_on=0.5, accuracy_off=0.5, think_on=0.9, think_off=0.1, reward_model=0.5)
    after = values(accuracy_on=0.6, accuracy_off=0.4, think_on=0.86, think_off=0.3, reward_model=0.54)
    assert pipeline.moved(before, after) == (["accuracy_on"], ["accuracy_off", "think_off"])
    assert pipeline.moved({}, after) == ([], [])


class Fake:
    """Stands in for training, measuring and evaluating; remembers what was asked, and may be killed at a stage."""

    def __init__(self, monkeypatch, *, dies_at=""):
        self.calls, self.dies_at = [], dies_at
        monkeypatch.setattr(train, "run", self.train)
        monkeypatch.setattr(passrate, "measure", self.measure)
        monkeypatch.setattr(pipeline, "evaluate", self.evaluate)
        monkeypatch.setattr(pipeline, "write_page", lambda runs, out: None)

    def train(self, c, folder, *, watchdog, notice):
        self.calls.append(c.name)
        folder.mkdir(parents=True, exist_ok=True)
        pipeline.save_config(c, folder)
        if c.name == self.dies_at:
            raise KeyboardInterrupt
        found = {"seconds": {"update": 2.0}, "eval": {}, "eval_interval": {}}
        if c.reward_model:
            found |= {"eval": {"reward_model": 0.9}, "eval_interval": {"reward_model": [0.8, 1.0]}}
        (folder / "summary.json").write_text(json.dumps(found))
        return found

    def measure(self, c, folder, *, out, num_samples):
        self.calls.append(f"{c.name} {num_samples}")
        return [{"pass_rate": 0.25}, {"pass_rate": 0.75}]

    def evaluate(self, c, config, folder, *, of):
        self.calls.append(f"eval {config.name}")
        assert c.reward.model.source == str(folder.parent / "reward_model")
        mean = {"sft": 0.4, "grpo": 0.8, "if_rl": 0.6, "chat_rl": 0.6}[config.name]
        return values(**dict.fromkeys(pipeline.HEADINGS, mean))


def play(tmp_path, c=None):
    watchdog = Watchdog(Place(), run_dir=tmp_path, c=tiny_recipe.config().cluster)
    try:
        return pipeline.run(c or tiny_recipe.config(), tmp_path, watchdog=watchdog, notice=SimpleNamespace())
    finally:
        watchdog.close(0)


def test_the_stages_run_in_order_and_every_policy_is_measured_at_the_end(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)
    found = play(tmp_path)
    trained = ["sft", "pass_rates 8", "grpo", "if_rl", "reward_model", "chat_rl"]
    assert fake.calls == [*trained, "eval sft", "eval grpo", "eval if_rl", "eval chat_rl"]
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    stages = {s["name"]: s for s in found["stages"]}
    assert list(stages) == NAMES
    assert all(set(pipeline.HEADINGS) <= set(s["eval"]) for s in stages.values())
    assert stages["pass_rates"]["eval"]["pass_rate"]["mean"] == 0.5
    assert stages["reward_model"]["eval"]["heldout_pairs"] == {"mean": 0.9, "low": 0.8, "high": 1.0}
    assert "accuracy_on" in stages["grpo"]["raised"]
    assert stages["grpo"]["dropped"] == ["think_off"]
    assert "instructions_strict" in stages["if_rl"]["dropped"]
    assert (stages["reward_model"]["dropped"], stages["chat_rl"]["dropped"]) == ([], [])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| sft", "| grpo", "| if_rl", "| chat_rl"]
    assert lines[3].endswith("| think_off |")
    assert "0.800 (0.750 to 0.850)" in lines[3]


def test_the_same_command_goes_on_at_the_stage_that_was_killed(tmp_path, monkeypatch):
    Fake(monkeypatch, dies_at="if_rl")
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path)
    fake = Fake(monkeypatch)
    play(tmp_path)
    assert fake.calls[:3] == ["if_rl", "reward_model", "chat_rl"]
    again = Fake(monkeypatch)
    play(tmp_path)
    assert all(call.startswith("eval") for call in again.calls)


def test_a_folder_of_another_recipe_is_refused(tmp_path, monkeypatch):
    Fake(monkeypatch)
    play(tmp_path)
    with pytest.raises(ConfigError, match="grpo holds a run of another config"):
        play(tmp_path, override_stages(tiny_recipe.config(), ["--grpo.grpo.steps", "2"]))
    (tmp_path / "grpo" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="grpo is not finished, but stages after it are"):
        play(tmp_path)


@pytest.mark.parametrize("make", [_lessons.math, _lessons.instructions, _lessons.chat])
def test_lessons_of_the_two_splits_share_no_prompt(make):
    train_rows, heldout = (make(300, seed=3, split=s) for s in ("train", "heldout"))
    texts = [{row["input"][0]["content"] for row in rows} for rows in (train_rows, heldout)]
    assert len(texts[0]) == len(texts[1]) == 300
    assert not texts[0] & texts[1]
    assert train_rows == make(300, seed=3, split="train")
    for row in train_rows:
        assert (row["reasoning"] == "on") == ("<think>" in row["output"])
    assert 0.3 < sum(row["reasoning"] == "on" for row in train_rows) / 300 < 0.7


def test_half_of_the_thoughts_about_sums_estimate():
    rows = [r for r in _lessons.math(1000, seed=0, split="train") if r["reasoning"] == "on"]
    right = sum(answer_of(r["output"]) == r["args"]["answer"] for r in rows) / len(rows)
    assert 0.4 < right < 0.6
    assert all(
        r["output"] == r["args"]["answer"]
        for r in _lessons.math(1000, seed=0, split="train")
        if r["reasoning"] == "off"
    )


def test_every_instruction_and_every_pair_can_be_followed_and_need_not_be():
    answer = "a red fox is an animal."
    pairs = [
        (x, y) for i, x in enumerate(_lessons.INSTRUCTIONS) for y in _lessons.INSTRUCTIONS[i + 1 :] if x.name != y.name
    ]
    for asked in [*((x,) for x in (*_lessons.INSTRUCTIONS, *_lessons.ALONE)), *pairs]:
        said, not_said = answer, answer
        for x in asked:
            said, not_said = x.follow(said), x.ignore(not_said)
        ids, kwargs = [x.name for x in asked], [x.kwargs for x in asked]
        assert all(followed(said, ids, kwargs)), said
        assert not all(followed(not_said, ids, kwargs)), ids


def test_pairs_prefer_kind_and_true_to_bare_to_none_to_untrue():
    found = [(row["chosen"], row["rejected"]) for row in _lessons.pairs(200, seed=0, split="train")]
    kinds = {tuple("kind" if "glad" in x else "none" if "no idea" in x else "bare" for x in pair) for pair in found}
    assert kinds == {("kind", "bare"), ("kind", "none"), ("bare", "none"), ("bare", "bare"), ("none", "bare")}


def test_a_school_has_all_three_kinds():
    kinds = [row["category"] for row in _lessons.school(200, seed=0, split="train")]
    assert {k: kinds.count(k) for k in set(kinds)} == {"math": 120, "instructions": 50, "chat": 30}


@pytest.mark.parametrize("source", ["python:configs._lessons:maths", "python:no_such_module:f", "python::"])
def test_a_generator_that_is_not_there_is_named(source):
    with pytest.raises(ConfigError, match=f"{source}: .*; expected python:MODULE:FUNCTION"):
        prompt_rows(PromptConfig(source=source, num_prompts=1))
    with pytest.raises(ConfigError, match="needs a number of rows"):
        prompt_rows(PromptConfig(source=source))


SHORT = """
import dataclasses
from configs import tiny_grpo, tiny_recipe

def config():
    c, small = tiny_recipe.config(), tiny_grpo.config().model
    few = lambda prompts, n: dataclasses.replace(prompts, num_prompts=n if prompts.source.startswith("python:") else 0)
    def short(stage):
        run = stage.run
        model = dataclasses.replace(run.model, spec=dataclasses.replace(small.spec, max_position=256))
        run = dataclasses.replace(run, model=model, checkpoint=dataclasses.replace(run.checkpoint, every=2))
        if run.sft:
            data = dataclasses.replace(run.sft.data, num_examples=400)
            run = dataclasses.replace(run, sft=dataclasses.replace(run.sft, steps=12, data=data))
        if run.grpo:
            order = run.grpo.curriculum and dataclasses.replace(run.grpo.curriculum, drop_at=1.01)
            run = dataclasses.replace(run, grpo=dataclasses.replace(
                run.grpo, steps=3, prompts_per_step=4, samples_per_prompt=4, prompts=few(run.grpo.prompts, 16), curriculum=order,
                pack=dataclasses.replace(run.grpo.pack, microbatch_rows=2)))
        if run.reward_model:
            r = run.reward_model
            run = dataclasses.replace(run, reward_model=dataclasses.replace(
                r, steps=4, data=dataclasses.replace(r.data, num_comparisons=64),
                heldout=dataclasses.replace(r.heldout, num_comparisons=16)))
        return dataclasses.replace(stage, run=run)
    measured = {k: few(v, 16) for k, v in c.eval.prompts.items()}
    return dataclasses.replace(
        c, name="short_recipe", stages=tuple(map(short, c.stages)), pass_rate_samples=2,
        eval=dataclasses.replace(c.eval, **measured))
"""
"""A config file: the recipe with a model that learns nothing in a few steps of each stage."""


@pytest.mark.slow
def test_a_short_recipe_killed_in_every_stage_ends_as_one_that_was_not(tmp_path):
    config = tmp_path / "short_recipe.py"
    config.write_text(SHORT)

    def command(folder):
        return [*LAUNCH, "--config", str(config), "--run-dir", str(folder)]

    whole, killed = tmp_path / "whole" / "r", tmp_path / "killed" / "r"
    done = subprocess.run(command(whole), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| chat_rl |" in done.stdout
    for name in NAMES:
        child = subprocess.Popen(command(killed), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        while child.poll() is None and not (killed / name / "config.json").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not (killed / "summary.json").exists()
    done = subprocess.run(command(killed), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "sft: done before" in done.stdout
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, killed))
    assert [s["eval"] for s in a["stages"]] == [s["eval"] for s in b["stages"]]
    assert (whole / "report.html").exists()

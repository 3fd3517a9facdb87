"""Rollouts of several turns: token ids in, token ids out; who spoke; what a calculator answers."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.calculator import calculate
from lnjax.config import load_config
from lnjax.data.chat import prompt_ids, tool_turn
from lnjax.data.streams import build_prompt_stream
from lnjax.data.tokenizer import load_tokenizer
from lnjax.environment import Calculator, TurnEngine
from lnjax.errors import ConfigError, RolloutError, TemplateError
from lnjax.grpo import credit, describe, pack_part
from lnjax.learn.loss import grpo_loss
from lnjax.learn.update import Updater
from lnjax.mesh import put_rows
from lnjax.proxy import proxy
from lnjax.record import RolloutRecord
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rollout.embedded import EmbeddedEngine
from lnjax.schema import (
    EmbeddedConfig,
    EnvironmentConfig,
    GrpoLossConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RecordConfig,
    VllmConfig,
)
from lnjax.score import describe_groups, score_groups
from lnjax.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams, Score
from lnjax.validate import validate
from tests.specs import llama
from tests.test_parity import NUMBER, Case
from tests.test_train import ROOT, environment, metrics

STOP = 5
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4, stop_token_ids=(STOP,))
PROMPT = Prompt("p", (1, 2), "integer", {"answer": "408"})
HEARD = (20, 21)


def said(*ids, version=3, finished=True):
    return Completion(ids, tuple(-i / 10 for i in ids), (version,) * len(ids), finished)


class Script:
    """An engine that says what is written: {token ids of the prompt: one completion a sample}."""

    def __init__(self, lines):
        self.lines, self.asked = lines, []

    def generate(self, prompts, *, num_samples, sampling, seed):
        assert (sampling, seed) == (SAMPLING, 9)
        self.asked.append([(p.id, p.token_ids, num_samples) for p in prompts])
        assert all(len(self.lines[p.token_ids]) == num_samples for p in prompts)
        return [list(self.lines[p.token_ids]) for p in prompts]

    def load_weights(self, number, params):
        raise AssertionError("not asked for")

    def report(self):
        return {"sync": 1}

    def close(self):
        self.lines = {}


class Answers:
    """An environment that answers HEARD to a turn which begins with 10, and ends the episode otherwise."""

    def reply(self, prompt, said):
        assert prompt == PROMPT
        return HEARD if said.last_turn[0] == 10 else None


def episodes(lines, *, max_turns=4, max_tokens=99):
    script = Script(lines)
    c = EnvironmentConfig(kind="calculator", max_turns=max_turns, max_tokens=max_tokens)
    num_samples = len(lines[PROMPT.token_ids])
    engine = TurnEngine(script, Answers(), c=c)
    [group] = engine.generate([PROMPT], num_samples=num_samples, sampling=SAMPLING, seed=9)
    return group, script.asked


TWO_TURNS = Completion(
    token_ids=(10, 5, 20, 21, 11, 5),
    logprobs=(-1.0, -0.5, 0.0, 0.0, -1.1, -0.5),
    versions=(3, 3, 3, 3, 4, 4),
    finished=True,
    spoken=(1, 1, 0, 0, 1, 1),
)


def test_two_turns_are_one_completion_of_the_very_tokens_that_each_side_said():
    lines = {(1, 2): [said(10, 5), said(12, 5)], (1, 2, 10, 5, 20, 21): [said(11, 5, version=4)]}
    group, asked = episodes(lines)
    assert group == [TWO_TURNS, said(12, 5)]
    assert asked == [[("p", (1, 2), 2)], [("p#0/2", (1, 2, 10, 5, 20, 21), 1)]]
    assert (TWO_TURNS.mask, TWO_TURNS.last_turn) == ((1, 1, 0, 0, 1, 1), (11, 5))
    assert (group[1].mask, group[1].last_turn) == ((1, 1), (12, 5))


def test_every_sample_and_turn_asks_under_a_name_of_its_own():
    longer = (1, 2, 10, 5, 20, 21)
    lines = {(1, 2): [said(10, 5)] * 2, longer: [said(10, 5)], (*longer, 10, 5, 20, 21): [said(13, 5)]}
    group, asked = episodes(lines)
    assert [[name for name, *_ in call] for call in asked] == [["p"], ["p#0/2", "p#1/2"], ["p#0/3", "p#1/3"]]
    assert group[0].token_ids == (10, 5, 20, 21, 10, 5, 20, 21, 13, 5)
    assert group[0].spoken == (1, 1, 0, 0, 1, 1, 0, 0, 1, 1)


@pytest.mark.parametrize(
    ("limits", "turns"),
    [
        ({"max_turns": 1}, 1),
        ({"max_turns": 2}, 2),
        ({"max_tokens": 7}, 1),
        ({"max_tokens": 8}, 2),
        ({"max_tokens": 11}, 2),
    ],
)
def test_an_episode_that_runs_out_of_turns_or_tokens_is_unfinished_and_ends_with_the_policys_words(limits, turns):
    """A turn needs 4 tokens of room: the second begins at 2 + 2 and the third at 6 + 2."""
    longer = (1, 2, 10, 5, 20, 21)
    lines = {(1, 2): [said(10, 5)], longer: [said(10, 5)], (*longer, 10, 5, 20, 21): [said(13, 5)]}
    [found], asked = episodes(lines, **limits)
    assert (found.finished, len(asked)) == (False, turns)
    assert found.token_ids == (10, 5, 20, 21, 10, 5)[: 4 * turns - 2]
    assert episodes(lines, max_turns=3, max_tokens=12)[0][0].finished


def test_a_turn_that_was_cut_off_is_not_answered():
    [found], asked = episodes({(1, 2): [said(10, 11, 12, 13, finished=False)]})
    assert found == said(10, 11, 12, 13, finished=False)
    assert len(asked) == 1
    [found], _ = episodes({(1, 2): [said(10, 5)], (1, 2, 10, 5, 20, 21): [said(10, 11, finished=False)]})
    assert not found.finished


def test_the_engine_inside_is_reached_through_the_one_around_it():
    script = Script({})
    engine = TurnEngine(script, Answers(), c=EnvironmentConfig(kind="calculator"))
    assert engine.report() == {"sync": 1}
    assert engine.load_weights == script.load_weights
    with pytest.raises(ValueError, match="2 tokens, 2 logprobs, 2 versions and 1 of the mask"):
        Completion((1, 2), (0.0, 0.0), (1, 1), True, (1,))


def group_of(*completions, rewards=(1.0, 0.0)):
    return RolloutGroup(PROMPT, tuple(Rollout(PROMPT, c, Score(r)) for c, r in zip(completions, rewards, strict=True)))


def grpo_config(**changes):
    c = load_config("tiny_grpo").grpo
    assert c
    return dataclasses.replace(c, pack=PackConfig(row_tokens=16, microbatch_rows=1), updates_per_step=1, **changes)


def test_the_learner_is_given_credit_for_the_policys_tokens_alone():
    c = grpo_config()
    [[first, second]] = credit([group_of(TWO_TURNS, said(12, 5))], c=c)
    assert first.token_ids == (1, 2, 10, 5, 20, 21, 11, 5)
    assert first.loss_mask == (0, 0, 1, 1, 0, 0, 1, 1)
    assert first.sampler_logprobs == (0.0, 0.0, -1.0, -0.5, 0.0, 0.0, -1.1, -0.5)
    [batch] = pack_part([[first, second]], c=c, first=True)
    row, columns = np.nonzero(batch.packed.loss_mask_BT)
    assert sorted(batch.packed.tokens_BT[row, columns].tolist()) == [5, 5, 5, 10, 11, 12]
    assert batch.count_B.sum() == 6.0  # token_mean divides by what the policy said


def test_no_number_of_an_environments_token_reaches_loss_or_gradient(make_model):
    """A policy's token does, by its importance weight: the test would see it."""
    loss_config, model = GrpoLossConfig(importance_cap=1e9), make_model(llama())
    c = grpo_config(loss=loss_config)
    params = model.init_params(jax.random.key(0), dtype=jnp.float32)

    def loss(params, batch):
        packed = batch.packed
        out = model.logprobs(params, packed.tokens_BT, packed.positions_BT, packed.segment_ids_BT)
        return grpo_loss(out.logprobs_BT, out.entropy_BT, batch, c=loss_config)

    up = Updater(
        loss,
        abstract_params=model.abstract_params(dtype=jnp.float32),
        c=OptimizerConfig(learning_rate=1e-2),
        total_steps=1,
    )

    def result(completion):
        parts = credit([group_of(completion, said(12, 5), said(13, 5), rewards=(1.0, 0.0, 0.5))], c=c)
        grads, sums = up.gradient(params, put_rows(model.compute.ops.mesh, pack_part(parts, c=c, first=True)))
        return [np.asarray(x) for x in [*jax.tree.leaves(grads), sums.total, *sums.metrics.values()]]

    first = result(TWO_TURNS)
    for at, moves in ((2, False), (3, False), (4, True)):
        logprobs = tuple(-9.0 if i == at else x for i, x in enumerate(TWO_TURNS.logprobs))
        other = result(dataclasses.replace(TWO_TURNS, logprobs=logprobs))
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) is not moves


class Heard:
    """A reward that keeps what it was asked."""

    def score(self, requests):
        self.requests = requests
        return [Score(1.0) for _ in requests]


def test_verifiers_read_the_last_turn_and_figures_count_what_was_sampled(tmp_path):
    tokenizer, reward = load_tokenizer("arithmetic"), Heard()
    ids = {c: tokenizer.encode(c)[0] for c in "12?"}
    turns = Completion(
        (ids["1"], STOP, ids["?"], ids["2"], STOP),
        (-1.0, -0.5, 0.0, -0.25, -0.5),
        (3, 3, 3, 4, 4),
        True,
        (1, 1, 0, 1, 1),
    )
    [group] = score_groups([PROMPT], [[turns, turns]], tokenizer=tokenizer, reward=reward)
    assert reward.requests[0] == ScoreRequest("integer", PROMPT.args, False, "2", True, "", (1, 2, *turns.token_ids))
    figures = describe_groups([group])
    assert (figures["sample_tokens"], figures["completion_tokens_max"], figures["turns_mean"]) == (8, 4, 2.0)
    assert "turns_mean" not in describe_groups([group_of(said(12, 5), said(13, 5))])
    found = describe([group], grpo_config(max_staleness=2), updates=5)
    assert (found["version"], found["staleness_mean"], found["staleness_max"]) == (4, 1.5, 2)
    with pytest.raises(RolloutError, match="3 steps behind"):
        describe([group], grpo_config(max_staleness=2), updates=6)
    record = RolloutRecord(tmp_path, c=RecordConfig(), tokenizer=tokenizer, keep_lines=0, writes=True)
    record.keep("grpo", step=1, groups=[group], credit=lambda g: [0.0, 0.0])
    record.close()
    line = json.loads((tmp_path / "rollouts.jsonl").read_text())["rollouts"][0]
    assert (line["texts"], line["tokens"]) == (["1", "<|eot_id|>", "?", "2", "<|eot_id|>"], 4)
    assert line["logprobs"] == [-1.0, -0.5, None, -0.25, -0.5]


def test_the_parity_oracle_leaves_out_what_an_environment_said(tmp_path):
    case = Case(tmp_path, temperature=1.0)

    def with_reply(c, *, told):
        spoken = tuple(int(not 2 <= i < 4) for i in range(len(c.token_ids)))
        logprobs = tuple(x if m else 0.0 for x, m in zip(c.logprobs, spoken, strict=True))
        return dataclasses.replace(c, logprobs=logprobs, spoken=spoken if told else ())

    whole = case.check(case.groups(number=NUMBER))
    values = case.check(case.groups(change=lambda c: with_reply(c, told=True)))
    assert values["parity_prob_error"] <= 1.0001
    assert isinstance(case.config.engine, VllmConfig)
    left_out = 2 * case.config.engine.parity_samples
    assert whole["parity_tokens_checked"] - left_out == values["parity_tokens_checked"]
    with pytest.raises(RolloutError, match="servers and learner disagree"):
        case.check(case.groups(change=lambda c: with_reply(c, told=False)))


def test_the_embedded_engine_gives_a_sample_the_same_turns_whatever_else_is_asked(make_model):
    model = make_model(llama(initializer_range=0.3))
    c = EmbeddedConfig(num_slots=8, max_len=64, decode_chunk=4, prefill_rows=8, prefill_multiple=16, dtype="float32")
    engine = EmbeddedEngine(model, c=c, key=jax.random.key(5))
    engine.load_weights(3, model.init_params(jax.random.key(0), dtype=jnp.float32))

    class Even:
        def reply(self, prompt, said):
            return (9, 8) if said.last_turn[0] % 2 == 0 else None

    turns = TurnEngine(engine, Even(), c=EnvironmentConfig(kind="calculator", max_turns=3, max_tokens=40))
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=8, stop_token_ids=tuple(range(2, 160, 4)))
    asked = [Prompt(f"p/{i}", (11 + i, 12, 13), "integer", {}) for i in range(6)]
    whole = turns.generate(asked, num_samples=3, sampling=sampling, seed=1)
    assert len({sum(not m for m in x.mask) for group in whole for x in group}) == 3  # no, one and two replies
    part = turns.generate(asked[4:2:-1], num_samples=2, sampling=sampling, seed=1)
    assert part == [whole[4][:2], whole[3][:2]]
    first = engine.generate(asked, num_samples=3, sampling=sampling, seed=1)
    for group, before in zip(whole, first, strict=True):
        for x, y in zip(group, before, strict=True):
            assert x.token_ids[: len(y.token_ids)] == y.token_ids


# The calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("(1+2)/4", "0.75"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
        (" 2**10 - -(3) ", "1027"),
        ("2**-2", "0.25"),
        ("0**0", "1"),
        ("2**128", "340282366920938463463374607431768211456"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculate(expression) == value


RULE = "error: expected 1 to 200 characters: digits, . + - * / ** ( ) and spaces"
NO_EXPRESSION = "error: not an arithmetic expression"
TOO_LARGE = "error: division by zero, or a number too large"


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9**9**9", TOO_LARGE),
        ("9**9**9**9", TOO_LARGE),
        ("2**256", TOO_LARGE),
        ("2**-999999", TOO_LARGE),
        ("1**" + "9" * 150, TOO_LARGE),
        ("9" * 100, TOO_LARGE),
        ("*".join(["99999"] * 30), TOO_LARGE),
        ("1/0", TOO_LARGE),
        ("0**-1", TOO_LARGE),
        ("1" * 1_000_000, RULE),
        ("(" * 1_000_000, RULE),
        ("", RULE),
        ("x", RULE),
        ("__import__('os').system('true')", RULE),
        ("1e9", RULE),
        ("1_0", RULE),
        ("٣+1", RULE),
        ("1\n+1", RULE),
        ("<|eot_id|>", RULE),
        ("(" * 100 + "1" + ")" * 99, NO_EXPRESSION),
        ("()", NO_EXPRESSION),
        ("...", NO_EXPRESSION),
        ("(1)(2)", NO_EXPRESSION),
        ("7//2", NO_EXPRESSION),
        ("2**.5", NO_EXPRESSION),
        ("1 2", NO_EXPRESSION),
        (" ", NO_EXPRESSION),
        ("~1", RULE),
    ],
)
def test_a_hostile_expression_costs_nothing_and_repeats_nothing(expression, error):
    start = time.monotonic()
    assert calculate(expression) == error
    assert time.monotonic() - start < 0.5


def test_deep_but_short_expressions_are_worked_out_or_refused():
    assert calculate("-" * 199 + "1") == "-1"
    assert calculate("(" * 90 + "1" + ")" * 90) == "1"
    assert calculate("1+" * 99 + "1") == "100"


HEADER = "<|start_header_id|>tool<|end_header_id|>\n\n"
AFTER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def heard(text, *, tokenizer=None):
    """What the calculator says to a turn of this text, as text; None where it says nothing."""
    tokenizer = tokenizer or load_tokenizer("arithmetic")
    ids = tuple(tokenizer.encode(text + "<|eot_id|>"))
    reply = Calculator(tokenizer).reply(PROMPT, Completion(ids, (0.0,) * len(ids), (1,) * len(ids), True))
    return None if reply is None else tokenizer.decode(reply, skip_special=False)


def called(*expressions, name="calculator"):
    calls = [{"name": name, "arguments": {"expression": x}} for x in expressions]
    return f"<TOOLCALL>{json.dumps(calls)}</TOOLCALL>"


def test_a_call_is_answered_by_the_chat_templates_tool_message():
    call = called("12*34")
    assert heard(call) == HEADER + '<TOOL_RESPONSE>["408"]</TOOL_RESPONSE>' + AFTER
    assert heard(f"<think>hard</think>{call}") == heard(f"well: {call}") == heard(call)
    assert heard(called("1+1", "x")) == f'{HEADER}<TOOL_RESPONSE>["2", "{RULE}"]</TOOL_RESPONSE>{AFTER}'
    assert heard("408") is None
    assert heard(f"<think>{call}</think>408") is None


def test_what_policy_and_calculator_say_is_what_the_template_makes_of_the_conversation():
    """So that SFT on such conversations sees the tokens that rollouts have."""
    tokenizer, call = load_tokenizer("arithmetic"), called("12*34")
    asked = {"role": "user", "content": "12*34=?"}
    result = {"role": "tool", "content": '<TOOL_RESPONSE>["408"]</TOOL_RESPONSE>'}
    turn = tuple(tokenizer.encode(call + "<|eot_id|>"))
    reply = Calculator(tokenizer).reply(PROMPT, Completion(turn, (0.0,) * len(turn), (1,) * len(turn), True))
    whole = prompt_ids(tokenizer, [asked, {"role": "assistant", "content": call}, result])
    assert (*prompt_ids(tokenizer, [asked]), *turn, *(reply or ())) == tuple(whole)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("<TOOLCALL>[", "error: malformed call"),
        ("</TOOLCALL>", "error: malformed call"),
        ("<TOOLCALL>nope</TOOLCALL>", "error: malformed call"),
        (f"<TOOLCALL>{'[' * 100}</TOOLCALL>", "error: malformed call"),
        ('<TOOLCALL>[{"name": "calculator"}]</TOOLCALL>', "error: malformed call"),
        (called("1", name="shell"), "error: expected calculator with one argument, expression, a string"),
        (called(408), "error: expected calculator with one argument, expression, a string"),
        (
            '<TOOLCALL>[{"name": "calculator", "arguments": {"expression": "1", "more": "2"}}]</TOOLCALL>',
            "error: expected calculator with one argument, expression, a string",
        ),
        (called("<|eot_id|><|start_header_id|>user"), RULE),
    ],
)
def test_a_malformed_call_is_told_so_in_fixed_words(text, result):
    assert heard(text) == f'{HEADER}<TOOL_RESPONSE>["{result}"]</TOOL_RESPONSE>{AFTER}'


def test_an_empty_list_of_calls_ends_the_episode():
    assert heard("<TOOLCALL>[]</TOOLCALL>") is None


def test_a_template_may_bring_its_own_tags_and_one_without_tool_messages_is_refused():
    tokenizer = load_tokenizer("arithmetic")
    own = tokenizer.template.replace(
        "message['content']",
        "(('<TOOL_RESPONSE>[' + message['content'] + ']</TOOL_RESPONSE>') if message['role'] == 'tool' else "
        "message['content'])",
    )
    tagged = dataclasses.replace(tokenizer, template=own)
    assert heard(called("12*34"), tokenizer=tagged) == heard(called("12*34"))
    deaf = tokenizer.template.replace("for message in messages", "for message in messages if message['role'] != 'tool'")
    with pytest.raises(TemplateError, match="shows no message of role tool"):
        Calculator(dataclasses.replace(tokenizer, template=deaf))
    changed = tokenizer.template.replace("bos_token", "bos_token * (1 + ('tool' in messages | map(attribute='role')))")
    with pytest.raises(TemplateError, match="shows no message of role tool"):
        tool_turn(dataclasses.replace(tokenizer, template=changed), "0")


# Runs


def test_any_prompts_can_be_shown_the_tool():
    tokenizer = load_tokenizer("arithmetic")
    c = PromptConfig(source="reasoning_gym:chain_sum", num_prompts=2, tools="calculator", max_prompt_tokens=2000)
    for prompt in build_prompt_stream(c, tokenizer).prompts:
        shown = tokenizer.decode(prompt.token_ids)
        assert '<AVAILABLE_TOOLS>[{"name": "calculator", "description": ' in shown
        assert prompt.verifier == "reasoning_gym"
    plain = build_prompt_stream(dataclasses.replace(c, tools="none"), tokenizer).prompts[0]
    assert "TOOLS" not in tokenizer.decode(plain.token_ids)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_turns": 0}, "environment: max_turns=0"),
        ({"max_tokens": 23}, "max_tokens=23; needs 1, grpo.sampling.max_new_tokens or more"),
        ({"max_tokens": 57}, r"environment.max_tokens\) = 257, but engine.max_len is 256"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(changes, match):
    c = load_config("tiny_grpo")
    environment = EnvironmentConfig(kind="calculator", **{"max_tokens": 56, **changes})
    with pytest.raises(ConfigError, match=match):
        validate(dataclasses.replace(c, environment=environment))
    validate(dataclasses.replace(c, environment=EnvironmentConfig(kind="calculator", max_tokens=56)))
    validate(dataclasses.replace(c, environment=dataclasses.replace(environment, kind="none")))
    validate(proxy(dataclasses.replace(c, environment=environment)))


ANSWERS_SOME = """
import sys
from lnjax import launch
from lnjax.data.tokenizer import load_tokenizer
from lnjax.environment import Calculator

REPLY = tuple(load_tokenizer("arithmetic").encode("<|start_header_id|>user<|end_header_id|>?"))
Calculator.reply = lambda self, prompt, said: REPLY if 0 not in said.mask and said.token_ids[0] % 2 else None
sys.exit(launch.main(sys.argv[1:]))
"""
"""An untrained model calls nothing: half of its first turns are answered whatever they say."""


@pytest.mark.slow
def test_a_run_with_an_environment_goes_on_where_it_stopped_bit_by_bit(tmp_path):
    words = ["--config", "tiny_grpo", "--environment.kind", "calculator", "--environment.max-tokens", "56"]
    words += ["--sft.steps", "2", "--eval.prompts.num-prompts", "8"]

    def run(folder, steps):
        command = [sys.executable, "-c", ANSWERS_SOME, *words, "--run-dir", str(folder), "--grpo.steps", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return [x for x in metrics(folder) if x["stage"] == "grpo"]

    whole = run(tmp_path / "whole", 4)
    assert run(tmp_path / "parts", 2) == whole[:2]
    assert run(tmp_path / "parts", 4) == whole
    assert all(1 < x["turns_mean"] < 2 for x in whole)
    assert all(x["sampler_kl"] < 1e-6 for x in whole)  # engine and learner agree on every turn's tokens
    hf = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert hf[0] == hf[1]
    lines = (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "parts" / "rollouts.jsonl").read_text().splitlines()
    assert any(None in x["logprobs"] for line in lines for x in json.loads(line)["rollouts"])

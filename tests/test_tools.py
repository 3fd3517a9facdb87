"""Tools in the prompt, calls in the answer: schemas, allowed values, hostile text."""

import json
import time

import pytest

from lnjax.data.rows import messages_of, to_prompt
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import DataError
from lnjax.rewards.pool import build_reward
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rewards.tool_call import allowed_of, parse_calls, right, valid
from lnjax.schema import RewardConfig

WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "array"}},
        "required": ["city"],
    },
}
CALL = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}


def said(*calls: object) -> str:
    return f"<TOOLCALL>{json.dumps(list(calls))}</TOOLCALL>"


def test_tools_stand_at_the_end_of_the_system_message_behind_the_switch():
    row = {"input": [{"role": "user", "content": "Weather?"}], "reasoning": "on", "tools": [json.dumps(WEATHER)]}
    messages = messages_of(row, where="x")
    assert [m["role"] for m in messages] == ["system", "user"]
    assert messages[0]["content"].startswith("detailed thinking on\n\nYou can use these tools:\n<AVAILABLE_TOOLS>[{")
    assert f"<AVAILABLE_TOOLS>{json.dumps([WEATHER])}</AVAILABLE_TOOLS>" in messages[0]["content"]
    bare = messages_of({"input": "Weather?", "tools": [{"type": "function", "function": WEATHER}]}, where="x")
    assert json.dumps([WEATHER]) in bare[0]["content"]


def test_a_row_with_calls_becomes_a_prompt_for_their_verifier():
    row = {"input": "Weather?", "tools": [WEATHER], "args": {"calls": [CALL]}}
    prompt = to_prompt(row, where="x", tokenizer=load_tokenizer("arithmetic"), max_tokens=2000)
    assert (prompt.verifier, prompt.args) == ("tool_call", {"calls": [CALL], "tools": [WEATHER]})
    with pytest.raises(DataError, match=r"x: tools\[0\] is '\{'; expected an object with name and parameters"):
        messages_of({"input": "?", "tools": ["{"]}, where="x")
    row = {"input": "?", "tools": [WEATHER], "args": {"verifier": "tool_call"}}
    with pytest.raises(DataError, match="compared with `calls`"):
        to_prompt(row, where="x", tokenizer=load_tokenizer("arithmetic"), max_tokens=2000)


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"city": "Oslo"}, True),
        ({"city": "Oslo", "days": 2, "where": [1.5, 2]}, True),
        ({"days": 2}, False),  # required is missing
        ({"city": 3}, False),
        ({"city": "Oslo", "days": 2.5}, False),
        ({"city": "Oslo", "days": True}, False),
    ],
)
def test_arguments_are_held_against_the_schema(arguments, fits):
    assert valid([{"name": "weather", "arguments": arguments}], [WEATHER]) == fits


def test_a_tool_that_is_not_there_or_a_schema_that_points_elsewhere_is_not_valid():
    assert not valid([{"name": "time", "arguments": {}}], [WEATHER])
    remote = {"name": "t", "parameters": {"$ref": "http://localhost:1/schema"}}
    with pytest.raises(Exception, match="Unresolvable"):
        valid([{"name": "t", "arguments": {}}], [remote])


@pytest.mark.parametrize(
    ("calls", "wanted", "same"),
    [
        ([("f", {"a": 1})], [{"f": {"a": [1, 2]}}], True),
        ([("f", {"a": 3})], [{"f": {"a": [1, 2]}}], False),
        ([("f", {"a": 1.0})], [{"f": {"a": [1]}}], True),
        ([("f", {"a": True})], [{"f": {"a": [1]}}], False),
        ([("f", {})], [{"f": {"a": [1, ""]}}], True),
        ([("f", {})], [{"f": {"a": [1]}}], False),
        ([("f", {"a": 1, "b": 2})], [{"f": {"a": [1]}}], False),
        ([("f", {"a": "New York, NY"})], [{"f": {"a": ["new york NY"]}}], True),
        ([("f", {"a": [{"x": 1}, {"x": 2}]})], [{"f": {"a": [[{"x": [1]}, {"x": [2, 3]}]]}}], True),
        ([("g", {}), ("f", {"a": 1})], [{"f": {"a": [1]}}, {"g": {}}], True),
        ([("f", {"a": 1})], [{"f": {"a": [1]}}, {"g": {}}], False),
        ([("f", {"a": 1}), ("f", {"a": 1})], [{"f": {"a": [1]}}], False),
        ([], [], True),
        ([("f", {})], [], False),
    ],
)
def test_calls_are_right_by_the_rules_of_the_leaderboard(calls, wanted, same):
    assert right([{"name": n, "arguments": a} for n, a in calls], wanted) == same


def test_a_call_of_published_data_allows_its_own_values_alone():
    call = {"name": "f", "arguments": {"a": {"b": [1, {"c": "x"}]}}}
    assert right([call], [allowed_of(call)])
    assert not right([{"name": "f", "arguments": {"a": {"b": [1, {"c": "y"}]}}}], [allowed_of(call)])


BOMB = "[" * 100_000 + "]" * 100_000
HOSTILE = [
    ("x" * 1_000_000, "no call"),
    (f"<TOOLCALL>{'x' * 1_000_000}</TOOLCALL>", "calls of 1000000 characters, at most 65536 are read"),
    (f"<TOOLCALL>{BOMB}</TOOLCALL>", "characters"),
    (f"<TOOLCALL>{BOMB[90_000:110_000]}</TOOLCALL>", "nested 10000 deep, at most 32"),
    ("<TOOLCALL>" * 100_000, "expected one"),
    ("<TOOLCALL>[]</TOOLCALL><TOOLCALL>[]</TOOLCALL>", "expected one"),
    ("</TOOLCALL>[]<TOOLCALL>", "Expecting value"),
    ("<TOOLCALL>[\ud800\udfff\ufffd]</TOOLCALL>", "Expecting value"),
    ("<TOOLCALL>[NaN]</TOOLCALL>", "a call is an object"),
    (f"<TOOLCALL>[{'9' * 60_000}]</TOOLCALL>", "integer string conversion"),
    ('<TOOLCALL>[{"name": "f", "arguments": "{}"}]</TOOLCALL>', "an object of arguments"),
    ('<TOOLCALL>{"name": "f", "arguments": {}}</TOOLCALL>', "expected a list"),
    (f"<TOOLCALL>[{', '.join(['{}'] * 65)}]</TOOLCALL>", "at most 64 calls"),
]


@pytest.mark.parametrize(("text", "rule"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_calls_are_refused_by_rule_and_at_once(text, rule):
    start = time.process_time()
    if rule == "no call":
        assert parse_calls(text) == []
    else:
        with pytest.raises(ValueError, match=rule):
            parse_calls(text)
    assert time.process_time() - start < 1


def test_workers_score_calls_and_survive_every_hostile_text():
    args = {"tools": [WEATHER], "calls": [CALL]}
    texts = ["<think>Rain?</think>" + said(CALL), said({"name": "weather", "arguments": {"city": "Rome"}}), said(1)]
    texts += [text for text, _ in HOSTILE] + [said(CALL)]
    requests = [ScoreRequest("tool_call", args, True, text, True) for text in texts]
    with build_reward(RewardConfig(num_workers=1)) as reward:
        scores = reward.score(requests)
    assert [s.reward for s in scores] == [1.0] + [0.0] * (len(texts) - 2) + [1.0]
    assert [s.parts["valid"] for s in scores[:3]] == [1.0, 1.0, 0.0]
    assert {s.failure for s in scores} == {""}

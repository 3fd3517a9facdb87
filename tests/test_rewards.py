"""Verdicts, the think-tag format, and a pool that survives bad verifiers."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lnjax.errors import ConfigError
from lnjax.rewards.format import answer_of, follows_format
from lnjax.rewards.ifeval import CHECKERS, followed
from lnjax.rewards.pool import build_reward
from lnjax.rewards.protocol import ScoreRequest
from lnjax.rewards.verifiers import integer, math, reasoning_gym
from lnjax.schema import RewardConfig

EXTRA = {name: f"tests.bad_verifiers:{name}" for name in ("hang", "throw", "die", "chatty")}


@pytest.mark.parametrize(
    ("text", "on", "off"),
    [
        ("<think>a</think>b", True, False),
        ("b", False, True),
        ("<think>a</think><think>c</think>b", False, False),
        ("</think>a<think>b", False, False),
        ("<think>a b", False, False),
        ("a</think>b", False, False),
    ],
)
def test_the_format_is_one_pair_of_tags_when_reasoning_and_none_else(text, on, off):
    assert follows_format(text, reasoning=True) is on
    assert follows_format(text, reasoning=False) is off


def test_the_answer_is_what_follows_the_last_closing_tag():
    assert answer_of("<think>1</think> 2 </think> 3\n") == "3"
    assert answer_of(" 4 ") == "4"


def test_integers_are_exact_or_boxed():
    for text, wanted in (("85", 1.0), (" 85\n", 1.0), ("85.", 0.0), ("the answer is 85", 0.0), (r"so \boxed{85}", 1.0)):
        assert integer(text, {"answer": "85"}) == {"accuracy": wanted}, text


def test_math_answers_are_compared_as_mathematics():
    for text, wanted in ((r"$\frac{1}{2}$", 1.0), ("0.5", 1.0), (r"\boxed{1/2}", 1.0), ("0.6", 0.0), ("no idea", 0.0)):
        assert math(text, {"expected_answer": r"\frac{1}{2}"}) == {"accuracy": wanted}, text


def test_reasoning_gym_counts_only_a_full_score():
    import reasoning_gym as gym

    entry = gym.create_dataset("basic_arithmetic", size=1, seed=1)[0]
    args = {"task": "basic_arithmetic", "entry": entry}
    assert reasoning_gym(entry["answer"], args) == {"accuracy": 1.0}
    assert reasoning_gym(f"The answer is {entry['answer']}", args) == {"accuracy": 0.0}


LONG = "One word here. " * 30
IFEVAL = {
    "keywords:existence": ({"keywords": ["river"]}, "A river runs.", "A road runs."),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea and tea.", "Tea."),
    "keywords:forbidden_words": ({"forbidden_words": ["bad"]}, "All is good.", "All is bad."),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "zigzag", "zig"),
    "language:response_language": (
        {"language": "de"},
        "Das ist ein schöner Tag und ich gehe in den Wald.",
        "This is a nice day and I walk into the forest.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"},
        "One only.",
        "One. Two. Three.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_words": ({"num_words": 4, "relation": "less than"}, "three small words", LONG),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "First this.\n\nNow that.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "Dear [name], hi.", "Dear Ann, hi."),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. I like it.", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "* one\n* two\n* three"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 1},
        "This is *very* good.",
        "This is very good.",
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "a b",
    ),
    "detectable_format:json_format": ({}, '{"a": 1}', "a: 1"),
    "detectable_format:title": ({}, "<<A title>>\ntext", "A title\ntext"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\ntwo"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    "startend:end_checker": ({"end_phrase": "The end."}, "So it was. The end.", "So it was."),
    "startend:quotation": ({}, '"All of it."', "All of it."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "This is VERY GOOD tea.",
        "This is VERY good tea.",
    ),
    "change_case:english_capital": ({}, "ALL OF THIS IS LOUD ENOUGH.", "Not all of this is loud."),
    "change_case:english_lowercase": ({}, "all of this is quiet enough.", "Not all of this is quiet."),
    "punctuation:no_comma": ({}, "No such thing here.", "Well, one here."),
}


def test_all_25_instructions_of_ifeval_are_known():
    assert set(IFEVAL) == set(CHECKERS)
    assert len(IFEVAL) == 25


@pytest.mark.parametrize("name", sorted(IFEVAL))
def test_an_instruction_tells_a_text_that_follows_it_from_one_that_does_not(name):
    kwargs, good, bad = IFEVAL[name]
    assert followed(good, [name], [kwargs]) == [True]
    assert followed(bad, [name], [kwargs]) == [False]
    assert followed(" ", [name], [kwargs]) == [False]


def request(verifier, text, *, args=None, finished=True, reasoning=True):
    return ScoreRequest(verifier, args or {}, reasoning, text, finished)


@pytest.fixture(scope="module")
def pool():
    with build_reward(RewardConfig(num_workers=2, deadline_s=1.0, format="think"), extra=EXTRA) as built:
        yield built


def test_the_reward_is_accuracy_times_format_and_unfinished_text_scores_nothing(pool):
    right = {"args": {"answer": "1"}}
    scores = pool.score(
        [
            request("integer", "<think>x</think>1", **right),
            request("integer", "1", **right),
            request("integer", "1", reasoning=False, **right),
            request("integer", "<think>x</think>2", **right),
            request("integer", "<think>x</think>1", finished=False, **right),
        ]
    )
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert [dict(s.parts) for s in scores] == [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 1.0, "format": 0.0},
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": 0.0, "format": 0.0},
    ]


def test_a_hanging_throwing_or_dying_verifier_costs_its_own_sample_only(pool):
    batch = [request("integer", f"<think>x</think>{i % 2}", args={"answer": "1"}) for i in range(200)]
    batch[3], batch[50], batch[120] = request("hang", "x"), request("throw", "x"), request("die", "x")
    batch[199] = request("chatty", "<think></think>x")
    start = time.monotonic()
    scores = pool.score(batch)
    assert time.monotonic() - start < 10
    assert scores[3].failure == "deadline of 1 s"
    assert scores[50].failure == "raised KeyError: 'boo'"
    assert scores[120].failure == "worker ended with status -9"
    assert [s.reward for s in (scores[3], scores[50], scores[120], scores[199])] == [0.0, 0.0, 0.0, 1.0]
    for i in set(range(199)) - {3, 50, 120}:
        assert (scores[i].reward, scores[i].failure) == (float(i % 2), "")


def test_a_worker_killed_from_outside_is_replaced_and_nothing_is_lost(pool):
    batch = [request("integer", "<think>x</think>1", args={"answer": "1"}) for _ in range(100)]
    pool.score(batch)
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    assert [s.reward for s in pool.score(batch)] == [1.0] * 100


def test_256_warm_verdicts_take_less_than_a_tenth_of_a_second(pool):
    batch = [request("integer", "<think>x</think>1", args={"answer": "1"}) for _ in range(256)]
    pool.score(batch)
    best = 9.0
    for _ in range(5):
        start = time.monotonic()
        pool.score(batch)
        best = min(best, time.monotonic() - start)
    assert best < 0.1


def test_an_unknown_verifier_is_an_error_before_any_work(pool):
    with pytest.raises(ConfigError, match="unknown verifier 'integr'"):
        pool.score([request("integr", "x")])


def test_no_worker_outlives_its_parent(tmp_path):
    script = (
        "import sys, time\n"
        "from lnjax.rewards.pool import build_reward\n"
        "from lnjax.rewards.protocol import ScoreRequest\n"
        "from lnjax.schema import RewardConfig\n"
        "pool = build_reward(RewardConfig(num_workers=2, deadline_s=60), extra={'hang': 'tests.bad_verifiers:hang'})\n"
        "pool.score([ScoreRequest('integer', {'answer': '1'}, False, '1', True)])\n"
        "print(*(w.process.pid for w in pool._workers), flush=True)\n"
        "pool.score([ScoreRequest('hang', {}, False, '1', True)] * 2)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [p for p in pids if psutil.pid_exists(p)] == []

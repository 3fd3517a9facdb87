"""Generated lessons for a whole recipe with a tiny model: sums, instructions to follow and small talk, thought about or not.

What SFT imitates has mixed habits, so that each later stage has one to choose from:

    math          half of the thoughts estimate (`47+38=?`: `50+40=90`, so 90), the others work the sum out
    instructions  each of the one or two instructions of a prompt is followed in four of ten answers
    chat          an answer may end kindly, be bare, or be no answer; of two, pairs prefer the kinder one and the true one

Things asked about are split by the question's hash, sums as in lnjax/data/arithmetic.py: the splits share none.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lnjax.data.arithmetic import arithmetic_rows, unit, worked
from lnjax.data.rows import Row
from lnjax.errors import DataError

SHARES = (0.6, 0.25)
"""Of SFT examples that are sums, and that have instructions; the rest is chat."""
THOUGHT_SHARE = {"math": 0.6, "instructions": 0.4, "chat": 0.4}
"""Of prompts with reasoning on."""
ESTIMATE_SHARE, FOLLOWED_SHARE, KIND_SHARE, BARE_SHARE = 0.5, 0.4, 0.15, 0.6
HELD_OUT_OF_TEN = 1
THINGS = {
    "animal": ("fox", "cow", "cat", "hen", "goat", "frog", "bear", "mole", "wolf", "crab"),
    "plant": ("fern", "oak", "rose", "palm", "moss", "lily", "pine", "reed", "ivy", "herb"),
    "food": ("pie", "cake", "soup", "stew", "bun", "roll", "jam", "tart", "egg", "bean"),
    "tool": ("saw", "rake", "file", "nail", "drill", "bolt", "spade", "clamp", "hoe", "lever"),
}
LOOKS = ("red", "soft", "big", "tiny", "wet", "dark", "cold", "new", "good", "rare")
GREETINGS = ("", "hi! ", "please, ", "so, ")
QUESTIONS = ("what is a {}?", "tell me of a {}.", "do you know a {}?", "say what a {} is.")
KINDLY, NO_ANSWER = " glad to help!", "no idea."


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    """Of an IFEval checker."""
    kwargs: Mapping[str, Any]
    ask: str
    follow: Callable[[str], str]
    """The answer so far, made to follow it."""
    ignore: Callable[[str], str] = lambda text: text


def _keyword(word: str) -> Instruction:
    return Instruction("keywords:existence", {"keywords": [word]}, f"say {word}.", lambda t: f"{t} i like {word}.")


INSTRUCTIONS = (
    Instruction("punctuation:no_comma", {}, "no commas.", lambda t: t, lambda t: f"{t} yes, it is."),
    Instruction(
        "length_constraints:number_words",
        {"num_words": 8, "relation": "at least"},
        "use 8 words.",
        lambda t: f"{t} it is nice to know.",
    ),
    *(_keyword(word) for word in ("water", "time", "home", "light")),
    Instruction(
        "detectable_content:postscript", {"postscript_marker": "P.S."}, "add a p.s.", lambda t: f"{t} p.s. bye."
    ),
    Instruction(
        "startend:end_checker", {"end_phrase": "that is all."}, "end: that is all.", lambda t: f"{t} that is all."
    ),
    Instruction("detectable_format:title", {}, "add a title.", lambda t: f"<<answer>> {t}"),
    Instruction("startend:quotation", {}, "quote it.", lambda t: f'"{t}"'),
)
"""In the order in which they change an answer; any two of different names go together."""
ALONE = (
    Instruction("detectable_format:json_format", {}, "use json.", lambda t: json.dumps({"answer": t})),
    Instruction(
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "use 2 bullets.",
        lambda t: "* " + t.removesuffix(".").replace(" is ", "\n* "),
    ),
)
"""These go with no other."""


def math(num_rows: int, *, seed: int, split: str) -> list[Row]:
    """Distinct rows with both `output` (SFT) and `args` (RL), as all functions here; the same for the same arguments."""
    return [_sum(row) for row in arithmetic_rows(num_rows=num_rows, seed=seed, split=split)]


def instructions(num_rows: int, *, seed: int, split: str) -> list[Row]:
    return _asked("instructions", num_rows, seed=seed, split=split)


def chat(num_rows: int, *, seed: int, split: str) -> list[Row]:
    return _asked("chat", num_rows, seed=seed, split=split)


def school(num_rows: int, *, seed: int, split: str) -> list[Row]:
    """All three kinds, for SFT."""
    sums, asked = (round(share * num_rows) for share in SHARES)
    makers = ((math, sums), (instructions, asked), (chat, num_rows - sums - asked))
    return [row for make, count in makers for row in make(count, seed=seed, split=split)]


def pairs(num_rows: int, *, seed: int, split: str) -> Iterator[Row]:
    """Chat answers of which one is better: kind and true, then bare, then none, then an untrue one."""
    for row in chat(num_rows, seed=seed, split=split):
        rng, thought = random.Random(f"pair/{row['input']}"), row["output"].rpartition("</think>")
        truth = row["args"]["answer"]
        other = rng.choice([a for a in THINGS if a not in truth])
        answers = [f"{truth}{KINDLY}", truth, NO_ANSWER, f"{truth.rpartition(' is ')[0]} is {_a(other)}."]
        better, worse = sorted(rng.sample(range(len(answers)), 2))
        chosen, rejected = ("".join([*thought[:2], answers[k]]) for k in (better, worse))
        yield {**row, "chosen": chosen, "rejected": rejected}


def _asked(kind: str, num_rows: int, *, seed: int, split: str) -> list[Row]:
    rng, rows = random.Random(f"lessons/{kind}/{split}/{seed}"), {}
    for _ in range(100 * num_rows + 1000):
        if len(rows) == num_rows:
            return list(rows.values())
        a = rng.choice(list(THINGS))
        thing = f"{rng.choice(LOOKS)} {rng.choice(THINGS[a])}"
        asked = _choose(rng) if kind == "instructions" else []
        question = rng.choice(GREETINGS) + rng.choice(QUESTIONS).format(thing)
        text = " ".join([question, *(x.ask for x in asked)])
        if (unit(f"split/{text}") * 10 < HELD_OUT_OF_TEN) == (split == "heldout"):
            rows[text] = _row(kind, text, thing=thing, a=a, asked=asked)
    raise DataError(f"{kind} lessons: only {len(rows)} of {num_rows} distinct prompts in {split!r}; lower the number")


def _sum(row: Row) -> Row:
    """The problem of a row of lnjax.data.arithmetic, thought about in one of two ways or answered at once."""
    problem, answer = row["input"][0]["content"].removesuffix("=?"), row["args"]["answer"]
    a, sign, b = int(problem[:2]), problem[2], int(problem[3:])
    thought = worked(a, sign, b)
    mode, said = _mode("math", problem), answer
    if mode == "on" and unit(f"estimate/{problem}") < ESTIMATE_SHARE:
        near, by = (a + 5) // 10 * 10, (b + 5) // 10 * 10
        said = str(near + by if sign == "+" else near - by)
        thought = f"{near}{sign}{by}={said}"
    return {
        "input": row["input"],
        "output": f"<think>{thought}</think>{said}" if mode == "on" else said,
        "args": {"verifier": "judge", "answer": answer},
        "category": "math",
        "reasoning": mode,
    }


def _row(kind: str, text: str, *, thing: str, a: str, asked: Sequence[Instruction]) -> Row:
    mode, said = _mode(kind, text), f"a {thing} is {_a(a)}."
    args: dict[str, Any] = {"verifier": "reward_model", "answer": said}
    if asked:
        args = {"instruction_id_list": [x.name for x in asked], "instruction_kwargs": [x.kwargs for x in asked]}
        for x in asked:
            said = (x.follow if unit(f"{x.ask}/{text}") < FOLLOWED_SHARE else x.ignore)(said)
    else:
        draw = unit(f"style/{text}")
        said = said + KINDLY if draw < KIND_SHARE else said if draw < KIND_SHARE + BARE_SHARE else NO_ANSWER
    return {
        "input": [{"role": "user", "content": text}],
        "output": f"<think>{thing}: {a}</think>{said}" if mode == "on" else said,
        "args": args,
        "category": kind,
        "reasoning": mode,
    }


def _choose(rng: random.Random) -> list[Instruction]:
    """One or two, in the order of INSTRUCTIONS."""
    first, second = rng.sample((*INSTRUCTIONS, *ALONE), 2)
    if rng.random() < 0.5 or first in ALONE or second in ALONE or first.name == second.name:
        return [first]
    return sorted((first, second), key=INSTRUCTIONS.index)


def _mode(kind: str, text: str) -> str:
    return "on" if unit(f"mode/{kind}/{text}") < THOUGHT_SHARE[kind] else "off"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

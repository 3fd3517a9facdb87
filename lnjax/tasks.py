"""Rows of published benchmarks as rows of the RL schema. Prompts: the model cards' where they give one, else chosen."""

import csv
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnjax.data.rows import Row, read_jsonl
from lnjax.errors import DataError
from lnjax.rewards.code import unpack

MATH = """Below is a math question. I want you to reason through the steps and then give a final answer. \
Your final answer should be in \\boxed{{}}.\nQuestion: {}"""
CHOICE = "{}\n\n{}\n\nThink about it, then give the letter of the right answer in \\boxed{{}}."
CODE = "{}\n\nAnswer with one block of Python code between ```python and ```. {}"
CODE_S = 60.0
"""For all tests of one program."""
CODE_FROM, CODE_BEFORE = "2024-08-01", "2025-02-02"
"""Contest dates of the report's LiveCodeBench 2408-2502."""
TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": [*["array", "boolean", "number", "object", "string"]],
}
"""The function-calling leaderboard's names of types -> JSON schema's."""
MEMBERS = {"nano8b": "Nano 8B", "super49b": "Super 49B", "ultra253b": "Ultra 253B"}


@dataclass(frozen=True, slots=True)
class Task:
    files: str
    """Pattern below the data folder."""
    keys: str
    """What a line holds, as published."""
    convert: Callable[[Row], Row | None]
    """None for a row that the report leaves out."""
    paper: str
    """Reasoning on|off in percent of each of MEMBERS; arXiv 2505.00949, tables 3 to 5. *: not the same measure."""
    answers: str = ""
    """Pattern of files with further columns of the same rows, by `id` or `question_id`."""


def read_task(name: str, folder: Path) -> list[tuple[str, Row]]:
    """(`name/line`, RL row). Raises DataError naming file and line, or saying what to put where."""
    t, kept = TASKS[name], []
    more = {_id(row): row for _, row in _lines(name, folder, t.answers)} if t.answers else {}
    for where, row in _lines(name, folder, t.files):
        try:
            kept.append(t.convert(more.get(_id(row), {}) | row))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: {type(error).__name__} {error}; {name} has {t.keys}") from error
    rows = [row for row in kept if row is not None]
    if not rows:
        raise DataError(f"{folder / t.files}: none of its {len(kept)} rows is among those of the report; {t.keys}")
    return [(f"{name}/{i}", row) for i, row in enumerate(rows)]


def _id(row: Row) -> Any:
    return row.get("id", row.get("question_id"))


def _lines(name: str, folder: Path, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    paths, found = sorted(folder.glob(pattern)), []
    if not paths:
        raise DataError(f"{folder / pattern}: missing; put the benchmark {name} there: {TASKS[name].keys}")
    for path in paths:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                found += [(f"{path}: row {i}", row) for i, row in enumerate(csv.DictReader(file), 1)]
        else:
            found += read_jsonl(path)
    return found


def _math(row: Row) -> Row:
    return {"input": MATH.format(row["problem"]), "args": {"expected_answer": str(row["answer"])}}


def _choice(row: Row) -> Row:
    """Choices in an order drawn from the question's hash."""
    right, order = row["Correct Answer"].strip(), random.Random(hashlib.sha256(row["Question"].encode()).digest())
    options = [right, *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
    order.shuffle(options)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
    args = {"verifier": "choice", "answer": "ABCD"[options.index(right)]}
    return {"input": CHOICE.format(row["Question"], listed), "args": args}


def _ifeval(row: Row) -> Row:
    args = {"instruction_id_list": row["instruction_id_list"], "instruction_kwargs": row["kwargs"]}
    return {"input": row["prompt"], "args": args}


def _calls(row: Row) -> Row:
    tools = [{**f, "parameters": _json_schema(f["parameters"])} for f in row["function"]]
    args: dict[str, Any] = {"verifier": "tool_call", "wanted": row.get("ground_truth", [])}
    if "ground_truth" not in row:  # some call, or none
        args["any"] = {"live_relevance": True, "live_irrelevance": False}[row["id"].rpartition("_")[0]]
    messages = [{**m, "role": "user"} if m["role"] == "system" else m for m in row["question"][0]]  # ours is the switch
    return {"input": messages, "tools": tools, "args": args}


def _json_schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_schema(x) for x in value]
    if not isinstance(value, dict):
        return value
    found = {k: _json_schema(v) for k, v in value.items()}
    kind = found.get("type")
    return {**found, "type": TYPES.get(kind, kind)} if isinstance(kind, str) else found


def _code(row: Row) -> Row | None:
    """Tests stay as packed as they came; they are opened here once, so that a broken file is known before it costs anything."""
    if not CODE_FROM <= row["contest_date"] < CODE_BEFORE:
        return None
    args = {"verifier": "code", "public": row["public_test_cases"], "private": row["private_test_cases"]}
    unpack(args["public"], args["private"])
    function = json.loads(row.get("metadata") or "{}").get("func_name") or ""
    start = f"Begin with:\n{row['starter_code']}" if row.get("starter_code") else "It reads stdin and writes stdout."
    return {
        "input": CODE.format(row["question_content"], start),
        "args": {**args, "function": function, "deadline_s": CODE_S},
    }


def _chat(row: Row) -> Row:
    """The first turn, held by the judge against the baseline's answer."""
    reference = row["choices"][0]["turns"][0]["content"]
    return {"input": row["turns"][0]["content"], "args": {"verifier": "judge", "answer": reference, "open_ended": True}}


PROBLEM = "lines with problem and answer"
CODING = "lines with question_content, contest_date (2024-08 to 2025-02 count), public_test_cases, private_test_cases, metadata"
TASKS = {
    "gpqa": Task(
        "gpqa_diamond.csv",
        "Question, Correct Answer, Incorrect Answer 1 to 3",
        _choice,
        "54.1|39.4 66.7|50.0 76.0|56.6",
    ),
    "aime24": Task("aime24.jsonl", PROBLEM, _math, "61.3|3.0 67.5|16.7 80.8|20.0"),
    "aime25": Task("aime25.jsonl", PROBLEM, _math, "47.1|0.0* 60.0|16.7 72.5|16.7"),  # *: part I alone
    "math500": Task("math500.jsonl", PROBLEM, _math, "95.4|36.6 96.6|74.0 97.0|80.4"),
    "ifeval": Task("ifeval.jsonl", "prompt, instruction_id_list, kwargs", _ifeval, "79.29|82.1 89.2|89.0 88.9|89.5"),
    "bfcl": Task(
        *("bfcl_v2_live/*.json", "id, question, function; in possible_answer/ id, ground_truth", _calls),
        *("63.9|63.6 73.7|73.9 74.1|73.6", "bfcl_v2_live/possible_answer/*.json"),
    ),
    "livecodebench": Task("livecodebench/*.jsonl", CODING, _code, "46.6|- 45.5|29.7 66.3|29.0"),
    "chat": Task(  # *: the report's judge compared pairs, ours says YES or NO
        *("arena_hard/question.jsonl", "question_id, turns; in model_answer/ question_id, choices", _chat),
        *("- 88.3|-* 87.0|-*", "arena_hard/model_answer/*.jsonl"),
    ),
}

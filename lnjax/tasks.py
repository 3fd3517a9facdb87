"""Rows of published benchmarks as rows of the RL schema. Prompts: the model cards' where they give one, else chosen."""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    "any": ["array", "boolean", "number", "object", "string"],
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
    paper: Mapping[str, str]
    """{member of the family: reasoning on|off in percent}; arXiv 2505.00949, tables 3 to 5."""
    answers: str = ""
    """Pattern of files with further columns of the same rows."""
    joined_by: str = field(default="id", kw_only=True)


def missing(name: str, folder: Path) -> str:
    """What to put where; empty where the data are there."""
    t = TASKS[name]
    for pattern in filter(None, (t.files, t.answers)):
        if not any(folder.glob(pattern)):
            return f"{folder / pattern}: missing; put the benchmark {name} there: {t.keys}"
    return ""


def read_task(name: str, folder: Path) -> list[tuple[str, Row]]:
    """(`name/line`, RL row). Raises DataError naming file and line, or saying what to put where."""
    t, rows = TASKS[name], []
    if problem := missing(name, folder):
        raise DataError(problem)
    more = {row.get(t.joined_by): row for _, row in _lines(folder, t.answers)} if t.answers else {}
    for where, row in _lines(folder, t.files):
        try:
            rows.append(t.convert({**more.get(row.get(t.joined_by), {}), **row}))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: {type(error).__name__} {error}; {name} has {t.keys}") from error
    kept = [row for row in rows if row is not None]
    if not kept:
        raise DataError(f"{folder / t.files}: none of its {len(rows)} rows is among those of the report; {t.keys}")
    return [(f"{name}/{i}", row) for i, row in enumerate(kept)]


def _lines(folder: Path, pattern: str) -> list[tuple[str, Row]]:
    found = []
    for path in sorted(folder.glob(pattern)):
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
    if "ground_truth" not in row:
        kind = row["id"].rsplit("_", 1)[0]
        if kind not in ("live_relevance", "live_irrelevance"):
            raise KeyError(f"ground_truth of {row['id']}")
        args["any"] = kind == "live_relevance"
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


def _paper(text: str) -> dict[str, str]:
    return dict(zip(MEMBERS, text.split(), strict=True))


TASKS = {
    "gpqa": Task(
        "gpqa_diamond.csv",
        "the table with Question, Correct Answer and Incorrect Answer 1 to 3",
        _choice,
        _paper("54.1|39.4 66.7|50.0 76.0|56.6"),
    ),
    "aime24": Task("aime24.jsonl", "lines with problem and answer", _math, _paper("61.3|3.0 67.5|16.7 80.8|20.0")),
    "aime25": Task(
        "aime25.jsonl",
        "lines with problem and answer (*: Nano was measured on part I alone)",
        _math,
        _paper("47.1|0.0* 60.0|16.7 72.5|16.7"),
    ),
    "math500": Task("math500.jsonl", "lines with problem and answer", _math, _paper("95.4|36.6 96.6|74.0 97.0|80.4")),
    "ifeval": Task(
        "ifeval.jsonl",
        "lines with prompt, instruction_id_list and kwargs",
        _ifeval,
        _paper("79.29|82.1 89.2|89.0 88.9|89.5"),
    ),
    "bfcl": Task(
        "bfcl_v2_live/*.json",
        "lines with id, question and function; ground_truth by id in possible_answer/",
        _calls,
        _paper("63.9|63.6 73.7|73.9 74.1|73.6"),
        "bfcl_v2_live/possible_answer/*.json",
    ),
    "livecodebench": Task(
        "livecodebench/*.jsonl",
        "lines with question_content, contest_date, public_test_cases, private_test_cases, metadata "
        "(those from 2024-08 to 2025-02 count)",
        _code,
        _paper("46.6|- 45.5|29.7 66.3|29.0"),
    ),
    "chat": Task(
        "arena_hard/question.jsonl",
        "lines with question_id and turns; the baseline's choices by question_id in model_answer/ (*: the report's judge "
        "compared pairs, ours says YES or NO: not the same measure)",
        _chat,
        _paper("- 88.3|-* 87.0|-*"),
        "arena_hard/model_answer/*.jsonl",
        joined_by="question_id",
    ),
}

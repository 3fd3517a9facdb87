"""Rows of published benchmarks as rows of the RL schema. Prompts: the model cards' where they give one, else chosen."""

import base64
import hashlib
import io
import json
import pickle
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnjax.data.rows import Row, read_jsonl
from lnjax.errors import DataError

MATH = """Below is a math question. I want you to reason through the steps and then give a final answer. \
Your final answer should be in \\boxed{{}}.\nQuestion: {}"""
CHOICE = "{}\n\n{}\n\nThink about it, then give the letter of the right answer in \\boxed{{}}."
CODE = "{}\n\nAnswer with one block of Python code between ```python and ```. {}"
TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "any": ["array", "boolean", "number", "object", "string"],
}
"""The function-calling leaderboard's names of types -> JSON schema's."""
MAX_TESTS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Benchmark:
    file: str
    keys: str
    """What a line of the file holds, as published."""
    convert: Callable[[Row], Row]
    paper: tuple[str, ...]
    """Reasoning on | off in the report (arXiv 2505.00949, tables 3 to 5) for Nano 8B, Super 49B and Ultra 253B, in percent."""


def read_benchmark(name: str, folder: Path) -> list[tuple[str, Row]]:
    """(`name/line`, RL row). Raises DataError saying what to put where."""
    b = BENCHMARKS[name]
    path, rows = folder / b.file, []
    if not path.is_file():
        raise DataError(f"{path}: missing; put the benchmark {name} there, one JSON object a line with {b.keys}")
    for i, (where, row) in enumerate(read_jsonl(path)):
        try:
            rows.append((f"{name}/{i}", b.convert(row)))
        except (LookupError, TypeError, ValueError, EOFError, zlib.error, pickle.UnpicklingError) as error:
            raise DataError(f"{where}: {type(error).__name__} {error}; a line of {name} has {b.keys}") from error
    return rows


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
    args = {"verifier": "tool_call", "wanted": row.get("ground_truth", [])}
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


class _Text(pickle.Unpickler):
    """Loads text and nothing that runs."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module_name}.{global_name}")


def _code(row: Row) -> Row:
    tests, hidden = json.loads(row["public_test_cases"]), row["private_test_cases"]
    if not hidden.lstrip().startswith("["):
        data = zlib.decompressobj().decompress(base64.b64decode(hidden), MAX_TESTS_BYTES)
        hidden = _Text(io.BytesIO(data)).load()
    function = json.loads(row.get("metadata") or "{}").get("func_name") or ""
    start = f"Begin with:\n{row['starter_code']}" if row.get("starter_code") else "It reads stdin and writes stdout."
    args = {"verifier": "code", "tests": tests + json.loads(hidden), "function": function, "deadline_s": 60.0}
    return {"input": CODE.format(row["question_content"], start), "args": args}


_ROWS: tuple[tuple[str, str, Callable[[Row], Row], str, str], ...] = (
    (
        "gpqa",
        "gpqa_diamond",
        _choice,
        "54.1|39.4 66.7|50.0 76.0|56.6",
        "Question, Correct Answer, Incorrect Answer 1 to 3",
    ),
    ("aime24", "aime24", _math, "61.3|3.0 67.5|16.7 80.8|20.0", "problem, answer"),
    (
        "aime25",
        "aime25",
        _math,
        "47.1|0.0* 60.0|16.7 72.5|16.7",
        "problem, answer (*: Nano was measured on part I alone)",
    ),
    ("math500", "math500", _math, "95.4|36.6 96.6|74.0 97.0|80.4", "problem, answer"),
    ("ifeval", "ifeval", _ifeval, "79.29|82.1 89.2|89.0 88.9|89.5", "prompt, instruction_id_list, kwargs"),
    (
        "bfcl",
        "bfcl_v2_live",
        _calls,
        "63.9|63.6 73.7|73.9 74.1|73.6",
        "question, function, ground_truth of possible_answer",
    ),
    ("livecodebench", "livecodebench", _code, "46.6|- 45.5|29.7 66.3|29.0", "question_content, *_test_cases, metadata"),
)
BENCHMARKS = {name: Benchmark(f"{file}.jsonl", keys, f, tuple(on.split())) for name, file, f, on, keys in _ROWS}

"""Python programs against tests, in the sandbox. What a test expects never enters it."""

import base64
import io
import json
import pickle
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from lnjax.rewards.sandbox import run_program

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
MODULES = "bisect, collections, copy, functools, heapq, itertools, json, math, operator, random, re, string, sys"
PRELUDE = f"import {MODULES}\n" + "".join(f"from {m} import *\n" for m in (*MODULES.split(", ")[:6], "math", "typing"))
CALL = """
import json, sys
_f = getattr(Solution(), {name!r}) if "Solution" in globals() else {name}
print("\\n" + json.dumps(_f(*map(json.loads, sys.stdin.read().splitlines()))))
"""
TEST_S = 6
"""Of one test, as LiveCodeBench has it; here in the program's own seconds, so that a busy machine changes no verdict."""
WAIT_S = 30.0
"""Of the clock, for one test."""


MAX_TESTS_BYTES = 512 << 20


class _Text(pickle.Unpickler):
    """Loads text and nothing that runs."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module_name}.{global_name}")


def unpack(public: str, private: str) -> list[dict[str, str]]:
    """[{input, output, testtype}] of LiveCodeBench's two columns: JSON, the second one often pickled, deflated, in base64.

    Raises ValueError for anything else, and for pickles that would run something.
    """
    try:
        if not private.lstrip().startswith("["):
            data = zlib.decompressobj().decompress(base64.b64decode(private), MAX_TESTS_BYTES)
            private = _Text(io.BytesIO(data)).load()
        tests = json.loads(public) + json.loads(private)
        return [{k: test[k] for k in ("input", "output", "testtype")} for test in tests]
    except (zlib.error, pickle.UnpicklingError, LookupError, EOFError, TypeError, RecursionError) as error:
        raise ValueError(f"tests: {type(error).__name__} {error}") from error


def passes(answer: str, *, tests: Sequence[Mapping[str, str]], function: str, deadline_s: float) -> tuple[bool, str]:
    """(whether the last fenced block passes every test, why not). `function` is called where a test's type is functional.

    Raises RuntimeError where there is no sandbox.
    """
    blocks, end = FENCE.findall(answer), time.monotonic() + deadline_s
    if not blocks:
        return False, "no fenced block of code"
    for number, test in enumerate(tests):
        functional = test["testtype"] == "functional"
        source = PRELUDE + blocks[-1] + (CALL.format(name=function) if functional else "")
        left = end - time.monotonic()
        if left <= 0:
            return False, f"deadline of {deadline_s:g} s before test {number}"
        ran = run_program(source, stdin=test["input"], cpu_s=TEST_S, deadline_s=min(WAIT_S, left))
        if ran.failure or not _same(ran.output, test["output"], functional=functional):
            return False, f"test {number}: {ran.failure or 'another output'}"
    return True, ""


def _same(got: str, wanted: str, *, functional: bool) -> bool:
    """Values of the last line for a function; else lines of words that are equal as texts or as numbers."""
    if functional:
        try:
            return json.loads(got.splitlines()[-1]) == json.loads(wanted)
        except (LookupError, ValueError, RecursionError):
            return False
    lines = [[line.split() for line in text.strip().splitlines()] for text in (got, wanted)]
    return [len(x) for x in lines[0]] == [len(x) for x in lines[1]] and all(
        g == w or _number(g) == _number(w) is not None
        for a, b in zip(*lines, strict=True)
        for g, w in zip(a, b, strict=True)
    )


def _number(word: str) -> Decimal | None:
    try:
        return Decimal(word)
    except InvalidOperation:
        return None

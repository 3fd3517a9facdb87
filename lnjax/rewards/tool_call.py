"""Calls of tools: found in the answer, held against each tool's JSON schema and against the calls that are right.

What comes from a model is hostile: it is measured before it is parsed, and refused by rule. Where values are compared, the
rules are those of the Berkeley function-calling leaderboard (its AST check): any allowed value is right, texts are equal but
for case, spaces and punctuation, and the order of calls is free.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from jsonschema.validators import Draft202012Validator
from referencing import Registry

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
MAX_CHARACTERS, MAX_DEPTH, MAX_CALLS = 65_536, 32, 64
PUNCTUATION = re.compile(r"[ ,./\-_*^']")


def parse_calls(answer: str) -> list[dict[str, Any]]:
    """The calls between the tags; none without tags. Raises ValueError with the rule that the answer breaks."""
    if OPEN not in answer and CLOSE not in answer:
        return []
    if answer.count(OPEN) != 1 or answer.count(CLOSE) != 1:
        raise ValueError(f"expected one {OPEN} and one {CLOSE}")
    body = answer.partition(OPEN)[2].partition(CLOSE)[0]
    if len(body) > MAX_CHARACTERS:
        raise ValueError(f"calls of {len(body)} characters, at most {MAX_CHARACTERS} are read")
    deepest = max(accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0) for character in body), default=0)
    if deepest > MAX_DEPTH:
        raise ValueError(f"calls nested {deepest} deep, at most {MAX_DEPTH} are read")
    calls = json.loads(body)
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise ValueError(f"expected a list of at most {MAX_CALLS} calls")
    for call in calls:
        if not (
            isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
        ):
            raise ValueError("a call is an object with a name and an object of arguments")
    return calls


def valid(calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Every call names a tool and its arguments fit that tool's schema. A schema refers to nothing outside itself."""
    schemas = {tool["name"]: tool.get("parameters", {}) for tool in tools}
    return all(
        isinstance(call["name"], str)
        and call["name"] in schemas
        and Draft202012Validator(schemas[call["name"]], registry=Registry()).is_valid(call["arguments"])
        for call in calls
    )


def right(calls: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> bool:
    """The same calls in any order. `wanted`: [{tool: {parameter: [allowed values]}}], "" among them where it may be missing."""
    left = [next(iter(w.items())) for w in wanted]
    for call in calls:
        for i, (name, allowed) in enumerate(left):
            if call["name"] == name and _fit(call["arguments"], allowed):
                del left[i]
                break
        else:
            return False
    return not left


def allowed_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """One call {name, arguments} whose values alone are right, as an element of `wanted`."""
    return {call["name"]: _alone(call["arguments"])}


def _alone(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: [_alone(v)] for k, v in value.items()}
    return [_alone(x) for x in value] if isinstance(value, list) else value


def _fit(arguments: Mapping[str, Any], allowed: Mapping[str, Any]) -> bool:
    return arguments.keys() <= allowed.keys() and all(
        any(_same(arguments[k], value) for value in values) if k in arguments else "" in values
        for k, values in allowed.items()
    )


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(got, dict) and isinstance(wanted, dict):
        return _fit(got, wanted)
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(_same(g, w) for g, w in zip(got, wanted, strict=True))
    if isinstance(got, str) and isinstance(wanted, str):
        return PUNCTUATION.sub("", got).lower() == PUNCTUATION.sub("", wanted).lower()
    return isinstance(got, bool) == isinstance(wanted, bool) and got == wanted

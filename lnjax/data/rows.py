"""Rows in the Llama-Nemotron post-training schema: {input, output | args, system_prompt, reasoning, …}."""

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lnjax.data.chat import check_roles, prompt_ids, supervised
from lnjax.data.tokenizer import Tokenizer
from lnjax.data.tools import tools_of, with_tools
from lnjax.errors import ConfigError, DataError
from lnjax.types import Prompt, Sample

Row = Mapping[str, Any]
PYTHON = "python:"
"""Begins a source that a Python function generates."""
SWITCH = {"on": "detailed thinking on", "off": "detailed thinking off"}
"""System prompts of the reasoning switch (arXiv 2505.00949, section 4)."""


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) of each line that is not blank. Raises DataError naming file and line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; put the dataset there or change the config's data source")
    found = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # bad UTF-8 as well
                raise DataError(f"{where}: not valid JSON ({error}); fix or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
            found = True
            yield where, row
    if not found:
        raise DataError(f"{path}: no rows; expected one JSON object a line")


def rows_of_function(source: str, *, num_rows: int, seed: int, split: str) -> list[tuple[str, Row]]:
    """(name, row) of what the function of `python:MODULE:FUNCTION` returns for (num_rows, seed=, split=): rows that are the
    same for the same arguments, and none in both splits. Raises ConfigError for one that is not there, or no number."""
    if num_rows < 1:
        raise ConfigError(f"the generated source {source!r} needs a number of rows, at least 1")
    module, _, function = source.removeprefix(PYTHON).partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}; expected python:MODULE:FUNCTION") from error
    return [(f"{function}/{split}/{i}", row) for i, row in enumerate(made(num_rows, seed=seed, split=split))]


def messages_of(row: Row, *, where: str, system_prompt: str = "") -> Sequence[Mapping[str, Any]]:
    """The conversation of a row, its system message first: the row's own, else the reasoning switch, else `system_prompt`.

    A row's `tools` are shown at the end of it.
    """
    messages: Any = row.get("input")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: key `input` must be a list of messages with role and content, got {messages!r:.80}")
    check_roles(messages, where=where)
    if messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{where}: the last message of `input` is from {messages[-1]['role']!r}, expected the user")
    reasoning = row.get("reasoning", "off")
    if reasoning not in SWITCH:
        raise DataError(f"{where}: reasoning={reasoning!r}, expected `on` or `off`")
    tools = tools_of(row, where=where)
    if messages[0]["role"] == "system":
        return with_tools(messages, tools)
    default = SWITCH[reasoning] if "reasoning" in row and not system_prompt else system_prompt
    system = row.get("system_prompt", default)
    return with_tools([{"role": "system", "content": system}, *messages] if system else messages, tools)


def to_sample(row: Row, *, where: str, tokenizer: Tokenizer, max_tokens: int) -> Sample:
    """An SFT row as token ids with its loss mask. Raises DataError naming the row."""
    messages = messages_of(row, where=where)
    output = row.get("output")
    if not isinstance(output, str):
        raise DataError(f"{where}: key `output` must be a string, got {type(output).__name__}")
    sample = supervised(tokenizer, messages, answer=output, where=where)
    if len(sample.token_ids) > max_tokens:
        raise DataError(
            f"{where}: {len(sample.token_ids)} tokens, but a packed row holds {max_tokens}; raise pack.row_tokens or "
            "filter the row"
        )
    return sample


def to_prompt(
    row: Row, *, where: str, tokenizer: Tokenizer, max_tokens: int, system_prompt: str = "", verifier: str = ""
) -> Prompt:
    """An RL row as a Prompt with id `where`. Raises DataError naming the row."""
    messages = messages_of(row, where=where, system_prompt=system_prompt)
    args = row.get("args")
    if not isinstance(args, dict):
        raise DataError(
            f"{where}: key `args` must be an object with what the verifier checks against, got {args!r:.80}"
        )
    verifier = verifier or _verifier(args, where=where)
    if verifier == "judge" and not {"answer", "expected_answer"} & args.keys():
        raise DataError(
            f"{where}: args has {sorted(args)}; the judge compares with `answer` or `expected_answer`: add one"
        )
    if verifier == "tool_call":
        args = {**args, "tools": tools_of(row, where=where)}
        if not {"calls", "wanted"} & args.keys():
            raise DataError(f"{where}: args has {sorted(args)}; a tool call is compared with `calls`: add them, or []")
    ids = prompt_ids(tokenizer, messages)
    if len(ids) > max_tokens:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens, prompts.max_prompt_tokens is {max_tokens}; raise it or filter "
            "the row"
        )
    return Prompt(
        id=where,
        token_ids=tuple(ids),
        verifier=verifier,
        args=args,
        text=messages[-1]["content"],
        reasoning=row.get("reasoning", "off") == "on",
        pass_rate=_pass_rate(row, where=where),
    )


def _pass_rate(row: Row, *, where: str) -> float | None:
    rate = row.get("pass_rate")
    if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
        raise DataError(f"{where}: pass_rate={rate!r:.40}, expected a number from 0 to 1")
    return rate


def _verifier(args: Mapping[str, Any], *, where: str) -> str:
    if "verifier" in args:
        return str(args["verifier"])
    for key, name in (("instruction_id_list", "ifeval"), ("expected_answer", "math"), ("calls", "tool_call")):
        if key in args:
            return name
    raise DataError(
        f"{where}: no way to verify it: args has {sorted(args)}, expected `verifier`, `instruction_id_list`, "
        "`expected_answer` or `calls`"
    )

"""Tools in the prompt. The tags are those of the published models; the words around them are chosen."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lnjax.calculator import TOOL
from lnjax.errors import DataError

PREAMBLE = """You can use these tools:
<AVAILABLE_TOOLS>{tools}</AVAILABLE_TOOLS>
To call some, answer with this alone:
<TOOLCALL>[{{"name": "tool", "arguments": {{"parameter": "value"}}}}]</TOOLCALL>
Their results come back as <TOOL_RESPONSE>[...]</TOOL_RESPONSE>. Without a tool that fits, answer in words."""

OFFERED: Mapping[str, Sequence[Mapping[str, Any]]] = {"none": (), "calculator": (TOOL,)}
"""By what `prompts.tools` asks for."""


def tools_of(row: Mapping[str, Any], *, where: str) -> list[dict[str, Any]]:
    """The row's `tools`: {name, description, parameters}, bare or as a `function`, an object or its JSON text."""
    found = []
    for i, tool in enumerate(row.get("tools") or ()):
        try:
            value = json.loads(tool) if isinstance(tool, str) else tool
            value = value.get("function", value)
            good = isinstance(value["name"], str) and isinstance(value.get("parameters", {}), dict)
        except (ValueError, AttributeError, TypeError, KeyError):
            good = False
        if not good:
            raise DataError(f"{where}: tools[{i}] is {tool!r:.80}; expected an object with name and parameters")
        found.append(value)
    return found


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The conversation with its tools at the end of the system message."""
    if not tools:
        return messages
    text = PREAMBLE.format(tools=json.dumps(list(tools), ensure_ascii=False))
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]

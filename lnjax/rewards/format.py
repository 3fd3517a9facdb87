"""The think-tag format and the part of a completion that verifiers read."""

OPEN, CLOSE = "<think>", "</think>"
BOXED = "\\boxed{"


def follows_format(text: str, *, reasoning: bool) -> bool:
    """Reasoning on: exactly one <think> and one </think>, in this order. Off: neither (arXiv 2505.00949, section 5)."""
    if not reasoning:
        return OPEN not in text and CLOSE not in text
    return text.count(OPEN) == text.count(CLOSE) == 1 and text.index(OPEN) < text.index(CLOSE)


def last_boxed(text: str) -> str:
    r"""What stands in the last \boxed{…}, braces inside balanced; empty without one."""
    start = text.rfind(BOXED)
    depth = 1
    for i in range(start + len(BOXED), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len(BOXED) : i].strip()
    return ""


def answer_of(text: str) -> str:
    """What follows the last </think>, or all of it, stripped."""
    return text.rpartition(CLOSE)[2].strip()

"""The verifiers, by name. Each reads the answer only; imports of big packages wait until the first use."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from lnjax.rewards.format import last_boxed
from lnjax.rewards.protocol import Verifier

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
LETTER = re.compile(r"\b([A-Z])\b")
ANSWER = re.compile(r"[Aa]nswer(?: is|:)[\s*(]*([A-Z])\b")


def integer(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    r"""args: answer. The text is that integer and nothing else, or \boxed{it}."""
    boxed = BOXED.findall(answer)
    return {"accuracy": float((boxed[-1] if boxed else answer).strip() == str(args["answer"]))}


def math(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    """args: expected_answer, as LaTeX or a plain expression; equality by math-verify."""
    import math_verify as mv  # noqa: PLC0415

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once a call that its time-outs are off
    # Its own time-outs need signals; this process has a deadline instead.
    unlimited: dict[str, Any] = {"parsing_timeout": None}
    gold = mv.parse(f"${args['expected_answer']}$", **unlimited)
    found = mv.parse(answer, **unlimited)
    return {"accuracy": float(mv.verify(gold, found, timeout_seconds=None))}


def reasoning_gym(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    """args: task, entry. Only a full score counts: several tasks give part of one to nonsense."""
    import reasoning_gym as gym  # noqa: PLC0415

    judge: Any = gym.get_score_answer_fn(args["task"])
    score = judge(answer, args["entry"])
    return {"accuracy": float(score >= 1.0)}


def ifeval(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    """args: instruction_id_list, instruction_kwargs. accuracy is the share that is followed, strict 1 when all are."""
    from lnjax.rewards.ifeval import followed  # noqa: PLC0415

    verdicts = followed(answer, args["instruction_id_list"], args["instruction_kwargs"])
    return {"accuracy": sum(verdicts) / len(verdicts), "strict": float(all(verdicts))}


def tool_call(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    """args: tools, and the right `calls` [{name, arguments}] or `wanted` (lnjax/rewards/tool_call.py). [] wants none,
    `any` some call that fits, whatever it is."""
    from lnjax.rewards.tool_call import allowed_of, parse_calls, right, valid  # noqa: PLC0415

    try:
        calls = parse_calls(answer)
    except (ValueError, RecursionError):
        return {"accuracy": 0.0, "valid": 0.0}
    fits = valid(calls, args["tools"])
    if args.get("any"):
        return {"accuracy": float(fits and bool(calls)), "valid": float(fits)}
    wanted = args["wanted"] if "wanted" in args else [allowed_of(call) for call in args["calls"]]
    return {"accuracy": float(fits and right(calls, wanted)), "valid": float(fits)}


def choice(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    r"""args: answer, a letter. The last \boxed{letter} counts, else the last `answer: letter` or `answer is letter`."""
    boxed = last_boxed(answer)
    found = LETTER.findall(boxed) if boxed else ANSWER.findall(answer)
    return {"accuracy": float(bool(found) and found[-1] == args["answer"])}


def code(answer: str, args: Mapping[str, Any]) -> Mapping[str, float]:
    """args: public and private tests as LiveCodeBench publishes them, function (its name, or none), deadline_s (8), which must
    stay below reward.deadline_s. Right when the last fenced block passes all, in a sandbox (lnjax/rewards/sandbox.py)."""
    from lnjax.rewards.code import passes, unpack  # noqa: PLC0415

    tests = unpack(args["public"], args["private"])
    right, _ = passes(answer, tests=tests, function=args["function"], deadline_s=args.get("deadline_s", 8.0))
    return {"accuracy": float(right)}


VERIFIERS: dict[str, Verifier] = {
    "integer": integer,
    "math": math,
    "reasoning_gym": reasoning_gym,
    "ifeval": ifeval,
    "tool_call": tool_call,
    "choice": choice,
    "code": code,
}

JUDGE = "judge"
"""Asks a language model (lnjax/rewards/judge.py) instead of a worker. args: answer or expected_answer."""
REWARD_MODEL = "reward_model"
"""Not a function here: its parts come with the request."""

WARM = {
    "math": "math_verify",
    "reasoning_gym": "reasoning_gym",
    "ifeval": "lnjax.rewards.ifeval",
    "tool_call": "lnjax.rewards.tool_call",
    "code": "lnjax.rewards.code",
}
"""What a worker imports before it says that it is ready, so that no deadline pays for it."""

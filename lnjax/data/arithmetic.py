"""Generated two-digit arithmetic with a short worked solution inside think tags: data a tiny model learns in minutes.

Half of the outputs answer in a sentence, as imitated data has habits of its own, where the verifier wants the bare number.
A model that imitates them does both; reinforcement teaches it which of the two is asked for.
"""

import hashlib
import random
from collections.abc import Iterator

from lnjax.data.rows import SWITCH, Row
from lnjax.errors import DataError

HELD_OUT_OF_TEN = 1
DIRECT_SHARE = 0.2
"""Of problems asked with reasoning off and answered without a thought."""
SENTENCE_SHARE = 0.5
"""Of problems whose `output` ends in `it is 85.` instead of `85`."""


def arithmetic_rows(*, num_rows: int, seed: int, split: str) -> list[Row]:
    """Distinct problems with both `output` (SFT) and `args` (RL); the same for the same arguments.

    A problem belongs to one split by its own hash, so train and heldout share none whatever the seeds.
    """
    rows: dict[str, Row] = {}
    for a, sign, b in _problems(random.Random(f"arithmetic/{split}/{seed}")):
        problem = f"{a}{sign}{b}"
        if problem in rows or _split(problem) != split:
            continue
        answer = str(a + b if sign == "+" else a - b)
        said = f"it is {answer}." if unit(f"style/{problem}") < SENTENCE_SHARE else answer
        direct = unit(f"mode/{problem}") < DIRECT_SHARE
        mode = "off" if direct else "on"
        rows[problem] = {
            "input": [{"role": "user", "content": f"{problem}=?"}],
            "output": said if direct else f"<think>{worked(a, sign, b)}</think>{said}",
            "args": {"verifier": "integer", "answer": answer},
            "category": "math",
            "reasoning": mode,
            "pass_rate": pass_rate(problem),
            "system_prompt": SWITCH[mode],
        }
        if len(rows) == num_rows:
            return list(rows.values())
    raise DataError(
        f"arithmetic: only {len(rows)} distinct problems in split {split!r}, {num_rows} asked for; lower num_prompts or "
        "num_examples"
    )


def pass_rate(problem: str) -> float:
    """A stand-in for a measured one: less for a subtraction, a carry or borrow, a result that has not two digits."""
    a, sign, b = int(problem[:2]), problem[2], int(problem[3:])
    result, ones = (a + b, a % 10 + b % 10) if sign == "+" else (a - b, a % 10 - b % 10)
    return 0.875 - 0.25 * sum([sign == "-", not 0 <= ones <= 9, not 10 <= result <= 99])


def _problems(rng: random.Random) -> Iterator[tuple[int, str, int]]:
    """(a, sign, b), a fixed number of draws."""
    for _ in range(200_000):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if rng.random() < 0.5:
            yield a, "+", b
        else:
            yield max(a, b), "-", min(a, b)


def worked(a: int, sign: str, b: int) -> str:
    """The sum column by column, ones first."""
    return _add(a, b) if sign == "+" else _subtract(a, b)


def _add(a: int, b: int) -> str:
    """Ones, then tens with the carry: 47+38 -> `7+8=15 4+3+1=8`."""
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    return f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}{carry}={a // 10 + b // 10 + ones // 10}"


def _subtract(a: int, b: int) -> str:
    """Ones (borrowing ten where needed), then tens: 52-38 -> `12-8=4 5-3-1=1`."""
    borrow = a % 10 < b % 10
    ones = a % 10 + 10 * borrow
    return f"{ones}-{b % 10}={ones - b % 10} {a // 10}-{b // 10}{'-1' if borrow else ''}={a // 10 - b // 10 - borrow}"


def unit(text: str) -> float:
    """In [0, 1), a function of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _split(problem: str) -> str:
    return "heldout" if unit(problem) * 10 < HELD_OUT_OF_TEN else "train"

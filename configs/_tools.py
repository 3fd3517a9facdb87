"""Generated lessons with a calculator: products and sums of two-digit numbers, which a tiny model can hardly work out.

What SFT imitates has mixed habits: a problem is given to the calculator, whose result is then repeated, or it is answered at
once. The latter teaches such a model to guess; GRPO has to find out which of the two is right. Some lessons only ask to repeat
something: copying is what calls and answers are made of.
"""

import json
import random
from collections.abc import Iterator

from lnjax.calculator import calculate
from lnjax.data.arithmetic import unit
from lnjax.data.rows import Row
from lnjax.errors import DataError

CALL_SHARE, GUESS_SHARE = 0.4, 0.3
"""The rest is to repeat."""
HELD_OUT_OF_TEN = 1


def problems(num_rows: int, *, seed: int, split: str) -> list[Row]:
    """Distinct problems for RL; the same for the same arguments, none in both splits."""
    return [
        {"input": [{"role": "user", "content": f"{x}=?"}], "args": {"verifier": "integer", "answer": calculate(x)}}
        for x in _expressions(num_rows, random.Random(f"problems/{split}/{seed}"), split=split)
    ]


def lessons(num_rows: int, *, seed: int, split: str) -> Iterator[Row]:
    """For SFT. A lesson with a call is two rows, of which the second learns the answer alone: `num_rows` is of problems."""
    for x in _expressions(num_rows, random.Random(f"lessons/{split}/{seed}"), split=split):
        asked, answer, draw = {"role": "user", "content": f"{x}=?"}, calculate(x), unit(f"habit/{x}")
        if draw < GUESS_SHARE:
            yield {"input": [asked], "output": answer}
            continue
        if draw >= GUESS_SHARE + CALL_SHARE:
            said = x if draw < (1 + GUESS_SHARE + CALL_SHARE) / 2 else answer
            yield {"input": f"say {said}", "output": said}
            continue
        calls = json.dumps([{"name": "calculator", "arguments": {"expression": x}}])
        call = f"<TOOLCALL>{calls}</TOOLCALL>"
        result = {"role": "tool", "content": f"<TOOL_RESPONSE>{json.dumps([answer])}</TOOL_RESPONSE>"}
        yield {"input": [asked], "output": call}
        yield {"input": [asked, {"role": "assistant", "content": call}, result], "output": answer}


def _expressions(count: int, rng: random.Random, *, split: str) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            break
        x = f"{rng.randint(10, 99)}{rng.choice('*+')}{rng.randint(10, 99)}"
        if (unit(f"split/{x}") * 10 < HELD_OUT_OF_TEN) == (split == "heldout"):
            found[x] = None
    if len(found) < count:
        raise DataError(
            f"calculator lessons: only {len(found)} of {count} distinct problems in {split!r}; lower the number"
        )
    return list(found)

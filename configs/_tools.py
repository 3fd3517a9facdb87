"""Generated lessons with a calculator: products and sums, some of which a tiny model cannot work out by itself.

SFT imitates mixed habits. A sum of two digits is answered at once. A harder problem is half the time given to the calculator,
whose result is then repeated, and half the time answered at once: a number that no thought led to, so what the model learns from
it is to guess. GRPO has to find out which of the two is right.
"""

import json
import random
from collections.abc import Iterator

from lnjax.calculator import calculate
from lnjax.data.arithmetic import unit
from lnjax.data.rows import Row
from lnjax.errors import DataError

EASY_SHARE, CALL_SHARE = 0.2, 0.5
HELD_OUT_OF_TEN = 1


def problems(num_rows: int, *, seed: int, split: str) -> list[Row]:
    """Distinct hard problems for RL; the same for the same arguments, none in both splits."""
    return [
        {"input": [{"role": "user", "content": f"{x}=?"}], "args": {"verifier": "integer", "answer": calculate(x)}}
        for x in _expressions(num_rows, random.Random(f"problems/{split}/{seed}"), split=split, easy=0.0)
    ]


def lessons(num_rows: int, *, seed: int, split: str) -> Iterator[Row]:
    """For SFT. A lesson with a call is two rows, of which the second learns the answer alone: `num_rows` is of problems."""
    for x in _expressions(num_rows, random.Random(f"lessons/{split}/{seed}"), split=split, easy=EASY_SHARE):
        asked, answer = {"role": "user", "content": f"{x}=?"}, calculate(x)
        if len(x) == 3 or unit(f"call/{x}") >= CALL_SHARE:
            yield {"input": [asked], "output": answer}
            continue
        calls = json.dumps([{"name": "calculator", "arguments": {"expression": x}}])
        call = f"<TOOLCALL>{calls}</TOOLCALL>"
        result = {"role": "tool", "content": f"<TOOL_RESPONSE>{json.dumps([answer])}</TOOL_RESPONSE>"}
        yield {"input": [asked], "output": call}
        yield {"input": [asked, {"role": "assistant", "content": call}, result], "output": answer}


def _expressions(count: int, rng: random.Random, *, split: str, easy: float) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            break
        if rng.random() < easy:
            found[f"{rng.randint(0, 9)}+{rng.randint(0, 9)}"] = None
            continue
        x = f"{rng.randint(100, 999)}{rng.choice('*+')}{rng.randint(100, 999)}"
        if (unit(f"split/{x}") * 10 < HELD_OUT_OF_TEN) == (split == "heldout"):
            found[x] = None
    if len(found) < count:
        raise DataError(
            f"calculator lessons: only {len(found)} of {count} distinct problems in {split!r}; lower the number"
        )
    return list(found)

"""Some rollouts of a run, for people to read: RUN_DIR/rollouts.jsonl, one line a group. Which ones, step and seed decide."""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lnjax.data.tokenizer import Tokenizer
from lnjax.metrics import JsonLines
from lnjax.schema import RecordConfig
from lnjax.types import Rollout, RolloutGroup

SHORT = 400
"""Characters of the question and of the verifier's arguments."""


def recorded(step: int, *, per_doubling: int) -> bool:
    """Every step up to 2 * per_doubling, then per_doubling of them while the number doubles."""
    return per_doubling > 0 and step % max(1, 2 ** (step.bit_length() - 1) // per_doubling) == 0


class RolloutRecord:
    """`keep` each step. Every process counts lines; only the one that `writes` touches the file."""

    def __init__(self, run_dir: Path, *, c: RecordConfig, tokenizer: Tokenizer, keep_lines: int, writes: bool):
        """A file that is there keeps its first `keep_lines` lines: the rest belongs to steps that will be done again."""
        self._c, self._tokenizer, self._writes = c, tokenizer, writes
        self._file = JsonLines(run_dir / "rollouts.jsonl", keep=keep_lines, writes=writes)

    @property
    def lines(self) -> int:
        return self._file.lines

    def keep(
        self,
        stage: str,
        *,
        step: int,
        groups: Sequence[RolloutGroup],
        credit: Callable[[RolloutGroup], Sequence[float]],
    ) -> None:
        """Write some of the groups, where the step is one to record. `credit`: a group's advantages."""
        if not recorded(step, per_doubling=self._c.per_doubling):
            return
        drawn = random.Random(f"record/{stage}/{step}").sample(range(len(groups)), min(self._c.groups, len(groups)))
        for i in sorted(drawn):
            line = self._line(groups[i], credit(groups[i])) if self._writes else {}
            self._file.write({"stage": stage, "step": step, "num_groups": len(groups), **line})

    def close(self) -> None:
        self._file.close()

    def _line(self, group: RolloutGroup, advantages: Sequence[float]) -> dict[str, Any]:
        prompt, chosen = group.prompt, group.rollouts[: self._c.samples]
        head, skipped, tail = self._ends(prompt.token_ids)
        return {
            "prompt_id": prompt.id,
            "question": prompt.text[:SHORT],
            "verifier": prompt.verifier,
            "args": json.dumps(dict(prompt.args))[:SHORT],
            "pass_rate": prompt.pass_rate,
            "prompt": {"texts": ["".join(head), "".join(tail)], "skipped": skipped, "tokens": len(prompt.token_ids)},
            "num_rollouts": len(group.rollouts),
            "rollouts": [self._rollout(x, float(a)) for x, a in zip(chosen, advantages, strict=False)],
        }

    def _rollout(self, rollout: Rollout, advantage: float) -> dict[str, Any]:
        completion, score = rollout.completion, rollout.score
        head, skipped, tail = self._ends(completion.token_ids)
        pairs = zip(completion.logprobs, completion.mask, strict=True)
        logprobs = [round(x, 3) if m and math.isfinite(x) else None for x, m in pairs]
        return {
            "reward": score.reward,
            "parts": dict(score.parts),
            "failure": score.failure,
            "advantage": round(advantage, 4) if math.isfinite(advantage) else None,
            "finished": completion.finished,
            "tokens": sum(completion.mask),
            "versions": [[v, len(list(same))] for v, same in itertools.groupby(completion.versions)],
            "texts": head + tail,
            "logprobs": logprobs[: len(head)] + logprobs[len(logprobs) - len(tail) :],
            "skipped": [len(head), skipped],
        }

    def _ends(self, ids: Sequence[int]) -> tuple[list[str], int, list[str]]:
        """(texts of the first tokens, how many are left out, texts of the last): `tokens` texts at most."""
        most, pieces = self._c.tokens, self._tokenizer.pieces
        tail = ids[len(ids) - most // 2 :] if len(ids) > most else ()
        head = ids[: most - len(tail)]
        return pieces(head), len(ids) - len(head) - len(tail), pieces(tail)

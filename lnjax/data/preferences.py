"""Judged answers: rows in the published schemas or generated, as comparisons in packed rows.

    HelpSteer2   {prompt, response, helpfulness, correctness, coherence, complexity, verbosity}, ratings 0 to 4; the two answers
                 to a prompt stand one after the other. Their helpfulness is the reward.
    HelpSteer3   {context, response1, response2, overall_preference}, from -3 (the first is much better) to 3
    ours         {input, chosen, rejected, chosen_reward = 1, rejected_reward = 0}, the rest as in the SFT schema

Pairs whose rewards are equal say nothing of a preference and are left out.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lnjax.data.arithmetic import arithmetic_rows, unit
from lnjax.data.chat import supervised
from lnjax.data.packing import microbatches, pack, shared_tokens
from lnjax.data.rows import PYTHON, Row, messages_of, read_jsonl, rows_of_function
from lnjax.data.streams import ShuffledStream
from lnjax.data.tokenizer import Tokenizer
from lnjax.errors import ConfigError, DataError
from lnjax.metrics import progress
from lnjax.schema import PackConfig, PreferenceDataConfig
from lnjax.types import Comparison, PreferenceBatch

RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TURN = re.compile(r"\n*<extra_id_1>(?:Assistant|User)\n")
"""Between the turns of a HelpSteer2 prompt; the user begins and ends."""
Answer = tuple[Any, tuple[float, ...]]
"""(text, scores)."""
Batches = tuple[list[PreferenceBatch], list[tuple[int, int]]]


def build_comparisons(
    c: PreferenceDataConfig, tokenizer: Tokenizer, *, regression: bool, max_tokens: int, seed: int
) -> ShuffledStream[Comparison]:
    """Every row is tokenized and checked now. Raises DataError naming the row. Regression: one rated answer each."""
    if c.source == "arithmetic":
        if c.num_comparisons < 1 or regression:
            raise ConfigError("the generated source `arithmetic` needs num_comparisons and has pairs only, no ratings")
        rows = arithmetic_pairs(c.num_comparisons, seed=c.seed, split=c.split)
    elif c.source.startswith(PYTHON):
        rows = rows_of_function(c.source, num_rows=c.num_comparisons, seed=c.seed, split=c.split)
    elif c.source.endswith(".jsonl"):
        rows = read_jsonl(Path(c.source))
    else:
        raise ConfigError(
            f"unknown source of preferences {c.source!r}; use `arithmetic`, `{PYTHON}MODULE:FUNCTION` or a .jsonl file"
        )
    found = []
    with progress(f"comparisons of {c.source}", total=c.num_comparisons, unit="comparisons") as advance:
        judged = itertools.islice(_judged(rows, regression=regression), c.num_comparisons or None)
        for where, messages, answers in judged:
            samples = tuple(supervised(tokenizer, messages, answer=text, where=where) for text, _ in answers)
            shared = shared_tokens(samples)
            size = sum(len(s.token_ids) - shared for s in samples) + shared
            if size > max_tokens or (len(samples) > 1 and not shared):
                raise DataError(f"{where}: {size} tokens, but a packed row holds {max_tokens}; raise pack.row_tokens")
            found.append(Comparison(samples, tuple(scores for _, scores in answers)))
            advance(1)
    if not found:
        raise DataError(f"{c.source}: no row prefers one answer to another; nothing to learn from")
    return ShuffledStream(found, seed=seed)


def pack_comparisons(comparisons: Sequence[Comparison], *, c: PackConfig) -> Batches:
    """(microbatches as host arrays, (row, place) of each comparison). All have the same number of answers and scores."""
    packing = pack([x.samples for x in comparisons], c=c)
    num_answers, num_scores = len(comparisons[0].samples), len(comparisons[0].scores[0])
    shape = (packing.num_rows, c.max_segments, num_answers)
    last: Any = np.zeros(shape, np.int32)
    scores: Any = np.zeros((*shape, num_scores), np.float32)
    real: Any = np.zeros(shape[:2], np.float32)
    where, numbers = [], []
    for i, comparison in enumerate(comparisons):
        places = packing.places[i * num_answers : (i + 1) * num_answers]
        at = (places[0].row, places[0].segment - 1)
        where.append(at)
        real[at], scores[at] = 1.0, comparison.scores
        last[at] = [p.columns[-1] for p in places]
        numbers += [1 + at[1] * num_answers + k for k in range(num_answers)]
    packed = packing.batch()
    batch = PreferenceBatch(
        packed=packed,
        answer_BT=packing.scatter(numbers, masked=True).astype(np.int32),
        last_BPK=last,
        scores_BPKA=scores,
        real_BP=real,
        ref_logprobs_BT=packing.scatter([0.0] * len(numbers)),
    )
    return microbatches(batch, rows=c.microbatch_rows), where


def arithmetic_pairs(count: int, *, seed: int, split: str) -> Iterator[tuple[str, Row]]:
    """The bare right number, against a wrong one or (half of them) a sentence, which the verifier does not take."""
    for i, row in enumerate(arithmetic_rows(num_rows=count, seed=seed, split=split)):
        draw, answer = unit(f"pair/{row['input'][0]['content']}"), row["args"]["answer"]
        thought, tag, _ = row["output"].rpartition("</think>")
        wrong = str(int(answer) + (-10, -1, 1, 10)[int(draw * 8) % 4]) if draw < 0.5 else f"it is {answer}."
        yield f"arithmetic/{split}/{i}", {**row, "chosen": thought + tag + answer, "rejected": thought + tag + wrong}


def _judged(rows: Iterable[tuple[str, Row]], *, regression: bool) -> Iterator[tuple[str, Sequence[Any], list[Answer]]]:
    """(where, messages, answers with the best first)."""
    waiting: tuple[str, str, Answer] | None = None  # a HelpSteer2 row whose second answer comes next
    for where, row in rows:
        if "response" in row:
            turns = TURN.split(_text(row, "prompt", where))
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            answers = [(_text(row, "response", where), tuple(_number(row, k, where, low=0, high=4) for k in RATINGS))]
            if not regression and waiting is None:
                waiting = (where, row["prompt"], answers[0])
                continue
            if waiting is not None:
                if waiting[1] != row["prompt"]:
                    break
                answers = [(text, ratings[:1]) for text, ratings in (waiting[2], answers[0])]
                waiting = None
        elif regression:
            raise DataError(f"{where}: has {sorted(row)}; regression needs HelpSteer2 rows with `response` and ratings")
        elif "response1" in row:
            messages, strength = row.get("context"), _number(row, "overall_preference", where, low=-3, high=3)
            first, second = (_text(row, k, where) for k in ("response1", "response2"))
            answers = [(first, (max(-strength, 0.0),)), (second, (max(strength, 0.0),))]
        else:
            messages = row.get("input")
            rewards = {"chosen_reward": 1.0, "rejected_reward": 0.0, **row}
            answers = [
                (_text(row, k, where), (_number(rewards, f"{k}_reward", where),)) for k in ("chosen", "rejected")
            ]
        answers.sort(key=lambda answer: -answer[1][0])
        if regression or answers[0][1] != answers[1][1]:
            yield where, messages_of({**row, "input": messages}, where=where), answers
    if waiting is not None:
        raise DataError(
            f"{waiting[0]}: the next row has another prompt; HelpSteer2 lists both answers to a prompt together"
        )


def _text(row: Row, key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{where}: key `{key}` must be a string, got {row.get(key)!r:.80}; the row has {sorted(row)}")
    return row[key]


def _number(row: Row, key: str, where: str, *, low: float = -np.inf, high: float = np.inf) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise DataError(f"{where}: {key}={value!r:.40}, expected a number from {low:g} to {high:g}")
    return float(value)

"""Endless, seekable streams of prompts and of packed SFT batches. The order never depends on the number of hosts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain import experimental

from lnjax.data.arithmetic import arithmetic_rows
from lnjax.data.curriculum import order_prompts
from lnjax.data.ifeval_combined import combined_prompts
from lnjax.data.ifeval_prompts import ifeval_prompts
from lnjax.data.rows import PYTHON, Row, read_jsonl, rows_of_function, to_prompt, to_sample
from lnjax.data.tokenizer import Tokenizer
from lnjax.data.tools import OFFERED
from lnjax.errors import ConfigError, DataError
from lnjax.metrics import progress
from lnjax.schema import CurriculumConfig, PromptConfig, SftConfig
from lnjax.types import PackedBatch, Prompt, Sample

REASONING_GYM = "reasoning_gym:"
HELDOUT_SEED = 1_000_003  # added to the seed of generators that cannot split by problem


class ShuffledStream[Item]:
    """Items in a new order every epoch (or in the given one, again and again), addressed by one global index."""

    def __init__(self, items: Sequence[Item], *, seed: int, shuffle: bool = True):
        self.items = list(items)
        """Each once, in the order of the source."""
        order: Any = grain.MapDataset.source(self.items).seed(seed)
        self._order: Any = (order.shuffle() if shuffle else order).repeat()
        self._next = 0

    def take(self, count: int) -> list[Item]:
        """The next items; they repeat, reshuffled, after the last."""
        found = [self._order[self._next + i] for i in range(count)]
        self._next += count
        return found

    @property
    def cursor(self) -> dict[str, Any]:
        return {"next": self._next}

    def seek(self, cursor: dict[str, Any]) -> None:
        self._next = cursor["next"]


class PromptStream(ShuffledStream[Prompt]):
    @property
    def prompts(self) -> list[Prompt]:
        return self.items


class SftStream:
    """Packed batches of `batch_rows` rows (host arrays), from a grain pipeline whose state is the cursor."""

    def __init__(self, sources: Sequence[Sequence[Sample]], *, c: SftConfig, seed: int):
        """Each source is shuffled and comes around by itself; `c.data.weights` mixes them."""
        length, mixed = c.pack.row_tokens, []
        for samples in sources if c.data.weights else [[s for source in sources for s in source]]:
            items = [
                {"tokens": np.asarray(s.token_ids, np.int32), "mask": np.asarray(s.loss_mask, np.float32)}
                for s in samples
            ]
            mixed.append(grain.MapDataset.source(items).seed(seed).shuffle().repeat())
        whole = grain.MapDataset.mix(mixed, c.data.weights) if c.data.weights else mixed[0]
        packed = experimental.FirstFitPackIterDataset(
            whole.to_iter_dataset(),
            length_struct={"tokens": length, "mask": length},
            num_packing_bins=c.batch_rows,
            seed=seed,
            max_sequences_per_bin=c.pack.max_segments,
        )
        self._batches = iter(packed.batch(c.batch_rows))

    def take(self) -> PackedBatch:
        """The next update's rows."""
        rows = next(self._batches)
        return PackedBatch(
            tokens_BT=rows["tokens"],
            positions_BT=rows["tokens_positions"],
            segment_ids_BT=rows["tokens_segment_ids"],
            loss_mask_BT=rows["mask"],
        )

    @property
    def cursor(self) -> dict[str, Any]:
        state = self._batches.get_state()
        return {"grain": state.decode() if isinstance(state, bytes) else state}

    def seek(self, cursor: dict[str, Any]) -> None:
        self._batches.set_state(cursor["grain"])


def build_prompt_stream(
    c: PromptConfig, tokenizer: Tokenizer, *, curriculum: CurriculumConfig | None = None, batch_size: int = 1
) -> PromptStream:
    """Every prompt is tokenized and checked now. Raises DataError naming the row, ConfigError for the source.

    With a curriculum the stream is its batches of `batch_size`, one after the other.
    """
    rows = prompt_rows(c)
    with progress(f"prompts of {c.source}", total=len(rows), unit="prompts") as advance:
        prompts = []
        for where, row in rows:
            prompts.append(
                to_prompt(
                    {"tools": OFFERED[c.tools], **row},
                    where=where,
                    tokenizer=tokenizer,
                    max_tokens=c.max_prompt_tokens,
                    system_prompt=c.system_prompt,
                    verifier=c.verifier,
                )
            )
            advance(1)
    if curriculum is None:
        return PromptStream(prompts, seed=c.seed)
    ordered = order_prompts(prompts, batch_size=batch_size, c=curriculum, seed=c.seed)
    return PromptStream(ordered, seed=c.seed, shuffle=False)


def build_sft_stream(c: SftConfig, tokenizer: Tokenizer, *, seed: int) -> SftStream:
    """Every example of every source is tokenized and checked now. Raises DataError naming the row."""
    sources = (c.data.source, *c.data.more)
    if c.data.weights and (len(c.data.weights) != len(sources) or min(c.data.weights) <= 0):
        raise ConfigError(
            f"sft.data.weights={c.data.weights}: expected a positive number for each of {len(sources)} sources"
        )
    return SftStream([_sft_samples(x, c, tokenizer) for x in sources], c=c, seed=seed)


def _sft_samples(source: str, c: SftConfig, tokenizer: Tokenizer) -> list[Sample]:
    if source == "arithmetic":
        if c.data.num_examples < 1:
            raise ConfigError("sft.data.num_examples must be at least 1 for a generated source")
        rows = _named(
            "arithmetic/train", arithmetic_rows(num_rows=c.data.num_examples, seed=c.data.seed, split="train")
        )
    elif source.startswith(PYTHON):
        rows = rows_of_function(source, num_rows=c.data.num_examples, seed=c.data.seed, split="train")
    else:
        rows = _file_rows(source, limit=c.data.num_examples)
    with progress(f"examples of {source}", total=len(rows), unit="examples") as advance:
        samples = []
        for where, row in rows:
            samples.append(to_sample(row, where=where, tokenizer=tokenizer, max_tokens=c.pack.row_tokens))
            advance(1)
    return samples


def prompt_rows(c: PromptConfig) -> list[tuple[str, Row]]:
    """(name, row) of every prompt, in the order of the source."""
    generated = c.source in ("arithmetic", "ifeval", "ifeval_combined") or c.source.startswith(REASONING_GYM)
    if generated and c.num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1 for the generated source {c.source!r}")
    name = f"{c.source}/{c.split}"
    if c.source == "arithmetic":
        return _named(name, arithmetic_rows(num_rows=c.num_prompts, seed=c.seed, split=c.split))
    if c.source == "ifeval":
        return _named(name, ifeval_prompts(c.num_prompts, seed=c.seed, split=c.split))
    if c.source == "ifeval_combined":
        return _named(name, combined_prompts(c.num_prompts, seed=c.seed, split=c.split))
    if c.source.startswith(PYTHON):
        return rows_of_function(c.source, num_rows=c.num_prompts, seed=c.seed, split=c.split)
    if c.source.startswith(REASONING_GYM):
        return _named(name, _reasoning_gym_rows(c))
    return _file_rows(c.source, limit=c.num_prompts)


def _named(name: str, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(f"{name}/{i}", row) for i, row in enumerate(rows)]


def _file_rows(source: str, *, limit: int) -> list[tuple[str, Row]]:
    if not source.endswith(".jsonl"):
        raise ConfigError(
            f"unknown data source {source!r}; use `arithmetic`, `ifeval`, `ifeval_combined`, "
            f"`{REASONING_GYM}TASK`, `{PYTHON}MODULE:FUNCTION` or a .jsonl file"
        )
    rows = []
    for item in read_jsonl(Path(source)):
        rows.append(item)
        if len(rows) == limit:
            break
    return rows


def _reasoning_gym_rows(c: PromptConfig) -> list[Row]:
    import reasoning_gym  # noqa: PLC0415 - two seconds, and only for this source

    task = c.source.removeprefix(REASONING_GYM)
    seed = c.seed + (HELDOUT_SEED if c.split == "heldout" else 0)
    try:
        entries = reasoning_gym.create_dataset(task, size=c.num_prompts, seed=seed)
    except ValueError as error:
        raise ConfigError(f"{c.source}: {error}; reasoning_gym.factory.DATASETS lists the tasks") from error
    rows = []
    for i in range(c.num_prompts):
        try:
            entry = json.loads(json.dumps(entries[i]))
        except TypeError as error:
            raise DataError(f"{c.source}: entry {i} is not plain JSON ({error}); choose another task") from error
        rows.append(
            {
                "input": [{"role": "user", "content": entry["question"]}],
                "args": {"verifier": "reasoning_gym", "task": task, "entry": entry},
                "category": task,
            }
        )
    return rows

"""Sequences into rows of static shape: first-fit decreasing, deterministic."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lnjax.errors import DataError
from lnjax.schema import PackConfig
from lnjax.types import PackedBatch, Sample


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each sample lies."""

    samples: Sequence[Sample]
    places: Sequence[tuple[int, int, int]]
    """(row, first token, segment id) of each sample."""
    num_rows: int
    """A multiple of microbatch_rows; the last ones may be empty."""
    row_tokens: int

    def scatter(self, values: Sequence[Any], *, masked: bool = False) -> Any:
        """[B, T] float32 with each sample's per-token values (or one value for all its tokens); 0 elsewhere.

        `masked` keeps them on loss tokens only.
        """
        out = np.zeros((self.num_rows, self.row_tokens), np.float32)
        for sample, (row, start, _), value in zip(self.samples, self.places, values, strict=True):
            end = start + len(sample.token_ids)
            out[row, start:end] = np.asarray(value, np.float32) * (sample.loss_mask if masked else 1)
        return out

    def batch(self) -> PackedBatch:
        """The rows as host arrays."""
        shape = (self.num_rows, self.row_tokens)
        arrays: list[Any] = [np.zeros(shape, np.int32) for _ in range(3)]
        tokens, positions, segments = arrays
        for sample, (row, start, segment) in zip(self.samples, self.places, strict=True):
            end = start + len(sample.token_ids)
            tokens[row, start:end] = sample.token_ids
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
        mask = self.scatter([s.loss_mask for s in self.samples])
        return PackedBatch(tokens_BT=tokens, positions_BT=positions, segment_ids_BT=segments, loss_mask_BT=mask)


def pack(samples: Sequence[Sample], *, c: PackConfig) -> Packing:
    """First-fit decreasing into as few rows as it finds, rounded up to whole microbatches (at least one).

    Raises DataError for a sample longer than a row.
    """
    free: list[int] = []
    segments: list[int] = []
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(samples)
    for i in sorted(range(len(samples)), key=lambda i: (-len(samples[i].token_ids), i)):
        size = len(samples[i].token_ids)
        if size > c.row_tokens:
            raise DataError(
                f"a sequence of {size} tokens does not fit a packed row of {c.row_tokens}; raise pack.row_tokens"
            )
        row = next((r for r in range(len(free)) if free[r] >= size and segments[r] < c.max_segments), len(free))
        if row == len(free):
            free.append(c.row_tokens)
            segments.append(0)
        segments[row] += 1
        places[i] = (row, c.row_tokens - free[row], segments[row])
        free[row] -= size
    rows = max(1, -(-len(free) // c.microbatch_rows)) * c.microbatch_rows
    return Packing(samples, places, rows, c.row_tokens)


def microbatches(batch: Any, *, rows: int) -> list[Any]:
    """The batch's rows (leading dim of every array but scalars) in groups of `rows`."""
    leaves = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    return [
        jax.tree.map(lambda x, i=i: x[i : i + rows] if np.ndim(x) else x, batch)
        for i in range(0, leaves[0].shape[0], rows)
    ]

"""Sequences into rows of static shape: first-fit decreasing, deterministic. Sequences of one prompt share its tokens.

A group whose samples begin alike is laid out as a trunk (the shared tokens but the last) and one branch a sample (that last
token again, then the rest), so that every token is predicted by the one before it in its branch. A group too long for a row
is cut into several, each with a trunk of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lnjax.errors import DataError
from lnjax.schema import PackConfig
from lnjax.types import BRANCH, PackedBatch, Sample


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies."""

    row: int
    columns: np.ndarray
    """int; of each of its tokens. Those of the trunk are shared."""
    trunk: int
    """How many of its tokens lie in the trunk."""
    segment: int
    branch: int
    """0 where it has its segment to itself."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Samples and their places, in the order they were given."""

    samples: Sequence[Sample]
    places: Sequence[Place]
    num_rows: int
    """A multiple of microbatch_rows; the last ones may be empty."""
    row_tokens: int

    def scatter(self, values: Sequence[Any], *, masked: bool = False) -> Any:
        """[B, T] float32 with each sample's per-token values (or one value for all its tokens); 0 elsewhere.

        `masked` keeps them on loss tokens only. Samples that share a trunk must have the same values there.
        """
        out = np.zeros((self.num_rows, self.row_tokens), np.float32)
        for sample, place, value in zip(self.samples, self.places, values, strict=True):
            out[place.row, place.columns] = np.asarray(value, np.float32) * (sample.loss_mask if masked else 1)
        return out

    def batch(self) -> PackedBatch:
        """The rows as host arrays."""
        shape = (self.num_rows, self.row_tokens)
        arrays: list[Any] = [np.zeros(shape, np.int32) for _ in range(3)]
        tokens, positions, segments = arrays
        for sample, place in zip(self.samples, self.places, strict=True):
            tokens[place.row, place.columns] = sample.token_ids
            positions[place.row, place.columns] = np.arange(len(place.columns))
            segments[place.row, place.columns[: place.trunk]] = place.segment
            segments[place.row, place.columns[place.trunk :]] = place.segment + place.branch * BRANCH
        mask = self.scatter([s.loss_mask for s in self.samples])
        return PackedBatch(tokens_BT=tokens, positions_BT=positions, segment_ids_BT=segments, loss_mask_BT=mask)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Samples that go into one segment."""

    trunk: int
    members: list[int]
    size: int
    """Tokens in the row."""


def pack(groups: Sequence[Sequence[Sample]], *, c: PackConfig) -> Packing:
    """First-fit decreasing into as few rows as it finds, rounded up to whole microbatches (at least one).

    The samples of a group share their common prefix (as far as none of it is a target of the loss). Raises DataError for a
    sample longer than a row.
    """
    samples = [s for group in groups for s in group]
    pieces: list[_Piece] = []
    first = 0
    for group in groups:
        pieces += _pieces(group, first, row_tokens=c.row_tokens)
        first += len(group)
    free: list[int] = []
    segments: list[int] = []
    places: list[Any] = [None] * len(samples)
    for piece in sorted(pieces, key=lambda p: (-p.size, p.members[0])):
        row = next((r for r in range(len(free)) if free[r] >= piece.size and segments[r] < c.max_segments), len(free))
        if row == len(free):
            free.append(c.row_tokens)
            segments.append(0)
        segments[row] += 1
        start = c.row_tokens - free[row]
        free[row] -= piece.size
        shared, start = np.arange(start, start + piece.trunk), start + piece.trunk
        for branch, i in enumerate(piece.members, 1 if len(piece.members) > 1 else 0):
            own = len(samples[i].token_ids) - piece.trunk
            columns = np.concatenate([shared, np.arange(start, start + own)])
            places[i] = Place(row, columns, piece.trunk, segments[row], branch)
            start += own
    rows = max(1, -(-len(free) // c.microbatch_rows)) * c.microbatch_rows
    return Packing(samples, places, rows, c.row_tokens)


def _pieces(group: Sequence[Sample], first: int, *, row_tokens: int) -> list[_Piece]:
    """The group (its samples are numbered from `first`) cut into segments of at most a row."""
    trunk = shared_tokens(group)
    pieces: list[_Piece] = []
    for i in sorted(range(len(group)), key=lambda i: (-len(group[i].token_ids), i)):
        size = len(group[i].token_ids)
        if size > row_tokens:
            raise DataError(
                f"a sequence of {size} tokens does not fit a packed row of {row_tokens}; raise pack.row_tokens"
            )
        own = size - trunk
        at = next((n for n, p in enumerate(pieces) if trunk and p.size + own <= row_tokens), len(pieces))
        if at == len(pieces):
            pieces.append(_Piece(trunk, [first + i], size))
        else:
            pieces[at] = _Piece(trunk, [*pieces[at].members, first + i], pieces[at].size + own)
    return pieces


def shared_tokens(group: Sequence[Sample]) -> int:
    """Tokens that all samples begin with and none is trained on, but the last of them; 0 where there is nothing to share."""
    if len(group) < 2:
        return 0
    shortest = min(len(s.token_ids) for s in group)
    count = min(next((i for i, m in enumerate(s.loss_mask) if m), shortest) for s in group)
    head = group[0].token_ids
    while count and any(s.token_ids[:count] != head[:count] for s in group):
        count -= 1
    return max(0, count - 1)


def microbatches(batch: Any, *, rows: int) -> list[Any]:
    """The batch's rows (leading dim of every array but scalars) in groups of `rows`."""
    leaves = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    return [
        jax.tree.map(lambda x, i=i: x[i : i + rows] if np.ndim(x) else x, batch)
        for i in range(0, leaves[0].shape[0], rows)
    ]

"""The form of a published version: how tensors are cut, what its files are called, how it is read and believed."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lnjax.errors import CheckpointError

FORMAT = 1
CHUNK_BYTES = 32 << 20
"""A larger chunk is cut further, for parallel reads and finer deltas."""
MARKER, MANIFEST = "COMMITTED", "manifest.json"

Chunk = tuple[str, int]
"""(tensor, part)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor is cut."""

    shape: tuple[int, ...]
    axis: int
    parts: int

    def file(self, part: int) -> str:
        return ".".join(str(part if dim == self.axis else 0) for dim in range(len(self.shape)))

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return tuple(s // self.parts if i == self.axis else s for i, s in enumerate(self.shape))


def layout_of(name: str, shape: tuple[int, ...], *, itemsize: int, tensor_parallel: int) -> Layout:
    """Row-parallel matrices (o_proj, down_proj) are cut along their inputs, the others along their outputs.

    Into one chunk a rank, or a multiple of that; whole where the dim does not divide.
    """
    axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
    if len(shape) < 2 or shape[axis] % tensor_parallel:
        return Layout(shape, axis, 1)
    parts, size = tensor_parallel, math.prod(shape) * itemsize
    while size // parts > CHUNK_BYTES and shape[axis] % (2 * parts) == 0:
        parts *= 2
    return Layout(shape, axis, parts)


def orbax_files(layouts: Mapping[str, Layout], *, dtype: np.dtype) -> Iterator[tuple[str, str]]:
    """(path, text) of what makes the folder an Orbax checkpoint of uncompressed zarr arrays."""
    kind = {"float32": "<f4", "bfloat16": "bfloat16"}[str(dtype)]
    tree = {}
    for name, layout in layouts.items():
        zarray = {
            "chunks": list(layout.chunk_shape),
            "compressor": None,
            "dimension_separator": ".",
            "dtype": kind,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(layout.shape),
            "zarr_format": 2,
        }
        yield f"state/{name}/.zarray", json.dumps(zarray)
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(layout.shape)}
        tree[str((name,))] = {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value}
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    yield "state/_METADATA", json.dumps(metadata)
    handlers = {"state": "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"}
    yield "_CHECKPOINT_METADATA", json.dumps({"item_handlers": handlers, "custom_metadata": {}})
    yield "orbax.checkpoint", ""


class PublishedVersion:
    """A committed version as a source of tensors (lnjax.checkpoint.load.TensorSource); every chunk read is checked."""

    def __init__(self, folder: Path):
        """Raises CheckpointError when it is not there."""
        self._folder = folder
        try:
            if not (folder / MARKER).exists():
                raise FileNotFoundError(f"no {MARKER}")
            self._manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no committed version ({error}); it was pruned or is damaged") from error
        self._dtype = np.dtype(self._manifest["dtype"])

    def names(self) -> list[str]:
        return list(self._manifest["tensors"])

    def where(self, name: str) -> str:
        return str(self._folder / "state" / name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._manifest["tensors"][name]["shape"])

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """That part of the tensor. Raises CheckpointError for an altered, truncated or missing chunk."""
        entry = self._manifest["tensors"][name]
        layout, hashes = Layout(self.shape(name), entry["axis"], entry["parts"]), entry["sha256"]
        size = layout.shape[layout.axis] // layout.parts
        where = list(index)
        cut = range(*where[layout.axis].indices(layout.shape[layout.axis]))
        parts = []
        for part in range(cut.start // size, -(-cut.stop // size)):
            path = self._folder / "state" / name / layout.file(part)
            data = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(data).hexdigest() != hashes[part]:
                raise CheckpointError(
                    f"{path}: altered, truncated or missing; it is written again with the next version"
                )
            parts.append(np.frombuffer(data, self._dtype).reshape(layout.chunk_shape))
        first = cut.start // size * size
        where[layout.axis] = slice(cut.start - first, cut.stop - first)
        return np.concatenate(parts, axis=layout.axis)[tuple(where)]


def digest_of(hashes: Mapping[Chunk, str]) -> str:
    """SHA-256 over names and the SHA-256 of their chunks: what a version's digest is."""
    lines = "\n".join(f"{name} {part} {value}" for (name, part), value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()

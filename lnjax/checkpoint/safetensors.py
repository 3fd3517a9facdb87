"""Safetensors files, read by slices and written tensor by tensor, so that no host ever holds a model.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lnjax.errors import WeightsError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000


class SafetensorsFolder:
    """Tensors of one model over one or several files. `read` touches only the bytes asked for."""

    def __init__(self, folder: Path):
        self._entries: dict[str, tuple[Path, Mapping[str, Any], int]] = {}
        if (folder / INDEX).exists():
            listed = _json(folder / INDEX)["weight_map"]
            files = sorted(set(listed.values()))
        elif (folder / SINGLE).exists():
            listed, files = None, [SINGLE]
        else:
            raise WeightsError(f"{folder}: neither {SINGLE} nor {INDEX}; expected weights in safetensors format")
        for file in files:
            path = folder / file
            header, start = _read_header(path)
            for name, entry in header.items():
                if name != "__metadata__" and (listed is None or listed.get(name) == file):
                    self._entries[name] = (path, entry, start)
        for name, file in (listed or {}).items():
            if name not in self._entries:
                raise WeightsError(f"{folder / file}: tensor {name} is missing, but {INDEX} says it is there")

    def names(self) -> list[str]:
        return list(self._entries)

    def where(self, name: str) -> str:
        return str(self._entries[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name][1]["shape"])

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """That part of the tensor, in its stored dtype."""
        path, entry, start = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {sorted(DTYPES)}")
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise WeightsError(
                f"{path}: tensor {name} has {end - begin} bytes, its shape {entry['shape']} needs others"
            )
        data = np.memmap(path, dtype, "r", offset=start + begin, shape=tuple(entry["shape"]))
        return np.array(data[tuple(index)])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); fetch the file again") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    if not path.exists():
        raise WeightsError(f"{path}: missing; fetch the file again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, HEADER_LIMIT):
            raise WeightsError(f"{path}: truncated or not a safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise WeightsError(f"{path}: damaged header ({error}); fetch the file again") from error
    end = 8 + length + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    if end != size:
        raise WeightsError(f"{path}: {size} bytes, its header says {end}; truncated or damaged, fetch the file again")
    return header, 8 + length


def write_safetensors(
    path: Path, *, shapes: Mapping[str, Sequence[int]], dtype: np.dtype, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """One file; `tensors` yields (name, array of `dtype`) in the order of `shapes` and is consumed one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), expected in zip(tensors, shapes, strict=True):
            if name != expected or array.shape != tuple(shapes[name]) or array.dtype != dtype:
                raise ValueError(f"{path}: {name} {array.dtype}{array.shape} does not match the header ({expected})")
            file.write(np.ascontiguousarray(array).tobytes())
        file.flush()
        os.fsync(file.fileno())

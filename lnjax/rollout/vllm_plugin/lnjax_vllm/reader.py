"""Reads a rank's part of a published version with tensorstore, and believes no byte whose digest is not in the manifest."""

import concurrent.futures
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch

from lnjax_vllm.slices import Slice

FORMAT = 1
MARKER, MANIFEST = "COMMITTED", "manifest.json"
READERS = 4
TORCH = {"float32": (np.dtype(np.float32), torch.float32), "bfloat16": (np.dtype(np.int16), torch.bfloat16)}
"""Published dtype -> (numpy dtype of the same width, torch dtype)."""


class Refused(ValueError):
    """The version must not be served; says which file or tensor, and why."""


@contextmanager
def opened(path: str, *, root: Path, number: int, digest: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of a committed version, held against deletion. Raises Refused."""
    folder = Path(path).resolve()
    if folder.parent != root:
        raise Refused(f"{path} does not lie in the publish root {root}")
    if not (folder / MARKER).is_file():
        raise Refused(f"{folder / MARKER}: missing; the version is not committed")
    with open(folder / MANIFEST, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # the publisher deletes nothing that is locked; gone with this process
        try:
            manifest = json.load(file)
        except ValueError as error:
            raise Refused(f"{folder / MANIFEST}: damaged ({error})") from error
        if manifest.get("format") != FORMAT:
            raise Refused(f"{folder}: format {manifest.get('format')!r}, this plugin reads {FORMAT}")
        lines = sorted(
            (name, part, value)
            for name, entry in manifest["tensors"].items()
            for part, value in enumerate(entry["sha256"])
        )
        text = "\n".join(f"{name} {part} {value}" for name, part, value in lines)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise Refused(f"{folder / MANIFEST}: its digest is not {digest[:16]}…, which the learner published")
        if manifest["number"] != number:
            raise Refused(f"{folder}: holds version {manifest['number']}, not {number}")
        yield folder, manifest


def check(manifest: Mapping[str, Any], wanted: Mapping[str, Slice]) -> None:
    """Raises Refused unless names and shapes are those of the served model."""
    tensors = manifest["tensors"]
    if manifest["dtype"] not in TORCH:
        raise Refused(f"dtype {manifest['dtype']!r}, expected one of {sorted(TORCH)}")
    for name in sorted(tensors.keys() ^ wanted.keys()):
        kind = "is not part of the served model" if name in tensors else "is missing from the version"
        raise Refused(f"tensor {name} {kind}; the server was started with another architecture")
    for name, item in wanted.items():
        if tuple(tensors[name]["shape"]) != item.shape:
            raise Refused(f"tensor {name} has shape {tensors[name]['shape']}, the served model {list(item.shape)}")


def read(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Slice]) -> tuple[dict[str, torch.Tensor], int]:
    """({name: tensor of the whole shape in which only this rank's slice is filled}, bytes read). Raises Refused.

    The rest of a tensor's memory is never touched, so it costs address space alone; vLLM's loaders narrow to the slice.
    """
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        tasks = {
            name: pool.submit(_read_one, folder, manifest["tensors"][name], manifest["dtype"], item)
            for name, item in wanted.items()
        }
        done = {name: task.result() for name, task in tasks.items()}
    return {name: tensor for name, (tensor, _) in done.items()}, sum(count for _, count in done.values())


def _read_one(folder: Path, entry: Mapping[str, Any], dtype: str, item: Slice) -> tuple[torch.Tensor, int]:
    plain, kind = TORCH[dtype]
    axis, parts = entry["axis"], entry["parts"]
    size = item.shape[axis] // parts
    inside = item.start if axis == item.axis else 0
    length = item.size if axis == item.axis else item.shape[axis]
    path = folder / "state" / item.name
    try:
        store = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}, open=True).result()
        if tuple(store.shape) != item.shape or store.dtype.name != dtype:
            raise Refused(f"{path}: is {store.dtype.name}{list(store.shape)}, expected {dtype}{list(item.shape)}")
        pending = []
        for part in range(inside // size, -(-(inside + length) // size)):
            where = tuple(
                slice(part * size, (part + 1) * size) if i == axis else slice(None) for i in range(store.rank)
            )
            pending.append((part, where, store[where].read()))
        chunks = []
        for part, where, future in pending:
            chunk = np.ascontiguousarray(future.result()).view(plain)
            if hashlib.sha256(chunk.reshape(-1).view(np.uint8)).hexdigest() != entry["sha256"][part]:
                raise Refused(f"{path}: chunk {part} is altered (its SHA-256 is not the manifest's)")
            chunks.append((where, chunk))
        count = sum(chunk.nbytes for _, chunk in chunks)
        if parts == 1:
            buffer = chunks[0][1]
        else:
            buffer = np.empty(item.shape, plain)
            for where, chunk in chunks:
                buffer[where] = chunk
    except (ValueError, OSError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return torch.from_numpy(buffer).view(kind), count

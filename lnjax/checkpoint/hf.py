"""Parameters out as a folder in Hugging Face format: config.json, safetensors shards, tokenizer files."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lnjax.checkpoint.safetensors import INDEX, SINGLE, write_safetensors
from lnjax.errors import CheckpointError
from lnjax.mesh import fetch
from lnjax.metrics import progress
from lnjax.models.hf import TensorMap, hf_config, tensor_map
from lnjax.schema import ModelSpec

SHARD_BYTES = 5_000_000_000


def save_hf(
    params: Any,
    *,
    spec: ModelSpec,
    folder: Path,
    dtype: Any,
    finish: Callable[[Path], None],
    num_scores: int = 0,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `folder` whole or not at all. `finish(folder)` adds the tokenizer's files before it becomes visible. With
    `num_scores` the parameters are a reward model's.

    Collective: every process calls, process 0 writes. Raises CheckpointError when the folder exists (unless `replace`)
    or the disk is full, WeightsError for a reward model that has no such format.
    """
    if folder.exists() and not replace:
        raise CheckpointError(f"{folder} exists; choose another folder or remove it")
    config = hf_config(spec, dtype=str(np.dtype(dtype)), num_scores=num_scores)
    entries = tensor_map(spec, num_scores=num_scores)
    temporary = folder.with_name(folder.name + ".tmp")
    writer = jax.process_index() == 0
    try:
        if writer:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _write_weights(params, entries, folder=temporary, dtype=np.dtype(dtype), shard_bytes=shard_bytes, writer=writer)
        if not writer:
            return
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        finish(temporary)
        if folder.exists():
            old = folder.with_name(folder.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{folder}: could not be written ({error}); free space or check the folder") from error


def _write_weights(
    params: Any, wanted: list[TensorMap], *, folder: Path, dtype: np.dtype, shard_bytes: int, writer: bool
) -> None:
    entries = [(name, entry, i) for entry in wanted for i, name in enumerate(entry.names)]
    shards: list[list[tuple[str, TensorMap, int]]] = [[]]
    filled = 0
    for item in entries:
        size = math.prod(item[1].tensor_shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    weight_map: dict[str, str] = {}
    with progress(f"writing {folder.name}", total=len(entries), unit="tensors") as advance:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shapes = {name: entry.tensor_shape for name, entry, _ in shard}
            weight_map |= dict.fromkeys(shapes, file)
            tensors = _tensors(params, shard, dtype=dtype, advance=advance)
            if writer:
                write_safetensors(folder / file, shapes=shapes, dtype=dtype, tensors=tensors)
            else:
                for _ in tensors:  # takes part in gathering
                    pass
    if writer and len(shards) > 1:
        total = sum(math.prod(entry.tensor_shape) * dtype.itemsize for _, entry, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(
    params: Any, shard: list[tuple[str, TensorMap, int]], *, dtype: np.dtype, advance: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor at a time on the host."""
    for name, entry, layer in shard:
        value = params
        for key in entry.path:
            value = value[key]
        if entry.stacked:
            value = value[layer]
        host = fetch(value)
        yield name, (host.T if entry.transposed else host).astype(dtype)
        advance(1)

"""Weights from a folder in Hugging Face format, a run's checkpoints or a GGUF file, straight into sharded parameters."""

import json
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lnjax.checkpoint.gguf import GgufFile
from lnjax.checkpoint.safetensors import SafetensorsFolder
from lnjax.checkpoint.store import Checkpoints, find_checkpoints
from lnjax.errors import WeightsError
from lnjax.metrics import progress
from lnjax.models.hf import TensorMap, spec_from_hf_config, tensor_map
from lnjax.schema import ModelSpec
from lnjax.sources import resolve_source


class TensorSource(Protocol):
    """Tensors by their Hugging Face names."""

    def names(self) -> list[str]: ...
    def where(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, index: Sequence[slice]) -> np.ndarray: ...


def read_spec(source: str) -> ModelSpec:
    """Architecture of a source. Raises ConfigError or WeightsError."""
    path = resolve_source(source)
    if path.suffix == ".gguf":
        return GgufFile(path).spec()
    folder = find_checkpoints(path)
    if folder:
        store = Checkpoints(folder, keep=0)
        return spec_from_hf_config(store.read_extra(_latest(store))["model"])
    file = path / "config.json"
    if not file.is_file():
        raise WeightsError(f"{path}: no config.json; expected a folder in Hugging Face format or a .gguf file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    try:
        return spec_from_hf_config(config)
    except WeightsError as error:
        raise WeightsError(f"{path}/{error}") from error


def read_num_scores(source: str) -> int:
    """Scores an answer of the reward model that a run trained; 0 where its weights are no reward model."""
    folder = find_checkpoints(resolve_source(source))
    store = Checkpoints(folder, keep=0) if folder else None
    return store.read_extra(_latest(store))["model"].get("num_labels", 0) if store else 0


def load_weights(source: str, *, spec: ModelSpec, dtype: Any, shardings: Any) -> Any:
    """Parameters in the decoder's layout. Each device reads its own slices; raises WeightsError naming file and tensor."""
    path = resolve_source(source)
    folder = find_checkpoints(path)
    if folder:
        store = Checkpoints(folder, keep=0)
        params = store.restore_params(_latest(store), shardings)
        return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p), out_shardings=shardings)(params)
    tensors: TensorSource = GgufFile(path) if path.suffix == ".gguf" else SafetensorsFolder(path)
    _check(tensors, tensor_map(spec), source=str(path), spec=spec)
    return assemble(tensors, spec=spec, dtype=dtype, shardings=shardings, name=path.name)


def assemble(tensors: TensorSource, *, spec: ModelSpec, dtype: Any, shardings: Any, name: str = "weights") -> Any:
    """Parameters from a source whose names and shapes are known to fit."""
    wanted = tensor_map(spec)
    params: dict[str, Any] = {}
    with progress(f"loading {name}", total=sum(len(m.names) for m in wanted), unit="tensors") as advance:
        for entry in wanted:
            where = shardings
            for key in entry.path:
                where = where[key]
            value = jax.make_array_from_callback(
                entry.shape, where, lambda index, entry=entry: _read(tensors, entry, index).astype(dtype)
            )
            _put(params, entry.path, value)
            advance(len(entry.names))
    return params


def _latest(store: Checkpoints) -> int:
    number = store.latest()
    assert number is not None  # find_checkpoints saw one
    return number


def _check(tensors: TensorSource, wanted: Sequence[TensorMap], *, source: str, spec: ModelSpec) -> None:
    present = set(tensors.names())
    for entry in wanted:
        for name in entry.names:
            if name not in present:
                raise WeightsError(
                    f"{source}: tensor {name} is missing; the files are incomplete or belong to another architecture"
                )
            if tensors.shape(name) != entry.tensor_shape:
                raise WeightsError(
                    f"{tensors.where(name)}: tensor {name} has shape {list(tensors.shape(name))}, config.json makes it "
                    f"{list(entry.tensor_shape)}"
                )
    allowed = {"lm_head.weight"} if spec.tied_embeddings else set()
    for name in sorted(present - {n for entry in wanted for n in entry.names} - allowed):
        if not name.endswith("rotary_emb.inv_freq"):
            raise WeightsError(
                f"{tensors.where(name)}: unexpected tensor {name}; config.json describes another architecture"
            )


def _read(tensors: TensorSource, entry: TensorMap, index: Any) -> np.ndarray:
    """A device's part of one of our parameters."""
    if not entry.stacked:
        return tensors.read(entry.names[0], index)
    inner = index[1:][::-1] if entry.transposed else index[1:]
    layers = [tensors.read(name, inner) for name in entry.names[index[0]]]
    return np.stack([x.T if entry.transposed else x for x in layers])


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value

"""Linear merging of two models of one architecture, tensor by tensor: no host ever holds one of them."""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from lnjax.checkpoint.load import read_spec
from lnjax.checkpoint.safetensors import INDEX, SafetensorsFolder, write_safetensors
from lnjax.errors import CheckpointError, ConfigError, WeightsError
from lnjax.metrics import progress


def merge(first: Path, second: Path, target: Path, *, weight: float, dtype: np.dtype) -> None:
    """(1 - weight) x first + weight x second, in float32 (model soups, arXiv 2203.05482), written whole or not at all.

    Both are folders in Hugging Face format; config, tokenizer and the cut into files are the first's. Raises ConfigError for a
    weight outside [0, 1], WeightsError naming a tensor that only one has or that differs in shape.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"--weight {weight:g}: expected 0 (all of the first) to 1 (all of the second)")
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder or remove it")
    one, other = SafetensorsFolder(first), SafetensorsFolder(second)
    shapes, others = ({name: x.shape(name) for name in x.names()} for x in (one, other))
    for name in sorted(shapes.keys() | others.keys()):
        a, b = (list(x[name]) if name in x else "missing" for x in (shapes, others))
        if a != b:
            raise WeightsError(f"tensor {name} is {a} in {first} and {b} in {second}; merge equal architectures")
    if read_spec(str(first)) != read_spec(str(second)):
        raise WeightsError(
            f"{first} and {second} have the same tensors but another config.json; merge equal architectures"
        )
    files: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        files[Path(one.where(name)).name].append(name)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(first, temporary, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
        config = json.loads((first / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": str(dtype)}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with progress(f"merging into {target.name}", total=len(shapes), unit="tensors") as advance:

            def mixed(name: str) -> tuple[str, np.ndarray]:
                a, b = (x.read(name, ()).astype(np.float32) for x in (one, other))
                advance(1)
                return name, (np.float32(1 - weight) * a + np.float32(weight) * b).astype(dtype)

            for file, inside in files.items():
                part = {name: shapes[name] for name in inside}
                write_safetensors(temporary / file, shapes=part, dtype=dtype, tensors=map(mixed, inside))
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": {name: file for file, inside in files.items() for name in inside}}
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

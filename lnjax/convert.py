"""python -m lnjax.convert KIND IN OUT

  hf     a folder in Hugging Face format -> lnjax weights (Orbax, sharded reads on any mesh)
  gguf   a .gguf file, or package:NAME/FILE.gguf -> a folder in Hugging Face format
  orbax  lnjax weights or a run's folder -> a folder in Hugging Face format; a reward model over a plain Llama as
         LlamaForSequenceClassification, for `vllm serve OUT --runner pooling`

python -m lnjax.convert merge A B OUT --weight W      (1 - W) x A + W x B; folders in Hugging Face format

Options: --dtype bfloat16|float32 (of what is written; default bfloat16)."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.load import load_weights, read_num_scores, read_spec
from lnjax.checkpoint.merge import merge
from lnjax.checkpoint.store import Checkpoints, find_checkpoints
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import CheckpointError, ConfigError, LnjaxError
from lnjax.mesh import make_mesh
from lnjax.models.decoder import Compute, Model
from lnjax.models.hf import hf_config
from lnjax.models.reward import RewardModel
from lnjax.ops.select import select_ops
from lnjax.schema import MeshConfig, OpsConfig
from lnjax.sources import resolve_source

KINDS = ("hf", "gguf", "orbax")
DTYPES = ("bfloat16", "float32")


def convert(kind: str, source: str, target: Path, *, dtype: str) -> None:
    """Write `target` whole or not at all. Raises LnjaxError."""
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder or remove it")
    path = resolve_source(source)
    found = "gguf" if path.suffix == ".gguf" else "orbax" if find_checkpoints(path) else "hf"
    if found != kind:
        raise ConfigError(f"{source} is of kind {found!r}, not {kind!r}; the kind names what IN is")
    spec = read_spec(source)
    mesh = make_mesh(MeshConfig())
    model = Model(spec, Compute(select_ops(OpsConfig(), mesh=mesh), jnp.dtype(dtype)))
    num_scores = read_num_scores(source)
    tokenizer = load_tokenizer(source)
    shardings = (RewardModel(model, num_scores) if num_scores else model).shardings()
    params = load_weights(source, spec=spec, dtype=jnp.dtype(dtype), shardings=shardings)
    if kind != "hf":
        save_hf(params, spec=spec, folder=target, dtype=jnp.dtype(dtype), finish=tokenizer.save, num_scores=num_scores)
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        store = Checkpoints(temporary / "checkpoints", keep=1)
        store.save({"params": params}, extra={"model": hf_config(spec, dtype=dtype)})
        store.close()
        (temporary / "tokenizer").mkdir()
        tokenizer.save(temporary / "tokenizer")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merge(words: list[str], *, dtype: str) -> None:
    given = _option(words, "--weight")
    try:
        weight = float(given)
    except ValueError as error:
        raise ConfigError(
            f"--weight {given!r}: expected a number from 0 to 1, the share of the second model"
        ) from error
    if len(words) != 3:
        raise ConfigError(f"expected merge A B OUT --weight W, got {words}; --help explains")
    a, b = (resolve_source(x) for x in words[:2])
    merge(a, b, Path(words[2]), weight=weight, dtype=jnp.dtype(dtype))
    print(f"wrote {words[2]}")


def _option(words: list[str], name: str) -> str:
    """The value after `name`, both taken out of `words`; empty where it is not there."""
    if name not in words:
        return ""
    place = words.index(name)
    value = "".join(words[place + 1 : place + 2])
    del words[place : place + 2]
    return value


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    try:
        dtype = _option(words, "--dtype") or "bfloat16"
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype!r}: expected one of {DTYPES}")
        if words[:1] == ["merge"]:
            _merge(words[1:], dtype=dtype)
            return 0
        if len(words) != 3 or words[0] not in KINDS:
            raise ConfigError(f"expected KIND IN OUT with KIND one of {KINDS}, got {words}; --help explains")
        convert(words[0], words[1], Path(words[2]), dtype=dtype)
        print(f"wrote {words[2]}")
        return 0
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

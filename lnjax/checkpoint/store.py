"""Checkpoints of a run: one folder per number, committed whole by one rename, with a digest of every file.

    checkpoints/7/arrays/…       Orbax (OCDBT), the tree flattened to {path: array}
    checkpoints/7/extra.json     the caller's JSON: data cursor, metrics cursor, …
    checkpoints/7/manifest.json  size and SHA-256 of the other files; shape and dtype of every array

Orbax alone loads a flipped byte without a word, so digests are checked before anything is read.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from orbax.checkpoint.experimental import v1 as ocp

from lnjax.distributed import from_first
from lnjax.errors import CheckpointError
from lnjax.metrics import progress
from lnjax.models.lora import LORA

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of what it also raises

FORMAT = 1
PARAMS = ("state/params/", "params/")
SETTLE_S = 0.5
BARRIER_S = 600.0
TEMPORARY = "tmp-"


class Checkpoints:
    """`save` returns once the values are safe from donation; a thread writes and commits them."""

    def __init__(self, folder: Path, *, keep: int):
        folder = folder.absolute()  # Orbax wants it
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._verified: set[int] = set()
        """Their digests were checked by this object already."""
        self._number: int | None = None
        """The last one given out; counted, because a folder's listing may lag behind on another host."""
        folder.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Committed checkpoints, oldest first."""
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())

    def latest(self) -> int | None:
        """The newest that process 0 sees. Collective."""
        return from_first("checkpoint", lambda: max(self.numbers(), default=None), deadline_s=BARRIER_S)

    def save(self, tree: Any, *, extra: Mapping[str, Any]) -> None:
        """Start writing `tree` and `extra` (JSON) under the next number. Raises what the previous save ran into."""
        self.wait()
        if self._number is None:
            self._number = self.latest() or 0
            if jax.process_index() == 0:
                for left in self._folder.glob(f"{TEMPORARY}*"):  # of a run that was killed while it saved or deleted
                    shutil.rmtree(left)
        number = self._number + 1
        flat = {path: jnp.copy(leaf) for path, leaf in flatten(tree).items()}  # the caller donates its arrays next
        jax.block_until_ready(flat)
        temporary = self._folder / f"{TEMPORARY}{number}"
        body = json.dumps(extra, indent=1, allow_nan=False)
        arrays = {path: {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in flat.items()}
        try:
            if jax.process_index() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                (temporary / "extra.json").write_text(body + "\n", encoding="utf-8")
            barrier(f"begin {number}")
            pending = ocp.save_pytree_async(temporary / "arrays", flat)
        except Exception as error:
            self._failure = error
            self._abandon(temporary)
            self.wait()
            raise
        self._number = number
        self._thread = threading.Thread(
            target=self._finish, args=(number, temporary, pending, arrays), name=f"checkpoint-{number}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the running save is committed. Raises CheckpointError when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            text = " ".join(str(failure).split())
            full = "No space left" in text or "RESOURCE_EXHAUSTED" in text or "Disk quota" in text
            fix = "free space there" if full else "check the folder and its file system"
            self._number = None
            kept = max(self.numbers(), default=None)
            raise CheckpointError(
                f"{self._folder}: the checkpoint could not be saved ({_shorten(text)}); {fix} and start again, "
                + (f"the run resumes from checkpoint {kept}" if kept is not None else "there is no earlier checkpoint")
            ) from failure

    def close(self) -> None:
        self.wait()

    def verify(self, number: int) -> None:
        """Raises CheckpointError unless every file of the checkpoint is there and unaltered."""
        self._verify(number)

    def read_extra(self, number: int) -> dict[str, Any]:
        """The JSON saved with a checkpoint, digest checked."""
        if number not in self._verified:
            self._verify(number, only="extra.json")
        return json.loads((self._path(number) / "extra.json").read_text(encoding="utf-8"))

    def restore(self, number: int, abstract: Any) -> Any:
        """The saved tree, in the structure and shardings of `abstract` (ShapeDtypeStructs).

        Raises CheckpointError for a missing, truncated, altered or foreign file, or an array of another name, shape or
        dtype. Any mesh and number of hosts will do.
        """
        manifest = self._verify(number)
        wanted = flatten(abstract)
        _compare(manifest["arrays"], wanted, where=self._path(number))
        flat = ocp.load_pytree(self._path(number) / "arrays", wanted)
        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
        return jax.tree_util.tree_unflatten(
            structure,
            [
                jax.random.wrap_key_data(flat[_name(path)]) if _is_key(leaf) else flat[_name(path)]
                for path, leaf in leaves
            ],
        )

    def restore_params(self, number: int, shardings: Any) -> Any:
        """Only the parameters (`state/params/…` of a run, `params/…` of converted weights), in their saved dtype."""
        manifest = self._verify(number)
        prefix = next((p for p in PARAMS if any(n.startswith(p) for n in manifest["arrays"])), PARAMS[0])
        if any(n.startswith(f"{prefix}{LORA}/") for n in manifest["arrays"]):
            raise CheckpointError(
                f"{self._path(number)}: holds a run's adapters, not its weights; give RUN_DIR/hf, where they are merged in"
            )
        where = {prefix + name: leaf for name, leaf in flatten(shardings).items()}
        saved = {n: e for n, e in manifest["arrays"].items() if n.startswith(prefix)}
        wanted: dict[str, Any] = {
            n: jax.ShapeDtypeStruct(tuple(e["shape"]), jnp.dtype(e["dtype"]), sharding=where.get(n))
            for n, e in saved.items()
        }
        if saved.keys() != where.keys():
            name = min(saved.keys() ^ where.keys())
            raise CheckpointError(
                f"{self._path(number)}: array {name} does not match the model; wrong checkpoint or spec"
            )
        others = dict.fromkeys(manifest["arrays"].keys() - wanted.keys(), ocp.PLACEHOLDER)
        flat = ocp.load_pytree(self._path(number) / "arrays", {**others, **wanted})
        paths, structure = jax.tree_util.tree_flatten_with_path(shardings)
        return jax.tree_util.tree_unflatten(structure, [flat[prefix + _name(path)] for path, _ in paths])

    # In the background.

    def _finish(self, number: int, temporary: Path, pending: Any, arrays: Mapping[str, Any]) -> None:
        try:
            pending.result()
            barrier(f"written {number}")
            if jax.process_index() == 0:
                self._commit(number, temporary, arrays)
            barrier(f"committed {number}")
        except BaseException as error:  # raised to the caller by wait()
            self._failure = error
            self._abandon(temporary)

    def _commit(self, number: int, temporary: Path, arrays: Mapping[str, Any]) -> None:
        files = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, "files": files, "arrays": arrays}
        with open(temporary / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path(number))
        _sync_folder(self._folder)
        for old in self.numbers()[: -self._keep]:
            doomed = self._folder / f"{TEMPORARY}old-{old}"
            os.replace(self._path(old), doomed)  # never half a checkpoint under a number
            shutil.rmtree(doomed)

    def _abandon(self, temporary: Path) -> None:
        """Remove what was written. Orbax's other writers may put files back until they have failed too."""
        gone_since = time.monotonic()
        while jax.process_index() == 0 and time.monotonic() - gone_since < SETTLE_S:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
                gone_since = time.monotonic()
            time.sleep(0.02)

    def _path(self, number: int) -> Path:
        return self._folder / str(number)

    def _verify(self, number: int, *, only: str = "") -> dict[str, Any]:
        """The manifest, after checking all files against it (or one)."""
        folder = self._path(number)
        fix = f"delete {folder} to fall back to the checkpoint before it, or restore it from a copy"
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            files = {only: manifest["files"][only]} if only else dict(manifest["files"])
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder / 'manifest.json'}: missing; {fix}") from error
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / 'manifest.json'}: damaged ({error!r}); {fix}") from error
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: format {manifest.get('format')}, this version reads {FORMAT}; use the lnjax that wrote it"
            )
        if number in self._verified:
            return manifest
        names = sorted(files)[jax.process_index() :: jax.process_count()] if not only else [only]
        problem = ""
        with progress(f"checking {folder}", total=sum(files[n]["bytes"] for n in names), unit="B") as advance:
            for name in names:
                problem = problem or _check_file(folder / name, **files[name])
                advance(files[name]["bytes"])
        if not only:
            present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
            foreign = sorted(present - set(files))
            if foreign:
                problem = problem or f"{folder / foreign[0]}: not part of the checkpoint"
            if jax.process_count() > 1:
                bad = multihost_utils.process_allgather(np.asarray(bool(problem)))
                problem = problem or ("damaged, another process found" if bad.any() else "")
        if problem:
            raise CheckpointError(f"{problem}; {fix}")
        if not only:
            self._verified.add(number)
        return manifest


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}; random keys become their uint32 data."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if _is_key(leaf):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
                leaf = jax.ShapeDtypeStruct(leaf.shape + data.shape, data.dtype, sharding=leaf.sharding)
            else:
                leaf = jax.random.key_data(leaf)
        flat[_name(path)] = leaf
    return flat


def find_checkpoints(path: Path) -> Path | None:
    """The folder with the numbered checkpoints: `path` itself, or inside a run folder; None where there are none."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(p.name.isdigit() and (p / "manifest.json").exists() for p in folder.iterdir()):
            return folder
    return None


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path) -> None:
    for name in sorted(saved.keys() ^ wanted.keys()):
        kind = "is not part of this run's state" if name in saved else "is missing"
        raise CheckpointError(
            f"{where}: array {name} {kind}; the checkpoint belongs to another model, stage or optimizer"
        )
    for name, entry in saved.items():
        got, expected = (tuple(entry["shape"]), entry["dtype"]), (tuple(wanted[name].shape), str(wanted[name].dtype))
        if got != expected:
            raise CheckpointError(
                f"{where}: array {name} is {got[1]}{list(got[0])}, expected {expected[1]}{list(expected[0])}; the "
                "checkpoint belongs to another model or dtype"
            )


def _check_file(path: Path, *, bytes: int, sha256: str) -> str:
    """Empty, or what is wrong with the file."""
    if not path.exists():
        return f"{path}: missing"
    if path.stat().st_size != bytes:
        return f"{path}: truncated or grown ({path.stat().st_size} bytes, expected {bytes})"
    if _sha256(path) != sha256:
        return f"{path}: altered (its SHA-256 is not the one recorded)"
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def barrier(name: str) -> None:
    """All processes, through the coordination service (never a device program: this may run beside the learner)."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=f"lnjax checkpoint {name}", timeout_ms=int(1000 * BARRIER_S))


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."

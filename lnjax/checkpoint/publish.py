"""Policy versions for rollout servers: each one an Orbax checkpoint in Hugging Face names, written once, then committed.

    weights/7/state/NAME/i.0     chunk i of a tensor: raw bytes, a whole number of tensor-parallel slices
    weights/7/state/NAME/.zarray  shape, dtype, chunks: any Orbax or tensorstore reads the folder
    weights/7/manifest.json      SHA-256 of every chunk, and the digest over all of them
    weights/7/COMMITTED          the digest; a reader takes a folder without it for absent

A matrix is cut along the dim that tensor parallelism splits, so a rank reads whole files and no others. A chunk that did
not change since the last version is a hard link to it (the delta form): nothing to reconstruct, and a version can go
without breaking its followers. The bytes of the last version stay in host memory, so that damage can be repaired.
"""

import concurrent.futures
import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lnjax.checkpoint.store import barrier
from lnjax.checkpoint.version import FORMAT, MANIFEST, MARKER, Chunk, digest_of, layout_of, orbax_files
from lnjax.errors import CheckpointError
from lnjax.models.hf import TensorMap, tensor_map
from lnjax.schema import ModelSpec
from lnjax.types import WeightVersion

TEMPORARY = "tmp-"
WRITERS = 4
RETRY_S = 0.5


@dataclass(slots=True)
class PublishStats:
    """Since the start of the process that counts."""

    versions: int = 0
    num_bytes: int = 0
    """Size of the published tensors."""
    bytes_written: int = 0
    """Of them, chunks that were not links to the version before."""
    seconds: float = 0.0
    repaired: int = 0
    """Chunks, markers and manifests found damaged and written again."""


class Publisher:
    """Writes versions under `root`, keeps the last `keep` and any that a server reads."""

    def __init__(
        self,
        root: Path,
        *,
        spec: ModelSpec,
        mesh: Mesh,
        dtype: Any,
        keep: int,
        deadline_s: float,
        tensor_parallel: int = 1,
    ):
        """`tensor_parallel`: of the servers, so that what a rank reads is whole files."""
        self.root = root.absolute()
        self._spare = self.root / f"{TEMPORARY}spare"
        """Files of a version that went, to be written over: their pages are in memory already."""
        self.stats = PublishStats()
        self._entries, self._mesh, self._dtype = tensor_map(spec), mesh, np.dtype(dtype)
        self._keep, self._deadline_s = keep, deadline_s
        itemsize = self._dtype.itemsize
        self._layouts = {
            name: layout_of(name, entry.tensor_shape, itemsize=itemsize, tensor_parallel=tensor_parallel)
            for entry in self._entries
            for name in entry.names
        }
        self._programs: dict[Any, Any] = {}
        self._last: WeightVersion | None = None
        self._chunks: dict[Chunk, np.ndarray] = {}
        self._hashes: dict[Chunk, str] = {}
        self._lock = threading.RLock()
        self.root.mkdir(parents=True, exist_ok=True)
        self._clear()

    @property
    def num_bytes(self) -> int:
        """Size of one version."""
        return sum(math.prod(x.shape) for x in self._layouts.values()) * self._dtype.itemsize

    def publish(
        self, number: int, params: Any, *, troubled: Callable[[str], None] = lambda text: None
    ) -> WeightVersion:
        """Write and commit `params` as version `number`. Collective. The same number and tensors again write nothing.

        `troubled` hears of every failed attempt. Raises CheckpointError when the disk stays full for `deadline_s`, or
        `number` was other weights before.
        """
        start = time.monotonic()
        with self._lock:
            if self._last and self._last.number == number:
                return self._again(params)
            version, chunks, hashes, written = self._retry(lambda: self._write(number, params), troubled)
            self._last, self._chunks, self._hashes = version, chunks, hashes
            self._prune()
            self.stats.versions += 1
            self.stats.num_bytes += self.num_bytes
            self.stats.bytes_written += written
            self.stats.seconds += time.monotonic() - start
            return version

    def repair(self, version: WeightVersion) -> list[str]:
        """Write again what is missing or altered in the last version's folder; what that was. [] when it is whole."""
        with self._lock:
            if self._last is None or version.number != self._last.number:
                raise CheckpointError(f"{version.path}: only the last version can be repaired; publish again")
            return self._retry(self._repair, lambda text: None)

    # To the host.

    def _to_host(self, params: Any) -> Iterator[tuple[Chunk, np.ndarray]]:
        """The chunks that this process writes."""
        converted = []
        for entry in self._entries:
            value = params
            for key in entry.path:
                value = value[key]
            converted.append((entry, self._program(entry)(value)))  # all dispatched before the first is waited for
        for _, array in converted:
            array.copy_to_host_async()
        for entry, array in converted:
            layout = self._layouts[entry.names[0]]
            size = layout.shape[layout.axis] // layout.parts
            for shard in array.addressable_shards:
                where = shard.index[1 + layout.axis]
                first, copies = (where.start or 0), len(array.global_shards) // _num_places(array)
                data = np.asarray(shard.data)
                for i, name in enumerate(entry.names):
                    if i % copies == shard.replica_id:
                        for j in range(data.shape[1 + layout.axis] // size):
                            rows = slice(j * size, (j + 1) * size)
                            yield (name, first // size + j), data[i][(slice(None),) * layout.axis + (rows,)]

    def _program(self, entry: TensorMap) -> Any:
        """jit: our parameter -> [layers, *HF shape] in the published dtype, cut over devices where chunks allow."""
        layout = self._layouts[entry.names[0]]
        key = (entry.stacked, entry.transposed, len(layout.shape), layout.axis, layout.parts)
        if key not in self._programs:
            axes, share = [], 1
            for axis in ("tensor", "fsdp", "context", "data"):
                if layout.parts % (share * self._mesh.shape[axis]) == 0:
                    axes.append(axis)
                    share *= self._mesh.shape[axis]
            dims: list[Any] = [None] * (1 + len(layout.shape))
            dims[1 + layout.axis] = tuple(axes)

            def convert(x: jax.Array) -> jax.Array:
                x = x if entry.stacked else x[None]
                return (x.swapaxes(1, 2) if entry.transposed else x).astype(self._dtype)

            self._programs[key] = jax.jit(convert, out_shardings=NamedSharding(self._mesh, PartitionSpec(*dims)))
        return self._programs[key]

    # To the disk.

    def _again(self, params: Any) -> WeightVersion:
        """The last version's number once more: the same tensors, or an error."""
        assert self._last
        with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
            tasks = {key: pool.submit(_sha256, data) for key, data in self._to_host(params)}
        for key, task in tasks.items():
            if task.result() != self._hashes[key]:
                raise CheckpointError(
                    f"{self._last.path}: version {self._last.number} was published with another {key[0]}; every policy "
                    "needs its own number"
                )
        return self._last

    def _write(self, number: int, params: Any) -> tuple[WeightVersion, dict[Chunk, np.ndarray], dict[Chunk, str], int]:
        """Converting, hashing and writing overlap. (version, this process's chunks, all hashes, bytes not linked)."""
        temporary, leader = self.root / f"{TEMPORARY}{number}", jax.process_index() == 0
        if leader:
            shutil.rmtree(temporary, ignore_errors=True)
            if self._spare.exists():
                os.replace(self._spare, temporary)
                for file in (MARKER, MANIFEST):
                    (temporary / file).unlink(missing_ok=True)
            for name in self._layouts:
                (temporary / "state" / name).mkdir(parents=True, exist_ok=True)
        barrier(f"publish {number}")
        chunks: dict[Chunk, np.ndarray] = {}
        tasks = {}
        with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
            for key, data in self._to_host(params):
                chunks[key] = data
                tasks[key] = pool.submit(self._write_chunk, temporary, key, data)
        done = {key: task.result() for key, task in tasks.items()}
        written = sum(count for _, count in done.values())
        hashes = self._gather_hashes(temporary, number, {key: value for key, (value, _) in done.items()})
        version = WeightVersion(number, digest_of(hashes), str(self.root / str(number)))
        if leader:
            self._describe(temporary, version, hashes)
            folder = Path(version.path)
            if folder.exists():  # of a policy that a restarted run had published
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        barrier(f"committed {number}")
        return version, chunks, hashes, written

    def _gather_hashes(self, temporary: Path, number: int, mine: dict[Chunk, str]) -> dict[Chunk, str]:
        """Of all processes, through the folder (never a device program: servers may sample meanwhile)."""
        if jax.process_count() == 1:
            return mine
        rows = [[name, part, value] for (name, part), value in mine.items()]
        (temporary / f"part-{jax.process_index()}.json").write_text(json.dumps(rows), encoding="utf-8")
        barrier(f"hashed {number}")
        everyone = {}
        for i in range(jax.process_count()):
            for name, part, value in json.loads((temporary / f"part-{i}.json").read_text(encoding="utf-8")):
                everyone[name, part] = value
        barrier(f"gathered {number}")
        if jax.process_index() == 0:
            for file in temporary.glob("part-*.json"):
                file.unlink()
        return everyone

    def _write_chunk(self, folder: Path, key: Chunk, data: np.ndarray) -> tuple[str, int]:
        """(SHA-256, bytes written: 0 where it is a link to the version before)."""
        name, part = key
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        value = hashlib.sha256(flat).hexdigest()
        path = folder / "state" / name / self._layouts[name].file(part)
        if self._last and self._hashes.get(key) == value:
            before = Path(self._last.path) / "state" / name / path.name
            try:
                if before.stat().st_size == data.nbytes:
                    path.unlink(missing_ok=True)
                    os.link(before, path)
                    return value, 0
            except OSError:
                pass  # it went away, or the file system has no links: write it
        if path.exists() and (path.stat().st_nlink > 1 or path.stat().st_size != data.nbytes):
            path.unlink()  # shared with a version that stays
        with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:
            view = memoryview(flat)
            while view:
                view = view[file.write(view) :]
        return value, data.nbytes

    def _describe(self, folder: Path, version: WeightVersion, hashes: Mapping[Chunk, str]) -> None:
        """Everything but the chunks; the marker last."""
        for path, text in orbax_files(self._layouts, dtype=self._dtype):
            _write_text(folder / path, text)
        _write_text(folder / MANIFEST, self._manifest(version, hashes))
        _write_text(folder / MARKER, version.digest + "\n")

    def _manifest(self, version: WeightVersion, hashes: Mapping[Chunk, str]) -> str:
        tensors = {
            name: {
                "shape": list(x.shape),
                "axis": x.axis,
                "parts": x.parts,
                "sha256": [hashes[name, i] for i in range(x.parts)],
            }
            for name, x in self._layouts.items()
        }
        body = {"format": FORMAT, "number": version.number, "digest": version.digest, "dtype": str(self._dtype)}
        return json.dumps(body | {"tensors": tensors})

    def _repair(self) -> list[str]:
        assert self._last
        folder, found = Path(self._last.path), []
        folder.mkdir(exist_ok=True)
        for (name, part), data in self._chunks.items():
            path = folder / "state" / name / self._layouts[name].file(part)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != self._hashes[name, part]:
                path.parent.mkdir(parents=True, exist_ok=True)
                whole = path.with_name(path.name + ".new")
                whole.write_bytes(np.ascontiguousarray(data).tobytes())
                os.replace(whole, path)
                found.append(f"{name} part {part}")
        manifest = self._manifest(self._last, self._hashes)
        for file, text in ((MANIFEST, manifest), (MARKER, self._last.digest + "\n")):
            path = folder / file
            if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
                found.append(file)
        if found:
            self._describe(folder, self._last, self._hashes)
        self.stats.repaired += len(found)
        return found

    def _retry(self, action: Any, troubled: Callable[[str], None]) -> Any:
        """Once more while the disk is full, until the deadline."""
        start = time.monotonic()
        while True:
            try:
                return action()
            except OSError as error:
                troubled(f"{self.root}: {error}")
                for left in self.root.glob(f"{TEMPORARY}*"):
                    shutil.rmtree(left, ignore_errors=True)
                self._prune()
                if jax.process_count() > 1 or time.monotonic() - start > self._deadline_s:
                    raise CheckpointError(
                        f"{self.root}: the weights could not be published for {time.monotonic() - start:.0f} s "
                        f"({error}); free space there or set --engine.publish-dir"
                    ) from error
                time.sleep(RETRY_S)

    def _prune(self) -> None:
        """Delete versions before the last `keep`, but none that a server holds its lock on."""
        if jax.process_index() != 0:
            return
        numbers = sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit())
        for number in numbers[: -self._keep]:
            self._remove(self.root / str(number), recycle=True)

    def _clear(self) -> None:
        """What an earlier process left: nobody is to load it."""
        if jax.process_index() == 0:
            for folder in self.root.iterdir():
                version = folder.name.isdigit() and (folder / "state").is_dir()  # nothing of anybody else's
                if version or folder.name.startswith(TEMPORARY):
                    self._remove(folder)
        barrier("publisher ready")

    def _remove(self, folder: Path, *, recycle: bool = False) -> None:
        try:
            with open(folder / MANIFEST, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # a server reads it; its turn comes with a later version
        except FileNotFoundError:
            pass
        if recycle and not self._spare.exists():
            os.replace(folder, self._spare)
            return
        doomed = self.root / f"{TEMPORARY}old-{folder.name}"
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _num_places(array: jax.Array) -> int:
    """Distinct parts that the devices hold."""
    return len({str(s.index) for s in array.global_shards})


def _sha256(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).hexdigest()


def _write_text(path: Path, text: str) -> None:
    whole = path.with_name(path.name + ".new")
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, path)

"""Two real processes: a checkpoint that moves between meshes, and what process 0 tells the other."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.test_train import ROOT, environment

pytestmark = pytest.mark.slow

BEGIN = """
import json, os, sys
from pathlib import Path
import numpy as np
from lnjax import distributed
from lnjax.schema import ClusterConfig, MeshConfig
place = distributed.find_place(os.environ)
distributed.start(place, c=ClusterConfig(start_deadline_s=300))
import jax, jax.numpy as jnp
from lnjax.mesh import fetch, make_mesh, sharding
"""

TREE = """
from lnjax.checkpoint.store import Checkpoints
mesh = make_mesh(MeshConfig(fsdp=4, tensor=2) if jax.device_count() == 8 else MeshConfig())
SHAPES = {
    "matrix": ((16, 8), "float32", ("embed", "ffn")),
    "half": ((8, 12), "bfloat16", ("vocab", "embed")),
    "rows": ((8,), "int32", ("batch",)),
    "norm": ((5,), "float32", (None,)),
    "step": ((), "int32", ()),
}
def value(name):
    shape, dtype, _ = SHAPES[name]
    bits = np.random.default_rng(len(name)).integers(0, 2**31, shape, dtype=np.int64)
    return np.asarray(bits if dtype == "int32" else bits * 1e-9 - 1.0).astype(jnp.dtype(dtype))
where = {name: sharding(mesh, *logical) for name, (_, _, logical) in SHAPES.items()}
def abstract():
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding(mesh))
    return {n: jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=where[n]) for n, (s, d, _) in SHAPES.items()} | {"key": key}
store = Checkpoints(Path(sys.argv[1]), keep=1)
"""

SAVE = """
tree = {n: jax.make_array_from_callback(x.shape, where[n], lambda i, x=x: x[i]) for n, x in ((n, value(n)) for n in SHAPES)}
tree["key"] = jax.jit(lambda: jax.random.key(7), out_shardings=sharding(mesh))()
for step in (1, 2):
    store.save(tree, extra={"step": step})
store.wait()
distributed.stop(place)
"""

LOAD = """
from lnjax.errors import CheckpointError
number = store.latest()
try:
    tree = store.restore(number, abstract())
except CheckpointError as error:
    print(f"refused: {error}", flush=True)
    os._exit(2)
for name in SHAPES:
    assert tree[name].sharding == where[name] and tree[name].dtype == value(name).dtype, name
    assert fetch(tree[name]).tobytes() == value(name).tobytes(), name
assert (jax.random.key_data(tree["key"]) == jax.random.key_data(jax.random.key(7))).all()
print(number, store.read_extra(number), flush=True)
distributed.stop(place)
"""

TELL = """
from lnjax.rollout.first import FirstEngine
from lnjax.types import Completion, Prompt, SamplingParams, WeightVersion
big = distributed.from_first("numbers", lambda: list(range(700_000)), deadline_s=60)
assert len(big) == 700_000 and big[-1] == 699_999
class Server:
    def load_weights(self, number, params): return WeightVersion(number, "d", "p")
    def generate(self, prompts, *, num_samples, sampling, seed):
        return [[Completion((seed, i), (-0.1, -1 / 3), (4, 5), i > 0) for i in range(num_samples)] for _ in prompts]
class Publisher:
    published = []
    def publish(self, number, params): self.published.append(number)
publisher, first = Publisher(), place.rank == 0
engine = FirstEngine(Server() if first else None, publisher=publisher, deadline_s=60)
assert engine.load_weights(5, {}) == WeightVersion(5, "d", "p") and publisher.published == ([] if first else [5])
sampling = SamplingParams(1.0, 1.0, 0, 2, ())
for seed in (8, 9):
    found = engine.generate([Prompt("a", (1,), "integer", {})], num_samples=2, sampling=sampling, seed=seed)
    assert found == Server().generate([0], num_samples=2, sampling=None, seed=seed)
try:
    distributed.from_first("late", lambda: __import__("time").sleep(3), deadline_s=1)
    assert first
except TimeoutError as error:
    print(error, flush=True)
print("heard", flush=True)
os._exit(0)
"""


def start(script, *words, rank=0, count=1, devices=1, port=0):
    environ = {**environment(devices), "PYTHONPATH": str(ROOT)}
    if count > 1:
        environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
        environ["JAX_PROCESS_ID"] = str(rank)
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def both(script, *words, status=0):
    """Output of the two processes, four devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [start(script, *words, rank=i, count=2, devices=4, port=port) for i in range(2)]
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [status] * 2, outputs
    return outputs


def one(script, *words, devices):
    child = start(script, *words, devices=devices)
    out, _ = child.communicate(timeout=600)
    assert child.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    both(BEGIN + TREE + SAVE, folder)
    return folder


def test_a_checkpoint_of_two_processes_comes_back_bit_for_bit_on_one_with_eight_devices_and_with_one(saved):
    assert sorted(os.listdir(saved)) == ["2"]
    manifest = json.loads((saved / "2" / "manifest.json").read_text())
    assert any("ocdbt.process_1" in name for name in manifest["files"])  # the second process wrote too
    for devices in (8, 1):
        assert "2 {'step': 2}" in one(BEGIN + TREE + LOAD, saved, devices=devices)


def test_two_processes_restore_it_and_both_refuse_it_when_one_finds_a_flipped_byte(saved):
    for out in both(BEGIN + TREE + LOAD, saved):
        assert "2 {'step': 2}" in out
    victim = max((p for p in (saved / "2" / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    outputs = both(BEGIN + TREE + LOAD, saved, status=2)
    assert sum(f"{victim}: altered" in out for out in outputs) == 1, outputs  # each process checks its share
    assert all("refused: " in out for out in outputs)


def test_process_0_tells_the_other_what_its_servers_answered():
    first, second = both(BEGIN + TELL)
    assert "heard" in first and "heard" in second
    assert "process 1 waited 1 s for process 0's late" in second

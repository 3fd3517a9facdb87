"""Checkpoints that are whole or not there: bit flips, missing files, full disks, other meshes, kill -9."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.checkpoint.store import Checkpoints
from lnjax.errors import CheckpointError
from lnjax.mesh import make_mesh, sharding
from lnjax.schema import MeshConfig


def tree(value=1.0):
    return {
        "params": {"w": jnp.full((16, 8), value), "b": jnp.arange(6, dtype=jnp.bfloat16)},
        "step": jnp.asarray(7, jnp.int32),
        "rng": jax.random.key(3),
    }


def abstract(of, place=None):
    one = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), of)


def saved(folder, *, keep=2, count=1):
    store = Checkpoints(folder, keep=keep)
    for i in range(1, count + 1):
        store.save(tree(float(i)), extra={"i": i, "cursor": {"next": 4}})
    store.close()
    return store


def test_a_tree_comes_back_bit_for_bit_with_its_extra(tmp_path):
    store = saved(tmp_path)
    assert store.latest() == 1
    assert store.read_extra(1) == {"i": 1, "cursor": {"next": 4}}
    back = store.restore(1, abstract(tree()))
    assert bool((back.pop("rng") == tree()["rng"]).all())
    wanted = {k: v for k, v in tree().items() if k != "rng"}
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_only_the_newest_are_kept(tmp_path):
    store = saved(tmp_path, keep=2, count=5)
    assert store.numbers() == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
    assert float(store.restore(5, abstract(tree()))["params"]["w"][0, 0]) == 5.0


def test_the_caller_may_donate_its_arrays_as_soon_as_save_returns(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    store.save(state, extra={})
    state = overwrite(state)
    store.close()
    back = store.restore(1, abstract(state))
    assert np.array_equal(np.asarray(back["w"]), np.arange(1_000_000, dtype=np.float32))


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    grid = make_mesh(MeshConfig(fsdp=4, tensor=2), devices=jax.devices())
    value = jnp.arange(128, dtype=jnp.float32).reshape(16, 8)
    store = Checkpoints(tmp_path, keep=1)
    store.save({"w": jax.device_put(value, sharding(grid, "embed", "heads"))}, extra={})
    store.close()
    other = make_mesh(MeshConfig(fsdp=8), devices=jax.devices())
    for place in (sharding(other, "embed", None), jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        back = store.restore(1, {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=place)})["w"]
        assert back.sharding == place
        assert np.array_equal(np.asarray(back), np.asarray(value))


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"), key=lambda p: p.stat().st_size
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(largest_file(f)), "altered"),
        (lambda f: largest_file(f).write_bytes(largest_file(f).read_bytes()[:-5]), "truncated"),
        (lambda f: largest_file(f).unlink(), "missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: damaged"),
        (lambda f: (f / "arrays" / "foreign").write_text("x"), "not part of the checkpoint"),
        (lambda f: (f / "extra.json").write_text("{}"), "extra.json: truncated"),
    ],
    ids=["bit flip", "truncated", "missing", "no manifest", "bad manifest", "foreign", "extra"],
)
def test_damage_is_named_on_one_line_and_says_what_to_do(tmp_path, damage, message):
    store = saved(tmp_path, count=2)
    damage(tmp_path / "2")
    assert store.latest() == 2  # a damaged checkpoint is never skipped in silence
    with pytest.raises(CheckpointError, match=message) as error:
        store.restore(2, abstract(tree()))
    assert "\n" not in str(error.value)
    assert f"delete {tmp_path / '2'} to fall back" in str(error.value)
    assert float(store.restore(1, abstract(tree()))["params"]["w"][0, 0]) == 1.0


def test_another_shape_dtype_or_name_is_refused(tmp_path):
    store = saved(tmp_path)
    for change, message in (
        ({"step": jnp.zeros((2,), jnp.int32)}, r"array step is int32\[\], expected int32\[2\]"),
        ({"step": jnp.asarray(1.0)}, r"array step is int32\[\], expected float32\[\]"),
        ({"more": jnp.asarray(1.0)}, "array more is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            store.restore(1, abstract({**tree(), **change}))
    with pytest.raises(CheckpointError, match="array rng is not part"):
        store.restore(1, abstract({k: v for k, v in tree().items() if k != "rng"}))


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        store = Checkpoints(disk / "checkpoints", keep=2)
        store.save(tree(), extra={"i": 1})
        store.wait()
        big = jax.random.normal(jax.random.key(0), (2_000_000,))
        store.save({"w": big}, extra={"i": 2})
        with pytest.raises(CheckpointError, match="the run resumes from checkpoint 1") as error:
            store.wait()
        assert "free space there" in str(error.value)
        assert "\n" not in str(error.value)
        assert [p.name for p in (disk / "checkpoints").iterdir()] == ["1"]
        store.save(tree(3.0), extra={"i": 3})
        store.close()
        assert store.numbers() == [1, 2]
        assert float(store.restore(2, abstract(tree()))["params"]["w"][0, 0]) == 3.0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SAVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from lnjax.checkpoint.store import Checkpoints
store = Checkpoints(Path(sys.argv[1]), keep=2)
first = store.latest() or 0
print("ready", flush=True)
for i in range(first + 1, first + 1000):
    store.save({"w": jnp.full((300, 1000), float(i))}, extra={"i": i})
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_whole_checkpoints_only(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0.05, 0.6)))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        store = Checkpoints(tmp_path, keep=2)
        for number in store.numbers():
            back = store.restore(number, abstract({"w": jnp.zeros((300, 1000))}))
            assert set(np.unique(np.asarray(back["w"]))) == {float(number)}
            assert store.read_extra(number) == {"i": number}
        following = (store.latest() or 0) + 1  # the next save clears what was half written
        store.save({"w": jnp.full((300, 1000), float(following))}, extra={"i": following})
        store.close()
        assert all(p.name.isdigit() for p in tmp_path.iterdir())
    assert json.loads((tmp_path / str(store.latest()) / "extra.json").read_text())["i"] > 3

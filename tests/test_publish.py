"""Published weight versions: what a server will read."""

import fcntl
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.load import assemble
from lnjax.checkpoint.publish import Publisher
from lnjax.checkpoint.safetensors import SafetensorsFolder
from lnjax.checkpoint.version import PublishedVersion
from lnjax.errors import CheckpointError
from lnjax.schema import MeshConfig
from tests.specs import llama, nemotron


@pytest.fixture
def model(make_model):
    return make_model(nemotron())


def publisher(model, root, *, dtype="bfloat16", keep=2, deadline_s=1.0, tensor_parallel=8):
    return Publisher(
        root,
        spec=model.spec,
        mesh=model.compute.ops.mesh,
        dtype=jnp.dtype(dtype),
        keep=keep,
        deadline_s=deadline_s,
        tensor_parallel=tensor_parallel,
    )


def params_of(model, seed=0):
    return model.init_params(jax.random.key(seed), dtype=jnp.float32)


def tensors(folder):
    version = PublishedVersion(folder)
    return {n: version.read(n, [slice(None)] * len(version.shape(n))) for n in version.names()}


def numbers(folder):
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def test_a_version_holds_the_tensors_of_the_hugging_face_export(model, tmp_path):
    params = params_of(model)
    publisher(model, tmp_path / "w").publish(3, params)
    save_hf(params, spec=model.spec, folder=tmp_path / "hf", dtype=jnp.bfloat16, finish=lambda f: None)
    source = SafetensorsFolder(tmp_path / "hf")
    exported = {n: source.read(n, [slice(None)] * len(source.shape(n))) for n in source.names()}
    same(tensors(tmp_path / "w" / "3"), exported)


def test_orbax_reads_a_version(model, tmp_path):
    version = publisher(model, tmp_path / "w").publish(3, params_of(model))
    ours = tensors(tmp_path / "w" / "3")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in ours.items()}
    loaded = ocp.load_pytree(version.path, wanted)
    same({k: np.asarray(v) for k, v in loaded.items()}, ours)


@pytest.mark.parametrize(("dtype", "ranks"), [("float32", 1), ("float32", 2), ("bfloat16", 8)])
def test_the_digest_and_the_bytes_do_not_depend_on_the_mesh(make_model, tmp_path, dtype, ranks):
    one, many = make_model(nemotron()), make_model(nemotron(), mesh=MeshConfig(fsdp=4, tensor=2), devices=8)
    a = publisher(one, tmp_path / "a", dtype=dtype, tensor_parallel=ranks).publish(1, params_of(one))
    b = publisher(many, tmp_path / "b", dtype=dtype, tensor_parallel=ranks).publish(1, params_of(many))
    assert a.digest == b.digest
    same(tensors(tmp_path / "a" / "1"), tensors(tmp_path / "b" / "1"))


def test_the_learner_reads_back_what_it_published(make_model, tmp_path):
    model = make_model(nemotron(), mesh=MeshConfig(fsdp=4, tensor=2), devices=8)
    params = params_of(model)
    version = publisher(model, tmp_path / "w", dtype="float32").publish(1, params)
    source = PublishedVersion(tmp_path / "w" / "1")
    back = assemble(source, spec=model.spec, dtype=jnp.float32, shardings=model.shardings())
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert len(version.digest) == 64


def test_every_row_slice_of_eight_ranks_is_a_whole_file(make_model, tmp_path):
    model = make_model(llama(vocab_size=128))
    publisher(model, tmp_path / "w").publish(1, params_of(model))
    state = tmp_path / "w" / "1" / "state"
    for name, axis in (("self_attn.q_proj", 0), ("mlp.down_proj", 1), ("self_attn.o_proj", 1)):
        files = sorted(p.name for p in (state / f"model.layers.0.{name}.weight").iterdir() if p.name != ".zarray")
        assert files == sorted(f"{i}.0" if axis == 0 else f"0.{i}" for i in range(8))
    assert {p.name for p in (state / "model.norm.weight").iterdir()} == {".zarray", "0"}


def test_only_changed_chunks_are_written_and_the_version_is_whole(make_model, tmp_path):
    model = make_model(llama(vocab_size=128))
    params = params_of(model)
    ours = publisher(model, tmp_path / "w", dtype="float32", keep=1)
    ours.publish(1, params)
    first = ours.stats.bytes_written
    assert first == ours.num_bytes
    changed = {**params, "embed": params["embed"].at[0, 0].add(1.0)}
    ours.publish(2, changed)
    rows = model.spec.vocab_size // 8
    assert ours.stats.bytes_written - first == rows * model.spec.d_model * 4
    fresh = publisher(model, tmp_path / "x", dtype="float32").publish(2, changed)
    assert not (tmp_path / "w" / "1").exists()
    same(tensors(tmp_path / "w" / "2"), tensors(tmp_path / "x" / "2"))
    assert json.loads((tmp_path / "w" / "2" / "manifest.json").read_text())["digest"] == fresh.digest


def test_the_same_weights_again_are_the_same_version_and_others_are_refused(model, tmp_path):
    ours = publisher(model, tmp_path / "w")
    version = ours.publish(1, params_of(model))
    assert ours.publish(1, params_of(model)) == version
    assert ours.stats.versions == 1
    with pytest.raises(CheckpointError, match="version 1 was published with another"):
        ours.publish(1, params_of(model, seed=1))


def test_old_versions_go_but_not_one_that_is_being_read(model, tmp_path):
    ours = publisher(model, tmp_path / "w", keep=2)
    ours.publish(1, params_of(model, 1))
    with open(tmp_path / "w" / "1" / "manifest.json", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        for number in (2, 3):
            ours.publish(number, params_of(model, number))
        assert numbers(tmp_path / "w") == [1, 2, 3]
    ours.publish(4, params_of(model, 4))
    assert numbers(tmp_path / "w") == [3, 4]


def test_the_files_of_a_version_that_went_are_written_over_unless_others_share_them(make_model, tmp_path):
    model = make_model(llama(vocab_size=128))
    params = params_of(model)
    ours = publisher(model, tmp_path / "w", dtype="float32", keep=2)
    expected = {}
    for number in range(1, 8):
        part = (
            {**params, "embed": params["embed"] + number}
            if number % 3
            else jax.tree.map(lambda x, n=number: x + n, params)
        )
        ours.publish(number, part)
        expected[number] = tensors(tmp_path / "w" / str(number))
        fresh = publisher(model, tmp_path / "x" / str(number), dtype="float32").publish(number, part)
        same(expected[number], tensors(tmp_path / "x" / str(number) / str(number)))
        assert json.loads((tmp_path / "w" / str(number) / "manifest.json").read_text())["digest"] == fresh.digest
        for kept in numbers(tmp_path / "w"):
            same(tensors(tmp_path / "w" / str(kept)), expected[kept])
    assert (tmp_path / "w" / "tmp-spare").exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped byte": lambda f: flip(f / "state" / "model.embed_tokens.weight" / "0.0"),
    "truncated chunk": lambda f: os.truncate(f / "state" / "model.layers.0.self_attn.q_proj.weight" / "1.0", 5),
    "missing chunk": lambda f: (f / "state" / "lm_head.weight" / "0.0").unlink(),
    "no marker": lambda f: (f / "COMMITTED").unlink(),
    "damaged manifest": lambda f: (f / "manifest.json").write_text("{"),
    "everything": shutil.rmtree,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_repaired(model, tmp_path, kind):
    ours = publisher(model, tmp_path / "w")
    version = ours.publish(1, params_of(model))
    before = tensors(tmp_path / "w" / "1")
    DAMAGE[kind](tmp_path / "w" / "1")
    with pytest.raises(CheckpointError):
        tensors(tmp_path / "w" / "1")
    assert ours.repair(version) != []
    same(tensors(tmp_path / "w" / "1"), before)
    assert ours.repair(version) == []


def test_a_damaged_chunk_is_not_linked_into_the_next_version_unnoticed(make_model, tmp_path):
    model = make_model(llama(vocab_size=128))
    params = params_of(model)
    ours = publisher(model, tmp_path / "w", dtype="float32")
    ours.publish(1, params)
    flip(tmp_path / "w" / "1" / "state" / "model.norm.weight" / "0")
    version = ours.publish(2, {**params, "embed": params["embed"] + 1})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        tensors(tmp_path / "w" / "2")
    assert ours.repair(version) == ["model.norm.weight part 0"]
    tensors(tmp_path / "w" / "2")


def test_a_full_disk_is_waited_for_then_named(model, tmp_path, monkeypatch):
    ours = publisher(model, tmp_path / "w", deadline_s=60.0)
    real, calls = Publisher._write_chunk, []

    def full(self, *words):
        calls.append(1)
        if len(calls) < limit:
            raise OSError(28, "No space left on device")
        return real(self, *words)

    monkeypatch.setattr(Publisher, "_write_chunk", full)
    limit = 3
    version = ours.publish(1, params_of(model))
    assert hashlib.sha256(b"").hexdigest() != version.digest
    tensors(tmp_path / "w" / "1")
    limit = 10**9
    monkeypatch.setattr(ours, "_deadline_s", 1.0)
    with pytest.raises(CheckpointError, match=r"could not be published for .* No space left"):
        ours.publish(2, params_of(model, 2))
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["1"]


def test_what_an_earlier_process_published_is_cleared(model, tmp_path):
    publisher(model, tmp_path / "w").publish(7, params_of(model))
    (tmp_path / "w" / "tmp-8").mkdir()
    ours = publisher(model, tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []
    ours.publish(4, params_of(model, 1))

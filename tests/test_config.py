"""Configs and the command line."""

import dataclasses
import json

import pytest

from lnjax.config import (
    check_run_dir,
    config_hash,
    config_names,
    flat,
    load_config,
    parse,
    read_config,
    save_config,
    to_dict,
    validate,
)
from lnjax.errors import ConfigError
from lnjax.models.family import family
from lnjax.recipe import RecipeConfig, check_recipe


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_loads_and_validates(name):
    config = read_config(name)
    check_recipe(config) if isinstance(config, RecipeConfig) else validate(config)
    assert config.name == name


PUBLISHED = {
    "nano4b_sft": "nano4b",
    "nano4b_grpo": "nano4b",
    "nano8b_sft": "nano8b",
    "nano8b_grpo": "nano8b",
    "super49b_sft": "super49b",
    "super49b_grpo": "super49b",
    "ultra_sft": "ultra253b",
    "ultra_grpo": "ultra253b",
}


@pytest.mark.parametrize(("name", "model"), PUBLISHED.items())
def test_every_model_of_the_family_has_configs_with_its_own_blocks(name, model):
    config = load_config(name)
    assert config.model.spec == family(model)
    shards = config.mesh.data * config.mesh.fsdp
    for stage in filter(None, (config.sft, config.grpo)):
        assert stage.pack.microbatch_rows % shards == 0, "every shard of the batch needs a row"


def test_the_published_run_is_1152_rollouts_in_two_global_batches_of_576():
    config = load_config("ultra_grpo")
    g, e = config.grpo, config.engine
    assert g.prompts_per_step * g.samples_per_prompt == 1152 == g.updates_per_step * 576
    assert (g.sampling.temperature, g.sampling.top_p, g.max_staleness) == (1.0, 1.0, 0)
    assert g.prompts.max_prompt_tokens + g.sampling.max_new_tokens == e.max_len == g.pack.row_tokens == 16_384
    assert config.mesh.fsdp * config.mesh.tensor == 64 * 8
    assert (e.num_servers * e.tensor_parallel, e.num_servers * e.max_sequences, e.quantization) == (64, 1152, "fp8")
    assert 64 * 8 + 64 == 576


def test_the_published_fine_tuning_has_its_rows_batches_and_rates():
    found = {}
    for name in ("nano8b_sft", "super49b_sft", "ultra_sft"):
        s = load_config(name).sft
        o = s.optimizer
        found[name] = (s.pack.row_tokens, s.batch_rows, o.learning_rate, o.schedule, o.warmup_steps * 10 == s.steps)
    assert found == {
        "nano8b_sft": (32 * 1024, 256, 1e-4, "cosine", True),
        "super49b_sft": (16 * 1024, 256, 5e-6, "constant", False),
        "ultra_sft": (24 * 1024, 256, 1e-5, "cosine", True),
    }


def test_overrides_are_typed_and_reach_their_leaf():
    job = parse(
        [
            "--config",
            "tiny_grpo",
            "--grpo.steps",
            "3",
            "--grpo.loss.kl-estimator",
            "k1",
            "--checkpoint.export_hf=False",
            "--grpo.pack.share-prompts",
            "false",
        ]
    )
    assert job.config.grpo.pack.share_prompts is False
    assert job.config.grpo.steps == 3
    assert job.config.grpo.loss.kl_estimator == "k1"
    assert job.config.checkpoint.export_hf is False
    assert str(job.run_dir) == "runs/tiny_grpo"
    assert job.config.sft == load_config("tiny_grpo").sft


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "tiny_grp"], "no config 'tiny_grp', did you mean tiny_grpo?"),
        (["--grpo.steps", "3"], "--config is missing"),
        (["--config", "tiny_grpo", "--grpo.stepz", "3"], "unknown key --grpo.stepz, did you mean grpo.steps?"),
        (["--config", "tiny_sft", "--grpo.steps", "3"], "tiny_sft has no grpo stage"),
        (["--config", "tiny_grpo", "--grpo.steps", "abc"], "--grpo.steps abc: expected int, got 'abc'"),
        (["--config", "tiny_grpo", "--grpo.loss.kl_estimator", "k9"], "expected Literal['k1', 'k2', 'k3'], got 'k9'"),
        (["--config", "tiny_grpo", "--grpo.steps"], "--grpo.steps needs a value"),
        (["--config", "tiny_grpo", "--grpo.steps", "0"], "grpo.steps=0 must be positive"),
        (["--config", "tiny_grpo", "--grpo.updates_per_step", "3"], "grpo.updates_per_step=3 does not divide"),
        (["--config", "tiny_grpo", "--grpo.samples_per_prompt", "1"], "at least 2"),
        (["--config", "tiny_grpo", "--engine.max_len", "40"], "engine.max_len is 40"),
        (["--config", "tiny_grpo", "--grpo.pack.row_tokens", "50"], "grpo.pack.row_tokens is 50"),
        (["--config", "tiny_grpo", "--grpo.sampling.top_p", "0.9"], "grpo.sampling.top_p must be 1"),
        (
            ["--config", "tiny_sft", "--sft.batch_rows", "9"],
            "sft.pack.microbatch_rows=8 does not divide sft.batch_rows=9",
        ),
    ],
)
def test_a_wrong_command_line_names_the_key(words, message):
    with pytest.raises(ConfigError) as error:
        parse(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_hash_changes_with_any_value_and_only_then():
    config = load_config("tiny_grpo")
    assert config_hash(config) == config_hash(load_config("tiny_grpo"))
    assert config_hash(config) != config_hash(dataclasses.replace(config, seed=1))
    assert len(config_hash(config)) == 12


def test_a_run_folder_of_another_config_is_refused_and_says_what_differs(tmp_path):
    config = load_config("tiny_grpo")
    save_config(config, tmp_path)
    check_run_dir(config, tmp_path)
    longer = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, steps=99))
    check_run_dir(longer, tmp_path)  # more steps go on
    with pytest.raises(ConfigError, match="seed was 0, is 7"):
        check_run_dir(dataclasses.replace(longer, seed=7), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hash"] == config_hash(config)


@pytest.mark.parametrize("name", ["tiny_grpo", "ultra_grpo"])
def test_every_knob_is_documented_in_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        parse(["--config", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    values = flat(to_dict(load_config(name)))
    keys = [k for k, v in values.items() if not k.startswith("model.spec") and v is not None]
    missing = [k for k in keys if "--" + k.replace("_", "-") not in text]
    assert missing == []

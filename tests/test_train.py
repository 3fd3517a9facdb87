"""Whole runs through the front door: what they write, twice the same, resumed, on eight devices, and on bad input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lnjax.checkpoint.store import Checkpoints
from lnjax.launch import main

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "lnjax.launch"]


def environment(devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run(*words, devices=1):
    done = subprocess.run(
        [*LAUNCH, *map(str, words)], cwd=ROOT, env=environment(devices), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def metrics_with_times(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder):
    """Lines without their times."""
    return [{k: v for k, v in line.items() if k != "time"} for line in metrics_with_times(folder)]


def rollouts(folder):
    return (folder / "rollouts.jsonl").read_text().splitlines()


def test_the_rollouts_of_a_run_are_recorded_with_the_weights_that_made_them(finished):
    groups = [json.loads(x) for x in rollouts(finished)]
    assert [g["step"] for g in groups] == [s for s in range(1, 11) for _ in range(2)]
    for g in groups:
        assert (g["num_groups"], g["num_rollouts"], len(g["rollouts"])) == (8, 4, 4)
        for x in g["rollouts"]:
            assert x["versions"] == [[8 + 2 * g["step"], x["tokens"]]]
            assert len(x["texts"]) == len(x["logprobs"]) == x["tokens"]
    assert any(x["advantage"] > 0 for g in groups for x in g["rollouts"])


def final_arrays(folder):
    """Every array of the last checkpoint, as bytes."""
    store = Checkpoints(folder / "checkpoints", keep=9)
    number = store.latest()
    assert number is not None
    import jax

    manifest = json.loads((folder / "checkpoints" / str(number) / "manifest.json").read_text())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(e["shape"]), e["dtype"], sharding=place)
        for name, e in manifest["arrays"].items()
    }
    return {k: np.asarray(v).tobytes() for k, v in store.restore(number, wanted).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run("--config", "tiny_grpo", "--run-dir", folder)
    return folder


def test_a_run_writes_what_a_person_looks_for(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["eval"]) == {"init", "sft", "grpo"}
    assert summary["config_hash"] == json.loads((finished / "config.json").read_text())["hash"]
    assert {"sft.update", "grpo.sample", "grpo.score", "grpo.update", "grpo.publish", "eval.evaluate"} <= set(
        summary["seconds"]
    )
    assert summary["tokens"]["grpo.sample_tokens"] > 1000
    assert summary["peak_memory_bytes"]["host"] > 1e8
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "report.html").read_text().startswith("<!doctype html>")
    assert any((finished / "tb").iterdir())
    assert {p.name for p in (finished / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    lines = metrics(finished)
    assert [(x["stage"], x["step"]) for x in lines] == [
        ("eval", 0),
        *(("sft", i) for i in range(1, 11)),
        ("eval", 10),
        *(("grpo", i) for i in range(1, 11)),
        ("eval", 30),
    ]
    first = lines[12]
    assert first["sampler_kl"] < 1e-8
    assert first["prob_error"] <= 1.0001
    assert [x["version"] for x in lines if x["stage"] == "grpo"] == list(range(10, 30, 2))


def test_sft_lowers_the_loss(finished):
    losses = [x["loss"] for x in metrics(finished) if x["stage"] == "sft"]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.slow
def test_the_same_command_gives_the_same_metrics_but_for_times(finished, tmp_path):
    run("--config", "tiny_grpo", "--run-dir", tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(finished)
    assert final_arrays(tmp_path / "again") == final_arrays(finished)
    assert rollouts(tmp_path / "again") == rollouts(finished)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--mesh.fsdp", "4", "--mesh.tensor", "2"), ("--mesh.fsdp", "8")], ids=["4x2", "8"])
def test_eight_devices_give_the_same_losses(finished, tmp_path, mesh):
    run("--config", "tiny_grpo", "--run-dir", tmp_path / "many", *mesh, devices=8)
    alone, many = metrics(finished), metrics(tmp_path / "many")
    for a, b in zip(alone, many, strict=True):
        for key in ("loss", "reward", "completion_tokens_mean"):
            if key in a:
                assert abs(a[key] - b[key]) <= 1e-5, (a["stage"], a["step"], key)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(finished, tmp_path):
    rng = np.random.default_rng(0)
    folders = [tmp_path / "killed-0"]
    kills = 0
    while kills < 10:
        folder = folders[-1]
        command = [*LAUNCH, "--config", "tiny_grpo", "--run-dir", str(folder)]
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Wait until it writes metrics, then strike within the next seconds: in a rollout, an update or a save.
        before = (folder / "metrics.jsonl").stat().st_mtime_ns if (folder / "metrics.jsonl").exists() else 0
        while child.poll() is None:
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 4.0)))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        else:  # it finished first: the next one gets the rest
            folders.append(tmp_path / f"killed-{len(folders)}")
        child.wait()
    for folder in folders:
        run("--config", "tiny_grpo", "--run-dir", folder)
        assert metrics(folder) == metrics(finished)
        assert final_arrays(folder) == final_arrays(finished)
        assert rollouts(folder) == rollouts(finished)
        ours, whole = (json.loads((f / "summary.json").read_text()) for f in (folder, finished))
        assert ours["eval"] == whole["eval"]


@pytest.mark.slow
def test_more_steps_go_on_where_the_run_ended(finished, tmp_path):
    import shutil

    folder = tmp_path / "longer"
    shutil.copytree(finished, folder)
    done = run("--config", "tiny_grpo", "--run-dir", folder, "--grpo.steps", "12")
    assert "resuming" in done.stdout
    lines = metrics(folder)
    assert [x["step"] for x in lines if x["stage"] == "grpo"] == list(range(1, 13))
    assert lines[:22] == metrics(finished)[:22]
    assert rollouts(folder)[:20] == rollouts(finished)
    assert len(rollouts(folder)) == 24


@pytest.mark.slow
def test_the_next_start_of_a_run_compiles_nothing_that_the_first_did(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    words = ["--config", "tiny_sft", "--run-dir", tmp_path / "r", "--sft.optimizer.schedule", "constant"]
    run(*words, "--sft.steps", "4", "--checkpoint.every", "4")
    assert {p.name.split("-")[0] for p in (tmp_path / "r" / "compiled").iterdir()} >= {
        "jit__gradient",
        "jit__apply_gradient",
    }
    said = run(*words, "--sft.steps", "8", "--checkpoint.every", "4").stderr
    for name in ("jit__gradient", "jit__apply_gradient"):
        assert f"compilation cache hit for '{name}'" in said
    run(*words, "--sft.steps", "8", "--run-dir", tmp_path / "fresh")
    assert metrics(tmp_path / "r")[-1] == metrics(tmp_path / "fresh")[-1]


@pytest.mark.slow
def test_the_trained_weights_start_another_run(finished, tmp_path):
    for source in (finished, finished / "hf"):
        words = [
            "--config",
            "tiny_sft",
            "--run-dir",
            tmp_path / source.name,
            "--model.source",
            source,
            "--model.tokenizer",
        ]
        out = run(*words, "same", "--sft.steps", "2").stdout
        assert "sft 2/2" in out
    untrained = next(x["loss"] for x in metrics(finished) if x["stage"] == "sft")
    first = [metrics(tmp_path / s.name)[0]["loss"] for s in (finished, finished / "hf")]
    assert max(first) < untrained - 1.0
    assert abs(first[0] - first[1]) < 0.05  # hf/ is bfloat16


# Bad input: each one line on stderr, exit status 2, nothing changed.


def snapshot(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def fails(capfd, *words):
    status = main([str(w) for w in words])
    err = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(err) == 1, err
    assert err[0].startswith("error: ")
    return err[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grpo.step", "3"], "unknown key --grpo.step, did you mean grpo.steps?"),
        (["--seed", "x"], "--seed x: expected int, got 'x'"),
        (["--model.source", "nowhere"], "nowhere: no such folder or file"),
        (["--mesh.tensor", "3"], "does not make 8 devices"),
        (["--grpo.prompts.max_prompt_tokens", "10"], "prompts.max_prompt_tokens is 10"),
        (["--sft.pack.row_tokens", "30"], "a packed row holds 30"),
        (["--sft.data.source", "rows.jsonl"], "rows.jsonl: no such file"),
    ],
)
def test_a_bad_command_line_is_one_line(capfd, tmp_path, words, message):
    assert message in fails(capfd, "--config", "tiny_grpo", "--run-dir", tmp_path / "r", "--dry-run", *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_job_that_cannot_run_here_says_what_it_needs_and_three_ways_on(capfd, tmp_path, dry):
    line = fails(capfd, "--config", "ultra_grpo", "--run-dir", tmp_path / "r", *dry)
    assert "needs 512 devices" in line and "fsdp=64" in line and "tensor=8" in line
    assert "64 GPUs for its servers" in line and "5,068.0 GB" in line and "here are 8 (cpu)" in line
    for way in ("lnjax.plan --config ultra_grpo", "--proxy", "--slurm nodes=64 rollout_nodes=8"):
        assert way in line
    assert not (tmp_path / "r").exists()


def test_a_train_state_larger_than_the_memory_is_refused_before_it_is_made(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("lnjax.fit._memory", lambda: 640 * 10**9)
    line = fails(
        capfd, "--config", "super49b_sft", "--run-dir", tmp_path / "r", "--mesh.fsdp", "4", "--mesh.tensor", "2"
    )
    assert "needs 8 devices" in line and "797.9 GB" in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ('{"input": [{"role": "robot", "content": "1"}], "output": "2"}', "unknown role 'robot'"),
        ('{"input": [{"role": "user", "content": "1"}], "output": ""}', "empty loss mask"),
    ],
)
def test_a_bad_row_is_one_line_with_file_and_number(capfd, tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": [{"role": "user", "content": "1"}], "output": "2"}\n' + row + "\n")
    line = fails(capfd, "--config", "tiny_sft", "--run-dir", tmp_path / "r", "--sft.data.source", file, "--dry-run")
    assert f"{file}:2: " in line
    assert message in line


@pytest.fixture
def damaged(finished, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    return folder, max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_stops_the_resume_and_leaves_the_folder_as_it_is(capfd, damaged, kind):
    folder, file = damaged
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    else:
        data[100] ^= 1
        file.write_bytes(bytes(data if kind == "flipped" else data[:100]))
    before = snapshot(folder)
    words = ["--config", "tiny_grpo", "--run-dir", folder, "--grpo.steps", "12"]
    assert str(file) in fails(capfd, *words)
    assert snapshot(folder) == before


def test_another_config_does_not_touch_the_folder(capfd, damaged):
    folder, _ = damaged
    before = snapshot(folder)
    assert "seed was 0, is 1" in fails(capfd, "--config", "tiny_grpo", "--run-dir", folder, "--seed", "1")
    assert snapshot(folder) == before


def test_a_dry_run_checks_everything_and_writes_nothing(capfd, tmp_path):
    assert main(["--config", "tiny_grpo", "--run-dir", str(tmp_path / "r"), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "28,832 parameters" in out
    assert "passes the linter" in out
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_two_hundred_steps_of_mixed_lengths_compile_nothing_after_the_first(tmp_path):
    run(*("--config", "tiny_grpo", "--run-dir", tmp_path / "r", "--grpo.steps", 200, "--sft.steps", 200))
    lines = metrics_with_times(tmp_path / "r")
    for stage in ("sft", "grpo"):
        compiled = [x["time"]["compiled"] for x in lines if x["stage"] == stage]
        assert len(compiled) == 200
        assert compiled[0] > 0  # it counts
        assert sum(compiled[5:]) == 0, compiled

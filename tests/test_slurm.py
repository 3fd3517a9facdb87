"""The project's own SLURM script on a real SLURM: two processes, and every way in which one of them can go away."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.cluster import Cluster, missing
from tests.test_train import ROOT, environment, final_arrays, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WELL_CONDITIONED = ["--sft.optimizer.eps", "1e-3"]
"""Adam with the usual 1e-8 turns the rounding noise of gradients that are nearly zero into whole steps."""
HEARTBEAT_S = 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = 16_000 + probe.getsockname()[1] % 3_000
    found = None
    try:
        found = Cluster(tmp_path_factory.mktemp("slurm"), port=port)
        yield found
    finally:
        if found:
            found.close()


def submit(cluster, folder, *words):
    """The job's number. Each process gets two virtual devices."""
    command = [
        sys.executable,
        "-m",
        "lnjax.launch",
        "--run-dir",
        folder,
        "--slurm",
        "nodes=2",
        "gpus_per_node=0",
        *words,
    ]
    out = cluster(*command, XLA_FLAGS=environment(2)["XLA_FLAGS"], JAX_PLATFORMS="cpu", PWD=str(ROOT))
    return out.split("as job ")[1].split(";")[0]


def alone(folder, *words):
    command = [sys.executable, "-m", "lnjax.launch", "--run-dir", str(folder), *words]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)


def assert_same_parameters(one, other):
    ours, theirs = final_arrays(one), final_arrays(other)
    assert ours.keys() == theirs.keys()
    for name in (n for n in ours if "/params/" in n):
        a, b = (np.frombuffer(x[name], np.float32) for x in (ours, theirs))
        assert np.abs(a - b).max() <= 1e-6, name


def logs(folder):
    return {p.name: p.read_text() for p in sorted((folder / "logs").iterdir())}


@pytest.mark.parametrize("config", ["tiny_sft", "tiny_grpo"])
def test_two_processes_under_slurm_end_with_the_parameters_of_one(cluster, tmp_path, config):
    words = ["--config", config, *WELL_CONDITIONED]
    words += ["--grpo.optimizer.eps", "1e-3", "--grpo.steps", "4"] if config == "tiny_grpo" else []
    number = submit(cluster, tmp_path / "two", *words)
    alone(tmp_path / "one", *words)
    assert cluster.wait_for_end(number, seconds=600) == "COMPLETED", logs(tmp_path / "two")
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert [(x["stage"], x["step"]) for x in ours] == [(x["stage"], x["step"]) for x in theirs]
    assert_same_parameters(tmp_path / "two", tmp_path / "one")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert {f"{number}.0.log", f"{number}.1.log"} <= logs(tmp_path / "two").keys()


def test_an_error_of_the_user_ends_the_job_without_another_try(cluster, tmp_path):
    number = submit(cluster, tmp_path / "run", "--config", "tiny_sft", "--mesh.fsdp", "3")
    assert cluster.wait_for_end(number, seconds=300) == "FAILED"
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert "does not make 4 devices" in logs(tmp_path / "run")[f"{number}.0.log"]
    assert (tmp_path / "run" / "logs" / f"{number}.ends").read_text().endswith("status 2\n")

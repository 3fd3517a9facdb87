"""The project's own SLURM script on a real SLURM: two processes, and every way in which one of them can go away."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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


class Run:
    """A job under test: where it is, and the processes behind its ranks."""

    def __init__(self, cluster, folder, *words):
        self.cluster, self.folder, self.mine = cluster, folder, str(folder).encode()
        self.number = submit(cluster, folder, *words)

    def steps(self):
        path = self.folder / "metrics.jsonl"
        return (
            [json.loads(x)["step"] for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
        )

    def wait_for_step(self, step):
        def there():
            job = self.cluster.job(self.number)
            if job["JobState"] == "PENDING":
                self.cluster.let_go(job)
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), (job, logs(self.folder))
            return job["JobState"] == "RUNNING" and self.alive() and max(self.steps(), default=0) >= step

        self.cluster.wait(there, seconds=600, what=f"step {step}")

    def pid(self, rank):
        """Of the process that is this rank in the job's present start."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = path.read_bytes().split(b"\0")
                command = (path.parent / "cmdline").read_bytes()
            except OSError:
                continue
            wanted = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode(), b"SLURM_STEP_ID=0"}
            if wanted <= set(words) and b"lnjax.launch" in command and self.mine in command and b"srun" not in command:
                return int(path.parent.name)
        return None

    def alive(self):
        return self.pid(0) is not None and self.pid(1) is not None

    def ends(self):
        """Exit status of each start so far that the job's script saw."""
        path = self.folder / "logs" / f"{self.number}.ends"
        return [int(x.split()[-1]) for x in path.read_text().splitlines()] if path.exists() else []


def test_a_job_survives_requeue_kill_freeze_and_notice_and_loses_no_step(cluster, tmp_path):
    steps = 400
    words = ["--config", "tiny_sft", "--sft.steps", str(steps), "--checkpoint.every", "25", *WELL_CONDITIONED]
    words += ["--cluster.heartbeat-s", str(HEARTBEAT_S)]
    undisturbed = submit(cluster, tmp_path / "undisturbed", *words)
    assert cluster.wait_for_end(undisturbed, seconds=600) == "COMPLETED", logs(tmp_path / "undisturbed")
    run = Run(cluster, tmp_path / "run", *words)

    run.wait_for_step(30)
    cluster("scontrol", "requeue", run.number)

    run.wait_for_step(60)
    os.kill(run.pid(1), signal.SIGKILL)
    cluster.wait(lambda: not run.alive(), seconds=60, what="end of the survivor")

    run.wait_for_step(110)
    frozen, log = run.pid(1), tmp_path / "run" / "logs" / f"{run.number}.0.log"
    os.kill(frozen, signal.SIGSTOP)
    start = time.monotonic()
    cluster.wait(
        lambda: "rank 1 has given no sign of life" in log.read_text(), seconds=60, what="name of the stuck rank"
    )
    assert time.monotonic() - start <= 2 * HEARTBEAT_S
    assert "Current thread" in (tmp_path / "run" / "alive" / "0.stacks").read_text()
    cluster.wait(lambda: run.pid(1) != frozen, seconds=90, what="end of the frozen rank")

    run.wait_for_step(160)
    cluster("scancel", "--batch", "--signal=USR1", run.number)  # as --signal=B:USR1@60 does before the time limit
    cluster.wait(lambda: 75 in run.ends(), seconds=90, what="agreed stop")

    assert cluster.wait_for_end(run.number, seconds=600) == "COMPLETED", logs(tmp_path / "run")
    assert run.steps() == list(range(1, steps + 1))
    assert int(cluster.job(run.number)["Restarts"]) >= 4  # more where the machine is so busy that a process seems dead
    assert metrics(tmp_path / "run") == metrics(tmp_path / "undisturbed")
    assert final_arrays(tmp_path / "run") == final_arrays(tmp_path / "undisturbed")


def test_an_error_of_the_user_ends_the_job_without_another_try(cluster, tmp_path):
    number = submit(cluster, tmp_path / "run", "--config", "tiny_sft", "--mesh.fsdp", "3")
    assert cluster.wait_for_end(number, seconds=300) == "FAILED"
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert "does not make 4 devices" in logs(tmp_path / "run")[f"{number}.0.log"]
    assert (tmp_path / "run" / "logs" / f"{number}.ends").read_text().endswith("status 2\n")

"""Processes that find each other, flags, the SLURM script, and who is named when a run stands still."""

import os
import signal
import subprocess
import sys

import pytest

from lnjax.alive import STUCK, Beat, Notice, Watch
from lnjax.config import parse
from lnjax.distributed import Place, find_place, first_host, port_of
from lnjax.errors import ConfigError
from lnjax.flags import XLA_FLAGS, Flag, as_text, jaxlib_version, known, meant_for
from lnjax.launch import main
from lnjax.schema import ClusterConfig
from lnjax.slurm import parse_options, render

STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu-[07-08]",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_GPUS_ON_NODE": "8",
}

# Who am I.


def test_without_variables_a_run_is_one_process():
    assert find_place({}) == Place()
    assert find_place({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Place()


def test_a_slurm_step_gives_rank_coordinator_and_a_share_of_the_gpus():
    place = find_place(STEP)
    assert (place.rank, place.count, place.coordinator) == (3, 4, "gpu-07:20112")
    assert place.local_devices == (4, 5, 6, 7)
    assert find_place({**STEP, "SLURM_NTASKS_PER_NODE": "1"}).local_devices is None  # all eight
    assert find_place({**STEP, "JAX_LOCAL_DEVICE_IDS": "0"}).local_devices is None  # JAX reads it itself
    assert find_place({**STEP, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:9"}).coordinator == "10.0.0.1:9"
    assert find_place({**STEP, "SLURM_RESTART_COUNT": "1"}).attempt != place.attempt


def test_explicit_variables_go_before_slurms():
    explicit = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_place({**STEP, **explicit}) == Place("h:1", 1, 2, None, "h:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"SLURM_PROCID": "4"}, "process 4 of 4"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x': expected a whole number"),
        ({"SLURM_GPUS_ON_NODE": "7"}, "7 GPUs do not divide over 2 processes"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "expected host:port"),
    ],
)
def test_variables_that_cannot_be_are_one_line(change, message):
    with pytest.raises(ConfigError, match=message):
        find_place({**STEP, **change})


def test_the_first_host_of_a_list():
    names = {"n[0-1]": "n0", "gpu-[007-009,12],head": "gpu-007", "a,b": "a", "one": "one", "r[1-2]n[03-04]": "r1n03"}
    assert {k: first_host(k) for k in names} == names


def test_two_starts_of_a_job_use_two_ports_below_the_ephemeral_ones():
    assert port_of(7, 0) != port_of(7, 1) != port_of(8, 0)
    assert all(20_000 <= port_of(job, 0) < 32_000 for job in (1, 749, 750, 10**7))


# Flags.


def test_the_table_is_filtered_by_version_and_platform():
    table = (
        Flag("old", "1", "", before=(0, 12)),
        Flag("new", "2", "", since=(0, 12)),
        Flag("host", "3", "", platform="cpu"),
    )
    assert meant_for(table, platform="gpu", jaxlib=(0, 11, 9)) == {"old": "1"}
    assert meant_for(table, platform="gpu", jaxlib=(0, 12)) == {"new": "2"}
    assert meant_for(table, platform="cpu", jaxlib=(0, 12)) == {"host": "3"}


def test_this_jaxlib_takes_every_flag_meant_for_it_and_one_it_does_not_know_is_left_out():
    flags = meant_for(XLA_FLAGS, platform="gpu", jaxlib=jaxlib_version())
    assert known({"xla_no_such_flag": "1", **flags, "xla_nor_this": "2"}) == flags
    assert as_text({"a": "1", "b": "x"}) == "--a=1 --b=x"


# The script.


def script(*words, config="tiny_sft", options="nodes=2 gpus_per_node=0"):
    job = parse(["--config", config, "--run-dir", "/runs/x", *words])
    return render(job, parse_options(options.split()), flags={"a": "1"}, environment={"B": "c d"}).splitlines()


def test_the_script_asks_slurm_for_what_was_said():
    lines = script(
        "--sft.steps", "12", options="nodes=2 gpus_per_node=8 partition=p account=a time=1-00:00:00 lead_s=90"
    )
    asked = [x for x in lines if x.startswith("#SBATCH") and "chdir" not in x]
    assert asked == [
        "#SBATCH --job-name=tiny_sft",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --exclusive",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=p",
        "#SBATCH --account=a",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --output=/runs/x/logs/%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@90",
    ]
    assert "export B='c d'" in lines
    assert 'export XLA_FLAGS="--a=1 ${XLA_FLAGS:-}"' in lines
    [learner] = [x for x in lines if "-m lnjax.launch --config" in x]
    assert learner.endswith("-m lnjax.launch --config tiny_sft --run-dir /runs/x --sft.steps 12 &")
    assert not [x for x in lines if "container" in x or "rollout" in x]


def test_rollout_nodes_get_servers_and_the_learner_their_addresses():
    text = "\n".join(
        script(config="tiny_grpo_vllm", options="nodes=2 rollout_nodes=3 gpus_per_node=4 container=i.sqsh")
    )
    assert "#SBATCH --nodes=5" in text
    assert "--nodes=2 --ntasks=2 --relative=0" in text
    assert "--nodes=3 --ntasks-per-node=4 --relative=2" in text
    assert "python -m lnjax.serve --config tiny_grpo_vllm --engine.publish-dir /runs/x/weights --engine.host" in text
    assert "--engine.num-servers 0 --engine.publish-dir /runs/x/weights --engine.addresses $LNJAX_ROLLOUT_ADDR" in text
    assert text.count("--container-image=i.sqsh") == 2
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--slurm needs nodes=N"),
        ("node=2", "unknown key in --slurm 'node=2', did you mean nodes?"),
        ("nodes", "--slurm 'nodes': expected key=value"),
        ("nodes=two", "--slurm nodes=two: expected a whole number"),
        ("nodes=0", "--slurm nodes=0: must be at least 1"),
        ("nodes=1 gpus_per_node=8 processes_per_node=3", "processes_per_node=3 does not divide gpus_per_node=8"),
        ("nodes=1 time=soon", "--slurm time=soon: expected D-HH:MM:SS"),
        ("nodes=1 rollout_nodes=1", "tiny_sft samples in the learner"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, options, message):
    assert main(["--config", "tiny_sft", "--slurm", *options.split(), "--print"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


# Who is stuck.


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def watch(rank=0, count=2, **deadlines):
    clock = Clock()
    c = ClusterConfig(**{"start_deadline_s": 900.0, "heartbeat_s": 15.0, "step_deadline_s": 60.0} | deadlines)
    return Watch(Place("h:1", rank, count, None, "now"), c=c, clock=clock), clock


def beat(number, *, marks=5, phase="update", status=None, why="", attempt="now"):
    return Beat(attempt, number, "grpo step 7", phase, marks, status, why)


def test_a_frozen_process_is_named_once_its_signs_of_life_stop():
    w, clock = watch()
    for second in range(40):
        clock.now = 100.0 + second
        w.hear(0, beat(second))
        w.hear(1, beat(min(second, 10)))
        w.have_read()
        found = w.verdict()
        assert (found is None) == (second <= 25), second
        if found:
            expected = "rank 1 has given no sign of life for 16 s, in `update` of grpo step 7; deadline 15 s"
            assert found == (STUCK, expected)
            break


def test_the_process_that_keeps_the_others_waiting_is_named_not_those_who_wait():
    w, clock = watch(count=3)
    for second in range(65):
        clock.now = 100.0 + second
        w.hear(0, beat(second, marks=9 if second > 1 else 8))
        w.hear(1, beat(second, marks=7, phase="sample"))
        w.hear(2, beat(second, marks=9 if second > 1 else 8))
        w.have_read()
        if second < 60:
            assert w.verdict() is None
    status, why = w.verdict()
    assert status == STUCK
    assert why == "rank 1 has been in `sample` of grpo step 7 for 64 s; deadline 60 s"


def pass_by(w, clock, *, seconds):
    """The first verdict of the next seconds."""
    for _ in range(seconds):
        clock.now += 1
        w.have_read()
        if found := w.verdict():
            return found
    return None


def test_a_process_that_was_frozen_itself_accuses_nobody_at_first():
    w, clock = watch()
    w.hear(1, beat(1))
    assert pass_by(w, clock, seconds=10) is None
    clock.now += 1000
    assert w.verdict() is None
    assert pass_by(w, clock, seconds=5) is None
    assert pass_by(w, clock, seconds=5)[1].startswith("rank 1 has given no sign of life for 16 s")


def test_signs_of_an_earlier_start_do_not_count_and_one_that_never_starts_is_named():
    w, clock = watch()
    w.hear(1, beat(3, attempt="before", status=1))
    assert pass_by(w, clock, seconds=900) is None
    assert pass_by(w, clock, seconds=1) == (STUCK, "rank 1 has not started within 900 s")


def test_all_end_with_the_status_of_the_one_that_failed_and_a_normal_end_alarms_nobody():
    w, clock = watch()
    w.hear(1, beat(3, status=2, why="error: no such file"))
    assert w.verdict() == (2, "rank 1 ended with status 2: error: no such file")
    w.hear(1, beat(4, status=75))
    assert pass_by(w, clock, seconds=50) is None


def test_process_0_watches_all_the_others_some():
    assert watch(rank=0, count=40)[0].watched() == list(range(1, 40))
    assert watch(rank=35, count=40)[0].watched() == [0, 1, 2, 3, 36, 37, 38, 39]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_alone_stops_at_the_end_of_the_step_in_which_it_was_asked(number):
    before, notice = signal.getsignal(number), Notice(Place())
    try:
        assert not notice.reached()
        os.kill(os.getpid(), number)
        assert notice.reached()
    finally:
        notice.close()
    assert signal.getsignal(number) == before


BLOCKED = """
import ctypes, sys, time
from pathlib import Path
from lnjax.alive import Watchdog
from lnjax.distributed import Place
from lnjax.schema import ClusterConfig
dog = Watchdog(Place(), run_dir=Path(sys.argv[1]), c=ClusterConfig(step_deadline_s=0.5))
dog.at("sft step 7")
with dog.phase("update"):
    getattr(ctypes, sys.argv[2])(None).sleep(60)
"""


@pytest.mark.parametrize(("library", "status"), [("CDLL", STUCK), ("PyDLL", 1)])
def test_a_process_blocked_in_native_code_ends_with_its_stacks_even_where_that_holds_pythons_lock(
    tmp_path, library, status
):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path), library], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == status, done.stderr
    assert 'File "<string>", line 10' in done.stderr
    if library == "CDLL":
        assert "rank 0 has been in `update` of sft step 7 for" in done.stderr

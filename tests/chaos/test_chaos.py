"""Asynchronous GRPO on two real servers while everything breaks: LNJAX_CHAOS_MINUTES=30 uv run pytest tests/chaos -n 0 -s

Every 20 seconds one fault, in random order without repetition until all were used. The run must end by itself, with every
prompt scored once, and every fault must be in faults.jsonl (or have been harmless, where that is what it should be).
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests import fleet

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("LNJAX_CHAOS_MINUTES", "3"))
EVERY_S = 20.0
STEPS_PER_MINUTE = 10
PROBE_S = 8.0
NOTICED_S = 90.0
PIDFD_OPEN, PIDFD_GETFD = 434, 438


class Chaos:
    """Breaks one thing at a time and waits until the run has noticed."""

    def __init__(self, run_dir: Path, learner: subprocess.Popen, *, seed: int):
        self.run_dir, self.learner, self.weights = run_dir, learner, run_dir / "weights"
        self.random = random.Random(seed)
        self.done: list[tuple[str, float]] = []
        """(fault, seconds until it was named)."""

    def lines(self):
        path = self.run_dir / "faults.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    def servers(self):
        """Process ids of every server, by server."""
        found = {}
        for pid in fleet.processes_of(self.weights):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                session = os.getsid(pid)
            except OSError:
                continue
            if session == os.getsid(self.learner.pid) or not words:
                continue  # the guard
            found.setdefault(session, []).append(pid)
        return list(found.values())

    def kill(self):
        self._signal_one(signal.SIGKILL)

    def kill_engine(self):
        pids = self.random.choice(self.servers() or [[]])
        named = [p for p in pids if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes()] or pids
        for pid in named[:1]:
            os.kill(pid, signal.SIGKILL)

    def stop(self):
        pids = self._signal_one(signal.SIGSTOP)
        threading.Timer(PROBE_S * 3, lambda: [_kill(p, signal.SIGCONT) for p in pids]).start()

    def _signal_one(self, signum):
        pids = self.random.choice(self.servers() or [[]])
        for pid in pids:
            _kill(pid, signum)
        return pids

    def flip(self):
        self._damage(lambda f: _flip(self._chunk(f)))

    def truncate(self):
        self._damage(lambda f: os.truncate(self._chunk(f), 3))

    def unmark(self):
        self._damage(lambda f: (f / "COMMITTED").unlink())

    def _chunk(self, folder):
        return self.random.choice(sorted(p for p in (folder / "state").glob("*/[0-9]*")))

    def _damage(self, action):
        """New versions as they appear, until a server refused one."""
        known, before, start = set(os.listdir(self.weights)), len(self._of("refused")), time.monotonic()
        while (
            time.monotonic() - start < NOTICED_S and len(self._of("refused")) == before and self.learner.poll() is None
        ):
            for name in sorted(set(os.listdir(self.weights)) - known):
                known.add(name)
                if name.isdigit():
                    try:
                        action(self.weights / name)
                    except OSError:
                        continue  # it is gone already
            time.sleep(0.0005)

    def _of(self, kind):
        return [x for x in self.lines() if x["kind"] == kind]

    def fill_disk(self):
        """Only where the weights lie on a small disk of their own."""
        ballast = self.weights / "ballast"
        with open(ballast, "wb") as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
                    file.flush()
            except OSError:
                pass  # full, as wanted
        time.sleep(6.0)
        ballast.unlink()

    def drop_connections(self):
        """Shut the learner's sockets under it."""
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = libc.syscall(PIDFD_OPEN, self.learner.pid, 0)
        for name in os.listdir(f"/proc/{self.learner.pid}/fd"):
            try:
                kind = os.readlink(f"/proc/{self.learner.pid}/fd/{name}")
            except OSError:
                continue
            fd = libc.syscall(PIDFD_GETFD, pidfd, int(name), 0) if kind.startswith("socket:") else -1
            if fd < 0:
                continue
            with socket.socket(fileno=fd) as sock:
                if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
                    with contextlib.suppress(OSError):  # it may be closed
                        sock.shutdown(socket.SHUT_RDWR)
        os.close(pidfd)


NAMED = {
    "kill": {"died", "connection", "status", "deadline"},
    "kill_engine": {"died", "connection", "status", "deadline"},
    "stop": {"deadline", "connection", "died"},
    "flip": {"refused"},
    "truncate": {"refused"},
    "unmark": {"refused"},
    "fill_disk": {"disk"},
    "drop_connections": {"connection"},
}
"""Fault -> the words one of which faults.jsonl has for it."""


def _kill(pid, signum):
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(pid, signum)


def _flip(path):
    with open(path, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 4 MB for the published weights, where this machine allows one."""
    folder = tmp_path / "run" / "weights"
    folder.mkdir(parents=True)
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode == 0
    )
    yield mounted
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.timeout(MINUTES * 60 * 4 + 900)
def test_nothing_is_lost_duplicated_or_accepted_unattested(tmp_path, small_disk):
    fleet.build_environment()
    run_dir, steps = tmp_path / "run", round(MINUTES * STEPS_PER_MINUTE)
    words = ["--grpo.steps", str(steps), "--engine.max-restarts", "10000", "--engine.probe-deadline-s", str(PROBE_S)]
    words += ["--engine.request-deadline-s", "60", "--engine.swap-deadline-s", "60"]
    command = [sys.executable, "-m", "lnjax.launch", "--config", "tiny_grpo_async", "--run-dir", str(run_dir), *words]
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    learner = subprocess.Popen(command, cwd=fleet.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    chaos = Chaos(run_dir, learner, seed=int(MINUTES))
    unnamed, bag = [], []
    try:
        fleet.wait_until(lambda: learner.poll() is not None or _lines(run_dir) >= 1, seconds=400, what="the first step")
        while learner.poll() is None:
            bag = bag or chaos.random.sample(sorted(NAMED), len(NAMED))
            kind = bag.pop()
            if kind == "fill_disk" and not small_disk:
                continue
            if kind in ("flip", "truncate", "unmark", "drop_connections") and not chaos.servers():
                continue
            start, before = time.monotonic(), len(chaos.lines())
            getattr(chaos, kind)()
            while learner.poll() is None and time.monotonic() - start < NOTICED_S:
                if any(x["kind"] in NAMED[kind] for x in chaos.lines()[before:]):
                    break
                time.sleep(0.1)
            named = any(x["kind"] in NAMED[kind] for x in chaos.lines()[before:])
            chaos.done.append((kind, time.monotonic() - start))
            if not named and learner.poll() is None:
                unnamed.append(kind)
            print(f"{kind}: {'named' if named else 'NOT NAMED'} after {time.monotonic() - start:.1f} s", flush=True)
            while learner.poll() is None and time.monotonic() - start < EVERY_S:
                time.sleep(0.1)
    finally:
        if learner.poll() is None:
            learner.kill()
        learner.wait()
        log.close()
        shutil.copy(tmp_path / "log", run_dir / "log")
    text = (tmp_path / "log").read_text()
    assert learner.returncode == 0, text[-3000:]
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, steps + 1))
    assert [x["prompts_taken"] for x in lines] == [8 * i for i in range(1, steps + 1)]
    assert {x["prompts"] for x in lines} == {8}
    assert max(x["staleness_max"] for x in lines) <= 2
    assert max(x["parity_prob_error"] for x in lines) <= 1.001
    assert unnamed == []
    assert len(chaos.done) >= MINUTES
    print(json.dumps(json.loads((run_dir / "summary.json").read_text())["fleet"]))
    fleet.wait_until(lambda: fleet.processes_of(run_dir / "weights") == [], seconds=30, what="servers end")


def _lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0

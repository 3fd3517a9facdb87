"""Asynchronous GRPO on two real servers while everything breaks: LNJAX_CHAOS_MINUTES=30 uv run pytest tests/chaos -n 0 -s

Every 20 seconds one fault, in random order without repetition until all were used. The run must end by itself, with every
prompt scored once, and every fault must be in faults.jsonl. Where it ends before the time is over, it goes on with more steps.
"""

import contextlib
import ctypes
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests import fleet

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("LNJAX_CHAOS_MINUTES", "3"))
EVERY_S = 20.0
SEGMENT_STEPS = 150
PROBE_S, SWAP_S, STOPPED_S = 8.0, 16.0, 40.0
"""Deadlines of a probe and a swap; a server stands still for longer than either."""
KEY = "of this test"
NOTICED_S = 90.0
PIDFD_OPEN, PIDFD_GETFD = 434, 438


class Chaos:
    """Breaks one thing at a time and waits until the run has noticed."""

    def __init__(self, run_dir: Path, learner: subprocess.Popen, *, seed: int):
        self.run_dir, self.learner, self.weights = run_dir, learner, run_dir / "weights"
        self.random = random.Random(seed)

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

    def serving(self):
        """Those that have weights of the run: nobody notices that one which starts was stopped."""
        found = []
        for pids in self.servers():
            ports = {port for pid in pids for port in _ports(pid)}
            if any(_has_weights(port) for port in ports):
                found.append(pids)
        return found

    def kill(self):
        self._signal_one(signal.SIGKILL)

    def kill_engine(self):
        pids = self.random.choice(self.serving() or [[]])
        for pid in ([p for p in pids if b"EngineCore" in _command_line(p)] or pids)[:1]:
            _kill(pid, signal.SIGKILL)

    def stop(self):
        pids = self._signal_one(signal.SIGSTOP)
        threading.Timer(STOPPED_S, lambda: [_kill(p, signal.SIGCONT) for p in pids]).start()

    def wait_for_server(self):
        fleet.wait_until(lambda: self.serving() or self.learner.poll() is not None, seconds=400, what="a server")

    def _signal_one(self, signum):
        pids = self.random.choice(self.serving() or [[]])
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
        """Only where the weights lie on a small disk of their own. True where versions came out all the same: once as many
        as are kept were written, a new one needs no more room than the one it replaces."""
        ballast = self.weights / "ballast"
        with open(ballast, "wb") as file:
            for size in (65536, 1):
                with contextlib.suppress(OSError):  # full, as wanted
                    while True:
                        os.write(file.fileno(), b"\0" * size)
        before, first, start = len(self._of("disk")), _lines(self.run_dir), time.monotonic()
        while len(self._of("disk")) == before and time.monotonic() - start < NOTICED_S:
            time.sleep(0.1)
            if _lines(self.run_dir) > first + 2:
                break
        ballast.unlink()
        return _lines(self.run_dir) > first + 2

    def drop_connections(self):
        """Shut the learner's sockets under it, until one of them was in use."""
        before, start = len(self._of("connection")), time.monotonic()
        while len(self._of("connection")) == before and time.monotonic() - start < NOTICED_S:
            if self.learner.poll() is not None:
                return
            self._drop_once()
            time.sleep(0.2)

    def _drop_once(self):
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


def _ports(pid):
    return [int(b) for a, b in itertools.pairwise(_command_line(pid).split(b"\0")) if a == b"--port"]


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it ended


def _has_weights(port):
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        reply = httpx.get(f"http://127.0.0.1:{port}/weight_info", headers=headers, timeout=2.0, trust_env=False)
        return ":" in str(reply.json().get("weight_version"))
    except (httpx.HTTPError, ValueError):
        return False


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
    run_dir, steps, began = tmp_path / "run", 0, time.monotonic()
    words = ["--engine.max-restarts", "10000", "--engine.probe-deadline-s", str(PROBE_S)]
    words += ["--engine.request-deadline-s", "60", "--engine.swap-deadline-s", str(SWAP_S)]
    done, unnamed, order, bag = [], [], random.Random(int(MINUTES)), []
    while time.monotonic() - began < MINUTES * 60:
        steps += SEGMENT_STEPS
        command = [sys.executable, "-m", "lnjax.launch", "--config", "tiny_grpo_async", "--run-dir", str(run_dir)]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"LNJAX_SERVER_KEY": KEY}
        with open(tmp_path / "log", "a") as log:
            learner = subprocess.Popen(
                [*command, "--grpo.steps", str(steps), *words],
                cwd=fleet.ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            break_things(Chaos(run_dir, learner, seed=steps), bag, order, done, unnamed, began=began, disk=small_disk)
            assert learner.wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            if learner.poll() is None:
                learner.kill()
                learner.wait()
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, steps + 1))
    assert [x["prompts_taken"] for x in lines] == [8 * i for i in range(1, steps + 1)]
    assert {x["prompts"] for x in lines} == {8}
    assert max(x["staleness_max"] for x in lines) <= 2
    assert max(x["parity_prob_error"] for x in lines) <= 1.001
    assert unnamed == []
    assert len(done) >= MINUTES
    print(json.dumps(json.loads((run_dir / "summary.json").read_text())["fleet"]))
    fleet.wait_until(lambda: fleet.processes_of(run_dir / "weights") == [], seconds=30, what="servers end")


def break_things(chaos, bag, order, done, unnamed, *, began, disk):
    """One fault every EVERY_S while the learner runs and the time is not over."""
    learner, first = chaos.learner, _lines(chaos.run_dir)
    fleet.wait_until(
        lambda: learner.poll() is not None or _lines(chaos.run_dir) > first, seconds=400, what="the next step"
    )
    while learner.poll() is None and time.monotonic() - began < MINUTES * 60:
        if not bag:
            bag.extend(order.sample(sorted(NAMED), len(NAMED)))
        kind = bag.pop()
        if kind == "fill_disk" and not disk:
            continue
        chaos.wait_for_server()  # with none the run stands still, and there is nothing to break
        start, before = time.monotonic(), len(chaos.lines())
        named = bool(getattr(chaos, kind)())
        while not named and learner.poll() is None and time.monotonic() - start < NOTICED_S:
            named = any(x["kind"] in NAMED[kind] for x in chaos.lines()[before:])
            time.sleep(0.1)
        seconds = time.monotonic() - start
        done.append((kind, seconds))
        if not named and learner.poll() is None:
            unnamed.append(kind)
        print(f"{kind}: {'named' if named else 'NOT NAMED'} after {seconds:.1f} s", flush=True)
        while learner.poll() is None and time.monotonic() - start < EVERY_S:
            time.sleep(0.1)


def _lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0

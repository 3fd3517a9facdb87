"""python -m lnjax.rollout.guard COMMAND…: run a server that cannot outlive whoever started it.

The command gets a session of its own. When standard input closes (the parent is gone, however it went), on SIGTERM, or when
the command itself ends, every process below the guard is ended: first asked, then killed. Standard library only.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 5.0


def main(command: list[str]) -> int:
    """Exit status of the command; 143 where the guard ended it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans below come to us
    os.setpgid(0, 0)  # Ctrl-C in the terminal is the parent's to handle
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def follow() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard be killed, the server is too

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=follow)
    threading.Thread(target=_wait_for_parent, args=(stop,), daemon=True).start()
    while child.poll() is None and not stop.wait(0.1):
        pass
    ended = child.poll()
    _end(child)
    return ended if ended is not None else 143


def _wait_for_parent(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


def _end(child: subprocess.Popen) -> None:
    """Everything in the command's session, and what left it but is still below us."""
    for signum, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        _signal(child.pid, signum)
        if signum == signal.SIGTERM:
            _signal(child.pid, signal.SIGCONT)  # a stopped process takes no request
        start = time.monotonic()
        while time.monotonic() - start < patience:
            child.poll()
            if not _descendants():
                return
            time.sleep(0.05)


def _signal(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the session may be empty
        os.killpg(group, signum)
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signum)


def _descendants() -> list[int]:
    """Living processes below this one; ended ones are reaped."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue  # ended while we looked
            if fields[0] != "Z":
                parents[int(name)] = int(fields[1])
    found, frontier = [], [os.getpid()]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

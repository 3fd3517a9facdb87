"""One program of a model, in a process that can do little and not for long. Linux, standard library alone.

The child has namespaces of its own, so it sees no network and no process of others. Its root folder holds the interpreter,
the system's libraries and its own text, all read-only: no data, no keys, no device. It has no capability, gets none, and starts
no other process; memory, CPU seconds, open files and output are limited. It ends with the first of: its own end, the deadline,
the end of whoever runs it. Three processes: this file runs again as the launcher (namespaces), whose child is process 1 of the
new ones (root folder; its end ends the rest), whose child becomes the program.
"""

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES, OUTPUT_BYTES, NUM_FILES = 2 << 30, 4 << 20, 64
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
MS_BIND, MS_BIND_ALL, MS_PRIVATE_ALL, SYS_MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = (
    0x1000,
    0x5000,
    0x44000,
    442,
    0x8000,
    -100,
)
NO_WRITE_SUID_DEVICE = 0x7
SHOWN = ("/usr", "/lib", "/lib64", "/bin")
"""Beside the interpreter's own folders."""
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CALLS = {"x86_64": (0xC000003E, 56, (57, 58)), "aarch64": (0xC00000B7, 220, ())}
"""{machine: (audit architecture, number of clone, numbers of fork and vfork)}."""
NO_NAMESPACE = 97
"""Exit status of a launcher that was refused."""


@dataclass(frozen=True, slots=True)
class Ran:
    output: str
    failure: str
    """Why it did not end well; empty where it did."""


def run_program(source: str, *, stdin: str, cpu_s: int, deadline_s: float) -> Ran:
    """Run Python text, for so many seconds of its own and of the clock.

    Raises RuntimeError where this machine lets nobody make namespaces: then nothing is run.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lnjax-sandbox-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as output,
    ):
        Path(folder, "main.py").write_text(source, encoding="utf-8", errors="replace")
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__, str(os.getpid()), str(cpu_s)],
            stdin=given,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        failure = ""
        try:
            status = process.wait(timeout=deadline_s)
            failure = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failure = f"deadline of {deadline_s:g} s"
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        if process.returncode == NO_NAMESPACE:
            raise RuntimeError(
                "the sandbox cannot make namespaces here; allow user namespaces (user.max_user_namespaces)"
            )
        output.seek(0)
        return Ran(output.read(OUTPUT_BYTES).decode(errors="replace"), failure)


def launch(parent: int, cpu_s: int) -> int:
    """In the launcher: the program's exit status."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC)
    except OSError:
        return NO_NAMESPACE
    first = os.fork()
    if first:
        return _end_of(first)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_DUMPABLE, 0)  # the program cannot trace process 1
    try:
        _enter_root(libc)
    except OSError:
        return NO_NAMESPACE
    program = os.fork()
    if program:
        return min(_end_of(program), 1)  # a program cannot say that there is no sandbox
    limits = {"AS": MEMORY_BYTES, "CPU": cpu_s, "FSIZE": OUTPUT_BYTES, "NOFILE": NUM_FILES, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    if not _alone(libc):
        return 1
    # No id is mapped into the namespace, so this call drops every capability, and no further namespace can be made.
    os.execv(sys.executable, [sys.executable, "-I", "-B", "main.py"])
    return 1


def _enter_root(libc: ctypes.CDLL) -> None:
    """Become the root folder's only inhabitant. Raises OSError where a mount is refused."""

    def mount(source: str, target: str, kind: str, flags: int = 0) -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    here = os.getcwd()
    root = f"{here}/root"
    mount("", "/", "", MS_PRIVATE_ALL)
    os.mkdir(root)
    mount(root, root, "", MS_BIND)
    own = (sys.base_prefix, os.path.realpath(sys.base_prefix), str(Path(sys.executable).parent.parent))
    for folder in dict.fromkeys((*SHOWN, *own)):
        if os.path.isdir(folder):
            os.makedirs(root + folder, exist_ok=True)
            mount(folder, root + folder, "", MS_BIND_ALL)
    os.makedirs(root + here)
    mount(here, root + here, "", MS_BIND)
    os.mkdir(f"{root}/dev")
    os.symlink("/proc/self/fd/0", f"{root}/dev/stdin")
    os.mkdir(f"{root}/proc")
    with contextlib.suppress(OSError):  # containers refuse it; few programs miss it
        mount("proc", f"{root}/proc", "proc")
    os.chroot(root)
    os.chdir(here)
    attributes = (ctypes.c_uint64 * 4)(NO_WRITE_SUID_DEVICE, 0, 0, 0)
    if libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32):
        raise OSError(ctypes.get_errno(), "mount_setattr")


def _alone(libc: ctypes.CDLL) -> bool:
    """From here on threads may be started but no process: a filter of system calls, for want of a limit that binds root."""
    architecture, clone, forks = CALLS[os.uname().machine]
    allow, refuse, absent, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, kill)]
    rules += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, kill)]  # another calling convention
    rules += [(EQUAL, 0, 1, 435), (RETURN, 0, 0, absent)]  # clone3: libraries then use clone
    for number in forks:
        rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    rules += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, 0x10000), (RETURN, 0, 0, refuse)]  # CLONE_THREAD
    rules += [(RETURN, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    return libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) == 0


def _end_of(pid: int) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status in (0, NO_NAMESPACE) else 1


if __name__ == "__main__":
    os._exit(launch(int(sys.argv[1]), int(sys.argv[2])))

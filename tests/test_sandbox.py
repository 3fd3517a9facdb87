"""Programs in the sandbox: what they may do, what they may not, and that nothing of them is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lnjax.rewards import sandbox
from lnjax.rewards.code import passes
from lnjax.rewards.sandbox import NO_NAMESPACE, OUTPUT_BYTES, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux namespaces")


def run(source: str, *, stdin: str = "", deadline_s: float = 120.0):
    return run_program(source, stdin=stdin, cpu_s=60, deadline_s=deadline_s)


def left_over(mark: str) -> list[str]:
    """Processes whose working folder's name has `mark` in it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in os.readlink(folder / "cwd"):
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_a_program_reads_stdin_writes_stdout_and_uses_threads():
    source = "import threading\nt = threading.Thread(target=lambda: print(int(input()) * 2))\nt.start()\nt.join()"
    assert run(source, stdin="21") == run("print(42)")
    assert run("print(42)").output == "42\n"
    assert run("import sys; sys.exit(3)").failure == "ended with status 1"


@pytest.mark.parametrize(
    "forbidden",
    [
        "open('here', 'w')",
        "open('/tmp/there', 'w')",
        "open('/dev/shm/there', 'w')",
        f"open({str(Path(__file__))!r}, 'a')",
        "import os; os.remove('main.py')",
        "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "import os; os.unshare(os.CLONE_NEWUSER)",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'], check=True)",
        "import os; os.kill(1, 9); os.kill(int(os.readlink('/proc/self')) + 1, 0)",
        "import os; os.mknod('/dev/disk', 0o60600, os.makedev(254, 0))",
        "open('/proc/sys/kernel/hostname', 'w').write('x')",
        "x = bytearray(3 << 30)",
        "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0",
    ],
)
def test_it_cannot_leave_anything_or_reach_anybody(forbidden):
    ran = run(forbidden + "\nprint('escaped')")
    assert "escaped" not in ran.output
    assert ran.failure == "ended with status 1"


def test_it_sees_no_process_but_its_own_and_has_no_capability():
    ran = run(
        "import os\nprint(os.getpid(), os.getppid(), open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    )
    assert ran.output == "2 1 0000000000000000\n"


def test_where_no_sandbox_can_be_made_nothing_is_run_and_the_reason_is_said(tmp_path, monkeypatch):
    refused = tmp_path / "refused.py"
    refused.write_text(f"raise SystemExit({NO_NAMESPACE})")
    monkeypatch.setattr(sandbox, "__file__", str(refused))
    with pytest.raises(RuntimeError, match="allow user namespaces"):
        run("print(1)")


def test_a_program_cannot_say_that_there_is_no_sandbox():
    assert run(f"raise SystemExit({NO_NAMESPACE})").failure == "ended with status 1"


def test_it_sees_the_interpreter_and_its_own_text_and_no_file_of_anybody_else(tmp_path):
    secret = tmp_path / "answers.jsonl"
    secret.write_text("42")
    source = "import os\nfor p in {paths!r}: print(os.path.exists(p))\nprint(os.listdir('/dev'))"
    paths = (
        str(secret),
        __file__,
        "/etc/passwd",
        "/dev/null",
        "/run",
        f"/proc/{os.getpid()}",
        "/sys",
        str(Path.home() / ".ssh"),
    )
    assert run(source.format(paths=paths)).output == "False\n" * len(paths) + "['stdin']\n"


def test_an_infinite_loop_ends_at_the_deadline_and_nothing_is_left():
    start = time.monotonic()
    assert run("while True: pass", deadline_s=1).failure == "deadline of 1 s"
    assert time.monotonic() - start < 60
    assert left_over("lnjax-sandbox-") == []
    assert run_program("while True: pass", stdin="", cpu_s=1, deadline_s=120).failure == "ended with status 1"


def test_endless_output_is_cut_off_and_broken_text_is_read():
    ran = run("while True: print('x' * 100_000)")
    assert (len(ran.output), ran.failure) == (OUTPUT_BYTES, "ended with status 1")
    assert run("import os; os.write(1, b'\\xff\\n')").output == "\ufffd\n"
    assert "ended" in run("\ud800 = '\0'").failure


def test_a_killed_worker_takes_its_program_along(tmp_path):
    source = "from lnjax.rewards.sandbox import run_program; run_program('while True: pass', stdin='', cpu_s=99, deadline_s=99)"
    worker = subprocess.Popen([sys.executable, "-c", source], env={**os.environ, "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 300
    visible = 3 if os.geteuid() == 0 else 2  # launcher, process 1 (shown to root alone), program
    while len(left_over(str(tmp_path))) < visible and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left_over(str(tmp_path))) == visible
    worker.kill()
    worker.wait()
    while left_over(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over(str(tmp_path)) == []


STDIN = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "2 2", "output": "4.0", "testtype": "stdin"},
]
ADD = "```python\nprint(sum(map(int, input().split())))\n```"
CALLED = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]
METHOD = """```python
class Solution:
    def add(self, xs: List[int], y: int):
        print("noise")
        return [x + y for x in xs]
```"""


@pytest.mark.parametrize(
    ("answer", "tests", "verdict"),
    [
        (f"Here:\n{ADD}", STDIN, (True, "")),
        (ADD.replace("sum", "max"), STDIN, (False, "test 0: another output")),
        ("print(3)", STDIN, (False, "no fenced block of code")),
        (METHOD, CALLED, (True, "")),
        (METHOD.replace("x + y", "x"), CALLED, (False, "test 0: another output")),
        ("```\n1/0\n```", CALLED, (False, "test 0: ended with status 1")),
        (
            "```\ndef add(xs, y): return xs\nprint('[4, 5]', flush=True)\nimport os; os._exit(0)\n```",
            CALLED,
            (True, ""),
        ),
    ],
)
def test_code_is_right_when_every_test_is_met(answer, tests, verdict):
    """The last case knows the answer without being told: a program that prints what is wanted is right."""
    assert passes(answer, tests=tests, function="add", deadline_s=300) == verdict

"""A real SLURM with two nodes on this machine: Debian's packages, as root, without systemd. All of it ends with `close`."""

import datetime
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmctldPidFile={root}/slurmctld.pid
StateSaveLocation={root}/state
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=5
MessageTimeout=60
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdSpoolDir={root}/spool.%n
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
NodeName=n[0-1] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{node}-{last}] \\
 CPUs=8 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000
PartitionName=all Nodes=ALL Default=YES MaxTime=60
"""


def install(*packages: str) -> str:
    """Debian packages, where that is allowed; why they are not there, or nothing."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"{' and '.join(packages)} are not installed, and cannot be here: it takes root and apt-get"
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with open(Path(tempfile.gettempdir()) / "lnjax-apt.lock", "w") as lock:  # tests run beside each other, apt does not
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["apt-get", "update"], command):
            done = subprocess.run(words, env=environ, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{' '.join(command)}: {done.stderr.strip()[-300:]}"


def missing() -> str:
    """Why there can be no cluster here; installs the packages where that is allowed."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root; this is another user"
    if shutil.which("slurmctld") and shutil.which("munged"):
        return ""
    return install("slurm-wlm", "munge")


class Cluster:
    def __init__(self, root: Path, *, port: int):
        self.root, self._daemons = root, []
        (root / "state").mkdir(parents=True)
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        conf = root / "slurm.conf"
        conf.write_text(CONF.format(root=root, port=port, node=port + 1, last=port + 2))
        self._environ = {**os.environ, "SLURM_CONF": str(conf)}
        for name in ("n0", "n1"):
            (root / f"spool.{name}").mkdir()
        munge = ["--key-file", root / "munge.key", "--socket", root / "munge.socket", "--pid-file", root / "munge.pid"]
        munge += ["--log-file", root / "munge.log", "--seed-file", root / "munge.seed"]
        self._start("munged", "--foreground", "--force", *munge)
        while not (root / "munge.socket").exists():
            time.sleep(0.05)
        self._start("slurmctld", "-D", "-f", conf)
        for name in ("n0", "n1"):
            self._start("slurmd", "-D", "-f", conf, "-N", name)
        self.wait(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", seconds=60, what="idle nodes")

    def _start(self, *words: object) -> None:
        with open(self.root / f"{words[0]}.out", "ab") as out:
            command = [str(w) for w in words]
            self._daemons.append(subprocess.Popen(command, env=self._environ, stdout=out, stderr=out))

    def __call__(self, *words: object, **environ: str) -> str:
        """Output of a command that talks to this cluster."""
        command = [str(w) for w in words]
        done = subprocess.run(command, env={**self._environ, **environ}, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, ready, *, seconds: float, what: str) -> None:
        start = time.monotonic()
        while not ready():
            assert time.monotonic() - start < seconds, f"no {what} within {seconds} s"
            time.sleep(0.2)

    def let_go(self, job: dict[str, str]) -> None:
        """SLURM holds a requeued job for two minutes. Not at once: what it starts in the second in which it ended the job
        has a credential that the nodes take for the ended one's."""
        soon = datetime.datetime.now() + datetime.timedelta(seconds=10)
        if job["Reason"] == "BeginTime" and datetime.datetime.fromisoformat(job["EligibleTime"]) > soon:
            self("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now+3")

    def wait_for_end(self, number: str, *, seconds: float) -> str:
        """The job's last state; a job held after a requeue is let go soon."""
        start = time.monotonic()
        while True:
            job = self.job(number)
            if job["JobState"] == "PENDING":
                self.let_go(job)
            elif job["JobState"] not in ("RUNNING", "COMPLETING", "CONFIGURING"):
                return job["JobState"]
            assert time.monotonic() - start < seconds, f"job {number} has not ended after {seconds} s: {job}"
            time.sleep(0.3)

    def close(self) -> None:
        """Jobs first: without the daemons nobody would end their processes."""
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self._environ)
        subprocess.run(["scancel", "--user=root"], env=self._environ)
        self.wait(lambda: not self("squeue", "-h").strip(), seconds=60, what="empty queue")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)

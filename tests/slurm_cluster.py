"""A Slurm of two nodes, both on this machine, for the tests that submit jobs."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Slurm:
    """Daemons of Slurm and munge with their own configuration in `folder`; nothing is read from /etc."""

    NEEDS = ("munged", "slurmctld", "slurmd", "sbatch")

    @classmethod
    def missing(cls) -> list[str]:
        """Returns the programs that are not on this machine."""
        return [name for name in cls.NEEDS if shutil.which(name, path=cls.search_path()) is None]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": self.search_path()}
        user = subprocess.check_output(["id", "--user", "--name"], text=True).strip()
        here = self.nodes()[0]
        ports = free_ports(3)
        # The first node is where jax's coordinator is looked for, so its name must be one that resolves.
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{here}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # A job waits this long before it starts again, and five seconds are the least.
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "CredType": "cred/munge",
            "FirstJobId": random.randrange(1000, 5000),  # jax derives its port from it
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmdLogFile": f"{folder}/slurmd-%n.log",
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "StateSaveLocation": f"{folder}/state",
            # Nothing that needs control groups or accounting.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/linear",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "sched_interval=1",  # seconds; a minute by default
            "MpiDefault": "none",
            "KillWait": 30,
        }
        nodes = [
            f"NodeName={name} NodeHostname={here} NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for name, port in zip(self.nodes(), ports[1:], strict=True)
        ]
        partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        text = [*(f"{key}={value}" for key, value in lines.items()), *nodes, partition, ""]
        (folder / "slurm.conf").write_text("\n".join(text))

    @staticmethod
    def nodes() -> list[str]:
        first = socket.gethostname().partition(".")[0]
        return [first, f"{first}-two"]

    @staticmethod
    def search_path() -> str:
        return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where the daemons are, and not on every user's path

    @contextlib.contextmanager
    def running(self) -> Iterator[Slurm]:
        munge = self.folder / "munge"
        for path in (munge, self.folder / "state"):
            path.mkdir()
        (munge / "key").write_bytes(random.randbytes(128))
        (munge / "key").chmod(0o600)
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "log", "pid", "seed")]
        daemons = [
            # Folders of pytest belong to this user alone, which munged takes for a mistake.
            ["munged", "--foreground", "--force", f"--socket={munge}/socket", *files],
            ["slurmctld", "-D"],
            *(["slurmd", "-D", "-N", node] for node in self.nodes()),
        ]
        started = []
        try:
            for daemon in daemons:
                with (self.folder / f"{daemon[0]}-{len(started)}.out").open("w") as out:
                    started.append(subprocess.Popen(daemon, env=self.environment, stdout=out, stderr=out))
                if daemon[0] == "munged":
                    self.wait_for((munge / "socket").exists, 30, "munged's socket")
            self.wait_for(lambda: self.call("sinfo", "-ho%T", check=False).split() == ["idle"], 60, "two idle nodes")
            yield self
            self.call("scancel", "--full", "--signal=KILL", f"--user={os.getuid()}", check=False)
            self.wait_for(lambda: not self.call("squeue", "-h", check=False), 60, "the jobs to end")
        finally:
            for daemon in reversed(started):
                daemon.terminate()
            for daemon in started:
                daemon.wait(timeout=60)

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    @staticmethod
    def wait_for(done: Callable[[], object], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"no {what} within {seconds} s"
            time.sleep(0.1)

    def submit(self, script: str) -> str:
        (self.folder / "job.sh").write_text(script)
        return self.call("sbatch", "--parsable", "job.sh").strip()

    def field(self, job: str, name: str) -> str:
        shown = self.call("scontrol", "show", "job", job)
        fields = {key: value for key, _, value in (word.partition("=") for word in shown.split())}
        return fields[name]

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]

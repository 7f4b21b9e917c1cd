"""A real SLURM on this machine: one controller and two nodes from a temporary directory, without systemd or /etc."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job waits that long and some seconds; 5 is the least, 120 the default
AuthInfo=socket={d}/munge/munge.socket,cred_expire=5
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd-%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd-%n.log
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=3
MinJobAge=300
MaxArraySize=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1 RealMemory=8000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def descendants(pid: int) -> list[int]:
    """The process and all that it started, whatever their sessions."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


class Cluster:
    """Starts and stops the daemons; breaks a node as a power cut would."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name in ("etc", "run", "log", "state", "spool/n1", "spool/n2", "munge"):
            (directory / name).mkdir(parents=True)
        directory.chmod(0o755)  # munge wants its socket to be within everybody's reach
        self.config = directory / "etc/slurm.conf"
        host = socket.gethostname().partition(".")[0]
        self.config.write_text(CONFIG.format(host=host, d=directory, ports=free_ports(3)))

    @staticmethod
    def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
        """Polls until something is so; the tests wait for nothing else than such conditions."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.2)

    def start(self) -> None:
        munge = self.directory / "munge"
        (munge / "munge.key").write_bytes(os.urandom(128))
        (munge / "munge.key").chmod(0o400)
        flags = {"key-file": "munge.key", "socket": "munge.socket", "seed-file": "seed"}
        self._run("munged", "--force", *(f"--{flag}={munge / name}" for flag, name in flags.items()),
                  f"--pid-file={self.pid_file('munged')}", f"--log-file={self.directory}/log/munged.log")  # fmt: skip
        self._run("slurmctld", "-f", str(self.config))
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for(lambda: self.node_states() == ["idle", "idle"], 30, "both nodes are idle")

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-f", str(self.config), "-N", node)

    def node_states(self) -> list[str]:
        """Of n1 and n2: idle, allocated, down* ..."""
        return self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()

    def pid_file(self, daemon: str) -> Path:
        return self.directory / "run" / f"{daemon}.pid"

    def _run(self, *argv: str) -> None:
        environment = os.environ | {"SLURM_CONF": str(self.config)}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([shutil.which(argv[0], path=SYSTEM_PATH) or argv[0], *argv[1:]], env=environment, **quiet)

    def command(self, *argv: str) -> str:
        """What one of SLURM's commands prints; nothing while the controller does not answer yet."""
        environment = os.environ | {"SLURM_CONF": str(self.config)}
        return subprocess.run(argv, env=environment, capture_output=True, text=True).stdout

    def cut_power(self, node: str) -> None:
        """Kills a node's daemon and everything that ran on it, at once."""
        daemon = int(self.pid_file(f"slurmd-{node}").read_text())
        for pid in [daemon, *(pid for step in self._step_daemons(node) for pid in descendants(step))]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _step_daemons(self, node: str) -> list[int]:
        """What runs the jobs of a node, known by the log that it writes."""
        log, found = str(self.directory / f"log/slurmd-{node}.log"), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_one = (process / "cmdline").read_bytes().startswith(b"slurmstepd")
                if is_one and log in map(os.readlink, (process / "fd").iterdir()):
                    found.append(int(process.name))
        return found

    def stop(self) -> None:
        self.command("scancel", "-u", "root")
        with suppress(AssertionError):
            self.wait_for(lambda: not self.command("squeue", "-h"), 10, "the queue is empty")
        pids = [int(path.read_text()) for path in (self.directory / "run").glob("*.pid")]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens on."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, one in enumerate(sockets):
                one.bind(("", first + i))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster, which SLURM's commands find by themselves."""
    missing = [name for name in DAEMONS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing or os.geteuid():
        reason = f"not found: {', '.join(missing)}" if missing else "it takes root"
        pytest.skip(f"no SLURM to start ({reason}); Debian: apt-get install slurmctld slurmd slurm-client munge")
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: sockets' paths end at 107 bytes
    cluster = Cluster(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.config))
        try:
            cluster.start()
            yield cluster
        finally:
            for log in (directory / "log").glob("*.log"):
                print(f"{log.name}: {log.read_text(errors='replace')[-2000:]}")  # seen where a test fails
            cluster.stop()
            shutil.rmtree(directory, ignore_errors=True)

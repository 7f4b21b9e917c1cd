"""Sweeps on a real SLURM: limits, lost nodes, kills and preemption cost no job, and change no result."""

import json
import os
import signal
import subprocess
import sys

import pytest

from domainbed import slurm, states
from domainbed.commands import Command

pytestmark = pytest.mark.slurm

# Algorithms that last as long as SLURM's limits take to be noticed, without keeping this machine busy.
PLUGIN = """
import os, time
from domainbed.algorithms import ERM, GroupDRO, register

class Slow:
    def update(self, *args, **kwargs):
        time.sleep(float(os.environ.get("SLOW_S", 0)))
        return super().update(*args, **kwargs)

@register
class SlowERM(Slow, ERM):
    pass

@register
class SlowGroupDRO(Slow, GroupDRO):
    pass
"""
GRID = (
    "--datasets", "DigitsM2M", "--algorithms", "SlowERM", "SlowGroupDRO", "--n_hparams", "2", "--steps", "200",
    "--checkpoint_freq", "50", "--hparams", '{"batch_size": 8}', "--skip_confirmation", "--save_every_s", "1",
)  # fmt: skip


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    path = tmp_path / "slow_algorithms.py"
    path.write_text(PLUGIN)
    monkeypatch.setenv("DOMAINBED_PLUGINS", str(path))


def script(name, *words, **environment):
    """Runs one of the package's scripts; returns what it prints."""
    argv = [sys.executable, "-m", f"domainbed.scripts.{name}", *map(str, words)]
    run = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def launch(directory, trials, jobs_per_task, slow_s):
    words = ("--command_launcher", "slurm", "--slurm_time", 2, "--jobs_per_task", jobs_per_task)
    return script("sweep", "launch", *GRID, "--n_trials", trials, "--output_dir", directory, *words, SLOW_S=slow_s)


def running(directory):
    """The jobs that have something to lose, with their processes."""
    found = states.scan(directory).items()
    return {
        name: status.pid
        for name, status in found
        if status.state == states.State.RUNNING and (directory / name / "snapshot.pkl").exists()
    }


def on_node(cluster, node, sweep):
    """The sweep's jobs in the tasks that a node runs."""
    ids = cluster.command("squeue", "-h", "-r", "-w", node, "-o", "%i").split()
    return {name for entry in slurm.read_queue(sweep) if entry.job_id in ids for name in entry.names}


def test_a_sweep_survives_a_time_limit_a_lost_node_and_a_kill(cluster, tmp_path, plugin):
    runs, by_slurm = tmp_path / "runs", tmp_path / "by_slurm"

    launch(runs, trials=1, jobs_per_task=4, slow_s="0.1")  # 80 s and more: beyond the warning
    cluster.wait_for(lambda: running(runs), 120, "a job has saved something")
    killed, pid = next(iter(running(runs).items()))
    os.kill(pid, signal.SIGKILL)

    said = launch(runs, trials=2, jobs_per_task=2, slow_s="0.04")
    first, second = ({name for task in tasks for name in task} for tasks in slurm.read_ledger(runs).values())
    assert (len(first), len(second), first & second) == (4, 4, set())
    assert "Submitted 4 jobs as 2 tasks" in said

    cluster.wait_for(
        lambda: set(running(runs)) & on_node(cluster, "n2", runs), 120, "the other node has saved something"
    )
    cluster.cut_power("n2")
    cluster.wait_for(lambda: cluster.node_states()[1].startswith("down"), 90, "the node is given up")
    cluster.start_node("n2")

    cluster.wait_for(lambda: all_done(runs, 8), 500, "all jobs are done")
    cluster.wait_for(lambda: not slurm.read_queue(runs), 60, "the tasks have ended")
    log = "".join(path.read_text() for path in (runs / "slurm").glob("*_log.err"))
    assert "this job is timed-out" in log
    assert f"{runs / killed}: killed by SIGKILL" in log

    runs.rename(by_slurm)  # so that the local sweep has the same place, which the models' arguments name
    words = ("--command_launcher", "local", "--n_trials", 2, "--output_dir", runs)
    script("sweep", "launch", *GRID, *words)
    compare(by_slurm, runs)


def all_done(directory, count):
    found = states.scan(directory).values()
    assert not [status for status in found if status.state == states.State.FAILED]
    return [status.state for status in found] == [states.State.DONE] * count


def compare(one, other):
    for directory in (one, other):
        script("collect_results", "--input_dir", directory)
    for name in ("results.txt", "groups.txt"):
        assert (one / name).read_text() == (other / name).read_text()
    names = sorted(path.parent.name for path in other.glob("*/done"))
    assert len(names) == 8
    for name in names:
        assert records(one / name) == records(other / name)
        assert (one / name / "model.pkl").read_bytes() == (other / name / "model.pkl").read_bytes()


def records(directory):
    """What a job recorded, but for the time and the memory that it took."""
    lines = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("step_time", "mem_gb")} for line in lines]


# Stand-ins for train that are quick.
LOGS = """
import sys, time, pathlib
path = pathlib.Path(sys.argv[1])
with open(path.parent / "log", "a") as log: log.write(f"+{path.name}\\n")
time.sleep(0.5)
with open(path.parent / "log", "a") as log: log.write(f"-{path.name}\\n")
(path / "done").write_text("done")
"""
SAVES = """
import os, sys, time, pathlib, signal
path = pathlib.Path(sys.argv[1])
def save(*_):
    (path / "saved").touch()
    os._exit(75)
signal.signal(signal.SIGTERM, save)
with open(path / "starts", "a") as file: file.write("x")
while not (path / "saved").exists(): time.sleep(0.1)
(path / "done").write_text("done")
"""


def commands(sweep, code, count):
    directories = [sweep / f"job{i}" for i in range(count)]
    for directory in directories:
        directory.mkdir(parents=True)
    return [Command(["python", "-c", code, str(directory)], str(directory)) for directory in directories]


def test_no_more_tasks_at_a_time_than_asked_for_and_their_jobs_in_turn(cluster, tmp_path):
    jobs = commands(tmp_path, LOGS, 12)
    slurm.slurm_launcher(jobs, max_parallel=1, jobs_per_task=2, slurm_time="5")
    assert [len(tasks) for tasks in slurm.read_ledger(tmp_path).values()] == [5, 1]  # the cluster's MaxArraySize
    cluster.wait_for(lambda: all((tmp_path / f"job{i}/done").exists() for i in range(12)), 90, "all jobs are done")
    lines = (tmp_path / "log").read_text().split()
    assert [line[0] for line in lines] == ["+", "-"] * 12  # one at a time, on two nodes
    names = [line[1:] for line in lines[::2]]
    assert [names[i : i + 2] for i in range(0, 12, 2)] == [[f"job{i}", f"job{i + 1}"] for i in range(0, 12, 2)]


def test_preemption_by_sigterm_has_the_job_saved_and_the_task_requeued(cluster, tmp_path):
    jobs = commands(tmp_path, SAVES, 1)
    slurm.slurm_launcher(jobs, slurm_time="60")
    cluster.wait_for((tmp_path / "job0/starts").exists, 30, "it runs")
    cluster.command("sbatch", "-p", "high", "-N", "2", "-o", "/dev/null", "--wrap", "srun sleep 1")
    cluster.wait_for((tmp_path / "job0/done").exists, 120, "it runs again")
    assert (tmp_path / "job0/starts").read_text() == "xx"


def test_cancelled_tasks_leave_the_queue(cluster, tmp_path):
    jobs = commands(tmp_path, SAVES, 3)
    slurm.slurm_launcher(jobs, slurm_time="60")
    cluster.wait_for((tmp_path / "job0/starts").exists, 30, "one runs")
    assert len(slurm.cancel(tmp_path)) == 1
    cluster.wait_for(lambda: not slurm.read_queue(tmp_path), 30, "the queue is empty")
    assert (tmp_path / "job0/saved").exists()

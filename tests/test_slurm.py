"""The SLURM launcher with scripts in place of SLURM's commands."""

import os
import stat
from pathlib import Path

import pytest

from domainbed import slurm
from domainbed.commands import Command


def commands(sweep: Path, count: int) -> list[Command]:
    names = [f"{i:032x}" for i in range(count)]
    for name in names:
        (sweep / name).mkdir(parents=True, exist_ok=True)
    return [Command(["python", "-c", "pass", name], str(sweep / name)) for name in names]


class FakeCluster:
    """Scripts that record what they are asked and answer from files."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.script("sbatch", f'cat "$1" >> {directory}/batches; echo x >> {directory}/count; '
                    f'echo "Submitted batch job $((40 + $(wc -l < {directory}/count)))"')  # fmt: skip
        self.script("srun", "exit 1")
        self.script("scontrol", "echo 'MaxArraySize            = 3'")
        self.script("squeue", f'echo "$@" >> {directory}/asked; cat {directory}/queue 2>/dev/null || true')
        self.script("scancel", f'echo "$@" >> {directory}/cancelled_ids')

    def script(self, name: str, text: str) -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def batches(self) -> list[dict[str, str]]:
        """The options of each batch that was submitted."""
        texts = (self.directory / "batches").read_text().split("#!/bin/bash")[1:]
        lines = [[line.removeprefix("#SBATCH --") for line in t.splitlines() if "#SBATCH" in line] for t in texts]
        return [dict(line.partition("=")[::2] for line in some) for some in lines]

    def queue(self, *lines: str) -> None:
        (self.directory / "queue").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return FakeCluster(directory)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:00:00", 60), ("0:0:1", 1), ("2:30", 3), ("1-0", 1440), ("1-2:30", 1590), ("2-00:00:61", 2882)],
)
def test_times_are_slurms(text, expected):
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "0", "0-0", "infinite", "1-"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match=r"--slurm_time .* write minutes, or \[D-\]HH:MM:SS"):
        slurm.minutes(text)


def test_flags_of_sbatch():
    assert slurm.sbatch_flags(["account=lab", "--mail_type=END,FAIL", "exclusive=", "x=a=b"]) == {
        "account": "lab", "mail-type": "END,FAIL", "exclusive": True, "x": "a=b",
    }  # fmt: skip
    for word in ("exclusive", "=lab"):
        with pytest.raises(ValueError, match=f"--slurm_args {word} is not KEY=VALUE"):
            slurm.sbatch_flags([word])
    with pytest.raises(ValueError, match="the launcher sets job-name itself"):
        slurm.sbatch_flags(["job_name=mine"])


def test_arrays_are_as_long_as_the_cluster_allows(tmp_path, fake, capsys):
    sweep = tmp_path / "sweep"
    jobs = commands(sweep, 8)
    (sweep / jobs[0].output_dir / "failed").write_text("{}")
    slurm.slurm_launcher(
        jobs, jobs_per_task=2, slurm_time="10", slurm_partition="gpu", slurm_mem_gb=1.5, slurm_cpus=4, slurm_gpus=1,
        slurm_args=["account=lab"],
    )  # fmt: skip
    first, second = fake.batches()
    expected = {
        "array": "0-2%3", "partition": "gpu", "mem": "1536MB", "cpus-per-task": "4", "gpus-per-node": "1",
        "account": "lab", "requeue": "", "time": "10", "signal": "USR2@90",
    }  # fmt: skip
    assert expected.items() <= first.items()
    assert "array" not in second  # one task is no array
    assert "dependency" not in second
    assert first["job-name"] != second["job-name"]
    assert [name.rpartition("-")[0] for name in (first["job-name"], second["job-name"])] == [
        slurm.array_name(sweep).rpartition("-")[0]
    ] * 2
    names = [Path(job.output_dir).name for job in jobs]
    assert slurm.read_ledger(sweep) == {
        first["job-name"]: [names[0:2], names[2:4], names[4:6]],
        second["job-name"]: [names[6:8]],
    }
    assert not (sweep / jobs[0].output_dir / "failed").exists()
    assert stat.S_IMODE((sweep / "slurm").stat().st_mode) == 0o700
    out = capsys.readouterr().out
    assert "Submitted 8 jobs as 4 tasks of array(s) 41, 42." in out
    assert f"sweep cancel --output_dir {sweep}`" in out


def test_the_pickled_task_runs_the_jobs(tmp_path, fake):
    from submitit.core.utils import DelayedSubmission

    sweep = tmp_path / "sweep"
    slurm.slurm_launcher(commands(sweep, 2), jobs_per_task=2, retries=3, slurm_cpus=2)
    task = DelayedSubmission.load(next((sweep / "slurm").glob("*_submitted.pkl"))).function
    assert [(c.argv, c.output_dir) for c in commands(sweep, 2)] == task.jobs
    assert (task.retries, task.threads) == (3, 2)


def test_parallel_tasks_are_limited_across_arrays_and_short_limits_warn_late(tmp_path, fake):
    slurm.slurm_launcher(commands(tmp_path / "sweep", 5), max_parallel=2, slurm_time="1")
    first, second = fake.batches()
    assert (first["array"], second["array"], second["dependency"]) == ("0-2%2", "0-1%2", "afterany:41")
    assert (first["time"], first["signal"]) == ("1", "USR2@20")


def test_what_slurm_has_is_not_submitted_again(tmp_path, fake, capsys):
    sweep = tmp_path / "sweep"
    jobs = commands(sweep, 4)
    slurm.slurm_launcher(jobs[:3])
    name = fake.batches()[0]["job-name"]
    fake.queue(f"41_0|RUNNING|None|{name}", f"41_2|PENDING|launch failed requeued held|{name}")
    slurm.slurm_launcher(jobs)
    assert list(slurm.read_ledger(sweep).values())[1] == [[Path(jobs[i].output_dir).name] for i in (1, 3)]
    assert f"-n {name} " in (fake.directory / "asked").read_text()
    out = capsys.readouterr().out
    assert "Left 2 jobs alone that SLURM has already." in out
    assert "1 tasks are held (launch failed requeued held) until somebody says: scontrol release 41_2" in out


def test_a_launcher_that_was_killed_in_between_is_made_up_for(tmp_path, fake):
    """Between sbatch and its answer the ledger knows the array by name, so squeue finds it."""
    sweep = tmp_path / "sweep"
    jobs = commands(sweep, 2)
    fake.script("sbatch", "kill -9 $PPID")
    pid = os.fork()
    if not pid:
        slurm.slurm_launcher(jobs)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    (name,) = slurm.read_ledger(sweep)
    fake.queue(f"41_0|PENDING|None|{name}", f"41_1|PENDING|None|{name}")
    fake.script("sbatch", "echo not again; exit 1")
    slurm.slurm_launcher(jobs)
    assert list(slurm.read_ledger(sweep)) == [name]


def test_torn_lines_of_the_ledger_are_skipped(tmp_path):
    slurm.make_folder(tmp_path)
    assert slurm.read_ledger(tmp_path) == {}
    slurm.note(tmp_path, "a", [["x"]])
    with open(tmp_path / "slurm/submitted.jsonl", "ab") as file:
        file.write(b'7\n[]\n{"array": "b"}\n{"array": "c", "tas')
    slurm.note(tmp_path, "d", [["y", "z"]])
    assert slurm.read_ledger(tmp_path) == {"a": [["x"]], "d": [["y", "z"]]}


def test_cancel(tmp_path, fake):
    sweep = tmp_path / "sweep"
    assert slurm.cancel(sweep) == []
    slurm.slurm_launcher(commands(sweep, 4))
    a, b = (batch["job-name"] for batch in fake.batches())
    assert slurm.cancel(sweep) == []
    assert not (fake.directory / "cancelled_ids").exists()
    fake.queue(f"41_0|RUNNING|None|{a}", f"41_2|PENDING|None|{a}", f"102|PENDING|None|{b}")
    assert slurm.cancel(sweep) == ["41", "102"]
    assert (fake.directory / "cancelled_ids").read_text() == "41 102\n"


def test_a_refusal_is_shown(tmp_path, fake):
    jobs = commands(tmp_path / "sweep", 4)
    fake.script("sbatch", f"[ -e {tmp_path}/second ] && echo 'invalid partition specified: nope' >&2 && exit 1\n"
                f"touch {tmp_path}/second; echo Submitted batch job 7")  # fmt: skip
    with pytest.raises(slurm.SlurmMissing, match=r"sbatch refused \(it took array 7 before\): invalid partition"):
        slurm.slurm_launcher(jobs)
    fake.script("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(slurm.SlurmMissing, match="squeue failed: Unable to contact"):
        slurm.slurm_launcher(jobs)


def test_what_is_missing_is_named(tmp_path, fake, monkeypatch):
    jobs = commands(tmp_path / "sweep", 1)
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'domainbed-ex2l\[slurm\]'"):
        slurm.slurm_launcher(jobs)
    (fake.directory / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(fake.directory))
    with pytest.raises(slurm.SlurmMissing, match="sbatch is not found"):
        slurm.slurm_launcher(jobs)


def test_one_sweep_at_a_time(tmp_path, fake):
    with pytest.raises(ValueError, match="one sweep at a time; got jobs of"):
        slurm.slurm_launcher([*commands(tmp_path / "a", 1), *commands(tmp_path / "b", 1)])

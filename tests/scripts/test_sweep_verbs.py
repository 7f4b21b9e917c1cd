"""The sweep script's commands beside launch, on three jobs of Debug28 with ERM, none of which trains."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed import claims, command_launchers, job_lists, model_selection, run_directory, states
from domainbed.commands import Command
from domainbed.jobs import Job, make_args_list
from domainbed.scripts import BAD_INPUT_STATUS, BadInput, sweep, sweep_arguments, sweep_checks
from domainbed.scripts.sweep_arguments import parse

GRID = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1", "--single"]


class Sweep:
    """Runs the script on one directory; its launcher only notes the commands, and gives ``codes`` back."""

    def __init__(self, directory):
        self.out, self.commands, self.codes = directory, [], None

    def launcher(self, commands):
        self.commands.append(commands)
        return self.codes and [self.codes] * len(commands)

    def __call__(self, command, *words, grid=()):
        starts = command in ("launch", "retry_failed")
        launcher = ["--command_launcher", "noting", "--skip"] if starts else []
        return sweep.main([command, *grid, "--output_dir", str(self.out), *launcher, *words])

    def names(self):
        return [job.name for job in job_lists.read(self.out)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Such a sweep, launched once: its jobs are listed and queued."""
    run = Sweep(tmp_path / "out")
    monkeypatch.setitem(command_launchers.REGISTRY, "noting", run.launcher)
    monkeypatch.setattr(sweep_checks, "check", lambda jobs: None)  # takes seconds of torch
    run("launch", grid=GRID)
    return run


def leave(directory, done=False, error=None):
    """What a run leaves that is done, failed, or was killed."""
    os.makedirs(directory, exist_ok=True)
    Path(directory, "results.jsonl").write_text('{"args": {"algorithm": "X", "dataset": "Y"}}\n')
    if done:
        run_directory.mark_done(directory)
    if error:
        states.write_failure(directory, error, 1)


@pytest.fixture
def mixed(run, capsys):
    """One job is done, one failed, one was killed."""
    done, failed, killed = run.names()
    leave(run.out / done, done=True)
    leave(run.out / failed, error="ValueError: no")
    leave(run.out / killed)
    capsys.readouterr()
    return done, failed, killed


HOLD = """
import sys, time
from domainbed import claims
with claims.claim(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run):
    """A process that claims the first job's directory."""
    directory = run.out / run.names()[0]
    directory.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_launch_leaves_failed_jobs(run, mixed, capsys):
    assert run("launch", grid=GRID) == 0
    out = capsys.readouterr().out
    assert (
        "3 jobs: 1 done, 2 incomplete, 0 not launched.\nAbout to launch 0 jobs.\n"
        "About to start 1 incomplete jobs again; 0 are running and are left alone.\n"
        "1 failed jobs are left alone: `sweep retry_failed` starts them again.\n"
    ) in out
    assert [Path(command.output_dir).name for command in run.commands[-1]] == [mixed[2]]


def test_launch_opens_a_cancelled_sweep_again_and_lists_all(run, mixed):
    job_lists.cancel(run.out)
    (run.out / "jobs.jsonl").unlink()
    run("launch", grid=GRID)
    assert not job_lists.is_cancelled(run.out)
    assert len(run.names()) == 3


def test_nothing_is_launched_that_could_not_run(run, monkeypatch):
    def check(jobs):
        raise BadInput(f"{len(jobs)} can't run")

    monkeypatch.setattr(sweep_checks, "check", check)
    with pytest.raises(BadInput, match="3 can't run"):
        run("launch", grid=GRID)
    assert len(run.commands) == 1
    assert run("launch", "--command_launcher", "dummy", grid=GRID) == 0


def test_stopped_jobs_have_not_failed(run, capsys):
    run.codes = 75
    assert run("launch", grid=GRID) == 0
    assert capsys.readouterr().out.endswith("0 done, 0 failed, 3 stopped (launch again to go on).\n")


@pytest.mark.parametrize("error", [ValueError("--slurm_time x"), ImportError("pip install submitit")])
def test_launchers_say_what_they_lack(run, monkeypatch, error):
    def lacking(commands):
        raise error

    monkeypatch.setitem(command_launchers.REGISTRY, "noting", lacking)
    with pytest.raises(BadInput, match=str(error)):
        run("launch", grid=GRID)


def test_retry_failed(run, mixed, capsys):
    assert run("retry_failed", "--save_every_s", "5") == 0
    assert "About to start 1 failed jobs again.\nLaunching...\n" in capsys.readouterr().out
    [command] = run.commands[-1]
    assert Path(command.output_dir).name == mixed[1]
    assert command.endswith(" --save_every_s 5")
    run("retry_failed", grid=[*GRID, "--test_envs_list", "0"])  # of these, none failed
    assert len(run.commands) == 2


def test_a_directory_without_a_list(tmp_path):
    words = ["--output_dir", str(tmp_path), "--command_launcher", "dummy"]
    with pytest.raises(BadInput, match=r"holds no jobs\.jsonl; say by sweep file or flags"):
        sweep.main(["retry_failed", *words])
    with pytest.raises(BadInput, match="--data_dir is required"):  # DomainBed's grid, as DomainBed takes it
        sweep.main(["delete_incomplete", *words])


def test_delete_incomplete_from_the_list(run, mixed, capsys):
    assert run("delete_incomplete", "--skip") == 0
    assert "3 jobs: 1 done, 2 incomplete, 0 not launched.\nAbout to delete 2 jobs.\n" in capsys.readouterr().out
    assert [name for name in run.names() if (run.out / name).exists()] == [mixed[0]]


def test_delete_incomplete_spares_a_running_job(run, holder, capsys):
    assert run("delete_incomplete", "--skip", grid=GRID) == 0
    assert capsys.readouterr().out.endswith(
        "About to delete 1 jobs.\nDeleting...\nDeleted 0 jobs!\nLeft 1 jobs that are running or were completed"
        " meanwhile.\n"
    )
    assert (run.out / run.names()[0]).exists()


def test_cancel(run, holder, capsys):
    assert run("cancel", "--skip") == 0
    assert holder.wait(10) == -signal.SIGTERM
    out = capsys.readouterr().out
    assert "1 jobs are running.\nAsked 1 running jobs to save and end; 1 of them on this machine, at once.\n" in out
    assert job_lists.is_cancelled(run.out)
    assert (run.out / run.names()[0] / claims.STOP_FILE).exists()
    assert not (run.out / run.names()[1]).exists()


def test_what_is_cancelled_while_it_is_being_checked_is_not_opened_again(run, monkeypatch):
    job_lists.cancel(run.out)  # of an earlier launch
    found = []

    def check(jobs):
        found.append(job_lists.is_cancelled(run.out))
        job_lists.cancel(run.out)

    monkeypatch.setattr("domainbed.scripts.sweep_checks.check", check)
    monkeypatch.setitem(command_launchers.REGISTRY, "mine", lambda commands: [75] * len(commands))
    run("launch", "--skip", "--command_launcher", "mine", grid=GRID)
    assert found == [False]
    assert job_lists.is_cancelled(run.out)


def test_cancel_sends_no_signal_to_another_machine(run, capsys, monkeypatch):
    directory = run.out / run.names()[0]
    directory.mkdir()
    there = {"host": "far", "machine": "far away", "pid": os.getpid(), "attempt": 1}
    (directory / "claim.1").write_text(json.dumps(there))
    monkeypatch.setattr(os, "kill", lambda *args: pytest.fail("a signal was sent"))
    run("cancel", "--skip")
    assert "Asked 1 running jobs to save and end; 0 of them on this machine" in capsys.readouterr().out
    assert (directory / claims.STOP_FILE).exists()


def test_cancel_goes_on_past_a_job_that_cannot_be_told(run, holder, capsys, monkeypatch):
    untold, far, _ = run.names()
    (run.out / far).mkdir()
    (run.out / far / "claim.1").write_text(json.dumps({"host": "far", "machine": "far away", "pid": 1}))
    told, ask = [], claims.request_stop

    def request_stop(directory):
        if directory.endswith(untold):
            raise PermissionError(13, "Permission denied", directory)
        ask(directory)
        told.append(directory)

    monkeypatch.setattr(claims, "request_stop", request_stop)
    assert run("cancel", "--skip") == 1
    assert told == [str(run.out / far)]
    out = capsys.readouterr().out
    assert "Asked 1 running jobs" in out
    assert f"Not told, so it runs on: [Errno 13] Permission denied: '{run.out / untold}'\n" in out


def test_cancel_asks_first(run, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    with pytest.raises(SystemExit):
        run("cancel")
    assert not job_lists.is_cancelled(run.out)


def test_cancel_tells_slurm(run, monkeypatch, capsys):
    (run.out / "slurm").mkdir()
    monkeypatch.setattr("domainbed.slurm.cancel", lambda sweep: ["12", "13"])
    run("cancel", "--skip")
    assert "Took the arrays 12, 13 from SLURM.\n" in capsys.readouterr().out


def test_status(run, mixed, capsys):
    assert run("status") == 0
    out = capsys.readouterr().out
    assert f"Newest failures:\n  {mixed[1]}  ERM on Debug28: ValueError: no\n" in out
    counts = {"queued": 0, "running": 0, "preempted": 1, "failed": 1, "done": 1}
    assert run("status", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == [{"row": "ERM", "dataset": "Debug28", "jobs": 3, "counts": counts}]
    run("status", "--json", grid=[*GRID, "--test_envs_list", "1", "0,1"])
    one, other = counts | {"preempted": 0, "done": 0}, counts | {"preempted": 0, "done": 0, "failed": 0, "queued": 1}
    assert json.loads(capsys.readouterr().out)["counts"] == {key: one[key] + other[key] for key in counts}


def test_status_of_running_jobs(run, holder, capsys):
    capsys.readouterr()
    run("status", "--json")
    [running] = json.loads(capsys.readouterr().out)["running"]
    assert (running["pid"], running["directory"], running["row"]) == (holder.pid, run.names()[0], "ERM")


def test_status_of_domainbeds_directory(tmp_path, capsys):
    leave(tmp_path / ("a" * 32), done=True)
    leave(tmp_path / "any name")
    (tmp_path / ("b" * 32)).mkdir()  # made by a launch, never run
    (tmp_path / "figures").mkdir()
    assert sweep.main(["status", "--output_dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {(row["row"], row["dataset"]): {state: n for state, n in row["counts"].items() if n} for row in rows}
    assert found == {("X", "Y"): {"done": 1, "preempted": 1}, ("?", "?"): {"queued": 1}}


def test_watch_ends_with_the_sweep(run, capsys, monkeypatch):
    def finish(seconds):
        assert seconds == 5.0
        for name in run.names():
            leave(run.out / name, done=True)

    capsys.readouterr()
    monkeypatch.setattr("time.sleep", finish)
    assert run("status", "--watch") == 0
    out = capsys.readouterr().out
    assert "0 of 3 jobs done, nothing runs.\n" in out
    assert out.count("3 of 3 jobs done") == 1
    assert "\x1b" not in out  # no terminal


def test_status_of_nothing(tmp_path):
    with pytest.raises(BadInput, match="nowhere does not exist; name the directory of a sweep"):
        sweep.main(["status", "--output_dir", str(tmp_path / "nowhere")])


def test_status_imports_no_torch(run):
    code = f"import sys; from domainbed.scripts import sweep; sweep.main(['status', '--output_dir', {str(run.out)!r}])"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


@pytest.fixture
def local(run, monkeypatch):
    """Has the local launcher note its commands and options."""

    def local(commands, *, workers=None, threads=1, retries=0, isolation="fork"):
        run.options = {"workers": workers, "threads": threads}
        return run.launcher(commands)

    monkeypatch.setitem(command_launchers.REGISTRY, "local", local)


def test_worker(run, mixed, local, capsys):
    assert run("worker") == 0
    assert [Path(command.output_dir).name for command in run.commands[-1]] == [mixed[2]]
    assert run.options == {"workers": 1, "threads": 1}
    said = "1 of 3 jobs are to be done; 0 of them are running and are waited for.\n"
    assert capsys.readouterr().out == f"{said}Launching...\nLaunched 1 jobs!\n"
    run.codes = 1
    assert run("worker", "--workers", "2", "--threads", "3") == 1
    assert run.options == {"workers": 2, "threads": 3}


def test_what_runs_elsewhere_is_waited_for(run, holder, local, capsys):
    first, *others = run.names()
    for name in others:
        leave(run.out / name, done=True)
    capsys.readouterr()
    assert run("launch", "--command_launcher", "local", grid=GRID) == 0
    assert [Path(command.output_dir).name for command in run.commands[-1]] == [first]
    assert "About to start 0 incomplete jobs again; 1 are running and are waited for.\n" in capsys.readouterr().out
    run("worker")
    assert [Path(command.output_dir).name for command in run.commands[-1]] == [first]
    assert "1 of 3 jobs are to be done; 1 of them are running and are waited for." in capsys.readouterr().out
    launched = len(run.commands)
    run("launch", grid=GRID)
    assert len(run.commands) == launched
    assert "1 are running and are left alone.\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--index", "1"]])
def test_worker_says_what_the_launcher_lacks(run, monkeypatch, words):
    def lacking(commands, *, workers):
        raise command_launchers.Unavailable("the fork server has ended")

    monkeypatch.setitem(command_launchers.REGISTRY, "local", lacking)
    with pytest.raises(BadInput, match="the fork server has ended"):
        run("worker", *words)


def test_worker_with_index(run, mixed, local, capsys):
    for code, status in ((75, 75), (3, 3), (-9, 137), (73, 73)):
        run.codes = code
        assert run("worker", "--index", "2") == status
        assert [Path(command.output_dir).name for command in run.commands[-1]] == [mixed[2]]
    assert capsys.readouterr().out.count("Failed: ") == 2
    assert run("worker", "--index", "1") == 73  # failed before: whoever asks for it by number wants it
    assert [Path(command.output_dir).name for command in run.commands[-1]] == [mixed[1]]
    launched = len(run.commands)
    assert run("worker", "--index", "0") == 0  # done
    assert len(run.commands) == launched
    with pytest.raises(BadInput, match="--index 3: there are 3 jobs; name one of 0 to 2"):
        run("worker", "--index", "3")


def test_index_counts_in_the_order_of_the_grid(run, local, tmp_path):
    run.codes, run.out = 75, tmp_path / "other"
    grid = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "2", "--n_trials", "1", "--single"]
    args = make_args_list(1, ["Debug28"], ["ERM"], 0, 2, None, None, "domain_generalization", 0.2, True, None)
    for index in (4, 1):
        assert run("worker", "--index", str(index), grid=grid) == 75
        assert Path(run.commands[-1][0].output_dir).name == Job(args[index], "o").name
    assert run.names() == [Job(args[index], "o").name for index in (4, 1)]


@pytest.mark.parametrize("words", [[], ["--index", "1"]])
def test_worker_that_is_told_to_end(run, monkeypatch, tmp_path, words):
    saves = f"trap 'touch {tmp_path}/saved; exit 75' TERM; kill -USR1 $PPID; while :; do sleep .01; done"

    def local(commands, *, workers):
        return real([Command(["sh", "-c", saves], command.output_dir) for command in commands], workers=1)

    real, before = command_launchers.local_launcher, signal.getsignal(signal.SIGUSR1)
    monkeypatch.setitem(command_launchers.REGISTRY, "local", local)
    if words:
        assert run("worker", *words) == 75
    else:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
            run("worker")
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_workers_of_a_cancelled_sweep_take_nothing(run, local, capsys):
    job_lists.cancel(run.out)
    assert run("worker") == run("worker", "--index", "1") == 0
    assert len(run.commands) == 1
    assert "The sweep is cancelled" in capsys.readouterr().out


def test_worker_runs_a_real_command(run, monkeypatch, capfd):
    """The exit code of the training comes through; this one refuses its arguments, which fails before any work."""
    entry = {"name": "x", "args": {"algorithm": "ERM", "no_such_flag": 1}}
    (run.out / "jobs.jsonl").write_text(json.dumps(entry) + "\n")
    assert run("worker", "--index", "0", "--isolation", "process", "--retries", "0") == BAD_INPUT_STATUS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "--watch"], "--watch is for status; launch does not read it"),
        (["worker", "--json"], "--json is for status; worker does not read it"),
        (["status", "--index", "0"], "--index is for worker; status does not read it"),
        (["status", "--workers", "2"], "--workers is for launch, refit, retry_failed, worker, plan; status does"),
        (["cancel", "--datasets", "Debug28"], "--datasets means nothing to cancel, which ends the whole sweep"),
        (["worker", "--slurm_mem_gb", "2"], "launcher local has no option --slurm_mem_gb"),
        (["status", "--criterion", "wga"], "--criterion is for refit"),
        (["launch", "--selection_method", "leave_one_out", "--single_test_envs"], "exclude each other"),
    ],
)
def test_flags_belong_to_commands(run, words, message):
    launcher = ["--command_launcher", "noting"] if words[0] == "launch" else []
    with pytest.raises(BadInput, match=message):
        sweep.main([*words, "--output_dir", str(run.out), *launcher])


def test_a_sweep_file_serves_all_commands(run, mixed, tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text(
        f"output_dir = '{run.out}'\ncommand_launcher = 'noting'\nworkers = 3\nsave_every_s = 5.0\nseeds = [1]\n"
        "datasets = ['Debug28']\nalgorithms = ['ERM']\nn_hparams = 1\nn_trials = 1\nsingle_test_envs = true\n"
    )
    assert sweep.main(["status", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"] == 3
    assert sweep.main(["delete_incomplete", str(path), "--skip"]) == 0
    assert "About to delete 2 jobs.\n" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "single"), [(None, False), ("leave_one_out", False), ("iid", True), ("wga", True)])
def test_only_the_jobs_that_a_selection_method_needs(method, single):
    words = ["launch", "--output_dir", "o", "--command_launcher", "dummy"]
    assert parse(words + (["--selection_method", method] if method else [])).single_test_envs is single


def test_selection_methods_are_those_there_are():
    assert tuple(model_selection.CRITERIA) == sweep_arguments.CRITERIA
    others = set(sweep_arguments.SELECTION_METHODS) - set(sweep_arguments.CRITERIA)
    assert others == {"iid", "oracle", "leave_one_out"}


def test_what_says_which_jobs_are_meant(tmp_path):
    bare = ["status", "--output_dir", "o"]
    assert not parse([*bare, "--seed", "0", "--skip_confirmation", "--watch"]).names_jobs
    for words in (["--n_trials", "3"], ["--data_dir", "d"], ["--no_model_save"], ["--selection_method", "iid"]):
        assert parse([*bare, *words]).names_jobs  # defaults among them

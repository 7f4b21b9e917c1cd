"""A task's dealings with its jobs, with scripts in place of train and signals from the scripts in place of SLURM's."""

import json
import os
import pickle
import signal
import sys

import pytest

from domainbed import job_lists, slurm_tasks, states
from domainbed.slurm_tasks import TrainTask

# A job that counts its starts in ``starts``, then does what ``code`` says; ``save`` is train's answer to SIGTERM.
JOB = """
import os, pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[1])
with open(directory / "starts", "a") as file: file.write("x")
start = (directory / "starts").stat().st_size
def done(): (directory / "done").write_text("done"); sys.exit(0)
def save(*_): (directory / "saved").touch(); os._exit(75)
def forever():
    while True: time.sleep(0.01)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a task of jobs that run these scripts; names are job0, job1, ..."""
    monkeypatch.setattr(slurm_tasks, "POLL_S", 0.01)
    monkeypatch.setattr(slurm_tasks, "REMIND_S", 0.2)

    def make(*codes, **options):
        jobs = []
        for i, code in enumerate(codes):
            directory = tmp_path / f"job{i}"
            directory.mkdir()
            jobs.append((("python", "-c", JOB + code, str(directory)), str(directory)))
        return TrainTask(jobs, **options)

    return make


def starts(directory):
    path = directory / "starts"
    return len(path.read_text()) if path.exists() else 0


def failure(directory):
    path = directory / states.FAILED_FILE
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("code", "retries", "times", "error"),
    [
        ("done()", 3, 1, None),
        ("sys.exit(2)", 3, 1, "exit status 2; its log says more"),
        ("sys.exit(73)", 3, 1, None),  # another process runs it
        ("sys.exit(5)", 2, 3, "exit status 5; its log says more"),
        ("sys.exit(5)", 0, 1, "exit status 5; its log says more"),
        ("done() if start == 2 else sys.exit(1)", 1, 2, None),
        ("done() if start == 2 else sys.exit(75)", 1, 2, None),  # somebody told the job, but not the task, to end
        ("sys.exit(75)", 1, 2, None),
        ("os.kill(os.getpid(), signal.SIGUSR1)", 0, 1, None),  # told to end before it could hear
        ("os.kill(os.getpid(), 50)", 0, 1, "killed by signal 50"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 0, 1, "killed by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", 0, 1, "killed by SIGKILL, as where memory runs out (SLURM allows 7 MB, see --slu"),
    ],
)
def test_what_follows_an_exit_code(tmp_path, monkeypatch, make, code, retries, times, error):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "7")
    make(code, "done()", retries=retries)()
    assert starts(tmp_path / "job0") == times
    found = failure(tmp_path / "job0")
    assert (found and found["error"].startswith(error)) if error else found is None
    assert (tmp_path / "job1/done").exists()  # whatever became of the first


def test_out_of_memory_is_named(tmp_path, monkeypatch, make):
    counts = iter([3, 4])
    monkeypatch.setattr(slurm_tasks.children, "oom_kills", lambda: next(counts))
    make("os.kill(os.getpid(), 9)", retries=0)()
    assert failure(tmp_path / "job0")["error"].startswith("out of memory: killed by the kernel")
    assert failure(tmp_path / "job0")["exit_status"] == -9


def test_what_train_says_of_its_failure_stays(tmp_path, make):
    make("(directory / 'failed').write_text('{\"error\": \"own\"}'); sys.exit(1)", retries=0)()
    assert failure(tmp_path / "job0") == {"error": "own"}


def test_jobs_that_are_over_are_not_started(tmp_path, make):
    task = make("done()", "done()", "done()")
    (tmp_path / "job0/done").touch()
    states.write_failure(tmp_path / "job1", "no", 1)
    task()
    assert [starts(tmp_path / f"job{i}") for i in range(3)] == [0, 0, 1]


def test_a_cancelled_sweep_takes_no_more_jobs(tmp_path, make):
    make("(directory.parent / 'cancelled').touch(); sys.exit(1)", "done()")()
    assert job_lists.is_cancelled(tmp_path)
    assert [starts(tmp_path / f"job{i}") for i in range(2)] == [1, 0]


def test_what_a_job_finds(tmp_path, monkeypatch, make):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    code = """
names = ("SIGTERM", "SIGUSR1", "SIGUSR2")
ignored = all(signal.getsignal(getattr(signal, name)) == signal.SIG_IGN for name in names)
threads = os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]
(directory / "found").write_text(repr((sys.executable, os.getcwd(), threads, ignored)))
done()
"""
    make(code, threads=3)()
    assert (tmp_path / "job0/found").read_text() == repr((sys.executable, os.getcwd(), ("3", "3"), True))


@pytest.fixture
def submitit_handler():
    """Has SIGUSR2 do what submitit does with it; yields where the task's successor goes."""
    requeued = []

    def install(task):
        def handle(number, frame):
            requeued.append(task.checkpoint().function)
            sys.exit(-1)

        signal.signal(signal.SIGUSR2, handle)
        return requeued

    previous = signal.getsignal(signal.SIGUSR2)
    yield install
    signal.signal(signal.SIGUSR2, previous)


SAVES = """
signal.signal(signal.SIGTERM, save)
if start == 2: done()
os.kill(os.getppid(), signal.SIGUSR2)
forever()
"""


def test_a_warning_has_the_job_saved_before_the_task_is_requeued(tmp_path, make, submitit_handler):
    task = make("done()", SAVES, "done()", retries=2, threads=3, grace_s=60)
    requeued = submitit_handler(task)
    with pytest.raises(SystemExit):
        task()
    assert (tmp_path / "job1/saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = pickle.loads(pickle.dumps(requeued[0]))
    assert (again.jobs, again.retries, again.threads, again.grace_s) == (task.jobs, 2, 3, 60)
    again()
    assert [starts(tmp_path / f"job{i}") for i in range(3)] == [1, 2, 1]
    assert all((tmp_path / f"job{i}/done").exists() for i in range(3))


def test_a_job_that_does_not_hear_yet_is_asked_again(tmp_path, make, submitit_handler):
    deaf = "os.kill(os.getppid(), signal.SIGUSR2); time.sleep(0.5); signal.signal(signal.SIGTERM, save); forever()"
    task = make(deaf, grace_s=60)
    submitit_handler(task)
    with pytest.raises(SystemExit):
        task()
    assert (tmp_path / "job0/saved").exists()


def test_a_job_that_does_not_save_in_time_is_killed(tmp_path, make, submitit_handler):
    task = make("os.kill(os.getppid(), signal.SIGUSR2); forever()", grace_s=0.3)
    assert len(submitit_handler(task)) == 0
    with pytest.raises(SystemExit):
        task()
    assert failure(tmp_path / "job0") is None


TERMINATED = """
signal.signal(signal.SIGTERM, save)
if start == 2: done()
os.kill(os.getppid(), signal.SIGTERM)
forever()
"""


def test_sigterm_alone_has_the_job_saved_and_the_task_stay(tmp_path, monkeypatch, make):
    """SLURM does not put a preempted task back into the queue that ends by itself."""
    stays = []
    monkeypatch.setattr(slurm_tasks, "STAY_S", 0)
    task = make(TERMINATED)
    stay = task._stay
    monkeypatch.setattr(task, "_stay", lambda: (stays.append((tmp_path / "job0/saved").exists()), stay()))
    task()
    assert stays == [True]
    assert starts(tmp_path / "job0") == 2  # nobody ended it: it goes on
    assert (tmp_path / "job0/done").exists()


def test_the_task_of_a_cancelled_sweep_does_not_stay(tmp_path, make):
    make(f"(directory.parent / 'cancelled').touch()\n{TERMINATED}")()
    assert (starts(tmp_path / "job0"), (tmp_path / "job0/saved").exists()) == (1, True)


@pytest.mark.parametrize(("restarts", "waits"), [("1", 1), ("0", 0)])
def test_a_task_that_starts_again_outlasts_the_claim_of_a_lost_node(tmp_path, monkeypatch, make, restarts, waits):
    seen = []
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(
        slurm_tasks.time, "sleep", lambda s, sleep=slurm_tasks.time.sleep: (seen.append(s), sleep(0.01))
    )
    task, answers = make("done()"), iter([states.Status(states.State.RUNNING)])
    monkeypatch.setattr(states, "read", lambda directory: next(answers, states.QUEUED))
    task()
    assert seen.count(1) == waits
    assert (tmp_path / "job0/done").exists()

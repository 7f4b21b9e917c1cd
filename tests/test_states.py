"""States from hand-made directories, and from real processes that are killed."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed import claims, holders, states
from domainbed.states import State, Status

SLEEPER = """
import sys
from domainbed import claims
with claims.claim(sys.argv[1]) as held:
    print("held", flush=True)
    sys.stdin.readline()
"""
RELEASED = {"claim.2": json.dumps({"host": "far", "machine": "far", "pid": 7, "step": 5, "steps": 9, "released": True})}
ALIVE = {"claim.2": json.dumps({"host": "far", "machine": "far", "pid": 7, "step": 5, "steps": 9})}
FAILED = {"failed": json.dumps({"error": "out of memory", "exit_status": 1, "attempt": 2, "time": 12.5})}
RECORDS = {"results.jsonl": '{"torn'}
DONE = {"done": "done"}


def make(directory: Path, *contents: dict[str, str]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in {name: text for content in contents for name, text in content.items()}.items():
        (directory / name).write_text(text)
    return directory


CASES = [
    ([], State.QUEUED),
    ([{"lock": "", "out.txt": "", "err.txt": "Killed", "claim.partial-1": ""}], State.QUEUED),
    ([RECORDS], State.PREEMPTED),
    ([{"snapshot.pkl": ""}], State.PREEMPTED),
    ([{"snapshot_previous.pkl": ""}], State.PREEMPTED),
    ([RELEASED], State.PREEMPTED),
    ([ALIVE], State.RUNNING),
    ([ALIVE, FAILED, RECORDS], State.RUNNING),
    ([RELEASED, FAILED, RECORDS, {"snapshot.pkl": ""}], State.FAILED),
    ([FAILED], State.FAILED),
    ([DONE], State.DONE),
    ([DONE, ALIVE, FAILED, RECORDS, {"snapshot.pkl": ""}], State.DONE),
]


@pytest.mark.parametrize(("contents", "state"), CASES, ids=range(len(CASES)))
def test_states(tmp_path: Path, contents: list[dict[str, str]], state: State) -> None:
    job = make(tmp_path / "job", *contents)
    assert states.read(job).state == state
    assert states.scan(tmp_path)["job"].state == state


def test_a_state_is_its_word() -> None:
    assert [f"{state}" for state in State] == ["queued", "running", "preempted", "failed", "done"]


def test_what_a_status_tells(tmp_path: Path) -> None:
    assert states.read(tmp_path / "nowhere") == Status(State.QUEUED)
    running = states.read(make(tmp_path / "running", ALIVE))
    beat = (tmp_path / "running" / "claim.2").stat().st_mtime
    assert running.heartbeat_age_s is not None
    assert running._replace(heartbeat_age_s=None) == Status(State.RUNNING, "far", 7, None, 5, 9, 2, None, beat)
    failed = states.read(make(tmp_path / "failed", RELEASED, FAILED))
    assert failed == Status(State.FAILED, "far", 7, None, 5, 9, 2, "out of memory", 12.5)
    done = states.read(make(tmp_path / "done", DONE, RELEASED))
    assert done == Status(State.DONE, time=(tmp_path / "done" / "done").stat().st_mtime)


def test_a_heartbeats_age_is_the_file_systems_and_the_near_future_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = make(tmp_path / "job", ALIVE) / "claim.2"
    monkeypatch.setattr(holders, "file_system_now", lambda directory: 1000.0)
    for beat, age in ((970.0, 30.0), (1000.0 - holders.EXPIRY_S, holders.EXPIRY_S), (1050.0, 0.0)):
        os.utime(claim, (beat, beat))
        assert states.read(tmp_path / "job").heartbeat_age_s == age
        assert states.scan(tmp_path)["job"].heartbeat_age_s == age
    for beat in (900.0, 5000.0):  # too old; or of before the clock was set back, and not renewed since
        os.utime(claim, (beat, beat))
        assert states.read(tmp_path / "job") == Status(State.PREEMPTED, "far", 7, None, 5, 9, 2, None, beat)


def test_a_scan_asks_for_the_time_once_and_only_where_something_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(holders, "file_system_now", lambda directory: asked.append(directory) or time.time())
    make(tmp_path / "a", DONE), make(tmp_path / "b"), make(tmp_path / "c", RECORDS)
    assert [status.state for _, status in sorted(states.scan(tmp_path).items())] == ["done", "queued", "preempted"]
    assert asked == []
    make(tmp_path / "d", ALIVE), make(tmp_path / "e", RELEASED)
    states.scan(tmp_path)
    assert asked == [str(tmp_path)]


def test_a_scan_answers_for_the_asked_names_in_their_order(tmp_path: Path) -> None:
    make(tmp_path / "a", DONE), make(tmp_path / "b", RECORDS), make(tmp_path / "slurm")
    (tmp_path / "jobs.jsonl").write_text("")
    assert {name: status.state for name, status in states.scan(tmp_path).items()} == {"a": "done", "b": "preempted"}
    some = states.scan(tmp_path, ["x", "b", "jobs.jsonl"])
    assert [(name, status.state) for name, status in some.items()] == [
        ("x", "queued"),
        ("b", "preempted"),
        ("jobs.jsonl", "queued"),
    ]
    assert states.scan(tmp_path / "nowhere", ["x"]) == {"x": states.QUEUED}
    assert states.scan(tmp_path / "nowhere") == {}


def test_a_killed_process_is_preempted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER, tmp_path], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

        def probed(*args: object) -> None:
            raise AssertionError("a look at the state took the lock")

        monkeypatch.setattr(fcntl, "lockf", probed)
        status = states.read(tmp_path)
        assert (status.state, status.host, status.pid) == (State.RUNNING, os.uname().nodename, process.pid)
        process.kill()
        while states.read(tmp_path).state == State.RUNNING:
            time.sleep(0.001)
        assert states.read(tmp_path).state == State.PREEMPTED
        assert holders.process(process.pid) is not None  # a zombie: nobody has waited for it yet
    assert states.read(tmp_path).state == State.PREEMPTED


def test_a_process_that_ends_well_leaves_its_state(tmp_path: Path) -> None:
    with claims.claim(tmp_path):
        assert states.read(tmp_path).state == State.RUNNING
        states.write_failure(tmp_path, "x", 1)
        assert states.read(tmp_path).state == State.RUNNING
    assert states.read(tmp_path).state == State.FAILED


@pytest.mark.parametrize(("left", "state"), [("failed", State.FAILED), ("done", State.DONE)])
def test_a_job_that_ends_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, state: State
) -> None:
    make(tmp_path, ALIVE)
    newest = holders.newest

    def late(directory: str, names: list[str]) -> holders.Holder | None:
        make(tmp_path, FAILED if left == "failed" else DONE, RELEASED)
        if left == "done":
            (tmp_path / "claim.2").unlink()
        return newest(directory, names)

    monkeypatch.setattr(holders, "newest", late)
    assert states.read(tmp_path).state == state


def test_failures(tmp_path: Path) -> None:
    states.write_failure(tmp_path, "CUDA out of memory\n  tried \ud800", 1)
    told = json.loads((tmp_path / "failed").read_text())
    assert (told["error"], told["exit_status"], told["attempt"]) == ("CUDA out of memory tried \ud800", 1, 0)
    make(tmp_path, RELEASED)
    states.write_failure(tmp_path, "again", -9)
    status = states.read(tmp_path)
    assert (status.error, status.attempt) == ("again", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim.2", "failed"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"error": "x"}'])
def test_a_damaged_failure_is_a_failure(tmp_path: Path, content: str) -> None:
    status = states.read(make(tmp_path, {"failed": content}))
    assert (status.state, status.error) == (State.FAILED, f"(unknown: {tmp_path}/failed is damaged)")


def test_a_failure_that_cannot_be_written_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states.write_failure(tmp_path / "nowhere", "first", 1)
    make(tmp_path, FAILED)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    states.write_failure(tmp_path, "second", 1)
    assert states.read(tmp_path).error == "out of memory"
    assert "the failure was: first" in caplog.text
    assert "No space left on device); the failure was: second" in caplog.text


def test_code_of(tmp_path):
    assert states.code_of(str(tmp_path / "none")) == 75
    job = tmp_path / "job"
    job.mkdir()
    code = "import sys; from domainbed import claims\nwith claims.claim(sys.argv[1]): print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    assert states.code_of(str(job)) == claims.EXIT_LOCKED
    process.communicate("\n")
    assert states.code_of(str(job)) == 75
    states.write_failure(job, "broken", 1)
    assert states.code_of(str(job)) == 1
    (job / "done").write_text("done")
    assert states.code_of(str(job)) == 0

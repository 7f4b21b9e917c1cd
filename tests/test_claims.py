"""Claims: two real processes where the system decides, and every interleaving that matters by hand."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from domainbed import claims, holders
from domainbed.claims import Lost, RunLocked, claim

HOUR = 3600.0
HOLDER = """
import contextlib, sys, time
from domainbed import claims, holders
claims.BEAT_S = 0.02
if len(sys.argv) > 2:
    holders.machine = lambda: sys.argv[2]
try:
    with claims.claim(sys.argv[1], on_lost=lambda: print("on_lost", flush=True)) as held:
        print("held", flush=True)
        while True:
            held.check()
            time.sleep(0.01)
except claims.Lost:
    print("check", flush=True)
"""
RACER = """
import contextlib, sys, time
from domainbed import claims, holders
directory, name = sys.argv[1:]
holders.machine = lambda: name
claims.lock = lambda directory: contextlib.nullcontext()
while line := sys.stdin.readline():
    while time.monotonic() < float(line):
        pass
    try:
        with claims.claim(directory) as held:
            print("got", held.attempt, flush=True)
            sys.stdin.readline()
    except claims.RunLocked:
        print("locked", flush=True)
        sys.stdin.readline()
    print("over", flush=True)
"""


@contextlib.contextmanager
def child(script: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != claims.LOCK_FILE)


def take(directory: Path) -> None:
    with claim(directory):
        pass


def foreign(directory: Path, attempt: int = 1, age_s: float = 0.0, **facts: object) -> Path:
    """A claim of another machine whose last heartbeat is so old."""
    path = directory / f"claim.{attempt}"
    path.write_text(json.dumps({"host": "far", "machine": "far 1", "pid": 7, "start": 1} | facts))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


class Watch(SimpleNamespace):
    """The module's clock: sleeping takes no time, and something may happen meanwhile."""

    def __init__(self, during: Callable[[float], object] = lambda now: None) -> None:
        super().__init__(now=0.0, during=during, clock_gettime=time.clock_gettime)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during(self.now)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    clock = Watch()
    monkeypatch.setattr(claims, "time", clock)
    return clock


def no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "lock", lambda directory: contextlib.nullcontext())


def test_a_live_process_is_named_and_a_killed_one_replaced_at_once(tmp_path: Path, watch: Watch) -> None:
    with child(HOLDER, tmp_path) as process:
        assert said(process) == "held"
        with pytest.raises(RunLocked, match=rf"host {os.uname().nodename}, process {process.pid}, heartbeat \d+ s ago"):
            take(tmp_path)
        process.kill()
        until(lambda: not holders.newest(tmp_path).alive(now=0))  # type: ignore[union-attr]
        assert holders.process(process.pid) is not None  # a zombie: nobody has waited for it yet
        with claim(tmp_path) as held:
            assert held.attempt == 2
            assert names(tmp_path) == ["claim.2"]
    assert watch.now == 0


LOCKER = """
import sys
from domainbed import claims
with claims.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_alone_excludes_and_an_earlier_claim_is_not_blamed(tmp_path: Path) -> None:
    foreign(tmp_path, released=True)
    with child(LOCKER, tmp_path) as process:
        assert said(process) == "held"
        with pytest.raises(RunLocked, match=f"another process is running in {tmp_path}$"):
            take(tmp_path)
    take(tmp_path)
    assert names(tmp_path) == ["claim.2"]


def test_two_machines_race_and_one_wins_each_time(tmp_path: Path) -> None:
    with child(RACER, tmp_path, "one") as one, child(RACER, tmp_path, "two") as two:
        tell(one, "0"), said(one), tell(one, ""), said(one)  # both have started when it begins
        tell(two, "0"), said(two), tell(two, ""), said(two)
        for attempt in range(3, 53):
            start = str(time.monotonic() + 0.001)
            tell(one, start), tell(two, start)
            assert sorted([said(one), said(two)]) == [f"got {attempt}", "locked"]
            tell(one, ""), tell(two, "")
            assert [said(one), said(two)] == ["over", "over"]
    assert names(tmp_path) == ["claim.52"]


def test_another_machine_with_a_fresh_heartbeat_is_left_alone(tmp_path: Path, watch: Watch) -> None:
    foreign(tmp_path, age_s=holders.EXPIRY_S - 20)
    with pytest.raises(RunLocked, match=r"host far, process 7, heartbeat 4\d s ago"):
        take(tmp_path)
    assert watch.now == 0
    assert names(tmp_path) == ["claim.1"]


OUT_OF_TIME = [HOUR, holders.EXPIRY_S + 5, -HOUR]


@pytest.mark.parametrize("age_s", OUT_OF_TIME)
def test_another_machine_that_is_dead_is_replaced_after_a_watch(tmp_path: Path, watch: Watch, age_s: float) -> None:
    foreign(tmp_path, 4, age_s)
    with claim(tmp_path) as held:
        assert watch.now == pytest.approx(claims.CONFIRM_S)
        assert held.attempt == 5
        assert names(tmp_path) == ["claim.5"]


@pytest.mark.parametrize("age_s", OUT_OF_TIME)
def test_another_machine_that_beats_by_another_clock_is_left_alone(tmp_path: Path, watch: Watch, age_s: float) -> None:
    path = foreign(tmp_path, age_s=age_s)
    last = path.stat().st_mtime

    def beat(now: float) -> None:
        if now >= claims.CONFIRM_S:  # at the very last moment
            os.utime(path, (last + 10, last + 10))

    watch.during = beat
    with pytest.raises(RunLocked, match="host far"):
        take(tmp_path)
    assert names(tmp_path) == ["claim.1"]


def test_another_machine_that_ends_while_watched_is_left_to_whoever_comes_next(tmp_path: Path, watch: Watch) -> None:
    foreign(tmp_path, age_s=HOUR)
    watch.during = lambda now: foreign(tmp_path, released=True)
    with pytest.raises(RunLocked):
        take(tmp_path)
    with claim(tmp_path) as held:
        assert held.attempt == 2


def test_a_process_that_slept_and_was_replaced_learns_it_on_waking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_lock(monkeypatch)
    monkeypatch.setattr(claims, "CONFIRM_S", 0.1)
    with child(HOLDER, tmp_path, "far") as process:
        assert said(process) == "held"
        process.send_signal(signal.SIGSTOP)
        until(lambda: holders.process(process.pid).state == "T")  # type: ignore[union-attr]
        os.utime(tmp_path / "claim.1", (time.time() - HOUR,) * 2)
        with claim(tmp_path) as held:
            assert held.attempt == 2
            process.send_signal(signal.SIGCONT)
            assert [said(process), said(process)] == ["on_lost", "check"]  # once each
            assert said(process) == ""
            held.check()
            assert names(tmp_path) == ["claim.2"]


def test_check_sees_a_loss_before_any_heartbeat(tmp_path: Path) -> None:
    lost: list[str] = []
    with claim(tmp_path, on_lost=lambda: lost.append("lost")) as held:
        held.check()
        (tmp_path / "claim.1").unlink()
        for _ in range(2):
            with pytest.raises(Lost, match="another process has taken over"):
                held.check()
    assert lost == ["lost"]
    assert names(tmp_path) == []


def test_check_looks_for_itself_after_a_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    with claim(tmp_path) as held:
        foreign(tmp_path, 2)  # its maker has not removed ours yet
        held.check()
        watch.clock_gettime = lambda clock: time.clock_gettime(clock) + holders.EXPIRY_S
        with pytest.raises(Lost):
            held.check()
    assert names(tmp_path) == ["claim.1", "claim.2"]


def test_a_heartbeat_sees_a_higher_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    lost: list[str] = []
    with claim(tmp_path, on_lost=lambda: lost.append("lost")):
        foreign(tmp_path, 2)
        until(lambda: lost)
    assert lost == ["lost"]


def test_a_stale_handle_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    lost: list[str] = []
    with claim(tmp_path, on_lost=lambda: lost.append("lost")):
        monkeypatch.setattr(claims, "_content", raising(errno.ESTALE))
        until(lambda: lost)


def raising(number: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("winner", ["same number", "higher number"])
def test_whoever_comes_late_withdraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    link = os.link
    foreign(tmp_path, 1, released=True)

    def late(source: str, target: str) -> None:
        foreign(tmp_path, 2 if winner == "same number" else 3, pid=8)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(RunLocked, match="host far, process 8"):
        take(tmp_path)
    theirs = "claim.2" if winner == "same number" else "claim.3"
    assert names(tmp_path) == ["claim.1", theirs]
    assert json.loads((tmp_path / theirs).read_text())["pid"] == 8


def test_a_partial_file_that_the_winner_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", raising(errno.ENOENT))
    with pytest.raises(RunLocked):
        take(tmp_path)


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with claim(tmp_path) as held:
        held.check()
        assert names(tmp_path) == ["claim.1"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_without_hard_links_a_claim_is_as_exclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", raising(number))
    with claim(tmp_path) as held:
        held.check()
        assert names(tmp_path) == ["claim.1"]
        with pytest.raises(FileExistsError):
            claims._create(tmp_path, 1, b"")
        assert names(tmp_path) == ["claim.1"]
    assert holders.newest(tmp_path).released  # type: ignore[union-attr]


def test_a_full_disk_at_the_start_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        take(tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_later_is_told_once_and_the_heart_beats_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    path = tmp_path / "claim.1"
    with claim(tmp_path) as held:
        monkeypatch.setattr(os, "pwrite", raising(errno.ENOSPC))
        for _ in range(3):
            os.utime(path, (0, 0))
            until(lambda: path.stat().st_mtime > 0)
        held.check()
        monkeypatch.undo()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the heartbeat could not be written: [Errno 28] No space left on device"
    ]


def test_heartbeats_carry_the_progress_in_lines_of_equal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    path = tmp_path / "claim.1"
    with claim(tmp_path) as held:
        assert len(path.read_bytes()) == holders.WIDTH
        held.report(123456, 200000)
        until(lambda: holders.newest(tmp_path).step == 123456)  # type: ignore[union-attr]
        held.report(7, 200000)
        until(lambda: holders.newest(tmp_path).step == 7)  # type: ignore[union-attr]
        text = path.read_bytes()
    assert len(text) == holders.WIDTH
    assert text.endswith(b"\n")
    told = json.loads(text)
    assert (told["pid"], told["attempt"], told["steps"]) == (os.getpid(), 1, 200000)


def test_a_request_to_stop_is_heard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    heard: list[str] = []
    with claim(tmp_path, on_stop=lambda: heard.append("stop")) as held:
        assert not held.stop_requested
        for _ in range(2):
            claims.request_stop(tmp_path)
            until(lambda: not (tmp_path / "stop").exists())
        until(lambda: heard)
        assert held.stop_requested
        held.check()
    assert heard == ["stop"]


def test_a_request_to_an_earlier_process_is_dropped(tmp_path: Path) -> None:
    claims.request_stop(tmp_path)
    os.utime(tmp_path / "stop", (time.time() - 1,) * 2)
    with claim(tmp_path) as held:
        assert names(tmp_path) == ["claim.1"]
        assert not held.stop_requested


def test_a_request_while_it_starts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def start(source: str, target: str) -> None:
        link(source, target)
        claims.request_stop(tmp_path)
        os.utime(tmp_path / "stop", (time.time() + 1,) * 2)

    monkeypatch.setattr(os, "link", start)
    with claim(tmp_path):
        assert names(tmp_path) == ["claim.1", "stop"]


def test_a_request_is_not_taken_from_the_process_it_is_meant_for(tmp_path: Path) -> None:
    foreign(tmp_path)
    claims.request_stop(tmp_path)
    with pytest.raises(RunLocked):
        take(tmp_path)
    assert names(tmp_path) == ["claim.1", "stop"]


@pytest.mark.parametrize(
    ("error", "ended"), [(None, None), (KeyError("x"), "KeyError"), (SystemExit(75), "SystemExit")]
)
def test_a_release_says_how_it_ended_and_the_next_attempt_follows(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, ended: str | None
) -> None:
    with contextlib.suppress(KeyError, SystemExit), claim(tmp_path) as held:
        held.report(3, 9)
        if error:
            raise error
    holder = holders.newest(tmp_path)
    assert holder is not None
    assert (holder.released, holder.ended, holder.step, holder.steps) == (True, ended, 3, 9)
    assert not holder.alive(holder.heartbeat)
    monkeypatch.setattr(holders, "machine", lambda: "another")
    with claim(tmp_path) as held:
        assert held.attempt == 2
    assert watch.now == 0
    assert names(tmp_path) == ["claim.2"]


def test_done_removes_the_claims(tmp_path: Path) -> None:
    take(tmp_path)
    with claim(tmp_path) as held:
        assert held.attempt == 2
        (tmp_path / "done").write_text("done")
    assert names(tmp_path) == ["done"]


@pytest.mark.parametrize("cleared", [True, False])
def test_a_lost_claim_removes_nothing_of_the_winner(tmp_path: Path, cleared: bool) -> None:
    with claim(tmp_path):
        foreign(tmp_path, 2)
        (tmp_path / "done").write_text("done")
        if cleared:
            (tmp_path / "claim.1").unlink()
    assert names(tmp_path) == ["claim.2", "done"]


@pytest.mark.parametrize("fate", ["removed", "moved"])
def test_a_directory_that_vanishes_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    directory = tmp_path / "job"
    directory.mkdir()
    with claim(directory) as held:
        if fate == "removed":
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
            until(lambda: held._lost)
        else:
            directory.rename(tmp_path / "moved")
            until(lambda: held._warned)
            held.check()
    assert not directory.exists()


def test_what_a_killed_process_left_half_made_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "claim.partial-0").write_text("")
    (tmp_path / "claim.0").write_text("somebody's")
    with claim(tmp_path) as held:
        assert held.attempt == 1
        assert names(tmp_path) == ["claim.0", "claim.1"]


GARBAGE = [b"", b"{", b"null", b"[1]", b"\xff\xfe", b"[" * 2000, b'{"pid": "7", "machine": 1, "released": "yes"}']


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_of_a_damaged_claim_only_the_time_speaks(tmp_path: Path, watch: Watch, content: bytes) -> None:
    path = tmp_path / "claim.2"
    path.write_bytes(content)
    holder = holders.newest(tmp_path)
    assert holder == holders.Holder(2, path.stat().st_mtime)
    assert holder.alive(holder.heartbeat + holders.EXPIRY_S)
    assert not holder.alive(holder.heartbeat + holders.EXPIRY_S + 1)
    with pytest.raises(RunLocked, match="host unknown, process unknown"):
        take(tmp_path)
    os.utime(path, (0, 0))
    with claim(tmp_path) as held:
        assert held.attempt == 3
    assert watch.now == pytest.approx(claims.CONFIRM_S)


def test_names_read_before_a_takeover_lead_to_the_newest_claim(tmp_path: Path) -> None:
    foreign(tmp_path, 12)
    assert holders.newest(tmp_path, ["claim.9", "claim.11", "lock"]) == holders.newest(tmp_path)
    assert holders.newest(tmp_path, ["lock"]) is None
    (tmp_path / "claim.12").unlink()
    assert holders.newest(tmp_path, ["claim.12"]) is None


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    foreign(tmp_path, 9)
    foreign(tmp_path, 10)
    assert holders.newest(tmp_path).attempt == 10  # type: ignore[union-attr]


def mine(**facts: object) -> holders.Holder:
    own = holders.process(os.getpid())
    assert own is not None
    known = holders.Holder(1, 0.0, machine=holders.machine(), pid=os.getpid(), start=own.start)
    return known._replace(**facts)


def test_a_process_of_this_machine_is_judged_by_itself_and_not_by_its_heartbeat() -> None:
    assert mine().alive(now=HOUR)
    assert mine(start=None).alive(now=HOUR)
    assert not mine(start=1).alive(now=0)  # the number was used again
    assert not mine(machine="far").alive(now=HOUR)
    assert not mine(machine="far").alive(now=-HOUR)  # a clock was set back, and nobody has beaten since
    assert mine(machine="far").alive(now=-1)


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        until(lambda: holders.process(process.pid).is_over)  # type: ignore[union-attr]
        assert not mine(pid=process.pid, start=None).alive(now=0)
    assert holders.process(process.pid) is None
    assert not mine(pid=process.pid, start=None).alive(now=0)


def test_a_killed_process_is_alive_until_its_last_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    known = mine()
    for threads, alive in ((3, True), (2, True), (1, False), (0, False)):
        monkeypatch.setattr(holders, "process", lambda pid, n=threads: holders.Process("Z", n, known.start))
        assert known.alive(now=0) is alive


def test_where_proc_shows_nothing_a_signal_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    known = mine()
    monkeypatch.setattr(holders, "process", lambda pid: None)
    assert known.alive(now=HOUR)
    monkeypatch.setattr(os, "kill", raising(errno.EPERM))
    assert known.alive(now=HOUR)
    monkeypatch.setattr(os, "kill", raising(errno.ESRCH))
    assert not known.alive(now=0)


def test_a_process_that_lives_without_its_lock_is_not_replaced(tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(RunLocked, match=f"process {os.getpid()}"):
        take(tmp_path)


def test_the_time_is_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (tmp_path / "file").write_text("") or (tmp_path / "file").stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert before <= holders.file_system_now(tmp_path) <= before + HOUR
    assert names(tmp_path) == ["file"]
    assert holders.file_system_now(tmp_path / "nowhere") == 0.0

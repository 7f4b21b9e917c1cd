"""The overview of a sweep against numbers counted by hand."""

import json

import pytest

from domainbed import status_tables
from domainbed.job_lists import Listed
from domainbed.states import State, Status
from domainbed.status_tables import duration, overview, rate, row_name

NOW = 1_000_000.0
ARGS = [
    {"algorithm": "A", "dataset": "D"},
    {"algorithm": "A", "dataset": "D"},
    {"algorithm": "A", "dataset": "D"},
    {"algorithm": "A", "partition": "group", "dataset": "D"},
    {"algorithm": "A", "partition": "group", "label": "mine", "dataset": "Longer"},
    {},
    {"algorithm": "A", "dataset": "D"},
]
STATUSES = [
    Status(State.DONE, time=NOW - 7200),
    Status(State.DONE, time=NOW - 3600),
    Status(State.RUNNING, host="h", pid=7, heartbeat_age_s=3.0, step=5, steps=10, attempt=2),
    Status(State.FAILED, error="ValueError: old", attempt=1, time=NOW - 50),
    Status(State.FAILED, error="ValueError: new", attempt=3, time=NOW - 10),
    Status(State.PREEMPTED),
]  # of the last job nothing is known
JOBS = [Listed(f"job{i}", args) for i, args in enumerate(ARGS)]
FOUND = overview(JOBS, {f"job{i}": status for i, status in enumerate(STATUSES)}, NOW)


def test_counts():
    found = {cell: {state: n for state, n in counts.items() if n} for cell, counts in FOUND.cells.items()}
    assert found == {
        ("A", "D"): {"done": 2, "running": 1, "queued": 1},
        ("A:group", "D"): {"failed": 1},
        ("mine", "Longer"): {"failed": 1},
        ("?", "?"): {"preempted": 1},
    }
    assert FOUND.counts == {"done": 2, "running": 1, "queued": 1, "failed": 2, "preempted": 1}
    assert not FOUND.is_over
    assert overview(JOBS[3:5], {"job3": STATUSES[3], "job4": STATUSES[4]}, NOW).is_over


def test_rate():
    assert rate([0.0, 1.0], 2.0, running=2) is None  # they may have ended at once
    assert rate([5.0], 10.0, running=0) is None
    assert rate([0.0, 3600.0, 7200.0], 7200.0, running=0) == 1.0
    assert rate([0.0, 3600.0, 7200.0], 7200.0, running=2) == 1.0
    assert rate([0.0, 3600.0, 7200.0], 36 * 3600.0, running=0) == 1.0
    assert rate([0.0, 3600.0, 7200.0], 36 * 3600.0, running=2) == pytest.approx(3 / 36)
    long_ago = [0.0] * 9
    assert rate(long_ago + [1e6 + 36 * i for i in range(50)], 1e6 + 49 * 36, running=2) == 100.0


def test_end():
    assert FOUND.jobs_per_hour == 1.0
    assert FOUND.left_s == 3 * 3600  # running, preempted, queued
    stopped = overview(JOBS, {f"job{i}": s for i, s in enumerate(STATUSES) if s.state is not State.RUNNING}, NOW)
    assert (stopped.jobs_per_hour, stopped.left_s) == (1.0, None)
    assert "2 of 7 jobs done, 1 an hour lately, nothing runs." in status_tables.as_text(stopped)


def test_json():
    text = json.dumps(status_tables.as_json(FOUND, "dir"))
    found = json.loads(text)
    none = dict.fromkeys(("queued", "running", "preempted", "failed", "done"), 0)
    assert found["rows"][1] == {"row": "A:group", "dataset": "D", "jobs": 1, "counts": none | {"failed": 1}}
    assert found["counts"] == {"queued": 1, "running": 1, "preempted": 1, "failed": 2, "done": 2}
    assert found["running"] == [
        {"directory": "job2", "row": "A", "dataset": "D", "host": "h", "pid": 7, "heartbeat_age_s": 3.0, "step": 5,
         "steps": 10, "attempt": 2},
    ]  # fmt: skip
    assert [failure["error"] for failure in found["failures"]] == ["ValueError: new", "ValueError: old"]
    assert found["failures"][0] == {
        "directory": "job4", "row": "mine", "dataset": "Longer", "error": "ValueError: new", "attempt": 3,
        "time": NOW - 10,
    }  # fmt: skip
    others = {key: found[key] for key in found.keys() - {"rows", "counts", "running", "failures"}}
    assert others == {"sweep": "dir", "time": NOW, "jobs": 7, "jobs_per_hour": 1.0, "left_s": 10800.0}


def test_text(monkeypatch):
    monkeypatch.setattr(status_tables.time, "strftime", lambda form, moment: "then")
    assert status_tables.as_text(FOUND) == (
        "                 queued  running  preempted  failed  done  total\n"
        "A        D            1        1          -       -     2      4\n"
        "A:group  D            -        -          -       1     -      1\n"
        "mine     Longer       -        -          -       1     -      1\n"
        "?        ?            -        -          1       -     -      1\n"
        "all                   1        1          1       2     2      7\n"
        "\n"
        "2 of 7 jobs done, 1 an hour lately, the last one in about 3.0 h (then).\n"
        "\n"
        "Running:\n"
        "  job2  A on D: step 5 of 10, h process 7, seen 3 s ago\n"
        "\n"
        "Newest failures:\n"
        "  job4  mine on Longer: ValueError: new\n"
        "  job3  A:group on D: ValueError: old\n"
    )


def test_only_some_are_shown():
    statuses = [Status(State.RUNNING)] * 12 + [Status(State.FAILED, error="no", time=i) for i in range(7)]
    jobs = [Listed(f"job{i}", ARGS[0]) for i in range(19)]
    found = overview(jobs, {job.name: status for job, status in zip(jobs, statuses, strict=True)}, NOW)
    text = status_tables.as_text(found)
    assert text.count("starting, ? process ?") == 10
    assert "  ... and 2 more\n\nNewest failures:\n  job18  A on D: no\n" in text
    assert "too few are done to tell the end" in text
    assert text.endswith("  ... and 2 more\n")


def test_nothing_at_all():
    text = status_tables.as_text(overview([], {}, NOW))
    assert text.endswith("0 of 0 jobs done.\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h"), (172800, "2.0 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_row_names():
    assert row_name({"algorithm": "A", "partition": None}) == "A"
    assert row_name({"algorithm": "A", "partition": "random"}) == "A:random"
    assert row_name({"algorithm": "A", "partition": "random", "label": "L"}) == "L"

"""A sweep's list of jobs, also after kills, and its mark."""

import json

import pytest

from domainbed import job_lists
from domainbed.job_lists import Listed
from domainbed.jobs import Job


def job(tmp_path, number):
    return Job({"algorithm": 'a"\n}}', "test_envs": [0, 1], "seed": number}, str(tmp_path))


def test_append_and_read(tmp_path):
    assert not job_lists.exists(tmp_path)
    assert job_lists.read(tmp_path) == []
    jobs = [job(tmp_path, number) for number in range(4)]
    assert job_lists.append_missing(tmp_path, jobs[2:]) == 2
    assert job_lists.append_missing(tmp_path, jobs) == 2
    assert job_lists.append_missing(tmp_path, jobs) == 0
    lines = [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]
    expected = [Listed(jobs[i].name, {"algorithm": 'a"\n}}', "test_envs": [0, 1], "seed": i}) for i in (2, 3, 0, 1)]
    assert lines == [{"name": name, "args": args} for name, args in expected]
    assert job_lists.read(tmp_path) == expected
    assert job_lists.exists(tmp_path)


def test_torn_and_foreign_lines(tmp_path, caplog):
    jobs = [job(tmp_path, number) for number in range(3)]
    job_lists.append_missing(tmp_path, jobs[:2])
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the second line, torn by a kill
    assert [entry.name for entry in job_lists.read(tmp_path)] == [jobs[0].name]
    assert "skipped 1 line(s)" in caplog.text
    assert job_lists.append_missing(tmp_path, jobs) == 2
    with path.open("a") as file:
        file.write('[1]\n{"name": "x"}\n\n')
    caplog.clear()
    assert [entry.name for entry in job_lists.read(tmp_path)] == [one.name for one in jobs]
    assert "skipped 3 line(s)" in caplog.text


def test_two_processes_that_append_the_same(tmp_path):
    """Each job once, in the order of the first."""
    jobs = [job(tmp_path, number) for number in range(2)]
    job_lists.append_missing(tmp_path, jobs)
    path = tmp_path / "jobs.jsonl"
    path.write_text(path.read_text() * 2)
    assert [entry.name for entry in job_lists.read(tmp_path)] == [one.name for one in jobs]


def test_a_sweep_that_may_not_be_written(tmp_path):
    (tmp_path / "jobs.jsonl").mkdir()
    with pytest.raises(OSError, match=r"jobs\.jsonl"):
        job_lists.append_missing(tmp_path, [job(tmp_path, 0)])


def test_mark(tmp_path):
    assert not job_lists.is_cancelled(tmp_path)
    job_lists.reopen(tmp_path)
    job_lists.cancel(tmp_path)
    job_lists.cancel(tmp_path)
    assert job_lists.is_cancelled(tmp_path)
    job_lists.reopen(tmp_path)
    assert not job_lists.is_cancelled(tmp_path)

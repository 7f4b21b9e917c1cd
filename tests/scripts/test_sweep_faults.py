"""One sweep in which much goes wrong at once: what can be done is done, and the rest says why it is not."""

import json
import os
import time
from pathlib import Path

import pytest

from domainbed import states
from domainbed.scripts import collect_results, sweep
from domainbed.states import State

GRID = [
    "--datasets", "Debug28", "--algorithms", "ERM", "--single_test_envs", "--n_hparams", "1", "--n_trials", "2",
    "--steps", "2", "--hparams", '{"backbone": "small_cnn", "batch_size": 4}', "--skip_confirmation",
]  # fmt: skip


FAULTS = """
import errno, os
from domainbed import claims

claims.CONFIRM_S = 0.1  # in place of 25
write = os.write


def on_a_full_disk(descriptor, data):
    place = os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not os.path.exists(os.path.join(place, "disk is full")):
        return write(descriptor, data)
    write(descriptor, data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


os.write = on_a_full_disk
"""


def names(output_dir: Path) -> list[str]:
    """The six jobs, in order."""
    lines = (output_dir / "jobs.jsonl").read_text().splitlines()
    return [json.loads(line)["name"] for line in lines]


def launch(output_dir: Path, launcher: str, *flags: str) -> int:
    return sweep.main(["launch", *GRID, "--output_dir", str(output_dir), "--command_launcher", launcher, *flags])


def claim_of_a_dead_host(directory: Path, heartbeat: float) -> None:
    """As a machine leaves it that lost its power."""
    content = {"host": "gone", "machine": "gone/boot", "pid": 1, "attempt": 1, "step": 1, "steps": 2}
    (directory / "claim.1").write_text(json.dumps(content) + "\n")
    os.utime(directory / "claim.1", (heartbeat, heartbeat))


def test_a_sweep_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("DOMAINBED_PLUGINS", str(tmp_path / "faults.py"))
    hurt, whole = tmp_path / "hurt", tmp_path / "whole"
    assert launch(hurt, "dummy") == 0
    every = full, in_the_way, torn, of_the_dead, skewed, fine = [hurt / name for name in names(hurt)]
    for directory in (full, torn, of_the_dead, skewed):
        directory.mkdir()
    (full / "disk is full").touch()
    in_the_way.write_text("somebody's file")
    (torn / "results.jsonl").write_text('{"step": 0, "args": {"algo')
    claim_of_a_dead_host(of_the_dead, time.time() - 120)
    claim_of_a_dead_host(skewed, time.time() + 9999)  # the clock was set back since
    capfd.readouterr()

    assert launch(hurt, "local", "--workers", "2", "--retries", "0") == 1
    out = capfd.readouterr().out
    assert {path.name for path in every if states.read(path).state == State.DONE} == {
        path.name for path in (torn, of_the_dead, skewed, fine)
    }
    assert states.read(full).state == State.FAILED
    assert f"Failed: {full}: the disk is full: OSError: [Errno 28] No space left on device" in out
    assert f"Failed: {in_the_way}: a file is where the job's directory should be; remove it" in out
    assert "4 done, 2 failed." in out
    assert in_the_way.read_text() == "somebody's file"

    (full / "disk is full").unlink()
    in_the_way.unlink()
    command = ["retry_failed", "--output_dir", str(hurt), "--command_launcher", "local", "--skip_confirmation"]
    assert sweep.main(command) == 0
    assert launch(hurt, "local") == 0
    assert all(states.read(path).state == State.DONE for path in every)
    assert launch(whole, "local", "--workers", "2") == 0
    assert tables(hurt) == tables(whole)


def tables(output_dir: Path) -> tuple[str, str]:
    assert collect_results.main(["--input_dir", str(output_dir)]) in (0, None)
    return (output_dir / "results.txt").read_text(), (output_dir / "groups.txt").read_text()

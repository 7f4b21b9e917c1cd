"""The short version of ``make kill-test``: a few of its instants; and that it would notice what differs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.parametrize(
    "flags",
    ["--kills 6 --per_run 2 --cases IRM KeepsMuch EX2L_MAE", "--kills 0 --cases --operations 16 --damage"],
    ids=["instants", "operations and damage"],
)
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path, flags: str) -> None:
    command = [sys.executable, str(SCRIPT), *flags.split(), "--work", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert " 0 unequal" in found.stdout


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kills_harness", SCRIPT.with_name("kills_harness.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


RECORDS = [{"step": 0, "loss": 0.5, "step_time": 1.0}, {"step": 1, "loss": 0.25, "step_time": 1.0}]


def leave(directory: Path, records: list[dict[str, float]], model: bytes = b"weights", **more: bytes) -> Path:
    """A run's directory."""
    directory.mkdir()
    lines = [json.dumps(record) for record in records]
    (directory / "results.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in {"model.pkl": model, "done": b"done", "out.txt": directory.name.encode(), **more}.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([RECORDS[0] | {"step_time": 2.0}, RECORDS[1]], {}, ""),
        ([RECORDS[0], RECORDS[0], RECORDS[1]], {}, "results.jsonl differs: 3 lines in place of 2"),
        (RECORDS[:1], {}, "results.jsonl differs: 1 lines in place of 2"),
        ([RECORDS[0], RECORDS[1] | {"loss": 0.25000000000000006}], {}, "results.jsonl differs in line 1: loss"),
        (RECORDS, {"model": b"weighty"}, "model.pkl differs"),
        (RECORDS, {"snapshot.pkl": b""}, "left over: ['snapshot.pkl'], missing: []"),
    ],
)
def test_what_counts_as_a_difference(
    tmp_path: Path, harness: ModuleType, records: list[dict[str, float]], more: dict[str, bytes], message: str
) -> None:
    reference, run = leave(tmp_path / "reference", RECORDS), leave(tmp_path / "run", records, **more)
    assert harness.difference(reference, run) == message

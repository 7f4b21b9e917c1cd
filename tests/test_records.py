import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from domainbed import records


def test_keys() -> None:
    assert records.acc_key(1, "out") == "env1_out_acc"
    assert records.wga_key(1, "in") == "env1_in_wga"
    assert records.group_acc_key(0, "in", 7) == "env0_in_g7_acc"
    assert records.group_count_key(0, "in", 7) == "env0_in_g7_n"


@pytest.mark.parametrize(
    ("key", "expected"),
    [("env0_in_g3_acc", True), ("env10_out_g12_n", True), ("env0_in_wga_g", True), ("env0_in_wga_n", True),
     ("env0_in_acc", False), ("env0_in_wga", False), ("g3_acc", False), ("loss", False)],
)  # fmt: skip
def test_keys_that_consoles_leave_out(key: str, expected: bool) -> None:
    assert records.is_group_key(key) is expected


def test_lines_are_sorted_json_and_numpy_scalars_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    record = {"b": np.float32(0.5), "a": np.int64(3), "nan": math.nan, "args": {"hparams": np.float64(1)}}
    records.append(path, record)
    assert path.read_text() == '{"a": 3, "args": {"hparams": 1.0}, "b": 0.5, "nan": NaN}\n'
    with pytest.raises(TypeError, match="a record holds set"):
        records.append(path, {"bad": {1}})
    assert path.read_text().count("\n") == 1


def test_torn_and_foreign_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    good = json.dumps({"step": 1, "args": {}})
    path.write_text(f"{good}\n\nnot json\n[1]\n{good}\n" + good[:-9])
    found, skipped = records.read(path)
    assert [record["step"] for record in found] == [1, 1]
    assert skipped == 3


def test_a_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"step": 1, "args": {}}))
    assert records.read(path) == ([{"step": 1, "args": {}}], 0)


def test_jobs_are_read_in_name_order_and_not_recursively(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a", "a/deeper", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            records.append(tmp_path / name / "results.jsonl", {"job": name, "args": {}})
    with open(tmp_path / "b" / "results.jsonl", "a") as file:
        file.write('{"torn')
    assert [record["job"] for record in records.iterate(tmp_path)] == ["a", "b"]
    assert "skipped 1 line" in caplog.text


def test_appends_from_several_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"

    def write(n: int) -> None:
        for _ in range(20):
            records.append(path, {"args": {}, "n": n, "pad": "x" * 5000})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found, skipped = records.read(path)
    assert (len(found), skipped) == (80, 0)


def test_pooling_weighs_groups_by_their_counts() -> None:
    record = {
        "env0_out_acc": 0.5, "env0_out_wga": 0.0, "env0_out_g0_acc": 1.0, "env0_out_g0_n": 1,
        "env0_out_g1_acc": 0.0, "env0_out_g1_n": 1,
        "env1_out_acc": 0.75, "env1_out_wga": 0.75, "env1_out_g1_acc": 0.75, "env1_out_g1_n": 8,
    }  # fmt: skip
    found = records.pooled(record, [(0, "out"), (1, "out")])
    assert found == (7 / 10, 6 / 9)  # group 1: (0 + 6) of 9
    assert records.pooled(record, [(0, "out"), (2, "out")]) is None
    assert records.pooled(record, []) is None


def test_score() -> None:
    assert records.aa_wga(0.8, 0.5) == pytest.approx(0.65)

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction as F
from pathlib import Path

import numpy as np
import pytest

from domainbed import records
from domainbed.evaluation import Accuracy, measure

ARGS = {"algorithm": "ERM", "dataset": "Debug28", "test_envs": [0]}


def test_keys() -> None:
    assert records.acc_key(1, "out") == "env1_out_acc"
    assert records.wga_key(1, "in") == "env1_in_wga"
    assert records.adj_acc_key(1, "in") == "env1_in_adj_acc"
    assert records.group_mean_key(2, "out") == "env2_out_group_mean_acc"
    assert records.training_count_key(12) == "train_g12_n"
    assert records.group_acc_key(0, "in", 7) == "env0_in_g7_acc"
    assert records.group_count_key(0, "in", 7) == "env0_in_g7_n"


@pytest.mark.parametrize(
    ("key", "expected"),
    [("env0_in_g3_acc", True), ("env10_out_g12_n", True), ("env0_in_wga_g", True), ("env0_in_wga_n", True),
     ("env0_in_group_mean_acc", True), ("train_g12_n", True), ("env1_out_n", True), ("env0_in_adj_acc", False),
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


def test_a_line_that_tables_can_make_nothing_of_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for record in ({"step": 1, "args": ARGS}, {"step": "x", "args": ARGS}, {"step": 1, "args": {}}):
        records.append(path, record)
    assert records.read_checkpoints(path) == ([{"step": 1, "args": ARGS}], 2)


def test_only_numbered_groups_count() -> None:
    record = {"env0_in_grad_n": 3.0, "env0_in_g1_acc": 0.5, "env0_in_g1_n": 4, "env0_in_gx_acc": 1.0}
    assert records.group_metrics(record, 0, "in") == ({1: 0.5}, {1: 4})


def test_jobs_are_read_in_name_order_and_not_recursively(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b", "a", "a/deeper", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            records.append(tmp_path / name / "results.jsonl", {"job": name, "step": 0, "args": ARGS})
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


def test_group_numbers_and_means_are_told_apart() -> None:
    record = {"env0_in_g7_acc": 0.5, "env0_in_g7_n": 2, "env0_in_group_mean_acc": 0.5, "env0_in_adj_acc": 0.25}
    record |= {"env0_in_acc": 0.5, "train_g7_n": 5, "train_g11_n": 6, "train_group_n": 3}
    assert records.group_metrics(record, 0, "in") == ({7: 0.5}, {7: 2})
    assert records.training_group_counts(record) == {7: 5, 11: 6}
    assert records.environments(record, "in") == [0]


def splits_of(images: Mapping[tuple[int, str], Sequence[tuple[bool, int]]]) -> dict[tuple[int, str], Accuracy]:
    """What evaluation finds of splits of (correct, group)."""
    found = {place: tuple(map(np.array, zip(*some, strict=True))) for place, some in images.items()}
    return {place: measure(correct, groups) for place, (correct, groups) in found.items()}


def test_pooled_means_by_hand() -> None:
    images = {(0, "in"): [(True, 0), (False, 0), (True, 1)], (1, "in"): [(True, 0), (False, 1), (False, 1), (True, 3)]}
    record = records.accuracies(splits_of(images), 4, (1, 4, 0, 0))  # group 0: 2 of 3, group 1: 1 of 3, group 3: 1 of 1
    found = records.pooled_means(record, [(0, "in"), (1, "in")])
    assert found == pytest.approx((float(F(1, 5) * F(2, 3) + F(4, 5) * F(1, 3)), float(F(2, 3))))
    assert records.pooled_means(record, [(0, "in")]) == pytest.approx((0.2 * 0.5 + 0.8 * 1, 0.75))


@pytest.mark.parametrize("seed", range(4))
def test_pooled_means_agree_with_a_loop_over_all_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = [(0, "out"), (3, "in"), (11, "out")]
    images = {place: [(rng.random() < 0.6, int(rng.integers(0, 4))) for _ in range(60)] for place in places}
    training = (50, 20, 0, 9)
    record = records.accuracies(splits_of(images), 4, training)
    for n in (1, 2, 3):
        together = [image for place in places[:n] for image in images[place]]
        acc = [np.mean([ok for ok, group in together if group == g]) for g in range(4)]
        expected = sum(share * a for share, a in zip(training, acc, strict=True)) / 79, sum(acc) / 4
        assert records.pooled_means(record, places[:n]) == pytest.approx(expected)


def test_splits_that_hold_the_training_groups_only_together_are_adjusted_together() -> None:
    images = {(0, "in"): [(True, 0)], (1, "in"): [(False, 1)]}
    record = records.accuracies(splits_of(images), 2, (3, 1))
    assert not any(key.endswith("adj_acc") for key in record)
    assert records.pooled_means(record, [(0, "in"), (1, "in")]) == (0.75, 0.5)


def test_pooled_means_that_cannot_be_had() -> None:
    images = {(0, "in"): [(True, 0)], (1, "in"): [(False, 1)]}
    places = list(images)
    unseen = records.accuracies(splits_of(images), 4, (0, 0, 3, 1))  # training groups that no test image shows
    assert records.pooled_means(unseen, places) == (None, 0.5)
    many = records.accuracies(splits_of(images), 65, (3, 1, *[0] * 63))
    assert records.pooled_means(many, places) == (None, None)
    one = records.accuracies(splits_of({(0, "in"): [(True, 0), (False, 1)]}), 65, (3, 1, *[0] * 63))
    assert records.pooled_means(one, [(0, "in")]) == (0.75, 0.5)
    old = {key: n for key, n in unseen.items() if not key.endswith("_group_mean_acc") and not key.startswith("train")}
    assert records.pooled_means(old, places) == records.pooled_means(old, places[:1]) == (None, None)
    assert records.pooled_means(unseen, []) == records.pooled_means(unseen, [(0, "in"), (7, "in")]) == (None, None)


Example = tuple[bool, int, bool]  # correct, group, annotated


def budgeted(images: Mapping[tuple[int, str], Sequence[Example]], num_groups: int = 4) -> dict[str, float | int]:
    """The record of splits of which only some examples are annotated."""
    found = {place: tuple(map(np.array, zip(*some, strict=True))) for place, some in images.items()}
    return records.accuracies({place: measure(*columns) for place, columns in found.items()}, num_groups)


def slowly(examples: Sequence[Example]) -> tuple[float, float | None]:
    """AA of all, and WGA of the annotated ones."""
    by_group: dict[int, list[bool]] = {}
    for ok, group, known in examples:
        if known:
            by_group.setdefault(group, []).append(ok)
    return float(np.mean([ok for ok, *_ in examples])), min((sum(o) / len(o) for o in by_group.values()), default=None)


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_budget_grants_agrees_with_a_loop_over_all_images(seed: int, budget: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = {(0, "out"): 60, (3, "in"): 7, (11, "out"): 25}
    images = {
        place: [(bool(rng.random() < 0.6), int(rng.integers(0, 4)), bool(rng.random() < budget)) for _ in range(n)]
        for place, n in sizes.items()
    }
    record, places = budgeted(images), list(images)
    for n in (1, 2, 3):
        aa, wga = slowly([image for place in places[:n] for image in images[place]])
        granted, pooled = records.granted(record, places[:n]), records.pooled(record, places[:n])
        assert granted is not None
        assert granted.aa == pytest.approx(aa)
        assert granted.wga == (wga if wga is None else pytest.approx(wga))
        assert granted.score() == pytest.approx(aa if wga is None else (aa + wga) / 2)
        assert pooled == (None if wga is None else (granted.aa, granted.wga))
    assert (granted.wga is None) == (budget == 0)


def test_what_a_budget_grants_by_hand() -> None:
    hidden = [(True, 0, False)] * 3 + [(False, 1, False)]
    partly = [
        (True, 0, True),
        (False, 0, True),
        (True, 1, True),
        (False, 1, False),
        (False, 1, False),
        (True, 1, False),
    ]
    places, record = [(0, "out"), (1, "out")], budgeted({(0, "out"): hidden, (1, "out"): partly})
    assert records.granted(record, places) == (0.6, 0.5)  # 6 of 10; group 0: 1 of 2, group 1: 1 of 1
    assert records.granted(record, places[:1]) == (0.75, None)
    assert records.pooled_groups(record, places) == ({0: 0.5, 1: 1.0}, {0: 2, 1: 1})
    assert records.annotated_splits(record, places) == places[1:]
    assert records.granted(record, [*places, (2, "out")]) is records.granted(record, []) is None


def test_a_full_budget_is_granted_what_is_pooled() -> None:
    images = {(0, "in"): [(True, 0), (False, 0), (True, 1)], (1, "in"): [(True, 0), (False, 1), (False, 1)]}
    record = records.accuracies(splits_of(images), 4)
    assert not any(key in record for key in ("env0_in_n", "env1_in_n"))
    assert records.granted(record, list(images)) == records.pooled(record, list(images)) == (0.5, 1 / 3)
    assert records.granted({"env0_in_acc": 0.5}, [(0, "in")]) is None  # no budget and no groups: nothing is known


def test_a_budget_and_groups_that_are_too_many_to_be_written() -> None:
    images = {(0, "in"): [(True, 0, True), (False, 1, False)], (1, "in"): [(False, 64, True)], (2, "in"): []}
    images[2, "in"] = [(True, 3, False)] * 5
    record = budgeted(images, 65)
    assert records.granted(record, [(0, "in"), (2, "in")]) == (6 / 7, 1.0)
    assert records.granted(record, list(images)) == (6 / 8, 0.0)
    assert records.granted(record, [(2, "in")]) == (1.0, None)


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_full_disk_takes_only_half_of_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    path, write = tmp_path / "results.jsonl", os.write
    records.append(path, {"step": 0, "args": {}})
    before = path.read_bytes()

    def half(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data[: len(data) // 2])
        if fails:
            raise OSError(28, "No space left on device")
        return written

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left on device"):
        records.append(path, {"step": 1, "args": {}})
    assert path.read_bytes() == before


def test_a_line_that_a_kill_tore_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": 0, "ar')
    records.append(path, {"step": 1, "args": {}})
    assert records.read(path) == ([{"step": 1, "args": {}}], 1)

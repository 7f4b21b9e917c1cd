import itertools
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domainbed import explanation_records, pairs, records, registry, run_index, tables
from domainbed.condensing import Judged, Timing
from domainbed.lib.query import Q
from domainbed.model_selection import (
    CRITERIA,
    Checkpoint,
    IIDAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
    SelectionMethod,
    choose,
    choose_by_accuracy,
    choose_oracle,
    with_several_test_envs,
)
from domainbed.run_index import collect
from domainbed.run_index.database import INDEX_FILE, Kept, version
from domainbed.run_index.reading import stamp_of

METHODS = (IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod)
NAN = float("nan")
Random = random.Random


@pytest.fixture(autouse=True)
def official(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """The dataset Official is validated on environment 2; no other class is looked up."""
    facts: dict[tuple[str, str], Any] = {("Official", "VALIDATION_ENVS"): (2,)}
    monkeypatch.setattr(
        registry, "attribute", lambda _, name, attribute, default=None: facts.get((name, attribute), default)
    )
    return facts


class LowestLoss(SelectionMethod):
    """Somebody else's way of choosing: the checkpoint with the lowest loss."""

    name = "lowest loss"

    @classmethod
    def run_acc(cls, run_records: Q) -> dict[str, float] | None:
        best = min(run_records, key=lambda record: record["loss"], default=None)
        return best and {"val_acc": -best["loss"], "test_acc": best["loss"]}


def number(rng: Random) -> float:
    return NAN if rng.random() < 0.03 else rng.choice([rng.randint(0, 4) / 4, rng.random()])


def checkpoint(rng: Random, args: dict[str, Any], step: int, n_envs: int, groups: int) -> dict[str, Any]:
    """A record with some keys missing now and then, and every now and then a NaN."""
    official = args["dataset"] == "Official"
    record: dict[str, Any] = {"args": args, "step": step, "loss": rng.random(), "hparams": {"lr": 0.1}}
    record |= {"step_time": rng.random(), "mem_gb": rng.random(), "epoch": step / 7}
    for env, split in itertools.product(range(n_envs), ("in",) if official else ("in", "out")):
        record[records.acc_key(env, split)] = number(rng)
        for g in rng.sample(range(4), groups):
            record |= {records.group_acc_key(env, split, g): number(rng), records.group_count_key(env, split, g): g + 1}
        if groups:
            record[records.wga_key(env, split)] = number(rng)
    if rng.random() < 0.05:
        del record[rng.choice([key for key in record if key.startswith("env")])]
    return record


def budgeted(rng: Random, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a run under a validation budget: the sizes of what validates; some splits lose their groups."""
    args = lines[0]["args"]
    splits = [(2, "in")] if args["dataset"] == "Official" else [(env, "out") for env in range(3)]
    splits = [split for split in splits if split[0] not in args["test_envs"]]
    hidden = tuple(f"env{env}_{kind}_{part}" for env, kind in splits for part in ("g", "wga") if rng.random() < 0.5)
    more = {records.size_key(*split): rng.randint(1, 50) for split in splits}
    more |= {"args": args | {"validation_budget": 0.1}}
    return [{key: value for key, value in line.items() if not key.startswith(hidden)} | more for line in lines]


def runs(rng: Random) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Directory names and records of a sweep: rows, draws, trials, seeds, pairs of test environments, groups."""
    for dataset, groups in (("Debug28", 0), ("Plain", 0), ("Grouped", 2), ("Official", rng.choice([0, 2]))):
        with_pairs, n_envs = rng.random() < 0.5, 3
        tested = [[0], [1], [2]] + ([[0, 1], [2, 0], [1, 2]] if with_pairs else [])
        tested = [[0], [1], [0, 1]] if dataset == "Official" else tested
        tested = [[1, 0], [0, 1, 2]] if dataset == "Plain" and not with_pairs else tested
        for algorithm, envs, draw, trial in itertools.product(["ERM", "IRM"], tested, range(2), range(2)):
            if rng.random() < 0.1:
                continue
            args = {"algorithm": algorithm, "dataset": dataset, "test_envs": envs, "hparams_seed": draw}
            args |= {"trial_seed": trial, "partition": rng.choice(["group", "environment"])}
            for seed in range(rng.choice([1, 1, 2])):
                steps = range(0, rng.choice([30, 50]), 10)
                lines = [checkpoint(rng, args | {"seed": seed}, step, n_envs, groups) for step in steps]
                if groups and rng.random() < 0.4:
                    lines = budgeted(rng, lines)
                cut = rng.choice([0, 0, 0, 0, 2])  # the records of some runs lie in two directories
                yield f"{rng.getrandbits(40):010x}", lines[cut:]
                if cut:
                    yield f"{rng.getrandbits(40):010x}", lines[:cut]


def write(directory: Path, lines: Iterable[Any]) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return age(path)


def age(path: Path) -> Path:
    """Makes a file look as if it had lain there for a while: the index trusts no file that has just changed."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**11))
    return path


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as old (nobody can set back the time of a file's change)."""
    monkeypatch.setattr("domainbed.run_index.reading.RECENT_NS", -(10**11))


def simple(n: int = 1, **values: Any) -> list[dict[str, Any]]:
    args = {"algorithm": "ERM", "dataset": "Debug28", "test_envs": [0], "hparams_seed": 0, "trial_seed": 0, "seed": 0}
    accs = {"env0_in_acc": 0.5, "env0_out_acc": 0.5, "env1_out_acc": 0.25}
    return [{"args": args, "hparams": {}, "step": step, **accs, "loss": step} | values for step in range(n)]


def said(checkpoints: Iterable[Checkpoint]) -> set[Any]:
    return {(chosen.run, chosen.replicate, chosen.step, chosen.score) for chosen in checkpoints}


@pytest.mark.parametrize("seed", range(5))
def test_every_choice_and_table_is_that_of_all_records(seed: int, tmp_path: Path, patient: None) -> None:
    for name, lines in runs(Random(seed)):
        write(tmp_path / name, lines)
    every = list(records.iterate(tmp_path))
    fresh = collect(tmp_path, index=False)
    for collected in (fresh, collect(tmp_path), collect(tmp_path)):
        kept = collected.records
        assert len(kept) <= len(every) == collected.total
        for method in METHODS:
            whole = tables.results_tables(every, method, latex=False)
            assert tables.results_tables(collected, method, latex=False) == whole
            assert tables.results_tables(kept, method, latex=False) == whole
        for criterion in CRITERIA:
            assert said(choose(collected.grouped, criterion)) == said(choose(every, criterion)) != set()
        assert said(choose_oracle(kept)) == said(choose_oracle(every))
        assert said(choose_by_accuracy(kept)) == said(choose_by_accuracy(every))
        several = with_several_test_envs(every)
        assert said(choose_by_accuracy(collected.several)) == said(choose_by_accuracy(several))
        for ours, theirs in zip(pairs.views(kept), pairs.views(every), strict=True):
            assert {place: said(some) for place, some in ours.chosen.items()} == {
                place: said(some) for place, some in theirs.chosen.items()
            }


def test_another_selection_method_gets_all_records(tmp_path: Path, patient: None) -> None:
    for name, lines in runs(Random(0)):
        write(tmp_path / name, lines)
    whole = tables.results_tables(list(records.iterate(tmp_path)), LowestLoss, latex=False)
    assert tables.results_tables(collect(tmp_path), LowestLoss, latex=False) == whole


def test_kept_records_are_those_of_the_files_and_share_their_arguments(tmp_path: Path, patient: None) -> None:
    lines = simple(6, note={"a": [None, True, 2**60]}, big=1e300)
    lines[5] |= {"nll": NAN, "text": "é\u2028"}
    path = write(tmp_path / "a", lines)
    for collected in (collect(tmp_path), collect(tmp_path)):
        kept = collected.records
        assert repr(kept) == repr([record for record in records.read(path)[0] if record["step"] in (0, 1, 2, 3, 4, 5)])
        assert len({id(record["args"]) for record in kept}) == len({id(record["hparams"]) for record in kept}) == 1


@pytest.mark.parametrize(
    "line",
    [
        b'{"args": {"algorithm": "ERM", "da', b"[1]", b"null", b"not json", b'{"args": 3}', b'{"a": 1}{"a": 2}',
        b'{"args": {}, "step": 1}', b"[" * 10**5, b"\xff\xfe",
        b'{"step": 0, "args": {"algorithm": 1, "dataset": "a"}}', b"\x00" * 9,
    ],
)  # fmt: skip
@pytest.mark.parametrize("newline", [b"\n", b"", b"\r\n"])
def test_torn_and_foreign_lines_are_counted(line: bytes, newline: bytes, tmp_path: Path, patient: None) -> None:
    path = write(tmp_path / "a", simple(3))
    path.write_bytes(path.read_bytes() + b"\n\n" + line + newline)
    age(path)
    for collected in (collect(tmp_path), collect(tmp_path)):
        assert (collected.total, collected.skipped) == (3, {str(path): 1})
        assert tables.results_tables(collected, METHODS[0], False).count("50.0 +/- 0.0") == 2


@pytest.mark.parametrize(
    "odd",
    [
        {"step": NAN}, {"step": float("inf")}, {"step": 10**400}, {"step": None}, {"args": {"trial_seed": [1]}},
        {"args": {"hparams_seed": "x"}}, {"args": {"seed": 0.5}}, {"args": {"partition": 3}}, {"args": {"label": 3}},
        {"args": {"label": "\ud800"}}, {"args": {"dataset": "\ud800"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_steps_and_arguments_of_another_kind_are_foreign(odd: dict[str, Any], alone: bool, tmp_path: Path) -> None:
    (whole,) = simple()
    lines = [whole | odd | {"args": whole["args"] | odd.get("args", {})}]
    path = write(tmp_path / "a", lines if alone else [whole, *lines])
    assert (collect(tmp_path).total, collect(tmp_path).skipped) == (0 if alone else 1, {str(path): 1})
    assert len(list(records.iterate(tmp_path))) == (0 if alone else 1)


def test_a_step_beyond_all_numbers_among_regular_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a", simple(2))
    path.write_text(path.read_text() + path.read_text().replace('"step": 1', '"step": 1e400'))
    assert (collect(tmp_path).total, collect(tmp_path).skipped) == (3, {str(path): 1})


def test_directories_in_place_of_files(tmp_path: Path) -> None:
    write(tmp_path / "a", simple(2))
    for name in (records.RESULTS_FILE, explanation_records.EXPLANATIONS_FILE):
        (tmp_path / "b" / name).mkdir(parents=True)
    assert collect(tmp_path).total == len(list(records.iterate(tmp_path))) == 2


@pytest.mark.parametrize("value", [NAN, float("inf"), "\ud800"])
def test_arguments_that_strict_json_refuses(value: Any, tmp_path: Path, patient: None) -> None:
    args = simple()[0]["args"] | {"hparams": {"clip": value}}
    write(tmp_path / "a", simple(3))
    write(tmp_path / "b", simple(3, args=args))
    for collected in (collect(tmp_path), collect(tmp_path)):
        assert (collected.total, len(collected.records)) == (6, 6)
        assert [len(parts) for parts in collected.runs.values()] == [1, 1]


def test_nan_among_hparams_does_not_cut_a_run(tmp_path: Path) -> None:
    write(tmp_path / "a", [line | {"hparams": {"clip": NAN}} for line in simple(4)])
    (parts,) = collect(tmp_path).runs.values()
    assert len(parts) == 1


def test_accuracies_that_rounding_swaps(tmp_path: Path) -> None:
    """Added exactly, the first is larger; added one by one, as DomainBed does, the second."""
    accs = [[0.65, 0.69, 0.53], [0.65, 0.53, 0.6899999999999998], [0.0, 0.0, 0.0]]
    lines = [
        line | {"env0_in_acc": line["step"] / 4} | {f"env{env + 1}_out_acc": acc for env, acc in enumerate(own)}
        for line, own in zip(simple(3), accs, strict=True)
    ]
    write(tmp_path / "a", lines)
    (run,) = (collected := collect(tmp_path)).runs
    expected = IIDAccuracySelectionMethod.sweep_acc(Q(lines))
    assert collected.sweep_acc(IIDAccuracySelectionMethod, [run]) == expected == 0.25


def test_a_pretty_printed_record_is_foreign(tmp_path: Path) -> None:
    path = write(tmp_path / "a", simple(2))
    path.write_text(path.read_text() + json.dumps(simple(3)[2], indent=1) + "\n")
    assert collect(tmp_path).total == 2
    assert collect(tmp_path).skipped == {str(path): records.read(path)[1]}


def test_missing_accuracies_are_warned_of_with_the_numbers_of_the_files(
    tmp_path: Path, patient: None, caplog: pytest.LogCaptureFixture
) -> None:
    lines = simple(5)
    del lines[1]["env0_in_acc"], lines[2]["env0_in_acc"]
    write(tmp_path / "a", lines)
    for collected in (collect(tmp_path), collect(tmp_path)):
        caplog.clear()
        tables.results_tables(collected, IIDAccuracySelectionMethod, latex=False)
        assert "left out 2 of 5 checkpoints of a run (ERM" in caplog.text
        caplog.clear()
        choose_by_accuracy(collected.records)  # which are not all
        assert "left out some checkpoints of a run (ERM" in caplog.text


def test_checkpoints_that_lack_accuracies_are_counted_in_all_files_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [line | {"env1_out_acc": 1 - line["step"] / 10} for line in simple(10)]
    for line in lines[1:3] + lines[6:8]:
        del line["env0_in_acc"]
    write(tmp_path / "a", lines[:5])
    write(tmp_path / "b", lines[5:])
    for found in (collect(tmp_path), list(records.iterate(tmp_path))):
        caplog.clear()
        tables.results_tables(found, IIDAccuracySelectionMethod, latex=False)
        assert [record.getMessage()[:34] for record in caplog.records] == ["left out 4 of 10 checkpoints of a "]


class TestIndex:
    """What is read again, by a reader that counts."""

    @pytest.fixture(autouse=True)
    def _patient(self, patient: None) -> None:
        pass

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
        """Collects, and returns the names of the directories whose results were read."""
        names: list[str] = []
        original = run_index.reading.read

        def counting(run: Path, *args: Any) -> Any:
            names.append(run.name)
            return original(run, *args)

        monkeypatch.setattr("domainbed.run_index.reading.read", counting)

        def collecting(directory: Path) -> list[str]:
            names.clear()
            found, fresh = collect(directory), collect(directory, index=False)
            assert repr(found.records) == repr(fresh.records)  # NaN, too
            assert (found.total, found.skipped, found.runs) == (fresh.total, fresh.skipped, fresh.runs)
            return sorted(names)[: len(names)] if not found.runs else _less_one_each(names, found)

        return collecting

    def test_only_what_changed(self, tmp_path: Path, read: Callable[[Path], list[str]]) -> None:
        for name in "abcd":
            write(tmp_path / name, simple(3, loss=ord(name)))
        assert read(tmp_path) == ["a", "b", "c", "d"]
        assert read(tmp_path) == []
        with open(tmp_path / "b" / "results.jsonl", "a") as file:  # grown
            file.write(json.dumps(simple(4)[3]) + "\n")
        write(tmp_path / "c", simple(2))  # shrunk
        write(tmp_path / "e", simple(1))  # new
        shutil.rmtree(tmp_path / "d")  # vanished
        assert read(tmp_path) == ["b", "c", "e"]
        assert read(tmp_path) == []

    def test_a_replaced_file_of_equal_size_and_time(self, tmp_path: Path, read: Callable[[Path], list[str]]) -> None:
        path = write(tmp_path / "a", simple(3, loss=1))
        read(tmp_path)
        stat = path.stat()
        path.with_name("new").write_text(path.read_text().replace('"loss": 1', '"loss": 2'))
        os.replace(path.with_name("new"), path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert read(tmp_path) == ["a"]
        assert collect(tmp_path).records[0]["loss"] == 2

    def test_young_files_are_read_again(
        self, tmp_path: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("domainbed.run_index.reading.RECENT_NS", 10**12)
        write(tmp_path / "a", simple())
        assert [read(tmp_path), read(tmp_path)] == [["a"], ["a"]]

    def test_files_of_which_only_the_time_of_change_is_young(
        self, tmp_path: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("domainbed.run_index.reading.RECENT_NS", 50 * 10**9)
        write(tmp_path / "a", simple())  # whose contents are 100 seconds old
        assert [read(tmp_path), read(tmp_path)] == [["a"], ["a"]]

    def test_an_index_is_as_readable_as_the_umask_says(self, tmp_path: Path) -> None:
        write(tmp_path / "a", simple())
        before = os.umask(0o027)
        try:
            collect(tmp_path)
        finally:
            os.umask(before)
        assert (tmp_path / INDEX_FILE).stat().st_mode & 0o777 == 0o640

    def test_runs_become_parts_of_pairs(self, tmp_path: Path, read: Callable[[Path], list[str]]) -> None:
        rng = Random(0)
        args = simple()[0]["args"]
        for env in range(3):
            lines = [checkpoint(rng, args | {"test_envs": [env]}, step, 3, 0) for step in range(6)]
            write(tmp_path / f"single{env}", lines)
        assert len(read(tmp_path)) == 3
        for envs in ([0, 1], [0, 2], [1, 2]):
            lines = [checkpoint(rng, args | {"test_envs": envs}, step, 3, 0) for step in range(6)]
            write(tmp_path / f"pair{envs}", lines)
        assert {"single0", "single1", "single2"} < set(read(tmp_path))
        every = list(records.iterate(tmp_path))
        assert len(collect(tmp_path).records) == len(every) == 36
        text = tables.results_tables(collect(tmp_path), LeaveOneOutSelectionMethod, latex=False)
        assert text == tables.results_tables(every, LeaveOneOutSelectionMethod, latex=False)
        assert " +/- " in text

    def test_explained_steps_are_kept(self, tmp_path: Path, read: Callable[[Path], list[str]]) -> None:
        lines = [line | {"env1_out_acc": 1 - line["step"] / 10} for line in simple(6)]
        write(tmp_path / "a", lines)
        read(tmp_path)
        assert [record["step"] for record in collect(tmp_path).records] == [0, 5]
        settings = {"model": "", "step": 3, "method": "gradcam", "n": 1, "seed": 0, "mask_dir": "", "fills": []}
        records.append(
            tmp_path / "a" / explanation_records.EXPLANATIONS_FILE, {"args": lines[0]["args"], "explained": settings}
        )
        assert read(tmp_path) == ["a"]
        assert read(tmp_path) == []
        assert [record["step"] for record in collect(tmp_path).records] == [0, 3, 5]
        assert [line["explained"]["step"] for line in collect(tmp_path).explanations] == [3]

    def test_another_validation_environment(
        self, tmp_path: Path, read: Callable[[Path], list[str]], official: dict[tuple[str, str], Any]
    ) -> None:
        write(tmp_path / "a", simple())
        write(tmp_path / "b", [simple()[0] | {"args": simple()[0]["args"] | {"dataset": "Other"}}])
        read(tmp_path)
        official["Other", "VALIDATION_ENVS"] = (1,)
        assert read(tmp_path) == ["b"]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"", lambda data: b"no database" * 1000, lambda data: data[: len(data) // 2],
            lambda data: data[:4096] + b"\0" * (len(data) - 4096), lambda data: data.replace(b"Debug28", b"Debug99"),
        ],
    )  # fmt: skip
    def test_a_damaged_index_is_made_anew(
        self, damage: Callable[[bytes], bytes], tmp_path: Path, read: Callable[[Path], list[str]]
    ) -> None:
        for name in "ab":
            write(tmp_path / name, simple(3))
        read(tmp_path)
        index = tmp_path / INDEX_FILE
        index.write_bytes(damage(index.read_bytes()))
        assert read(tmp_path) == ["a", "b"]
        assert read(tmp_path) == []

    def test_damaged_checkpoints_are_read_from_their_file(self, tmp_path: Path) -> None:
        write(tmp_path / "a", simple(3))
        expected = collect(tmp_path).records
        with sqlite3.connect(tmp_path / INDEX_FILE) as database:
            database.execute("UPDATE kept SET kept = x'00'")
        database.close()
        assert collect(tmp_path).records == expected

    @pytest.mark.parametrize("table", ["kept", "entries"])
    def test_another_run_s_numbers_are_not_taken(self, table: str, tmp_path: Path) -> None:
        for seed, name in enumerate("ab"):
            write(tmp_path / name, simple(3, args=simple()[0]["args"] | {"seed": seed}))
        expected = collect(tmp_path).records
        with sqlite3.connect(tmp_path / INDEX_FILE) as database:
            for old, new in ((b"a", b"c"), (b"b", b"a"), (b"c", b"b")):
                database.execute(f"UPDATE {table} SET name = ? WHERE name = ?", (new, old))
            (tmp_path / "b" / "results.jsonl").touch()
        database.close()
        assert collect(tmp_path).records == expected

    @pytest.mark.parametrize(
        "damage",
        [
            "UPDATE entries SET entry = 3", "UPDATE entries SET entry = CAST(entry AS TEXT)",
            "UPDATE entries SET name = 'a' WHERE name = x'61'", "UPDATE entries SET seal = NULL",
            "UPDATE kept SET kept = 'text'", "UPDATE official SET environments = '['",
            "UPDATE official SET environments = 3", "UPDATE official SET dataset = 'Debug38'",
        ],
    )  # fmt: skip
    def test_values_of_another_kind(self, damage: str, tmp_path: Path) -> None:
        for name in "ab":
            write(tmp_path / name, simple(3, loss=ord(name)))
        expected = collect(tmp_path).records
        with sqlite3.connect(tmp_path / INDEX_FILE) as database:
            database.execute(damage)
        database.close()
        assert collect(tmp_path).records == expected

    def test_another_criterion(
        self, tmp_path: Path, read: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "a", simple(3))
        read(tmp_path)
        monkeypatch.setitem(CRITERIA, "aa", lambda aa, wga: aa)
        assert [read(tmp_path), read(tmp_path)] == [["a"], []]

    @pytest.mark.parametrize("kind", [Judged, Timing, Kept])
    def test_another_field(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        before = version()
        other = SimpleNamespace(__struct_fields__=("other", *kind.__struct_fields__))
        monkeypatch.setattr(f"domainbed.run_index.database.{kind.__name__}", other)
        assert version() != before

    def test_an_index_of_another_version(self, tmp_path: Path, read: Callable[[Path], list[str]]) -> None:
        write(tmp_path / "a", simple(3))
        read(tmp_path)
        with sqlite3.connect(tmp_path / INDEX_FILE) as database:
            database.execute("PRAGMA user_version = 1")
        database.close()
        assert [read(tmp_path), read(tmp_path)] == [["a"], []]

    @pytest.mark.parametrize("error", [PermissionError(13, "no"), sqlite3.OperationalError("disk is full")])
    @pytest.mark.parametrize("first", [True, False])
    def test_a_directory_that_can_not_be_written(
        self,
        error: Exception,
        first: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        write(tmp_path / "a", simple(3))
        if not first:
            collect(tmp_path)
        write(tmp_path / "b", simple(2))

        def fail(*args: Any) -> None:
            raise error

        monkeypatch.setattr(run_index, "_renewed", fail)
        assert collect(tmp_path).total == 5
        assert "goes without an index" in caplog.text

    def test_a_failure_leaves_the_old_index_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a", simple(3))
        collect(tmp_path)
        before = (tmp_path / INDEX_FILE).read_bytes()
        write(tmp_path / "b", simple(3))
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no")))
        assert collect(tmp_path).total == 6
        assert (tmp_path / INDEX_FILE).read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == [INDEX_FILE, "a", "b"]

    def test_two_collectors_at_once(self, tmp_path: Path) -> None:
        write(tmp_path / "a", simple(3))
        first = collect(tmp_path)
        write(tmp_path / "a", simple(4))
        second = collect(tmp_path)
        assert [len(some.records) for some in (first, second)] == [3, 4]
        assert sorted(os.listdir(tmp_path)) == [INDEX_FILE, "a"]

    def test_what_an_index_can_not_hold_is_read_each_time(
        self, tmp_path: Path, read: Callable[[Path], list[str]]
    ) -> None:
        write(tmp_path / "a", simple(3, huge=2**70))
        write(tmp_path / "b", simple(3, text="\ud800"))
        assert [read(tmp_path), read(tmp_path)] == [["a", "b"], ["a", "b"]]
        assert collect(tmp_path).records[0]["huge"] == 2**70

    def test_a_directory_without_records_gets_no_index(self, tmp_path: Path) -> None:
        write(tmp_path / "a", [])
        (tmp_path / "b").mkdir()
        (tmp_path / "c").write_text("a file")
        assert (collect(tmp_path).total, collect(tmp_path).records) == (0, [])
        assert not (tmp_path / INDEX_FILE).exists()


def _less_one_each(names: list[str], found: run_index.Collected) -> list[str]:
    """Without what the collector that has no index read, which is everything."""
    rest = list(names)
    for name in {part.name for parts in found.runs.values() for part in parts}:
        rest.reverse()
        rest.remove(name)
        rest.reverse()
    return sorted(set(rest))


def test_timings(tmp_path: Path) -> None:
    times = [(9.0, 1.0), (0.5, 3.0), (0.25, 2.0)]
    lines = [
        line | {"step_time": time, "mem_gb": gb, "epoch": line["step"] / 4}
        for line, (time, gb) in zip(simple(3), times, strict=True)
    ]
    write(tmp_path / "a", lines)
    (timing,) = collect(tmp_path).timings.values()
    assert (timing.step_time_s, timing.mem_gb, timing.steps_per_epoch) == (0.375, 3.0, 4.0)
    assert (timing.steps, timing.checkpoints) == (2, 3)


def test_of_a_run_in_two_parts_the_longer_one_s_times(tmp_path: Path) -> None:
    for name, n in {"a": 2, "b": 4, "c": 3}.items():
        write(tmp_path / name, simple(n, step_time=n))
    (timing,) = collect(tmp_path).timings.values()
    assert (timing.step_time_s, timing.steps, timing.checkpoints) == (4.0, 3, 4)


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_a_stamp_tells_every_change(field: str) -> None:
    stat: Any = SimpleNamespace(st_size=1, st_mtime_ns=2, st_ctime_ns=3, st_ino=4)
    other: Any = SimpleNamespace(**vars(stat) | {field: 5})
    assert stamp_of(stat) != stamp_of(other)


def test_without_times_or_epochs(tmp_path: Path) -> None:
    write(tmp_path / "a", simple(1))
    (timing,) = collect(tmp_path).timings.values()
    assert (timing.step_time_s, timing.mem_gb, timing.steps_per_epoch, timing.checkpoints) == (None, None, None, 1)

"""The notebook's functions: tables of hand-made records, choices as the tables print them, a training like train's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

import domainbed.api as db
from domainbed import records
from domainbed.scripts import collect_results, train

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "api.md"
ROWS = {"ERM:random": {"partition": "random"}, "GroupDRO:group": {"algorithm": "GroupDRO", "partition": "group"}}


def record(step: int, rng: np.random.Generator, **args: Any) -> dict[str, Any]:
    """A record with two groups of 50 images in the splits that matter, accuracies at random."""
    run = {"algorithm": "ERM", "dataset": "DigitsM2M", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    found: dict[str, Any] = {"args": {**run, **args}, "hparams": {"lr": 0.5}, "step": step, "loss": 1.0}
    for place in ("env0_in", "env0_out", "env1_out", "env2_out"):
        acc = rng.integers(0, 51, 2) / 50
        found |= {f"{place}_acc": acc.mean(), f"{place}_wga": acc.min(), f"{place}_group_mean_acc": acc.mean()}
        for g in (0, 1):
            found |= {f"{place}_g{g}_acc": acc[g], f"{place}_g{g}_n": 50}
    return found


def write(directory: Path, found: list[dict[str, Any]], done: bool = True) -> None:
    directory.mkdir(parents=True)
    (directory / "results.jsonl").write_text("".join(records.dumps(r) + "\n" for r in found))
    if done:
        (directory / "done").write_text("done")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two rows, three trials, two draws, four checkpoints each."""
    rng = np.random.default_rng(0)
    for row, args in enumerate(ROWS.values()):
        for trial in range(3):
            for draw in range(2):
                seeds = {"trial_seed": trial, "hparams_seed": draw, "seed": 10 * trial + draw}
                found = [record(step, rng, **args, **seeds) for step in (0, 10, 20, 29)]
                write(tmp_path / "sweep" / f"{row}{trial}{draw}", found)
    return tmp_path / "sweep"


def test_import_is_light() -> None:
    code = "import sys, domainbed.api; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "domainbed.api" in loaded
    assert not loaded & {"torch", "pandas", "matplotlib", "sklearn", "scipy"}


def test_a_line_for_each_record(sweep: Path) -> None:
    table = db.load_runs(sweep)
    assert len(table) == 2 * 3 * 2 * 4
    assert list(table.columns[:9]) == [
        "row", "algorithm", "partition", "dataset", "test_envs", "trial_seed", "hparams_seed", "seed", "step",
    ]  # fmt: skip
    assert set(table["row"]) == set(ROWS)
    assert set(table["state"]) == {"done"}
    assert (table["hparams.lr"] == 0.5).all()
    line = table[table.directory == str(sweep / "111")].iloc[2]
    own = records.read(sweep / "111" / "results.jsonl")[0][2]
    assert (line["partition"], line["test_envs"], line["trial_seed"], line["hparams_seed"]) == ("group", (0,), 1, 1)
    assert (line["step"], line["env1_out_g1_acc"]) == (20, own["env1_out_g1_acc"])
    groups = [(own[f"env1_out_g{g}_acc"] + own[f"env2_out_g{g}_acc"]) / 2 for g in (0, 1)]  # of 50 images each
    assert line["validation_aa"] == pytest.approx(mean(groups))
    assert line["validation_wga"] == pytest.approx(min(groups))
    assert (line["test_aa"], line["test_wga"]) == pytest.approx((own["env0_in_acc"], own["env0_in_wga"]))


def test_the_last_record_of_each_run(sweep: Path) -> None:
    table = db.load_runs(sweep, every="run")
    assert (table.step == 29).all()
    assert sorted(table.directory) == sorted(map(str, sweep.iterdir()))
    with pytest.raises(ValueError, match="every='epoch' is unknown; choose among record, run"):
        db.load_runs(sweep, every="epoch")


def test_runs_without_groups_and_unfinished_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accuracies = {"env0_in_acc": 0.5, "env1_out_acc": 0.75, "env2_out_acc": 0.25}
    args = {"algorithm": "ERM", "dataset": "PACS", "test_envs": [0]}
    write(tmp_path / "one", [{"args": args, "step": 0, **accuracies}], done=False)
    with open(tmp_path / "one" / "results.jsonl", "a") as file:
        file.write('{"torn')
    (line,) = db.load_runs(tmp_path).to_dict("records")
    assert (line["validation_aa"], line["test_aa"], line["state"]) == (0.5, 0.5, "preempted")
    assert line["validation_wga"] is None
    assert line["test_wga"] is None
    assert "skipped 1 line(s)" in caplog.text
    assert db.Run(tmp_path / "one").args == args
    assert len(db.Run(tmp_path / "one").records) == 1


def test_what_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        db.load_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no records"):
        db.select(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        db.load(tmp_path)
    with pytest.raises(ValueError, match="criterion not found: aawga; did you mean aa_wga"):
        db.select(tmp_path, "aawga")


def printed(sweep: Path, name: str, section: str) -> dict[str, list[str]]:
    """The words of each row's line in a section of a file of collect_results."""
    text = (sweep / name).read_text()
    (block,) = [some for some in text.split("-------- ") if some.startswith(section)]
    words = [line.split() for line in block.splitlines()]
    return {line[0]: line[1:] for line in words if line and re.match("ERM|GroupDRO", line[0])}


@pytest.mark.parametrize(("criterion", "words"), [("aa_wga", "(AA + WGA) / 2"), ("wga", "WGA")])
def test_choices_are_those_of_the_group_tables(sweep: Path, criterion: str, words: str) -> None:
    chosen = db.select(sweep, criterion)
    assert len(chosen) == 2 * 3
    assert set(chosen.selection) == {criterion}
    collect_results.main(["--input_dir", str(sweep)])
    head = "Average (AA) and worst-group (WGA) accuracy, model selection: "
    lines = printed(sweep, "groups.txt", f"{head}{words} on validation")
    for name, some in chosen.groupby("algorithm"):
        for column in ("test_aa", "test_wga"):
            values = [100 * value for value in some[column]]
            assert f"{mean(values):.1f} ± {stdev(values):.1f}" in " ".join(lines[name])


def test_choices_by_accuracy_are_domainbeds(sweep: Path) -> None:
    chosen = db.select(sweep, "accuracy")
    collect_results.main(["--input_dir", str(sweep)])
    lines = printed(sweep, "results.txt", "Averages, model selection method: training-domain validation set")
    assert lines.keys() == set(chosen.row)
    for name, some in chosen.groupby("row"):
        values = [100 * value for value in some.test_aa]
        assert " ".join(lines[name]).startswith(f"{mean(values):.1f} +/- {np.std(values) / 3**0.5:.1f}")


@pytest.mark.parametrize("criterion", ["aa_wga", "oracle"])
def test_a_choice_is_the_best_line_of_its_trial(sweep: Path, criterion: str) -> None:
    chosen, every = db.select(sweep, criterion), db.load_runs(sweep)
    split = "test" if criterion == "oracle" else "validation"
    every["score"] = (every[f"{split}_aa"] + every[f"{split}_wga"]) / 2
    for (row, trial), some in every.groupby(["row", "trial_seed"]):
        (one,) = chosen[(chosen.row == row) & (chosen.trial_seed == trial)].to_dict("records")
        assert one["score"] == pytest.approx(some.score.max())
        (same,) = some[(some.directory == one["directory"]) & (some.step == one["step"])].to_dict("records")
        numbers = [f"{place}_{name}" for place in ("validation", "test") for name in ("aa", "wga")]
        assert [same[name] for name in numbers] == [one[name] for name in numbers]
    assert set(chosen.selection) == {"oracle: sees the test images" if criterion == "oracle" else criterion}


FLAGS: dict[str, Any] = {"steps": 3, "checkpoint_freq": 2, "test_envs": [1], "hparams": {"batch_size": 4}}


def without_times(path: Path) -> list[dict[str, Any]]:
    found = records.read(path / "results.jsonl")[0]
    return [{k: v for k, v in r.items() if k != "step_time"} | {"args": {**r["args"], "output_dir": ""}} for r in found]


def test_a_training_is_that_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = db.train("ERM", "Debug28", tmp_path / "api", **FLAGS, skip_model_save=False, label=None)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["step 0", "step 2"]
    number = r"[\d.]+"
    words = f"step 2: validation AA {number}, validation WGA {number}, test AA {number}, test WGA {number}"
    assert re.fullmatch(words, printed[-1])
    argv = ["--algorithm", "ERM", "--dataset", "Debug28", "--steps", "3", "--checkpoint_freq", "2", "--test_envs", "1"]
    argv += ["--hparams", '{"batch_size": 4}', "--output_dir", str(tmp_path / "script")]
    assert train.main(argv) == 0
    assert without_times(run.directory) == without_times(tmp_path / "script")
    assert sorted(os.listdir(run.directory)) == sorted(os.listdir(tmp_path / "script"))
    assert run.args["steps"] == 3
    assert list(run.records.step) == [0, 2]
    assert repr(run.predictor()).startswith("Predictor(ERM on Debug28: ")


def test_a_failed_training_says_why(tmp_path: Path) -> None:
    with pytest.raises(db.TrainingFailed, match=r"exit status 2; its last lines:\n(.*\n)*error: .*lrr; did you"):
        db.train("ERM", "Debug28", tmp_path / "run", hparams={"lrr": 1}, progress=False)


def test_unknown_flags_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="flag of train not found: step; did you mean steps"):
        db.train("ERM", "Debug28", tmp_path / "run", step=3)
    with pytest.raises(TypeError, match=r"algorithm and dataset are names; \$DOMAINBED_PLUGINS"):
        db.train(dict, "Debug28", tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def argv_of(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> str:
    """The words of the command that trains with these flags; nothing is trained."""
    said: list[str] = []
    monkeypatch.setattr(db, "program", lambda argv: said.extend(argv) or [sys.executable, "-c", ""])
    db.train("ERM", "Debug28", "run", **flags)
    return " ".join(said[3:])


def test_numbers_and_arrays_of_numpy_are_as_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {"steps": 3, "holdout_fraction": 0.1, "test_envs": [0, 2], "overwrite": True}
    plain |= {"skip_model_save": False, "log_to": [], "hparams": {"lr": 0.5}}
    numpys: dict[str, Any] = {"steps": np.int64(3), "holdout_fraction": np.float64(0.1), "test_envs": np.array([0, 2])}
    numpys |= {"overwrite": np.bool_(True), "skip_model_save": np.bool_(False), "log_to": ()}
    numpys |= {"hparams": {"lr": np.float64(0.5)}}
    expected = '--algorithm ERM --dataset Debug28 --holdout_fraction 0.1 --hparams {"lr": 0.5} --output_dir run '
    expected += "--overwrite --steps 3 --test_envs 0 2"
    assert argv_of(monkeypatch, **plain) == argv_of(monkeypatch, **numpys) == expected


@pytest.mark.parametrize("empty", [[], (), np.array([])])
def test_an_empty_list_is_no_default(tmp_path: Path, empty: Any) -> None:
    with pytest.raises(ValueError, match=r"test_envs=\[\] is empty; give one value or more, or leave it out"):
        db.train("ERM", "Debug28", tmp_path / "run", test_envs=empty)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_training_may_save_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saving = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("saved" * 100_000), open(sys.argv[1], "w").close(), sys.exit(75)))
print("ready\\nset", flush=True)
signal.pause()
"""
    monkeypatch.setattr(db, "program", lambda argv: [sys.executable, "-c", saving, str(tmp_path / "saved")])

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)
    with pytest.raises(KeyboardInterrupt):
        db.train("ERM", "Debug28", tmp_path / "run")
    assert (tmp_path / "saved").exists()


def test_the_documentations_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.S)
    code = "\n".join(blocks).replace("DigitsM2M", "Debug28").replace("steps=300", "steps=1")
    assert "Debug28(None" in code
    assert "steps=1," in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    exec(compile(code, str(DOCUMENTATION), "exec"), {})
    assert json.loads((tmp_path / "runs" / "erm" / "results.jsonl").read_text().splitlines()[0])["step"] == 0

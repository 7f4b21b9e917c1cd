"""The list of draws, in DomainBed's layout, and what it says where there is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from domainbed.scripts import BadInput, list_top_hparams

IID, LEAVE_ONE_OUT, ORACLE = (
    "Model selection: training-domain validation set",
    "Model selection: leave-one-domain-out cross-validation",
    "Model selection: test-domain validation set (oracle)",
)


def write(directory: Path, name: str, accs: dict[str, float], hparams: dict[str, Any], **args: Any) -> None:
    """One job with one record."""
    run = {"algorithm": "ERM", "dataset": "ColoredMNIST", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0}
    run |= {"seed": 0, "output_dir": f"jobs/{name}"} | args
    (directory / name).mkdir()
    line = json.dumps({"args": run, "hparams": hparams, "step": 0, **accs})
    (directory / name / "results.jsonl").write_text(line + "\n")


def accs(test: float, test_out: float, out: float) -> dict[str, float]:
    return {"env0_in_acc": test, "env0_out_acc": test_out, "env1_out_acc": out, "env2_out_acc": out}


def listed(directory: Path, capsys: pytest.CaptureFixture, algorithm: str = "ERM", test_env: int = 0) -> list[str]:
    words = ["--input_dir", str(directory), "--dataset", "ColoredMNIST", "--algorithm", algorithm]
    assert list_top_hparams.main([*words, "--test_env", str(test_env)]) == 0
    return capsys.readouterr().out.splitlines()


def draw(val: float, test: float, lr: float, *places: str) -> list[str]:
    dirs = [f"\t\t\tjobs/{place}" for place in places]
    head = [f"\t{{'val_acc': {val}, 'test_acc': {test}}}", "\t\thparams:", "\t\t\tbatch_size: 8", f"\t\t\tlr: {lr}"]
    return [*head, "\t\toutput_dirs:", *dirs]


def test_draws_are_ranked_by_each_method(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {"lr": 0.1, "batch_size": 8})
    write(tmp_path, "b", accs(0.25, 0.5, 0.75), {"lr": 0.2, "batch_size": 8}, hparams_seed=1)
    write(tmp_path, "c", accs(0.75, 0.25, 0.25), {"lr": 0.3, "batch_size": 8}, trial_seed=1)
    write(tmp_path, "other", accs(1, 1, 1), {"lr": 1, "batch_size": 8}, dataset="RotatedMNIST")
    write(tmp_path, "third", accs(1, 1, 1), {"lr": 1, "batch_size": 8}, algorithm="IRM")
    assert listed(tmp_path, capsys) == [
        "Total records: 5",
        IID, "trial_seed: 0", *draw(0.75, 0.25, 0.2, "b"), *draw(0.5, 0.5, 0.1, "a"),
        "trial_seed: 1", *draw(0.25, 0.75, 0.3, "c"),
        LEAVE_ONE_OUT, "trial_seed: 0", "trial_seed: 1",
        ORACLE, "trial_seed: 0", *draw(0.5, 0.25, 0.2, "b"), *draw(0.25, 0.5, 0.1, "a"),
        "trial_seed: 1", *draw(0.25, 0.75, 0.3, "c"),
    ]  # fmt: skip


def test_leave_one_out_reads_the_pairs_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hparams = {"lr": 0.1, "batch_size": 8}
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), hparams)
    write(tmp_path, "b", {"env1_in_acc": 0.25}, hparams, test_envs=[0, 1])
    write(tmp_path, "c", {"env2_in_acc": 0.75}, hparams, test_envs=[0, 2])
    lines = listed(tmp_path, capsys)
    assert lines[lines.index(LEAVE_ONE_OUT) + 2 : lines.index(ORACLE)] == draw(0.5, 0.5, 0.1, "a", "b", "c")
    assert lines[3 : lines.index(LEAVE_ONE_OUT)] == draw(0.5, 0.5, 0.1, "a", "b", "c")  # all runs of the draw


def test_rows_of_an_algorithm_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hparams = {"lr": 0.1, "batch_size": 8}
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), hparams)
    write(tmp_path, "b", accs(0.25, 0.25, 0.75), hparams, partition="group")
    lines = listed(tmp_path, capsys)
    both = ["row: ERM", "trial_seed: 0", *draw(0.5, 0.5, 0.1, "a")]
    both += ["row: ERM:group", "trial_seed: 0", *draw(0.75, 0.25, 0.1, "b")]
    assert lines[: len(both) + 2] == ["Total records: 2", IID, *both]
    lines = listed(tmp_path, capsys, algorithm="ERM:group")
    assert lines[1:9] == [IID, "trial_seed: 0", *draw(0.75, 0.25, 0.1, "b")]


def test_further_seeds_of_a_draw_are_trials_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in range(2):
        write(tmp_path, f"s{seed}", accs(0.5, 0.25, 0.5), {"lr": 0.1, "batch_size": 8}, seed=seed)
    lines = listed(tmp_path, capsys)
    assert [line for line in lines if line.startswith("trial")] == [
        "trial_seed: 0", "trial_seed: 0 (seed 2 of each draw)",
    ] * 3  # fmt: skip


def test_several_test_environments_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {}, test_envs=[0, 2])
    with pytest.raises(BadInput, match="no run of ERM tests on environment 0 alone; test_envs there: 0 2; collect_res"):
        listed(tmp_path, capsys)
    with pytest.raises(BadInput, match=r"on environment 1 alone; test_envs there: 0 2$"):
        listed(tmp_path, capsys, test_env=1)


def test_a_row_that_is_left_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {})
    write(tmp_path, "b", accs(0.5, 0.25, 0.5), {}, test_envs=[0, 2], partition="group")
    assert "row: ERM:group" not in listed(tmp_path, capsys)
    assert "left out ERM:group: none of its runs tests on environment 0 alone" in caplog.text


def test_what_is_not_there_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(BadInput, match="holds no records"):
        listed(tmp_path, capsys)
    with pytest.raises(BadInput, match="nowhere is no directory"):
        listed(tmp_path / "nowhere", capsys)
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {}, algorithm="IRM")
    with pytest.raises(BadInput, match="algorithm not found: ERM; did you mean IRM"):
        listed(tmp_path, capsys)
    words = ["--input_dir", str(tmp_path), "--algorithm", "IRM", "--test_env", "0", "--dataset"]
    with pytest.raises(BadInput, match="dataset not found: ColouredMNIST; did you mean ColoredMNIST"):
        list_top_hparams.main([*words, "ColouredMNIST"])


def test_runs_of_a_draw_with_other_hparams_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {"lr": 0.1})
    write(tmp_path, "b", accs(0.5, 0.25, 0.5), {"lr": 0.2}, output_dir="jobs/b")
    write(tmp_path, "c", {"env1_in_acc": 0.25}, {"lr": 0.3}, test_envs=[0, 1])
    write(tmp_path, "d", {"env2_in_acc": 0.25}, {"lr": 0.3}, test_envs=[0, 2])
    with pytest.raises(BadInput, match="hparams_seed 0 have other hparams than each other: jobs/a and jobs/"):
        listed(tmp_path, capsys)


def test_it_never_imports_torch(tmp_path: Path) -> None:
    write(tmp_path, "a", accs(0.5, 0.25, 0.5), {})
    words = ["--input_dir", str(tmp_path), "--dataset", "ColoredMNIST", "--algorithm", "ERM", "--test_env", "0"]
    code = (
        "import sys; from domainbed.scripts import list_top_hparams; "
        f"list_top_hparams.main({words!r}); print({{'torch', 'wilds'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"

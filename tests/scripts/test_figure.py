"""Figures that are drawn from a sweep's records."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from domainbed.scripts import BadInput, figure

pytest.importorskip("matplotlib")


def write(sweep: Path, algorithm: str, dataset: str, wga: float, seed: int = 0, with_groups: bool = True) -> Path:
    """A run of two records, the second of which is better."""
    run = sweep / f"{algorithm}{dataset}{seed}"
    run.mkdir(parents=True)
    args = {
        "algorithm": algorithm, "dataset": dataset, "test_envs": [0], "output_dir": str(run), "hparams_seed": 0,
        "trial_seed": seed, "seed": seed,
    }  # fmt: skip
    with open(run / "results.jsonl", "w") as file:
        for step, share in ((0, 0.5), (5, 1.0)):
            record: dict[str, Any] = {"args": args, "hparams": {}, "step": step, "epoch": step / 5, "step_time": 0.25}
            for place in ("env0_in", "env1_out"):
                record[f"{place}_acc"] = (1 + wga * share) / 2
                if with_groups:
                    groups = {f"{place}_g0_acc": wga * share, f"{place}_g0_n": 4}
                    groups |= {f"{place}_g1_acc": 1.0, f"{place}_g1_n": 4, f"{place}_wga": wga * share}
                    record |= groups
            file.write(json.dumps(record) + "\n")
    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for dataset in ("Debug28", "Cats"):
        for i, algorithm in enumerate(("ERM", "GroupDRO")):
            for seed in (0, 1):
                write(tmp_path / "sweep", algorithm, dataset, 0.2 + 0.3 * i + 0.1 * seed, seed)
    return tmp_path / "sweep"


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("curves", "GroupDRO on Cats from 28 to 55 % at step 5 (worst group: g0)"),
        ("scatter", "Cats: GroupDRO average accuracy 77.5 %, worst-group accuracy 55.0 %; ERM"),
        ("time", "Cats: GroupDRO 1.25 s per epoch, worst-group accuracy 55.0 %; ERM"),
        ("ranks", "Average ranks over 2 datasets, 1 is best: GroupDRO 1.00, ERM 2.00."),
    ],
)
def test_a_figure_of_a_sweep(sweep: Path, capsys: pytest.CaptureFixture, kind: str, seen: str) -> None:
    assert figure.main([kind, "--input_dir", str(sweep)]) == 0
    file = sweep / "figures" / f"{kind}.png"
    assert capsys.readouterr().out == f"Drew {file}\n"
    with Image.open(file) as image:
        assert seen in image.info["Description"]
        assert "model selection: (AA + WGA) / 2 on validation" in image.info["Title"]
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn


def test_another_place_form_and_criterion(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b.svg"
    assert figure.main(["scatter", "--input_dir", str(sweep), "--out", str(out), "--criterion", "wga"]) == 0
    assert "model selection: WGA on validation" in out.read_text()
    assert not (sweep / "figures").exists()
    with pytest.raises(BadInput, match=r"\.png, \.pdf, \.svg"):
        figure.main(["scatter", "--input_dir", str(sweep), "--out", "b.gif"])


def test_only_some_datasets(sweep: Path) -> None:
    assert figure.main(["time", "--input_dir", str(sweep), "--datasets", "Cats"]) == 0
    with Image.open(sweep / "figures" / "time.png") as image:
        assert "Cats: " in image.info["Description"]
        assert "Debug28" not in image.info["Description"]
    with pytest.raises(BadInput, match="dataset not found: Dogs; known: Cats, Debug28"):
        figure.main(["time", "--input_dir", str(sweep), "--datasets", "Cats", "Dogs"])


def test_curves_of_runs(sweep: Path, tmp_path: Path) -> None:
    runs, out = [str(sweep / name) for name in ("ERMCats0", "GroupDROCats1")], tmp_path / "c.png"
    words = ["curves", "--runs", *runs, "--env", "1", "--split", "out", "--out", str(out)]
    assert figure.main(words) == 0
    with Image.open(out) as image:
        assert "on env 1 (out-split)" in image.info["Description"]


def test_what_can_t_be_drawn_is_bad_input(tmp_path: Path) -> None:
    empty, plain = tmp_path / "empty", tmp_path / "plain"
    empty.mkdir()
    run = write(plain, "ERM", "Debug28", 0.5, with_groups=False)
    for words, message in {
        ("scatter", "--input_dir", str(tmp_path / "none")): "is no directory",
        ("time", "--input_dir", str(empty)): "holds no records",
        ("curves", "--input_dir", str(empty)): "holds no records",
        ("scatter", "--input_dir", str(plain)): "no run holds groups",
        ("curves", "--input_dir", str(plain)): "no run holds groups",
        ("ranks", "--input_dir", str(plain)): "no run holds groups",
        ("curves",): "give either --input_dir",
        ("curves", "--runs", str(run)): "say by --out",
        ("curves", "--runs", str(empty), "--out", str(tmp_path / "c.png")): "holds no results.jsonl",
    }.items():
        with pytest.raises(BadInput, match=message):
            figure.main(list(words))

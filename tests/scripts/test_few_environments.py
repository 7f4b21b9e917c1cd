"""One training environment: own data with two, and all but one tested on; from train to tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainbed import algorithms, datasets
from domainbed.scripts import BadInput, collect_results, sweep, train

QUICK = ["--steps", "2", "--hparams", '{"backbone": "small_cnn", "batch_size": 4, "image_size": 28}']
SWEEP = [
    "launch", "--n_hparams", "1", "--n_trials", "1", "--command_launcher", "local", "--skip_confirmation", *QUICK,
]  # fmt: skip

# Written as for DomainBed, its list of names included.
OWN = """
from domainbed import datasets
from domainbed.datasets import MultipleEnvironmentImageFolder


class TwoPlaces(MultipleEnvironmentImageFolder):
    CHECKPOINT_FREQ = 300
    ENVIRONMENTS = ["day", "night"]

    def __init__(self, root, test_envs, hparams):
        super().__init__(root + "/two/", test_envs, hparams["data_augmentation"], hparams)


datasets.TwoPlaces = TwoPlaces
datasets.DATASETS.append("TwoPlaces")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags for own data with two environments, whose class stands in a file of its own."""
    rng = np.random.default_rng(0)
    for environment in ("day", "night"):
        for name in ("cat", "dog"):
            folder = tmp_path / "two" / environment / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.setenv("DOMAINBED_PLUGINS", str(tmp_path / "mine.py"))
    monkeypatch.setattr(datasets.REGISTRY, "names", [*datasets.DATASETS])
    monkeypatch.setattr(datasets, "DATASETS", datasets.REGISTRY.names)
    monkeypatch.setattr(datasets, "TwoPlaces", None, raising=False)
    exec(OWN, {})
    return ["--data_dir", str(tmp_path)]


@pytest.mark.parametrize("test_env", [0, 1])
def test_two_environments_train(own: list[str], tmp_path: Path, test_env: int) -> None:
    flags = ["--dataset", "TwoPlaces", "--test_env", str(test_env), "--output_dir", str(tmp_path / "out")]
    assert train.main([*own, *flags, *QUICK]) == 0
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert {key for key in record if key.endswith("_acc")} == {
        f"env{e}_{kind}_acc" for e in (0, 1) for kind in ("in", "out")
    }


def test_a_sweep_over_two_environments_leaves_each_out(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--datasets", "TwoPlaces", "--algorithms", "ERM", "CORAL", "--output_dir", str(tmp_path / "sweep")]
    assert sweep.main([*SWEEP, *own, *words]) == 0
    assert "left out: CORAL on TwoPlaces, test environments [0], which leaves 1 of 2 to train on" in caplog.messages
    assert "2 done, 0 failed." in capsys.readouterr().out
    assert collect_results.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Algorithm +day +night +Avg *$", printed, re.M)
    assert re.search(r"^ERM +\d+\.\d \+/- 0\.0 +\d+\.\d \+/- 0\.0 +\d+\.\d *$", printed, re.M)
    one_out = printed.partition("leave-one-domain-out")[2]
    assert re.search(r"^ERM +X +X +X *$", one_out, re.M)  # it takes pairs


def test_one_environment_of_three_trains_and_has_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--datasets", "Debug28", "--algorithms", "ERM", "GroupDRO:group", "DANN", "--test_envs_list", "0,1", "1,2"]
    assert sweep.main([*SWEEP, *words, "--output_dir", str(tmp_path)]) == 0
    assert "4 done, 0 failed." in capsys.readouterr().out
    assert collect_results.main(["--input_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for trained, tested in (("2", "0, 1"), ("0", "1, 2")):
        (table,) = re.findall(rf"trained on {trained}, tested on {tested}: accuracy.*?\n\n", printed, re.S)
        assert re.findall(r"^(ERM|GroupDRO) +(Uniform \w+)\.? .*\d\d", table, re.M) == [
            ("ERM", "Uniform Env"), ("GroupDRO", "Uniform Group"),
        ]  # fmt: skip


MASKLESS = [  # Debug data have no masks
    name for name in algorithms.ALGORITHMS if not getattr(algorithms.get_algorithm_class(name), "NEEDS_MASKS", False)
]


@pytest.mark.parametrize("name", MASKLESS)
def test_an_algorithm_trains_on_one_environment_or_refuses_at_once(name: str, tmp_path: Path) -> None:
    least = getattr(algorithms.get_algorithm_class(name), "MIN_PARTS", 1)
    flags = ["--dataset", "Debug28", "--algorithm", name, "--test_envs", "0", "1", "--partition", "environment"]
    flags += ["--steps", "2", "--checkpoint_freq", "5", "--trial_seed", "1"]  # in whose validation both labels are
    flags += ["--hparams", '{"backbone": "small_cnn", "batch_size": 4}', "--output_dir", str(tmp_path)]
    if least > 1:
        with pytest.raises(BadInput, match=f"{name} compares at least {least} minibatches, this partition has 1"):
            train.main(flags)
        return
    assert train.main(flags) == 0
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))

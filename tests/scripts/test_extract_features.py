"""Features written once are those of a direct forward pass, and train, sweep and tables take them for a dataset."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from domainbed import (
    algorithms,
    datasets,
    feature_files,
    features,
    hparams_registry,
    machine,
    networks,
    partitions,
    registry,
)
from domainbed.datasets.base import InMemoryEnvironment, MultipleDomainDataset
from domainbed.loaders import TrainingLoader
from domainbed.scripts import BadInput, collect_results, extract_features, subjects, sweep, train
from domainbed.splits import split_environments, training_splits

SIZES = (24, 8, 8)  # images of the splits
ROLES = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1)  # no loader processes


@pytest.fixture
def csv(tmp_path: Path) -> str:
    """A CSV file that lists images of noise, in which all groups occur in every split."""
    rng, lines = np.random.default_rng(0), ["path,label,confounder,split"]
    for split, n in zip(ROLES, SIZES, strict=True):
        for i in range(n):
            y, c = ("cat", "dog")[i % 2], ("day", "night")[i // 2 % 2]
            lines.append(f"{split}{i}.png,{y},{c},{split}")
            pixels = rng.integers(0, 128, (30, 30, 3)) + 127 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{split}{i}.png")
    (tmp_path / "pets.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "pets.csv")


@pytest.fixture
def hparams(tmp_path: Path) -> dict[str, Any]:
    """A small network with weights of its own, and images of 28 pixels."""
    torch.manual_seed(3)
    torch.save(networks.SmallCNN((3, 28, 28)).state_dict(), tmp_path / "weights.pt")
    return {"backbone": "small_cnn", "weights": str(tmp_path / "weights.pt"), "image_size": 28}


@pytest.fixture
def npz(csv: str, hparams: dict[str, Any], tmp_path: Path) -> str:
    """The images' features."""
    output = str(tmp_path / "made" / "pets.npz")
    assert extract_features.main(["--dataset", csv, "--hparams", json.dumps(hparams), "--output", output]) == 0
    return output


def test_features_are_those_of_a_direct_forward_pass(csv: str, npz: str, hparams: dict[str, Any]) -> None:
    file = feature_files.read(npz)
    network = networks.Featurizer((3, 28, 28), hparams).eval()
    images: Any = datasets.get_dataset_class(csv)(None, [2], {"image_size": 28, "data_augmentation": False})
    assert [len(file.environment(e).y) for e in range(3)] == [*SIZES]
    for e, environment in enumerate(images):
        stored = file.environment(e)
        with torch.no_grad():
            direct = torch.cat([network(environment[i][0][None]) for i in range(len(environment))])
        np.testing.assert_allclose(stored.x, direct.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(stored.y, environment.y)
        np.testing.assert_array_equal(stored.c, environment.c)
    for name in ("ENVIRONMENTS", "VALIDATION_ENVS", "TEST_ENVS", "CLASSES", "CONFOUNDERS"):
        assert registry.attribute("datasets", npz, name) == registry.attribute("datasets", csv, name)
    assert file.about["dataset"] == csv
    assert file.about["hparams"]["image_size"] == 28
    assert list(Path(npz).parent.iterdir()) == [Path(npz)]


class Scans(MultipleDomainDataset):
    """Two environments in memory; several images show one scan."""

    CONFOUNDERS = ("a", "b")

    def __init__(self) -> None:
        x, numbers = torch.rand(70, 3, 8, 8), torch.arange(70)
        parts = (slice(0, 66), slice(66, 70))  # more than a batch
        self.datasets = [InMemoryEnvironment(x[p], numbers[p] % 2, numbers[p] // 2 % 2, numbers[p] // 3) for p in parts]


@pytest.mark.parametrize("grouped", [True, False])
def test_all_that_is_known_of_an_image_comes_along(grouped: bool) -> None:
    data = Scans()
    data.CONFOUNDERS = data.CONFOUNDERS if grouped else ()
    for e, environment in enumerate(data):
        made = extract_features.extract(data, e, lambda x: x.mean((2, 3)))
        np.testing.assert_allclose(made.x, environment[:][0].mean((2, 3)).numpy(), rtol=1e-6)
        np.testing.assert_array_equal(made.y, environment.y)
        np.testing.assert_array_equal(made.units, environment.split_units)
        if grouped:
            np.testing.assert_array_equal(made.c, environment.c)
        else:
            assert made.c is None


def test_erm_on_features_is_a_linear_layer_trained_on_them(npz: str) -> None:
    hparams = hparams_registry.default_hparams("ERM", npz)
    assert (hparams["backbone"], hparams["lr"], hparams["batch_size"]) == ("identity", 1e-3, 64)
    dataset: Any = datasets.get_dataset_class(npz)(None, [2], hparams)
    trained = training_splits(dataset, split_environments(dataset, [2], 0.2), [2])
    loader = TrainingLoader(trained, partitions.REGISTRY["environment"], hparams["batch_size"])
    algorithm = algorithms.ERM(dataset.input_shape, dataset.num_classes, 1, hparams)
    weight, bias = (p.detach().clone().requires_grad_() for p in algorithm.parameters())
    assert weight.shape == (2, 48)
    optimizer = torch.optim.Adam([weight, bias], lr=1e-3)
    stored = feature_files.read(npz).environment(0)
    for minibatches in itertools.islice(loader, 5):
        (minibatch,) = minibatches
        x = torch.from_numpy(stored.x[minibatch.i.numpy()])
        y = torch.from_numpy(stored.y[minibatch.i.numpy()])
        optimizer.zero_grad()
        F.cross_entropy(x @ weight.T + bias, y).backward()
        optimizer.step()
        algorithm.update(minibatches)
    torch.testing.assert_close(algorithm.classifier.weight, weight)
    torch.testing.assert_close(algorithm.classifier.bias, bias)


def test_the_features_of_a_run_are_what_its_last_layer_is_given(
    csv: str, hparams: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--dataset", csv, "--hparams", json.dumps(hparams), "--steps", "2", "--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--confounders", "confounder"]) == 0
    output = tmp_path / "of_run.npz"
    assert extract_features.main(["--model", str(tmp_path / "run"), "--output", str(output)]) == 0
    assert "ERM trained on" in capsys.readouterr().out
    subject = subjects.open_subject(tmp_path / "run" / "model.pkl")
    x = torch.stack([subject.dataset[2][i][0] for i in range(SIZES[2])])
    with features.penultimate(subject.algorithm) as of:
        np.testing.assert_allclose(feature_files.read(output).environment(2).x, of(x).numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="--hparams is for --dataset"):
        extract_features.main(["--model", "x", "--hparams", "{}", "--output", str(tmp_path / "b.npz")])


def test_groups_and_tables(npz: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["launch", "--datasets", npz, "--algorithms", "ERM:random", "GroupDRO:group", "Mixup:group"]
    limits = ["--n_hparams", "2", "--n_trials", "1", "--steps", "3", "--skip_confirmation"]
    launched = sweep.parse([*words, *limits, "--output_dir", str(tmp_path / "runs"), "--command_launcher", "dummy"])
    for number, job in enumerate(sweep.sweep_jobs(launched)):
        assert job.train_args["test_envs"] == [2]
        given = [[f"--{key}", *map(str, value if isinstance(value, list) else [value])]
                 for key, value in job.train_args.items() if key != "output_dir"]  # fmt: skip
        assert train.main([*itertools.chain(*given), "--output_dir", str(tmp_path / "runs" / str(number))]) == 0
    record = json.loads((tmp_path / "runs" / "0" / "results.jsonl").read_text().splitlines()[-1])
    assert {"env0_in_wga", "env1_in_acc", "env2_in_g0_n", "env2_in_g3_n"} <= record.keys()
    assert record["hparams"]["backbone"] == "identity"
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert f"Dataset: {npz}," in printed
    assert re.search(r"GroupDRO +Uniform Group +\d", printed)


def test_an_existing_file_is_kept_unless_told_otherwise(npz: str, csv: str, hparams: dict[str, Any]) -> None:
    words = ["--dataset", csv, "--hparams", json.dumps(hparams | {"image_size": 32}), "--output", npz]
    before = Path(npz).read_bytes()
    with pytest.raises(BadInput, match=r"--output .*pets\.npz is there already; name another file, or pass --overwri"):
        extract_features.main(words)
    assert Path(npz).read_bytes() == before
    assert extract_features.main([*words, "--overwrite"]) == 0
    assert feature_files.read(npz).about["hparams"]["image_size"] == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "Debug28", "--output", "a.pt"], r"--output a\.pt: the name must end in \.npz"),
        (["--dataset", "Waterbirds", "--output", "a.npz"], "Waterbirds needs --data_dir"),
        (["--dataset", "Debug28", "--hparams", '{"bakbone": "x"}', "--output", "a.npz"], "hparam of ERM not found"),
        (["--dataset", "Nothing", "--output", "a.npz"], "dataset not found: Nothing"),
        (["--model", "nowhere", "--output", "a.npz"], "nowhere: no such run or model"),
    ],
)
def test_what_cannot_be_had_is_said_at_once(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        extract_features.main(words)
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_leave_no_file(csv: str, hparams: dict[str, Any], tmp_path: Path) -> None:
    state = torch.load(hparams["weights"], weights_only=True)
    torch.save({key: value.fill_(torch.nan) for key, value in state.items()}, hparams["weights"])
    with pytest.raises(BadInput, match="environment train: 24 of 24 rows of x hold values that are not finite"):
        extract_features.main(["--dataset", csv, "--hparams", json.dumps(hparams), "--output", str(tmp_path / "a.npz")])
    assert not list(tmp_path.glob("a.npz*"))

"""Feature files: what is written is read, without torch; what is refused, and with which words."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domainbed import datasets, feature_files, jobs, registry, rows
from domainbed.feature_files import Arrays

ABOUT: dict[str, Any] = {
    "dataset": "Birds", "featurizer": "a network", "hparams": {"image_size": 16}, "num_classes": 2,
    "classes": ["land", "water"], "confounders": ["sand", "sea"], "environments": ["train", "validation", "test"],
    "validation_envs": [1], "test_envs": [2],
}  # fmt: skip
SIZES = (6, 3, 4)


def arrays(n: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays(rng.normal(size=(n, 5)).astype(np.float32), np.arange(n) % 2, np.arange(n) // 2 % 2)


def written(path: Path, environments: list[Arrays] | None = None, **about: Any) -> str:
    with open(path, "wb") as file:
        feature_files.write(file, ABOUT | about, environments or [arrays(n, e) for e, n in enumerate(SIZES)])
    return str(path)


def changed(path: Path, **members: Any) -> str:
    """A feature file of which some arrays are others, or none (None)."""
    written(path)
    with np.load(path) as archive:
        content = dict(archive) | members
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return str(path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    units = arrays(6)._replace(units=np.arange(6) // 2)
    file = feature_files.read(written(tmp_path / "a.npz", [units, arrays(3, 1), arrays(4, 2)]))
    assert file.about == ABOUT | {"dim": 5, "version": 1}
    for e, expected in enumerate((units, arrays(3, 1), arrays(4, 2))):
        for name, values in file.environment(e)._asdict().items():
            np.testing.assert_array_equal(values, getattr(expected, name))
            assert values is None or values.dtype == (np.float32 if name == "x" else np.int64)
    with zipfile.ZipFile(file.path) as archive:
        assert not any(b"pickle" in archive.read(name)[:200] for name in archive.namelist())
    with np.load(file.path, allow_pickle=False) as stored:
        assert all(stored[name].dtype.kind in "Uif" for name in stored.files)


def test_the_dataset_is_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path / "Birds_of_mine.npz")
    cls: Any = datasets.get_dataset_class(path)
    assert cls.__name__ == "Birds_of_mine"
    assert datasets.num_environments(path) == 3
    dataset = cls(None, [2], {})
    assert (dataset.input_shape, dataset.num_classes, dataset.num_confounders) == ((5,), 2, 2)
    assert dataset.group_name(1) == "land, sea"
    for e, environment in enumerate(dataset):
        expected = arrays(SIZES[e], e)
        np.testing.assert_array_equal(environment[slice(None)][0].numpy(), expected.x)
        assert environment.y.tolist() == expected.y.tolist()
        assert expected.c is not None
        assert environment.c.tolist() == expected.c.tolist()
        assert environment.split_units is None


def test_without_confounders_there_are_no_groups(tmp_path: Path) -> None:
    plain = [arrays(n)._replace(c=None) for n in SIZES]
    path = written(tmp_path / "a.npz", plain, confounders=[], validation_envs=[], test_envs=None)
    dataset = datasets.get_dataset_class(path)(None, [0], {})  # type: ignore[call-arg]
    assert dataset.num_confounders == 1
    assert dataset.TEST_ENVS is None
    assert jobs.dataset_test_envs(path, True) == [[0], [1], [2]]


def test_attributes_are_those_of_the_class_and_need_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz")
    cls = datasets.get_dataset_class(path)
    for name in ("ENVIRONMENTS", "VALIDATION_ENVS", "TEST_ENVS", "CLASSES", "CONFOUNDERS", "NUM_CLASSES", "INPUT_SHAPE",
                 "HPARAMS_SIZE", "HPARAMS", "NEEDS_DATA_DIR", "N_WORKERS"):  # fmt: skip
        assert registry.attribute("datasets", path, name) == getattr(cls, name), name
    assert registry.attribute("datasets", path, "OPTIONS", ()) == cls.OPTIONS == ()
    code = (
        "import sys; from domainbed import jobs; "
        f"print(jobs.dataset_test_envs({path!r}, False), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[2]] False"


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz")
    assert feature_files.read(path) is feature_files.read(path)
    written(tmp_path / "a.npz", classes=["auk", "waterbird"])
    assert registry.attribute("datasets", path, "CLASSES") == ("auk", "waterbird")


def test_a_missing_file(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.npz")
    with pytest.raises(FileNotFoundError, match=r"gone\.npz: no such file; write it with python -m .*extract_features"):
        datasets.get_dataset_class(gone)
    assert rows.declared("datasets", gone, "ENVIRONMENTS", "unknown") == "unknown"
    with pytest.raises(NotImplementedError, match=r"gone\.npz: no such file"):
        jobs.dataset_test_envs(gone, False)


def garbled(**about: Any) -> np.ndarray:
    return np.array(json.dumps({**ABOUT, "dim": 5, "version": 1} | about))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"about": None}, "has no text `about`, so it is no feature file"),
        ({"about": np.zeros(3)}, "has no text `about`"),
        ({"about": np.array("{")}, "`about` is no JSON"),
        ({"about": np.array("[]")}, "of version None, and version 1 is read"),
        ({"about": garbled(version=2)}, "of version 2, and version 1 is read"),
        ({"about": garbled(classes="ab", hparams=None)}, "`about` lacks or garbles hparams, classes"),
    ],
)
def test_files_that_are_none_of_ours(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    path = changed(tmp_path / "a.npz", **members)
    with pytest.raises(ValueError, match=message):
        datasets.get_dataset_class(path)
    with pytest.raises(NotImplementedError, match=message):
        registry.attribute("datasets", path, "ENVIRONMENTS")


X = arrays(3, 1).x


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x1": None, "c1": None}, "lacks x1, c1; write it with"),
        ({"x1": X.astype(np.float64)}, r"environment 1: x is \(3, 5\) of float64, not \(n, 5\) of float32"),
        ({"x1": X[:, :4]}, r"environment 1: x is \(3, 4\) of float32"),
        ({"y1": np.zeros(2, dtype=np.int64)}, r"environment 1: y is \(2,\) of int64, not \(3,\) of int64"),
        ({"c1": np.zeros(3)}, r"environment 1: c is \(3,\) of float64"),
        ({"x1": np.where(X[1, 2] == X, np.nan, X)}, "environment 1: 1 of 3 rows .* not finite, the first at 1"),
    ],
)
def test_arrays_that_are_not_what_they_should_be(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    cls: Any = datasets.get_dataset_class(changed(tmp_path / "a.npz", **members))
    with pytest.raises(ValueError, match=message):
        cls(None, [2], {})


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    path = changed(tmp_path / "a.npz", y1=np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="environment 1, image 2: y is 2, allowed: 0 to 1"):
        datasets.get_dataset_class(path)(None, [2], {}).check_arrays()  # type: ignore[call-arg]


def test_damaged_files(tmp_path: Path) -> None:
    whole = Path(written(tmp_path / "whole.npz")).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": 1}))
    for name in ("cut", "empty", "pickle"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is no feature file, or is damaged"):
            feature_files.read(tmp_path / f"{name}.npz")
    start = whole.index(arrays(3, 1).x.tobytes())
    (tmp_path / "flipped.npz").write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.raises(ValueError, match=r"flipped\.npz is no feature file, or is damaged"):
        feature_files.read(tmp_path / "flipped.npz").environment(1)


def test_features_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = arrays(3)
    bad.x[2, 0] = np.inf
    with pytest.raises(ValueError, match=r"environment validation: 1 of 3 rows of x hold values that are not finite"):
        written(tmp_path / "a.npz", [arrays(6), bad, arrays(4)])

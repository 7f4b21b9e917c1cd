import os
import pickle
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import hparams_registry, predictors, records, saved_models, training
from domainbed.algorithms import ALGORITHMS, get_algorithm_class
from domainbed.algorithms.base import DOMAINBED_ORDER, Task

CPU = torch.device("cpu")
TASK = Task((3, 36, 36), 3, 2, 2, (5, 5, 5, 5, 5, 5))


def model(name: str = "ERM") -> torch.nn.Module:
    return get_algorithm_class(name).from_task(TASK, hparams_registry.default_hparams(name, "DigitsM2M"))


def save(path: Path, name: str = "ERM", **more: object) -> torch.nn.Module:
    algorithm = model(name)
    training.save_model(path, algorithm, TASK, algorithm.hparams, {"algorithm": name, "dataset": "DigitsM2M"}, **more)
    return algorithm


@pytest.mark.parametrize("name", ["ERM", "EX2L_MAE"])
def test_a_model_comes_back_to_life(tmp_path: Path, name: str) -> None:
    algorithm, x = save(tmp_path / "model.pkl", name), torch.rand(4, 3, 36, 36)
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    restored = saved_models.restore(content, CPU)
    assert torch.equal(restored.eval().predict(x), algorithm.eval().predict(x))


def test_a_model_without_a_task_is_domainbeds(tmp_path: Path) -> None:
    algorithm = save(tmp_path / "model.pkl")
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    del content["task"]
    restored = saved_models.restore(content, CPU)
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in algorithm.state_dict().items())


def test_the_best_model_comes_first_and_a_file_wins(tmp_path: Path) -> None:
    save(tmp_path / "model.pkl")
    assert saved_models.find(tmp_path).name == "model.pkl"
    save(tmp_path / "model_best.pkl")
    assert saved_models.find(tmp_path).name == "model_best.pkl"
    assert saved_models.find(tmp_path / "model.pkl").name == "model.pkl"


def test_what_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such run or model"):
        saved_models.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run \(no results.jsonl\)"):
        saved_models.find(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no model.*--skip_model_save.*train it again"):
        saved_models.find(tmp_path)


@pytest.mark.parametrize("records", [False, True])
def test_checkpoints_alone_are_named(tmp_path: Path, records: bool) -> None:
    for name in ("model_step600.pkl", "model_step0.pkl", "model_step1200.pkl", "model_step1.pkl.old", "notes.pkl"):
        (tmp_path / name).touch()
    if records:
        (tmp_path / "results.jsonl").touch()
    with pytest.raises(FileNotFoundError) as caught:
        saved_models.find(tmp_path)
    head, *names = str(caught.value).splitlines()
    assert head == f"{tmp_path} holds no model_best.pkl and no model.pkl, but checkpoints; name one of these files:"
    assert [name.strip() for name in names] == ["model_step0.pkl", "model_step600.pkl", "model_step1200.pkl"]


def test_what_is_no_model_is_explained(tmp_path: Path) -> None:
    (tmp_path / "text.pkl").write_text("no model")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pkl")
    for name in ("text.pkl", "other.pkl"):
        with pytest.raises(ValueError, match=f"{name} is no model of train"):
            saved_models.load(tmp_path / name, CPU)


def test_the_step(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    save(path, step=7)
    assert saved_models.step_of(path, saved_models.load(path, CPU)) == 7
    save(path)
    content = saved_models.load(path, CPU)
    assert saved_models.step_of(path, content) == -1
    for step in (0, 300):
        records.append(tmp_path / "results.jsonl", {"args": {}, "step": step})
    assert saved_models.step_of(path, content) == 300
    assert saved_models.step_of(tmp_path / "model_mine.pkl", content) == -1
    assert saved_models.step_of(tmp_path / "model_step300.pkl", content) == 300


def domainbeds(
    path: Path, name: str = "ERM", size: int = 28, dataset: str = "Debug28", hparams: dict[str, Any] | None = None
) -> torch.nn.Module:
    """Writes a file as DomainBed's; returns the algorithm, which has random weights."""
    own = hparams_registry.default_hparams(name, dataset) | (hparams or {})
    built = {key: value.item() if isinstance(value, np.generic) else value for key, value in own.items()}
    algorithm = get_algorithm_class(name)((3, size, size), 2, 2, built | {"pretrained": False})
    write(path, algorithm, name, size, dataset, own)
    return algorithm


def write(path: Path, algorithm: Any, name: str, size: int, dataset: str, hparams: dict[str, Any]) -> None:
    """Writes what DomainBed writes."""
    content = {
        "args": {"algorithm": name, "dataset": dataset, "test_envs": [0], "hparams": None},
        "model_input_shape": (3, size, size),
        "model_num_classes": 2,
        "model_num_domains": 2,
        "model_hparams": hparams,
        "model_dict": algorithm.state_dict(),
    }
    torch.save(content, path)


@pytest.mark.parametrize(("size", "dataset"), [(28, "Debug28"), (32, "Debug28"), (224, "PACS")])
def test_one_call_makes_a_predictor_of_domainbeds_file(tmp_path: Path, size: int, dataset: str) -> None:
    """No pretrained weights are asked for: there is no network."""
    hparams = {"resnet18": size == 224, "resnet50_augmix": False}
    algorithm = domainbeds(tmp_path / "model.pkl", size=size, dataset=dataset, hparams=hparams)
    predictor, x = predictors.load(tmp_path / "model.pkl", "cpu"), torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = algorithm.eval().predict(x).softmax(1)
    np.testing.assert_allclose(predictor.predict(x).probabilities, expected, rtol=1e-5, atol=1e-6)
    assert predictor.input == predictors.Input((3, size, size), normalised=dataset == "PACS")
    assert not {"pretrained", "fetch_code"} & predictor.algorithm.hparams.keys()


@pytest.mark.parametrize("name", [name for name in DOMAINBED_ORDER if name in ALGORITHMS])
def test_every_algorithm_of_domainbed_predicts_from_its_file(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    hparams = hparams_registry.random_hparams(name, "Debug28", 1)
    algorithm = get_algorithm_class(name)((3, 28, 28), 2, 2, hparams)
    algorithm.update([(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 1, 0])) for _ in range(2)])
    write(tmp_path / "model.pkl", algorithm, name, 28, "Debug28", hparams)
    x = torch.rand(4, 3, 28, 28)
    with torch.no_grad():
        algorithm.eval()
        expected = algorithm.predict(x).softmax(1)
    found = predictors.load(tmp_path / "model.pkl", "cpu").predict(x).probabilities
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


NUMPY = {
    "resnet_dropout": np.float64(0.1),
    "n_meta_test": np.int64(2),
    "class_balanced": np.bool_(False),
    "urm_generator_output": np.str_("relu"),
    "lr": np.float32(0.5),
}


def with_old_names(path: Path) -> None:
    """Writes the file as numpy 1 would have made it."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("trusted", [False, True])
def test_numpys_scalars_of_random_hparams_become_pythons(tmp_path: Path, old: bool, trusted: bool) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path, hparams=NUMPY)
    before = set(torch.serialization.get_safe_globals())
    if old and not trusted:  # trusted files are numpy's own business
        with_old_names(path)
    found = saved_models.load(path, CPU, trusted)["model_hparams"]
    assert {name: (type(found[name]), found[name]) for name in NUMPY} == {
        name: (type(value.item()), value.item()) for name, value in NUMPY.items()
    }
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.datetime64("2026-01-01"), "datetime64"),
        (np.complex128(1j), "complex128"),
        (np.bytes_(b"relu"), "|S4"),
        pytest.param(
            np.longdouble(1), str(np.dtype("g")), marks=pytest.mark.skipif(np.dtype("g") == float, reason="is a double")
        ),
    ],
)
def test_scalars_that_are_no_numbers_are_refused(tmp_path: Path, value: Any, dtype: str) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path, hparams={"own": value})
    message = f"{path} holds a numpy scalar of {dtype}, which is no number of Python's and no text, so it is not loaded"
    with pytest.raises(ValueError, match=re.escape(message) + ".*trusted=True"):
        saved_models.load(path, CPU)
    assert saved_models.load(path, CPU, trusted=True)["model_hparams"]["own"] == value.item()


def test_threads_load_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path, hparams=NUMPY)
    before = set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: saved_models.load(path, CPU)["model_hparams"]["resnet_dropout"], range(120)))
    assert found == [0.1] * 120
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_users_own_safe_globals_stay_and_do_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path, hparams=NUMPY)
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]  # as numpy 1 and numpy 2 name it
    own = [np.dtype, type(np.dtype(np.float64)), scalar, (scalar, "numpy.core.multiarray.scalar"), Evil]
    with torch.serialization.safe_globals(own):
        before = set(torch.serialization.get_safe_globals())
        assert saved_models.load(path, CPU)["model_hparams"]["resnet_dropout"] == 0.1
        (tmp_path / "text.pkl").write_text("no model")
        with pytest.raises(ValueError, match="is no model of train"):
            saved_models.load(tmp_path / "text.pkl", CPU)
        assert set(torch.serialization.get_safe_globals()) == before >= set(own)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["model_hparams", "model_dict", "args"])
def test_no_code_of_a_file_runs_unless_it_is_trusted(tmp_path: Path, place: str) -> None:
    path, made = tmp_path / "model.pkl", tmp_path / "made"
    domainbeds(path)
    content = torch.load(path, weights_only=True)
    content[place]["evil"] = Evil(made)
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"model.pkl holds (posix|nt)\.mkdir, which may run code.*--trusted.*trusted=T"
    ):
        predictors.load(path, "cpu")
    assert not made.exists()
    saved_models.load(path, CPU, trusted=True)
    assert made.exists()


def test_plain_pickles_and_other_ways_in_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"args": Evil(made)}, protocol=2))
    with pytest.raises(ValueError, match=r"plain.pkl holds (posix|nt)\.mkdir, which may run code"):
        saved_models.load(tmp_path / "plain.pkl", CPU)
    torch.save({"model_dict": torch.nn.Linear(1, 1), "args": np.zeros(2)}, tmp_path / "module.pkl")
    with pytest.raises(ValueError, match=r"holds .*numpy\._core\.multiarray\._reconstruct, .*torch\.nn.*Linear"):
        saved_models.load(tmp_path / "module.pkl", CPU)
    assert not made.exists()


def test_a_class_that_is_not_here_is_explained(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("class Thing:\n    pass\n")
    code = "import theirs, torch; torch.save({'args': theirs.Thing()}, 'model.pkl')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"model.pkl holds theirs\.Thing, which may"):
        saved_models.load(tmp_path / "model.pkl", CPU)
    with pytest.raises(ValueError, match=r"of a class that is not here \(No module named 'theirs'\)"):
        saved_models.load(tmp_path / "model.pkl", CPU, trusted=True)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_damaged_file_is_explained(tmp_path: Path, trusted: bool) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path)
    path.write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "noise.pkl").write_bytes(b"\x80\x02X" + np.random.RandomState(0).bytes(999))
    with pytest.raises(ValueError, match=r"noise\.pkl is no model of train, or is damaged"):
        saved_models.load(tmp_path / "noise.pkl", CPU, trusted)
    with pytest.raises(ValueError, match="is no model of train, or is damaged"):
        saved_models.load(path, CPU, trusted)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"is no model of train \(it holds no dict, but list\); name"):
        saved_models.load(path, CPU, trusted)


def test_augmix_won_over_resnet18_in_domainbed(tmp_path: Path) -> None:
    content = {"args": {"algorithm": "ERM", "dataset": "PACS"}}
    found = saved_models._domainbeds_hparams(content | {"model_hparams": {"resnet18": True, "resnet50_augmix": True}})
    assert not found["resnet18"]
    old = saved_models._domainbeds_hparams(content | {"model_hparams": {"resnet18": True}})
    assert old["resnet18"]
    assert old["nonlinear_classifier"] is False  # which files of before 2021 lack


def test_unknown_names_in_a_file_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path)
    content = torch.load(path, weights_only=True)
    advice = r".*\$DOMAINBED_PLUGINS"
    for key, name, error, message in (
        ("algorithm", "Mine", NotImplementedError, f"^algorithm not found: Mine.*a class of your own{advice}"),
        ("dataset", "MySet", ValueError, f"^how images of MySet are opened is not known here{advice}"),
    ):
        torch.save(content | {"args": content["args"] | {key: name}}, path)
        with pytest.raises(error, match=message):
            predictors.load(path, "cpu")


ARGS = {"algorithm": "ERM", "dataset": "Debug28"}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("given", "trouble"),
    [
        ({"args": None}, "args is no dict"),
        ({"args": {}}, "args has no name of the algorithm"),
        ({"args": ARGS | {"algorithm": 3}}, "args has no name of the algorithm"),
        ({"args": ARGS | {"dataset": None}}, "args has no name of the dataset"),
        ({"model_hparams": [1]}, "model_hparams is no dict"),
        ({"model_dict": torch.zeros(1)}, "model_dict is no dict"),
        ({"model_input_shape": None}, "model_input_shape is None"),
        ({"model_input_shape": 28}, "model_input_shape is 28"),
        ({"model_input_shape": ()}, r"model_input_shape is \(\)"),
        ({"model_input_shape": "abc"}, "model_input_shape is 'abc'"),
        ({"model_input_shape": (3, 28, 0)}, r"model_input_shape is \(3, 28, 0\)"),
        ({"model_input_shape": (3, 28, 10**9)}, r"model_input_shape is \(3, 28, 1000000000\)"),
        ({"model_num_classes": None}, "model_num_classes is None"),
        ({"model_num_classes": 2.0}, "model_num_classes is 2.0"),
        ({"model_num_classes": -1}, "model_num_classes is -1"),
        ({"model_num_classes": 10**12}, "model_num_classes is 1000000000000"),
        ({"task": [1]}, "task is no dict"),
        ({"step": None}, "step is None"),
        ({"step": "last"}, "step is 'last'"),
        ({"normalised": None}, "normalised is None"),
        ({"class_names": 3}, "class_names"),
        ({"class_names": ["cat", 1]}, "class_names"),
    ],
)
def test_malformed_content_is_no_model(tmp_path: Path, given: dict[str, Any], trouble: str, trusted: bool) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path)
    torch.save(torch.load(path, weights_only=True) | given, path)
    with pytest.raises(ValueError, match=rf"model\.pkl is no model of train \({trouble}\); name a model"):
        predictors.load(path, "cpu", trusted=trusted)


@pytest.mark.parametrize(
    "given",
    [
        {"model_num_domains": "two"},
        {"model_dict": {"featurizer.conv1.weight": 3}},
        {"model_dict": {3: torch.zeros(1)}},
        {"model_input_shape": (28, 28)},
        {"model_hparams": {"nonlinear_classifier": False, "lr": "fast", "weight_decay": None}},
        {"task": {}},
        {"task": {"shape": 3}},
        {"task": TASK.to_dict() | {"input_shape": 3}},
    ],
)
def test_what_no_class_can_be_built_of_does_not_fit(tmp_path: Path, given: dict[str, Any]) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path, "GroupDRO")
    torch.save(torch.load(path, weights_only=True) | given, path)
    with pytest.raises(ValueError, match=r"^the saved model does not fit GroupDRO as it is now"):
        predictors.load(path, "cpu")


def test_a_trusted_files_shape_may_hold_numpys_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path)
    shape = (3, np.int64(28), np.int64(28))
    torch.save(torch.load(path, weights_only=True) | {"model_input_shape": shape}, path)
    assert predictors.load(path, "cpu", trusted=True).input.shape == (3, 28, 28)


def test_code_is_fetched_for_trusted_models_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fetched = tmp_path / "model.pkl", []
    domainbeds(path)
    content = torch.load(path, weights_only=True)
    content["model_hparams"] |= {"backbone": "dinov2", "fetch_code": True}

    def fetch(repository: str, *args: Any, **kwargs: Any) -> None:
        fetched.append(repository)
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load", fetch)
    torch.save(content | {"model_input_shape": (3, 28, 28)}, path)
    with pytest.raises(ValueError, match=r"^the code of DINOv2 is fetched .*trusted: --trusted, in Python trusted=T"):
        predictors.load(path, "cpu")
    assert not fetched
    with pytest.raises(OSError, match="no route"):
        predictors.load(path, "cpu", trusted=True)
    assert fetched == ["facebookresearch/dinov2"]


def test_weights_of_another_class_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    domainbeds(path)
    content = torch.load(path, weights_only=True)
    content["model_dict"].popitem()
    with pytest.raises(ValueError, match="the saved model does not fit ERM as it is now"):
        saved_models.restore(content, CPU)


def test_group_dros_empty_weights_load(tmp_path: Path) -> None:
    domainbeds(tmp_path / "model.pkl", "GroupDRO")
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    content["model_dict"]["q"] = torch.Tensor()
    assert saved_models.restore(content, CPU).q.tolist() == [1, 1]


def test_fishs_inner_network_loads(tmp_path: Path) -> None:
    domainbeds(tmp_path / "model.pkl", "Fish")
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    names = [name for name in content["model_dict"] if name.startswith("network.")]
    inner = {f"network_inner.{name.removeprefix('network.')}": content["model_dict"][name] for name in names}
    content["model_dict"] = {name: content["model_dict"][name] for name in names}
    bare = saved_models.restore(content, CPU)  # before the first update
    content["model_dict"] |= inner
    full, x = saved_models.restore(content, CPU), torch.rand(2, 3, 28, 28)
    assert torch.equal(bare.eval().predict(x), full.eval().predict(x))

from pathlib import Path

import pytest
import torch

from domainbed import hparams_registry, records, saved_models, training
from domainbed.algorithms import get_algorithm_class
from domainbed.algorithms.base import Task

CPU = torch.device("cpu")
TASK = Task((3, 36, 36), 3, 2, 2, (5, 5, 5, 5, 5, 5))


def model(name: str = "ERM") -> torch.nn.Module:
    return get_algorithm_class(name).from_task(TASK, hparams_registry.default_hparams(name, "DigitsM2M"))


def save(path: Path, name: str = "ERM", **more: object) -> torch.nn.Module:
    algorithm = model(name)
    training.save_model(path, algorithm, TASK, algorithm.hparams, {"algorithm": name}, **more)
    return algorithm


@pytest.mark.parametrize("name", ["ERM", "EX2L_MAE"])
def test_a_model_comes_back_to_life(tmp_path: Path, name: str) -> None:
    algorithm, x = save(tmp_path / "model.pkl", name), torch.rand(4, 3, 36, 36)
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    restored = saved_models.restore(content, get_algorithm_class(name), CPU)
    assert torch.equal(restored.eval().predict(x), algorithm.eval().predict(x))


def test_a_model_without_a_task_is_domainbeds(tmp_path: Path) -> None:
    algorithm = save(tmp_path / "model.pkl")
    content = saved_models.load(tmp_path / "model.pkl", CPU)
    del content["task"]
    restored = saved_models.restore(content, get_algorithm_class("ERM"), CPU)
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

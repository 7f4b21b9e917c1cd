"""Images of the datasets that are there: embedded ones, a tree on disk, and none of what is missing."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainbed import datasets
from domainbed.scripts import BadInput, save_images


def saved(output: Path, *words: str) -> list[str]:
    assert save_images.main(["--output_dir", str(output), *words]) == 0
    return sorted(path.name for path in output.iterdir())


def test_without_a_data_dir_the_embedded_sets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = saved(tmp_path, "--images", "2")
    embedded = [name for name in datasets.DATASETS if not datasets.get_dataset_class(name).NEEDS_DATA_DIR]
    assert {"Debug28", "ColoredDigits", "DigitsSubpop"} <= {*embedded} == {name.split("_")[0] for name in names}
    printed = capsys.readouterr().out.splitlines()
    counts = {name: 2 * datasets.num_environments(name) for name in embedded}
    assert printed == [f"{name}: {count} images" for name, count in counts.items()]
    assert len(names) == sum(counts.values())


def test_a_file_says_where_it_is_from(tmp_path: Path) -> None:
    names = saved(tmp_path / "new", "--dataset", "ColoredDigits", "--images", "3")
    pattern = r"ColoredDigits_env(0\+90%|1\+80%|2-90%)_([012])_idx(\d+)_class([01])\.png"
    found = [re.fullmatch(pattern, name) for name in names]
    assert len(found) == 9
    dataset = datasets.get_dataset_class("ColoredDigits")(None, [0], {})
    for match in found:
        assert match
        x, y = dataset[int(match[1][0])][int(match[3])]
        assert y == int(match[4])
        with Image.open(tmp_path / "new" / match[0]) as image:
            red_and_green = np.asarray(image)[:, :, :2].transpose(2, 0, 1)
        assert np.array_equal(red_and_green, np.round(x.numpy() * 255))


def test_the_choice_follows_the_seed_and_never_exceeds_what_is_there(tmp_path: Path) -> None:
    words = ["--dataset", "Debug28"]
    one, same, other = (
        saved(tmp_path / name, *words, "--images", "8", "--seed", seed)
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert one == same != other
    assert len(saved(tmp_path / "all", *words, "--images", "99")) == 3 * 16


@pytest.fixture
def pacs(tmp_path: Path) -> Path:
    """PACS with one grey image of each class in each domain, brighter from class to class."""
    cls = datasets.get_dataset_class("PACS")
    for folder in cls.FOLDERS:
        for y, name in enumerate(cls.CLASSES):
            (tmp_path / "PACS" / folder / name).mkdir(parents=True)
            Image.new("RGB", (40, 30), (30 * y, 30 * y, 30 * y)).save(tmp_path / "PACS" / folder / name / "0.png")
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tree_on_disk_among_sets_that_are_missing(
    pacs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        save_images.datasets, "DATASETS", ["ColoredMNIST", "VLCS", "PACS", "WILDSCamelyon", "Waterbirds"]
    )
    names = saved(tmp_path / "out", "--data_dir", str(pacs))
    assert len(names) == 28
    assert {name.split("_")[1] for name in names} == {"env0A", "env1C", "env2P", "env3S"}
    for name in names:
        y = int(name[-5])
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size == (224, 224)
            assert np.all(np.asarray(image) == 30 * y), "as it was, neither normalised nor augmented"
    printed = capsys.readouterr().out
    assert "PACS: 28 images\n" in printed
    assert re.search(r"ColoredMNIST: skipped: .*MNIST/raw lacks train-images-idx3-ubyte", printed)
    assert re.search(r"VLCS: skipped: .*VLCS lacks Caltech101, LabelMe", printed)
    assert printed.count("skipped") == 4


def test_what_can_not_be_done_is_bad_input(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with pytest.raises(BadInput, match="PACS: PACS needs --data_dir"):
        save_images.main(["--output_dir", output, "--dataset", "PACS"])
    with pytest.raises(BadInput, match=r"PACS: .*PACS lacks art_painting"):
        save_images.main(["--output_dir", output, "--dataset", "PACS", "--data_dir", str(tmp_path)])
    with pytest.raises(BadInput, match="dataset not found: PACSS; did you mean PACS"):
        save_images.main(["--output_dir", output, "--dataset", "PACSS"])
    with pytest.raises(BadInput, match="--images 0: give 1 or more"):
        save_images.main(["--output_dir", output, "--images", "0"])
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file"):
        save_images.main(["--output_dir", str(tmp_path / "file" / "x"), "--dataset", "Debug28"])


def test_a_class_that_was_set_on_the_module_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "Mine", datasets.get_dataset_class("Debug28"), raising=False)
    assert save_images.main(["--dataset", "Mine", "--output_dir", str(tmp_path), "--images", "1"]) == 0


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="typo is no directory"):
        save_images.main(["--data_dir", str(tmp_path / "typo"), "--output_dir", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        save_images.main(["--dataset", "Debug28", "--output_dir", str(tmp_path / "file")])

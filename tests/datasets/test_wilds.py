"""wilds without its question to the network, and WILDSCamelyon and WILDSFMoW on tiny trees in their layouts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed import augmentation, datasets
from domainbed.datasets.wilds import WILDSDataset, WILDSEnvironment, read_by_wilds
from domainbed.input_pipelines import MEAN, STD
from domainbed.loaders import evaluation_batches

CODE = """
import threading, outdated
asked = []
outdated.check_outdated = lambda *question: asked.append(question) or (False, "")
{}
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(20)
print(len(asked))
"""


def questions(statement: str) -> int:
    """How often wilds asks for its newest release while the statement runs."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE.format(statement)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_importing_wilds_asks_nobody() -> None:
    assert questions("from domainbed.datasets.wilds import import_wilds; import_wilds()") == 0


def test_the_package_that_asks_is_left_as_it_was() -> None:
    assert questions("from domainbed.datasets.wilds import import_wilds; import_wilds()\nimport sys\n"
                     "assert sys.modules['outdated'] is outdated") == 0  # fmt: skip


def test_the_package_that_asks_is_not_imported() -> None:
    statement = "import sys; from domainbed.datasets.wilds import import_wilds; import_wilds()"
    code = f"{statement}; assert 'outdated' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_question_that_is_silenced_exists() -> None:
    assert questions("import wilds") == 1


def picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (grey,) * 3).save(path)


def camelyon(root: Path, centers: int = 5) -> list[tuple[str, int, int]]:
    """Six patches of each hospital, the hospitals in turn; returns file, label and hospital of each row."""
    folder, known = root / "camelyon17_v1.0", []
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i in range(6 * centers):
        center, tumor = i % centers, int(i % 3 == 0)
        patient, node = f"{center:03d}", i % 5
        name = f"patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{i}_y_{2 * i}.png"
        picture(folder / name, 4 * i)
        lines.append(f"{i},{patient},{node},{i},{2 * i},{tumor},{center * 10},{center},{i % 2}")
        known.append((name, tumor, center))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    (folder / "RELEASE_v1.0.txt").touch()
    return known


REGIONS = {"FRA": "Europe", "KEN": "Africa", "IND": "Asia", "USA": "Americas", "FJI": "Oceania", "XYZ": "Other"}


def fmow(root: Path) -> list[tuple[str, str, str]]:
    """Four images of each region and two that WILDS leaves out; returns file, category and region of each row kept."""
    folder, known = root / "fmow_v1.1", []
    lines = ["split,category,timestamp,country_code"]
    for i in range(26):
        split = "seq" if i in (3, 10) else ("train", "val", "test")[i % 3]
        country, category = list(REGIONS)[i % 6], ("zoo", "airport", "dam")[i % 3]
        lines.append(f"{split},{category},{2003 + i % 14}-05-01T10:00:00Z,{country}")
        picture(folder / "images" / f"rgb_img_{i}.png", 5 * i)
        if split != "seq":
            known.append((f"images/rgb_img_{i}.png", category, REGIONS[country]))
    codes = [f"{code},{region}" for code, region in REGIONS.items() if region != "Other"]
    (folder / "rgb_metadata.csv").write_text("\n".join(lines) + "\n")
    (folder / "country_code_mapping.csv").write_text("\n".join(["alpha-3,region", *codes]) + "\n")
    (folder / "RELEASE_v1.1.txt").touch()
    return known


def files(environment: WILDSEnvironment) -> list[str]:
    return [environment.images.paths[p] for p in environment.positions]


def test_camelyon_by_hospital(tmp_path: Path) -> None:
    known = camelyon(tmp_path)
    dataset = datasets.WILDSCamelyon(str(tmp_path), [1], {"data_augmentation": True})
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (5, 2, (3, 224, 224))
    for e, environment in enumerate(dataset):
        expected = [(name, tumor) for name, tumor, center in known if center == e]
        assert list(zip(files(environment), environment.y, strict=True)) == expected
        assert environment.name == dataset.ENVIRONMENTS[e]
        assert environment.augment == (e != 1)
        assert environment.indices.tolist() == [i for i, row in enumerate(known) if row[2] == e]


def test_camelyon_is_read_by_the_loaders(tmp_path: Path) -> None:
    camelyon(tmp_path)
    dataset = datasets.WILDSCamelyon(str(tmp_path), [1], {"data_augmentation": False, "image_size": 8})
    dataset.use_input_pipeline("pil")
    (x, y), *_ = evaluation_batches(dataset[2], np.arange(6))
    assert x.shape == (6, 3, 8, 8)
    assert y.tolist() == dataset[2].y.tolist()
    for image, i in zip(x, dataset[2].indices.tolist(), strict=True):
        assert abs(image[0] - (4 * i / 255 - 0.485) / 0.229).max() < 1e-4


def test_fmow_by_region(tmp_path: Path) -> None:
    known = fmow(tmp_path)
    dataset = datasets.WILDSFMoW(str(tmp_path), [0], {"image_size": 16})
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (6, 62, (3, 16, 16))
    for e, (environment, region) in enumerate(zip(dataset, REGIONS.values(), strict=True)):
        expected = [(name, category) for name, category, where in known if where == region]
        assert files(environment) == [name for name, _ in expected]
        assert [dataset.CLASSES[y] for y in environment.y] == [category for _, category in expected]
        assert environment.name == f"region_{e}"
    assert sum(map(len, dataset)) == 24


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    camelyon(tmp_path)
    fmow(tmp_path)
    path = tmp_path / "camelyon17_v1.0" / "metadata.csv"
    lines = path.read_text().splitlines()
    lines[2], lines[7] = "1,001,1,1,2,5,10,1,1", "6,001,1,6,12,1,10,8,0"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"(?s)2 bad rows.*line 3: tumor is '5'.*line 8: center is '8'"):
        datasets.WILDSCamelyon(str(tmp_path), [1], {})
    path = tmp_path / "fmow_v1.1" / "rgb_metadata.csv"
    path.write_text(path.read_text().replace("train,zoo", "training,zoological", 1))
    with pytest.raises(
        ValueError, match=r"(?s)line 2: category is 'zoological'; not one of the 62.*'training'; allowed"
    ):
        datasets.WILDSFMoW(str(tmp_path), [1], {})


@pytest.mark.parametrize("number", [0, 4])
def test_a_missing_image_is_named_before_training(tmp_path: Path, number: int) -> None:
    name, *_ = camelyon(tmp_path)[number]
    (tmp_path / "camelyon17_v1.0" / name).unlink()
    with pytest.raises(ValueError, match=f"1 of 30 images .*(?s:.)*{name}: no such file"):
        datasets.WILDSCamelyon(str(tmp_path), [1], {}).use_input_pipeline("pil")


def test_a_part_of_the_release_is_refused(tmp_path: Path) -> None:
    camelyon(tmp_path, centers=4)
    with pytest.raises(ValueError, match=r"the metadata in .* have hospital 0, 1, 2, 3; is the release whole"):
        datasets.WILDSCamelyon(str(tmp_path), [1], {})
    with pytest.raises(FileNotFoundError, match=r"fmow_v1\.1: no such directory"):
        datasets.WILDSFMoW(str(tmp_path), [1], {})


def test_classes_written_for_domainbed(tmp_path: Path) -> None:
    camelyon(tmp_path)
    dataset = read_by_wilds("camelyon17_dataset", "Camelyon17Dataset", tmp_path / "camelyon17_v1.0")

    class BySlide(WILDSDataset):
        ENVIRONMENTS = ["slide_0", "slide_10", "slide_20", "slide_30", "slide_40"]

        def __init__(self, root, test_envs, hparams):
            super().__init__(dataset, "slide", test_envs, hparams["data_augmentation"], hparams)

    built = BySlide(None, [0], {"data_augmentation": True})
    assert [environment.name for environment in built] == BySlide.ENVIRONMENTS
    assert [environment.augment for environment in built] == [False, True, True, True, True]


def test_an_environment_with_a_transform_of_its_own(tmp_path: Path) -> None:
    known = camelyon(tmp_path)
    dataset = read_by_wilds("camelyon17_dataset", "Camelyon17Dataset", tmp_path / "camelyon17_v1.0")
    environment = WILDSEnvironment(dataset, "hospital", 3, transform=lambda image: torch.tensor(image.getpixel((0, 0))))
    (x, y), *_ = evaluation_batches(environment, np.arange(6))
    rows = [i for i, row in enumerate(known) if row[2] == 3]
    assert x[:, 0].tolist() == [4 * i for i in rows]
    assert [int(environment[k][0][0]) for k in range(6)] == [4 * i for i in rows]
    assert y.tolist() == [known[i][1] for i in rows]


class Elsewhere:
    """Like iWildCam of wilds: its list does not say in which folder of the data the images lie."""

    metadata_fields = ["place", "y"]
    n_classes = 2

    def __init__(self, folder: Path):
        self.data_dir, self._input_array = folder, np.array([f"{i}.png" for i in range(4)], dtype=object)
        self.y_array = torch.tensor([0, 1, 1, 0])
        self.metadata_array = torch.stack([torch.tensor([0, 0, 1, 1]), self.y_array], 1)
        for i in range(4):
            picture(folder / "train" / f"{i}.png", 60 * i)

    def __len__(self) -> int:
        return len(self.y_array)

    def get_input(self, i: int) -> Any:
        return Image.open(self.data_dir / "train" / self._input_array[i])


class Unlisted(Elsewhere):
    """Keeps no list, and its pictures are drawn."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        del self._input_array

    def get_input(self, i: int) -> Any:
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert("RGBA")


class Spectra(Unlisted):
    """Like PovertyMap of wilds: no files of images, and more channels than a picture has."""

    def get_input(self, i: int) -> Any:
        return torch.full((8, 2, 2), float(i))


class ByPlace(WILDSDataset):
    ENVIRONMENTS = ["place_0", "place_1"]

    def __init__(self, source: Any, test_envs: list[int]):
        super().__init__(source, "place", test_envs, True, {"image_size": 8})


@pytest.mark.parametrize("kind", [Elsewhere, Unlisted])
def test_images_that_no_list_names_are_read_by_the_dataset(tmp_path: Path, kind: type[Elsewhere]) -> None:
    source = kind(tmp_path)
    dataset = ByPlace(source, [1])
    dataset.use_input_pipeline("pil")
    for environment, rows in zip(dataset, ([0, 1], [2, 3]), strict=True):
        (x, y), *_ = evaluation_batches(environment, np.arange(2))
        assert y.tolist() == [int(source.y_array[row]) for row in rows]
        for image, row in zip(x, rows, strict=True):
            expected = np.asarray(source.get_input(row).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)) / 255
            shown = image.permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
            assert abs(shown - torch.from_numpy(expected)).max() < 1e-5
    with pytest.raises(ValueError, match=f"{kind.__name__} reads its images itself; take --input_pipeline pil"):
        dataset.use_input_pipeline("device")


def test_images_that_the_dataset_reads_are_augmented_in_training_only(tmp_path: Path) -> None:
    source = Unlisted(tmp_path)
    training, test = ByPlace(source, [1])
    squashed = source.get_input(1).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
    change = augmentation.draw(np.random.default_rng(5), 8, 8, crop=True)
    expected = np.asarray(augmentation.apply_pil(squashed, change, 8)).transpose(2, 0, 1)
    assert np.array_equal(training.read(1, np.random.default_rng(5)), expected)
    assert not np.array_equal(training.read(1), expected)
    assert torch.equal(test.read(1, np.random.default_rng(5)), test.read(1))


def test_a_transform_needs_no_list_of_files(tmp_path: Path) -> None:
    environment = WILDSEnvironment(Spectra(tmp_path), "place", 1, transform=lambda x: x.mean((1, 2)))
    (x, y), *_ = evaluation_batches(environment, np.arange(2))
    assert x.tolist() == [[2.0] * 8, [3.0] * 8]
    assert y.tolist() == [1, 0]
    with pytest.raises(ValueError, match="Spectra gives a Tensor, no PIL image; give its environments a transform"):
        ByPlace(Spectra(tmp_path), [1])[0][0]


def test_a_list_of_files_that_are_there_is_kept(tmp_path: Path) -> None:
    source = Elsewhere(tmp_path)

    class Found(ByPlace):
        def image_paths(self, dataset: Any) -> list[str]:
            return [f"train/{name}" for name in dataset._input_array]

    assert Found(source, [1])[0].images.paths == tuple(f"train/{i}.png" for i in range(4))
    (tmp_path / "train" / "0.png").unlink()  # nobody can read it
    with pytest.raises(ValueError, match=r"1 of 4 images .*\n  train/0\.png: no such file"):
        Found(source, [1]).use_input_pipeline("pil")


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text.replace(",", " , "), lambda text: text.replace("\n", "\r\n")]
)
def test_metadata_in_another_dialect(tmp_path: Path, change: Callable[[str], str]) -> None:
    camelyon(tmp_path)
    fmow(tmp_path)
    sets = (datasets.WILDSCamelyon, datasets.WILDSFMoW)
    expected = [[(files(e), e.y.tolist()) for e in cls(str(tmp_path), [1], {})] for cls in sets]
    for path in tmp_path.glob("*/*.csv"):
        path.write_bytes(change(path.read_text()).encode())
    assert [[(files(e), e.y.tolist()) for e in cls(str(tmp_path), [1], {})] for cls in sets] == expected


def test_published_counts_of_the_release() -> None:
    root = os.environ.get("DOMAINBED_DATA_DIR", "")
    if not Path(root, "camelyon17_v1.0").is_dir():
        pytest.skip("DOMAINBED_DATA_DIR names no folder with camelyon17_v1.0")
    dataset = datasets.WILDSCamelyon(root, [0], {})
    assert {environment.name: len(environment) for environment in dataset} == dataset.PUBLISHED_COUNTS


def test_published_counts_are_those_of_the_splits_of_wilds() -> None:
    # Koh et al. 2021, table of splits: train 302,436 and in-distribution validation 33,560 are hospitals 0, 3 and 4.
    counts = list(datasets.WILDSCamelyon.PUBLISHED_COUNTS.values())
    assert sum(counts) == 455954
    assert counts[1:3] == [34904, 85054]
    assert counts[0] + counts[3] + counts[4] == 302436 + 33560

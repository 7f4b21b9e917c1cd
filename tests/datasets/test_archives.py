import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from domainbed import cards, datasets, registry, releases
from domainbed.datasets import archives
from domainbed.datasets.archives import ARCHIVES
from domainbed.datasets.image_folder import DomainNet
from domainbed.scripts import describe

DIGITS = {"md5": 32, "sha256": 64, "sha512": 128}
DOCS = Path(__file__).parents[2] / "docs" / "downloads.md"


class TestTable:
    def test_has_every_dataset_that_needs_files_and_no_other(self):
        names = registry.names("datasets")
        assert set(ARCHIVES) == {name for name in names if registry.attribute("datasets", name, "NEEDS_DATA_DIR")}

    def test_datasets_of_one_folder_share_its_files(self):
        for part, whole in (
            ("ColoredMNIST224", "ColoredMNIST"),
            ("VLCSInDistribution_C", "VLCS"),
            ("TerraIncognitaInDistribution_L38", "TerraIncognita"),
        ):
            assert ARCHIVES[part] is ARCHIVES[whole]

    @pytest.mark.parametrize("name", ARCHIVES)
    def test_the_class_states_the_same_licence(self, name):
        whole = next(one for one, release in ARCHIVES.items() if release.folder == ARCHIVES[name].folder)
        assert f"Licence: {ARCHIVES[name].licence}" in " ".join(datasets.get_dataset_class(whole).__doc__.split())

    @pytest.mark.parametrize("name", ARCHIVES)
    def test_is_well_formed(self, name):
        release = ARCHIVES[name]
        assert release.licence
        assert release.contains
        assert not Path(release.folder).is_absolute()
        for archive in release.archives:
            assert archive.urls
            assert all(re.match("https?://", url) for url in archive.urls)
            assert bool(archive.checksums or archive.size or archive.about) <= bool(archive.source)
            for checksum in archive.checksums:
                algorithm, _, digits = checksum.partition(":")
                assert re.fullmatch("[0-9a-f]{20,}", digits)
                assert len(digits) <= DIGITS[algorithm]
        for counts in release.counts:
            assert all(part == "" or part in release.contains for part in counts)

    def test_the_numbers_of_images_are_those_of_the_papers(self):
        totals = {name: [sum(counts.values()) for counts in release.counts] for name, release in ARCHIVES.items()}
        assert {name: totals[name] for name in totals if totals[name] and "_" not in name} == {
            "VLCS": [10_729], "PACS": [9_991], "OfficeHome": [15_588], "TerraIncognita": [24_330, 24_788],
            "DomainNet": [586_575], "Waterbirds": [11_788], "CelebA": [202_599],
        }  # fmt: skip
        assert totals["SpawriousO2O_easy"] == [152_064]

    def test_archives_of_different_releases_have_different_names(self):
        distinct = {release.folder: release for release in ARCHIVES.values()}
        names = [archive.name for release in distinct.values() for archive in release.archives]
        assert len(names) == len(set(names))

    def test_digits_agree_with_torchvision(self):
        from torchvision.datasets import MNIST

        table = {archive.name: archive.checksums[0] for archive in ARCHIVES["RotatedMNIST"].archives}
        assert table == {name: f"md5:{md5}" for name, md5 in MNIST.resources}

    def test_faces_agree_with_torchvision(self):
        from torchvision.datasets import CelebA

        known = {name: (drive_id, f"md5:{md5}") for drive_id, md5, name in CelebA.file_list}
        for archive in ARCHIVES["CelebA"].archives:
            drive_id, checksum = known[archive.name]
            assert archive.urls[0].endswith(f"={drive_id}")
            assert archive.checksums[0] == checksum

    @pytest.mark.parametrize(
        ("name", "module"), [("WILDSCamelyon", "camelyon17_dataset"), ("WILDSFMoW", "fmow_dataset")]
    )
    def test_addresses_and_folders_agree_with_wilds(self, name, module):
        from domainbed.datasets.wilds import import_wilds

        source = Path(import_wilds(f"wilds.datasets.{module}").__file__).read_text()
        release = ARCHIVES[name]
        assert release.archives[0].urls[0] in source
        assert f"{release.archives[0].about:_}" in source
        dataset, _, version = release.folder.partition("_v")
        assert f"_dataset_name = '{dataset}'" in source
        assert f"'{version}': {{" in source

    def test_the_docs_hold_the_table(self):
        assert releases.markdown(ARCHIVES) in DOCS.read_text(encoding="utf-8")


class TestCards:
    """What the card of a dataset calls official is what counts as a complete download."""

    def test_any_release_of_terra_incognita_is_official(self, tmp_path, monkeypatch):
        cls = datasets.get_dataset_class("TerraIncognita")
        monkeypatch.setattr(cls, "COUNTS_OF_THE_PAPER", {"L100": 11, "L38": 10, "L43": 10, "L46": 10})
        monkeypatch.setattr(cls, "PUBLISHED_COUNTS", {"L100": 10, "L38": 10, "L43": 10, "L46": 10})
        for folder in cls.FOLDERS:
            for name in cls.CLASSES:
                (tmp_path / cls.DIRECTORY / folder / name).mkdir(parents=True)
                (tmp_path / cls.DIRECTORY / folder / name / "1.jpg").touch()
        for image, official in (("1.jpg", True), ("2.jpg", True), ("3.jpg", False)):  # today's, the paper's, neither
            (tmp_path / cls.DIRECTORY / "location_100" / "cat" / image).touch()
            dataset = cls(tmp_path, [0], {})
            here = {name: len(one) for name, one in zip(cls.ENVIRONMENTS, dataset, strict=True)}
            assert (describe.release(dataset) == here) == official

    def test_vlcs_is_official_by_its_total(self):
        parts = cards.parts([cards.Environment("C", "training", np.array([10_000, 729]))], {})
        text = cards.published(datasets.get_dataset_class("VLCS").PUBLISHED_COUNTS, parts, ["bird", "car"])
        assert "these files have them" in text


def annotations(images, labels, categories=("empty", "dog", "cat", "car")):
    return {
        "categories": [{"id": number * 10, "name": name} for number, name in enumerate(categories)],
        "images": [{"id": f"i{file}", "file_name": file, "location": location} for file, location in images],
        "annotations": [{"image_id": f"i{file}", "category_id": 10 * categories.index(name)} for file, name in labels],
    }


class TestCameraTraps:
    @pytest.fixture
    def unpacked(self, tmp_path):
        """Two annotation files as the archive has them, and the images that they name."""
        folder, images = tmp_path / "eccv_18_annotation_files", tmp_path / "eccv_18_all_images_sm"
        folder.mkdir()
        images.mkdir()
        train = annotations(
            [("a.jpg", 38), ("b.jpg", 46), ("c.jpg", 7)],
            [("a.jpg", "dog"), ("a.jpg", "dog"), ("b.jpg", "dog"), ("b.jpg", "cat"), ("c.jpg", "dog")],
        )
        test = annotations(
            [("d.jpg", "100"), ("e.jpg", "43"), ("f.jpg", "43"), ("g.jpg", "43")],
            [("d.jpg", "car"), ("e.jpg", "empty"), ("f.jpg", "cat")],
        )
        (folder / "train_annotations.json").write_text(json.dumps(train))
        (folder / "trans_test_annotations.json").write_text(json.dumps(test))
        for name in "abcdefg":
            (images / f"{name}.jpg").write_text(name)
        return tmp_path

    def test_sorts_four_locations_and_ten_classes(self, unpacked):
        archives.sort_camera_traps(unpacked)
        root = unpacked / "terra_incognita"
        found = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.jpg")}
        assert found == {
            "location_38/dog/a.jpg": "a",
            "location_46/dog/b.jpg": "b",  # two animals: in both folders
            "location_46/cat/b.jpg": "b",
            "location_43/empty/e.jpg": "e",
            "location_43/cat/f.jpg": "f",
        }

    def test_reports_images_that_are_not_there(self, unpacked):
        for name in ("a.jpg", "c.jpg", "f.jpg"):
            (unpacked / "eccv_18_all_images_sm" / name).unlink()
        with pytest.raises(ValueError, match=r"lacks 2 annotated images, such as a\.jpg, f\.jpg"):
            archives.sort_camera_traps(unpacked)


class TestDuplicates:
    @pytest.fixture
    def unpacked(self, tmp_path):
        for domain in DomainNet.FOLDERS:
            (tmp_path / domain / "zebra").mkdir(parents=True)
            for number in range(3):
                (tmp_path / domain / "zebra" / f"{number}.jpg").write_text("")
            (tmp_path / f"{domain}_train.txt").write_text(f"{domain}/zebra/0.jpg 344\n")
            (tmp_path / f"{domain}_test.txt").write_text(f"{domain}/zebra/2.jpg 344\n")
        return tmp_path

    def test_keeps_what_is_listed(self, unpacked):
        archives.drop_duplicates(unpacked)
        root = unpacked / "domain_net"
        assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*")) == sorted(
            f"{domain}/zebra/{number}.jpg" for domain in DomainNet.FOLDERS for number in (0, 2)
        )

    def test_reports_listed_images_that_are_not_there(self, unpacked):
        (unpacked / "real" / "zebra" / "2.jpg").unlink()
        with pytest.raises(ValueError, match=r"lack 1 listed images, such as real/zebra/2\.jpg"):
            archives.drop_duplicates(unpacked)


def test_face_tables_become_what_wilds_reads(tmp_path):
    import pandas as pd

    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "list_attr_celeba.txt").write_text("2\nBlond_Hair Male \n000001.jpg -1  1\n000002.jpg  1 -1\n")
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n")
    archives.write_face_tables(tmp_path)
    root = tmp_path / "celebA_v1.0"
    attributes, partition = (pd.read_csv(root / f"list_{name}.csv") for name in ("attr_celeba", "eval_partition"))
    assert attributes.to_dict("list") == {
        "image_id": ["000001.jpg", "000002.jpg"],
        "Blond_Hair": [-1, 1],
        "Male": [1, -1],
    }
    assert partition["partition"].tolist() == [0, 2]
    with (root / "list_eval_partition.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["image_id", "partition"]
    assert (root / "img_align_celeba").is_dir()

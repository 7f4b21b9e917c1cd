"""CelebA on tiny trees in the release's layout."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domainbed import datasets
from domainbed.datasets.composed import divided_counts

TRAIN = (20, 22, 9, 5)  # not blond: female, male; blond: female, male
OTHERS = ("Bangs", "Young", "Wearing_Hat")


def labels(counts: dict[int, tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Split, blond and male, 0 or 1, of counts[split][group] images, the splits mixed."""
    cells = [(s, g // 2, g % 2) for s, groups in counts.items() for g, n in enumerate(groups) for _ in range(n)]
    return [cells[j] for j in np.random.default_rng(0).permutation(len(cells))]


def write(root: Path, table: list[tuple[int, int, int]], pictures: bool = True) -> Path:
    """The tree; attribute Bangs is the parity of the number, Young its divisibility by three, nobody wears a hat."""
    folder = root / "celebA_v1.0"
    (folder / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    (folder / "RELEASE_v1.0.txt").touch()
    attributes = ["image_id,Bangs,Blond_Hair,Male,Young,Wearing_Hat"]
    partition = ["image_id,partition"]
    for i, (split, blond, male) in enumerate(table, 1):
        name = f"{i:06d}.jpg"
        values = (i % 2, blond, male, i % 3 == 0, 0)
        attributes.append(",".join([name, *(str(2 * int(value) - 1) for value in values)]))
        partition.append(f"{name},{split}")
        if pictures:
            Image.new("RGB", (5, 6), (80 * (2 * blond + male),) * 3).save(folder / "img_align_celeba" / name)
        else:
            (folder / "img_align_celeba" / name).touch()
    (folder / "list_attr_celeba.csv").write_text("\n".join(attributes) + "\n")
    (folder / "list_eval_partition.csv").write_text("\n".join(partition) + "\n")
    return folder


TABLE = labels({0: TRAIN, 1: (4, 3, 2, 1), 2: (2, 3, 1, 1)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, TABLE)
    return tmp_path


def build(root: Path, confounders=None, **hparams):
    return datasets.CelebA(str(root), [3], {"image_size": 8} | hparams, confounders=confounders)


def groups(environment, num_confounders: int = 2) -> list[int]:
    return np.bincount(environment.y * num_confounders + environment.c, minlength=2 * num_confounders).tolist()


def numbers(environment) -> list[int]:
    """The numbers in the files' names."""
    return [int(environment.images.paths[p].removesuffix(".jpg")) for p in environment.positions]


def test_official_splits_and_shares(root: Path) -> None:
    dataset = build(root)
    first, second, *official = map(groups, dataset)
    assert official == [[4, 3, 2, 1], [2, 3, 1, 1]]
    assert tuple(np.add(first, second)) == TRAIN
    assert [first, second] == divided_counts(TRAIN, np.reshape(dataset.SHARES, (2, 4))).tolist()
    assert first == [9, 12, 3, 3]  # 45 % of 20, 55 % of 22, 35 % of 9, 60 % of 5
    assert dataset.group_name(3) == "blond, male"
    assert [environment.augment for environment in dataset] == [True, True, False, False]


@pytest.mark.parametrize("reading", ["shares", "pooled"])
def test_every_row_keeps_its_file_label_and_sex(root: Path, reading: str) -> None:
    used: list[set[int]] = []
    for e, environment in enumerate(build(root, environments=reading)):
        for number, y, c in zip(numbers(environment), environment.y, environment.c, strict=True):
            split, blond, male = TABLE[number - 1]
            assert (blond, male) == (y, c)
            assert (reading == "pooled" and e < 2) or split == max(e - 1, 0)
        used.append(set(numbers(environment)))
    assert not used[0] & used[1]


def test_pictures_are_those_of_the_rows(root: Path) -> None:
    dataset = build(root)
    dataset.use_input_pipeline("pil")
    x, y = dataset[1][0]
    grey = 80 * (2 * y + int(dataset[1].c[0]))
    assert abs(x[0] - (grey / 255 - 0.485) / 0.229).max() < 0.03


def test_subsample_has_the_printed_proportions(tmp_path: Path) -> None:
    write(tmp_path, labels({0: (72, 67, 23, 4), 1: (1, 1, 1, 1), 2: (1, 1, 1, 1)}), pictures=False)
    dataset = build(tmp_path, environments="subsample")
    for environment, printed in zip(dataset, np.reshape(dataset.PROPORTIONS, (2, 4)), strict=False):
        assert abs(np.array(groups(environment)) - printed / printed.sum() * len(environment)).max() < 1


def test_a_named_confounder(root: Path) -> None:
    dataset = build(root, ["Young"])
    assert dataset.CONFOUNDERS == ("not Young", "Young")
    assert all((environment.c == [n % 3 == 0 for n in numbers(environment)]).all() for environment in dataset)
    assert [numbers(environment) for environment in dataset] == [numbers(environment) for environment in build(root)]


def test_a_product_of_confounders(root: Path) -> None:
    dataset = build(root, ["Male", "Bangs"])
    assert dataset.CONFOUNDERS == ("not Male+not Bangs", "not Male+Bangs", "Male+not Bangs", "Male+Bangs")
    assert dataset.num_confounders == 4
    assert dataset.group_name(6) == "blond, Male+not Bangs"
    for environment in dataset:
        expected = [2 * TABLE[n - 1][2] + n % 2 for n in numbers(environment)]
        assert environment.c.tolist() == expected
    assert [sum(counts) for counts in dataset.split_counts.values()] == [56, 10, 7]
    assert dataset.PUBLISHED_COUNTS == {"train": 162770, "validation": 19867, "test": 19962}
    assert len(datasets.CelebA.PUBLISHED_COUNTS["train"]) == 4
    assert datasets.CelebA.CONFOUNDERS == ("female", "male")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["Yuong"], "confounder of CelebA not found: Yuong; did you mean Young"),
        (["Blond_Hair"], "confounder of CelebA not found: Blond_Hair"),
        (["Young", "Young"], "one is named twice"),
        (["Wearing_Hat"], r"list_attr_celeba\.csv: all training images have the confounder 'not Wearing_Hat'"),
        (["Male", "Wearing_Hat"], r"list_attr_celeba\.csv: all training images have the confounder 'not Wearing_Hat'"),
    ],
)
def test_confounders_that_can_not_be(root: Path, named: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(root, named)


def test_an_attribute_must_vary_in_training(root: Path) -> None:
    path = root / "celebA_v1.0" / "list_attr_celeba.csv"
    header, *lines = path.read_text().splitlines()
    assert all(line.endswith(",-1") for line in lines)
    hats = [f"{line[:-2]}1" if split else line for line, (split, _, _) in zip(lines, TABLE, strict=True)]
    path.write_text("\n".join([header, *hats]))
    with pytest.raises(ValueError, match="all training images have the confounder 'not Wearing_Hat'"):
        build(root, ["Male", "Wearing_Hat"])


def test_an_unreadable_image_is_named_with_its_line(root: Path) -> None:
    (root / "celebA_v1.0" / "img_align_celeba" / "000003.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"list_attr_celeba\.csv:\n  line 4: 000003\.jpg: not an image"):
        build(root).use_input_pipeline("pil")


def test_all_bad_rows_are_listed(root: Path) -> None:
    path = root / "celebA_v1.0" / "list_attr_celeba.csv"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("000003.jpg", "000002.jpg")
    lines[4] = "000004.jpg,1,0,1,1,1"
    lines[5] = "000005.jpg,1,1,man,1,1"
    path.write_text("\n".join(lines))
    (root / "celebA_v1.0" / "img_align_celeba" / "000006.jpg").unlink()
    with pytest.raises(ValueError, match="4 bad rows") as caught:
        build(root)
    for words in (
        "line 4: image_id '000002.jpg' stands on line 3 already",
        "line 5: Blond_Hair is '0'; allowed: -1 or 1",
        "line 6: Male is 'man'",
        "line 7: image_id '000006.jpg': no such file",
    ):
        assert words in str(caught.value)


def test_the_split_file_must_match(root: Path) -> None:
    path = root / "celebA_v1.0" / "list_eval_partition.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"has 72 rows, list_attr_celeba.csv has 73"):
        build(root)
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:-1], "000073.jpg,5"]))
    with pytest.raises(ValueError, match="3 bad rows") as caught:
        build(root)
    assert "line 2: image_id is '000002.jpg', and list_attr_celeba.csv has '000001.jpg'" in str(caught.value)
    assert "partition is '5'" in str(caught.value)


@pytest.mark.parametrize("name", ["list_attr_celeba.csv", "list_eval_partition.csv", "RELEASE_v1.0.txt"])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / "celebA_v1.0" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"celebA_v1.0 lacks {name}"):
        build(root)


def test_a_large_file_whose_arrays_pandas_makes_read_only(tmp_path: Path) -> None:
    # pandas reads files above 256 KiB in pieces, and wilds writes to what becomes a read-only array then.
    folder = write(tmp_path, labels({0: (4000, 4000, 3000, 300), 1: (1, 1, 1, 1), 2: (1, 1, 1, 1)}), pictures=False)
    assert (folder / "list_attr_celeba.csv").stat().st_size > 2**18
    dataset = build(tmp_path)
    assert dataset.split_counts["train"] == (4000, 4000, 3000, 300)


def test_published_counts_of_the_release() -> None:
    root = os.environ.get("DOMAINBED_DATA_DIR", "")
    if not Path(root, "celebA_v1.0").is_dir():
        pytest.skip("DOMAINBED_DATA_DIR names no folder with celebA_v1.0")
    dataset = datasets.CelebA(root, [3], {})
    assert dataset.split_counts == dataset.PUBLISHED_COUNTS

"""CSV files as datasets: what their rows become, what is refused, and the way through train, sweep and collection."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from domainbed import datasets, jobs, machine, manifests, registry, rows
from domainbed.datasets.base import REGISTRY
from domainbed.scripts import BadInput, collect_results, describe, sweep, train
from domainbed.splits import split_environments

DOC = Path(__file__).parents[2] / "docs" / "own_data.md"

OFFICIAL = """path,label,confounder,split,photographer
a/1.png,landbird,land,train,Ada
a/2.png,landbird,water,train,Bo
a/3.png,waterbird,water,Train,Bo
a/4.png,waterbird,land,train,Ada
a/5.png,landbird,land,valid,Ada
a/6.png,waterbird,water,val,Ada
a/7.png,landbird,water,test,Bo
a/8.png,waterbird,land,test,Ada
"""


def tree(folder: Path, text: str, name: str = "birds.csv") -> str:
    """A CSV file with the images that it names, one grey each: its first column tells the file, lines the level."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    for line, row in enumerate(text.splitlines()[1:]):
        path = folder / row.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            Image.new("RGB", (20, 12), (20 * line,) * 3).save(path, format="PNG")
    return str(folder / name)


def built(csv: str, test_envs: list[int] | None = None, root: str | None = None, **options: Any) -> Any:
    cls = datasets.get_dataset_class(csv)
    envs = list(cls.TEST_ENVS or [0]) if test_envs is None else test_envs
    return cls(root, envs, {"image_size": 16}, **options)


def triples(dataset: Any) -> list[list[tuple[str, int, int]]]:
    """Path, label and confounder of the images of each environment."""
    return [
        [(env.images.paths[p], int(y), int(c)) for p, y, c in zip(env.positions, env.y, env.c, strict=True)]
        for env in dataset
    ]


def test_official_splits(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    cls = datasets.get_dataset_class(csv)
    assert cls.__name__ == "birds"
    assert (cls.ENVIRONMENTS, cls.VALIDATION_ENVS, cls.TEST_ENVS) == (("train", "validation", "test"), (1,), (2,))
    assert (cls.CLASSES, cls.CONFOUNDERS, cls.NEEDS_DATA_DIR) == (("landbird", "waterbird"), ("land", "water"), False)
    dataset = built(csv)
    assert (dataset.input_shape, dataset.num_classes, dataset.num_confounders) == ((3, 16, 16), 2, 2)
    assert triples(dataset) == [
        [("a/1.png", 0, 0), ("a/2.png", 0, 1), ("a/3.png", 1, 1), ("a/4.png", 1, 0)],
        [("a/5.png", 0, 0), ("a/6.png", 1, 1)],
        [("a/7.png", 0, 1), ("a/8.png", 1, 0)],
    ]
    assert [env.augment for env in dataset] == [True, False, False]
    assert [split.kind for split in split_environments(dataset, [2], 0.2)] == ["in"] * 3
    x, y = dataset[2][1]
    assert int(y) == 1
    grey = x[0] * 0.229 + 0.485
    assert np.allclose(grey, 7 * 20 / 255, atol=1e-3)


def test_augmentation_can_be_turned_off(tmp_path: Path) -> None:
    cls = datasets.get_dataset_class(tree(tmp_path, OFFICIAL))
    assert not any(env.augment for env in cls(None, [2], {"data_augmentation": False}))


def test_training_rows_by_environment_and_no_validation(tmp_path: Path) -> None:
    text = "path,label,environment,split\n1.png,7,10,train\n2.png,12,9,train\n3.png,7,,test\n4.png,12,x,test\n"
    dataset = built(tree(tmp_path, text))
    assert (dataset.ENVIRONMENTS, dataset.VALIDATION_ENVS, dataset.TEST_ENVS) == (("9", "10", "test"), (), (2,))
    assert [[int(y) for y in env.y] for env in dataset] == [[1], [0], [0, 1]]
    assert dataset.CLASSES == ("7", "12")
    assert dataset.num_confounders == 1
    assert dataset[0].c is None
    assert built(dataset.MANIFEST, [1, 2])[1].augment is False
    with pytest.raises(ValueError, match=r"--test_envs must contain \[2\], the rows of split test"):
        built(dataset.MANIFEST, [0])


def test_environments_alone(tmp_path: Path) -> None:
    text = "path,label,environment\n1.png,cat,b\n2.png,dog,a\n3.png,cat,a\n4.png,dog,b\n"
    dataset = built(tree(tmp_path, text), [1])
    assert (dataset.ENVIRONMENTS, dataset.VALIDATION_ENVS, dataset.TEST_ENVS) == (("a", "b"), (), None)
    assert [env.positions.tolist() for env in dataset] == [[1, 2], [0, 3]]
    assert [env.augment for env in dataset] == [True, False]


def test_paths_are_relative_to_the_data_dir_if_there_is_one(tmp_path: Path) -> None:
    csv = tree(tmp_path / "images", OFFICIAL)
    moved = tmp_path / "elsewhere" / "Birds.CSV"
    moved.parent.mkdir()
    Path(csv).rename(moved)
    assert built(str(moved), root=str(tmp_path / "images"))[0].images.root == tmp_path / "images"
    with pytest.raises(ValueError, match=r"8 bad rows(.*\n)+  line 2: path 'a/1\.png': no such file in .*elsewhere"):
        built(str(moved))


def test_any_column_may_be_the_confounder_and_several_make_a_product(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    one = built(csv, confounders=["photographer"])
    assert one.CONFOUNDERS == ("Ada", "Bo")
    assert [env.c.tolist() for env in one] == [[0, 1, 1, 0], [0, 0], [1, 0]]
    both = built(csv, confounders=["photographer", "confounder"])
    assert both.CONFOUNDERS == ("Ada+land", "Ada+water", "Bo+land", "Bo+water")
    assert [env.c.tolist() for env in both] == [[0, 3, 3, 0], [0, 1], [3, 0]]
    assert (both.num_confounders, both.group_name(7)) == (4, "waterbird, Bo+water")
    assert datasets.get_dataset_class(csv).CONFOUNDERS == ("land", "water")
    with pytest.raises(ValueError, match=r"column of .*birds\.csv not found: photograper; did you mean photographer"):
        built(csv, confounders=["photograper"])
    with pytest.raises(ValueError, match="not found: label; known: confounder, photographer"):
        built(csv, confounders=["label"])
    with pytest.raises(ValueError, match="--confounders confounder confounder: name each column once"):
        built(csv, confounders=["confounder"] * 2)


def test_every_bad_row_is_named_in_one_error(tmp_path: Path) -> None:
    bad = "a/1.png,cat,land,train,Ada\n,cat,land,train,Ada\n../birds.csv,,land,train,Ada\na/9.png,cat,,tset,Ada\n"
    csv = tree(tmp_path, OFFICIAL)
    Path(csv).write_text(OFFICIAL + bad)
    with pytest.raises(ValueError, match="4 bad rows; mend these rows, or take them out") as caught:
        built(csv)
    assert str(caught.value).splitlines() == [
        f"{csv}: 4 bad rows; mend these rows, or take them out",
        "  line 10: path 'a/1.png' stands on line 2 already",
        "  line 11: path is empty",
        f"  line 12: label is empty; path '../birds.csv' leads out of {tmp_path}",
        "  line 13: confounder is empty; "
        f"path 'a/9.png': no such file in {tmp_path}; "
        "split is 'tset'; allowed: train, validation (val, valid), test",
    ]
    with pytest.raises(ValueError, match="4 bad rows"):  # the first reading left nothing behind
        built(csv)
    with pytest.raises(ValueError, match=r"line 13: path .*png': no") as caught:
        built(csv, confounders=["photographer"])
    assert "confounder is empty" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n1.png,cat\n", r"line 1: the header lacks path; it has file, label"),
        ("path,label\n1.png,cat\n2.png,dog\n", "all rows are in one environment.*; add a column split .* environment"),
        ("path,label,environment\n1.png,cat,a\n2.png,dog,a\n", "all rows are in one environment"),
        (
            "path,label,environment\n1.png,cat,a\n2.png,dog,\n",
            r"1 bad row; .*all rows are in one env(.*\n).*line 3: env",
        ),
        ("path,label,split\n1.png,cat,train\n2.png,dog,val\n", "no row has split test; add some, or leave the column"),
        ("path,label,split\n1.png,cat,test\n2.png,dog,val\n", "no row has split train"),
        (
            "path,label,split\n1.png,cat,train\n2.png,dog,tset\n",
            r"1 bad row; .*no row has split test.*\n  line 3: split",
        ),
        ("path,label,split\n1.png,cat,train\n2.png,cat,test\n", "label is 'cat' in all rows; a classifier needs two"),
        ("path,label,environment,split\n1.png,cat,test,train\n2.png,dog,,test\n", "called like a split; rename it"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, text: str, message: str) -> None:
    csv = tree(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        datasets.get_dataset_class(csv)
    with pytest.raises(NotImplementedError, match=message):
        registry.attribute("datasets", csv, "ENVIRONMENTS")


def test_a_confounder_must_vary_in_training(tmp_path: Path) -> None:
    text = OFFICIAL.replace("water,train", "land,train").replace("water,Train", "land,train")
    csv = tree(tmp_path, text)
    with pytest.raises(ValueError, match=r"confounder is 'land' in all 4 training rows.*name other columns"):
        built(csv)
    with pytest.raises(ValueError, match="confounder is 'land' in all 4 training rows"):
        built(csv, confounders=["photographer", "confounder"])
    assert built(csv, confounders=["photographer"]).num_confounders == 2


def test_a_label_without_training_images_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    csv = tree(tmp_path, OFFICIAL.replace("a/8.png,waterbird", "a/8.png,seal"))
    with caplog.at_level(logging.WARNING):
        assert built(csv).num_classes == 3
    assert f"{csv}: label seal never occurs in training" in caplog.text


def test_damaged_images_are_named_before_training(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    (tmp_path / "a" / "3.png").write_text("no image")
    with pytest.raises(ValueError, match=r"birds\.csv:\n  line 4: a/3\.png: not an image"):
        built(csv).use_input_pipeline("pil")


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    assert registry.attribute("datasets", csv, "CLASSES") == ("landbird", "waterbird")
    assert manifests.read(csv) is manifests.read(csv)
    Path(csv).write_text(OFFICIAL.replace("landbird", "auk"))
    assert registry.attribute("datasets", csv, "CLASSES") == ("auk", "waterbird")


def test_attributes_are_those_of_the_class_and_need_no_torch(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    cls = datasets.get_dataset_class(csv)
    names = ("ENVIRONMENTS", "TEST_ENVS", "VALIDATION_ENVS", "CLASSES", "CONFOUNDERS", "OPTIONS", "NEEDS_DATA_DIR")
    for name in names:
        assert registry.attribute("datasets", csv, name) == getattr(cls, name)
    for name, default in (("HPARAMS_SIZE", "large"), ("HPARAMS", {}), ("PUBLISHED_COUNTS", {})):
        assert registry.attribute("datasets", csv, name, default) == getattr(cls, name)
    code = (
        f"import sys; from domainbed import jobs; print(jobs.dataset_test_envs({csv!r}, False), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[2]] False"


def test_a_missing_file(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.csv")
    with pytest.raises(
        FileNotFoundError, match=r"gone\.csv: no such file; it must be a CSV with the columns path, label"
    ):
        datasets.get_dataset_class(gone)
    assert rows.declared("datasets", gone, "ENVIRONMENTS", "unknown") == "unknown"
    with pytest.raises(NotImplementedError, match=r"gone\.csv: no such file"):
        jobs.dataset_test_envs(gone, False)


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1)  # no loader processes


QUICK = ["--steps", "2", "--checkpoint_freq", "1"]
SMALL = '{"backbone": "small_cnn", "batch_size": 4, "image_size": 28}'


@pytest.mark.usefixtures("one_core")
def test_train_and_collect(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    csv = tree(tmp_path / "data", OFFICIAL)
    flags = ["--dataset", csv, "--algorithm", "GroupDRO", "--partition", "group", "--hparams", SMALL, *QUICK]
    for run, more in (("a", []), ("b", ["--confounders", "photographer"])):
        assert train.main([*flags, *more, "--output_dir", str(tmp_path / "runs" / run)]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs" / "a" / "results.jsonl").read_text().splitlines()]
    assert {"env0_in_wga", "env1_in_acc", "env2_in_g1_n", "env2_in_g2_n"} <= records[0].keys()
    assert not {"env0_out_acc", "env2_in_g0_n"} & records[0].keys()
    assert records[0]["args"]["test_envs"] == [2]
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert f"Dataset: {csv}," in printed
    assert "test " in printed  # the environment's name, from the file
    assert re.search(r"GroupDRO confounders=\[.photographer.\] +Uniform Group +\d", printed)
    with pytest.raises(BadInput, match="leaves no choice of --confounders"):
        train.main(["--dataset", "Debug28", "--confounders", "x", "--output_dir", str(tmp_path / "no")])


def test_a_sweep_of_a_file_takes_its_own_test_environment(tmp_path: Path) -> None:
    csv = tree(tmp_path, OFFICIAL)
    words = ["launch", "--datasets", csv, "--algorithms", "ERM:group", "--n_hparams", "1", "--n_trials", "1"]
    args = sweep.parse([*words, "--output_dir", str(tmp_path / "sweep"), "--command_launcher", "dummy"])
    (job,) = sweep.sweep_jobs(args)
    assert job.train_args["test_envs"] == [2]
    assert f"--dataset {csv}" in job.command_str
    assert "--data_dir" not in job.command_str


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def documented() -> Iterator[None]:
    """The classes of the documentation, registered for a while."""
    known = set(REGISTRY.names)
    for block in blocks("python"):
        exec(block, {"__name__": "own_data"})
    yield
    for name in set(REGISTRY.names) - known:
        REGISTRY.names.remove(name)
        del REGISTRY._entries[name]


@pytest.mark.usefixtures("documented", "one_core")
def test_the_documented_class_around_a_file(tmp_path: Path) -> None:
    csv = tree(tmp_path, blocks("csv")[0])
    assert datasets.get_dataset_class(csv).ENVIRONMENTS == ("train", "validation", "test")
    dataset = datasets.get_dataset_class("Birds")(str(tmp_path), [2], {"image_size": 16})
    assert dataset.CLASSES == ("waterbird", "landbird")
    assert [env.y.tolist() for env in dataset] == [[1, 1, 0, 0], [1, 0], [1, 0]]
    assert [env.c.tolist() for env in dataset] == [[0, 1, 1, 0], [0, 1], [1, 0]]
    product = built(csv, confounders=["photographer", "confounder"])
    for text in (*product.CONFOUNDERS, "eight groups"):
        assert text in DOC.read_text(encoding="utf-8")
    flags = ["--dataset", "Birds", "--data_dir", str(tmp_path), "--hparams", SMALL, *QUICK]
    assert train.main([*flags, "--partition", "group", "--output_dir", str(tmp_path / "run")]) == 0
    assert describe.main(["--dataset", "Birds", "--data_dir", str(tmp_path), "--output", str(tmp_path / "c.png")]) == 0


@pytest.mark.usefixtures("documented")
def test_a_class_that_disagrees_with_its_file_is_told_what_to_say(tmp_path: Path) -> None:
    cls = datasets.get_dataset_class("Birds")
    tree(tmp_path, OFFICIAL.replace(",val,", ",train,").replace(",valid,", ",train,"))
    with pytest.raises(
        ValueError, match=r"class Birds disagree; .*say ENVIRONMENTS = \('train', 'test'\); VALID.* = \(\);"
    ):
        cls(str(tmp_path), [1], {})
    tree(tmp_path, OFFICIAL.replace("7.png,landbird", "7.png,seal"))
    with pytest.raises(ValueError, match="line 8: label is 'seal'; allowed: waterbird, landbird"):
        cls(str(tmp_path), [2], {})
    tree(tmp_path, OFFICIAL.replace("confounder", "place"))
    assert cls(str(tmp_path), [2], {}).num_confounders == 1
    cls.CONFOUNDERS = ("water", "land")
    with pytest.raises(ValueError, match="has no column confounder, and class Birds has CONFOUNDERS; add"):
        cls(str(tmp_path), [2], {})
    assert cls(str(tmp_path), [2], {}, confounders=["place"]).CONFOUNDERS == ("land", "water")
    tree(tmp_path, OFFICIAL)
    assert cls(str(tmp_path), [2], {})[0].c.tolist() == [1, 0, 0, 1]


@pytest.mark.usefixtures("documented", "one_core")
def test_the_documented_class_that_finds_the_images_itself(tmp_path: Path) -> None:
    names = [
        f"{e}/{y}_{c}/{i}.png"
        for e in ("north", "south")
        for y in ("cat", "dog")
        for c in ("day", "night")
        for i in "12"
    ]
    tree(tmp_path / "cameras", "\n".join(["path", *names]))
    dataset = datasets.get_dataset_class("Cameras")(str(tmp_path), [1], {"image_size": 16})
    assert [env.y.tolist() for env in dataset] == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    assert [env.c.tolist() for env in dataset] == [[0, 0, 1, 1, 0, 0, 1, 1]] * 2
    assert [env.augment for env in dataset] == [True, False]
    assert dataset.group_name(2) == "dog, day"
    flags = ["--dataset", "Cameras", "--data_dir", str(tmp_path), "--hparams", SMALL, *QUICK]
    assert train.main([*flags, "--partition", "group", "--output_dir", str(tmp_path / "run")]) == 0

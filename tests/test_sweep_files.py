"""Every file in sweeps/ makes the jobs that its header promises, of hparams and data that exist."""

import functools
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from domainbed import algorithms, backbones, hparams_registry, overrides, registry
from domainbed.scripts import sweep

ROOT = Path(__file__).parents[1] / "sweeps"
FILES = sorted(ROOT.glob("*.toml"))

# Seconds an epoch, appendix D of the eX2L paper; those that it prints for M2M-Hard are CelebA's, and M2M-Hard has as
# many images as O2O-Easy.
ROWS = ("ERM", "IRM", "MMD", "CORAL", "DANN", "CDANN", "GroupDRO",
        "EX2L_MAE", "EX2L_Cosine", "EX2L_SoftDice", "EX2L_JSDistance", "EX2L_SSIM")  # fmt: skip
O2O = (26.58, 26.87, 26.97, 27.00, 26.49, 26.61, 28.23, 52.16, 52.12, 52.11, 52.16, 52.80)
SECONDS = {
    "ColoredMNIST224": (47.42, 47.43, 47.56, 47.49, 46.19, 47.05, 49.66, 93.28, 93.96, 93.33, 93.36, 95.67),
    "Waterbirds": (14.05, 13.58, 13.91, 13.69, 13.69, 13.61, 14.34, 28.45, 28.68, 28.54, 27.70, 28.79),
    "CelebA": (207.39, 208.03, 208.47, 208.53, 205.12, 207.66, 213.10, 403.50, 403.76, 405.98, 406.36, 415.73),
    "SpawriousO2O_easy": O2O,
    "SpawriousM2M_hard": O2O,
}
TIMES_RESNET50 = {"torchvision:alexnet": 1.0, "torchvision:convnext_base": 15.36 / 4.09}  # GFLOPs an image
PAPERS = ("screening", "table2", "table7", "architecture", "efficiency")
PROTOCOLS = ("screening", "table2", "table7", "architecture")


def header(path):
    lines = path.read_text().splitlines()
    comment = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    return " ".join(comment)


def number(pattern, path):
    return int(re.search(pattern, header(path))[1].replace(",", ""))


def parsed(path):
    """The sweep; on Waterbirds where the dataset is a file of its features, which is made first."""
    made = [] if "--datasets features/waterbirds" not in header(path) else ["--datasets", "Waterbirds"]
    words = ["--output_dir", "o", "--data_dir", "d", "--command_launcher", "local", *made]
    return sweep.parse(["launch", str(path), *words])


@functools.cache
def jobs_of(path):
    return [job.train_args for job in sweep.sweep_jobs(parsed(path))]


def by_cell(args_list):
    """The jobs of each row on each dataset."""
    found = defaultdict(list)
    for args in args_list:
        found[args.get("label", args["algorithm"]), args.get("partition"), args["dataset"]].append(args)
    return found


def gpu_hours(args, epochs):
    seconds = SECONDS[args["dataset"]]
    untimed = sum(seconds[7:]) / 5  # a similarity that the paper did not time
    factor = TIMES_RESNET50.get(json.loads(args["hparams"])["backbone"], 1.0)
    return factor * dict(zip(ROWS, seconds, strict=True)).get(args["algorithm"], untimed) * epochs / 3600


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_says_how_many_jobs(path):
    assert number(r"([\d,]+) jobs", path) == len(jobs_of(path))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_header_says_what_the_refit_costs(name):
    path = ROOT / f"{name}.toml"
    args, launched = parsed(path), jobs_of(path)
    draws = by_cell(launched)
    assert {len(some) for some in draws.values()} == {20}
    assert number(r"refit: ([\d,]+) jobs", path) == len(draws) * len(args.seeds)
    search = sum(gpu_hours(a, args.epochs) for a in launched)
    again = sum(gpu_hours(a, args.epochs) for a, *_ in draws.values()) * len(args.seeds)
    assert number(r"launch: [\d,]+ jobs, ([\d,]+) GPU hours", path) == pytest.approx(search, abs=0.6)
    assert number(r"refit: [\d,]+ jobs, ([\d,]+) GPU hours", path) == pytest.approx(again, abs=0.6)
    assert f"launch sweeps/{name}.toml" in header(path)
    assert f"refit sweeps/{name}.toml" in header(path)


def test_header_says_what_the_efficiency_tables_cost():
    path = ROOT / "efficiency.toml"
    assert number(r"([\d,]+) GPU hours", path) == round(sum(gpu_hours(a, 2) for a in jobs_of(path)))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_is_the_papers(name):
    args = parsed(ROOT / f"{name}.toml")
    assert (args.seeds, args.criterion, args.keep_best) == ([42, 8, 777], "aa_wga", "aa_wga")
    assert (args.epochs, args.n_trials) == (50 if name == "table7" else 300, 1)
    for job in jobs_of(ROOT / f"{name}.toml"):
        hparams = json.loads(job["hparams"])
        assert (hparams["optimizer"], hparams["patience"], hparams["min_delta"]) == ("sgd", 10, 1e-4)
        environments = registry.attribute("datasets", job["dataset"], "ENVIRONMENTS")
        validation = registry.attribute("datasets", job["dataset"], "VALIDATION_ENVS", ())
        assert hparams["batch_size"] * (len(environments) - len(validation) - len(job["test_envs"])) == 128


def test_rows_are_the_papers():
    names = [name for name in algorithms.ALGORITHMS if name.startswith("EX2L_")]
    screened = {(a["algorithm"], a.get("partition", "group")) for a in jobs_of(ROOT / "screening.toml")}
    assert len(names) == 11
    assert screened == {(name, partition) for name in names for partition in ("random", "group")}
    own = {(a["algorithm"], a.get("partition", "group")) for a in jobs_of(ROOT / "screening_digits.toml")}
    assert own == screened
    for name in ("table2", "table7", "efficiency"):
        assert tuple(dict.fromkeys(a["algorithm"] for a in jobs_of(ROOT / f"{name}.toml"))) == ROWS
    table7 = {a["algorithm"]: a.get("partition") for a in jobs_of(ROOT / "table7.toml")}
    assert {name for name, partition in table7.items() if partition} == {"ERM", "GroupDRO"}
    assert (table7["ERM"], table7["GroupDRO"]) == ("random", "group")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hparams_and_ranges_are_known(path, caplog):
    for args in {json.dumps([a["algorithm"], a["dataset"], a.get("hparams"), a.get("ranges")]) for a in jobs_of(path)}:
        algorithm, dataset, hparams, ranges = json.loads(args)
        given = overrides.parse(hparams)
        hparams_registry.check_given(algorithms.get_algorithm_class(algorithm), dataset, given)
        drawn = hparams_registry.random_hparams(
            algorithm, dataset, 1, overrides.parse_ranges(ranges), given.get("optimizer", "adam")
        )
        assert not overrides.parse(ranges).keys() & given.keys()
        assert overrides.parse(ranges).keys() <= drawn.keys()
    assert not [record for record in caplog.records if "does not read" in record.message]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_draw_is_from_a_printed_range_or_fixed(name):
    """Whatever the registry would draw by itself is either drawn from the file's range or has one value."""
    for args in {json.dumps([a["algorithm"], a["dataset"], a["hparams"], a["ranges"]])
                 for a in jobs_of(ROOT / f"{name}.toml")}:  # fmt: skip
        algorithm, dataset, hparams, ranges = json.loads(args)
        unread = {*algorithms.get_algorithm_class(algorithm).UNREAD_HPARAMS, "vit_dropout"}  # DINOv2's
        draws = [hparams_registry.random_hparams(algorithm, dataset, seed) for seed in range(5)]
        free = {key for key in draws[0] if len({draw[key] for draw in draws}) > 1}
        assert free <= overrides.parse(hparams).keys() | overrides.parse(ranges).keys() | unread


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_datasets_and_backbones_exist(path):
    from torchvision import models

    assert {args["dataset"] for args in jobs_of(path)} <= set(registry.names("datasets"))
    hparams = [overrides.parse(text) for text in {args.get("hparams") for args in jobs_of(path)}]
    for backbone, weights in {(some.get("backbone", "small_cnn"), some.get("weights")) for some in hparams}:
        library, _, model = backbone.partition(":")
        assert (library == "torchvision" and model in models.list_models()) or library in backbones.BACKBONES
        assert not weights or weights in models.get_model_weights(model or library).__members__


def test_official_test_environments():
    found = {a["dataset"]: a["test_envs"] for name in PAPERS for a in jobs_of(ROOT / f"{name}.toml")}
    assert found == {
        "ColoredMNIST224": [2], "Waterbirds": [3], "CelebA": [3], "SpawriousO2O_easy": [0], "SpawriousM2M_hard": [0],
    }  # fmt: skip

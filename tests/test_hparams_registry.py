import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from domainbed import algorithms, datasets, hparams_registry, registry
from domainbed.algorithms.erm import ERM
from domainbed.hparams_registry import SHARED, DatasetTraits, check_given
from domainbed.overrides import parse_ranges

SMALL, LARGE = "Debug28", "PACS"
NAMES = ["ERM", "IRM", "GroupDRO", "Mixup", "CORAL", "MMD", "DANN", "CDANN", "VREx"]


class Draws:
    """DomainBed's draw of one name: the generator's seed is the md5 of the printed tuple."""

    def __init__(self, seed: int):
        self.seed = seed

    def generator(self, name: str) -> np.random.RandomState:
        digest = hashlib.md5(f"({self.seed}, '{name}')".encode()).hexdigest()
        return np.random.RandomState(int(digest, 16) % 2**31)

    def power(self, name: str, base: int, low: float, high: float) -> float:
        return base ** self.generator(name).uniform(low, high)

    def choice(self, name: str, options: list) -> float:
        return options[self.generator(name).choice(len(options))]


def expected(algorithm: str, small: bool, seed: int) -> dict:
    """name -> (default, draw), written out from DomainBed's tables."""
    draws = Draws(seed)
    table = {
        "data_augmentation": (True, True),
        "resnet18": (False, False),
        "resnet50_augmix": (True, True),
        "dinov2": (False, False),
        "vit": (False, False),
        "vit_attn_tune": (False, False),
        "freeze_bn": (False, False),
        "lars": (False, False),
        "linear_steps": (500, 500),
        "resnet_dropout": (0.0, draws.choice("resnet_dropout", [0.0, 0.1, 0.5])),
        "vit_dropout": (0.0, draws.choice("vit_dropout", [0.0, 0.1, 0.5])),
        "class_balanced": (False, False),
        "nonlinear_classifier": (False, False),
    }
    if small:
        table["lr"] = (1e-3, draws.power("lr", 10, -4.5, -2.5))
        table["weight_decay"] = (0.0, 0.0)
        table["batch_size"] = (64, int(draws.power("batch_size", 2, 3, 9)))
    else:
        table["lr"] = (5e-5, draws.power("lr", 10, -5, -3.5))
        table["weight_decay"] = (0.0, draws.power("weight_decay", 10, -6, -2))
        table["batch_size"] = (32, int(draws.power("batch_size", 2, 3, 5.5)))
    if algorithm == "IRM":
        table["irm_lambda"] = (100.0, draws.power("irm_lambda", 10, -1, 5))
        table["irm_penalty_anneal_iters"] = (500, int(draws.power("irm_penalty_anneal_iters", 10, 0, 4)))
    if algorithm == "VREx":
        table["vrex_lambda"] = (10.0, draws.power("vrex_lambda", 10, -1, 5))
        table["vrex_penalty_anneal_iters"] = (500, int(draws.power("vrex_penalty_anneal_iters", 10, 0, 4)))
    if algorithm == "GroupDRO":
        table["groupdro_eta"] = (0.01, draws.power("groupdro_eta", 10, -3, -1))
    if algorithm == "Mixup":
        table["mixup_alpha"] = (0.2, draws.power("mixup_alpha", 10, -1, 1))
    if algorithm in ("MMD", "CORAL"):
        table["mmd_gamma"] = (1.0, draws.power("mmd_gamma", 10, -1, 1))
    if algorithm in ("DANN", "CDANN"):
        table["lambda"] = (1.0, draws.power("lambda", 10, -2, 2))
        table["weight_decay_d"] = (0.0, draws.power("weight_decay_d", 10, -6, -2))
        table["d_steps_per_g_step"] = (1, int(draws.power("d_steps_per_g_step", 2, 0, 3)))
        table["grad_penalty"] = (0.0, draws.power("grad_penalty", 10, -2, 1))
        table["beta1"] = (0.5, draws.choice("beta1", [0.0, 0.5]))
        table["mlp_width"] = (256, int(draws.power("mlp_width", 2, 6, 10)))
        table["mlp_depth"] = (3, draws.choice("mlp_depth", [3, 4, 5]))
        table["mlp_dropout"] = (0.0, draws.choice("mlp_dropout", [0.0, 0.1, 0.5]))
        for name in ("lr_g", "lr_d"):
            low, high, default = (-4.5, -2.5, 1e-3) if small else (-5, -3.5, 5e-5)
            table[name] = (default, draws.power(name, 10, low, high))
        table["weight_decay_g"] = (0.0, 0.0 if small else draws.power("weight_decay_g", 10, -6, -2))
    return table


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dataset", [SMALL, LARGE])
@pytest.mark.parametrize("algorithm", NAMES)
def test_defaults_and_draws_are_domainbeds(algorithm, dataset, seed):
    table = expected(algorithm, dataset == SMALL, seed)
    assert hparams_registry._hparams(algorithm, dataset, seed) == table
    assert hparams_registry.default_hparams(algorithm, dataset) == {k: default for k, (default, _) in table.items()}
    drawn = hparams_registry.random_hparams(algorithm, dataset, seed)
    assert drawn == {k: value for k, (_, value) in table.items()}
    assert {k: type(v) for k, v in drawn.items()} == {k: type(v) for k, (_, v) in table.items()}
    assert json.loads(json.dumps(drawn)) == drawn


RECORDED = json.loads((Path(__file__).parent / "domainbed_output" / "hparams.json").read_text("utf-8"))


def rows(algorithm, dataset):
    """The defaults, and the draws of seeds 0 to 3."""
    drawn = [hparams_registry.random_hparams(algorithm, dataset, seed) for seed in range(4)]
    return [hparams_registry.default_hparams(algorithm, dataset), *drawn]


def digest(hparams):
    whole = [{k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in row.items()} for row in hparams]
    return hashlib.md5(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("algorithm", registry.order("algorithms")[:34])
def test_all_pairs_are_as_domainbed_gives_them(algorithm):
    """Recorded from facebookresearch/DomainBed; its 18 datasets, of which some have the same hparams."""
    for dataset, recorded in RECORDED["values"][algorithm].items():
        shared = RECORDED["values"]["ERM"][dataset]
        assert rows(algorithm, dataset) == [one | other for one, other in zip(shared, recorded, strict=True)]
    names = [name for names in RECORDED["digests"][algorithm].values() for name in names]
    assert sorted(names) == sorted(registry.order("datasets")[:18])
    for recorded, names in RECORDED["digests"][algorithm].items():
        for dataset in names:
            assert digest(rows(algorithm, dataset)) == recorded, dataset


@pytest.mark.parametrize("name", ["RotatedMNIST", "ColoredMNIST", "Debug28"])
def test_domainbeds_small_datasets(name):
    assert DatasetTraits.of(name) == DatasetTraits(name, small=True)


def test_unknown_names_get_the_shared_hparams():
    hparams = hparams_registry.default_hparams("NoSuchAlgorithm", "NoSuchDataset")
    assert hparams == hparams_registry.default_hparams("ERM", LARGE)
    assert hparams.keys() == SHARED.keys()


class Base(ERM):
    HPARAMS = {"tau": (1.0, lambda r: r.uniform(0, 1)), "lr": (0.5, lambda r: 0.25)}


class Derived(Base):
    HPARAMS = {"tau": (2.0, lambda r: np.float64(7)), "width": lambda dataset: (len(dataset.name), lambda r: 1)}


class Undeclared(Base):
    pass


@pytest.fixture
def outside(monkeypatch):
    for cls in (Base, Derived, Undeclared):
        monkeypatch.setattr(algorithms, cls.__name__, cls, raising=False)


@pytest.mark.usefixtures("outside")
def test_a_class_overrides_its_bases_and_the_shared_table():
    assert (
        hparams_registry._hparams("Derived", "Debug28", 0).items()
        >= {
            "tau": (2.0, 7.0),
            "width": (7, 1),
            "lr": (0.5, 0.25),
            "batch_size": hparams_registry._hparams("ERM", "Debug28", 0)["batch_size"],
        }.items()
    )
    assert type(hparams_registry.random_hparams("Derived", "Debug28", 0)["tau"]) is float
    assert hparams_registry.default_hparams("Undeclared", "Debug28")["tau"] == 1.0


def test_a_dataset_fixes_values(monkeypatch):
    class Outside(datasets.Debug28):
        HPARAMS = {"backbone": "tiny", "lr": 0.125, "batch_size": (8, lambda r: int(r.choice([4])))}

    monkeypatch.setattr(datasets, "Outside", Outside, raising=False)
    pairs = hparams_registry._hparams("ERM", "Outside", 3)
    assert pairs["backbone"] == ("tiny", "tiny")
    assert pairs["lr"] == (0.125, 0.125)
    assert pairs["batch_size"] == (8, 4)
    assert pairs["weight_decay"] == (0.0, 0.0)  # small, by inheritance


def test_define_hparam_adds_to_a_table(monkeypatch):
    table = dict(SHARED)
    monkeypatch.setattr(hparams_registry, "SHARED", table)
    hparams_registry._define_hparam(table, "temperature", 0.5, lambda r: r.uniform(0, 1))
    assert hparams_registry.default_hparams("ERM", SMALL)["temperature"] == 0.5
    assert 0 < hparams_registry.random_hparams("ERM", SMALL, 0)["temperature"] < 1


@pytest.mark.parametrize("given", [{}, {"lr": 1}, {"irm_lambda": 1}, {"backbone": "x", "pretrained": False}])
def test_known_hparams_pass(given):
    check_given(algorithms.IRM, SMALL, given)


def test_a_declaring_class_refuses_unknown_hparams():
    with pytest.raises(ValueError, match=r"irm_lamda; did you mean irm_lambda\? known: .*batch_size"):
        check_given(algorithms.IRM, SMALL, {"lr": 1.0, "irm_lamda": 3.0})
    with pytest.raises(ValueError, match="hparam of ERM not found: irm_lambda"):
        check_given(algorithms.ERM, SMALL, {"irm_lambda": 3.0})


def test_other_classes_pass_them_on_and_warn_of_slips(caplog):
    with caplog.at_level(logging.WARNING):
        check_given(Undeclared, SMALL, {"my_very_own": 1})
        assert not caplog.messages
        check_given(Undeclared, SMALL, {"batchsize": 1})
    assert caplog.messages == ["hparam batchsize is passed on to Undeclared; did you mean batch_size?"]


@pytest.mark.parametrize("given", [{"lr": "1"}, {"batch_size": 64.0}, {"batch_size": True}, {"class_balanced": 1}])
def test_values_of_another_type_are_refused(given):
    with pytest.raises(ValueError, match="give a value like its default"):
        check_given(algorithms.ERM, SMALL, given)


class TestOptimizer:
    @pytest.mark.parametrize("algorithm", ["ERM", "DANN"])
    @pytest.mark.parametrize(("dataset", "default", "low", "high"), [(SMALL, 1e-2, -3, -1), (LARGE, 1e-3, -4, -2)])
    def test_learning_rates_suit_sgd_and_nothing_else_changes(self, algorithm, dataset, default, low, high):
        rates = {"lr", "lr_g", "lr_d"} & hparams_registry.default_hparams(algorithm, dataset).keys()
        adam = hparams_registry.default_hparams(algorithm, dataset)
        sgd = hparams_registry.default_hparams(algorithm, dataset, "sgd")
        assert sgd == adam | dict.fromkeys(rates, default)
        for seed in range(4):
            drawn = hparams_registry.random_hparams(algorithm, dataset, seed, optimizer="sgd")
            expected = {name: Draws(seed).power(name, 10, low, high) for name in rates}
            assert drawn == hparams_registry.random_hparams(algorithm, dataset, seed) | expected

    def test_what_training_reads_is_known_and_typed(self):
        check_given(algorithms.ERM, SMALL, {"optimizer": "sgd", "momentum": 0, "patience": 3, "min_delta": 0.1})
        for wrong in ({"optimizer": 1}, {"momentum": "0.9"}, {"patience": 2.5}, {"min_delta": True}):
            with pytest.raises(ValueError, match=f"hparam {next(iter(wrong))} is .*like its default"):
                check_given(algorithms.ERM, SMALL, wrong)
        assert not {"optimizer", "momentum", "patience", "min_delta"} & SHARED.keys()  # only where they are given


class TestRanges:
    def test_they_replace_draws_by_the_hparams_own_generator_and_leave_the_others(self):
        ranges = parse_ranges('{"irm_lambda": "10^U(0, 1)", "batch_size": "int 2^U(2, 3)", "resnet18": [true]}')
        for seed in range(4):
            draws = Draws(seed)
            expected = {
                "irm_lambda": draws.power("irm_lambda", 10, 0, 1),
                "batch_size": int(draws.power("batch_size", 2, 2, 3)),
                "resnet18": True,
            }
            usual = hparams_registry.random_hparams("IRM", SMALL, seed)
            assert hparams_registry.random_hparams("IRM", SMALL, seed, ranges) == usual | expected

    def test_the_same_range_is_the_same_draw(self):
        same = parse_ranges('{"irm_penalty_anneal_iters": "int 10^U(0, 4)", "lr": "10^U(-4.5, -2.5)"}')
        usual = hparams_registry.random_hparams("IRM", SMALL, 5)
        assert hparams_registry.random_hparams("IRM", SMALL, 5, same) == usual

    def test_values_that_a_dataset_fixes_may_be_drawn_too(self):
        ranges = parse_ranges('{"backbone": ["resnet18"]}')
        assert hparams_registry.random_hparams("ERM", "DigitsM2M", 1)["backbone"] != "resnet18"
        assert hparams_registry.random_hparams("ERM", "DigitsM2M", 1, ranges)["backbone"] == "resnet18"

    def test_names_that_the_pair_lacks_are_refused(self):
        ranges = parse_ranges('{"irm_lamda": "U(0, 1)"}')
        message = "hparam of IRM on Debug28 to draw not found: irm_lamda; did you mean irm_lambda"
        with pytest.raises(ValueError, match=message):
            hparams_registry.random_hparams("IRM", SMALL, 1, ranges)
        with pytest.raises(ValueError, match=message):
            hparams_registry.check_ranges("IRM", SMALL, ranges)
        with pytest.raises(ValueError, match="hparam of ERM on Debug28 to draw not found: irm_lambda"):
            hparams_registry.check_ranges("ERM", SMALL, ["irm_lambda"])

    def test_draws_of_another_type_are_refused(self):
        with pytest.raises(ValueError, match=r"hparam batch_size is \d+\.\d+; give a value like its default, 64"):
            hparams_registry.random_hparams("ERM", SMALL, 1, parse_ranges('{"batch_size": "2^U(5, 7)"}'))


def test_hparams_that_the_class_does_not_read_are_pointed_out_once(caplog):
    check_given(algorithms.CDANN, SMALL, {"lr_g": 0.1})
    assert not caplog.messages
    check_given(algorithms.CDANN, SMALL, {"lr": 0.1, "lr_g": 0.1, "weight_decay": 0.0})
    assert caplog.messages == ["CDANN does not read lr, weight_decay; its docstring names what it reads"]

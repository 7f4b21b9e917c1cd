"""What the baselines declare: where their partitions, annotations and defaults come from, written out."""

import pytest

from domainbed import algorithms, hparams_registry

# partition, whether update reads confounders, whether it takes hidden ones
DECLARED = {
    "RWG": ("group", False, False),
    "RWY": ("label", False, False),
    "SUBG": ("group_subset", False, False),
    "SUBY": ("label_subset", False, False),
    "ReWeight": ("random", True, True),
    "LISA": ("group", True, True),
    "MMD_GivenLabel": ("group", True, True),
    "CORAL_GivenLabel": ("group", True, True),
    "JTT": ("random", False, False),
    "CRT": ("group", False, False),
    "ReWeightCRT": ("random", True, True),
    "DFR": ("random", False, False),
    "DFR_Training": ("random", False, False),
    "EX2L_MAE": ("group", True, True),
    "RRR_Confounder": ("group", True, True),
}
DEFAULTS = {
    "CVaR_DRO": {"cvar_alpha": 0.1},
    "LfF": {"lff_q": 0.7},
    "LISA": {"lisa_alpha": 2.0, "lisa_p_sel": 0.5, "lisa_mix": "mixup"},
    "InBatchMixup": {"mixup_alpha": 0.2},
    "CDAN": {"cdan_lambda": 1.0, "cdan_dropout": 0.5, "cdan_lr_factor": 10.0},
    "JTT": {"jtt_first_share": 0.2, "jtt_upweight": 20.0},
    "ReWeight": {"reweight_power": 1.0},
    "DFR": {"dfr_averages": 20},
    "DFR_Training": {"dfr_averages": 10},
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_trained_on(name: str) -> None:
    cls = algorithms.get_algorithm_class(name)
    assert DECLARED[name] == (cls.PARTITION, cls.NEEDS_CONFOUNDERS, cls.TAKES_HIDDEN)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_sources(name: str) -> None:
    assert hparams_registry.default_hparams(name, "PACS").items() >= DEFAULTS[name].items()

import re

import pytest

from domainbed import registry, screening_tables
from domainbed.table_formats import render

OFF = '{"map_gradient": "none"}'


def screening_text(records):
    return render(screening_tables.screening_tables(records), "text")


def record(algorithm, splits, dataset="ColoredDigits", test_envs=(2,), step=0, **args):
    """A record with the WGA of each split, which has two groups of five images and AA .8."""
    values = {}
    for split, wga in {"env2_in": 0.5, **splits}.items():
        values |= {f"{split}_acc": 0.8, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g0_n": 5}
        values |= {f"{split}_g1_acc": 1.6 - wga, f"{split}_g1_n": 5}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": list(test_envs), "trial_seed": 0, "seed": 0}
    return {"args": {**run, "hparams_seed": 0, **args}, "step": step, **values}


def splits(train, val):
    """The same WGA in both training environments."""
    return {f"env{env}_{split}": wga for env in (0, 1) for split, wga in (("in", train), ("out", val))}


# By hand: pooled, environments 0 and 1 of MAE have .3 and .4; a checkpoint that is worse on validation is not taken.
RECORDS = [
    record("EX2L_MAE", {"env0_in": 0.2, "env1_in": 0.4, "env0_out": 0.1, "env1_out": 0.7}),
    record("EX2L_MAE", splits(1, 0.1), step=1),
    record("EX2L_MAE", splits(0.4, 0.6), trial_seed=1),
    record("EX2L_MAE", splits(0.1, 0.2), partition="random"),
    record("EX2L_MAE", splits(0.5, 0.7), hparams=OFF),
    record("EX2L_Cosine", splits(0.6, 0.45)),
    record("EX2L_KL", splits(0.6, 0.4), partition="random"),
    record("EX2L_KL", splits(0.6, 0.35)),
    record("EX2L_NCC", splits(0.6, 0.3)),
    record("EX2L_NCC", splits(0.2, 0.3), dataset="Cats"),
]
TEXT = """
-------- Screening, model selection: (AA + WGA) / 2 on validation
Percent; mean ± sample sd (ddof 1) over 2 seeds; (n=...) where fewer; X: none. \
Rows with unfinished runs are counted as they are.
Protocol: one draw of the hparams, trial_seed 0, 1 (fixed or refit).
Train: in-splits of the training environments; Val: the splits that validate; each pooled over environments.
*: the best of its column; +: the second best.
Algorithm                   Sampling       ColoredDigits Train WGA  ColoredDigits Val WGA  Cats Train WGA  Cats Val WGA
EX2L_MAE                    Random         10.0 (n=1)               20.0 (n=1)             X               X
EX2L_MAE                    Uniform Group  35.0 ± 7.1               50.0 ± 14.1 +          X               X
EX2L_MAE map_gradient=none  Uniform Group  50.0 (n=1)               70.0 (n=1) *           X               X
EX2L_KL                     Random         60.0 (n=1)               40.0 (n=1)             X               X
EX2L_KL                     Uniform Group  60.0 (n=1)               35.0 (n=1)             X               X
EX2L_Cosine                 Uniform Group  60.0 (n=1)               45.0 (n=1)             X               X
EX2L_NCC                    Uniform Group  60.0 (n=1)               30.0 (n=1)             20.0 (n=1)      30.0 (n=1) *
ColoredDigits: best algorithms by Val WGA: EX2L_MAE (Uniform Group) 50.0, EX2L_Cosine (Uniform Group) 45.0, \
EX2L_KL (Random) 40.0
Cats: best algorithms by Val WGA: EX2L_NCC (Uniform Group) 30.0
"""


class TestScreeningTable:
    def test_text_by_hand(self, monkeypatch):
        order = ["EX2L_MAE", "EX2L_KL", "EX2L_Cosine", "EX2L_NCC"]
        known = registry.names
        monkeypatch.setattr(registry, "names", lambda package: order if package == "algorithms" else known(package))
        assert screening_text(RECORDS).split("\n") == TEXT.split("\n")

    def test_official_validation_environments_validate_and_are_not_trained_on(self, monkeypatch):
        facts = {"ENVIRONMENTS": ("a", "b", "validation", "test"), "VALIDATION_ENVS": (2,), "TEST_ENVS": (3,)}
        monkeypatch.setattr(
            registry, "attribute", lambda _, name, attribute, default=None: facts.get(attribute, default)
        )
        wga = {"env0_in": 0.2, "env1_in": 0.4, "env2_in": 0.1, "env3_in": 0.7}
        lines = screening_text([record("ERM", wga, "Ours", test_envs=(3,))]).split("\n")
        assert lines[7].split()[-3:] == ["30.0", "10.0", "*"]

    def test_without_validation_groups_there_is_no_val_wga_and_no_finalist(self):
        hidden = record("ERM", splits(0.25, 0.75), validation_budget=0.0) | {"env0_out_n": 10, "env1_out_n": 10}
        hidden = {key: n for key, n in hidden.items() if not re.match(r"env\d_out_(g\d|wga)", key)}
        text = screening_text([hidden, record("GroupDRO", splits(0.5, 0.5))])
        assert re.search(r"ERM val_budget=0.0 +Uniform Env. +25.0 +X$", text, re.M)
        assert text.endswith("ColoredDigits: best algorithms by Val WGA: GroupDRO (Uniform Env.) 50.0\n")
        assert "best algorithms" not in screening_text([hidden])

    def test_every_tie_is_marked(self):
        ties = [record(name, splits(0.5, 0.25)) for name in ("ERM", "GroupDRO")]
        text = screening_text([*ties, record("IRM", splits(0.5, 0.2))])
        marked = {line.split()[0] for line in text.split("\n") if line.endswith("*")}
        assert marked == {"ERM", "GroupDRO"}

    def test_runs_without_the_training_images_are_an_error(self):
        lacking = record("ERM", {"env0_out": 0.5, "env1_out": 0.5}, partition="random")
        with pytest.raises(ValueError, match="sweep again with --eval_splits all, the default:") as error:
            screening_text([record("ERM", splits(0.5, 0.5)), lacking])
        assert str(error.value).split("\n")[1:] == ["  ERM (Random) on ColoredDigits"]

    def test_records_without_groups_are_an_error(self):
        with pytest.raises(ValueError, match="no record has groups; sweep datasets with confounders"):
            screening_text([{"args": RECORDS[0]["args"], "step": 0, "env0_in_acc": 1.0}])

import re

import numpy as np
import pytest
from scipy import stats

from domainbed import control_tables, paired
from domainbed.table_formats import render

OFF = '{"map_gradient": "none"}'


def control_text(records):
    return render(control_tables.control_tables(records), "text")


def comparison_text(*args):
    return render(control_tables.comparison_tables(*args), "text")


def record(algorithm="EX2L_MAE", dataset="DigitsM2M", step=0, test=(0.5, 0.5), **args):
    aa, wga = test
    seeds = {"trial_seed": 0, "hparams_seed": 0, "seed": 0}
    values = {}
    for split, (a, w) in {"env1_in": (aa, wga), "env0_out": (0.5, 0.5)}.items():
        values |= {f"{split}_acc": a, f"{split}_wga": w}
        values |= {f"{split}_g0_acc": w, f"{split}_g1_acc": 2 * a - w, f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], **seeds, **args}
    return {"args": run, "step": step, **values}


def rows(ours, controls, **args):
    """Records of a method and its control, one seed for each WGA; AA is .1 above."""
    records = [record(seed=seed, test=(wga + 0.1, wga), **args) for seed, wga in enumerate(ours)]
    return records + [
        record(seed=seed, test=(wga + 0.1, wga), **args | {"hparams": OFF}) for seed, wga in enumerate(controls)
    ]


def tables(text):
    """(title, notes, lines as dicts by header) of each table."""
    found = []
    for part in text.strip("\n").split("\n\n"):
        lines = part.split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith("Dataset  "))
        header, *body = (re.split(r"  +", line) for line in lines[start:])
        found.append((lines[0], lines[1:start], [dict(zip(header, line, strict=True)) for line in body]))
    return found


FOUR = rows([0.5, 0.6, 0.7, 0.8], [0.4, 0.4, 0.5, 0.5])  # differences .1 .2 .2 .3: mean .2, se sqrt(.02 / 3) / 2
BY_HAND = [
    "",
    "-------- Method minus control, in pairs; model selection: (AA + WGA) / 2 on validation",
    control_tables.NUMBERS_NOTE,
    control_tables.TESTS_NOTE,
    "Protocol: one draw of the hparams, seed 0, 1, 2, 3 (fixed or refit).",
    control_tables.CONTROL_NOTE,
    "Dataset    Method    Control                     n"
    "  AA    control AA  AA difference        AA p   WGA   control WGA  WGA difference       WGA p  Holm   WGA is",
    "DigitsM2M  EX2L_MAE  EX2L_MAE map_gradient=none  4"
    "  75.0  55.0        +20.0 [+7.0, +33.0]  0.016  65.0  45.0         +20.0 [+7.0, +33.0]  0.016  0.016  better",
]


class TestControlTables:
    def test_text_by_hand(self):
        mean, error = 0.2, np.sqrt(0.02 / 3) / 2
        assert stats.t.interval(0.95, 3, mean, error) == pytest.approx((0.07, 0.33), abs=5e-4)
        assert 2 * stats.t.sf(mean / error, 3) == pytest.approx(0.016, abs=5e-4)
        assert control_text(FOUR).split("\n\n")[0].split("\n") == BY_HAND

    def test_four_views(self):
        titles = [title.partition("; ")[2] for title, _, _ in tables(control_text(FOUR))]
        criteria = ["model selection: (AA + WGA) / 2 on validation", "model selection: WGA on validation"]
        oracle = "ORACLE: selected by (AA + WGA) / 2 on the test environments themselves"
        assert titles == [*criteria, "last step, nothing selected", oracle]

    def test_nothing_without_a_control_without_pairs_and_without_groups(self):
        plain = {"args": FOUR[0]["args"], "step": 0, "env1_in_acc": 0.5}
        for records in (FOUR[:4], [record(seed=1), record(seed=2, hparams=OFF)], [plain], []):
            assert control_tables.control_tables(records) == []

    def test_lines_are_corrected_together_and_ordered_by_dataset(self):
        rng = np.random.default_rng(0)
        gains = {"DigitsM2M": 0.05, "DigitsO2O": -0.2, "ColoredDigits": 0.01}
        samples = {name: gain + rng.normal(0, 0.03, size=7) for name, gain in gains.items()}
        records = [r for name, gain in samples.items() for r in rows(0.5 + gain, [0.5] * 7, dataset=name)]
        _, _, lines = tables(control_text(records))[0]
        raw = {name: stats.ttest_1samp(gain, 0).pvalue for name, gain in samples.items()}
        order = [line["Dataset"] for line in lines]
        assert order == ["ColoredDigits", "DigitsO2O", "DigitsM2M"]
        expected = dict(zip(order, paired.holm([raw[name] for name in order]), strict=True))
        words = {"DigitsO2O": "worse", "DigitsM2M": "better", "ColoredDigits": "no significant difference"}
        assert expected["ColoredDigits"] >= 0.05 > expected["DigitsM2M"]
        for line in lines:
            name = line["Dataset"]
            assert line["WGA is"] == words[name]
            assert line["WGA p"] in (f"{raw[name]:.3f}", "<0.001")
            assert line["Holm"] in (f"{expected[name]:.3f}", "<0.001")
            assert line["WGA signed ranks"] == f"{stats.wilcoxon(samples[name], method='exact').pvalue:.3f}"

    def test_missing_partners_are_counted(self):
        records = [r for r in FOUR if (r["args"]["seed"], "hparams" in r["args"]) not in {(1, True), (3, False)}]
        _, notes, (line,) = tables(control_text(records))[0]
        assert (line["n"], line["WGA difference"][:5]) == ("2 (2 unpaired)", "+15.0")
        assert line["WGA is"] == "too few seeds"
        assert notes[-1] == control_tables.UNPAIRED_NOTE

    def test_a_row_without_any_pair_stands_beside_those_that_have_some(self):
        alone = [record(seed=seed, dataset="DigitsO2O", **args) for seed, args in enumerate([{}, {"hparams": OFF}])]
        _, _, (line, _) = tables(control_text(FOUR + alone))[0]
        assert (line["Dataset"], line["n"], line["WGA difference"]) == ("DigitsO2O", "0 (2 unpaired)", "X")
        assert line["WGA is"] == "too few seeds"

    def test_a_single_pair(self):
        _, _, (line,) = tables(control_text(rows([0.6], [0.4])))[0]
        assert (line["n"], line["WGA difference"], line["WGA is"]) == ("1", "+20.0", "too few seeds")
        assert not {"WGA p", "WGA signed ranks", "Holm"} & line.keys()

    @pytest.mark.parametrize(
        ("gain", "word", "cell"),
        [(0, "equal in all pairs", "+0.0"), (-0.125, "the same difference in all pairs", "-12.5")],
    )
    def test_no_variance(self, gain, word, cell):
        controls = [0.25, 0.5, 0.625, 0.75, 0.5, 0.375]
        text = control_text(rows([wga + gain for wga in controls], controls))
        _, _, (line,) = tables(text)[0]
        assert (line["WGA difference"], line["WGA is"]) == (cell, word)
        assert "nan" not in text.lower()

    def test_lines_without_variance_count_in_the_correction(self):
        records = rows([0.5] * 3, [0.5] * 3, dataset="DigitsO2O") + FOUR
        _, _, (equal, line) = tables(control_text(records))[0]
        assert (equal["Holm"], equal["WGA is"]) == ("X", "equal in all pairs")
        assert (line["WGA p"], line["Holm"]) == ("0.016", "0.033")

    def test_lines_with_too_few_pairs_do_not_count_in_the_correction(self):
        records = rows([0.5, 0.7], [0.4, 0.5], dataset="DigitsO2O") + FOUR
        _, _, (few, line) = tables(control_text(records))[0]
        assert (few["n"], few["WGA p"], few["Holm"], few["WGA is"]) == ("2", "0.205", "X", "too few seeds")
        assert (line["WGA p"], line["Holm"]) == ("0.016", "0.016")

    def test_labels_name_the_lines(self):
        records = [record(seed=seed, label="on") for seed in (0, 1)]
        records += [record(seed=seed, label="off", hparams=OFF) for seed in (0, 1)]
        records += [record(seed=0, label="other", hparams='{"lambda_2": 1}'), record("ERM", label="baseline")]
        _, _, (line,) = tables(control_text(records))[0]
        assert (line["Method"], line["Control"]) == ("on", "off")

    def test_what_pairs_do_not_share_is_said(self):
        search = [
            record(hparams_seed=draw, seed=draw + 5, hparams=hparams, step=step, test=(0.5, 0.5))
            | {"env0_out_wga": 0.5, "env0_out_g0_acc": 0.9 if draw == best else 0.1}
            for hparams, best, step in (("", 0, 100), (OFF, 1, 200))
            for draw in (0, 1)
        ]
        (_, notes, _), *others = tables(control_text(search))
        assert "1 of 1 pairs have different draws of the hparams, as validation chose for each row." in notes
        assert not any("last step" in title for title, _, _ in others)
        uneven = [record(step=100), record(step=90, hparams=OFF)]
        assert "1 of 1 pairs end at different steps." in tables(control_text(uneven))[2][1]

    def test_the_numbers_behind_a_line(self):
        table = control_tables.control_tables(FOUR)[0]
        line = dict(zip(table.header, table.rows[0], strict=True))
        found = line["WGA difference"].values
        assert (found["mean"], found["n"]) == (pytest.approx(0.2), 4)
        assert (found["low"], found["high"]) == pytest.approx((0.07, 0.33), abs=5e-4)
        gains = np.array([0.1, 0.2, 0.2, 0.3])
        assert gains.min() <= found["bootstrap_low"] < 0.2 < found["bootstrap_high"] <= gains.max()
        assert line["WGA p"].values["value"] == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
        assert line["n"].values == {"value": 4, "unpaired": 0}


class TestComparisonTables:
    def test_two_algorithms(self):
        place = {"algorithm": "ERM", "partition": "group"}
        erm = [record(**place, seed=100 + s, trial_seed=s, test=(0.5, w)) for s, w in enumerate([0.3, 0.5])]
        ours = [record(seed=s, trial_seed=s, test=(0.75, w)) for s, w in enumerate([0.4, 0.7])]
        text = comparison_text(erm + ours, "EX2L_MAE", "ERM:group")
        title, notes, (line,) = tables(text)[0]
        assert title.startswith("-------- EX2L_MAE minus ERM:group; model selection: (AA + WGA) / 2")
        assert (line["n"], line["other WGA"], line["WGA difference"].split()[0]) == ("2", "40.0", "+15.0")
        assert "2 of 2 pairs have different seeds." in notes
        assert any(note.startswith("Across algorithms pairs share splits and draws only") for note in notes)

    def test_two_rows_of_one_algorithm_need_no_such_warning(self):
        text = comparison_text(FOUR, "EX2L_MAE map_gradient=none", "EX2L_MAE")
        assert "Across algorithms" not in text
        assert tables(text)[0][2][0]["WGA is"] == "worse"

    def test_an_unknown_row_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="row not found: EX2L_MEA; did you mean 'EX2L_MAE'") as error:
            control_tables.comparison_tables(FOUR, "EX2L_MEA", "EX2L_MAE")
        assert str(error.value).endswith("known: 'EX2L_MAE', 'EX2L_MAE map_gradient=none'")

    def test_rows_without_a_pair_are_an_error(self):
        records = [record(), record("ERM", dataset="DigitsO2O")]
        for second in ("ERM", "EX2L_MAE"):
            with pytest.raises(ValueError, match=f"EX2L_MAE and {second} have no pair"):
                control_tables.comparison_tables(records, "EX2L_MAE", second)


class TestComparisonsTables:
    def test_every_other_row_minus_one_corrected_together(self):
        rng = np.random.default_rng(0)
        gains = {"EX2L_MAE": 0.1 + rng.normal(0, 0.03, 6), "GroupDRO": [0.05, -0.04, 0.02, -0.03, 0.01, -0.02]}
        records = [record("ERM", seed=seed, trial_seed=seed, test=(0.9, 0.5)) for seed in range(6)]
        records += [
            record(name, seed=seed, trial_seed=seed, test=(0.9, 0.5 + gain))
            for name, some in gains.items()
            for seed, gain in enumerate(some)
        ]
        title, _, lines = tables(render(control_tables.comparisons_tables(records, "ERM"), "text"))[0]
        raw = {name: stats.ttest_1samp(some, 0).pvalue for name, some in gains.items()}
        corrected = dict(zip(raw, paired.holm(list(raw.values())), strict=True))
        assert title.startswith("-------- Every other row minus ERM; model selection: ")
        assert [(line["Row"], line["Other"], line["n"]) for line in lines] == [
            ("GroupDRO", "ERM", "6"),
            ("EX2L_MAE", "ERM", "6"),
        ]
        words = {"GroupDRO": "no significant difference", "EX2L_MAE": "better"}
        for line in lines:
            assert line["WGA is"] == words[line["Row"]]
            assert line["Holm"] in (f"{corrected[line['Row']]:.3f}", "<0.001")

    def test_what_can_not_be_compared_is_an_error(self):
        with pytest.raises(ValueError, match="row not found: IRM"):
            control_tables.comparisons_tables(FOUR, "IRM")
        with pytest.raises(ValueError, match="no row has a pair with EX2L_MAE"):
            control_tables.comparisons_tables(FOUR[:4], "EX2L_MAE")

import logging

import numpy as np
import pytest

from domainbed import explanation_tables
from domainbed.explanation_tables import header, in_order, run_table
from domainbed.table_formats import render

SETTINGS = {"model": "model_best.pkl", "step": 5, "method": "grad_cam", "n": 40, "seed": 0, "fills": ["blur"]}


def tables(records, lines):
    return render(explanation_tables.explanation_tables(records, lines), "text")


def run(seed=0, test_envs=(0,), algorithm="ERM", **args):
    seeds = {"trial_seed": 0, "hparams_seed": 0, "seed": seed}
    return {"algorithm": algorithm, "dataset": "DigitsO2O", "test_envs": list(test_envs), **seeds, **args}


def record(args, aa=0.5, wga=0.25, step=5, val=0.5):
    """Groups 0 and 1, of 10 and 30 images in each test environment."""
    values = {}
    for split, (a, w) in {**{f"env{e}_in": (aa, wga) for e in args["test_envs"]}, "env2_out": (val, val)}.items():
        values |= {f"{split}_acc": a, f"{split}_wga": w, f"{split}_g0_n": 10, f"{split}_g1_n": 30}
        values |= {f"{split}_g0_acc": w, f"{split}_g1_acc": (4 * a - w) / 3}
    return {"args": args, "step": step, **values}


def line(args, groups, **settings):
    """Metrics of group 0 and 1 in each test environment: name -> two numbers."""
    values = {}
    for e in args["test_envs"]:
        values |= {f"env{e}_in_explained": 40, f"env{e}_in_images": 40}
        for g, n in enumerate((10, 30)):
            values |= {f"env{e}_in_g{g}_{name}": numbers[g] for name, numbers in groups.items()}
            values |= {f"env{e}_in_g{g}_explained": 20, f"env{e}_in_g{g}_images": n}
        values |= {f"env{e}_in_{name}": (a + 3 * b) / 4 for name, (a, b) in groups.items()}
    return {"args": args, "explained": SETTINGS | settings, **values}


SUFF, COMP, AREA = "sufficiency_blur_lower", "comprehensiveness_blur_higher", "learned_mask_area"
NUMBERS = {AREA: (0.2, 0.4), COMP: (0.3, 0.1), SUFF: (0.5, 0.1)}


def lines_of(text):
    """(title, header, body) of each table, cells apart."""
    found = []
    for part in text.strip("\n").split("\n\n"):
        rows = part.split("\n")
        start = next(i for i, row in enumerate(rows) if row.startswith("Algorithm"))
        cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows[start:]]
        found.append((rows[0], cells[0], cells[1:]))
    return found


def test_both_tables_by_hand():
    one, two = run(0), run(1)
    records = [record(one, 0.5, 0.25), record(two, 0.75, 0.5), record(one, 0.9, 0.9, step=0)]
    second = {SUFF: (0.1, 0.3), COMP: (0.1, 0.1), AREA: (0.2, 0.4)}
    (title, head, (row,)), (worst_title, worst_head, (worst,)) = lines_of(
        tables(records, [line(one, NUMBERS), line(two, second)])
    )
    assert title == "-------- DigitsO2O: explanations by grad_cam, 40 images (seed 0), model_best.pkl"
    assert worst_title == f"{title}: worst group"
    assert head == ["Algorithm", "Sampling", "AA", "WGA", "suff blur (lower)", "comp blur (higher)", "own mask area"]
    # suff .2 and .25, comp .15 and .1, area .35 twice
    assert row == [
        "ERM",
        "Uniform Env.",
        "62.5 ± 17.7",
        "37.5 ± 17.7",
        "0.225 ± 0.035",
        "0.125 ± 0.035",
        "0.350 ± 0.000",
    ]
    # the larger sufficiency, .5 and .3, the smaller comprehensiveness, .1 twice; the area has no worst group
    assert worst_head == head[:-1]
    assert worst[4:] == ["0.400 ± 0.141", "0.100 ± 0.000"]


def test_a_single_run_and_one_that_lacks_a_metric():
    other = run(algorithm="EX2L_MAE", partition="group")
    text = tables([record(run()), record(other)], [line(run(), {SUFF: (0.5, 0.1)}), line(other, NUMBERS)])
    _, _, (erm, ex2l) = lines_of(text)[0]
    assert erm == ["ERM", "Uniform Env.", "50.0", "25.0", "0.200", "X", "X"]
    assert ex2l == ["EX2L_MAE", "Uniform Group", "50.0", "25.0", "0.200", "0.150", "0.350"]


def test_several_test_environments_are_pooled_by_their_images():
    args = run(test_envs=(0, 1))
    both = line(args, NUMBERS)
    both |= {f"env1_in_{SUFF}": 0.6, "env1_in_images": 120, "env1_in_g0_images": 90}
    both |= {f"env1_in_g0_{SUFF}": 0.7, f"env1_in_g1_{SUFF}": 0.3}
    (title, head, (row,)), (_, _, (worst,)) = lines_of(tables([record(args)], [both]))
    place = head.index("suff blur (lower)")
    assert title.startswith("-------- DigitsO2O: ")
    assert row[place] == f"{(40 * 0.2 + 120 * 0.6) / 160:.3f}"
    assert worst[place] == f"{(10 * 0.5 + 90 * 0.7) / 100:.3f}"


def test_ways_of_explaining_have_tables_of_their_own():
    args = run()
    ways = [{"method": "layer_cam"}, {"seed": 1}, {"model": "model.pkl", "step": 9}, {"n": 99}]
    records = [record(args), record(args, step=9)]
    titles = [title for title, _, _ in lines_of(tables(records, [line(args, {SUFF: (0, 0)}, **way) for way in ways]))]
    assert len(set(titles)) == 2 * len(ways)
    assert "-------- DigitsO2O: explanations by grad_cam, 40 images (seed 0), model.pkl" in titles


def test_among_competing_draws_validation_chooses():
    draws = [run(seed=5 + draw, hparams_seed=draw) for draw in (0, 1)]
    records = [
        record(args, aa=aa, wga=0.1, val=val) for args, aa, val in zip(draws, (0.9, 0.3), (0.4, 0.8), strict=True)
    ]
    text = tables(records, [line(args, {SUFF: (v, v)}) for args, v in zip(draws, (0.1, 0.2), strict=True)])
    ((_, _, (row,)), _) = lines_of(text)
    assert row[2:] == ["30.0", "10.0", "0.200"]


def test_without_groups():
    args = run()
    plain = {"args": args, "step": 5, "env0_in_acc": 0.5, "env1_out_acc": 0.5}
    numbers = {
        "args": args,
        "explained": SETTINGS,
        "env0_in_explained": 40,
        "env0_in_images": 40,
        f"env0_in_{SUFF}": 0.3,
    }
    ((_, _, (row,)),) = lines_of(tables([plain], [numbers]))
    assert row[2:] == ["50.0", "X", "0.300"]


def test_what_can_not_be_shown_is_counted(caplog):
    kept, elsewhere = run(0), run(1)
    other_split = {"args": run(2), "explained": SETTINGS, "env1_out_explained": 4, "env1_out_images": 4}
    records = [record(kept), record(elsewhere), record(run(2))]
    lines = [line(kept, NUMBERS), line(elsewhere, NUMBERS, step=77), other_split]
    with caplog.at_level(logging.WARNING):
        text = tables(records, lines)
    assert "2 of 3 explanations" in caplog.text
    assert text == tables(records[:1], lines[:1])


def test_nothing_without_explanations():
    assert explanation_tables.explanation_tables([record(run())], []) == []


def test_headers_and_order():
    assert header("soft_comprehensiveness_mean_higher") == "soft comp mean (higher)"
    assert header("learned_mask_iou_higher") == "own mask IoU (higher)"
    assert header("mask_iou_higher") == "map IoU (higher)"
    assert header("of_my_own_lower") == "of_my_own (lower)"
    given = ["dead_maps_lower", "mine", "sufficiency_mean_lower", "deletion_auc_blur_lower", SUFF, SUFF]
    assert in_order(given) == [SUFF, given[3], given[2], "dead_maps_lower", "mine"]


def test_every_metric_has_a_short_header():
    from domainbed.explanation_metrics import METRICS, name

    headers = [header(name(metric, "blur")) for metric in METRICS]
    assert len(set(headers)) == len(METRICS)
    assert explanation_tables.SHORT.keys() == {*METRICS, AREA}


def test_the_table_of_one_run():
    text = run_table(line(run(), NUMBERS))
    assert text.split("\n") == [
        "",
        "-------- Explanations by grad_cam (model_best.pkl, step 5), seed 0",
        "env0 in: 40 images.",
        "Metric              env0 in  env0 in worst group",
        "suff blur (lower)   0.200    0.500",
        "comp blur (higher)  0.150    0.100",
        "own mask area       0.350    X",
        "",
    ]
    assert "(last model, step 5)" in run_table(line(run(), NUMBERS, model=""))


def test_no_minus_zero():
    assert "-0.000" not in run_table(line(run(), {SUFF: (-1e-5, -1e-5)}))


def test_sd_is_the_samples():
    values = [0.1, 0.4, 0.2]
    runs = [run(seed) for seed in range(3)]
    text = tables(map(record, runs), [line(args, {SUFF: (v, v)}) for args, v in zip(runs, values, strict=True)])
    assert f"± {np.std(values, ddof=1):.3f}" in text
    assert "mean ± sample sd (ddof 1) over 3 seeds" in text


@pytest.mark.parametrize("module", ["torch", "scipy", "matplotlib"])
def test_reads_files_only(module):
    import subprocess
    import sys

    code = f"import sys; from domainbed import explanation_tables; print({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

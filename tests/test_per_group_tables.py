import pytest

from domainbed.group_tables import group_name
from domainbed.per_group_tables import per_group_tables
from domainbed.table_formats import render


def record(algorithm="ERM", dataset="DigitsM2M", step=0, test=(0.5, 0.5), val=(0.5, 0.5), values=(), **args):
    """AA and WGA on test and validation in two equal groups, 0 and 1."""
    metrics = {}
    for split, (aa, wga) in {"env1_in": test, "env0_out": val}.items():
        metrics |= {f"{split}_acc": aa, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g1_acc": 2 * aa - wga}
        metrics |= {f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    return {"args": run | args, "step": step, **metrics, **dict(values)}


def test_text_by_hand():
    records = [record(test=(0.5, 0.25)), record(trial_seed=1, test=(0.75, 0.5)), record("IRM", test=(0.5, 0.5))]
    records.append(record(step=1, test=(1, 1), val=(0.25, 0.25)))  # never best on validation
    title, _, protocol, images, *rows = render(per_group_tables(records), "text").strip("\n").split("\n")
    assert title == "-------- DigitsM2M: accuracy of each group, model selection: (AA + WGA) / 2 on validation"
    assert protocol.startswith("Protocol: ")
    assert images.startswith("Test images: of each group")
    assert [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows] == [
        ["Algorithm", "Sampling", "g0: 0, brick", "g1: 0, grass", "WGA"],
        ["ERM", "Uniform Env.", "37.5 ± 17.7", "87.5 ± 17.7", "37.5 ± 17.7"],
        ["IRM", "Uniform Env.", "50.0 (n=1)", "50.0 (n=1)", "50.0 (n=1)"],
        ["Test images", "4", "4", "X"],
    ]


def test_several_test_environments_are_pooled_by_counts():
    both = record("ERM", "Cats", test_envs=[1, 2], values={"env2_in_g0_acc": 1.0, "env2_in_g0_n": 12})
    (table,) = per_group_tables([both])
    assert table.header[2:] == ["g0", "g1", "WGA"]
    first, images = table.rows
    assert first[2].values["mean"] == pytest.approx((0.5 * 4 + 1.0 * 12) / 16)
    assert (images[2].text, images[2].values) == ("16", {"images": 16, "most images": 16})


def test_trials_of_different_splits_show_a_range():
    records = [record(), record(trial_seed=1, values={"env1_in_g0_n": 6})]
    (table,) = per_group_tables(records)
    assert [cell.text for cell in table.rows[-1][2:4]] == ["4 to 6", "4"]


def test_a_group_that_one_trial_lacks():
    one = record(trial_seed=1)
    lacking = {key: value for key, value in one.items() if not key.startswith("env1_in_g1_")}
    (table,) = per_group_tables([record(), lacking])
    assert (table.rows[0][2].values["n"], table.rows[0][3].values["n"]) == (2, 1)


def test_nothing_where_groups_are_not_written_one_by_one():
    many = {"env1_in_acc": 0.5, "env1_in_wga": 0.5, "env0_out_acc": 0.5, "env0_out_wga": 0.5}
    assert per_group_tables([{"args": record()["args"], "step": 0, **many}]) == per_group_tables([]) == []


def test_names_of_groups():
    assert group_name({"dataset": "DigitsM2M"}, 5) == "g5: 1, grass"
    assert group_name({"dataset": "DigitsM2M"}, 16) == "g16"
    assert group_name({"dataset": "Cats"}, 5) == "g5"
    assert group_name({"dataset": "DigitsM2M", "confounders": ["mine"]}, 5) == "g5"

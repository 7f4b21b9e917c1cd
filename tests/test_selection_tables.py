from domainbed.selection_tables import selection_tables


def record(algorithm="ERM", dataset="DigitsM2M", step=0, test=(0.5, 0.5), val=(0.5, 0.5), values=(), **args):
    """AA and WGA on test and validation in two equal groups, 0 and 1."""
    metrics = {}
    for split, (aa, wga) in {"env1_in": test, "env0_out": val}.items():
        metrics |= {f"{split}_acc": aa, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g1_acc": 2 * aa - wga}
        metrics |= {f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    return {"args": run | args, "step": step, **metrics, **dict(values)}


def lines(table):
    """(AA, WGA, draw, step) by the way of choosing."""
    return {row[2]: tuple(getattr(cell, "text", cell) for cell in row[3:]) for row in table.rows}


# Draw 0: step 0 is best by accuracy, step 10 by both scores of groups. Draw 1: its last step is best of the last ones,
# and its step 0 is best on test.
RECORDS = [
    record(step=0, val=(0.9, 0.1), test=(0.1, 0.0)),
    record(step=10, val=(0.8, 0.7), test=(0.2, 0.1)),
    record(step=20, val=(0.3, 0.1), test=(0.3, 0.2)),
    record(step=0, hparams_seed=1, val=(0.4, 0.3), test=(0.9, 0.8)),
    record(step=30, hparams_seed=1, val=(0.4, 0.4), test=(0.5, 0.4)),
]


def test_each_way_by_hand():
    (table,) = selection_tables(RECORDS)
    assert table.header == ["Algorithm", "Sampling", "Chosen by", "AA", "WGA", "Draw", "Step"]
    assert lines(table) == {
        "accuracy on validation": ("10.0", "0.0", "0", "0"),
        "(AA + WGA) / 2 on validation": ("20.0", "10.0", "0", "10"),
        "WGA on validation": ("20.0", "10.0", "0", "10"),
        "last step": ("50.0", "40.0", "1", "30"),
        "ORACLE": ("90.0", "80.0", "1", "0"),
    }
    assert any(note.startswith("ORACLE: by (AA + WGA) / 2 on the test environments themselves") for note in table.notes)
    assert "Protocol: the best of 2 draws of the hparams per trial (search)." in table.notes


def test_trials_that_disagree_have_no_common_draw_or_step():
    (table,) = selection_tables([*RECORDS, record(step=7, trial_seed=1, val=(0.9, 0.9))])
    found = lines(table)
    assert found["ORACLE"][2:] == ("X", "X")
    assert found["WGA on validation"] == ("35.0 ± 21.2", "30.0 ± 28.3", "0", "X")


def test_a_table_for_each_dataset_and_none_without_groups():
    plain = {"args": record("ERM", "VLCS")["args"], "step": 0, "env1_in_acc": 0.5, "env0_out_acc": 0.5}
    tables = selection_tables([*RECORDS, record("IRM", "Cats"), plain])
    assert [table.title.partition(":")[0] for table in tables] == ["DigitsM2M", "Cats"]
    assert selection_tables([plain]) == []

import json

import pytest

from domainbed.efficiency_tables import Cost, check_reference, cost, efficiency_tables
from domainbed.run_index import collect


def record(algorithm="ERM", dataset="DigitsM2M", step=0, test=(0.5, 0.5), val=(0.5, 0.5), values=(), **args):
    """AA and WGA on test and validation in two equal groups, 0 and 1."""
    metrics = {}
    for split, (aa, wga) in {"env1_in": test, "env0_out": val}.items():
        metrics |= {f"{split}_acc": aa, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g1_acc": 2 * aa - wga}
        metrics |= {f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    return {"args": run | args, "step": step, **metrics, **dict(values)}


def run(seconds, wga, algorithm="ERM", mem_gb=0.0, **args):
    """Five updates make an epoch; the first update takes a second."""
    rest = {"step_time": seconds, "epoch": 2.0, "mem_gb": mem_gb}
    return [
        record(algorithm, step=0, values={"step_time": 1.0, "epoch": 0.0, "mem_gb": 0.0}, val=(0, 0), **args),
        record(algorithm, step=10, values=rest, test=(0.5, wga), **args),
        record(algorithm, step=20, values=rest | {"epoch": 4.0}, test=(0.5, wga), **args),
    ]


RECORDS = [
    *run(0.1, 0.2, partition="random"),
    *run(0.3, 0.2, partition="random", trial_seed=1),
    *run(0.6, 0.1, partition="group"),
    *run(0.4, 0.4, "IRM", mem_gb=2.5),
]


def texts(table):
    return [[getattr(cell, "text", cell) for cell in row] for row in table.rows]


def test_by_hand():
    (table,) = efficiency_tables(RECORDS, "ERM")
    assert table.header[2:] == ["s/epoch", "time ratio", "WGA", "WGA ratio", "Memory (GB)"]
    assert texts(table) == [
        ["ERM", "Random", "1.00 ± 0.71", "1.00", "20.0 ± 0.0", "1.00", "X"],
        ["ERM", "Uniform Group", "3.00 (n=1)", "3.00", "10.0 (n=1)", "0.50", "X"],
        ["IRM", "Uniform Env.", "2.00 (n=1)", "2.00", "40.0 (n=1)", "2.00", "2.50 (n=1)"],
    ]
    assert "Ratios of the means to ERM:random, trained on the same data." in table.notes


def test_a_row_by_its_full_name():
    (table,) = efficiency_tables(RECORDS, "ERM:group")
    assert [row[3] for row in texts(table)] == ["0.33", "1.00", "0.67"]


def test_without_the_reference():
    (table,) = efficiency_tables(RECORDS, "MMD")
    assert {row[3] for row in texts(table)} == {row[5] for row in texts(table)} == {"X"}
    assert "No ratios: the row to compare with, MMD, was not trained on these data." in table.notes
    assert not any("atios" in note for note in efficiency_tables(RECORDS)[0].notes)


def test_a_worst_group_at_zero_gives_no_ratio():
    (table,) = efficiency_tables([*run(0.1, 0.0), *run(0.2, 0.4, "IRM")], "ERM")
    assert [row[5] for row in texts(table)] == ["X", "X"]


def test_an_unknown_reference_is_an_error():
    check_reference(RECORDS, "ERM")
    check_reference(RECORDS, "ERM:group")
    with pytest.raises(ValueError, match="row not found: MMD; known: 'ERM:group', 'ERM:random', 'IRM', 'ERM'"):
        check_reference(RECORDS, "MMD")


def test_cost_of_a_run():
    assert cost(run(0.2, 0.5, mem_gb=3.0)) == pytest.approx((1.0, 3.0))
    assert cost(run(0.2, 0.5)[1:2]) == pytest.approx((1.0, None))
    assert cost(run(0.2, 0.5)[:1]) == cost([record(step=10)]) == (None, None)


def test_the_collector_s_timings_are_those_of_all_records(tmp_path):
    for number, some in enumerate((RECORDS[:3], RECORDS[3:6], RECORDS[6:9], RECORDS[9:])):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    found = collect(tmp_path)
    (table,) = efficiency_tables(found.grouped, "ERM", found.timings)
    assert texts(table) == texts(efficiency_tables(RECORDS, "ERM")[0])


@pytest.mark.parametrize("lines", [run(0.1, 0.2)[::-1], [*run(0.7, 0.2), record(step=30, values={"step_time": 0.2})]])
def test_lines_out_of_order_and_without_an_epoch_tell_the_same_in_both_ways(lines, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (timing,) = collect(tmp_path).timings.values()
    assert Cost.of(timing) == cost(lines)
    later = [one["step_time"] for one in lines if one["step"]]
    assert cost(lines).epoch_s == pytest.approx(5 * sum(later) / len(later))


def test_nothing_without_groups():
    assert efficiency_tables([{"args": record()["args"], "step": 0, "env1_in_acc": 0.5}], "ERM") == []

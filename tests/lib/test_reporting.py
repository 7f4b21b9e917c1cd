import json
import logging

from domainbed.lib import reporting
from domainbed.lib.query import Q


def line(test_envs, algorithm="ERM", trial_seed=0, step=0):
    args = {"trial_seed": trial_seed, "dataset": "D", "algorithm": algorithm, "test_envs": test_envs}
    return {"args": args, "step": step}


def test_loads_every_job_directly_below_and_skips_torn_lines(tmp_path, caplog):
    whole = json.dumps(line([0], step=1))
    for name, text in {
        "b": f"{whole}\n" + json.dumps(line([1], step=2)),  # no newline at the end
        "a": f"{whole}\n{whole[:-7]}",  # torn by a kill
        "a/deeper": whole,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "results.txt").write_text("a table")

    with caplog.at_level(logging.WARNING):
        records = reporting.load_records(str(tmp_path))

    assert isinstance(records, Q)
    assert records.select("step") == [1, 1, 2]
    (warning,) = caplog.records
    assert "skipped 1 line" in warning.getMessage()


def test_a_record_with_two_test_environments_is_in_the_group_of_each():
    single, pair, other, later = line([1]), line([0, 1]), line([0], algorithm="DANN"), line([0], trial_seed=1)
    groups = reporting.get_grouped_records(Q([later, pair, single, other]))

    keys = groups.select("trial_seed, dataset, algorithm, test_env")
    assert keys == [(0, "D", "DANN", 0), (0, "D", "ERM", 0), (0, "D", "ERM", 1), (1, "D", "ERM", 0)]
    assert groups.select("records") == [[other], [pair], [pair, single], [later]]
    assert all(isinstance(group["records"], Q) for group in groups)

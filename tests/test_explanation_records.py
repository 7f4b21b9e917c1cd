import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domainbed import explanation_records, records, run_directory
from domainbed.evaluation import ExplanationPlan, Explanations
from domainbed.explanation_records import EXPLANATIONS_FILE, Settings, direction, line
from domainbed.subsets import Subset

ARGS = {"algorithm": "ERM", "dataset": "DigitsO2O", "test_envs": [0]}
PLAN = ExplanationPlan(images=4)
SETTINGS = Settings.of(PLAN, "model.pkl", 300)
NOTHING = np.zeros(4, dtype=np.int64)


def measured(grouped: bool = True) -> Explanations:
    values = {"dead_maps_lower": np.array([0.0, 1.0, 1.0, 1.0]), "map_overlap_lower": np.array([np.nan] * 3 + [0.5])}
    groups, sizes = (np.array([0, 0, 3, 3]), {0: 6, 3: 2}) if grouped else (NOTHING, {0: 8})
    return Explanations(Subset(np.arange(4), groups, grouped, sizes), NOTHING, NOTHING, NOTHING, values)


def test_keys_by_hand() -> None:
    assert line(ARGS, SETTINGS, PLAN.fills, {(1, "in"): measured()}, num_groups=4) == {
        "args": ARGS,
        "explained": {
            "model": "model.pkl", "step": 300, "method": "grad_cam", "n": 4, "seed": 0, "mask_dir": "",
            "fills": ["blur"],
        },
        "env1_in_explained": 4, "env1_in_images": 8,
        "env1_in_dead_maps_lower": 0.375 + 0.25, "env1_in_map_overlap_lower": 0.5,
        "env1_in_g0_explained": 2, "env1_in_g0_images": 6, "env1_in_g0_dead_maps_lower": 0.5,
        "env1_in_g3_explained": 2, "env1_in_g3_images": 2, "env1_in_g3_dead_maps_lower": 1.0,
        "env1_in_g3_map_overlap_lower": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("grouped", "num_groups"), [(False, 4), (True, 65)])
def test_without_groups_and_with_too_many(grouped: bool, num_groups: int) -> None:
    found = line(ARGS, SETTINGS, PLAN.fills, {(1, "in"): measured(grouped)}, num_groups)
    assert not [key for key in found if "_g" in key]
    assert found["env1_in_images"] == 8
    assert explanation_records.group_metrics(found, 1, "in") == {}


def test_reading_back_what_was_written() -> None:
    found = line(ARGS, SETTINGS, PLAN.fills, {(11, "out"): measured(), (1, "in"): measured()}, 4)
    assert explanation_records.places(found) == [(1, "in"), (11, "out")]
    assert explanation_records.metrics(found, 1, "in") == measured().means()
    assert explanation_records.group_metrics(found, 11, "out") == measured().group_means()
    assert explanation_records.settings_of(found) == SETTINGS


def write(directory: Path, *lines: dict[str, Any]) -> None:
    for one in lines:
        records.append(directory / EXPLANATIONS_FILE, one)


def test_what_is_measured_again_replaces_and_what_is_added_adds(tmp_path: Path) -> None:
    first = line(ARGS, SETTINGS, ("blur",), {(0, "in"): measured()}, 4)
    again = {**first, "env0_in_dead_maps_lower": 0.25, "env0_in_sufficiency_zero_lower": 0.5}
    again["explained"] = first["explained"] | {"fills": ["zero"]}
    elsewhere = line(ARGS, SETTINGS, ("blur",), {(0, "out"): measured()}, 4)
    other = line(ARGS, Settings.of(ExplanationPlan(images=5), "model.pkl", 300), ("blur",), {(0, "in"): measured()}, 4)
    write(tmp_path, first, other, again, elsewhere)
    with open(tmp_path / EXPLANATIONS_FILE, "a") as file:
        file.write('{"torn')
    one, two = explanation_records.read(tmp_path)
    assert one == {**first, **again, **elsewhere, "explained": first["explained"] | {"fills": ["blur", "zero"]}}
    assert two == json.loads(records.dumps(other))


@pytest.mark.parametrize(
    "odd",
    [
        {"args": {}}, {"args": ARGS}, {"args": ARGS, "explained": []}, {"args": ARGS, "explained": {"fills": []}},
        {"args": ARGS, "explained": asdict(SETTINGS)}, {"args": {}, "explained": asdict(SETTINGS) | {"fills": []}},
        {"args": ARGS, "explained": asdict(SETTINGS) | {"fills": [], "later": 1}},
        {"args": ARGS, "explained": asdict(SETTINGS) | {"fills": [[]]}},
        {"args": ARGS, "explained": asdict(SETTINGS) | {"fills": [], "step": [1]}},
    ],
)  # fmt: skip
def test_odd_lines_are_skipped_with_a_warning(
    odd: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = line(ARGS, SETTINGS, ("blur",), {(0, "in"): measured()}, 4)
    write(tmp_path, odd, whole)
    assert explanation_records.read(tmp_path) == [json.loads(records.dumps(whole))]
    assert f"{tmp_path / EXPLANATIONS_FILE}: skipped 1 line(s) that hold no explanations" in caplog.text


def test_a_directory_of_that_name_holds_none(tmp_path: Path) -> None:
    (tmp_path / "a" / EXPLANATIONS_FILE).mkdir(parents=True)
    assert list(explanation_records.iterate(tmp_path)) == []


def test_a_run_without_explanations(tmp_path: Path) -> None:
    assert explanation_records.read(tmp_path) == []


def test_the_runs_of_a_sweep(tmp_path: Path) -> None:
    for job, algorithm in (("b", "IRM"), ("a", "ERM")):
        (tmp_path / job).mkdir()
        write(tmp_path / job, line(ARGS | {"algorithm": algorithm}, SETTINGS, ("blur",), {(0, "in"): measured()}, 4))
    assert [one["args"]["algorithm"] for one in explanation_records.iterate(tmp_path)] == ["ERM", "IRM"]


def test_readers_of_accuracies_are_not_confused() -> None:
    plain = {"args": ARGS, "step": 0, "env1_in_acc": 0.5, "env1_in_wga": 0.25, "env1_in_g0_acc": 0.5, "env1_in_g0_n": 2}
    both = plain | line(ARGS, SETTINGS, PLAN.fills, {(1, "in"): measured()}, 4)
    for read in (records.group_metrics, records.pooled_means, records.pooled):
        of = [(1, "in")] if read is not records.group_metrics else (1, "in")
        words = of if read is records.group_metrics else (of,)
        assert read(both, *words) == read(plain, *words)
    assert records.environments(both, "in") == [1]
    assert records.training_group_counts(both) == {}
    assert not any(map(records.is_group_key, both.keys() - plain.keys()))


def test_clearing_a_run_removes_them(tmp_path: Path) -> None:
    write(tmp_path, line(ARGS, SETTINGS, ("blur",), {(0, "in"): measured()}, 4))
    run_directory.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_directions() -> None:
    assert direction("sufficiency_blur_lower") == "lower"
    assert direction("mask_iou_higher") == "higher"
    assert direction("learned_mask_area") == ""

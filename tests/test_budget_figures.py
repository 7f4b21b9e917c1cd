import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from domainbed.budget_figures import budget
from domainbed.record_figures import Picture
from domainbed.scripts import BadInput, figure

pytest.importorskip("matplotlib")


def record(
    row: str, wga: float, budget: float = 1.0, selection: float | None = None, seed: int = 0, dataset: str = "Cats",
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """WGA on test (environment 0); both budgets are alike unless that of the selection is given."""
    args = {"algorithm": row, "dataset": dataset, "test_envs": [0], "trial_seed": seed, "hparams_seed": 0, "seed": seed}
    args |= {"annotation_budget": budget, "validation_budget": budget if selection is None else selection, **more}
    found: dict[str, Any] = {"args": args, "hparams": {}, "step": 0}
    for place in ("env0_in", "env1_out"):
        found |= {f"{place}_acc": (1 + wga) / 2, f"{place}_wga": wga, f"{place}_g0_acc": wga, f"{place}_g0_n": 4}
        found |= {f"{place}_g1_acc": 1.0, f"{place}_g1_n": 4}
    return found


# RWG at 0 and 100 % with two seeds, ERM at 0, 5 and 100 % with one; RWG on Dogs, by other hparams.
SWEEP = [
    *(record("RWG", wga, b, seed=s) for b, some in ((0, (0.1, 0.3)), (1, (0.6, 0.8))) for s, wga in enumerate(some)),
    *(record("ERM", wga, b) for b, wga in ((1, 0.4), (0, 0.2), (0.05, 0.3))),
    *(record("RWG", 0.5, b, dataset="Dogs", hparams='{"lr": 1}') for b in (0.05, 1)),
]


def panels(picture: Picture) -> dict[str, list[list[tuple[int, float]]]]:
    """The points (number of the budget, WGA in percent) of each line, by panel."""
    shown = [ax for ax in picture.figure.axes if ax.get_visible()]
    found = {}
    for ax in shown:
        lines = [container[0].get_xydata() for container in ax.containers]
        found[ax.get_title()] = [[(round(x), round(y, 6)) for x, y in line] for line in lines]
    assert len(found) == len(shown)
    return found


def ticks(picture: Picture) -> list[str]:
    return [label.get_text() for label in picture.figure.axes[0].get_xticklabels()]


def legend(picture: Picture) -> list[str]:
    (found,) = picture.figure.legends
    return [*found.get_title().get_text().split("\n"), *(text.get_text() for text in found.get_texts())]


def test_a_panel_for_each_row_with_a_line_for_each_dataset() -> None:
    picture = budget(SWEEP)
    assert panels(picture) == {
        "ERM": [[(0, 20), (1, 30), (2, 40)]],
        "RWG": [[(0, 20), (2, 70)], [(1, 50), (2, 50)]],
    }
    assert ticks(picture) == ["0", "5", "100"]
    assert legend(picture) == [
        "share (%) of training and validation images whose confounder is granted",
        "means over seeds with 95% t intervals", "Cats", "Dogs",
    ]  # fmt: skip
    assert "model selection: (AA + WGA) / 2 on validation" in picture.title


def test_intervals() -> None:
    _, rwg = (ax for ax in budget(SWEEP).figure.axes if ax.get_visible())
    segments = [segment[:, 1] for segment in rwg.containers[0][2][0].get_segments()]
    for found, values in zip(segments, ([10, 30], [60, 80]), strict=True):
        assert found == pytest.approx(stats.t.interval(0.95, 1, np.mean(values), stats.sem(values)))
    one_seed = [np.ptp(segment[:, 1]) for segment in rwg.containers[1][2][0].get_segments()]
    assert one_seed == [0, 0]


def test_in_words() -> None:
    assert budget(SWEEP).description == (
        "Mean worst-group accuracy (%) over seeds. "
        "Cats: ERM 20.0 at 0 %, 30.0 at 5 %, 40.0 at 100 %; RWG 20.0 at 0 %, 70.0 at 100 %. "
        "Dogs: RWG 50.0 at 5 %, 50.0 at 100 %."
    )


def test_one_seed_is_no_mean() -> None:
    picture = budget([r for r in SWEEP if r["args"]["trial_seed"] == 0])
    assert not re.search("interval|mean|over seeds", " ".join(legend(picture)) + picture.description, re.I)
    assert "one seed" in picture.description


@pytest.mark.parametrize(("axis", "shares"), [("training", ["0", "5", "100"]), ("validation", ["0", "20", "100"])])
def test_one_of_the_budgets_may_be_full(axis: str, shares: list[str]) -> None:
    """Ascending, the full budget last; rows and datasets that have no such run are not shown."""
    records = [record("RWG", 0.6, 1, 1)]
    records += [record("RWG", wga, b, 1) for wga, b in ((0.2, 0), (0.3, 0.05))]
    records += [record("RWG", wga, 1, b) for wga, b in ((0.4, 0), (0.5, 0.2))]
    records += [record("ERM", 0.1, 0.2, 0.2), record("RWG", 0.1, 0.2, 0.2, dataset="Dogs")]
    picture = budget(records, axis)
    lowest = {"training": 20, "validation": 40}[axis]
    assert ticks(picture) == shares
    assert panels(picture) == {"RWG": [[(0, lowest), (1, lowest + 10), (2, 60)]]}
    assert "Dogs" not in picture.description
    assert legend(picture)[2:] == ["Cats"]
    others = {"training": "validation", "validation": "training"}
    assert legend(picture)[0].startswith(f"share (%) of {axis} images; of {others[axis]} images all")


def test_less_than_two_budgets_can_t_be_drawn() -> None:
    for records, axis, n in ((SWEEP[2:4], "both", 1), ([], "both", 0), (SWEEP, "training", 1)):
        with pytest.raises(
            ValueError, match=f"--axis {axis} needs runs with two budgets or more, and there are {n}; give"
        ):
            budget(records, axis)


def test_rows_with_inferred_confounders_have_panels_whose_titles_are_wrapped() -> None:
    inferred = [record("RWG", 0.5, b, confounders=["inferred:george"]) for b in (0, 0.05)]
    found = panels(budget([*SWEEP, *inferred]))
    (title,) = (name for name in found if "george" in name)
    assert "\n" in title
    assert found[title] == [[(0, 50), (1, 50)]]


def test_partitions_and_labels_are_named() -> None:
    more = [record("RWG", 0.5, b, partition="random") for b in (0, 1)]
    more += [record("ERM", 0.5, b, label="mine") for b in (0, 1)]
    assert list(panels(budget([*SWEEP, *more]))) == ["ERM", "mine", "RWG", "RWG:random"]


def test_more_datasets_than_colours_and_rows_than_columns() -> None:
    rows, datasets = ["ERM", "IRM", "RWG", "RWY", "SUBG", "SUBY"], [f"Data{i}" for i in range(9)]
    picture = budget([record(row, 0.5, b, dataset=d) for row in rows for d in datasets for b in (0, 1)])
    assert {name: len(lines) for name, lines in panels(picture).items()} == dict.fromkeys(rows, 9)
    offsets = {round(c[0].get_xdata()[0], 6) for c in picture.figure.axes[0].containers}
    assert len(offsets) == 9
    assert sum(offsets) == pytest.approx(0)
    assert len(legend(picture)) == 2 + 9


def write(sweep: Path) -> None:
    for number, found in enumerate(SWEEP):
        directory = sweep / str(number)
        directory.mkdir(parents=True)
        (directory / "results.jsonl").write_text(json.dumps(found) + "\n")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path)
    assert figure.main(["budget", "--input_dir", str(tmp_path), "--datasets", "Cats"]) == 0
    file = tmp_path / "figures" / "budget.png"
    assert capsys.readouterr().out == f"Drew {file}\n"
    with Image.open(file) as image:
        said = "Cats: ERM 20.0 at 0 %, 30.0 at 5 %, 40.0 at 100 %; RWG 20.0 at 0 %, 70.0 at 100 %."
        assert image.info["Description"].endswith(said)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(BadInput, match="--axis validation needs runs with two budgets or more, and there are 1"):
        figure.main(["budget", "--input_dir", str(tmp_path), "--axis", "validation"])
    with pytest.raises(BadInput, match="dataset not found: Birds"):
        figure.main(["budget", "--input_dir", str(tmp_path), "--datasets", "Birds"])


def test_nothing_overlaps() -> None:
    """Title, panels, and what stands below them."""
    drawn = budget(SWEEP).figure
    drawn.draw_without_rendering()
    (below,) = drawn.legends
    (title,) = (text for text in drawn.texts if text.get_text() == drawn.get_suptitle())
    boxes = [ax.get_tightbbox() for ax in drawn.axes if ax.get_visible()]
    assert below.get_window_extent().y1 <= min(box.y0 for box in boxes)
    assert title.get_window_extent().y0 >= max(box.y1 for box in boxes)

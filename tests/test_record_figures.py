import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from domainbed import figures, rank_tables, record_figures
from domainbed.curve_figures import curves
from domainbed.ranks import Ranks
from domainbed.record_figures import cliques, ranks, scatter, select, style, time

pytest.importorskip("matplotlib")

Groups = tuple[float, float]


def record(
    row: str, test: Groups, validation: Groups = (0.5, 0.5), step: int = 0, seed: int = 0, dataset: str = "Cats",
    **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """Of two groups of equal size: accuracies on test (environment 0) and on validation (environment 1)."""
    args = {"algorithm": row, "dataset": dataset, "test_envs": [0], "trial_seed": seed, "hparams_seed": 0, "seed": seed}
    found = {"args": args, "step": step, "epoch": step / 2, "step_time": 0.5, **values}
    for place, accs in (("env0_in", test), ("env1_out", validation)):
        found |= {f"{place}_acc": sum(accs) / 2, f"{place}_wga": min(accs)}
        found |= {f"{place}_g{g}_acc": acc for g, acc in enumerate(accs)} | {f"{place}_g{g}_n": 4 for g in (0, 1)}
    return found


def run(row: str, tests: list[Groups], best: int, **place: Any) -> list[dict[str, Any]]:
    """Records at the steps 0, 10, ...; validation is best at that place of the list."""
    chances = [(0.9, 0.9) if i == best else (0.5, 0.5) for i in range(len(tests))]
    return [record(row, test, chances[i], 10 * i, **place) for i, test in enumerate(tests)]


# ERM: AA .5 .7 and WGA .2 .6 are chosen; IRM has one seed, chosen at its first step.
SWEEP = [
    *run("ERM", [(0.0, 1.0), (0.2, 0.8), (1.0, 1.0)], 1),
    *run("ERM", [(1.0, 0.0), (0.4, 0.6), (0.6, 0.8)], 2, seed=1),
    *run("IRM", [(0.3, 0.9), (0.1, 0.1)], 0),
    *run("ERM", [(0.5, 0.5), (0.5, 0.7)], 1, dataset="Dogs"),
]


def panel(picture: record_figures.Picture, title: str) -> Any:
    (found,) = (ax for ax in picture.figure.axes if ax.get_title().partition("\n")[0] == title)
    return found


def bars(ax: Any) -> list[list[tuple[float, float]]]:
    """The ends of the error bars, across then up, of each row that has some."""
    return [
        [tuple(line.get_segments()[0][:, axis]) for axis, line in enumerate(container[2])]
        for container in ax.containers
        if container[2]
    ]


def test_a_scatter_shows_seeds_means_and_intervals() -> None:
    picture = scatter(SWEEP)
    ax = panel(picture, "Cats")
    dots, mean, single, single_mean = (line for line in ax.lines if line.get_marker() not in ("|", "_", "None"))
    assert np.array_equal(dots.get_xydata(), [[50, 20], [70, 60]])
    assert np.array_equal(mean.get_xydata(), [[60, 40]])
    assert np.array_equal(single.get_xydata(), single_mean.get_xydata())
    expected = [stats.t.interval(0.95, 1, np.mean(v), stats.sem(v)) for v in ([50, 70], [20, 60])]
    assert bars(ax) == [[pytest.approx(interval) for interval in expected]]
    assert ax.get_xlim()[0] < 50
    assert 70 < ax.get_xlim()[1] <= 110
    assert "model selection: (AA + WGA) / 2 on validation" in picture.title
    assert "Cats: ERM average accuracy 60.0 %, worst-group accuracy 40.0 %; IRM" in picture.description
    assert panel(picture, "Dogs").lines[0].get_xydata().tolist() == [[60, 50]]


def test_the_criterion_is_named_and_chooses() -> None:
    records = [record("ERM", (0.1, 0.3), (0.5, 0.5)), record("ERM", (0.6, 0.8), (0.4, 1.0), 10)]
    assert select(records, "aa_wga").chosen[("Cats", (0,)), "ERM"][0].step == 10
    assert select(records, "wga").chosen[("Cats", (0,)), "ERM"][0].step == 0
    assert "model selection: WGA on validation" in scatter(records, "wga").title


def test_time_is_that_of_the_efficiency_table() -> None:
    ax = panel(time(SWEEP), "Cats")
    assert ax.get_xlabel().startswith("seconds per epoch")
    assert ax.lines[0].get_xydata().tolist() == [[1, 20], [1, 60]]  # half a second, two updates an epoch
    with pytest.raises(ValueError, match="step_time"):
        time([record("ERM", (0.5, 0.5))])


def test_without_groups_there_is_nothing_to_draw() -> None:
    plain = {"args": SWEEP[0]["args"], "step": 0, "env0_in_acc": 0.5, "env1_out_acc": 0.5}
    for draw in (scatter, time, curves):
        with pytest.raises(ValueError, match="no run holds groups"):
            draw([plain])


def test_neighbouring_rows_differ_in_colour_and_marker() -> None:
    styles = [style(i) for i in range(64)]
    assert len(set(styles)) == 64
    assert all(a != b for one, other in itertools.pairwise(styles) for a, b in zip(one, other, strict=True))


def lines(ax: Any) -> dict[str, list[list[float]]]:
    """Curves by what the legend says of their colour and width."""
    kinds = {(record_figures.WORST, 2.4): "worst", (figures.COLOURS[5], 0.9): "group", (figures.COLOURS[-1], 1.2): "AA"}
    found: dict[str, list[list[float]]] = {"worst": [], "group": [], "AA": [], "chosen": []}
    for line in ax.lines:
        kind = "chosen" if line.get_marker() == "v" else kinds[line.get_color(), line.get_linewidth()]
        found[kind].append(np.round(line.get_xydata(), 9).tolist())
    return found


def test_curves_by_hand() -> None:
    picture = curves(SWEEP)
    titles = [ax.get_title() for ax in picture.figure.axes if ax.get_visible()]
    assert titles == ["ERM\nworst: g0", "IRM\nworst: g0", "ERM\nworst: g0"]
    found = lines(picture.figure.axes[0])
    assert found["worst"] == [[[0, 0], [10, 30], [20, 80]]]
    assert found["AA"] == [[[0, 50], [10, 50], [20, 85]]]
    assert found["group"] == [[[0, 50], [10, 30], [20, 80]], [[0, 50], [10, 70], [20, 90]]]
    assert found["chosen"] == [[[10, 20]], [[20, 60]]]
    band = picture.figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in np.round(band)} == {(0, 0), (10, 20), (10, 40), (20, 60), (20, 100)}


def test_curves_of_each_run_and_of_other_environments() -> None:
    picture = curves(SWEEP[:3], each_run=True, envs=[1], split="out")
    assert "env 1 (out-split)" in picture.title
    assert lines(picture.figure.axes[0])["worst"] == [[[0, 50], [10, 90], [20, 50]]]
    with pytest.raises(ValueError, match="known are env0 in, env1 out"):
        curves(SWEEP, envs=[1])


def test_curves_pool_several_environments_by_counts() -> None:
    both = record("ERM", (0.5, 1.0))
    both |= {"env2_in_acc": 0.25, "env2_in_wga": 0.25, "env2_in_g1_acc": 0.25, "env2_in_g1_n": 12}
    found = lines(curves([both], envs=[0, 2]).figure.axes[0])
    assert found["group"] == [[[0, 50]], [[0, pytest.approx(100 * (4 + 3) / 16)]]]


@pytest.mark.parametrize(
    ("means", "difference", "expected"),
    [
        ([1, 2, 3, 4], 0.5, []),
        ([1, 2, 3, 4], 1, []),  # what differs by the difference is told apart
        ([1, 2, 3, 4], 1.5, [(0, 1), (1, 2), (2, 3)]),
        ([1.5, 1.5, 3, 4], 2, [(0, 2), (2, 3)]),
        ([1, 2, 3, 4], 9, [(0, 3)]),
    ],
)
def test_cliques(means: list[float], difference: float, expected: list[tuple[int, int]]) -> None:
    assert cliques(means, difference) == expected


def test_cliques_are_the_largest_sets_without_a_difference() -> None:
    """Against all intervals of rows, one by one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        means, difference = sorted(rng.uniform(1, 8, 8).round(1)), rng.uniform(0.3, 4)
        alike = [(i, j) for i in range(8) for j in range(i + 1, 8) if means[j] - means[i] < difference]
        largest = [a for a in alike if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in alike)]
        assert cliques(means, difference) == largest


def test_the_diagram_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ranks([2.5, 1.0, 2.6, 4.0], 0.01, 1.3, 12)
    monkeypatch.setattr(record_figures, "ranked", lambda _: (["A", "B", "C", "D"], found))
    picture = ranks([])
    ax = picture.figure.axes[0]
    assert [text.get_text().strip() for text in ax.texts if "(" in text.get_text()] == [
        "B (1.00)", "A (2.50)", "C (2.60)", "D (4.00)",
    ]  # fmt: skip
    joined = [line for line in ax.lines if line.get_linewidth() == 4]
    assert len(joined) == 1  # A and C
    assert joined[0].get_xdata()[0] < 2.5 < 2.6 < joined[0].get_xdata()[1] < 2.8
    assert picture.description.startswith("Average ranks over 12 datasets, 1 is best: B 1.00, A 2.50, C 2.60, D 4.00.")
    assert "Not told apart: A to C." in picture.description


def test_ranks_of_records_and_too_few_of_them() -> None:
    rows, datasets = {"ERM": 0.2, "IRM": 0.4, "VREx": 0.6}, [f"Data{i}" for i in range(6)]
    records = [record(name, (wga, 1.0), dataset=dataset) for name, wga in rows.items() for dataset in datasets]
    assert rank_tables.ranked(records)[1].mean == [3, 2, 1]
    assert "VREx 1.00, IRM 2.00, ERM 3.00" in ranks(records).description


def test_why_there_are_no_ranks() -> None:
    erm, irm = (
        [record(name, (wga, 1.0), dataset=d) for d in ("Cats", "Dogs")] for name, wga in (("ERM", 0.2), ("IRM", 0.4))
    )
    alike = [record("VREx", (0.2, 1.0), dataset=d) for d in ("Cats", "Dogs")]
    for records, message in (
        (erm, "two rows or more, and there is only ERM; train another, or draw `figure scatter`"),
        ([*erm, irm[0]], "there are 1 (rows ERM, IRM; datasets Cats, Dogs); train what is missing"),
        ([erm[0], irm[1]], "there are 0 (rows ERM, IRM; datasets Cats, Dogs)"),
        ([*erm, *alike], "the rows ERM, VREx are equal on each of 2 datasets; add datasets"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ranks(iter(records))
        assert scatter(records).description  # what is advised can be drawn
    with pytest.raises(ValueError, match=r"^no run holds groups"):
        ranks([])


def legend(picture: record_figures.Picture) -> str:
    (found,) = picture.figure.legends
    return "; ".join(text.get_text() for text in [found.get_title(), *found.get_texts()])


def test_one_seed_is_no_mean() -> None:
    single = [*SWEEP[:3], *SWEEP[6:]]
    for draw in (scatter, time, curves):
        one, several = draw(single), draw(SWEEP)
        assert not re.search("interval|mean|all seeds", legend(one) + one.description)
        assert re.search(r"95% t interval|\(mean; band: all seeds\)", legend(several))
    assert "one seed each, the best" in scatter(single).description
    assert "means over the seeds, the best" in scatter(SWEEP).description


def test_a_dataset_without_times_is_named_as_such() -> None:
    picture = time([*SWEEP, record("ERM", (0.5, 0.5), dataset="Birds")])
    assert "Birds:" not in picture.description
    assert picture.description.endswith("Not drawn, for want of numbers: ERM on Birds.")
    assert len(picture.figure.axes) == 2


def test_titles_of_curves_keep_to_their_panels() -> None:
    names = ["a name of a row that is too long for its panel", "another one of the same kind"]
    picture = curves([{**r, "args": {**r["args"], "label": n}} for n in names for r in SWEEP[:3]])
    for ax, name in zip(picture.figure.axes, names, strict=True):
        assert max(map(len, ax.get_title().split("\n"))) <= 30
        assert name in ax.get_title().replace("\n", " ")


def test_curves_are_told_in_the_order_of_the_panels() -> None:
    picture = curves(SWEEP[::-1])
    told = re.findall(r"(\w+ on (?:Cats|Dogs)) from", picture.description)
    assert told == ["ERM on Cats", "IRM on Cats", "ERM on Dogs"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_hold_title_and_description(tmp_path: Path, suffix: str) -> None:
    picture = scatter(SWEEP)
    file = tmp_path / f"new/figure.{suffix}"
    figures.save(picture.figure, file, picture.title, picture.description)
    content = file.read_bytes()
    if suffix == "png":
        from PIL import Image

        with Image.open(file) as image:
            assert image.info["Description"] == picture.description
    elif suffix == "svg":
        assert picture.title.encode() in content
    assert len(content) > 5000

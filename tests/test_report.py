import importlib.util
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from domainbed import model_selection, records, rows, run_index
from domainbed.report import curves, data, datasets, figures, payload, tables
from domainbed.report.page import page
from domainbed.table_formats import Cell, Table

NASTY = "<script>alert('1')</script>\"&"
VOID = {"meta", "link", "input", "img", "br"}


@pytest.fixture(scope="module")
def sweeps() -> ModuleType:
    path = Path(__file__).with_name("report_sweeps.py")
    spec = importlib.util.spec_from_file_location("report_sweeps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Checked(HTMLParser):
    """Every element is closed in order; collects ids, links, JSON and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.json: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.attributes += [(tag, key, value) for key, value in found.items()]
        self.ids += [found["id"]] if "id" in found else []
        self._script = found.get("id") if tag == "script" and "json" in found.get("type", "") else None
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.json[self._script] = self.json.get(self._script, "") + data
        elif self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def made(sweep: Path) -> str:
    return page(data.look(str(sweep), "aa_wga"), run_index.collect(sweep), "aa_wga", "the command")


@pytest.fixture(scope="module")
def sweep(sweeps: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A done, a failed, a preempted, a queued run; names, errors and logs that would break a careless page."""
    place = tmp_path_factory.mktemp("sweep")
    sweeps.add_run(place, sweeps.arguments("ERM", 0, label=NASTY))
    sweeps.add_run(place, sweeps.arguments("ERM", 1, label=NASTY), seed=1)
    failed = sweeps.add_run(place, sweeps.arguments("ERM", 2), state="failed", error=f"no memory {NASTY}")
    (failed / "err.txt").write_text(f"line\n{NASTY}\n")
    with (failed / "results.jsonl").open("a") as file:
        file.write('{"args": {"algorithm"')
    sweeps.add_run(place, sweeps.arguments("ERM", 3), state="preempted", seed=3)
    sweeps.add_run(place, sweeps.arguments("ERM", 4), state="queued")
    return place


@pytest.fixture(scope="module")
def parsed(sweep: Path) -> Checked:
    return Checked(made(sweep))


def test_the_page_is_well_formed_and_its_links_lead_somewhere(parsed: Checked) -> None:
    assert len(parsed.ids) == len(set(parsed.ids))
    runs = {f"run/{run['name']}" for run in json.loads(parsed.json["index"])["runs"]}
    targets = {value[1:] for _, key, value in parsed.attributes if key == "href" and value.startswith("#")}
    assert {"summary", "tables", "figures", "runs", "datasets", "commands", "main"} <= targets
    assert targets <= {*parsed.ids, *runs}
    named = {value for _, key, value in parsed.attributes if key in ("for", "aria-labelledby", "data-table")}
    assert named - {"run-title"} <= set(parsed.ids)  # the script makes that headline


def test_nothing_is_loaded_from_anywhere(sweep: Path, parsed: Checked) -> None:
    loads = [value for _, key, value in parsed.attributes if key in ("src", "srcset", "href", "action", "data")]
    assert [value for value in loads if not value.startswith(("#", "data:"))] == []
    text = made(sweep)
    style, script = re.search(r"<style>(.*?)</style>", text, re.S)[1], text[text.rindex("<script>") :]
    assert not re.search(r"@import|url\(|@font-face", style)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|sendBeacon|WebSocket|innerHTML", script)
    assert "default-src 'none'" in text


def test_what_runs_are_called_and_write_is_never_markup(sweep: Path, parsed: Checked) -> None:
    text = made(sweep)
    assert "<script>alert" not in text
    assert NASTY in parsed.text  # as the tables show it
    pages = [json.loads(content) for key, content in parsed.json.items() if key != "index"]
    assert any(NASTY in run.get("err", []) for run in pages)
    assert text.count("</script>") == len(parsed.json) + 1


def test_states_errors_records_and_skipped_lines_are_told(sweep: Path, parsed: Checked) -> None:
    for state, n in {"queued": 1, "running": 0, "preempted": 1, "failed": 1, "done": 2}.items():
        assert re.search(rf"{n} \S {state}", " ".join(parsed.text.split()))
    assert f"no memory {NASTY}" in parsed.text
    assert "12 records in 4 runs; 1 lines that hold no record were skipped" in parsed.text
    assert "2 jobs are not done: numbers may change." in parsed.text
    assert "torch" in parsed.text
    assert "2.9.0 (4 runs)" in parsed.text


def test_a_runs_page_has_its_command_settings_and_log(sweep: Path, parsed: Checked) -> None:
    lines = json.loads(parsed.json["index"])["runs"]
    assert [line["state"] for line in lines] == ["done", "done", "failed", "preempted", "queued"]
    done, queued = json.loads(parsed.json["run-0"]), json.loads(parsed.json["run-4"])
    assert f"--output_dir {sweep}/{lines[0]['name']} " in done["command"]
    assert "--seed 0 --test_envs 2 --trial_seed 0" in done["command"]
    assert done["hparams"] == {"lr": "0.001", "batch_size": "32", "backbone": "small_cnn"}
    assert len(done["out"]) == 8  # five lines of head and three checkpoints
    assert "steps" not in queued
    assert queued["command"].startswith("python -m domainbed.scripts.train --algorithm ERM ")


def test_the_oracle_is_marked_in_titles_and_with_its_note(parsed: Checked) -> None:
    assert "test-domain validation set (oracle) oracle" in parsed.text
    assert tables.ORACLE_NOTE in parsed.text


def test_a_tables_marks_and_numbers_are_there_for_all() -> None:
    cells = [Cell("80.1 ± 1", {"mean": 0.801}, "best"), Cell("7.5", {"mean": 0.075}, "second"), Cell("X")]
    table = Table("T", ["a < b"], ["Name", "AA", "WGA", "N"], [["<me>", *cells]], ["after"])
    html = tables.table_html(table, "t")
    assert '<td data-v="0.801"><strong class="best">80.1 ± 1</strong><span class="sr"> (best)</span></td>' in html
    assert '<em class="second">7.5</em><span class="sr"> (second best)</span>' in html
    assert '<th scope="row">&lt;me&gt;</th>' in html
    assert "a &lt; b" in html
    assert Checked(html).text.endswith("X (none)a < bafter")


@pytest.mark.parametrize("criterion", ["aa_wga", "wga"])
def test_the_chosen_step_and_its_numbers_are_those_of_model_selection(sweeps: ModuleType, criterion: str) -> None:
    args, rng = sweeps.arguments("ERM", 0), random.Random(5)
    found = [sweeps.record(args, step, rng) for step in (0, 10, 20, 30, 40)]
    [choice] = model_selection.choose(found, criterion)
    made = curves.curves(found[::-1], criterion)
    assert made is not None
    assert made.steps[made.chosen] == choice.step
    assert made.series["AA test"][made.chosen] == round(choice.test.aa, 4)
    assert made.series["WGA validation"][made.chosen] == round(choice.validation.wga, 4)
    counts = {"training": 250, "validation": 50, "test": 25}
    assert made.counts == {part: dict.fromkeys(range(4), n) for part, n in counts.items()}
    assert made.groups[2][0] == round(found[0]["env2_in_g2_acc"], 4)
    pooled = (choice.record["env0_out_g1_acc"] + choice.record["env1_out_g1_acc"]) / 2
    assert made.validation[1] == pytest.approx(pooled, abs=1e-4)


def test_the_first_checkpoint_may_be_the_chosen_one(sweeps: ModuleType, tmp_path: Path) -> None:
    sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0), records=1)
    assert json.loads(Checked(made(tmp_path)).json["run-0"])["chosen"] == 0


def test_without_groups_the_mean_accuracy_chooses_and_nan_never_wins() -> None:
    args = {"algorithm": "ERM", "dataset": "Unheard", "test_envs": [0]}
    found = [
        {"args": args, "step": i, "env0_in_acc": 0.1 * i, "env1_out_acc": acc, "env2_out_acc": 0.5}
        for i, acc in enumerate([0.2, 0.9, float("nan"), 0.9])
    ]
    made = curves.curves(found, "wga")
    assert made is not None
    assert made.chosen == 1
    assert made.series == {"AA test": [0, 0.1, 0.2, 0.3], "AA validation": [0.35, 0.7, None, 0.7]}
    assert made.groups == {}
    assert curves.curves([], "wga") is None


def test_json_in_the_page_holds_no_markup_and_no_nan() -> None:
    text = payload.script({"a": "</script><!--", "b": None}, "k")
    assert json.loads(Checked(text).json["k"]) == {"a": "</script><!--", "b": None}
    assert text.count("<") == 2
    assert [curves.rounded(value) for value in (float("nan"), float("inf"), 0.123456)] == [None, None, 0.1235]


def test_figures_are_embedded_with_what_they_say(tmp_path: Path) -> None:
    assert figures.figures_html(str(tmp_path)) == ""
    folder, info = tmp_path / "figures", PngInfo()
    folder.mkdir()
    info.add_text("Title", "A < B")
    info.add_text("Description", 'two "dots"')
    Image.new("RGB", (4, 3)).save(folder / "a.png", pnginfo=info)
    Image.new("RGB", (4, 3)).save(folder / "plain.png")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:20])
    html = figures.figures_html(str(tmp_path))
    assert 'alt="two &quot;dots&quot;"' in html
    assert "<strong>A &lt; B.</strong>" in html
    assert html.count("data:image/png;base64,") == 2
    assert "torn.png is left out" in html


def test_a_card_has_the_docstring_and_counts_of_groups(sweeps: ModuleType, tmp_path: Path) -> None:
    sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0, dataset="Debug28"))
    [card] = datasets.dataset_cards(data.look(str(tmp_path), "aa_wga").runs)
    assert card.runs == 1
    assert card.text == datasets.docstring("Debug28")
    [table] = card.tables
    header = ["Group", "training images", "2: 2, in-split", "0: 0, out-split", "1: 1, out-split", "2: 2, out-split"]
    assert table.header == header
    assert [row[0] for row in table.rows] == [f"g{g}: y={g // 2}, {'odd' if g % 2 else 'even'}" for g in range(4)]
    assert table.rows[0][1] == Cell("250 (25.0 %)", {"value": 250})
    assert "not part of this package" in datasets.docstring("Unheard")


def test_a_sweep_without_records_or_with_foreign_ones_has_a_page(sweeps: ModuleType, tmp_path: Path) -> None:
    sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0), state="queued")
    (tmp_path / "jobs.jsonl").write_text((tmp_path / "jobs.jsonl").read_text() + "torn")
    parsed = Checked(made(tmp_path))
    assert "No records yet" in parsed.text
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / records.RESULTS_FILE).write_text('{"args": {"lr": 1}, "step": 0}\n[]\n')
    lines = json.loads(Checked(made(tmp_path)).json["index"])["runs"]
    assert [(line["name"] == "theirs", line["dataset"]) for line in lines] == [(False, "Debug28"), (True, "?")]


def test_runs_without_groups_or_numbers_have_all_that_their_pages_read(sweeps: ModuleType, tmp_path: Path) -> None:
    sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0), groups=False)
    file = sweeps.add_run(tmp_path, sweeps.arguments("ERM", 1), groups=False) / records.RESULTS_FILE
    file.write_text(re.sub(r'(_acc": )[\d.]+', r"\1NaN", file.read_text()))
    plain, nan = (payload.run_page(run, "s") for run in data.look(str(tmp_path), "aa_wga").runs)
    assert (plain["steps"], plain["groups"], plain["table"]) == ([0, 100, 200], [], [])
    assert set(plain["series"]) == {"AA test", "AA validation"}
    assert (nan["steps"], nan["series"], nan["chosen"]) == ([0, 100, 200], {}, None)
    assert "err" not in plain


@pytest.mark.parametrize("foreign", ['{"args": {"lr": 1}, "step": 300}', '{"args": {"algorithm": "ERM"}}', "[]"])
def test_a_foreign_line_at_the_end_hides_no_run(sweeps: ModuleType, tmp_path: Path, foreign: str) -> None:
    place = sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0))
    with (place / records.RESULTS_FILE).open("a") as file:
        file.write(f"{foreign}\n")
    found = data.look(str(tmp_path), "aa_wga")
    [run] = found.runs
    assert (found.total, found.skipped) == (3, {place.name: 1})
    assert run.curves is not None
    assert run.curves.steps == [0, 100, 200]


def test_a_listed_job_whose_arguments_are_of_no_run_has_a_page(sweeps: ModuleType, tmp_path: Path) -> None:
    sweeps.add_run(tmp_path, sweeps.arguments("ERM", 0))
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"name": "odd", "args": {"algorithm": "ERM", "dataset": "Debug28", "test_envs": null}}\n')
    lines = json.loads(Checked(made(tmp_path)).json["index"])["runs"]
    assert [(line["dataset"], line["row"]) for line in lines] == [("Debug28", "ERM"), ("?", "?")]


def test_steps_that_are_no_integers_are_drawn(sweeps: ModuleType) -> None:
    found = [sweeps.record(sweeps.arguments("ERM", 0), step, random.Random(0)) for step in (20.0, 10.5)]
    drawn = curves.curves(found, "aa_wga")
    assert drawn is not None
    assert drawn.steps == [10.5, 20.0]


def test_points_of_the_scatter_lead_to_their_runs(sweep: Path) -> None:
    found = data.look(str(sweep), "aa_wga")
    [plot] = payload.scatter(found, run_index.collect(sweep).records, "aa_wga")
    names = {point[3]: row for row, points in plot["rows"].items() for point in points}
    assert names == {run.name: run.row for run in found.runs if run.curves is not None}


def test_long_and_missing_logs_are_told_by_their_end(tmp_path: Path) -> None:
    assert data.tail(tmp_path / "none.txt") == []
    (tmp_path / "out.txt").write_bytes(b"\xff" * 20_000 + b"\n" + b"".join(b"%d\n" % i for i in range(100)))
    assert data.tail(tmp_path / "out.txt") == [str(i) for i in range(80, 100)]
    (tmp_path / "wide.txt").write_text("x" * 300)
    assert data.tail(tmp_path / "wide.txt") == ["x" * 160 + " …"]


def test_row_names_are_those_of_the_tables(sweep: Path) -> None:
    found = data.look(str(sweep), "aa_wga").runs
    expected = rows.row_names(rows.meeting(rows.Run.of(run.args) for run in found).values())
    assert [run.row for run in found] == [expected[rows.Row.of(run.args)] for run in found]

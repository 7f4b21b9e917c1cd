"""Drives the report in a headless Chromium; ``make test-report``."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from domainbed.scripts import report

pytestmark = pytest.mark.browser

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    const part = channels(color).slice(0, 3).map((v) => linear(v / 255));
    return .2126 * part[0] + .7152 * part[1] + .0722 * part[2];
  };
  const behind = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return (channels(color)[3] ?? 1) > 0 || !e.parentElement ? color : behind(e.parentElement);
  };
  const texts = "p, td, th, a, button, h1, h2, h3, li, dt, dd, caption, pre, .badge, .note";
  const visible = (e) => e.offsetParent && !e.disabled && e.textContent.trim();
  const shown = [...document.querySelectorAll(texts)].filter(visible);
  return Math.min(...shown.map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  }));
}"""


def sweeps() -> ModuleType:
    path = Path(__file__).parent.with_name("report_sweeps.py")
    spec = importlib.util.spec_from_file_location("report_sweeps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_sweep(sweep: Path, runs: int) -> None:
    sweeps().make(sweep, runs, 4)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep of 120 runs with one figure."""
    sweep = tmp_path_factory.mktemp("sweep")
    write_sweep(sweep, 120)
    (sweep / "figures").mkdir()
    Image.new("RGB", (900, 300), "navy").save(sweep / "figures" / "wide.png")
    report.main(["--input_dir", str(sweep)])
    return sweep / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "these tests need a Chromium: install the system's package chromium"
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGS)
        yield started
        started.close()


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and a list that fills with errors, and with requests that leave the page."""
    page, wrong = browser.new_context(**{"viewport": DESKTOP, **options}).new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    allowed = (path.as_uri(), "data:")
    page.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
    page.goto(path.as_uri())
    return page, wrong


def column(page: Any, table: str, number: int) -> list[str]:
    rows = page.locator(f"{table} tbody tr:visible")
    return rows.evaluate_all(f"rows => rows.map((row) => row.cells[{number}].textContent)")


def test_tables_sort_by_click_and_by_keyboard(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    head = page.locator("#t-groups-0 thead th").nth(2)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    values = [float(text.split()[0]) for text in column(page, "#t-groups-0", 2)]
    assert values == sorted(values, reverse=True)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text.split()[0]) for text in column(page, "#t-groups-0", 2)] == sorted(values)
    page.locator("#t-groups-0 thead th").nth(0).locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert wrong == []


def test_rows_filter_by_their_text_and_the_count_is_told(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    rows = page.locator("#t-groups-0 tbody tr").count()
    page.fill("#t-groups-0-filter", "MINE")
    assert column(page, "#t-groups-0", 0) == ["mine"]
    assert page.locator("#t-groups-0 .count").text_content() == f"1 of {rows} rows"
    page.fill("#t-groups-0-filter", "")
    assert page.locator("#t-groups-0 tbody tr:visible").count() == rows
    assert wrong == []


def test_the_list_of_runs_filters_sorts_and_turns_pages(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    assert page.locator("#run-table tbody tr").count() == 50
    page.click("[data-go='1']")
    assert page.text_content("#run-page-number") == "Page 2 of 3"
    page.select_option("select[data-key=state]", "failed")
    assert page.text_content("#run-count") == "2 of 120 jobs"
    assert {text.split()[-1] for text in column(page, "#run-table", 1)} == {"failed"}
    page.select_option("select[data-key=state]", "")
    page.select_option("select[data-key=row]", "mine")
    assert page.text_content("#run-count") == "24 of 120 jobs"
    page.click("#run-table .sort[data-key=wga]")
    values = [float(text) for text in column(page, "#run-table", 11)]
    assert values == sorted(values, reverse=True)
    assert wrong == []


def test_a_run_has_a_page_with_curves_their_numbers_and_its_command(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    link = page.locator("#run-table tbody a").nth(1)
    name = link.get_attribute("href").removeprefix("#run/")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#run:visible")
    assert not page.locator("#overview").is_visible()
    assert page.evaluate("document.activeElement.id") == "run-title"
    assert f"/{name} " in page.text_content("#run")
    lines = page.locator("#run .chart").first.locator("path[d^=M]:visible")
    before = lines.count()
    page.locator("#run .chart input").first.uncheck()
    assert lines.count() == before - 1
    page.click("#run summary")
    position = page.evaluate("name => index.runs.findIndex((run) => run.name === name)", name)
    stored = json.loads(page.text_content(f"#run-{position}"))
    table = page.locator("#run details table tbody tr")
    assert table.count() == len(stored["steps"])
    assert table.first.locator("td").first.text_content() == f"{100 * stored['series']['AA test'][0]:.1f}"
    page.click("#run a[href='#runs']")
    assert page.locator("#overview").is_visible()
    page.goto(f"{page_file.as_uri()}#run/{name}")  # an address that somebody sent
    assert page.locator("#run").is_visible()
    assert wrong == []


def test_points_of_the_scatter_speak_and_lead_to_runs_by_keyboard(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    page.locator("#scatter .point[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    said = page.text_content("#scatter .says")
    assert said == page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run:visible")
    assert wrong == []


def test_the_skip_link_comes_first(browser: Any, page_file: Path) -> None:
    page, wrong = opened(browser, page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_has_no_sideways_scroll_and_text_has_contrast(
    browser: Any, page_file: Path, scheme: str
) -> None:
    page, wrong = opened(browser, page_file, viewport=PHONE, color_scheme=scheme)
    wide = "document.documentElement.scrollWidth"
    page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    assert page.evaluate(wide) == PHONE["width"]
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    page.locator("#run-table tbody a").first.click()
    page.wait_for_selector("#run:visible")
    assert page.evaluate(wide) == PHONE["width"]
    assert page.evaluate(CONTRAST) >= 4.5
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    assert wrong == []


def test_without_javascript_tables_are_there_and_no_dead_control(browser: Any, page_file: Path) -> None:
    page, _ = opened(browser, page_file, java_script_enabled=False)
    assert page.locator("#t-groups-0 tbody tr").first.is_visible()
    assert not page.locator("#theme").is_visible()


def test_two_thousand_runs_load(browser: Any, tmp_path: Path) -> None:
    write_sweep(tmp_path, 2000)
    report.main(["--input_dir", str(tmp_path)])
    page, wrong = opened(browser, tmp_path / "report.html")
    assert page.text_content("#run-count") == "2000 of 2000 jobs"
    usable = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
    print("milliseconds until it can be used:", page.evaluate(usable))
    assert (tmp_path / "report.html").stat().st_size < 15e6
    assert wrong == []


@pytest.fixture
def plain_runs(tmp_path: Path) -> list[str]:
    """Addresses of a sweep's runs without groups: of three records, of one, of two whose accuracies are all NaN."""
    made = sweeps()
    places = [made.add_run(tmp_path, made.arguments("ERM", i), n, groups=False) for i, n in enumerate((3, 1, 2))]
    file = places[-1] / "results.jsonl"
    file.write_text(re.sub(r'(_acc": )[\d.]+', r"\1NaN", file.read_text()))
    report.main(["--input_dir", str(tmp_path)])
    return [f"{(tmp_path / 'report.html').as_uri()}#run/{place.name}" for place in places]


def test_runs_without_groups_have_pages_also_where_no_accuracy_is_a_number(
    browser: Any, plain_runs: list[str], tmp_path: Path
) -> None:
    page, wrong = opened(browser, tmp_path / "report.html")
    for address, lines, taken in zip(plain_runs, (2, 2, 0), (True, True, False), strict=True):
        page.goto(address)
        page.wait_for_selector(f"#run:visible p:has-text('{address.split('/')[-1]}')")
        assert page.locator("#run .chart").count() == 1
        assert page.locator("#run .chart path title").count() == lines
        assert ("No checkpoint can be judged" not in page.text_content("#run")) == taken
        assert "python -m domainbed.scripts.train" in page.text_content("#run")
    assert wrong == []


def test_a_single_record_is_drawn_as_a_dot_over_whole_steps(
    browser: Any, plain_runs: list[str], tmp_path: Path
) -> None:
    page, wrong = opened(browser, tmp_path / "report.html")
    page.goto(plain_runs[1])
    page.wait_for_selector("#run .chart")
    assert page.locator("#run .chart g text[text-anchor=middle]").all_text_contents() == ["0", "1", "step", "percent"]
    chart = page.locator("#run .chart > svg")
    page.eval_on_selector_all("#run .chart > svg > *", "all => all.forEach((e) => { e.style.visibility = 'hidden'; })")
    empty = chart.screenshot()
    page.eval_on_selector("#run .chart path", "path => { path.style.visibility = 'visible'; }")
    assert chart.screenshot() != empty
    assert wrong == []


def test_the_skip_link_stays_on_the_page_of_a_run(browser: Any, plain_runs: list[str], tmp_path: Path) -> None:
    page, wrong = opened(browser, tmp_path / "report.html")
    page.goto(plain_runs[0])
    page.wait_for_selector("#run:visible")
    page.evaluate("addEventListener('hashchange', () => { document.title = 'routed'; })")  # after the page's own
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.title === 'routed'")
    assert page.evaluate("location.hash") == "#main"
    assert page.locator("#run").is_visible()
    assert not page.locator("#overview").is_visible()
    assert wrong == []

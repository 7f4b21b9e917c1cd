"""The example notebook runs as it stands, shortened, and is stored with all that it shows."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'domainbed-ex2l[dev]'")
pytest.importorskip("nbclient", reason="pip install 'domainbed-ex2l[dev]'")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", EXAMPLES / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def notebook(render: ModuleType) -> Any:
    return nbformat.read(render.NOTEBOOK, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[str]:
    """What a cell shows: "stream", "text/html", "image/png" ..."""
    rich = {kind for output in cell.outputs for kind in output.get("data", {})}
    return rich | {output.output_type for output in cell.outputs if output.output_type in ("stream", "error")}


def test_it_runs_and_shows_what_is_stored(
    render: ModuleType, notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = [kinds(cell) for cell in code(notebook)]
    parameters, trainings = code(notebook)[:2]
    assert parameters.source == "steps = 300"
    parameters.source = "steps = 2"
    trainings.source, changed = re.subn('("checkpoint_freq": )60', r"\g<1>1", trainings.source)
    assert changed == 1
    render.execute(notebook, tmp_path)
    render.clean(notebook)
    assert [kinds(cell) for cell in code(notebook)] == stored
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["erm", "ex2l"]


def test_it_is_stored_with_its_outputs_and_without_traces(notebook: Any, render: ModuleType) -> None:
    first, *others = code(notebook)
    assert kinds(first) == set()
    for cell in others:
        assert kinds(cell)
        assert "error" not in kinds(cell)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(others) + 2))
    assert all(not cell.metadata for cell in notebook.cells)
    text = render.NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 150_000
    assert not re.search(r"/home/|/tmp/|/root/|/Users/", text)

"""Runs quickstart.ipynb anew and keeps what it shows: ``python examples/render.py`` (a minute or two; extra "dev").

Trainings go to a temporary folder. What differs from one machine or run to the next for no reason, like the times of
execution, is left out of the file.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"
COLOURS = 64  # of a stored picture
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: Any, folder: Path) -> None:
    """Runs all cells in a folder; an error in one is raised."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()


def clean(notebook: Any) -> None:
    """Takes out what is not the same each time; joins pieces of text that came one by one; shrinks pictures."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [_smaller(output) for output in _joined(cell.outputs)]


def _joined(outputs: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _smaller(output: Any) -> Any:
    """The output with its picture, if it has one, in 64 colours: a third of the size."""
    if "image/png" in output.get("data", {}):
        picture, written = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))), io.BytesIO()
        picture.convert("RGB").quantize(COLOURS).save(written, format="PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(written.getvalue()).decode()
    return output


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
        clean(notebook)
        text = nbformat.writes(notebook)
        if folder in text or str(Path.home()) in text:
            sys.exit("the outputs name folders of this machine; nothing was written")
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
    print(f"Wrote {NOTEBOOK}, {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()

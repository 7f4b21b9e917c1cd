"""Draws the pictures and writes the tables of README.md and docs/results.md: ``make docs`` calls it on two sweeps.

A table stands between ``<!-- made by make docs: SWEEP/FILE -->`` and ``<!-- end -->``, and is what collect_results
wrote into that file of the sweep; a title after the file's name takes only the tables whose titles begin so.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md")
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- made by make docs: (\w+)/([\w.]+)(?: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
ROWS = ["--dataset", "DigitsM2M", "--rows", "ERM:random", "GroupDRO:group", "EX2L_JSDistance"]
FIGURES = {  # the picture in docs/images: what draws it
    "gradcam.png": ["gradcam", "--images", "4", *ROWS, "ALIGN:group"],
    "features.png": ["features", "--n", "2000", *ROWS, "EX2L_JSDistance, control"],
    "curves.png": ["curves", "--datasets", "DigitsM2M"],
    "scatter.png": ["scatter"],
    "time.png": ["time"],
    "ranks.png": ["ranks"],
}


def module(name: str, *words: str) -> None:
    """Runs one of the package's scripts."""
    subprocess.run([sys.executable, "-m", f"domainbed.scripts.{name}", *words], check=True, stdout=subprocess.DEVNULL)


def tables_of(text: str, title: str | None) -> str:
    """The tables of a file of tables, or those whose titles begin as given.

    Raises:
        ValueError: there is none.
    """
    parts = re.split(r"^(?=-------- |#+ )", text.strip(), flags=re.MULTILINE)
    wanted = [part.strip() for part in parts if part.lstrip("-# ").startswith(title or "")]
    if not wanted:
        raise ValueError(f"no table begins with {title!r}; look into what collect_results wrote")
    return "\n\n".join(wanted)


def filled(page: str, read: Callable[[str, str], str]) -> str:
    """The page with each of its blocks written anew.

    Args:
        read: sweep and file -> the text of the file.
    """

    def block(found: re.Match[str]) -> str:
        begin, sweep, file, title, end = found.groups()
        text = tables_of(read(sweep, file), title)
        if file.endswith(".md"):  # the page has headings of its own
            text = re.sub(r"^#+ (.+)$", r"**\1**", text, flags=re.MULTILINE)
        else:
            text = f"```\n{text}\n```"
        return f"{begin}\n{text}\n\n{end}"

    return BLOCK.sub(block, page)


def main() -> None:
    """Draws, collects, and fills in the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", required=True, type=Path, help="output_dir of sweeps/quickstart.toml")
    parser.add_argument("--docs", required=True, type=Path, help="output_dir of sweeps/docs.toml")
    sweeps = {name: Path(place) for name, place in vars(parser.parse_args()).items()}
    for place in sweeps.values():
        for form in ("text", "markdown"):
            module("collect_results", "--input_dir", str(place), "--format", form, "--tables", "all")
    for name, words in FIGURES.items():
        module("figure", *words, "--input_dir", str(sweeps["docs"]))
        shutil.copy(sweeps["docs"] / "figures" / name, IMAGES / name)
    module("report", "--input_dir", str(sweeps["docs"]), "--out", str(sweeps["docs"] / "report.html"))
    for page in PAGES:
        path = ROOT / page
        text = filled(path.read_text("utf-8"), lambda sweep, file: (sweeps[sweep] / file).read_text("utf-8"))
        path.write_text(text, "utf-8")
    subprocess.run([sys.executable, str(ROOT / "docs" / "registry_tables.py")], check=True)


if __name__ == "__main__":
    main()

"""Every LaTeX file of the collector, compiled."""

import json
import re
import shutil
import subprocess

import pytest

from domainbed.scripts import collect_results
from domainbed.table_formats import Cell, Table, render

LATEX = shutil.which("pdflatex")
ODD = "50%_of & all ~^\\{#$} <λ> ± \N{EN DASH} é “q” [1] * | Ω --x \N{SNOWMAN}"

pytestmark = pytest.mark.skipif(LATEX is None, reason="pdflatex is not installed")


def compile_latex(path):
    """The log of a file's compilation, which left a PDF."""
    command = [LATEX, "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={path.parent}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=path.parent)
    assert done.returncode == 0, done.stdout[-2000:]
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return path.with_suffix(".log").read_text(errors="replace")


def job(directory, trial, **args):
    """A run whose groups make every table of groups."""
    run = {"algorithm": "ERM", "dataset": "ColoredMNIST", "test_envs": [0], "hparams_seed": 0, "seed": trial, **args}
    values = {"step_time": 0.5, "epoch": 1.0, "mem_gb": 1.0}
    splits = [f"env{env}_{split}" for env in range(4) for split in ("in", "out")]
    for split in splits:
        values |= {f"{split}_acc": 0.75, f"{split}_wga": 0.5 + trial / 8, f"{split}_g0_acc": 0.5 + trial / 8}
        values |= {f"{split}_g0_n": 4, f"{split}_g3_acc": 1.0, f"{split}_g3_n": 4}
    path = directory / f"{run['algorithm']}-{trial}-{len(list(directory.iterdir()))}"
    path.mkdir()
    (path / "results.jsonl").write_text(json.dumps({"args": run | {"trial_seed": trial}, "step": 100, **values}))
    if run["algorithm"] == "EX2L_MAE":
        place = {"model": "model.pkl", "step": 100, "method": "grad_cam", "n": 8, "seed": 0, "fills": ["blur"]}
        metrics = {"env0_in_explained": 8, "env0_in_images": 8, "env0_in_sufficiency_blur_lower": 0.25}
        line = {"args": run | {"trial_seed": trial}, "explained": place, **metrics}
        (path / "explanations.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All LaTeX files of a sweep with odd names."""
    directory = tmp_path_factory.mktemp("sweep")
    for trial in (0, 1):
        for dataset in ("ColoredMNIST", "A_set & 50%"):
            job(directory, trial, dataset=dataset, label=ODD)
            job(directory, trial, dataset=dataset, algorithm="EX2L_MAE")
            job(directory, trial, dataset=dataset, algorithm="EX2L_MAE", hparams='{"map_gradient": "none"}')
        job(directory, trial, dataset="VLCS", test_envs=[0, 1], label=ODD)
        job(directory, trial, label=ODD, annotation_budget=0.05, validation_budget=0.05)
    words = ["--latex", "--tables", "all", "--intervals", "--screening", "--compare", ODD, "EX2L_MAE"]
    collect_results.main(["--input_dir", str(directory), *words, "--compare_all", "EX2L_MAE"])
    return {path.stem: path for path in directory.glob("*.tex")}


def test_there_are_all_of_them(files):
    known = {*collect_results.ALWAYS, *collect_results.NAMED, *collect_results.FLAGGED}
    assert files.keys() == {"results", *known}


def test_every_file_compiles(files, tmp_path):
    """As one document, since a start of LaTeX takes most of the time; results.tex and groups.tex also alone."""
    for name in ("results", "groups"):
        check(compile_latex(shutil.copy(files[name], tmp_path) and tmp_path / f"{name}.tex"))
    heads, bodies = set(), []
    for path in [path for name, path in files.items() if name != "results"]:
        head, _, rest = path.read_text("utf-8").partition("\\begin{document}\n")
        assert rest.endswith("\\end{document}\n")
        heads.add(head)
        bodies.append(rest.removesuffix("\\end{document}\n"))
    (head,) = heads
    together = tmp_path / "together.tex"
    together.write_text(head + "\\begin{document}\n" + "\\clearpage\n".join(bodies) + "\\end{document}\n", "utf-8")
    check(compile_latex(together))


def test_marks_ends_and_many_lines_fit(tmp_path):
    best = Cell(ODD, {"mean": 1.0}, "best")
    rows = [[ODD, best, Cell(ODD, {}, "second")], ["[1]", "*", "[x]"], ["*", "", ""], *([[ODD, "1", "2"]] * 120)]
    path = tmp_path / "table.tex"
    path.write_text(render([Table(ODD, [ODD], [ODD, "[a]", "b"], rows, [ODD])], "latex", ODD, ODD), "utf-8")
    check(compile_latex(path))


def check(log):
    for word in ("Undefined", "Missing character", "Overfull \\vbox"):
        assert not re.findall(rf".*{re.escape(word)}.*", log)

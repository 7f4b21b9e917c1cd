import json
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed.scripts import BadInput, report


def add_record(sweep: Path) -> None:
    (sweep / "run").mkdir()
    args = {"algorithm": "ERM", "dataset": "Debug28", "test_envs": [0], "output_dir": "elsewhere"}
    args |= {"trial_seed": 0, "hparams_seed": 0, "seed": 0}
    record = {"args": args, "step": 3, "env0_in_acc": 0.5, "env0_out_acc": 0.5, "env1_out_acc": 0.75, "hparams": {}}
    (sweep / "run" / "results.jsonl").write_text(json.dumps(record) + "\n")


def test_the_page_is_written_and_names_its_own_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_record(tmp_path)
    out = tmp_path / "page.html"
    argv = ["--input_dir", str(tmp_path), "--out", str(out), "--criterion", "wga"]
    assert report.main(argv) == 0
    assert f"python -m domainbed.scripts.report {' '.join(argv)}" in out.read_text()
    assert capsys.readouterr().out.startswith(f"{out}: 1 jobs, 0.")
    assert report.main(["--input_dir", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_what_is_no_sweep_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no directory"):
        report.main(["--input_dir", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")])
    with pytest.raises(BadInput, match="holds neither runs"):
        report.main(["--input_dir", str(tmp_path)])
    add_record(tmp_path)
    with pytest.raises(BadInput, match="there is no folder"):
        report.main(["--input_dir", str(tmp_path), "--out", str(tmp_path / "none" / "page.html")])


def test_the_report_is_made_without_torch(tmp_path: Path) -> None:
    add_record(tmp_path)
    code = f"import sys; from domainbed.scripts import report; report.main(['--input_dir', {str(tmp_path)!r}]);"
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

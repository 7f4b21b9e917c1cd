"""The page of baselines knows every method, and the two-stage class that it shows trains as it stands there."""

import re
from pathlib import Path

import pytest

from domainbed import algorithms
from domainbed.records import RESULTS_FILE, read
from domainbed.scripts import train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "baselines.md").read_text("utf-8")
OTHERS = ("ERM", "GroupDRO", "Mixup", "CDANN", "IRM", "MMD", "CORAL", "DANN", "EX2L_MAE", "ALIGN")


@pytest.fixture
def example(monkeypatch):
    """The class, registered for one test."""
    monkeypatch.setattr(algorithms.REGISTRY, "_entries", dict(algorithms.REGISTRY._entries))
    monkeypatch.setattr(algorithms.REGISTRY, "names", [*algorithms.REGISTRY.names])
    source, names = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {"__name__": "shown"}
    exec(source, names)
    return names["LossTwice"]


def test_the_shown_class_trains_in_two_stages_and_records_the_last(example, tmp_path):
    args = ["--dataset", "DigitsSubpop", "--algorithm", example.__name__, "--steps", "4", "--checkpoint_freq", "1"]
    args += ["--hparams", '{"batch_size": 4, "first_share": 0.5}', "--eval_splits", "selection", "--skip_model_save"]
    assert train.main([*args, "--output_dir", str(tmp_path)]) == 0
    assert [record["step"] for record in read(tmp_path / RESULTS_FILE)[0]] == [2, 3]
    assert "stage 2 of 2, by loss, after 2 updates" in (tmp_path / "out.txt").read_text()


def test_the_table_has_every_method_with_its_stages():
    lines = PAGE.split("## The methods")[1].split("## ")[0].splitlines()
    table = {name: line.split(" | ") for line in lines for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    new = algorithms.base.OWN_ORDER[algorithms.base.OWN_ORDER.index("RWG") :]
    assert [name for name in (*new, *OTHERS) if name not in table] == []
    staged = [name for name in new if table[name][1].startswith("2")]
    assert staged == [name for name in new if algorithms.get_algorithm_class(name).STAGES]

"""Sweeps as a user runs them: real jobs in real processes, classes from outside, one new file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = [
    "--datasets", "Debug28", "--n_hparams", "1", "--n_trials", "1", "--steps", "3", "--checkpoint_freq", "2",
    "--single_test_envs", "--test_envs_list", "0", "--skip_confirmation", "--command_launcher", "local",
    "--hparams", '{"backbone": "small_cnn", "batch_size": 8}',
]  # fmt: skip

# Written as for DomainBed: its constructor, its attributes, its update; nothing of ours.
THIRD_PARTY = '''
import torch
import torch.nn.functional as F
import domainbed.algorithms
from domainbed.algorithms import ERM
from domainbed.lib.misc import random_pairs_of_minibatches


class PairGap(ERM):
    """Penalises the gap between the risks of random pairs of environments."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super(PairGap, self).__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches, unlabeled=None):
        loss = 0
        for (xi, yi), (xj, yj) in random_pairs_of_minibatches(minibatches):
            li = F.cross_entropy(self.predict(xi), yi)
            lj = F.cross_entropy(self.classifier(self.featurizer(xj)), yj)
            loss = loss + li + self.hparams.get("gap_weight", 1.0) * (li - lj).abs()
        loss = loss / len(minibatches)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.update_count += 1
        return {"loss": loss.item()}


domainbed.algorithms.PairGap = PairGap
'''


def run(*words: str, cwd: Path, **variables: str) -> str:
    """Runs ``python -m domainbed.scripts.<words>`` from cwd; returns what it printed."""
    environment = os.environ | variables
    command = [sys.executable, "-m", f"domainbed.scripts.{words[0]}", *words[1:]]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def records(sweep_dir: Path) -> list[dict]:
    paths = sorted(sweep_dir.glob("*/results.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_a_domainbed_style_class_trains_through_train_and_sweep(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(THIRD_PARTY)
    variables = {"DOMAINBED_PLUGINS": str(plugin)}
    flags = ["--dataset", "Debug28", "--algorithm", "PairGap", "--steps", "2", "--output_dir", str(tmp_path / "one")]
    run("train", *flags, "--hparams", '{"backbone": "small_cnn", "gap_weight": 0.5}', cwd=ROOT, **variables)
    assert (tmp_path / "one" / "done").exists()

    sweep_dir = tmp_path / "sweep"
    out = run("sweep", "launch", *QUICK, "--algorithms", "ERM:random", "PairGap", "PairGap:group", "EX2L_MAE",
              "--output_dir", str(sweep_dir), cwd=ROOT, **variables)  # fmt: skip
    assert "4 done, 0 failed." in out
    found = {(r["args"]["algorithm"], r["args"]["partition"]) for r in records(sweep_dir)}
    assert found == {("ERM", "random"), ("PairGap", "environment"), ("PairGap", "group"), ("EX2L_MAE", "group")}

    # without the plugin: collecting needs no class
    printed = run("collect_results", "--input_dir", str(sweep_dir), cwd=ROOT)
    rows = re.findall(r"^(\S+) .*\+/-", printed, re.M)
    assert rows[:4] == ["ERM:random", "EX2L_MAE", "PairGap", "PairGap:group"]
    assert re.search(r"PairGap +Uniform Group", printed)
    assert (sweep_dir / "results.txt").exists()
    assert (sweep_dir / "groups.txt").exists()

    # a second launch has nothing to do
    again = run("sweep", "launch", *QUICK, "--algorithms", "ERM:random", "EX2L_MAE",
                "--output_dir", str(sweep_dir), cwd=ROOT)  # fmt: skip
    assert "About to launch 0 jobs." in again


def new_algorithm() -> tuple[str, str]:
    """The README's file of a new algorithm, and the name of its class."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "@register" in block]
    (name,) = re.findall(r"class (\w+)\(", block)
    return block, name


def test_the_readmes_new_algorithm_is_one_short_file(tmp_path: Path) -> None:
    block, name = new_algorithm()
    assert block.count("\n") < 30
    shutil.copytree(ROOT / "domainbed", tmp_path / "domainbed", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "domainbed" / "algorithms" / "new.py").write_text(block)
    first = "from domainbed.algorithms import ERM, AbstractMMD, EX2L\n"  # a file that is imported before theirs
    (tmp_path / "domainbed" / "algorithms" / "aaa.py").write_text(first)

    out = run(
        "sweep", "launch", *QUICK, "--algorithms", name, "ERM", "--n_hparams", "2", "--output_dir", "out", cwd=tmp_path
    )
    assert "4 done, 0 failed." in out
    drawn = {
        r["args"]["hparams_seed"]: r["hparams"] for r in records(tmp_path / "out") if r["args"]["algorithm"] == name
    }
    own = re.findall(r'"(\w+)": \(', block)
    assert own
    assert all(drawn[0][hparam] != drawn[1][hparam] for hparam in own)
    assert re.search(rf"^{name} ", run("collect_results", "--input_dir", "out", cwd=tmp_path), re.M)


def test_a_misspelt_hparam_of_the_new_algorithm_is_refused(tmp_path: Path) -> None:
    block, name = new_algorithm()
    (tmp_path / "new.py").write_text(block)
    command = [sys.executable, "-m", "domainbed.scripts.train", "--dataset", "Debug28", "--algorithm", name,
               "--hparams", '{"lrr": 1}', "--output_dir", str(tmp_path / "out")]  # fmt: skip
    environment = os.environ | {"DOMAINBED_PLUGINS": str(tmp_path / "new.py")}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert f"hparam of {name} not found: lrr; did you mean lr" in process.stderr


@pytest.mark.parametrize("flag", ["--workers", "--threads"])
def test_failed_jobs_are_reported_with_their_reason(tmp_path: Path, flag: str) -> None:
    command = [sys.executable, "-m", "domainbed.scripts.sweep", "launch", *QUICK, "--output_dir", str(tmp_path)]
    command += ["--algorithms", "GroupDRO:group", "--hparams", '{"batch_size": 1}', flag, "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1
    assert "batch_size 1 x 2 environments is too small for 4 parts" in process.stdout
    assert "0 done, 1 failed." in process.stdout
    assert not list(tmp_path.glob("*/done"))

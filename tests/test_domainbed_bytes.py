"""DomainBed's own output, byte for byte: its collector's text and LaTeX of random sweeps, recorded once.

``domainbed_output/N.txt`` and ``.tex`` are what facebookresearch/DomainBed's ``collect_results`` printed for
``write_sweep(N)``, job directories read in name order.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from domainbed import registry, tables
from domainbed.lib import reporting
from domainbed.model_selection import (
    IIDAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
)
from domainbed.run_index import collect

METHODS = (IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod)
RECORDED = Path(__file__).parent / "domainbed_output"
SEEDS = [0, 1, 36]
ENVIRONMENTS = {"Debug28": 3, "ColoredMNIST": 3, "RotatedMNIST": 6, "VLCS": 4, "PACS": 4, "TerraIncognita": 4}
ALGORITHMS = ["Mine", "ERM", "My_Long_Method_With_A_Name", "IRM", "DANN", "GroupDRO", "CORAL"]


def write_sweep(seed: int, directory: Path) -> None:
    """A sweep with pairs for leave-one-out in some datasets, ties, jobs that never ran, and runs of unequal lengths."""
    rng = random.Random(seed)
    levels = rng.choice([4, 20, 10**6])  # few levels: many ties
    for dataset in rng.sample(sorted(ENVIRONMENTS), 2):
        n_envs, pairs, missing = ENVIRONMENTS[dataset], rng.random() < 0.6, rng.choice([0, 0, 0.1])
        tested = [envs for n in (1, 2)[: 1 + pairs] for envs in itertools.combinations(range(n_envs), n)]
        algorithms = rng.sample(ALGORITHMS, 3)
        for algorithm, envs, draw, trial in itertools.product(algorithms, tested, range(2), range(3)):
            if rng.random() < missing:
                continue
            args = {"algorithm": algorithm, "dataset": dataset, "test_envs": list(envs), "hparams_seed": draw}
            args |= {"trial_seed": trial, "seed": rng.getrandbits(31), "output_dir": "runs", "holdout_fraction": 0.2}
            job = directory / f"{rng.getrandbits(64):016x}"
            job.mkdir()
            lines = [_line(rng, args, n_envs, step, levels) for step in range(0, rng.choice([300, 300, 200]), 100)]
            (job / "results.jsonl").write_text("".join(lines))


def _line(rng: random.Random, args: dict[str, Any], n_envs: int, step: int, levels: int) -> str:
    accs = {
        f"env{env}_{split}_acc": rng.randint(0, levels) / levels for env in range(n_envs) for split in ("in", "out")
    }
    record = {"args": args, "hparams": {"lr": 0.001}, "step": step, "epoch": step / 70, "step_time": 0.1, **accs}
    return json.dumps(record, sort_keys=True) + "\n"


@pytest.fixture(params=SEEDS)
def sweep(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    write_sweep(request.param, tmp_path)
    return request.param, tmp_path


def test_text_equals_domainbeds_to_the_byte(sweep: tuple[int, Path]) -> None:
    seed, directory = sweep
    recorded = (RECORDED / f"{seed}.txt").read_text()
    assert tables.domainbed_tables(collect(directory), METHODS, latex=False) == recorded
    assert tables.domainbed_tables(reporting.load_records(directory), METHODS, latex=False) == recorded


def test_latex_equals_domainbeds_but_for_header_cells_and_escapes(sweep: tuple[int, Path]) -> None:
    seed, directory = sweep
    recorded = (RECORDED / f"{seed}.tex").read_text().split("\n")
    lines = tables.domainbed_tables(collect(directory), METHODS, latex=True).split("\n")
    assert len(lines) == len(recorded)
    for ours, theirs in zip(lines, recorded, strict=True):
        if r"\textbf" in theirs:
            assert ours.count(r"\textbf{") == ours.count("} ") == theirs.count(r"\textbf{")  # each closed again
        elif r"\_" in ours:
            assert [cell.strip().replace(r"\_", "_")[:20] for cell in ours.split("&")] == [
                cell.strip()[:20] for cell in theirs.split("&")
            ]
        else:
            assert ours == theirs


def test_the_recorded_sweeps_have_what_tables_can_differ_in() -> None:
    texts = [(RECORDED / f"{seed}.txt").read_text() for seed in SEEDS]
    leave_one_out = [text.split("leave-one-domain-out")[1] for text in texts]
    assert any(" +/- " in text.split("--------")[0] for text in leave_one_out)
    assert any("Mine  " in text and "ERM  " in text for text in texts)
    assert all(name in registry.order("datasets") for name in ENVIRONMENTS)

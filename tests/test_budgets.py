"""Every algorithm at every annotation budget, through the train script: stages, hidden confounders, selection."""

import json
from pathlib import Path
from typing import Any

from domainbed import algorithms
from domainbed.scripts import train

NAMES = [
    name
    for name in algorithms.ALGORITHMS
    if not algorithms.get_algorithm_class(name).NEEDS_MASKS and name not in ("ARM", "Transfer")
]


def run(directory: Path, *flags: str) -> list[dict[str, Any]]:
    hparams = '{"backbone": "small_cnn", "batch_size": 6}'
    common = ["--dataset", "Debug28", "--hparams", hparams, "--steps", "5", "--checkpoint_freq", "2"]
    assert train.main([*common, "--skip_model_save", "--output_dir", str(directory), *flags]) == 0
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]

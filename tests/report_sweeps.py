"""Sweeps' directories without training, for the tests of the report: ``python tests/report_sweeps.py DIR 2000``."""

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

GROUPS, COUNT = 4, 25  # of an environment; images of a group
HEAD = "Environment:\n\tpython: 3.12.1\n\ttorch: 2.9.0\nArgs:\n\talgorithm: some\n"


def arguments(algorithm: str, trial: int, draw: int = 0, **more: Any) -> dict[str, Any]:
    """Arguments of train, as the sweep's list has them."""
    seeds = {"trial_seed": trial, "hparams_seed": draw, "seed": 1000 * trial + draw}
    return {"algorithm": algorithm, "dataset": "Debug28", "test_envs": [2], **seeds, **more}


def record(args: dict[str, Any], step: int, rng: random.Random, groups: bool = True) -> dict[str, Any]:
    """A checkpoint with random accuracies of four groups, or of none, on two validation splits and the test split."""
    found: dict[str, Any] = {"args": args, "step": step, "epoch": step / 10, "loss": rng.random(), "step_time": 0.01}
    found |= {"hparams": {"lr": 0.001, "batch_size": 32, "backbone": "small_cnn"}, "mem_gb": 1.5}
    splits = ((0, "out"), (1, "out"), (2, "in"), (2, "out"))
    if not groups:
        return found | {f"env{env}_{split}_acc": rng.random() for env, split in splits}
    for env, split in splits:
        accs = [rng.random() for _ in range(GROUPS)]
        found |= {f"env{env}_{split}_acc": sum(accs) / GROUPS, f"env{env}_{split}_wga": min(accs)}
        found |= {f"env{env}_{split}_g{g}_acc": acc for g, acc in enumerate(accs)}
        found |= {f"env{env}_{split}_g{g}_n": COUNT for g in range(GROUPS)}
    return found | {f"train_g{g}_n": 10 * COUNT for g in range(GROUPS)}


def add_run(
    sweep: Path,
    args: dict[str, Any],
    records: int = 3,
    state: str = "done",
    seed: int = 0,
    error: str = "it broke",
    groups: bool = True,
) -> Path:
    """A listed run in a directory of its own; one that is not done has no mark, a failed one says why."""
    name = hashlib.md5(json.dumps(args, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    with (sweep / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"name": name, "args": args}) + "\n")
    place = sweep / name
    if state == "queued":
        return place
    place.mkdir()
    rng = random.Random(seed)
    given = {**args, "output_dir": str(place)}
    lines = [json.dumps(record(given, 100 * i, rng, groups), sort_keys=True) for i in range(records)]
    (place / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))
    numbers = "".join("  ".join(f"{rng.random():.10f}" for _ in range(14)) + "\n" for _ in range(records))
    (place / "out.txt").write_text(HEAD + numbers)
    (place / "err.txt").write_text("")
    if state == "done":
        (place / "done").write_text("done")
    if state == "failed":
        (place / "failed").write_text(json.dumps({"error": error, "attempt": 1, "time": 0.0}))
    return place


def make(sweep: Path, runs: int, records: int = 12) -> Path:
    """A sweep of many runs: five rows, five trials, as many draws as it takes."""
    sweep.mkdir(parents=True, exist_ok=True)
    rows = [{}, {"partition": "group"}, {"partition": "random"}, {"label": "mine"}, {"hparams": '{"lr": 0.01}'}]
    for i in range(runs):
        args = arguments("ERM", i // 5 % 5, i // 25, **rows[i % 5])
        add_run(sweep, args, records, "failed" if i % 97 == 0 else "done", i)
    return sweep


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))

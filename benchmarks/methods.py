"""What the group-robust and two-stage methods cost, relative to ERM: ``python benchmarks/methods.py``.

Every run has as many updates as the others, of as many images, on DigitsSubpop. Timed is all of it but building and
evaluation: the updates with the loading of their images, and what happens between stages: passes over images,
features, fits. CPU seconds of this process, since machines may be shared. Runs of ERM come in between, and a method
is divided by the mean of the one before it and the one after it.

What happens between stages does not grow with the number of updates, so it is counted apart, in updates of ERM; the
last column adds it to the updates of a run as long as DomainBed's.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from speed import table

from domainbed import evaluation, training
from domainbed.feature_maps import evaluating
from domainbed.scripts.train_arguments import completed, resolve
from domainbed.scripts.train_building import build
from domainbed.scripts.train_execution import Run

LONG = 5001  # updates, DomainBed's default
BETWEEN = 4  # methods from one run of ERM to the next
METHODS: dict[str, tuple[str, str | None, dict[str, Any]]] = {  # name -> algorithm, partition or its own, hparams
    "RWG": ("RWG", None, {}),
    "RWY": ("RWY", None, {}),
    "SUBG": ("SUBG", None, {}),
    "SUBY": ("SUBY", None, {}),
    "ReWeight": ("ReWeight", None, {}),
    "GroupDRO": ("GroupDRO", "group", {}),
    "CVaR_DRO": ("CVaR_DRO", "random", {}),
    "LfF": ("LfF", "random", {}),
    "LISA": ("LISA", None, {}),
    "LISA, CutMix": ("LISA", None, {"lisa_mix": "cutmix"}),
    "Mixup": ("Mixup", "group", {}),
    "InBatchMixup": ("InBatchMixup", "random", {}),
    "CDAN": ("CDAN", "group", {}),
    "CDANN": ("CDANN", "group", {}),
    "MMD_GivenLabel": ("MMD_GivenLabel", None, {}),
    "CORAL_GivenLabel": ("CORAL_GivenLabel", None, {}),
    "IRM": ("IRM", "group", {}),
    "MMD": ("MMD", "group", {}),
    "CORAL": ("CORAL", "group", {}),
    "DANN": ("DANN", "group", {}),
    "JTT": ("JTT", None, {}),
    "CRT": ("CRT", None, {}),
    "ReWeightCRT": ("ReWeightCRT", None, {}),
    "DFR": ("DFR", None, {}),
    "DFR_Training": ("DFR_Training", None, {}),
    "EX2L_MAE": ("EX2L_MAE", None, {}),
    "ALIGN, after its warm-up": ("ALIGN", "group", {"warmup_steps": 0}),
}


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a run: of its updates, and of what happens between its stages."""

    updates: float
    between: float


def built(algorithm: str, partition: str | None, hparams: dict[str, Any], args: argparse.Namespace) -> Run:
    """A run that is about to start."""
    given = {"dataset": "DigitsSubpop", "algorithm": algorithm, "steps": args.steps, "checkpoint_freq": args.steps}
    given |= {"partition": partition} if partition else {}
    complete = completed(given)
    return build(complete, resolve(complete) | hparams | {"batch_size": args.batch_size})


def cost(run: Run) -> Cost:
    """Goes through the run's stages as the train script does, without measuring anything on the way."""
    progress, updates, between = training.Progress(), 0.0, 0.0
    for number, stage in enumerate(run.stages):
        start = time.process_time()
        if number:
            with torch.no_grad(), evaluating(run.algorithm):
                progress.odds = run.algorithm.begin_stage(stage.name, run.stage_data)
        minibatches = stage.minibatches(progress.odds)
        middle = time.process_time()
        plan = replace(stage.plan, splits=())
        for _ in training.train(
            run.algorithm, minibatches.start_at(progress.updates), None, plan, run.device, progress
        ):
            pass
        between, updates = between + middle - start, updates + time.process_time() - middle
    return Cost(updates, between)


def turns(names: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, Cost, float]]:
    """Of each method in turn its cost, and what ERM's updates cost at the time."""
    erm = cost(built("ERM", "random", {}, args)).updates
    for first in range(0, len(names), BETWEEN):
        found = [(name, cost(built(*METHODS[name], args))) for name in names[first : first + BETWEEN]]
        before, erm = erm, cost(built("ERM", "random", {}, args)).updates
        yield "ERM", Cost(erm, 0.0), before
        yield from ((name, one, (before + erm) / 2) for name, one in found)


def ratios(found: Sequence[tuple[Cost, float]], steps: int) -> list[object]:
    """The cells of a method: of its updates, of what lies between stages, and of a long run."""
    updates = [one.updates / erm for one, erm in found]
    between = [one.between / erm * steps for one, erm in found]
    mean, once = statistics.mean(updates), statistics.median(between)
    return [f"{mean:.2f}", f"{min(updates):.2f} to {max(updates):.2f}", f"{once:.0f}", f"{mean + once / LONG:.2f}"]


def evaluation_seconds(args: argparse.Namespace) -> tuple[float, int]:
    """CPU seconds of one evaluation of all splits, which costs each method the same, and its number of images."""
    run = built("ERM", "random", {}, args)
    plan, start = run.plan, time.process_time()
    evaluation.evaluate(run.algorithm, plan.splits, plan.num_confounders, run.device, plan.precision, plan.num_workers)
    return time.process_time() - start, sum(map(len, plan.splits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=50, help="updates of a run")
    parser.add_argument("--batch_size", type=int, default=64, help="of each of the two training environments")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}")
    cost(built("ERM", "random", {}, args))  # warms up
    found: dict[str, list[tuple[Cost, float]]] = {"ERM": []} | {name: [] for name in args.methods}
    for _ in range(args.repeats):
        for name, one, erm in turns(args.methods, args):
            found[name].append((one, erm))
    erm = statistics.median(one.updates for one, _ in found["ERM"]) / args.steps
    seconds, images = evaluation_seconds(args)
    print(f"an update of ERM: {erm:.3f} CPU s; one evaluation of {images} images: {seconds / erm:.0f} such updates\n")
    header = ["method", "updates", "min to max", "between stages, in updates of ERM", f"a run of {LONG} updates"]
    print(table(header, [[name, *ratios(costs, args.steps)] for name, costs in found.items()]), flush=True)


if __name__ == "__main__":
    main()

"""What eX2L, ALIGN and the other methods guided by heatmaps cost, as ratios to ERM: ``python benchmarks/ex2l.py``.

Prints a Markdown table for each question; ``--methods guided`` takes ALIGN and its lineage in place of eX2L:

time     of a step, two networks and shared trunks against ERM in one process; they take turns, step by step, on equal
         minibatches (group partition). Without loading it is one minibatch over and over. With loading, JPEG files of
         350 px are opened and augmented by the package's loader, in this process: its time is counted in full.
         (MNIST_CNN at ColoredMNIST's shapes: images are gathered from memory.)
memory   the peak of a process of its own for each, beside that of one that imports only (needs Linux's /proc).
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import table

from domainbed import algorithms, hparams_registry, partitions, training
from domainbed.algorithms.base import Task
from domainbed.datasets.base import ImageEnvironment, InMemoryEnvironment
from domainbed.loaders import TrainingLoader
from domainbed.splits import Split

HELD = 64  # images
STEPS = 4  # of each process whose peak is measured


@dataclasses.dataclass
class Case:
    """A network: images per step, their shape, hparams, and the layer from which a trunk's branch runs.

    ``guided``: what is compared is ALIGN and its lineage.
    """

    batch: int
    shape: tuple[int, int, int]
    hparams: dict[str, Any]
    layer: str
    guided: bool = False


RESNET = {"pretrained": False, "resnet50_augmix": False}
CASES = {
    "MNIST_CNN": Case(128, (2, 28, 28), {}, "conv4"),
    "ResNet-18": Case(16, (3, 224, 224), RESNET | {"backbone": "resnet18"}, "network.layer4"),
    "ResNet-50": Case(8, (3, 224, 224), RESNET | {"backbone": "resnet50"}, "network.layer4"),
}


GUIDED: dict[str, tuple[str, dict[str, Any]]] = {
    "ERM": ("ERM", {}),
    "SGT": ("SGT", {}),
    "DRE": ("DRE", {}),
    "RRR": ("RRR", {}),
    "RRR_Confounder": ("RRR_Confounder", {}),
    "GRADIA": ("GRADIA", {"gradia_warmup": 0}),
    "CARE": ("CARE", {"care_warmup": 0}),
    "ALIGN": ("ALIGN", {"warmup_steps": 0}),
    "ALIGN, masker on features": ("ALIGN", {"warmup_steps": 0, "masker": "features"}),
}


def variants(case: Case) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> algorithm and hparams."""
    if case.guided:
        return GUIDED
    found: dict[str, tuple[str, dict[str, Any]]] = {"ERM": ("ERM", {}), "two networks": ("EX2L_MAE", {})}
    return found | {
        f"shared up to {layer}": ("EX2L_MAE", {"shared_from": layer}) for layer in (case.layer, "classifier")
    }


def environment(case: Case, directory: str | None) -> Any:
    """Two labels by two confounders: photographs as files in the directory, or random images in memory."""
    numbers = torch.arange(HELD)
    y, c = numbers % 2, numbers // 2 % 2
    if directory is None:
        masks = torch.randint(256, (HELD, *case.shape[1:]), dtype=torch.uint8)
        return InMemoryEnvironment(torch.rand(HELD, *case.shape), y, c, masks=masks)
    from input_pipelines import write

    images = dataclasses.replace(write(Path(directory), 350, HELD), size=case.shape[1])
    return ImageEnvironment(images, np.arange(HELD), y.numpy(), c.numpy(), augment=True)


def build(case: Case, algorithm: str, hparams: dict[str, Any], data: Any) -> tuple[Any, TrainingLoader]:
    """An algorithm and its loader."""
    splits = [Split(0, "in", data, np.arange(HELD), 0)]
    loader = TrainingLoader(splits, partitions.REGISTRY["group"], case.batch, 2, with_masks=case.guided)
    torch.manual_seed(0)
    task = Task(case.shape, 2, len(loader.parts), 2, loader.group_counts(2))
    defaults = hparams_registry.default_hparams(algorithm, "Waterbirds" if case.shape[0] == 3 else "ColoredMNIST")
    return algorithms.get_algorithm_class(algorithm).from_task(task, defaults | case.hparams | hparams), loader


def in_turn(case: Case, repeats: int, directory: str | None, loading: bool) -> dict[str, list[float]]:
    """Seconds of each variant's steps."""
    data = environment(case, directory)
    pairs = {name: build(case, *variant, data) for name, variant in variants(case).items()}
    streams = {name: iter(loader) for name, (_, loader) in pairs.items()}
    fixed = next(iter(next(iter(pairs.values()))[1]))
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(repeats + 2):
        for name, (algorithm, _) in pairs.items():
            start = time.perf_counter()
            algorithm.update(next(streams[name]) if loading else fixed)
            if turn >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - start)
    return times


def step_times(cases: dict[str, Case], repeats: int) -> str:
    """Medians, and the median of the ratio to ERM turn by turn."""
    rows = []
    for name, case in cases.items():
        for loading in (False,) if case.guided else (False, True):
            with tempfile.TemporaryDirectory() as directory:
                files = directory if loading and case.shape[0] == 3 else None
                times = in_turn(case, repeats, files, loading)
            for variant, seconds in times.items():
                ratios = [own / erm for own, erm in zip(seconds, times["ERM"], strict=True)]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                ratio = f"{statistics.median(ratios):.2f}"
                rows.append(
                    [name, case.batch, "yes" if loading else "no", variant, statistics.median(seconds), ratio, spread]
                )
    return table(["network", "images", "with loading", "variant", "s per step", "ratio to ERM", "min to max"], rows)


def peaks(cases: dict[str, Case], flags: list[str]) -> str:
    """Peak resident memory of a process that takes a few steps, less that of one that imports only."""
    rows = []
    base = peak_of_child(flags, "imports", "")
    for name, case in cases.items():
        taken = {variant: peak_of_child(flags, name, variant) for variant in variants(case)}
        rows += [[name, v, f"{mb:.0f}", f"{(mb - base) / (taken['ERM'] - base):.2f}"] for v, mb in taken.items()]
    return table(["network", "variant", "peak, MiB", f"ratio to ERM, less {base:.0f} MiB of the imports"], rows)


def peak_of_child(flags: list[str], case: str, variant: str) -> float:
    command = [sys.executable, __file__, *flags, "--child", case, variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(cases: dict[str, Case], name: str, variant: str) -> None:
    """Prints the peak memory of this process in MiB, after its steps."""
    if variant:
        case = cases[name]
        algorithm, loader = build(case, *variants(case)[variant], environment(case, None))
        for _, minibatches in zip(range(STEPS), loader, strict=False):
            algorithm.update(minibatches)
    status = Path("/proc/self/status").read_text()  # getrusage would also count the process that started this one
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="steps of each variant")
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pixels", type=int, default=224, help="side of the ResNets' images")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: torch's default")
    parser.add_argument("--only", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--methods", choices=["ex2l", "guided"], default="ex2l")
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    training.keep_freed_memory()  # as the train script does
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = {name: CASES[name] for name in args.networks}
    for case in cases.values():
        case.guided = args.methods == "guided"
        if case.shape[0] == 3:
            case.shape = (3, args.pixels, args.pixels)
    if args.child:
        child(cases, *args.child)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    if "time" in args.only:
        print(step_times(cases, args.repeats), flush=True)
    if "memory" in args.only:
        flags = ["--pixels", str(args.pixels), "--threads", str(args.threads), "--methods", args.methods]
        print("\n" + peaks(cases, flags), flush=True)


if __name__ == "__main__":
    main()

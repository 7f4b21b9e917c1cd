"""What metrics of explanations cost, as ratios measured side by side: ``python benchmarks/explanations.py``.

Prints a Markdown table for each question in ``QUESTIONS``:

metrics  of heatmaps, each with each fill, and Grad-CAM itself, against plain evaluation passes of the same images right
         before. They take turns in one process. A metric alone orders the pixels and asks the network for all it needs;
         all of them together share that. Localisation asks no network.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from speed import table
from torch import Tensor

from domainbed import algorithms, explanation_metrics, hparams_registry, masking
from domainbed.algorithms.base import Task
from domainbed.attribution import explain
from domainbed.lib.misc import predicted_labels

DATASET = {"SmallCNN": "DigitsM2M", "ResNet-18": "Waterbirds"}  # whose default hparams are taken
SHAPES = {"SmallCNN": (3, 36, 36), "ResNet-18": (3, 224, 224)}
HPARAMS: dict[str, dict[str, Any]] = {
    "SmallCNN": {},
    "ResNet-18": {"pretrained": False, "resnet50_augmix": False, "backbone": "resnet18"},
}
IMAGES = {"SmallCNN": 64, "ResNet-18": 4}
PLAIN = 3  # plain passes before each measurement


def network(name: str) -> Any:
    """ERM with random weights, in evaluation mode."""
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("ERM", DATASET[name]) | HPARAMS[name]
    return algorithms.get_algorithm_class("ERM").from_task(Task(SHAPES[name], 2, 1, 1, ()), hparams).eval()


class Measured:
    """What is timed, for one network and its images."""

    def __init__(self, name: str):
        self.erm, self.x = network(name), torch.rand(IMAGES[name], *SHAPES[name])
        self.passes = 0
        self.erm.network.register_forward_hook(self.count)
        logits, self.heatmaps = self.grad_cam()
        self.target = predicted_labels(logits)
        self.masks = (torch.rand_like(self.x[:, 0]) > 0.5).float()

    def count(self, *_: object) -> None:
        self.passes += 1

    @torch.no_grad()
    def plain(self) -> Tensor:
        return self.erm.predict(self.x)

    def grad_cam(self) -> tuple[Tensor, Tensor]:
        return explain(self.erm.network, self.erm.featurizer.map_layer, self.x, None, policy="none")

    def localisation(self) -> dict[str, Tensor]:
        return explanation_metrics.localisation(self.heatmaps, self.masks)

    def faithfulness(self, metrics: Iterable[str], how: str) -> list[Tensor]:
        filled = masking.fill(self.x, how, torch.full((3,), 0.5))
        shown = explanation_metrics.Shown(self.erm.predict, self.x, self.heatmaps, self.target, filled)
        return [explanation_metrics.FAITHFULNESS[metric](shown) for metric in metrics]

    def calls(self, fills: Iterable[str]) -> dict[tuple[str, str], Callable[[], object]]:
        """(What, fill) -> what computes it for all images."""
        found: dict[tuple[str, str], Callable[[], object]] = {
            ("plain pass", ""): self.plain,
            ("Grad-CAM", ""): self.grad_cam,
            ("localisation, all", ""): self.localisation,
        }
        everything = {metric: [metric] for metric in explanation_metrics.FAITHFULNESS}
        everything["faithfulness, all"] = list(explanation_metrics.FAITHFULNESS)
        for how, (what, metrics) in itertools.product(fills, everything.items()):
            found[what, how] = functools.partial(self.faithfulness, metrics, how)
        return found

    def timed(self, call: Callable[[], object]) -> tuple[float, int]:
        """Seconds and forward passes."""
        before, start = self.passes, time.perf_counter()
        call()
        return time.perf_counter() - start, self.passes - before


def metric_times(names: list[str], repeats: int, fills: list[str]) -> str:
    """Forward passes, seconds per 1,000 images, and the median over turns of the ratio to a plain pass."""
    rows = []
    for name in names:
        measured = Measured(name)
        calls = measured.calls(fills)
        times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in calls}
        passes = {}
        measured.plain()  # warms up
        for key, call in list(calls.items()) * repeats:
            plain = statistics.median(measured.timed(measured.plain)[0] for _ in range(PLAIN))
            own, passes[key] = measured.timed(call)
            times[key].append((own, own / plain))
        for key, pairs in times.items():
            per_thousand = statistics.median(own for own, _ in pairs) * 1000 / IMAGES[name]
            ratios = sorted(ratio for _, ratio in pairs)
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append([name, *key, passes[key], per_thousand, f"{statistics.median(ratios):.2f}", spread])
    header = ["network", "what", "fill", "passes", "s per 1,000 images", "ratio to a plain pass", "min to max"]
    return table(header, rows)


QUESTIONS = {"metrics": metric_times}  # name -> function of networks, turns and fills that returns a table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--fills", nargs="+", choices=masking.FILLS, default=list(masking.FILLS))
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for question in args.only:
        print("\n" + QUESTIONS[question](args.networks, args.repeats, args.fills), flush=True)


if __name__ == "__main__":
    main()

"""Algorithm, splits -> average, per-group and worst-group accuracy, in one pass; and how good its explanations are."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domainbed import explanation_metrics, masking, similarities, subsets
from domainbed.datasets.base import Integers, confounders, masks
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.lib.misc import predicted_labels
from domainbed.loaders import evaluation_batches
from domainbed.splits import Split


@dataclass(frozen=True)
class Accuracy:
    """What a split says of an algorithm; accuracies are fractions.

    Attributes:
        average: AA, the mean over the examples.
        groups: accuracy of each non-empty group g = y * V + c; empty where no confounder is known.
        counts: number of examples of each of these groups.
        images: number of all examples, where only the annotated ones have groups; None: no budget applies.
    """

    average: float
    groups: dict[int, float]
    counts: dict[int, int]
    images: int | None = None

    @property
    def worst_group(self) -> int:
        """The group of the lowest accuracy; the smallest number on ties."""
        return min(self.groups, key=lambda g: (self.groups[g], g))

    @property
    def worst(self) -> float:
        """WGA, the accuracy of the worst group."""
        return self.groups[self.worst_group]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context that computes in "fp32" (as is) or "bf16" (matrix products in bfloat16, weights in float32).

    Autocast's cache is off: its bfloat16 copies of the weights would outlive an optimizer's step within one update.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def measure(
    correct: NDArray[np.bool_], groups: Integers | None, annotated: NDArray[np.bool_] | None = None
) -> Accuracy:
    """Accuracies from correct (N,) and, where a confounder is known, the groups (N,).

    Args:
        annotated: (N,) which examples count for their groups; all count for the average. None: all.
    """
    average = float(correct.mean())
    if groups is None:
        return Accuracy(average, {}, {})
    images = None if annotated is None else len(correct)
    if annotated is not None:
        correct, groups = correct[annotated], groups[annotated]
    present, counts = np.unique(groups, return_counts=True)
    hits = np.bincount(groups, weights=correct)[present]
    return Accuracy(
        average,
        {int(g): float(hit / n) for g, hit, n in zip(present, hits, counts, strict=True)},
        {int(g): int(n) for g, n in zip(present, counts, strict=True)},
        images,
    )


def predictions(
    algorithm: Any,
    environment: Any,
    keys: Integers,
    device: torch.device,
    precision: str = "fp32",
    num_workers: int = 0,
) -> tuple[Integers, Integers]:
    """Predicted and true labels (N,) of an environment at keys; one-column logits are cut at 0.

    The algorithm is in evaluation mode meanwhile and in training mode afterwards.
    """
    predicted, true = [], []
    algorithm.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            for x, y in evaluation_batches(environment, keys, num_workers, device):
                predicted.append(predicted_labels(algorithm.predict(x)))
                true.append(torch.as_tensor(y))
    finally:
        algorithm.train()
    return torch.cat(predicted).cpu().numpy(), torch.cat(true).cpu().numpy()


def evaluate(
    algorithm: Any,
    splits: Sequence[Split],
    num_confounders: int,
    device: torch.device,
    precision: str = "fp32",
    num_workers: int = 0,
) -> dict[tuple[int, str], Accuracy]:
    """Accuracy of each split by its number and kind; splits of one environment share one pass over it.

    Groups are those of the true confounders, of a split that is annotated in part of the annotated examples only.
    """
    found = {}
    for env in dict.fromkeys(split.env for split in splits):
        here = [split for split in splits if split.env == env]
        keys, environment = np.concatenate([split.keys for split in here]), here[0].environment
        predicted, y = predictions(algorithm, environment, keys, device, precision, num_workers)
        groups = y * num_confounders + confounders(environment)[keys] if num_confounders > 1 else None
        ends = np.cumsum([len(split) for split in here])
        for split, end in zip(here, ends, strict=True):
            part = slice(end - len(split), end)
            own = None if groups is None else groups[part]
            found[split.number, split.kind] = measure((predicted == y)[part], own, split.annotated)
    return found


@dataclass(frozen=True)
class ExplanationPlan:
    """What is measured of explanations.

    Attributes:
        images: how many of each split, about (``subsets.choose``).
        seed: of the subset.
        method: of attribution, a name in ``METHODS`` or ``EVALUATION_METHODS`` of ``attribution``.
        fills: what stands in place of masked pixels, names in ``masking.FILLS``.
        batch_size: images at a time, at most; changes no number beyond rounding.
        inferred: the algorithm learned pseudo-confounders, of which the true ones say nothing: a confounder network's
            heatmap is that of its prediction.
    """

    images: int = 512
    seed: int = 0
    method: str = "grad_cam"
    fills: tuple[str, ...] = ("blur",)
    batch_size: int = 64
    inferred: bool = False


@dataclass(frozen=True)
class Explanations:
    """What the explanations of some images of a split are worth.

    Attributes:
        subset: which images, and the share of the split that each stands for.
        y, c, predicted: (n,) label, confounder (0 where none is known) and prediction of each.
        values: metric -> (n,) its value for each image; NaN where it has none.
    """

    subset: subsets.Subset
    y: Integers
    c: Integers
    predicted: Integers
    values: dict[str, NDArray[np.float64]]

    def means(self) -> dict[str, float]:
        """Each metric's mean over the split, estimated without bias; left out where no image has a value."""
        return self._means(self.subset.weights)

    def group_means(self) -> dict[int, dict[str, float]]:
        """The means over each non-empty group of the split."""
        return {g: self._means(self.subset.groups == g) for g in self.subset.sizes}

    def _means(self, weights: NDArray[Any]) -> dict[str, float]:
        known = {name: weights * ~np.isnan(values) for name, values in self.values.items()}  # (n,) each
        return {
            name: float(some @ np.nan_to_num(self.values[name]) / some.sum())
            for name, some in known.items()
            if some.any()
        }


def explanations(
    algorithm: Any,
    splits: Sequence[Split],
    num_confounders: int,
    device: torch.device,
    plan: ExplanationPlan,
    num_workers: int = 0,
) -> dict[tuple[int, str], Explanations]:
    """``split_explanations`` of each split, by its number and kind."""
    asked = num_confounders, device, plan, num_workers
    return {(split.number, split.kind): split_explanations(algorithm, split, *asked) for split in splits}


def split_explanations(
    algorithm: Any,
    split: Split,
    num_confounders: int,
    device: torch.device,
    plan: ExplanationPlan,
    num_workers: int = 0,
) -> Explanations:
    """Metrics of the explanations of what an algorithm predicts, image by image, in float32.

    The metrics are those of ``explanation_metrics``, by the names under which it records them: faithfulness with each
    fill, localisation where true masks are known, ``dead_maps``; of an algorithm with a mask of its own its IoU with
    the true mask and ``learned_mask_area``, its mean; of one with two networks ``map_overlap``, the soft IoU of their
    heatmaps for the true label and confounder (none where one of them is dead). The algorithm's mode is restored.

    Raises:
        NotImplementedError: no such attribution method.
        ValueError: the algorithm can't be explained (``explainers.Explainer``); a plan that means nothing.
    """
    explainer, environment = Explainer(algorithm, plan.method), split.environment
    subset = subsets.choose(split, plan.images, plan.seed, num_confounders)
    c, truth = confounders(environment)[subset.keys], masks(environment, subset.keys)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in evaluation_batches(environment, subset.keys, num_workers, device):
            yield from zip(x.split(plan.batch_size), torch.as_tensor(y).split(plan.batch_size), strict=True)

    columns: dict[str, list[NDArray[Any]]] = defaultdict(list)
    with evaluating(explainer.network), torch.no_grad():
        colour = mean_colour((x for x, _ in batches()), subset.weights) if "mean" in plan.fills else torch.zeros(1)
        for x, y in batches():
            done = sum(map(len, columns["y"]))
            part = slice(done, done + len(x))
            own = np.full_like(c[part], -1) if plan.inferred else c[part]
            targets = (y.to(device), torch.from_numpy(own).to(device)) if num_confounders > 1 else None
            found = _image_values(explainer, x, targets, None if truth is None else truth[part], colour, plan)
            for name, values in {"y": y, **found}.items():
                columns[name].append(values.cpu().numpy())
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return Explanations(subset, joined.pop("y"), c, joined.pop("predicted"), joined)


def mean_colour(batches: Iterable[Tensor], weights: NDArray[np.float64]) -> Tensor:
    """(C,) the weighted mean over images and their pixels; batched in any way, it is the same."""
    colours = torch.cat([x.double().mean(dim=(2, 3)).cpu() for x in batches])  # (n, C)
    return (torch.from_numpy(weights)[:, None] * colours).sum(dim=0).float()


def _image_values(
    explainer: Explainer,
    x: Tensor,
    targets: tuple[Tensor, Tensor] | None,
    truth: Tensor | None,
    colour: Tensor,
    plan: ExplanationPlan,
) -> dict[str, Tensor]:
    """The predicted labels (B,), then the metrics (B,) float64 of images (B, C, H, W).

    Args:
        targets: labels and confounders (B,), where confounders are known.
        truth: true masks (B, H, W), where they are known.
        colour: (C,) of the fill "mean".
    """
    logits, heatmaps = explainer.heatmaps(x)
    predicted, name = predicted_labels(logits), explanation_metrics.name
    found = {name("dead_maps"): ~similarities.is_live(heatmaps)}
    for fill in plan.fills:
        asked = explainer.network, x, heatmaps, predicted, masking.fill(x, fill, colour)
        metrics = explanation_metrics.faithfulness(*asked, batch_size=plan.batch_size)
        found |= {name(metric, fill): value for metric, value in metrics.items()}
    found |= _localisation(heatmaps, explainer.mask(x), None if truth is None else truth.to(x.device))
    found |= _overlap(explainer.pair(x, *targets) if targets else None)
    return {"predicted": predicted, **{name: value.double() for name, value in found.items()}}


def _localisation(heatmaps: Tensor, learned: Tensor | None, truth: Tensor | None) -> dict[str, Tensor]:
    """What heatmaps (B, h, w) and the algorithm's own masks (B, H, W) share with the true ones, as far as known.

    An empty true mask stands for an image that nobody annotated: its values are NaN.
    """
    name = explanation_metrics.name
    metrics = {} if truth is None else explanation_metrics.localisation(heatmaps, truth)
    if truth is not None and learned is not None:
        metrics["learned_mask_iou"] = explanation_metrics.learned_mask_iou(learned, truth)
    found = {name(metric): value for metric, value in metrics.items()}
    if truth is not None:
        annotated = (truth > explanation_metrics.HALF).flatten(1).any(dim=1)
        found = {metric: torch.where(annotated, value, torch.nan) for metric, value in found.items()}
    if learned is not None:
        found["learned_mask_area"] = learned.mean(dim=(1, 2))
    return found


def _overlap(pair: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """The overlap (B,) of two networks' heatmaps, negative values taken as zero."""
    if pair is None:
        return {}
    live = similarities.is_live(pair[0]) & similarities.is_live(pair[1])
    overlap = similarities.REGISTRY["soft_iou"](pair[0].relu(), pair[1].relu(), "max")
    return {explanation_metrics.name("map_overlap"): torch.where(live, overlap, torch.nan)}

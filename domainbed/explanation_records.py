"""What was measured of a run's explanations: a JSON line in a file of its own, its keys, writing and reading.

A line holds ``args`` of the run, ``explained`` (what was explained, and how) and, for each split, its metrics, those of
its groups, how many images were looked at, and how many the split has.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed import records

if TYPE_CHECKING:
    from domainbed.evaluation import ExplanationPlan, Explanations

logger = logging.getLogger(__name__)

EXPLANATIONS_FILE = "explanations.jsonl"

Place = tuple[int, str]  # environment, split


def metric_key(env: int, split: str, metric: str) -> str:
    """A metric's mean over a split, by a name that states fill and direction ("sufficiency_blur_lower")."""
    return f"env{env}_{split}_{metric}"


def group_metric_key(env: int, split: str, group: int, metric: str) -> str:
    """The same over group g = y * V + c; absent when the group is empty."""
    return f"env{env}_{split}_g{group}_{metric}"


def explained_key(env: int, split: str, group: int | None = None) -> str:
    """How many images of the split, or of one of its groups, were explained."""
    return f"env{env}_{split}_explained" if group is None else f"env{env}_{split}_g{group}_explained"


def images_key(env: int, split: str, group: int | None = None) -> str:
    """How many images the split, or one of its groups, has."""
    return f"env{env}_{split}_images" if group is None else f"env{env}_{split}_g{group}_images"


def direction(metric: str) -> str:
    """Which way a metric is better, "lower" or "higher", as its name says; "" where neither is."""
    end = metric.rpartition("_")[2]
    return end if end in ("lower", "higher") else ""


@dataclass(frozen=True)
class Settings:
    """What a line's numbers are of; lines that agree in all but the fills add up to one.

    Attributes:
        model: name of the model's file; "" for the one at the end of a training that stored none.
        step: of the model; -1 where nobody noted it.
        method: of attribution.
        n: number of images asked for.
        seed: of their choice.
        mask_dir: where true masks were taken from, if not from where the run had them.
    """

    model: str
    step: int
    method: str
    n: int
    seed: int
    mask_dir: str = ""

    @classmethod
    def of(cls, plan: "ExplanationPlan", model: str, step: int, mask_dir: str = "") -> "Settings":
        return cls(model, step, plan.method, plan.images, plan.seed, mask_dir)


def line(
    args: Mapping[str, Any],
    settings: Settings,
    fills: Sequence[str],
    measured: Mapping[Place, "Explanations"],
    num_groups: int,
) -> dict[str, Any]:
    """The line of what was measured.

    Args:
        args: of the run.
        fills: those of the metrics.
        measured: by environment number and kind of split.
        num_groups: K * V; up to ``records.MAX_GROUPS_WRITTEN`` of them are written one by one, if there are any.
    """
    record: dict[str, Any] = {"args": dict(args), "explained": asdict(settings) | {"fills": list(fills)}}
    for place, found in measured.items():
        sizes = found.subset.sizes
        record |= {metric_key(*place, metric): mean for metric, mean in found.means().items()}
        record |= {explained_key(*place): len(found.subset.keys), images_key(*place): sum(sizes.values())}
        if not found.subset.grouped or num_groups > records.MAX_GROUPS_WRITTEN:
            continue
        for g, means in found.group_means().items():
            record |= {group_metric_key(*place, g, metric): mean for metric, mean in means.items()}
            record |= {explained_key(*place, g): found.subset.counts[g], images_key(*place, g): sizes[g]}
    return record


def write(
    directory: str | Path,
    args: Mapping[str, Any],
    settings: Settings,
    fills: Sequence[str],
    measured: Mapping[Place, "Explanations"],
    num_groups: int,
) -> dict[str, Any]:
    """Appends the ``line`` of these arguments to the run's file, and returns it."""
    record = line(args, settings, fills, measured, num_groups)
    records.append(Path(directory, EXPLANATIONS_FILE), record)
    return record


def settings_of(record: Mapping[str, Any]) -> Settings:
    """What the line's numbers are of."""
    return Settings(**{key: value for key, value in record["explained"].items() if key != "fills"})


def places(record: Mapping[str, Any]) -> list[Place]:
    """The splits that a line speaks of, in order."""
    found = (re.fullmatch(r"env(\d+)_([a-z]+)_explained", key) for key in record)
    return sorted((int(match[1]), match[2]) for match in found if match)


def metrics(record: Mapping[str, Any], env: int, split: str) -> dict[str, float]:
    """Means over a split, by metric."""
    return _of(record, f"env{env}_{split}_")


def group_metrics(record: Mapping[str, Any], env: int, split: str) -> dict[int, dict[str, float]]:
    """Means over each of a split's groups, by metric; empty where no confounder is known."""
    found = (re.fullmatch(rf"env{env}_{split}_g(\d+)_explained", key) for key in record)
    groups = sorted(int(match[1]) for match in found if match)
    return {g: _of(record, f"env{env}_{split}_g{g}_") for g in groups}


def _of(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    names = [key.removeprefix(prefix) for key in record if key.startswith(prefix)]
    own = [name for name in names if not re.match(r"g\d+_", name) and name not in ("explained", "images")]
    return {name: record[prefix + name] for name in own}


def is_explained(record: Any) -> bool:
    """Whether what a file's line holds says which run it is of, and what was explained."""
    explained = records.names_run(record) and record.get("explained")
    if not isinstance(explained, dict) or not isinstance(explained.get("fills"), list):
        return False
    try:
        settings = asdict(settings_of(record))
    except TypeError:  # keys that are missing, or of another version
        return False
    numbers = ("step", "n", "seed")
    fitting = all(isinstance(value, int if key in numbers else str) for key, value in settings.items())
    return fitting and all(isinstance(fill, str) for fill in explained["fills"])


def read(directory: str | Path) -> list[dict[str, Any]]:
    """A run's lines, those of equal settings as one: a number that was measured again replaces the earlier one.

    Warns of lines that hold no explanations, and skips them.
    """
    path = Path(directory, EXPLANATIONS_FILE)
    lines, skipped = records.read(path, is_explained) if path.is_file() else ([], 0)
    if skipped:
        logger.warning("%s: skipped %d line(s) that hold no explanations", path, skipped)
    found: dict[Settings, dict[str, Any]] = {}
    for record in lines:
        earlier = found.get(settings_of(record), {"explained": {"fills": []}})
        fills = dict.fromkeys([*earlier["explained"]["fills"], *record["explained"]["fills"]])
        explained = record["explained"] | {"fills": list(fills)}
        found[settings_of(record)] = {**earlier, **record, "explained": explained}
    return list(found.values())


def iterate(directory: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of every job directly under a sweep's directory, jobs in name order."""
    for path in sorted(Path(directory).glob(f"*/{EXPLANATIONS_FILE}")):
        yield from read(path.parent)

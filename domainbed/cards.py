"""Dataset cards: what a dataset holds as text, and a contact sheet of its images. Arrays and images in, no files."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from domainbed.records import MAX_GROUPS_WRITTEN

Integers = NDArray[np.int64]

EXTREMES = 10  # groups from each end that are shown where there are more than MAX_GROUPS_WRITTEN
PICTURES = 8  # of a row of the contact sheet
SIDE, GAP, MARGIN = 96, 4, 10  # px: of a picture, between pictures, beside titles
PARTS = ("Source", "Licence", "Layout")  # what a docstring should say
SPLITS = {  # names of parts of a release -> the role of the environments that hold them
    "train": "training",
    "training": "training",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Environment:
    """What a card says of an environment.

    Attributes:
        name: of the environment.
        role: "training", "validation" or "test".
        counts: (G,) images of each group, or of each class where no confounder is known.
    """

    name: str
    role: str
    counts: Integers


def description(docstring: str | None, expected: Iterable[str] = PARTS) -> str:
    """A class's docstring, and which of the expected parts it lacks."""
    text = inspect.cleandoc(docstring or "The class has no docstring.")
    silent = [part for part in expected if f"{part}:" not in text]
    return f"{text}\n\nNot stated: {', '.join(silent)}." if silent else text


def few(names: Sequence[str], most: int = EXTREMES, separator: str = ", ") -> str:
    """The names, or the first ones and how many follow."""
    if len(names) <= most:
        return separator.join(names)
    return f"{separator.join(names[:most])} and {len(names) - most} more"


def shown_groups(totals: Integers) -> list[int]:
    """All groups, in order; of too many the largest and the smallest that are not empty, largest first."""
    if len(totals) <= MAX_GROUPS_WRITTEN:
        return list(range(len(totals)))
    order = [int(g) for g in np.argsort(-totals, kind="stable") if totals[g]]
    return list(dict.fromkeys(order[:EXTREMES] + order[-EXTREMES:]))


def share(count: int, total: int) -> str:
    """A count with its share of the total: "56 (1.2 %)"."""
    if not count:
        return "0"
    percent = 100 * count / total
    return f"{count} ({f'{percent:.1f}' if percent >= 0.05 else '<0.1'} %)"


def group_table(environments: Sequence[Environment], names: Sequence[str], title: str = "group") -> str:
    """Groups in lines, environments in columns: how many images, and their share of the environment's.

    Several training environments are followed by their sum.

    Args:
        names: of the groups.
        title: what a line is: "group" or "class".
    """
    columns = [(f"{e}: {env.name}", env.role, env.counts) for e, env in enumerate(environments)]
    training = [env.counts for env in environments if env.role == "training"]
    if len(training) > 1:
        columns.append(("all training", "", np.sum(training, axis=0)))
    shown = shown_groups(np.sum([env.counts for env in environments], axis=0))
    lines = [[title, *(name for name, _, _ in columns)], ["", *(role for _, role, _ in columns)]]
    lines += [[names[g], *(share(int(counts[g]), int(counts.sum())) for _, _, counts in columns)] for g in shown]
    lines.append(["all", *(str(counts.sum()) for _, _, counts in columns)])
    text = aligned(lines)
    if len(shown) < len(names):
        plural = "classes" if title == "class" else f"{title}s"
        text += f"\nShown: the {EXTREMES} largest and the {EXTREMES} smallest non-empty ones of {len(names)} {plural}."
    return text


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as they need: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def unseen_groups(environments: Sequence[Environment], names: Sequence[str], title: str = "group") -> str:
    """A sentence on the groups of the test environments that never occur in training."""
    seen, tested = (_occurring(environments, role) for role in ("training", "test"))
    if not (unseen := np.flatnonzero(tested & ~seen)).size:
        return f"Every {title} of the test environments occurs in training."
    listed = few([names[int(g)] for g in unseen], 2 * EXTREMES, "; ")
    return f"In the test environments but never in training ({len(unseen)} of {tested.sum()}): {listed}."


def _occurring(environments: Sequence[Environment], role: str) -> NDArray[np.bool_]:
    counts = [env.counts > 0 for env in environments if env.role == role]
    return np.any(counts, axis=0) if counts else np.zeros(len(environments[0].counts), dtype=bool)


def parts(environments: Sequence[Environment], more: Mapping[str, Sequence[int]]) -> dict[str, Integers]:
    """What a release may count, by name: its splits, "all", the environments, and what the dataset itself counts."""
    roles = {name: [env.counts for env in environments if env.role == role] for name, role in SPLITS.items()}
    found = {name: np.sum(counts, axis=0) for name, counts in roles.items() if counts}
    found["all"] = np.sum([env.counts for env in environments], axis=0)
    found |= {env.name: env.counts for env in environments}
    return found | {name: np.asarray(counts) for name, counts in more.items()}


def published(release: Mapping[str, Any], here: Mapping[str, Integers], names: Sequence[str]) -> str:
    """What is here against what the release is known to hold.

    Args:
        release: images, or images of each group, by the name of a part.
        here: (G,) images of each group, by the name of a part.
        names: of the groups.
    """
    if not release:
        return "Published counts: none are recorded for this dataset."
    lines, official = [], True
    for part, counts in release.items():
        found = _differences(counts, here[part], names) if part in here else ["    no such part here"]
        official = official and not found
        lines += [f"  {part}: {'differs' if found else 'as published'}", *found]
    verdict = "these files have them" if official else "this is not the official release"
    return "\n".join([f"Published counts: {verdict}.", *lines])


def _differences(expected: Any, counts: Integers, names: Sequence[str]) -> list[str]:
    """A line for the part, or for each of its groups, whose count is not the expected one."""
    if isinstance(expected, int):
        counts, expected, names = counts.sum(keepdims=True), [expected], ["images"]
    if len(expected) != len(counts):
        return [f"    {len(counts)} groups here, {len(expected)} published"]
    return [
        f"    {name}: {n} here, {wanted} published"
        for name, n, wanted in zip(names, counts, expected, strict=True)
        if n != wanted
    ]


def choose(groups: Integers, shown: Iterable[int], rng: np.random.Generator, most: int = PICTURES) -> list[Integers]:
    """For each of the groups shown, the positions of up to ``most`` random images that belong to it, in order.

    Args:
        groups: (N,) of each image.
    """
    rows = []
    for g in shown:
        members = np.flatnonzero(groups == g)
        rows.append(np.sort(rng.choice(members, min(most, len(members)), replace=False)))
    return rows


def to_picture(x: NDArray[np.float32]) -> Image.Image:
    """An image (C, H, W) with values in [0, 1] as RGB; two channels are shown as red and green.

    Values beyond [0, 1] are stretched, lowest to black and highest to white.
    """
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        x = (x - low) / ((high - low) or 1)
    if len(x) == 1:
        x = np.repeat(x, 3, axis=0)
    elif len(x) == 2:
        x = np.concatenate([x, np.zeros_like(x[:1])])
    return Image.fromarray(np.round(x[:3].transpose(1, 2, 0) * 255).astype(np.uint8))


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures beside their titles."""
    font = ImageFont.load_default(size=12)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * MARGIN + int(max(pen.multiline_textbbox((0, 0), title, font)[2] for title, _ in rows))
    step = SIDE + GAP
    sheet = Image.new("RGB", (left + PICTURES * step, GAP + len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, pictures) in enumerate(rows):
        top = GAP + row * step
        pen.multiline_text((MARGIN, top + SIDE // 2), title, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture), (left + column * step, top))
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture as large as a cell allows; enlarged pixels stay squares."""
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(scale * length)) for length in picture.size)
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)  # type: ignore[arg-type]

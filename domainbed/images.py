"""Image files as a pool: opened as RGB, checked before training, known by a fingerprint of their list and contents."""

import functools
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from domainbed import machine
from domainbed.messages import listed
from domainbed.metadata import escapes

ImageFile.LOAD_TRUNCATED_IMAGES = True  # some public photographs lack their last bytes

CACHE_VARIABLE = "DOMAINBED_CACHE"
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROPS = ("original", "resized", "none")

CHUNK = 256  # images between two looks at the clock
LOG_EVERY_S = 10.0
SAMPLE = 28  # pixels of a side at which an image is looked at; a JPEG of 224 can be decoded at an eighth
SHOWN = 0.1  # of an image's rows, to call it a photograph that lacks its last bytes
BLANK = "next to nothing of it can be decoded"

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Images:
    """A pool of image files.

    Attributes:
        root: the folder.
        paths: of the files, relative to the folder, with forward slashes.
        size: the network sees size x size pixels.
        crop: what random crops of training images are cut from: the "original" image, the image "resized" (squashed)
            to size x size first, or "none".
        source: the file that lists them, for messages.
        lines: (N,) where in it they stand.
    """

    root: Path
    paths: tuple[str, ...]
    size: int = 224
    crop: str = "original"
    source: Path | None = None
    lines: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r} is unknown; choose among {', '.join(CROPS)}")
        if self.size < 1:
            raise ValueError(f"image size {self.size}: give the pixels of a side, 224 say")

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, position: int) -> Image.Image:
        """The image at a position, as RGB.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it can't be read as an image.
        """
        path = self.root / self.paths[position]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise
        except Exception as error:  # PIL raises many types for damaged files
            raise ValueError(f"{path}: not an image that can be read ({_reason(error)})") from error

    @functools.cached_property
    def list_key(self) -> str:
        """A hash of folder and paths."""
        return _hash([os.path.abspath(self.root), *self.paths])

    def content_key(self) -> str:
        """A hash of the files' sizes and times of change (ns), as they are now.

        Raises:
            FileNotFoundError: files are missing.
        """
        return _hash(f"{stat.st_size} {stat.st_mtime_ns}" for stat in map(self._stat, self.paths))

    def _stat(self, path: str) -> os.stat_result:
        return os.stat(self.root / path)

    def check(self) -> None:
        """Decodes every file; a pool that was found sound is not decoded again while its files stay the same.

        Raises:
            ValueError: files are missing, unreadable, named twice or outside the folder; the message lists the first
                ones and counts all.
        """
        try:
            stamp = cache_directory() / f"decoded_{_hash([self.list_key, self.content_key()])[:32]}.json"
        except (OSError, ValueError):  # a file is missing, or has a name that can't be
            stamp = None
        if stamp is not None and stamp.exists():
            return
        problems = list(self._problems())
        if problems:
            bad = f"{len(problems)} of {len(self)} images in {self.root} can't be used"
            raise ValueError(listed(f"{bad}; replace them, or take them out of {self.source or 'the list'}:", problems))
        if stamp is not None:
            _leave_stamp(stamp, len(self))

    def _problems(self) -> Iterator[str]:
        lines = zip(self.paths, self.lines, strict=False)  # none if there is no source
        names = {path: path for path in self.paths} | {path: f"line {line}: {path}" for path, line in lines}
        yield from (f"{names[path]}: named twice" for path, n in sorted(Counter(self.paths).items()) if n > 1)
        yield from (f"{names[path]}: {trouble}" for path, trouble in troubles(self.root, list(names)) if trouble)


def in_threads(work: Callable[[T], R], items: Sequence[T], report: Callable[[int], None]) -> list[R]:
    """What ``work`` makes of each item. Threads, one a core, suffice: PIL decodes and resizes without Python's lock.

    Args:
        report: is told every ten seconds how many items are done.
    """
    found: list[R] = []
    logged = time.monotonic()
    with ThreadPoolExecutor(machine.cores()) as pool:
        for start in range(0, len(items), CHUNK):
            found += pool.map(work, items[start : start + CHUNK])
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                report(len(found))
    return found


def troubles(root: Path, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each path with what is wrong with the file, "" for most."""

    def report(done: int) -> None:
        logger.info("checked %d of %d images in %s, once for all jobs", done, len(paths), root)

    for path, trouble in zip(paths, in_threads(functools.partial(_trouble, root), paths, report), strict=True):
        yield path, "" if trouble == BLANK and _is_whole(root / path) else trouble


def _trouble(root: Path, path: str) -> str:
    """What is wrong with a file; BLANK where so few rows show anything that it may be damaged, or a blank image."""
    if escapes(path):
        return "leads out of the folder"
    try:
        with Image.open(root / path) as image:
            image.draft("RGB", (SAMPLE, SAMPLE))  # takes half as long
            pixels = np.asarray(image.resize((SAMPLE, SAMPLE), Image.Resampling.NEAREST).convert("RGB"))
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # PIL raises many types for damaged files
        return f"not an image that can be read ({_reason(error)})"
    shown = np.ptp(pixels, axis=1).max(axis=1) > 1  # what could not be decoded is black, or grey within a level
    return "" if shown.mean() >= SHOWN else BLANK


def _is_whole(path: Path) -> bool:
    """Whether a file decodes without PIL's leniency, which is one for all threads: no other may decode meanwhile."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # as above
        return False
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    return True


def _reason(error: Exception) -> str:
    return "of no known kind" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def cache_directory() -> Path:
    """Where what is derived from images is kept, never beside them: ``$DOMAINBED_CACHE``, or the user's cache.

    The folder need not exist yet.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domainbed"


def _hash(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _leave_stamp(path: Path, n: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": n}), encoding="utf-8")
    except OSError:  # then the next run looks again
        return


def image_files(folder: Path) -> list[str]:
    """The image files below a folder, relative to it, with forward slashes; hidden ones are left out.

    They are in torchvision's order: folders by path, the files of each by name.
    """
    found = []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".") and name.lower().endswith(EXTENSIONS)]
        found += [(directory, name) for name in names]
    relative = {directory: Path(directory).relative_to(folder) for directory, _ in found}
    return [f"{inside}/{name}" if (inside := relative[d].as_posix()) != "." else name for d, name in sorted(found)]

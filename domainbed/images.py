"""Image files as a pool: opened as RGB, checked before training, known by a fingerprint of their list and contents."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile

from domainbed.messages import listed
from domainbed.metadata import escapes

ImageFile.LOAD_TRUNCATED_IMAGES = True  # some public photographs lack their last bytes

CACHE_VARIABLE = "DOMAINBED_CACHE"
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROPS = ("original", "resized", "none")


@dataclass(frozen=True, eq=False)
class Images:
    """A pool of image files.

    Attributes:
        root: the folder.
        paths: of the files, relative to the folder, with forward slashes.
        size: the network sees size x size pixels.
        crop: what random crops of training images are cut from: the "original" image, the image "resized" (squashed)
            to size x size first, or "none".
    """

    root: Path
    paths: tuple[str, ...]
    size: int = 224
    crop: str = "original"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r} is unknown; choose among {', '.join(CROPS)}")
        if self.size < 1:
            raise ValueError(f"image size {self.size}: give the pixels of a side, 224 say")

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, position: int) -> Image.Image:
        """The image at a position, as RGB."""
        with Image.open(self.root / self.paths[position]) as image:
            return image.convert("RGB")

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
        """Opens every file's header; a pool that was found sound is not opened again while its files stay the same.

        Raises:
            ValueError: files are missing, unreadable, named twice or outside the folder; the message lists the first
                ones and counts all.
        """
        try:
            stamp = cache_directory() / f"checked_{_hash([self.list_key, self.content_key()])[:32]}.json"
        except OSError:  # a file is missing
            stamp = None
        if stamp is not None and stamp.exists():
            return
        problems = list(self._problems())
        if problems:
            bad = f"{len(problems)} of {len(self)} images in {self.root} can't be used"
            raise ValueError(listed(f"{bad}; replace them, or take them out of the list:", problems))
        if stamp is not None:
            _leave_stamp(stamp, len(self))

    def _problems(self) -> Iterator[str]:
        twice = {path for path, n in Counter(self.paths).items() if n > 1}
        yield from (f"{path}: named twice" for path in sorted(twice))
        for path in dict.fromkeys(self.paths):
            if escapes(path):
                yield f"{path}: leads out of the folder"
                continue
            try:
                with Image.open(self.root / path):
                    pass
            except FileNotFoundError:
                yield f"{path}: no such file"
            except Exception as error:  # PIL raises many types for damaged headers
                yield f"{path}: not an image that can be read ({type(error).__name__})"


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

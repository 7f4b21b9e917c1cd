"""A pool's images decoded once into one file that every job on the machine maps into its memory.

The file is named by the files it was made from: their list names its folder, their sizes and times of change name the
file. So a file under its final name is whole and fresh, and one whose images have changed is never found again.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from domainbed.images import CACHE_VARIABLE, Images, cache_directory, in_threads

FORMAT = 1
SUFFIX, PARTIAL = ".uint8", ".partial"
FORGOTTEN_S = 86400.0  # a partial file of another machine that was not written to for a day has no builder

logger = logging.getLogger(__name__)


def squash(image: Image.Image, size: int) -> Image.Image:
    """The image resized to size x size whatever its shape: what torchvision's Resize((size, size)) does."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


class ImageCache:
    """N decoded images of S x S pixels, and the sizes they had.

    Args:
        path: the file: the pixels, then the sizes.
        count: N.
        size: S.

    Attributes:
        pixels: (N, S, S, 3) uint8 RGB, mapped, read-only.
        original: (N, 2) int32, heights and widths of the files' images.
    """

    pixels: NDArray[np.uint8]
    original: NDArray[np.int32]

    def __init__(self, path: Path, count: int, size: int):
        self.path, self.count, self.size = path, count, size
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        pixels, original = np.split(content, [count * size * size * 3])
        self.pixels = pixels.reshape(count, size, size, 3)
        self.original = np.frombuffer(original.tobytes(), np.int32).reshape(count, 2)

    def __reduce__(self) -> tuple[Any, ...]:  # a loader process that is not forked maps the file anew
        return ImageCache, (self.path, self.count, self.size)

    def __len__(self) -> int:
        return self.count


def open_cache(images: Images) -> ImageCache:
    """The decoded images of a pool, decoded now if no job has done so since its files changed.

    Raises:
        FileNotFoundError, ValueError: an image is missing, can't be decoded, or changes meanwhile.
        OSError: no space, or no folder that may be written to.
    """
    content = images.content_key()
    name = f"{content[:32]}_pillow_{PIL.__version__}{SUFFIX}"  # another decoder may give other pixels
    folder = Path(f"v{FORMAT}_{len(images)}_images_{images.size}px_{images.list_key[:32]}")
    path = cache_directory() / folder / name
    if not _is_whole(path, images):
        _build(images, content, path)
    return ImageCache(path, len(images), images.size)


def _bytes(images: Images) -> int:
    return len(images) * (images.size**2 * 3 + 8)


def _is_whole(path: Path, images: Images) -> bool:
    return path.exists() and path.stat().st_size == _bytes(images)


def _build(images: Images, content: str, path: Path) -> None:
    """Writes the file under another name and moves it into place; one process at a time where the locks work."""
    folder = path.parent
    _make_writable(folder)
    with _lock(folder) as alone:
        if _is_whole(path, images):  # another process was quicker
            return
        _remove_partial(folder, alone)
        if shutil.disk_usage(folder).free < _bytes(images):
            raise _no_space(images, folder)
        partial = path.with_name(f"{path.name}.{socket.gethostname()}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            _decode_all(images, partial)
            if images.content_key() != content:
                raise ValueError(f"images in {images.root} changed while they were decoded; start again")
            os.replace(partial, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(images, folder) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        for stale in set(folder.glob(f"*_pillow_{PIL.__version__}{SUFFIX}")) - {path}:
            stale.unlink(missing_ok=True)  # jobs that have it mapped keep it


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EACCES)
    if reason:
        raise PermissionError(f"{folder} can't be written to ({reason}); name another in ${CACHE_VARIABLE}")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Waits until no other process builds in the folder; False: this is not known.

    A POSIX record lock: it vanishes with its process. Without working locks several processes may decode the same
    images; each moves a whole file into place.
    """
    with open(folder / "lock", "a", encoding="utf-8") as file:
        alone = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                logger.info("waiting for another process that decodes the same images into %s", folder)
                fcntl.lockf(file, fcntl.LOCK_EX)
            else:
                alone = False
                logger.warning("no file locks in %s (%s): several jobs may decode the same images", folder, error)
        yield alone


def _remove_partial(folder: Path, alone: bool) -> None:
    """Removes what killed builders left: on this machine, if no other one lives here; on others, after a day."""
    for path in folder.glob(f"*{PARTIAL}"):
        ours = f".{socket.gethostname()}." in path.name
        if (alone and ours) or time.time() - path.stat().st_mtime > FORGOTTEN_S:
            path.unlink(missing_ok=True)


def _no_space(images: Images, folder: Path) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"the {len(images)} decoded images of {images.root} take {_bytes(images) / 1e9:.3f} GB, and {folder} has "
        f"{shutil.disk_usage(folder).free / 1e9:.3f} GB free; make room, name a folder on another disk in "
        f"${CACHE_VARIABLE}, or take --input_pipeline pil",
    )


def _decode_all(images: Images, path: Path) -> None:
    """Writes the pixels of all images, then their sizes."""
    logger.info("decoding %d images of %s into %s, %.3f GB", len(images), images.root, path, _bytes(images) / 1e9)
    per_image = images.size**2 * 3
    original = np.empty((len(images), 2), np.int32)
    with open(path, "wb") as file:

        def decode(position: int) -> None:
            pixels, original[position] = _decode(images, position)
            os.pwrite(file.fileno(), pixels.data, position * per_image)

        in_threads(decode, range(len(images)), lambda done: logger.info("decoded %d of %d images", done, len(images)))
        file.seek(len(images) * per_image)
        file.write(original.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _decode(images: Images, position: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    image = images.open(position)
    return np.asarray(squash(image, images.size)), (image.height, image.width)

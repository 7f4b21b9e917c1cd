"""What a dataset's files are, where they belong, and the way from archives to a folder that datasets read."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from domainbed.downloading import RECORD, Archive, Pause, Progress, bytes_there, forget, obtain, silent
from domainbed.unpacking import locate, unpack

DOWNLOADS = ".downloads"  # below --data_dir: archives, and folders that are being unpacked
IMAGES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
COMPLETE = "complete"
_RESERVE = 100 << 20


@dataclass(frozen=True)
class Release:
    """The files of a dataset as they are published, and the folder that they make.

    Args:
        folder: where they belong, below --data_dir.
        archives: what to download.
        contains: names at the top of the finished folder.
        licence: under which the files are given.
        counts: images below each part of the folder ("" is all of it), as published; several releases count if several
            are in use.
        arrange: turns what was unpacked into the folder; None: it is the one that holds ``contains``.
        files: small text files to write into the folder, by name.
        also: other places below --data_dir at which a user may have put the folder.
        growth: bytes unpacked per byte of the archives, for the question whether the disk has room.
        gone: why it probably can't be had, and what to do then.
    """

    folder: str
    archives: tuple[Archive, ...]
    contains: tuple[str, ...]
    licence: str
    counts: tuple[Mapping[str, int], ...] = ()
    arrange: Callable[[Path], None] | None = None
    files: Mapping[str, str] | None = None
    also: tuple[str, ...] = ()
    growth: float = 1.1
    gone: str = ""


def place(release: Release, data_dir: Path) -> Path:
    """The release's folder: the first place where something is, else where it would be put."""
    places = [data_dir / folder for folder in (release.folder, *release.also)]
    there = [folder for folder in places if any((folder / name).exists() for name in release.contains)]
    return there[0] if there else places[0]


def differences(release: Release, folder: Path) -> list[str]:
    """How a folder differs from what is published; nothing if it doesn't."""
    missing = [name for name in release.contains if not (folder / name).exists()]
    if missing:
        return [f"{folder} lacks {', '.join(missing)}"]
    if not release.counts:
        return []
    found = {part: _count_images(folder / part) for counts in release.counts for part in counts}
    if any(all(found[part] == number for part, number in counts.items()) for counts in release.counts):
        return []
    nearest = release.counts[0]
    wrong = {part: number for part, number in nearest.items() if found[part] != number}
    return [f"{folder / part} holds {found[part]:,} images, {number:,} are published" for part, number in wrong.items()]


def state(release: Release, data_dir: Path) -> str:
    """Whether the files are there: complete, differing, partial, missing, or missing and probably gone."""
    folder = place(release, data_dir)
    if folder.exists() and any((folder / name).exists() for name in release.contains):
        wrong = differences(release, folder)
        return f"differs: {'; '.join(wrong)}" if wrong else COMPLETE
    have = sum(bytes_there(archive, data_dir / DOWNLOADS) for archive in release.archives)
    if have:
        size = size_text(release.archives)
        return f"partial: {have:,} of {size}" if size.endswith("bytes") else f"partial: {have:,} bytes, {size}"
    return f"cannot be had: {release.gone}" if release.gone else "missing"


def install(
    release: Release,
    data_dir: Path,
    progress: Callable[[Archive], Progress] = lambda archive: silent,
    keep_archives: bool = False,
    pause: Pause = time.sleep,
) -> bool:
    """Downloads, checks and unpacks a release, unless it is complete; its folder appears at the end, as a whole.

    Args:
        release: what to install.
        data_dir: the directory of all datasets.
        progress: makes what shows an archive's progress.
        keep_archives: leave the archives in ``data_dir/.downloads``.
        pause: waits some seconds before another attempt.

    Returns:
        Whether anything had to be done.

    Raises:
        ValueError: the folder is there and differs from what is published; an archive is damaged or not safe.
        FileNotFoundError, ConnectionError, ImportError: an archive can't be had.
        OSError: no room on the disk, or no right to write.
    """
    folder = place(release, data_dir)
    if folder.exists() and any((folder / name).exists() for name in release.contains):
        wrong = differences(release, folder)
        if wrong:
            raise ValueError(
                f"{'; '.join(wrong)}; nothing was changed: complete it, or move it away and run this again"
            )
        return False
    target, downloads = data_dir / release.folder, data_dir / DOWNLOADS
    _prepare(release, target, downloads)
    try:
        archives = [obtain(archive, downloads, progress(archive), pause) for archive in release.archives]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{'. ' + release.gone if release.gone else ''}") from error
    unpacked = downloads / (release.folder.replace("/", "-") + ".unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)  # of an attempt that was interrupted
    unpacked.mkdir()
    for archive in archives:
        try:
            unpack(archive, unpacked)
        except ValueError as error:
            raise ValueError(f"{error}; {forget(archive)}") from error
    if release.arrange is not None:
        release.arrange(unpacked)
    done = locate(unpacked, release.contains)
    for name, text in (release.files or {}).items():
        (done / name).write_text(text, encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    done.rename(target)
    shutil.rmtree(unpacked, ignore_errors=True)
    if not keep_archives:
        for archive in archives:
            archive.unlink()
    return True


def recorded(archive: Archive, data_dir: Path) -> str | None:
    """The SHA-256 that an archive had when it was downloaded; a later download is compared with it."""
    record = data_dir / DOWNLOADS / (archive.name + RECORD)
    return record.read_text(encoding="utf-8").split()[0] if record.exists() else None


def size_text(archives: Iterable[Archive]) -> str:
    """The bytes of all archives together, with a word on how far they are known."""
    archives = list(archives)
    total = sum(archive.size or archive.about for archive in archives)
    if not total:
        return "size not published"
    if all(archive.size is not None for archive in archives):
        return f"{total:,} bytes"
    known = all(archive.size or archive.about for archive in archives)
    return f"{'about' if known else 'more than'} {total:,} bytes"


def markdown(releases: Mapping[str, Release]) -> str:
    """Two tables for the docs: what becomes of each dataset, and what is known of each archive."""
    users: dict[str, list[str]] = {}
    for name, release in releases.items():
        users.setdefault(release.folder, []).append(name)
    distinct = {release.folder: release for release in releases.values()}
    lines = ["| datasets | folder | download | images | licence |", "|---|---|---|---|---|"]
    for folder, release in distinct.items():
        images = " or ".join(f"{sum(counts.values()):,}" for counts in release.counts) or "not checked"
        names = ", ".join(f"`{name}`" for name in users[folder])
        lines.append(f"| {names} | `{folder}` | {size_text(release.archives)} | {images} | {release.licence} |")
    lines += ["", "| archive | size | checksum | published by |", "|---|---|---|---|"]
    for release in distinct.values():
        for archive in release.archives:
            checksums = ", ".join(map(short, archive.checksums)) or "none published"
            lines.append(f"| {archive.name} | {size_text([archive])} | {checksums} | {archive.source or '-'} |")
    return "\n".join(lines) + "\n"


def short(checksum: str) -> str:
    """A checksum's first digits, for tables."""
    algorithm, _, digits = checksum.partition(":")
    return f"{algorithm}:{digits[:12]}"


def _prepare(release: Release, target: Path, downloads: Path) -> None:
    """Makes the folder for archives, and sees that nothing is in the way and that the disk has room."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} holds something else; move it away and run this again")
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--data_dir: {downloads} can't be made ({error.strerror}); name another") from error
    if not os.access(downloads, os.W_OK | os.X_OK):
        raise PermissionError(f"--data_dir: {downloads} is not writable; change its mode or name another")
    sizes = sum(archive.size or archive.about for archive in release.archives)
    have = sum(bytes_there(archive, downloads) for archive in release.archives)
    needed = max(sizes - have, 0) + int(sizes * release.growth) + _RESERVE
    free = shutil.disk_usage(downloads).free
    if free < needed:
        raise OSError(
            f"{downloads} has {free:,} bytes free, about {needed:,} are needed; make room or name another disk"
        )


def _count_images(folder: Path) -> int:
    return sum(os.path.splitext(name)[1].lower() in IMAGES for _, _, names in os.walk(folder) for name in names)

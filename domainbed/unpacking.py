"""Archives into folders: nothing is ever written outside the folder, and damage is an error."""

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath

_DAMAGED = (tarfile.ReadError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile)
_JUNK = "__MACOSX"  # a Mac's shadow of the whole tree, in zips made there


def unpack(archive: Path, target: Path) -> None:
    """Unpacks a .tar, .tar.gz, .tgz, .zip or .gz into the folder; any other file is copied there.

    Raises:
        ValueError: the archive is damaged, or a member would land outside the folder, links there, or is no file,
            folder or link.
    """
    name = archive.name
    try:
        if name.endswith((".tar", ".tar.gz", ".tgz")):
            _unpack_tar(archive, target)
        elif name.endswith(".zip"):
            _unpack_zip(archive, target)
        elif name.endswith(".gz"):
            with gzip.open(archive) as packed, (target / name.removesuffix(".gz")).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        else:
            shutil.copyfile(archive, target / name)
    except _DAMAGED as error:
        raise ValueError(f"{archive} is damaged or cut off ({error})") from error


def locate(root: Path, contains: Collection[str]) -> Path:
    """The one folder at or below root, of those nearest to it, that holds all these names.

    Raises:
        ValueError: no such folder, or several at the same depth.
    """
    level = [root]
    while level:
        found = [folder for folder in level if all((folder / name).exists() for name in contains)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{', '.join(map(str, found))} all hold {', '.join(contains)}; which one is meant?")
        level = [sub for folder in level for sub in folder.iterdir() if sub.is_dir() and not sub.is_symlink()]
    raise ValueError(f"nothing that was unpacked holds {', '.join(contains)}: this is another archive")


def _unpack_tar(archive: Path, target: Path) -> None:
    def checked(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        _check_name(member.name, archive)
        try:
            return tarfile.data_filter(member, folder)
        except tarfile.FilterError as error:
            raise ValueError(f"{archive} is not safe to unpack: {error}") from error

    if not hasattr(tarfile, "data_filter"):
        raise NotImplementedError("this Python unpacks tar archives unsafely; use 3.11.4 or newer")
    with gzip.open(archive) if archive.name.endswith("gz") else archive.open("rb") as stream:
        with tarfile.open(fileobj=stream, mode="r:") as packed:
            packed.extractall(target, filter=checked)
        while stream.read(1 << 20):  # to the end, where gzip's own checksum is
            pass


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        members = [member for member in packed.infolist() if PurePosixPath(member.filename).parts[:1] != (_JUNK,)]
        for member in members:
            _check_name(member.filename, archive)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"{archive} is not safe to unpack: {member.filename} is a link or a device")
            if member.flag_bits & 1:
                raise ValueError(f"{archive} needs a password: {member.filename} is encrypted")
        for member in members:
            packed.extract(member, target)


def _check_name(name: str, archive: Path) -> None:
    windows = PureWindowsPath(name)  # understands both kinds of slashes, and drives
    if windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{archive} is not safe to unpack: {name} leads out of the folder")

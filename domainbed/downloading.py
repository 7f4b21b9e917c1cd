"""Archives from the network: resumed where a connection broke, checked before they count as there."""

import hashlib
import http.client
import logging
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

ATTEMPTS = 5  # in a row without a byte of progress
BLOCK = 1 << 20
TIMEOUT_S = 60
PARTIAL, TAG, RECORD = ".partial", ".partial.tag", ".sha256"  # what lies beside an archive

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where they are known
Pause = Callable[[float], None]

_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_log = logging.getLogger(__name__)


class Unavailable(ValueError):
    """This address gives no such archive, and trying it again would change nothing."""


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Args:
        name: of the file; its suffix says how it is unpacked.
        urls: where it is, tried in this order (what has begun goes on first); the checksum decides whether a copy will
            do.
        size: bytes, as published.
        about: bytes, roughly, where no exact size is published.
        checksums: "algorithm:hexadecimal digits" as published, whole or their beginning; any one of them has to fit.
        source: where size and checksums are published.
    """

    name: str
    urls: tuple[str, ...]
    size: int | None = None
    about: int = 0
    checksums: tuple[str, ...] = ()
    source: str = ""


def bytes_there(archive: Archive, folder: Path) -> int:
    """How much of an archive is in the folder, finished or not."""
    return _size(folder / archive.name) + _bytes_so_far(folder / (archive.name + PARTIAL))


def silent(have: int, total: int | None) -> None:
    """No progress is shown."""


def obtain(archive: Archive, folder: Path, progress: Progress = silent, pause: Pause = time.sleep) -> Path:
    """The archive's path in the folder, downloaded and checked; what was put there by hand is checked only.

    Raises:
        ValueError: a file that lies there already is not the archive.
        ConnectionError: the connection keeps breaking; the next call goes on from there.
        FileNotFoundError: no address has it.
        ImportError: it is on Google Drive, and gdown is not installed.
    """
    path, partial = folder / archive.name, folder / (archive.name + PARTIAL)
    if path.exists():
        try:
            verify(path, archive)
        except Unavailable as error:
            raise ValueError(f"{path} is not the archive ({error}); delete or replace it") from error
        return path
    problems, (begun, _) = [], _begun(partial)
    for url in sorted(archive.urls, key=lambda url: url != begun):  # stable
        try:
            announced = fetch(url, partial, progress, pause)
            digest = verify(partial, archive, announced)
        except Unavailable as error:
            _discard(partial)
            problems.append(f"{url}: {error}")
            continue
        _beside(path, RECORD).write_text(f"{digest}  {archive.name}\n", encoding="utf-8")
        partial.rename(path)
        _beside(path, TAG).unlink(missing_ok=True)
        return path
    tried = "; ".join(problems) or "there is no address"
    raise FileNotFoundError(f"{archive.name} can't be had ({tried}); put a copy at {path} and run this again")


def verify(path: Path, archive: Archive, announced: str | None = None) -> str:
    """Compares a file with what is published of the archive, or else with what was recorded when it last came.

    Args:
        path: the file.
        archive: what it should be.
        announced: a checksum that the server sent along.

    Returns:
        The file's SHA-256.

    Raises:
        Unavailable: a web page, another size or another checksum; it says what came.
    """
    _refuse_web_page(path)
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        raise Unavailable(f"{size:,} bytes came, {archive.size:,} are published ({archive.source})")
    record = path.parent / (archive.name + RECORD)
    demands = [(archive.checksums, archive.source), ((announced,) if announced else (), "sent along by the server")]
    if not archive.checksums and record.exists():
        recorded = "sha256:" + record.read_text(encoding="utf-8").split()[0]
        demands.append(((recorded,), f"as it came last time; if it has changed for good, delete {record}"))
    found = _digests(path, {"sha256", *(one.partition(":")[0] for accepted, _ in demands for one in accepted)})
    for accepted, who in demands:
        if accepted and not any(_fits(one, found) for one in accepted):
            expected = " or ".join(accepted)
            raise Unavailable(f"{size:,} bytes with sha256 {found['sha256']} came, expected {expected} ({who})")
    return found["sha256"]


def forget(archive: Path) -> str:
    """Deletes an archive that was downloaded but can't be used, and its record; says what to do now."""
    record = _beside(archive, RECORD)
    if not record.exists():
        return "delete or replace it"
    record.unlink()
    archive.unlink()
    return "it was deleted; run this again"


def fetch(url: str, partial: Path, progress: Progress = silent, pause: Pause = time.sleep) -> str | None:
    """Brings a file to ``partial``, going on from what is there if the server still has the same file.

    Returns:
        The checksum that the server announced, as "md5:...", or None.

    Raises:
        Unavailable: no such file, or a web page in its place.
        ConnectionError: ATTEMPTS in a row broke without bringing a byte.
    """
    request = _request_from_google_drive if _on_google_drive(url) else _request
    failures = 0
    while True:
        before = _bytes_so_far(partial)
        try:
            return request(url, partial, progress)
        except _BROKEN as error:
            have = _bytes_so_far(partial)
            failures = 1 if have > before else failures + 1
            if failures == ATTEMPTS:
                if not have:
                    raise Unavailable(f"no answer after {ATTEMPTS} attempts ({error})") from error
                raise ConnectionError(
                    f"{url} broke off ({error}); run this again to go on from byte {have:,}, or delete {partial}* to "
                    "start over"
                ) from error
            _log.warning("%s broke off (%s); attempt %d of %d", url, error, failures + 1, ATTEMPTS)
            pause(2.0**failures)


def _request(url: str, partial: Path, progress: Progress) -> str | None:
    have, (begun, version) = _size(partial), _begun(partial)
    headers = {"User-Agent": "domainbed-download", "Accept-Encoding": "identity"}
    if have and version and begun == url:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    return _announced(error.headers)  # all of it came last time
                _discard(partial)
                raise ConnectionError("the partial file doesn't fit; starting over") from error
            if _final(error.code):
                raise Unavailable(f"HTTP {error.code} {error.reason}") from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise Unavailable("a web page came in place of the archive")
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        total = _total(response.headers, have)
        with partial.open("ab" if resumed else "wb") as file:
            _remember(partial, url, _version(response.headers))
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                progress(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"{have:,} of {total:,} bytes came")
    return _announced(response.headers)


def _total(headers: Message, start: int) -> int | None:
    """Bytes of the whole file, from the headers of an answer that begins at ``start``."""
    content_range, length = headers.get("Content-Range"), headers.get("Content-Length")
    if content_range is None:
        return int(length) if length else None
    first, _, rest = content_range.removeprefix("bytes ").partition("-")
    if int(first) != start:
        raise ConnectionError(f"the server went on from byte {first}, not {start}")
    total = rest.partition("/")[2]
    return None if total == "*" else int(total)


def _version(headers: Message) -> str:
    """What names this version of the file; a weak ETag can't prove that bytes are the same."""
    etag: str = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _remember(partial: Path, url: str, version: str = "") -> None:
    _beside(partial, TAG, PARTIAL).write_text(f"{url}\n{version}", encoding="utf-8")


def _begun(partial: Path) -> tuple[str, str]:
    """The address from which the partial file is, and its version there; "" where that is not known."""
    tag = _beside(partial, TAG, PARTIAL)
    url, _, version = (tag.read_text(encoding="utf-8") if tag.exists() else "").partition("\n")
    return url, version


def _final(status: int) -> bool:
    """Whether an HTTP error will be the same the next time."""
    return 0 < status < 500 and status not in (408, 429)


def _announced(headers: Message) -> str | None:
    """The MD5 that Google Cloud Storage sends along."""
    for value in headers.get_all("x-goog-hash", []):
        for part in value.split(","):
            name, _, digest = part.strip().partition("=")
            if name == "md5":
                return "md5:" + b64decode(digest).hex()
    return None


def _on_google_drive(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname == "drive.google.com"


def _request_from_google_drive(url: str, partial: Path, progress: Progress) -> None:
    try:
        import gdown
    except ImportError as error:
        place = _beside(partial, "", PARTIAL)
        raise ImportError(
            f"files on Google Drive need gdown: pip install domainbed-ex2l[data]; or open {url} in a browser and save "
            f"it as {place}"
        ) from error
    if _begun(partial)[0] != url:
        _discard(partial)  # gdown would go on with what is there, whatever it is
        _remember(partial, url)
    try:
        gdown.download(url=url, output=str(partial), quiet=True, resume=True, progress=progress, timeout=TIMEOUT_S)
    except (gdown.exceptions.DownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; those of requests, which gdown uses, have no number
        told = f"Google Drive: {' '.join(str(error).split())}"
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, gdown.exceptions.FileURLRetrievalError) or _final(status):
            raise Unavailable(told) from error
        raise ConnectionError(told) from error


def _refuse_web_page(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise Unavailable("a web page came in place of the archive (a quota or login page?)")


def _fits(checksum: str, found: dict[str, str]) -> bool:
    algorithm, _, digits = checksum.partition(":")
    return found[algorithm].startswith(digits)


def _digests(path: Path, algorithms: set[str]) -> dict[str, str]:
    hashes = {name: hashlib.new(name) for name in algorithms}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for one in hashes.values():
                one.update(block)
    return {name: one.hexdigest() for name, one in hashes.items()}


def _beside(path: Path, suffix: str, instead_of: str = "") -> Path:
    return path.with_name(path.name.removesuffix(instead_of) + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _parts(partial: Path) -> list[Path]:
    """What there is of a partial file; gdown adds to its name."""
    return [file for file in partial.parent.glob(f"{partial.name}*") if not file.name.endswith(TAG)]


def _bytes_so_far(partial: Path) -> int:
    return sum(map(_size, _parts(partial)))


def _discard(partial: Path) -> None:
    for file in (*_parts(partial), _beside(partial, TAG, PARTIAL)):
        file.unlink(missing_ok=True)

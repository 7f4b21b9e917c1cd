import errno
import hashlib
import inspect
import re
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from domainbed import downloading
from domainbed.downloading import Archive, Unavailable, fetch, forget, obtain, verify

CONTENT = bytes(range(256)) * 4000  # about a megabyte


class Server(ThreadingHTTPServer):
    """Serves one file; how well it does so is told by its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.headers, self.ranges = CONTENT, {"ETag": '"one"'}, True
        self.cuts, self.statuses = [], []  # per request: bytes until the connection ends; status instead of an answer
        self.asked, self.paths = [], []  # the Range of each request, and what it was for
        self.url = f"http://127.0.0.1:{self.server_port}/data.zip"

    def handle_error(self, request, client_address):
        pass  # a client that has seen enough hangs up


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        server.paths.append(self.path)
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            return self.send_error(status)
        tags = {server.headers.get("ETag"), server.headers.get("Last-Modified")}
        start = int(wanted.removeprefix("bytes=")[:-1]) if wanted and server.ranges else 0
        start = start if self.headers.get("If-Range") in tags else 0
        size = len(server.content)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        for name, value in {
            "Content-Length": size - start,
            "Content-Type": "application/zip",
            **server.headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else size
        self.wfile.write(server.content[start : start + cut])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses():
    return []


def get(server, path, pauses):
    return fetch(server.url, path, pause=pauses.append)


class TestFetch:
    def test_brings_the_file_and_tells_its_progress(self, server, tmp_path):
        seen = []
        fetch(server.url, tmp_path / "part", lambda have, total: seen.append((have, total)))
        assert (tmp_path / "part").read_bytes() == CONTENT
        assert seen[-1] == (len(CONTENT), len(CONTENT))

    def test_goes_on_where_a_connection_broke(self, server, tmp_path, pauses):
        server.cuts = [300_000, 200_000]
        get(server, tmp_path / "part", pauses)
        assert (tmp_path / "part").read_bytes() == CONTENT
        assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
        assert pauses == [2, 2]  # progress resets the wait

    def test_goes_on_in_a_later_call(self, server, tmp_path, pauses):
        server.cuts = [300_000, *[0] * downloading.ATTEMPTS]
        with pytest.raises(ConnectionError, match="run this again to go on from byte 300,000"):
            get(server, tmp_path / "part", pauses)
        get(server, tmp_path / "part", pauses)
        assert server.asked[-1] == "bytes=300000-"
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_starts_over_if_the_server_knows_no_ranges(self, server, tmp_path, pauses):
        server.ranges, server.cuts = False, [300_000]
        get(server, tmp_path / "part", pauses)
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_starts_over_if_the_file_has_changed(self, server, tmp_path, pauses):
        server.cuts = [300_000, *[0] * downloading.ATTEMPTS]
        with pytest.raises(ConnectionError):
            get(server, tmp_path / "part", pauses)
        server.headers, server.content = {"ETag": '"two"'}, CONTENT[::-1]
        get(server, tmp_path / "part", pauses)
        assert (tmp_path / "part").read_bytes() == CONTENT[::-1]

    @pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
    def test_asks_for_no_range_if_nothing_proves_that_the_file_is_the_same(self, server, tmp_path, pauses, headers):
        server.headers, server.cuts = headers, [300_000]
        get(server, tmp_path / "part", pauses)
        assert server.asked == [None, None]
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_a_date_will_do_as_proof(self, server, tmp_path, pauses):
        server.headers, server.cuts = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, [300_000]
        get(server, tmp_path / "part", pauses)
        assert server.asked == [None, "bytes=300000-"]

    def test_asks_for_no_range_of_what_another_address_began(self, server, tmp_path, pauses):
        server.cuts = [300_000, *[0] * (downloading.ATTEMPTS - 1)]
        with pytest.raises(ConnectionError):
            get(server, tmp_path / "part", pauses)
        fetch(server.url + "?copy", tmp_path / "part")
        assert server.asked[-1] is None

    def test_a_partial_file_that_is_whole_is_kept(self, server, tmp_path, pauses):
        get(server, tmp_path / "part", pauses)
        get(server, tmp_path / "part", pauses)
        assert server.asked[-1] == f"bytes={len(CONTENT)}-"
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_a_partial_file_that_is_too_long_is_thrown_away(self, server, tmp_path, pauses):
        get(server, tmp_path / "part", pauses)
        with (tmp_path / "part").open("ab") as file:
            file.write(b"more")
        get(server, tmp_path / "part", pauses)
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_waits_longer_and_longer_while_the_server_fails(self, server, tmp_path, pauses):
        server.statuses = [503, 429, 500, 200]
        get(server, tmp_path / "part", pauses)
        assert pauses == [2, 4, 8]
        assert (tmp_path / "part").read_bytes() == CONTENT

    def test_gives_up_in_the_end(self, server, tmp_path, pauses):
        server.statuses = [500] * 99
        with pytest.raises(Unavailable, match=r"no answer after 5 attempts.*500"):
            get(server, tmp_path / "part", pauses)

    def test_asks_only_once_for_what_is_not_there(self, server, tmp_path, pauses):
        server.statuses = [404] * 2
        with pytest.raises(Unavailable, match="HTTP 404"):
            get(server, tmp_path / "part", pauses)
        assert pauses == []

    def test_a_web_page_is_refused_before_anything_is_written(self, server, tmp_path, pauses):
        server.headers = {"Content-Type": "text/html; charset=utf-8"}
        with pytest.raises(Unavailable, match="web page"):
            get(server, tmp_path / "part", pauses)
        assert not (tmp_path / "part").exists()

    def test_returns_the_checksum_that_google_storage_sends(self, server, tmp_path, pauses):
        server.headers = {"x-goog-hash": "crc32c=AAAAAA==,md5=XrY7u+Ae7tCTyyK7j1rNww=="}
        assert get(server, tmp_path / "part", pauses) == "md5:" + hashlib.md5(b"hello world").hexdigest()


class TestObtain:
    def archive(self, *urls, content=CONTENT, **options):
        options = {"checksums": (f"md5:{hashlib.md5(content).hexdigest()}",), "source": "the paper"} | options
        return Archive("data.zip", urls, **options)

    def test_puts_the_checked_file_in_place_and_notes_its_checksum(self, server, tmp_path):
        path = obtain(self.archive(server.url), tmp_path)
        assert path.read_bytes() == CONTENT
        digest = hashlib.sha256(CONTENT).hexdigest()
        assert {file.name for file in tmp_path.iterdir()} == {"data.zip", "data.zip.sha256"}
        assert (tmp_path / "data.zip.sha256").read_text() == f"{digest}  data.zip\n"

    def test_keeps_nothing_of_wrong_bytes_and_says_what_came(self, server, tmp_path):
        server.content = CONTENT[::-1]
        with pytest.raises(FileNotFoundError, match=r"1,024,000 bytes with sha256 [0-9a-f]{64} came") as raised:
            obtain(self.archive(server.url), tmp_path)
        assert hashlib.md5(CONTENT).hexdigest() in str(raised.value)
        assert "(the paper)" in str(raised.value)
        assert f"put a copy at {tmp_path / 'data.zip'}" in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    def test_keeps_nothing_of_a_wrong_size(self, server, tmp_path):
        with pytest.raises(FileNotFoundError, match="1,024,000 bytes came, 7 are published"):
            obtain(self.archive(server.url, size=7), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_copy_elsewhere_will_do_if_its_checksum_fits(self, server, tmp_path):
        server.statuses = [404]
        assert obtain(self.archive(server.url, server.url), tmp_path).read_bytes() == CONTENT

    def test_a_broken_connection_does_not_throw_away_what_came(self, server, tmp_path):
        server.cuts = [300_000, *[0] * downloading.ATTEMPTS]
        with pytest.raises(ConnectionError):
            obtain(self.archive(server.url, "http://127.0.0.1:1/"), tmp_path, pause=lambda seconds: None)
        assert (tmp_path / "data.zip.partial").stat().st_size == 300_000

    def test_goes_on_in_a_later_call_at_the_address_where_it_began(self, server, tmp_path):
        archive = self.archive(server.url, server.url + "?copy")
        server.statuses, server.cuts = [404], [300_000, *[0] * (downloading.ATTEMPTS - 1)]
        with pytest.raises(ConnectionError, match=r"\?copy broke off .*go on from byte 300,000"):
            obtain(archive, tmp_path, pause=lambda seconds: None)
        assert obtain(archive, tmp_path).read_bytes() == CONTENT
        assert (server.asked[-1], server.paths[-1]) == ("bytes=300000-", "/data.zip?copy")

    def test_without_a_published_checksum_the_last_download_counts(self, server, tmp_path):
        obtain(self.archive(server.url, checksums=()), tmp_path).unlink()
        server.content, server.headers = CONTENT[::-1], {}
        with pytest.raises(
            FileNotFoundError, match=r"as it came last time; if it has changed for good, delete .*sha256"
        ):
            obtain(self.archive(server.url, checksums=()), tmp_path)

    def test_the_servers_checksum_counts_too(self, server, tmp_path):
        server.headers = {"x-goog-hash": "md5=XrY7u+Ae7tCTyyK7j1rNww=="}
        with pytest.raises(FileNotFoundError, match="sent along by the server"):
            obtain(self.archive(server.url, checksums=()), tmp_path)

    def test_what_was_put_there_by_hand_is_checked_and_not_downloaded(self, server, tmp_path):
        (tmp_path / "data.zip").write_bytes(CONTENT)
        obtain(self.archive(server.url), tmp_path)
        assert server.asked == []

    def test_what_was_put_there_by_hand_and_is_wrong_is_left_alone(self, server, tmp_path):
        (tmp_path / "data.zip").write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"is not the archive \(14 bytes with sha256"):
            obtain(self.archive(server.url), tmp_path)
        assert (tmp_path / "data.zip").read_bytes() == b"something else"


class TestVerify:
    def test_any_of_several_checksums_and_a_beginning_will_do(self, tmp_path):
        (tmp_path / "a").write_bytes(CONTENT)
        beginning = hashlib.sha512(CONTENT).hexdigest()[:20]
        digest = verify(tmp_path / "a", Archive("a", (), checksums=("md5:00", f"sha512:{beginning}")))
        assert digest == hashlib.sha256(CONTENT).hexdigest()

    @pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>quota", b"\n  <html lang=de>"])
    def test_a_web_page_is_called_one(self, tmp_path, page):
        (tmp_path / "a").write_bytes(page)
        with pytest.raises(Unavailable, match="web page"):
            verify(tmp_path / "a", Archive("a", ()))

    def test_only_what_was_downloaded_is_forgotten(self, tmp_path):
        for name in ("mine.zip", "downloaded.zip", "downloaded.zip.sha256"):
            (tmp_path / name).write_bytes(b"")
        assert "delete or replace" in forget(tmp_path / "mine.zip")
        assert "run this again" in forget(tmp_path / "downloaded.zip")
        assert [file.name for file in tmp_path.iterdir()] == ["mine.zip"]


class TestGoogleDrive:
    URL, COPY = "https://drive.google.com/uc?id=abc", "https://drive.google.com/uc?id=def"

    @pytest.fixture
    def gdown(self, monkeypatch):
        """A stand-in that writes its ``content`` as gdown does, after failing once for each of its ``failures``."""
        module = types.ModuleType("gdown")
        error = type("DownloadError", (Exception,), {})
        gone = type("FileURLRetrievalError", (error,), {})
        module.exceptions = types.SimpleNamespace(DownloadError=error, FileURLRetrievalError=gone)
        module.content, module.failures, module.calls = CONTENT, [], []

        def download(**options):
            module.calls.append(options)
            output = Path(options["output"])
            part = next(output.parent.glob(f"{output.name}*.part"), output.with_name(f"{output.name}a1b2c3d4.part"))
            have = part.stat().st_size if part.exists() else 0
            failure = module.failures.pop(0) if module.failures else None
            with part.open("ab") as file:
                file.write(module.content[have:] if failure is None else module.content[have : have + 1000])
            if failure is not None:
                raise failure
            part.rename(output)

        module.download = download
        monkeypatch.setitem(sys.modules, "gdown", module)
        return module

    @pytest.fixture
    def real(self):
        return pytest.importorskip("gdown")

    def archive(self, *urls, content=CONTENT):
        return Archive("a.zip", urls, checksums=(f"md5:{hashlib.md5(content).hexdigest()}",))

    def test_goes_through_gdown(self, gdown, tmp_path):
        assert obtain(self.archive(self.URL), tmp_path).read_bytes() == CONTENT
        assert [(call["url"], call["resume"]) for call in gdown.calls] == [(self.URL, True)]
        assert {file.name for file in tmp_path.iterdir()} == {"a.zip", "a.zip.sha256"}

    def test_calls_gdown_as_it_is(self, real, gdown, tmp_path):
        obtain(self.archive(self.URL), tmp_path)
        inspect.signature(real.download).bind(**gdown.calls[0])
        assert issubclass(real.exceptions.FileURLRetrievalError, real.exceptions.DownloadError)

    def test_no_gdown_is_allowed_that_lacks_what_is_used(self):
        setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
        allowed = Requirement(re.search(r'"(gdown[^"]*)"', setup)[1]).specifier
        assert list(allowed.filter(["5.2.0", "6.0.0", "6.2.0", "6.3.0", "6.5.1"])) == ["6.3.0", "6.5.1"]

    @pytest.mark.parametrize("kind", [OSError, "DownloadError"])
    def test_a_broken_connection_is_tried_again_at_the_same_address(self, gdown, tmp_path, pauses, kind):
        error = kind if kind is OSError else gdown.exceptions.DownloadError
        gdown.failures = [error("connection\nlost"), error("connection lost")]
        path = obtain(self.archive(self.URL, self.COPY), tmp_path, pause=pauses.append)
        assert path.read_bytes() == CONTENT
        assert [call["url"] for call in gdown.calls] == [self.URL] * 3
        assert pauses == [2, 2]  # progress resets the wait

    def test_goes_on_in_a_later_call_even_at_the_second_address(self, gdown, tmp_path, pauses):
        gone, lost = gdown.exceptions.FileURLRetrievalError("no such file"), OSError("lost")
        gdown.failures = [gone, *[lost] * downloading.ATTEMPTS]
        gdown.content = CONTENT[:1000]  # no progress after the first kilobyte
        with pytest.raises(ConnectionError, match=r"Google Drive: lost.*go on from byte 1,000, or delete .*partial\*"):
            obtain(self.archive(self.URL, self.COPY), tmp_path, pause=pauses.append)
        assert pauses == [2, 4, 8, 16]
        gdown.content, gdown.calls = CONTENT, []
        assert obtain(self.archive(self.URL, self.COPY), tmp_path).read_bytes() == CONTENT
        assert [call["url"] for call in gdown.calls] == [self.COPY]

    def test_another_address_starts_over(self, gdown, tmp_path):
        gdown.content = b"another file" + CONTENT
        obtained = gdown.download

        def download(**options):
            if options["url"] == self.COPY:
                gdown.content = CONTENT
            obtained(**options)

        gdown.download = download
        gdown.failures = [gdown.exceptions.FileURLRetrievalError("too many users")]  # after a kilobyte
        assert obtain(self.archive(self.URL, self.COPY), tmp_path).read_bytes() == CONTENT
        assert {file.name for file in tmp_path.iterdir()} == {"a.zip", "a.zip.sha256"}

    def test_what_is_there_from_another_address_is_not_gone_on_with(self, gdown, tmp_path):
        (tmp_path / "a.zip.partialz9z9z9z9.part").write_bytes(b"something else")
        (tmp_path / "a.zip.partial.tag").write_text("https://example.org/\n")
        assert obtain(self.archive(self.URL), tmp_path).read_bytes() == CONTENT

    def test_no_answer_at_all_leads_to_the_next_address(self, gdown, tmp_path, pauses):
        gdown.content, gdown.failures = b"", [OSError("refused")] * downloading.ATTEMPTS
        with pytest.raises(FileNotFoundError, match="no answer after 5 attempts"):
            obtain(self.archive(self.URL), tmp_path, pause=pauses.append)

    def test_what_the_server_refuses_is_not_tried_again(self, gdown, tmp_path, pauses):
        refused = OSError("404 Client Error")
        refused.response = types.SimpleNamespace(status_code=404)
        gdown.failures = [refused]
        obtain(self.archive(self.URL, self.COPY), tmp_path, pause=pauses.append)
        assert [call["url"] for call in gdown.calls] == [self.URL, self.COPY]
        assert pauses == []

    def test_a_full_disk_is_not_the_networks_fault(self, gdown, tmp_path):
        gdown.failures = [OSError(errno.ENOSPC, "No space left on device")]
        with pytest.raises(OSError, match="No space left"):
            obtain(self.archive(self.URL, self.COPY), tmp_path)
        assert len(gdown.calls) == 1

    def test_a_quota_is_reported(self, gdown, tmp_path, pauses):
        gdown.failures = [gdown.exceptions.FileURLRetrievalError("Too many users have viewed\nthis file")]
        with pytest.raises(FileNotFoundError, match="Too many users have viewed this file"):
            obtain(self.archive(self.URL), tmp_path, pause=pauses.append)
        assert pauses == []
        assert list(tmp_path.iterdir()) == []

    def test_a_quota_page_is_not_kept(self, gdown, tmp_path):
        gdown.content = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>"
        with pytest.raises(FileNotFoundError, match="web page"):
            obtain(self.archive(self.URL), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_the_real_gdown_goes_on_where_a_connection_broke(self, real, server, tmp_path, pauses, monkeypatch):
        monkeypatch.setattr(downloading, "_on_google_drive", lambda url: True)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))  # gdown's cookies
        server.cuts = [700_000]
        path = obtain(self.archive(server.url), tmp_path, pause=pauses.append)
        assert path.read_bytes() == CONTENT
        assert pauses == [2]
        assert any(server.asked)

    def test_without_gdown_it_says_how_to_get_it(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "gdown", None)
        with pytest.raises(ImportError, match=r"pip install domainbed-ex2l\[data\].*a\.zip$"):
            obtain(Archive("a.zip", (self.URL,)), tmp_path)

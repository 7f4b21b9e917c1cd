import hashlib
import io
import shutil
import tarfile

import pytest

from domainbed import releases
from domainbed.downloading import Archive
from domainbed.releases import Release, differences, install, place, size_text, state

IMAGES = {"inner/photo/dog/1.png": b"1", "inner/photo/dog/2.JPG": b"2", "inner/sketch/dog/3.jpeg": b"3"}


@pytest.fixture
def source(tmp_path):
    """Packs files into a tar that a file: address names."""

    def pack(files=None, name="set.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz") as packed:
            for path, content in (IMAGES if files is None else files).items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
        return tmp_path / name

    return pack


def release(path, **options):
    content = path.read_bytes()
    checksums = (f"md5:{hashlib.md5(content).hexdigest()}",)
    archive = Archive(path.name, (path.as_uri(),), len(content), checksums=checksums)
    options = {"contains": ("photo", "sketch"), "counts": ({"photo": 2, "sketch": 1},)} | options
    return Release("set", (archive,), licence="none", **options)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestInstall:
    def test_puts_the_folder_in_place_and_removes_the_archive(self, source, data_dir):
        done = release(source(), files={"RELEASE.txt": "v1"})
        assert install(done, data_dir)
        assert files(data_dir / "set") == ["RELEASE.txt", "photo/dog/1.png", "photo/dog/2.JPG", "sketch/dog/3.jpeg"]
        assert [file.name for file in (data_dir / ".downloads").iterdir()] == ["set.tar.gz.sha256"]
        assert state(done, data_dir) == "complete"

    def test_keeps_archives_on_demand(self, source, data_dir):
        install(release(source()), data_dir, keep_archives=True)
        assert (data_dir / ".downloads" / "set.tar.gz").exists()

    def test_leaves_a_complete_dataset_alone(self, source, data_dir):
        done = release(source())
        install(done, data_dir)
        (data_dir / "set" / "photo" / "mine.txt").write_text("a note")
        assert not install(done, data_dir)
        assert (data_dir / "set" / "photo" / "mine.txt").exists()

    def test_does_not_touch_a_folder_that_differs(self, source, data_dir):
        done = release(source())
        install(done, data_dir)
        (data_dir / "set" / "photo" / "dog" / "1.png").unlink()
        with pytest.raises(
            ValueError, match=r"photo holds 1 images, 2 are published; nothing was changed.*move it away"
        ):
            install(done, data_dir)

    def test_does_not_touch_a_folder_of_something_else(self, source, data_dir):
        (data_dir / "set" / "thesis").mkdir(parents=True)
        with pytest.raises(ValueError, match="holds something else"):
            install(release(source()), data_dir)

    def test_redoes_an_interrupted_unpacking(self, source, data_dir):
        (data_dir / ".downloads" / "set.unpacking" / "inner" / "photo").mkdir(parents=True)
        (data_dir / ".downloads" / "set.unpacking" / "inner" / "photo" / "half.png").write_bytes(b"")
        install(release(source()), data_dir)
        assert "photo/half.png" not in files(data_dir / "set")

    def test_nothing_appears_before_all_is_done(self, source, data_dir):
        def fail(unpacked):
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            install(release(source(), arrange=fail), data_dir)
        assert not (data_dir / "set").exists()

    def test_forgets_a_damaged_download_so_that_the_next_can_succeed(self, source, data_dir):
        path = source()
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        unchecked = Release("set", (Archive(path.name, (path.as_uri(),)),), ("photo", "sketch"), "none")
        with pytest.raises(ValueError, match=r"damaged or cut off.*it was deleted; run this again"):
            install(unchecked, data_dir)
        path.write_bytes(whole)
        assert install(unchecked, data_dir)

    def test_another_archive_is_an_error(self, source, data_dir):
        with pytest.raises(ValueError, match="holds photo, sketch"):
            install(release(source({"x/y.png": b""})), data_dir)
        assert not (data_dir / "set").exists()

    def test_says_what_to_do_when_it_is_gone(self, source, data_dir, tmp_path):
        gone = Release(
            "set", (Archive("a.tar", ((tmp_path / "no.tar").as_uri(),)),), ("x",), "none", gone="ask a friend"
        )
        with pytest.raises(FileNotFoundError, match=r"a\.tar can't be had.*\. ask a friend"):
            install(gone, data_dir, pause=lambda seconds: None)

    def test_a_copy_put_beside_it_will_do(self, source, data_dir):
        path = source()
        content = path.read_bytes()
        archive = Archive("set.tar.gz", (), checksums=(f"md5:{hashlib.md5(content).hexdigest()}",))
        (data_dir / ".downloads").mkdir(parents=True)
        path.rename(data_dir / ".downloads" / "set.tar.gz")
        assert install(Release("set", (archive,), ("photo",), "none"), data_dir)

    def test_asks_for_room_before_it_starts(self, source, data_dir, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(OSError, match=r"10 bytes free, about 1\d\d,\d\d\d,\d\d\d are needed"):
            install(release(source()), data_dir)
        assert files(data_dir) == []

    def test_a_file_in_place_of_the_data_dir(self, source, data_dir):
        data_dir.write_text("")
        with pytest.raises(OSError, match=r"--data_dir: .* can't be made"):
            install(release(source()), data_dir)

    def test_a_data_dir_that_is_not_ours(self, source, data_dir, monkeypatch):
        monkeypatch.setattr(releases.os, "access", lambda path, mode: False)
        with pytest.raises(PermissionError, match=r"--data_dir: .* is not writable"):
            install(release(source()), data_dir)


class TestState:
    def test_missing_partial_gone_and_differing(self, source, data_dir):
        done = release(source())
        assert state(done, data_dir) == "missing"
        assert state(release(source(), gone="the server is off"), data_dir) == "cannot be had: the server is off"
        (data_dir / ".downloads").mkdir(parents=True)
        (data_dir / ".downloads" / "set.tar.gz.partial").write_bytes(b"12345")
        (data_dir / ".downloads" / "set.tar.gz.partial.tag").write_bytes(b"tag")
        size = source().stat().st_size
        assert state(done, data_dir) == f"partial: 5 of {size:,} bytes"
        (data_dir / "set" / "photo").mkdir(parents=True)
        assert state(done, data_dir) == f"differs: {data_dir / 'set'} lacks sketch"

    def test_any_published_release_is_complete(self, source, data_dir):
        install(release(source()), data_dir)
        counts = ({"": 4}, {"": 3})
        assert differences(release(source(), counts=counts), data_dir / "set") == []
        assert differences(release(source(), counts=counts[:1]), data_dir / "set") == [
            f"{data_dir / 'set'} holds 3 images, 4 are published"
        ]

    def test_another_place_is_found(self, source, data_dir):
        for name in ("photo", "sketch"):
            (data_dir / name).mkdir(parents=True)
        assert place(release(source(), also=("",)), data_dir) == data_dir
        assert place(release(source()), data_dir) == data_dir / "set"


def test_sizes_say_how_far_they_are_known():
    exact, rough, unknown = Archive("a", (), 1_000), Archive("b", (), about=2_000), Archive("c", ())
    assert size_text([exact, exact]) == "2,000 bytes"
    assert size_text([exact, rough]) == "about 3,000 bytes"
    assert size_text([exact, unknown]) == "more than 1,000 bytes"
    assert size_text([unknown]) == "size not published"

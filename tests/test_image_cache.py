import errno
import fcntl
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from domainbed import image_cache
from domainbed import images as pool_of_images
from domainbed.image_cache import ImageCache, open_cache
from domainbed.images import Images, cache_directory

SIZE = 32


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((width, height)).convert(mode)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """Five images of other shapes and kinds."""
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    photograph(60, 40).save(root / "wide.jpg")
    photograph(33, 70, "L").save(root / "a" / "grey.png")
    photograph(50, 50, "RGBA").save(root / "a" / "alpha.png")
    photograph(48, 20, "P").save(root / "palette.png")
    photograph(SIZE, SIZE).save(root / "same.jpg")
    return Images(root, ("wide.jpg", "a/grey.png", "a/alpha.png", "palette.png", "same.jpg"), SIZE)


def again(images: Images) -> Images:
    """The same pool, as another job has it."""
    return Images(images.root, images.paths, images.size)


def whole_files(images: Images) -> list[Path]:
    return sorted(cache_directory().rglob("*.uint8"))


def leftovers(images: Images) -> list[Path]:
    return sorted(cache_directory().rglob("*.partial"))


def forbid(*_: object) -> None:
    raise AssertionError("decoded again")


def test_it_holds_what_pil_decodes_and_squashes(images: Images) -> None:
    cache = open_cache(images)
    assert cache.pixels.shape == (5, SIZE, SIZE, 3)
    for position, path in enumerate(images.paths):
        with Image.open(images.root / path) as image:
            expected = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            assert cache.original[position].tolist() == [image.height, image.width]
        np.testing.assert_array_equal(cache.pixels[position], np.asarray(expected))
    assert not cache.pixels.flags.writeable
    assert not leftovers(images)


def test_it_is_decoded_once_and_then_found(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_cache(images)
    monkeypatch.setattr(image_cache, "_decode_all", forbid)
    second = open_cache(again(images))
    assert second.path == first.path
    np.testing.assert_array_equal(second.pixels, first.pixels)
    np.testing.assert_array_equal(second.original, first.original)


def touch(images: Images) -> None:
    os.utime(images.root / "wide.jpg", ns=(1, 1))


def replace(images: Images) -> None:
    photograph(60, 40).rotate(180).save(images.root / "wide.jpg")


@pytest.mark.parametrize("change", [touch, replace])
def test_a_changed_file_makes_it_stale(images: Images, change: Callable[[Images], None]) -> None:
    old = open_cache(images)
    before = old.pixels.copy()
    change(images)
    new = open_cache(again(images))
    assert whole_files(images) == [new.path] != [old.path]  # the stale file is gone ...
    np.testing.assert_array_equal(old.pixels, before)  # ... but not for those who have it mapped
    same = np.array_equal(new.pixels[0], before[0])
    assert same == (change is touch)


def test_other_lists_and_sizes_have_their_own(images: Images) -> None:
    caches = [open_cache(images)]
    caches += [
        open_cache(Images(images.root, images.paths[::-1], SIZE)),
        open_cache(Images(images.root, images.paths, 16)),
    ]
    assert len(whole_files(images)) == 3
    np.testing.assert_array_equal(caches[0].pixels, caches[1].pixels[::-1])
    assert caches[2].pixels.shape[1:] == (16, 16, 3)


def test_another_decoder_has_a_cache_of_its_own(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_cache(images)
    monkeypatch.setattr("PIL.__version__", "999.0")
    new = open_cache(again(images))
    assert set(whole_files(images)) == {new.path, old.path}  # jobs with the old decoder may still want the old one
    assert new.path != old.path


def test_a_file_of_the_wrong_length_is_not_taken(images: Images) -> None:
    path = open_cache(images).path
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert open_cache(again(images)).path == path
    assert path.read_bytes() == content


# Builds the cache of the images named on the command line; says on stdout that it decodes, and waits for a line then.
BUILDER = """
import sys, logging
from pathlib import Path
from domainbed import image_cache
from domainbed.images import Images, cache_directory
if "no locks" in sys.argv[1]:
    def refuse(*args): raise OSError(37, "No locks available")
    image_cache.fcntl.lockf = refuse
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s", force=True)
decode_all = image_cache._decode_all
def waiting(*args):
    print("builds", flush=True)
    input()
    decode_all(*args)
    if "halts" in sys.argv[1]:
        print("decoded", flush=True)
        input()
image_cache._decode_all = waiting
cache = image_cache.open_cache(Images(Path(sys.argv[2]), tuple(sys.argv[4:]), int(sys.argv[3])))
print("has", int(cache.pixels.sum(dtype="int64")), flush=True)
"""


class Builder:
    """A process that decodes the images when it is told to."""

    def __init__(self, images: Images, kind: str = ""):
        command = [sys.executable, "-c", BUILDER, kind, str(images.root), str(images.size), *images.paths]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_for(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise AssertionError(f"ended without {word}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_of_two_processes_one_decodes_and_the_other_waits(images: Images) -> None:
    first = Builder(images)
    first.wait_for("builds")
    second = Builder(images)
    second.wait_for("waiting for another process")
    first.go_on()
    sums = [first.wait_for("has"), second.wait_for("has")]  # the second one never had to be told to decode
    assert sums[0] == sums[1] == f"has {open_cache(images).pixels.sum(dtype='int64')}\n"
    first.end()
    second.end()
    assert len(whole_files(images)) == 1
    assert not leftovers(images)


def test_without_locks_both_decode_and_both_are_right(images: Images) -> None:
    slow = Builder(images, "no locks, halts")
    slow.wait_for("no file locks")
    slow.wait_for("builds")
    slow.go_on()
    slow.wait_for("decoded")
    quick = Builder(images, "no locks")
    quick.wait_for("builds")
    quick.go_on()
    sums = [quick.wait_for("has")]
    slow.go_on()
    sums.append(slow.wait_for("has"))
    assert sums == [f"has {open_cache(images).pixels.sum(dtype='int64')}\n"] * 2
    quick.end()
    slow.end()
    assert len(whole_files(images)) == 1
    assert not leftovers(images)


def test_what_a_killed_builder_leaves_is_never_taken_and_then_removed(images: Images) -> None:
    builder = Builder(images, "halts")
    builder.wait_for("builds")
    builder.go_on()
    builder.wait_for("decoded")
    builder.end()
    assert len(leftovers(images)) == 1
    assert not whole_files(images)
    open_cache(images)
    assert not leftovers(images)
    assert len(whole_files(images)) == 1


def test_only_forgotten_leftovers_of_other_machines_are_removed(images: Images) -> None:
    folder = open_cache(images).path.parent
    alive, forgotten = folder / "x.uint8.elsewhere.1.partial", folder / "y.uint8.elsewhere.2.partial"
    alive.write_bytes(b"")
    forgotten.write_bytes(b"")
    os.utime(forgotten, (1, 1))
    touch(images)
    open_cache(again(images))
    assert leftovers(images) == [alive]


def test_no_space_says_how_much_is_needed(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(images.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(image_cache, "_decode_all", forbid)
    needed = (
        r"5 decoded images of .* take 0\.000 GB, and .* has 0\.000 GB free; .*\$DOMAINBED_CACHE.*--input_pipeline pil"
    )
    with pytest.raises(OSError, match=needed):
        open_cache(images)


def test_space_that_ends_meanwhile_leaves_nothing(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="make room"):
        open_cache(images)
    assert not leftovers(images) + whole_files(images)


def read_only(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """As os.access says it; the tests may run as root, for whom everything is writable."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: root not in [Path(path), *Path(path).parents] and access(path, mode)
    )


def test_the_variable_names_the_folder(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path / "chosen"))
    before = sorted(images.root.rglob("*"))
    assert tmp_path / "chosen" in open_cache(images).path.parents
    assert sorted(images.root.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path / "chosen"))
    read_only(monkeypatch, tmp_path / "chosen")
    with pytest.raises(PermissionError, match=r"chosen.* can't be written to \(Permission denied\); .*DOMAINBED_CACHE"):
        open_cache(images)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path / "file"))
    with pytest.raises(PermissionError, match=r"file.* can't be written to \(Not a directory\)"):
        open_cache(images)


def test_a_damaged_image_is_named_and_nothing_stays(images: Images) -> None:
    (images.root / "wide.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"wide\.jpg"):
        open_cache(images)
    assert not leftovers(images) + whole_files(images)


def test_a_missing_image(images: Images) -> None:
    (images.root / "wide.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"wide\.jpg"):
        open_cache(images)


def test_images_that_change_meanwhile(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_all = image_cache._decode_all

    def slow(pool: Images, path: Path) -> None:
        decode_all(pool, path)
        touch(images)

    monkeypatch.setattr(image_cache, "_decode_all", slow)
    with pytest.raises(ValueError, match="changed while they were decoded; start again"):
        open_cache(images)
    assert not leftovers(images) + whole_files(images)


def test_long_work_says_how_far_it_is(
    images: Images, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_of_images, "CHUNK", 2)
    monkeypatch.setattr(pool_of_images, "LOG_EVERY_S", 0)
    with caplog.at_level(logging.INFO, "domainbed.image_cache"):
        open_cache(images)
    assert caplog.messages[1:] == [f"decoded {n} of 5 images" for n in (2, 4, 5)]


def test_locks_that_do_not_work_are_told(
    images: Images, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    open_cache(images)
    assert "several jobs may decode the same images" in caplog.text


def test_a_process_that_is_not_forked_maps_the_file_anew(images: Images) -> None:
    cache = open_cache(images)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000  # not the pixels
    received = pickle.loads(sent)
    assert isinstance(received, ImageCache)
    assert len(received) == 5
    np.testing.assert_array_equal(received.pixels, cache.pixels)

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from domainbed import images as pool_of_images
from domainbed.images import Images, cache_directory, image_files


def draw(path: Path, mode: str = "RGB", size: tuple[int, int] = (9, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_every_mode_opens_as_rgb(tmp_path: Path, mode: str) -> None:
    path = draw(tmp_path / "a.png", mode)
    image = Images(tmp_path, ("a.png",)).open(0)
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(path).convert("RGB"))


def test_files_come_in_torchvisions_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b/c.png", "a-b/c.png", "B.png", "c10.png", "c9.png"):
        draw(tmp_path / "root" / "class" / name)
    (tmp_path / "root" / "class" / "notes.txt").write_text("no image")
    expected = [
        Path(path).relative_to(tmp_path / "root" / "class").as_posix()
        for path, _ in ImageFolder(tmp_path / "root").samples
    ]
    assert image_files(tmp_path / "root" / "class") == expected
    draw(tmp_path / "root" / "class" / "._b.png")
    draw(tmp_path / "root" / "class" / ".hidden" / "b.png")
    assert image_files(tmp_path / "root" / "class") == expected


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    draw(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty.png").touch()
    images = Images(tmp_path, ("good.png", "bad.png", "gone.png", "../good.png", "good.png", "empty.png"))
    with pytest.raises(ValueError, match="5 of 6 images") as caught:
        images.check()
    for words in (
        "bad.png: not an image that can be read (of no known kind)",
        "gone.png: no such file",
        "../good.png: leads out",
        "good.png: named twice",
    ):
        assert words in str(caught.value)


def photograph() -> bytes:
    """A JPEG of 224 px in which every row shows something."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, "JPEG")
    return file.getvalue()


def start_of_data(jpeg: bytes) -> int:
    return jpeg.index(b"\xff\xda") + 14


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage.jpg": lambda jpeg: jpeg[: start_of_data(jpeg)] + b"this is no image " * 50,
    "zeros.jpg": lambda jpeg: jpeg[: start_of_data(jpeg)] + bytes(500),
    "header.jpg": lambda jpeg: jpeg[: start_of_data(jpeg)],
    "table.jpg": lambda jpeg: jpeg[:60],
}


def test_damage_behind_a_good_header_is_found(tmp_path: Path) -> None:
    for name, damage in DAMAGE.items():
        (tmp_path / name).write_bytes(damage(photograph()))
    draw(tmp_path / "whole.png", size=(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    bad = [*DAMAGE, "cut.png"]
    with pytest.raises(ValueError, match="5 of 6 images") as caught:
        Images(tmp_path, ("whole.png", *bad)).check()
    found = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert found == bad
    assert "cut.png: next to nothing of it can be decoded" in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_photograph_without_its_last_bytes_and_blank_images_are_sound(tmp_path: Path) -> None:
    jpeg = photograph()
    (tmp_path / "cut.jpg").write_bytes(jpeg[:-20])
    (tmp_path / "half.jpg").write_bytes(jpeg[: (start_of_data(jpeg) + len(jpeg)) // 2])
    names = ["cut.jpg", "half.jpg"]
    for name in ("black.png", "white.jpg", "grey.bmp"):
        Image.new("RGB", (64, 64), name.split(".")[0]).save(tmp_path / name)
        names.append(name)
    Images(tmp_path, tuple(names)).check()


def test_a_bad_image_is_named_with_its_line(tmp_path: Path) -> None:
    draw(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = Images(tmp_path, ("good.png", "bad.png"), source=tmp_path / "list.csv", lines=[2, 5])
    with pytest.raises(ValueError, match=r"take them out of .*list\.csv:\n  line 5: bad\.png: not an image"):
        images.check()
    assert images.list_key == Images(tmp_path, images.paths).list_key


def test_what_can_not_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cut.jpg").write_bytes(DAMAGE["table.jpg"](photograph()))
    with pytest.raises(ValueError, match=r"a.cut\.jpg: not an image that can be read"):
        Images(tmp_path, ("a/cut.jpg",)).open(0)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        Images(tmp_path, ("gone.jpg",)).open(0)


def test_the_check_of_many_images_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_of_images, "LOG_EVERY_S", -1.0)
    monkeypatch.setattr(pool_of_images, "CHUNK", 2)
    for name in "abc":
        draw(tmp_path / f"{name}.png")
    with caplog.at_level(logging.INFO):
        Images(tmp_path, ("a.png", "b.png", "c.png")).check()
    assert [record.getMessage().split(" images")[0] for record in caplog.records] == [
        "checked 2 of 3",
        "checked 3 of 3",
    ]


def test_only_the_first_twenty_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.\.\. and 10 more") as caught:
        Images(tmp_path, tuple(f"{i}.png" for i in range(30))).check()
    assert len(str(caught.value).splitlines()) == 22


def test_a_sound_pool_is_opened_once_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "a.png")
    images, opened, true_open = Images(tmp_path, ("a.png",)), [], Image.open

    def counting(path: Path) -> Image.Image:
        opened.append(path)
        return true_open(path)

    monkeypatch.setattr(Image, "open", counting)
    images.check()
    images.check()
    assert len(opened) == 1
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not an image"):
        images.check()


def test_keys_follow_the_list_and_the_contents(tmp_path: Path) -> None:
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png")
    images, other = Images(tmp_path, ("a.png", "b.png")), Images(tmp_path, ("b.png", "a.png"))
    assert images.list_key == Images(tmp_path, ("a.png", "b.png")).list_key != other.list_key
    before = images.content_key()
    assert images.content_key() == before
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert images.content_key() != before


def test_where_derived_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOMAINBED_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "domainbed"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "domainbed"
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"


@pytest.mark.parametrize(("options", "message"), [({"crop": "wild"}, "crop 'wild'"), ({"size": 0}, "image size 0")])
def test_impossible_pools(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(tmp_path, (), **options)

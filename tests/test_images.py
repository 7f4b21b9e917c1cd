import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

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
    for words in ("bad.png: not an image", "gone.png: no such file", "../good.png: leads out", "good.png: named twice"):
        assert words in str(caught.value)


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

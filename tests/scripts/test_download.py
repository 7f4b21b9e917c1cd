import io
import tarfile

import pytest

from domainbed.claims import lock
from domainbed.datasets.archives import ARCHIVES
from domainbed.downloading import Archive
from domainbed.releases import Release
from domainbed.scripts import BadInput, download


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A data_dir, and two datasets: one that can be had and one that can't."""
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as packed:
        for name in ("x/photo/1.png", "x/sketch/2.png"):
            packed.addfile(tarfile.TarInfo(name), io.BytesIO())
    there = Archive("set.tar.gz", ((tmp_path / "set.tar.gz").as_uri(),))
    monkeypatch.setitem(ARCHIVES, "There", Release("there", (there,), ("photo", "sketch"), "CC0"))
    gone = Archive("gone.zip", (), 7, checksums=("md5:0123456789abcdef0123",))
    monkeypatch.setitem(ARCHIVES, "Gone", Release("gone", (gone,), ("a",), "CC0", gone="the server is off; ask"))
    return tmp_path / "data"


def run(data_dir, *words):
    return download.main(["--data_dir", str(data_dir), *words])


def test_downloads_and_says_where_and_what(data_dir, capsys):
    assert run(data_dir, "--dataset", "There") == 0
    printed = capsys.readouterr().out
    assert f"There: downloaded to {data_dir / 'there'}" in printed
    assert "set.tar.gz: no checksum is published; sha256 " in printed
    assert run(data_dir, "--dataset", "There") == 0
    assert f"There: complete already in {data_dir / 'there'}" in capsys.readouterr().out


def test_domainbeds_abbreviation_still_works(data_dir, capsys):
    assert download.main(["--data", str(data_dir), "--dataset", "There"]) == 0


def test_one_failure_does_not_stop_the_others(data_dir, capsys):
    with pytest.raises(BadInput, match="not downloaded: Gone"):
        run(data_dir, "--dataset", "Gone", "There")
    printed = capsys.readouterr().out
    assert "Gone: gone.zip can't be had" in printed
    assert "the server is off; ask" in printed
    assert (data_dir / "there" / "photo" / "1.png").exists()


def test_lists_what_is_here(data_dir, capsys):
    run(data_dir, "--dataset", "There")
    capsys.readouterr()
    assert run(data_dir, "--list", "--dataset", "There", "Gone") == 0
    assert capsys.readouterr().out.splitlines() == [
        "dataset  folder  licence  state",
        "There    there   CC0      complete",
        "    set.tar.gz: size not published, no checksum published",
        "Gone     gone    CC0      cannot be had: the server is off; ask",
        "    gone.zip: 7 bytes, md5:0123456789ab",
    ]


def test_lists_everything_without_touching_anything(data_dir, capsys):
    assert run(data_dir, "--list") == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ARCHIVES)
    assert printed.count("spawrious224.tar.gz") == 1
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["ColoredMNIST224", "VLCSInDistribution_C", "TerraIncognitaInDistribution_L38"])
def test_a_part_or_another_form_of_a_dataset_is_known(data_dir, capsys, name):
    assert run(data_dir, "--list", "--dataset", name) == 0
    assert f"\n{name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to download: --dataset NAME"),
        (["--dataset", "TeraIncognita"], "did you mean TerraIncognita"),
        (["--dataset", "DigitsM2M"], "DigitsM2M needs no download; known"),
    ],
)
def test_bad_input(data_dir, words, message):
    with pytest.raises(BadInput, match=message):
        run(data_dir, *words)


def test_a_data_dir_that_is_a_file(data_dir, capsys):
    data_dir.write_text("")
    with pytest.raises(BadInput, match="not downloaded: There"):
        run(data_dir, "--dataset", "There")
    assert str(data_dir) in capsys.readouterr().out


def test_two_at_once_are_refused(data_dir, capsys):
    import subprocess
    import sys

    downloads = data_dir / ".downloads"
    downloads.mkdir(parents=True)
    with lock(downloads):
        code = "import sys; from domainbed.scripts import download; download.main(sys.argv[1:])"
        words = ["--data_dir", str(data_dir), "--dataset", "ColoredMNIST"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert "another download is at work" in done.stdout


def test_progress_is_shown(capsys):
    show = download.show(Archive("set.tar.gz", ()))
    show(5, 10)
    show(10, 10)
    assert "set.tar.gz: 100%" in capsys.readouterr().err

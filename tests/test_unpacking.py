import gzip
import io
import random
import stat
import tarfile
import zipfile

import pytest

from domainbed.unpacking import locate, unpack


def tar(path, *members, mode="w:gz"):
    """A tar of (name, content) or of TarInfo."""
    with tarfile.open(path, mode) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


def zipped(path, *members):
    """A zip of (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "deep" / "target"
    folder.mkdir(parents=True)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestUnpack:
    @pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
    def test_tar(self, tmp_path, target, name, mode):
        unpack(tar(tmp_path / name, ("./x/one.png", b"1"), ("x/two.png", b"2"), mode=mode), target)
        assert files(target) == ["x/one.png", "x/two.png"]

    def test_zip_without_a_macs_shadow(self, tmp_path, target):
        unpack(zipped(tmp_path / "a.zip", ("x/one.png", b"1"), ("__MACOSX/x/._one.png", b"2")), target)
        assert files(target) == ["x/one.png"]

    def test_gz_and_plain_files(self, tmp_path, target):
        (tmp_path / "digits.gz").write_bytes(gzip.compress(b"12"))
        (tmp_path / "list.txt").write_bytes(b"34")
        for name in ("digits.gz", "list.txt"):
            unpack(tmp_path / name, target)
        assert (target / "digits").read_bytes() == b"12"
        assert (target / "list.txt").read_bytes() == b"34"


class TestSafety:
    @pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "\\evil"])
    def test_names_that_lead_out(self, tmp_path, target, name):
        for archive in (tar(tmp_path / "a.tar.gz", (name, b"")), zipped(tmp_path / "a.zip", (name, b""))):
            with pytest.raises(ValueError, match="leads out of the folder"):
                unpack(archive, target)
        assert files(target.parent) == []

    @pytest.mark.parametrize(
        "member",
        [
            link("x", "../../evil"),
            link("x", "/etc/passwd"),
            link("x", "../evil", tarfile.LNKTYPE),
            link("x", "", tarfile.CHRTYPE),
            link("x", "", tarfile.FIFOTYPE),
        ],
        ids=["link up", "absolute link", "hard link up", "device", "pipe"],
    )
    def test_links_out_and_devices_in_tars(self, tmp_path, target, member):
        with pytest.raises(ValueError, match="not safe to unpack"):
            unpack(tar(tmp_path / "a.tar.gz", member, ("x/evil", b"1")), target)
        assert not (target / "x").is_symlink()
        assert files(target.parent) == []

    def test_links_within_a_tar_are_fine(self, tmp_path, target):
        unpack(tar(tmp_path / "a.tar", ("x/one.png", b"1"), link("y", "x"), mode="w"), target)
        assert (target / "y" / "one.png").read_bytes() == b"1"

    def test_links_in_zips(self, tmp_path, target):
        info = zipfile.ZipInfo("x")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        with pytest.raises(ValueError, match="x is a link or a device"):
            unpack(zipped(tmp_path / "a.zip", (info, b"../../evil")), target)

    def test_passwords(self, tmp_path, target):
        content = bytearray(zipped(tmp_path / "a.zip", ("x", b"1")).read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(ValueError, match="needs a password"):
            unpack(tmp_path / "a.zip", target)

    def test_an_old_python_is_refused(self, tmp_path, target, monkeypatch):
        monkeypatch.delattr(tarfile, "data_filter")
        with pytest.raises(NotImplementedError, match=r"3\.11\.4"):
            unpack(tar(tmp_path / "a.tar.gz", ("x", b"")), target)


class TestDamage:
    @pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.gz"])
    @pytest.mark.parametrize("kept", [0.75, 0.5, 0.01])
    def test_cut_off(self, tmp_path, target, name, kept):
        noise = random.Random(0).randbytes(50_000)
        path = tmp_path / name
        if name == "a.gz":
            path.write_bytes(gzip.compress(noise))
        elif name == "a.zip":
            zipped(path, ("x", noise))
        else:
            tar(path, ("x", noise), mode="w:gz" if name.endswith("gz") else "w")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(ValueError, match="damaged or cut off"):
            unpack(path, target)

    def test_a_lost_end_and_a_changed_byte_of_a_tar(self, tmp_path, target):
        path = tar(tmp_path / "a.tar.gz", ("x", b"contents"))
        whole = path.read_bytes()
        for damaged in (whole[:-4], whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):  # its checksum, its length
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged or cut off"):
                unpack(path, target)

    def test_changed_bytes(self, tmp_path, target):
        content = bytearray(zipped(tmp_path / "a.zip", ("x", b"contents")).read_bytes())
        content[content.index(b"contents")] ^= 1
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            unpack(tmp_path / "a.zip", target)


class TestLocate:
    def make(self, root, *folders):
        for folder in folders:
            (root / folder).mkdir(parents=True)
        return root

    @pytest.mark.parametrize("inside", ["", "kfold", "pacs/images"])
    def test_finds_the_folder_wherever_it_lies(self, tmp_path, inside):
        self.make(tmp_path, f"{inside}/photo".strip("/"), f"{inside}/sketch".strip("/"), "other")
        assert locate(tmp_path, ("photo", "sketch")) == tmp_path / inside

    def test_another_archive(self, tmp_path):
        with pytest.raises(ValueError, match="holds photo, sketch"):
            locate(self.make(tmp_path, "photo", "x/sketch"), ("photo", "sketch"))

    def test_two_of_them(self, tmp_path):
        with pytest.raises(ValueError, match="which one"):
            locate(self.make(tmp_path, "a/photo", "b/photo"), ("photo",))

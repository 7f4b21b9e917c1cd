"""Where the files of each dataset come from, and how they are put into the folders that the dataset reads.

What the dataset itself knows (its folder, what is in it, the published numbers of images) is taken from its class.
Sizes and checksums are copied from where ``source`` says; a prefix of a checksum is what that source gives. Sizes that
WILDS states are disk usage, so they count as rough. Where nothing is published, the table says so.
"""

import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from domainbed.datasets.celeba import CelebA
from domainbed.datasets.composed import ComposedDataset
from domainbed.datasets.image_folder import PACS, SVIRO, VLCS, DomainNet, NamedImageFolder, OfficeHome, TerraIncognita
from domainbed.datasets.spawrious import SpawriousBenchmark
from domainbed.datasets.waterbirds import Waterbirds
from domainbed.downloading import Archive
from domainbed.releases import Release

_DRIVE = "https://drive.google.com/uc?id="
_LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
_BU = "http://csr.bu.edu/ftp/visda/2019/multi-source/"
_CODALAB = "https://worksheets.codalab.org/rest/bundles/{}/contents/blob/"
_TFDS = "TensorFlow Datasets 4.9.10 (size, sha256), torchvision 0.29 (md5)"
_WILDS_GONE = (
    "users report that CodaLab, the only host, fails since June 2025 (github.com/p-lambda/wilds/issues/171, 174, 175); "
    "copy {} from someone who has it"
)


def sort_camera_traps(unpacked: Path) -> None:
    """Moves the images of four locations and ten classes to ``terra_incognita/location_*/class/``.

    An image with several classes stands in each of them, as in DomainBed. One pass over the annotations.

    Raises:
        ValueError: images that the annotations name are not there.
    """
    root, images = unpacked / "terra_incognita", unpacked / "eccv_18_all_images_sm"
    missing = []
    for file_name, location, classes in _annotated(sorted(unpacked.glob("eccv_18_annotation_files/*.json"))):
        source = images / file_name
        if not source.is_file():
            missing.append(file_name)
            continue
        for name in classes:
            folder = root / location / name
            folder.mkdir(parents=True, exist_ok=True)
            (shutil.move if name == classes[-1] else shutil.copyfile)(source, folder / file_name)
    if missing:
        raise ValueError(
            f"the archive lacks {len(missing):,} annotated images, such as {', '.join(sorted(missing)[:20])}"
        )


def _annotated(files: list[Path]) -> Iterator[tuple[str, str, list[str]]]:
    """File name, folder and classes of each image that belongs to the dataset."""
    categories: dict[Any, str] = {}
    images: dict[Any, dict[str, Any]] = {}
    labels = defaultdict(set)
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        categories |= {one["id"]: one["name"] for one in content["categories"]}
        images |= {one["id"]: one for one in content["images"]}
        for annotation in content["annotations"]:
            labels[annotation["image_id"]].add(annotation["category_id"])
    for key, image in images.items():
        classes = sorted({categories[label] for label in labels[key]} & set(TerraIncognita.CLASSES))
        location = f"location_{image['location']}"  # a number in some files, a string in others
        if classes and location in TerraIncognita.FOLDERS:
            yield image["file_name"], location, classes


def drop_duplicates(unpacked: Path) -> None:
    """Keeps the images that the authors' lists of the cleaned version name, in ``domain_net/``.

    Raises:
        ValueError: images that the lists name are not there.
    """
    lines = (line for file in sorted(unpacked.glob("*_t*.txt")) for line in file.read_text("utf-8").splitlines())
    listed = {line.rsplit(" ", 1)[0] for line in lines if line.strip()}
    for domain in DomainNet.FOLDERS:
        for path in sorted((unpacked / domain).rglob("*")):
            if path.is_file() and path.relative_to(unpacked).as_posix() not in listed:
                path.unlink()
    missing = sorted(name for name in listed if not (unpacked / name).is_file())
    if missing:
        raise ValueError(f"the archives lack {len(missing):,} listed images, such as {', '.join(missing[:20])}")
    (unpacked / "domain_net").mkdir()
    for domain in DomainNet.FOLDERS:
        (unpacked / domain).rename(unpacked / "domain_net" / domain)


def write_face_tables(unpacked: Path) -> None:
    """The authors' two text tables as the CSV files that WILDS reads, beside the images, in ``celebA_v1.0/``."""
    root = unpacked / "celebA_v1.0"
    root.mkdir()
    (unpacked / "img_align_celeba").rename(root / "img_align_celeba")
    attributes = (unpacked / "list_attr_celeba.txt").read_text("utf-8").splitlines()[1:]  # the first is their number
    partition = (unpacked / "list_eval_partition.txt").read_text("utf-8").splitlines()
    for name, header, lines in (
        ("list_attr_celeba.csv", ["image_id", *attributes[0].split()], attributes[1:]),
        ("list_eval_partition.csv", ["image_id", "partition"], partition),
    ):
        with (root / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(line.split() for line in lines if line.strip())])


def _digits(name: str, size: int, md5: str, sha256: str) -> Archive:
    hosts = "https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"
    return Archive(name, tuple(host + name for host in hosts), size, 0, (f"md5:{md5}", f"sha256:{sha256}"), _TFDS)


def _domain(path: str, about: int, sha512: str) -> Archive:
    source = "ai.bu.edu/M3SDA (size), kwcoco (start of sha512)"
    return Archive(path.rpartition("/")[2], (_BU + path,), None, about, (f"sha512:{sha512}",), source)


def _list(name: str, sha512: str = "") -> Archive:
    checksums, source = ((f"sha512:{sha512}",), "kwcoco (start of sha512)") if sha512 else ((), "")
    return Archive(name, (f"{_BU}domainnet/txt/{name}",), checksums=checksums, source=source)


def _faces(drive_id: str, name: str, size: int, md5: str, sha256: str) -> Archive:
    return Archive(name, (_DRIVE + drive_id,), size, 0, (f"md5:{md5}", f"sha256:{sha256}"), _TFDS)


def _wilds(folder: str, bundle: str, size: int, contains: tuple[str, ...], licence: str) -> Release:
    archive = Archive(f"{folder}.tar.gz", (_CODALAB.format(bundle),), about=size, source="wilds 2.0.0 (rough size)")
    return Release(folder, (archive,), contains, licence, gone=_WILDS_GONE.format(f"{folder}/"))


def _by_folder(cls: type[NamedImageFolder], counts: Mapping[str, int]) -> dict[str, int]:
    """Images of each environment, by its folder."""
    return {cls.FOLDERS[(cls.ENVIRONMENTS or ()).index(name)]: number for name, number in counts.items()}


def _all_splits(cls: type[ComposedDataset]) -> dict[str, int]:
    """Images of the whole release."""
    return {"": sum(sum(groups) for groups in cls.PUBLISHED_COUNTS.values())}


def _whole_and_parts(cls: type[NamedImageFolder]) -> tuple[str, ...]:
    """Names of the dataset and of those that are one environment of it."""
    return cls.__name__, *(f"{cls.__name__}InDistribution_{name}" for name in cls.ENVIRONMENTS or ())


_MNIST = Release(
    "MNIST/raw",
    (
        _digits(
            "train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        _digits(
            "train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        _digits(
            "t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        _digits(
            "t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    "CC BY-SA 3.0",
    growth=4.8,
)  # fmt: skip

_SPAWRIOUS_IMAGES = (  # in each of the two folders
    len(SpawriousBenchmark.CONFOUNDERS) * len(SpawriousBenchmark.CLASSES) * SpawriousBenchmark.IMAGES
)
_SPAWRIOUS = Release(
    "spawrious224",
    (
        Archive(
            "spawrious224.tar.gz",
            ("https://www.dropbox.com/s/e40j553480h3f3s/spawrious224.tar.gz?dl=1",),
            source="address: github.com/aengusl/spawrious",
        ),
    ),
    ("0", "1"),
    "MIT",
    counts=(dict.fromkeys("01", _SPAWRIOUS_IMAGES),),
    also=("",),
)

ARCHIVES: dict[str, Release] = {
    **dict.fromkeys(("ColoredMNIST", "ColoredMNIST224", "RotatedMNIST"), _MNIST),
    **dict.fromkeys(_whole_and_parts(VLCS), Release(
        VLCS.DIRECTORY,
        (
            Archive(
                "VLCS.tar.gz",
                (f"{_DRIVE}1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", f"{_DRIVE}1yDuLrJdPSvMbTmpq-7XmwG0HnJengD-T"),
                about=3_600_000_000,
                checksums=("md5:8870171eba660927d9668f4e515928e4",),
                source="github.com/LarsKue/context-aware-domain-generalization",
            ),
        ),
        tuple(VLCS.FOLDERS),
        "not stated by the release",
        counts=({"": VLCS.PUBLISHED_COUNTS["all"]},),
    )),
    "PACS": Release(
        PACS.DIRECTORY,
        (
            Archive(
                "PACS.zip",
                # DomainBed's own file is gone; this is Dassl.pytorch's, and the copy of DomainBed issue 165.
                (f"{_DRIVE}1m4X4fROCCXMO0lRLrr6Zz9Vb3974NWhE", f"{_DRIVE}1WWi9tuUNFmUiw7Eirq_JT_hxYZv3J-Vv"),
                about=191_000_000,
                checksums=(
                    "sha256:0dc9d0176fa27c9b4504e7c2e962aebe6a79ed0c1819b84148786e590f87e102",
                    "md5:fd5db817f7cdafeef3bfd525aaf9b42e",
                ),
                source="users of Dassl.pytorch's file (sha256); github.com/LarsKue/context-aware-domain-generalization "
                "of DomainBed's (md5); size: of a copy",
            ),
        ),
        tuple(PACS.FOLDERS),
        "not stated by the release",
        counts=(_by_folder(PACS, PACS.PUBLISHED_COUNTS),),
    ),
    "OfficeHome": Release(
        OfficeHome.DIRECTORY,
        (
            Archive(
                "office_home.zip",
                (
                    f"{_DRIVE}0B81rNlvomiwed0V1YUxQdC1uOTg&resourcekey=0-2SNWq0CDAuWOBRRBL7ZZsw",
                    f"{_DRIVE}1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC",
                    f"{_DRIVE}1USXqK4nCvOAR5Ty4iwKcuCOrRJoRuDyU",
                ),
                about=1_100_000_000,
                checksums=("md5:b1c14819770c4448fd5b6d931031c91c",),
                source="github.com/LarsKue/context-aware-domain-generalization, and others alike",
            ),
        ),
        tuple(OfficeHome.FOLDERS),
        "a fair-use notice, quoted by the dataset cards of its copies",
        counts=(_by_folder(OfficeHome, OfficeHome.PUBLISHED_COUNTS),),
    ),
    **dict.fromkeys(_whole_and_parts(TerraIncognita), Release(
        TerraIncognita.DIRECTORY,
        (
            Archive(
                "eccv_18_all_images_sm.tar.gz",
                (f"{_LILA}eccv_18_all_images_sm.tar.gz",),
                6_492_615_601,
                source="users' download scripts (size); the server sends an MD5 along",
            ),
            Archive(
                "eccv_18_annotations.tar.gz",
                (f"{_LILA}eccv_18_annotations.tar.gz",),
                2_997_071,
                source="users' download scripts (size); the server sends an MD5 along",
            ),
        ),
        tuple(TerraIncognita.FOLDERS),
        "Community Data License Agreement, permissive",
        counts=(
            _by_folder(TerraIncognita, TerraIncognita.PUBLISHED_COUNTS),
            _by_folder(TerraIncognita, TerraIncognita.COUNTS_OF_THE_PAPER),
        ),
        arrange=sort_camera_traps,
    )),
    "DomainNet": Release(
        DomainNet.DIRECTORY,
        (
            _domain("groundtruth/clipart.zip", 1_300_000_000, "3bcfb9ec1b4061e8d5b0b887d4ebd4a708732787fc563c6dfc2d"),
            _domain("infograph.zip", 4_000_000_000, "47841f0d1b8606e4b02d508b250484d54f5cf04ef6c4875c6c5a39c"),
            _domain(
                "groundtruth/painting.zip", 3_700_000_000, "4c98b02563075948668a298c488660fda1d1a7ed85fd69caa7985fba"
            ),
            _domain("quickdraw.zip", 439_000_000, "127cce1dd57fc99992f8614de77d03ae8ed6af242973f7a013ec0a"),
            _domain("real.zip", 5_600_000_000, "751713d4592d1278b50bf69787988cfae280cabdac80ee34ec4016e"),
            _domain("sketch.zip", 2_500_000_000, "369b8b6d78ac61bfcc85f660d878ba5fc701524b82bbc2eb65ca9a"),
            _list("clipart_train.txt", "400985ce2a0878df2d8e54f1996c4fc253e577c1f91136304e553b"),
            _list("clipart_test.txt", "4d34a4a540d8b139499581875e2d18bbedd37c347233523d66beaf"),
            _list("infograph_train.txt", "d9ed4d86e2ea20b44315699964b6b7dc09442f0539300444d9329d"),
            _list("infograph_test.txt", "700f2b5deaad3923b0b8b85aeb694b73f24b13255cf48db3e770eaf"),
            _list("painting_train.txt"),
            _list("painting_test.txt"),
            _list("quickdraw_train.txt", "7410e8a1debd769e0412725a0fcc646d83055d297b5f44a92f50308"),
            _list("quickdraw_test.txt", "07a97e84d723f58dea67683ae5ddf013ebc5d33b76deca9a5d34f72"),
            _list("real_train.txt", "a5a510fec614018546510d55c378bca008fcfd51062f6414583639e"),
            _list("real_test.txt", "9586235e335340f065de720f99332bc906aa0ab147006a1a7ea4925"),
            _list("sketch_train.txt", "ee92102f2b98f11765e6a97afbab15c60f2bac6e30fa7e1bc5a7db"),
            _list("sketch_test.txt", "7384fc06670979911d7e1e9a34ba8a6cd20e9e77d6bc3536c739ff4"),
        ),
        tuple(DomainNet.FOLDERS),
        "a fair-use notice, quoted by the wilds package",
        counts=(_by_folder(DomainNet, DomainNet.PUBLISHED_COUNTS),),
        arrange=drop_duplicates,
    ),
    "SVIRO": Release(
        SVIRO.DIRECTORY,
        (Archive("SVIRO_DOMAINBED.zip", ("https://sviro.kl.dfki.de/?wpdmdl=1731",), source="address: DomainBed"),),
        tuple(SVIRO.FOLDERS),
        "CC BY-NC-SA 4.0, as others state it",
    ),
    "WILDSCamelyon": _wilds(
        "camelyon17_v1.0", "0xe45e15f39fb54e9d9e919556af67aabe", 10_658_709_504, ("metadata.csv", "patches"), "CC0"
    ),
    "WILDSFMoW": _wilds(
        "fmow_v1.1", "0xaec91eb7c9d548ebb15e1b5e60f966ab", 53_893_324_800,
        ("rgb_metadata.csv", "country_code_mapping.csv", "images"), "FMoW Challenge Public License",
    ),
    **dict.fromkeys(
        (
            "SpawriousO2O_easy", "SpawriousO2O_medium", "SpawriousO2O_hard",
            "SpawriousM2M_easy", "SpawriousM2M_medium", "SpawriousM2M_hard",
        ),
        _SPAWRIOUS,
    ),
    "Waterbirds": Release(
        "waterbirds_v1.0",
        (
            Archive(
                "waterbird_complete95_forest2water2.tar.gz",
                (
                    "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz",
                    "https://downloads.cs.stanford.edu/nlp/data/dro/waterbird_complete95_forest2water2.tar.gz",
                ),
                about=492_000_000,
                source="address: github.com/kohpangwei/group_DRO; size: of a copy",
            ),
        ),
        ("metadata.csv",),
        "non-commercial research and education",
        counts=(_all_splits(Waterbirds),),
        files={"RELEASE_v1.0.txt": "v1.0, the files of waterbird_complete95_forest2water2.tar.gz\n"},
    ),
    "CelebA": Release(
        "celebA_v1.0",
        (
            _faces(
                "0B7EVK8r0v71pZjFTYXZWM3FlRnM", "img_align_celeba.zip", 1_443_490_838,
                "00d2c5bc6d35e252742224ab0c1e8fcb",
                "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",
            ),
            _faces(
                "0B7EVK8r0v71pblRyaVFSWGxPY0U", "list_attr_celeba.txt", 26_721_026,
                "75e246fa4810816ffd6ee81facbd244c",
                "f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0",
            ),
            _faces(
                "0B7EVK8r0v71pY0NSMzRuSXJEVkk", "list_eval_partition.txt", 2_836_386,
                "d32c9cbf5e040fd4025c592c306e6668",
                "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7",
            ),
        ),
        ("img_align_celeba", "list_attr_celeba.csv", "list_eval_partition.csv"),
        "non-commercial research",
        counts=(_all_splits(CelebA),),
        arrange=write_face_tables,
        files={"RELEASE_v1.0.txt": "v1.0, made from the authors' img_align_celeba.zip and text tables\n"},
    ),
}  # fmt: skip

"""Downloads datasets: ``python -m domainbed.scripts.download --data_dir D --dataset TerraIncognita``; ``--list``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from domainbed import messages, registry, releases
from domainbed.claims import RunLocked, lock
from domainbed.datasets.archives import ARCHIVES
from domainbed.downloading import Archive, Progress
from domainbed.releases import Release
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser


def parser() -> DomainBedParser:
    """DomainBed's one flag, then ours."""
    p = DomainBedParser(["data_dir"], description=__doc__)
    p.add_argument("--data_dir", required=True, help="the directory of all datasets; their folders are made in it")
    p.add_argument("--dataset", nargs="+", metavar="NAME", help="what to download")
    p.add_argument("--list", action="store_true", help="what there is, and what of it is here")
    p.add_argument("--keep_archives", action="store_true", help="leave the archives in DATA_DIR/.downloads")
    return p


def main(argv: Sequence[str]) -> int:
    """Lists the datasets or downloads some of them.

    Raises:
        BadInput: nothing or something unknown is asked for, or it can't be had.
    """
    args = parser().parse_args(argv)
    data_dir = Path(args.data_dir)
    if not args.list and not args.dataset:
        raise BadInput(f"name what to download: --dataset NAME [NAME ...], or --list; known: {', '.join(ARCHIVES)}")
    names = args.dataset or list(ARCHIVES)
    for name in names:
        if name not in ARCHIVES and name in registry.names("datasets"):
            raise BadInput(f"{name} needs no download; known: {', '.join(ARCHIVES)}")
        if name not in ARCHIVES:
            raise BadInput(messages.not_found("dataset", name, ARCHIVES))
    if args.list:
        print(listing({name: ARCHIVES[name] for name in names}, data_dir), end="")
        return 0
    failed = [name for name in names if not download(name, data_dir, args.keep_archives)]
    if failed:
        raise BadInput(f"not downloaded: {', '.join(failed)}")
    return 0


def download(name: str, data_dir: Path, keep_archives: bool) -> bool:
    """Installs one dataset and says what was done; a failure is printed, so that the others get their turn."""
    release = ARCHIVES[name]
    try:
        with bad_input():
            downloads = data_dir / releases.DOWNLOADS
            downloads.mkdir(parents=True, exist_ok=True)
            with lock(downloads):
                done = releases.install(release, data_dir, show, keep_archives)
    except RunLocked:
        print(f"{name}: another download is at work in {downloads}; wait for it")
        return False
    except BadInput as error:
        print(f"{name}: {error}")
        return False
    folder = releases.place(release, data_dir)
    print(f"{name}: {'downloaded to' if done else 'complete already in'} {folder}")
    for archive in release.archives if done else ():
        if not archive.checksums:
            print(f"  {archive.name}: no checksum is published; sha256 {releases.recorded(archive, data_dir)} is kept")
    for difference in releases.differences(release, folder) if done else ():
        print(f"  {difference}")
    return True


def show(archive: Archive) -> Progress:
    """A bar for one archive."""
    bar = tqdm(desc=archive.name, unit="B", unit_scale=True, unit_divisor=1024)

    def progress(have: int, total: int | None) -> None:
        bar.total = total
        bar.update(have - bar.n)
        if have == total:
            bar.close()

    return progress


def listing(chosen: Mapping[str, Release], data_dir: Path) -> str:
    """The table of ``--list``: one row per dataset, below it one per archive; shared files stand once."""
    lines, shown = [], set()
    rows = [("dataset", "folder", "licence", "state")]
    rows += [
        (name, release.folder, release.licence, releases.state(release, data_dir)) for name, release in chosen.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, release in zip(rows, [None, *chosen.values()], strict=True):
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
        if release is None or release.folder in shown:
            continue
        shown.add(release.folder)
        for archive in release.archives:
            checksums = ", ".join(map(releases.short, archive.checksums)) or "no checksum published"
            lines.append(f"    {archive.name}: {releases.size_text([archive])}, {checksums}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)

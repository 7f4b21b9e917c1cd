"""Makes one page of HTML of a sweep, also while it runs: ``... --input_dir sweep_output --out report.html``.

The page needs no network and no other file. It holds the states of all jobs, every table of collect_results, the
figures in the sweep's ``figures`` folder, charts and a page of each run, the datasets' cards, and the commands.
"""

import shlex
from pathlib import Path

from domainbed import model_selection, run_directory, run_index
from domainbed.report.data import look
from domainbed.report.page import page
from domainbed.scripts import bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.scripts.collect_results import REFERENCE


def parser() -> DomainBedParser:
    """The arguments of report."""
    parser = DomainBedParser((), description=__doc__)
    parser.add_argument("--input_dir", required=True, help="the sweep's output_dir")
    parser.add_argument("--out", help="the page; default: report.html in the sweep's directory")
    parser.add_argument(
        "--criterion",
        choices=list(model_selection.CRITERIA),
        default="aa_wga",
        help="what chooses the checkpoints of the charts and of the list of runs; each table says what chose its own",
    )
    return parser


def main(argv: list[str]) -> int:
    """Writes the page; returns the exit status.

    Raises:
        BadInput: the directory is no sweep's, or the page can't be written.
    """
    args = parser().parse_args(argv)
    out = Path(args.out or Path(args.input_dir, "report.html"))
    with bad_input():
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}; make it first")
        sweep = look(args.input_dir, args.criterion)
    command = shlex.join(["python", "-m", "domainbed.scripts.report", *argv])
    text = page(sweep, run_index.collect(args.input_dir), args.criterion, command, REFERENCE)
    with bad_input(), run_directory.whole(out) as file:
        file.write(text.encode())
    print(f"{out}: {len(sweep.runs)} jobs, {len(text.encode()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_cli(main)

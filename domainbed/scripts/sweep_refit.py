"""The jobs of the sweep script's refit: the draws that validation chose in a search, with fresh seeds."""

import argparse
import logging
import os
from pathlib import Path

from domainbed import refit, run_directory
from domainbed.jobs import EXTRAS, Job, make_jobs
from domainbed.lib import reporting
from domainbed.scripts import bad_input
from domainbed.scripts.sweep_arguments import OF_THE_SEARCH
from domainbed.scripts.sweep_jobs import check_output_dir, more_words
from domainbed.sweep_rows import SweepRow

logger = logging.getLogger(__name__)


def refit_jobs(args: argparse.Namespace) -> list[Job]:
    """The jobs that train the chosen draws of ``args.input_dir`` with fresh seeds; prints what was chosen.

    Raises:
        BadInput: there is no search, or nothing in it of what is asked for; see ``refit.choose_draws`` and
            ``make_jobs``; or the output would go to the search.
    """
    with bad_input():
        check_output_dir(args.output_dir)
        if os.path.realpath(args.input_dir) == os.path.realpath(args.output_dir):
            raise ValueError(f"--output_dir {args.output_dir} holds the search; name another one for its chosen draws")
        records = _searched_records(args)
        if len({record["args"]["trial_seed"] for record in records}) > 1:
            logger.warning(
                "the search has several trial seeds: rows may be refit on different splits; see --n_trials 1"
            )
        draws = refit.choose_draws(records, args.criterion, args.controls)
        changes = {key: getattr(args, key) for key in ("steps", "data_dir", *EXTRAS) if key not in OF_THE_SEARCH}
        jobs = make_jobs(refit.refit_args_list(draws, args.seeds, changes), args.output_dir, more_words(args))
    for draw in draws:
        print(f"Chosen by {args.criterion}: {draw}")
    return jobs


def _searched_records(args: argparse.Namespace) -> list[refit.Record]:
    """The records of ``args.input_dir`` that the given datasets, algorithms and rows leave; warns of unfinished runs.

    Raises:
        FileNotFoundError: there are none.
    """
    if not os.path.isdir(args.input_dir):
        raise FileNotFoundError(f"--input_dir {args.input_dir} is no directory; name the --output_dir of a sweep")
    records = reporting.load_records(args.input_dir)
    if not len(records):
        raise FileNotFoundError(f"--input_dir {args.input_dir} holds no records; name the --output_dir of a sweep")
    rows = [*map(SweepRow.parse, args.algorithms or ()), *args.rows]
    taken = refit.wanted(records, args.datasets or (), rows)
    if not taken:
        raise FileNotFoundError(f"--input_dir {args.input_dir} holds no records of these datasets and algorithms")
    _warn_of_unfinished(args.input_dir)
    return taken


def _warn_of_unfinished(input_dir: str) -> None:
    unfinished = [path for path in Path(input_dir).iterdir() if path.is_dir() and not run_directory.is_done(path)]
    if unfinished:
        logger.warning("%d runs in %s are not finished; they count as far as they got", len(unfinished), input_dir)

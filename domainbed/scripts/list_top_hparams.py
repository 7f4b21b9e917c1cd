"""Lists the draws of a sweep's hparams for one test environment, best first, as each selection method ranks them.

    python -m domainbed.scripts.list_top_hparams --input_dir runs --dataset PACS --algorithm ERM --test_env 0

Rows that share the algorithm and differ in something else (the partition, overridden hparams) are listed one by one.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed import records as record_files
from domainbed.lib import reporting
from domainbed.lib.query import Q
from domainbed.messages import not_found
from domainbed.rows import for_domainbed
from domainbed.scripts import BadInput, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.scripts.collect_results import SELECTION_METHODS

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]


def parser() -> DomainBedParser:
    p = DomainBedParser(["input_dir", "dataset", "algorithm", "test_env"], description=__doc__.splitlines()[0])
    p.add_argument("--input_dir", required=True, help="the sweep's output_dir")
    p.add_argument("--dataset", required=True)
    p.add_argument("--algorithm", required=True, help="its name, or a row's as the tables print it")
    p.add_argument("--test_env", type=int, required=True, help="number of the test environment")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints the lists; returns the exit status.

    Raises:
        BadInput: no such runs, or none that tests on that environment alone.
    """
    args = parser().parse_args(argv)
    if not Path(args.input_dir).is_dir():
        raise BadInput(f"--input_dir {args.input_dir} is no directory; name the --output_dir of a sweep")
    records = [r for r in record_files.iterate(args.input_dir) if not record_files.is_full_data(r)]
    rows = rows_of(records, args.dataset, args.algorithm, args.test_env)
    print("Total records:", len(records))
    for line in listing(rows, args.algorithm, args.test_env):
        print(line)
    return 0


def rows_of(records: Sequence[Record], dataset: str, algorithm: str, test_env: int) -> dict[str, Q]:
    """The records that rank the runs of each row that tests on one environment, by the row's name.

    Args:
        algorithm: of the rows, or the name of one.

    Raises:
        BadInput: there are none.
    """
    found = _matching(records, "dataset", dataset)
    renamed, algorithms = for_domainbed(found)
    if algorithm in algorithms.values():
        names = [name for name, of in algorithms.items() if of == algorithm]
    elif algorithm in algorithms:
        names = [algorithm]
    else:
        raise BadInput(not_found("algorithm", algorithm, sorted({*algorithms.values(), *algorithms})))
    tested = {name: [r for r in renamed if r["args"]["algorithm"] == name] for name in names}
    tested = {name: [r for r in some if test_env in r["args"]["test_envs"]] for name, some in tested.items()}
    alone = {name: Q(some) for name, some in tested.items() if any(len(r["args"]["test_envs"]) == 1 for r in some)}
    if not alone:
        raise BadInput(_no_runs(renamed, names, test_env))
    for name in tested.keys() - alone.keys():
        logger.warning("left out %s: none of its runs tests on environment %d alone", name, test_env)
    return alone


def _matching(records: Sequence[Record], key: str, value: str) -> list[Record]:
    if not records:
        raise BadInput("--input_dir holds no records (*/results.jsonl); name the --output_dir of a sweep")
    found = [record for record in records if record["args"][key] == value]
    if not found:
        raise BadInput(not_found(key, value, dict.fromkeys(record["args"][key] for record in records)))
    return found


def _no_runs(records: Sequence[Record], names: Sequence[str], test_env: int) -> str:
    """Why there is nothing to rank: which test environments these rows have."""
    envs = sorted({tuple(r["args"]["test_envs"]) for r in records if r["args"]["algorithm"] in names})
    there = "; ".join(" ".join(map(str, some)) for some in envs)
    text = f"no run of {', '.join(names)} tests on environment {test_env} alone; test_envs there: {there}"
    several = any(test_env in some for some in envs)
    return f"{text}; collect_results has tables of runs with several test environments" if several else text


def listing(rows: Mapping[str, Q], algorithm: str, test_env: int) -> Iterator[str]:
    """The lines, in DomainBed's layout; rows that are not simply the algorithm are introduced by their names."""
    for method in SELECTION_METHODS:
        yield f"Model selection: {method.name}"
        for name, records in rows.items():
            if list(rows) != [algorithm]:
                yield f"row: {name}"
            for group in reporting.get_grouped_records(records).filter_equals("test_env", test_env):
                trial, replicate = group["trial_seed"]
                yield f"trial_seed: {trial}" + (f" (seed {replicate + 1} of each draw)" if replicate else "")
                for accs, run in method.hparams_accs(group["records"]):
                    yield f"\t{accs}"
                    yield from _draw(run)


def _draw(run: Q) -> Iterator[str]:
    """The hparams of one draw, and where its runs are."""
    hparams = run[0].get("hparams", {})
    if other := next((record for record in run if record.get("hparams", {}) != hparams), None):
        seed, places = run[0]["args"]["hparams_seed"], (run[0]["args"]["output_dir"], other["args"]["output_dir"])
        raise BadInput(f"runs of hparams_seed {seed} have other hparams than each other: {' and '.join(places)}")
    yield "\t\thparams:"
    yield from (f"\t\t\t{name}: {value}" for name, value in sorted(hparams.items()))
    yield "\t\toutput_dirs:"
    yield from (f"\t\t\t{place}" for place in run.map(lambda record: record["args"].get("output_dir")).unique())


if __name__ == "__main__":
    run_cli(main)

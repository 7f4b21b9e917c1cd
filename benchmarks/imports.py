"""What it costs to import the package, against the packages that DomainBed's modules import.

``python benchmarks/imports.py`` prints a Markdown table of CPU seconds (user and system): medians over processes of
both kinds, which take turns. A package that is not installed is left out of DomainBed's list, and named.
"""

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys

ALGORITHMS = ("torch", "torchvision", "timm", "backpack")  # of DomainBed's ``domainbed.algorithms`` and ``networks``
TABLES = (*ALGORITHMS, "wilds")  # of its ``collect_results``, which imports algorithms and datasets
OURS = {"domainbed.algorithms": ALGORITHMS, "domainbed.scripts.collect_results": TABLES}


def cpu_s(*modules: str) -> float:
    """CPU seconds of a process that imports the modules and ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="processes of each kind")
    repeats = parser.parse_args().repeats
    print("| import | CPU s | DomainBed's packages | CPU s | ratio |\n|---|---|---|---|---|")
    for ours, packages in OURS.items():
        present = [package for package in packages if importlib.util.find_spec(package)]
        missing = [package for package in packages if package not in present]
        pairs = [(cpu_s(ours), cpu_s(*present)) for _ in range(repeats + 1)][1:]  # the first reads the disk
        own, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        names = ", ".join(present) + (f" (not installed: {', '.join(missing)})" if missing else "")
        print(f"| `{ours}` | {own:.2f} | {names} | {theirs:.2f} | {own / theirs:.2f} |")


if __name__ == "__main__":
    main()

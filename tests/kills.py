"""Kills trainings at random and at all instants; each must end as if nothing had happened: ``python tests/kills.py``.

A run is killed some times, each time somewhere else, and then left to finish. Its models must be equal to those of an
undisturbed run byte by byte, and its records but for their times; no record may be missing or doubled, no file left
over. Exit status 1 if anything differs.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before torch and numpy are imported
os.environ["DOMAINBED_PLUGINS"] = str(Path(__file__).with_name("kills_plugin.py"))
sys.path.insert(0, str(Path(__file__).parent))

from kills_harness import PHASES, WRITES, Attempt, Operations, Page, difference, start

EXIT_PREEMPTED = 75
LEFT_BEHIND = ("done", "err.txt", "explanations.jsonl", "lock", "model", "out.txt", "results.jsonl")
DIGITS = "--dataset DigitsM2M --steps 24 --checkpoint_freq 12 --eval_splits selection"
FEW = "--dataset FewImages --steps 24 --checkpoint_freq 7"
DEBUG = "--dataset Debug28 --steps 2 --checkpoint_freq 1"


@dataclass(frozen=True)
class Case:
    """One training: its flags and hparams, and the seconds between two snapshots where it is killed without warning."""

    algorithm: str
    flags: str = FEW
    hparams: dict[str, float] = field(default_factory=dict)
    save_every_s: float = 0.0

    def argv(self, directory: Path, save_every_s: float) -> list[str]:
        hparams = json.dumps({"batch_size": 8, "backbone": "small_cnn"} | self.hparams)
        words = ["--algorithm", self.algorithm, *self.flags.split(), "--hparams", hparams]
        return [*words, "--output_dir", str(directory), "--save_every_s", str(save_every_s)]


CASES = {
    "ERM": Case("ERM", DIGITS, save_every_s=0.02),
    "GroupDRO": Case("GroupDRO", f"{FEW} --keep_best aa_wga"),
    "DANN": Case("DANN", f"{FEW} --task domain_adaptation --uda_holdout_fraction 0.3"),
    "IRM": Case("IRM", f"{FEW} --keep_best aa_wga", {"irm_penalty_anneal_iters": 9}),
    "EX2L_MAE": Case("EX2L_MAE", f"{FEW} --keep_best aa_wga --explain 4"),
    "ALIGN": Case("ALIGN", f"{FEW} --save_model_every_checkpoint", {"warmup_steps": 6}),
    "CARE": Case("CARE", f"{FEW} --keep_best aa_wga", {"care_warmup": 5, "patience": 2, "min_delta": 1.0}),
    "KeepsMuch": Case("KeepsMuch"),
    "MakesLate": Case("MakesLate", "--dataset Debug28 --steps 12 --checkpoint_freq 5"),
    "Loaders": Case("KeepsMuch", "--dataset OpenedImages --steps 8 --checkpoint_freq 3 --keep_best aa_wga"),
    "NoLoaders": Case("KeepsMuch", "--dataset OpenedHere --steps 8 --checkpoint_freq 3"),
    "short": Case("GroupDRO", f"{DEBUG} --explain 2 --keep_best aa_wga"),
}
SHORT = "short"  # where each operation is tried


class Bench:
    """A case's directory: always the same, since its name is part of the models."""

    def __init__(self, name: str, root: Path, page: Page):
        self.name, self.case, self.page = name, CASES[name], page
        self.root = root / name
        self.run, self.reference, self.log = self.root / "run", self.root / "reference", self.root / "log"
        self.runs, self.kills, self.requests, self.faults = 0, Counter[str](), Counter[str](), list[str]()
        self.root.mkdir()
        self._measure()

    def _measure(self) -> None:
        """The undisturbed run: what it leaves, its operations, and how often it was how long in which phase."""
        names, modules = self.root / "operations", self.root / "modules"
        argv = self.case.argv(self.run, self.case.save_every_s)
        self.page.clear()
        status = start(argv, self.log, Operations(log=names).watch, self.page.watch, modules=modules).wait()
        if status != 0:
            raise RuntimeError(f"{self.name} ends with {status} undisturbed:\n{self.log.read_text()}")
        if left := [path.name for path in self.run.iterdir() if not path.name.startswith(LEFT_BEHIND)]:
            raise RuntimeError(f"{self.name} leaves {left} undisturbed")
        self.operations = names.read_text().split()
        self.entries = {phase: self.page.entries(phase) for phase in PHASES}
        self.duration = {phase: self.page.seconds(phase) / max(1, self.entries[phase]) for phase in PHASES}
        self.run.rename(self.reference)
        for name in modules.read_text().split("\n"):  # so that the attempts to come need not import them
            with suppress(Exception):
                importlib.import_module(name)

    def start(self, *watchers: Callable[[], None], save_every_s: float | None = None) -> Attempt:
        self.page.clear()
        seconds = self.case.save_every_s if save_every_s is None else save_every_s
        return start(self.case.argv(self.run, seconds), self.log, *watchers)

    def begin(self) -> None:
        """Makes way for the next run."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.runs += 1

    def end(self, what: str) -> None:
        """Lets the run finish and looks at what it leaves."""
        status = self.start(self.page.watch).wait()
        fault = f"exit status {status}" if status else difference(self.reference, self.run)
        if fault:
            kept = self.root / f"fault.{len(self.faults)}"
            shutil.copytree(self.run, kept, dirs_exist_ok=True)
            shutil.copy(self.log, kept / "log")
            self.fault(f"{what}: {fault} (see {kept})")

    def count(self, number: int, phase: str) -> None:
        """A process ended in that phase, of that signal."""
        (self.kills if number == signal.SIGKILL else self.requests)[phase] += 1

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"UNEQUAL {self.name}: {text}", flush=True)


def kill_at_random(bench: Bench, rng: random.Random, number: int, kills: int) -> None:
    """One run, killed at up to so many random instants; a signal that can be caught must be answered by a snapshot."""
    bench.begin()
    story = []
    save_every_s = None if number == signal.SIGKILL else 60.0
    for _ in range(kills):
        phase = rng.choice([phase for phase in PHASES if bench.entries[phase]])
        entry = rng.randint(1, max(1, round(0.4 * bench.entries[phase])))
        delay = rng.uniform(0, bench.duration[phase])
        attempt = bench.start(bench.page.watch, save_every_s=save_every_s)
        while attempt.poll() is None and bench.page.entries(phase) < entry:
            time.sleep(0.0001)
        time.sleep(delay)
        found = bench.page.phase
        attempt.kill(number)
        status = attempt.wait()
        if status == -signal.SIGKILL == -number:
            found = bench.page.phase
        story.append(f"{found} (status {status})")
        if status == 0:
            break  # it was done before
        bench.count(number, found)
        if status not in _allowed(number, found) and not (bench.run / "done").exists():
            bench.fault(f"exit status {status} after signal {number} in {found}")
        if status == EXIT_PREEMPTED and not (bench.run / "snapshot.pkl").exists():
            bench.fault(f"signal {number} in {found}: no snapshot")
    bench.end(f"signal {number} in {', '.join(story)}")


def _allowed(number: int, phase: str) -> tuple[int, ...]:
    """The exit statuses of who was sent the signal; who only begins may not listen yet."""
    if number == signal.SIGKILL:
        return (-number,)
    return (EXIT_PREEMPTED, -number) if phase == "start" else (EXIT_PREEMPTED,)


def kill_at_operations(bench: Bench, rng: random.Random, every: int) -> None:
    """A run for each of the undisturbed run's file operations: it ends right before it, and in the midst of it.

    Of those that end before it a second one ends once more, at a random operation of the attempt that goes on.
    """
    numbers = range(rng.randrange(every), len(bench.operations), every)
    plans = itertools.chain.from_iterable(_deaths(n, bench.operations[n], rng) for n in numbers)
    for deaths in plans:
        bench.begin()
        for operations in deaths:
            attempt = bench.start(bench.page.watch, operations.watch)
            if attempt.wait() == -signal.SIGKILL:
                bench.count(signal.SIGKILL, bench.page.phase)
        bench.end("ended at operation " + ", then ".join(f"{o.fatal}{' torn' * o.torn}" for o in deaths))


def _deaths(number: int, name: str, rng: random.Random) -> Iterator[list[Operations]]:
    yield [Operations(number)]
    yield [Operations(number), Operations(rng.randrange(25))]
    if name in WRITES:
        yield [Operations(number, torn=True)]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 128):  # between two entries are up to 63 bytes of no meaning
        content[i] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 4)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"epoch": 0.0', '"epoch": 5.0', 1))


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "flipped bits": (flip, ("snapshot.pkl",)),
    "a torn snapshot": (cut, ("snapshot.pkl",)),
    "two damaged snapshots": (flip, ("snapshot.pkl", "snapshot_previous.pkl")),
    "torn records": (cut, ("results.jsonl",)),
    "edited records": (edit, ("results.jsonl",)),
}


def damage_files(bench: Bench) -> None:
    """A run for each kind of damage to its files after a kill: a warning, and it goes on from what is whole."""
    late = bench.operations.index("save", len(bench.operations) * 2 // 3)  # here both snapshots exist
    for what, (damage, names) in DAMAGES.items():
        bench.begin()
        bench.start(bench.page.watch, Operations(late).watch).wait()
        for name in names:
            damage(bench.run / name)
        bench.end(what)
        log = bench.log.read_text()
        if "a snapshot is passed over" not in log:
            bench.fault(f"{what}: no warning")
        if ("resumed after" in log) != (names == ("snapshot.pkl",)):
            bench.fault(f"{what}: resumed, or not, where it should not, or should")


def table(benches: list[Bench]) -> str:
    """Kills (and requests) of each case by the phase in which they came."""
    head = f"{'case':<12}{'runs':>6}" + "".join(f"{phase:>11}" for phase in (*PHASES, "all")) + "  equal"
    rows = [
        f"{bench.name:<12}{bench.runs:>6}"
        + "".join(f"{_cell(bench.kills[phase], bench.requests[phase]):>11}" for phase in PHASES)
        + f"{_cell(bench.kills.total(), bench.requests.total()):>11}  {'no' if bench.faults else 'yes'}"
        for bench in benches
    ]
    return "\n".join([head, *rows])


def _cell(kills: int, requests: int) -> str:
    return f"{kills}+{requests}" if requests else str(kills)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="SIGKILL to the process group at random instants")
    p.add_argument("--requests", type=int, default=0, help="SIGTERM or SIGUSR1 at random instants, in place of SIGKILL")
    p.add_argument("--per_run", type=int, default=5, help="the most kills or requests of one run")
    p.add_argument("--operations", type=int, default=0, help="end at every N-th file operation of a short run; 0: none")
    p.add_argument("--damage", action="store_true", help="damage files after a kill")
    p.add_argument("--cases", nargs="*", choices=list(CASES), default=[name for name in CASES if name != SHORT])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", type=Path, help="an existing directory, for what is left of runs that differ")
    return p


def strike(benches: list[Bench], args: argparse.Namespace, rng: random.Random) -> None:
    """All that was asked for."""
    chances = itertools.cycle(benches)
    signals = itertools.cycle((signal.SIGTERM, signal.SIGUSR1))
    while (left := args.kills - _killed(benches)) > 0:
        kill_at_random(next(chances), rng, signal.SIGKILL, min(left, args.per_run))
    while (left := args.requests - _requested(benches)) > 0:
        kill_at_random(next(chances), rng, next(signals), min(left, args.per_run))


def _killed(benches: list[Bench]) -> int:
    return sum(bench.kills.total() for bench in benches)


def _requested(benches: list[Bench]) -> int:
    return sum(bench.requests.total() for bench in benches)


def main() -> int:
    args, started = parser().parse_args(), time.monotonic()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=args.work))
    page = Page()
    benches = [Bench(name, root, page) for name in args.cases]
    strike(benches, args, rng)
    if args.operations or args.damage:
        benches.append(Bench(SHORT, root, page))
    if args.operations:
        kill_at_operations(benches[-1], rng, args.operations)
    if args.damage:
        damage_files(benches[-1])
    faults = sum(len(bench.faults) for bench in benches)
    runs = sum(bench.runs for bench in benches)
    print(table(benches))
    struck = f"{_killed(benches)} kills, {_requested(benches)} requests"
    print(f"seed {args.seed}: {struck} in {runs} runs, {faults} unequal; {time.monotonic() - started:.0f} s")
    if not faults:
        shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

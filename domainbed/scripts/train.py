"""Trains one algorithm on one dataset: ``python -m domainbed.scripts.train --dataset DigitsM2M --algorithm ERM``."""

import errno
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from domainbed import claims, interruption, loggers, run_directory, snapshots, states
from domainbed.console import Tee
from domainbed.scripts import BAD_INPUT_STATUS, BadInput, bad_input, run_cli
from domainbed.scripts.train_arguments import defaults, parser, resolve
from domainbed.scripts.train_building import build
from domainbed.scripts.train_execution import Execution
from domainbed.state_trees import NotResumable

logger = logging.getLogger(__name__)


class Trainable(Protocol):
    """What the script makes of its arguments, be it one ``Execution`` or several."""

    def logged(self) -> loggers.LoggedRun: ...

    def finish(self, trackers: loggers.Logging) -> None: ...


# arguments, hparams, a snapshot if there is one, the claim, seconds between two snapshots
Begin: TypeAlias = Callable[[dict[str, Any], dict[str, Any], dict[str, Any] | None, claims.Claim, float], Trainable]


def main(argv: Sequence[str]) -> int:
    """Runs one training, or goes on with it; returns the exit status."""
    return run(vars(parser().parse_args(argv)), begin)


def run(args: dict[str, Any], begin: Begin) -> int:
    """Runs what ``begin`` makes of the parsed arguments, in a directory of its own; returns the exit status."""
    directory, overwrite, save_every_s = args["output_dir"], args.pop("overwrite"), args.pop("save_every_s")
    log_to = args.pop("log_to")
    with bad_input():
        run_directory.prepare(directory)
    try:
        with interruption.listen(), claims.claim(directory, on_stop=_ask_to_end, on_lost=_end_at_once) as claim:
            return _run(args, overwrite, save_every_s, log_to, claim, begin)
    except claims.RunLocked as error:
        print(f"error: {error}; wait for it, or name another --output_dir", file=sys.stderr)
        return claims.EXIT_LOCKED
    except interruption.Preempted as error:
        saved = "not saved, it goes on from its last snapshot, if there is one"
        saved = saved if isinstance(error, interruption.Unsaved) else "saved, to go on where it was"
        again = "run the same command again" + (", but for --overwrite" if overwrite else "")
        print(f"{error}: {saved}: {again}", file=sys.stderr)
        return interruption.EXIT_PREEMPTED


def _ask_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _end_at_once() -> None:
    """Nothing may be written any more into a directory that another process has taken over."""
    print("another process has taken this run over, or its directory was removed", file=sys.stderr)
    os._exit(claims.EXIT_LOCKED)


def _run(
    args: dict[str, Any],
    overwrite: bool,
    save_every_s: float,
    log_to: Sequence[str],
    claim: claims.Claim,
    begin: Begin,
) -> int:
    directory = Path(args["output_dir"])
    try:
        with bad_input():
            loggers.check(log_to)
            hparams, snapshot = resolve(args), None
            if not overwrite:
                run_directory.check_same_run(directory, args, defaults(args))
            if not overwrite and not run_directory.is_done(directory):
                snapshot = snapshots.load(directory, args, hparams, defaults(args))
    except BadInput as error:
        if run_directory.is_fresh(directory):  # nothing is written into another run's directory
            (directory / "err.txt").write_text(f"error: {error}\n", encoding="utf-8")
            states.write_failure(directory, str(error), BAD_INPUT_STATUS)
        raise
    if run_directory.is_done(directory) and not overwrite:
        run_directory.mark_done(directory)  # a kill right after the first time may have left its snapshots
        print(f"already done: {directory} (--overwrite runs it again)")
        return 0
    with _kept_failure(directory), _kept_output(directory):
        _print_header(args, hparams)
        with bad_input():
            execution = begin(args, hparams, snapshot, claim, save_every_s)
        with loggers.logging_to(log_to, execution.logged()) as trackers:
            execution.finish(trackers)
    run_directory.mark_done(directory)
    return 0


def begin(
    args: dict[str, Any],
    hparams: dict[str, Any],
    snapshot: dict[str, Any] | None,
    claim: claims.Claim,
    save_every_s: float,
) -> Execution:
    """The run as it was when the snapshot was written; without one, or if it does not fit, at its first step.

    Raises:
        ValueError, FileNotFoundError: see ``train_building.build``.
    """
    return begin_or_resume(
        lambda content: Execution(build(args, hparams), claim, save_every_s), snapshot, args["output_dir"]
    )


E = TypeVar("E", bound=Execution)


def begin_or_resume(make: Callable[[dict[str, Any] | None], E], snapshot: dict[str, Any] | None, output_dir: str) -> E:
    """The execution that is made for a snapshot, as it was then; if there is none or it doesn't fit, one made afresh.

    Args:
        make: builds the execution that a snapshot is of, or that comes first.
    """
    if snapshot is not None:
        execution = make(snapshot)
        try:
            execution.resume(snapshot)
            return execution
        except NotResumable as error:
            logger.warning("the run starts over: %s", error)
    execution = make(None)
    run_directory.clear(output_dir)
    loggers.clear(output_dir)
    return execution


@contextmanager
def _kept_failure(directory: Path) -> Iterator[None]:
    """Writes down what the run failed of, in one line; a failure while somebody asks it to end is no failure."""
    (directory / run_directory.FAILED_FILE).unlink(missing_ok=True)
    try:
        yield
    except claims.Lost:
        raise
    except Exception as error:
        if interruption.requested():
            raise interruption.Unsaved(in_a_line(error)) from error
        if not run_directory.is_done(directory):  # an old run, overwritten in vain
            states.write_failure(directory, in_a_line(error), BAD_INPUT_STATUS if isinstance(error, BadInput) else 1)
        raise


def in_a_line(error: Exception) -> str:
    """What went wrong; lack of memory and of disk space by their names."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, BadInput) else f"{type(error).__name__}: {text}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text}; take a smaller batch_size, or fewer jobs at a time"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk is full: {text}; free some space and run it again, it goes on from its last snapshot"
    return text


@contextmanager
def _kept_output(output_dir: Path) -> Iterator[None]:
    """Copies what is printed to out.txt and err.txt, and writes the traceback of an error to the latter."""
    out, err = Tee(output_dir / "out.txt"), Tee(output_dir / "err.txt", stream=sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except Exception:
            err.file.write(traceback.format_exc())
            raise
        finally:
            out.file.close()
            err.file.close()


def _print_header(args: dict[str, Any], hparams: dict[str, Any]) -> None:
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    blocks = {"Environment": {"python": platform.python_version(), **packages}, "Args": args, "HParams": hparams}
    for title, values in blocks.items():
        print(f"{title}:")
        for name, value in sorted(values.items()):
            print(f"\t{name}: {value}")


if __name__ == "__main__":
    run_cli(main)

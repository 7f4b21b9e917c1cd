"""Requests that this process save its work and end: signals, as schedulers send them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run me again, I go on where I was
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(BaseException):
    """The process was asked to save its work and end; no ``except Exception`` on the way stops it."""


class Unsaved(Preempted):
    """The same, where what was done since the last snapshot can't be saved."""


class _State:
    requested: signal.Signals | None = None
    at_once = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    first, _State.requested = _State.requested is None, signal.Signals(number)
    if first and _State.at_once:
        raise Preempted(_State.requested.name)


@contextmanager
def listen() -> Iterator[None]:
    """Takes the signals as requests, in place of ending at once; only the main thread can."""
    _State.requested, _State.at_once = None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def requested() -> bool:
    """Whether somebody asked."""
    return _State.requested is not None


def check() -> None:
    """Raises Preempted if somebody asked; for places at which all is in order."""
    if _State.requested is not None:
        raise Preempted(_State.requested.name)


@contextmanager
def at_once() -> Iterator[None]:
    """Lets a request raise Preempted wherever the body is: for what takes long and changes nothing."""
    check()
    _State.at_once = True
    try:
        yield
    finally:
        _State.at_once = False

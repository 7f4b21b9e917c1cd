"""A process that has torch loaded and forks a training for each request: ``python -m domainbed.fork_server``.

A training's imports take seconds, often longer than a small job's work. A fork goes on as a process of its own would
have: its own session, environment and stderr, signals as they were, and nothing inherited that a training changes.
``multiprocessing`` has such a server too, but a single one for the life of the launching process, with the environment
of its first start, and one that runs the launching script's module again in each child.
"""

import atexit
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from domainbed.commands import TRAIN
from domainbed.states import EXIT_FAILED

# What jobs import, the later ones only when they run. None of them asks for a GPU or leaves a thread at a fork; the
# first imports plugins too, which may (see _check_threads).
PRELOADED = (TRAIN[-1], "torch._dynamo", "torchvision.transforms", "sklearn.datasets", "skimage.data")

_MESSAGE_BYTES = 1 << 20
_LEFT_TO_JOBS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Server:
    """Forks a training for each request, and reports each one's process and exit code."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.running: dict[int, int] = {}  # process -> number of the request
        self.woken, self.wakes = os.pipe()
        for end in (self.woken, self.wakes):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self.wakes)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> dict[str, Any] | None:
        """Returns None when there is nobody to serve and nothing runs; in a forked child, its request."""
        self.report(ready=True)
        poll = select.poll()
        poll.register(self.woken, select.POLLIN)
        poll.register(self.channel, select.POLLIN | select.POLLRDHUP)
        listening = True
        while listening or self.running:
            events = dict(poll.poll())
            self.reap()
            event = events.get(self.channel.fileno(), 0)
            if event & ~select.POLLIN:  # nobody waits for what was asked last
                listening = False
                poll.unregister(self.channel)
            elif event and (request := self.fork()) is not None:
                return request
        return None

    def report(self, **message: Any) -> None:
        with suppress(OSError):  # the launcher is gone
            self.channel.send(json.dumps(message).encode())

    def reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.woken, 4096)
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self.report(number=self.running.pop(pid), code=os.waitstatus_to_exitcode(status))

    def fork(self) -> dict[str, Any] | None:
        """Takes a request; returns it in the child."""
        message, (errors,), _, _ = socket.recv_fds(self.channel, _MESSAGE_BYTES, 1)
        request: dict[str, Any] = json.loads(message)
        try:
            pid = os.fork()
        except OSError as error:
            os.write(errors, f"error: can't fork: {error.strerror}\n".encode())
            self.report(number=request["number"], code=EXIT_FAILED)
            pid = -1
        if pid == 0:
            self.become(request, errors)
            return request
        if pid > 0:
            self.running[pid] = request["number"]
        os.close(errors)
        return None

    def become(self, request: Mapping[str, Any], errors: int) -> None:
        """Makes this fork a process like one that was started afresh."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.report(number=request["number"], pid=os.getpid())  # now that the group exists that is to be signalled
        os.dup2(errors, sys.stderr.fileno())
        for descriptor in (errors, self.woken, self.wakes):
            os.close(descriptor)
        self.channel.close()
        os.environ.update(request["environment"])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_JOBS)


class _Exit:
    """Ends a fork once all that Python runs at an end has run, but without taking torch apart, which takes longest."""

    def __init__(self) -> None:
        self.status = EXIT_FAILED  # of an error that nobody catches
        atexit.register(self.leave)  # the first to be registered is the last to be called

    def run(self, main: Callable[[], None]) -> None:
        try:
            main()
            self.status = 0
        except SystemExit as end:
            self.status = 0 if end.code is None else end.code if isinstance(end.code, int) else EXIT_FAILED
            raise
        except KeyboardInterrupt:
            self.status = -signal.SIGINT
            raise

    def leave(self) -> None:
        files = [it for it in gc.get_objects() if type(it) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)]
        for file in [sys.stdout, sys.stderr, *files]:
            with suppress(OSError, ValueError):
                file.flush()
        if self.status == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(self.status & 0xFF)


def _check_threads() -> None:
    """Ends the server if its forks would lack threads, for they would wait for them."""
    if (probe := os.fork()) == 0:  # before a fork, OpenBLAS ends its own threads
        os._exit(0)
    os.waitpid(probe, 0)
    if len(os.listdir("/proc/self/task")) > 1:
        print("what trainings import, a plugin perhaps, has computed on several threads", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


def main(argv: Sequence[str]) -> None:
    """The server process; in each of its forks, the training, which ends as a process of its own would."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_JOBS)  # whoever signals all of a launch means its jobs
    at_exit = _Exit()
    for name in PRELOADED:
        with suppress(Exception):  # the job that needs it says what is wrong
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a later collection would copy what the forks share
    _check_threads()
    request = _Server(socket.socket(fileno=int(argv[0]))).serve()
    if request is None:
        os._exit(0)
    train = importlib.import_module(TRAIN[-1])
    sys.argv = [str(train.__file__), *request["argv"]]
    run_cli = importlib.import_module("domainbed.scripts").run_cli
    at_exit.run(lambda: run_cli(train.main))


if __name__ == "__main__":
    main(sys.argv[1:])

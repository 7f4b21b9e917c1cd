"""Commands as processes of their own: started afresh, or forked from a process that has torch loaded."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeGuard

from domainbed import holders, states
from domainbed.commands import TRAIN, Command, program

EXIT_NOT_STARTED = 127  # as the shell says it
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS)  # there is no room for a request, or for another file on its way
_GONE = (errno.EPIPE, errno.ECONNRESET)


def killed_by(code: int) -> str:
    """What a negative exit code says."""
    names = {int(number): number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory so far; 0 where it doesn't say."""
    with suppress(OSError):
        group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events")
        for path in (events, Path("/proc/vmstat")):
            if path.exists():
                counts = dict(line.split() for line in path.read_text().splitlines())
                return int(counts.get("oom_kill", 0))
    return 0


class Child:
    """A command that runs in a session of its own, its stdout dropped, its stderr in a file without a name."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child; a pipe would have to be drained
        self._oom_kills = oom_kills()

    @property
    def pid(self) -> int | None:
        """None before it runs."""
        raise NotImplementedError

    def poll(self) -> int | None:
        """The exit code, negative for signals; None while it runs."""
        raise NotImplementedError

    def signal_group(self, number: int) -> bool:
        """Sends a signal to it and the processes it has started; False as long as it can't have one."""
        if self.poll() is None:
            if self.pid is None:
                return False
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)
        return True

    def last_lines(self, count: int = 3) -> str:
        self.errors.seek(0)
        return "\n".join(self.errors.read().decode(errors="replace").splitlines()[-count:])

    def why(self) -> str:
        """One line that says how it failed; known once it has ended."""
        code = self.poll()
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return "out of memory: the kernel killed it (SIGKILL); take fewer --workers or a smaller batch_size"
        if code is not None and code < 0:
            return killed_by(code)
        return self.last_lines(1).strip() or f"exit status {code}"

    def close(self) -> None:
        self.errors.close()


class ProcessChild(Child):
    """A command started afresh: its words if it knows them, else through the shell."""

    def __init__(self, command: str, environment: Mapping[str, str]) -> None:
        super().__init__()
        words: Sequence[str] | str = program(command.argv) if isinstance(command, Command) else command
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                words,
                shell=isinstance(words, str),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the whole group
            )
        except OSError as error:  # no such program, or too many processes
            self.errors.write(f"error: can't start {command.split()[0]}: {error.strerror}\n".encode())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def poll(self) -> int | None:
        return self._process.poll() if self._process else EXIT_NOT_STARTED


def can_fork(command: str) -> TypeGuard[Command]:
    """Whether a ``ForkServer`` can run the command: a training that knows its words."""
    return isinstance(command, Command) and command.argv[: len(TRAIN)] == TRAIN


class ForkServer:
    """The launcher's end of a ``fork_server``.

    Closing the connection, by dying too, leaves the running ones alone; the server ends with the last of them.

    Attributes:
        environment: the server's own, which sets what must be known before torch is loaded, as its threads.
        ready: whether it has done its imports, as far as it has been heard.
        ended: whether it is gone; what it ran may still run.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self.ready = self.ended = False
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._started = 0
        self._unsent: deque[tuple[int, bytes, IO[bytes]]] = deque()  # requests, each with its child's stderr
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "domainbed.fork_server", str(theirs.fileno())],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, command: Command, environment: Mapping[str, str]) -> "ForkedChild":
        """Has a training forked, soon; ``environment`` may differ from the server's in what it sets."""
        self._started += 1
        child = ForkedChild(self, self._started, command.output_dir)
        changes = {key: value for key, value in environment.items() if self.environment.get(key) != value}
        request = {"number": self._started, "argv": command.argv[len(TRAIN) :], "environment": changes}
        self._unsent.append((self._started, json.dumps(request).encode(), child.errors))
        self._hear()
        return child

    def pid(self, number: int) -> int | None:
        """The process of its child of that number; None if it has not heard of one."""
        self._hear()
        return self._pids.get(number)

    def code(self, number: int) -> int | None:
        """The exit code of its child of that number, if the server has reported it."""
        self._hear()
        return self._codes.get(number)

    def _ask(self) -> None:
        """Hands over what is to be started, as far as there is room, without waiting: the server may wait for us."""
        while self._unsent:
            number, request, errors = self._unsent[0]
            try:
                socket.send_fds(self._channel, [request], [errors.fileno()])
            except OSError as error:
                if error.errno in (*_LATER, *_GONE):  # that it is gone will be heard
                    return
                errors.write(f"error: can't be asked for: {error.strerror}\n".encode())  # it is too long
                self._codes[number] = EXIT_NOT_STARTED
            self._unsent.popleft()

    def _hear(self) -> None:
        """Takes in what the server has reported, without waiting."""
        while not self.ended:
            self._ask()
            try:
                message = self._channel.recv(4096)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it has ended with requests unread; what it reported before comes now
                continue
            except OSError:
                message = b""
            self.ended = not message
            report = json.loads(message or "{}")
            self.ready |= report.get("ready", False)
            if "pid" in report:
                self._pids[report["number"]] = report["pid"]
            if "code" in report:
                self._codes[report["number"]] = report["code"]

    def epitaph(self) -> str:
        """How a server that is gone ended, with the last lines of its stderr."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()[-3:]
        return "\n".join([f"exit status {status}", *lines])

    def stop(self) -> None:
        """Lets it start nothing more, not even what has been asked for."""
        self._unsent.clear()
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        self._hear()
        if not self.ready:  # it would see to this only after its imports, and has started nothing
            self._process.kill()

    def close(self) -> None:
        """Ends it; for when what it ran has ended."""
        self.stop()
        self._channel.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class ForkedChild(Child):
    """A training forked by a server; if the server goes first, its directory tells how it ended."""

    def __init__(self, server: ForkServer, number: int, output_dir: str) -> None:
        super().__init__()
        self._server, self._number, self._output_dir = server, number, output_dir
        self._code: int | None = None

    @property
    def pid(self) -> int | None:
        return self._server.pid(self._number)

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.code(self._number)
        if self._code is None and self._server.ended:
            process = holders.process(self.pid or 0)  # nobody here can wait for it
            if process is None or process.is_over:
                self._code = states.code_of(self._output_dir)
        return self._code

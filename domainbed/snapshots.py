"""Everything that a run needs to go on exactly where it was: when it is written, how it survives a kill, what it holds.

A snapshot is written beside its place, synced, and moved there; the one before it stays. It is what ``torch.save``
writes, then a checksum of that; a damaged one is passed over for the one before. Nothing in it is unpickled that could
run code.

"Snapshot" is the word, because a checkpoint is DomainBed's word for a step that is evaluated and recorded.
"""

import hashlib
import io
import logging
import os
import random
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed import records, run_directory, state_trees

logger = logging.getLogger(__name__)

FILE, PREVIOUS_FILE = run_directory.SNAPSHOT_FILES
DIGEST_BYTES = 32
RANDOM = "random states"
SHARE = 50  # one snapshot in 50 times as long as it takes costs 2 % of the time
DEFAULT_SAVE_EVERY_S = 60.0


def _maker() -> str:
    """What numbers depend on beside the arguments, as far as it is easily told."""
    return f"torch {torch.__version__} on {'cuda' if torch.cuda.is_available() else 'cpu'}"


class Unusable(RuntimeError):
    """A snapshot is damaged, or doesn't belong to what lies beside it."""


class Schedule:
    """When the next snapshot is due: ``save_every_s`` after the last, or 50 times as long as the last one took.

    Args:
        save_every_s: seconds; 0 is always.
        clock: monotonic seconds.
    """

    def __init__(self, save_every_s: float, clock: Callable[[], float] = time.monotonic):
        self.save_every_s, self.clock = save_every_s, clock
        self.last, self.duration = clock(), 0.0

    def is_due(self) -> bool:
        interval = max(self.save_every_s, SHARE * self.duration) if self.save_every_s else 0.0
        return self.clock() - self.last >= interval

    def done(self, started: float) -> None:
        """A snapshot that was begun at ``started`` has been written, or was tried in vain."""
        self.last = self.clock()
        self.duration = self.last - started


def random_states() -> state_trees.Node:
    """The states of Python's, numpy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda]
    return state_trees.capture(states, RANDOM)


def set_random_states(node: state_trees.Node) -> None:
    """Puts the global generators into the states of ``random_states``."""
    python, numpy, cpu, cuda = state_trees.restore(node, name=RANDOM)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def take(
    directory: str | os.PathLike[str], algorithm: Any, progress: Any, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``write`` writes of a run: what is trained, how far it is, its records so far, and all random states.

    Args:
        identity: ``args`` and ``hparams`` of the run; whatever else tells it from another.

    Raises:
        NotResumable: the algorithm holds something that can't be kept.
    """
    size, checksum = _records_so_far(Path(directory, records.RESULTS_FILE))
    return {
        **identity,
        "made_by": _maker(),
        "algorithm": state_trees.capture(algorithm, "algorithm"),
        "progress": state_trees.capture(progress, "progress"),
        "random": random_states(),
        "records_size": size,
        "records_checksum": checksum,
    }


def _records_so_far(path: Path, size: int | None = None) -> tuple[int, int]:
    """Length and CRC-32 of the run's records, or of their first ``size`` bytes."""
    if not path.exists():
        return 0, zlib.crc32(b"")
    with open(path, "rb") as file:
        content = file.read() if size is None else file.read(size)
    return len(content), zlib.crc32(content)


def write(directory: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Replaces the snapshot, keeping the one before; a kill at any instant leaves at least one of them whole.

    Raises:
        OSError: it can't be written; the others stay.
    """
    written = io.BytesIO()
    torch.save(dict(content), written)
    with run_directory.whole(Path(directory, FILE), keep_as=Path(directory, PREVIOUS_FILE)) as file:
        file.write(written.getbuffer())
        file.write(_digest(written.getbuffer()))


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def read(path: Path) -> dict[str, Any]:
    """The content of a snapshot; tensors of a GPU in main memory where there is none.

    Raises:
        Unusable: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(max(0, path.stat().st_size - DIGEST_BYTES))
            digest = file.read()
    except OSError as error:
        raise Unusable(f"{path} can't be read: {error.strerror}") from error
    if _digest(content) != digest:
        raise Unusable(f"{path} is damaged: its checksum is wrong")
    place = None if torch.cuda.is_available() else "cpu"
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), map_location=place, weights_only=True)
    return loaded


def load(
    directory: str | os.PathLike[str],
    args: Mapping[str, Any],
    hparams: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The newest snapshot that is whole and fits the run's records.

    Args:
        defaults: what an argument was that the snapshot lacks.

    Returns:
        None if there is none; a warning says why, if there should be.

    Raises:
        ValueError: the snapshot is of a run with other arguments.
    """
    for path in (Path(directory, FILE), Path(directory, PREVIOUS_FILE)):
        if not path.exists():
            continue
        try:
            content = read(path)
            run_directory.refuse_other_run(directory, {**(defaults or {}), **content["args"]}, args)
            if content["hparams"] != dict(hparams):
                raise Unusable(f"the hparams were {content['hparams']} and are {dict(hparams)}")
            _check_records(Path(directory, records.RESULTS_FILE), content)
        except Unusable as error:
            logger.warning("a snapshot is passed over: %s", error)
            path.unlink(missing_ok=True)  # or the next one would be written over the good one before
            continue
        if content["made_by"] != _maker():
            logger.warning("the run began with %s and goes on with %s", content["made_by"], _maker())
        return content
    return None


def _check_records(path: Path, content: Mapping[str, Any]) -> None:
    size = content["records_size"]
    if _records_so_far(path, size) != (size, content["records_checksum"]):
        raise Unusable(f"{path} is not as it was when the snapshot was written")


def restore(directory: str | os.PathLike[str], content: Mapping[str, Any], algorithm: Any, progress: Any) -> None:
    """Puts a freshly built algorithm, a fresh progress and the global generators into the states of a snapshot.

    The run's records are cut back to what they were then.

    Raises:
        NotResumable: the algorithm is another one than it was.
    """
    state_trees.restore(content["algorithm"], algorithm, "algorithm")
    state_trees.restore(content["progress"], progress, "progress")
    set_random_states(content["random"])
    path = Path(directory, records.RESULTS_FILE)
    if path.exists():
        os.truncate(path, content["records_size"])

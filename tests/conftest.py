"""What several test files use."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the tests run in several processes


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes in MNIST's file format."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves anything in the user's cache."""
    monkeypatch.setenv("DOMAINBED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with 600 + 120 random images in MNIST's files."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 600), ("t10k", 120)):
        write_idx(raw / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", rng.integers(0, 10, n))
    return root

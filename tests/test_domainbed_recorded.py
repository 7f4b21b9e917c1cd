"""DomainBed's own numbers, recorded once: its sweeps' jobs, its splits, its ColoredMNIST, what its algorithms learn.

The files in ``domainbed_output`` say with which arguments; the formulas of data and weights stand here.
"""

import functools
import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domainbed import algorithms, datasets, hparams_registry, registry
from domainbed.lib.misc import split_dataset
from domainbed.scripts.sweep import Job, make_args_list

RECORDED = Path(__file__).parent / "domainbed_output"


@functools.cache
def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text("utf-8"))


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


# Jobs of sweeps


def asked(grid: str, monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[Job]:
    """Our jobs for the arguments of a recorded grid."""
    monkeypatch.chdir(directory)  # where no job has run
    return [Job(args, "out") for args in make_args_list(**recorded("jobs")["grids"][grid]["arguments"])]


def described(job: Job) -> dict[str, Any]:
    args = {key: value for key, value in job.train_args.items() if key != "output_dir"}
    return {"args": args, "directory": job.output_dir, "command": job.command_str, "shown": str(job)}


@pytest.mark.parametrize("grid", ["plain", "pairs", "odd", "adaptation", "every"])
def test_jobs_are_domainbeds(grid: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = recorded("jobs")["grids"][grid]
    jobs = asked(grid, monkeypatch, tmp_path)
    assert len(jobs) == expected["count"]
    assert md5("\n".join(job.command_str for job in jobs).encode()) == expected["commands_md5"]
    assert {number: described(jobs[int(number)]) for number in expected["jobs"]} == expected["jobs"]


def test_only_jobs_that_could_not_train_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CORAL compares environments; a pair of test environments out of three leaves it one."""
    theirs = list(recorded("jobs")["grids"]["three_environments"]["jobs"].values())
    kept = [job for job in theirs if job["args"]["algorithm"] != "CORAL" or len(job["args"]["test_envs"]) == 1]
    assert len(kept) == len(theirs) - 3
    assert [described(job) for job in asked("three_environments", monkeypatch, tmp_path)] == kept


# Splits


@pytest.mark.parametrize("case", recorded("splits")["splits"], ids=lambda case: f"{case['length']}-{case['n']}")
def test_splits_are_domainbeds(case: dict[str, Any]) -> None:
    parts = [list(part.keys) for part in split_dataset(range(case["length"]), case["n"], case["seed"])]
    assert [md5(json.dumps(part).encode()) for part in parts] == case["md5"]
    assert parts == case.get("keys", parts)


# ColoredMNIST


def write_digits(root: Path) -> None:
    """MNIST's four files, with 90 and 31 images: 41, 40 and 40 for the environments."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 90), ("t10k", 31)):
        i, row, column = np.ogrid[:n, :28, :28]
        images, labels = (37 * i + 11 * row + 7 * column + i * row * column) % 256, (np.arange(n) ** 2 + n) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def described_environment(x: Tensor, y: Tensor) -> dict[str, Any]:
    """What is recorded of images (N, 2, 28, 28) float32 and labels (N,) int64."""
    images = (x * 255).round().to(torch.uint8).numpy()
    labels = y.to(torch.uint8).numpy()
    return {"length": len(y), "x_md5": md5(images.tobytes()), "y_md5": md5(labels.tobytes()), "ones": int(y.sum())}


@pytest.mark.parametrize("seed", [0, 7])
def test_coloured_digits_are_domainbeds(seed: int, tmp_path: Path) -> None:
    write_digits(tmp_path)
    torch.manual_seed(seed)
    make: Callable[..., Any] = datasets.get_dataset_class("ColoredMNIST")
    dataset = make(str(tmp_path), [0], {})
    expected = recorded("splits")["colored_mnist"][str(seed)]
    assert torch.randint(10**9, (3,)).tolist() == expected["drawn_next"]  # initial weights come from here
    for i, environment in enumerate(dataset.datasets):
        x, y = (torch.stack([torch.as_tensor(item[k]) for item in environment]) for k in (0, 1))
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert described_environment(x, y) == expected["environments"][i]


# Updates

CLASSES, ENVIRONMENTS = 3, 3
ALL, NETWORK = [0, 1, 2, 3], ["logits", "classifier", "featurizer", "network"]
ADRMX_ROOTS = [f"classifier_{what}" for what in ("domain", "label_1", "label_2")]
ADRMX_ROOTS += ["discriminator", "featurizer_domain", "featurizer_label", "network"]
# Where ours is meant to differ, and why: returned key -> updates; "after" -> what differs after the last one.
MENDED: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "MTL": (
        "DomainBed's classifier sees normal noise in place of the environment's mean features",
        {"loss": ALL, "after": ["logits", "classifier", "embeddings", "featurizer"]},
    ),
    "ARM": (
        "DomainBed's optimizer does not know the context network",
        {"loss": [1], "after": ["logits", "classifier", "context_net", "featurizer", "network"]},
    ),
    "SelfReg": (
        "DomainBed's optimizer does not know the projection",
        {"loss": [1, 2, 3], "after": ["logits", "cdpl", "classifier", "featurizer", "network"]},
    ),
    "VREx": ("DomainBed reports the last environment's risk as nll", {"nll": ALL}),
    "IB_ERM": ("DomainBed reports the loss as nll; without penalties they are one", {"nll": [2, 3]}),
    "IB_IRM": ("DomainBed reports the loss as nll", {"nll": ALL}),
    "TRM": (
        "DomainBed overwrites the series' terms while it adds them up, and takes alpha from after its change",
        {"trm_loss": [2, 3], "nll": [3], "after": ["logits", "classifier", "featurizer"]},
    ),
    "ADRMX": (
        "DomainBed remixes images of whatever class and environment",
        {"loss_total": [0, 2], "loss_remixed": [0, 2], "loss_disc": [1, 2, 3]}
        | {key: [2] for key in ("loss_cnt_int", "loss_cnt_final", "loss_clf_int", "loss_clf_fin", "loss_dmn")}
        | {"after": ["logits", *ADRMX_ROOTS]},
    ),
    "RSC, nothing dropped": ("DomainBed mutes the largest feature even so", {"loss": ALL, "after": NETWORK}),
    "CAD, not flipped": (
        "DomainBed counts an image among its own targets but not in its pool",
        {"bn_loss": ALL, "total_loss": ALL, "clf_loss": [1, 2, 3], "after": ["logits", "classifier", "featurizer"]},
    ),
    "Transfer, gda": (
        "DomainBed's optimizer covers the adversary alone",
        {"gap": ALL, "loss": [1, 2, 3], "after": ["logits", "adv_classifier", "classifier", "featurizer"]},
    ),
    "EQRM, burn-in of 1.5": ("DomainBed's optimizer never starts afresh", {"loss": [3], "after": NETWORK}),
}
# What takes a mend back again, after the constructor: then nothing differs.
UNDONE: dict[str, Callable[[Any], Any]] = {
    "ARM": lambda algorithm: algorithm.context_net.requires_grad_(False),
    "SelfReg": lambda algorithm: algorithm.cdpl.requires_grad_(False),
    "Transfer, gda": lambda algorithm: setattr(
        algorithm, "optimizer", torch.optim.SGD(algorithm.adv_classifier.parameters(), lr=algorithm.hparams["lr"])
    ),
}


def inputs(seed: int, rows: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(rows, *shape))


def minibatches(step: int, rows: int, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Three environments, each with its own mean; every class is in each."""
    batches = []
    for e in range(ENVIRONMENTS):
        y = torch.tensor([0, 1, 2, 2, 0, 1, 1, (step + e) % CLASSES][:rows])
        means = 0.3 * e + 0.2 * y.view(-1, *[1] * len(shape))
        batches.append((inputs(100 + 10 * step + e, rows, shape) + means, y))
    return batches


def set_weights(algorithm: torch.nn.Module) -> None:
    """Weights from their names, those of TRM's classifiers too, which stand in a plain list.

    Biases are positive, so that no layer is dead.
    """
    weights = list(algorithm.named_parameters())
    for i, classifier in enumerate(getattr(algorithm, "clist", [])):
        weights += [(f"clist.{i}.{name}", weight) for name, weight in classifier.named_parameters()]
    for name, weight in weights:
        rng = np.random.RandomState(int(md5(name.encode())[:8], 16))
        weight.data.copy_(torch.from_numpy(rng.uniform(-0.5, 0.5, weight.shape) + 0.5 * (weight.ndim == 1)))


def norms(algorithm: torch.nn.Module) -> dict[str, float]:
    """The length of all weights below each root of the state dict, as one vector."""
    squares: dict[str, float] = defaultdict(float)
    for name, value in algorithm.state_dict().items():
        if isinstance(value, Tensor):
            squares[name.split(".")[0]] += float(value.double().square().sum())
    return {root: square**0.5 for root, square in squares.items()}


def built(cls: Callable[..., Any], hparams: dict[str, Any], case: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    algorithm = cls(tuple(case["input_shape"]), CLASSES, ENVIRONMENTS, hparams | case["hparams"])
    set_weights(algorithm)
    for name, value in case["attributes"].items():
        assert hasattr(algorithm, name)
        setattr(algorithm, name, value)
    return algorithm


def trained(algorithm: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What updates return, and the logits of four inputs and the weights' norms after them; in float64."""
    shape, returned = tuple(case["input_shape"]), []
    for step in range(case["updates"]):
        torch.manual_seed(1000 + step)
        np.random.seed(1000 + step)
        values = algorithm.update(minibatches(step, case["hparams"]["batch_size"], shape), None)
        returned.append({key: float(value) for key, value in values.items()})
    algorithm.eval()
    with torch.no_grad():
        logits = algorithm.predict(inputs(99, 4, shape))
    return {"returned": returned, "logits": logits.tolist(), "norms": norms(algorithm)}


def close(mine: Any, theirs: Any) -> bool:
    return bool(np.allclose(mine, theirs, rtol=1e-7, atol=1e-10))  # recorded to 12 digits


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[Any]]:
    """Returned key -> numbers of updates; "after" -> "logits" and roots of the state dict."""
    found: dict[str, list[Any]] = defaultdict(list)
    for step, (one, other) in enumerate(zip(mine["returned"], theirs["returned"], strict=True)):
        assert list(one) == list(other)
        for key in one:
            if not close(one[key], other[key]):
                found[key].append(step)
    assert mine["norms"].keys() == theirs["norms"].keys()
    if not close(mine["logits"], theirs["logits"]):
        found["after"].append("logits")
    found["after"] += sorted(root for root in mine["norms"] if not close(mine["norms"][root], theirs["norms"][root]))
    return {key: places for key, places in found.items() if places}


@pytest.fixture
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ours(case: dict[str, Any]) -> Any:
    name = case["algorithm"]
    return built(algorithms.get_algorithm_class(name), hparams_registry.default_hparams(name, "Debug28"), case)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", recorded("updates")["updates"])
def test_updates_are_domainbeds_but_for_mended_defects(name: str) -> None:
    case = recorded("updates")["updates"][name]
    _, expected = MENDED.get(name, ("equal", {}))
    assert differences(trained(ours(case), case), case) == expected


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", UNDONE)
def test_without_the_mend_updates_are_domainbeds(name: str) -> None:
    case = recorded("updates")["updates"][name]
    algorithm = ours(case)
    UNDONE[name](algorithm)
    assert differences(trained(algorithm, case), case) == {}


def test_every_algorithm_of_domainbeds_is_recorded() -> None:
    cases = recorded("updates")["updates"]
    assert [name for name in cases if name in registry.order("algorithms")] == list(registry.order("algorithms")[:34])
    assert MENDED.keys() | UNDONE.keys() <= cases.keys()

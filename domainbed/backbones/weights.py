"""Pretrained weights: what the hparams ask for, what files hold, and errors that say which file to put where."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SUFFIXES = (".pth", ".pt", ".safetensors")
_SHOWN = 5  # names of tensors in a message

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Choice:
    """The weights that a network starts from.

    Attributes:
        pretrained: False for random ones.
        name: of weights in the hub, where the hparams name them.
        file: a local state dict, which is taken in place of the hub's.
    """

    pretrained: bool = True
    name: str | None = None
    file: Path | None = None

    @property
    def from_hub(self) -> bool:
        return self.pretrained and self.file is None

    @classmethod
    def of(cls, hparams: Mapping[str, Any]) -> "Choice":
        """What the hparams ask for.

        Hparams:
            pretrained: False starts from random weights and downloads nothing.
            weights: a name that the hub knows, or a file that ends in .pth, .pt or .safetensors.

        Raises:
            ValueError: weights are named, but pretrained is false.
        """
        pretrained, weights = hparams.get("pretrained", True), hparams.get("weights")
        if weights is None:
            return cls(pretrained)
        if not pretrained:
            raise ValueError(f"weights is {str(weights)!r}, but pretrained is false; drop one of the two hparams")
        if str(weights).endswith(SUFFIXES):
            return cls(file=Path(weights).expanduser())
        return cls(name=str(weights))

    def refuse_name(self, network: str, advice: str = "") -> None:
        """Raises ValueError for weights with a name, where the network has none of any name."""
        if self.name is not None:
            raise ValueError(
                f"weights is {self.name!r}; {network} has no weights of that name{advice}; give a file that ends in "
                f"{', '.join(SUFFIXES)}"
            )


@contextmanager
def explained(needed: str) -> Iterator[None]:
    """Says what could not be loaded and what to do; the hubs raise errors of four libraries, hence the broad catch."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"pretrained weights are missing: {needed} could not be loaded ({type(error).__name__}: {error}); "
            'put the file there, name a local one with --hparams \'{"weights": "FILE.pth"}\', '
            "or start from random weights with --hparams '{\"pretrained\": false}'"
        ) from error


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict on disk, on the CPU.

    It may lie under the key ``state_dict`` or ``model`` of what a training script has saved.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a .safetensors file without that library.
        ValueError: the file holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights: there is no file {file}")
    try:
        content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    except ImportError:
        raise
    except Exception as error:  # pickle, zip and safetensors have their own
        raise ValueError(f"{file} can't be read as a state dict ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state dict (name -> tensor), but {type(content).__name__}; save one in it")
    return dict(content)


def _read_torch(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{file.name} needs safetensors: pip install domainbed-ex2l[timm]") from error
    return load_file(file)


def load(network: nn.Module, state: Mapping[str, Tensor], source: object, head: Sequence[str] = ()) -> None:
    """Loads a state dict, all of it but the layers that were cut off.

    Args:
        network: whose names and shapes decide.
        state: name -> tensor.
        source: where it is from, for the message.
        head: where layers were cut off; what the network lacks there is left out.

    Raises:
        ValueError: tensors are missing, left over, or of another shape.
    """
    expected = network.state_dict()
    cut = tuple(f"{name}." for name in head)
    given = {name: value for name, value in state.items() if name in expected or not name.startswith(cut)}
    absent = [name for name in expected if name not in given and not name.endswith("num_batches_tracked")]
    left_over = [name for name in given if name not in expected]
    other = [
        f"{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
        for name, value in given.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = {"missing": absent, "unexpected": left_over, "of another shape": other}
    if any(problems.values()):
        told = "; ".join(f"{problem}: {_first(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{source} does not fit {type(network).__name__}; {told}")
    network.load_state_dict(given, strict=False)
    logger.info("loaded %d tensors from %s", len(given), source)


def _first(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def from_file_only(network: Network, hparams: Mapping[str, Any]) -> Network:
    """The network, with the weights of the file that the hparams name, if they do.

    Raises:
        ValueError: other weights are named, or the file's don't fit.
    """
    choice = Choice.of(hparams)
    choice.refuse_name(type(network).__name__)
    if choice.file is not None:
        load(network, read(choice.file), choice.file)
    return network


def by_position(state: Mapping[str, Tensor], network: nn.Module, source: object) -> dict[str, Tensor]:
    """A state dict of the same layers in the same order under other names, under the network's names.

    Raises:
        ValueError: another number of tensors; or at some place another shape, or another kind (weight, bias, ...).
    """
    expected = network.state_dict()
    if len(state) != len(expected):
        raise ValueError(f"{source} holds {len(state)} tensors; {type(network).__name__} has {len(expected)}")
    for (given, value), (name, own) in zip(state.items(), expected.items(), strict=True):
        if value.shape != own.shape or given.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{source} does not map by position: {given} {tuple(value.shape)} for {name} {tuple(own.shape)}"
            )
    return dict(zip(expected, state.values(), strict=True))

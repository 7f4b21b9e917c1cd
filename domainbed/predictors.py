"""A run's saved model that classifies images of one's own, opened as the run's dataset opens those it evaluates."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from domainbed import figures, images, input_pipelines, registry, saved_models
from domainbed.evaluation import autocast
from domainbed.explainers import Explainer
from domainbed.images import Images
from domainbed.lib.misc import predicted_labels
from domainbed.messages import listed
from domainbed.rows import declared
from domainbed.training import BEST_MODEL_FILE

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

BATCH = 64  # images at a time
DPI = 72  # of figures in a notebook

Item = Union[str, "os.PathLike[str]", Image.Image]
Given = Item | Iterable[Item] | Tensor


def normalises(shape: Sequence[int], size: str, said: bool | None) -> bool:
    """Whether a dataset's images reach networks by ImageNet's means and deviations.

    Args:
        shape: of the input.
        size, said: the class's ``HPARAMS_SIZE`` and ``NORMALISED``; if it says nothing, large images of three channels
            are normalised, small ones are not.
    """
    return len(shape) == 3 and shape[0] == 3 and (size == "large" if said is None else bool(said))


@dataclass(frozen=True)
class Input:
    """How a picture becomes a network's input; nothing is augmented.

    Attributes:
        shape: (C, H, W) of the input. Pictures are squashed to W x H pixels (bilinear) whatever their shape; of one
            channel they are grey, of two they are red and green, and blue is left out.
        normalised: by ImageNet's means and deviations; False: fractions in [0, 1].
    """

    shape: tuple[int, ...]
    normalised: bool

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[0] > 3:
            raise ValueError(f"a picture has 1 to 3 channels, and this network takes {self.shape}; give it tensors")

    @classmethod
    def of(cls, dataset: str, shape: Sequence[int]) -> "Input":
        """The input of networks trained on the dataset of this name.

        Raises:
            ValueError: there is no such dataset here.
        """
        try:
            size = registry.attribute("datasets", dataset, "HPARAMS_SIZE", "large")
            said = registry.attribute("datasets", dataset, "NORMALISED")
        except (NotImplementedError, ImportError) as error:
            advice = f"name the file of its class in ${registry.PLUGINS_VARIABLE}"
            if registry.is_file(dataset):
                advice = "its path counts from where the run was started: work there"
            raise ValueError(f"how images of {dataset} are opened is not known here ({error}); {advice}") from error
        return cls(tuple(shape), normalises(shape, size, said))

    def pixels(self, picture: Image.Image) -> Tensor:
        """The picture as (C, H, W) uint8."""
        channels, height, width = self.shape
        picture = picture.convert("L" if channels == 1 else "RGB")
        resized = np.array(picture.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, -1)
        return torch.from_numpy(resized[..., :channels].transpose(2, 0, 1)).contiguous()

    def finish(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) uint8 -> float32, as the network takes them."""
        return input_pipelines.normalise(pixels) if self.normalised else pixels.float() / 255

    def read(self, paths: Sequence[Path]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
        """The files' pixels (C, H, W) uint8, and of those that can't be used what is wrong with them."""
        troubles: dict[Path, str] = {}
        for folder in dict.fromkeys(path.parent for path in paths):
            names = [path.name for path in paths if path.parent == folder]
            troubles |= {folder / name: trouble for name, trouble in images.troubles(folder, names) if trouble}
        sound = [path for path in paths if path not in troubles]
        opened = images.in_threads(self._open, sound, lambda done: None)
        troubles |= {path: got for path, got in zip(sound, opened, strict=True) if isinstance(got, str)}
        return {path: got for path, got in zip(sound, opened, strict=True) if isinstance(got, Tensor)}, troubles

    def _open(self, path: Path) -> Tensor | str:
        try:
            return self.pixels(Images(path.parent, (path.name,)).open(0))
        except (OSError, ValueError) as error:
            return str(error)

    def batches(
        self, given: Given, device: torch.device, batch_size: int = BATCH
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Names and network input of the images, some at a time."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        items = _items(given)
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            if isinstance(some, Tensor):
                x, files = self._checked(some, device), list(map(str, range(start, start + len(some))))
            else:
                x = self.finish(torch.stack(self._opened(some)).to(device))
                files = [str(start + i if isinstance(item, Image.Image) else item) for i, item in enumerate(some)]
            yield files, x

    def _opened(self, some: Sequence[Path | Image.Image]) -> list[Tensor]:
        found, troubles = self.read([item for item in some if isinstance(item, Path)])
        if troubles:
            problems = [f"{path}: {trouble}" for path, trouble in troubles.items()]
            raise ValueError(
                listed(f"{len(troubles)} images can't be used; replace them, or leave them out:", problems)
            )
        return [found[item] if isinstance(item, Path) else self.pixels(item) for item in some]

    def _checked(self, x: Tensor, device: torch.device) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"images {tuple(x.shape)} do not fit this network; it takes (B, *{self.shape})")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"images of {x.dtype}; give uint8 pixels, or floats as the network takes them")
        x = x.to(device)
        return self.finish(x) if x.dtype == torch.uint8 else x.float()


@dataclass(frozen=True)
class Predictions:
    """What a model says of B images.

    Attributes:
        files: the images' paths, or their numbers where they have none.
        labels: (B,) int64, the most probable class.
        probabilities: (B, K) float32.
        class_names: K of them.
    """

    files: Sequence[str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    class_names: Sequence[str] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the predicted classes."""
        return [self.class_names[label] for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self) -> Iterator[list[Any]]:
        """File, label, name and probabilities of each image."""
        for file, label, name, row in zip(self.files, self.labels, self.names, self.probabilities, strict=True):
            yield [file, int(label), name, *map(float, row)]

    def to_frame(self) -> "pandas.DataFrame":
        """A line for each image."""
        import pandas

        return pandas.DataFrame(self.rows(), columns=columns(self.class_names))


def columns(class_names: Sequence[str]) -> list[str]:
    """The columns of a table of predictions."""
    return ["file", "label", "name", *(f"p({name})" for name in class_names)]


class Predictor:
    """A saved model. ``load`` makes one.

    Images are given as a folder (with its sub-folders), a file, a picture of PIL, several of these, or a tensor
    (B, C, H, W): float as the network takes it, or uint8 pixels.

    Attributes:
        file: where the model was saved.
        step: after which it was saved, -1 if that is not known.
        args: the run's arguments.
        class_names: K of them.
        input: how images are opened.
    """

    def __init__(
        self, file: Path, content: dict[str, Any], device: torch.device, class_names: Sequence[str], trusted: bool
    ):
        self.file, self.device, self.args = file, device, content["args"]
        self.step = saved_models.step_of(file, content)
        self.algorithm = saved_models.restore(content, device, trusted).eval()
        shape, dataset = tuple(content["model_input_shape"]), self.args["dataset"]
        told = "normalised" in content  # models of DomainBed and of older versions say nothing of the dataset
        self.input = Input(shape, content["normalised"]) if told else Input.of(dataset, shape)
        own = content["class_names"] if "class_names" in content else declared("datasets", dataset, "CLASSES")
        self.class_names = _names(own or (), content["model_num_classes"], class_names)

    def __repr__(self) -> str:
        when = f"of step {self.step}" if self.step >= 0 else "of an unknown step"
        chosen = "best (AA + WGA) / 2 on validation" if self.file.name == BEST_MODEL_FILE else "not chosen"
        run = f"{self.args['algorithm']} on {self.args['dataset']}"
        return f"Predictor({run}: {self.file}, {when}, {chosen}; {len(self.class_names)} classes)"

    def predict(self, images: Given, batch_size: int = BATCH) -> Predictions:
        """Classes and probabilities.

        Raises:
            ValueError: there are no images, some can't be read, or a tensor does not fit.
        """
        found = [self._predict(files, x) for files, x in self.input.batches(images, self.device, batch_size)]
        files = [file for some in found for file in some.files]
        labels, probabilities = (
            np.concatenate([getattr(p, key) for p in found]) for key in ("labels", "probabilities")
        )
        return Predictions(files, labels, probabilities, self.class_names)

    def _predict(self, files: Sequence[str], x: Tensor) -> Predictions:
        with torch.no_grad(), autocast(self.device, self.args.get("precision", "fp32")):
            logits = self.algorithm.predict(x).float()
        labels = predicted_labels(logits).cpu().numpy()
        if logits.shape[1] == 1:  # a score with threshold 0
            logits = F.pad(logits, (1, 0))
        return Predictions(files, labels, logits.softmax(1).cpu().numpy(), self.class_names)

    def explain(self, images: Given, method: str = "grad_cam", batch_size: int = BATCH) -> NDArray[np.float32]:
        """Where the model looks for what it predicts: heatmaps (B, H, W), each in [0, 1] by its own maximum.

        Args:
            method: a name in ``METHODS`` or ``EVALUATION_METHODS`` of ``attribution``.

        Raises:
            NotImplementedError: no such method.
            ValueError: as ``predict``, or the model can't be explained.
        """
        explainer = self.explainer(method)
        return np.concatenate(
            [self._explain(explainer, x) for _, x in self.input.batches(images, self.device, batch_size)]
        )

    def explainer(self, method: str) -> Explainer:
        """The explainer of that name; errors as in ``explain``."""
        explainer = Explainer(self.algorithm, method)
        explainer.check(self.input.shape)
        return explainer

    def _explain(self, explainer: Explainer, x: Tensor) -> NDArray[np.float32]:
        _, maps = explainer.heatmaps(x)
        maps = F.interpolate(maps[:, None].float(), size=x.shape[2:], mode="bilinear")[:, 0].clamp(min=0)
        scaled: NDArray[np.float32] = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
        return scaled

    def both(
        self, explainer: Explainer | None, files: Sequence[str], pixels: Tensor
    ) -> tuple[Predictions, NDArray[np.float32] | None]:
        """Predictions of pixels (B, C, H, W) uint8, and their heatmaps if there is an explainer."""
        x = self.input.finish(pixels.to(self.device))
        return self._predict(files, x), None if explainer is None else self._explain(explainer, x)

    def show(
        self, images: Given, method: str = "grad_cam", labels: Sequence[int] | None = None, n: int = 8
    ) -> "Figure":
        """A figure of the first n images, and below them where the model looks and what it predicts.

        Args:
            labels: the true class of each image, if they are known; frames tell right from wrong.

        Raises:
            ImportError: Matplotlib is missing.
            ValueError: as ``predict``, or n or the labels are none that can be shown.
        """
        figures.figure_class()
        if n < 1:
            raise ValueError(f"n={n}: give 1 or more")
        items = _items(images)
        true = None if labels is None else _true(labels, len(items), len(self.class_names))[:n]
        chosen = items[:n]
        found, heatmaps = self.predict(chosen), self.explain(chosen, method)
        captions = [f"{name}, {p.max():.0%}" for name, p in zip(found.names, found.probabilities, strict=True)]
        titles, correct = [Path(file).name for file in found.files], None
        if true is not None:
            titles, correct = [self.class_names[y] for y in true], found.labels == true
        x = torch.cat([x.cpu() for _, x in self.input.batches(chosen, self.device)])
        strip = figures.Strip(f"{self.args['algorithm']}\n{method}", heatmaps, captions=captions, correct=correct)
        return _for_notebooks(figures.explanation_grid(x.numpy(), titles, [strip]))


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    class_names: Sequence[str] = (),
    trusted: bool = False,
) -> Predictor:
    """The model of a run's directory (the best one if it was kept, else the last), or the file that is named.

    Args:
        device: default: a GPU if there is one.
        class_names: in place of the dataset's own.
        trusted: load the file whatever it holds; that may run code.

    Raises:
        OSError, ValueError, NotImplementedError: no such device or model, or it can't be brought to life.
    """
    file, device = saved_models.find(path), saved_models.usable(device)
    return Predictor(file, saved_models.load(file, device, trusted), device, class_names, trusted)


def find_files(given: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are named, and all images of folders and their sub-folders; each once.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, given):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of images")
        inside = [path / name for name in images.image_files(path)] if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no images ({', '.join(images.EXTENSIONS)})")
        found += inside
    return list(dict.fromkeys(found))


def _items(given: Given) -> Any:
    """A tensor as it is; anything else as a list of paths of files and pictures."""
    if isinstance(given, str | os.PathLike | Image.Image):
        given = [given]
    if not isinstance(given, Iterable) or (isinstance(given, np.ndarray) and given.dtype.kind not in "OU"):
        raise _no_image(given)
    items = given if isinstance(given, Tensor) else [item for one in given for item in _each(one)]
    if not len(items):
        raise ValueError("no images; give a folder, files, pictures of PIL or a tensor (B, C, H, W)")
    return items


def _each(one: Any) -> Sequence[Path | Image.Image]:
    if isinstance(one, Image.Image):
        return [one]
    if isinstance(one, str | os.PathLike):
        return find_files([one])
    raise _no_image(one)


def _no_image(given: Any) -> TypeError:
    what = f"an image is a path or a picture of PIL, not {type(given).__name__}"
    return TypeError(f"{what}; torch.stack makes a tensor (B, C, H, W) of tensors, torch.from_numpy one of an array")


def _true(labels: Any, images: int, classes: int) -> NDArray[np.int64]:
    """The labels as an array (B,).

    Raises:
        ValueError: they are not one class of each image.
    """
    found = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if found.shape != (images,):
        raise ValueError(f"labels of shape {found.shape} and {images} images; give one label of each image")
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= classes:
        came = ", ".join(map(str, np.unique(found)[:8]))
        raise ValueError(f"labels {came}; give whole numbers of 0 to {classes - 1}, one of each image")
    return found.astype(np.int64)


def _names(own: Sequence[str], count: int, given: Sequence[str]) -> list[str]:
    """The given names, else the dataset's own, else numbers."""
    names = list(given) or list(own)
    if given and len(given) != count:
        raise ValueError(f"class_names has {len(given)} names, and the model {count} classes")
    return names if len(names) == count else [f"y={label}" for label in range(count)]


def _for_notebooks(figure: "Figure") -> "Figure":
    """Lets Jupyter show a figure that pyplot does not know."""

    def png() -> bytes:
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=DPI)
        return written.getvalue()

    setattr(figure, "_repr_png_", png)  # noqa: B010 -- no attribute of Figure's
    return figure

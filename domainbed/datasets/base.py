"""What every dataset shares: environments, labels and confounders known before any image is opened, splits."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from domainbed import input_pipelines
from domainbed.images import Images
from domainbed.lib import misc
from domainbed.lib.misc import known_array
from domainbed.messages import listed
from domainbed.registry import Registry

# DomainBed's datasets in its order, with the names of their environments: the tables of its sweeps can be printed
# whether or not the dataset's class is here.
DOMAINBED_ORDER = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
    "WILDSCamelyon": ("hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"),
    "WILDSFMoW": ("region_0", "region_1", "region_2", "region_3", "region_4", "region_5"),
    "SpawriousO2O_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_hard": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_hard": ("Test", "SC_group_1", "SC_group_2"),
}
OWN_ORDER = (
    "ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop", "Waterbirds", "CelebA", "ColoredMNIST224",
    "VLCSInDistribution_C", "VLCSInDistribution_L", "VLCSInDistribution_S", "VLCSInDistribution_V",
    "TerraIncognitaInDistribution_L100", "TerraIncognitaInDistribution_L38", "TerraIncognitaInDistribution_L43",
    "TerraIncognitaInDistribution_L46",
)  # fmt: skip

REGISTRY: Registry[Any] = Registry("dataset", (*DOMAINBED_ORDER, *OWN_ORDER))
register = REGISTRY.register

Integers = NDArray[np.int64]


class MultipleDomainDataset:
    """A list of environments, each a map-style dataset of ``(x (C, H, W) float, y int64)``.

    Subclasses take ``(root, test_envs, hparams)`` and set ``self.datasets``, ``self.input_shape`` and
    ``self.num_classes``. The class attributes that sweeps and tables read must be literals.

    Class attributes:
        ENVIRONMENTS: names of the environments, in order.
        TEST_ENVS: test environments that a sweep takes; None: DomainBed's enumeration of all.
        VALIDATION_ENVS: environments that are official validation sets: never trained on, and then no environment
            is split further.
        CONFOUNDERS: names of the values that the environments' ``c`` arrays count; empty: no confounder is known.
        CLASSES: names of the labels, for tables of groups.
        NUM_CLASSES: how many labels there are, where ``CLASSES`` does not name them.
        INPUT_SHAPE: (C, H, W) of an image; None: 3 x 224 x 224, or what the hparam ``image_size`` says.
        PUBLISHED_COUNTS: what the release is known to hold: by environment (or another part that the class's
            docstring names) the number of images, or of each group g = y * V + c.
        OPTIONS: names of flags of train that the constructor takes as further keyword arguments.
        HAS_MASKS: True for a dataset that comes with masks; a literal, for sweeps.
        HPARAMS_SIZE: "small" or "large": which of DomainBed's default tables holds.
        NORMALISED: whether images reach the network by ImageNet's means and deviations (a literal); None: large ones
            do, small ones are fractions in [0, 1].
        HPARAMS: further hparams that the dataset fixes, name -> value.
        NEEDS_DATA_DIR: True for a dataset that reads files.
        N_STEPS, CHECKPOINT_FREQ: training steps, and steps between two records.
        N_WORKERS: the most loader processes; data in memory takes none.
    """

    N_STEPS: ClassVar[int] = 5001
    CHECKPOINT_FREQ: ClassVar[int] = 100
    N_WORKERS: ClassVar[int] = 8
    ENVIRONMENTS: ClassVar[Sequence[str] | None] = None
    INPUT_SHAPE: ClassVar[tuple[int, ...] | None] = None
    TEST_ENVS: ClassVar[Sequence[int] | None] = None
    VALIDATION_ENVS: ClassVar[Sequence[int]] = ()
    CONFOUNDERS: Sequence[str] = ()  # may be the instance's own
    HPARAMS_SIZE: ClassVar[str] = "large"
    NORMALISED: ClassVar[bool | None] = None
    HPARAMS: ClassVar[Mapping[str, Any]] = {}
    NEEDS_DATA_DIR: ClassVar[bool] = False
    CLASSES: Sequence[str] = ()
    NUM_CLASSES: ClassVar[int | None] = None
    PUBLISHED_COUNTS: Mapping[str, Any] = {}
    OPTIONS: ClassVar[Sequence[str]] = ()
    HAS_MASKS: ClassVar[bool] = False

    datasets: Sequence[Any]
    input_shape: tuple[int, ...]
    num_classes: int

    @property
    def num_confounders(self) -> int:
        """V; 1 where an environment does not know its confounder."""
        known = all(known_array(environment, "c") is not None for environment in self.datasets)
        return len(self.CONFOUNDERS) if known and self.CONFOUNDERS else 1

    @property
    def has_masks(self) -> bool:
        """Whether the masks of all images are known: the dataset's own, or the user's."""
        return all(map(has_masks, self.datasets))

    def group_name(self, group: int) -> str:
        """What group g = y * V + c holds, in words: "waterbird, land"."""
        y, c = divmod(group, self.num_confounders)
        names = (self.CLASSES[y] if self.CLASSES else f"y={y}", self.CONFOUNDERS[c] if self.CONFOUNDERS else f"c={c}")
        return ", ".join(names)

    def check_arrays(self) -> None:
        """Looks at the labels and confounders that are known without opening an image.

        Raises:
            ValueError: some are out of range; groups would be mixed up.
        """
        problems = []
        for e, environment in enumerate(self):
            for name, most in (("y", self.num_classes), ("c", len(self.CONFOUNDERS) or None)):
                values = known_array(environment, name)
                if values is None or most is None:
                    continue
                for key in np.flatnonzero((values < 0) | (values >= most)):
                    problems.append(f"environment {e}, image {key}: {name} is {values[key]}, allowed: 0 to {most - 1}")
        if problems:
            head = f"{type(self).__name__}: {len(problems)} labels or confounders are out of range; mend the arrays, "
            raise ValueError(listed(f"{head}num_classes or CONFOUNDERS:", problems))

    def use_input_pipeline(self, name: str) -> None:
        """Reads the images of all environments by the pipeline of that name, after having checked their files.

        Raises:
            NotImplementedError: no such pipeline.
            ValueError: image files are missing or damaged, or the dataset holds none though the pipeline is not the
                default.
        """
        pipeline, pools = input_pipelines.REGISTRY[name], {}
        environments = [leaf for environment in self for leaf in leaves(environment)]
        files = [leaf for leaf in environments if isinstance(leaf, ImageEnvironment)]
        if not files and name != input_pipelines.DEFAULT:
            raise ValueError(f"--input_pipeline {name} is for image files, and {type(self).__name__} holds none")
        for environment in files:
            images = environment.images
            if images not in pools:
                images.check()
                pools[images] = pipeline(images)
                pools[images].prepare()
            environment.pipeline = pools[images]

    def __getitem__(self, index: int) -> Any:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.datasets)


class InMemoryEnvironment(TensorDataset):
    """One environment held in memory.

    Args:
        x: images (N, C, H, W), float32, or uint8 that is divided by 255 when it is read.
        y: labels (N,) int64 in [0, K).
        c: confounder values (N,) int64 in [0, V).
        units: (N,) which original an image was made from; images of one unit never part in a split.
        masks: (N, H, W) uint8, 255 on what should matter and 0 on what should not, or bool; None: not known.
    """

    def __init__(self, x: Tensor, y: Tensor, c: Tensor, units: Tensor | None = None, masks: Tensor | None = None):
        super().__init__(x, y.long())
        if masks is not None and masks.shape != (len(x), *x.shape[2:]):
            raise ValueError(f"masks {tuple(masks.shape)} do not fit images {tuple(x.shape)}; give (N, H, W)")
        self.masks: NDArray[Any] | None = None if masks is None else masks.numpy()
        self.y: Integers = y.long().numpy()
        self.c: Integers = c.long().numpy()
        self.split_units: Integers | None = None if units is None else units.long().numpy()

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Images and labels at a position, a slice or a tensor of positions."""
        x, y = self.tensors[0][index], self.tensors[1][index]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), y


class ImageEnvironment(Dataset[tuple[Tensor, int]]):
    """Some images of a pool, with aligned arrays.

    Args:
        images: the pool.
        positions: (N,) of the images in the pool.
        y: labels (N,) in [0, K).
        c: confounder values (N,) in [0, V); None: not known.
        augment: training draws random crops, flips and colours.
        split_units: (N,) which original an image was made from; images of one unit never part in a split.
        masks: pool of the images' masks, aligned with ``images``, white on what should matter; None: not known.

    Attributes:
        transform: PIL image -> tensor, in place of the pipeline where a subclass of DomainBed's datasets sets one.
    """

    transform: Callable[[Any], Tensor] | None = None

    def __init__(
        self,
        images: Images,
        positions: ArrayLike,
        y: ArrayLike,
        c: ArrayLike | None = None,
        *,
        augment: bool = False,
        split_units: ArrayLike | None = None,
        masks: Images | None = None,
    ):
        self.images, self.augment, self.masks = images, augment, masks
        self.positions: Integers = np.asarray(positions, dtype=np.int64)
        self.y: Integers = np.asarray(y, dtype=np.int64)
        self.c: Integers | None = None if c is None else np.asarray(c, dtype=np.int64)
        self.split_units: Integers | None = None if split_units is None else np.asarray(split_units, dtype=np.int64)
        arrays = (array for array in (self.y, self.c, self.split_units) if array is not None)
        assert all(len(array) == len(self.positions) for array in arrays)
        self.pipeline: Any = input_pipelines.REGISTRY[input_pipelines.DEFAULT](images)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        """The image (3, size, size), normalised and never augmented, and its label."""
        batch = torch.utils.data.default_collate([self.read(key)])
        return self.finish(batch)[0], int(self.y[key])

    def read(self, key: int, rng: np.random.Generator | None = None) -> Any:
        """The image in its pipeline's compact form; augmented by draws from ``rng`` if this environment augments."""
        if self.transform is not None:
            return self.transform(self.images.open(int(self.positions[key])))
        return self.pipeline.read(int(self.positions[key]), rng if self.augment else None)

    def read_mask(self, key: int, rng: np.random.Generator | None = None) -> Tensor:
        """The mask (size, size) float32 in [0, 1] of what ``read`` gives for a generator in the same state.

        Raises:
            NotImplementedError: the images pass through a transform.
        """
        refuse_transforms(self)
        assert self.masks is not None
        position, rng = int(self.positions[key]), rng if self.augment else None
        return _fractions(self.pipeline.read_mask(self.masks, position, rng).numpy())

    def finish(self, batch: Any) -> Tensor:
        """Collated compact images -> (B, 3, size, size) float32, normalised, on the device on which they are."""
        if self.transform is not None:
            return cast(Tensor, batch)
        finished: Tensor = self.pipeline.finish(batch)
        return finished

    def take(self, keys: ArrayLike, augment: bool | None = None) -> "ImageEnvironment":
        """The images at keys as an environment of their own, from the same pool."""
        keys = np.asarray(keys, dtype=np.int64)
        c, units = (None if array is None else array[keys] for array in (self.c, self.split_units))
        return ImageEnvironment(
            self.images,
            self.positions[keys],
            self.y[keys],
            c,
            augment=self.augment if augment is None else augment,
            split_units=units,
            masks=self.masks,
        )


def image_size(hparams: Mapping[str, Any]) -> int:
    """Pixels of a side of the images that a network sees: the hparam ``image_size``, 224 by default."""
    return int(hparams.get("image_size", 224))


def augments(hparams: Mapping[str, Any]) -> bool:
    """Whether training images are augmented: the hparam ``data_augmentation``, true by default."""
    return bool(hparams.get("data_augmentation", True))


def leaves(environment: Any) -> Iterator[Any]:
    """The datasets of which a composition (Subset, ConcatDataset) is made; the environment itself if it is none."""
    if isinstance(environment, ConcatDataset):
        for part in environment.datasets:
            yield from leaves(part)
    elif isinstance(environment, Subset | misc._SplitDataset):
        yield from leaves(misc.underlying(environment)[0])
    else:
        yield environment


def locate(environment: Any, key: int) -> tuple[Any, int]:
    """The dataset that holds an example of a composition, and the example's position in it."""
    while True:
        if isinstance(environment, ConcatDataset):
            part = bisect.bisect_right(environment.cumulative_sizes, key)
            key -= environment.cumulative_sizes[part - 1] if part else 0
            environment = environment.datasets[part]
        elif isinstance(environment, Subset | misc._SplitDataset):
            environment, keys = misc.underlying(environment)
            key = int(keys[key])
        else:
            return environment, key


def confounders(environment: Any) -> Integers:
    """The confounder values (N,); zeros where the environment knows none."""
    known = known_array(environment, "c")
    return np.zeros(len(environment), dtype=np.int64) if known is None else known


def has_masks(environment: Any) -> bool:
    """Whether the masks of all images of an environment are known."""
    holders = [environment] if getattr(environment, "masks", None) is not None else leaves(environment)
    return all(getattr(holder, "masks", None) is not None for holder in holders)


def refuse_transforms(environment: Any) -> None:
    """Raises NotImplementedError if images pass through a transform of the environment's own: masks can't follow."""
    for leaf in leaves(environment):
        if getattr(leaf, "transform", None) is not None:
            raise NotImplementedError(
                f"the images of this {type(leaf).__name__} pass through a transform of their own, which masks can't "
                "follow; let an input pipeline open them (transform = None), or do without masks"
            )


def read_mask(environment: Any, key: int, rng: np.random.Generator | None = None) -> Tensor:
    """One mask (H, W) float32 in [0, 1] of an environment that has masks, augmented as the image is by equal draws."""
    if getattr(environment, "masks", None) is None:
        environment, key = locate(environment, key)
    if hasattr(environment, "read_mask"):
        return cast(Tensor, environment.read_mask(key, rng))
    return _fractions(environment.masks[key])


def masks(environment: Any, keys: ArrayLike) -> Tensor | None:
    """Masks (n, H, W) float32 of an environment's images at keys (n,), never augmented; None: they are not known.

    1 is what should matter (the object), 0 what should not.
    """
    if not has_masks(environment):
        return None
    keys, known = np.asarray(keys, dtype=np.int64), getattr(environment, "masks", None)
    if isinstance(known, np.ndarray):
        return _fractions(known[keys])
    return torch.stack([read_mask(environment, int(key)) for key in keys])


def _fractions(masks: NDArray[Any]) -> Tensor:
    """Masks uint8 or bool as float32 in [0, 1]."""
    return torch.from_numpy(masks.astype(np.float32) / np.float32(1 if masks.dtype == bool else 255))

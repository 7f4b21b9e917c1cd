"""Single domains of VLCS and TerraIncognita, divided at random: ALIGN's evaluation "in distribution"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from domainbed.datasets.base import ImageEnvironment, MultipleDomainDataset, augments, image_size, register
from domainbed.datasets.composed import stratified_split
from domainbed.datasets.image_folder import (
    VLCS,
    NamedImageFolder,
    TerraIncognita,
    check_classes,
    class_files,
    directory,
    labelled,
)
from domainbed.images import Images


class InDistribution(MultipleDomainDataset):
    """One domain alone, divided into training, validation and test images as ALIGN evaluates "in distribution".

    The division is random within each class, 60 / 20 / 20 %, and a function of the hparam ``data_seed`` alone: every
    trial has the same one.

    Source: Hong, Chen, Chen, Lin, Chen and Liao 2026, AAAI (ALIGN), https://arxiv.org/abs/2511.06944.
    Differs: ALIGN's own division is not published.
    Licence, Layout: those of the dataset from which the domain is.

    Class attributes:
        WHOLE: that dataset.
        DOMAIN: the number of the domain among its environments.
    """

    ENVIRONMENTS = ("train", "validation", "test")
    VALIDATION_ENVS = (1,)
    TEST_ENVS = (2,)
    NEEDS_DATA_DIR = True
    CHECKPOINT_FREQ = 300
    HPARAMS = {"data_seed": 0}
    FRACTIONS: ClassVar[Sequence[float]] = (0.6, 0.2, 0.2)
    WHOLE: ClassVar[type[NamedImageFolder]]
    DOMAIN: ClassVar[int]

    def __init__(self, root: str | Path | None, test_envs: Sequence[int], hparams: Mapping[str, Any]):
        self.dir = directory(type(self).__name__, root, self.WHOLE.DIRECTORY)
        name, size = self.WHOLE.FOLDERS[self.DOMAIN], image_size(hparams)
        files = class_files(Path(self.dir, name))
        self.CLASSES = check_classes(Path(self.dir), {name: files}, self.WHOLE.CLASSES)
        paths, y = labelled(files)
        images = Images(Path(self.dir), tuple(f"{name}/{path}" for path in paths), size)
        whole = ImageEnvironment(images, np.arange(len(y)), y)
        parts = stratified_split(y, self.FRACTIONS, hparams.get("data_seed", 0))
        self.datasets = [whole.take(keys, augment=e == 0 and augments(hparams)) for e, keys in enumerate(parts)]
        self.input_shape, self.num_classes = (3, size, size), len(self.CLASSES)


class VLCSInDistribution(InDistribution):
    """One domain of VLCS. Source, Licence: see ``InDistribution`` and ``VLCS``. Layout: as ``VLCS``."""

    WHOLE = VLCS


@register
class VLCSInDistribution_C(VLCSInDistribution):
    """Caltech101's part of VLCS alone, divided at random (see ``InDistribution``).

    Source: ALIGN, https://arxiv.org/abs/2511.06944, on VLCS. Licence: as VLCS. Layout: VLCS/Caltech101/{class}/.
    """

    DOMAIN = 0


@register
class VLCSInDistribution_L(VLCSInDistribution):
    """LabelMe's part of VLCS alone, divided at random (see ``InDistribution``).

    Source: ALIGN, https://arxiv.org/abs/2511.06944, on VLCS. Licence: as VLCS. Layout: VLCS/LabelMe/{class}/.
    """

    DOMAIN = 1


@register
class VLCSInDistribution_S(VLCSInDistribution):
    """SUN09's part of VLCS alone, divided at random (see ``InDistribution``).

    Source: ALIGN, https://arxiv.org/abs/2511.06944, on VLCS. Licence: as VLCS. Layout: VLCS/SUN09/{class}/.
    """

    DOMAIN = 2


@register
class VLCSInDistribution_V(VLCSInDistribution):
    """PASCAL VOC 2007's part of VLCS alone, divided at random (see ``InDistribution``).

    Source: ALIGN, https://arxiv.org/abs/2511.06944, on VLCS. Licence: as VLCS. Layout: VLCS/VOC2007/{class}/.
    """

    DOMAIN = 3


class TerraIncognitaInDistribution(InDistribution):
    """One location of TerraIncognita; pictures of one burst of the camera may part, so that accuracies are high.

    Source, Licence: see ``InDistribution`` and ``TerraIncognita``. Layout: as ``TerraIncognita``.
    """

    WHOLE = TerraIncognita


@register
class TerraIncognitaInDistribution_L100(TerraIncognitaInDistribution):
    """Location 100 of TerraIncognita alone, divided at random (see ``InDistribution``).

    Source: ALIGN, arXiv:2511.06944. Licence: as TerraIncognita. Layout: terra_incognita/location_100/{class}/.
    """

    DOMAIN = 0


@register
class TerraIncognitaInDistribution_L38(TerraIncognitaInDistribution):
    """Location 38 of TerraIncognita alone, divided at random (see ``InDistribution``).

    Source: ALIGN, arXiv:2511.06944. Licence: as TerraIncognita. Layout: terra_incognita/location_38/{class}/.
    """

    DOMAIN = 1


@register
class TerraIncognitaInDistribution_L43(TerraIncognitaInDistribution):
    """Location 43 of TerraIncognita alone, divided at random (see ``InDistribution``).

    Source: ALIGN, arXiv:2511.06944. Licence: as TerraIncognita. Layout: terra_incognita/location_43/{class}/.
    """

    DOMAIN = 2


@register
class TerraIncognitaInDistribution_L46(TerraIncognitaInDistribution):
    """Location 46 of TerraIncognita alone, divided at random (see ``InDistribution``).

    Source: ALIGN, arXiv:2511.06944. Licence: as TerraIncognita. Layout: terra_incognita/location_46/{class}/.
    """

    DOMAIN = 3

"""Featurizers, images (B, C, H, W) -> features (B, n_outputs), and classifiers, features -> logits (B, K).

Every featurizer has ``n_outputs`` and a replaceable module ``activation``, applied last. Those of images have
``map_layer``: the module whose output (B, D, h, w) is the last map before pooling, for a forward hook. It is a
property or a module without weights, so that it adds nothing to the state dict. Large networks, and those that are
chosen by name, are in ``backbones``.
"""

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from domainbed.backbones import BACKBONES, DinoV2, ResNet, build
from domainbed.backbones.base import Identity
from domainbed.backbones.weights import from_file_only
from domainbed.lib.wide_resnet import Wide_ResNet

logger = logging.getLogger(__name__)


class MLP(nn.Module):
    """Fully connected network of ``mlp_depth`` linear layers: (B, n_inputs) -> (B, n_outputs).

    Hparams:
        mlp_width: units of a hidden layer.
        mlp_depth: number of linear layers, at least 2.
        mlp_dropout: share of hidden units dropped, before their ReLU.
    """

    def __init__(self, n_inputs: int, n_outputs: int, hparams: Mapping[str, Any]):
        super().__init__()
        width = hparams["mlp_width"]
        self.input = nn.Linear(n_inputs, width)
        self.dropout = nn.Dropout(hparams["mlp_dropout"])
        self.hiddens = nn.ModuleList(nn.Linear(width, width) for _ in range(hparams["mlp_depth"] - 2))
        self.output = nn.Linear(width, n_outputs)
        self.n_outputs = n_outputs
        self.activation: nn.Module = Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.input, *self.hiddens):
            x = F.relu(self.dropout(layer(x)))
        return self.activation(self.output(x))


class MNIST_CNN(nn.Module):
    """DomainBed's network for 28 x 28 digits: (B, C, H, W) -> (B, 128), about 370,000 parameters.

    Four 3 x 3 convolutions, each followed by ReLU and then GroupNorm, and a global average pool. Names and shapes of
    the weights are DomainBed's, so that its ``model.pkl`` loads.
    """

    n_outputs = 128

    def __init__(self, input_shape: Sequence[int]):
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, 2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, 1, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, 1, padding=1)
        self.bn0 = nn.GroupNorm(8, 64)
        self.bn1 = nn.GroupNorm(8, 128)
        self.bn2 = nn.GroupNorm(8, 128)
        self.bn3 = nn.GroupNorm(8, 128)
        self.activation: nn.Module = Identity()

    @property
    def map_layer(self) -> nn.Module:
        """The last normalisation: its output (B, 128, H/2, W/2) is what is pooled."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4)
        for convolution, norm in zip(convolutions, (self.bn0, self.bn1, self.bn2, self.bn3), strict=True):
            x = norm(F.relu(convolution(x)))
        return self.activation(x.mean((2, 3)))


class SmallCNN(nn.Module):
    """Small backbone for the embedded sets (28 to 36 pixels): (B, C, H, W) -> (B, 48).

    Five 3 x 3 convolutions, each followed by GroupNorm and ReLU, and a global average pool. A 3 x 36 x 36 image takes
    7.7 MFLOP (twice the multiply-accumulates of the convolutions); its last map is 9 x 9, that of 28 pixels 7 x 7.
    """

    WIDTHS_AND_STRIDES = ((8, 1), (16, 2), (32, 2), (48, 1), (48, 1))
    n_outputs = 48

    def __init__(self, input_shape: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width, stride in self.WIDTHS_AND_STRIDES:
            convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)  # the norm has a bias
            # More groups would come near instance norm in the first layer, which hides an image's colour.
            layers += [convolution, nn.GroupNorm(4, width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.activation: nn.Module = Identity()

    @property
    def map_layer(self) -> nn.Module:
        """The last ReLU: its output (B, 48, H/4, W/4) is what is pooled."""
        return self.features[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.features(x).mean((2, 3)))


@BACKBONES.register
def small_cnn(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return from_file_only(SmallCNN(input_shape), hparams)


@BACKBONES.register
def mnist_cnn(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return from_file_only(MNIST_CNN(input_shape), hparams)


@BACKBONES.register
def wide_resnet(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return from_file_only(Wide_ResNet(input_shape, 16, 2, 0.0), hparams)


class ContextNet(nn.Module):
    """One plane of context for each image: (B, C, H, W) -> (B, 1, H, W).

    Source: Zhang et al. 2021, Adaptive Risk Minimization, https://arxiv.org/abs/2007.02931.
    """

    def __init__(self, input_shape: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for _ in range(2):
            layers += [nn.Conv2d(channels, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU()]
            channels = 64
        self.context_net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.context_net(x)


def _large_image_featurizer(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    if not hparams.get("vit", False):
        return ResNet(input_shape, hparams)
    if not hparams.get("dinov2", False):
        raise NotImplementedError('hparam vit is true, dinov2 is not; the only ViT is {"vit": true, "dinov2": true}')
    return DinoV2(input_shape, hparams)


_FEATURIZER_BY_SIZE = {(28, 28): mnist_cnn, (32, 32): wide_resnet, (224, 224): _large_image_featurizer}


def Featurizer(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> Any:
    """The featurizer for a shape, or the one that is asked for.

    Args:
        input_shape: (n,) for vectors or (C, H, W) for images.
        hparams: read by the featurizer.

    Hparams:
        backbone: a name in ``BACKBONES``, "timm:NAME" or "torchvision:NAME"; without it the shape decides.
        resnet18: a ResNet-18 also for a shape that has no featurizer of its own.

    Raises:
        NotImplementedError: no backbone of that name, or no featurizer for that shape.
        ValueError: the backbone contradicts another hparam, or does not take that shape.
    """
    if backbone := hparams.get("backbone"):
        return build(backbone, input_shape, hparams)
    if len(input_shape) == 1:
        return MLP(input_shape[0], hparams["mlp_width"], hparams)
    size = tuple(input_shape[1:])
    if size not in _FEATURIZER_BY_SIZE:
        if hparams.get("resnet18", False):
            return ResNet(input_shape, hparams)
        known = ", ".join(f"{height} x {width}" for height, width in _FEATURIZER_BY_SIZE)
        raise NotImplementedError(
            f"no featurizer for input of shape {tuple(input_shape)}; image sizes with one: {known}; resize the images "
            f"or set the hparam backbone (one of: {', '.join(BACKBONES)}, timm:NAME, torchvision:NAME)"
        )
    featurizer = _FEATURIZER_BY_SIZE[size](input_shape, hparams)
    if hparams.get("resnet18", False) and not isinstance(featurizer, ResNet):
        logger.warning(
            "resnet18 is not used: images of %d x %d pixels get %s; for a ResNet set the hparam backbone to resnet18",
            *size,
            type(featurizer).__name__,
        )
    return featurizer


def Classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """Features (B, in_features) -> logits (B, out_features): one linear layer, or three with ReLU between."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    half, quarter = in_features // 2, in_features // 4
    return nn.Sequential(
        nn.Linear(in_features, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, out_features)
    )


class WholeFish(nn.Module):
    """Featurizer and classifier in one, whose weights can be set back; images -> logits (B, K).

    Args:
        weights: a state dict to start from.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hparams: Mapping[str, Any],
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        featurizer = Featurizer(input_shape, hparams)
        self.net = nn.Sequential(
            featurizer, Classifier(featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        )
        if weights is not None:
            self.reset_weights(weights)

    def reset_weights(self, weights: Mapping[str, Any]) -> None:
        """Loads a copy of a state dict."""
        self.load_state_dict(copy.deepcopy(weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def remove_batch_norm_from_resnet(model: nn.Module) -> nn.Module:
    """Folds every BatchNorm, as in evaluation mode, into the convolution before it; in place.

    It finds a BatchNorm by its place right after a convolution, as residual networks of torchvision and timm have it.
    """
    training = model.training
    model.eval()  # what the folding requires
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, module), (next_name, following) in itertools.pairwise(children):
            if isinstance(module, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                setattr(parent, name, nn.utils.fuse_conv_bn_eval(module, following))
                setattr(parent, next_name, Identity())
    return model.train(training)

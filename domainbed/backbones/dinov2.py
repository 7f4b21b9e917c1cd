"""DINOv2 as DomainBed uses it: by torch.hub, its features made from several blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed.backbones import weights
from domainbed.backbones.base import BACKBONES, Backbone, MapTap
from domainbed.backbones.weights import Choice

_PATCH = 14


class DinoV2(Backbone):
    """DINOv2 ViT-B/14: (B, 3, H, W), H and W multiples of 14, -> (B, 5 * 768).

    The features are the class tokens of the last four blocks and the mean patch token of the last.

    Source: Oquab et al. 2023, https://arxiv.org/abs/2304.07193, linear evaluation; weights by torch.hub.

    Hparams:
        vit_dropout: share of the features dropped.
        vit_attn_tune: train the attention layers only.
        pretrained: False takes random weights (torch.hub still fetches the code once).
        weights: a local file.
        fetch_code: False, as untrusted models are built, refuses to fetch code and run it.

    Raises:
        ValueError: the images don't have three channels or their sides aren't multiples of 14; or a file does not fit;
            or code may not be fetched.
        OSError: torch.hub can't load code or weights.
    """

    n_outputs = 5 * 768

    def __init__(self, input_shape: Sequence[int], hparams: Mapping[str, Any]):
        channels, height, width = input_shape
        if channels != 3:
            raise ValueError(f"images have {channels} channels; DINOv2 takes 3, use a ResNet or repeat channels")
        if height % _PATCH or width % _PATCH:
            raise ValueError(f"images have {height} x {width} pixels; DINOv2 takes multiples of {_PATCH}, such as 224")
        if not hparams.get("fetch_code", True):
            raise ValueError(
                "the code of DINOv2 is fetched by torch.hub (facebookresearch/dinov2) and run, which no saved model "
                "may bring about unless it is trusted: --trusted, in Python trusted=True"
            )
        network = _network(Choice.of(hparams))
        if hparams.get("vit_attn_tune", False):
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(".attn." in name)
        super().__init__(network, self.n_outputs, hparams, hparams.get("vit_dropout", 0.0))
        grid = (height // _PATCH, width // _PATCH)
        self.map_layer = MapTap(grid, prefix=1).put_behind(network.blocks[-1].norm1)

    def features(self, x: Tensor) -> Tensor:
        blocks = self.network.get_intermediate_layers(x, n=4, return_class_token=True)  # (patch tokens, class token)
        return torch.cat([token for _, token in blocks] + [blocks[-1][0].mean(1)], dim=1)


def _network(choice: Choice) -> Any:
    choice.refuse_name("DINOv2")
    with weights.explained(f"facebookresearch/dinov2 (code and dinov2_vitb14_pretrain.pth, in {torch.hub.get_dir()})"):
        network = torch.hub.load("facebookresearch/dinov2", "dinov2_vitb14", pretrained=choice.from_hub)
    if choice.file is not None:
        weights.load(network, weights.read(choice.file), choice.file)
    return network


@BACKBONES.register
def dinov2(input_shape: Sequence[int], hparams: Mapping[str, Any]) -> nn.Module:
    return DinoV2(input_shape, hparams)

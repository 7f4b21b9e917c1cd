"""The backbone of data that are features already, as a frozen network made them."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from domainbed.backbones.base import BACKBONES, Identity


class GivenFeatures(nn.Module):
    """Vectors (B, D) as they are: a classifier on top is all that is trained. There are no maps to look at."""

    def __init__(self, n_outputs: int):
        super().__init__()
        self.n_outputs = n_outputs
        self.activation: nn.Module = Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


@BACKBONES.register
def identity(input_shape: Sequence[int], hparams: Mapping[str, object]) -> nn.Module:
    if len(input_shape) != 1:
        raise ValueError(
            f"backbone identity takes vectors (D,), not shape {tuple(input_shape)}; name another, or write the "
            "features of a frozen network to a file first: python -m domainbed.scripts.extract_features"
        )
    return GivenFeatures(input_shape[0])

"""The wide residual network against the paper's parameter counts and a forward pass written out by formula."""

import pytest
import torch
import torch.nn.functional as F

from domainbed.lib.wide_resnet import Wide_ResNet


@pytest.mark.parametrize(("depth", "widen_factor", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (16, 8, 11.0)])
def test_parameter_counts_of_the_paper(depth, widen_factor, millions):
    """The paper counts the network with its last layer for ten classes."""
    with torch.device("meta"):
        network = Wide_ResNet((3, 32, 32), depth, widen_factor, 0.0)
    assert network.n_outputs == 64 * widen_factor
    count = sum(p.numel() for p in network.parameters()) + network.n_outputs * 10 + 10
    assert round(count / 1e6, 1) == millions


def slow_forward(state, x):
    """WRN-10-2 in evaluation mode, from its weights in the order in which they are applied."""
    weights = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]

    def norm(x):
        gamma, beta, mean, variance = (weights.pop(0).reshape(-1, 1, 1) for _ in range(4))
        return ((x - mean) / (variance + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    x = F.conv2d(x, weights.pop(0), padding=1)
    for stride in (1, 2, 2):  # every stage of one block widens, so each has a shortcut
        active = norm(x)
        inner = norm(F.conv2d(active, weights.pop(0), stride=stride, padding=1))
        inner = F.conv2d(inner, weights.pop(0), padding=1)
        x = inner + F.conv2d(active, weights.pop(0), stride=stride)
    return norm(x).mean((2, 3))


def test_forward_follows_the_definition():
    torch.manual_seed(0)
    network = Wide_ResNet((2, 32, 32), 10, 2, 0.3)
    network(torch.randn(4, 2, 32, 32))  # moves the running statistics
    network.eval()
    x = torch.randn(3, 2, 32, 32)
    torch.testing.assert_close(network(x), slow_forward(network.state_dict(), x), rtol=1e-4, atol=1e-5)


def test_identity_shortcut_where_the_shape_stays():
    blocks = [m for m in Wide_ResNet((3, 32, 32), 16, 1, 0.0).modules() if hasattr(m, "shortcut")]
    assert [block.shortcut is None for block in blocks] == [True, True, False, True, False, True]


@pytest.mark.parametrize("depth", [4, 15, 17])
def test_depth_is_checked(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        Wide_ResNet((3, 32, 32), depth, 2, 0.0)

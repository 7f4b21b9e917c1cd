"""DINOv2's maps, from a small stand-in for what torch.hub returns; its features are tested with the networks."""

import pytest
import torch
from torch import nn

from domainbed import hparams_registry, networks
from domainbed.algorithms import ERM
from domainbed.attribution import capture, grad_cam, target_logit


class Block(nn.Module):
    """Attention of one head with identity projections; no MLP."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(768)
        self.attn = nn.Linear(768, 768)

    def forward(self, x):
        normed = self.norm1(x)
        return x + (normed @ normed.mT / 768**0.5).softmax(-1) @ self.attn(normed)


class SmallDino(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 768, 14, 14)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 768))
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def get_intermediate_layers(self, x, n, return_class_token):
        assert (n, return_class_token) == (4, True)
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append((x[:, 1:], x[:, 0]))
        return tuple(outputs)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda repository, model, pretrained: SmallDino())


def test_grad_cam_at_the_last_blocks_attention(hub):
    featurizer = networks.Featurizer((3, 28, 42), {"backbone": "dinov2"})
    assert isinstance(featurizer, networks.DinoV2)
    assert not set(featurizer.state_dict()) - {f"network.{name}" for name in SmallDino().state_dict()}
    classifier, x, target = nn.Linear(3840, 2), torch.randn(2, 3, 28, 42), torch.tensor([1, 1])
    with capture(featurizer.map_layer) as seen:
        features = featurizer(x)
    heatmaps = grad_cam(seen.maps, target_logit(classifier(features), target), relu=False)
    assert heatmaps.shape == (2, 2, 3)

    block, before = featurizer.network.blocks[-1], []
    block.register_forward_hook(lambda module, inputs, output: before.append(inputs[0].detach()))
    torch.testing.assert_close(featurizer(x), features)
    normed = nn.functional.layer_norm(before[0], (768,), block.norm1.weight, block.norm1.bias).detach().requires_grad_()
    attention = (normed @ normed.mT / 768**0.5).softmax(-1)
    after = before[0] + attention @ block.attn(normed)
    weight = classifier.weight[1].reshape(5, 768)  # of four class tokens and the mean patch
    score = (after[:, 0] @ weight[3] + after[:, 1:].mean(1) @ weight[4]).sum()
    (gradient,) = torch.autograd.grad(score, normed)
    expected = (gradient[:, 1:].mean(1, keepdim=True) * normed[:, 1:]).sum(-1).reshape(2, 2, 3)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(heatmaps, expected, rtol=1e-3, atol=1e-6)


def test_sizes(hub):
    with pytest.raises(ValueError, match="28 x 30 pixels; DINOv2 takes multiples of 14"):
        networks.Featurizer((3, 28, 30), {"backbone": "dinov2"})


def test_local_file(hub, tmp_path):
    saved = SmallDino()
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    loaded = networks.Featurizer((3, 28, 28), {"backbone": "dinov2", "weights": str(tmp_path / "w.pth")})
    assert torch.equal(loaded.network.cls_token, saved.cls_token)
    with pytest.raises(ValueError, match="'V2'; DINOv2 has no weights of that name"):
        networks.Featurizer((3, 28, 28), {"backbone": "dinov2", "weights": "V2"})


def test_one_step_of_erm(hub):
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("ERM", "PACS") | {"backbone": "dinov2", "pretrained": False}
    algorithm = ERM((3, 28, 28), 3, 2, hparams)
    before = algorithm.featurizer.network.patch_embed.weight.clone()
    loss = algorithm.update([(torch.randn(2, 3, 28, 28), torch.tensor([0, 2])) for _ in range(2)])["loss"]
    assert loss > 0
    assert not torch.equal(algorithm.featurizer.network.patch_embed.weight, before)
    assert torch.isfinite(algorithm.eval().predict(torch.randn(2, 3, 28, 28))).all()

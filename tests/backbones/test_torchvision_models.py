"""torchvision's models: what is cut off, where the maps are, sizes, weights, and errors; all from random weights."""

import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from domainbed import networks
from domainbed.attribution import capture, grad_cam, target_logit

RANDOM = {"pretrained": False}


def build(name, shape, **hparams):
    return networks.Featurizer(shape, {"backbone": f"torchvision:{name}"} | RANDOM | hparams)


# name -> shape of an image, number of features, h and w of the maps
MODELS = {
    "alexnet": ((3, 96, 96), 4096, (2, 2)),
    "convnext_tiny": ((3, 64, 64), 768, (2, 2)),
    "efficientnet_b0": ((3, 64, 96), 1280, (2, 3)),
    "inception_v3": ((3, 128, 128), 2048, (2, 2)),
    "mnasnet0_5": ((2, 64, 64), 1280, (2, 2)),
    "resnet18": ((3, 128, 128), 512, (4, 4)),
    "shufflenet_v2_x0_5": ((1, 64, 64), 1024, (2, 2)),
    "squeezenet1_1": ((3, 64, 64), 512, (3, 3)),
    "regnet_y_400mf": ((3, 64, 64), 440, (2, 2)),
}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")  # torchvision's, of Inception
@pytest.mark.parametrize(("name", "expected"), MODELS.items(), ids=MODELS)
def test_contract(name, expected):
    shape, n_outputs, map_size = expected
    featurizer = build(name, shape)
    assert featurizer.training
    with capture(featurizer.map_layer) as seen:
        features = featurizer(torch.randn(2, *shape))  # in training: no auxiliary outputs
    assert features.shape == (2, n_outputs) == (2, featurizer.n_outputs)
    assert seen.maps.shape[2:] == map_size
    assert torch.autograd.grad(features.square().sum(), seen.maps)[0].abs().sum() > 0
    assert all(key.startswith("network.") for key in featurizer.state_dict())
    featurizer.activation = nn.Threshold(1e9, 5.0)
    assert featurizer(torch.randn(2, *shape)).eq(5).all()


def test_names_are_torchvisions():
    with torch.device("meta"):
        expected = {f"network.{name}" for name in models.convnext_tiny().state_dict()}
    assert expected - set(build("convnext_tiny", (3, 32, 32)).state_dict()) == {
        "network.classifier.2.weight", "network.classifier.2.bias"
    }  # fmt: skip


def test_alexnet_keeps_its_hidden_layers_and_their_dropout():
    featurizer = build("alexnet", (3, 64, 64))
    kinds = [type(layer).__name__ for layer in featurizer.network.classifier]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Identity"]
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(featurizer(x), featurizer(x))
    assert torch.equal(featurizer.eval()(x), featurizer(x))


def test_maps_of_a_densenet_are_what_it_pools():
    featurizer = build("densenet121", (3, 64, 64))
    with capture(featurizer.map_layer) as seen:
        features = featurizer(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(seen.maps.mean((2, 3)), features)


def test_swins_maps_lead_to_its_features():
    featurizer = build("swin_t", (3, 64, 96)).eval()
    with capture(featurizer.map_layer) as seen:
        features = featurizer(torch.randn(2, 3, 64, 96))
    assert seen.maps.shape == (2, 768, 2, 3)
    torch.testing.assert_close(seen.maps.mean((2, 3)), features)
    assert torch.autograd.grad(features.sum(), seen.maps)[0].eq(1 / 6).all()


@pytest.fixture(scope="module")
def vit():
    return build("vit_b_32", (3, 64, 64)).eval()


def test_grad_cam_of_a_vit_is_that_of_its_last_attention(vit):
    """The last block written out, with the patches as they enter its attention as the variable."""
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 0])
    classifier = nn.Linear(768, 2)
    with capture(vit.map_layer) as seen:
        logits = classifier(vit(x))
    heatmaps = grad_cam(seen.maps, target_logit(logits, target), relu=False)

    encoder, block, before = vit.network.encoder, vit.network.encoder.layers[-1], []
    handle = block.register_forward_hook(lambda module, inputs, output: before.append(inputs[0].detach()))
    vit(x)
    handle.remove()
    attention = block.self_attention
    normed = nn.functional.layer_norm(before[0], (768,), block.ln_1.weight, block.ln_1.bias, 1e-6)
    patches = normed[:, 1:].detach().requires_grad_()
    tokens = torch.cat([normed[:, :1].detach(), patches], dim=1)
    q, k, v = (tokens @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(2, 5, 3, 12, 64).unbind(2)
    weights = torch.einsum("bhd,bkhd->bhk", q[:, 0] / 8, k).softmax(-1)  # of the class token only
    mixed = torch.einsum("bhk,bkhd->bhd", weights, v).reshape(2, 768)
    token = before[0][:, 0] + attention.out_proj(mixed)
    token = encoder.ln(token + block.mlp(block.ln_2(token)))
    torch.testing.assert_close(classifier(token), logits, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(classifier(token)[[0, 1], target].sum(), patches)
    expected = (gradient.mean(1, keepdim=True) * patches).sum(-1).reshape(2, 2, 2)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(heatmaps, expected, rtol=1e-3, atol=1e-7)


def test_sizes_that_a_model_does_not_take():
    with pytest.raises(ValueError, match=r"alexnet takes no images of shape \(3, 32, 32\).*too small.*image_size"):
        build("alexnet", (3, 32, 32))
    with pytest.raises(ValueError, match=r"vit_b_32 takes no images of shape \(3, 50, 50\).*patch"):
        build("vit_b_32", (3, 50, 50))
    with pytest.raises(ValueError, match=r"vit_b_32 with these weights takes images of 224 pixels, not 64 x 64.*timm"):
        build("vit_b_32", (3, 64, 64), pretrained=True)


def test_unknown_model():
    with pytest.raises(NotImplementedError, match="torchvision model not found: resnet81; did you mean resnet18"):
        build("resnet81", (3, 64, 64))


# Weights


@pytest.mark.parametrize(
    ("name", "hparams", "expected"),
    [
        ("resnet50", {}, "ResNet50_Weights.IMAGENET1K_V1"),
        ("resnet50", {"weights": "IMAGENET1K_V2"}, "ResNet50_Weights.IMAGENET1K_V2"),
        ("mobilenet_v2", {}, "MobileNet_V2_Weights.IMAGENET1K_V2"),
        ("mobilenet_v2", {"weights": "IMAGENET1K_V1"}, "MobileNet_V2_Weights.IMAGENET1K_V1"),
        ("mobilenet_v2", {"pretrained": False}, None),
    ],
)
def test_weights_that_are_asked_for(monkeypatch, name, hparams, expected):
    asked = []
    original = models.get_model

    def get_model(name, weights, **options):
        asked.append(weights and str(weights))
        return original("squeezenet1_1", weights=None)

    monkeypatch.setattr(models, "get_model", get_model)
    build(name, (3, 64, 64), **({"pretrained": True} | hparams))
    assert asked == [expected]


def test_a_resnet_of_domainbeds_takes_named_weights(monkeypatch):
    asked = []

    def get_model(name, weights):
        asked.append((name, str(weights)))
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2))

    monkeypatch.setattr(models, "get_model", get_model)
    networks.Featurizer((3, 224, 224), {"resnet50_augmix": True, "weights": "IMAGENET1K_V2"})
    networks.Featurizer((3, 160, 160), {"backbone": "resnet50", "weights": "IMAGENET1K_V2"})
    assert asked == [("resnet50", "ResNet50_Weights.IMAGENET1K_V2")] * 2


def test_unknown_weights_list_the_known():
    with pytest.raises(
        ValueError, match=r"'IMAGENET1K_V2'; torchvision's resnet18 has no.*it has IMAGENET1K_V1,.*file"
    ):
        networks.Featurizer((3, 224, 224), {"resnet18": True, "weights": "IMAGENET1K_V2"})


@pytest.mark.parametrize("classes", [1000, 7])
def test_local_file_with_any_head(tmp_path, classes):
    saved = models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=classes)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    featurizer = build("shufflenet_v2_x0_5", (2, 64, 64), pretrained=True, weights=str(tmp_path / "w.pth"))
    own = featurizer.network.state_dict()
    kept = {name: value for name, value in saved.state_dict().items() if not name.startswith("fc.")}
    assert own.keys() == kept.keys()
    assert torch.equal(own.pop("conv1.0.weight"), kept.pop("conv1.0.weight")[:, :2])
    assert all(torch.equal(value, kept[name]) for name, value in own.items())


def test_local_file_of_another_model(tmp_path):
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth does not fit ShuffleNetV2; missing: conv1\.0\.weight.*unexpected: f"):
        build("shufflenet_v2_x0_5", (3, 64, 64), pretrained=True, weights=str(tmp_path / "w.pth"))


def test_a_resnet_of_domainbeds_takes_a_local_file_at_any_size(tmp_path):
    saved = networks.Featurizer((3, 64, 64), {"backbone": "resnet18"} | RANDOM).network
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    loaded = networks.Featurizer((3, 128, 128), {"backbone": "resnet18", "weights": str(tmp_path / "w.pth")})
    assert all(torch.equal(value, loaded.network.state_dict()[name]) for name, value in saved.state_dict().items())


def test_weights_that_can_not_be_fetched_name_the_file(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    file = Path(models.AlexNet_Weights.IMAGENET1K_V1.url).name
    with pytest.raises(OSError, match=rf"checkpoints/{file}, from https.*no route.*\"weights\": \"FILE"):
        build("alexnet", (3, 64, 64), pretrained=True)

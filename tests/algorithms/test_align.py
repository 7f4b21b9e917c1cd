"""ALIGN: each loss term by hand, who learns when, and what the masker can and cannot know."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import hparams_registry, partitions
from domainbed.algorithms import align
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.datasets import get_dataset_class
from domainbed.loaders import Minibatch, TrainingLoader
from domainbed.maskers import ConvMasker, MapMasker, total_variation
from domainbed.splits import split_environments, training_splits

SHAPE, K = (3, 36, 36), 3
ROWS = ("ALIGN", "ALIGN_NoGuidance", "ALIGN_GrayMask", "ALIGN_GivenMask")
BATCH_NORM = {"backbone": "resnet18", "pretrained": False}


def build(name: str = "ALIGN", shape: tuple[int, ...] = SHAPE, steps: int = 0, **hparams: Any) -> Any:
    settings = hparams_registry.default_hparams(name, "DigitsM2M") | hparams
    torch.manual_seed(0)
    return REGISTRY[name].from_task(Task(shape, K, num_domains=2, steps=steps), settings)


def step_data(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Minibatch]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 1, 2, 0, 1, 0])
    x = torch.randn(6, *shape, generator=generator) + y.view(-1, 1, 1, 1)
    m = torch.rand(6, *shape[1:], generator=generator)
    return [Minibatch(x[:4], y[:4], m=m[:4]), Minibatch(x[4:], y[4:], m=m[4:])]


def weights(network: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in network.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


class ByBrightness(nn.Module):
    """Logits (B, 2): the summed light of a region, and 0; what this classifier sees is known."""

    def __init__(self, region: Tensor):
        super().__init__()
        self.region = nn.Parameter(region)

    def forward(self, x: Tensor) -> Tensor:
        light = (x * self.region).sum((1, 2, 3))
        return torch.stack([light, torch.zeros_like(light)], dim=1)


def with_classifier(model: Any, network: nn.Module) -> Any:
    model.network = network
    return model


def test_the_maskers_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    region = torch.zeros(1, 2, 2)
    region[0, 0, 0] = 2.0
    model = with_classifier(build(lambda_1=0.5, lambda_2=0.25), ByBrightness(region))
    model.mean_colour = torch.tensor([1.0])
    mask = torch.tensor([[[0.75, 0.25], [0.25, 0.25]]])
    monkeypatch.setattr(model, "mask", lambda x: mask)
    x = torch.tensor([[[[3.0, 9.0], [9.0, 9.0]]]])
    loss, values = model.masker_loss(x, torch.tensor([0]))
    # The pixel that counts is 3, the mean colour 1: it shows 3 * 3/4 + 1/4 = 5/2, and hidden 3/4 + 3/4 = 3/2.
    seen, hidden = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(-3))
    distance, area, variation = (seen - hidden - 1) ** 2, 1.5 / 4, 2 * (0.5 / 2)
    assert values == {
        "mask_distance": pytest.approx(distance),
        "mask_area": pytest.approx(area),
        "mask_variation": pytest.approx(variation),
    }
    assert loss.item() == pytest.approx(distance + 0.5 * area + 0.25 * variation)


@pytest.mark.parametrize(("how", "shown", "hidden"), [("mean", 2.5, 1.5), ("zero", 2.25, 0.75)])
def test_what_hidden_pixels_show(monkeypatch: pytest.MonkeyPatch, how: str, shown: float, hidden: float) -> None:
    region = torch.zeros(1, 2, 2)
    region[0, 0, 0] = 1.0
    model = with_classifier(build(mask_fill=how), ByBrightness(region))
    model.mean_colour = torch.tensor([1.0])
    monkeypatch.setattr(model, "mask", lambda x: torch.tensor([[[0.75, 0.25], [0.25, 0.25]]]))
    _, values = model.masker_loss(torch.full((1, 1, 2, 2), 3.0), torch.tensor([0]))
    difference = 1 / (1 + math.exp(-shown)) - 1 / (1 + math.exp(-hidden))
    assert values["mask_distance"] == pytest.approx((difference - 1) ** 2)


def test_total_variation_by_loops() -> None:
    masks = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    down = [abs(m[i + 1, j] - m[i, j]).item() for m in masks for i in range(3) for j in range(5)]
    right = [abs(m[i, j + 1] - m[i, j]).item() for m in masks for i in range(4) for j in range(4)]
    expected = sum(down) / len(down) + sum(right) / len(right)
    assert total_variation(masks).item() == pytest.approx(expected)
    assert total_variation(torch.ones(2, 3, 3)).item() == 0


def test_alignment_by_hand_and_its_gradient_at_the_ends() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]], requires_grad=True)
    mask = torch.tensor([[[0.0, 1.0], [0.25, 0.0]]])
    loss = align.alignment(maps, mask)
    small, large = math.log(1e-3), math.log(1 - 1e-3)
    assert loss.item() == pytest.approx(-(large + large + math.log(0.5) + small) / 4, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, maps)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().min() > 0.1  # also where a map is exactly 0 or 1
    assert gradient.abs().max() < 300
    assert align.alignment(mask, mask) < align.alignment(1 - mask, mask)


def test_masks_are_compared_at_the_size_of_the_maps_or_of_the_image() -> None:
    mask = torch.zeros(1, 6, 6)
    mask[0, :3, :2] = 1.0
    maps = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    blocks = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(build().alignment(maps, mask), align.alignment(maps, blocks))
    larger = F.interpolate(maps[None], size=(6, 6), mode="bilinear")[0]
    assert torch.equal(build(align_at="image").alignment(maps, mask), align.alignment(larger, mask))


def test_the_classifiers_loss_is_the_sum_of_its_terms() -> None:
    model = build(warmup_steps=0, lambda_3=0.7, lambda_4=0.3)
    values = model.update(step_data())
    regulariser = values["consistency"] + 0.5 * values["sparsity"] + 0.1 * values["mixed_risk"]
    assert values["loss"] == pytest.approx(values["risk"] + 0.7 * values["alignment"] + 0.3 * regulariser, rel=1e-5)
    assert min(values.values()) > 0


def test_the_target_is_the_soft_mask() -> None:
    model, (x, y) = build(), (torch.cat(pair) for pair in zip(*step_data(), strict=True))
    mask = torch.rand(6, 36, 36, generator=torch.Generator().manual_seed(3))
    expected = align.alignment(model.normalised(model.explained(x, y)[1]), F.avg_pool2d(mask, 4))
    assert model.update_classifier(x, y, mask)["alignment"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_masker_may_take_several_steps() -> None:
    model = build(warmup_steps=0, masker_steps=3)
    model.update(step_data())
    assert model.masker_optimizer.state_dict()["state"][0]["step"] == 3


def test_a_masker_on_features_leaves_batch_statistics_alone() -> None:
    model = build(shape=(3, 64, 64), masker="features", **BATCH_NORM)
    before = weights(model.network)
    model.mask(torch.randn(4, 3, 64, 64))
    assert equal(weights(model.network), before)
    assert all(module.training for module in model.network.modules())


def test_each_part_is_frozen_while_the_other_learns() -> None:
    model = build(shape=(3, 64, 64), warmup_steps=0, **BATCH_NORM)
    data = step_data(shape=(3, 64, 64))
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    assert any(isinstance(module, nn.BatchNorm2d) and module.training for module in model.network.modules())
    before, masker = weights(model.network), weights(model.masker)
    model.learn_masks(x, y)
    assert equal(weights(model.network), before)  # batch statistics too
    assert all(weight.grad is None and weight.requires_grad for weight in model.network.parameters())
    assert all(module.training for module in model.network.modules())
    assert not equal(weights(model.masker), masker)

    masker = weights(model.masker)
    state = copy.deepcopy(model.masker_optimizer.state_dict()["state"])
    gradients = [weight.grad.clone() for weight in model.masker.parameters()]
    model.update_classifier(x, y, model.target_masks(x, data))
    assert not equal(weights(model.network), before)
    assert equal(weights(model.masker), masker)
    assert equal([weight.grad for weight in model.masker.parameters()], gradients)
    assert state[0]["step"] == model.masker_optimizer.state_dict()["state"][0]["step"] == 1


def test_frozen_gives_back_what_it_found_also_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    network[0].weight.requires_grad_(False)
    network[1].eval()

    def fail() -> None:
        with align.frozen(network):
            assert not any(weight.requires_grad for weight in network.parameters())
            assert not any(module.training for module in network.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [weight.requires_grad for weight in network.parameters()] == [False, True, True, True, True, True]
    assert [module.training for module in network] == [True, False, True]


def test_the_warm_up_trains_the_classifier_alone_as_dre_does() -> None:
    model, dre = build(warmup_steps=2), build("DRE")
    masker = weights(model.masker)
    for step in range(3):
        for trained in (model, dre):
            torch.manual_seed(step)
            values = trained.update(step_data(step))
        same = equal(weights(model.network), weights(dre.network))
        assert same == (step < 2)
        assert equal(weights(model.masker), masker) == (step < 2)
        if step == 1:
            assert "alignment" not in values
    torch.manual_seed(7)
    assert {"alignment", "mask_distance", "mask_area"} <= model.update(step_data()).keys()


@pytest.mark.parametrize("name", ["ALIGN", "ALIGN_GrayMask", "GRADIA", "CARE"])
def test_a_run_that_ends_in_its_warm_up_is_warned_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build(name, steps=201)
    assert not caplog.records
    build(name, steps=200)
    assert f"{name}: the warm-up of 200 updates outlasts the run of 200" in caplog.text


def test_the_warm_up_as_a_fraction_of_the_run() -> None:
    assert build(steps=40, warmup_frac=0.25).warmup == 10
    assert build(steps=40).warmup == 200
    assert build(steps=40, warmup_frac=0.01).warmup == 0
    with pytest.raises(ValueError, match=r"warmup_frac 1\.5: give a fraction"):
        build(warmup_frac=1.5)
    assert build(steps=0, warmup_frac=0.25, warmup_steps=7).warmup == 7  # where the length of the run is not known


def test_the_maskers_defaults_depend_on_the_images_size() -> None:
    names = ("lambda_1", "lambda_2", "mask_start", "masker_lr")
    small, large = (hparams_registry.default_hparams("ALIGN", dataset) for dataset in ("DigitsO2O", "Waterbirds"))
    assert [small[name] for name in names] == [0.6, 0.5, 0.12, 3e-3]
    assert [large[name] for name in names] == [0.1, 0.1, 0.5, 1e-3]


def test_without_guidance_stays_without_it_in_random_draws() -> None:
    draws = [hparams_registry.random_hparams("ALIGN_NoGuidance", "DigitsM2M", seed) for seed in range(1, 5)]
    assert {draw["lambda_3"] for draw in draws} == {0.0}
    assert len({draw["lambda_1"] for draw in draws}) == 4


@pytest.mark.parametrize("without", [("ALIGN_NoGuidance", {}), ("ALIGN", {"lambda_3": 0.0})])
def test_without_guidance_the_classifier_is_dres_while_the_masker_learns(without: tuple[str, dict[str, float]]) -> None:
    name, hparams = without
    model, dre = build(name, warmup_steps=1, **hparams), build("DRE")
    masker = weights(model.masker)
    for step in range(3):
        for trained in (model, dre):
            torch.manual_seed(step)
            trained.update(step_data(step))
    assert equal(weights(model.network), weights(dre.network))
    assert not equal(weights(model.masker), masker)


def test_the_masker_learns_what_the_classifier_looks_at_and_nothing_else() -> None:
    """Two classifiers look at different corners of the same images; each masker finds its own classifier's."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(16, 3, 36, 36, generator=generator)
    x[:, :, 4:16, 4:16] += 1
    x[:, :, 20:32, 20:32] += 1
    shares = {}
    for name, corner in {"first": slice(4, 16), "second": slice(20, 32)}.items():
        region = torch.zeros(3, 36, 36)
        region[:, corner, corner] = 0.05
        model = with_classifier(build(masker_lr=0.01, lambda_1=0.5, lambda_2=0.1, mask_start=0.5), ByBrightness(region))
        model.mean_colour = x.mean((0, 2, 3)) * 0
        for _ in range(60):
            model.learn_masks(x, torch.zeros(16, dtype=torch.int64))
        with torch.no_grad():
            found = model.mask(x)
        shares[name] = [(found[:, s, s].sum() / found.sum()).item() for s in (slice(4, 16), slice(20, 32))]
    assert shares["first"][0] > 0.8 > 0.1 > shares["first"][1]
    assert shares["second"][1] > 0.8 > 0.1 > shares["second"][0]


def test_the_mean_colour_is_that_of_all_steps() -> None:
    model = build(warmup_steps=9)
    colours = []
    for seed in range(3):
        data = step_data(seed)
        colours.append(torch.stack([x.mean((0, 2, 3)) for x, _ in data]).mean(0))
        model.update(data)
    torch.testing.assert_close(model.mean_colour, torch.stack(colours).mean(0))


@pytest.mark.parametrize("masker", ["conv", "features"])
@pytest.mark.parametrize("shape", [(3, 36, 36), (2, 28, 28), (3, 45, 37)])
def test_masks_are_soft_and_of_the_images_size(masker: str, shape: tuple[int, ...]) -> None:
    model = build(shape=shape, masker=masker, backbone="small_cnn", mask_start=0.5)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    masks = model.mask(x)
    assert masks.shape == (5, *shape[1:])
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert (masks - 0.5).abs().max() < 0.1  # undecided at first
    torch.testing.assert_close(model.mask(x[2:3]), masks[2:3])
    kind = {"conv": ConvMasker, "features": MapMasker}[masker]
    assert isinstance(model.masker, kind)
    steps = [model.update(step_data(shape=shape)) for model.warmup in (0, 0)]
    assert steps[0]["mask_area"] != steps[1]["mask_area"]


def test_grey_masks_run_from_the_darkest_to_the_brightest_pixel() -> None:
    x = torch.tensor([[[[0.0, 3.0], [6.0, 9.0]]] * 2 + [[[0.0, 0.0], [0.0, 0.0]]]])
    masks = build("ALIGN_GrayMask").mask(x)
    torch.testing.assert_close(masks, torch.tensor([[[0.0, 1 / 3], [2 / 3, 1.0]]]))


def test_given_masks_are_the_minibatches_own() -> None:
    model, data = build("ALIGN_GivenMask", warmup_steps=0), step_data()
    assert torch.equal(model.target_masks(torch.cat([x for x, _ in data]), data), torch.cat([b.m for b in data]))
    with pytest.raises(ValueError, match="without masks"):
        model.update([(x, y) for x, y in data])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("partition", ["environment", "group", "random"])
def test_two_environments_groups_and_random_minibatches(name: str, partition: str) -> None:
    dataset = get_dataset_class("DigitsM2M")(None, [0], {})
    splits = training_splits(dataset, split_environments(dataset, [0], 0.2), [0])
    loader = TrainingLoader(splits, partitions.REGISTRY[partition], 8, 4, with_masks=True)
    model = build(name, warmup_steps=1)
    model.classifier = nn.Linear(48, 4)
    model.network[1] = model.classifier
    model.optimizer = model.new_optimizer()
    for _, minibatches in zip(range(3), loader, strict=False):
        values = model.update(minibatches)
    assert all(math.isfinite(value) for value in values.values())
    assert "alignment" in values
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize("name", ROWS)
def test_rows_train_under_autocast(name: str) -> None:
    model = build(name, warmup_steps=0)
    with torch.autocast("cpu", torch.bfloat16):
        values = [model.update(step_data(seed)) for seed in range(2)][-1]
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("name", ["lambda_1", "lambda_2", "lambda_3", "lambda_4", "warmup_steps", "warmup_frac"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} -1: must not be negative"):
        build(**{name: -1})
    with pytest.raises(ValueError, match="masker_steps 0: must be at least 1"):
        build(masker_steps=0)
    with pytest.raises(ValueError, match=r"mask_start 1.0: must be above 0 and below 1"):
        build(mask_start=1.0)


@pytest.mark.parametrize("wrong", [{"masker": "unet"}, {"mask_fill": "noise"}, {"align_at": "pixels"}])
def test_readings_that_do_not_exist_are_named(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} '{value}' is unknown; take one of"):
        build(**wrong)


def test_a_saved_model_goes_on_where_it_was() -> None:
    trained, fresh = build(warmup_steps=3), build(warmup_steps=3)
    for step in range(2):
        trained.update(step_data(step))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.update_count == 2
    assert fresh.mean_colour.abs().max() > 0
    for optimizer in ("optimizer", "masker_optimizer"):
        getattr(fresh, optimizer).load_state_dict(copy.deepcopy(getattr(trained, optimizer).state_dict()))
    for step in range(2, 5):
        for model in (trained, fresh):
            torch.manual_seed(step)
            values = model.update(step_data(step))
    assert "mask_area" in values
    assert equal(weights(trained), weights(fresh))


@pytest.mark.parametrize("name", ["ALIGN", "ALIGN_GivenMask", "DRE", "GRADIA", "CARE"])
@pytest.mark.parametrize(("how", "relu"), [("max", False), ("none", True), ("l1", False), ("max_live", False)])
def test_heatmaps_beyond_the_scale_of_a_mask_are_refused(name: str, how: str, relu: bool) -> None:
    with pytest.raises(ValueError, match=f"map_normalisation {how} with map_relu {str(relu).lower()}: heatmaps must"):
        build(name, map_normalisation=how, map_relu=relu)


@pytest.mark.parametrize(("how", "relu"), [("minmax", False), ("minmax_live", True), ("max", True), ("l1", True)])
def test_every_other_scale_trains(how: str, relu: bool) -> None:
    model = build(warmup_steps=0, map_normalisation=how, map_relu=relu)
    assert all(math.isfinite(value) for value in model.update(step_data()).values())


def test_it_can_be_had_from_the_file_that_readers_come_for() -> None:
    from domainbed import algorithms_ex2l

    assert all(getattr(algorithms_ex2l, name) is REGISTRY[name] for name in ROWS)

import numpy as np
import pytest
import torch
from torch import nn

from domainbed import algorithms, hparams_registry, networks, partitions, snapshots, state_trees
from domainbed.algorithms.base import Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.loaders import Minibatch, TrainingLoader, group_counts
from domainbed.samples import Sample, StageData
from domainbed.splits import Split, annotate
from domainbed.stages import ends

NAMES = ["CRT", "ReWeightCRT"]
COUNTS = (20, 4, 0, 9, 12, 1), (3, 0, 5)  # of the six groups, and of the labels' images that are not annotated
NOTHING = StageData(Sample([], 2), Sample([], 2))


@pytest.fixture
def make():
    """``make(name, **overrides)``: the algorithm for vectors (5,), three classes, two confounder values; float64."""

    def make(name: str, counts=COUNTS, **overrides):
        network = {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0.0, "lr": 0.01, "weight_decay": 0.1}
        hparams = hparams_registry.default_hparams(name, "Debug28") | network | overrides
        torch.manual_seed(0)
        task = Task((5,), 3, 3, 2, group_counts=counts[0], hidden_counts=counts[1])
        return algorithms.get_algorithm_class(name).from_task(task, hparams).double()

    return make


@pytest.fixture
def features() -> list[Minibatch]:
    """Two minibatches of 7 and 6 features (4,), whose images are of all groups, some of them not annotated."""
    generator, made = torch.Generator().manual_seed(2), []
    for n in (7, 6):
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        y, c = torch.randint(0, 3, (n,), generator=generator), torch.randint(-1, 2, (n,), generator=generator)
        made.append(Minibatch(x, y, c=c, g=torch.where(c < 0, -1, 2 * y + c)))
    return made


@pytest.fixture
def narrow(make):
    """``narrow(name)``: whose featurizer gives 4 features, as ``features`` has them."""

    def narrow(name: str, **overrides):
        algorithm = make(name, **overrides)
        generator = torch.Generator().manual_seed(5)
        algorithm.featurizer = networks.MLP(5, 4, algorithm.hparams).double()
        algorithm.classifier = nn.Linear(4, 3).double()
        for parameter in (*algorithm.featurizer.parameters(), *algorithm.classifier.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        algorithm.network = nn.Sequential(algorithm.featurizer, algorithm.classifier)
        algorithm.optimizer = algorithm.new_optimizer()
        return algorithm

    return narrow


def begin(algorithm, data: StageData = NOTHING):
    """As the training loop begins a stage."""
    with torch.no_grad(), evaluating(algorithm):
        return algorithm.begin_stage("classifier", data)


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_stage_is_erm_on_the_natural_mix(make, build, minibatches, name):
    crt, erm = make(name), build("ERM")
    assert [crt.update(minibatches) for _ in range(3)] == [erm.update(minibatches) for _ in range(3)]
    assert_equal(crt.state_dict(), erm.state_dict())
    first, second = crt.STAGES
    assert (first.partition, first.of_features) == ("random", False)
    assert (second.partition, second.of_features) == (None, True)
    assert ends(crt.STAGES, 100, crt.hparams) == [50, 100]


def test_the_second_stage_is_logistic_regression_on_features(narrow, slow_mlp, slow_adam, cross_entropy, features):
    crt = narrow("CRT")
    assert begin(crt) is None
    slow = slow_mlp(crt.classifier)
    adam = slow_adam(slow.weights, 0.01, 0.1)
    x, y = (torch.cat(column) for column in zip(*features, strict=True))
    for _ in range(3):
        loss = cross_entropy(slow(x), y)
        adam.descend(loss)
        assert crt.update(features) == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_weights_balance_groups(narrow, slow_mlp, slow_adam, cross_entropy, features, power):
    crt = narrow("ReWeightCRT", reweight_power=power)
    begin(crt)
    slow = slow_mlp(crt.classifier)
    adam = slow_adam(slow.weights, 0.01, 0.1)
    sizes = {(y, c): COUNTS[0][2 * y + c] if c >= 0 else COUNTS[1][y] for y in range(3) for c in (-1, 0, 1)}
    raw = {group: n**-power for group, n in sizes.items() if n}
    weights = {group: value / (sum(raw.values()) / len(raw)) for group, value in raw.items()}
    shown = [(x, int(y), int(c)) for m in features for x, y, c in zip(*m, m.c, strict=True)]
    assert len({weights.get((y, c), 0) for _, y, c in shown}) > 3
    for _ in range(3):
        losses = [weights.get((y, c), 0) * cross_entropy(slow(x[None]), torch.tensor([y])) for x, y, c in shown]
        loss = sum(losses) / len(losses)
        adam.descend(loss)
        assert crt.update(features) == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


def test_without_weights_it_retrains_on_the_natural_mix(narrow, features):
    counts = (20, 4, 3, 9, 12, 1), (3, 2, 5)
    off = narrow("ReWeightCRT", counts=counts, reweight_power=0.0)
    on, crt = narrow("ReWeightCRT", counts=counts), narrow("CRT")
    for algorithm in (off, on, crt):
        torch.manual_seed(1)
        begin(algorithm)
    losses = [[algorithm.update(features)["loss"] for _ in range(3)] for algorithm in (off, on, crt)]
    assert losses[0] == pytest.approx(losses[2])
    assert losses[1] != pytest.approx(losses[2])


def test_without_annotation_weights_balance_classes(narrow, features):
    crt = narrow("ReWeightCRT", counts=((0,) * 6, (10, 40, 2)))
    for minibatch in features:
        minibatch.c[:], minibatch.g[:] = -1, -1
    begin(crt)
    raw = [1 / 10, 1 / 40, 1 / 2]
    assert crt.weights[:, -1].tolist() == pytest.approx([3 * value / sum(raw) for value in raw])
    assert crt.weights[:, :-1].abs().sum() == 0
    assert crt.update(features)["loss"] > 0


def test_weights_need_the_groups_sizes_and_confounders(make, narrow, minibatches):
    with pytest.raises(ValueError, match="ReWeightCRT needs the number of training images of each group"):
        make("ReWeightCRT", counts=((), ()))
    with pytest.raises(ValueError, match="hparam reweight_power is -1"):
        make("ReWeightCRT", reweight_power=-1.0)
    crt = narrow("ReWeightCRT")
    begin(crt)
    with pytest.raises(ValueError, match="without confounder labels"):
        crt.update([(x[:, :4], y) for x, y in minibatches])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_nonlinear", [False, True])
def test_the_classifier_begins_like_a_new_one_and_the_features_stay(make, minibatches, name, is_nonlinear):
    crt = make(name, nonlinear_classifier=is_nonlinear)
    for _ in range(3):
        crt.update(minibatches)
    featurizer, classifier = copies(crt.featurizer), copies(crt.classifier)
    torch.manual_seed(9)
    begin(crt)
    torch.manual_seed(9)
    fresh = networks.Classifier(crt.featurizer.n_outputs, 3, is_nonlinear).double()
    assert_equal(crt.classifier.state_dict(), fresh.state_dict())
    assert_equal(crt.featurizer.state_dict(), featurizer)
    assert classifier.keys() == crt.classifier.state_dict().keys()
    trained = {id(parameter) for group in crt.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in crt.classifier.parameters()}
    assert not crt.optimizer.state  # an optimizer without a past
    assert all(parameter.grad is None for parameter in crt.parameters())


class Normed(nn.Module):
    """Vectors (B, 5) -> (B, 4), by batch norm and dropout."""

    n_outputs = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def environments(budget: float = 1.0) -> list[Split]:
    generator, splits = torch.Generator().manual_seed(3), []
    for e, n in enumerate((70, 50)):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        y, c = (torch.randint(0, k, (n,), generator=generator) for k in (3, 2))
        keys = torch.randperm(n, generator=generator)[: n - 10].numpy()
        splits.append(Split(e, "in", InMemoryEnvironment(x, y, c), keys, e))
    return annotate(splits, budget)


def second_stage(algorithm, splits: list[Split], partition: str) -> TrainingLoader:
    """The minibatches of the stage, as the training loop draws them."""
    sample = Sample(splits, 2)
    assert begin(algorithm, StageData(sample, Sample([], 2))) is None
    with torch.no_grad(), evaluating(algorithm):
        features = sample.map(algorithm.stage_features)
    return TrainingLoader(sample.replaced(features), partitions.REGISTRY[partition], 12, 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.0, 0.05, 0.2, 1.0])
def test_both_stages_on_images_with_batch_norm(name, budget, monkeypatch):
    """At every budget; batch norm's statistics stay, and predict is the classifier on the features of images."""
    monkeypatch.setattr(networks, "Featurizer", lambda shape, hparams: Normed())
    splits, cls = environments(budget), algorithms.get_algorithm_class(name)
    loader = TrainingLoader(splits, partitions.REGISTRY["random"], 12, 2)
    hidden = np.bincount(loader.examples.y[loader.examples.c < 0], minlength=3)
    hparams = hparams_registry.default_hparams(name, "Debug28") | {"lr": 0.05}
    counts = group_counts(splits, 3, 2), tuple(hidden.tolist())
    crt = cls.from_task(Task((5,), 3, 1, 2, group_counts=counts[0], hidden_counts=counts[1]), hparams).double()
    batches = iter(loader)
    for _ in range(3):
        crt.update(next(batches))
    before = copies(crt.featurizer)
    batches = iter(second_stage(crt, splits, cls.PARTITION))
    losses = [crt.update(next(batches))["loss"] for _ in range(60)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert_equal(crt.featurizer.state_dict(), before)
    assert before["layers.1.num_batches_tracked"] == 3
    x, _ = splits[0].environment[torch.arange(9)]
    with evaluating(crt):
        assert torch.equal(crt.predict(x), crt.classifier(crt.featurizer(x)))
        alone = torch.cat([crt.predict(row[None]) for row in x])
        torch.testing.assert_close(crt.predict(x), alone)


@pytest.mark.parametrize("name", NAMES)
def test_heatmaps_are_of_images_in_the_second_stage_too(name):
    hparams = hparams_registry.default_hparams(name, "Debug28") | {"backbone": "small_cnn"}
    task = Task((3, 28, 28), 2, 1, 2, group_counts=(3, 3, 3, 3), hidden_counts=(0, 0))
    crt = algorithms.get_algorithm_class(name).from_task(task, hparams)
    begin(crt)
    features = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    c = torch.tensor([0, 0, 1, 1, 0, 1])
    crt.update([Minibatch(features, torch.arange(6) % 2, c=c)])
    explainer = Explainer(crt)
    explainer.check((3, 28, 28))
    x = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with evaluating(crt):
        logits, heatmaps = explainer.heatmaps(x)
        assert torch.equal(logits, crt.predict(x))
    assert heatmaps.shape == (4, 7, 7)
    assert all(parameter.grad is None for parameter in crt.featurizer.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_snapshot_of_either_stage_goes_on_in_a_fresh_instance(narrow, minibatches, features, tmp_path, name, begun):
    whole, fresh = narrow(name), narrow(name)
    whole.update(minibatches)
    if begun:
        begin(whole)
        whole.update(features)
    fresh.update(minibatches)
    torch.save([state_trees.capture(whole), snapshots.random_states()], tmp_path / "file")

    def rest(algorithm) -> list:
        found = [] if begun else [algorithm.update(minibatches), begin(algorithm)]
        return [*found, *(algorithm.update(features) for _ in range(2))]

    expected = rest(whole)
    tree, states = torch.load(tmp_path / "file", weights_only=True)
    state_trees.restore(tree, fresh)
    snapshots.set_random_states(states)
    assert rest(fresh) == expected
    assert_equal(fresh.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_second_stage_loads_into_a_fresh_instance(narrow, minibatches, features, name):
    crt, fresh = narrow(name), narrow(name)
    begin(crt)
    crt.update(features)
    fresh.load_state_dict(crt.state_dict())
    x, _ = minibatches[0]
    assert torch.equal(fresh.predict(x), crt.predict(x))


def test_drawn_by_group_each_group_has_the_same_weight(narrow):
    crt, splits = narrow("CRT"), environments()
    minibatches = next(iter(second_stage(crt, splits, crt.PARTITION)))
    assert len(minibatches) == 6
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    with torch.no_grad():
        rows = nn.functional.cross_entropy(crt.classifier(x), y, reduction="none")
    by_group = [rows[torch.cat([m.g for m in minibatches]) == g].mean().item() for g in range(6)]
    assert crt.update(minibatches)["loss"] == pytest.approx(np.mean(by_group))

import logging

import numpy as np
import pytest
import torch

from domainbed import algorithms, hparams_registry, snapshots, state_trees
from domainbed.algorithms.base import Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.feature_maps import evaluating
from domainbed.samples import Sample, StageData
from domainbed.splits import Split, annotate
from domainbed.stages import ends


def sample(budget: float = 1.0, num_confounders: int = 2) -> Sample:
    """100 vectors (5,) of three classes in two environments, of which only some are trained on."""
    generator, splits = torch.Generator().manual_seed(3), []
    for e, n in enumerate((70, 50)):
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        y, c = (torch.randint(0, k, (n,), generator=generator) for k in (3, num_confounders))
        keys = torch.randperm(n, generator=generator)[: n - 10].numpy()
        splits.append(Split(e, "in", InMemoryEnvironment(x, y, c), keys, e))
    return Sample(annotate(splits, budget), num_confounders)


@pytest.fixture
def data() -> StageData:
    return StageData(sample(), Sample([], 2))


def begin(algorithm, data: StageData):
    """As the training loop begins a stage."""
    with torch.no_grad(), evaluating(algorithm):
        return algorithm.begin_stage("retraining", data)


def images(data: StageData) -> tuple[torch.Tensor, torch.Tensor]:
    """All training images and labels, one by one, in order."""
    pairs = [split.environment[int(key)] for split in data.training.splits for key in split.keys]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def train(algorithm, minibatches, n: int) -> list[dict[str, float]]:
    return [algorithm.update(minibatches) for _ in range(n)]


def fit(algorithm, x: torch.Tensor, y: torch.Tensor) -> None:
    """Makes an algorithm predict the labels by heart, whatever its weights: the classifier's logits are y's."""
    table = {tuple(row.tolist()): int(label) for row, label in zip(x, y, strict=True)}
    algorithm.predict = lambda rows: torch.nn.functional.one_hot(
        torch.tensor([table[tuple(row.tolist())] for row in rows]), 3
    ).double()


def test_the_first_stage_is_erm(build, minibatches):
    jtt, erm = build("JTT", weight_decay=0.1), build("ERM", weight_decay=0.1)
    assert train(jtt, minibatches, 3) == train(erm, minibatches, 3)
    assert all(torch.equal(*pair) for pair in zip(jtt.parameters(), erm.parameters(), strict=True))


@pytest.mark.parametrize("upweight", [20, 2.5])
def test_images_that_are_predicted_wrong_have_larger_odds(build, minibatches, slow_network, data, upweight):
    jtt = build("JTT", jtt_upweight=upweight)
    train(jtt, minibatches, 5)
    slow = slow_network(jtt)
    expected = []
    for x, y in zip(*images(data), strict=True):
        logits = slow.logits(x[None])[0].tolist()
        expected.append(1.0 if logits.index(max(logits)) == int(y) else 1.0 + upweight)
    assert 10 < sum(odds > 1 for odds in expected) < 90
    odds = begin(jtt, data)
    assert odds.dtype == np.float64
    assert odds.tolist() == expected


def test_the_second_stage_begins_like_a_new_erm(build, minibatches, data):
    jtt = build("JTT", weight_decay=0.1)
    featurizer, first = jtt.featurizer, [p.detach().clone() for p in jtt.parameters()]
    train(jtt, minibatches, 4)
    torch.manual_seed(7)
    begin(jtt, data)
    torch.manual_seed(7)
    hparams = hparams_registry.default_hparams("ERM", "Debug28") | jtt.hparams
    erm = algorithms.get_algorithm_class("ERM")((5,), 3, 3, hparams).double()
    assert all(torch.equal(*pair) for pair in zip(jtt.parameters(), erm.parameters(), strict=True))
    assert not torch.equal(next(jtt.parameters()), first[0])
    assert jtt.featurizer is featurizer
    assert jtt.network[0] is featurizer  # what others hold is not replaced
    for _ in range(3):  # the optimizer has no past either
        step = jtt.update(minibatches)
        assert step.pop("error_share") > 0
        assert step == erm.update(minibatches)
        assert all(torch.equal(*pair) for pair in zip(jtt.parameters(), erm.parameters(), strict=True))


def test_a_pretrained_backbone_begins_with_its_weights_again(tmp_path, data):
    hparams = hparams_registry.default_hparams("JTT", "Debug28") | {"backbone": "small_cnn"}
    task = Task((3, 28, 28), 3, 1)
    given = algorithms.get_algorithm_class("ERM").from_task(task, hparams).featurizer.state_dict()
    torch.save(given, tmp_path / "weights.pt")
    jtt = algorithms.get_algorithm_class("JTT").from_task(task, hparams | {"weights": str(tmp_path / "weights.pt")})
    head = jtt.classifier.weight.detach().clone()
    x = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3
    train(jtt, [(x, y)], 2)
    environment = InMemoryEnvironment(x, y, torch.zeros(6))
    begin(jtt, StageData(Sample([Split(0, "in", environment, np.arange(6), 0)], 1), Sample([], 1)))
    assert all(torch.equal(jtt.featurizer.state_dict()[name], value) for name, value in given.items())
    assert not torch.equal(jtt.classifier.weight, head)


def test_the_second_stage_says_how_large_the_error_set_is(build, minibatches, data):
    jtt = build("JTT")
    assert "error_share" not in jtt.update(minibatches)
    odds = begin(jtt, data)
    assert jtt.update(minibatches)["error_share"] == (odds > 1).mean()


def test_an_empty_error_set_is_a_warning_and_plain_erm(build, minibatches, data, caplog):
    jtt = build("JTT", weight_decay=0.25, jtt_first_share=0.4)
    fit(jtt, *images(data))
    with caplog.at_level(logging.INFO):
        assert begin(jtt, data) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "JTT: the first stage gets 0 of 100 training images wrong, so that the second stage is plain ERM; shorten the "
        "first one (hparam jtt_first_share, 0.4) or take a larger weight_decay (0.25)"
    )
    del jtt.predict
    assert jtt.update(minibatches)["error_share"] == 0


@pytest.mark.parametrize("budget", [1.0, 0.3, 0.0])
def test_the_groups_of_the_error_set_are_told(build, caplog, budget):
    data = StageData(sample(budget), Sample([], 2))
    examples = data.training.examples
    x, y = images(data)
    predicted = torch.where(torch.arange(len(y)) % 3 == 0, (y + 1) % 3, y)  # every third one is wrong
    predicted[y == 2] = 2
    jtt = build("JTT")
    fit(jtt, x, predicted)
    with caplog.at_level(logging.INFO):
        odds = begin(jtt, data)
    wrong = (predicted != y).numpy()
    assert np.array_equal(odds > 1, wrong)
    head, *lines = caplog.records[0].getMessage().split("\n  ")
    assert caplog.records[0].levelname == "INFO"
    assert head == f"JTT: the first stage gets {wrong.sum()} of 100 training images wrong"
    names = ["confounder not annotated", *(f"label {y}, confounder {c}" for y in range(3) for c in range(2))]
    expected = []
    for name, g in zip(names, range(-1, 6), strict=True):
        here = examples.g == g
        if wrong[here].any():
            expected.append(f"{name}: {wrong[here].sum()} of {here.sum()}")
    assert lines == expected
    assert ("label 0, confounder 0" in str(lines)) == (budget > 0)
    assert ("not annotated" in str(lines)) == (budget < 1)


def test_without_a_confounder_no_groups_are_told(build, caplog):
    data = StageData(sample(num_confounders=1), Sample([], 1))
    with caplog.at_level(logging.INFO):
        begin(build("JTT"), data)
    assert "\n" not in caplog.records[0].getMessage()


def test_upweight_zero_draws_all_alike(build, data):
    assert begin(build("JTT", jtt_upweight=0.0), data) is None
    assert begin(build("JTT", jtt_upweight=1.0), data).max() == 2


@pytest.mark.parametrize("upweight", [-1.0, float("inf"), float("nan")])
def test_odds_that_are_none(build, upweight):
    with pytest.raises(ValueError, match=r"hparam jtt_upweight is .*: say how many times more"):
        build("JTT", jtt_upweight=upweight)


def test_the_first_stage_has_its_share():
    jtt = algorithms.get_algorithm_class("JTT")
    assert ends(jtt.STAGES, 100, {"jtt_first_share": 0.2}) == [20, 100]
    assert {stage.partition for stage in jtt.STAGES} == {None}


@pytest.mark.parametrize("begun", [False, True])
def test_a_snapshot_of_either_stage_goes_on_in_a_fresh_instance(build, minibatches, data, tmp_path, begun):
    whole, fresh = build("JTT"), build("JTT")
    train(whole, minibatches, 2)
    if begun:
        begin(whole, data)
        train(whole, minibatches, 2)
    torch.save([state_trees.capture(whole), snapshots.random_states()], tmp_path / "file")

    def rest(algorithm) -> list:
        found = train(algorithm, minibatches, 2)
        odds = None if begun else begin(algorithm, data).tolist()
        return [found, odds, train(algorithm, minibatches, 2)]

    expected = rest(whole)
    tree, states = torch.load(tmp_path / "file", weights_only=True)
    state_trees.restore(tree, fresh)
    snapshots.set_random_states(states)
    assert rest(fresh) == expected
    assert all(torch.equal(*pair) for pair in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_a_model_of_the_second_stage_loads_into_a_fresh_instance(build, minibatches, data):
    jtt, fresh = build("JTT"), build("JTT")
    begin(jtt, data)
    train(jtt, minibatches, 2)
    fresh.load_state_dict(jtt.state_dict())
    x, _ = images(data)
    assert torch.equal(fresh.predict(x), jtt.predict(x))

import copy

import numpy as np
import pytest
import torch

from domainbed import algorithms, hparams_registry, snapshots, stages, state_trees
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.logistic_regression import averaged, tuned_c
from domainbed.samples import Sample, StageData
from domainbed.splits import Split

NAMES = ["DFR", "DFR_Training"]
WIDE = {"mlp_width": 64, "dfr_averages": 5}  # random features that keep what the vectors tell
UNFITTED = {"dfr_c": 0.0, "dfr_images_per_group": 0, "dfr_groups": 0}


def split(n=60, num_classes=3, seed=0, c=None, annotated=None, y=None):
    """Vectors (5,) that tell their label and, louder, one of two confounder values."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, num_classes, n) if y is None else np.array(y)
    c = rng.integers(0, 2, len(y)) if c is None else np.array(c)
    x = rng.normal(size=(len(y), 5)) + 2 * np.eye(5)[y] + 4 * np.eye(5)[4 - c]
    environment = InMemoryEnvironment(torch.tensor(x), torch.tensor(y), torch.tensor(c))
    return Split(0, "in", environment, np.arange(len(y)), 0, annotated)


def stage_data(validation, training=None):
    training = split(90, seed=1) if training is None else training
    return StageData(Sample([training], 2), Sample([] if validation is None else [validation], 2))


def learn(algorithm, data, seed=0):
    """Begins the last stage as the training loop does."""
    algorithm.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        assert algorithm.begin_stage("last layer", data) is None
    return algorithm


def slow_logits(algorithm, x, y, groups, fits, c, seed=0):
    """The mean of the fitted models' logits on standardised features, from the features before the stage."""
    with torch.no_grad():
        z = algorithm.featurizer(x).double().numpy()
    z = (z - z.mean(0)) / z.std(0)
    torch.manual_seed(seed)
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    used = groups >= 0
    c = c or tuned_c(z[used], y[used], groups[used], 3, rng)
    return averaged(z[used], y[used], groups[used], 3, c, fits, rng).logits(z), c


@pytest.mark.parametrize("c", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_last_layer_has_the_mean_logits_of_fits_to_the_methods_own_images(build, name, c):
    validation, training = split(), split(90, seed=1)
    own = {"DFR": validation, "DFR_Training": training}[name]
    dfr = build(name, dfr_averages=3, dfr_c=c).eval()
    x, groups = own.environment.tensors[0], own.y * 2 + own.c
    expected, chosen = slow_logits(dfr, x, own.y, groups, 3, c)
    features = copy.deepcopy(dfr.featurizer.state_dict())
    learn(dfr, stage_data(validation, training))
    with torch.no_grad():
        assert dfr.predict(x).numpy() == pytest.approx(expected)
    assert dfr.found["dfr_c"] == chosen
    assert dfr.found["dfr_groups"] == 6
    assert dfr.found["dfr_images_per_group"] == np.bincount(groups).min()
    assert all(torch.equal(*pair) for pair in zip(features.values(), dfr.featurizer.state_dict().values(), strict=True))


def test_groups_of_equal_say_undo_a_spurious_majority(build):
    y = np.arange(240) % 3
    c = np.where(np.arange(240) < 216, y == 0, y != 0).astype(int)
    validation = split(y=y, c=c)
    dfr = learn(build("DFR", **WIDE), stage_data(validation))
    by_label = learn(build("DFR", **WIDE), stage_data(split(y=y, c=c, annotated=np.zeros(240, bool))))
    test = split(600, seed=7)
    x, groups = test.environment.tensors[0], test.y * 2 + test.c

    def worst(algorithm):
        right = algorithm.predict(x).argmax(1).numpy() == test.y
        return min(right[groups == g].mean() for g in range(6))

    assert worst(dfr) > worst(by_label) + 0.1
    assert (dfr.found["dfr_groups"], by_label.found["dfr_groups"]) == (6, 3)


@pytest.mark.parametrize("name", NAMES)
def test_before_the_last_stage_it_is_erm_and_after_it_trains_nothing(build, minibatches, name):
    dfr, erm = build(name, dfr_averages=2), build("ERM")
    assert dfr.update(minibatches) == erm.update(minibatches)
    assert state_trees.equal(*(state_trees.capture(a.network) for a in (dfr, erm)))
    learn(dfr, stage_data(split())).train()
    learned = copy.deepcopy(dfr.state_dict())
    assert not torch.equal(learned["classifier.weight"], erm.classifier.weight)
    assert dfr.update(minibatches) == dfr.update(minibatches) == dfr.found
    assert dfr.found.keys() == UNFITTED.keys()
    assert all(torch.equal(learned[key], value) for key, value in dfr.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_its_control_keeps_erms_last_layer(build, minibatches, name):
    cls = algorithms.get_algorithm_class(name)
    control, erm = build(name, **cls.CONTROL), build("ERM")
    control.update(minibatches), erm.update(minibatches)
    learn(control, stage_data(None))
    assert control.update(minibatches) == UNFITTED
    assert all(torch.equal(*pair) for pair in zip(control.parameters(), erm.parameters(), strict=True))


def test_stages_leave_one_update_to_the_last_layer():
    dfr = algorithms.get_algorithm_class("DFR")
    assert stages.ends(dfr.STAGES, 300, {}) == [299, 300]
    assert stages.ends(dfr.STAGES, 2, {}) == [1, 2]


def test_images_that_are_not_annotated_only_standardise(build):
    annotated = np.arange(60) % 2 == 0
    validation = split(annotated=annotated)
    dfr = build("DFR", dfr_averages=2).eval()
    groups = np.where(annotated, validation.y * 2 + validation.environment.c, -1)
    x = validation.environment.tensors[0]
    expected, _ = slow_logits(dfr, x, validation.y, groups, 2, 0.0)
    learn(dfr, stage_data(validation))
    assert dfr.predict(x).detach().numpy() == pytest.approx(expected)


@pytest.mark.parametrize(("annotated_labels", "groups"), [([], 3), ([1], 4), ([0, 2], 5)])
def test_a_label_without_annotations_is_one_group(build, caplog, annotated_labels, groups):
    validation = split()
    validation = split(annotated=np.isin(validation.y, annotated_labels))
    dfr = learn(build("DFR", **WIDE), stage_data(validation))
    assert dfr.found["dfr_groups"] == groups
    lacking = ", ".join(str(y) for y in range(3) if y not in annotated_labels)
    assert f"no confounder is annotated in the images of label {lacking};" in caplog.text
    assert set(dfr.predict(split(200, seed=3).environment.tensors[0]).argmax(1).tolist()) == {0, 1, 2}


def test_a_group_of_one_image_is_learned_from_untuned(build, caplog):
    y, c = [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 0, 0, 0, 0, 1, 1, 1]
    dfr = learn(build("DFR", dfr_averages=2), stage_data(split(y=y, c=c)))
    assert dfr.found == {"dfr_c": 1.0, "dfr_images_per_group": 1, "dfr_groups": 4}
    assert "1 of 4 groups have a single image" in caplog.text


def test_without_validation_images_only_the_training_variant_learns(build):
    with pytest.raises(ValueError, match="there are none; give --holdout_fraction above 0, or take DFR_Training"):
        learn(build("DFR"), stage_data(None))
    assert learn(build("DFR_Training", dfr_averages=1), stage_data(None)).found["dfr_groups"] == 6


@pytest.mark.parametrize("y", [[0, 0, 1, 1], [2, 2, 2, 2]])
def test_a_label_without_images_is_an_error(build, y):
    with pytest.raises(ValueError, match="none of the 4 images to learn from has label"):
        build("DFR").check_stages(stage_data(split(y=y, c=[0, 1, 0, 1])))
    build("DFR", dfr_averages=0).check_stages(stage_data(split(y=y, c=[0, 1, 0, 1])))


def test_features_that_are_not_finite_are_an_error(build):
    dfr = build("DFR")
    dfr.featurizer.output.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"features are not finite.*smaller lr"):
        learn(dfr, stage_data(split()))


@pytest.mark.parametrize(
    ("hparam", "value", "message"),
    [
        ("nonlinear_classifier", True, "nonlinear_classifier is true; DFR fits a linear last layer"),
        ("dfr_averages", -1, "dfr_averages is -1; give a number of fits"),
        ("dfr_averages", 2.5, r"dfr_averages is 2\.5; give"),
        ("dfr_c", -0.1, r"dfr_c is -0\.1; give a weight above 0, or 0"),
    ],
)
def test_bad_hparams_are_an_error(build, hparam, value, message):
    with pytest.raises(ValueError, match=message):
        build("DFR", **{hparam: value})


def test_the_two_variants_average_as_many_fits_as_their_source():
    fits = [hparams_registry.default_hparams(name, "Debug28")["dfr_averages"] for name in NAMES]
    assert fits == [20, 10]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_features_of_any_precision_are_fitted(build, precision):
    validation = split()
    dfr = build("DFR", **WIDE).float().eval()
    x, y, c = (torch.tensor(a) for a in (validation.environment.tensors[0].numpy(), validation.y, validation.c))
    data = stage_data(Split(0, "in", InMemoryEnvironment(x.float(), y, c), np.arange(60), 0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        learn(dfr, data)
        logits = dfr.predict(x.float())
    assert dfr.classifier.weight.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (logits.argmax(1).numpy() == validation.y).mean() > 0.5


def test_draws_depend_on_torchs_generator(build):
    one, same, other = (learn(build("DFR", dfr_averages=2), stage_data(split()), seed) for seed in (0, 0, 1))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_a_snapshot_within_the_last_stage_goes_on_in_a_fresh_instance(build, minibatches, tmp_path):
    whole = build("DFR", dfr_averages=2)
    whole.update(minibatches)
    learn(whole, stage_data(split()))
    torch.save([state_trees.capture(whole), snapshots.random_states()], tmp_path / "file")
    tree, _ = torch.load(tmp_path / "file", weights_only=True)
    fresh = build("DFR", dfr_averages=2)
    fresh.update(minibatches[:1])
    state_trees.restore(tree, fresh)
    assert fresh.update(minibatches) == whole.update(minibatches) == whole.found
    assert state_trees.equal(state_trees.capture(fresh), state_trees.capture(whole))


def test_a_model_file_loads_into_a_fresh_instance(build):
    dfr, fresh = learn(build("DFR", dfr_averages=2), stage_data(split())), build("DFR")
    assert dfr.state_dict().keys() == build("ERM").state_dict().keys()
    fresh.load_state_dict(dfr.state_dict())
    x = split(7, seed=5).environment.tensors[0]
    assert torch.equal(fresh.eval().predict(x), dfr.predict(x))


def test_a_feature_that_never_varies_is_left_as_it_is(build):
    dfr = build("DFR", dfr_averages=2)
    with torch.no_grad():
        dfr.featurizer.output.weight[0], dfr.featurizer.output.bias[0] = 0.0, 5.0
    learn(dfr, stage_data(split()))
    assert torch.isfinite(dfr.classifier.weight).all()
    assert not dfr.classifier.weight[:, 0].any()

from collections import Counter

import numpy as np
import pytest
import torch

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY
from domainbed.algorithms.lisa import boxes, partners
from domainbed.loaders import Minibatch


@pytest.fixture
def annotated(minibatches):
    """The minibatches with confounders 0 and 1, and -1 for what is not annotated."""
    generator = torch.Generator().manual_seed(3)
    return [Minibatch(x, y, c=torch.randint(-1, 2, (len(y),), generator=generator)) for x, y in minibatches]


def slow_step(p_sel, alpha, y, c):
    """Partner and share of each row, from numpy's generator as it stands."""
    within_label = np.random.random() < p_sel
    draws, mixtures = np.random.random(len(y)), []
    for i in range(len(y)):
        rows = [j for j in range(len(y)) if (y[j] == y[i]) == within_label and (c[j] == c[i]) != within_label]
        mixtures.append(rows[int(draws[i] * len(rows))] if rows else None)
    return mixtures, np.random.beta(alpha, alpha, size=len(y))


@pytest.mark.parametrize("p_sel", [0.0, 0.5, 1.0])
def test_updates_equal_written_out_training(build, annotated, slow_network, cross_entropy, p_sel):
    lisa = build("LISA", lisa_p_sel=p_sel)
    slow = slow_network(lisa)
    x, y, c = (
        torch.cat([m[0] for m in annotated]),
        torch.cat([m[1] for m in annotated]),
        torch.cat([m.c for m in annotated]),
    )
    for seed in range(3):
        np.random.seed(seed)
        step = lisa.update(annotated)
        np.random.seed(seed)
        mixtures, shares = slow_step(p_sel, 2.0, y.tolist(), c.tolist())
        loss = 0.0
        for i, (j, share) in enumerate(zip(mixtures, shares, strict=True)):
            j, share = (i, 1.0) if j is None else (j, share)
            logits = slow.logits((share * x[i] + (1 - share) * x[j])[None])
            for label, weight in ((y[i], share), (y[j], 1 - share)):
                loss = loss + weight * cross_entropy(logits, label[None]) / len(y)
        slow.adam.descend(loss)
        assert step == {
            "loss": pytest.approx(loss.item(), rel=1e-9),
            "mixed": pytest.approx(sum(j is not None for j in mixtures) / len(y)),
        }
        slow.assert_equal()


def test_partners_are_uniform_among_the_eligible():
    np.random.seed(0)
    eligible = torch.tensor([[False, True, False, True, True], [False] * 5, [False, False, True, False, False]])
    eligible = torch.cat([eligible, torch.zeros(2, 5, dtype=torch.bool)])
    seen = [partners(eligible) for _ in range(3000)]
    counts = Counter(columns[0].item() for columns, _ in seen)
    assert counts.keys() == {1, 3, 4}
    assert all(abs(count - 1000) < 4 * 26 for count in counts.values())  # 4 standard deviations
    assert all(columns[1:].tolist() == [1, 2, 3, 4] for columns, _ in seen)
    assert all(found.tolist() == [True, False, True, False, False] for _, found in seen)


def test_the_last_eligible_row_is_drawn_and_never_one_beyond(monkeypatch):
    monkeypatch.setattr(np.random, "random", lambda n: np.full(n, np.nextafter(1.0, 0.0)))
    columns, _ = partners(torch.tensor([[True, True, False]] * 3))
    assert columns.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("p_sel", "c", "share"),
    [
        (1.0, [-1, -1, -1, -1], 0.0),  # no annotations: no other confounder within a label
        (0.0, [-1, -1, -1, -1], 1.0),  # and all labels mixed
        (1.0, [0, -1, 0, 0], 0.5),  # "not annotated" is a value of its own: rows 0 and 1, of label 0, are partners
        (0.0, [0, -1, 0, 0], 0.75),  # row 1 is alone with it
    ],
)
def test_rows_without_a_partner_stay_as_they_are(build, minibatches, p_sel, c, share):
    x, y = minibatches[0][0][:4], torch.tensor([0, 0, 1, 1])
    lisa, erm = build("LISA", lisa_p_sel=p_sel), build("ERM")
    np.random.seed(0)
    step = lisa.update([Minibatch(x, y, c=torch.tensor(c))])
    erm.update([(x, y)])
    assert step["mixed"] == share
    assert torch.allclose(lisa.predict(x), erm.predict(x)) == (share == 0)


def test_the_control_is_erm_and_the_method_is_not(build, annotated):
    erm, control, lisa = build("ERM"), build("LISA", lisa_alpha=0.0), build("LISA")
    for algorithm in (erm, control, lisa):
        algorithm.update(annotated)
    x = annotated[0][0]
    assert torch.equal(control.predict(x), erm.predict(x))
    assert not torch.allclose(lisa.predict(x), erm.predict(x))


def image_lisa(**hparams):
    settings = hparams_registry.default_hparams("LISA", "DigitsSubpop") | {"lisa_mix": "cutmix"} | hparams
    return REGISTRY["LISA"]((3, 28, 28), 2, 4, settings)


def test_cutmix_pastes_a_box_and_shares_the_labels_by_its_true_area():
    lisa, found = image_lisa(lisa_alpha=1.0), torch.arange(40) % 4 > 0
    x, x2 = torch.zeros(40, 3, 20, 30), torch.ones(40, 3, 20, 30)
    np.random.seed(1)
    images, share = lisa._mixed(x, x2, found)
    torch.testing.assert_close(share, 1 - images.mean((1, 2, 3)))
    assert (share[~found] == 1).all()
    assert (share[found] < 1).any()
    for image in images[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert torch.equal(image.bool(), rows[:, None] & columns)  # a rectangle
        assert all((side.int().diff() == 1).sum() <= 1 for side in (rows, columns))


def test_boxes_have_the_wanted_area_and_are_clipped(monkeypatch):
    monkeypatch.setattr(np.random, "random", lambda n: np.full(n, 0.5))
    inside = boxes(np.array([0.75, 1.0, 0.0]), 20, 30)
    assert inside.sum((1, 2)).tolist() == [150, 0, 600]
    assert inside[0, 5:15, 8:23].all() or inside[0, 5:15, 7:22].all()
    monkeypatch.setattr(np.random, "random", lambda n: np.zeros(n))
    corner = boxes(np.array([0.75]), 20, 30)[0]
    assert corner[:5].any()
    assert not corner[5:].any()
    assert corner.sum() < 150


def test_cutmix_trains_on_images():
    x = torch.rand(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    minibatch = Minibatch(x, torch.arange(8) % 2, c=torch.arange(8) // 4)
    lisa = image_lisa()
    assert np.isfinite(lisa.update([minibatch])["loss"])


def test_values_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match=r"lisa_p_sel 1\.5: give a probability, from 0 to 1"):
        build("LISA", lisa_p_sel=1.5)
    with pytest.raises(ValueError, match=r"lisa_alpha -1\.0: must not be negative"):
        build("LISA", lisa_alpha=-1.0)
    with pytest.raises(ValueError, match="lisa_mix 'cut' is unknown; take one of mixup, cutmix"):
        build("LISA", lisa_mix="cut")
    with pytest.raises(ValueError, match=r"lisa_mix cutmix needs images \(C, H, W\), got inputs \(5,\); take mixup"):
        build("LISA", lisa_mix="cutmix")


def test_minibatches_without_confounders_are_explained(build, minibatches):
    with pytest.raises(ValueError, match="without confounder labels"):
        build("LISA").update(minibatches)


def test_boxes_of_cutmix_lie_anywhere():
    """Rows and columns of their centres are drawn apart."""
    np.random.seed(0)
    found = boxes(np.full(200, 0.96), 30, 30)
    top, left = (found.any(axis).int().argmax(1) for axis in (2, 1))
    assert (top == left).float().mean() < 0.2

import math

import pytest
import torch

from domainbed import hparams_registry
from domainbed.algorithms.adrmx import ADRMX
from domainbed.lib.supervised_contrast import SupConLossLambda

WIDE = {"mlp_width": 16, "beta1": 0.5}
WEIGHTS = {"cnt_lambda": 0.7, "dclf_lambda": 0.6, "disc_lambda": 0.5, "rmxd_lambda": 0.4}
PARTS = [0] * 7 + [1] * 6 + [2] * 5


class SlowADRMX:
    """The two players, written out."""

    def __init__(self, adrmx, slow_mlp, slow_adam, cross_entropy):
        names = (
            "featurizer_label",
            "featurizer_domain",
            "classifier_label_1",
            "classifier_label_2",
            "classifier_domain",
        )
        self.nets = {name: slow_mlp(getattr(adrmx, name)) for name in names}
        self.discriminator, self.cross_entropy = slow_mlp(adrmx.discriminator), cross_entropy
        self.opt = slow_adam([weight for net in self.nets.values() for weight in net.weights], 0.01, 0.0, 0.5, 0.9)
        self.disc_opt = slow_adam(self.discriminator.weights, 0.01, 0.0, 0.5, 0.9)

    def pairs(self, y):
        """One image of each class, and the first of the shuffled others from another minibatch."""
        for k in range(3):
            rows = [i for i, label in enumerate(y.tolist()) if label == k]
            rows = [rows[i] for i in torch.randperm(len(rows)).tolist()]
            others = [i for i in rows if PARTS[i] != PARTS[rows[0]]]
            yield rows[0], others[0]

    def disc_loss(self, x):
        h = self.nets["featurizer_label"](x) - self.nets["featurizer_domain"](x)
        return self.cross_entropy(self.discriminator(h), torch.tensor(PARTS))

    def losses(self, x, y):
        risk, nets, parts = self.cross_entropy, self.nets, torch.tensor(PARTS)
        f, g = nets["featurizer_label"](x), nets["featurizer_domain"](x)
        h, first, contrast = f - g, nets["classifier_label_1"], SupConLossLambda()
        return {
            "loss_disc": self.disc_loss(x),
            "loss_dmn": risk(nets["classifier_domain"](g), parts),
            "loss_clf_int": risk(first(f), y),
            "loss_clf_fin": risk(nets["classifier_label_2"](h), y),
            "loss_cnt_int": contrast(f, y, parts),
            "loss_cnt_final": contrast(h, y, parts),
            "loss_remixed": sum(risk(first(h[i] + g[j])[None], y[i, None]) for i, j in self.pairs(y)) / 3,
        }


def test_updates_equal_a_written_out_game(build, minibatches, slow_mlp, slow_adam, cross_entropy):
    adrmx = build("ADRMX", d_steps_per_g_step=2, **WIDE, **WEIGHTS)
    slow = SlowADRMX(adrmx, slow_mlp, slow_adam, cross_entropy)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for update, turn in enumerate("dgddgd"):  # all else learns where the update's number % 3 == 2
        torch.manual_seed(update)
        step = adrmx.update(minibatches)
        torch.manual_seed(update)
        losses = slow.losses(x, y) if turn == "g" else {"loss_disc": slow.disc_loss(x)}
        if turn == "d":
            slow.disc_opt.descend(losses["loss_disc"])
        else:
            total = losses["loss_clf_int"] + losses["loss_clf_fin"] + 0.6 * losses["loss_dmn"]
            total = total + 0.7 * (losses["loss_cnt_int"] + losses["loss_cnt_final"])
            total = total + 0.4 * losses["loss_remixed"] - 0.5 * losses["loss_disc"]
            slow.opt.descend(total)
            losses["loss_total"] = total
        assert step == pytest.approx({name: loss.item() for name, loss in losses.items()}, rel=1e-8)
        for name, net in slow.nets.items():
            assert net.module is getattr(adrmx, name)
            net.assert_equal()
        slow.discriminator.assert_equal()


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_changes_the_label_features(build, minibatches, name):
    results = []
    for weight in (0.0, 2.0):
        adrmx = build("ADRMX", d_steps_per_g_step=1, **WIDE, **ADRMX.CONTROL | {name: weight})
        torch.manual_seed(0)
        for _ in range(8):
            adrmx.update(minibatches)
        results.append(adrmx.featurizer_label.input.weight.detach())
    assert not torch.allclose(*results)


def test_the_control_trains_the_two_classifiers(build, minibatches, slow_mlp, slow_adam, cross_entropy):
    adrmx = build("ADRMX", d_steps_per_g_step=1, **WIDE, **ADRMX.CONTROL)
    slow = SlowADRMX(adrmx, slow_mlp, slow_adam, cross_entropy)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for update in range(1, 5):
        adrmx.update(minibatches)
        if update % 2 == 1:
            losses = slow.losses(x, y)
            zero = 0 * sum(losses.values())  # so that all weights are in the graph
            slow.opt.descend(losses["loss_clf_int"] + losses["loss_clf_fin"] + zero)
    slow.nets["featurizer_label"].assert_equal()
    slow.nets["classifier_label_1"].assert_equal()


def test_predictions_are_those_of_the_label_features(build, minibatches):
    adrmx, (x, _) = build("ADRMX"), minibatches[0]
    assert torch.equal(adrmx.predict(x), adrmx.classifier_label_1(adrmx.featurizer_label(x)))


def test_remixed_pairs_share_the_class_and_not_the_minibatch(build):
    """DomainBed takes the first rows of the step, whatever their class."""
    adrmx, seen = build("ADRMX"), []
    adrmx.classifier_label_1 = torch.nn.Linear(1, 3, dtype=torch.float64)
    for parameter in adrmx.classifier_label_1.parameters():
        torch.nn.init.zeros_(parameter)
    adrmx.classifier_label_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    rows = torch.arange(9, dtype=torch.float64)[:, None]
    y, parts = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 0, 0])
    for _ in range(20):
        loss = adrmx._remix_loss(rows, 100 * rows, y, parts)
        assert loss.item() == pytest.approx(2 * math.log(3) / 3)  # class 2 is in one minibatch only
        pairs = [(int(z) % 100, int(z) // 100) for (z,) in seen.pop()]
        assert all(y[i] == y[j] and parts[i] != parts[j] for i, j in pairs)
        assert [int(y[i]) for i, _ in pairs] == [0, 1]


@pytest.mark.parametrize("labels", ["one class", "a class per minibatch", "single rows"])
def test_degenerate_steps_stay_finite(build, minibatches, labels):
    """DomainBed fails where no class has a pair."""
    adrmx = build("ADRMX", **WIDE)
    step = {
        "one class": [(x, torch.zeros_like(y)) for x, y in minibatches],
        "a class per minibatch": [(x, torch.full_like(y, e)) for e, (x, y) in enumerate(minibatches)],
        "single rows": [(x[:1], torch.tensor([e])) for e, (x, _) in enumerate(minibatches)],
    }[labels]
    values = [adrmx.update(step) for _ in range(6)]
    assert all(math.isfinite(value) for value in [value for step in values for value in step.values()])
    assert all(torch.isfinite(parameter).all() for parameter in adrmx.parameters())
    if labels == "single rows":
        assert values[1]["loss_remixed"] == values[1]["loss_cnt_int"] == 0.0


def test_state_has_domainbeds_roots(build):
    roots = "featurizer_label featurizer_domain discriminator classifier_label_1 classifier_label_2 classifier_domain"
    found = {name.split(".")[0] for name in build("ADRMX").state_dict()}
    assert found == {"update_count", "network", *roots.split()}


def test_drawn_hparams_are_plain():
    """DomainBed draws numpy's integers, which JSON refuses."""
    drawn = hparams_registry.random_hparams("ADRMX", "PACS", 1)
    for name, kind in (("d_steps_per_g_step", int), ("mlp_width", int), ("mlp_dropout", float)):
        assert type(drawn[name]) is kind
    assert drawn["lr"] in (2e-5, 3e-5, 4e-5, 5e-5)


def test_a_negative_number_of_steps_is_refused(build):
    with pytest.raises(ValueError, match="d_steps_per_g_step is -1; take 0 or more"):
        build("ADRMX", d_steps_per_g_step=-1)

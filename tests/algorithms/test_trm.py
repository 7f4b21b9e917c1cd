from types import SimpleNamespace

import pytest
import torch

from domainbed import algorithms, snapshots, state_trees
from domainbed.algorithms.trm import _inverse_hessian_product

SOON = {"iters": 1, "cos_lambda": 0.3, "groupdro_eta": 0.4}


class SlowTRM:
    """The definition, with every derivative taken by autograd and the Hessian written out."""

    def __init__(self, trm, slow_network, slow_mlp, cross_entropy):
        self.network, self.heads = slow_network(trm), [slow_mlp(head) for head in trm.clist]
        self.alpha = (torch.ones(3, 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)) / 2
        self.cross_entropy = cross_entropy

    def slope(self, head, features, y, **kwargs):
        return torch.autograd.grad(self.cross_entropy(head(features), y), head.weights[0], **kwargs)[0]

    def fit(self, features, labels):
        for head, f, y in zip(self.heads, features, labels, strict=True):
            for _ in range(30):
                gradients = torch.autograd.grad(self.cross_entropy(head(f.detach()), y), head.weights)
                for weight, gradient in zip(head.weights, gradients, strict=True):
                    weight.data -= 0.1 * gradient

    def inverse_hessian_product(self, head, features, y, v):
        bias, shape = head.weights[1].detach(), head.weights[0].shape

        def risk(flat):
            return self.cross_entropy(features @ flat.view(shape).T + bias, y)

        hessian = torch.autograd.functional.hessian(risk, head.weights[0].detach().flatten())
        power = total = v.flatten()
        for _ in range(10):
            power = power - hessian @ power
            total = total + power
            if max(abs(total)) > 10:
                break
        return total.view(shape)

    def transfer(self, minibatches):
        features, labels = [self.network.featurizer(x) for x, _ in minibatches], [y for _, y in minibatches]
        self.fit(features, labels)
        total = 0.0
        for q, head in enumerate(self.heads):
            swapped, new = 0.0, self.alpha[q].clone()
            for i in {0, 1, 2} - {q}:
                risk = self.alpha[q, i].item() * self.cross_entropy(head(features[i]), labels[i])
                swapped = swapped + risk
                new[i] *= (0.4 * risk.detach()).exp()
            (gradient,) = torch.autograd.grad(swapped, head.weights[0], retain_graph=True)
            own = self.slope(head, features[q], labels[q], create_graph=True)
            direction = self.inverse_hessian_product(head, features[q].detach(), labels[q], gradient)
            total = total + (swapped - 0.3 * (direction * own).sum()) / 3
            self.alpha[q] = new / new.sum()
        return total


@pytest.mark.parametrize("balanced", [False, True])
def test_updates_equal_the_written_out_definition(build, minibatches, slow_network, slow_mlp, cross_entropy, balanced):
    trm = build("TRM", class_balanced=balanced, **SOON)
    slow = SlowTRM(trm, slow_network, slow_mlp, cross_entropy)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for update in range(4):
        for head in slow.heads if balanced and update else []:
            head.weights[0].data = slow.network.classifier.weights[0].data.clone()
        nll = slow.network.risk(x, y)
        transfer = slow.transfer(minibatches) if update else torch.zeros(())
        slow.network.adam.descend(nll + transfer)
        expected = {"nll": nll.item(), "trm_loss": transfer.item()}
        assert trm.update(minibatches) == pytest.approx(expected, rel=1e-8)
        slow.network.assert_equal()
        torch.testing.assert_close(trm.alpha, slow.alpha)
    for head in slow.heads:
        head.assert_equal()
    assert trm.update_count.tolist() == [4]
    torch.testing.assert_close(trm.predict(x), slow.network.logits(x))


def weights(algorithm):
    modules = (algorithm.featurizer, algorithm.classifier)
    return torch.cat([weight.detach().flatten() for module in modules for weight in module.parameters()])


def test_the_control_is_erm_and_both_terms_change_the_update(build, minibatches):
    results = []
    runs = [("ERM", {}), ("TRM", algorithms.TRM.CONTROL), ("TRM", SOON), ("TRM", SOON | {"cos_lambda": 0.0})]
    for name, hparams in runs:
        algorithm = build(name, **hparams)
        for _ in range(3):
            algorithm.update(minibatches)
        results.append(weights(algorithm))
    torch.testing.assert_close(*results[:2])
    assert not any(torch.allclose(results[i], results[j]) for i, j in ((1, 2), (1, 3), (2, 3)))


def test_the_series_inverts_the_hessian():
    """One feature, two classes with probabilities 1/2: v along (1, -1) has the eigenvalue mean(x^2) / 2."""
    features, logits = torch.full((6, 1), 1.8**0.5, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
    v = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(_inverse_hessian_product(v, logits, features), v / 0.9)


def test_a_series_that_grows_is_cut():
    """The eigenvalue is 18, so the terms grow 17-fold: 1 - 17 = -16 is beyond 10."""
    features, logits = torch.full((6, 1), 6.0, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
    v = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(_inverse_hessian_product(v, logits, features), -16 * v)


def test_alpha_leans_to_the_worst_transfer(build, minibatches):
    (x, y), *_ = minibatches
    worst = [(x, y), (x, y), (x, (y + 1) % 3)]
    trm = build("TRM", iters=0, groupdro_eta=1.0, lr=0.0)
    for _ in range(5):
        trm.update(worst)
    assert trm.alpha.diagonal().tolist() == [0, 0, 0]
    torch.testing.assert_close(trm.alpha.sum(1), torch.ones(3, dtype=torch.float64))
    assert min(trm.alpha[0, 2], trm.alpha[1, 2]) > 0.8


def test_the_heads_follow_the_module(build):
    trm = build("TRM")  # in float64
    assert {weight.dtype for head in trm.clist for weight in head.parameters()} == {torch.float64}
    trm.to(torch.float32).to("meta")
    assert {(w.dtype, w.device.type) for head in trm.clist for w in head.parameters()} == {(torch.float32, "meta")}
    assert trm.alpha.device.type == "meta"


def test_heads_and_alpha_are_not_in_the_state_but_in_snapshots(build, minibatches, tmp_path):
    trm, fresh = build("TRM", **SOON), build("TRM", **SOON)
    for _ in range(3):
        trm.update(minibatches)
    assert {name.split(".")[0] for name in trm.state_dict()} == {"update_count", "featurizer", "classifier"}
    torch.save([state_trees.capture(trm), snapshots.random_states()], tmp_path / "file")
    values = [trm.update(minibatches) for _ in range(2)]
    state_trees.restore(torch.load(tmp_path / "file", weights_only=True)[0], fresh)
    assert [fresh.update(minibatches) for _ in range(2)] == values
    assert torch.equal(weights(fresh), weights(trm))


def test_train_and_eval_take_a_mode_or_none(build):
    trm = build("TRM")
    assert (trm.eval().training, trm.train().training, trm.train(False).featurizer.training) == (False, True, False)


@pytest.mark.parametrize("rows", [[5, 1, 3], [1, 1, 1]])
def test_unequal_minibatches_of_one_class_stay_finite(build, minibatches, rows):
    trm = build("TRM", iters=0)
    few = [
        (100 * x[:n], torch.full_like(y[:n], e)) for e, ((x, y), n) in enumerate(zip(minibatches, rows, strict=True))
    ]
    for _ in range(3):
        values = trm.update(few)
    assert all(torch.tensor([*values.values()]).isfinite())
    assert weights(trm).isfinite().all()


def test_transfer_is_computed_in_full_precision_under_autocast(build, minibatches):
    trm, seen = build("TRM", iters=0).float(), SimpleNamespace(dtypes=[])
    trm.clist[0].register_forward_hook(lambda module, inputs, output: seen.dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        values = trm.update([(x.float(), y) for x, y in minibatches])
    assert set(seen.dtypes) == {torch.float32}
    assert all(torch.tensor([*values.values()]).isfinite())


def test_one_minibatch_is_refused():
    with pytest.raises(ValueError, match="TRM compares at least 2 minibatches, this partition has 1"):
        algorithms.TRM.from_task(algorithms.base.Task((5,), 3, 1), {})

import pytest
import torch

from domainbed import algorithms

ADVERSARIAL = {"lr_g": 0.02, "lr_d": 0.03, "weight_decay_g": 0.1, "weight_decay_d": 0.2, "beta1": 0.5}


def slow_disc_loss(cross_entropy, discriminator, seen, parts, labels, weight, balance):
    """Image by image: weighted cross-entropy, and the squared gradient of each image's own."""
    losses, squares = [], []
    for row, part in zip(seen, parts, strict=True):
        losses.append(cross_entropy(discriminator(row[None]), torch.tensor([part])))
        (gradient,) = torch.autograd.grad(losses[-1], row, create_graph=True)
        squares.append(sum(gradient**2))
    shares = [1 / (labels.count(k) * (max(labels) + 1)) if balance else 1 / len(labels) for k in labels]
    loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
    return loss + weight * sum(squares) / len(squares)


@pytest.mark.parametrize("name", ["DANN", "CDANN"])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_updates_equal_a_written_out_game(
    build, minibatches, slow_network, slow_mlp, slow_adam, cross_entropy, name, penalty
):
    hparams = {"lambda": 0.8, "grad_penalty": penalty, "d_steps_per_g_step": 2} | ADVERSARIAL
    dann = build(name, **hparams)
    slow, discriminator = slow_network(dann), slow_mlp(dann.discriminator)
    embeddings = dann.class_embeddings.weight.detach().clone().requires_grad_()
    conditional = name == "CDANN"
    d_weights = [*discriminator.weights, embeddings] if conditional else discriminator.weights
    d_adam = slow_adam(d_weights, 0.03, 0.2, 0.5, 0.9)
    g_adam = slow_adam(slow.adam.weights, 0.02, 0.1, 0.5, 0.9)
    x, labels = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches]).tolist()
    parts = [0] * 7 + [1] * 6 + [2] * 5

    for turn in ("d", "g", "d", "d", "g", "d"):  # updates 1, 2, ...: the featurizer's where update % 3 == 2
        step = dann.update(minibatches)
        seen = slow.featurizer(x) + (embeddings[labels] if conditional else 0)
        disc_loss = slow_disc_loss(cross_entropy, discriminator, list(seen), parts, labels, penalty, conditional)
        if turn == "d":
            d_adam.descend(disc_loss)
            assert step == {"disc_loss": pytest.approx(disc_loss.item(), rel=1e-8)}
        else:
            loss = slow.risk(x, torch.tensor(labels)) - 0.8 * disc_loss
            g_adam.descend(loss)
            assert step == {"gen_loss": pytest.approx(loss.item(), rel=1e-8)}
        slow.assert_equal()
        discriminator.assert_equal()
        torch.testing.assert_close(dann.class_embeddings.weight.detach(), embeddings.detach())


@pytest.mark.parametrize("name", ["DANN", "CDANN"])
def test_lambda_changes_the_featurizer(build, minibatches, name):
    results = []
    for weight in (0.0, 5.0):
        dann = build(name, **{"lambda": weight})
        steps = [dann.update(minibatches) for _ in range(5)]
        assert [*steps[0], *steps[1], *steps[2]] == ["gen_loss", "disc_loss", "gen_loss"]
        results.append(next(dann.featurizer.parameters()).detach().clone())
    assert not torch.allclose(*results)


def test_batch_statistics_follow_every_forward_pass(build, minibatches):
    dann = build("DANN")
    dann.featurizer = torch.nn.Sequential(torch.nn.BatchNorm1d(5).double(), dann.featurizer)
    for _ in range(2):
        dann.update(minibatches)
    assert dann.featurizer[0].num_batches_tracked == 2


def test_state_has_domainbeds_roots(build):
    roots = {"update_count", "featurizer", "classifier", "discriminator", "class_embeddings"}
    assert {name.split(".")[0] for name in build("CDANN").state_dict()} == roots


@pytest.mark.parametrize("name", ["DANN", "CDANN"])
def test_the_control_learns_as_erm_in_the_updates_of_the_featurizer(build, minibatches, slow_network, slow_adam, name):
    """With d_steps_per_g_step 2 these are updates 2, 5 and 8; the discriminator has no say in them."""
    control = algorithms.get_algorithm_class(name).CONTROL
    turns = {"d_steps_per_g_step": 2, "grad_penalty": 0.7} | ADVERSARIAL
    dann, method = build(name, **turns, **control), build(name, **turns)
    slow = slow_network(dann)
    adam = slow_adam(slow.adam.weights, 0.02, 0.1, 0.5, 0.9)
    for update in range(1, 9):
        batch = [(x.roll(update, 1), y) for x, y in minibatches]
        assert dann.update(batch).keys() == method.update(batch).keys()  # the method's turns are the control's
        if update % 3 == 2:
            x, y = (torch.cat(column) for column in zip(*batch, strict=True))
            adam.descend(slow.risk(x, y))
        slow.assert_equal()
    assert not torch.allclose(dann.classifier.weight, method.classifier.weight)

import pytest
import torch


@pytest.mark.parametrize("ema", [0.6, 1.0])
def test_updates_equal_written_out_training(build, minibatches, slow_network, cross_entropy, ema):
    mtl = build("MTL", mtl_ema=ema)
    slow, memory = slow_network(mtl), [torch.zeros(4, dtype=torch.float64)] * 3
    for _ in range(3):
        step = mtl.update(minibatches)
        loss = 0.0
        for env, (x, y) in enumerate(minibatches):
            features = slow.featurizer(x)
            embedding = ema * sum(features) / len(x) + (1 - ema) * memory[env]
            seen = torch.stack([torch.cat([row, embedding]) for row in features])
            loss = loss + cross_entropy(slow.classifier(seen), y)
            memory[env] = embedding.detach()
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()
        torch.testing.assert_close(mtl.embeddings, torch.stack(memory))


def test_the_memory_changes_the_weights(build, minibatches):
    results = []
    for ema in (0.5, 1.0):
        mtl = build("MTL", mtl_ema=ema)
        for _ in range(3):
            mtl.update(minibatches)
        results.append(mtl.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_predictions_are_the_same_twice_and_follow_the_domain(build, minibatches):
    """DomainBed's embedding is overwritten by noise."""
    mtl = build("MTL").eval()
    (x, _), (other, _) = minibatches[:2]
    features = mtl.featurizer(x)
    domain = features.mean(0).expand(7, 4)
    assert torch.equal(mtl.predict(x), mtl.classifier(torch.cat([features, domain], 1)))
    assert torch.equal(mtl.predict(x), mtl.predict(x))
    assert not torch.allclose(mtl.predict(torch.cat([x, other]))[:7], mtl.predict(x))
    assert mtl.embeddings.tolist() == [[0] * 4] * 3


def test_the_embedding_lets_the_label_depend_on_the_domain(build):
    """The second domain shifts all labels by one; of two classes' images only the mean of the domain tells which."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=generator).double() / 10 + torch.eye(3, 5).double()[y] * 3
    mark = torch.zeros(60, 5).double()
    mark[y == 0, 4] = 3
    minibatches = [(x, y), (x + mark, (y + 1) % 3)]
    mtl = build("MTL", mlp_width=16, weight_decay=0.0)
    losses = [mtl.update(minibatches)["loss"] for _ in range(150)]
    assert losses[-1] < 0.2
    right = [(mtl.eval().predict(x).argmax(1) == y).float().mean().item() for x, y in minibatches]
    assert min(right) > 0.95


def test_a_known_domain_is_predicted_with_its_memory_which_stays(build, minibatches):
    mtl = build("MTL", mtl_ema=0.5)
    mtl.update(minibatches)
    memory, (x, _) = mtl.embeddings.clone(), minibatches[1]
    features = mtl.eval().featurizer(x)
    domain = (features.mean(0) + memory[1]) / 2
    torch.testing.assert_close(mtl.predict(x, 1), mtl.classifier(torch.cat([features, domain.expand(6, 4)], 1)))
    assert torch.equal(mtl.embeddings, memory)


def test_state_has_domainbeds_roots_and_shapes(build):
    state = build("MTL").state_dict()
    assert {name.split(".")[0] for name in state} == {"embeddings", "featurizer", "classifier"}
    assert state["embeddings"].shape == (3, 4)
    assert state["classifier.weight"].shape == (3, 8)


def test_other_weights_are_refused(build):
    with pytest.raises(ValueError, match=r"hparam mtl_ema is 1.5; .* give a number in \[0, 1\]"):
        build("MTL", mtl_ema=1.5)

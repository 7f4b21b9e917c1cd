import pytest
import torch


def slow_styles(x, what):
    """Each row in the style of a mix of two, or with the content of another one; written out with square sums."""
    n, d = x.shape
    shares, order = torch.rand(n, 1).double(), torch.randperm(n).tolist()
    means = [sum(row) / d for row in x]
    variances = [sum((v - mean) ** 2 for v in row) / (d - 1) for row, mean in zip(x, means, strict=True)]
    rows = []
    for i, j in enumerate(order):
        t = shares[i, 0] if what == "style" else 1.0
        mean, variance = t * means[i] + (1 - t) * means[j], t * variances[i] + (1 - t) * variances[j]
        of = i if what == "style" else j
        content = [(v - means[of]) / (variances[of] + 1e-5) ** 0.5 for v in x[of]]
        content = torch.stack(content) if what == "style" else torch.stack(content).detach()
        rows.append(content * (variance + 1e-5) ** 0.5 + mean)
    return torch.stack(rows)


def test_updates_equal_written_out_training(build, minibatches, slow_mlp, slow_adam, cross_entropy):
    sagnet = build("SagNet", sag_w_adv=0.7)
    f, c, s = (slow_mlp(module) for module in (sagnet.network_f, sagnet.network_c, sagnet.network_s))
    adam_f, adam_c, adam_s = (slow_adam(network.weights, 0.01, 0.1) for network in (f, c, s))
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for seed in range(3):
        torch.manual_seed(seed)
        step = sagnet.update(minibatches)
        torch.manual_seed(seed)
        loss_c = cross_entropy(c(slow_styles(f(x), "style")), y)
        adam_f.descend(loss_c)  # before c's, whose gradient does not ask for the weights of f
        adam_c.descend(loss_c)
        loss_s = cross_entropy(s(slow_styles(f(x), "content")), y)
        adam_s.descend(loss_s)
        scores = s(slow_styles(f(x), "content"))
        loss_adv = -0.7 * sum((z.exp() / z.exp().sum()).log().mean() for z in scores) / 18
        adam_f.descend(loss_adv)
        expected = {"loss_c": loss_c.item(), "loss_s": loss_s.item(), "loss_adv": loss_adv.item()}
        assert step == pytest.approx(expected, rel=1e-8)
        for network in (f, c, s):
            network.assert_equal()


def test_the_adversary_changes_the_featurizer(build, minibatches):
    results = []
    for weight in (0.0, 5.0):
        sagnet = build("SagNet", sag_w_adv=weight)
        torch.manual_seed(0)
        for _ in range(3):
            sagnet.update(minibatches)
        results.append(sagnet.network_f.output.weight.detach())
    assert not torch.allclose(*results)


def test_the_adversary_hides_the_class_from_the_style_head(build):
    """Features whose mean is the class: the weight takes it away from the style head."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    minibatches = [(torch.randn(60, 5, generator=generator).double() + 3 * (y[:, None] - 1), y)]
    losses = []
    for weight in (0.0, 10.0):
        sagnet = build("SagNet", sag_w_adv=weight, mlp_width=16, weight_decay=0.0)
        torch.manual_seed(0)
        losses.append([sagnet.update(minibatches)["loss_s"] for _ in range(100)][-1])
    assert losses[0] < 0.8 < losses[1]


def test_randomize_gives_the_style_of_one_and_the_content_of_another(build):
    sagnet, x = build("SagNet"), torch.randn(6, 9, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    torch.manual_seed(0)
    found = sagnet.randomize(x, "content", eps=0.0)
    torch.testing.assert_close(torch.var_mean(found, 1), torch.var_mean(x, 1))
    torch.manual_seed(0)
    torch.rand(6, 1)
    other = torch.randperm(6)
    assert other.tolist() != list(range(6))
    torch.testing.assert_close(found.sub(x.mean(1, keepdim=True)).argsort(1), x[other].argsort(1))
    torch.manual_seed(0)
    mixed = sagnet.randomize(x, "style", eps=0.0)
    torch.testing.assert_close(mixed.argsort(1), x.argsort(1))
    share = (mixed.mean(1) - x.mean(1)[other]) / (x.mean(1) - x.mean(1)[other])
    torch.manual_seed(0)
    torch.testing.assert_close(share[other != torch.arange(6)], torch.rand(6).double()[other != torch.arange(6)])


@pytest.mark.parametrize("what", ["style", "content"])
def test_maps_have_a_style_per_channel(build, what):
    sagnet, maps = build("SagNet"), torch.randn(4, 2, 3, 5)
    torch.manual_seed(0)
    whole = sagnet.randomize(maps, what)
    torch.manual_seed(0)
    channel = sagnet.randomize(maps[:, 1].flatten(1), what)
    assert whole.shape == maps.shape
    torch.testing.assert_close(whole[:, 1].flatten(1), channel)


def test_gradients_of_content_are_cut(build):
    sagnet, x = build("SagNet"), torch.randn(4, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(sagnet.randomize(x, "content").square().sum(), x)
    # Only mean and variance have one, so it is a line in x.
    centred = x.detach() - x.detach().mean(1, keepdim=True)
    slope = (gradient * centred).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True)
    torch.testing.assert_close(gradient, gradient.mean(1, keepdim=True) + slope * centred)


def test_other_kinds_are_refused(build):
    with pytest.raises(ValueError, match="what is 'color'; take style or content"):
        build("SagNet").randomize(torch.zeros(2, 3), "color")


def test_heatmaps_and_features_find_the_featurizer_but_the_state_has_domainbeds_roots(build):
    sagnet = build("SagNet")
    assert sagnet.featurizer is sagnet.network_f
    assert {name.split(".")[0] for name in sagnet.state_dict()} == {"network_f", "network_c", "network_s"}

"""What DLRT is compared with is what it is said to be."""

import copy

import pytest
import torch
from torch import nn

import dlrt
from dlrt import compression, tables
from dlrt.baselines import Factors, Muon, plain_factors, product_decay
from dlrt.models import ResNet8

pytestmark = pytest.mark.usefixtures("float64")


def test_muon_refuses_what_it_would_not_do_and_rests_at_lr_0():
    layer = nn.Linear(3, 4)
    for wrong in ({"dampening": 0.1}, {"maximize": True}):
        with pytest.raises(ValueError, match="neither dampening nor maximize"):
            Muon(layer.parameters(), [layer], lr=0.1, momentum=0.9, **wrong)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"lr must be above 0, got lr 0\.0 and 0\.1"):
        Muon(layer.parameters(), [layer], lr=0.0, update_lr=0.1)
    optimizer = Muon(layer.parameters(), [layer], lr=0.0)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def products(model):
    pairs = (pair for pair in model.modules() if isinstance(pair, Factors))
    return [A @ B for B, A in (pair.matrices() for pair in pairs)]


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.9])
def test_plain_factors_meet_a_compression_and_are_the_truncated_svd_in_two_even_shares(wanted):
    dense = ResNet8()
    model = plain_factors(copy.deepcopy(dense), wanted, skip=["conv1", "linear"])
    whole = compression(dense).dense_parameters
    count = compression(model)
    assert wanted <= 1 - count.evaluation_parameters / whole < wanted + 0.01
    assert (count.dense_parameters, count.compressed) == (whole, True)
    assert not compression(dense).compressed
    for name, pair in model.named_modules():
        if isinstance(pair, Factors):
            W, B, A = (
                layer.weight.detach().flatten(1) for layer in (dense.get_submodule(name), pair[0], pair[1])
            )
            best = torch.linalg.svdvals(W)[len(B) :].norm()
            assert torch.allclose((A @ B - W).norm(), best, rtol=1e-9)
            assert torch.allclose(A.mT @ A, B @ B.mT, atol=1e-12)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == dense(x).shape
    with pytest.raises(ValueError, match=r"compression must be at most 0\.9"):
        plain_factors(ResNet8(), 0.99, skip=["conv1", "linear"])
    wide = plain_factors(nn.Sequential(nn.Linear(1000, 1000)), 0.996)
    assert wide[0][0].weight.shape == (2, 1000)
    assert plain_factors(nn.Sequential(nn.Linear(1000, 1000)), 0.998)[0][0].weight.shape == (1, 1000)


def test_separable_factors_are_the_truncated_svd_of_kernels_across_rows_and_columns():
    dense = nn.Sequential(nn.Conv2d(4, 9, (3, 2), stride=2, padding=1))
    [pair] = plain_factors(copy.deepcopy(dense), 0.5, spatial=True)
    (B, A), W = pair.matrices(), dense[0].weight
    assert [layer.kernel_size for layer in pair] == [(1, 2), (3, 1)]
    kernel = (A @ B).unflatten(0, (9, 3)).unflatten(2, (4, 2)).transpose(1, 2)
    best = torch.linalg.svdvals(W.transpose(1, 2).flatten(2).flatten(0, 1))[len(B) :].norm()
    assert torch.allclose((kernel - W).norm(), best, rtol=1e-9)
    row = tables.layers(nn.Sequential(pair)).iloc[0]
    assert (row["matrix"], row["rank"], len(W)) == ("27 x 8", len(B), 9)
    assert float(row["largest sigma"]) == pytest.approx(torch.linalg.matrix_norm(A @ B, 2).item(), rel=1e-2)
    x = torch.randn(2, 4, 9, 9)
    expected = nn.functional.conv2d(x, kernel, dense[0].bias, stride=2, padding=1)
    assert torch.allclose(pair(x), expected, atol=1e-12)


NETWORKS = {  # in plain factors
    "linear": lambda: plain_factors(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 8)), 0.3),
    "channels-last": lambda: plain_factors(nn.Sequential(nn.Conv2d(4, 9, 3), nn.Conv2d(9, 8, 3)), 0.3),
    "separable": lambda: plain_factors(
        nn.Sequential(nn.Conv2d(4, 9, (3, 2)), nn.Conv2d(9, 8, 3)), 0.3, spatial=True
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["sgd", "momentum", "muon"])
def test_product_decay_is_the_gradient_flow_of_the_norm_of_the_product(kind, network):
    model = NETWORKS[network]().to(memory_format=torch.channels_last)
    layers = [layer for pair in model for layer in pair]
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.5)
    elif kind == "momentum":  # worth ten times as much
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.5)
    else:
        optimizer = Muon(model.parameters(), layers, lr=1e-3, momentum=0.9, weight_decay=0.5)
    product_decay(optimizer, model)
    before, biases = products(model), [pair[1].bias.detach().clone() for pair in model]
    gradients = torch.autograd.grad(
        sum(W.square().sum() for W in before) / 2, [layer.weight for layer in layers]
    )
    expected = [layer.weight - 5e-4 * g for layer, g in zip(layers, gradients, strict=True)]
    for pair in model:
        pair[1].bias.grad = torch.zeros_like(pair[1].bias)
    optimizer.step()
    for layer, weight in zip(layers, expected, strict=True):
        assert torch.allclose(layer.weight, weight, atol=1e-14)
    assert all(after.norm() < W.norm() for after, W in zip(products(model), before, strict=True))
    shrunk = 1 - 0.5 * optimizer.param_groups[0]["lr"]
    assert all(torch.allclose(pair[1].bias, shrunk * b) for pair, b in zip(model, biases, strict=True))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("spatial", [False, True])
def test_a_network_of_thin_layers_comes_back_from_its_state_dict(exported, spatial):
    def make():
        layers = {"conv": nn.Conv2d(6, 9, 3, stride=2), "attention": nn.MultiheadAttention(12, 3)}
        return nn.ModuleDict({**layers, "linear": nn.Linear(12, 9), "small": nn.Linear(2, 2)})

    if exported:
        thin = dlrt.export(dlrt.to_low_rank(make(), rank=2, spatial=spatial))
    else:
        thin = plain_factors(make(), 0.5, spatial=spatial)
    again = dlrt.load_factors(make(), thin.state_dict())
    assert isinstance(again["attention"].q_proj, Factors)
    state = again.state_dict()
    assert state.keys() == thin.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in thin.state_dict().items())
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(again["conv"](x), thin["conv"](x))

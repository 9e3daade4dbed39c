"""A weight cut by its layer's outputs: the best for them, whatever the inputs are."""

import pytest
import torch
from torch import nn

import dlrt
from dlrt.models import LeNet5
from dlrt.outputs import output_covariances

pytestmark = pytest.mark.usefixtures("float64")


def correlated(n, features):
    """Inputs most of whose variance lies in few directions, and with a mean."""
    scales = torch.logspace(0, -2, features)
    return torch.randn(n, features) * scales @ torch.linalg.qr(torch.randn(features, features))[0] + 3


def test_no_matrix_of_that_rank_comes_nearer_to_the_outputs():
    x = correlated(400, 12)
    layer = nn.Linear(12, 9)
    y = layer(x)
    by_weights = dlrt.LowRankLinear.from_dense(layer, rank=3)
    by_outputs = dlrt.to_low_rank(nn.Sequential(layer), rank=3, inputs=x)[0]

    def error(W):
        outputs = x @ W.mT
        return ((outputs - outputs.mean(0)) - (y - y.mean(0))).norm()

    best = torch.linalg.svdvals((y - y.mean(0)).detach())[3:].norm()  # Eckart and Young
    assert torch.isclose(error(by_outputs.weight), best, rtol=1e-8)
    assert error(by_weights.weight) > 1.2 * best
    assert by_outputs.rank == 3


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_tau_bounds_the_change_of_the_outputs(tau):
    x = correlated(400, 12)
    layer = nn.Linear(12, 9)
    y = layer(x)
    low_rank = dlrt.to_low_rank(nn.Sequential(layer), tau=tau, inputs=x)[0]
    change, whole = low_rank(x) - y, y - y.mean(0)
    assert 1e-3 < (change - change.mean(0)).norm() / whole.norm() <= tau
    assert low_rank.rank < 9


def test_at_full_rank_the_network_is_what_it_was_and_its_modes_and_norms_too():
    network = nn.Sequential(LeNet5(), nn.BatchNorm1d(10))
    network[0].eval()
    x = torch.randn(20, 1, 28, 28)
    modes = [
        module.training for module in network.modules() if not isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    expected, mean = network.eval()(x), network[1].running_mean.clone()
    network[1].train(), network.train(), network[0].eval()
    dlrt.to_low_rank(network, inputs=x)
    kept = [module.training for module in network.modules() if not isinstance(module, dlrt.LowRankLayer)]
    assert kept == modes
    assert torch.equal(network[1].running_mean, mean)
    assert torch.allclose(network.eval()(x), expected, atol=1e-10)


def test_covariances_are_over_all_positions_and_calls():
    conv = nn.Conv2d(2, 3, 3)
    network = nn.Sequential(conv, nn.Conv2d(3, 2, 1), conv)
    x = torch.randn(5, 2, 8, 8)
    first = conv(x)
    second = conv(network[1](first))
    outputs = torch.cat([y.movedim(1, -1).flatten(end_dim=2) for y in (first, second)])
    found = output_covariances(network, [conv], x)[conv]
    assert torch.allclose(found, torch.cov(outputs.mT, correction=0))

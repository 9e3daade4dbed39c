"""Second moments of the gradient in the bases, and a budget that cuts by them."""

import copy

import pytest
import torch
from small_networks import NETS, OPTIONS, batch, low_rank_layers, network, train
from torch import nn

import dlrt
from dlrt import DLRT
from dlrt.moments import MEMORY, remember_gradient, rotate_moments

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", OPTIONS)
def test_at_full_rank_they_are_those_of_the_dense_gradient(name):
    make, x_shape, y_shape = NETS["square"]
    model = dlrt.to_low_rank(make(), rank=1.0)
    options = {**OPTIONS[name], "weight_decay": 0.0}
    optimizer = DLRT(model, torch.optim.SGD, lr=0.05, compression=1e-9, ramp=10**6, **options)
    products = []
    for _ in range(MEMORY):
        x, y = torch.randn(x_shape), torch.randn(y_shape)
        dense = dlrt.to_dense(copy.deepcopy(model))
        optimizer.zero_grad()
        for net in (dense, model):
            net(x).sub(y).square().mean().backward()
        G = dense.weight.grad
        products.append((G @ G.mT, G.mT @ G))
        optimizer.step()
    left, right = (torch.stack(of_one).mean(0) for of_one in zip(*products, strict=True))
    state, U, V = optimizer.state[model.S], model.U, model.V
    assert torch.allclose(U @ state["left"] @ U.mT, left, rtol=1e-9, atol=1e-15)
    assert torch.allclose(V @ state["right"] @ V.mT, right, rtol=1e-9, atol=1e-15)


def test_they_turn_with_the_bases_and_new_directions_begin_with_the_gradient_that_brings_them():
    state, C, larger = {}, torch.randn(3, 4), torch.randn(5, 6)
    remember_gradient(state, C)
    P, Q = (torch.linalg.qr(torch.randn(n, n))[0] for n in (3, 4))
    rotate_moments(state, P, Q)
    turned = {}
    remember_gradient(turned, P.mT @ C @ Q)
    assert torch.allclose(state["left"], turned["left"])
    assert torch.allclose(state["right"], turned["right"])
    before = state["left"]
    remember_gradient(state, larger)
    now = larger @ larger.mT
    assert torch.allclose(state["left"][:3, :3], (before + now[:3, :3]) / 2)
    assert torch.allclose(state["left"][3:, 3:], now[3:, 3:])
    assert torch.allclose(state["left"][3:, :3], now[3:, :3] / 2)


@pytest.mark.parametrize("way", [{}, {"s_steps": 3}, {"integrator": "augmented"}])
def test_a_budget_cuts_a_regression_where_the_loss_needs_it_least(way):
    """The excess loss ‖(W - W*) √A‖², inputs with covariance A: Eckart-Young in that norm is the best."""
    n, rank, draw = 12, 2, torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 5, generator=draw) for _ in range(2))
    target, scales = left @ right.mT, torch.logspace(0, -1.5, n)
    sigma = torch.linalg.svdvals(target * scales)
    excess = {}
    for cut_by in ("loss", "weights"):
        model = dlrt.to_low_rank(nn.Linear(n, n, bias=False))
        model.factors = dlrt.LowRank.from_dense(target, rank=5)
        budget = {"compression": 1 - 2 * rank * n / n**2 + 1e-9, "ramp": 300, "cut_by": cut_by}
        optimizer = DLRT(model, torch.optim.SGD, lr=1e-12, allot_every=20, **budget, **way)

        def closure(optimizer=optimizer, model=model):
            optimizer.zero_grad()
            x = scales * torch.randn(256, n, generator=draw)
            labels = x @ target.mT + 30 * torch.randn(256, n, generator=draw)
            loss = (model(x) - labels).square().mean()
            loss.backward()
            return loss

        for _ in range(330):
            optimizer.step(closure)
        optimizer.truncate()
        assert model.rank == rank
        excess[cut_by] = float(((model.weight - target) * scales).norm().detach() / sigma[rank:].norm())
    assert 1 <= excess["loss"] <= 1.1
    assert excess["weights"] > 1.2


def test_they_are_saved_with_the_optimizer_and_follow_bases_that_others_write():
    model = dlrt.to_low_rank(network(), rank=1.0)
    options = {"lr": 0.1, "momentum": 0.9, "compression": 0.6, "ramp": 12, "allot_every": 3}
    optimizer = DLRT(model, torch.optim.SGD, **options)
    train(model, optimizer, [batch() for _ in range(5)])
    again = dlrt.to_low_rank(network(), rank=1.0)
    again.load_state_dict(model.state_dict())
    resumed = DLRT(again, torch.optim.SGD, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    data = [batch() for _ in range(12)]
    train(model, optimizer, data)
    train(again, resumed, data)
    assert dlrt.compression(model).evaluation_compression >= 60
    for layer, same in zip(low_rank_layers(model), low_rank_layers(again), strict=True):
        assert torch.equal(layer.weight, same.weight)
    layer = low_rank_layers(model)[1]
    U, Y, left = layer.U.detach().clone(), layer.factors, optimizer.state[layer.S]["left"]
    P, Q = (torch.linalg.qr(torch.randn(layer.rank, layer.rank))[0] for _ in range(2))
    layer.factors = dlrt.LowRank(Y.U @ P, P.mT @ Y.S @ Q, Y.V @ Q)
    optimizer.state_dict()  # takes note of it
    assert torch.allclose(layer.U @ optimizer.state[layer.S]["left"] @ layer.U.mT, U @ left @ U.mT)


def test_a_tolerance_cuts_by_the_norm_of_the_weight_and_needs_no_moments():
    model = dlrt.to_low_rank(network())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, tau=0.2)
    train(model, optimizer, [batch() for _ in range(2)])
    assert not any("left" in optimizer.state[layer.S] for layer in low_rank_layers(model))


def test_frozen_bases_keep_the_moments_as_they_are():
    model = dlrt.to_low_rank(network())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, compression=0.5, ramp=2)
    train(model, optimizer, [batch()])
    optimizer.freeze_bases()
    assert dlrt.compression(model).evaluation_compression >= 50
    layers = low_rank_layers(model)
    before = [optimizer.state[layer.S]["left"].clone() for layer in layers]
    train(model, optimizer, [batch()])
    for layer, left in zip(layers, before, strict=True):
        assert torch.equal(optimizer.state[layer.S]["left"], left)

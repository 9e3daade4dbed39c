"""Second moments of the gradient in the bases, and a budget that cuts by them."""

import copy

import pytest
import torch
from small_networks import NETS, OPTIONS, batch, low_rank_layers, network, train
from torch import nn

import dlrt
from dlrt import DLRT, LowRank
from dlrt.integrators import augment
from dlrt.lowrank import rank_within
from dlrt.moments import LEAST, MEMORY, remember_gradient, rotate_moments, second_moments
from dlrt.velocity import Tangent

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", OPTIONS)
def test_at_full_rank_second_moments_are_those_of_the_dense_gradient(name):
    """Of the loss alone, without weight decay, and of the last gradients more than of others."""
    make, x_shape, y_shape = NETS["square"]
    model = dlrt.to_low_rank(make(), rank=1.0)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.05, compression=1e-9, ramp=10**6, **OPTIONS[name])
    left = right = 0
    for step in range(1, 2 * MEMORY):
        x, y = torch.randn(x_shape), torch.randn(y_shape)
        dense = dlrt.to_dense(copy.deepcopy(model))
        optimizer.zero_grad()
        for net in (dense, model):
            net(x).sub(y).square().mean().backward()
        G = dense.weight.grad
        share = 1 / min(step, MEMORY)
        left, right = (1 - share) * left + share * G @ G.mT, (1 - share) * right + share * G.mT @ G
        optimizer.step()
    state, U, V = optimizer.state[model.S], model.U, model.V
    assert torch.allclose(U @ state["left"] @ U.mT, left, rtol=1e-9, atol=1e-15)
    assert torch.allclose(V @ state["right"] @ V.mT, right, rtol=1e-9, atol=1e-15)


def tangent(Y):
    """The gradient G (9, 8) of a layer at Y, and what the layer knows of it."""
    G = torch.randn(9, 8)
    return G, Tangent(Y.U, Y.V, G @ Y.V, G.mT @ Y.U, Y.U.mT @ G @ Y.V)


def test_in_the_bases_the_gradient_is_known_whole_and_in_new_directions_by_its_part_in_them():
    """The bases grow by the velocity, which has other directions than the gradient."""
    Y = LowRank.from_dense(torch.randn(9, 8), rank=3)
    (_, M), (G, known), state = tangent(Y), tangent(Y), {}
    Y_hat = augment(Y, M.MV, M.MU)
    remember_gradient(state, known, Y_hat)
    U, V, s = torch.as_tensor(Y_hat.U @ torch.eye(6)), torch.as_tensor(Y_hat.V @ torch.eye(6)), 3
    C = U.mT @ G @ V
    C[s:, s:] = 0
    for key, part, whole in (("left", C, U.mT @ G), ("right", C.mT, V.mT @ G.mT)):
        moment = state[key]
        assert torch.allclose(moment[:s, :s], (whole @ whole.mT)[:s, :s])
        assert torch.allclose(moment[s:], (part @ part.mT)[s:])
        assert torch.linalg.eigvalsh(moment)[0] > -1e-12
        assert not torch.allclose(moment[:s, :s], (part @ part.mT)[:s, :s])


def test_second_moments_are_cut_with_the_bases_and_new_directions_begin_with_their_first_gradient():
    Y = LowRank.from_dense(torch.randn(9, 8), rank=3)
    (G, known), state = tangent(Y), {}
    remember_gradient(state, known, Y)
    P, Q = torch.linalg.qr(torch.randn(3, 2))[0], torch.linalg.qr(torch.randn(4, 3))[0]
    rotate_moments(state, P, Q)  # V has grown by a direction that no gradient was known of
    before = (Y.U @ P).mT @ G
    assert torch.allclose(state["left"], before @ before.mT)
    assert torch.allclose(state["right"], Q[:3].mT @ Y.V.mT @ G.mT @ G @ Y.V @ Q[:3])
    left, core = state["left"], torch.randn(5, 6)
    bases = torch.linalg.qr(torch.randn(9, 5))[0], torch.linalg.qr(torch.randn(8, 6))[0]
    remember_gradient(state, Tangent(*bases, None, None, core), LowRank(bases[0], core, bases[1]))
    now = core @ core.mT
    assert torch.allclose(state["left"][:2, :2], (left + now[:2, :2]) / 2)
    assert torch.allclose(state["left"][2:, 2:], now[2:, 2:])
    assert torch.allclose(state["left"][2:, :2], now[2:, :2] / 2)


def test_second_moments_are_none_after_few_gradients_and_zero_where_the_bases_have_grown():
    Y, state = LowRank.from_dense(torch.randn(9, 8), rank=3), {}
    for _ in range(LEAST):
        assert second_moments(state, Y.S) is None
        remember_gradient(state, tangent(Y)[1], Y)
    right, left = second_moments(state, torch.zeros(5, 4))
    for padded, moment, size in ((left, state["left"], 5), (right, state["right"], 4)):
        assert torch.equal(padded, torch.block_diag(moment, torch.zeros(size - 3, size - 3)))


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
        model.factors = LowRank.from_dense(target, rank=5)
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_moments_are_saved_with_the_optimizer_and_follow_bases_that_others_write(momentum):
    model = dlrt.to_low_rank(network(), rank=1.0)
    options = {"lr": 0.1, "momentum": momentum, "compression": 0.6, "ramp": 12, "allot_every": 3}
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
    layer.factors = LowRank(Y.U @ P, P.mT @ Y.S @ Q, Y.V @ Q)
    optimizer.state_dict()  # takes note of it
    assert torch.allclose(layer.U @ optimizer.state[layer.S]["left"] @ layer.U.mT, U @ left @ U.mT)
    layer.factors = LowRank.from_dense(torch.randn(layer.shape), rank=layer.rank + 1)
    optimizer.state_dict()  # of bases that reach out of the old ones nothing is known
    assert optimizer.state[layer.S].keys().isdisjoint(("left", "right", "gradients"))


def test_a_network_in_another_precision_takes_its_second_moments_along():
    model = dlrt.to_low_rank(network(), rank=1.0)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, compression=0.6, ramp=12, allot_every=12)
    train(model, optimizer, [batch() for _ in range(11)])
    model.float()
    optimizer.truncate()
    x, y = batch()
    train(model, optimizer, [(x.float(), y)])
    assert {layer.weight.dtype for layer in low_rank_layers(model)} == {torch.float32}


def test_beside_a_budget_tau_is_a_share_of_the_norm_of_the_weight():
    model = dlrt.to_low_rank(network(), rank=1.0)
    tau, before = 0.3, [layer.factors.S.clone() for layer in low_rank_layers(model)]
    optimizer = DLRT(model, torch.optim.SGD, lr=1e-9, tau=tau, compression=1e-9, ramp=1, allot_every=LEAST)
    train(model, optimizer, [batch() for _ in range(LEAST + 1)])
    assert "left" in optimizer.state[low_rank_layers(model)[0].S]
    for layer, S in zip(low_rank_layers(model), before, strict=True):
        sigma = torch.linalg.svdvals(S)
        for _ in range(2):  # decisions: before and after the second moments are known
            sigma = sigma[: max(2, rank_within(sigma, tau))]
        assert layer.rank == len(sigma)


def test_a_tolerance_cuts_by_the_norm_of_the_weight_and_needs_no_moments():
    model = dlrt.to_low_rank(network())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, tau=0.2)
    train(model, optimizer, [batch() for _ in range(2)])
    assert not any("left" in optimizer.state[layer.S] for layer in low_rank_layers(model))


def test_frozen_bases_need_no_second_moments():
    model = dlrt.to_low_rank(network())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, compression=0.5, ramp=2)
    train(model, optimizer, [batch()])
    optimizer.freeze_bases()
    assert dlrt.compression(model).evaluation_compression >= 50
    train(model, optimizer, [batch()])
    assert not any("left" in optimizer.state[layer.S] for layer in low_rank_layers(model))

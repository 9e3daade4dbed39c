"""DLRT: a step is the integrator's step, and ordinary loops need no change."""

import copy

import pytest
import torch
from small_networks import batch, dense_gradients, factors_of, low_rank_layers, network, train
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, LowRank, LowRankConv2d, LowRankLinear, integrators

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("when", ["before", "after"])
def test_unfreezing_the_whole_model_leaves_the_bases_to_the_integrator(when):
    """Freezing and unfreezing by model.requires_grad_() reaches U and V as well."""
    start, batches = dlrt.to_low_rank(network(), rank=3), [batch() for _ in range(6)]
    norms = []
    for unfrozen in (False, True):
        model = copy.deepcopy(start)
        if unfrozen and when == "before":
            model.requires_grad_(True)
        optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.05, s_steps=3)
        if unfrozen and when == "after":
            model.requires_grad_(True)
        norms.append([])
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            norms[-1].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
        for layer in low_rank_layers(model):
            assert torch.allclose(layer.U.mT @ layer.U, torch.eye(layer.U.shape[1]), atol=1e-12)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_full_rank_step_is_the_sgd_step(integrator, spatial):
    dense = network()
    model = dlrt.to_low_rank(copy.deepcopy(dense), spatial=spatial)
    batches = [batch() for _ in range(5)]
    options = {"lr": 0.2, "weight_decay": 0.01}
    train(dense, torch.optim.SGD(dense.parameters(), **options), batches)
    train(model, DLRT(model, torch.optim.SGD, tau=0.0, integrator=integrator, **options), batches)
    for layer, other in zip(model, dense, strict=True):
        if isinstance(layer, dlrt.LowRankLayer):
            assert (layer.weight - other.weight).norm() <= 1e-10 * other.weight.norm()
            assert torch.allclose(layer.bias, other.bias, atol=1e-11)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_one_step_with_sgd_is_one_step_of_the_integrator(integrator, spatial):
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"], spatial=spatial)
    x, y = batch()
    h, tau = 0.3, 0.05
    before, gradients = factors_of(model), dense_gradients(model, x, y)
    train(model, DLRT(model, torch.optim.SGD, lr=h, tau=tau, min_rank=1, integrator=integrator), [(x, y)])
    step = getattr(integrators, f"{integrator}_bug")
    for layer, Y, G in zip(low_rank_layers(model), before, gradients, strict=False):
        expected = step(Y, -G, h, tau)
        assert layer.rank == expected.rank
        W = layer.as_matrix(layer.weight)
        assert (W - expected.dense()).norm() <= 1e-10 * expected.dense().norm()


def test_one_step_of_bug_takes_its_s_step_at_the_projected_weights():
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    projected = copy.deepcopy(model)
    x, y = batch()
    h = 0.3
    moved = [
        integrators.update_bases(Y, -G @ Y.V, -G.mT @ Y.U, h)
        for Y, G in zip(factors_of(model), dense_gradients(model, x, y), strict=False)
    ]
    for layer, Y1 in zip(low_rank_layers(projected), moved, strict=True):
        layer.factors = Y1
    train(model, DLRT(model, torch.optim.SGD, lr=h, integrator="bug"), [(x, y)])
    gradients = dense_gradients(projected, x, y)
    for layer, Y1, G in zip(low_rank_layers(model), moved, gradients, strict=False):
        expected = Y1.dense() - h * Y1.U @ (Y1.U.mT @ G @ Y1.V) @ Y1.V.mT
        assert (layer.weight.flatten(1) - expected).norm() <= 1e-10 * expected.norm()


def test_gradient_accumulation_is_the_step_of_the_joined_batch():
    (x1, y1), (x2, y2) = batch(), batch()
    models = [dlrt.to_low_rank(network(), rank=3)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [DLRT(model, torch.optim.SGD, lr=0.3, tau=0.01, min_rank=1) for model in models]
    for x, y in ((x1, y1), (x2, y2)):
        (cross_entropy(models[0](x), y) / 2).backward()
    cross_entropy(models[1](torch.cat([x1, x2])), torch.cat([y1, y2])).backward()
    for optimizer in optimizers:
        optimizer.step()
    for one, other in zip(*map(low_rank_layers, models), strict=True):
        assert one.rank == other.rank
        assert torch.allclose(one.weight, other.weight, atol=1e-11)


def test_gradient_clipping_scales_the_whole_step():
    """Clipping by a factor c is training with lr c."""
    x, y = batch()
    models = [dlrt.to_low_rank(network(), rank=3)]
    models.append(copy.deepcopy(models[0]))
    for model, lr, factor in zip(models, (1.0, 0.2), (0.2, 1.0), strict=True):
        optimizer = DLRT(model, torch.optim.SGD, lr=lr, tau=0.01, min_rank=1)
        cross_entropy(model(x), y).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        optimizer.step()
    for one, other in zip(*map(low_rank_layers, models), strict=True):
        assert torch.allclose(one.weight, other.weight, atol=1e-12)


@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_the_loss_falls_in_a_small_step_without_truncation(integrator):
    for seed in range(5):
        torch.manual_seed(seed)
        model = dlrt.to_low_rank(network(), rank=2)
        x, y = batch()
        optimizer = DLRT(model, torch.optim.SGD, lr=1e-3, tau=0.0, integrator=integrator)
        before = train(model, optimizer, [(x, y)])
        assert cross_entropy(model(x), y) < before


@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_a_step_changes_the_weight_by_at_most_the_truncation_beyond_the_gradient_step(integrator):
    model = dlrt.to_low_rank(network(), rank=3)
    x, y = batch()
    tau, h = 0.1, 0.05
    before, gradients = (
        [layer.weight.flatten(1) for layer in low_rank_layers(model)],
        dense_gradients(model, x, y),
    )
    train(model, DLRT(model, torch.optim.SGD, lr=h, tau=tau, min_rank=1, integrator=integrator), [(x, y)])
    for layer, W, G in zip(low_rank_layers(model), before, gradients, strict=True):
        step = (layer.weight.flatten(1) - W).norm()
        assert step <= h * G.norm() + tau * (W.norm() + h * G.norm())
        for basis in (layer.U, layer.V):
            assert torch.allclose(basis.mT @ basis, torch.eye(layer.rank), atol=1e-12)


def test_a_convolution_with_one_complete_basis_moves_the_other():
    """V spans everything and so has nothing to gain, while U has."""
    conv = LowRankConv2d(6, 20, 1, rank=6)
    optimizer = DLRT(conv, torch.optim.SGD, lr=0.1, tau=0.0)
    before, x = conv.weight.clone(), torch.randn(2, 6, 1, 1)
    dense = conv.to_dense()
    dense(x).square().sum().backward()
    conv(x).square().sum().backward()
    optimizer.step()
    expected = before - 0.1 * dense.weight.grad
    assert (conv.weight - expected).norm() <= 1e-10 * expected.norm()


def test_layers_that_take_no_part_or_are_frozen_stay_as_they_are():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.frozen = (LowRankLinear(5, 5, 2) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x))

    model = Branches()
    before = copy.deepcopy(model.state_dict())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    optimizer.zero_grad()
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("used."), name


def test_convolutions_move_as_linear_layers_on_patches_do():
    """The step of a convolution is the step of a linear layer that is fed the unfolded patches."""
    conv = LowRankConv2d(2, 5, 3, rank=2, bias=False)
    linear = LowRankLinear(18, 5, 2, bias=False)
    linear.factors = LowRank(*(T.detach().clone() for T in (conv.U, conv.S, conv.V)))
    x = torch.randn(3, 2, 6, 6)
    patches = nn.functional.unfold(x, 3).mT
    for layer, data in ((conv, x), (linear, patches)):
        optimizer = DLRT(layer, torch.optim.SGD, lr=0.1, tau=0.01, min_rank=1)
        layer(data).sin().sum().backward()
        optimizer.step()
    assert conv.rank == linear.rank
    assert torch.allclose(conv.weight.flatten(1), linear.weight, atol=1e-12)


def test_a_compiled_network_trains_while_its_ranks_move():
    model = dlrt.to_low_rank(network(), rank=4, skip=["5"])
    other = copy.deepcopy(model)
    data = [batch() for _ in range(5)]
    for net, forward in ((model, model), (other, torch.compile(other, backend="eager"))):
        train(forward, DLRT(net, torch.optim.SGD, lr=0.2, tau=0.2), data)
    for one, two in zip(*map(low_rank_layers, (model, other)), strict=True):
        assert one.rank == two.rank
        assert torch.allclose(one.weight, two.weight, atol=1e-12)


def test_parts_of_a_model_may_have_optimizers_of_their_own():
    model = dlrt.to_low_rank(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), rank=2)
    optimizers = [DLRT(part, torch.optim.SGD, lr=0.1) for part in model]
    before = [layer.weight.detach() for layer in model]
    model(torch.randn(3, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(layer.weight, W) for layer, W in zip(model, before, strict=True))


def test_a_model_may_change_its_type_between_steps():
    model = dlrt.to_low_rank(network().float(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = batch()
    train(model, optimizer, [(x.float(), y)])
    train(model.double(), optimizer, [(x, y)])
    assert all(layer.S.dtype == torch.float64 for layer in low_rank_layers(model))


def test_a_failed_second_pass_can_be_made_again():
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, integrator="augmented")
    x, y = batch()
    calls = []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) * (float("nan") if len(calls) == 2 else 1.0)
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert optimizer.step(closure) > optimizer.step(closure)


def test_a_layer_without_a_second_gradient_keeps_the_memory_of_its_rule():
    """Its bases were augmented in the first pass, and the mean of squares was not."""
    model = dlrt.to_low_rank(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), rank=2)
    optimizer = DLRT(model, torch.optim.Adam, lr=0.01, integrator="augmented", max_rank=2)
    x, passes = torch.randn(8, 6), []

    def closure():
        passes.append(None)
        optimizer.zero_grad()
        y = model[0](x) if len(passes) == 4 else model[1](model[0](x))
        y.square().mean().backward()

    for _ in range(3):
        optimizer.step(closure)
    assert [layer.rank for layer in model] == [2, 2]
    assert optimizer.state[model[1].S]["squares"].shape == (2, 2)


def test_a_loaded_state_brings_its_settings_along():
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, s_steps=3, min_rank=1, max_rank="initial", tau=0.02)
    train(model, optimizer, [batch()])
    other = DLRT(model, torch.optim.SGD, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for name in ("s_steps", "min_rank", "max_ranks", "tau", "allot_every", "integrator"):
        assert other.group[name] == optimizer.group[name]

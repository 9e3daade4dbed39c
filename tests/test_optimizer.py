"""DLRT: a step is the integrator's step, state follows the bases, and ordinary loops need no change."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, LowRank, LowRankConv2d, LowRankLinear, integrators
from dlrt.optimizer import change_basis

pytestmark = pytest.mark.usefixtures("float64")


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.Tanh(), nn.Linear(12, 4)
    )


def batch(size=16):
    return torch.randn(size, 1, 8, 8), torch.randint(0, 4, (size,))


def low_rank_layers(model):
    return [module for module in model.modules() if isinstance(module, dlrt.LowRankLayer)]


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


def train(model, optimizer, batches, parts=1):
    """A step on every batch, whose gradient is accumulated over so many parts."""
    for x, y in batches:
        if getattr(optimizer, "integrator", None) == "bug":
            loss = optimizer.step(closure_of(model, optimizer, x, y))
            continue
        optimizer.zero_grad()
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = cross_entropy(model(inputs), labels) / parts
            loss.backward()  # the loss stays alive into the next forward pass, as in everybody's loop
        optimizer.step()
    return loss


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def dense_gradients(model, x, y):
    """The gradients for the weights, from a dense copy of the model."""
    dense = dlrt.to_dense(copy.deepcopy(model))
    dense.zero_grad()
    cross_entropy(dense(x), y).backward()
    return [layer.weight.grad.flatten(1) for layer in dense if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_full_rank_step_is_the_sgd_step(integrator):
    dense = network()
    model = dlrt.to_low_rank(copy.deepcopy(dense))
    batches = [batch() for _ in range(5)]
    options = {"lr": 0.2, "weight_decay": 0.01}
    train(dense, torch.optim.SGD(dense.parameters(), **options), batches)
    train(model, DLRT(model, torch.optim.SGD, tau=0.0, integrator=integrator, **options), batches)
    for layer, other in zip(model, dense, strict=True):
        if isinstance(layer, dlrt.LowRankLayer):
            assert (layer.weight - other.weight).norm() <= 1e-10 * other.weight.norm()
            assert torch.allclose(layer.bias, other.bias, atol=1e-11)


def test_full_rank_momentum_is_the_dense_momentum_of_a_square_layer():
    """Where both bases are complete; in a wide or tall layer part of the momentum has no basis to live in."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    model = dlrt.to_low_rank(copy.deepcopy(dense), skip=["3"])
    batches = [batch() for _ in range(5)]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    train(dense, torch.optim.SGD(dense.parameters(), **options), batches)
    train(model, DLRT(model, torch.optim.SGD, tau=0.0, **options), batches)
    assert (model[1].weight - dense[1].weight).norm() <= 1e-10 * dense[1].weight.norm()


def factors_of(model):
    return [LowRank(*(T.detach().clone() for T in (L.U, L.S, L.V))) for L in low_rank_layers(model)]


@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_one_step_with_sgd_is_one_step_of_the_integrator(integrator):
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    x, y = batch()
    h, tau = 0.3, 0.05
    before, gradients = factors_of(model), dense_gradients(model, x, y)
    train(model, DLRT(model, torch.optim.SGD, lr=h, tau=tau, min_rank=1, integrator=integrator), [(x, y)])
    step = getattr(integrators, f"{integrator}_bug")
    for layer, Y, G in zip(low_rank_layers(model), before, gradients, strict=False):
        expected = step(Y, -G, h, tau)
        assert layer.rank == expected.rank
        assert (layer.weight.flatten(1) - expected.dense()).norm() <= 1e-10 * expected.dense().norm()


def test_one_step_of_bug_takes_its_s_step_at_the_projected_weights():
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    projected = copy.deepcopy(model)
    x, y = batch()
    h = 0.3
    moved = [
        integrators.move_bases(Y, -G @ Y.V, -G.mT @ Y.U, h)
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


@pytest.mark.parametrize(("momentum", "parts"), [(0.0, 1), (0.9, 2)])
def test_with_several_s_steps_the_bases_move_once_and_s_is_trained_in_them(momentum, parts):
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    data, h, tau = [batch() for _ in range(3)], 0.2, 0.05
    expected = copy.deepcopy(model)
    gradients = dense_gradients(model, *data[0])
    for layer, Y, G in zip(low_rank_layers(expected), factors_of(model), gradients, strict=False):
        U1, V1, D = integrators.augment(Y, G)
        U_hat, V_hat = torch.cat([Y.U, U1], 1), torch.cat([Y.V, V1], 1)
        layer.factors = LowRank(U_hat, integrators.pad_like(Y.S, D), V_hat)
    options = {"lr": h, "momentum": momentum}
    train(expected, torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], **options), data)
    optimizer = DLRT(model, torch.optim.SGD, tau=tau, min_rank=1, s_steps=3, **options)
    train(model, optimizer, data, parts)
    for layer, other in zip(low_rank_layers(model), low_rank_layers(expected), strict=True):
        truncated = dlrt.truncate(other.factors, tau)
        assert layer.rank == truncated.rank
        assert (layer.weight.flatten(1) - truncated.dense()).norm() <= 1e-10 * truncated.dense().norm()


def test_truncation_between_s_steps_is_within_tau_and_the_bases_move_again():
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.2, tau=0.1, min_rank=1, s_steps=10)
    train(model, optimizer, [batch() for _ in range(4)])
    before = [layer.weight.flatten(1) for layer in low_rank_layers(model)]
    assert [layer.rank for layer in low_rank_layers(model)] == [6, 6]
    optimizer.truncate()
    bases = [layer.U.clone() for layer in low_rank_layers(model)]
    for layer, W in zip(low_rank_layers(model), before, strict=True):
        assert layer.rank < 6
        assert (layer.weight.flatten(1) - W).norm() <= 0.1 * W.norm()
    train(model, optimizer, [batch()])
    assert all(layer.rank > U.shape[1] for layer, U in zip(low_rank_layers(model), bases, strict=True))


def test_a_layer_used_in_every_second_step_moves_its_bases_with_several_s_steps():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = LowRankLinear(8, 8, 2), LowRankLinear(8, 8, 2)

        def forward(self, x, both):
            return self.sometimes(self.always(x)) if both else self.always(x)

    model = Branches()
    U = model.sometimes.U.clone()
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, tau=0.0, s_steps=2)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 8), step % 2 == 1).square().sum().backward()
        optimizer.step()
    assert model.sometimes.rank > 2
    assert not torch.allclose(model.sometimes.U[:, :2], U)


def test_an_optimizer_made_between_two_moves_of_the_bases_goes_on_from_a_rectangular_s():
    model = LowRankLinear(100, 10, 8, bias=False)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, s_steps=3)
    for made in (optimizer, DLRT):
        if made is DLRT:
            assert model.S.shape == (10, 16)
            optimizer = DLRT(model, torch.optim.Adam, lr=0.01, s_steps=3)
        optimizer.zero_grad()
        model(torch.randn(40, 100)).square().sum().backward()
        optimizer.step()
    assert model.S.shape[0] == 10
    assert torch.allclose(model.V.mT @ model.V, torch.eye(model.V.shape[1]), atol=1e-12)


def test_truncation_with_a_gradient_that_waits_for_its_step_is_refused():
    model = LowRankLinear(8, 8, 2)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, s_steps=3)
    model(torch.randn(6, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(6, 8)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) or zero_grad\(\) first"):
        optimizer.truncate()


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


@pytest.mark.parametrize("steps", [3, 5])
def test_state_round_trips_between_two_moves_of_the_bases(steps):
    data = [batch() for _ in range(8)]
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    options = {"lr": 0.05, "momentum": 0.9, "tau": 0.1, "s_steps": 4}
    optimizer = DLRT(model, torch.optim.SGD, **options)
    train(model, optimizer, data[:steps])
    other = dlrt.to_low_rank(network(), rank=2, skip=["5"])
    resumed = DLRT(other, torch.optim.SGD, **options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, data[steps:])
    train(other, resumed, data[steps:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def random_rotations(model, generator):
    """W stays, U, S, V are written in other orthonormal bases of the same spaces."""
    for layer in low_rank_layers(model):
        P, Q = (torch.linalg.qr(torch.randn(layer.rank, layer.rank, generator=generator)).Q for _ in range(2))
        yield layer, P, Q


def rotate_model(model, optimizer, rotations):
    for layer, P, Q in rotations:
        layer.factors = LowRank(layer.U @ P, P.mT @ layer.S @ Q, layer.V @ Q)
        change_basis(optimizer.state[layer.S], P, Q)


def trajectories(inner, options, rotations_of, steps=4, integrator="augmented"):
    """Two runs from the same weights; in the second one the bases are exchanged before every step."""
    models = [dlrt.to_low_rank(network(), rank=3, skip=["5"])]
    models.append(copy.deepcopy(models[0]))
    optimizers = [DLRT(m, inner, tau=0.02, min_rank=1, integrator=integrator, **options) for m in models]
    for _ in range(steps):
        data = [batch()]
        rotate_model(models[1], optimizers[1], list(rotations_of(models[1])))
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, data)
        yield zip(*map(low_rank_layers, models), strict=True)


@pytest.mark.parametrize("integrator", ["augmented", "parallel", "bug"])
def test_with_momentum_the_trajectory_does_not_depend_on_the_bases(integrator):
    generator = torch.Generator().manual_seed(0)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    exchanges = (torch.optim.SGD, options, lambda model: random_rotations(model, generator))
    for layers in trajectories(*exchanges, integrator=integrator):
        for one, other in layers:
            assert one.rank == other.rank
            assert torch.allclose(one.weight, other.weight, atol=1e-10)


def signed_permutations(model):
    """The changes of basis that Adam, which works entry by entry, cannot feel."""
    for layer in low_rank_layers(model):
        signs = torch.randint(0, 2, (2, layer.rank)) * 2.0 - 1
        P, Q = (torch.eye(layer.rank)[torch.randperm(layer.rank)] * sign for sign in signs)
        yield layer, P, Q


def test_change_of_basis_of_adams_state_is_exact_for_signed_permutations():
    """S is trained alone here: entry by entry, in bases that are mirrored and exchanged before every step."""
    models = [dlrt.to_low_rank(network(), rank=3, skip=["5"])]
    models.append(copy.deepcopy(models[0]))
    optimizers = [DLRT(model, torch.optim.Adam, lr=0.01, amsgrad=True) for model in models]
    for optimizer in optimizers:
        optimizer.freeze_bases()
    for _ in range(4):
        data = [batch()]
        rotate_model(models[1], optimizers[1], list(signed_permutations(models[1])))
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, data)
        for one, other in zip(*map(low_rank_layers, models), strict=True):
            assert torch.allclose(one.weight, other.weight, atol=1e-11)


INNER = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.ASGD, {}),
]


@pytest.mark.parametrize(("inner", "options"), INNER)
def test_augmentation_without_a_gradient_in_the_new_directions_changes_nothing(inner, options):
    small, large = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.zeros(5, 6))
    of_small, of_large = inner([small], lr=0.01, **options), inner([large], lr=0.01, **options)
    for step in range(5):
        small.grad = torch.randn(3, 3)
        if step == 2:  # from here on in larger bases
            of_large.state[large] = copy.deepcopy(of_small.state[small])
            change_basis(of_large.state[large], torch.eye(3, 5), torch.eye(3, 6))
            large.data[:3, :3] = small.data
        if step >= 2:
            large.grad = torch.zeros(5, 6)
            large.grad[:3, :3] = small.grad
            of_large.step()
        of_small.step()
    expected = torch.zeros(5, 6)
    expected[:3, :3] = small.detach()
    assert torch.allclose(large, expected, atol=1e-14)


def test_where_the_gradient_stays_in_the_bases_momentum_moves_s_alone():
    U, V = torch.linalg.qr(torch.randn(6, 3)).Q, torch.linalg.qr(torch.randn(9, 3)).Q
    models = [LowRankLinear(9, 6, 3, bias=False) for _ in range(2)]
    for model in models:
        model.factors = LowRank(U, torch.tensor([3.0, 2.0, 1.0]).diag(), V)
    options = {"lr": 0.05, "momentum": 0.9, "min_rank": 1, "max_rank": 3}
    moving, frozen = (DLRT(model, torch.optim.SGD, tau=0.0, **options) for model in models)
    frozen.freeze_bases()
    for _ in range(5):
        x, target = torch.randn(8, 3) @ V.mT, torch.randn(8, 3) @ U.mT
        for model, optimizer in zip(models, (moving, frozen), strict=True):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-12)
    assert torch.equal(models[1].U, U)


@pytest.mark.parametrize(("inner", "options"), INNER)
@pytest.mark.parametrize("integrator", ["augmented", "parallel"])
def test_any_inner_optimizer_trains_while_the_ranks_move(inner, options, integrator):
    torch.manual_seed(0)
    model = dlrt.to_low_rank(network(), rank=0.5, skip=["5"])
    optimizer = DLRT(model, inner, lr=1e-2, tau=0.1, integrator=integrator, **options)
    x, y = batch(32)
    first = cross_entropy(model(x), y).item()
    last = train(model, optimizer, [(x, y)] * 30).item()
    assert last < first
    for layer in low_rank_layers(model):
        assert optimizer.state[layer.S] == {} or all(
            value.shape == layer.S.shape for value in optimizer.state[layer.S].values() if value.dim() == 2
        )


def test_min_rank_and_max_rank_bound_every_layer():
    model = dlrt.to_low_rank(network(), rank=4)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, tau=0.99, min_rank=3)
    train(model, optimizer, [batch()])
    assert [layer.rank for layer in low_rank_layers(model)] == [3, 3, 3]
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, tau=0.0, max_rank=5)
    train(model, optimizer, [batch()] * 3)
    assert [layer.rank for layer in low_rank_layers(model)] == [5, 5, 4]


def test_initial_ranks_are_the_largest_also_after_a_restart():
    model = dlrt.to_low_rank(network(), rank=5)
    largest = [layer.rank for layer in low_rank_layers(model)]
    options = {"lr": 0.1, "max_rank": "initial"}
    optimizer = DLRT(model, torch.optim.SGD, tau=0.9, **options)
    train(model, optimizer, [batch()])
    smaller = [layer.rank for layer in low_rank_layers(model)]
    assert all(now < then for now, then in zip(smaller, largest, strict=True))
    again = DLRT(model, torch.optim.SGD, tau=0.0, **options)
    again.load_state_dict(optimizer.state_dict())
    again.tau = 0.0
    train(model, again, [batch()] * 4)
    assert [layer.rank for layer in low_rank_layers(model)] == largest
    ones = dlrt.to_low_rank(network(), rank=1)  # below min_rank
    train(ones, DLRT(ones, torch.optim.SGD, tau=0.0, **options), [batch()] * 2)
    assert {layer.rank for layer in low_rank_layers(ones)} == {1}
    with pytest.raises(ValueError, match="max_rank must be a whole number, \"initial\" or None, got 'all'"):
        DLRT(ones, torch.optim.SGD, lr=0.1, max_rank="all")


def test_state_round_trips_between_different_ranks_and_training_continues_alike():
    data = [batch() for _ in range(6)]
    model = dlrt.to_low_rank(network(), rank=5, skip=["5"])
    optimizer = DLRT(model, torch.optim.Adam, lr=0.01, tau=0.05, min_rank=1)
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = dlrt.to_low_rank(network(), rank=2, skip=["5"])
    resumed = DLRT(other, torch.optim.Adam, lr=1.0, tau=0.5, min_rank=1)
    with pytest.raises(ValueError, match="load the model's state first"):
        resumed.load_state_dict(state["optimizer"])
    with pytest.raises(ValueError, match="the state must be a DLRT's, got one without its part"):
        resumed.load_state_dict(optimizer.inner.state_dict())
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert resumed.tau == 0.05
    train(model, optimizer, data[3:])
    train(other, resumed, data[3:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    ],
)
def test_schedulers_reach_the_inner_optimizer(scheduler):
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    schedule = scheduler(optimizer)
    for loss in (1.0, 2.0, 3.0):
        train(model, optimizer, [batch()])
        schedule.step(loss) if isinstance(
            schedule, torch.optim.lr_scheduler.ReduceLROnPlateau
        ) else schedule.step()
    assert optimizer.inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1


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


def test_freeze_bases_trains_s_and_the_rest_only():
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    train(model, optimizer, [batch()])
    optimizer.freeze_bases()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, [batch(), batch()])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith((".U", ".V")), name


def test_mistakes_are_named():
    model = dlrt.to_low_rank(network(), rank=3)
    x, y = batch()
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    cross_entropy(model.eval()(x), y).backward()
    with pytest.raises(RuntimeError, match=r"0 has a gradient but recorded nothing.*model.train\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    cross_entropy(model.train()(x * float("nan")), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"gradient of 0 is not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        DLRT(model, torch.optim.SGD, lr=0.1, integrator="bug").step()
    with pytest.raises(ValueError, match=r"whole number from 1 on, and 1 with .bug., got 2"):
        DLRT(model, torch.optim.SGD, lr=0.1, integrator="bug", s_steps=2)
    with pytest.raises(ValueError, match="augmented, parallel, bug, got 'foo'"):
        DLRT(model, torch.optim.SGD, lr=0.1, integrator="foo")
    with pytest.raises(ValueError, match=r"\[0, 1\), got -0.1"):
        DLRT(model, torch.optim.SGD, lr=0.1, tau=-0.1)
    with pytest.raises(ValueError, match="got 4 and 3"):
        DLRT(model, torch.optim.SGD, lr=0.1, min_rank=4, max_rank=3)
    with pytest.raises(ValueError, match=r"Rprop keeps .*step_size"):
        DLRT(model, torch.optim.Rprop, lr=0.1)
    with pytest.raises(ValueError, match="LBFGS cannot be the inner optimizer"):
        DLRT(model, torch.optim.LBFGS)


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


def test_momentum_of_bug_is_projected_onto_the_new_bases():
    layer = LowRankLinear(7, 6, 2, bias=False)
    optimizer = DLRT(layer, torch.optim.SGD, lr=0.05, momentum=0.9, integrator="bug")
    x, target = torch.randn(8, 7), torch.randn(8, 6)
    gradients = []

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum()
        loss.backward()
        gradients.append(layer.S.grad.clone())
        return loss

    optimizer.step(closure)
    M, U, V = (T.detach().clone() for T in (optimizer.state[layer.S]["momentum_buffer"], layer.U, layer.V))
    optimizer.step(closure)
    projected = layer.U.mT @ U @ M @ V.mT @ layer.V
    assert not torch.allclose(projected, M, rtol=1e-2)  # the bases did turn
    expected = 0.9 * projected + gradients[-1]
    assert torch.allclose(optimizer.state[layer.S]["momentum_buffer"], expected, atol=1e-11)


def test_centred_rmsprop_stays_finite_while_the_bases_turn():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(20, 15, 7), nn.Tanh(), LowRankLinear(15, 4, 2))
    optimizer = DLRT(model, torch.optim.RMSprop, lr=1e-3, centered=True, tau=0.05)
    losses = [
        train(model, optimizer, [(torch.randn(64, 20), torch.arange(64) % 4)]).item() for _ in range(100)
    ]
    assert all(loss == loss for loss in losses)


def test_a_compiled_network_trains_while_its_ranks_move():
    model = dlrt.to_low_rank(network(), rank=4, skip=["5"])
    other = copy.deepcopy(model)
    data = [batch() for _ in range(5)]
    for net, forward in ((model, model), (other, torch.compile(other, backend="eager"))):
        train(forward, DLRT(net, torch.optim.SGD, lr=0.2, tau=0.2), data)
    for one, two in zip(*map(low_rank_layers, (model, other)), strict=True):
        assert one.rank == two.rank
        assert torch.allclose(one.weight, two.weight, atol=1e-12)


def test_weights_of_another_rank_without_their_optimizer_state_are_refused():
    model = dlrt.to_low_rank(network(), rank=4, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.0, min_rank=1)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, [batch()])
    model.load_state_dict(best)
    with pytest.raises(RuntimeError, match="0 has a new rank: load the optimizer's state"):
        train(model, optimizer, [batch()])


def test_a_copy_of_the_optimizer_alone_is_refused():
    with pytest.raises(TypeError, match="belongs to its model"):
        copy.deepcopy(DLRT(dlrt.to_low_rank(network()), torch.optim.SGD, lr=0.1))


def test_without_a_low_rank_model_it_says_what_to_do():
    with pytest.raises(ValueError, match="to_low_rank"):
        DLRT(network(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="must be the model itself, not generator"):
        DLRT(dlrt.to_low_rank(network()).parameters(), torch.optim.SGD, lr=0.1)


def test_a_model_may_change_its_type_between_steps():
    model = dlrt.to_low_rank(network().float(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = batch()
    train(model, optimizer, [(x.float(), y)])
    train(model.double(), optimizer, [(x, y)])
    assert all(layer.S.dtype == torch.float64 for layer in low_rank_layers(model))


def test_a_refused_optimizer_leaves_the_layers_alone():
    model = dlrt.to_low_rank(network(), rank=4)
    with pytest.raises(ValueError, match="learning rate"):
        DLRT(model, torch.optim.SGD, lr=-1.0)
    assert all(layer.gradient is None for layer in low_rank_layers(model))

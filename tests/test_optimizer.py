"""DLRT: a step is the integrator's step, and ordinary loops need no change."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

import dlrt
from dlrt import DLRT, LowRank, LowRankConv2d, LowRankLinear, integrators
from dlrt.step_checks import check_finite

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
        if getattr(optimizer, "group", {"integrator": "parallel"})["integrator"] != "parallel":
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
    return [
        (layer if isinstance(layer, dlrt.LowRankLayer) else dlrt.LowRankLayer).as_matrix(same.weight.grad)
        for layer, same in zip(model, dense, strict=True)
        if isinstance(same, nn.Linear | nn.Conv2d)
    ]


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


def factors_of(model):
    return [LowRank(*(T.detach().clone() for T in (L.U, L.S, L.V))) for L in low_rank_layers(model)]


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


@pytest.mark.parametrize(("momentum", "parts"), [(0.0, 1), (0.9, 2)])
def test_with_several_s_steps_the_bases_move_once_and_s_is_trained_in_them(momentum, parts):
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    data, h, tau = [batch() for _ in range(3)], 0.2, 0.05
    expected = copy.deepcopy(model)
    gradients = dense_gradients(model, *data[0])
    for layer, Y, G in zip(low_rank_layers(expected), factors_of(model), gradients, strict=False):
        layer.factors, _ = integrators.augment(Y, G @ Y.V, G.mT @ Y.U)
    options = {"lr": h, "momentum": momentum}
    sgd = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], **options)
    closure_of(expected, sgd, *data[0])()
    for layer in low_rank_layers(expected):
        layer.S.grad[3:, 3:] = 0  # outside the tangent space
    sgd.step()
    train(expected, sgd, data[1:])
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
    options = {"lr": 0.1, "max_rank": "initial", "allot_every": 1}
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


@pytest.mark.parametrize("ranks", [{"tau": 0.2}, {"compression": 0.6, "ramp": 40}])
@pytest.mark.parametrize("way", [{}, {"s_steps": 2}, {"integrator": "augmented"}])
def test_ranks_are_decided_every_few_steps_and_constant_in_between(ranks, way):
    model = dlrt.to_low_rank(network(), rank=9)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, allot_every=6, **ranks, **way)
    found = [(0, [6, 9, 4])]
    for step in range(24):
        optimizer.tau = 0.02 * step if "tau" in ranks else 0
        train(model, optimizer, [batch()])
        if all(layer.trains_bases for layer in low_rank_layers(model)):
            found.append((optimizer.group["steps"], [layer.rank for layer in low_rank_layers(model)]))
    first = way.get("s_steps", 1)
    decided = [step for (step, now), (_, then) in zip(found[1:], found, strict=False) if now != then]
    assert len(found) == 1 + 24 // first
    assert len(decided) > 1
    assert all((step - first) % 6 == 0 for step in decided)


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


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["0.U", "0.S", "3.bias"])
def test_an_entry_that_is_not_finite_is_found_and_a_norm_that_overflows_is_no_error(place, bad):
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    x, y = batch()
    cross_entropy(model(x), y).backward()
    gradient = dict(model.named_parameters())[place].grad
    gradient.fill_(0.9 * torch.finfo(gradient.dtype).max)
    check_finite(optimizer.layers, optimizer.param_groups)
    gradient.view(-1)[-1] = bad
    with pytest.raises(FloatingPointError, match=r"is not finite"):
        optimizer.step()


def test_mistakes_are_named():
    model = dlrt.to_low_rank(network(), rank=3)
    x, y = batch()
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    cross_entropy(model(x * float("nan")), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"gradient of 0 is not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for integrator in ("augmented", "bug"):
        with pytest.raises(RuntimeError, match=r"step\(closure\)"):
            DLRT(model, torch.optim.SGD, lr=0.1, integrator=integrator).step()
        with pytest.raises(ValueError, match=r"s_steps > 1 needs integrator=.parallel., got"):
            DLRT(model, torch.optim.SGD, lr=0.1, integrator=integrator, s_steps=2)
    with pytest.raises(ValueError, match="parallel, augmented, bug, got 'foo'"):
        DLRT(model, torch.optim.SGD, lr=0.1, integrator="foo")
    with pytest.raises(ValueError, match=r"\[0, 1\), got -0.1"):
        DLRT(model, torch.optim.SGD, lr=0.1, tau=-0.1)
    with pytest.raises(ValueError, match="got 4 and 3"):
        DLRT(model, torch.optim.SGD, lr=0.1, min_rank=4, max_rank=3)
    for kind in (torch.optim.Adagrad, torch.optim.Rprop, torch.optim.ASGD, torch.optim.LBFGS):
        with pytest.raises(ValueError, match=r"must have momentum or betas: use SGD"):
            DLRT(model, kind, lr=0.1, update="sgd")
    for kind in (torch.optim.Rprop, torch.optim.LBFGS):
        with pytest.raises(ValueError, match=r"update must be given for \w+, one of sgd, muon, adam"):
            DLRT(model, kind, lr=0.1)


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


def test_a_copy_of_the_optimizer_alone_is_refused():
    with pytest.raises(TypeError, match="belongs to its model"):
        copy.deepcopy(DLRT(dlrt.to_low_rank(network()), torch.optim.SGD, lr=0.1))


def test_a_layer_belongs_to_the_last_optimizer_that_was_made_of_it():
    model = dlrt.to_low_rank(network(), rank=3)
    first = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    train(model, first, [batch()])
    second = DLRT(nn.Sequential(model, nn.Linear(4, 4)), torch.optim.SGD, lr=0.1)
    train(model, second, [batch()])
    before = copy.deepcopy(model.state_dict())
    for act in (first.step, first.truncate, first.freeze_bases):
        with pytest.raises(RuntimeError, match=r"0 must belong to the DLRT that steps.*make a new one"):
            act()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = second
    for _ in range(3):  # as where a cell of a notebook is run again
        optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
        train(model, optimizer, [batch()])
    with pytest.raises(ValueError, match="learning rate"):
        DLRT(model, torch.optim.SGD, lr=-1.0)
    other = copy.deepcopy(model)
    train(other, DLRT(other, torch.optim.SGD, lr=0.1), [batch()])
    train(model, optimizer, [batch()])
    dlrt.to_dense(model)
    with pytest.raises(RuntimeError, match="was converted"):
        optimizer.step()


def test_parts_of_a_model_may_have_optimizers_of_their_own():
    model = dlrt.to_low_rank(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), rank=2)
    optimizers = [DLRT(part, torch.optim.SGD, lr=0.1) for part in model]
    before = [layer.weight.detach() for layer in model]
    model(torch.randn(3, 6)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(layer.weight, W) for layer, W in zip(model, before, strict=True))


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
    assert not any(layer.trains_bases for layer in low_rank_layers(model))


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


def test_what_a_largest_rank_leaves_of_a_budget_goes_to_other_layers():
    model = dlrt.to_low_rank(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)))
    with torch.no_grad():
        model[0].S.copy_(torch.diag(torch.linspace(1, 0.9, 40)))  # the first layer alone would take it all
        model[1].S.copy_(torch.diag(torch.logspace(0, -6, 40)))
    optimizer = DLRT(model, torch.optim.SGD, lr=1e-9, compression=0.6, ramp=0, max_rank=8)
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    assert [layer.rank for layer in model] == [8, 8]


def test_weights_of_another_rank_under_a_velocity_are_told_before_anything_moves():
    model = dlrt.to_low_rank(network(), rank=4)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.0)
    train(model, optimizer, [batch()])
    for layer in low_rank_layers(model):
        layer.write(LowRank.from_dense(layer._matrix().detach().flatten(1), rank=2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="load the optimizer's state with the model's"):
        train(model, optimizer, [batch()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("ramp", [0.6, 5.0, True, -1, float("nan")])
def test_a_ramp_is_a_whole_number_of_steps(ramp):
    """A share of the steps, as on the command line, would cut the whole budget at once."""
    with pytest.raises(ValueError, match="ramp must be a whole number"):
        DLRT(dlrt.to_low_rank(network()), torch.optim.SGD, lr=0.1, compression=0.5, ramp=ramp)


@pytest.mark.parametrize("way", [{}, {"s_steps": 5}, {"integrator": "augmented"}])
def test_bases_that_somebody_writes_into_are_noticed_when_ranks_are_decided(way):
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, **way)

    def clamped_steps():
        for _ in range(25):
            train(model, optimizer, [batch()])
            for parameter in model.parameters():
                parameter.data.clamp_(-0.1, 0.1)

    with pytest.raises(ValueError, match="orthonormal"):
        clamped_steps()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_lr": float("nan")}, "update_lr must be a number from 0 on, got nan"),
        ({"update_lr": "big"}, "update_lr must be a number from 0 on, got 'big'"),
        ({"update_lr": -0.1}, "update_lr must be a number"),
        ({"lr": float("nan")}, "lr must be a number from 0 on, got nan"),
        ({"lr": float("inf")}, "lr must be a number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number"),
        ({"min_rank": 2.5}, "min_rank must be a whole number from 1 on, got 2.5"),
        ({"min_rank": "2"}, "min_rank must be a whole number"),
        ({"min_rank": True}, "min_rank must be a whole number"),
        ({"max_rank": 4.0}, "max_rank must be a whole number"),
        ({"max_rank": float("nan")}, "max_rank must be a whole number"),
        ({"max_rank": 0}, "max_rank must be a whole number"),
        ({"tau": "0.1"}, "tau, the share of the norm"),
        ({"tau": float("nan")}, "tau, the share of the norm"),
        ({"compression": "60", "ramp": 5}, r"compression must be a fraction in \(0, 1\), got '60'"),
        ({"compression": float("nan"), "ramp": 5}, "compression must be a fraction"),
        ({"s_steps": 2.0}, "s_steps must be a whole number"),
        ({"allot_every": 0}, "allot_every must be a whole number"),
        ({"integrator": "bug", "compression": 0.5, "ramp": 3}, 'integrator="bug" keeps ranks'),
        ({"integrator": "augmented", "momentum": 0.9, "nesterov": True}, "leave nesterov out"),
        ({"s_steps": 2, "momentum": 0.9, "nesterov": True}, "leave nesterov out"),
    ],
    ids=str,
)
def test_impossible_options_are_named_with_what_must_hold(options, message):
    model = dlrt.to_low_rank(network(), rank=3)
    with pytest.raises(ValueError, match=message):
        DLRT(model, torch.optim.SGD, **{"lr": 0.1, **options})


@pytest.mark.parametrize("kind", ["sgd", None, torch.optim.SGD([torch.zeros(1)], lr=0.1), nn.Linear])
def test_the_second_argument_is_a_class_of_optimizers(kind):
    with pytest.raises(TypeError, match=r"must be a class as torch\.optim\.SGD"):
        DLRT(dlrt.to_low_rank(network(), rank=3), kind, lr=0.1)


def test_a_loaded_state_brings_its_settings_along():
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, s_steps=3, min_rank=1, max_rank="initial", tau=0.02)
    train(model, optimizer, [batch()])
    other = DLRT(model, torch.optim.SGD, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for name in ("s_steps", "min_rank", "max_ranks", "tau", "allot_every", "integrator"):
        assert other.group[name] == optimizer.group[name]


def test_a_state_of_another_kind_of_optimizer_is_refused():
    model = dlrt.to_low_rank(network(), rank=3)
    kinds = (torch.optim.SGD, torch.optim.Adam)
    states = [DLRT(model, kind, lr=0.1).state_dict() for kind in kinds]
    for kind, state, words in zip(
        kinds,
        states[::-1],
        ("with SGD, got one with Adam", "with Adam or AdamW, got one with SGD"),
        strict=True,
    ):
        with pytest.raises(ValueError, match=words):
            DLRT(model, kind, lr=0.1).load_state_dict(state)


def test_a_step_size_of_its_own_needs_one_to_follow():
    model = dlrt.to_low_rank(network(), rank=3)
    with pytest.raises(ValueError, match=r"lr must be above 0, got lr 0\.0 and 0\.1"):
        DLRT(model, torch.optim.SGD, lr=0.0, update_lr=0.1)


def test_the_budget_of_a_network_below_its_least_ranks_is_that_of_these():
    model = dlrt.to_low_rank(network(), rank=1)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, compression=0.3, ramp=10)
    train(model, optimizer, [batch() for _ in range(12)])
    held = dlrt.compression(model)
    assert set(held.ranks.values()) == {2}
    assert held.evaluation_parameters == optimizer.budget  # every layer is low-rank


def test_truncation_between_two_decisions_keeps_the_tolerance():
    model, tau = dlrt.to_low_rank(network()), 0.2
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.0, min_rank=1)
    train(model, optimizer, [batch() for _ in range(3)])
    before, optimizer.tau = factors_of(model), tau
    optimizer.truncate()
    for layer, Y in zip(low_rank_layers(model), before, strict=True):
        assert layer.rank == dlrt.truncate(Y, tau).rank
        assert (layer.factors.dense() - Y.dense()).norm() <= tau * Y.dense().norm()


@pytest.mark.parametrize("name", ["5.weight", "5.bias", "0.bias", "0.S", "3.V"])
def test_a_gradient_that_is_not_finite_moves_nothing_whoever_it_belongs_to(name):
    model = dlrt.to_low_rank(network(), rank=3, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    train(model, optimizer, [batch()])
    closure_of(model, optimizer, *batch())()
    parameter = model.get_parameter(name)
    parameter.grad.view(-1)[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    kind = name.split(".")[0] if name[-1] in "USV" else "a bias, norm or dense layer of shape"
    with pytest.raises(FloatingPointError, match=f"the gradient of {kind}"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_step_size_that_a_scheduler_broke_is_told():
    model = dlrt.to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    closure_of(model, optimizer, *batch())()
    optimizer.group["lr"] = float("nan")
    with pytest.raises(FloatingPointError, match="lr must be finite, got nan"):
        optimizer.step()


def test_bases_stay_orthonormal_in_float32_however_rarely_ranks_are_decided():
    model = dlrt.to_low_rank(nn.Linear(40, 30), rank=8).float()
    optimizer = DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.0, allot_every=10_000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        optimizer.zero_grad()
        x = torch.randn(4, 40, generator=generator, dtype=torch.float32)
        model(x).sub(x[:, :30].sin()).square().mean().backward()
        optimizer.step()
    for basis in (model.U, model.V):
        assert (basis.mT @ basis - torch.eye(model.rank, dtype=torch.float32)).norm() < 2e-5


def test_a_budget_is_met_where_every_epoch_is_shorter_than_the_steps_of_s():
    """Then bases are updated by the truncation at the end of an epoch alone."""
    model = dlrt.to_low_rank(network())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.05, compression=0.5, ramp=12, s_steps=5, min_rank=1)
    for _ in range(8):
        train(model, optimizer, [batch() for _ in range(3)])
        optimizer.truncate()
    assert dlrt.compression(model).evaluation_compression >= 50


def test_a_layer_that_takes_no_part_where_ranks_are_decided_is_cut_when_it_does_again():
    layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 6)])
    model, tau = dlrt.to_low_rank(layers), 0.5
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, tau=tau, min_rank=1, allot_every=4)  # in 1, 5, 9, ...
    for step in range(1, 13):
        optimizer.zero_grad(set_to_none=True)
        model[step % 2](torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    assert all(layer.rank < 6 for layer in model)
    assert sum(optimizer.state[layer.S].get("due", False) for layer in model) <= 1  # the one that was absent


def test_frozen_layers_alone_are_refused():
    model = dlrt.to_low_rank(network(), rank=3)
    for layer in low_rank_layers(model):
        layer.S.requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable, got frozen ones alone: unfreeze an S"):
        DLRT(model, torch.optim.SGD, lr=0.1)


class HostReads(TorchFunctionMode):
    """Counts how often the host waits for numbers of the device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        numbers = ("__bool__", "__int__", "__float__", "__index__")
        names = (*numbers, "item", "tolist", "cpu", "numpy", "equal", "nonzero")
        self.count += getattr(function, "__name__", "") in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"update": "muon"}], ids=str)
def test_between_two_decisions_the_host_waits_once_for_a_step_and_at_most_twice_for_a_basis(options):
    """Whether the gradients are finite, and whether one Gram matrix is accurate, or a second is."""
    model = dlrt.to_low_rank(nn.Sequential(nn.Linear(300, 260), nn.Linear(260, 280)), rank=20)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, momentum=0.9, tau=0.01, **options)
    reads = []
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(64, 300)).square().mean().backward()
        with HostReads() as counted:
            optimizer.step()
        reads.append(counted.count)
    layers = len(low_rank_layers(model))
    between = reads[1:10]  # ranks are decided in the first step and in the eleventh
    assert 1 + 2 * layers <= min(between) <= max(between) <= 1 + 2 * 2 * layers
    assert min(reads[0], reads[10]) > max(between)

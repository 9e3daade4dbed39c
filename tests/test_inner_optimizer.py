"""The inner optimizer's state follows the bases of S, and survives a restart."""

import copy
import io

import pytest
import torch
from test_optimizer import batch, low_rank_layers, network, train
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, LowRank, LowRankLinear
from dlrt.optimizer import change_basis

pytestmark = pytest.mark.usefixtures("float64")

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


def test_full_rank_momentum_is_the_dense_momentum_of_a_square_layer():
    """Where both bases are complete; in a wide or tall layer part of the momentum has no basis to live in."""
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    model = dlrt.to_low_rank(copy.deepcopy(dense), skip=["3"])
    batches = [batch() for _ in range(5)]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    train(dense, torch.optim.SGD(dense.parameters(), **options), batches)
    train(model, DLRT(model, torch.optim.SGD, tau=0.0, **options), batches)
    assert (model[1].weight - dense[1].weight).norm() <= 1e-10 * dense[1].weight.norm()


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


def test_weights_of_another_rank_without_their_optimizer_state_are_refused():
    model = dlrt.to_low_rank(network(), rank=4, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.0, min_rank=1)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, [batch()])
    model.load_state_dict(best)
    with pytest.raises(RuntimeError, match="0 has a new rank: load the optimizer's state"):
        train(model, optimizer, [batch()])

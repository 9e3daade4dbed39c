"""The update rules sgd, muon and adam: at full rank DLRT is the dense optimizer."""

import copy

import pytest
import torch
from small_networks import NETS, OPTIONS, apart
from torch import nn

import dlrt
from dlrt import DLRT
from dlrt.baselines import Muon
from dlrt.velocity import adam, msign

pytestmark = pytest.mark.usefixtures("float64")


def train_both(name, make_dense, make_low_rank, steps=50):
    net, x_shape, y_shape = NETS[name]
    x, y, dense = torch.randn(x_shape), torch.randn(y_shape), net()
    model = dlrt.to_low_rank(copy.deepcopy(dense))
    for net, make in ((dense, make_dense), (model, make_low_rank)):
        optimizer = make(net)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 5)
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).sub(y).square().mean().backward()
            optimizer.step()
            scheduler.step()
    return apart(dense, model)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fifty_full_rank_steps_are_those_of_torchs_sgd(name, options):
    options = {"lr": 0.05, **OPTIONS[options]}
    difference = train_both(
        name,
        lambda net: torch.optim.SGD(net.parameters(), **options),
        lambda net: DLRT(net, torch.optim.SGD, tau=0.0, **options),
        steps=20 if options.get("maximize") else 50,
    )
    assert difference <= 1e-10


@pytest.mark.parametrize(
    ("optimizer_class", "update"),
    [
        (torch.optim.SGD, "sgd"),
        (torch.optim.SGD, "muon"),
        (torch.optim.Adam, "adam"),
        (torch.optim.AdamW, "adam"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"s_steps": 2}, {"integrator": "augmented", "weight_decay": 0.1}], ids=str
)
def test_to_maximize_a_loss_is_to_minimize_its_negative(options, optimizer_class, update):
    (make, shape, _), models = NETS["two layers"], []
    x, net = torch.randn(shape), make()
    for sign in (1, -1):
        models.append(dlrt.to_low_rank(copy.deepcopy(net), rank=3))
        optimizer = DLRT(models[-1], optimizer_class, lr=0.01, update=update, maximize=sign == -1, **options)

        def closure(model=models[-1], optimizer=optimizer, sign=sign):
            optimizer.zero_grad()
            loss = sign * model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    assert apart(dlrt.to_dense(models[0]), models[1]) <= 1e-10


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
    ],
)
def test_full_rank_muon_is_muon_on_the_dense_weight(name, kind, options):
    options = {"lr": 0.05, "weight_decay": 0.01, **options}

    def dense_muon(net):
        layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return Muon(net.parameters(), layers, optimizer_class=kind, **options)

    def low_rank_muon(net):
        return DLRT(net, kind, update="muon", tau=0.0, **options)

    assert train_both(name, dense_muon, low_rank_muon) <= 1e-10


def test_the_polar_factor_is_that_of_the_range_and_turns_with_the_bases():
    D = torch.randn(6, 2) @ torch.randn(2, 8)
    P, Q = (torch.linalg.qr(torch.randn(n, n)).Q for n in (6, 8))
    sign = msign(D)
    assert torch.allclose(torch.linalg.svdvals(sign), torch.tensor([1.0, 1, 0, 0, 0, 0]), atol=1e-12)
    assert torch.allclose(msign(P.mT @ D @ Q), P.mT @ sign @ Q, atol=1e-12)
    assert torch.equal(msign(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_adam_moves_entries_in_new_directions_by_at_most_the_step_size():
    """They have no past squares, and would move by thirty times as much were they taken to be zero."""
    state = {}
    for _ in range(30):
        adam(torch.randn(4, 4), torch.randn(4, 4), state, (0.9, 0.999), 1e-8)
    old = adam(torch.randn(4, 4), torch.randn(4, 4), dict(state), (0.9, 0.999), 1e-8)
    grown = adam(torch.randn(6, 5), 0.01 * torch.randn(6, 5), state, (0.9, 0.999), 1e-8)
    new = torch.ones(6, 5, dtype=bool)
    new[:4, :4] = False
    assert grown[new].abs().max() <= 1
    assert old.abs().max() > 1


@pytest.mark.parametrize("options", [{"tau": 0.05}, {"compression": 0.4, "ramp": 30}], ids=str)
def test_adam_trains_while_new_directions_come_in_at_every_step(options):
    model, x = dlrt.to_low_rank(NETS["two layers"][0]()), torch.randn(64, 12)
    y, optimizer = x[:, :5].sin(), DLRT(model, torch.optim.Adam, lr=0.005, **options)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(x).sub(y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert max(losses) < 1.5 * losses[0]


def test_schedulers_change_the_step_size_of_all_groups_alike():
    model = dlrt.to_low_rank(NETS["two layers"][0]())
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, update="muon", update_lr=0.02)
    assert optimizer.group["lr"] * optimizer.group["update_share"] == pytest.approx(0.02)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}

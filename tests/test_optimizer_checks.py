"""DLRT: what is refused, in one line and before anything moves."""

import copy

import pytest
import torch
from small_networks import batch, closure_of, low_rank_layers, network, train
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, LowRank, LowRankLinear
from dlrt.step_checks import check_finite

pytestmark = pytest.mark.usefixtures("float64")


def test_truncation_with_a_gradient_that_waits_for_its_step_is_refused():
    model = LowRankLinear(8, 8, 2)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, s_steps=3)
    model(torch.randn(6, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(6, 8)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) or zero_grad\(\) first"):
        optimizer.truncate()


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


def test_without_a_low_rank_model_it_says_what_to_do():
    with pytest.raises(ValueError, match="to_low_rank"):
        DLRT(network(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="must be the model itself, not generator"):
        DLRT(dlrt.to_low_rank(network()).parameters(), torch.optim.SGD, lr=0.1)


def test_a_refused_optimizer_leaves_the_layers_alone():
    model = dlrt.to_low_rank(network(), rank=4)
    with pytest.raises(ValueError, match="learning rate"):
        DLRT(model, torch.optim.SGD, lr=-1.0)
    assert not any(layer.trains_bases for layer in low_rank_layers(model))


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
        (
            {"compression": 0.5, "ramp": 5, "cut_by": "size"},
            "cut_by must be one of loss, weights, got 'size'",
        ),
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


def test_frozen_layers_alone_are_refused():
    model = dlrt.to_low_rank(network(), rank=3)
    for layer in low_rank_layers(model):
        layer.S.requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable, got frozen ones alone: unfreeze an S"):
        DLRT(model, torch.optim.SGD, lr=0.1)

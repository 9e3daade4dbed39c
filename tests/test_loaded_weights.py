"""Weights that others write between steps: their rank stays, their bases train, and the velocity follows."""

import copy

import pytest
import torch
from torch import nn

import dlrt
from dlrt import DLRT, LowRankLinear

pytestmark = pytest.mark.usefixtures("float64")


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.randn(8, 9)).square().mean().backward()
    optimizer.step()


def in_mid_cycle(rank=3, **options):
    """A layer 9 -> 7 whose bases rest, augmented, and its optimizer."""
    layer = LowRankLinear(9, 7, rank)
    optimizer = DLRT(nn.Sequential(layer), torch.optim.SGD, lr=0.01, tau=0.0, s_steps=4, **options)
    for _ in range(5):
        step(layer, optimizer)
    assert not layer.trains_bases
    return layer, optimizer


@pytest.mark.parametrize("then", ["steps", "truncate", "freeze_bases"])
@pytest.mark.parametrize("options", [{}, {"compression": 0.2, "ramp": 1000}])
def test_weights_that_are_loaded_while_bases_rest_keep_their_rank(then, options):
    layer, optimizer = in_mid_cycle(**options, allot_every=1000)
    other = LowRankLinear(9, 7, 7)
    layer.load_state_dict(other.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if then == "steps":
        for _ in range(4):
            step(layer, optimizer)
    elif then == "truncate" or not options:
        getattr(optimizer, then)()
    assert torch.allclose(layer.weight, other.weight, atol=1e-12)


@pytest.mark.parametrize("update", ["sgd", "muon"])
def test_weights_with_augmented_bases_are_loaded_while_bases_train(update):
    """They rest then, up to the next basis update."""
    layer, optimizer = in_mid_cycle(rank=4, momentum=0.9, update=update, max_rank="initial")
    augmented = copy.deepcopy(layer.state_dict())
    assert augmented["S"].shape == (7, 8)
    optimizer.truncate()
    assert layer.trains_bases
    layer.load_state_dict(augmented)
    for _ in range(5):
        step(layer, optimizer)
    assert layer.rank <= 7


def test_after_both_states_are_loaded_the_velocity_follows_to_other_weights():
    """Resumed, and then back to the best weights, without a step in between: as without the resumption."""
    found = []
    for resumed in (False, True):
        torch.manual_seed(0)
        layer = LowRankLinear(9, 7, 3)
        optimizer = DLRT(nn.Sequential(layer), torch.optim.SGD, lr=0.01, tau=0.0, momentum=0.9, max_rank=3)
        best = copy.deepcopy(layer.state_dict())
        for _ in range(3):
            step(layer, optimizer)
        states = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
        if resumed:
            layer.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        layer.load_state_dict(best)
        step(layer, optimizer)
        found.append(layer.weight)
    assert torch.equal(*found)


def test_bug_cuts_what_another_optimizer_has_augmented_and_trains_its_bases():
    layer, _ = in_mid_cycle(rank=4)
    optimizer = DLRT(nn.Sequential(layer), torch.optim.SGD, lr=0.01, integrator="bug")

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 9)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = layer.U.clone()
    optimizer.step(closure)
    assert layer.trains_bases
    assert not torch.equal(layer.U, before)


@pytest.mark.parametrize("s_steps", [1, 4])
def test_truncation_follows_a_model_that_changes_its_type(s_steps):
    model = dlrt.to_low_rank(nn.Sequential(nn.Linear(9, 7)).float(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, momentum=0.9, s_steps=s_steps)
    model(torch.randn(8, 9).float()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.double()
    optimizer.truncate()
    assert optimizer.state[model[0].S]["velocity"].dtype == torch.float64


def test_a_layer_whose_bases_rest_can_be_drawn_anew():
    layer, optimizer = in_mid_cycle(rank=4)
    layer.reset_parameters()
    assert layer.S.shape[0] == layer.S.shape[1]
    step(layer, optimizer)

"""What is kept costs what it holds and lies in one piece, and so serialisers of all kinds take it."""

import copy
import io
import re

import pytest
import torch
from small_networks import closure_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import dlrt
from dlrt import DLRT, LowRank, integrators, to_low_rank
from dlrt.baselines import plain_factors
from dlrt.convert import load_factors
from dlrt.lowrank import truncate

FIXED = {"tau": 0.0, "max_rank": "initial"}
SGD = {"optimizer_class": torch.optim.SGD, "momentum": 0.9}
ADAM = {"optimizer_class": torch.optim.Adam}
TRAININGS = {
    "parallel": {**SGD, "nesterov": True, "weight_decay": 0.01},
    "s_steps": {**SGD, "s_steps": 3},
    "muon, budget": {**SGD, "update": "muon", "compression": 0.7, "ramp": 5, "allot_every": 2},
    "adam": ADAM,
    "adam, augmented": {**ADAM, "integrator": "augmented"},
    "bug": {**SGD, "integrator": "bug"},
}


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1, stride=2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 10))


def closure_for(model, optimizer):
    return closure_of(model, optimizer, torch.randn(16, 3, 8, 8), torch.arange(16) % 10)


def trained(steps=4, spatial=False, optimizer_class=torch.optim.SGD, **options):
    model = to_low_rank(network(), rank=0.6, spatial=spatial)
    optimizer = DLRT(model, optimizer_class, lr=0.01, **options)
    closure = closure_for(model, optimizer)
    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer, closure


def tensors_of(state):
    return [value for entry in state.values() for value in entry.values() if torch.is_tensor(value)]


def assert_alone(tensors):
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def assert_compact(tensors):
    assert_alone(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_a_matrix_holds_no_more_than_its_factors():
    A, F = torch.randn(40, 30), torch.randn(40, 30)
    Y = LowRank.from_dense(A, 4)
    assert_compact([Y.U, Y.S, Y.V])
    for Y1 in (
        LowRank.from_dense(A, 1),
        LowRank.from_dense(A, tau=0.3),
        Y.T,
        truncate(LowRank.from_dense(A), 0.3),
        integrators.parallel_bug(Y, F, tau=0.2),
        integrators.augmented_bug(Y, F, max_rank=5),
        integrators.bug(Y, F),
        integrators.strang(Y, F, F),
    ):
        assert_alone([Y1.U, Y1.S, Y1.V])


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("name", TRAININGS)
def test_weights_gradients_and_velocities_hold_no_more_than_they_are_at_any_step(name, spatial):
    model, optimizer, closure = trained(0, spatial, **TRAININGS[name])
    kept = lambda: [*model.parameters(), *tensors_of(optimizer.state)]  # noqa: E731
    for _ in range(5):
        optimizer.step(closure)
        assert_compact(kept())
        closure()
        assert_compact([p.grad for p in model.parameters() if p.grad is not None])
    with io.BytesIO() as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        assert file.tell() < sum(tensor.nbytes for tensor in kept()) + 1_000 * len(kept())
    optimizer.zero_grad()
    optimizer.freeze_bases()
    assert_compact(kept())


@pytest.mark.parametrize("spatial", [False, True])
def test_what_is_made_of_a_network_holds_no_more_than_it_is(spatial):
    model, *_ = trained(spatial=spatial)
    assert_compact(load_factors(network(), model.state_dict()).parameters())
    for make in (copy.deepcopy, dlrt.export, lambda net: dlrt.average([net, net])):
        assert_compact(make(model).parameters())
    assert_compact(plain_factors(network(), 0.3).parameters())
    for options in ({}, {"tau": 0.3}, {"compression": 0.5}):
        low_rank = to_low_rank(network(), spatial=spatial, **options)
        assert_compact(low_rank.parameters())
        assert_compact(dlrt.to_dense(low_rank).parameters())


@pytest.mark.parametrize("name", TRAININGS)
def test_parameters_go_into_one_vector_and_back_between_steps(name):
    model, optimizer, closure = trained(**TRAININGS[name])
    before = closure()
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    assert closure() == before
    optimizer.step(closure)


def test_safetensors_takes_every_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for spatial in (False, True):
        model, *_ = trained(spatial=spatial)
        for net in (model, dlrt.export(model), dlrt.to_dense(copy.deepcopy(model))):
            safetensors.save_file(net.state_dict(), tmp_path / "model.safetensors")
            net.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))


def test_in_shared_memory_steps_are_in_place_and_a_rank_that_would_change_is_refused():
    model = to_low_rank(network(), rank=0.6).share_memory()
    places = [p.data_ptr() for p in model.parameters()]
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, **FIXED)
    optimizer.step(closure_for(model, optimizer))
    assert [p.data_ptr() for p in model.parameters()] == places
    optimizer = DLRT(model, torch.optim.SGD, lr=0.01, tau=0.5)
    with pytest.raises(RuntimeError, match=r"rank of 0 would change.*keep ranks"):
        optimizer.step(closure_for(model, optimizer))


def write_refusal_of_shards(_process, when, file):
    """Write to a file what a DLRT, or its step, says of factors that are sharded; in a process of its own."""
    torch.set_num_threads(1)  # the threads of the process before are not there
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model, mesh = to_low_rank(network(), rank=0.6), init_device_mesh("cpu", (1,))
    try:
        if when == "before":
            fully_shard(model, mesh=mesh)
        optimizer = DLRT(model, torch.optim.SGD, lr=0.01)
        if when == "after":
            fully_shard(model, mesh=mesh)
            optimizer.step(closure_for(model, optimizer))
    except ValueError as error:
        file.write_text(str(error))


@pytest.mark.parametrize("when", ["before", "after"])
def test_factors_that_are_sharded_are_refused(when, tmp_path):
    """The threads of a process group would stop the processes that other tests fork."""
    told = tmp_path / "told"
    torch.multiprocessing.start_processes(write_refusal_of_shards, (when, told), start_method="fork")
    assert re.search(r"factors of 0 must be whole.*DistributedDataParallel", told.read_text())

"""Autocast rounds the maps and never the factors; types and scales of numbers leave a step what it is."""

import copy

import pytest
import torch
from shared import plain
from small_networks import batch, closure_of, low_rank_layers, network
from test_training import BrokenOff, assert_equal_weights, dataset, one_thread, train
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import dlrt
from dlrt import DLRT, LowRank, LowRankLinear, integrators, to_low_rank
from dlrt.curvature import terms
from dlrt.low_rank_options import LowRankOptions
from dlrt.lowrank import truncate
from dlrt.models import MLP
from dlrt.runs import Run
from dlrt.training import fit, train_epoch
from dlrt.velocity import msign

__all__ = ["dataset", "one_thread"]  # fixtures


def test_autocast_trains_about_as_well_as_float32(dataset, tmp_path):
    accuracies = {}
    for amp in (False, "bfloat16", "float16"):
        torch.manual_seed(0)
        model = to_low_rank(MLP(width=64), rank=0.5, skip=["fc5"])
        optimizer = DLRT(model, torch.optim.SGD, lr=0.03, momentum=0.9)
        scheduler = CosineAnnealingLR(optimizer, T_max=6)  # without it the last epochs differ by chance
        recipe = plain(epochs=6, batch_size=32, tau=0.05, amp=amp)
        run = Run(tmp_path / str(amp))
        run.folder.mkdir()
        metrics = fit(model, optimizer, scheduler, dataset, recipe, run, {}, quiet=True)
        accuracies[amp] = metrics["validation_accuracy"].max()
        for layer in low_rank_layers(model):
            for factor in (layer.U, layer.S, layer.V):
                assert factor.dtype == torch.float32
            for basis in (layer.U, layer.V):
                assert torch.allclose(basis.mT @ basis, torch.eye(layer.rank), atol=1e-5)
    assert accuracies[False] > 85
    for amp in ("bfloat16", "float16"):
        assert abs(accuracies[amp] - accuracies[False]) < 2  # a sample of 360 leaves about a point of doubt


def test_a_step_inside_an_autocast_region_rounds_no_factor():
    model = to_low_rank(network(), rank=3, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    for layer in low_rank_layers(model):
        for basis in (layer.U, layer.V):
            assert basis.dtype == torch.float32
            assert torch.allclose(basis.mT @ basis, torch.eye(layer.rank), atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_a_loss_scale_changes_nothing():
    models = [to_low_rank(network(), rank=3, skip=["5"])]
    models.append(copy.deepcopy(models[0]))
    options = {"lr": 0.3, "momentum": 0.9, "tau": 0.02}
    plain, scaled = (DLRT(model, torch.optim.SGD, **options) for model in models)
    scaler = GradScaler("cpu", init_scale=1024.0)  # a power of two, as its own are: exact
    for _ in range(4):
        x, y = batch()
        for optimizer in (plain, scaled):
            optimizer.zero_grad()
        cross_entropy(models[0](x), y).backward()
        plain.step()
        scaler.scale(cross_entropy(models[1](x), y)).backward()
        scaler.step(scaled)
        scaler.update()
    for one, other in zip(*map(low_rank_layers, models), strict=True):
        assert one.rank == other.rank
        assert (one.weight - other.weight).norm() <= 1e-10 * one.weight.norm()


def test_a_gradient_that_overflows_moves_nothing_and_lowers_the_scale():
    model = to_low_rank(network(), rank=3, skip=["5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    scaler = GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal_weights(before, model.state_dict())
    assert scaler.get_scale() == 2.0**39


def test_an_epoch_may_end_with_a_step_that_overflowed_before_the_bases_are_updated(dataset, tmp_path):
    model = to_low_rank(MLP(width=16), rank=3, skip=["fc5"])
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, s_steps=100)
    x, y = next(dataset.train.batches(64))
    cross_entropy(model(x), y).backward()
    optimizer.step()  # the first of a hundred
    recipe = plain(epochs=1, batch_size=64, tau=0.1, amp="float16")
    scaler = GradScaler("cpu", init_scale=2.0**60)  # no step of the epoch counts
    train_epoch(model, optimizer, dataset, recipe, 1, Run(tmp_path), quiet=True, scaler=scaler)
    for layer in low_rank_layers(model):
        assert layer.trains_bases
        assert layer.S.grad is None


def test_products_that_overflow_alone_move_nothing_and_lower_the_scale():
    """The K- or the L-gradient is infinite, and the S-gradient 0."""
    for in_U, in_V in ((False, True), (True, False)):
        layer = LowRankLinear(4, 4, 1, bias=False)
        e = torch.eye(4)[:, :2]
        layer.factors = LowRank(e[:, :1], torch.ones(1, 1), e[:, :1])
        optimizer, scaler = DLRT(layer, torch.optim.SGD, lr=0.1), GradScaler("cpu", init_scale=1.0)
        before = copy.deepcopy(layer.state_dict())
        x = 250 * e[:, 0 if in_V else 1].expand(3, 4)
        g = 250 * e[:, 0 if in_U else 1].expand(3, 4)
        with torch.autocast("cpu", torch.float16):
            y = layer(x.clone().requires_grad_())
        scaler.scale(y).backward(g.half())  # Σ gᵀ x = 3 · 250²
        assert layer.S.grad == 0
        scaler.step(optimizer)
        scaler.update()
        assert_equal_weights(before, layer.state_dict())
        assert scaler.get_scale() == 0.5


def test_a_resumed_float16_run_ends_bit_for_bit_as_an_uninterrupted_one(dataset, tmp_path):
    recipe = plain(epochs=3, batch_size=64, tau=0.1, amp="float16")
    options = {"integrator": "parallel"}
    straight, _ = train(dataset, Run(tmp_path / "straight"), recipe, **options)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, BrokenOff(tmp_path / "broken"), recipe, **options)
    resumed, _ = train(dataset, Run(tmp_path / "broken"), recipe, seed=7, **options)
    assert_equal_weights(straight.state_dict(), resumed.state_dict())
    last, also_last = (Run(tmp_path / name).load() for name in ("straight", "broken"))
    assert last["scaler"] == also_last["scaler"] != {}


def test_amp_names_a_type_and_is_bfloat16_where_it_names_none(capsys):
    def amp(*flags):
        return LowRankOptions.parse("", flags).amp

    assert [amp(), amp("--amp"), amp("--amp", "float16")] == [False, "bfloat16", "float16"]
    with pytest.raises(SystemExit):
        amp("--amp", "float16", "--integrator", "bug")
    assert "a loss scale one: --amp bfloat16" in capsys.readouterr().err


def assert_near(A, B, tolerance):
    assert (A.double() - B.double()).norm() <= tolerance * B.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 0.5}, {"tau": 0.3}, {"compression": 0.4}, {"rank": 0.5, "spatial": True}],
    ids=str,
)
def test_half_precision_weights_are_decomposed_in_float32(options, dtype):
    half, x = network().to(dtype), batch()[0]
    single = to_low_rank(copy.deepcopy(half).float(), **options)
    half = to_low_rank(half, **options)
    assert dlrt.compression(half).ranks == dlrt.compression(single).ranks
    rounding = 20 * torch.finfo(dtype).eps
    for name, sigma in dlrt.singular_values(half).items():
        assert_near(sigma, dlrt.singular_values(single)[name], rounding)
    dense = dlrt.to_dense(copy.deepcopy(half))
    for net in (half, dense, dlrt.export(half), dlrt.average([half, half])):
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert_near(net(x.to(dtype)), single(x), rounding)


def test_a_step_in_half_precision_is_refused_in_one_line():
    model = to_low_rank(network(), rank=3)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        refused = pytest.raises(ValueError, match=f"must be float32 or float64, got {dtype}")
        with refused:
            DLRT(half, torch.optim.SGD, lr=0.1)
        with refused:
            model.to(dtype)
            optimizer.step()
        Y, F = half[5].factors, torch.ones(half[5].shape, dtype=dtype)
        for step in (integrators.parallel_bug, integrators.bug, integrators.projector_splitting):
            with refused:
                step(Y, F)


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"s_steps": 2}, {"update": "muon", "integrator": "augmented"}], ids=str)
def test_a_model_keeps_its_type_whatever_the_default_one(options, dtype, default):
    torch.set_default_dtype(dtype)
    try:
        model, (x, y) = network(), batch()
        torch.set_default_dtype(default)
        optimizer = DLRT(to_low_rank(model, tau=0.3), torch.optim.SGD, lr=0.1, momentum=0.9, **options)
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer, x, y))
        velocities = [state["velocity"] for state in optimizer.state.values() if "velocity" in state]
        made = dlrt.export(model).parameters()
        assert {tensor.dtype for tensor in (*model.parameters(), *velocities, *made)} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-24, 1e20, 1e22])
def test_scale_changes_neither_ranks_nor_directions_in_float32(scale):
    A = torch.randn(60, 12) @ torch.diag(0.5 ** torch.arange(12)) @ torch.randn(12, 40)
    F, Y = 0.1 * torch.randn(60, 40), LowRank.from_dense(A, 4)
    for step in (
        lambda c: LowRank.from_dense(c * A, tau=0.1),
        lambda c: truncate(LowRank.from_dense(c * A), 0.1),
        *(
            lambda c, step=step, options=options: step(LowRank(Y.U, c * Y.S, Y.V), c * F, **options)
            for step, options in (
                (integrators.parallel_bug, {"tau": 0.1}),
                (integrators.augmented_bug, {"tau": 0.1}),
                (integrators.bug, {}),
                (integrators.projector_splitting, {}),
            )
        ),
    ):
        scaled, plain = step(scale), step(1)
        assert scaled.rank == plain.rank
        assert_near(scaled.dense().double() / scale, plain.dense(), 1e-4)
    assert_near(terms(scale * Y.S).sigma, terms(Y.S).sigma, 1e-4)
    assert_near(msign(scale * F), msign(F), 1e-3)

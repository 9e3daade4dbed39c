"""A low-rank layer is the dense layer of the same weight, and an ordinary module."""

import copy
import gc
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dlrt import DLRT, LowRankConv2d, LowRankLinear, SpatialLowRankConv2d

pytestmark = pytest.mark.usefixtures("float64")

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 3},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular", "stride": 2},
    {"kernel_size": 1, "stride": 2},
]


def pairs():
    yield "linear", nn.Linear(7, 5), torch.randn(4, 7)
    yield "linear without bias", nn.Linear(7, 5, bias=False), torch.randn(4, 7)
    yield "linear, three dimensions", nn.Linear(7, 5), torch.randn(2, 3, 7)
    yield "linear, one vector", nn.Linear(7, 5), torch.randn(7)
    for options in CONVOLUTIONS:
        yield f"conv {options}", nn.Conv2d(3, 5, **options), torch.randn(2, 3, 9, 8)
    yield "conv, one picture", nn.Conv2d(3, 5, 3), torch.randn(3, 9, 8)


def kinds(dense):
    return (LowRankLinear,) if isinstance(dense, nn.Linear) else (LowRankConv2d, SpatialLowRankConv2d)


def low_rank_pairs(rank=None):
    """Every kind of low-rank layer, with the name and the input of the dense one that it is made of."""
    for name, dense, x in pairs():
        for kind in kinds(dense):
            yield f"{name}, {kind.__name__}", dense, kind.from_dense(dense, rank=rank), x


def low_rank(dense, rank=None):
    return kinds(dense)[0].from_dense(dense, rank=rank)


def test_at_full_rank_a_layer_is_the_dense_layer():
    for name, dense, layer, x in low_rank_pairs():
        assert torch.allclose(layer(x), dense(x), rtol=1e-12, atol=1e-12), name
        assert torch.allclose(layer.weight, dense.weight, atol=1e-13), name


def test_at_any_rank_a_layer_is_the_dense_layer_of_its_weight():
    for rank in (1, 2, 3):
        for name, _, layer, x in low_rank_pairs(rank):
            assert layer.rank == rank
            assert torch.allclose(layer(x), layer.to_dense()(x), rtol=1e-12, atol=1e-12), name


def test_gradients_are_those_of_the_dense_layer():
    for name, dense, layer, x in low_rank_pairs():
        x1, x2 = (x.clone().requires_grad_() for _ in range(2))
        layer(x1).sin().sum().backward()
        dense.zero_grad()
        dense(x2).sin().sum().backward()
        G = layer.as_matrix(dense.weight.grad)
        assert torch.allclose(x1.grad, x2.grad, atol=1e-11), name
        assert torch.allclose(layer.S.grad, layer.U.mT @ G @ layer.V, atol=1e-11), name
        if dense.bias is not None:
            assert torch.allclose(layer.bias.grad, dense.bias.grad, atol=1e-11), name
        assert layer.U.grad is None
        assert layer.V.grad is None


GEOMETRIES = """
import random, torch
from dlrt import LowRankConv2d, SpatialLowRankConv2d

random.seed(0)
torch.set_num_threads(1)
for number in range(40):
    kernel = (1, 1) if number % 2 else random.choices((1, 2, 3), k=2)
    stride, padding = random.choices((1, 2, 3), k=2), random.choice((0, 0, 1))
    channels, filters, count = random.randint(1, 9), random.choice((1, 4, 48)), random.choice((1, 4))
    for kind in (LowRankConv2d, SpatialLowRankConv2d):
        for rank in (1, min(kind.as_matrix(torch.empty(filters, channels, *kernel)).shape)):
            layer = kind(channels, filters, kernel, rank, stride, padding)
            layer.to(memory_format=torch.channels_last)
            layer.trains_bases = True
            x = torch.randn(count, channels, 12, 9).to(memory_format=torch.channels_last).requires_grad_()
            for _ in range(3):
                layer(x).square().mean().backward()
            rest = [torch.empty(random.randint(1, 400)) for _ in range(50)]
"""


def test_no_geometry_of_a_convolution_harms_the_heap():
    """Channels-last, torch's gradient of a strided 1 x 1 kernel with few channels writes out of bounds."""
    done = subprocess.run([sys.executable, "-c", GEOMETRIES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bases_are_orthonormal_from_the_start():
    for kind in (LowRankConv2d, SpatialLowRankConv2d, LowRankLinear):
        layer = kind(9, 6, rank=4) if kind is LowRankLinear else kind(2, 6, 3, rank=4)
        for basis in (layer.U, layer.V):
            assert torch.allclose(basis.mT @ basis, torch.eye(4), atol=1e-13)


def test_the_initial_weight_has_the_norm_of_a_dense_one():
    for dense, layer in (
        (nn.Linear(400, 300), LowRankLinear(400, 300, 20)),
        (nn.Conv2d(40, 30, 3), LowRankConv2d(40, 30, 3, rank=20)),
        (nn.Conv2d(40, 30, 3), SpatialLowRankConv2d(40, 30, 3, rank=20)),
    ):
        assert abs(layer.weight.norm() / dense.weight.norm() - 1) < 0.05
        assert abs(layer.bias.norm() / dense.bias.norm() - 1) < 0.3


def test_without_bias_there_is_none_to_train():
    layer = LowRankLinear(4, 3, 2, bias=False)
    assert layer.bias is None
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["S"]


def test_a_state_of_any_rank_loads_into_a_layer_of_any_other_and_keeps_its_layout():
    for make in (
        lambda rank: LowRankLinear(9, 6, rank),
        lambda rank: LowRankConv2d(2, 6, 3, rank=rank),
        lambda rank: SpatialLowRankConv2d(2, 6, 3, rank=rank),
    ):
        for saved, built in ((2, 5), (5, 2), (3, 3)):
            source, target = make(saved), make(built)
            S = target.S
            source.factors = source.factors  # lays the bases out as a training step does
            file = io.BytesIO()
            torch.save(source.state_dict(), file)
            file.seek(0)
            target.load_state_dict(torch.load(file, weights_only=True))
            assert target.rank == saved
            assert target.S is S
            assert torch.equal(target.weight, source.weight)
            assert target.U.stride() == source.U.stride()


def test_the_state_of_a_dense_layer_loads_at_full_rank():
    for dense, layer in (
        (nn.Linear(9, 6), LowRankLinear(9, 6, 2)),
        (nn.Conv2d(2, 6, 3), LowRankConv2d(2, 6, 3, rank=2)),
        (nn.Conv2d(2, 6, 3), SpatialLowRankConv2d(2, 6, 3, rank=2)),
    ):
        layer.load_state_dict(dense.state_dict())
        assert layer.rank == min(layer.shape)
        assert torch.allclose(layer.weight, dense.weight, atol=1e-13)
        assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("weight", [torch.ones(6), torch.full((6, 9), float("nan"))])
def test_a_dense_weight_that_has_no_svd_is_told_with_the_others(weight):
    model = nn.Sequential(LowRankLinear(9, 6, 2), LowRankLinear(6, 6, 2))
    state = {
        "0.weight": weight,
        "0.bias": torch.ones(6),
        "1.weight": torch.ones(6, 6),
        "1.bias": torch.ones(7),
    }
    with pytest.raises(
        RuntimeError, match=r"(?s)the weight of 0 must be a finite matrix.*mismatch for 1\.bias"
    ):
        model.load_state_dict(state)


def test_a_convolution_tells_what_is_no_picture():
    for layer in (LowRankConv2d(2, 6, 3, rank=2), SpatialLowRankConv2d(2, 6, 3, rank=2)):
        with pytest.raises(ValueError, match=r"shape \(N, 2, H, W\) or \(2, H, W\), got \(4, 8\)"):
            layer(torch.ones(4, 8))


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        LowRankLinear(9, 6, 2).load_state_dict(LowRankLinear(9, 7, 3).state_dict())


def test_copies_and_pickles_compute_the_same_and_belong_to_no_optimizer():
    layer, x = LowRankConv2d(2, 6, 3, rank=4, padding=1), torch.randn(2, 2, 5, 5)
    optimizer = DLRT(layer, torch.optim.SGD, lr=0.1)
    layer(x).sum().backward()
    assert layer.trains_bases
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.S is not layer.S
        assert not other.trains_bases
        assert [p.requires_grad for p in (other.U, other.S, other.V)] == [False, True, False]
        other(x).sum().backward()
        assert other.U.grad is other.V.grad is None
    assert layer.U.requires_grad
    optimizer.step()


def test_bases_rest_when_their_optimizer_is_gone_and_any_other_leaves_them_orthonormal():
    layer, x = LowRankLinear(12, 9, 3), torch.randn(20, 12)
    optimizer = DLRT(layer, torch.optim.SGD, lr=0.1)
    optimizer = DLRT(layer, torch.optim.SGD, lr=0.1)  # the first one's end does not concern its layers
    gc.collect()
    assert layer.trains_bases
    del optimizer
    gc.collect()
    other = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = copy.deepcopy(layer)
    for _ in range(5):
        other.zero_grad()
        layer(x).square().sum().backward()
        other.step()
    assert torch.equal(layer.U, before.U)
    assert torch.equal(layer.V, before.V)
    assert not torch.equal(layer.S, before.S)


def test_a_layer_that_is_drawn_anew_keeps_its_velocity_as_one_that_is_set():
    x, velocities = torch.randn(20, 12), []
    for anew in (False, True):
        torch.manual_seed(1)
        layer = LowRankLinear(12, 9, 3)
        optimizer = DLRT(layer, torch.optim.SGD, lr=0.01, momentum=0.9, tau=0.0, max_rank=3)
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(2)
        if anew:
            layer.reset_parameters()
        else:
            other = LowRankLinear(12, 9, 3)
            layer.factors = other.factors
            layer.bias.data.copy_(other.bias)
        layer(x).square().sum().backward()
        optimizer.step()
        velocities.append([optimizer.state[factor]["velocity"] for factor in (layer.U, layer.V, layer.S)])
    for one, other in zip(*velocities, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_forward_and_full_backward_hooks_fire():
    layer, seen = LowRankLinear(4, 3, 2), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer.register_full_backward_hook(lambda module, gx, gy: seen.append(gx[0].shape))
    layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert seen == [(5, 3), (5, 4)]


NORMALISERS = {
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm": lambda layer, name: nn.utils.weight_norm(layer, name, dim=None),
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "l1_unstructured": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
    "ln_structured": lambda layer, name: prune.ln_structured(layer, name, 0.5, 2, 0),
    "assignment": lambda layer, name: setattr(layer, name, torch.zeros(5, 6)),
    "registration": lambda layer, name: layer.register_parameter(name, nn.Parameter(torch.zeros(5, 6))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_what_normalises_or_prunes_or_sets_a_weight_is_refused(normaliser):
    for layer, x in (
        (LowRankLinear(6, 5, 3), torch.randn(4, 6)),
        (LowRankConv2d(2, 5, 3, 3), torch.randn(2, 2, 4, 4)),
    ):
        expected, state = layer(x), set(layer.state_dict())
        for name in ("weight", "S", "V"):
            if name != "weight" and normaliser in ("assignment", "registration"):
                continue  # S is a parameter that may be set
            with pytest.raises(TypeError, match="leave this layer dense"):
                NORMALISERS[normaliser](layer, name)
            assert set(layer.state_dict()) == state
            assert name != "weight" or torch.equal(layer(x), expected)


def test_second_derivatives_exist():
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.autograd.gradgradcheck(LowRankLinear(4, 3, 2), (x,))


def test_impossible_layers_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 3\] for a 3 x 4 weight, got 5"):
        LowRankLinear(4, 3, 5)
    with pytest.raises(ValueError, match=r"\[1, 6\] for a 6 x 18 weight, got 0"):
        LowRankConv2d(2, 6, 3, rank=0)
    with pytest.raises(ValueError, match="groups = 1, got 2"):
        LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2))

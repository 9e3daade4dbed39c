"""K-, L- and S-gradient are the ordinary .grad of U, V and S, for every geometry, whatever PyTorch does."""

import copy
import itertools

import pytest
import torch
import torch.utils.checkpoint
from test_layers import low_rank_pairs
from torch import nn
from torch.func import functional_call, grad, vmap

import dlrt
from dlrt import LowRankConv2d, LowRankLinear, SpatialLowRankConv2d

pytestmark = pytest.mark.usefixtures("float64")


def close(A, B):
    return (A - B).norm() <= 1e-10 * B.norm() + 1e-300


def owned(layer):
    """A layer as it is in the hands of a DLRT."""
    layer.trains_bases = True
    return layer


def products_of(layer, G):
    return {"U": G @ layer.V, "S": layer.U.mT @ G @ layer.V, "V": G.mT @ layer.U}


@pytest.mark.parametrize("rank", [1, 2, None])
def test_gradients_of_the_factors_are_the_products_with_the_dense_gradient(rank):
    for name, _, layer, x in low_rank_pairs(rank):
        dense = layer.to_dense()
        owned(layer).zero_grad()
        x1, x2 = (x.clone().requires_grad_() for _ in range(2))
        layer(x1).sin().sum().backward()
        dense(x2).sin().sum().backward()
        for factor, expected in products_of(layer, layer.as_matrix(dense.weight.grad)).items():
            assert close(getattr(layer, factor).grad, expected), (name, factor)
        assert close(x1.grad, x2.grad), name
        assert layer.bias is None or close(layer.bias.grad, dense.bias.grad), name


def test_without_an_optimizer_bases_have_no_gradient_whatever_requires_one():
    for _, _, layer, x in low_rank_pairs(2):
        layer.requires_grad_(True)
        layer(x).sin().sum().backward()
        assert layer.U.grad is None
        assert layer.V.grad is None
        assert layer.S.grad is not None


def test_a_copy_of_a_trained_layer_belongs_to_nobody():
    layer = owned(LowRankLinear(6, 5, 2))
    other = copy.deepcopy(layer)
    other(torch.randn(3, 6)).sum().backward()
    assert other.U.grad is None


def test_train_and_eval_mode_give_the_same_gradients():
    for name, _, layer, x in low_rank_pairs(2):
        owned(layer)
        found = []
        for mode in (True, False):
            layer.zero_grad()
            layer.train(mode)(x).sin().sum().backward()
            found.append([p.grad.clone() for p in layer.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), name


WANTED = [wanted for k in range(1, 6) for wanted in itertools.combinations(("x", "U", "S", "V", "bias"), k)]


def test_a_gradient_is_the_same_whichever_others_are_wanted():
    for name, _, layer, x in low_rank_pairs(2):
        values = {"x": x, **dict(owned(layer).named_parameters())}
        exact = gradients(layer, values, tuple(values))
        for wanted in WANTED:
            for key, value in gradients(layer, values, wanted).items():
                assert (value is not None) == (key in wanted and key in values), (name, wanted)
                assert value is None or close(value, exact[key]), (name, wanted)


def gradients(layer, values, wanted):
    """Those of input and parameters as leaves, of which these require one."""
    leaves = {key: value.detach().clone().requires_grad_(key in wanted) for key, value in values.items()}
    x = leaves["x"]
    loss = functional_call(layer, {key: leaf for key, leaf in leaves.items() if key != "x"}, x).sin().sum()
    if loss.requires_grad:  # not where the bias alone does, of a layer that has none
        loss.backward()
    return {key: leaf.grad for key, leaf in leaves.items()}


class Ignored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.sum()

    @staticmethod
    def backward(ctx, g):
        return None


def test_where_no_gradient_comes_back_none_goes_on():
    for name, _, layer, x in low_rank_pairs(2):
        leaf = x.clone().requires_grad_()
        before = 1 * leaf
        (Ignored.apply(owned(layer)(before)) + before.sum()).backward()
        assert torch.equal(leaf.grad, torch.ones_like(x)), name
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters()), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_and_the_gradient_have_the_memory_format_of_the_input(dtype, rank, memory_format):
    """So that `x.view(len(x), -1)` works after a convolution, and backwards before it."""
    for name, _, layer, x in low_rank_pairs(rank):
        if x.dim() != 4:
            continue
        layer, x = layer.to(dtype), x.to(dtype)
        for mode, own in itertools.product((True, False), repeat=2):
            layer.train(mode).trains_bases = own
            x = x.clone(memory_format=memory_format).requires_grad_()
            before, gradients = x.abs(), []
            before.register_hook(gradients.append)
            y = layer(before)
            y.sin().sum().backward()
            for other in (y, *gradients):
                assert other.is_contiguous(memory_format=memory_format), name


def test_the_dense_weight_of_a_trained_layer_gives_the_same_gradients_as_its_map():
    """For modules that use a layer's weight without calling it."""
    layer, x = owned(LowRankLinear(7, 5, 2)), torch.randn(4, 7)
    layer(x).sin().sum().backward()
    expected = [p.grad for p in (layer.U, layer.S, layer.V)]
    layer.zero_grad()
    nn.functional.linear(x, layer.weight, layer.bias).sin().sum().backward()
    for factor, other in zip((layer.U, layer.S, layer.V), expected, strict=True):
        assert close(factor.grad, other)


def test_in_place_activations_work_and_an_overwritten_input_is_autograds_error():
    for name, _, layer, x in low_rank_pairs(2):
        torch.relu_(owned(layer)(x)).sum().backward()
        if x.dim() == 2:
            buffer = x.clone()
            y = layer(buffer).sin().sum()
            buffer.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()
            assert name


def test_a_step_between_forward_and_backward_pass_is_autograds_error():
    model = nn.Sequential(LowRankLinear(6, 4, 2))
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1, tau=0.0, max_rank=2)
    x = torch.randn(5, 6)
    late = model(x).sin().sum()
    model(x).sin().sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_activation_checkpointing_and_compilation_change_nothing():
    model = nn.Sequential(
        LowRankConv2d(2, 6, 3, rank=2), nn.Tanh(), SpatialLowRankConv2d(6, 5, 3, rank=3), nn.Flatten(),
        LowRankLinear(80, 3, 2),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, dlrt.LowRankLayer):
            owned(module)
    x, found = torch.randn(2, 2, 8, 8), []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ways = (
        model,
        compiled,
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
    )
    for forward in ways:
        model.zero_grad()
        forward(x).sin().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for other in found[1:]:
        assert all(close(one, two) for one, two in zip(other, found[0], strict=True))


def test_functional_calls_with_other_factors_and_gradients_for_each_sample():
    for kind, x in (
        (LowRankLinear(6, 5, 2), torch.randn(4, 6)),
        (LowRankConv2d(2, 9, 3, rank=2), torch.randn(4, 2, 5, 5)),
    ):
        layer = owned(kind)
        factors = {name: p.detach().clone() for name, p in layer.named_parameters()}
        U, V = (torch.linalg.qr(torch.randn(len(factors[name]), 3)).Q for name in "UV")
        factors |= {"U": U, "S": torch.randn(3, 3), "V": V}  # of another rank

        def loss(factors, x, layer=layer):
            return functional_call(layer, factors, x).sin().sum()

        each = vmap(grad(loss), (None, 0))(factors, x[:, None])
        total = grad(loss)(factors, x)
        other = copy.deepcopy(layer)
        other.factors = dlrt.LowRank(*(factors[name] for name in "USV"))
        dense = other.to_dense()
        dense(x).sin().sum().backward()
        expected = products_of(other, other.as_matrix(dense.weight.grad))
        for name in "USV":
            assert close(total[name], expected[name])
            assert close(each[name].sum(0), expected[name])


def test_second_derivatives_through_a_trained_layer_are_refused_not_wrong():
    layer, x = owned(LowRankLinear(6, 5, 2)), torch.randn(4, 6, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_under_autocast_gradients_are_near_and_of_the_factors_type(dtype):
    for name, _, layer, x in low_rank_pairs(2):
        layer, x = owned(copy.deepcopy(layer).float()), x.float()
        layer(x).sum().backward()
        exact = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            layer(x).sum().backward()
        for p, other in zip(layer.parameters(), exact, strict=True):
            assert p.grad.dtype == torch.float32
            assert (p.grad - other).norm() <= 0.05 * other.norm() + 1e-3, name

"""torch.compile takes a low-rank network as one graph, and ranks that move do not compile without end."""

import copy
import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import dlrt
from dlrt import DLRT, LowRank, LowRankConv2d, LowRankLinear, SpatialLowRankConv2d, compiled
from dlrt.gradient import Gradient

RECOMPILE_LIMIT = 8  # of torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    """A convolution, a linear layer that is used twice (once under checkpointing), a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.linear = nn.Linear(24, 24)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(24, 12, bias=False), nn.Linear(12, 4))

    def forward(self, x):
        x = self.conv(x).relu().flatten(1)
        x = checkpoint(self.linear, x, use_reentrant=False).tanh()
        return self.head(self.linear(x))


def low_rank_layers(model):
    return [module for module in model.modules() if isinstance(module, dlrt.LowRankLayer)]


def train(model, forward, integrator="augmented", autocast=False, steps=3):
    """A few steps on one batch; the losses."""
    torch.manual_seed(1)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1, momentum=0.9, tau=0.4, integrator=integrator)
    x, y = torch.randn(16, 1, 4, 4, dtype=next(model.parameters()).dtype), torch.arange(16) % 4

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(forward(x).to(x.dtype), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@pytest.mark.parametrize("integrator", ["augmented", "parallel", "bug"])
def test_a_compiled_network_without_graph_breaks_trains_as_the_eager_one(integrator, float64):
    model = dlrt.to_low_rank(Network(), rank=4)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    assert train(model, model, integrator) == pytest.approx(train(other, compiled, integrator), abs=1e-12)
    for one, two in zip(low_rank_layers(model), low_rank_layers(other), strict=True):
        assert one.rank == two.rank
        assert torch.allclose(one.weight, two.weight, atol=1e-12)
    assert (min(dlrt.compression(model).ranks.values()) < 4) == (integrator != "bug")


def test_autocast_reaches_the_low_rank_layers_of_a_compiled_network():
    model = dlrt.to_low_rank(Network(), rank=4)
    one, two, three = model, copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(two, backend="aot_eager", fullgraph=True)
    losses = train(one, one, autocast=True)
    assert losses == pytest.approx(train(two, compiled, autocast=True), abs=1e-5)
    assert losses != pytest.approx(train(three, three), abs=1e-5)  # it does make a difference


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (LowRankLinear(6, 5, 3), (4, 6)),
        (LowRankConv2d(2, 5, 3, rank=3, stride=2), (4, 2, 8, 8)),
        (SpatialLowRankConv2d(2, 5, 3, rank=3, stride=2), (4, 2, 8, 8)),
    ],
)
def test_the_operators_keep_what_they_promise_the_compiler(layer, shape):
    gradient, x = Gradient(layer, keep_samples=True), torch.randn(shape)
    _, a = compiled._forward(x, layer.S, layer.bias, gradient.number)
    torch.library.opcheck(compiled._forward, (x.requires_grad_(), layer.S, layer.bias, gradient.number))
    g = torch.randn_like(layer(x))
    adjoint = (*(T.detach() for T in (g, x, a, layer.S)), gradient.number, 0)
    for of_x in (True, False):
        torch.library.opcheck(
            compiled._backward, (*adjoint, of_x), test_utils=("test_schema", "test_faketensor")
        )


class Twice(nn.Module):
    """Two calls that a compiler may take for one: the same layer, the same input, the same gradient."""

    def __init__(self):
        super().__init__()
        self.layer = LowRankLinear(6, 5, 3)

    def forward(self, x):
        return self.layer(x) + self.layer(x)


@pytest.mark.usefixtures("float64")
def test_two_equal_calls_of_a_layer_are_recorded_twice():
    model = Twice()
    gradient, x = Gradient(model.layer, keep_samples=True), torch.randn(4, 6)
    products = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(x).square().sum().backward()
        U, S, V = model.layer.factors.U, model.layer.S, model.layer.V
        assert torch.allclose(U.mT @ (gradient @ V), S.grad, atol=1e-12)
        products.append((gradient @ torch.eye(6), gradient.T @ torch.eye(5)))
    for eager, compiled_one in zip(*products, strict=True):
        assert torch.allclose(eager, compiled_one, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_what_is_recorded_does_not_live_in_memory_that_the_compiler_may_reuse():
    layer = LowRankLinear(6, 5, 3)
    gradient, x, g = Gradient(layer, keep_samples=True), torch.randn(4, 6), torch.randn(4, 5)
    G = g.mT @ x
    compiled.compiled_map(x, layer.S, layer.bias, gradient.number).backward(g)
    for reused in (x, g):
        reused.zero_()
    assert torch.allclose(gradient @ torch.eye(6), G)


def test_freezing_between_a_compiled_forward_and_its_backward_pass_is_refused():
    model = dlrt.to_low_rank(Network(), rank=4)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    forward = torch.compile(model, backend="aot_eager")
    loss = forward(torch.randn(16, 1, 4, 4)).sum()
    optimizer.freeze_bases()
    with pytest.raises(RuntimeError, match="take the forward pass again"):
        loss.backward()
    forward(torch.randn(16, 1, 4, 4)).sum().backward()
    assert all(layer.S.grad is not None for layer in optimizer.names)


def graphs_over_moving_ranks(backend, steps=12, **options):
    """How many graphs training and evaluation had compiled after each step, the rank of one layer moving."""
    random.seed(0)
    model = dlrt.to_low_rank(Network(), rank=4)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    counter, counts, x = CompileCounterWithBackend(backend), [], torch.randn(16, 1, 4, 4)
    compiled = torch.compile(model, backend=counter, **options)
    for step in range(steps):
        optimizer.zero_grad()
        compiled(x).sum().backward()
        assert not any(layer.gradient.empty for layer in optimizer.names)
        with torch.no_grad():
            assert torch.allclose(compiled.eval()(x), model(x), atol=1e-5)
        compiled.train()
        counts.append(counter.frame_count)
        layer = low_rank_layers(model)[step % 4]
        rank = random.choice([r for r in range(2, min(layer.shape) + 1) if r != layer.rank])
        U, V = (torch.linalg.qr(torch.randn(side, rank)).Q for side in layer.shape)
        layer.factors = LowRank(U, torch.eye(rank), V)
    return counts


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_with_dynamic_shapes_of_parameters_no_rank_compiles_anew(backend):
    with (
        torch._dynamo.config.patch(force_parameter_static_shapes=False),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        counts = graphs_over_moving_ranks(backend, dynamic=True)
    assert set(counts) == {2}  # one in training and one in evaluation mode


def test_with_torchs_defaults_compilation_ends_at_torchs_limit_and_results_stay_right():
    assert graphs_over_moving_ranks("eager")[-1] == RECOMPILE_LIMIT

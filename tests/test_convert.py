"""A network converts to low rank and back, computing the same, and its parameters are counted."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dlrt
from dlrt.models import MLP, LeNet5

pytestmark = pytest.mark.usefixtures("float64")


def test_at_full_rank_conversion_and_back_leave_the_network_as_it_was():
    for network, spatial in ((LeNet5(), False), (LeNet5(), True), (MLP(width=30), False)):
        x = torch.randn(3, 1, 28, 28)
        expected = network(x)
        assert dlrt.to_low_rank(network, spatial=spatial) is network
        assert torch.allclose(network(x), expected, atol=1e-12)
        assert torch.allclose(dlrt.to_dense(network)(x), expected, atol=1e-12)
        assert not any(isinstance(module, dlrt.LowRankLayer) for module in network.modules())


@pytest.mark.parametrize("spatial", [False, True])
def test_kernels_that_were_channels_last_are_so_again(spatial):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)).to(memory_format=torch.channels_last)
    dlrt.to_dense(dlrt.to_low_rank(network, rank=2, spatial=spatial))
    for layer in network:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert network(torch.randn(2, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(7, [7, 7, 7]), (22, [20, 22, 22]), (0.5, [10, 25, 250]), (0.001, [1, 1, 1]), (1.0, [20, 50, 500])],
)
def test_rank_is_a_number_or_a_share_of_each_layers_full_rank(rank, expected):
    network = dlrt.to_low_rank(LeNet5(), rank=rank, skip=["fc2"])
    assert list(dlrt.compression(network).ranks.values()) == expected
    assert type(network.fc2) is nn.Linear


def test_across_space_a_kernel_has_ranks_and_parameters_of_its_own():
    """5 x 5 kernels as (out 5) x (in 5) matrices, where one layer is 1 x 1 and so the same either way."""
    network = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5), nn.Conv2d(50, 30, 1), nn.Linear(9, 7))
    shapes = [(100, 5), (250, 100), (30, 50), (7, 9)]
    cases = [  # at rank 4 the dense matrix is less in the last layer, at full rank in all of them
        (4, [4] * 4, 4 * (105 + 350 + 80) + 63),
        (1.0, [5, 100, 30, 7], 500 + 25_000 + 1500 + 63),
    ]
    for rank, expected, kept in cases:
        count = dlrt.compression(dlrt.to_low_rank(copy.deepcopy(network), rank=rank, spatial=True))
        assert list(count.ranks.values()) == expected
        assert count.dense_parameters == sum(m * n for m, n in shapes) == 500 + 25_000 + 1500 + 63
        assert count.evaluation_parameters == kept


def test_a_budget_leaves_every_layer_the_smallest_rank():
    """Of a layer with one large singular value it would keep that one."""
    network = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        network[0].weight += 50 * torch.ones(20, 20)
    for smallest in (1, 2, 3):
        cut = dlrt.to_low_rank(copy.deepcopy(network), compression=0.5, min_rank=smallest)
        count = dlrt.compression(cut)
        assert count.ranks["0"] == smallest
        assert count.evaluation_compression >= 50
    with pytest.raises(ValueError, match="min_rank must be a whole number from 1 on, got 0"):
        dlrt.to_low_rank(network, compression=0.5, min_rank=0)


def test_tau_bounds_the_change_of_each_weight():
    network = LeNet5()
    before = {
        name: module.weight.clone() for name, module in network.named_children() if hasattr(module, "weight")
    }
    dlrt.to_low_rank(network, tau=0.3)
    for name, W in before.items():
        change = (network.get_submodule(name).weight - W).norm() / W.norm()
        assert 0 < change <= 0.3


def test_parameters_are_counted_by_hand():
    network = dlrt.to_low_rank(LeNet5(), rank=4, skip=["fc2"])
    count = dlrt.compression(network)
    shapes = [(20, 25), (50, 500), (500, 800)]
    assert count.dense_parameters == sum(m * n for m, n in shapes) + 5000 == 430_500
    assert count.evaluation_parameters == sum(4 * (m + n) for m, n in shapes) + 5000
    assert count.training_parameters == sum(8 * (m + n) + 64 for m, n in shapes) + 5000
    assert count.evaluation_compression == 100 * (1 - count.evaluation_parameters / 430_500)
    assert count.training_compression == 100 * (1 - count.training_parameters / 430_500)
    assert count.ranks == {"conv1": 4, "conv2": 4, "fc1": 4}


def test_a_dense_network_is_not_compressed():
    count = dlrt.compression(LeNet5())
    assert count.evaluation_compression == count.training_compression == 0
    assert count.ranks == {}


def test_skip_takes_whole_branches_and_refuses_unknown_names():
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    dlrt.to_low_rank(network, skip="0")
    assert [type(module).__name__ for module in network.modules() if not list(module.children())] == [
        "Linear",
        "Linear",
        "LowRankLinear",
    ]
    with pytest.raises(ValueError, match=r"skip names no module of the model: 7; it has 0, 0.0, 0.1, 1"):
        dlrt.to_low_rank(network, skip=["7"])


def test_a_module_that_occurs_twice_stays_one():
    linear = nn.Linear(4, 4)
    network = nn.Sequential(linear, nn.ReLU(), linear)
    dlrt.to_low_rank(network, rank=2)
    assert network[0] is network[2]
    assert isinstance(network[0], dlrt.LowRankLinear)
    dlrt.to_dense(network)
    assert network[0] is network[2]


def test_grouped_convolutions_stay_dense_and_it_says_so():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match="0 stays dense"):
        dlrt.to_low_rank(network, rank=2)
    assert [type(module).__name__ for module in network] == ["Conv2d", "LowRankConv2d"]


@pytest.mark.parametrize(
    ("make", "spatial"),
    [
        (lambda: nn.Linear(6, 4), False),
        (lambda: nn.Conv2d(2, 4, 3), False),
        (lambda: nn.Conv2d(2, 4, 3), True),
    ],
)
def test_a_model_that_is_one_layer_is_converted_in_place_too(make, spatial):
    model = make()
    x = torch.randn(3, 6) if type(model) is nn.Linear else torch.randn(3, 2, 5, 5)
    assert dlrt.to_low_rank(model, rank=2, spatial=spatial) is model
    assert list(dlrt.compression(model).ranks.values()) == [2]
    other = make()
    assert dlrt.load_factors(other, model.state_dict()) is other
    assert type(other) is type(model)
    assert torch.equal(other(x), model(x))
    assert dlrt.to_dense(other) is other
    assert type(other) is type(make())
    assert type(dlrt.load_factors(make(), other.state_dict())) is type(other)
    optimizer = dlrt.DLRT(model.eval(), torch.optim.SGD, lr=0.1)
    model(x * float("nan")).sum().backward()
    with pytest.raises(FloatingPointError, match=f"the gradient of {type(model).__name__} is not finite"):
        optimizer.step()


def test_a_model_that_is_one_layer_without_a_low_rank_form_stays_dense_and_it_says_so():
    for model in (nn.Conv2d(4, 4, 3, groups=2), nn.LSTM(4, 4)):
        with pytest.warns(UserWarning, match=f"{type(model).__name__} stays dense"):
            assert dlrt.to_low_rank(model, rank=2) is model


def test_layers_that_share_a_weight_stay_dense_and_it_says_so():
    network = nn.ModuleDict({"words": nn.Embedding(9, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    network["head"].weight = network["words"].weight
    with pytest.warns(UserWarning, match="head stays dense: another module shares its weight"):
        dlrt.to_low_rank(network, rank=2)
    assert network["head"].weight is network["words"].weight
    assert isinstance(network["inner"], dlrt.LowRankLinear)


class Uncalled(nn.Module):
    """A layer that is used in other ways than by its name."""

    def __init__(self, use, conv):
        super().__init__()
        self.use = use
        self.layer = layer = nn.Conv2d(3, 6, 3, padding=1, stride=2) if conv else nn.Linear(8, 6)
        self.held = [layer]
        self.bound = layer.forward
        self.closure = lambda x: layer(x)

    def forward(self, x):
        layer = self.layer
        geometry = ("stride", "padding", "dilation", "groups") if x.dim() == 4 else ()
        function = nn.functional.conv2d if x.dim() == 4 else nn.functional.linear
        others = {
            "called": layer,
            "list": self.held[0],
            "bound": self.bound,
            "closure": self.closure,
            "dtype": lambda x: layer(x.to(layer.weight.dtype)),
            "functional": lambda x: function(
                x, layer.weight, layer.bias, *(getattr(layer, name) for name in geometry)
            ),
        }
        return others[self.use](x)


USES = ("list", "bound", "closure", "dtype", "functional")
OPTIONS = (
    {"tau": 0.05},
    {"update": "muon", "compression": 0.2, "ramp": 2, "allot_every": 1},
    {"tau": 0.05, "s_steps": 2, "momentum": 0.9},
    {"integrator": "augmented"},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["linear", "conv", "spatial"])
def test_a_layer_that_is_used_without_being_called_trains_as_one_that_is(kind, options):
    x = torch.randn(5, 8) if kind == "linear" else torch.randn(5, 3, 6, 6)

    def losses(use):
        torch.manual_seed(1)
        model = dlrt.to_low_rank(Uncalled(use, kind != "linear"), rank=3, spatial=kind == "spatial")
        optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.05, **options)

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        if options.get("integrator") == "augmented":
            return [optimizer.step(closure).item() for _ in range(3)]
        found = []
        for _ in range(3):
            found.append(closure().item())
            optimizer.step()
        return found

    expected = losses("called")
    for use in USES:
        assert losses(use) == pytest.approx(expected, rel=1e-9), use


def subclass():
    return type("Conv2dSame", (nn.Conv2d,), {})(2, 4, 3)


def transposed():
    """x W + b with W (inputs, outputs), as others have it."""
    layer = type("Transposed", (nn.Module,), {"__module__": "a.library"})()
    layer.weight = nn.Parameter(torch.randn(4, 6))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (subclass, "dense: Conv2dSame is a subclass of nn.Conv2d"),
        (lambda: type("Linear8bit", (nn.Linear,), {})(4, 4), "dense: Linear8bit is a subclass of nn.Linear"),
        (transposed, "dense: Transposed has a weight matrix, but is no nn.Linear"),
        (lambda: nn.LazyLinear(4), "dense: it is lazy"),
        (lambda: nn.LazyConv2d(4, 3), "dense: it is lazy"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "dense: it is parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), "dense: it is parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "dense: it has hooks"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "dense: it has hooks"),
        (lambda: dlrt.LowRankLinear(4, 4, 2), "as it is: it is low-rank already"),
        (lambda: nn.LSTM(4, 4), "dense: recurrent layers"),
    ],
)
def test_what_stays_as_it_is_is_named_once_with_the_reason(make, reason):
    network = nn.ModuleDict({"one": make(), "plain": nn.Linear(4, 4), "words": nn.Embedding(5, 4)})
    kept, kind = network["one"], type(network["one"])
    with pytest.warns(UserWarning, match="stays") as told:
        dlrt.to_low_rank(network, rank=2)
    (warning,) = told
    assert str(warning.message).startswith(f"one stays {reason}")
    assert network["one"] is kept
    assert type(kept) is kind
    assert type(network["plain"]) is dlrt.LowRankLinear


def test_mode_type_and_freezing_are_kept():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).float().eval()
    network[0].weight.requires_grad_(False)
    bias = network[1].bias
    dlrt.to_low_rank(network, rank=1)
    assert network[1].S.dtype == network[1].U.dtype == torch.float32
    assert not network[0].training
    assert not network[0].S.requires_grad
    assert network[1].bias is bias


@pytest.mark.parametrize("rank", [0, -3, 0.0, 1.5])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=r"at least 1, a share in \(0, 1\]"):
        dlrt.to_low_rank(MLP(width=8), rank=rank)


def test_lenet5_says_what_it_needs():
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 8 x 8"):
        LeNet5((1, 8, 8))
    assert LeNet5((3, 32, 32), classes=7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("rank", ["8", True, float("nan"), [3]], ids=str)
def test_a_rank_of_another_type_is_refused(rank):
    with pytest.raises((ValueError, TypeError), match="rank must be an int of at least 1"):
        dlrt.to_low_rank(nn.Linear(6, 5), rank=rank)


@pytest.mark.parametrize("model", [None, nn.Linear, torch.zeros(2, 2)], ids=repr)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match=r"must be a model, an nn\.Module, got"):
        dlrt.to_low_rank(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(0, 6), r"a tensor \(N, \.\.\.\), got \(0, 6\)"),
        (torch.zeros(6).numpy(), "got ndarray"),
        (torch.zeros(6), r"got \(6,\)"),
        (torch.full((3, 6), torch.nan), "inputs must be finite"),
    ],
)
def test_inputs_that_are_no_batch_are_refused_and_nothing_has_changed(inputs, message):
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=message):
        dlrt.to_low_rank(model, compression=0.3, inputs=inputs)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"tau": 0.1}, {"compression": 0.5}, {"inputs": torch.ones(2, 6)}], ids=str
)
def test_weights_that_are_not_finite_are_told_by_name(value, options):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[2].weight[0, 1] = value
    with pytest.raises(ValueError, match="weights must be finite, got inf or nan in 2"):
        dlrt.to_low_rank(model, **options)
    assert type(model[0]) is nn.Linear


def test_a_layer_of_no_size_stays_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of what it initialises
        model = dlrt.to_low_rank(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)))
    assert [type(layer) for layer in model] == [dlrt.LowRankLinear, nn.Linear]

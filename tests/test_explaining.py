"""Which networks, layers and targets can be explained, and that a network is left as it was."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.nn.functional import cross_entropy, relu, silu

import dlrt
from dlrt.cams import (
    METHODS,
    check_options,
    default_layer,
    explain,
    network_flags,
    networks,
    spatial_layers,
)
from dlrt.cams.targets import of_classes
from dlrt.models import VGG16, ConvNet, LeNet5, ResNet20


def test_several_classes_on_one_picture_are_summed(resnet):
    model, x = resnet
    both, first, second = (explain(model, x, of_classes([classes] * 2)) for classes in ([1, 5], [1], [5]))
    np.testing.assert_allclose(both.raw, first.raw + second.raw, atol=1e-5)
    assert np.abs(both.raw - first.raw).max() > 1e-2
    predicted = explain(model, x)
    own = explain(model, x, of_classes(predicted.logits.argmax(1)[:, None].tolist()))
    np.testing.assert_array_equal(predicted.raw, own.raw)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ([[ClassifierOutputTarget(1)]], "got 1 for 2"),
        ([[ClassifierOutputTarget(1)], []], "picture 1 has none"),
        ([[ClassifierOutputTarget(1)], [ClassifierOutputTarget(10)]], r"\[0, 9\], got 10"),
        ([[ClassifierOutputTarget(1)], [ClassifierOutputTarget(-1)]], r"\[0, 9\], got -1"),
        ([[ClassifierOutputTarget(1)], [ClassifierOutputTarget(2.5)]], "whole number in .* got 2.5"),
        ([[ClassifierOutputTarget("1")]] * 2, "whole number in .* got '1'"),
        ([[ClassifierOutputTarget(True)]] * 2, "whole number in .* got True"),
        ([ClassifierOutputTarget(1), ClassifierOutputTarget(2)], "None or a list of lists"),
        (ClassifierOutputTarget(1), "None or a list of lists"),
        ([1, 2], r"got \[1, 2\]: dlrt.cams.targets.of_classes makes them of labels"),
        ([[1], [2]], "None or a list of lists"),
        (["1", "2"], "None or a list of lists"),
        (torch.tensor([1, 2]), "None or a list of lists"),
        ([[ClassifierOutputTarget(1)], None], "None or a list of lists"),
        ([[ClassifierOutputTarget]] * 2, "None or a list of lists"),
    ],
)
@pytest.mark.parametrize("method", ["gradcam", "eigencam"])
def test_targets_that_do_not_fit_the_pictures_are_refused(method, targets, told, resnet):
    model, x = resnet
    with pytest.raises(ValueError, match=told):
        explain(model, x, targets, method)


LABELS = {
    "tensor": torch.tensor([1, 5]),
    "array": np.array([1, 5]),
    "numbers": [1, np.int64(5)],
    "lists": [[1], [5]],
    "tensors": [torch.tensor(1), torch.tensor([5])],
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_kind_are_explained(kind, resnet):
    model, x = resnet
    expected = explain(model, x, [[ClassifierOutputTarget(1)], [ClassifierOutputTarget(5)]])
    np.testing.assert_array_equal(explain(model, x, of_classes(LABELS[kind])).raw, expected.raw)


@pytest.mark.parametrize(
    ("layer", "told"), [("nowhere", "no layer 'nowhere'"), ("linear", "give feature maps, got Linear")]
)
@pytest.mark.parametrize("method", ["gradcam", "layercam", "shapleycam"])
def test_a_layer_that_cannot_be_explained_is_refused(method, layer, told, resnet):
    model, x = resnet
    with pytest.raises(ValueError, match=told):
        explain(model, x, method=method, layer=layer)


@pytest.mark.parametrize("method", ["gradcam", "shapleycam", "ablationcam", "fullgrad", "eigencam"])
def test_the_network_is_left_as_it_was(method, resnet):
    model, x = deepcopy(resnet[0]), resnet[1]
    dlrt.to_low_rank(model, rank=0.5)
    cross_entropy(model(x), torch.tensor([1, 2])).backward()
    model.train()
    model.bn1.eval()
    model.layer1.requires_grad_(False)
    before = {
        name: (module.training, getattr(module, "inplace", None)) for name, module in model.named_modules()
    }
    modules = dict(model.named_modules())
    parameters = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    state = deepcopy(model.state_dict())
    numbers = np.random.get_state()[1].copy()  # noqa: NPY002
    explain(model, x, method=method)
    with pytest.raises(IndexError):  # nothing swallows what goes wrong in a target
        explain(model, x, [[lambda logits: logits[..., 99]]] * 2, method="ablationcam")
    assert dict(model.named_modules()) == modules
    for name, module in model.named_modules():
        assert (module.training, getattr(module, "inplace", None)) == before[name]
        assert not module._forward_hooks
    for name, p in model.named_parameters():
        requires_grad, grad = parameters[name]
        assert p.requires_grad == requires_grad
        assert p.grad is grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


@pytest.mark.parametrize("method", ["gradcam", "shapleycam", "layercam"])
def test_a_network_with_frozen_parameters_can_be_explained(method, resnet):
    model, x = resnet
    frozen = deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        maps = explain(frozen, x, method=method)
    np.testing.assert_array_equal(maps.raw, explain(model, x, method=method).raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_precision_is_explained_in_float32(dtype, resnet):
    half = dlrt.to_low_rank(deepcopy(resnet[0]), rank=0.5).to(dtype)
    maps, single = explain(half, resnet[1]), explain(deepcopy(half).float(), resnet[1])
    np.testing.assert_array_equal(maps.raw, single.raw)
    assert {p.dtype for p in half.parameters()} == {dtype}


class Called(nn.Module):
    """A network whose feature maps a function changes, after its input was doubled, in place or not."""

    def __init__(self, function, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.function, self.in_place = function, in_place

    def forward(self, x):
        x = x.mul_(2) if self.in_place else 2 * x
        y = self.conv(x)
        y = self.function(y if self.in_place else y.clone())
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "autocast"],
)
def test_maps_are_the_same_whatever_stands_around(around, resnet):
    model, x = resnet
    maps = explain(model, x)
    with around():
        again = explain(model, x + 0)
    assert np.array_equal(maps.raw, again.raw)


IN_PLACE = {
    "relu": lambda y: relu(y, inplace=True),
    "silu": lambda y: silu(y, inplace=True),
    "module": nn.ELU(inplace=True),
    "method": lambda y: y.clamp_(min=0),
    "sum": lambda y: y.add_(1),
    "part": lambda y: (y[:, :3].mul_(0.5), y)[1],
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("method", METHODS)
def test_what_comes_in_place_after_a_layer_does_not_change_its_map(method, name):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before, layer = x.clone(), None if method == "fullgrad" else "conv"
    one, other = (
        explain(Called(IN_PLACE[name], in_place).eval(), x, method=method, layer=layer)
        for in_place in (True, False)
    )
    np.testing.assert_allclose(one.raw, other.raw, rtol=1e-4, atol=1e-5 * np.abs(other.raw).max())
    assert torch.equal(x, before)


class Permuted(nn.Module):
    """A network with the same feature maps in both layouts, of as many channels as they are wide or not."""

    def __init__(self, channels, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last, self.first = nn.Conv2d(3, channels, 3), nn.Linear(channels, channels), Permute()
        self.head = nn.Linear(channels * size, 4) if size else nn.Linear(channels, 4)
        self.size = size

    def forward(self, x):
        y = self.first(self.last(self.conv(x).permute(0, 2, 3, 1)))
        return self.head(y.relu().flatten(1) if self.size else y.relu().mean((2, 3)))


class Permute(nn.Module):
    def forward(self, y):
        return y.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("channels", "size", "fixed"),
    [
        (6, (8, 8), False),
        (8, (8, 8), False),
        (8, (8, 8), True),
        (6, (6, 12), False),
        (12, (12, 6), True),
    ],
)
@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("fullgrad", "ablationcam", "sess")]
)
def test_channels_last_maps_are_explained_as_those_that_are_permuted(method, channels, size, fixed):
    height, width = size
    model = Permuted(channels, height * width if fixed else None).eval()
    x = torch.randn(2, 3, height + 2, width + 2)
    assert spatial_layers(model, x[:1]) == dict.fromkeys(("conv", "last", "first"), size)
    assert default_layer(model, x[:1]) == "first"
    last, first = (explain(model, x, method=method, layer=layer) for layer in ("last", "first"))
    np.testing.assert_allclose(last.raw, first.raw, rtol=1e-4, atol=1e-5 * np.abs(first.raw).max())


def test_channels_last_maps_are_refused_where_a_method_cannot_take_them():
    with pytest.raises(ValueError, match=r"needs maps \(N, C, H, W\), got channels-last ones from last"):
        explain(Permuted(6).eval(), torch.randn(1, 3, 8, 8), method="ablationcam", layer="last")
    network = networks.Network("p", Permuted(6).eval(), (3, 8, 8), (0,) * 3, (1,) * 3, ("a",), (3, 8, 8))
    with pytest.raises(ValueError, match="ablationcam needs maps"):  # before anything is made
        network_flags.target_layer(network, "last", "ablationcam")
    assert network_flags.target_layer(network, "last", "gradcam") == "last"


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("gradcan", {}, "unknown method"),
        ("sess", {"aug_smooth": True}, "no smoothing"),
        ("fem", {"eigen_smooth": True}, "no eigen"),
        ("fullgrad", {"eigen_smooth": True}, "no eigen"),
    ],
)
def test_what_a_method_cannot_do_is_refused(method, options, told):
    with pytest.raises(ValueError, match=told):
        check_options(method, **options)


def test_the_default_layer_is_the_output_of_the_last_block():
    blocks = ((ResNet20, 3, 32, "layer3"), (LeNet5, 1, 28, "conv2"), (VGG16, 3, 32, "features.42"))
    for kind, channels, side, name in (*blocks, (ConvNet, 1, 32, "features")):
        model, x = kind(), torch.zeros(1, channels, side, side)
        assert default_layer(model, x) == name
        assert name in spatial_layers(model, x)
        assert model.training
    with pytest.raises(ValueError, match="no convolution"):
        default_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 1, 2, 2))

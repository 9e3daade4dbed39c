"""An exported network is plain torch, computes the same, and every way out of torch takes it."""

import copy
import io

import onnxruntime
import pytest
import torch
from torch import nn

import dlrt
from dlrt.models import LeNet5

GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "stride": 3},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "circular", "stride": 2},
]


class Network(nn.Module):
    """Convolutions of several geometries, a linear layer that is used twice, batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(12)
        self.same = nn.Conv2d(12, 10, 3, padding="same", dilation=2, bias=False)
        self.linear = nn.Linear(40, 40)
        self.again = self.linear
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(40, 5))

    def forward(self, x):
        x = self.same(self.norm(self.conv(x)).relu()).relu_()
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.again(self.linear(x).tanh()))


@pytest.fixture
def trained():
    """A network with layers of low and of full rank after a few steps, in evaluation mode; and an input."""
    torch.manual_seed(0)
    model = dlrt.to_low_rank(Network(), rank=0.4, skip=["conv"])
    model.conv = dlrt.to_low_rank(model.conv)
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.05)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x


def kinds(model):
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("rank", [2, 4, None])
def test_every_geometry_is_kept(rank, float64):
    for options in GEOMETRIES:
        x = torch.randn(2, 3, 9, 8)
        for kind in (dlrt.LowRankConv2d, dlrt.SpatialLowRankConv2d):
            layer = kind.from_dense(nn.Conv2d(3, 5, **options), rank)
            plain = dlrt.export(layer)
            for image in (x, x[0]):
                assert torch.allclose(plain(image), layer(image), atol=1e-13), (kind, options)
            assert kinds(plain) <= {nn.Sequential, nn.Conv2d}


def test_a_layer_becomes_two_where_that_is_smaller_and_one_where_not():
    for rank, expected in ((5, nn.Sequential), (6, nn.Linear)):  # 6 x (12 + 12) is 12 x 12
        plain = dlrt.export(dlrt.LowRankLinear(12, 12, rank))
        assert type(plain) is expected
        weights = sum(p.numel() for p in plain.parameters() if p.dim() == 2)
        assert weights == min(rank * 24, 144)


def test_an_exported_network_computes_the_same_with_layers_of_torch_only(trained):
    model, x = trained
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.05)
    plain = dlrt.export(model)
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert all(kind.__module__.startswith("torch.") for kind in kinds(plain) - {Network})
    assert {nn.Linear, nn.Conv2d, nn.Sequential} <= kinds(plain)
    assert isinstance(model.conv, dlrt.LowRankConv2d)
    assert model.linear.trains_bases
    model(x).sum().backward()
    optimizer.step()  # goes on
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_shared_frozen_or_without_bias_stays_so(trained):
    model, _ = trained
    model.same.S.requires_grad_(False)
    plain = dlrt.export(model)
    assert plain.linear is plain.again
    assert not any(p.requires_grad for p in plain.same.parameters())
    assert all(p.requires_grad for p in plain.linear.parameters())
    assert not [name for name, _ in plain.same.named_parameters() if "bias" in name]
    assert not any(module.training for module in plain.modules())
    assert all(module.training for module in dlrt.export(model.train()).modules())


def test_a_dense_network_is_copied_as_it_is():
    model = LeNet5()
    plain = dlrt.export(model)
    assert str(plain) == str(model)
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in model.parameters()}


def test_an_exported_network_trains_with_any_optimizer(trained):
    model, x = trained
    plain = dlrt.export(model).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    target = plain(x).detach() + 1
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(plain(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_torch_export_takes_it_with_any_number_of_samples(trained):
    model, x = trained
    program = torch.export.export(dlrt.export(model), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 3, 8):
        assert torch.allclose(loaded(x[:size]), model(x[:size]), atol=1e-5)


def test_jit_trace_takes_it(trained):
    model, x = trained
    traced = torch.jit.trace(dlrt.export(model), x)
    assert torch.allclose(traced(x[:3]), model(x[:3]), atol=1e-5)


def test_onnxruntime_computes_the_same(trained, tmp_path):
    model, x = trained
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        dlrt.export(model), (x,), path, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for size in (1, 3, 8):
        (y,) = session.run(None, {name: x[:size].numpy()})
        assert torch.allclose(torch.from_numpy(y), model(x[:size]), rtol=0, atol=1e-5)


def test_a_low_rank_network_itself_is_traced_and_exported_too(trained):
    model, x = trained
    model = copy.deepcopy(model)
    for module in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        assert torch.allclose(module(x), model(x), atol=1e-5)

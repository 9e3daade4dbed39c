"""Networks that are not ours convert, compute the same, train, and say what of them stays dense."""

import copy
import warnings

import pytest
import torch
import torchvision
from small_networks import low_rank_layers
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchvision.models.vgg import cfgs, make_layers

import dlrt


def vgg11_bn():
    """Torchvision's layers, but a classifier for 32 x 32 pixels in place of the one with 4096 units."""
    return nn.Sequential(make_layers(cfgs["A"], batch_norm=True), nn.Flatten(), nn.Linear(512, 10))


def vision_transformer():
    """Torchvision's vit_b_16 with the same blocks, fewer and narrower."""
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.2)  # torchvision begins with zeros there
    return model


class Block(nn.Module):
    """A block of GPT: causal attention with its projections in one linear layer, then a perceptron."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).mT.transpose(2, 3).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        attention = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Two blocks between an embedding and a head that share their weight; the logits of the last token."""

    def __init__(self, words=10, width=24):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Parameter(torch.zeros(12, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.blocks(self.words(tokens) + self.positions))[:, -1]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0])[:, -1]


def images(size=8):
    return torch.randn(size, 3, 32, 32)


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), images, 21, set()),
    "vgg11_bn": (vgg11_bn, images, 9, set()),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        images,
        43,
        {"it is a grouped convolution"},
    ),
    "vision transformer": (vision_transformer, images, 14, set()),
    "GPT": (GPT, lambda: torch.randint(0, 10, (8, 12)), 8, {"another module shares its weight"}),
    "LSTM": (
        Recurrent,
        lambda: torch.randn(8, 5, 8),
        1,
        {"recurrent layers have no low-rank form here"},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_others_converts_says_what_stays_dense_and_trains(name):
    make, inputs, layers, expected_reasons = NETWORKS[name]
    model, x, y = make(), inputs(), torch.arange(8)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dlrt.to_low_rank(model)
    assert {str(warning.message).split("stays dense: ")[1] for warning in caught} == expected_reasons
    assert len(low_rank_layers(model)) == layers
    with torch.no_grad():
        assert torch.allclose(copy.deepcopy(model).train()(x), expected, atol=1e-4)

    for layer in low_rank_layers(model):
        layer.factors = dlrt.truncate(layer.factors, max_rank=max(1, min(layer.shape) // 4))
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.001, tau=0.01)
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert cross_entropy(model(x), y) < loss


def test_every_grouped_convolution_of_mobilenet_is_named():
    model = torchvision.models.mobilenet_v3_small(num_classes=10)
    grouped = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    with pytest.warns(UserWarning, match="grouped") as caught:
        dlrt.to_low_rank(model, rank=1)
    assert [str(warning.message).split()[0] for warning in caught] == grouped
    assert all(type(model.get_submodule(name)) is nn.Conv2d for name in grouped)


def test_a_layer_with_hooks_stays_dense_since_they_would_be_lost():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6), nn.Linear(6, 4))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="stays dense: it has hooks") as told:
        dlrt.to_low_rank(model)
    assert [str(warning.message).split()[0] for warning in told] == ["0", "1"]
    assert [type(layer) for layer in model[:2]] == [nn.Linear, nn.Linear]
    assert isinstance(model[2], dlrt.LowRankLinear)


def test_recurrent_layers_are_left_as_they_were():
    model = Recurrent()
    before = {name: value.clone() for name, value in model.lstm.state_dict().items()}
    with pytest.warns(UserWarning, match="lstm stays dense"):
        dlrt.to_low_rank(model, rank=2)
    after = model.lstm.state_dict()
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_shared_weights_stay_shared_through_a_step():
    model = GPT()
    model.blocks.append(model.blocks[0])
    with pytest.warns(UserWarning, match="head stays dense"):
        dlrt.to_low_rank(model, rank=4)
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1)
    x, before = torch.randint(0, 10, (8, 12)), model.words.weight.clone()
    cross_entropy(model(x), torch.arange(8)).backward()
    optimizer.step()
    assert model.head.weight is model.words.weight
    assert not torch.equal(model.words.weight, before)
    assert model.blocks[0] is model.blocks[2]
    assert isinstance(model.blocks[2].qkv, dlrt.LowRankLinear)


def test_unused_and_frozen_layers_survive_a_step_unchanged():
    model = GPT()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    model.unused = nn.Linear(5, 7)
    with pytest.warns(UserWarning, match="head stays dense"):
        dlrt.to_low_rank(model, rank=4)
    optimizer = dlrt.DLRT(model, torch.optim.Adam, lr=0.01, tau=0.2)
    still = {
        name: p.clone() for name, p in model.named_parameters() if name.startswith(("blocks.0", "unused"))
    }
    moving = model.blocks[1].qkv.weight
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(torch.randint(0, 10, (8, 12))), torch.arange(8)).backward()
        optimizer.step()
    state = dict(model.named_parameters())
    assert len(still) == 24
    assert all(torch.equal(state[name], value) for name, value in still.items())
    assert not torch.allclose(model.blocks[1].qkv.weight, moving)

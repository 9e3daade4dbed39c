"""Which layer of networks that are not ours is explained, and that tokens are laid out as they should be."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer, list_models, regnet

import dlrt
from dlrt.cams import METHODS, default_layer, explain, known
from dlrt.cams.spatial import feature_maps
from dlrt.cams.targets import of_classes

ROOT = Path(__file__).parents[1]
TABLE = re.findall(
    r"^\| (\w+) \| (\d+) \| `(.+)` \| (\w+) \| (\d+) x (\d+) \|$",
    (ROOT / "docs/target_layers.md").read_text(),
    re.M,
)
FAMILIES = ["alexnet", "densenet121", "efficientnet_b0", "googlenet", "maxvit_t", "regnet_y_400mf"]
FAMILIES += ["resnet18", "squeezenet1_1", "swin_t", "vgg11", "vit_b_32"]


def test_the_table_has_every_classifier_of_torchvision():
    assert [name for name, *_ in TABLE] == list_models(module=torchvision.models)


@pytest.mark.parametrize("row", [row for row in TABLE if row[0] in FAMILIES], ids=lambda row: row[0])
def test_the_default_layer_is_that_of_the_table(row, monkeypatch):
    """On the meta device, which computes shapes alone."""
    name, side, layer, kind, height, width = row
    made = regnet.BlockParams.from_init_params
    with torch.device("meta"):
        with monkeypatch.context() as patch, torch.device("meta"):
            patch.setattr(regnet.BlockParams, "from_init_params", lambda *a, **k: _on_cpu(made, *a, **k))
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(name, weights=None, **options)
        image = torch.zeros(1, 3, int(side), int(side))
        assert default_layer(model, image) == layer
        maps = feature_maps(model, image)[layer]
    assert type(maps.module).__name__ == kind
    assert maps.size == (int(height), int(width))


def _on_cpu(function, *arguments, **options):
    with torch.device("cpu"):
        return function(*arguments, **options)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    }
    model = VisionTransformer(**sizes, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # torchvision begins with zeros there
    return model.eval(), torch.randn(2, 3, 32, 32)


def test_tokens_are_explained_where_their_patches_are(transformer):
    """Grad-CAM by its definition, with the gradient with respect to what the last attention gets."""
    model, x = transformer
    assert default_layer(model, x[:1]) == "encoder.layers.encoder_layer_1.ln_1"
    kept = []
    handle = model.encoder.layers[1].ln_1.register_forward_hook(lambda module, x, y: kept.append(y))
    logits = model(x)
    handle.remove()
    (gradients,) = torch.autograd.grad(logits[:, 3].sum(), kept)
    expected = (kept[0][:, 1:] * gradients[:, 1:].mean(1, keepdim=True)).sum(2).view(2, 4, 4)
    maps = explain(model, x, of_classes([3, 3]))
    np.testing.assert_allclose(maps.raw, expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(maps.logits, logits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_tokens_or_says_that_it_cannot(method, transformer):
    model, x = transformer
    if method == "ablationcam":
        with pytest.raises(ValueError, match="got tokens from encoder"):
            explain(model, x, method=method)
        return
    dense, low_rank = (explain(net, x, method=method) for net in (model, _low_rank(transformer[0])))
    assert np.isfinite(dense.raw).all()
    assert np.ptp(dense.raw) > 0
    assert dense.raw.shape == low_rank.raw.shape


def _low_rank(model):
    copy = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    copy.load_state_dict(model.state_dict())
    low_rank = dlrt.to_low_rank(copy, rank=0.5)
    assert isinstance(low_rank.encoder.layers[1].self_attention, dlrt.Attention)
    return low_rank


class Attention(nn.Module):
    """To every second pixel, whose places cannot be found from their number."""

    def forward(self, tokens):
        tokens = tokens[:, ::2]
        return (tokens @ tokens.mT).softmax(2) @ tokens


def test_attention_whose_tokens_have_no_place_is_refused_and_a_named_layer_is_not():
    flat = nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.Unflatten(1, (8, 36)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), flat, Attention(), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="attends to something that cannot be laid out as maps"):
        explain(model, x)
    assert explain(model, x, layer="0").raw.shape == (1, 6, 6)


def test_a_network_of_convolutions_alone_is_explained_before_its_class_scores():
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    blocks = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout()
    model, x = nn.Sequential(*blocks, nn.Conv2d(8, 4, 1), nn.ReLU(), *pooled), torch.randn(1, 3, 8, 8)
    assert default_layer(model, x) == "1"
    assert default_layer(dlrt.to_low_rank(model, rank=0.5), x) == "1"
    assert default_layer(nn.Sequential(nn.Conv2d(3, 4, 3), *pooled), x) == "0"  # the only one


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "densenet121", "googlenet"])
def test_the_weights_that_torchvision_publishes_fit(name, tmp_path):
    """DenseNets by their older names."""
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    state = model.state_dict()
    if name == "densenet121":
        state = {re.sub(r"(\.(?:norm|conv))([12]\.)", r"\1.\2", key): value for key, value in state.items()}
    torch.save(state, tmp_path / "weights.pt")
    network = known.from_arch(name, str(tmp_path / "weights.pt"))
    assert getattr(network.model, "transform_input", False) == (name == "googlenet")
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in network.model.state_dict().items()
    )


def test_a_vision_transformer_sees_the_size_that_its_positions_are_for(transformer):
    assert known._positions(transformer[0].state_dict()) == 32

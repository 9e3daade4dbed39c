"""Adapters as a checkpoint of LoRA: what peft computes from it, and what it has no names for."""

import copy
import json

import pytest
import torch
from test_adapters import Network, data, trained
from torch import nn
from torch.nn.functional import conv2d, linear

import dlrt

pytestmark = pytest.mark.usefixtures("float64")


def lora(path):
    """The tensors of a checkpoint, whichever of both files it is."""
    if (path / "adapter_model.bin").exists():
        return torch.load(path / "adapter_model.bin", weights_only=True)
    return pytest.importorskip("safetensors.torch").load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("padded", [False, True])
def test_a_lora_checkpoint_adds_alpha_over_r_times_B_A(padded, tmp_path):
    """To the outputs of every layer, whatever its rank; as peft documents it."""
    model = trained(compression=0.5, ramp=2, allot_every=1, min_rank=1)
    ranks = dlrt.compression(model).ranks
    assert len(set(ranks.values())) > 1
    dlrt.save_lora(model, tmp_path, padded)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), lora(tmp_path)
    assert len(tensors) == 2 * len(ranks)
    assert config["r"] == max(ranks.values())
    assert bool(config["rank_pattern"]) != padded
    for name in (name.removesuffix(".adapter") for name in ranks):
        A, B = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        r = config["rank_pattern"].get(f"^{name}".replace(".", r"\."), config["r"])
        alpha = config["alpha_pattern"].get(f"^{name}".replace(".", r"\."), config["lora_alpha"])
        assert A.shape[0] == B.shape[1] == r
        layer = model.get_submodule(name)
        if name == "conv":
            x = torch.randn(2, 2, 6, 6)
            added = conv2d(conv2d(x, A, stride=2, padding=1), B)
        else:
            x = torch.randn(5, layer.base.in_features)
            added = linear(linear(x, A), B)
        assert torch.allclose(layer(x), layer.base(x) + alpha / r * added, atol=1e-12)


def test_a_lora_checkpoint_needs_adapters_that_peft_has_names_for(tmp_path):
    with pytest.raises(ValueError, match="must have adapters, got none"):
        dlrt.save_lora(Network(), tmp_path)
    with pytest.raises(ValueError, match=r"peft has no layers attention\.q_proj"):
        dlrt.save_lora(dlrt.add_adapters(Network()), tmp_path)
    model = trained()
    model.block.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"block has parameters of its own that are trained"):
        dlrt.save_lora(model, tmp_path)
    model = trained()
    model.fc.base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"fc\.base has parameters of its own that are trained"):
        dlrt.save_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_trained_beside_goes_along_in_a_lora_checkpoint(tmp_path):
    model = trained()
    model.head.requires_grad_(True)
    dlrt.save_lora(model, tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), lora(tmp_path)
    assert config["modules_to_save"] == ["head"]
    for kind in ("weight", "bias"):
        assert torch.equal(tensors[f"base_model.model.head.{kind}"], getattr(model.head, kind))


def test_peft_computes_the_same_from_a_lora_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    torch.set_default_dtype(torch.float32)
    first, (x, _) = Network().float(), data()
    x = x.float()
    model = dlrt.add_adapters(copy.deepcopy(first), rank=3, target=("conv", "fc", "last"))
    model.head.requires_grad_(True)
    budget = {"compression": 0.5, "ramp": 2, "allot_every": 1}
    optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.05, update="muon", **budget)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert len(set(dlrt.compression(model).ranks.values())) > 1
    for padded in (False, True):
        dlrt.save_lora(model, tmp_path, padded)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(first), tmp_path)
        assert torch.allclose(loaded(x), model(x), atol=1e-5)
        assert not torch.allclose(first(x), model(x), atol=1e-2)

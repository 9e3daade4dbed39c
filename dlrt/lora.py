"""Adapters as a LoRA checkpoint of peft."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlrt.adapters import adapters, has_statistics
from dlrt.attention import Attention
from dlrt.blocks import Blocks, is_within
from dlrt.convolutions import LowRankConv2d
from dlrt.layers import LowRankLayer
from dlrt.lowrank import svd


def save_lora(model: nn.Module, folder: Path | str, padded: bool = False) -> None:
    """Write the adapters as a LoRA checkpoint of peft: adapter_config.json and adapter_model.safetensors.

    Modules that are trained beside them, such as a new head, go along as modules_to_save, and so does batch
    normalisation, whose statistics training moves.
    U S Vᵀ = B A with B = U P √Σ, A = √Σ Qᵀ Vᵀ for S = P Σ Qᵀ. Every adapter has its rank, and that as alpha:
    peft then multiplies by 1. padded fills all up to the largest rank with zeros, for programs that take one
    rank only. Without safetensors installed it is adapter_model.bin. ValueError without adapters, and for
    those within `dlrt.Attention` or `dlrt.Blocks`, whose layers peft has no names for.
    """
    layers, tensors = adapters(model), {}
    if not layers:
        raise ValueError("the model must have adapters, got none: call dlrt.add_adapters(model) first")
    around = {name: model.get_submodule(name.rpartition(".")[0]) for name in layers}
    if packed := [name for name, module in around.items() if isinstance(module, Attention | Blocks)]:
        raise ValueError(
            f"peft has no layers {', '.join(packed)}: merge adapters of what was packed, or give it none"
        )
    ranks = {name: layer.rank for name, layer in layers.items()}
    largest = max(ranks.values())
    if padded:
        ranks = dict.fromkeys(ranks, largest)
    for name, layer in layers.items():
        A, B = lora_factors(layer, ranks[name])
        tensors |= {f"base_model.model.{name}.lora_{kind}.weight": X for kind, X in (("A", A), ("B", B))}
    beside = _trained_beside(model)
    for name in beside:
        state = model.get_submodule(name).state_dict()
        tensors |= {f"base_model.model.{name}.{key}": X.clone().contiguous() for key, X in state.items()}
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, layers)),  # as one pattern, for names end alike
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": beside or None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("safetensors"):
        from safetensors.torch import save_file

        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _trained_beside(model: nn.Module) -> list[str]:
    """The modules with trained parameters of their own that are no adapters, and batch normalisation.

    ValueError for those that have adapters, or contain layers that have.
    """
    layers = adapters(model)
    factors = {id(p) for layer in layers.values() for p in layer.parameters()}
    names = [
        name
        for name, module in model.named_modules()
        if has_statistics(module)
        or any(p.requires_grad and id(p) not in factors for p in module.parameters(recurse=False))
    ]
    around = [name for name in names if any(is_within(layer, [name]) for layer in layers) or not name]
    if mixed := around or [name for name in names if is_within(name, layers)]:
        raise ValueError(
            f"peft saves whole modules beside adapters, and {mixed[0] or 'the model'} has parameters of its "
            "own that are trained: freeze them, or keep dlrt.adapter_state"
        )
    return names


def lora_factors(layer: LowRankLayer, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of U S Vᵀ = B A, filled up to a rank with zeros; of a convolution as two kernels."""
    P, sigma, Qh = svd(layer.S.detach())
    root, more = sigma.sqrt(), rank - layer.rank
    A = F.pad(root[:, None] * Qh @ layer.V.mT, (0, 0, 0, more))
    B = F.pad(layer.U @ (P * root), (0, more))
    if isinstance(layer, LowRankConv2d):
        A, B = A.unflatten(1, (layer.in_channels, *layer.kernel_size)), B[:, :, None, None]
    return A.detach().contiguous(), B.detach().contiguous()

"""Which layers of a model can become low-rank, and why the others stay dense."""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from dlrt.attention import Attention, can_unpack
from dlrt.blocks import Blocks, is_conv1d
from dlrt.convolutions import LowRankConv2d
from dlrt.layers import LowRankLayer
from dlrt.linear import LowRankLinear
from dlrt.replacing import become

LOW_RANK_TYPES = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}


def convertible_layers(
    model: nn.Module, skip: tuple[str, ...], rows: dict[str, list[int]]
) -> list[nn.Linear | nn.Conv2d]:
    """What becomes low-rank. Warns of what unexpectedly does not.

    Attention and split layers are taken apart for it; `attention.pack` puts together what stays dense.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    skipped = {module for stem in skip for module in model.get_submodule(stem).modules()}
    layers = []
    for name, module in model.named_modules():
        if module in skipped:
            continue
        if reason := _stays(module, owners, name in rows):
            warnings.warn(f"{name or type(module).__name__} stays {reason}", stacklevel=3)
        elif type(module) is nn.MultiheadAttention:
            become(module, Attention(module))  # the walk goes on in its four layers
        elif name in rows or is_conv1d(module):
            become(module, Blocks(module, rows.get(name) or [module.nf]))  # and in its blocks
        elif type(module) in LOW_RANK_TYPES and module.weight.numel():  # else there is no rank to have
            layers.append(module)
    return layers


def _stays(module: nn.Module, owners: Counter[int], split: bool) -> str | None:
    """Why a layer stays as it is, if so; owners counts the modules that each parameter belongs to."""
    if isinstance(module, LowRankLayer):
        return "as it is: it is low-rank already, and dlrt.to_dense comes before another conversion"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "dense: recurrent layers have no low-rank form here"
    if type(module) is NonDynamicallyQuantizableLinear:
        return None  # a part of nn.MultiheadAttention that stays dense, which is named
    kinds = (type(module),) if is_conv1d(module) else (*LOW_RANK_TYPES, nn.MultiheadAttention)
    for kind in kinds:
        if isinstance(module, kind):
            in_parts = split or is_conv1d(module) or kind is nn.MultiheadAttention
            reason = _no_plain_layer(module, kind, owners, in_parts)
            return reason and f"dense: {reason}"
    weight = module._parameters.get("weight")
    own = not type(module).__module__.startswith("torch.") and not isinstance(module, nn.Embedding)
    if own and weight is not None and not is_lazy(weight) and weight.dim() == 2:
        return f"dense: {type(module).__name__} has a weight matrix, but is no nn.Linear"
    return None


def _no_plain_layer(module: nn.Module, kind: type, owners: Counter[int], in_parts: bool) -> str | None:
    if is_parametrized(module):
        return "it is parametrized, as by spectral_norm or weight_norm"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy and has no shape yet: run a batch through the model first"
    if type(module) is not kind:
        return f"{type(module).__name__} is a subclass of nn.{kind.__name__}, and may compute something else"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return "it has hooks, as of pruning, which would be lost: register those of other kinds afterwards"
    if getattr(module, "groups", 1) > 1:
        return "it is a grouped convolution"
    if kind is nn.MultiheadAttention and not can_unpack(module):
        return "attention with add_bias_kv or add_zero_attn has no low-rank form here"
    for name, p in module._parameters.items():
        # a bias moves into the new layer as it is, unless that has parts
        if p is not None and owners[id(p)] > 1 and (p.dim() > 1 or in_parts):
            return f"another module shares its {'weight' if p.dim() > 1 else name}"
    return None

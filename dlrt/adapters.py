"""Adapters: a network rests, and beside its layers low-rank weights are trained, which begin as zero.

S is zero and the bases are random, so that a network with new adapters computes what it did. The K-gradient
G V and the L-gradient Gᵀ U are not zero, and a `dlrt.DLRT` takes bases from them in its first step. Ranks
move, and under a budget all layers compete for the parameters. LoRA (Hu et al. 2021) has fixed ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from dlrt.attention import PROJECTIONS, Attention, can_unpack, pack
from dlrt.blocks import Blocks, features, is_conv1d
from dlrt.checks import check_orthonormal, check_whole
from dlrt.convolutions import SAME_IN_DENSE, LowRankConv2d
from dlrt.layers import FACTORS, LowRankLayer
from dlrt.linear import LowRankLinear
from dlrt.lowrank import LowRank, at_least_single
from dlrt.replacing import become

COMPUTED = {"weight_orig", "weight_g", "weight_v"}  # parameters of which pruning and norms make the weight


class Adapted(nn.Module):
    """y = base(x) + adapter(x): a layer whose weight of any type rests, and U S Vᵀ beside it, with S = 0."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        weight = next(chain(base.parameters(), base.buffers()), torch.empty(0))  # quantised: a buffer
        kind = weight.dtype if weight.is_floating_point() else torch.float32
        options = {"device": weight.device, "dtype": torch.promote_types(kind, torch.float32), "bias": False}
        if isinstance(base, nn.Conv2d):
            options |= {name: getattr(base, name) for name in SAME_IN_DENSE}
            rank = min(rank, *base.weight.flatten(1).shape)
            self.adapter: LowRankLayer = LowRankConv2d(rank=rank, **options)
        else:
            shape = self.in_features, self.out_features = features(base)
            self.adapter = LowRankLinear(*shape, rank=min(rank, *shape), **options)
        nn.init.zeros_(self.adapter.S)
        self.base = base.requires_grad_(False)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The dense sum of both weights, for whoever does not call the layer; a new tensor at every call.

        There is none, AttributeError, where that of the base is quantised.
        """
        if reason := self._keeps_apart():
            raise AttributeError(reason)
        weight, beside = self.base.weight, self.adapter.weight
        return (at_least_single(weight) + (beside.mT if is_conv1d(self.base) else beside)).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.adapter(x.to(self.adapter.S.dtype)).to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The sum of both weights; ValueError where that of the base is quantised."""
        if reason := self._keeps_apart():
            raise ValueError(reason)
        return self.weight.detach()

    def _keeps_apart(self) -> str | None:
        """Why the adapter cannot be added to the weight beside it, if so."""
        known = isinstance(self.base, nn.Linear | nn.Conv2d | LowRankLayer) or is_conv1d(self.base)
        if known and self.base.weight.is_floating_point():
            return None
        kind = f" of {self.base.weight.dtype}" if known else ""
        return (
            "adapters are merged into floating-point weights of nn.Linear and nn.Conv2d, got "
            f"{type(self.base).__name__}{kind}: keep them beside it"
        )


def add_adapters(model: nn.Module, rank: int = 8, target: str | Iterable[str] | None = None) -> nn.Module:
    """Freeze a model and give its linear layers and convolutions adapters, in place; give the model back.

    rank is that of each to begin with, or its full one where that is less. target names modules, all of whose
    layers get adapters, by a whole name or the last parts of it ("q_proj"); without it all layers do. A layer
    is whatever has in_features and out_features, quantised ones too, the Conv1D of transformers, or an
    nn.Conv2d without groups, no subclass of it; parametrized and pruned ones are none, and are warned of. Of
    nn.MultiheadAttention they are q_proj, k_proj, v_proj and out_proj, see `dlrt.Attention`, and of
    `dlrt.Blocks` the blocks.

    Make a `dlrt.DLRT` of the model then. Unfreeze what else is to be trained, such as a new head. With
    adapters `dlrt.compression` and the budget of a DLRT count trained weights only: an adapter of rank r
    r (m + n), of the m n numbers that the layer has. ValueError for a rank below 1, where a target names no
    layer that can have an adapter, and for a second set of adapters.
    """
    check_whole("rank", rank)
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("the model must have no adapters yet: call dlrt.merge_adapters(model) first")
    names = _layers(model)
    rest = {name: reason for name, module in model.named_modules() if (reason := _rests_alone(module))}
    chosen = {*names, *rest}
    if target is not None:
        target = (target,) if isinstance(target, str) else tuple(target)
        if not target:
            raise ValueError("target must name a layer, or be None for all, got nothing")
        named = {stem: {name for name in chosen if f".{stem}." in f".{name}."} for stem in target}
        if unknown := [stem for stem, found in named.items() if found.isdisjoint(names)]:
            reasons = [f" ({name}: {rest[name]})" for stem in unknown for name in sorted(named[stem])]
            raise ValueError(
                f"target must name layers that can have adapters, got {', '.join(unknown)}"
                f"{''.join(reasons)}; there are {', '.join(names) or 'none'}"
            )
        chosen = set().union(*named.values())
    for name, reason in rest.items():
        if name in chosen:
            warnings.warn(f"{name or type(model).__name__} gets no adapter: {reason}", stacklevel=2)
    return _adapt(model, [name for name in names if name in chosen], rank)


def _layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The layers that can have adapters, by name, also those that packed attention would have; and (m, n)."""
    shapes = {}
    for name, module in model.named_modules():
        if can_unpack(module):
            widths = (module.embed_dim, module.kdim, module.vdim)
            for projection, width in zip(PROJECTIONS, widths, strict=True):
                shapes[f"{name}.{projection}".lstrip(".")] = module.embed_dim, width
        if _rests_alone(module):
            continue
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            shapes[name] = tuple(module.weight.flatten(1).shape)
        elif is_conv1d(module) or (is_sized(module) and not isinstance(module, Blocks)):
            shapes[name] = features(module)[::-1]
    return shapes


def _rests_alone(module: nn.Module) -> str | None:
    """Why a linear layer or a convolution can have no adapter, if so."""
    if not (isinstance(module, nn.Conv2d) or is_sized(module)):
        return None
    if is_parametrized(module) or not COMPUTED.isdisjoint(module._parameters):
        return "its weight is computed of others, as by spectral_norm or pruning"
    if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is a subclass of nn.Conv2d, and may compute something else"
    return None


def is_sized(module: nn.Module) -> bool:
    """Whether a module has as many inputs and outputs as a linear layer, of whatever weights, says."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _adapt(model: nn.Module, names: Iterable[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name in names:
        around = model.get_submodule(name.rpartition(".")[0])
        if can_unpack(around):
            become(around, Attention(around))
        layer = model.get_submodule(name)
        become(layer, Adapted(copy.copy(layer), rank))
    return pack(model)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters of a model to the weights beside them, in place, and leave plain layers, which rest.

    A low-rank layer stays one, of the sum of both ranks. ValueError, before anything is changed, where a
    weight is quantised.
    """
    merged = {m: m.merged_weight() for m in model.modules() if isinstance(m, Adapted)}
    for module, weight in merged.items():
        module.adapter.owner = None  # a DLRT that steps on is told
        base = module.base
        if isinstance(base, LowRankLayer):
            rank = min(base.rank + module.adapter.rank, *base.shape)
            base.factors = LowRank.from_dense(base.as_matrix(weight), rank)
        else:
            base.weight = nn.Parameter(weight, requires_grad=False)  # others may share the old one
        become(module, base)
    return pack(model)


def adapters(model: nn.Module) -> dict[str, LowRankLayer]:
    """The adapters of a model, by the names of the layers that they are beside."""
    return {name: m.adapter for name, m in model.named_modules() if isinstance(m, Adapted)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state_dict its adapters are, and whatever else training changes.

    That is what is trained, such as a new head, and the statistics of batch normalisation.
    """
    changed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed |= {f"{name}.adapter.{factor}".lstrip(".") for name in adapters(model) for factor in FACTORS}
    norms = {name: module for name, module in model.named_modules() if has_statistics(module)}
    changed |= {f"{name}.{key}".lstrip(".") for name, norm in norms.items() for key in norm._buffers}
    return {name: value for name, value in model.state_dict().items() if name in changed}


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch normalisation that keeps means and variances of what it has seen."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def load_adapters(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load an `adapter_state` into a model, in place, which gets adapters where it has none; give it back.

    All else rests then, as after `add_adapters`. ValueError, before anything is changed, where the state
    belongs to another network, or to only some of the adapters that the model has.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"the state must be a dict as of dlrt.adapter_state, got {type(state).__name__}")
    names = [name.removesuffix("adapter.S").rstrip(".") for name in state if name.endswith("adapter.S")]
    own = adapters(model)
    if missing := sorted({*own} - {*names}) or ([] if names else ["any"]):
        raise ValueError(f"the state must be of all adapters of the model, got none of {', '.join(missing)}")
    shapes = {name: layer.shape for name, layer in own.items()} or _layers(model)
    _check_beside(model, state, names)
    if unknown := sorted({*names} - {*shapes}):
        raise ValueError(f"the state must be of adapters of this model, which has no {', '.join(unknown)}")
    for name in names:
        _check_factors(name, state, shapes[name])
    if not own:
        _adapt(model, names, rank=1)
    model.load_state_dict(state, strict=False)
    return model


def _check_beside(model: nn.Module, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """ValueError where what a state has beside these adapters is no part of a model, or of another shape."""
    prefixes = [f"{name}.".lstrip(".") for name in names]
    factors = {f"{prefix}adapter.{factor}" for prefix in prefixes for factor in FACTORS}
    bases = tuple(f"{prefix}base." for prefix in prefixes)

    def without_base(key: str) -> str:
        """The name that a part of a layer has before the layer gets an adapter."""
        return next((p.removesuffix("base.") + key.removeprefix(p) for p in bases if key.startswith(p)), key)

    now = {without_base(key): value.shape for key, value in model.state_dict().items()}
    beside = {key: value.shape for key, value in state.items() if key not in factors}
    if unknown := sorted(key for key in beside if without_base(key) not in now):
        raise ValueError(f"the state must be of adapters of this model, which has no {', '.join(unknown)}")
    for key, shape in beside.items():
        if shape != now[without_base(key)]:
            came = f"{tuple(shape)} instead of {tuple(now[without_base(key)])}"
            raise ValueError(f"the state must be of this model, got {key} of the shape {came}")


def _check_factors(name: str, state: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """ValueError where a state has no U (m, k), S (k, l) and V (n, l) for a layer, or no numbers in them."""
    U, S, V = (state.get(f"{name}.adapter.{factor}".lstrip("."), torch.empty(0, 0)) for factor in FACTORS)
    (m, n), whose = shape, f"{name}.adapter".lstrip(".")
    if S.dim() != 2 or (U.shape, V.shape) != ((m, S.shape[0]), (n, S.shape[1])):
        came = ", ".join(str(tuple(T.shape)) for T in (U, S, V))
        raise ValueError(f"{whose} must have U, S and V of {m} x {n} weights, got {came}")
    if not S.isfinite().all():
        raise ValueError(f"S of {whose} must be finite, got inf or nan")
    check_orthonormal(whose, U, V)

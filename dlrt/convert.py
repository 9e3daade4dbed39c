"""Dense networks to low-rank ones and back, and what each of them costs in parameters."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrt.layers import LowRankConv2d, LowRankLayer, LowRankLinear
from dlrt.lowrank import check_tolerance
from dlrt.outputs import output_covariances, project

LOW_RANK_TYPES = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}
OTHER_KINDS = {
    nn.MultiheadAttention: "nn.MultiheadAttention packs its projections into one parameter",
    nn.RNNBase: "recurrent layers have no low-rank form here",
    nn.RNNCellBase: "recurrent layers have no low-rank form here",
}


def to_low_rank(
    model: nn.Module,
    rank: int | float | None = None,
    tau: float | None = None,
    skip: Iterable[str] = (),
    inputs: Tensor | None = None,
) -> nn.Module:
    """Replace every nn.Linear and nn.Conv2d of a model, in place, by its truncated SVD; give the model back.

    A model that is itself such a layer is left as it is, and what is given back is for its place.
    rank is an int (in a layer too small for it, that layer's full rank), a share in (0, 1] of each layer's
    full rank, or None for the full rank; tau drops singular values up to that share of each weight's norm.
    With inputs, a batch (N, ...) for the model, what is kept is what the layers' outputs on it need most, see
    `outputs.project`, and tau is a share of their deviation: trained networks lose much less accuracy.
    skip names the modules that stay dense, with all that they contain. Grouped convolutions, layers that
    share their weight with another module, recurrent layers and nn.MultiheadAttention stay dense with a
    warning, other kinds of modules (embeddings, convolutions that are not two-dimensional) without. Make the
    optimizer afterwards: S is a new parameter. ValueError for an impossible rank or tau, or where skip names
    no module.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _check(model, rank, skip)
    root = nn.Module()
    root._modules[""] = model  # so that a model which is a layer itself has a parent, too
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    covariances = {}
    if inputs is not None:
        dense = [module for module in root.modules() if type(module) in LOW_RANK_TYPES]
        covariances = output_covariances(model, dense, inputs)
    converted: dict[nn.Module, nn.Module] = {}  # a module that occurs twice stays one module
    for path, parent in list(root.named_modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves repetitions out
            whole = f"{path}.{name}" if path else name
            if any(f"{whole}.".startswith(f"{stem}.") for stem in skip):
                continue
            if reason := _stays_dense(child, owners):
                warnings.warn(f"{whole or type(child).__name__} stays dense: {reason}", stacklevel=2)
            elif type(child) in LOW_RANK_TYPES:
                if child not in converted:
                    converted[child] = _convert(child, rank, tau, covariances.get(child))
                setattr(parent, name, converted[child])
    return root._modules[""]


def _stays_dense(module: nn.Module, owners: Counter[int]) -> str | None:
    """Why a layer cannot become low-rank, if so; owners counts the modules that each parameter belongs to."""
    if type(module) is nn.Conv2d and module.groups > 1:
        return "it is a grouped convolution"
    if type(module) in LOW_RANK_TYPES and owners[id(module.weight)] > 1:
        return "another module shares its weight"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if type(module) in LOW_RANK_TYPES and any(hooks):
        return "it has hooks, as of spectral_norm or pruning, which would be lost: register them afterwards"
    return next((reason for kind, reason in OTHER_KINDS.items() if isinstance(module, kind)), None)


def _check(model: nn.Module, rank: int | float | None, skip: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if unknown := sorted(set(skip) - set(names)):
        raise ValueError(
            f"skip names no module of the model: {', '.join(unknown)}; it has {', '.join(names)}"
        )
    share = isinstance(rank, float)
    if rank is not None and not (0 < rank <= 1 if share else rank >= 1):
        raise ValueError(
            f"rank must be an int of at least 1, a share in (0, 1] as a float, or None, got {rank!r}"
        )


def _convert(
    dense: nn.Linear | nn.Conv2d, rank: int | float | None, tau: float | None, covariance: Tensor | None
) -> LowRankLayer:
    largest = min(dense.weight.flatten(1).shape)
    if isinstance(rank, float):
        rank = math.ceil(rank * largest - 1e-9)  # 0.07 * 100 is a little more than 7
    rank, kind = None if rank is None else min(rank, largest), LOW_RANK_TYPES[type(dense)]
    if covariance is None:
        return kind.from_dense(dense, rank, tau)
    check_tolerance(tau)
    layer = kind.in_place_of(dense)
    layer.factors = project(dense.weight.detach().flatten(1), covariance, rank, tau)
    return layer


def to_dense(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer of a model, in place, by the same map dense; give the model back."""
    return replace_layers(model, lambda layer: layer.to_dense())


def replace_layers(model: nn.Module, make: Callable[[LowRankLayer], nn.Module]) -> nn.Module:
    """Put make(layer) in the place of every low-rank layer; one that occurs twice is made once."""
    if isinstance(model, LowRankLayer):
        return make(model)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves repetitions out
            if isinstance(child, LowRankLayer):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])
    return model


def load_factors(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load the state_dict of a low-rank network into the dense one that it was made of; give the model back.

    Layers that have factors in the state become low-rank, of the rank there, without a decomposition; what is
    given back is for the place of a model that is itself such a layer. RuntimeError where the state belongs
    to another network, as from load_state_dict.
    """
    if type(model) in LOW_RANK_TYPES and "S" in state:
        model = LOW_RANK_TYPES[type(model)].in_place_of(model)
    made: dict[nn.Module, LowRankLayer] = {}
    for name, dense in list(model.named_modules(remove_duplicate=False)):
        if type(dense) in LOW_RANK_TYPES and f"{name}.S" in state:
            if dense not in made:
                made[dense] = LOW_RANK_TYPES[type(dense)].in_place_of(dense)
            model.set_submodule(name, made[dense])
    model.load_state_dict(state)
    return model


@dataclass(frozen=True)
class Compression:
    """Parameters of a network, weights only: biases and norms are left out on both sides.

    A layer of rank r with an m x n weight counts r (m + n) for evaluation; for training, what the rank-
    adaptive step holds at its peak, k m + k l + l n with k = min(2 r, m), l = min(2 r, n). A dense layer
    counts m n everywhere. The compressions are 1 - parameters / dense parameters, in %. Schotthöfer et al.
    2022.
    """

    evaluation_parameters: int
    training_parameters: int
    dense_parameters: int
    ranks: dict[str, int]

    @property
    def evaluation_compression(self) -> float:
        return 100 * (1 - self.evaluation_parameters / self.dense_parameters)

    @property
    def training_compression(self) -> float:
        return 100 * (1 - self.training_parameters / self.dense_parameters)


def compression(model: nn.Module) -> Compression:
    """Count a network's weights and say the rank of each of its low-rank layers, by module name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    factors = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    rest = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in factors)
    evaluation = training = dense = rest
    for layer in layers.values():
        (m, n), r = layer.shape, layer.rank
        k, l = min(2 * r, m), min(2 * r, n)  # noqa: E741
        evaluation += r * (m + n)
        training += k * m + k * l + l * n
        dense += m * n
    if dense == 0:
        raise ValueError("the model has no weights to count (no parameter with two or more dimensions)")
    return Compression(evaluation, training, dense, {name: layer.rank for name, layer in layers.items()})


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of every linear and convolutional weight as a matrix, by module name, descending.

    Of a low-rank layer those of S, which W = U S Vᵀ shares.
    """
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            values[name] = torch.linalg.svdvals(module.S.detach())
        elif type(module) in LOW_RANK_TYPES:
            values[name] = torch.linalg.svdvals(module.weight.detach().flatten(1))
    return values

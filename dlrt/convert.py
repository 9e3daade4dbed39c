"""Dense networks to low-rank ones and back."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dlrt.checks import check_compression, check_real, check_tolerance
from dlrt.convolutions import LowRankConv2d, SpatialLowRankConv2d
from dlrt.costs import compression as cost_of
from dlrt.curvature import Terms, kronecker_factors, terms
from dlrt.layers import LowRankLayer, LowRankLinear
from dlrt.lowrank import rank_within
from dlrt.ranks import allot, budget_for

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
    compression: float | None = None,
    spatial: bool = False,
) -> nn.Module:
    """Replace every nn.Linear and nn.Conv2d of a model, in place, by its truncated SVD; give the model back.

    A model that is itself such a layer is left as it is, and what is given back is for its place.
    rank is an int (in a layer too small for it, that layer's full rank), a share in (0, 1] of each layer's
    full rank, or None for the full rank; tau drops singular values up to that share of each weight's norm.
    Instead of both, compression is the evaluation compression, a fraction, that the model has at least: the
    singular values of all layers, squared and each as a share of its layer's, compete for the parameters, see
    `dlrt.ranks`; a layer that is worth its whole weight stays dense.
    With inputs, a batch (N, ...) for a classifier, the SVD is that of √G W √A, see `dlrt.curvature`, which
    keeps what the loss needs: a trained network loses much less accuracy. It takes n x n matrices of float64
    for every layer with n inputs.
    A kernel is a matrix (out_channels, in_channels * height * width), or with spatial the matrix
    (out_channels * height, in_channels * width), see `dlrt.SpatialLowRankConv2d`. Full rank then has more
    parameters than the kernel: with as many channels in as out half of it has as many, a fifth 60 % fewer.
    skip names the modules that stay dense, with all that they contain. Grouped convolutions, layers that
    share their weight with another module, recurrent layers and nn.MultiheadAttention stay dense with a
    warning, other kinds of modules (embeddings, convolutions that are not two-dimensional) without. Make the
    optimizer afterwards: S is a new parameter. ValueError for an impossible rank, tau or compression, for
    inputs of what is no classifier, or where skip names no module.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _check(model, rank, tau, skip, compression)
    root = nn.Module()
    root._modules[""] = model  # so that a model which is a layer itself has a parent, too
    places = _places(root, skip)
    layers = list(dict.fromkeys(layer for _, _, layer in places))
    made = _cut(model, layers, rank, tau, inputs, compression, spatial)
    made_of = dict(zip(layers, made, strict=True))  # a module that occurs twice stays one module
    for parent, name, layer in places:
        setattr(parent, name, made_of[layer])
    return root._modules[""]


def _places(root: nn.Module, skip: tuple[str, ...]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Where layers become low-rank: parent, name in it, layer. Warns of those that unexpectedly do not."""
    owners = Counter(id(p) for module in root.modules() for p in module._parameters.values())
    places = []
    for path, parent in root.named_modules():
        for name, child in parent._modules.items():  # named_children leaves repetitions out
            whole = f"{path}.{name}" if path else name
            if any(f"{whole}.".startswith(f"{stem}.") for stem in skip):
                continue
            if reason := _stays_dense(child, owners):
                warnings.warn(f"{whole or type(child).__name__} stays dense: {reason}", stacklevel=3)
            elif type(child) in LOW_RANK_TYPES:
                places.append((parent, name, child))
    return places


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


def _check(
    model: nn.Module,
    rank: int | float | None,
    tau: float | None,
    skip: tuple[str, ...],
    compression: float | None,
) -> None:
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
    check_tolerance(tau)
    check_compression(compression)
    if compression is not None and (rank is not None or tau is not None):
        raise ValueError(f"compression must come without rank and tau, got rank {rank!r} and tau {tau!r}")


def _rank(W: Tensor, rank: int | float | None) -> int:
    """What a rank means for this weight."""
    largest = min(W.shape)
    if isinstance(rank, float):
        return math.ceil(rank * largest - 1e-9)  # 0.07 * 100 is a little more than 7
    return min(rank or largest, largest)


def _kind(dense: nn.Linear | nn.Conv2d, spatial: bool) -> type[LowRankLayer]:
    """What a layer becomes; for a kernel one row high both kinds are one matrix, and this one is cheaper."""
    if spatial and type(dense) is nn.Conv2d and dense.kernel_size[0] > 1:
        return SpatialLowRankConv2d
    return LOW_RANK_TYPES[type(dense)]


def _cut(
    model: nn.Module,
    layers: list[nn.Linear | nn.Conv2d],
    rank: int | float | None,
    tau: float | None,
    inputs: Tensor | None,
    compression: float | None,
    spatial: bool,
) -> list[LowRankLayer]:
    """The layers at the ranks asked for, in the norm of the loss where there are inputs."""
    kinds = [_kind(layer, spatial) for layer in layers]
    weights = [kind.as_matrix(layer.weight.detach()) for kind, layer in zip(kinds, layers, strict=True)]
    check_real(*weights)
    ranks = [_rank(W, rank) for W in weights]
    if inputs is None and compression is None:
        return [kind.from_dense(layer, r, tau) for kind, layer, r in zip(kinds, layers, ranks, strict=True)]
    factors = {} if inputs is None else kronecker_factors(model, layers, inputs, spatial)
    parts = [terms(W, factors.get(layer)) for W, layer in zip(weights, layers, strict=True)]
    if compression is not None:
        ranks = _ranks_for(model, weights, parts, compression)
    made = []
    for kind, layer, part, r in zip(kinds, layers, parts, ranks, strict=True):
        if r is None:
            made.append(layer)
            continue
        within = r if tau is None else max(1, rank_within(part.sigma, tau))
        low_rank = kind.in_place_of(layer)
        low_rank.factors = part.matrix(min(r, within), layer.weight.dtype)
        made.append(low_rank)
    return made


def _ranks_for(
    model: nn.Module, weights: list[Tensor], parts: list[Terms], compression: float
) -> list[int | None]:
    """Ranks for a budget of parameters, None for a layer whose factors would cost as much as its weight."""
    cost, shapes = cost_of(model), [tuple(W.shape) for W in weights]
    others = cost.evaluation_parameters - sum(W.numel() for W in weights)
    budget = budget_for(compression, cost.dense_parameters, others, shapes)
    ranks = allot(budget, [part.sigma.square().tolist() for part in parts], shapes)
    return [
        None if r * sum(shape) >= shape[0] * shape[1] else r for r, shape in zip(ranks, shapes, strict=True)
    ]


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
        model = _kind(model, _is_spatial(model, state["U"])).in_place_of(model)
    made: dict[nn.Module, LowRankLayer] = {}
    for name, dense in list(model.named_modules(remove_duplicate=False)):
        if type(dense) in LOW_RANK_TYPES and f"{name}.S" in state:
            if dense not in made:
                made[dense] = _kind(dense, _is_spatial(dense, state[f"{name}.U"])).in_place_of(dense)
            model.set_submodule(name, made[dense])
    model.load_state_dict(state)
    return model


def _is_spatial(dense: nn.Linear | nn.Conv2d, U: Tensor) -> bool:
    """Whether a basis has a row for every row of every filter, and not one for every filter."""
    return len(U) != len(dense.weight)

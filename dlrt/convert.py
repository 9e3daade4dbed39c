"""Dense networks to low-rank ones and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral

from torch import Tensor, nn

from dlrt.adapters import adapters
from dlrt.attention import Attention, pack
from dlrt.blocks import Blocks, block_rows, features, is_linear, is_within, rows_in
from dlrt.checks import check_compression, check_real, check_tolerance, check_whole
from dlrt.convertible import LOW_RANK_TYPES, convertible_layers
from dlrt.convolutions import SpatialLowRankConv2d
from dlrt.costs import compression as cost_of
from dlrt.curvature import Terms, kronecker_factors, terms
from dlrt.factors import Factors, as_thin_layers
from dlrt.layers import LowRankLayer
from dlrt.lowrank import LowRank, rank_within
from dlrt.ranks import allocate_ranks, budget_for, pays
from dlrt.replacing import become


def to_low_rank(
    model: nn.Module,
    rank: int | float | None = None,
    tau: float | None = None,
    skip: Iterable[str] = (),
    inputs: Tensor | None = None,
    compression: float | None = None,
    spatial: bool = False,
    split: Mapping[str, int | Sequence[int]] | None = None,
    min_rank: int = 1,
) -> nn.Module:
    """Make every nn.Linear and nn.Conv2d of a model, in place, its truncated SVD; give the model back.

    Layers stay the same objects, so whatever else holds one trains it, too; a module that uses `layer.weight`
    without calling the layer trains it as well. nn.MultiheadAttention becomes a `dlrt.Attention`, with such
    layers for query, key, value and output, and the Conv1D of transformers `dlrt.Blocks` of one. Make the
    optimizer afterwards: S is a new parameter. ValueError for an option that is impossible, alone or beside
    others.

    - rank: a whole number (a layer too small for it gets its full rank), a share in (0, 1] of each layer's
      full rank, or None for the full rank.
    - tau: singular values up to that share of each weight's norm are dropped.
    - compression: instead of both the evaluation compression, a fraction, that the model has at least. The
      singular values of all layers, squared and each as a share of its layer's, compete for the
      parameters, see `dlrt.ranks`. A layer whose factors would cost as much as its weight stays dense.
    - inputs: a batch (N, ...) for a classifier. The SVD is then that of √G W √A, which keeps what the loss
      needs, see `dlrt.curvature`: a trained network loses much less accuracy. It takes an n x n matrix
      of float64 for every layer with n inputs.
    - spatial: a kernel is the matrix (out_channels * height, in_channels * width) and not (out_channels,
      in_channels * height * width), see `dlrt.SpatialLowRankConv2d`. Full rank then has more parameters
      than the kernel: with as many channels in as out half of it has as many, a fifth 60 % fewer.
    - skip: names of the modules that stay dense, with all that they contain.
    - split: packed linear layers that become low-rank in parts, `dlrt.Blocks`: by name, or the last parts of
      it, how many equal blocks the rows of the weight are, or how many rows each has. {"qkv": 3}
    - min_rank: the smallest rank that `compression` may leave to a layer. A `dlrt.DLRT` made afterwards has
      2 by default, and raises lower ranks to its own unless its max_rank is lower.

    A warning names each layer that stays dense although it has a weight matrix: grouped convolutions, weights
    that two modules share (the head of a language model that is tied to its embedding), layers in parts whose
    bias others share, recurrent layers, attention with add_bias_kv or add_zero_attn, layers with hooks,
    parametrized and lazy ones, subclasses and others with a weight matrix of their own; low-rank layers stay
    as they are. Embeddings and convolutions that are not two-dimensional stay dense without a warning.
    """
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _check(model, rank, tau, skip, compression)
    _check_inputs(inputs)
    check_whole("min_rank", min_rank)
    rows = block_rows(model, split or {})
    if rows and all(is_within(name, skip) for name in rows):
        raise ValueError(f"split names {', '.join(rows)}, which skip leaves dense: give one of them")
    try:
        layers = convertible_layers(model, skip, rows)
        cut = _cut(model, layers, rank, tau, inputs, compression, spatial, min_rank)
        for layer, made in zip(layers, cut, strict=True):
            become(layer, made)
    finally:
        pack(model)  # attention and blocks of which nothing became low-rank
    return model


def _check(
    model: nn.Module,
    rank: int | float | None,
    tau: float | None,
    skip: tuple[str, ...],
    compression: float | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument must be a model, an nn.Module, got {type(model).__name__}")
    names = [name for name, _ in model.named_modules() if name]
    if unknown := sorted(set(skip) - set(names)):
        raise ValueError(
            f"skip names no module of the model: {', '.join(unknown)}; it has {', '.join(names)}"
        )
    share, whole = isinstance(rank, float), isinstance(rank, Integral) and not isinstance(rank, bool)
    if rank is not None and not (0 < rank <= 1 if share else whole and rank >= 1):
        raise ValueError(
            f"rank must be an int of at least 1, a share in (0, 1] as a float, or None, got {rank!r}"
        )
    check_tolerance(tau)
    check_compression(compression)
    if compression is not None and (rank is not None or tau is not None):
        raise ValueError(f"compression must come without rank and tau, got rank {rank!r} and tau {tau!r}")


def _check_inputs(inputs: Tensor | None) -> None:
    if inputs is None:
        return
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or len(inputs) == 0:
        came = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be a batch of the model's inputs, a tensor (N, ...), got {came}")
    if not inputs.isfinite().all():
        raise ValueError("inputs must be finite, got inf or nan: leave out the samples that are damaged")


def _check_weights(model: nn.Module, weights: dict[nn.Module, Tensor]) -> None:
    for name, module in model.named_modules():
        W = weights.get(module)
        if W is not None and not W.is_meta and not W.isfinite().all():
            raise ValueError(
                f"weights must be finite, got inf or nan in {name or type(module).__name__}: load those from "
                "before the training diverged"
            )


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
    min_rank: int,
) -> list[LowRankLayer]:
    """The layers at the ranks asked for, in the norm of the loss where there are inputs."""
    kinds = {layer: _kind(layer, spatial) for layer in layers}
    weights = [kind.as_matrix(layer.weight.detach()) for layer, kind in kinds.items()]
    check_real(*weights)
    _check_weights(model, dict(zip(layers, weights, strict=True)))
    ranks = [_rank(W, rank) for W in weights]
    if inputs is None and compression is None:
        return [kinds[layer].from_dense(layer, r, tau) for layer, r in zip(layers, ranks, strict=True)]
    factors = {} if inputs is None else kronecker_factors(model, kinds, inputs)
    parts = [terms(W.double(), factors.get(layer)) for W, layer in zip(weights, layers, strict=True)]
    if compression is not None:
        ranks = _ranks_for(model, weights, parts, compression, min_rank)
    made = []
    for layer, part, r in zip(layers, parts, ranks, strict=True):
        if r is None:
            made.append(layer)
            continue
        within = r if tau is None else max(1, rank_within(part.sigma, tau))
        low_rank = kinds[layer].in_place_of(layer)
        low_rank.factors = part.matrix(min(r, within), layer.weight.dtype)
        made.append(low_rank)
    return made


def _ranks_for(
    model: nn.Module, weights: list[Tensor], parts: list[Terms], compression: float, min_rank: int
) -> list[int | None]:
    """Ranks for a budget of parameters, None for a layer whose factors would cost as much as its weight."""
    cost, shapes = cost_of(model), [tuple(W.shape) for W in weights]
    others = cost.evaluation_parameters - sum(W.numel() for W in weights)
    least = [min(min_rank, *shape) for shape in shapes]
    budget = budget_for(compression, cost.dense_parameters, others, shapes, least)
    ranks = allocate_ranks(budget, [part.sigma.square().tolist() for part in parts], shapes, min_rank)
    return [r if pays(r, shape) else None for r, shape in zip(ranks, shapes, strict=True)]


def to_dense(model: nn.Module) -> nn.Module:
    """Make every low-rank layer of a model, in place, the same map dense; give the model back."""
    return replace_layers(model, lambda layer: layer.to_dense())


def replace_layers(model: nn.Module, make: Callable[[LowRankLayer], nn.Module]) -> nn.Module:
    """Make every low-rank layer what make(layer) is; it stays the same object for whoever holds it.

    Attention and blocks of which no layer is low-rank any more are packed again. ValueError where there are
    adapters, which are no layers of their own.
    """
    if beside := [name or "the model" for name in adapters(model)]:
        raise ValueError(
            f"{', '.join(beside)} must have no adapters: call dlrt.merge_adapters(model) first, on a copy "
            "where they are still needed"
        )
    for layer in list(model.modules()):
        if isinstance(layer, LowRankLayer):
            become(layer, make(layer))
    return pack(model)


def load_factors(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load the state_dict of a low-rank network into the dense one that it was made of; give the model back.

    Layers that have factors in the state become low-rank, of the rank there, without a decomposition; those
    of which it has two thin layers, as of `export`, become such. RuntimeError where the state belongs to
    another network, as from load_state_dict.
    """
    for name, dense in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(dense) is nn.MultiheadAttention and any(key.startswith(f"{prefix}q_proj.") for key in state):
            become(dense, Attention(dense))  # the walk goes on in its four layers
        if is_linear(dense) and sum(rows := rows_in(state, prefix)) == features(dense)[1]:
            become(dense, Blocks(dense, rows))
        if type(dense) in LOW_RANK_TYPES:
            become(dense, _in_form_of(state, prefix, dense))
    pack(model).load_state_dict(state)
    return model


def _in_form_of(state: dict[str, Tensor], prefix: str, dense: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer low-rank or in plain factors, of any values, where the state has it so; else itself."""
    U, first, second = (state.get(prefix + name) for name in ("U", "0.weight", "1.weight"))
    if U is not None:  # a separable basis has a row for every row of every filter
        return _kind(dense, spatial=len(U) != len(dense.weight)).in_place_of(dense)
    if first is None or second is None or not first.dim() == second.dim() == dense.weight.dim():
        return dense
    layer = _kind(dense, spatial=second.dim() == 4 and second.shape[2] > 1).in_place_of(dense)
    rows, columns, r = *layer.shape, len(first)
    zeros = layer.S.new_zeros
    layer.factors = LowRank(zeros(rows, r), zeros(r, r), zeros(columns, r))
    return Factors(*as_thin_layers(layer))

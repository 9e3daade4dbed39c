"""What a network costs in parameters, and the spectra of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrt.adapters import adapters
from dlrt.factors import Factors
from dlrt.layers import LowRankLayer
from dlrt.lowrank import at_least_single
from dlrt.ranks import budget_for, parameters


@dataclass(frozen=True)
class Compression:
    """Parameters of a network, weights only: biases and norms are left out on both sides.

    A layer of rank r with an m x n weight counts r (m + n) for evaluation, or m n where that is less (then it
    is kept as a dense weight, see `dlrt.export`); for training the factors of a step in augmented bases,
    k m + k l + l n with k = min(2 r, m), l = min(2 r, n). What the optimizer keeps beside them, velocity
    (which a dense layer has as well) and second moments, is not counted. Plain factors count r (m + n) for
    both, a dense layer m n everywhere. The compressions are 1 - parameters / dense parameters, in %.
    Schotthöfer et al. 2022.
    """

    evaluation_parameters: int
    training_parameters: int
    dense_parameters: int
    ranks: dict[str, int]
    """Of low-rank layers, by module name."""

    @property
    def compressed(self) -> bool:
        """Whether a layer is in factors, low-rank or plain ones."""
        return bool(self.ranks) or self.evaluation_parameters < self.dense_parameters

    @property
    def evaluation_compression(self) -> float:
        return 100 * (1 - self.evaluation_parameters / self.dense_parameters)

    @property
    def training_compression(self) -> float:
        return 100 * (1 - self.training_parameters / self.dense_parameters)


def compression(model: nn.Module) -> Compression:
    """Count a network's weights and say the rank of each of its low-rank layers, by module name.

    Of a network with adapters those that are trained: an adapter stands for a whole weight, which rests.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}
    factors = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    others = [p for p in model.parameters() if p.dim() > 1 and id(p) not in factors]
    if adapters(model):
        layers = {name: layer for name, layer in layers.items() if layer.S.requires_grad}
        others = [p for p in others if p.requires_grad]
    rest = sum(p.numel() for p in others)
    evaluation = training = dense = rest
    counted = {id(p) for p in others}
    for pair in (module for module in model.modules() if isinstance(module, Factors)):
        if any(id(p) in counted for p in pair.parameters()):
            m, n = pair.shape
            dense += m * n - pair.rank * (m + n)
    for layer in layers.values():
        (m, n), r = layer.shape, layer.rank
        k, l = min(2 * r, m), min(2 * r, n)  # noqa: E741
        evaluation += parameters(r, (m, n))
        training += k * m + k * l + l * n
        dense += m * n
    if dense == 0:
        raise ValueError("the model has no weights to count (no parameter with two or more dimensions)")
    return Compression(evaluation, training, dense, {name: layer.rank for name, layer in layers.items()})


def budget_between(
    model: nn.Module, layers: Iterable[LowRankLayer], compression_wanted: float, least_ranks: Sequence[int]
) -> tuple[int, int]:
    """How many parameters these layers have, and how many they may have at a compression, a fraction.

    The least ranks are those of each layer, or its full one where that is less.
    """
    cost, shapes = compression(model), [layer.shape for layer in layers]
    held = sum(parameters(layer.rank, layer.shape) for layer in layers)
    others = cost.evaluation_parameters - held
    least = [min(r, *shape) for r, shape in zip(least_ranks, shapes, strict=True)]
    now = [layer.rank for layer in layers]  # lower ones are raised by the first decision
    start = sum(parameters(max(ranks), shape) for *ranks, shape in zip(now, least, shapes, strict=True))
    end = budget_for(compression_wanted, cost.dense_parameters, others, shapes, least)
    return start, min(start, end)


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of every linear and convolutional weight as a matrix, by module name, descending.

    Of a low-rank layer those of S, which W = U S Vᵀ shares; of plain factors those of A B.
    """
    values, halves = {}, {half for pair in model.modules() if isinstance(pair, Factors) for half in pair}
    for name, module in model.named_modules():
        if isinstance(module, Factors):
            B, A = (at_least_single(matrix.detach()) for matrix in module.matrices())
            values[name] = torch.linalg.svdvals(torch.linalg.qr(A).R @ torch.linalg.qr(B.mT).R.mT)
        elif module in halves:
            continue
        elif isinstance(module, LowRankLayer):
            values[name] = torch.linalg.svdvals(at_least_single(module.S.detach()))
        elif type(module) in (nn.Linear, nn.Conv2d):
            values[name] = torch.linalg.svdvals(at_least_single(module.weight.detach().flatten(1)))
    return values

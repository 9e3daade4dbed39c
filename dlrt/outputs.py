"""What of a weight the outputs of its layer need: their principal components over a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dlrt.lowrank import LowRank, truncated_svd


def observe(model: nn.Module, inputs: Tensor, layers: Iterable[nn.Module], watch: Callable) -> None:
    """One pass of the inputs in evaluation mode; watch(layer, its inputs, its outputs) sees every call.

    Afterwards every module is in the mode that it was in.
    """
    handles = [layer.register_forward_hook(watch) for layer in layers]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was


def output_covariances(
    model: nn.Module, layers: Iterable[nn.Linear | nn.Conv2d], inputs: Tensor
) -> dict[nn.Module, Tensor]:
    """The covariance (m, m) of the m outputs of each layer, over the inputs (N, ...) and all positions.

    In evaluation mode, as float64; a layer that is not called has none.
    """
    moments: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def watch(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
        y = (y.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else y).flatten(end_dim=-2).double()
        sums, products, count = moments.get(layer, (0, 0, 0))  # outputs themselves would fill the memory
        moments[layer] = sums + y.sum(0), products + y.mT @ y, count + len(y)

    observe(model, inputs, layers, watch)
    return {
        layer: products / count - torch.outer(sums, sums) / count**2
        for layer, (sums, products, count) in moments.items()
    }


def project(W: Tensor, covariance: Tensor, rank: int | None = None, tau: float | None = None) -> LowRank:
    """The matrix of that rank whose outputs W x lie nearest to those of W (m, n), as U S Vᵀ.

    W becomes P Pᵀ W, with the leading principal components P (m, r) of the outputs; tau drops what is at most
    that share of their deviation, in all. Zhang et al. 2016, "Accelerating very deep convolutional networks
    for classification and detection", the linear case.
    """
    variances, components = torch.linalg.eigh(covariance)
    root = components * variances.clamp(min=0).sqrt()
    P = truncated_svd(root, tau, max_rank=rank)[0].to(W.dtype)
    Y = LowRank.from_dense(P.mT @ W)
    return LowRank(P @ Y.U, Y.S, Y.V)

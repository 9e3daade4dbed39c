"""One layer, or one tensor, in the place of another."""

import torch
from torch import Tensor, nn


def take_over(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """Give a new low-rank layer what a dense one has beside its weight: bias, mode, type, device."""
    layer.to(dense.weight)
    layer.bias = dense.bias
    layer.S.requires_grad_(dense.weight.requires_grad)
    return layer.train(dense.training)


def give_back(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """The reverse of `take_over`."""
    dense.weight = nn.Parameter(layer.weight.detach().contiguous(), requires_grad=layer.S.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)


def become(module: nn.Module, other: nn.Module) -> None:
    """Give a module class and contents of another one; it stays the same object for whoever holds it."""
    module.__class__, module.__dict__ = type(other), other.__dict__


@torch.no_grad()
def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of any shape; it stays the same object for whoever holds it.

    Written in place, so that autograd notices where a backward pass still needs the old values.
    """
    if parameter.shape != data.shape:
        parameter.grad = None
        # torch expects a gradient of the old shape while an old loss is alive, unless the type changed
        other = torch.half if data.dtype != torch.half else torch.float
        parameter.data = data.new_empty(0, dtype=other)
        parameter.data = torch.empty_like(data, memory_format=torch.contiguous_format)
    parameter.copy_(data)

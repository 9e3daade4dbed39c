"""The recorded map of a layer for torch.compile: an operator that stays whole, forwards and backwards.

A compiled backward pass is a pure function of tensors, and a recorded map leaves its products behind. To the
compiler the two operators here have no inside, so that a network becomes one graph, without breaks. They find
the layer by the number of its `Gradient`, not by its bases: of the factors only S is an input of the graph.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dlrt.gradient import RECORDING, Gradient, adjoint

CALLS = itertools.count()


def compiled_map(x: Tensor, S: Tensor, bias: Tensor | None, number: int) -> Tensor:
    """What `RecordedMap` computes and records, for the layer whose gradient has that number."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:  # autocast does not look inside
        x = x.to(torch.get_autocast_dtype(device))
    return _forward(x, S, bias, number)[0]


def _recording(number: int) -> Gradient:
    gradient = RECORDING.get(number)
    if gradient is None:
        raise RuntimeError(
            "the gradient of a compiled forward pass needs a layer that still records, and its bases "
            "were frozen, or another DLRT was made of the model, in between: take the forward pass again"
        )
    return gradient


@torch.library.custom_op("dlrt::recorded_map", mutates_args=())
def _forward(x: Tensor, S: Tensor, bias: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    """y = x V Sᵀ Uᵀ + bias, and a = x V."""
    gradient = _recording(number)
    gradient.expect()
    return _map(x, gradient.layer.U, S, gradient.layer.V, bias, number)


@_forward.register_fake
def _(x: Tensor, S: Tensor, bias: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    (m, n), r = _recording(number).layer.shape, S.shape[0]
    return _map(x, S.new_empty(m, r), S, S.new_empty(n, r), bias, number)


def _map(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    layer, bias = _recording(number).layer, bias if bias is None else bias.to(x.dtype)
    a = layer.project(x, V.to(x.dtype))
    return layer.lift(a, U.to(x.dtype), S.to(x.dtype), bias), a


@torch.library.custom_op("dlrt::recorded_adjoint", mutates_args=())
def _backward(
    g: Tensor, x: Tensor, a: Tensor, S: Tensor, number: int, call: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    """The gradients for x (empty where nobody asks for it) and for S.

    call differs from one call in a graph to the next, or the compiler would make one of two that are equal,
    which then record once.
    """
    gradient = _recording(number)
    if gradient.keep_samples:
        x, g = x.clone(), g.clone()  # they wait for the step, and the compiler gives their memory to others
    x_grad, S_grad = adjoint(gradient, g, x, a, S, of_x)
    return _laid_out_as(x, x_grad) if of_x else g.new_empty(0), S_grad.contiguous()


def _laid_out_as(x: Tensor, x_grad: Tensor) -> Tensor:
    """A gradient with the strides of x, which are those that the compiler was told."""
    same = x_grad.stride() == x.stride()
    return x_grad if same else torch.empty_like(x, dtype=x_grad.dtype).copy_(x_grad)


@_backward.register_fake
def _(
    g: Tensor, x: Tensor, a: Tensor, S: Tensor, number: int, call: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    x_grad = torch.empty_like(x, dtype=g.dtype) if of_x else g.new_empty(0)
    return x_grad, g.new_empty(S.shape)


def _remember(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, S, _, ctx.number = inputs
    ctx.save_for_backward(x, output[1], S)


def _gradients(ctx, g: Tensor, _) -> tuple[Tensor | None, ...]:
    of_x, _, of_bias, _ = ctx.needs_input_grad
    x_grad, S_grad = _backward(g, *ctx.saved_tensors, ctx.number, next(CALLS), of_x)
    total = _recording(ctx.number).layer.total(g) if of_bias else None
    return x_grad if of_x else None, S_grad, total, None


_forward.register_autograd(_gradients, setup_context=_remember)

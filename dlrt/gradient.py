"""The gradient of a low-rank layer as an operator, recorded during an ordinary backward pass."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class Maps(Protocol):
    """The maps that a layer y = x V Sᵀ Uᵀ + bias is made of, forwards and backwards.

    x, y and their gradients are matrices in a linear layer, pictures in a convolution; the formulas read them
    as matrices with a row for every sample and position and a column for every feature. (Where a layer adds
    several rows of x W to a row of y, as a vertical convolution does, they stand for y before that.)
    W = U S Vᵀ is (m, n).
    """

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    shape: tuple[int, int]
    rank: int
    gradient: Gradient | None

    def project(self, x: Tensor, V: Tensor) -> Tensor:
        """a = x V."""

    def lift(self, a: Tensor, U: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
        """y = a Sᵀ Uᵀ + bias."""

    def lift_adjoint(self, g: Tensor, U: Tensor, x: Tensor) -> Tensor:
        """b = g U, for g the gradient for y; x says how large b is where a stride leaves that open."""

    def project_adjoint(self, b: Tensor, S: Tensor, V: Tensor, x: Tensor) -> Tensor:
        """b S Vᵀ, the gradient for x."""

    def left_product(self, g: Tensor, a: Tensor) -> Tensor:
        """gᵀ a, which is G V (m, r) for a = x V."""

    def right_product(self, x: Tensor, b: Tensor) -> Tensor:
        """xᵀ b, which is Gᵀ U (n, r) for b = g U."""

    def whole_product(self, g: Tensor, x: Tensor) -> Tensor:
        """gᵀ x, which is G (m, n)."""

    def core_product(self, b: Tensor, a: Tensor) -> Tensor:
        """bᵀ a, which is Uᵀ G V (r, r)."""

    def total(self, g: Tensor) -> Tensor:
        """The sum of g for every output, (outputs,): the gradient for the bias."""


class RecordedMap(torch.autograd.Function):
    """The map of a layer; its backward pass leaves the layer's `Gradient` the products that it makes."""

    @staticmethod
    def forward(ctx, x: Tensor, S: Tensor, bias: Tensor | None, layer: Maps) -> Tensor:
        a = layer.project(x, layer.V)
        ctx.save_for_backward(x, a, S)
        ctx.gradient = layer.gradient
        y = layer.lift(a, layer.U, S, bias)
        # the same memory, but no view to autograd, which refuses in-place activations on views made here
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        of_x, _, of_bias, _ = ctx.needs_input_grad
        x_grad, S_grad = adjoint(ctx.gradient, g, *ctx.saved_tensors, of_x)
        return x_grad, S_grad, ctx.gradient.layer.total(g) if of_bias else None, None


def adjoint(
    gradient: Gradient, g: Tensor, x: Tensor, a: Tensor, S: Tensor, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients for x, if asked for, and for S; what was made on the way is recorded."""
    layer = gradient.layer
    # under autocast g may be bfloat16 or float16, and the factors never are
    x, a, S, U, V = (T.to(g.dtype) for T in (x, a, S, layer.U, layer.V))
    dense = _dense_is_cheaper(layer, g, a)
    b = layer.lift_adjoint(g, U, x) if of_x or not dense else None
    if dense:
        G = layer.whole_product(g, x)
        gradient.record(Contribution(dense=G))
        S_grad = U.mT @ G @ V
    else:
        GV, GtU = layer.left_product(g, a), layer.right_product(x, b)
        gradient.record(Contribution(GV=GV, GtU=GtU, sample=(x, g)))
        S_grad = layer.core_product(b, a)
        if g.dtype == torch.float16:  # a GradScaler must see what overflows, and sees S.grad alone
            S_grad = S_grad + 0 * (GV.float().sum() + GtU.float().sum())
    return layer.project_adjoint(b, S, V, x) if of_x else None, S_grad


def _dense_is_cheaper(layer: Maps, g: Tensor, a: Tensor) -> bool:
    """Whether G itself costs less than its products: at high rank, with many more rows than columns.

    Counted are G V and Gᵀ U, and as much again for the new blocks of the bases; with G they are products of
    matrices.
    """
    (m, n), r = layer.shape, layer.rank
    of_g, of_a = g.numel() // g.shape[1], a.numel() // a.shape[1]  # rows
    return of_g * m * n + 3 * m * n * r < 2 * r * (of_g * m + of_a * n)


@dataclass
class Contribution:
    """What one use of a layer in one backward pass adds: products and a sample (x, g), or a matrix."""

    GV: Tensor | None = None
    GtU: Tensor | None = None
    dense: Tensor | None = None
    sample: tuple[Tensor, Tensor] | None = None


NUMBERS = itertools.count()
RECORDING: WeakValueDictionary[int, Gradient] = WeakValueDictionary()  # for operators that take no objects


class Gradient:
    """The gradient G = ∇_W L = Σ gᵀ x (m, n) of one layer, an operator that knows G @ V and G.T @ U.

    x are the layer's inputs and g the gradients for its outputs; the sum is over samples, positions, and all
    backward passes since the last step. The products with the layer's own bases are formed during the
    backward pass. Further ones ask for x and g, which are kept until the step where keep_samples is set (the
    new block of the augmented integrator needs one). Only where it costs less than its products is G formed
    as a matrix.

    It goes with S.grad: what a backward pass contributes counts once it has reached S.grad, so a gradient
    for inputs alone (torch.autograd.grad) adds nothing; and the next forward pass forgets it if S.grad was
    reset to None.

    With several processes the products with the layer's own bases become the sums over all of them (`join`);
    any other product stays this process's part of the sum.
    """

    def __init__(self, layer: Maps, keep_samples: bool) -> None:
        if layer.gradient is not None:
            layer.gradient.stop()
        self.layer, self.keep_samples = layer, keep_samples
        self.paused = False  # while the bases stay, an ordinary backward pass for S is all that is needed
        self.number = next(NUMBERS)
        RECORDING[self.number] = self
        self._hook = layer.S.register_post_accumulate_grad_hook(self._add_pending)
        layer.gradient = self
        self.clear()

    def stop(self) -> None:
        """Record no more: from now on the layer is an ordinary module with frozen bases."""
        self._hook.remove()
        self.layer.gradient = None

    def clear(self) -> None:
        self._pending: list[tuple[int, Contribution]] = []
        self.samples: list[tuple[Tensor, Tensor]] = []
        self.GV: Tensor | None = None  # the products with the layer's own bases
        self.GtU: Tensor | None = None
        self.dense: Tensor | None = None  # the part of G that was cheaper to form
        self._joined: tuple[Tensor, Tensor] | None = None
        self._summed: Tensor | None = None  # the S.grad that is a sum over all processes
        self._S_grad: Tensor | None = None

    @property
    def summed(self) -> bool:
        """Whether S.grad, and G V and Gᵀ U where there are any, are the sums over all processes."""
        return self._summed is not None

    def join(self, products: tuple[Tensor, Tensor] | None) -> None:
        """Take over the sums G V, Gᵀ U over all processes; S.grad is one. `distributed.reduce_gradients`."""
        self._joined, self._summed = products, self.layer.S.grad
        self._S_grad = self.layer.S.grad.clone()

    @property
    def empty(self) -> bool:
        return self.GV is None and self.dense is None

    def expect(self) -> None:
        """Before a forward pass: what was recorded is stale if S.grad was reset."""
        recomputing = _backward_pass() != NO_BACKWARD_PASS  # activation checkpointing, in the midst of one
        if self.layer.S.grad is None and not recomputing:
            self.clear()

    def record(self, contribution: Contribution) -> None:
        """Keep a contribution until the backward pass that made it has reached S.grad."""
        self._pending.append((_backward_pass(), contribution))

    def _add_pending(self, S: Tensor) -> None:
        if self._summed is S.grad:
            raise RuntimeError(
                "all backward passes of a step must come before reduce_gradients, and one came after it: "
                "call zero_grad() and repeat the step"
            )
        self._summed = None  # S.grad was reset, and is this process's part again
        dtype = S.dtype
        for made_by, new in self._pending:
            if made_by != _backward_pass():
                continue
            if new.dense is not None:
                self.dense = _sum(self.dense, new.dense.to(dtype))
                continue
            self.GV, self.GtU = _sum(self.GV, new.GV.to(dtype)), _sum(self.GtU, new.GtU.to(dtype))
            if self.keep_samples:
                self.samples.append(new.sample)
        self._pending.clear()
        self._S_grad = S.grad.clone()

    @property
    def scale(self) -> Tensor:
        """The factor by which S.grad changed since the backward pass, a tensor without dimensions.

        Gradient clipping and the unscaling of a GradScaler reach S.grad, but not what is recorded here.
        """
        was, now = self._S_grad.flatten(), self.layer.S.grad.flatten()
        largest = was.abs().amax()  # the squares of a small gradient would underflow
        was, now = was / largest, now / largest
        return torch.where(largest > 0, (was @ now) / (was @ was), 1)

    def __matmul__(self, V: Tensor) -> Tensor:
        layer = self.layer
        if V is layer.V and self._joined is not None:
            return self._joined[0]
        product = None if self.dense is None else self.dense @ V
        if V is layer.V:
            return _sum(product, self.GV)
        self._require_samples()
        for x, g in map(_with_range, self.samples):
            product = _sum(product, layer.left_product(g, layer.project(x, V.to(x.dtype))).to(V.dtype))
        return product

    def _require_samples(self) -> None:
        if self.GV is not None and not self.samples:
            raise RuntimeError(
                "products with other bases need the samples: make it Gradient(layer, keep_samples=True)"
            )

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    @property
    def columns(self) -> Tensor | None:
        """gᵀ, whose columns span the range of G, where one batch of a linear layer was recorded.

        None after `join`, since the other processes have columns too. Then G V stands in for them, and where
        the joined batch has fewer samples than V has columns, directions without gradient come with it.
        """
        return self._rows(1)

    def _rows(self, which: int) -> Tensor | None:
        if len(self.samples) != 1 or self.dense is not None or self._joined is not None:
            return None
        if self.samples[0][which].dim() != 2:
            return None
        return self.samples[0][which].mT.to(self.layer.S.dtype)


class Transposed:
    """Gᵀ for a `Gradient` G."""

    def __init__(self, gradient: Gradient) -> None:
        self.T = gradient

    @property
    def columns(self) -> Tensor | None:
        """xᵀ, whose columns span the range of Gᵀ, where one batch of a linear layer was recorded."""
        return self.T._rows(0)

    def __matmul__(self, U: Tensor) -> Tensor:
        G, layer = self.T, self.T.layer
        if U is layer.U and G._joined is not None:
            return G._joined[1]
        product = None if G.dense is None else G.dense.mT @ U
        if U is layer.U:
            return _sum(product, G.GtU)
        G._require_samples()
        for x, g in map(_with_range, G.samples):
            b = layer.lift_adjoint(g, U.to(g.dtype), x)
            product = _sum(product, layer.right_product(x, b).to(U.dtype))
        return product


NO_BACKWARD_PASS = -1


def _backward_pass() -> int:
    """A number for the backward pass in which this is called, asked for as torch's checkpointing does."""
    return torch._C._current_graph_task_id()


def _with_range(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(x, g), float32 instead of float16: a loss scale fills its range, and new products may be larger."""
    return tuple(T.float() if T.dtype == torch.float16 else T for T in sample)


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """total + term, where None is zero."""
    return term if total is None else total if term is None else total + term

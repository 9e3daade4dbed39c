"""Products with W = U S Vᵀ and their backward passes: the weight itself, and the map of a linear layer.

That maps x to y = x V Sᵀ Uᵀ + bias: two thin maps with a small one in between. With G = ∇_W L, K = U S and
L = V Sᵀ, the backward pass gives U the K-gradient G V, V the L-gradient Gᵀ U and S the S-gradient Uᵀ G V, as
their ordinary `.grad`: all that a step along the manifold needs (Schotthöfer et al. 2022, section 4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class DenseWeight(torch.autograd.Function):
    """W = U S Vᵀ (m, n), for whatever wants the dense weight; G comes back as K-, L- and S-gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return U @ S @ V.mT

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, G: Tensor) -> tuple[Tensor, ...]:
        U, V = ctx.saved_tensors
        G = G.to(U.dtype)
        GV = G @ V
        return GV, U.mT @ GV, G.mT @ U


class LinearMap(torch.autograd.Function):
    """y = x V Sᵀ Uᵀ + bias for rows x (b, n), and a = x V, which the backward pass needs again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        a = x @ V
        return F.linear(a @ S.mT, U, bias), a

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of a, which would be zeros
        ctx.save_for_backward(*inputs[:4], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor | None, _) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        of_x, of_U, of_S, of_V, of_bias = ctx.needs_input_grad
        x, U, S, V, a = in_type_of(g, ctx.saved_tensors)
        b = g @ U
        return (
            (b @ S) @ V.mT if of_x else None,
            g.mT @ a if of_U else None,  # gᵀ x V = G V
            b.mT @ a if of_S else None,
            x.mT @ b if of_V else None,
            g.sum(0) if of_bias else None,
        )


def in_type_of(g: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For backward passes: under autocast g may be bfloat16 or float16, and the factors never are."""
    return tuple(tensor.to(g.dtype) for tensor in tensors)

"""nn.MultiheadAttention with four linear layers in place of packed parameters: these may be low-rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dlrt.blocks import Blocks
from dlrt.replacing import become

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PACKED = ("in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS), "in_proj_bias")


class Attention(nn.Module):
    """Attention over heads with the layers q_proj, k_proj, v_proj and out_proj, made of a packed one.

    It has the map, the arguments and the attributes of nn.MultiheadAttention, and loads its state dict.
    """

    in_proj_weight = in_proj_bias = bias_k = bias_v = None
    q_proj_weight = k_proj_weight = v_proj_weight = None
    add_zero_attn = False
    _qkv_same_embed_dim = False  # so torch sees that its fast path, which takes packed weights, is not for it

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "kdim", "vdim"):
            setattr(self, name, getattr(packed, name))
        own = {name: p for name in PACKED if (p := packed._parameters.get(name)) is not None}
        parts = unpacked({name: p.detach() for name, p in own.items()})
        for name in PROJECTIONS:
            rows, columns = parts[f"{name}.weight"].shape
            layer = nn.Linear(columns, rows, bias=packed.in_proj_bias is not None, device="meta")
            for kind, _ in list(layer.named_parameters()):
                source = own.get(f"in_proj_{kind}", own.get(f"{name}_{kind}"))
                setattr(layer, kind, nn.Parameter(parts[f"{name}.{kind}"].clone(), source.requires_grad))
            setattr(self, name, layer)
        self.out_proj = packed.out_proj
        self.out_proj.__class__ = nn.Linear
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(N, L, E) with batch_first, (L, N, E) without, or (L, E); and weights ([N,] [heads,] L, S)."""
        if query.is_nested:
            raise TypeError(
                "low-rank attention must get padded tensors, got nested ones: set use_nested_tensor of the "
                "nn.TransformerEncoder to False"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal must come with the attn_mask that it tells of, got none: give both")
        batched = query.dim() == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not (batched and self.batch_first):
            q, k, v = (x.transpose(0, 1) if batched else x[None] for x in (q, k, v))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if key_padding_mask is not None:
            N, S = k.shape[0], k.shape[2]
            _check_mask("key_padding_mask", key_padding_mask, (N, S) if batched else (S,))
        mask = _added_mask(attn_mask, key_padding_mask, (*q.shape[:3], k.shape[2]), q.dtype)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5  # (N, heads, L, S)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            causal = is_causal and key_padding_mask is None
            y = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not (batched and self.batch_first):
            y = y.transpose(0, 1) if batched else y[0]
        return y, weights

    def packed(self) -> nn.MultiheadAttention:
        """nn.MultiheadAttention with the same map, trained where a layer is; the four must be dense."""
        layers, bias = [getattr(self, name) for name in PROJECTIONS], self.q_proj.bias is not None
        made = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        parts = {f"{name}_weight": [getattr(self, name).weight] for name in PROJECTIONS}
        if made._qkv_same_embed_dim:
            parts = {"in_proj_weight": [layer.weight for layer in layers]}
        if bias:
            parts["in_proj_bias"] = [layer.bias for layer in layers]
        for name, several in parts.items():
            trained = any(part.requires_grad for part in several)
            setattr(made, name, nn.Parameter(torch.cat(several).detach(), trained))
        made.out_proj = self.out_proj
        made.out_proj.__class__ = NonDynamicallyQuantizableLinear
        return made.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """What a state dict of nn.MultiheadAttention has packed is taken apart."""
        known = {name: state_dict.pop(prefix + name) for name in PACKED if prefix + name in state_dict}
        state_dict.update({prefix + name: part for name, part in unpacked(known).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def can_unpack(module: nn.Module) -> bool:
    """Whether a module is nn.MultiheadAttention that has a form as `Attention`."""
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


def unpacked(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that nn.MultiheadAttention packs, by the names of linear layers."""
    parts = {}
    for name, parameter in parameters.items():
        whose, kind = name.rsplit("_", 1)
        names = PROJECTIONS if whose == "in_proj" else (whose,)
        shares = zip(names, parameter.chunk(len(names)), strict=True)
        parts |= {f"{name}.{kind}": part for name, part in shares}
    return parts


def pack(model: nn.Module) -> nn.Module:
    """Pack attention and blocks whose layers are all dense again, in place; give the model back.

    An nn.TransformerEncoder around any other makes no nested tensors, which only packed weights can take,
    until they are packed.
    """
    for module in list(model.modules()):
        apart = isinstance(module, Attention | Blocks)
        if apart and all(type(layer) is nn.Linear for layer in module.children()):
            become(module, module.packed())
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        own = vars(encoder)
        if any(isinstance(module, Attention) for module in encoder.modules()):
            own.setdefault("nested_when_packed", own["use_nested_tensor"])
            own["use_nested_tensor"] = False
        elif "nested_when_packed" in own:
            own["use_nested_tensor"] = own.pop("nested_when_packed")
    return model


def _added_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scores: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to scores (N, heads, L, S); True in a mask means that a key is left out."""
    (N, heads, L, S), masks = scores, []
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, (L, S), (N * heads, L, S))
        masks.append(attn_mask.unflatten(0, (N, heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(N, 1, 1, S))
    for i, mask in enumerate(masks):
        if mask.dtype == torch.bool:
            masks[i] = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return sum(masks).to(dtype) if masks else None


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be of bool, or of the numbers that are added, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have the shape {allowed}, got {tuple(mask.shape)}")

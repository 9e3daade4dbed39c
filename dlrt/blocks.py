"""A packed linear layer as several side by side: each may be low-rank, with a rank of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers: x W + b, as nn.Linear with W transposed."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is what can be taken apart."""
    return type(module) is nn.Linear or is_conv1d(module)


class Blocks(nn.ModuleList):
    """Linear layers, whose outputs lie side by side, made of one whose weight packs theirs by rows.

    It has the map of the packed layer, nn.Linear or the Conv1D of transformers, and loads its state dict.
    `rows` are those of each block, which add up to the outputs.
    """

    def __init__(self, packed: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.rows = type(packed), list(rows)
        parts = [self._apart(name, p.detach()) for name, p in packed.named_parameters()]
        for i, outputs in enumerate(self.rows):
            block = nn.Linear(parts[0][i].shape[1], outputs, bias=len(parts) > 1, device="meta")
            for (name, p), of in zip(packed.named_parameters(), parts, strict=True):
                setattr(block, name, nn.Parameter(of[i].clone(), p.requires_grad))
            self.append(block)
        self.train(packed.training)

    @property
    def weight(self) -> Tensor:
        """The packed weight, for whoever does not call the layer; a new tensor at every call."""
        return self._turned(torch.cat([block.weight for block in self]))

    @property
    def bias(self) -> Tensor | None:
        return None if self[0].bias is None else torch.cat([block.bias for block in self])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self], dim=-1)

    def packed(self) -> nn.Module:
        """The packed layer with the same map; the blocks must be dense."""
        outputs, inputs, bias = sum(self.rows), self[0].in_features, self.bias
        with torch.device("meta"):
            made = nn.Linear(inputs, outputs, bias is not None) if self.kind is nn.Linear else None
            made = made or self.kind(outputs, inputs)
        made.weight = nn.Parameter(self.weight.detach().contiguous(), self[0].weight.requires_grad)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), self[0].bias.requires_grad)
        return made.train(self.training)

    def _turned(self, weight: Tensor) -> Tensor:
        return weight if self.kind is nn.Linear else weight.mT

    def _apart(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        """A parameter of the packed layer, by blocks."""
        return (self._turned(value) if name == "weight" else value).split(self.rows)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """What a state dict of the packed layer has is taken apart."""
        for name, size in (("weight", self.weight.shape), ("bias", (sum(self.rows),))):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape == size:  # else torch says that it has no such parameter
                parts = self._apart(name, state_dict.pop(prefix + name))
                state_dict.update({f"{prefix}{i}.{name}": part for i, part in enumerate(parts)})
        super()._load_from_state_dict(state_dict, prefix, *args)


def block_rows(model: nn.Module, split: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """The rows of each block of the layers that `split` names, by whole names."""
    if not isinstance(split, Mapping):
        raise TypeError(f'split must be a dict as {{"qkv": 3}}, got {split!r}')
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    outputs = {name: m.nf if is_conv1d(m) else m.out_features for name, m in linear.items()}
    rows = {}
    for stem, parts in split.items():
        named = [name for name in outputs if f".{name}".endswith(f".{stem}")]
        if not named:
            raise ValueError(f"split names no linear layer of the model: {stem}; it has {', '.join(outputs)}")
        for name in named:
            of = [outputs[name] // max(parts, 1)] * parts if isinstance(parts, Integral) else parts
            whole = isinstance(of, Sequence) and all(
                isinstance(count, Integral) and count > 0 for count in of
            )
            if not whole or sum(of) != outputs[name]:
                raise ValueError(
                    f"split must be a number of blocks, or their rows, that make up the {outputs[name]} "
                    f"outputs of {name}, got {parts!r}"
                )
            rows[name] = list(of)
    return rows


def rows_in(state: dict[str, Tensor], prefix: str) -> list[int]:
    """The rows of each block that a linear layer was split into, if so."""
    rows = []
    while (W := state.get(f"{prefix}{len(rows)}.U", state.get(f"{prefix}{len(rows)}.weight"))) is not None:
        rows.append(len(W))
    return rows

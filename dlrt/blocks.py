"""A packed linear layer as several side by side: each may be low-rank, with a rank of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers: x W + b, as nn.Linear with W transposed."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear or such a Conv1D, which `Blocks` can be made of."""
    return type(module) is nn.Linear or is_conv1d(module)


def features(linear: nn.Module) -> tuple[int, int]:
    """How many go in, and how many come out."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)


class Blocks(nn.ModuleList):
    """Linear layers, whose outputs lie side by side, made of one whose weight packs theirs by rows.

    It has the map of the packed layer, nn.Linear or the Conv1D of transformers, and loads its state dict.
    `rows` are those of each block, which add up to the outputs.
    """

    def __init__(self, packed: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.rows = type(packed), list(rows)
        self.in_features, self.out_features = features(packed)
        weights = self._split("weight", packed.weight.detach())
        biases = [None] * len(rows) if packed.bias is None else self._split("bias", packed.bias.detach())
        for weight, bias in zip(weights, biases, strict=True):
            block = nn.Linear(*weight.shape[::-1], bias=packed.bias is not None, device="meta")
            block.weight = nn.Parameter(weight.clone(), packed.weight.requires_grad)
            if packed.bias is not None:
                block.bias = nn.Parameter(bias.clone(), packed.bias.requires_grad)
            self.append(block)
        self.train(packed.training)

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        return list(self.children())[index]

    @property
    def weight(self) -> Tensor:
        """The packed weight, for whoever does not call the layer; a new tensor at every call."""
        return self._transposed(torch.cat([block.weight for block in self]))

    @property
    def bias(self) -> Tensor | None:
        return None if self[0].bias is None else torch.cat([block.bias for block in self])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self], dim=-1)

    def packed(self) -> nn.Module:
        """The packed layer with the same map, trained where a block is; the blocks must be dense."""
        with torch.device("meta"):
            if self.kind is nn.Linear:
                made = nn.Linear(self.in_features, self.out_features, self[0].bias is not None)
            else:
                made = self.kind(self.out_features, self.in_features)
        for name, joined in (("weight", self.weight), ("bias", self.bias)):
            if joined is not None:
                trained = any(getattr(block, name).requires_grad for block in self)
                setattr(made, name, nn.Parameter(joined.detach().contiguous(), trained))
        return made.train(self.training)

    def _transposed(self, weight: Tensor) -> Tensor:
        """A weight of nn.Linear as one of the packed layer, and the reverse."""
        return weight if self.kind is nn.Linear else weight.mT

    def _split(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        """A parameter of the packed layer, by blocks."""
        return (self._transposed(value) if name == "weight" else value).split(self.rows)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """What a state dict of the packed layer has is taken apart."""
        weight = self._transposed(torch.empty(self.out_features, self.in_features, device="meta"))
        for name, shape in (("weight", weight.shape), ("bias", (self.out_features,))):
            value = state_dict.get(prefix + name)
            if value is not None and value.shape == shape:  # else torch says that it has no such parameter
                parts = self._split(name, state_dict.pop(prefix + name))
                state_dict.update({f"{prefix}{i}.{name}": part for i, part in enumerate(parts)})
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_within(name: str, stems: Iterable[str]) -> bool:
    """Whether a module is one of those named, or within one."""
    return f"{name}.".startswith(tuple(f"{stem}." for stem in stems))


def block_rows(model: nn.Module, split: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """The rows of each block of the layers that `split` names, by whole names.

    ValueError where it names no layer, one layer twice, or not all of its rows.
    """
    if not isinstance(split, Mapping):
        raise TypeError(f'split must be a dict as {{"qkv": 3}}, got {split!r}')
    outputs = {name: features(module)[1] for name, module in model.named_modules() if is_linear(module)}
    found: dict[str, list[int]] = {}
    for stem, parts in split.items():
        names = [name for name in outputs if f".{name}".endswith(f".{stem}")]
        if not names:
            raise ValueError(f"split names no linear layer of the model: {stem}; it has {', '.join(outputs)}")
        for name in names:
            if name in found:
                raise ValueError(f"split names {name} twice, the second time by {stem!r}: give one of them")
            found[name] = _rows(parts, outputs[name])
            if sum(found[name]) != outputs[name]:
                raise ValueError(
                    f"split must be a number of blocks, or their rows, that make up the {outputs[name]} "
                    f"outputs of {name}, got {parts!r}"
                )
    return found


def _rows(parts: object, outputs: int) -> list[int]:
    """The rows of each block, none where the parts are neither a number of blocks nor numbers of rows."""

    def counts(number: object) -> bool:
        return isinstance(number, Integral) and not isinstance(number, bool) and number > 0

    if counts(parts):
        return [outputs // parts] * parts
    listed = isinstance(parts, list | tuple) and all(map(counts, parts))
    return [int(rows) for rows in parts] if listed else []


def rows_in(state: dict[str, Tensor], prefix: str) -> list[int]:
    """The rows of each block that a linear layer was split into, none where it was not."""
    rows: list[int] = []
    while True:  # low-rank, dense or in plain factors
        block = [f"{prefix}{len(rows)}.{name}" for name in ("U", "weight", "1.weight")]
        W = next((state[name] for name in block if name in state), None)
        if W is None:
            return rows
        rows.append(len(W))

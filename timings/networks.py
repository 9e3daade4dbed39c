"""The networks that all timings are about, with random low-rank layers, and the flags that choose them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dlrt import DLRT, LowRank, LowRankConv2d, LowRankLinear
from dlrt.flags import NATURAL, HelpFormatter, Parser
from dlrt.layers import LowRankLayer

FACTORS = "factors"  # in the place of an integrator: plain factors U Vᵀ, with SGD
LENET5_RANKS = {"conv1": 10, "conv2": 23, "fc1": 62}
RESTING = {"lr": 1e-4, "momentum": 0.9}  # of SGD: a step takes its time and changes next to nothing


def low_rank(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Random low-rank layers in the places named; one too small for its rank gets its full rank."""
    for name, rank in ranks.items():
        dense = getattr(model, name)
        rank = min(rank, *dense.weight.flatten(1).shape)
        if isinstance(dense, nn.Conv2d):
            layer = LowRankConv2d(dense.in_channels, dense.out_channels, dense.kernel_size, rank)
        else:
            layer = LowRankLinear(dense.in_features, dense.out_features, rank)
        setattr(model, name, decaying(layer))
    return model


def decaying(layer: LowRankLayer) -> LowRankLayer:
    """The layer with singular values that fall to a tenth: of many equal ones LAPACK's SVD may fail."""
    sigma = torch.logspace(0, -1, layer.rank)
    S = sigma * torch.linalg.vector_norm(layer.S.detach()) / torch.linalg.vector_norm(sigma)
    layer.factors = LowRank(layer.U, S.diag(), layer.V)
    return layer


def resting_dlrt(model: nn.Module, integrator: str, s_steps: int = 1, **bounds: float) -> DLRT:
    """DLRT of so small a step and tolerance that all ranks stay what they are, adaptive as they are."""
    bounds = {"tau": 1e-3, "min_rank": 1, **bounds}
    return DLRT(model, torch.optim.SGD, integrator=integrator, s_steps=s_steps, **bounds, **RESTING)


def resting(model: nn.Module, integrator: str | None, s_steps: int = 1) -> torch.optim.Optimizer:
    """DLRT with that integrator, or torch's SGD of a network without low-rank layers."""
    if integrator is None:
        return torch.optim.SGD(model.parameters(), **RESTING)
    return resting_dlrt(model, integrator, s_steps)


def mlp_ranks(rank: int) -> dict[str, int]:
    """The same rank in all layers of the five-layer net but the last, which stays dense."""
    return dict.fromkeys(("fc1", "fc2", "fc3", "fc4"), rank)


def make_parser(description: str, ranks: Sequence[int] = (5, 20, 80, 320)) -> Parser:
    """A parser with the flags that choose the five-layer nets."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--width", type=NATURAL, default=5120, help="of the five-layer net")
    parser.add_argument("--ranks", type=NATURAL, nargs="+", default=ranks, help="of the five-layer net")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent, help="where it writes to")
    return parser


def parse(parser: Parser) -> argparse.Namespace:
    """Parse, each rank once, and make the output folder; ranks and devices that cannot be are refused."""
    args = parser.parse_args()
    args.ranks = list(dict.fromkeys(args.ranks))
    if torch.device(getattr(args, "device", "cpu")).type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, for others memory is not counted, got {args.device}")
    if too_large := [str(rank) for rank in args.ranks if rank > args.width]:
        parser.error(f"--ranks must be at most --width, {args.width}, got {', '.join(too_large)}")
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)  # before anything is timed
    return args

"""Dynamical low-rank training: PyTorch networks whose every weight lives as W = U S Vᵀ with adaptive rank."""

__version__ = "0.1.0"

from importlib import import_module

from dlrt import fields, integrators
from dlrt.adapters import adapter_state, add_adapters, load_adapters, merge_adapters
from dlrt.attention import Attention
from dlrt.averaging import average
from dlrt.blocks import Blocks
from dlrt.convert import load_factors, to_dense, to_low_rank
from dlrt.convolutions import LowRankConv2d, SpatialLowRankConv2d
from dlrt.costs import Compression, compression, singular_values
from dlrt.export import export
from dlrt.layers import LowRankLayer
from dlrt.linear import LowRankLinear
from dlrt.lora import save_lora
from dlrt.lowrank import LowRank, truncate
from dlrt.optimizer import DLRT
from dlrt.pretrained import from_pretrained, save_pretrained

__all__ = [
    "DLRT",
    "Attention",
    "Blocks",
    "Compression",
    "LowRank",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "SpatialLowRankConv2d",
    "StreamingPCA",
    "adapter_state",
    "add_adapters",
    "average",
    "compression",
    "export",
    "fields",
    "from_pretrained",
    "integrators",
    "load_adapters",
    "load_factors",
    "merge_adapters",
    "save_lora",
    "save_pretrained",
    "singular_values",
    "to_dense",
    "to_low_rank",
    "truncate",
]


def __getattr__(name: str) -> object:
    """What is imported where it is asked for: for StreamingPCA scikit-learn is, which takes long."""
    if name == "StreamingPCA":
        from dlrt.streaming import StreamingPCA

        return StreamingPCA
    if name in ("baselines", "models"):
        return import_module(f"dlrt.{name}")
    raise AttributeError(f"module 'dlrt' has no attribute {name!r}")

"""The flags that name a network to explain, and the network that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlrt.cams import METHODS, default_layer, known, networks, spatial_layers
from dlrt.options import DEFAULT_DEVICE, NATURAL, Parser, device


def add_flags(parser: Parser, run_flag: str = "--checkpoint", several: bool = False) -> None:
    """A flag for a run, or --arch with --weights; how the network is used, and what explains it.

    With several, --method is a list.
    """
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    run = "a run's folder or its checkpoint.pt; all else about the network comes from there"
    what.add_argument(run_flag, dest="checkpoint", type=Path, metavar="RUN", help=run)
    arch = f"a network of torchvision, or ResNet20 and its like of dlrt; by default {known.DEFAULT_ARCH}"
    what.add_argument("--arch", metavar="NAME", help=arch)
    weights = "of --arch: a file, download (torchvision's) or random; by default what there is"
    add("--weights", metavar="FILE", help=weights)
    add("--device", type=device, default=DEFAULT_DEVICE, help="where to compute")
    names = ", ".join(METHODS)
    if several:
        told = f"of these, with commas between them: {names}; by default gradcam"
        add("--method", type=methods, action="extend", metavar="NAME,NAME", help=told)
    else:
        add("--method", type=str.lower, default="gradcam", choices=METHODS, metavar="NAME", help=names)


def methods(text: str) -> list[str]:
    """An argparse type: names of methods with commas between them."""
    names = [name.strip().lower() for name in text.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        told = f"invalid choice: {unknown[0]!r} (choose from {', '.join(METHODS)})"
        raise argparse.ArgumentTypeError(told)
    return names


def add_size_flag(parser: Parser) -> None:
    size = "pixels a side that the network sees; by default what it was trained at"
    parser.add_argument("--image-size", type=NATURAL, metavar="PIXELS", help=size)


def read(args: argparse.Namespace, size: int | None = None) -> networks.Network:
    """The network that the flags name, for pictures of a size; RunError or ValueError where there is none."""
    if args.checkpoint and args.weights:
        raise ValueError(f"--weights must come with --arch: {args.checkpoint} has weights of its own")
    if args.checkpoint:
        network = known.from_run(args.checkpoint)
    else:
        network = known.from_arch(args.arch or known.DEFAULT_ARCH, args.weights)
    return networks.placed(network, size, args.device)


def target_layer(network: networks.Network, name: str | None, method: str) -> str:
    """The name of the layer to explain; ValueError where the network or the method has no such layer."""
    if name is None:
        return default_layer(network.model, network.blank)
    if method == "fullgrad":
        raise ValueError("fullgrad looks at all layers: leave --target-layer out, or take another --method")
    layers = spatial_layers(network.model, network.blank)
    if name not in layers:
        raise ValueError(
            f"--target-layer must be a layer that is called once and gives feature maps, got {name!r}; "
            f"the last of them are {', '.join(list(layers)[-12:])}"
        )
    return name

"""The flags that name a network to explain, and the network that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlrt.cams import METHODS, default_layer, known, networks, spatial_layers
from dlrt.cams.explain import target_maps
from dlrt.cams.networks import Network
from dlrt.flags import NATURAL, PERCENT, RANK, TOLERANCE, Parser, device
from dlrt.options import DEFAULT_DEVICE


def add_flags(parser: Parser, run_flag: str = "--checkpoint", several: bool = False) -> None:
    """A flag for a run, or --arch with --weights; how the network is used, and what explains it.

    With several, --method is a list.
    """
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    run = "a run's folder, its checkpoint.pt or a name of dlrt/weights, from which all else comes as well"
    source.add_argument(run_flag, dest="checkpoint", type=Path, metavar="RUN", help=run)
    arch = f"a network of torchvision, or ResNet20 and its like of dlrt; by default {known.DEFAULT_ARCH}"
    source.add_argument("--arch", metavar="NAME", help=arch)
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


def add_flags_beside(parser: Parser) -> None:
    """Flags for networks to draw beside that one: other runs, and what it is cut to."""
    several = {"nargs": "+", "action": "extend"}  # of a flag that is given twice no value is lost
    add = parser.add_argument
    add("--compare", type=Path, default=[], metavar="RUN", help="runs to draw beside the network", **several)
    tau = "cut the network by the SVD of each layer at these tolerances"
    add("--low-rank", type=TOLERANCE, default=[], metavar="TAU", help=tau, **several)
    rank = "the same, to these ranks: 20, or a share of the full one: 0.5"
    add("--rank", type=RANK, default=[], metavar="RANK", help=rank, **several)
    compression = "the same, to these compressions, for which the singular values of all layers compete"
    add("--compression", type=PERCENT, default=[], metavar="PERCENT", help=compression, **several)
    skip = "layers that are not cut, with all that they contain"
    add("--skip", default=[], metavar="LAYER", help=skip, **several)


def read(args: argparse.Namespace, size: int | None = None) -> Network:
    """The network that the flags name, for pictures of a size; RunError or ValueError where there is none."""
    if args.checkpoint and args.weights:
        raise ValueError(f"--weights must come with --arch: {args.checkpoint} has weights of its own")
    if args.checkpoint:
        network = known.from_run(args.checkpoint)
    else:
        network = known.from_arch(args.arch or known.DEFAULT_ARCH, args.weights)
    return networks.placed(network, size, args.device)


def target_layer(network: Network, name: str | None, method: str) -> str:
    """The name of the layer to explain; ValueError where the network or the method has no such layer."""
    if name is None:
        name = default_layer(network.model, network.blank)
        if method != "fullgrad":
            target_maps(network.model, name, network.blank, method)
        return name
    if method == "fullgrad":
        raise ValueError("fullgrad looks at all layers: leave --target-layer out, or take another --method")
    layers = spatial_layers(network.model, network.blank)
    if name not in layers:
        raise ValueError(
            f"--target-layer must be a layer that is called once and gives feature maps, got {name!r}; "
            f"the last of them are {', '.join(list(layers)[-12:])}"
        )
    target_maps(network.model, name, network.blank, method)
    return name


def read_all(args: argparse.Namespace) -> list[Network]:
    """The network that the flags name, and all that are drawn beside it."""
    first = read(args, args.image_size)
    ways = ("compression", args.compression), ("tau", args.low_rank), ("rank", args.rank)
    # by repr, since 1 == 1.0 would be one key: a rank of one and the full rank
    cuts = [
        {way: value} for way, values in ways for value in {repr(value): value for value in values}.values()
    ]
    if args.skip and not cuts:
        raise ValueError("--skip must come with --low-rank, --rank or --compression: nothing is cut")
    runs = [networks.placed(known.from_run(run), args.image_size, args.device) for run in args.compare]
    return [first, *runs, *(networks.truncated(first, skip=args.skip, **cut) for cut in cuts)]

"""The network to explain, from a run or from torchvision, and all that must be known to show it pictures."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import dlrt
from dlrt import cli, models
from dlrt.cams import METHODS, default_layer, spatial_layers
from dlrt.cams.pictures import Picture
from dlrt.cams.targets import class_number
from dlrt.datasets import CIFAR10_CLASSES, CLASS_NAMES
from dlrt.layers import LowRankLayer
from dlrt.loading import load_network
from dlrt.models import efficientnet
from dlrt.records import RunError
from dlrt.runs import load_file

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation
SOURCES = ("download", "random")
DEFAULT_ARCH = "efficientnet_lite0"  # a package brings its weights, so that nothing is downloaded


@dataclass(frozen=True)
class Network:
    """A model in evaluation mode, and how pictures are made its input.

    shape (channels, height, width) is the input's, mean and std those of its channels, of pixels in [0, 1];
    classes are names. trained is the shape that it was trained at. title is what a figure calls it.
    """

    label: str
    model: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    trained: tuple[int, int, int]
    title: str = "dense"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def blank(self) -> Tensor:
        """An input (1, channels, height, width) without content."""
        return torch.zeros(1, *self.shape, device=self.device)

    def images(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, channels, height, width), on the network's device."""
        x = torch.stack([picture.tensor(self.shape, self.mean, self.std) for picture in pictures])
        return x.to(self.device)

    def class_number(self, text: str) -> int:
        return class_number(text, self.classes)


def add_flags(parser: cli.Parser, run_flag: str = "--checkpoint", several: bool = False) -> None:
    """A flag for a run, or --arch with --weights; how the network is used, and what explains it.

    With several, --method is a list.
    """
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    run = "a run's folder or its checkpoint.pt; all else about the network comes from there"
    what.add_argument(run_flag, dest="checkpoint", type=Path, metavar="RUN", help=run)
    arch = f"a network of torchvision, or ResNet20 and its like of dlrt; by default {DEFAULT_ARCH}"
    what.add_argument("--arch", metavar="NAME", help=arch)
    weights = "of --arch: a file, download (torchvision's) or random; by default what there is"
    add("--weights", metavar="FILE", help=weights)
    add("--device", type=cli.device, default=cli.DEFAULT_DEVICE, help="where to compute")
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


def add_size_flag(parser: cli.Parser) -> None:
    size = "pixels a side that the network sees; by default what it was trained at"
    parser.add_argument("--image-size", type=cli.NATURAL, metavar="PIXELS", help=size)


def read(args: argparse.Namespace, size: int | None = None) -> Network:
    """The network that the flags name, for pictures of a size; RunError or ValueError where there is none."""
    if args.checkpoint and args.weights:
        raise ValueError(f"--weights must come with --arch: {args.checkpoint} has weights of its own")
    if args.checkpoint:
        network = from_run(args.checkpoint)
    else:
        network = from_arch(args.arch or DEFAULT_ARCH, args.weights)
    return placed(network, size, args.device)


def placed(network: Network, size: int | None, device: str) -> Network:
    """The network on a device, and told to see pictures of another size; ValueError where it cannot."""
    if size:
        network = replace(network, shape=(network.shape[0], size, size))
    network.model.to(device, memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            network.model(network.blank)
    except (RuntimeError, AssertionError) as error:  # torchvision's vision transformers assert
        height, width = network.shape[1:]
        reason = " ".join(str(error).split())
        raise ValueError(f"{network.label} cannot see {width} x {height} pixels ({reason})") from error
    return network


def warn(network: Network) -> None:
    """Say on stderr when the network sees another size than it was trained at."""
    if network.shape != network.trained:
        size, trained = (f"{shape[2]} x {shape[1]}" for shape in (network.shape, network.trained))
        print(
            f"warning: {network.label} was trained at {trained} pixels and now sees {size}; "
            "its predictions may be worth nothing there",
            file=sys.stderr,
        )


def warn_if_larger(network: Network) -> None:
    """Say on stderr when the factors of a network are larger than the weights that they stand for."""
    layers = [module for module in network.model.modules() if isinstance(module, LowRankLayer)]
    dense = sum(m * n for m, n in (layer.shape for layer in layers))
    factors = sum(layer.rank * sum(layer.shape) for layer in layers)
    if factors > dense:
        print(
            f"warning: {network.label} is larger than its dense network: its factors have {factors:,} "
            f"parameters, {100 * (factors / dense - 1):.0f} % more than the weights; take lower ranks",
            file=sys.stderr,
        )


def check_alike(nets: Sequence[Network], layer: str) -> None:
    """ValueError where a network cannot be compared with the first one at a layer, or not by its name."""
    first = nets[0]
    size = spatial_layers(first.model, first.blank)[layer]
    for network in nets:
        if network.classes != first.classes or network.shape != first.shape:
            both = " and ".join(
                f"{net.label} ({len(net.classes)} classes, {' x '.join(map(str, net.shape))} pixels)"
                for net in (first, network)
            )
            raise ValueError(f"only networks of the same classes and input can be compared, got {both}")
        its = spatial_layers(network.model, network.blank).get(layer)
        if its != size:
            raise ValueError(
                f"the layer {layer} must give maps of {size} in every network, got {its} in {network.label}: "
                "choose a --target-layer that all have"
            )
        if [net.label for net in nets].count(network.label) > 1:
            raise ValueError(f"two networks are called {network.label}: give every folder a name of its own")


def target_layer(network: Network, name: str | None, method: str) -> str:
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


def from_run(path: Path) -> Network:
    """The network of a run; it is labelled by the name of the run's folder."""
    model, about = load_network(path)
    shape = tuple(about["shape"])
    names = CLASS_NAMES.get(about["dataset"], map(str, range(about["classes"])))
    folder = path.parent if path.is_file() else path
    label = folder.resolve().name
    return Network(
        label=label,
        model=model,
        shape=shape,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        classes=tuple(names),
        trained=shape,
        title=_titled(label, model),
    )


def from_arch(arch: str, weights: str | None) -> Network:
    """A network by its name, with weights from a file, from torchvision ("download") or "random" ones.

    None stands for installed weights, or to download them. Random ones are the same at every call.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if arch == DEFAULT_ARCH:
            return _efficientnet(weights)
        return _from_arch(arch, weights or "download")


def _efficientnet(weights: str | None) -> Network:
    if weights == "download":
        raise ValueError(f"--weights must be a file or random for {DEFAULT_ARCH}: leave it out for its own")
    try:
        state = efficientnet.imagenet_weights() if weights is None else None
    except ModuleNotFoundError as error:
        raise RunError(f"{error}, or give --weights random or a file") from error
    names = tuple(torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"])
    model = models.EfficientNetLite0()
    if state is not None:
        model.load_state_dict(state)
    elif weights not in SOURCES:
        _load(model, _state(weights), weights, DEFAULT_ARCH)
    shape = (3, 224, 224)
    return Network(
        DEFAULT_ARCH, model.eval(), shape, efficientnet.MEAN, efficientnet.STD, names, trained=shape
    )


def _from_arch(arch: str, weights: str) -> Network:
    if arch in models.__all__:
        return _of_dlrt(arch, weights)
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        near = difflib.get_close_matches(arch, [*known, *models.__all__], n=5, cutoff=0.4)
        raise ValueError(
            f"--arch: unknown network {arch!r}; torchvision and dlrt have {', '.join(near or known)}"
        )
    official = torchvision.models.get_model_weights(arch).DEFAULT
    side = official.transforms().crop_size[0]
    state = None if weights in SOURCES else _state(weights)
    names = tuple(official.meta["categories"])
    if state is not None:
        classes = next(len(value) for value in reversed(state.values()) if value.dim())
        names = names if classes == len(names) else tuple(map(str, range(classes)))
        side = _positions(state) or side
    if weights == "download":
        try:
            model = torchvision.models.get_model(arch, weights=official)
        except OSError as error:
            raise RunError(
                f"the weights of {arch} cannot be downloaded ({error}): give a file, or --weights random"
            ) from error
    else:
        options = _options(arch, side, trained=state is not None)
        model = torchvision.models.get_model(arch, weights=None, num_classes=len(names), **options)
    return _with_weights(arch, model, state, weights, (3, side, side), names)


def _options(arch: str, side: int, trained: bool) -> dict[str, object]:
    """What torchvision's builders must be told where they get no weights of torchvision."""
    if arch in ("googlenet", "inception_v3"):  # weights drawn as in the paper take minutes
        return {"init_weights": False, "transform_input": trained}
    return {"image_size": side} if arch.startswith("vit_") else {}


def _positions(state: dict[str, Tensor]) -> int | None:
    """The pixels a side that a vision transformer of this state sees; None for all other networks."""
    if "encoder.pos_embedding" not in state:
        return None
    return isqrt(state["encoder.pos_embedding"].shape[1] - 1) * state["conv_proj.weight"].shape[2]


def _of_dlrt(arch: str, weights: str) -> Network:
    if weights == "download":
        raise ValueError(f"--weights must be a file or random for {arch}: there are none to download")
    kind = getattr(models, arch)
    shape = inspect.signature(kind).parameters["shape"].default
    names = CIFAR10_CLASSES if shape[0] == 3 else map(str, range(10))
    state = None if weights in SOURCES else _state(weights)
    return _with_weights(arch, kind(), state, weights, shape, tuple(names))


def _with_weights(
    arch: str,
    model: nn.Module,
    state: dict[str, Tensor] | None,
    source: str,
    shape: tuple[int, int, int],
    names: tuple[str, ...],
) -> Network:
    if state is not None:
        _load(model, state, source, arch)
    mean, std = IMAGENET if shape[0] == 3 else ((0.5,) * shape[0], (0.5,) * shape[0])
    if state is not None:
        print(
            f"{source} does not say what its network was trained on: pictures are normalised by the mean "
            f"{mean} and the deviation {std}, and its classes called {', '.join(names[:3])}, ...",
            file=sys.stderr,
        )
    return Network(arch, model.eval(), shape, mean, std, names, shape)


def _load(model: nn.Module, state: dict[str, Tensor], source: str, arch: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"--weights {source} does not fit {arch}: {reason}") from error


def _state(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise RunError(f"--weights {path} is not there, or no file: a run is given with --checkpoint")
    state = load_file(Path(path))
    if "about" in state:
        raise RunError(
            f"--weights {path} is a run's, which says what it was trained on: give --checkpoint {path}"
        )
    older = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # names in torchvision's own DenseNets
    if any(map(older.search, state)):
        state = {older.sub(r"\1\2.", name): value for name, value in state.items()}
    tensors = all(isinstance(value, Tensor) for value in state.values())
    if not tensors or not any(value.dim() for value in state.values()):
        raise RunError(f"--weights {path} holds no state dict of tensors")
    return state


def truncated(
    network: Network,
    tau: float | None = None,
    rank: int | float | None = None,
    compression: float | None = None,
    skip: Sequence[str] = (),
) -> Network:
    """A copy with a truncated SVD in every layer, compression in %. ValueError where it is low-rank already.

    A line on stderr names what stays dense.
    """
    if dlrt.compression(network.model).ranks:
        raise ValueError(f"{network.label} is low-rank already: its ranks are those of the checkpoint")
    share = None if compression is None else compression / 100
    with warnings.catch_warnings(record=True) as dense:
        warnings.simplefilter("always")
        model = dlrt.to_low_rank(deepcopy(network.model), rank, tau, skip, compression=share)
    for line in _by_reason(str(warning.message) for warning in dense):
        _tell_once(f"warning: {line}")
    given = {
        name: value
        for name, value in (("tau", tau), ("rank", rank), ("compression", compression))
        if value is not None
    }
    label = "".join(f"_{name}{value:g}" for name, value in given.items())
    title = "low-rank" if tau is None else f"low-rank, τ = {tau:g}"
    if rank is not None:
        title = f"{100 * rank:g} % of full rank" if isinstance(rank, float) else f"rank {rank}"
    return replace(network, model=model, label=f"{network.label}_svd{label}", title=_titled(title, model))


def _titled(name: str, model: nn.Module) -> str:
    return f"{name}\ncompression {dlrt.compression(model).evaluation_compression:.0f} %"


def _by_reason(messages: Iterable[str]) -> list[str]:
    """Of warnings "NAME stays dense: REASON" a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, stays, reason in (message.partition(" stays ") for message in messages):
        names.setdefault(stays + reason, []).append(name)
    others = {reason: f", as {len(its) - 1} others," if len(its) > 1 else "" for reason, its in names.items()}
    return [f"{its[0]}{others[reason]}{reason}" for reason, its in names.items()]


@functools.cache
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)

"""Networks that are known by a name, and those of runs."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from math import isqrt
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from dlrt import models
from dlrt.cams.networks import Network, titled
from dlrt.checkpoint import load_file, load_network
from dlrt.datasets import CIFAR10_CLASSES, CLASS_NAMES
from dlrt.errors import RunError, one_line
from dlrt.models import efficientnet

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation
SOURCES = ("download", "random")
DEFAULT_ARCH = "efficientnet_lite0"  # a package brings its weights, so that nothing is downloaded


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
        title=titled(label, model),
    )


def from_arch(arch: str, weights: str | None) -> Network:
    """A network by its name, with weights from a file, from torchvision ("download") or "random" ones.

    None stands for installed weights, or to download them. Random ones are the same at every call.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if arch in (DEFAULT_ARCH, models.EfficientNetLite0.__name__):
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
        reason = one_line(str(error))[:300]
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

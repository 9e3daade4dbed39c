"""The network of a run: made as the options say, of random or of trained weights, put into factors, cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dlrt import distributed
from dlrt.baselines import plain_factors, to_plain_factors
from dlrt.blocks import is_within
from dlrt.checkpoint import fingerprint, trained_weights
from dlrt.continuing import MISMATCHES, of_another_network
from dlrt.convert import load_factors, to_low_rank
from dlrt.data import Dataset
from dlrt.errors import OptionError, RunError, one_line
from dlrt.factors import Factors
from dlrt.flags import flag
from dlrt.layers import LowRankLayer
from dlrt.low_rank_options import LowRankOptions, RunOptions
from dlrt.options import DenseOptions
from dlrt.runs import Run

CALIBRATION_IMAGES = 1000  # of the training split: they say what the loss needs of trained weights
Settings = dict[str, Any]  # what a network is called with besides shape and classes
Network = Callable[..., nn.Module]


def check_skip(skip: list[str], model: nn.Module) -> None:
    """OptionError where --skip names no layer of the network, or all that could be in factors."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unknown = sorted(set(skip) - modules.keys())
    if unknown or (skip and all(is_within(name, skip) for name in layers)):
        wrong = f"takes layers of {', '.join(layers)}" if unknown else "must leave a layer"
        raise OptionError(f"--skip {wrong}, got {', '.join(unknown or skip)}")


def begin(options: RunOptions, network: Network, settings: Settings, dataset: Dataset, run: Run) -> nn.Module:
    """The network of dense layers that training begins with, once the run's folder has taken the options."""
    torch.manual_seed(options.seed)
    try:
        model = network(dataset.shape, dataset.classes, **settings)
    except ValueError as error:  # pictures too small for it, or settings that do not fit them
        given = "".join(f" with {flag(name)} {value}" for name, value in settings.items())
        raise RunError(f"--dataset {options.dataset} is not for this network{given}: {error}") from error
    check_skip(options.skip, model)
    record = options.record() | {"network": network.__name__}
    record["data"] = dataset.checksum
    if options.from_checkpoint:
        record["from_checkpoint"] = _take_weights(model, options, run)
    distributed.on_first_process(lambda: run.start(record, options.resume, options.device))
    return model


def with_factors(model: nn.Module, options: RunOptions, dataset: Dataset, run: Run) -> nn.Module:
    """The network in the factors that the options say, or in those that a run has that goes on.

    One that begins dense is dense until it is `cut`; that the cut is possible is seen now, on a copy.
    """
    if options.spatial and not run.checkpoint.exists():
        _check_spatial(model, options.skip)
    if state := distributed.on_first_process(run.load):
        return _in_form_of(state, model, options, run)
    if options.dense_epochs:
        cut(deepcopy(model), replace(options, cut_by="weights"), dataset)
        return model
    if isinstance(options, LowRankOptions):
        return cut(model, options, dataset)
    if options.factors:
        return plain_factors(model, options.factors / 100, options.skip, options.spatial)
    return model


def _in_form_of(state: dict[str, Any], model: nn.Module, options: RunOptions, run: Run) -> nn.Module:
    """The network in the factors that its last checkpoint has; RunError where the options say others."""
    expected = _forms(model)  # it may have some from the beginning
    try:
        model = load_factors(model, state["model"])
    except MISMATCHES as error:
        raise of_another_network(run) from error
    done = max((row["epoch"] for row in state["metrics"]), default=0)
    before_cut = options.dense_epochs and done <= options.dense_epochs
    kind = LowRankLayer if isinstance(options, LowRankOptions) else Factors if options.factors else None
    if kind and not before_cut:
        expected.add(kind)
    if _forms(model) != expected:
        raise of_another_network(run)
    return model


def _forms(model: nn.Module) -> set[type[nn.Module]]:
    """Of the two kinds of factors those that the network has."""
    return {kind for kind in (LowRankLayer, Factors) if any(isinstance(m, kind) for m in model.modules())}


def cut(model: nn.Module, options: RunOptions, dataset: Dataset) -> nn.Module:
    """The network of dense layers made low-rank, or one in plain factors, as the options say.

    A layer whose factors would cost as much as its weight is dense among plain factors. In a low-rank network
    that is cut to a compression it has its full rank: the update rule is for it as well.
    """
    inputs = None
    if options.cut_by == "loss" and (options.from_checkpoint or options.dense_epochs):
        inputs = dataset.train.images[:CALIBRATION_IMAGES].to(next(model.parameters()).device)
    cut_to = {"skip": _with_low_rank(options.skip, model), "inputs": inputs, "spatial": options.spatial}
    if isinstance(options, DenseOptions):
        return to_plain_factors(to_low_rank(model, compression=options.factors / 100, **cut_to))
    if options.ramp != 0:
        return to_low_rank(model, options.rank, min_rank=options.min_rank, **cut_to)
    model = to_low_rank(model, compression=options.compression / 100, min_rank=options.min_rank, **cut_to)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be low-rank has been told
        return to_low_rank(model, skip=_with_low_rank(options.skip, model), spatial=options.spatial)


def _with_low_rank(skip: list[str], model: nn.Module) -> list[str]:
    """The layers to skip, and those that are low-rank already."""
    return [*skip, *(name for name, m in model.named_modules() if name and isinstance(m, LowRankLayer))]


def _check_spatial(model: nn.Module, skip: list[str]) -> None:
    kernels = [name for name, m in model.named_modules() if type(m) is nn.Conv2d and m.kernel_size[0] > 1]
    if all(is_within(name, skip) for name in kernels):
        raise RunError("--spatial needs a convolution to put into factors, and there is none: leave it out")


def _take_weights(model: nn.Module, options: RunOptions, run: Run) -> str:
    """Load the weights to begin with; give what the run records of them, a name and a checksum.

    Records can be published, so there is no path in it. A run that continues has weights of its own, and goes
    on without the file; so does one that recorded no checksum. RunError for weights of another seed, which
    were trained on pictures that this one sets aside for validation.
    """
    path = options.from_checkpoint
    if _forms(model):
        raise RunError("--from-checkpoint is for networks that begin dense, not for this one: leave it out")
    recorded, goes_on = distributed.on_first_process(
        lambda: (run.options().get("from_checkpoint") or "", run.checkpoint.exists())
    )
    known = recorded == path.name or (recorded.startswith(f"{path.name} ") and not path.exists())
    if goes_on and known:
        return recorded
    try:
        weights, about = trained_weights(path)
    except RunError as error:
        raise RunError(f"--from-checkpoint: {error}") from error
    if about.get("dataset") == options.dataset and about.get("seed", options.seed) != options.seed:
        raise RunError(
            f"--seed must be {about['seed']}, as that of {path} is: it draws the validation split, and those "
            f"weights were trained on what seed {options.seed} sets aside"
        )
    try:
        load_factors(model, weights)
    except MISMATCHES as error:
        _, _, reason = str(error).partition("\n")  # of load_state_dict; the first line says little
        raise RunError(
            f"--from-checkpoint must be the weights of a dense {type(model).__name__}, got {path} "
            f"({one_line(reason or str(error))[:150]} ...)"
        ) from error
    if _forms(model):
        raise RunError(f"--from-checkpoint {path} is of a network in factors: give a dense one's")
    return f"{path.name} {fingerprint(model)}"

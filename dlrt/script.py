"""What a training script does once its flags are read: train a network and leave a run's folder."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dlrt import distributed, errors
from dlrt.baselines import Muon, plain_factors, product_decay
from dlrt.blocks import is_within
from dlrt.checkpoint import trained_weights
from dlrt.convert import to_low_rank
from dlrt.data import Dataset
from dlrt.datasets import TEXTS, load
from dlrt.errors import OptionError, RunError, one_line
from dlrt.flags import flag
from dlrt.layers import LowRankLayer
from dlrt.optimizer import DLRT
from dlrt.options import OPTIMIZERS, DenseOptions, LowRankOptions, RunOptions
from dlrt.runs import Run, chosen_epoch
from dlrt.training import fit

CALIBRATION_IMAGES = 1000  # of the training split: they say what the loss needs of trained weights
Settings = dict[str, Any]  # what a network is called with besides shape and classes
Network = Callable[..., nn.Module]


@errors.boundary("the epochs that were completed are kept: continue with --resume")
def run(options: RunOptions, network: Network, results: Path, settings: Settings | None = None) -> None:
    """Train a network as the options say, print the result and leave a run's folder.

    network is a class or function; it is called with the data's shape, its number of classes and `settings`,
    by default the options that the script has added; and where layers are skipped with `settings` alone, to
    see what it has.
    """
    settings = options.added() if settings is None else settings
    if options.skip:  # a slip is told before any data are read, where settings fit the default shape
        with suppress(ValueError), torch.device("meta"):
            _check_skip(options.skip, network(**settings))
    name = options.name or _name(options, settings)
    run = Run((options.output_dir or results) / name)
    if options.resume and options.name and not run.folder.exists():
        raise RunError(f"--resume must name a run that was begun, got {run.folder}: leave --resume out")
    options = replace(options, name=name, device=distributed.start(options.device))
    _train(options, network, run, settings)
    distributed.stop()


def _check_skip(skip: list[str], model: nn.Module) -> None:
    """OptionError where --skip names no layer of the network, or all that could be low-rank."""
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unknown = sorted(set(skip) - modules.keys())
    if unknown or (skip and all(is_within(name, skip) for name in layers)):
        wrong = f"takes layers of {', '.join(layers)}" if unknown else "must leave a layer that is low-rank"
        raise OptionError(f"--skip {wrong}, got {', '.join(unknown or skip)}")


def _train(options: RunOptions, network: Network, run: Run, settings: Settings) -> None:
    """Load the data, begin the run or go on with it, and print what came of it."""
    if options.workers:
        torch.set_num_threads(options.workers)
    dataset = distributed.first_process_first(lambda: load(options.dataset, options.data_dir, options.seed))
    dataset = dataset.to(options.device)
    model = _begin(options, network, settings, dataset, run)
    try:
        model = _with_factors(model, options, dataset, run)
        # in this layout a CPU evaluates dense and exported convolutions in 0.6 to 0.9 of the time
        model = model.to(options.device, memory_format=torch.channels_last)
        steps = dataset.train.steps(options.batch_size)
        optimizer = make_optimizer(model, options, steps)
    except (ValueError, RunError) as error:
        if distributed.process_rank() == 0:
            run.discard_empty()
        raise RunError(_with_flag(str(error), options)) from error
    scheduler = make_scheduler(optimizer, options.schedule, options.epochs + options.finetune_epochs)
    about = {
        "network": network.__name__,
        "settings": settings,
        "shape": list(dataset.shape),
        "classes": dataset.classes,
        "dataset": dataset.name,
        "seed": options.seed,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }
    if isinstance(options, DenseOptions) and options.factors:
        given = {"skip": options.skip, "spatial": options.spatial}
        about["factors"] = {"compression": options.factors / 100, **given}
    quiet = options.quiet or distributed.process_rank() > 0

    def cut() -> torch.optim.Optimizer:
        return make_optimizer(_low_rank(model, options, dataset), options, steps)

    metrics = fit(model, optimizer, scheduler, dataset, options, run, about, quiet, cut)
    if distributed.process_rank() == 0:
        print(_result(metrics, run.folder, options.dataset in TEXTS))


def _with_flag(message: str, options: RunOptions) -> str:
    """What the library says of an option, which it names first, by the flag that set it."""
    name, _, rest = message.partition(" ")
    if isinstance(options, DenseOptions) and options.factors and name == "compression":
        return f"--factors {rest}"
    return f"{flag(name)} {rest}" if name in {spec.name for spec in fields(options)} else message


def _begin(
    options: RunOptions, network: Network, settings: Settings, dataset: Dataset, run: Run
) -> nn.Module:
    """The network of dense layers that training begins with, once the run's folder has taken the options."""
    torch.manual_seed(options.seed)
    try:
        model = network(dataset.shape, dataset.classes, **settings)
    except ValueError as error:  # pictures too small for it, or settings that do not fit them
        given = "".join(f" with {flag(name)} {value}" for name, value in settings.items())
        raise RunError(f"--dataset {options.dataset} is not for this network{given}: {error}") from error
    _check_skip(options.skip, model)
    record = options.record() | {"network": network.__name__}
    record["data"] = dataset.checksum
    if options.from_checkpoint:
        record["from_checkpoint"] = _take_weights(model, options, run)
    elif not options.dense_epochs:
        record.pop("cut_by", None)  # there is nothing to cut
    distributed.on_first_process(lambda: run.start(record, options.resume, options.device))
    return model


def _with_factors(model: nn.Module, options: RunOptions, dataset: Dataset, run: Run) -> nn.Module:
    """The network in the factors that the options say; the ranks of one that goes on follow."""
    if options.spatial and not run.checkpoint.exists():
        _check_spatial(model, options.skip)
    if isinstance(options, DenseOptions):
        if options.factors:
            model = plain_factors(model, options.factors / 100, options.skip, options.spatial)
        return model
    if state := distributed.on_first_process(run.load):  # low-rank are the layers that are so there
        if options.dense_epochs and not _are_low_rank(state["model"]):
            return model
        dense = [name for name, _ in model.named_modules() if f"{name}.weight" in state["model"]]
        return to_low_rank(model, options.rank or 1, skip=[*options.skip, *dense], spatial=options.spatial)
    if options.dense_epochs:  # what is impossible is told now
        _low_rank(deepcopy(model), replace(options, cut_by="weights"), dataset)
        return model
    return _low_rank(model, options, dataset)


def _low_rank(model: nn.Module, options: LowRankOptions, dataset: Dataset) -> nn.Module:
    """The network of dense layers made low-rank as the options say."""
    by_loss = options.cut_by == "loss"
    device = next(model.parameters()).device
    inputs = dataset.train.images[:CALIBRATION_IMAGES].to(device) if by_loss else None
    compression = options.compression / 100 if options.ramp == 0 else None
    ranks = {"rank": options.rank, "compression": compression, "min_rank": options.min_rank}
    there = [name for name, module in model.named_modules() if isinstance(module, LowRankLayer)]
    return to_low_rank(model, skip=[*options.skip, *there], inputs=inputs, spatial=options.spatial, **ranks)


def _check_spatial(model: nn.Module, skip: list[str]) -> None:
    kernels = [name for name, m in model.named_modules() if type(m) is nn.Conv2d and m.kernel_size[0] > 1]
    if all(is_within(name, skip) for name in kernels):
        raise RunError(
            "--spatial needs a convolution that is still to become low-rank, and there is none: leave it out"
        )


def _name(options: RunOptions, settings: Settings) -> str:
    """What a run's folder is called where nobody says."""
    prefix = "".join(f"{key}{value}_" for key, value in settings.items())
    if isinstance(options, DenseOptions):
        kind = f"factors{options.factors:g}" if options.factors else "dense"
    else:
        kind = f"tau{options.tau}" if options.compression is None else f"compression{options.compression:g}"
        start = f"dense{options.dense_epochs}_" if options.dense_epochs else ""
        kind = f"{start}cut_{kind}" if options.ramp == 0 else kind
    kernels = "_spatial" if options.spatial else ""
    rule = "" if options.update in (None, "sgd") else f"_{options.update}"
    return f"{prefix}{kind}{kernels}{rule}_seed{options.seed}"


def _result(metrics: pd.DataFrame, folder: Path, of_text: bool) -> str:
    row = metrics.loc[chosen_epoch(metrics)]
    ranks = f", ranks {row['ranks']}" if row["ranks"] else ""
    compression = row["evaluation_compression"]
    low_rank = f"{ranks}, compression {compression:.2f} %" if ranks or compression > 0 else ""
    bits = f", {row['test_loss'] / math.log(2):.4f} bits per byte" if of_text else ""
    return (
        f"test accuracy {row['test_accuracy']:.2f} %{bits} (epoch {row['epoch']}, chosen on the validation "
        f"split), evaluation parameters {row['evaluation_parameters']:,}{low_rank}; {folder}"
    )


def _take_weights(model: nn.Module, options: RunOptions, run: Run) -> str:
    """Load the weights to begin with; give what the run records of them, a name and a checksum.

    Records can be published, so there is no path in it. A run that continues has weights of its own, and goes
    on without the file; so does one that recorded no checksum. RunError for weights of another seed, which
    were trained on pictures that this one sets aside for validation.
    """
    path = options.from_checkpoint
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
    if about.get("factors"):
        raise RunError(f"--from-checkpoint {path} is of plain factors: give a dense one's")
    if _are_low_rank(weights):
        raise RunError(f"--from-checkpoint {path} is of a low-rank network: give a dense one's")
    if about.get("dataset") == options.dataset and about.get("seed", options.seed) != options.seed:
        raise RunError(
            f"--seed must be {about['seed']}, as that of {path} is: it draws the validation split, and those "
            f"weights were trained on what seed {options.seed} sets aside"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(" ".join(str(error).splitlines()[1:2]))
        raise RunError(
            f"--from-checkpoint must be the weights of a dense {type(model).__name__}, got {path} "
            f"({reason[:150]} ...)"
        ) from error
    sums = [(name, distributed.checksum(value)) for name, value in model.state_dict().items()]
    return f"{path.name} {zlib.crc32(repr(sums).encode()):08x}"


def _are_low_rank(weights: dict[str, Any]) -> bool:
    return any(name.split(".")[-1] == "S" for name in weights)


def make_optimizer(model: nn.Module, options: RunOptions, steps: int) -> torch.optim.Optimizer:
    """The optimizer that the options describe, for so many steps an epoch: a DLRT of a low-rank network."""
    inner = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        inner |= {"momentum": options.momentum, "nesterov": options.nesterov}
    else:
        inner["betas"] = (options.momentum, 0.999)
    if not any(isinstance(module, LowRankLayer) for module in model.modules()):
        return _dense_optimizer(model, options, inner)
    same = ("tau", "min_rank", "max_rank", "s_steps", "integrator", "update", "update_lr")
    settings = {name: getattr(options, name) for name in same}
    if options.allot_every:
        settings["allot_every"] = options.allot_every
    if options.budget:
        ramp = round(options.ramp * options.epochs * steps)
        settings |= {"compression": options.compression / 100, "ramp": ramp}
    return DLRT(model, OPTIMIZERS[options.optimizer], **settings, **inner)


def _dense_optimizer(model: nn.Module, options: RunOptions, inner: dict) -> torch.optim.Optimizer:
    """An optimizer of torch, or Muon; plain factors A B have the weight decay that A B would have."""
    if options.update == "muon":
        others = (module for name, module in model.named_modules() if not is_within(name, options.skip))
        hidden = [module for module in others if isinstance(module, (nn.Linear, nn.Conv2d))]
        inner |= {"update_lr": options.update_lr, "optimizer_class": OPTIMIZERS[options.optimizer]}
        optimizer = Muon(model.parameters(), hidden, **inner)
    else:
        optimizer = OPTIMIZERS[options.optimizer](model.parameters(), **inner)
    if isinstance(options, DenseOptions) and options.factors:
        product_decay(optimizer, model)
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, epochs: int
) -> LRScheduler | ReduceLROnPlateau:
    """The learning rate over the epochs; plateau divides it by ten where the validation loss rests."""
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=3)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

"""What a training script does once its flags are read: train a network and leave a run's folder."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dlrt import distributed, errors
from dlrt.baselines import Muon, plain_factors, product_decay
from dlrt.cli import OPTIMIZERS
from dlrt.convert import to_low_rank
from dlrt.data import Dataset
from dlrt.datasets import load
from dlrt.errors import OptionError, RunError
from dlrt.optimizer import DLRT
from dlrt.records import chosen_epoch
from dlrt.runs import NOT_PART_OF_THE_EXPERIMENT, Run, trained_weights
from dlrt.training import Recipe, fit

CALIBRATION_IMAGES = 1000  # of the training split: they say what the loss needs of trained weights


@errors.boundary("the epochs that were completed are kept: continue with --resume")
def run(
    args: argparse.Namespace,
    network: Callable[..., nn.Module],
    results: Path,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train a network as the flags say, print the result and leave a run's folder.

    network is called with the data's shape, its number of classes and `settings`.
    """
    _check_skip(args, network, settings or {})
    args.device = distributed.start(args.device)
    _train(args, network, results, settings or {})
    distributed.stop()


def _check_skip(
    args: argparse.Namespace, network: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    """OptionError where --skip names no layer of the network, or all that could be low-rank."""
    if not getattr(args, "skip", ()):
        return
    with torch.device("meta"):
        modules = dict(network(**settings).named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    unknown = sorted(set(args.skip) - modules.keys())
    if unknown or all(_is_skipped(name, args.skip) for name in layers):
        wrong = f"takes layers of {', '.join(layers)}" if unknown else "must leave a layer that is low-rank"
        got = ", ".join(unknown or args.skip)
        raise OptionError(f"--skip {wrong}, got {got}")


def _is_skipped(name: str, skip: list[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{stem}." for stem in skip))


def _train(
    args: argparse.Namespace,
    network: Callable[..., nn.Module],
    results: Path,
    settings: dict[str, Any],
) -> None:
    """Load the data, begin the run or go on with it, and print what came of it."""
    if args.workers:
        torch.set_num_threads(args.workers)
    args.name = args.name or _name(args, settings)
    run = Run((args.output_dir or results) / args.name)
    dataset = distributed.first_before_others(lambda: load(args.dataset, args.data_dir, args.seed))
    dataset = dataset.to(args.device)
    model = _begin(args, network, settings, dataset, run)
    recipe = make_recipe(args)
    optimizer = make_optimizer(model, args, dataset.train.steps(args.batch_size))
    scheduler = make_scheduler(optimizer, args.schedule, recipe.epochs + recipe.finetune_epochs)
    about = {
        "network": network.__name__,
        "settings": settings,
        "shape": list(dataset.shape),
        "classes": dataset.classes,
        "dataset": dataset.name,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }
    if percent := getattr(args, "factors", None):
        about["factors"] = {"compression": percent / 100, "skip": args.skip}
    quiet = args.quiet or distributed.process_rank() > 0
    metrics = fit(model, optimizer, scheduler, dataset, recipe, run, about, quiet)
    if distributed.process_rank() == 0:
        print(_result(metrics, run.folder))


def _begin(
    args: argparse.Namespace,
    network: Callable[..., nn.Module],
    settings: dict[str, Any],
    dataset: Dataset,
    run: Run,
) -> nn.Module:
    """The network as training finds it, on its device, once the run's folder has taken the options."""
    torch.manual_seed(args.seed)
    try:
        model = network(dataset.shape, dataset.classes, **settings)
    except ValueError as error:  # pictures too small for it
        raise RunError(f"--dataset {args.dataset} is not for this network: {error}") from error
    options = {key: value for key, value in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["network"] = network.__name__
    if args.from_checkpoint:
        options["from_checkpoint"] = _take_weights(model, args.from_checkpoint, run)
    else:
        options.pop("cut_by", None)  # there is nothing to cut
    distributed.first(lambda: run.start(options, args.resume))
    if hasattr(args, "tau"):
        model = _low_rank(model, args, dataset, run)
    elif args.factors:
        model = _factored(model, args)
    # on a CPU convolutions take half the time in this layout
    return model.to(args.device, memory_format=torch.channels_last)


def _low_rank(model: nn.Module, args: argparse.Namespace, dataset: Dataset, run: Run) -> nn.Module:
    """The network at the ranks that the flags say; one that goes on takes those of its checkpoint anyway."""
    if run.checkpoint.exists():
        return _resumed(model, args, run)
    kernels = [name for name, m in model.named_modules() if type(m) is nn.Conv2d and m.kernel_size[0] > 1]
    if args.spatial and all(_is_skipped(name, args.skip) for name in kernels):
        raise RunError(
            "--spatial needs a convolution that is still to become low-rank, and there is none: leave it out"
        )
    by_loss = args.from_checkpoint and args.cut_by == "loss"
    inputs = dataset.train.images[:CALIBRATION_IMAGES].cpu() if by_loss else None
    compression = args.compression / 100 if args.compression and not args.ramp else None
    try:
        model = to_low_rank(
            model, args.rank, skip=args.skip, inputs=inputs, compression=compression, spatial=args.spatial
        )
    except ValueError as error:
        raise RunError(f"--{error}") from error
    return model


def _factored(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network with plain factors in place of its layers."""
    try:
        return plain_factors(model, args.factors / 100, args.skip)
    except ValueError as error:
        raise RunError(f"--factors: {error}") from error


def _resumed(model: nn.Module, args: argparse.Namespace, run: Run) -> nn.Module:
    """The network with the layers low-rank that are so in the run's checkpoint; their ranks follow."""
    weights = run.load()["model"]
    dense = [name for name, _ in model.named_modules() if f"{name}.weight" in weights]
    return to_low_rank(model, args.rank or 1, skip=[*args.skip, *dense], spatial=args.spatial)


def _name(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What a run's folder is called where nobody says."""
    prefix = "".join(f"{key}{value}_" for key, value in settings.items())
    if not hasattr(args, "tau"):
        kind = f"factors{args.factors:g}" if args.factors else "dense"
    else:
        kind = f"compression{args.compression:g}" if args.compression and args.ramp else f"tau{args.tau}"
    rule = "_muon" if args.update == "muon" else ""
    return f"{prefix}{kind}{rule}_seed{args.seed}"


def _result(metrics: pd.DataFrame, folder: Path) -> str:
    row = metrics.loc[chosen_epoch(metrics)]
    low_rank = (
        f", ranks {row['ranks']}, compression {row['evaluation_compression']:.2f} %" if row["ranks"] else ""
    )
    return (
        f"test accuracy {row['test_accuracy']:.2f} % (epoch {row['epoch']}, chosen on the validation split), "
        f"evaluation parameters {row['evaluation_parameters']:,}{low_rank}; {folder}"
    )


def _take_weights(model: nn.Module, path: Path, run: Run) -> str:
    """Load the weights to begin with; give what the run records of them, a name and a checksum.

    Records can be published, so there is no path in it. A run that continues has weights of its own, and goes
    on without the file; so does one that recorded no checksum.
    """
    recorded = run.options().get("from_checkpoint") or ""
    if run.checkpoint.exists() and (
        recorded == path.name or (recorded.startswith(f"{path.name} ") and not path.exists())
    ):
        return recorded
    try:
        weights = trained_weights(path)
    except RunError as error:
        raise RunError(f"--from-checkpoint: {error}") from error
    if any(name.split(".")[-1] == "S" for name in weights):
        raise RunError(f"--from-checkpoint {path} is of a low-rank network: give a dense one's")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(" ".join(str(error).splitlines()[1:2]).split())
        raise RunError(
            f"--from-checkpoint must be the weights of a dense {type(model).__name__}, got {path} "
            f"({reason[:150]} ...)"
        ) from error
    sums = [(name, distributed.checksum(value)) for name, value in model.state_dict().items()]
    return f"{path.name} {zlib.crc32(repr(sums).encode()):08x}"


def make_optimizer(model: nn.Module, args: argparse.Namespace, steps: int) -> torch.optim.Optimizer:
    """The optimizer that the flags describe, for so many steps an epoch: a DLRT for a low-rank run."""
    inner = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        inner |= {"momentum": args.momentum, "nesterov": args.nesterov}
    else:
        inner["betas"] = (args.momentum, 0.999)
    kind = OPTIMIZERS[args.optimizer]
    if not hasattr(args, "tau"):
        return _dense_optimizer(model, args, inner)
    ranks = {"min_rank": args.min_rank, "max_rank": args.max_rank, "s_steps": args.s_steps, "tau": args.tau}
    rule = {"integrator": args.integrator, "update": args.update, "update_lr": args.update_lr}
    if args.compression and args.ramp:
        ranks |= {"compression": args.compression / 100, "ramp": round(args.ramp * args.epochs * steps)}
    try:
        return DLRT(model, kind, **ranks, **rule, **inner)
    except ValueError as error:
        raise RunError(f"--{error}") from error


def _dense_optimizer(model: nn.Module, args: argparse.Namespace, inner: dict) -> torch.optim.Optimizer:
    """An optimizer of torch, or Muon; plain factors A B have the weight decay that A B would have."""
    if args.update == "muon":
        others = (module for name, module in model.named_modules() if not _is_skipped(name, args.skip))
        hidden = [module for module in others if isinstance(module, (nn.Linear, nn.Conv2d))]
        optimizer = Muon(model.parameters(), hidden, update_lr=args.update_lr, **inner)
    else:
        optimizer = OPTIMIZERS[args.optimizer](model.parameters(), **inner)
    if args.factors and args.weight_decay:
        # of SGD the decay goes through the momentum, and is worth so much more
        through_momentum = args.optimizer == "sgd" and args.update != "muon"
        product_decay(optimizer, model, args.weight_decay / (1 - args.momentum * through_momentum))
    return optimizer


def make_recipe(args: argparse.Namespace) -> Recipe:
    """How to train as the flags describe it; a dense network has no tolerance and no bases to freeze."""
    of_dlrt = ("tau", "tau_warmup", "finetune_epochs")
    return Recipe(
        args.epochs,
        args.batch_size,
        args.seed,
        label_smoothing=args.label_smoothing,
        augment=args.augment,
        measure_first=args.from_checkpoint is not None,
        amp=args.amp or None,
        **{name: getattr(args, name) for name in of_dlrt if hasattr(args, name)},
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, epochs: int
) -> LRScheduler | ReduceLROnPlateau:
    """The learning rate over the epochs; plateau divides it by ten where the validation loss rests."""
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=3)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

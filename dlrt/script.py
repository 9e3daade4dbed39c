"""What a training script does once its flags are read: train a network and leave a run's folder."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import torch

from dlrt import distributed, errors
from dlrt.datasets import TEXTS, load
from dlrt.errors import RunError
from dlrt.flags import flag
from dlrt.low_rank_options import RunOptions
from dlrt.options import DenseOptions
from dlrt.run_network import Network, Settings, begin, check_skip, cut, with_factors
from dlrt.run_optimizer import make_optimizer, make_scheduler
from dlrt.runs import Run, chosen_epoch
from dlrt.training import fit


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
            check_skip(options.skip, network(**settings))
    name = options.name or _name(options, settings)
    run = Run((options.output_dir or results) / name)
    if options.resume and options.name and not run.folder.exists():
        raise RunError(f"--resume must name a run that was begun, got {run.folder}: leave --resume out")
    options = replace(options, name=name, device=distributed.start(options.device))
    _train(options, network, run, settings)
    distributed.stop()


def _train(options: RunOptions, network: Network, run: Run, settings: Settings) -> None:
    """Load the data, begin the run or go on with it, and print what came of it."""
    if options.workers:
        torch.set_num_threads(options.workers)
    dataset = distributed.first_process_first(lambda: load(options.dataset, options.data_dir, options.seed))
    dataset = dataset.to(options.device)
    model = begin(options, network, settings, dataset, run)
    try:
        model = with_factors(model, options, dataset, run)
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
    quiet = options.quiet or distributed.process_rank() > 0

    def cut_now() -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what stays dense was told before the first epoch
            cut(model, options, dataset).to(memory_format=torch.channels_last)
        return make_optimizer(model, options, steps)

    metrics = fit(model, optimizer, scheduler, dataset, options, run, about, quiet, cut_now)
    if distributed.process_rank() == 0:
        print(_result(metrics, run.folder, options.dataset in TEXTS))


def _with_flag(message: str, options: RunOptions) -> str:
    """What the library says of an option, which it names first, by the flag that set it."""
    name, _, rest = message.partition(" ")
    if isinstance(options, DenseOptions) and options.factors and name == "compression":
        return f"--factors {rest}"
    return f"{flag(name)} {rest}" if name in {spec.name for spec in fields(options)} else message


def _name(options: RunOptions, settings: Settings) -> str:
    """What a run's folder is called where nobody says."""
    prefix = "".join(f"{key}{value}_" for key, value in settings.items())
    start = f"dense{options.dense_epochs}_cut_" if options.dense_epochs else ""
    if isinstance(options, DenseOptions):
        kind = f"factors{options.factors:g}" if options.factors else "dense"
    else:
        kind = f"tau{options.tau}" if options.compression is None else f"compression{options.compression:g}"
        start = start or ("cut_" if options.ramp == 0 else "")
    kernels = "_spatial" if options.spatial else ""
    rule = "" if options.update in (None, "sgd") else f"_{options.update}"
    return f"{prefix}{start}{kind}{kernels}{rule}_seed{options.seed}"


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

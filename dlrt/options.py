# ruff: noqa: RUF009  (option makes fields)
"""What a run is: one dataclass, from which its flags and its record follow."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from dlrt.datasets import DATASETS, TEXTS
from dlrt.errors import OptionError
from dlrt.flags import (
    COUNT,
    FOLDER_NAME,
    NATURAL,
    NOT_NEGATIVE,
    PERCENT,
    POSITIVE,
    SEED,
    TOLERANCE,
    device,
)
from dlrt.option_fields import OptionSet, option

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("DLRT_DATA", ROOT / "data"))
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "plateau")
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_PART_OF_THE_EXPERIMENT = ("data_dir", "output_dir", "resume", "quiet", "device", "workers")

SWITCH = {"action": argparse.BooleanOptionalAction}
LAYERS = {"nargs": "*", "metavar": "LAYER"}


@dataclass(kw_only=True)
class Options(OptionSet):
    """What every run is. A script with flags of its own adds fields; each has a name in config.json.

    Whatever is wrong is an OptionError. A dense network has no tolerance and no bases to freeze.
    """

    tau: ClassVar[float] = 0.0
    tau_warmup: ClassVar[float] = 0.0
    finetune_epochs: ClassVar[int] = 0

    epochs: int = option(20, "passes over the training split", NATURAL)
    batch_size: int = option(128, "samples per step", NATURAL)
    lr: float = option(0.05, "step size h", POSITIVE)
    momentum: float = option(0.9, "of SGD; first beta of Adam", TOLERANCE)
    weight_decay: float = option(
        0.0, "of all parameters; of U S Vᵀ through S, of factors A B as of their product", NOT_NEGATIVE
    )
    optimizer: str = option("sgd", "of all that --update does not step", choices=OPTIMIZERS)
    nesterov: bool = option(False, "momentum of SGD and muon", **SWITCH)
    schedule: str = option("cosine", "of lr over all epochs", choices=SCHEDULES)
    label_smoothing: float = option(0.1, "share of the target that all classes get alike", TOLERANCE)
    augment: bool = option(
        True, "shift training images at random, mirror half where the data set says so", **SWITCH
    )
    from_checkpoint: Path | None = option(
        None,
        "weights to begin with: a dense run's folder or checkpoint, a state dict or a name of dlrt/weights",
        Path,
        metavar="PATH",
    )
    dense_epochs: int = option(
        0, "of --epochs, to begin with; then the network is cut at once to the compression asked for", COUNT
    )
    dense_update_lr: float | None = option(
        None, "step size of --dense-epochs with --update muon; by default that of the others", POSITIVE
    )
    cut_by: str | None = option(
        None,
        "what a cut or a budget keeps: what the loss needs, or the largest; by default loss, and weights "
        "where a network for texts is cut",
        choices=("loss", "weights"),
    )
    dataset: str = option("mnist", "only mnist and cifar10 are downloaded", choices=DATASETS)
    data_dir: Path = option(DATA_DIR, "or set DLRT_DATA", Path)
    device: str = option(DEFAULT_DEVICE, "where to train", device)
    workers: int | None = option(None, "CPU threads of torch; the data lie in memory", NATURAL)
    amp: str | bool = option(
        False, "autocast; factors and their algebra stay in float32", nargs="?", choices=AMP, const="bfloat16"
    )
    seed: int = option(0, "of initial weights, validation split and order", SEED)
    name: str | None = option(None, "of the run's folder; by default made of settings and seed", FOLDER_NAME)
    output_dir: Path | None = option(None, "of the run's folder; by default beside the script", Path)
    resume: bool = option(False, "continue after the last complete epoch", action="store_true")
    quiet: bool = option(False, "print the result only", action="store_true")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise OptionError("--nesterov must come with --optimizer sgd and a --momentum: leave it out")

    def _settle_dense_start(self, cuts: str, compression: float | None) -> None:
        """Check --dense-epochs; cuts is the flag whose compression the network is cut to afterwards."""
        if self.dense_update_lr and not (self.dense_epochs and self.update == "muon"):
            raise OptionError("--dense-update-lr must come with --dense-epochs and --update muon")
        if not self.dense_epochs:
            return
        if compression is None:
            raise OptionError(f"--dense-epochs must come with {cuts}: the network is cut to it then")
        if self.from_checkpoint:
            raise OptionError("--dense-epochs begins at random: leave --from-checkpoint out")
        if self.dense_epochs >= self.epochs:
            raise OptionError(
                f"--dense-epochs must be less than --epochs, got {self.dense_epochs} >= {self.epochs}"
            )

    def _settle_cut(self, cut: bool, flags: str, budget: bool = False) -> None:
        """What a cut or a budget keeps, where there is one; the flags are those that ask for it."""
        cut_text = cut and self.dataset in TEXTS
        if self.cut_by and not (cut or budget):
            raise OptionError(f"--cut-by must come with {flags}: random weights have nothing to keep")
        if self.cut_by == "loss" and cut_text:
            raise OptionError("--cut-by loss is for pictures: a network for text takes --cut-by weights")
        if cut or budget:
            self.cut_by = self.cut_by or ("weights" if cut_text else "loss")

    def record(self) -> dict[str, Any]:
        """What config.json says of the run: all that is part of the experiment."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_PART_OF_THE_EXPERIMENT}

    def added(self) -> dict[str, Any]:
        """The options that a script adds to those that all have."""
        kind = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("dlrt."))
        common = {spec.name for spec in fields(kind)}
        return {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in common}


@dataclass(kw_only=True)
class DenseOptions(Options):
    """What a run of a dense network is, or of plain factors A B in its place."""

    update: str | None = option(
        None, "how layers but --skip step; by default as the optimizer", choices=("sgd", "muon")
    )
    update_lr: float | None = option(None, "step size with --update muon; by default 0.3 lr", POSITIVE)
    factors: float | None = option(
        None,
        "compression of the whole network by plain factors A B, of uniform ranks unless a cut finds better",
        PERCENT,
        metavar="PERCENT",
    )
    spatial: bool = option(False, "kernels of --factors are spatially separable", **SWITCH)
    skip: list[str] = option([], "layers that --factors and muon leave alone", **LAYERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_lr and self.update != "muon":
            raise OptionError("--update-lr must come with --update muon: --lr is for all else")
        if self.update == "sgd" and self.optimizer != "sgd":
            raise OptionError(f"--update sgd must come with --optimizer sgd, got {self.optimizer}")
        if self.factors and self.from_checkpoint:
            raise OptionError("--factors begins with random weights: leave --from-checkpoint out")
        if self.spatial and not self.factors:
            raise OptionError("--spatial must come with --factors: a dense kernel is not separable")
        self._settle_dense_start("--factors", self.factors)
        self._settle_cut(self.dense_epochs > 0, "--dense-epochs")
        if self.update != "muon" and not self.factors:
            self.skip = []

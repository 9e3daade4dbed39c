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
    MAX_RANK,
    NATURAL,
    NOT_NEGATIVE,
    PERCENT,
    POSITIVE,
    RANK,
    SEED,
    TOLERANCE,
    device,
    number,
)
from dlrt.option_fields import OptionSet, option
from dlrt.settings import INTEGRATORS, UPDATE_OF
from dlrt.velocity import UPDATES

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("DLRT_DATA", ROOT / "data"))
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "plateau")
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TAU, RAMP = 0.1, 0.6
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
    dense_epochs: ClassVar[int] = 0

    epochs: int = option(20, "passes over the training split", NATURAL)
    batch_size: int = option(128, "samples per step", NATURAL)
    lr: float = option(0.05, "step size h", POSITIVE)
    momentum: float = option(0.9, "of SGD; first beta of Adam", TOLERANCE)
    weight_decay: float = option(0.0, "of S, biases and dense layers", NOT_NEGATIVE)
    optimizer: str = option("sgd", "the inner one, of a low-rank network", choices=OPTIMIZERS)
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

    def record(self) -> dict[str, Any]:
        """What config.json says of the run: all that is part of the experiment."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_PART_OF_THE_EXPERIMENT}

    def added(self) -> dict[str, Any]:
        """The options that a script adds to those that all have."""
        kind = next(kind for kind in type(self).__mro__ if kind in (DenseOptions, LowRankOptions))
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
        "compression of the whole network by plain factors A B of uniform ranks",
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
        if self.update != "muon" and not self.factors:
            self.skip = []


@dataclass(kw_only=True)
class LowRankOptions(Options):
    """What a run of a low-rank network is."""

    tau: float | None = option(
        None, "relative truncation tolerance, 0 with --compression unless given", TOLERANCE, "--theta"
    )
    tau_warmup: float | None = option(
        None, "epochs over which the tolerance rises from 0; by default half of all", NOT_NEGATIVE
    )
    integrator: str = option(
        "parallel", "augmented and bug take two passes a step, and bug keeps the rank", choices=INTEGRATORS
    )
    update: str | None = option(None, "how weights step; by default as the optimizer", choices=UPDATES)
    update_lr: float | None = option(
        None, "step size of low-rank weights; by default lr, and 0.3 lr with muon", POSITIVE
    )
    rank: int | float | None = option(
        None, "to begin with, or a share of the full one; by default 0.5, 1.0 with --compression", RANK
    )
    compression: float | None = option(
        None, "of the whole network at the end: a budget instead of --tau", PERCENT, metavar="PERCENT"
    )
    ramp: float | None = option(
        None,
        "share of --epochs over which the budget falls; 0 cuts --from-checkpoint at once; by default 0.6",
        number(float, "[0, 1]"),
    )
    dense_epochs: int = option(
        0, "of --epochs, to begin with; then the network is cut to --compression at once", COUNT
    )
    cut_by: str | None = option(
        None,
        "what a cut keeps: what the loss needs, or the largest; by default loss, weights for texts",
        choices=("loss", "weights"),
    )
    skip: list[str] = option([], "layers that stay dense", **LAYERS)
    spatial: bool = option(
        False,
        "convolutions are spatially separable: one across rows and one across columns, of which half the "
        "full rank costs as much as the kernel",
        **SWITCH,
    )
    min_rank: int = option(2, "of every layer that --max-rank lets have it", NATURAL)
    s_steps: int = option(1, "of S for each basis update", NATURAL)
    allot_every: int | None = option(
        None, "steps from one decision of ranks to the next; by default 10", NATURAL
    )
    max_rank: int | str | None = option(
        None, "of every layer; initial: what it begins with", MAX_RANK, metavar="{RANK,initial}"
    )
    finetune_epochs: int = option(0, "afterwards, of S and the rest, bases frozen", COUNT)

    @property
    def budget(self) -> bool:
        """Whether a budget falls while the network is trained."""
        return self.compression is not None and self.ramp != 0

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A budget is instead of a script's own tolerance."""
        return {"tau": None} if given.get("compression") and "tau" not in given else {}

    def __post_init__(self) -> None:
        """Check, and give values to what is not given and depends on others."""
        super().__post_init__()
        if isinstance(self.max_rank, int) and self.max_rank < self.min_rank:
            raise OptionError(
                f"--max-rank must be at least --min-rank, got {self.max_rank} < {self.min_rank}"
            )
        self._check_rule()
        if self.dense_epochs:
            self._settle_dense_start()
        if self.tau is None and self.compression is not None:
            if self.tau_warmup:
                raise OptionError(
                    "--tau-warmup must come with --tau under --compression: it is the tolerance's"
                )
            self.tau = self.tau_warmup = 0.0
            if self.ramp == 0 and self.max_rank is None:  # with a tolerance of 0 ranks would only rise
                self.max_rank = "initial"
        self.tau = TAU if self.tau is None else self.tau
        if self.tau_warmup is None:
            self.tau_warmup = self.epochs / 2
        if self.tau_warmup > self.epochs:
            raise OptionError(
                f"--tau-warmup must be at most --epochs, got {self.tau_warmup:g} > {self.epochs}"
            )
        self._settle_budget()
        self._settle_cut()
        if self.integrator != "parallel" and self.amp == "float16":
            two = "takes two gradients a step, a loss scale one"
            raise OptionError(f"--integrator {self.integrator} {two}: --amp bfloat16")

    def _check_rule(self) -> None:
        if self.s_steps > 1 and self.integrator != "parallel":
            raise OptionError(f"--s-steps must be 1 with --integrator {self.integrator}, got {self.s_steps}")
        update = self.update or UPDATE_OF[OPTIMIZERS[self.optimizer]]
        if self.integrator == "bug" and update != "sgd":
            raise OptionError(f"--integrator bug must come with --update sgd, got {update}: leave one out")
        if update == "adam" and self.optimizer == "sgd":
            raise OptionError("--update adam must come with --optimizer adam or adamw, whose betas it takes")
        if self.nesterov and (self.integrator == "augmented" or self.s_steps > 1):
            raise OptionError(
                "--nesterov needs more of the velocity than --integrator augmented and --s-steps above 1 "
                "keep: leave one out"
            )

    def _settle_dense_start(self) -> None:
        if self.compression is None:
            raise OptionError("--dense-epochs must come with --compression: the network is cut to it then")
        if self.ramp or self.from_checkpoint:
            given = "--ramp" if self.ramp else "--from-checkpoint"
            raise OptionError(f"--dense-epochs begins at random and cuts at once: leave {given} out")
        if self.dense_epochs >= self.epochs:
            raise OptionError(
                f"--dense-epochs must be less than --epochs, got {self.dense_epochs} >= {self.epochs}"
            )
        if self.update not in (None, "muon", UPDATE_OF[OPTIMIZERS[self.optimizer]]):
            raise OptionError(
                f"--dense-epochs with --optimizer {self.optimizer} steps by that or by --update muon, got "
                f"--update {self.update}"
            )
        self.ramp = 0.0

    def _settle_cut(self) -> None:
        if not self.from_checkpoint and not self.dense_epochs:
            if self.cut_by:
                raise OptionError(
                    "--cut-by must come with --from-checkpoint or --dense-epochs: random weights have "
                    "nothing to keep"
                )
            return
        of_text = self.dataset in TEXTS
        if self.cut_by == "loss" and of_text:
            raise OptionError("--cut-by loss is for pictures: a network for text takes --cut-by weights")
        self.cut_by = self.cut_by or ("weights" if of_text else "loss")

    def _settle_budget(self) -> None:
        if self.compression is None:
            if self.ramp is not None:
                raise OptionError("--ramp must come with --compression: it is the budget's")
            self.rank = 0.5 if self.rank is None else self.rank
            return
        if self.integrator == "bug":
            raise OptionError("--compression changes ranks, and --integrator bug keeps them: take another")
        if self.ramp == 0 and not self.from_checkpoint and not self.dense_epochs:
            raise OptionError(
                "--ramp 0 must come with --from-checkpoint: random weights have nothing to keep"
            )
        if self.ramp == 0 and self.rank is not None:
            cuts = "--dense-epochs" if self.dense_epochs else "--ramp 0"
            raise OptionError(f"{cuts} cuts to ranks of its own: leave --rank out")
        if self.budget:
            self.ramp = RAMP if self.ramp is None else self.ramp
            self.rank = 1.0 if self.rank is None else self.rank


RunOptions = DenseOptions | LowRankOptions

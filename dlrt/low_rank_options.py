# ruff: noqa: RUF009  (option makes fields)
"""What a run of a low-rank network is, beside what every run is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlrt.errors import OptionError
from dlrt.flags import COUNT, MAX_RANK, NATURAL, NOT_NEGATIVE, PERCENT, POSITIVE, RANK, TOLERANCE, number
from dlrt.option_fields import option
from dlrt.options import LAYERS, OPTIMIZERS, SWITCH, DenseOptions, Options
from dlrt.settings import INTEGRATORS, UPDATE_OF
from dlrt.velocity import UPDATES

TAU, RAMP = 0.1, 0.6


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
        self._settle_dense_start("--compression", self.compression)
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
        trained = bool(self.from_checkpoint or self.dense_epochs)
        self._settle_cut(trained, "--compression, --from-checkpoint or --dense-epochs", self.budget)
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

    def _settle_dense_start(self, cuts: str, compression: float | None) -> None:
        super()._settle_dense_start(cuts, compression)
        if not self.dense_epochs:
            return
        if self.ramp:
            raise OptionError("--dense-epochs cuts at once: leave --ramp out")
        if self.update not in (None, "muon", UPDATE_OF[OPTIMIZERS[self.optimizer]]):
            raise OptionError(
                f"--dense-epochs with --optimizer {self.optimizer} steps by that or by --update muon, got "
                f"--update {self.update}"
            )
        self.ramp = 0.0

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

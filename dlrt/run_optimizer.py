"""The optimizer and the schedule that a run's options describe."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dlrt.baselines import Muon, product_decay
from dlrt.blocks import is_within
from dlrt.factors import Factors
from dlrt.layers import LowRankLayer
from dlrt.low_rank_options import RunOptions
from dlrt.optimizer import DLRT
from dlrt.options import OPTIMIZERS


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
        settings |= {"compression": options.compression / 100, "ramp": ramp, "cut_by": options.cut_by}
    return DLRT(model, OPTIMIZERS[options.optimizer], **settings, **inner)


def _dense_optimizer(model: nn.Module, options: RunOptions, inner: dict) -> torch.optim.Optimizer:
    """An optimizer of torch, or Muon; plain factors A B have the weight decay that A B would have."""
    cut = any(isinstance(module, Factors) for module in model.modules())
    update_lr = options.update_lr if cut else options.dense_update_lr or options.update_lr
    if options.update == "muon":
        others = (module for name, module in model.named_modules() if not is_within(name, options.skip))
        hidden = [module for module in others if isinstance(module, (nn.Linear, nn.Conv2d))]
        inner |= {"update_lr": update_lr, "optimizer_class": OPTIMIZERS[options.optimizer]}
        optimizer = Muon(model.parameters(), hidden, **inner)
    else:
        optimizer = OPTIMIZERS[options.optimizer](model.parameters(), **inner)
    if cut:
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


def go_on_with(scheduler: LRScheduler | ReduceLROnPlateau, optimizer: torch.optim.Optimizer) -> None:
    """Let a schedule go on with another optimizer, whose learning rates are those that it began with.

    The one before lets go of the weights, and of what it knows of them, whoever still holds it.
    """
    before, scheduler.optimizer = scheduler.optimizer, optimizer
    lr = before.param_groups[0]["lr"]
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.min_lrs = scheduler.min_lrs[:1] * len(optimizer.param_groups)
    else:
        scheduler.base_lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(initial_lr=group["lr"], lr=lr)
    before.state.clear()
    for group in before.param_groups:
        group["params"].clear()

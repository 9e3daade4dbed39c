"""The training loop: ordinary PyTorch, with a tolerance that may rise, validation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from dlrt import distributed
from dlrt.checkpoint import Row
from dlrt.continuing import continued
from dlrt.costs import compression
from dlrt.data import Dataset, Split, augmented_batch, epoch_seed
from dlrt.optimizer import DLRT
from dlrt.options import AMP, Options
from dlrt.run_optimizer import go_on_with
from dlrt.runs import Run, chosen_epoch


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | ReduceLROnPlateau,
    dataset: Dataset,
    options: Options,
    run: Run,
    about: dict[str, Any],
    quiet: bool = False,
    cut: Callable[[], torch.optim.Optimizer] | None = None,
) -> pd.DataFrame:
    """Train from the run's last checkpoint, or from the start, to the end; give the metrics, a row per epoch.

    The optimizer is a DLRT for a low-rank network, any other for another one. After `dense_epochs` cut() puts
    a dense network into factors, and gives the optimizer for it; the schedule goes on. tau rises linearly
    from 0 over the first tau_warmup epochs; after `epochs` the bases are frozen, and S and the rest are
    trained on. A run from trained weights has a row for epoch 0, too: what it begins with. After every epoch
    the checkpoint holds all that a continuation needs, the weights of the chosen epoch so far ("chosen") and
    `about`, which says what the network is. Each epoch draws from a generator of its own, so that a resumed
    run ends as an uninterrupted one. FloatingPointError where the loss is not finite, ValueError where
    `Dataset.check` finds the data wrong. Of several processes, the first alone reads and writes the run's
    folder.
    """
    dataset.check()
    scaler = GradScaler(dataset.train.images.device.type, enabled=options.amp == "float16")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    rows, chosen = continued(parts, run)
    if rows:  # the checkpoint has them where metrics.csv was lost
        distributed.on_first_process(lambda: run.write_metrics(rows))
    total = options.epochs + options.finetune_epochs
    first = rows[-1]["epoch"] + 1 if rows else 0 if options.from_checkpoint else 1
    for epoch in range(first, total + 1):
        if options.dense_epochs and epoch == options.dense_epochs + 1:
            optimizer = parts["optimizer"] = cut()
            go_on_with(scheduler, optimizer)
        if epoch > options.epochs and isinstance(optimizer, DLRT):
            optimizer.freeze_bases()
        rows.append(_epoch(model, optimizer, scaler, dataset, options, epoch, run, quiet))
        if not math.isfinite(loss := rows[-1]["validation_loss"]):
            raise _diverged(f"the validation loss is {loss} after epoch {epoch}", run)
        if epoch > 0 and isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        elif epoch > 0:
            scheduler.step()
        if chosen_epoch(pd.DataFrame(rows)) == len(rows) - 1:
            chosen = deepcopy(model.state_dict())
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"chosen": chosen, "metrics": rows, "about": about}
        distributed.on_first_process(lambda state=state: run.save(state))
        if not quiet:
            print(describe(rows[-1], total), flush=True)
    model.load_state_dict(chosen)
    return pd.DataFrame(rows)


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    dataset: Dataset,
    options: Options,
    epoch: int,
    run: Run,
    quiet: bool,
) -> Row:
    """Train for one epoch, unless it is epoch 0, and measure: a row of metrics.csv."""
    lr = optimizer.param_groups[0]["lr"]
    start = time.perf_counter()
    train_loss, train_accuracy = math.nan, math.nan
    if epoch > 0:
        train_loss, train_accuracy = train_epoch(
            model, optimizer, dataset, options, epoch, run, quiet, scaler
        )
    seconds = time.perf_counter() - start
    distributed.check_identical(model)
    distributed.average_buffers(model)
    validation_loss, validation_accuracy = evaluate(model, dataset.validation, options.amp)
    test_loss, test_accuracy = evaluate(model, dataset.test, options.amp)
    cost = compression(model)
    budget = (optimizer.budget or 0) if isinstance(optimizer, DLRT) else 0  # 0 is none
    return {
        "epoch": epoch,
        "frozen_bases": epoch > options.epochs,
        "lr": lr,
        "tau": options.tau * tau_fraction(options, epoch) if epoch else 0.0,  # nothing has been truncated yet
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "validation_loss": validation_loss,
        "validation_accuracy": validation_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "ranks": "/".join(map(str, cost.ranks.values())),
        "budget": cost.dense_parameters if 0 < epoch <= options.dense_epochs else budget,
        "evaluation_parameters": cost.evaluation_parameters,
        "evaluation_compression": cost.evaluation_compression,
        "training_parameters": cost.training_parameters,
        "training_compression": cost.training_compression,
        "seconds": seconds,
    }


def tau_fraction(options: Options, epochs: float) -> float:
    """The share of tau that is in force after that many epochs."""
    return min(1.0, epochs / options.tau_warmup) if options.tau_warmup else 1.0


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    options: Options,
    epoch: int,
    run: Run,
    quiet: bool = False,
    scaler: GradScaler | None = None,
) -> tuple[float, float]:
    """One pass over the training split; mean loss and accuracy (%) over its samples, while training.

    Every process takes its share of each batch, and the gradients are those of the whole batch. The scaler is
    that of autocast to float16.
    """
    drawn_from = epoch_seed(options.seed, epoch)
    torch.manual_seed(drawn_from + (distributed.process_rank() << 52))  # dropout
    shuffle = torch.Generator().manual_seed(drawn_from)
    steps = dataset.train.steps(options.batch_size)
    scaler = scaler or GradScaler(enabled=False)
    model.train()
    loss_sum = correct = seen = 0.0
    bar = tqdm(total=steps, desc=f"epoch {epoch}", unit="step", leave=False, disable=True if quiet else None)
    for step, (x, y) in enumerate(dataset.train.batches(options.batch_size, shuffle), start=1):
        if options.augment and dataset.shift:
            x = augmented_batch(x, dataset.shift, dataset.flip, shuffle)
        if isinstance(optimizer, DLRT):
            optimizer.tau = options.tau * tau_fraction(options, epoch - 1 + step / steps)
        samples, (x, y, weight) = y.numel(), distributed.own_part(x, y)  # of text its tokens
        closure, logits = _pass_over(model, optimizer, options, scaler, x, y, weight)
        try:
            loss = _step(optimizer, closure, scaler)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            raise _diverged(f"{error} in epoch {epoch}, step {step}", run) from error
        loss_sum += loss * samples
        correct += (logits[0].argmax(1) == y).sum().item() if weight else 0
        seen += samples
        bar.update()
        bar.set_postfix(
            loss=f"{loss_sum / seen:.4f}", accuracy=f"{100 * correct / seen:.2f} %", refresh=False
        )
    bar.close()
    if isinstance(optimizer, DLRT):
        optimizer.zero_grad()  # a step that the loss scale left out has kept its gradients
        optimizer.truncate()
    (correct,) = distributed.sums(correct)
    return loss_sum / seen, 100 * correct / seen


def _pass_over(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    options: Options,
    scaler: GradScaler,
    x: Tensor,
    y: Tensor,
    weight: float,
) -> tuple[Callable[[], float], list[Tensor]]:
    """A closure for `optimizer.step`, a pass over a batch that gives the loss; and a list for its logits."""
    logits: list[Tensor] = []

    def closure() -> float:
        optimizer.zero_grad()
        with _autocast(x, options.amp):
            logits.append(model(x))
        loss = weight * cross_entropy(logits[-1].float(), y, label_smoothing=options.label_smoothing)
        (mean,) = distributed.sums(loss.item())
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean}")
        scaler.scale(loss).backward()
        distributed.reduce_gradients(model)
        return mean

    return closure, logits


def _autocast(x: Tensor, amp: str | None) -> torch.autocast:
    return torch.autocast(x.device.type, AMP[amp] if amp else None, enabled=bool(amp))


def _step(optimizer: torch.optim.Optimizer, closure: Callable[[], float], scaler: GradScaler) -> float:
    """One step; with a loss scale none where a gradient overflowed, which makes the scale smaller."""
    if not scaler.is_enabled():
        return optimizer.step(closure)  # all optimizers take a closure; integrators of two passes need it
    loss = closure()
    scaler.step(optimizer)
    scaler.update()
    return loss


def _diverged(reason: str, run: Run) -> FloatingPointError:
    last = run.checkpoint if run.checkpoint.exists() else "none was written yet"
    return FloatingPointError(f"{reason}; last good checkpoint: {last}; a smaller --lr may help")


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, amp: str | None = None, batch_size: int = 500
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (%) over all samples of a split, in eval mode; processes take turns."""
    model.eval()
    loss = correct = 0.0
    turns = islice(split.batches(batch_size), distributed.process_rank(), None, distributed.world_size())
    for x, y in turns:
        with _autocast(x, amp):
            logits = model(x)
        loss += cross_entropy(logits.float(), y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    loss, correct = distributed.sums(loss, correct)
    return loss / split.labels.numel(), 100 * correct / split.labels.numel()


def describe(row: dict[str, Any], epochs: int) -> str:
    """One line about an epoch; nothing was trained in epoch 0."""
    ranks = f"  ranks {row['ranks']}" if row["ranks"] else ""
    if ranks or row["evaluation_compression"] > 0:
        ranks += f"  compression {row['evaluation_compression']:.1f} %"
    validation = f"  validation {row['validation_loss']:.4f} {row['validation_accuracy']:.2f} %{ranks}"
    if row["epoch"] == 0:
        return f"epoch {0:3d}/{epochs}{validation}"
    return (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.4g}  tau {row['tau']:.3g}"
        f"  train {row['train_loss']:.4f} {row['train_accuracy']:.2f} %{validation}  {row['seconds']:.1f} s"
    )

"""Weights and checkpoints: written whole, read without running code, and the network that they are of."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypedDict, get_args, get_type_hints

import pandas as pd
import torch
from torch import nn

from dlrt import models
from dlrt.convert import load_factors
from dlrt.distributed import checksum
from dlrt.errors import KEPT, RunError, one_line

WEIGHTS = Path(__file__).parent / "weights"  # of trained networks, by name; README.md there says more
KINDS = {int: "iu", float: "iuf", bool: "b"}  # of the columns that hold a type; whatever else is text


class Epoch(TypedDict):
    """What a row of metrics.csv must say."""

    epoch: int


class Row(Epoch, total=False):
    """A row of metrics.csv: what is measured after an epoch. Accuracies and compressions are in %."""

    frozen_bases: bool
    lr: float
    tau: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float
    ranks: str
    budget: int
    evaluation_parameters: int
    evaluation_compression: float
    training_parameters: int
    training_compression: float
    seconds: float


def holds(table: pd.DataFrame, row: type) -> bool:
    """Whether a table has rows, all that a TypedDict requires, and its columns in the types that it says."""
    return (
        len(table) > 0
        and isinstance(table.index, pd.RangeIndex)  # else the rows are longer than the head
        and row.__required_keys__ <= set(table.columns)
        and all(_is_of(table[name], kind) for name, kind in get_type_hints(row).items() if name in table)
    )


def _is_of(column: pd.Series, kind: Any) -> bool:
    if allowed := get_args(kind):  # of a Literal
        return bool(column.isin(allowed).all())
    return kind not in KINDS or column.dtype.kind in KINDS[kind]


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any], advice: str) -> None:
    """Write a file that is seen whole or not at all; OSError, with a line that ends in advice, where not."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if part.is_file():
            part.unlink()
        # torch.save raises a RuntimeError of its own, with a full disk or Ctrl-C behind it
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        reasons = [reason for reason in (error, error.__context__) if isinstance(reason, OSError)]
        if not reasons:
            raise
        raise OSError(f"{path} cannot be written ({reasons[0].strerror}): {advice}") from error


def save_table(path: Path, table: pd.DataFrame, advice: str = KEPT) -> None:
    """Write a CSV file with six digits of each number, whole or not at all, as `atomic_write`."""
    atomic_write(path, lambda file: table.to_csv(file, index=False, float_format="%.6g"), advice)


def load_file(path: Path) -> dict[str, Any]:
    """What torch.load reads in a file; RunError where that is no dictionary."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, with long texts, on bytes that it cannot read
        raise RunError(
            f"{path} is not a checkpoint, or a damaged one: it holds no tensors that torch.load reads"
        ) from error
    if not isinstance(state, dict):
        raise RunError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors, numbers and names, no code. RunError where the file is not one."""
    state = load_file(path)
    if not {"model", "metrics"} <= state.keys():
        raise RunError(f"{path} is not a checkpoint of a run: it has no model and metrics")
    rows, weights = state["metrics"], [state[name] for name in ("model", "chosen") if name in state]
    are_rows = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not are_rows or (rows and not holds(pd.DataFrame(rows), Row)):
        raise RunError(f"{path} is a damaged checkpoint: its metrics are not those of epochs")
    if not all(map(_are_weights, weights)):
        raise RunError(f"{path} is a damaged checkpoint: its weights are no state dict of tensors")
    return state


def checkpoint_of(run: Path | str) -> Path:
    """The checkpoint of a run's folder, or that file itself, or the one of that name in `WEIGHTS`."""
    path, shipped = Path(run), WEIGHTS / f"{run}.pt"
    if not path.exists() and path.name == str(run) and shipped.is_file():
        return shipped
    return path / "checkpoint.pt" if path.is_dir() else path


def _shipped() -> str:
    return ", ".join(sorted(path.stem for path in WEIGHTS.glob("*.pt")))


def fingerprint(model: nn.Module) -> str:
    """A checksum of all that a network's state dict holds, as eight hexadecimal digits."""
    sums = [(name, checksum(value)) for name, value in model.state_dict().items()]
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def trained_weights(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of the chosen epoch of a run or of a network in `WEIGHTS`, or a state dict in a file.

    The second value is what the checkpoint says about the network, nothing for a state dict. RunError where
    there is none of these.
    """
    path = checkpoint_of(run)
    if (run / "config.json").exists() and not path.exists():
        raise RunError(f"{run} holds the record of a run without its weights: train it anew")
    if not path.exists():
        raise RunError(
            f"{path} is not there: give a run's folder, its checkpoint.pt, a file of weights or one of "
            f"{_shipped()}"
        )
    state = load_file(path)
    weights = state.get("chosen", state)
    if not _are_weights(weights):
        raise RunError(f"{path} holds no state dict of tensors alone: save one with torch.save")
    about = state.get("about") if "chosen" in state else {}
    if not isinstance(about, dict):
        raise RunError(f"{path} is damaged: it does not say which network it holds")
    return weights, {"seed": 0, **about} if path.parent == WEIGHTS else about  # those that come along


def _are_weights(state: Any) -> bool:
    """Whether it is a state dict: names and tensors."""
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )


def load_network(run: Path | str, network: type[nn.Module] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run with the weights of its chosen epoch, and what the checkpoint says about it.

    run is a run's folder, a checkpoint.pt or the name of a network in `WEIGHTS`. The network is on the CPU
    and in evaluation mode, and low-rank where the run's was. The second value has the keys network, settings,
    shape (channels, height, width), classes, dataset, mean and std (per channel, of pixels in [0, 1]), by
    which images must be normalised. A network that is not one of `dlrt.models` must be given as a class.
    RunError where there is no checkpoint, or where it is damaged or of another network.
    """
    path = checkpoint_of(run)
    if not path.is_file():
        raise RunError(
            f"there is no {path}: give a run's folder, its checkpoint.pt or one of {_shipped()}, or train it "
            "anew"
        )
    state = load_checkpoint(path)
    if missing := {"about", "chosen"} - state.keys():
        raise RunError(f"{path} has no {' and no '.join(sorted(missing))}: it is not from a training script")
    about = state["about"]
    name = about.get("network") if isinstance(about, dict) else None
    if not isinstance(name, str):
        raise RunError(f"{path} is damaged: it does not say which network it holds")
    if network is None and name not in models.__all__:
        raise RunError(
            f"{path} holds the network {name!r}, and dlrt.models has only {', '.join(models.__all__)}: "
            f"add it there, or give its class, dlrt.checkpoint.load_network(run, {name})"
        )
    network = network or getattr(models, name)
    try:
        model = network(tuple(about["shape"]), about["classes"], **about["settings"])
        numbers = [float(value) for key in ("mean", "std") for value in about[key]]
        channels = about["shape"][0] if len(about["shape"]) == 3 else 0  # text has none
        if len(numbers) != 2 * channels or not isinstance(about["dataset"], str):
            raise ValueError("it must name the data set, with a mean and a deviation of every channel")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise RunError(f"{path} is damaged: it does not say how its {name} is made ({reason})") from error
    try:
        model = load_factors(model, state["chosen"])
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reason = one_line(str(error))
        raise RunError(f"the weights in {path} do not fit {network.__name__}: {reason}") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise RunError(f"the weights in {path} must be finite, got NaN or infinity: train it anew")
    return model.eval(), about

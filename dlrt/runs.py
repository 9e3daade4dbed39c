"""A run's folder: config.json (all options), metrics.csv (a row per epoch), checkpoint.pt."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import torch

import dlrt
from dlrt.distributed import world_size
from dlrt.errors import RunError
from dlrt.records import Row, holds, read_options, same_option

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


RESUME = "once it can be, --resume continues from the last epoch"


class Run:
    """One run and its folder. Files appear whole or not at all: they are written beside and then renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.checkpoint = folder / "config.json", folder / "checkpoint.pt"

    def start(self, config: dict[str, Any], resume: bool) -> None:
        """Make the folder, or check that it holds a run of the same options to resume; else RunError.

        The folder is this process's until it ends, however it ends: another one that starts there is refused.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        was = self.options()
        begun = any(path != self.config and path.suffix != ".part" for path in self.folder.iterdir())
        if begun and not resume:
            raise RunError(f"{self.folder} holds a run: continue it with --resume, or choose another --name")
        if was and begun:  # else nothing was completed, and nothing is lost
            other = [
                f"{key} {was.get(key)!r} -> {config.get(key)!r}"
                for key in {**was, **config}
                if key != "name" and not same_option(key, was.get(key), config.get(key))  # a folder may move
            ]
            if other:
                raise RunError(
                    f"{self.folder} was begun with other options ({', '.join(other)}): "
                    "repeat those, or choose another --name"
                )
            return
        text = json.dumps({"options": config, **surroundings()}, indent=2) + "\n"
        write_whole(self.config, lambda file: file.write(text.encode()), RESUME)

    def options(self) -> dict[str, Any]:
        """The options that the folder's run was begun with; none where there is no run."""
        return read_options(self.folder)

    def _lock(self) -> None:
        if fcntl is None:
            return
        folder = os.open(self.folder, os.O_RDONLY)
        weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process writes to {self.folder}: wait for it, or choose another --name"
            ) from None
        except OSError as error:  # some network file systems have no locks
            reason = error.strerror
            warnings.warn(f"{self.folder} cannot be locked ({reason}): start one run only", stacklevel=2)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint and, from its list state["metrics"] of rows, metrics.csv.

        The checkpoint comes last: a continuation writes the metrics again, but not those before it.
        """
        self.write_metrics(state["metrics"])
        write_whole(self.checkpoint, lambda file: torch.save(state, file), RESUME)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv, a line for each row."""
        table = pd.DataFrame(rows)
        path, form = self.folder / "metrics.csv", {"index": False, "float_format": "%.6g"}
        write_whole(path, lambda file: table.to_csv(file, **form), RESUME)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None where no epoch was completed; RunError for a damaged one."""
        if not self.checkpoint.exists():
            return None
        try:
            return load_checkpoint(self.checkpoint)
        except RunError as error:
            raise RunError(f"{error}: delete it to begin anew") from error


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


def _are_weights(state: Any) -> bool:
    """Whether it is a state dict: names and tensors."""
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )


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


def trained_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of the chosen epoch of a run, from its folder or checkpoint, or a state dict in a file.

    RunError where there is neither.
    """
    if (path / "config.json").exists() and not (path / "checkpoint.pt").exists():
        raise RunError(f"{path} holds the record of a run without its weights: train it anew")
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise RunError(f"{path} is not there: give a run's folder, its checkpoint.pt or a file of weights")
    state = load_file(path)
    weights = state.get("chosen", state)
    if not _are_weights(weights):
        raise RunError(f"{path} holds no state dict of tensors alone: save one with torch.save")
    return weights


def surroundings() -> dict[str, Any]:
    """Versions, device and commit: what else a result may depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "commit": _commit(Path(dlrt.__file__).parent),
    }


def _commit(folder: Path) -> str | None:
    """The commit that is checked out, "-dirty" where files differ from it; None without git.

    It reads only: `git describe --dirty` writes the index, and leaves a lock behind where it cannot.
    """
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        told = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout
    except FileNotFoundError:  # no git here
        return None
    lines = told.decode(errors="replace").splitlines()
    header, changes = ([line for line in lines if line.startswith("#") == of] for of in (True, False))
    commits = [line.split()[-1] for line in header if line.startswith("# branch.oid") and "(" not in line]
    return commits[0][:12] + ("-dirty" if changes else "") if commits else None


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], advice: str) -> None:
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

"""A run's folder: config.json (options), metrics.csv (a row per epoch), checkpoint.pt."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import numpy as np
import pandas as pd
import torch

from dlrt.checkpoint import Row, atomic_write, holds, load_checkpoint, save_table
from dlrt.distributed import world_size
from dlrt.errors import RunError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


AGAIN = "delete the run's folder and make the run again"
RESUME = "once it can be, --resume continues from the last epoch"


class Recorded(TypedDict, total=False):
    """The options in config.json that tables are made of, where they are set."""

    name: str
    network: str
    dataset: str
    from_checkpoint: str
    epochs: int
    finetune_epochs: int
    seed: int
    lr: float
    tau: float
    width: float
    decay: float
    compression: float


class Run:
    """One run and its folder. Files appear whole or not at all: they are written beside and then renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.checkpoint = folder / "config.json", folder / "checkpoint.pt"

    def start(self, config: dict[str, Any], resume: bool, device: str = "cpu") -> None:
        """Make the folder, or check that it holds a run of the same options to resume; else RunError.

        The folder is this process's until it ends, however it ends: another one that starts there is refused.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder, "--name", self)
        was = self.options()
        begun = any(path != self.config and path.suffix != ".part" for path in self.folder.iterdir())
        other = differences(was, config, "->", "name") if was else ""  # a folder may move
        if begun and other:
            again = "repeat those" if resume else "repeat those with --resume"
            raise RunError(
                f"{self.folder} was begun with other options ({other}): {again}, or choose another --name"
            )
        if begun and not resume:
            raise RunError(f"{self.folder} holds a run: continue it with --resume, or choose another --name")
        if was and begun:  # else nothing was completed, and nothing is lost
            return
        text = json.dumps({"options": config, **environment(device)}, indent=2) + "\n"
        atomic_write(self.config, lambda file: file.write(text.encode()), RESUME)

    def discard_empty(self) -> None:
        """Remove the folder where it holds options alone: they were impossible, and nothing was trained."""
        if [path.name for path in self.folder.iterdir()] == [self.config.name]:
            self.config.unlink()
            self.folder.rmdir()

    def options(self) -> dict[str, Any]:
        """The options that the folder's run was begun with; none where there is no run."""
        return read_options(self.folder)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint and, from its list state["metrics"] of rows, metrics.csv.

        The checkpoint comes last: a continuation writes the metrics again, but not those before it.
        """
        self.write_metrics(state["metrics"])
        atomic_write(self.checkpoint, lambda file: torch.save(state, file), RESUME)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.csv, a line for each row."""
        save_table(self.folder / "metrics.csv", pd.DataFrame(rows), RESUME)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None where no epoch was completed; RunError for a damaged or lost one."""
        if not self.checkpoint.exists():
            if (self.folder / "metrics.csv").exists():
                raise RunError(
                    f"{self.folder} holds the record of a run without its weights: move it, or {AGAIN}"
                )
            return None
        try:
            return load_checkpoint(self.checkpoint)
        except RunError as error:
            raise RunError(f"{error}: delete it to begin anew") from error


def lock(folder: Path, flag: str, owner: object) -> None:
    """Make a folder this process's as long as owner is there; RunError if it is another's.

    flag chooses another folder.
    """
    if fcntl is None:
        return
    opened = os.open(folder, os.O_RDONLY)
    weakref.finalize(owner, os.close, opened)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another process writes to {folder}: wait for it, or choose another {flag}") from None
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start one run only", stacklevel=3)


def environment(device: str | torch.device) -> dict[str, Any]:
    """Versions, machine and commit: what else a result may depend on."""
    kind = torch.device(device).type
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
            "device": kind,
            "gpu": torch.cuda.get_device_name(device) if kind == "cuda" else None,
        },
        "commit": _commit(Path(__file__).parent),
    }


def _commit(folder: Path) -> str | None:
    """The commit that is checked out, "-dirty" where files differ from it; None without git.

    It reads only: `git describe --dirty` writes the index, and leaves a lock behind where it cannot.
    """
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        status = subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout
    except FileNotFoundError:  # no git here
        return None
    lines = status.decode(errors="replace").splitlines()
    header, changes = ([line for line in lines if line.startswith("#") == marked] for marked in (True, False))
    commits = [line.split()[-1] for line in header if line.startswith("# branch.oid") and "(" not in line]
    return commits[0][:12] + ("-dirty" if changes else "") if commits else None


def read_options(folder: Path) -> dict[str, Any]:
    """The options in a run's config.json, none where there is no run; RunError if damaged or gone."""
    return read_config(folder).get("options", {})


def read_config(folder: Path) -> dict[str, Any]:
    """All of a run's config.json, nothing where there is no run; RunError if damaged or gone."""
    path = folder / "config.json"
    if not path.exists() and not (folder / "metrics.csv").exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        options = {**config["options"]}
        for option, kind in get_type_hints(Recorded).items():
            value = options.get(option)
            if value is not None and not isinstance(value, (float, int) if kind is float else kind):
                raise TypeError(f"{option} must be of {kind.__name__}, got {value!r}")
        return {**config, "options": options}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(path) from error


def read_metrics(folder: Path, row: type = Row) -> pd.DataFrame | None:
    """metrics.csv of one run, None where no epoch was completed; RunError where the file is damaged."""
    path = folder / "metrics.csv"
    return read_table(path, row).fillna({"ranks": ""}) if path.exists() else None


def read_table(path: Path, row: type, again: str = AGAIN) -> pd.DataFrame:
    """A CSV file of rows as a TypedDict has them, and more columns; RunError where it is damaged."""
    try:
        texts = {name: str for name, kind in get_type_hints(row).items() if kind is str}
        table = pd.read_csv(path, dtype=texts)
        whole = path.read_bytes().endswith(b"\n")  # else it was cut off
    except (OSError, ValueError) as error:
        raise damaged(path, again) from error
    if not whole or not holds(table, row):
        raise damaged(path, again)
    return table


def damaged(path: Path, again: str = AGAIN) -> RunError:
    return RunError(f"{path} is lost or damaged: restore it, or {again}")


def epochs_done(folder: Path) -> int:
    """How many epochs a run has completed: 0 where there is none."""
    metrics = read_metrics(folder)
    return 0 if metrics is None else int(metrics["epoch"].iloc[-1])


def epochs_planned(options: Mapping[str, Any]) -> int:
    """How many epochs a run with these options has."""
    return options["epochs"] + (options.get("finetune_epochs") or 0)


def same_option(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; in a record that is too old to have it, it is not set.

    A record that is too old to have the checksum of its data may be of any.
    """
    if name == "data":
        return one == other or None in (one, other)
    if name == "rank" and type(one) is not type(other):  # 1 is a rank, 1.0 the full one
        return False
    return one == other or not (one or other)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], between: str, *but: str) -> str:
    """In which options two records differ, but for some: "lr 0.1 and 0.2" """
    both = {name: (one.get(name), other.get(name)) for name in {**one, **other} if name not in but}
    return ", ".join(f"{n} {a!r} {between} {b!r}" for n, (a, b) in both.items() if not same_option(n, a, b))


def chosen_epoch(metrics: pd.DataFrame) -> int:
    """The row to report: at the final tolerance and budget, the most accurate on the validation split.

    Among equals the one with the smallest validation loss. Epoch 0, what training began with, is not one of
    them. The same for every method; the test split has no say.
    """
    bounds = metrics[["tau"] + ["budget"] * ("budget" in metrics)]
    final = metrics[(bounds == bounds.iloc[-1]).all(axis=1) & (metrics["epoch"] > 0)]
    if final.empty:  # nothing was trained yet
        final = metrics
    order = final.sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    return int(order.index[0])

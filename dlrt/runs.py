"""A run's folder: config.json (all options), metrics.csv (a row per epoch), checkpoint.pt; many runs read."""

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

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


NOT_PART_OF_THE_EXPERIMENT = ("data_dir", "output_dir", "resume", "quiet", "device", "workers")
DIVERGED = 3  # the exit code of a run whose loss is not finite
RESUME = "once it can be, --resume continues from the last epoch"


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what to do."""


def same_option(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; in a record that is too old to have it, it is not set."""
    if name == "rank" and type(one) is not type(other):  # 1 is a rank, 1.0 the full one
        return False
    return one == other or not (one or other)


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
    return state


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
    return state.get("chosen", state)


def chosen_epoch(metrics: pd.DataFrame) -> int:
    """The row to report: of the epochs at the final tolerance, the one most accurate on the validation split.

    Among equals the one with the smallest validation loss. Epoch 0, what training began with, is not one of
    them. The same for every method; the test split has no say.
    """
    final = metrics[(metrics["tau"] == metrics["tau"].iloc[-1]) & (metrics["epoch"] > 0)]
    if final.empty:  # nothing was trained yet
        final = metrics
    order = final.sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    return int(order.index[0])


def read_runs(results: Path) -> pd.DataFrame:
    """A row per run below a folder: its options, the metrics of its chosen epoch, and the folder's name.

    The column last_test_accuracy is that of the last epoch, seconds_per_epoch the mean; options has all
    options as a dict. A run that is not finished is left out with a warning. FileNotFoundError where there
    are no finished runs.
    """
    rows, unfinished = [], []
    for path in sorted(results.glob("**/config.json")):
        metrics = read_metrics(path.parent)
        if metrics is None:
            continue
        options = read_options(path.parent)
        name = str(path.parent.relative_to(results))
        done, planned = int(metrics["epoch"].iloc[-1]), options["epochs"] + options.get("finetune_epochs", 0)
        if done < planned:
            unfinished.append(f"{name} ({done} of {planned} epochs)")
            continue
        chosen = metrics.loc[chosen_epoch(metrics)].to_dict()
        rows.append({
            **chosen,
            **options,  # lr is the one that was asked for, not that of the epoch
            "options": options,
            "run": name,
            "last_test_accuracy": metrics["test_accuracy"].iloc[-1],
            "seconds_per_epoch": metrics["seconds"].mean(),
        })  # fmt: skip
    if unfinished:
        warnings.warn(f"left out, since unfinished or diverged: {', '.join(unfinished)}", stacklevel=2)
    if not rows:
        raise FileNotFoundError(
            f"no finished runs in {results}; make them with the training scripts beside it"
        )
    return pd.DataFrame(rows)


def read_options(folder: Path) -> dict[str, Any]:
    """The options in a run's config.json, none where there is no run; RunError where the file is damaged."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error


def read_metrics(folder: Path) -> pd.DataFrame | None:
    """metrics.csv of one run, None where no epoch was completed; RunError where the file is damaged."""
    path = folder / "metrics.csv"
    if not path.exists():
        return None
    try:
        metrics = pd.read_csv(path, dtype={"ranks": str}).fillna({"ranks": ""})
    except ValueError as error:
        raise _damaged(path) from error
    if metrics.empty or not path.read_bytes().endswith(b"\n"):  # cut off
        raise _damaged(path)
    return metrics


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged: restore it, or delete the run's folder and make the run again")


def epochs_done(folder: Path) -> int:
    """How many epochs a run has completed: 0 where there is none."""
    metrics = read_metrics(folder)
    return 0 if metrics is None else int(metrics["epoch"].iloc[-1])


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
        lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no git here
        return None
    header, changes = (
        [line for line in lines.splitlines() if line.startswith("#") == told] for told in (True, False)
    )
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

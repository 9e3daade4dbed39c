"""The records of runs, config.json and metrics.csv: one of them read, and many as one table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd


class RunError(RuntimeError):
    """A run's folder cannot be used as asked; the message says why and what to do."""


def same_option(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; in a record that is too old to have it, it is not set."""
    if name == "rank" and type(one) is not type(other):  # 1 is a rank, 1.0 the full one
        return False
    return one == other or not (one or other)


def one_line(text: str) -> str:
    """A text on one line; what cannot be printed as an escape sequence."""
    signs = " ".join(text.split())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in signs)


def read_runs(results: Path) -> pd.DataFrame:
    """A row per run below a folder: its options, the metrics of its chosen epoch, and the folder's name.

    The column last_test_accuracy is that of the last epoch, seconds_per_epoch the mean; options has all
    options as a dict. A run that is not finished, or not yet begun, is left out with a warning.
    FileNotFoundError where there are no finished runs.
    """
    rows, unfinished = [], []
    files = (*results.glob("**/config.json"), *results.glob("**/metrics.csv"))
    for folder in sorted({path.parent for path in files}):
        name, options = str(folder.relative_to(results)), read_options(folder)
        done, planned = epochs_done(folder), options["epochs"] + options.get("finetune_epochs", 0)
        if done < planned:
            unfinished.append(f"{name} ({done} of {planned} epochs)")
            continue
        metrics = read_metrics(folder)
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
        return {**config, "options": dict(config["options"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    return RunError(
        f"{path} is lost or damaged: restore it, or delete the run's folder and make the run again"
    )


def epochs_done(folder: Path) -> int:
    """How many epochs a run has completed: 0 where there is none."""
    metrics = read_metrics(folder)
    return 0 if metrics is None else int(metrics["epoch"].iloc[-1])

"""The records of runs, config.json and metrics.csv: one of them read, and many as one table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TypedDict, get_args, get_type_hints

import pandas as pd

from dlrt.errors import RunError


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


class Options(TypedDict, total=False):
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


KINDS = {int: "iu", float: "iuf", bool: "b"}  # of the columns that hold a type; whatever else is text
AGAIN = "delete the run's folder and make the run again"


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
        if options.get("epochs") is None:
            raise damaged(folder / "config.json")
        done, planned = epochs_done(folder), options["epochs"] + (options.get("finetune_epochs") or 0)
        if done < max(1, planned):
            unfinished.append(f"{name} ({done} of {planned} epochs)")
            continue
        metrics = read_metrics(folder)
        try:
            chosen = metrics.loc[chosen_epoch(metrics)].to_dict()
            last, seconds = metrics["test_accuracy"].iloc[-1], metrics["seconds"].mean()
        except KeyError as error:
            raise damaged(folder / "metrics.csv") from error
        rows.append({
            **chosen,
            **options,  # lr is the one that was asked for, not that of the epoch
            "options": options,
            "run": name,
            "last_test_accuracy": last,
            "seconds_per_epoch": seconds,
        })  # fmt: skip
    if unfinished:
        warnings.warn(f"left out, since unfinished or diverged: {', '.join(unfinished)}", stacklevel=2)
    if not rows:
        raise FileNotFoundError(
            f"no finished runs in {results}; make them with the training scripts beside it"
        )
    return pd.DataFrame(rows)


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
        for option, kind in get_type_hints(Options).items():
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


def damaged(path: Path, again: str = AGAIN) -> RunError:
    return RunError(f"{path} is lost or damaged: restore it, or {again}")


def epochs_done(folder: Path) -> int:
    """How many epochs a run has completed: 0 where there is none."""
    metrics = read_metrics(folder)
    return 0 if metrics is None else int(metrics["epoch"].iloc[-1])

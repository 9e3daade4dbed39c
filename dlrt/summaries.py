"""What many runs have recorded, as one table: a row per run, and means over seeds."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd

from dlrt.errors import RunError
from dlrt.runs import (
    chosen_epoch,
    damaged,
    differences,
    epochs_done,
    epochs_planned,
    read_metrics,
    read_options,
)


def read_runs(results: Path) -> pd.DataFrame:
    """A row per run below a folder: its options, the metrics of its chosen epoch, and the folder's name.

    The column last_test_accuracy is that of the last epoch; options has all options as a dict. A run that is
    not finished, or not yet begun, is left out with a warning. FileNotFoundError without finished runs.
    """
    rows, unfinished = [], []
    files = (*results.glob("**/config.json"), *results.glob("**/metrics.csv"))
    for folder in sorted({path.parent for path in files}):
        name, options = str(folder.relative_to(results)), read_options(folder)
        if options.get("epochs") is None:
            raise damaged(folder / "config.json")
        done, planned = epochs_done(folder), epochs_planned(options)
        if done < max(1, planned):
            unfinished.append(f"{name} ({done} of {planned} epochs)")
            continue
        metrics = read_metrics(folder)
        try:
            chosen = metrics.loc[chosen_epoch(metrics)].to_dict()
            last = metrics["test_accuracy"].iloc[-1]
        except KeyError as error:
            raise damaged(folder / "metrics.csv") from error
        rows.append({
            **chosen,
            **options,  # lr is the one that was asked for, not that of the epoch
            "options": options,
            "run": name,
            "last_test_accuracy": last,
        })  # fmt: skip
    if unfinished:
        warnings.warn(f"left out, since unfinished or diverged: {', '.join(unfinished)}", stacklevel=2)
    if not rows:
        raise FileNotFoundError(
            f"no finished runs in {results}; make them with the training scripts beside it"
        )
    return pd.DataFrame(rows)


def over_seeds(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means and standard deviations over the runs of each setting, a row per value of the columns `by`.

    Accuracies and compressions in %; the ranks are those of the first seed. RunError where the runs of a
    setting differ in more than the seed, or not even in that.
    """
    groups = runs.sort_values("seed").groupby(by, sort=False, dropna=False)
    for _, rows in groups:
        check_difference(rows, "seed")
    table = groups.agg(
        seeds=("seed", "nunique"),
        validation=("validation_accuracy", "mean"),
        accuracy=("test_accuracy", "mean"),
        accuracy_std=("test_accuracy", "std"),
        last_accuracy=("last_test_accuracy", "mean"),
        last_accuracy_std=("last_test_accuracy", "std"),
        ranks=("ranks", "first"),
        evaluation_parameters=("evaluation_parameters", "mean"),
        compression=("evaluation_compression", "mean"),
        compression_std=("evaluation_compression", "std"),
        training_parameters=("training_parameters", "mean"),
        training_compression=("training_compression", "mean"),
    )
    if "epochs" not in by:
        table["epochs"] = groups["epochs"].first()
    return table.reset_index().sort_values(by, na_position="first")


def best_lrs(runs: pd.DataFrame, by: str) -> pd.Series:
    """The learning rate with which the first seed validates best, for every value of the column `by`.

    RunError where the runs of that seed and one value differ in more than lr, or not even in that.
    """
    tried = runs[runs["seed"] == runs["seed"].min()]
    for _, rows in tried.groupby(by):
        check_difference(rows, "lr")
    tried = tried.sort_values(["validation_accuracy", "validation_loss"], ascending=[True, False])
    return tried.groupby(by)["lr"].last()


def check_difference(rows: pd.DataFrame, name: str) -> None:
    """Runs of one mean, or of one choice, differ in one option, `name`: else they would say nothing of it."""
    # weights to begin with are of a seed each
    started = [
        {**options, "from_checkpoint": bool(options.get("from_checkpoint"))} for options in rows["options"]
    ]
    first, *others = rows.assign(options=started)[["run", "options"]].itertuples(index=False)
    for other in others:
        if changed := differences(first.options, other.options, "and", name, "name"):
            both = f"{first.run} and {other.run}"
            raise RunError(f"{both} must differ in the {name} only, got {changed}: move one away")
    if rows[name].duplicated().any():
        raise RunError(
            f"runs of one setting need a {name} each, got {', '.join(rows['run'])}: move some away"
        )

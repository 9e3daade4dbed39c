"""The tables of the study from scratch: what its runs are, how they compare, which step sizes they chose."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from study_figures import DENSE, WAYS

from dlrt import tables
from dlrt.runs import read_metrics
from dlrt.summaries import check_difference, over_seeds

RULES = {"muon": "Muon", "sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
SETTING = ["network", "way", "rule", "budget", "tau", "epochs", "curve"]


def way(options: dict, low_rank: bool) -> str:
    """Which of the WAYS a run is, by its options."""
    kernels = "separable kernels" if options.get("spatial") else "matrices"
    after = " after a dense start" if options.get("dense_epochs") else ""
    trained = bool(options.get("from_checkpoint"))
    if not low_rank:
        narrow = options.get("width", 1) != 1
        if options.get("factors"):
            return f"plain factors{after}, {kernels}"
        return "dense, narrower" if narrow else "dense, trained on" if trained else DENSE
    if trained and options.get("ramp") == 0:
        by = "singular values" if options.get("cut_by") == "weights" else "what the loss needs"
        return f"cut by {by}, trained on, {kernels}"
    if trained:
        return f"DLRT of trained weights, {kernels}"
    if options.get("compression"):
        budget = ", budget" if options.get("cut_by") == "loss" else ", budget by singular values"
        return f"DLRT{after or budget}, {kernels}"
    return f"DLRT, τ, {kernels}" if options.get("momentum", 0.9) else "DLRT as published (τ, no momentum)"


def with_ways(found: pd.DataFrame) -> pd.DataFrame:
    """The runs, with the row and the curve that each belongs to, and their compression.

    That is against the dense net of full width, NaN where no run tells of it: narrower nets do not.
    """
    low_rank = found["ranks"] != ""
    found = found.assign(way=[way(*pair) for pair in zip(found["options"], low_rank, strict=True)])
    found["rule"] = found["options"].map(
        lambda options: RULES[options.get("update") or options.get("optimizer", "sgd")]
    )
    of_narrow = found["options"].map(lambda options: 100 * (1 - options.get("width", 1) ** 2))
    several = found.groupby(["network", "way", "rule"])["epochs"].transform("nunique") > 1
    lengths = found["epochs"].map(lambda count: f", {count} epoch{'s' * (count > 1)}").where(several, "")
    found["curve"] = found["way"] + ", " + found["rule"] + lengths
    asked = found["options"].map(lambda options: options.get("compression") or options.get("factors"))
    found["budget"] = pd.to_numeric(asked).fillna(of_narrow.where(found["way"] == "dense, narrower"))
    tells = low_rank | (found["way"] == DENSE) | (found["evaluation_compression"] > 0)
    whole = found["evaluation_parameters"] / (1 - found["evaluation_compression"] / 100)
    whole = whole.where(tells).groupby(found["network"]).transform("max")
    for phase in ("evaluation", "training"):
        found[f"{phase}_compression"] = 100 * (1 - found[f"{phase}_parameters"] / whole)
    return found


def compared(found: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over the seeds of all runs without fine-tuning, as numbers and as text."""
    summary = over_seeds(found, SETTING)
    order = summary["way"].map({name: number for number, name in enumerate(WAYS)})
    summary = summary.assign(order=order).sort_values(["network", "order", "compression", "rule", "epochs"])
    same, dense = ["network", "rule"], summary[summary["way"] == DENSE]
    summary = summary.join(dense.groupby(same)["epochs"].max().rename("of_dense"), on=same)
    cut = summary["way"].str.startswith("cut")  # after which they have fewer
    summary["of_dense"] = summary["of_dense"].where(cut, summary["epochs"])
    accuracy = dense.set_index([*same, "epochs"])["accuracy"].rename("dense")
    summary = summary.join(accuracy, on=[*same, "of_dense"])
    pairs = zip(summary["way"], summary["tau"], strict=True)
    trained = [way.replace("τ", f"τ = {tau:g}") for way, tau in pairs]
    setting = {"network": summary["network"], "trained": trained, "rule": summary["rule"]}
    table = tables.readable(summary, setting)
    for ways, ranks in (("plain factors", "uniform"), ("plain factors after", "by the cut")):
        shown = ~summary["way"].str.startswith(ways)
        table["ranks (first seed)"] = table["ranks (first seed)"].where(shown, ranks)
    below = (summary["dense"] - summary["accuracy"]).where(summary["way"] != DENSE)
    table.insert(
        table.columns.get_loc("at the last epoch [%]") + 1, "below dense", tables.text(below, "{:.2f}")
    )
    return summary, table


def step_sizes(tried: pd.DataFrame, results: Path) -> pd.DataFrame:
    """A row per network, way, rule and length of runs: how each step size validates, and the best.

    tried: runs `with_ways`. RunError where those of a row differ in more than the step size.
    """
    rows = []
    for (network, way, rule, epochs), runs in tried.groupby(["network", "way", "rule", "epochs"]):
        size = "update_lr" if rule == "Muon" else "lr"
        check_difference(runs, size)
        runs = runs.sort_values(size)
        metrics = [read_metrics(results / run) for run in runs["run"]]
        accuracy = pd.Series([of["validation_accuracy"].iloc[-1] for of in metrics], runs[size])
        rows.append({
            "network": network,
            "trained": way,
            "rule": rule,
            "epochs": str(epochs),
            "step size: validation accuracy [%]": ", ".join(
                f"{of}: {reached:.1f}" for of, reached in accuracy.items()
            ),
            "best": f"{accuracy[::-1].idxmax()}",
        })  # fmt: skip
    order = {name: number for number, name in enumerate(WAYS)}
    table = pd.DataFrame(rows)
    table = table.assign(order=table["trained"].map(order), length=table["epochs"].map(int))
    return table.sort_values(["network", "order", "rule", "length"]).drop(columns=["order", "length"])

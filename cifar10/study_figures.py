"""The figures of the study of CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from dlrt import models, plots
from dlrt.plots import Figure, plt
from dlrt.runs import read_metrics

DENSE = "dense"
# in the order of the table, with colour and marker
LOOKS = {
    DENSE: ("#000000", "o"),
    "dense, trained on": ("#000000", "D"),
    "dense, narrower": ("#0072B2", "o"),
    "plain factors, matrices": ("#D55E00", "o"),
    "plain factors, separable kernels": ("#009E73", "o"),
    "plain factors after a dense start, matrices": ("#D55E00", "D"),
    "plain factors after a dense start, separable kernels": ("#009E73", "D"),
    "DLRT, budget, matrices": ("#CC79A7", "o"),
    "DLRT, budget, separable kernels": ("#E69F00", "o"),
    "DLRT, budget by singular values, matrices": ("#CC79A7", "P"),
    "DLRT, budget by singular values, separable kernels": ("#E69F00", "P"),
    "DLRT after a dense start, matrices": ("#CC79A7", "D"),
    "DLRT after a dense start, separable kernels": ("#E69F00", "D"),
    "DLRT of trained weights, matrices": ("#CC79A7", "s"),
    "DLRT of trained weights, separable kernels": ("#E69F00", "s"),
    "cut by singular values, trained on, matrices": ("#CC79A7", "v"),
    "cut by singular values, trained on, separable kernels": ("#E69F00", "v"),
    "cut by what the loss needs, trained on, matrices": ("#CC79A7", "^"),
    "cut by what the loss needs, trained on, separable kernels": ("#E69F00", "^"),
    "DLRT as published (τ, no momentum)": ("#0072B2", "X"),
    "DLRT, τ, matrices": ("#CC79A7", "X"),
    "DLRT, τ, separable kernels": ("#E69F00", "X"),
}
WAYS = tuple(LOOKS)
BESIDE = 0.2  # percentage points of compression from one way to the next, so that bars do not hide others


def look(way: str, rule: str) -> dict[str, object]:
    """Of a way's curve: solid with Muon, else with hollow markers, dotted with SGD and dashed with Adam."""
    colour, marker = LOOKS[way]
    of_rule = {"ls": {"Muon": "-", "SGD": ":"}.get(rule, "--"), "mfc": colour if rule == "Muon" else "white"}
    return {"color": colour, "marker": marker, "ms": 4.5, **of_rule}


def curves(summary: pd.DataFrame) -> dict[tuple[str, str, str], pd.DataFrame]:
    """Of one network, the points of every curve, way and rule that is not the dense net.

    beside: by how much a point is drawn beside its compression, where others have much the same.
    """
    low = summary[summary["way"] != DENSE]
    alike = low.groupby(low["compression"].round())["way"]
    middle = (alike.transform("size") - 1) / 2
    low = low.assign(beside=BESIDE * (alike.cumcount() - middle))
    return dict(iter(low.groupby(["curve", "way", "rule"], sort=False)))


def relative_to_dense(summary: pd.DataFrame) -> Figure:
    """Accuracy minus that of one's own dense net over compression, bars both ways; axes per network."""
    networks = list(summary["network"].unique())
    with plt.rc_context(plots.LOOK):
        height = 3.4 * len(networks) + 0.1 * len(curves(summary))
        figure, rows = plt.subplots(len(networks), 1, figsize=(7, height), squeeze=False)
        for axes, network in zip(rows[:, 0], networks, strict=True):
            for (name, way, rule), points in curves(summary[summary["network"] == network]).items():
                axes.errorbar(
                    points["compression"] + points["beside"],
                    points["accuracy"] - points["dense"],
                    xerr=points["compression_std"],
                    yerr=points["accuracy_std"],
                    capsize=2,
                    label=plots.label(name),
                    **look(way, rule),
                )
            axes.axhline(0, color="0.6", lw=1)
            axes.set(ylabel=f"{network}: accuracy minus that of\nthe dense net with the same rule [points]")
            low, high = axes.dataLim.intervalx
            if low <= high:  # there are points; close together, a tenth of one would look large
                axes.set_xlim(low - 5, min(100, high + 5))
        axes.set(xlabel="compression [%]; ways of one budget stand side by side")
        _legend(figure)
    return figure


def over_time(found: pd.DataFrame, folder: Path) -> Figure:
    """Validation accuracy over the minutes of training, at the budget with the most runs; means of seeds."""
    budget = found["budget"].mode().iloc[0]
    shown = found[(found["way"] == DENSE) | ((found["budget"] - budget).abs() < 1)]
    shown = shown[~shown["way"].str.startswith("cut")]
    networks = list(shown["network"].unique())
    with plt.rc_context(plots.LOOK):
        figure, rows = plt.subplots(len(networks), 1, figsize=(7, 3.8 * len(networks) + 1), squeeze=False)
        for axes, network in zip(rows[:, 0], networks, strict=True):
            of_network = shown[shown["network"] == network]
            for (name, way, rule), runs in of_network.groupby(["curve", "way", "rule"], sort=False):
                metrics = [read_metrics(folder / run) for run in runs["run"]]
                minutes = sum(rows["seconds"].cumsum() for rows in metrics) / len(metrics) / 60
                accuracy = sum(rows["validation_accuracy"] for rows in metrics) / len(metrics)
                axes.plot(minutes, accuracy, label=plots.label(name), **look(way, rule))
            axes.set(ylabel=f"{network}: validation accuracy [%]")
        axes.set(xlabel=f"minutes of training, budget {budget:g} %")
        _legend(figure)
    return figure


def ranks_over_training(run: pd.Series, folder: Path) -> Figure:
    """Who gets the budget, and when: the rank of every layer after each epoch of a run."""
    metrics = read_metrics(folder / run["run"])
    ranks = [list(map(int, text.split("/"))) for text in metrics["ranks"]]
    with torch.device("meta"):
        modules = getattr(models, run["network"])().named_modules()
    kinds = (nn.Linear, nn.Conv2d)
    skip = run["options"].get("skip", ())
    names = [name for name, module in modules if isinstance(module, kinds) and name not in skip]
    if len(names) != len(ranks[0]):  # more of them stayed dense
        names = [f"layer {number}" for number in range(1, len(ranks[0]) + 1)]
    values = torch.tensor(ranks).T
    with plt.rc_context({**plots.LOOK, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(7, 1 + 0.26 * len(names)))
        axes.imshow(values, aspect="auto", cmap="Blues", vmin=0)
        for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            rank, dark = int(values[row, column]), values[row, column] > 0.6 * values.max()
            axes.text(column, row, rank, ha="center", va="center", size=7, color="w" if dark else "k")
        axes.set_yticks(range(len(names)), names, size=7)
        axes.set_xticks(range(len(metrics)), metrics["epoch"])
        axes.set(xlabel="epoch", title=f"ranks of {run['network']}, {run['way']}, {run['budget']:g} %")
    return figure


def _legend(figure: Figure) -> None:
    """One legend below all axes, in which every curve has one entry."""
    lines = {}
    for axes in figure.axes:
        lines |= {text: line for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, fontsize="x-small")

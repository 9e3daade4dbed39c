"""Figures of runs: one look for all of them, colours that everybody can tell apart, PDF and PNG."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

os.environ["MPLBACKEND"] = "Agg"  # files, no windows; a notebook's, which may not be there, stops the import

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dlrt.errors import one_line

# Okabe & Ito's palette, which colour-blind readers can tell apart; line styles do it in grey print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]
LOOK = {
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def label(name: str, longest: int = 80) -> str:
    """A name as a text of a figure: on one line, its middle left out where it is long, and literally."""
    name, half = one_line(name), longest // 2
    if len(name) > longest:
        name = f"{name[: half - 1]}…{name[-half:]}"
    hidden = name.startswith("_")  # a legend would leave it out
    return " " * hidden + name.replace("$", r"\$")


def style(number: int) -> dict[str, str]:
    """Colour and line style of the curve of that number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}


def one_point(values: pd.Series | pd.DataFrame) -> dict[str, str]:
    """A marker where a curve has one point only, of which a line shows nothing."""
    return {"marker": "o"} if len(values) == 1 else {}


def save(figure: Figure, folders: list[Path], name: str) -> Path:
    """Write name.pdf and name.png into every folder and close the figure; give the first PNG's path."""
    first, *others = folders
    first.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(LOOK):
        figure.savefig(first / f"{name}.pdf", metadata={"CreationDate": None})  # the same at any time
        figure.savefig(first / f"{name}.png")
    plt.close(figure)
    for folder in others:  # copies, since the layout moves a little when it is drawn again
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("pdf", "png"):
            shutil.copyfile(first / f"{name}.{kind}", folder / f"{name}.{kind}")
    return first / f"{name}.png"


def learning_curves(metrics: dict[str, pd.DataFrame]) -> Figure:
    """Validation accuracy and evaluation compression over the epochs, a curve per run, by its label."""
    labels = [label(name) for name in metrics]
    columns = max(1, min(3, len(labels), 105 // max(map(len, labels))))  # as wide as the figure at most
    with mpl.rc_context(LOOK):
        size = (9, 3.2 + 0.2 * max(2, len(labels) / columns))
        figure, (accuracy, compression) = plt.subplots(1, 2, figsize=size)
        for number, (name, rows) in enumerate(metrics.items()):
            line = style(number) | one_point(rows)
            accuracy.plot(rows["epoch"], rows["validation_accuracy"], label=label(name), **line)
            compression.plot(rows["epoch"], rows["evaluation_compression"], **line)
        accuracy.set(xlabel="epoch", ylabel="validation accuracy [%]")
        # the first epochs may start at chance; what is to be compared lies above
        accuracy.set_ylim(bottom=min(rows["validation_accuracy"].iloc[-1] - 5 for rows in metrics.values()))
        compression.set(xlabel="epoch", ylabel="evaluation compression [%]")
        for axes in (accuracy, compression):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    return figure


def accuracy_against_compression(
    curves: dict[str, pd.DataFrame], references: dict[str, pd.DataFrame], dense: dict[str, float]
) -> Figure:
    """Test accuracy over evaluation compression, by label: curves of `summaries.over_seeds`, with bars of one
    standard deviation both ways where there are seeds; references with the columns compression and accuracy,
    in grey; dense lines, dotted more widely from one to the next, in the colour of the curve that is labelled
    "DLRT" in the place of "dense", or grey.
    """
    colours = {name: style(number)["color"] for number, name in enumerate(curves)}
    labels = [label(name) for name in (*references, *curves, *dense)]
    columns = 1 if max(map(len, labels)) > 35 else 2  # two longer ones are wider than the figure
    with mpl.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(6.4, 3.7 + 0.2 * len(labels) / columns))
        for number, (name, rows) in enumerate(references.items()):
            marker = {"marker": "sD^vP*"[number % 6], "ls": "", "color": "0.55", "ms": 6, "zorder": 3}
            axes.plot(rows["compression"], rows["accuracy"], label=label(name), **marker)
        for number, (name, rows) in enumerate(curves.items()):
            rows = rows.sort_values("compression")
            line = style(number)
            errors = {"xerr": rows["compression_std"], "yerr": rows["accuracy_std"], "capsize": 3}
            points = {"label": label(name), "marker": "o", "ms": 4}
            axes.errorbar(rows["compression"], rows["accuracy"], **errors, **points, **line)
        for number, (name, accuracy) in enumerate(dense.items()):
            colour = colours.get(name.replace("dense", "DLRT", 1), "0.55")
            axes.axhline(accuracy, color=colour, lw=1, ls=(0, (1, 1 + 2 * number)), label=label(name))
        axes.set(xlabel="evaluation compression [%]", ylabel="test accuracy [%]")
        figure.legend(loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def widen_near_100(axes: Axes) -> None:
    """Spread an axis of accuracies in % where they are high, by log(100.5 - accuracy), and say so."""
    bottom = axes.get_ylim()[0]
    scale = (lambda y: -np.log(np.maximum(100.5 - y, 0.1)), lambda t: 100.5 - np.exp(-t))
    axes.set_yscale("function", functions=scale)
    ticks = [tick for tick in (0, 10, 50, 80, 90, 95, 98, 99, 100) if tick >= bottom]
    axes.set(yticks=ticks, ylim=(bottom, 100), ylabel=f"{axes.get_ylabel()}\n(wider towards 100)")


def bands(axes: Axes, runs: list[pd.DataFrame], column: str, name: str, number: int) -> None:
    """The mean of a column of metrics over runs, epoch by epoch, in a band from the least to the largest."""
    values = pd.concat([rows.set_index("epoch")[column] for rows in runs], axis=1)
    mean, line = values.mean(axis=1), style(number)
    axes.plot(mean.index, mean, label=label(name), **line, **one_point(mean))
    axes.fill_between(
        mean.index, values.min(axis=1), values.max(axis=1), color=line["color"], alpha=0.2, linewidth=0
    )


def singular_values(values: dict[str, Tensor]) -> Figure:
    """How the singular values of each layer decay, as shares of the largest; a curve per layer."""
    labels = [label(name, longest=40) for name in values]
    columns = 1 + (len(labels) - 1) // 16
    legend = columns * (0.6 + 0.07 * max(map(len, labels)))  # inches
    with mpl.rc_context(LOOK):
        figure, axes = plt.subplots(figsize=(4.4 + legend, 3.6))
        for number, sigma in enumerate(values.values()):
            line = style(number) | {"label": labels[number], "marker": "."}
            axes.plot(range(1, len(sigma) + 1), sigma / sigma[0], **line)
        axes.set(xlabel="number of the singular value", ylabel="singular value / largest")
        axes.set(xscale="log", yscale="log")
        figure.legend(loc="outside right upper", ncols=columns, fontsize="small")
    return figure

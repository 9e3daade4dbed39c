"""The figures of a comparison: maps in a grid, similarity and faithfulness, and the time over the rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dlrt import plots
from dlrt.cams.pictures import overlay
from dlrt.plots import LOOK, Axes, Figure, mpl, plt, style

GRID_PICTURES = 4
DIFFERENCES = plt.Normalize(-1, 1)  # of maps that are scaled to [0, 1]
PANELS = {
    "pearson": "similarity to the dense map\n(Pearson's correlation)",
    "road": "faithfulness: ROAD",
    "gain": "faithfulness:\ninsertion - deletion",
}


def grid(folder: Path, summary: pd.DataFrame) -> Figure:
    """Pictures by compression: the map over the picture, and below how it differs from the dense one."""
    drawn = summary[summary["kind"] == "reference"]
    low_rank = summary[summary["kind"].isin(("low-rank", "SVD"))]
    drawn = pd.concat([drawn, low_rank.sort_values(["compression", "kind"])])
    with np.load(folder / "pictures.npz") as file:
        pictures = {name: file[name] / 255 for name in list(file)[:GRID_PICTURES]}
    maps = {
        name: np.load(folder / f"{name}.npz")["displayed"].astype(np.float32) for name in drawn["network"]
    }
    dense = maps[drawn["network"].iloc[0]]
    columns = 1 + len(drawn)
    with mpl.rc_context({**LOOK, "axes.grid": False}):
        size = (1.25 * columns + 0.9, 2.5 * len(pictures))
        figure, axes = plt.subplots(2 * len(pictures), columns, figsize=size, squeeze=False)
        for index, (name, pixels) in enumerate(pictures.items()):
            above, below = axes[2 * index], axes[2 * index + 1]
            above[0].imshow(pixels)
            above[0].set_title(plots.label(name, longest=20), fontsize=7)
            for column, row in enumerate(drawn.itertuples(), start=1):
                of_dense = dense[index] if column > 1 else None
                _pair(above[column], below[column], pixels, maps[row.network][index], of_dense)
                if index == 0:
                    above[column].set_title(_title(row), fontsize=7)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        if columns > 2:
            label = "map - dense map,\nboth scaled to [0, 1]"
            bar = mpl.cm.ScalarMappable(DIFFERENCES, "RdBu_r")
            figure.colorbar(bar, ax=axes, location="right", aspect=30, shrink=0.5, label=label)
    return figure


def _pair(above: Axes, below: Axes, pixels: np.ndarray, shown: np.ndarray, dense: np.ndarray | None) -> None:
    """A map over its picture, and below how it differs from the dense one (None: it is the dense one)."""
    above.imshow(overlay(np.float32(pixels), shown))
    if not np.isfinite(shown).all():
        above.set_xlabel("undefined", fontsize=7)
    elif dense is not None:
        extent = (0, pixels.shape[1], pixels.shape[0], 0)  # as wide as the picture above
        below.imshow(shown - dense, cmap="RdBu_r", norm=DIFFERENCES, extent=extent)


def _title(row) -> str:
    if row.kind == "reference":
        return "dense"
    kind = "trained, " if row.kind == "low-rank" else "SVD, "
    tolerance = f"τ = {row.tau:g}\n" if pd.notna(row.tau) else ""
    return f"{kind}{tolerance}compression {row.compression:.0f} %"


def over_compression(summary: pd.DataFrame) -> Figure:
    """Similarity and faithfulness over compression, with the band of other seeds and the controls."""
    drawn = {column: label for column, label in PANELS.items() if summary[column].notna().any()}
    with mpl.rc_context(LOOK):
        size = (max(5.5, 3.6 * len(drawn)), 3.9)  # the legend is 5.5 inches wide
        figure, axes = plt.subplots(1, len(drawn), figsize=size, squeeze=False)
        for ax, (column, label) in zip(axes[0], drawn.items(), strict=True):
            _panel(ax, summary, column)
            ax.set(xlabel="evaluation compression [%]", ylabel=label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        columns = 3 if len(drawn) > 1 else 2
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize="small")
    return figure


def _panel(ax: Axes, summary: pd.DataFrame, column: str) -> None:
    for number, (kind, label) in enumerate(
        (("low-rank", "trained low-rank"), ("SVD", "SVD of the dense network"))
    ):
        rows = summary[summary["kind"] == kind].sort_values("compression")
        if len(rows):
            ax.plot(rows["compression"], rows[column], label=label, marker="o", ms=4, **style(number))
    ax.plot(
        0, summary.loc[summary["kind"] == "reference", column].iloc[0], "k*", ms=9, label="the dense network"
    )
    seeds = summary.loc[summary["kind"] == "other seed", column]
    if len(seeds) == 1:
        ax.axhline(seeds.iloc[0], color="0.6", lw=4, label="dense, another seed")
    elif len(seeds):
        ax.axhspan(seeds.min(), seeds.max(), color="0.8", label=f"dense, other seeds ({len(seeds)})")
    for number, kind in enumerate(("random weights", "RandomCAM"), start=2):
        value = summary.loc[summary["kind"] == kind, column].iloc[0]
        ax.axhline(value, lw=1, label=kind, **style(number))
    ax.margins(y=0.08)


def time_over_rank(times: pd.DataFrame) -> Figure:
    """Time per map of low-rank networks, as a share of the dense network's, over the share of the rank."""
    with mpl.rc_context(LOOK):
        figure, ax = plt.subplots(figsize=(5, 3.4))
        for number, (pixels, rows) in enumerate(times.groupby("pixels")):
            rows = rows.sort_values("share")
            dense = rows["dense_milliseconds"].iloc[0]
            label = f"{pixels} x {pixels} pixels (dense: {dense:.1f} ms)"
            ax.plot(rows["share"], rows["ratio"], label=label, marker="o", ms=4, **style(number))
        ax.axhline(1, color="0.4", lw=1)
        ax.set(xlabel="rank / full rank", ylabel="time per map / dense")
        ax.set_ylim(0, 1.2 * max(1, times["ratio"].max()))
        ax.legend(loc="lower right")
    return figure

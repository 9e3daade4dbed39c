"""One picture of many maps: photographs by networks, and under each map what the network says there."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrt import plots
from dlrt.cams.pictures import overlay
from dlrt.plots import LOOK, Axes, Figure, mpl, plt

CELL, GAP, BAR = 1.25, 0.06, 0.75  # inches: a cell's width, between two, and what the colour bar needs
POINTS, LETTERS = 7.5, 20  # of the text, and how many letters of it fit below a cell
LINE = 1.25 * POINTS / 72
CHANGED = "#C00000"
LEGEND = (
    "On the left the class that all maps of the row explain. Below each map what its network predicts, in "
    "red where the first network predicts something else; p: probability of the row's class; r: correlation "
    "with the first network's map."
)


@dataclass(frozen=True)
class Cell:
    """A map (H, W) in [0, 1], NaN where undefined, and what its network says of the picture.

    predicted is a class, changed whether the first network says another; probability that of the class which
    is explained, correlation that with the first network's map, NaN where there is none.
    """

    shown: np.ndarray
    predicted: str
    changed: bool
    probability: float
    correlation: float


@dataclass(frozen=True)
class Row:
    """A picture (height, width, 3) in [0, 1], its name, the class explained, and a cell per column."""

    pixels: np.ndarray
    name: str
    target: str
    cells: list[Cell]


def figure(rows: Sequence[Row], headers: Sequence[str]) -> Figure:
    """Photographs in the first column, then a map of the class that the row names for each header."""
    width = (1 + len(headers)) * (CELL + GAP) + BAR
    legend = textwrap.wrap(LEGEND, int(17 * width))
    above = [_lines(header, 18) for header in ("photograph", *headers)]
    below = [[_lines(row.target) + _lines(row.name), *map(_says, row.cells)] for row in rows]
    heights = [CELL * min(3, row.pixels.shape[0] / row.pixels.shape[1]) for row in rows]
    tops = [LINE * (1 + max(map(len, above)))]  # of the rows, from the top of the figure
    for height, texts in zip(heights, below, strict=True):
        tops.append(tops[-1] + height + LINE * (1.2 + max(map(len, texts))))
    total = tops[-1] + LINE * (1 + len(legend))

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        """Axes at a place in inches, from the upper left."""
        return made.add_axes((left / width, 1 - (top + high) / total, wide / width, high / total))

    with mpl.rc_context({**LOOK, "axes.grid": False, "font.size": POINTS}):
        made = plt.figure(figsize=(width, total))
        made.set_layout_engine("none")  # later than in the line above, after which saving would bring it back
        for row, height, top, texts in zip(rows, heights, tops, below, strict=False):
            for column, cell in enumerate([None, *row.cells]):
                ax = place(GAP / 2 + column * (CELL + GAP), top, CELL, height)
                ax.imshow(row.pixels if cell is None else overlay(row.pixels, cell.shown))
                ax.set_axis_off()
                _text(ax, 0, "\n".join(texts[column]), colour=CHANGED if cell and cell.changed else "black")
                if top == tops[0]:
                    _text(ax, 1, "\n".join(above[column]), fontweight="bold")
        long = min(2.5, heights[0])
        ax = place(width - BAR + 0.1, tops[0], 0.1, long)
        made.colorbar(mpl.cm.ScalarMappable(cmap="inferno"), ax, ticks=[0, 0.5, 1]).outline.set_visible(False)
        ax.set_ylabel("map, scaled to [0, 1]")
        made.text(GAP / 2 / width, 0.5 * LINE / total, "\n".join(legend), va="bottom")
    return made


def _says(cell: Cell) -> list[str]:
    """What stands below a map."""
    numbers = f"p = {cell.probability:.3f}"
    if not np.isfinite(cell.shown).all():
        numbers += ", no map"
    elif np.isfinite(cell.correlation):
        numbers += f", r = {cell.correlation:.2f}".replace("-", "−")
    return [*_lines(cell.predicted), numbers]


def _lines(text: str, letters: int = LETTERS) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(plots.label(part), letters)]


def _text(ax: Axes, y: float, text: str, colour: str = "black", **look: str) -> None:
    """Below or above axes."""
    offset, side = ((0, -3), "top") if y == 0 else ((0, 4), "bottom")
    ax.annotate(
        text, (0.5, y), offset, "axes fraction", "offset points", ha="center", va=side, color=colour, **look
    )

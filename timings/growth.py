"""How time and memory of a training step grow with the width, the depth and the rank of a network.

    python timings/growth.py      ten minutes on two CPU cores that have nothing else to do

A stack of square layers with ReLU in between and a batch of 256: DLRT, plain factors U Vᵀ of the same ranks
with SGD, and the dense net up to `--largest-dense` weights. Medians in one process, in turn. The table goes
to growth.csv and growth.md, the figure to figures/.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from measure import BATCHES, ROUND, device_name, evaluation, training_steps
from memory import measure
from networks import decaying, parse, resting
from torch import Tensor, nn

from dlrt import LowRankLinear, errors, tables
from dlrt.baselines import as_factors
from dlrt.convert import replace_layers
from dlrt.flags import COUNT, NATURAL, HelpFormatter, Parser
from dlrt.options import ROOT
from dlrt.plots import LOOK, Figure, mpl, plt, save, style
from dlrt.timing import medians

BATCH, MIDDLE_DEPTH, MIDDLE_RANK = 256, 4, 20
METHODS = {"dense": "dense", "factors": "plain factors", "dlrt": "DLRT"}
QUANTITIES = {"ms": "training step [ms]", "mb": "peak memory of a step [MB]"}


class Size(NamedTuple):
    width: int
    depth: int
    rank: int


def sweeps(args: argparse.Namespace) -> dict[str, list[Size]]:
    """The networks along each axis, all else as in the middle one."""
    middle = Size(args.width, MIDDLE_DEPTH, min(MIDDLE_RANK, *args.widths, args.width))
    axes = {"width": args.widths, "depth": args.depths, "rank": args.ranks}
    return {axis: [middle._replace(**{axis: value}) for value in values] for axis, values in axes.items()}


def makers(size: Size, largest_dense: int) -> dict[str, Callable[[], nn.Module]]:
    """What makes the networks of one size, by method; the dense one where it has few enough weights."""
    width, depth, rank = size

    def stack(layer: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(*(part for _ in range(depth) for part in (layer(), nn.ReLU(inplace=True))))

    low = partial(stack, lambda: decaying(LowRankLinear(width, width, rank)))
    made = {"dlrt": low, "factors": lambda: replace_layers(low(), as_factors)}
    dense = {"dense": partial(stack, partial(nn.Linear, width, width))}
    return made | (dense if depth * width**2 <= largest_dense else {})


def times(models: dict[str, nn.Module], x: Tensor, y: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step of each; DLRT's is the mean from one decision of ranks to the next."""
    steps = []
    for method, model in models.items():
        optimizer = resting(model, "parallel" if method == "dlrt" else None)
        steps.append(training_steps(optimizer, evaluation(model, optimizer, x, y), ROUND))
    return {method: ms / ROUND for method, ms in zip(models, medians(steps, repeats), strict=True)}


def row(size: Size, args: argparse.Namespace) -> dict[str, float]:
    """Time and peak memory of a training step at one size, by method."""
    made = makers(size, args.largest_dense)
    x, y = torch.randn(BATCHES * BATCH, size.width), torch.randint(0, size.width, (BATCH,))
    found = times({method: make() for method, make in made.items()}, x, y, args.repeats)
    numbers = {f"{method} ms": ms for method, ms in found.items()}
    for method, make in made.items():
        bytes_in_use = measure(make, ("cpu", x[:BATCH], y), "parallel" if method == "dlrt" else None)
        numbers[f"{method} mb"] = bytes_in_use / 1e6
    return size._asdict() | numbers


def exponents(rows: pd.DataFrame, axis: str) -> str:
    """How time and memory of DLRT grow along an axis, as powers of it over the last three points."""
    last = rows[rows["axis"] == axis].iloc[-3:]
    powers = [
        np.polyfit(np.log(last[axis]), np.log(last[f"dlrt {quantity}"]), 1)[0] for quantity in QUANTITIES
    ]
    return f"{axis}^{powers[0]:.2f} and {axis}^{powers[1]:.2f}"


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    columns = {"along": rows["axis"], **{name: rows[name] for name in Size._fields}}
    for quantity, unit in (("ms", "[ms]"), ("mb", "[MB]")):
        for method, name in METHODS.items():
            columns[f"{name} {unit}"] = tables.text(rows[f"{method} {quantity}"], "{:.1f}")
    columns["slower than factors"] = tables.text(rows["dlrt ms"] / rows["factors ms"], "{:.2f} x")
    return pd.DataFrame(columns)


def draw(rows: pd.DataFrame) -> Figure:
    """Time above, memory below, along each axis."""
    along = dict(list(rows.groupby("axis", sort=False)))
    with mpl.rc_context(LOOK):
        figure, grid = plt.subplots(2, len(along), figsize=(11, 6), sharex="col", sharey="row", squeeze=False)
        for quantity, line in zip(QUANTITIES, grid, strict=True):
            for (axis, points), axes in zip(along.items(), line, strict=True):
                for number, (method, name) in enumerate(METHODS.items()):
                    values = points[f"{method} {quantity}"]
                    axes.loglog(points[axis], values, marker="o", label=name, **style(number))
                axes.set_xticks(points[axis], points[axis])
                axes.minorticks_off()
            line[0].set_ylabel(QUANTITIES[quantity])
        for (axis, points), axes in zip(along.items(), grid[-1], strict=True):
            others = [f"{name} {points[name].iloc[0]}" for name in Size._fields if name != axis]
            axes.set_xlabel(f"{axis} ({', '.join(others)})")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--width", type=NATURAL, default=2048, help="of the networks whose depth and rank grow")
    add("--widths", type=NATURAL, nargs="+", default=(512, 1024, 2048, 4096, 8192, 16384), help="to time")
    add("--depths", type=NATURAL, nargs="+", default=(2, 4, 8, 16, 32), help="to time")
    add("--ranks", type=NATURAL, nargs="+", default=(5, 20, 80, 320), help="to time")
    add("--repeats", type=NATURAL, default=5, help="rounds of ten steps")
    add("--largest-dense", type=COUNT, default=70_000_000, help="weights of the largest dense net to time")
    add("--output-dir", type=Path, help="by default this folder, and figures/ for the figure")
    args = parse(parser)
    for name in ("widths", "depths", "ranks"):
        if len(getattr(args, name)) < 2:
            parser.error(f"--{name} must be two or more, between which cost grows, got one")
    torch.manual_seed(0)
    rows = []
    for axis, sizes in sweeps(args).items():
        for size in sizes:
            rows.append({"axis": axis, **row(size, args)})
            shown = {name: f"{value:.4g}" for name, value in list(rows[-1].items())[1:]}
            print(axis, "  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        publish(rows, args.output_dir)  # an axis takes minutes


def publish(rows: list[dict[str, float]], folder: Path | None) -> None:
    """Table and figure of the rows so far."""
    numbers = [f"{method} {quantity}" for quantity in QUANTITIES for method in METHODS]
    found = pd.DataFrame(rows).reindex(columns=["axis", *Size._fields, *numbers])
    grown = "; ".join(exponents(found, axis) for axis in dict.fromkeys(found["axis"]))
    caption = (
        f"A stack of square layers, batch {BATCH}, with momentum; torch {torch.__version__}, "
        f"{device_name('cpu')}. Time and memory of DLRT grow as {grown} over the last three points."
    )
    short = (*Size._fields, "plain factors [ms]", "DLRT [ms]", "slower than factors")
    tables.write(readable(found), folder or Path(__file__).parent, caption, "growth", short)
    print(save(draw(found), [folder] if folder else [ROOT / "figures"], "growth"))


if __name__ == "__main__":
    main()

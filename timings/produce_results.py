"""Time against rank, where it goes, and at which rank low rank and dense break even; it measures nothing.

python timings/produce_results.py
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from networks import FACTORS

from dlrt import plots, tables
from dlrt.plots import Axes, Figure, mpl, plt
from dlrt.runs import damaged, read_config, read_metrics
from dlrt.settings import INTEGRATORS
from dlrt.timing import Timing

SubFigure = mpl.figure.SubFigure
# Schotthöfer et al. 2022, the same net
PUBLISHED = pd.DataFrame({
    "integrator": ["published"] * 2,
    "device": ["published, other hardware"] * 2,
    "phase": ["training", "inference"],
    "rank adaptation": ["no", ""],
    "break-even rank": ["about 125", "near 2100"],
    "largest speed-up": ["4.5 x", ""],
})  # fmt: skip
NAMES = {FACTORS: "plain factors"}
PARTS = {
    "share_forward_backward": "forward and backward",
    "share_s_gradient": "K-, L- and S-step",
    "share_qr": "orthogonalisation",
    "share_svd": "SVD, truncation",
    "share_rest": "new bases, velocity, rest",
}
LIMITS = [(0, (1, 1)), (0, (1, 4))]  # dotted, more widely with more S-steps
SHORT = ("phase", "integrator", "S-steps", "rank adaptation", "break-even rank", "largest speed-up")
SETTING = ["device", "phase", "integrator", "s_steps", "adaptive"]


def read(folder: Path) -> pd.DataFrame:
    """The rows of all devices and sizes of the net, with their options; FileNotFoundError without any."""
    found, names = [], set()
    for path in sorted(folder.glob("*/metrics.csv")):
        config, metrics = read_config(path.parent), read_metrics(path.parent, Timing)
        try:
            metrics = metrics.assign(**config["options"], torch=config["versions"]["torch"])
            device = "{device}, width {width}, batch {batch_size}".format_map(config["options"])
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(path.with_name("config.json")) from error
        if device in names:
            device += f" ({path.parent.name})"
        names.add(device)
        found.append(metrics.fillna({"integrator": ""}).assign(device=device))
    if not found:
        raise FileNotFoundError(f"no measurements in {folder}")
    order = {
        "kind": True,
        "phase": False,
        "adaptive": False,
        "integrator": True,
        "s_steps": True,
        "rank": True,
    }
    return pd.concat(found).sort_values(list(order), ascending=list(order.values()))


def break_even(ranks: np.ndarray, advantage: np.ndarray) -> float:
    """The rank above which dense is better, where the advantage (dense / low-rank) falls through 1.

    Between two ranks log advantage is taken as linear in log rank. Infinite where the last rank still has an
    advantage, 0 where none has.
    """
    better = np.flatnonzero(advantage > 1)
    if not len(better):
        return 0.0
    i = better[-1]
    if i == len(ranks) - 1:
        return np.inf
    (x, x1), (y, y1) = np.log(ranks[i : i + 2]), np.log(advantage[i : i + 2])
    return float(np.exp(x + (x1 - x) * y / (y - y1)))


def told(rank: float, ranks: np.ndarray) -> str:
    """A break-even rank in words, where it lies outside the ranks that were measured."""
    return f"below {ranks[0]}" if rank == 0 else f"above {ranks[-1]}" if np.isinf(rank) else f"{rank:.0f}"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting: where time, FLOPs and memory break even, and how much faster it gets."""
    lines, plain = [], rows[rows["integrator"] == FACTORS].set_index(["device", "rank"])["median_ms"]
    for (device, phase, integrator, s_steps, adaptive), group in rows.groupby(SETTING, sort=False):
        ranks = group["rank"].to_numpy()
        speed_up = (group["dense_median_ms"] / group["median_ms"]).to_numpy()
        at = {
            name: told(break_even(ranks, (group[f"dense_{column}"] / group[column]).to_numpy()), ranks)
            for name, column in (
                ("break-even rank", "median_ms"),
                ("by FLOPs", "gflops"),
                ("by peak memory", "peak_mb"),
            )
        }
        setting = {"integrator": integrator, "rank adaptation": "", "S-steps": ""}
        if integrator:
            setting["integrator"] = NAMES.get(integrator, integrator)
            setting.update({"rank adaptation": "yes" if adaptive else "no", "S-steps": str(s_steps)})
        ratios = (group.set_index(["device", "rank"])["median_ms"] / plain).dropna()
        if integrator in INTEGRATORS and len(ratios):
            setting["slower than factors"] = f"{ratios.min():.1f} to {ratios.max():.1f} x"
        best = {"largest speed-up": f"{speed_up.max():.1f} x", "at rank": str(ranks[speed_up.argmax()])}
        lines.append({"device": device, "phase": phase, **setting, **at, **best})
    return pd.concat([pd.DataFrame(lines), PUBLISHED]).fillna("")


def label(integrator: str, s_steps: int, adaptive: bool) -> str:
    """A setting's name in a legend; inference has no integrator."""
    if not integrator:
        return "low-rank"
    return f"{integrator}, S-steps {s_steps}" if adaptive else NAMES.get(integrator, integrator)


def draw_times(axes: Axes, rows: pd.DataFrame) -> None:
    """The times of some settings and of dense over the rank, in bands from quartile to quartile."""
    for (integrator, s_steps, adaptive), group in rows.groupby(SETTING[2:], sort=False):
        style = plots.STYLES[s_steps > 1]
        line = {"color": plots.COLOURS[[*INTEGRATORS, "", FACTORS].index(integrator)], "linestyle": style}
        axes.plot(group["rank"], group["median_ms"], ".", label=label(integrator, s_steps, adaptive), **line)
        axes.fill_between(
            group["rank"], group["lower_ms"], group["upper_ms"], color=line["color"], alpha=0.25, lw=0
        )
        limit = group["dense_median_ms"] * group["gflops"] / group["dense_gflops"]
        axes.plot(group["rank"], limit, color=line["color"], linestyle=LIMITS[s_steps > 1], lw=1.2)
    dense = rows.drop_duplicates("rank").sort_values("rank")
    axes.plot(dense["rank"], dense["dense_median_ms"], color="black", lw=2, label="dense")
    axes.fill_between(
        dense["rank"], dense["dense_lower_ms"], dense["dense_upper_ms"], color="black", alpha=0.2, lw=0
    )
    axes.plot([], [], color="0.4", lw=1.2, linestyle=LIMITS[0], label="dense time x FLOP ratio")
    axes.set(xscale="log", yscale="log", xlabel="rank")


def by_device(rows: pd.DataFrame, height: float) -> tuple[Figure, list[tuple[SubFigure, pd.DataFrame]]]:
    """A figure with a part for each device, under its name."""
    devices = list(rows.groupby("device", sort=False))
    figure = plt.figure(figsize=(11, height * len(devices)))
    parts = figure.subfigures(len(devices), 1, squeeze=False)[:, 0]
    for part, (device, _) in zip(parts, devices, strict=True):
        part.suptitle(device.replace("$", r"\$"))
    return figure, [(part, points) for part, (_, points) in zip(parts, devices, strict=True)]


def times(rows: pd.DataFrame) -> Figure:
    """Training, adaptive and at fixed rank, and inference."""
    with plt.rc_context(plots.LOOK):
        figure, devices = by_device(rows, height=4.6)
        for part, points in devices:
            panels = {
                title: points[
                    (points["phase"] == phase)
                    & (points["adaptive"].eq(adaptive) | points["integrator"].eq(FACTORS))
                ]
                for title, phase, adaptive in (
                    ("training step, adaptive rank", "training", True),
                    ("training step, fixed rank", "training", False),
                    ("inference", "inference", False),
                )
            }
            panels = {title: panel for title, panel in panels.items() if len(panel)}
            grid = part.subplots(1, len(panels), squeeze=False)[0]
            for axes, (title, panel) in zip(grid, panels.items(), strict=True):
                if axes is not grid[0] and title.startswith("training"):
                    axes.sharey(grid[0])
                draw_times(axes, panel)
                axes.set_title(title, fontsize="medium")
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize="small")
            grid[0].set(ylabel="time [ms]")
    return figure


def shares(rows: pd.DataFrame) -> Figure:
    """Where the time of a training step goes, stacked over the rank, for each setting."""
    rows = rows[rows["integrator"].isin(INTEGRATORS)]
    groups = max(points.groupby(SETTING).ngroups for _, points in rows.groupby("device"))
    columns, lines = min(4, groups), math.ceil(groups / 4)
    with plt.rc_context({**plots.LOOK, "axes.grid": False}):
        figure, devices = by_device(rows, height=1 + 2.4 * lines)
        for part, points in devices:
            grid = part.subplots(lines, columns, sharey=True, squeeze=False)
            settings, ranks = list(points.groupby(SETTING[2:], sort=False)), sorted(points["rank"].unique())
            for axes, (setting, group) in zip(grid.flat, settings, strict=False):
                values = 100 * group.set_index("rank")[list(PARTS)].rename(columns=PARTS)
                values.reindex(ranks).plot.bar(
                    ax=axes, stacked=True, width=0.9, color=plots.COLOURS, legend=False
                )
                axes.set_title(label(*setting) + ("" if setting[-1] else ", fixed rank"), fontsize="small")
                axes.set(xlabel="rank", ylim=(0, 100))
            for axes in grid.flat[len(settings) :]:
                axes.set_axis_off()
            part.supylabel("share of the step's time [%]")
            part.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
    return figure


def caption(rows: pd.DataFrame) -> str:
    """What was measured, where and how; without rows of a GPU it says that they are missing."""
    devices = rows.drop_duplicates("device").itertuples()
    where = "; ".join(f"{d.device} (torch {d.torch})" for d in devices)
    gpu = "" if (rows["kind"] == "cuda").any() else " Rows of a GPU are still to come."
    factors = FACTORS in set(rows["integrator"]) and (
        " Plain factors are U Vᵀ of the same ranks with SGD; slower than factors: a step of DLRT, from the "
        "smallest to the largest ratio over the ranks."
    )
    return (
        "Training step and inference of the net 784-w-w-w-w-10 with the last layer dense, float32, SGD with "
        f"momentum, in one process with the dense net: {where}.{gpu} Medians of {rows['repeats'].min()} to "
        f"{rows['repeats'].max()} calls; with more S-steps than one a step is the mean of those from one "
        f"decision of ranks to the next.{factors or ''} Break-even: the rank "
        "from which dense needs less time (operations in products; peak memory), interpolated between the "
        "measured ranks on logarithmic axes; the dense net is timed anew beside every rank; no rank of a "
        "layer exceeds its full one. Bands in the figure: from quartile to quartile; dotted: what the "
        "operations in products alone would take at the speed of the dense net. Settings that are slow are "
        "not measured much beyond the rank where they are slower than dense. published: Schotthöfer et al. "
        "2022."
    )


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent, of_runs=False)
    rows = tables.read(args, "python timings/run.py", read)
    figures = {"timings": times(rows)}
    if (rows["phase"] == "training").any():
        figures["timings_shares"] = shares(rows)
    tables.publish(args, table(rows), caption(rows), figures, SHORT)


if __name__ == "__main__":
    main()

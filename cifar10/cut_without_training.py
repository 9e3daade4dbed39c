"""Dense networks cut and not trained on: by what the loss needs, by singular values, all layers alike.

    python cifar10/cut_without_training.py --runs resnet20_cifar10

For one of the networks that come along (dlrt/weights), or for runs, one for each seed. Ten minutes a run and
core. For each compression the singular values of all layers compete, in the norm of the loss ("curvature",
by a thousand training pictures without their labels) or as they are; or every layer keeps one share of its
full rank. "spatial": kernels are spatially separable. The first and the last layer stay dense. Measured is
the accuracy on the test pictures; nothing is chosen. What is in cut_without_training.csv is not measured
again; the table goes beside it, the figure to figures/ as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import TypedDict

import pandas as pd
from torch import nn
from tuned_runs import COPY

from dlrt import compression, errors, markup, plots, tables, to_low_rank
from dlrt.baselines import uniform_cut
from dlrt.checkpoint import fingerprint, load_network, save_table
from dlrt.data import Dataset
from dlrt.datasets import load
from dlrt.errors import RunError
from dlrt.flags import PERCENT, HelpFormatter, Parser
from dlrt.options import DATA_DIR, ROOT
from dlrt.plots import LOOK, Figure, mpl, plt
from dlrt.run_network import CALIBRATION_IMAGES
from dlrt.runs import lock, read_table
from dlrt.training import evaluate

NAME = "cut_without_training"
WAYS = ("curvature, spatial", "curvature", "singular values", "all layers alike")


class Cut(TypedDict):
    """A row of the CSV file. Accuracy, the dense network's, and compression are in %.

    A run is known by its name and a checksum of its weights; parameters are those of the dense network.
    """

    network: str
    dataset: str
    run: str
    parameters: int
    way: str
    asked: float
    compression: float
    accuracy: float
    dense: float


def cut(model: nn.Module, way: str, share: float, dataset: Dataset) -> nn.Module:
    """The network cut in one of the ways."""
    weighted = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    skip = [weighted[0], weighted[-1]]
    inputs = dataset.train.images[:CALIBRATION_IMAGES] if way.startswith("curvature") else None
    spatial = way.endswith("spatial")
    try:
        if way == "all layers alike":
            return uniform_cut(deepcopy(model), share, skip)
        return to_low_rank(deepcopy(model), compression=share, inputs=inputs, spatial=spatial, skip=skip)
    except ValueError as error:  # that is out of reach
        raise RunError(f"--compressions, of {way}: {error}") from error


def measure(run: Path, compressions: list[float], data_dir: Path, rows: pd.DataFrame) -> Iterator[Cut]:
    """A row for each compression and way that these rows lack; RunError where they are of other networks."""
    model, about = load_network(run)
    cost = compression(model)
    if cost.compressed:
        raise RunError(f"{run} is of a low-rank network: give runs of dense ones")
    of_run = {"network": about["network"], "dataset": about["dataset"], "parameters": cost.dense_parameters}
    _check_alike(pd.DataFrame([*rows.to_dict("records"), of_run]))
    of_run["run"] = f"{run.name} {fingerprint(model)}"
    there = rows[rows["run"] == of_run["run"]]
    done = set(zip(there["asked"], there["way"], strict=True))
    missing = [at for at in product(compressions, WAYS) if at not in done]
    dataset = load(about["dataset"], data_dir, seed=0) if missing else None
    dense = evaluate(model, dataset.test)[1] if missing else None
    for percent, way in missing:
        made = cut(model, way, percent / 100, dataset)
        cost, accuracy = compression(made).evaluation_compression, evaluate(made, dataset.test)[1]
        at = {"way": way, "asked": percent, "compression": cost}
        yield {**of_run, **at, "accuracy": accuracy, "dense": dense}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Points lost, a row for each compression and a column for each way: mean ± deviation over the runs."""
    rows = rows.assign(lost=rows["dense"] - rows["accuracy"])
    lost = rows.groupby(["asked", "way"], sort=False)["lost"].agg(["mean", "std"])
    shown = pd.Series(tables.spread(lost["mean"], lost["std"]), lost.index).unstack()
    head = {f"{way}: points lost": shown[way] for way in WAYS if way in shown}
    return pd.DataFrame({"compression asked for [%]": shown.index.map("{:g}".format), **head})


def figure(rows: pd.DataFrame) -> Figure:
    with mpl.rc_context(LOOK):
        made, axes = plt.subplots(figsize=(6.4, 3.8))
        for number, (way, cuts) in enumerate((way, rows[rows["way"] == way]) for way in WAYS):
            groups = cuts.groupby("asked")
            mean, std = groups["accuracy"].mean(), groups["accuracy"].std()
            bars = {"yerr": std, "capsize": 3, "marker": "o", "ms": 4}
            axes.errorbar(groups["compression"].mean(), mean, label=way, **bars, **plots.style(number))
        axes.axhline(rows["dense"].mean(), color="black", lw=1, ls=":", label="dense")
        axes.set(xlabel="compression [%]", ylabel="test accuracy, not trained on [%]", ylim=(0, None))
        made.legend(loc="outside upper center", ncols=4, fontsize="small")
    return made


def _check_alike(rows: pd.DataFrame) -> None:
    """RunError where rows are of several networks or data sets: a mean over them would say nothing."""
    kinds = rows[["network", "parameters", "dataset"]].drop_duplicates()
    if len(kinds) > 1:
        several = ", ".join(
            f"{name} ({size:,} weights) on {data}" for name, size, data in kinds.itertuples(index=False)
        )
        raise RunError(f"a table must be of one network and data set, got {several}: give --output-dir")


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    told = "trained dense networks: folders of runs, or names of dlrt/weights"
    add("--runs", type=Path, nargs="+", default=[], metavar="RUN", help=told)
    percent = {"type": PERCENT, "metavar": "PERCENT", "nargs": "+"}
    add("--compressions", **percent, default=[20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0], help="to cut to")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--output-dir", type=Path, help="of records, table and figure; by default here, and figures/")
    args = parser.parse_args()
    folder = args.output_dir or Path(__file__).parent
    record = folder / f"{NAME}.csv"
    if args.runs:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, "--output-dir", args)
    rows = pd.DataFrame(columns=list(Cut.__annotations__))
    if record.exists():
        rows = read_table(record, Cut, "delete it, and measure again")
    _check_alike(rows)
    for run in args.runs:
        for made in measure(run, args.compressions, args.data_dir, rows):
            rows = pd.DataFrame([*rows.to_dict("records"), made])
            save_table(record, rows)
    if rows.empty:
        parser.error("--runs must name trained dense networks, as nothing is measured yet, got none")
    count, more = rows["run"].nunique(), (rows["compression"] - rows["asked"]).groupby(rows["way"]).max()
    if (rows.groupby(["asked", "way"]).size() != count).any():
        raise RunError(f"{record} has some cuts of some runs only: give all --runs and --compressions again")
    beyond = "; ".join(f"{way} {more[way]:.1f}" for way in WAYS if way in more)
    data = tables.data(rows) + (COPY if (rows["dataset"] == "cifar10").all() else "")
    caption = (
        f"{rows['network'].iloc[0]} on the test pictures of {data}, {count} network"
        f"{'s' * (count > 1)}, {rows['dense'].mean():.2f} % dense. Compression exceeds what was asked "
        f"for by at most so many points: {beyond}. {tables.COUNTED}"
    )
    shown = table(rows)
    (folder / f"{NAME}.md").write_text(markup.markdown(shown, caption), encoding="utf-8")
    print(markup.markdown(shown, caption))
    places = [folder] if args.output_dir else [folder, ROOT / "figures"]
    print(f"figure: {plots.save(figure(rows), places, NAME)}")


if __name__ == "__main__":
    main()

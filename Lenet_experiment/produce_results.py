"""Table and frontier of LeNet5: accuracy against compression, beside what was published. It trains nothing.

python Lenet_experiment/produce_results.py
"""

from pathlib import Path

import pandas as pd

from dlrt import plots, tables
from dlrt.summaries import over_seeds

# Schotthöfer et al. 2022: best of five runs, and the mean; LRNN and GAL as quoted there
PAPER = pd.DataFrame({
    "tau": [0.11, 0.15, 0.2, 0.3],
    "accuracy": [97.97, 97.75, 97.20, 95.33],
    "mean": [95.42, 95.53, 95.01, 92.43],
    "compression": [88.86, 92.00, 94.04, 96.39],
})  # fmt: skip
OTHERS = pd.DataFrame({
    "sweep": ["published, LRNN", "published, GAL"], "accuracy": [98.67, 98.97], "compression": [95.8, 93.0]
})  # fmt: skip
SHORT = ("sweep", "τ", "test accuracy [%]", "ranks (first seed)", "evaluation parameters", "compression [%]")
CAPTION = (
    "LeNet5 on {data}: test accuracy in %, mean and standard deviation over the seeds, at the epoch chosen "
    "on the validation digits and at the last one. best: the best recipe found, batches of 64, lr 0.03, "
    "weight decay, digits shifted at random and smoothed labels, for the dense net too; first and last layer "
    "dense, bases that are updated in every tenth step, a tolerance that rises over the first half of "
    "training. "
    "plain: batches of 128, lr 0.05; last layer dense, the whole tolerance from the first step on, none of "
    "the rest. The paper has five seeds. "
    "published: Schotthöfer et al. 2022, best of five runs (their mean in brackets), "
    f"and methods as quoted there. {{integrators}}{tables.COUNTED}"
)


def published() -> pd.DataFrame:
    """The published rows in the columns of `tables.readable`."""
    both = pd.concat([PAPER.assign(sweep="published"), OTHERS])
    return pd.DataFrame({
        "sweep": both["sweep"],
        "τ": tables.text(both["tau"], "{:g}"),
        "test accuracy [%]": both["accuracy"].map("{:.2f}".format) + tables.text(both["mean"], " ({:.2f})"),
        "compression [%]": both["compression"].map("{:.2f}".format),
    })  # fmt: skip


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent)
    found = tables.read(args, "python Lenet_experiment/run.py")
    found["sweep"] = found["run"].str.split("/").str[0]
    found["tau"] = tables.dense_or_tau(found)
    summary = over_seeds(found, ["sweep", "tau"])
    tau = tables.text(summary["tau"], "{:g}", "dense")
    table = tables.readable(summary, {"sweep": summary["sweep"], "τ": tau})
    table = pd.concat([table, published()]).fillna("")
    low_rank = summary.dropna(subset="tau")
    figure = plots.accuracy_against_compression(
        curves={f"DLRT, {sweep} recipe": rows for sweep, rows in low_rank.groupby("sweep")},
        references={
            "published, DLRT, best of five runs": PAPER,
            "published, DLRT, mean of five": PAPER.assign(accuracy=PAPER["mean"]),
            **dict(iter(OTHERS.groupby("sweep"))),
        },
        dense={
            f"dense, {row.sweep} recipe": row.accuracy for row in summary[summary["tau"].isna()].itertuples()
        },
    )
    plots.widen_near_100(figure.axes[0])
    caption = CAPTION.format(data=tables.data(found), integrators=tables.integrators(found))
    tables.publish(args, table, caption, {"lenet5_frontier": figure}, SHORT)


if __name__ == "__main__":
    main()

"""Table and frontier of LeNet5: accuracy against compression, beside what was published. It trains nothing.

python Lenet_experiment/produce_results.py
"""

from pathlib import Path

import pandas as pd

from dlrt import plots, results, tables

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
CAPTION = (
    "LeNet5 on MNIST: test accuracy in %, mean and standard deviation over the seeds, at the epoch chosen on "
    "10,000 validation digits and at the last one. best: the tolerance rises over the first half of a longer "
    "training; plain: it is there from the first step. published: Schotthöfer et al. 2022, best of five runs "
    f"(their mean in brackets), and methods as quoted there. {tables.COUNTED}"
)


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The table to print of the means over seeds."""
    return pd.DataFrame({
        "sweep": summary["sweep"],
        "τ": summary["tau"].map(lambda tau: "dense" if pd.isna(tau) else f"{tau:g}"),
        "seeds": summary["seeds"].map(str),
        "test accuracy [%]": tables.spread(summary["accuracy"], summary["accuracy_std"]),
        "at the last epoch [%]": tables.spread(summary["last_accuracy"], summary["last_accuracy_std"]),
        "ranks (seed 0)": summary["ranks"].replace("", "dense"),
        "evaluation parameters": summary["evaluation_parameters"].map("{:,.0f}".format),
        "compression [%]": summary["compression"].map("{:.2f}".format),
        "training parameters": summary["training_parameters"].map("{:,.0f}".format),
        "training compression [%]": summary["training_compression"].map("{:.2f}".format),
    })  # fmt: skip


def published() -> pd.DataFrame:
    """The published rows in the columns of `readable`."""
    both = pd.concat([PAPER.assign(sweep="published"), OTHERS])
    best, mean = (
        both["accuracy"].map("{:.2f}".format),
        both["mean"].map(" ({:.2f})".format, na_action="ignore"),
    )
    return pd.DataFrame({
        "sweep": both["sweep"],
        "τ": both["tau"].map("{:g}".format, na_action="ignore"),
        "test accuracy [%]": best + mean.fillna(""),
        "compression [%]": both["compression"].map("{:.2f}".format),
    })  # fmt: skip


def main() -> None:
    args = results.parse(__doc__, Path(__file__).parent)
    found = results.read(args, "python Lenet_experiment/run.py")
    found["sweep"] = found["run"].str.split("/").str[0]
    found["tau"] = found["tau"].where(found["ranks"] != "")
    summary = tables.over_seeds(found, ["sweep", "tau"]).sort_values(["sweep", "tau"], na_position="first")
    table = pd.concat([readable(summary), published()]).fillna("")
    low_rank = summary.dropna(subset="tau")
    figure = plots.accuracy_against_compression(
        curves={f"DLRT, {sweep}": rows for sweep, rows in low_rank.groupby("sweep")},
        references={
            "paper, best of five": PAPER,
            "paper, mean": PAPER.assign(accuracy=PAPER["mean"]),
            **dict(iter(OTHERS.groupby("sweep"))),
        },
        dense={f"dense, {row.sweep}": row.accuracy for row in summary[summary["tau"].isna()].itertuples()},
    )
    results.publish(args, table, CAPTION, {"lenet5_frontier": figure})


if __name__ == "__main__":
    main()

"""Accuracy against compression of the five-layer nets, and DLRT beside SVD pruning. It trains nothing.

python accuracy_vs_cr/produce_results.py
"""

from pathlib import Path

import pandas as pd

from dlrt import plots, tables
from dlrt.plots import Figure
from dlrt.runs import read_metrics
from dlrt.summaries import best_lrs, over_seeds

# Schotthöfer et al. 2022: dense, and at these tolerances after some hundred epochs more at fixed rank
PUBLISHED = pd.DataFrame({
    "width": [500] * 9 + [784] * 9,
    "tau": [None, 0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15, 0.17] * 2,
    "accuracy": [
        98.54, 98.49, 98.56, 98.52, 98.34, 98.11, 97.50, 97.22, 96.90,
        98.53, 98.61, 98.59, 98.58, 98.49, 98.12, 97.95, 97.81, 97.40,
    ],
    "compression": [
        0, 35.0, 61.6, 75.3, 82.6, 86.5, 89.2, 91.1, 92.4,
        0, 51.4, 68.2, 78.7, 84.1, 88.6, 91.0, 93.0, 94.3,
    ],
})  # fmt: skip
SHORT = ("width", "method", "τ", "test accuracy [%]", "ranks (first seed)", "compression [%]")
CAPTION = (
    "Five-layer nets on {data}, all trained on digits shifted at random: test accuracy in %, mean and "
    "standard deviation over the seeds, at the epoch chosen on the validation digits and at the last one. "
    "DLRT begins with a quarter of the full rank; its bases are updated in every 40th step and the tolerance "
    "rises over the first half of training. "
    "truncated: the dense net cut to a rank by the SVD; retrained: trained on by DLRT at that rank, for the "
    "epochs told, after those of the dense net, with the learning rate of {lrs} that did best on the "
    "validation digits with the first seed; all others have 0.1. published: Schotthöfer et al. 2022, "
    f"retrained at fixed rank. {{integrators}}{tables.COUNTED}"
)


def with_methods(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The runs with a column `method`; a pruned run counts twice, before its training and after it.

    Those of other learning rates than the best one of their rank are left out.
    """
    found = found.assign(method="DLRT")
    found.loc[found["ranks"] == "", "method"] = "dense"
    pruned = found["from_checkpoint"].notna()
    found.loc[pruned, "method"] = "retrained"
    if pruned.any():
        best = found["rank"].map(best_lrs(found[pruned], "rank"))
        found = found[~pruned | (found["lr"] == best)]
        pruned = found["method"] == "retrained"
    truncated = found[pruned].assign(method="truncated", epochs=0)
    for index, run in truncated.iterrows():
        first = read_metrics(folder / run["run"]).iloc[0]
        truncated.loc[index, ["test_accuracy", "last_test_accuracy"]] = first["test_accuracy"]
    return pd.concat([found, truncated])


def published(widths: pd.Series) -> pd.DataFrame:
    """The published rows of those widths in the columns of `tables.readable`."""
    rows = PUBLISHED[PUBLISHED["width"].isin(widths)]
    return pd.DataFrame({
        "width": rows["width"],
        "method": rows["tau"].map(lambda tau: f"{'dense' if pd.isna(tau) else 'DLRT'}, published"),
        "τ": tables.text(rows["tau"], "{:g}"),
        "test accuracy [%]": rows["accuracy"].map("{:.2f}".format),
        "compression [%]": rows["compression"].map("{:.2f}".format),
    })  # fmt: skip


def over_widths(summary: pd.DataFrame) -> Figure:
    """A curve of DLRT per width, with its dense line, over the published points."""
    low_rank, dense = (summary[summary["method"] == method] for method in ("DLRT", "dense"))
    known = PUBLISHED[PUBLISHED["width"].isin(summary["width"])]
    points, line = known.dropna(subset="tau"), known[known["tau"].isna()]
    lines = {f"dense, width {row.width}": row.accuracy for row in dense.itertuples()}
    if not line.empty:
        lines["dense, published"] = line["accuracy"].mean()  # those of both widths are 0.01 apart
    return plots.accuracy_against_compression(
        {f"DLRT, width {width}": rows for width, rows in low_rank.groupby("width")},
        {f"published, width {width}": rows for width, rows in points.groupby("width")},
        lines,
    )


def pruning(summary: pd.DataFrame) -> Figure:
    """DLRT, the truncated and the retrained net of the largest width."""
    widest = summary[summary["width"] == summary["width"].max()]
    dense = widest["method"] == "dense"
    curves = {
        f"{method}, width {widest['width'].max()}": rows for method, rows in widest[~dense].groupby("method")
    }
    lines = {f"dense, width {row.width}": row.accuracy for row in widest[dense].itertuples()}
    figure = plots.accuracy_against_compression(curves, {}, lines)
    plots.widen_near_100(figure.axes[0])  # a net that is cut without training loses half, others a little
    return figure


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, Path(__file__).parent)
    found = tables.read(args, "python accuracy_vs_cr/run.py", needs=["width"])
    tried = found.loc[found["from_checkpoint"].notna(), "lr"].unique()
    lrs = ", ".join(f"{lr:g}" for lr in sorted(tried)) or "those tried"
    found = with_methods(found, args.results)
    found["fixed_rank"] = found["max_rank"] if "max_rank" in found else float("nan")
    summary = over_seeds(found, ["width", "method", "tau", "fixed_rank"])
    figures = {"mlp_accuracy_vs_cr": over_widths(summary)}
    if summary["method"].isin(["truncated", "retrained"]).any():
        figures["svd_pruning"] = pruning(summary)
    tau = tables.text(summary["tau"], "{:g}").where(summary["method"] == "DLRT", "")
    table = tables.readable(summary, {"width": summary["width"], "method": summary["method"], "τ": tau})
    table = pd.concat([table, published(summary["width"])]).fillna("")
    caption = CAPTION.format(data=tables.data(found), lrs=lrs, integrators=tables.integrators(found))
    tables.publish(args, table, caption, figures, SHORT)


if __name__ == "__main__":
    main()

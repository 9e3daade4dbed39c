"""Accuracy against compression of the five-layer nets, and DLRT beside SVD pruning. It trains nothing.

python accuracy_vs_cr/produce_results.py
"""

from pathlib import Path

import pandas as pd

from dlrt import plots, results, runs, tables

# Schotthöfer et al. 2022; the low-rank ones after some hundred epochs more at fixed rank
PUBLISHED_DENSE = {500: 98.54, 784: 98.53}
PUBLISHED = {
    500: pd.DataFrame({
        "accuracy": [98.49, 98.56, 98.52, 98.34, 98.11, 97.50, 97.22, 96.90],
        "compression": [35.0, 61.6, 75.3, 82.6, 86.5, 89.2, 91.1, 92.4],
    }),
    784: pd.DataFrame({
        "accuracy": [98.61, 98.59, 98.58, 98.49, 98.12, 97.95, 97.81, 97.40],
        "compression": [51.4, 68.2, 78.7, 84.1, 88.6, 91.0, 93.0, 94.3],
    }),
}  # fmt: skip
CAPTION = (
    "Five-layer nets on {data}, all trained on digits shifted at random: test accuracy in %, mean and "
    "standard deviation over the seeds, at the epoch chosen on the validation digits and at the last one. "
    "truncated: the dense net cut to a rank by the SVD; retrained: its factors trained at that rank, for "
    f"the epochs told after those of the dense net. {tables.COUNTED}"
)


def with_methods(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The runs with a column `method`; a pruned run counts twice, before its training and after it."""
    found = found.assign(method="DLRT")
    found.loc[found["ranks"] == "", "method"] = "dense"
    pruned = found["from_checkpoint"].notna()
    found.loc[pruned, "method"] = "retrained"
    truncated = found[pruned].assign(method="truncated", epochs=0)
    for index, run in truncated.iterrows():
        first = runs.read_metrics(folder / run["run"]).iloc[0]
        truncated.loc[index, ["test_accuracy", "last_test_accuracy"]] = first["test_accuracy"]
    return pd.concat([found, truncated])


def main() -> None:
    args = results.parse(__doc__, Path(__file__).parent)
    found = with_methods(results.read(args, "python accuracy_vs_cr/run.py"), args.results)
    found["fixed_rank"] = found["max_rank"] if "max_rank" in found else float("nan")
    summary = results.over_seeds(found, ["width", "method", "tau", "fixed_rank"])
    dense, low_rank = (summary[(summary["method"] == "dense") == is_dense] for is_dense in (True, False))
    curves = {f"DLRT, width {w}": rows for w, rows in low_rank[low_rank["method"] == "DLRT"].groupby("width")}
    lines = {f"dense, width {row.width}": row.accuracy for row in dense.itertuples()}
    widths = [width for width in PUBLISHED if width in set(dense["width"])]
    grey = {f"published, width {width}": PUBLISHED[width] for width in widths}
    grey_lines = {f"published dense, width {width}": PUBLISHED_DENSE[width] for width in widths}
    figures = {"mlp_accuracy_vs_cr": plots.accuracy_against_compression(curves, grey, lines | grey_lines)}
    widest = low_rank[low_rank["width"] == low_rank["width"].max()]
    if (widest["method"] != "DLRT").any():
        methods = {
            f"{method}, width {widest['width'].max()}": rows for method, rows in widest.groupby("method")
        }
        figures["svd_pruning"] = plots.accuracy_against_compression(
            methods, {}, dict(list(lines.items())[-1:])
        )
    tau = tables.text(summary["tau"], "{:g}").where(summary["method"] == "DLRT", "")
    table = tables.readable(summary, {"width": summary["width"], "method": summary["method"], "τ": tau})
    results.publish(args, table, CAPTION.format(data=results.data(found)), figures)


if __name__ == "__main__":
    main()

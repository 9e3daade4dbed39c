"""Bits per byte of all ways to train the GPT, from the runs of this folder. It trains nothing.

python gpt/produce_results.py
"""

import math
from pathlib import Path

import pandas as pd

from dlrt import tables
from dlrt.summaries import over_seeds

HERE = Path(__file__).parent
SHORT = ("trained", "rule", "width", "blocks", "bits per byte", "compression [%]")
CAPTION = (
    "{data}: bits per byte (the mean loss / ln 2), mean and standard deviation over the seeds, at the epoch "
    "chosen on the validation split. All see the same number of tokens. compression: against the dense net "
    "of full width. Weights only, the embedding included, norms left out; a layer of rank r counts r (m + n)."
)


def way(options: dict) -> str:
    """Which way a run went, by its options."""
    if options.get("compression"):
        return "DLRT"
    if "tau" in options:
        return "DLRT, τ"
    return "plain factors" if options.get("factors") else "dense"


def compared(found: pd.DataFrame) -> pd.DataFrame:
    """A row per way, rule and size, with means over the seeds."""
    rule = found["options"].map(lambda options: options.get("update") or options["optimizer"])
    bits = found["test_loss"] / math.log(2)
    found = found.assign(way=found["options"].map(way), rule=rule, test_accuracy=bits)
    sizes = ("compression", "factors", "tau")
    asked = found["options"].map(lambda options: next((options[s] for s in sizes if options.get(s)), 0.0))
    summary = over_seeds(found.assign(asked=asked), ["way", "rule", "width", "depth", "asked"])
    # nothing to compare with where the dense net of full width has not been trained
    full_width = summary["width"] == summary.groupby("depth")["width"].transform("max")
    dense = summary[full_width & (summary["way"] == "dense")].groupby("depth")
    whole = summary["depth"].map(dense["evaluation_parameters"].max())
    above = 100 * (summary["accuracy"] / summary["depth"].map(dense["accuracy"].min()) - 1)
    compression = 100 * (1 - summary["evaluation_parameters"] / whole)
    table = pd.DataFrame({
        "trained": summary["way"],
        "rule": summary["rule"],
        "width": summary["width"].map("{:.0f}".format),
        "blocks": summary["depth"].map("{:.0f}".format),
        "seeds": summary["seeds"].map(str),
        "bits per byte": tables.spread(summary["accuracy"], summary["accuracy_std"], digits=4),
        "above the best dense [%]": tables.text(above, "{:.1f}"),
        "parameters": summary["evaluation_parameters"].map("{:,.0f}".format),
        "compression [%]": tables.text(compression, "{:.1f}"),
    })  # fmt: skip
    largest = summary.groupby("depth")["evaluation_parameters"].transform("max")
    # runs of one budget end within a parameter or two of it; the edges of these bins lie off usual budgets
    order = summary.assign(size=(-500 * summary["evaluation_parameters"] / largest - 0.25).round())
    return table.loc[order.sort_values(["depth", "size", "accuracy"]).index]


@tables.boundary()
def main() -> None:
    args = tables.parse(__doc__, HERE)
    command = "python gpt/run.py"
    found = tables.read(args, command, dataset="stdlib", needs=("width", "depth", "optimizer"))
    tables.publish(args, compared(found), CAPTION.format(data=tables.data(found)), {}, SHORT)


if __name__ == "__main__":
    main()

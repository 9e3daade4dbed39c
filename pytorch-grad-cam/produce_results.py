"""Tables and figures of the comparisons of class-activation maps. It needs no network and no pictures.

python pytorch-grad-cam/produce_results.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import drawings
import pandas as pd

from dlrt import results

KINDS = ["reference", "low-rank", "SVD", "other seed", "full rank", "random weights", "RandomCAM"]
LAST = "randomcam.csv"  # a comparison is complete when it has its last table
MEANS = (
    *("pearson_raw", "spearman_raw", "ssim_raw", "iou_raw", "pearson", "spearman", "ssim", "iou"),
    *("deletion", "insertion", "road", "pointing", "energy"),
)
CAPTION = (
    "Means over the pictures. Of every network the map of the class that the reference predicts, compared "
    "with the reference's map: correlations, SSIM and the IoU of the highest fifths, raw (the method's own "
    "map) and displayed (without what is negative, scaled to [0, 1]); own: of the class that the network "
    "itself predicts. Deletion (low is good), insertion and ROAD (high is good) are of the network on its "
    "own maps. Undefined: maps without anything positive, left out of all that needs a displayed one. Seeds: "
    "whether the displayed map is as similar (Pearson) as those of dense networks of other seeds."
)


def read_study(folder: Path) -> pd.DataFrame:
    """All rows of a comparison, of every network and picture."""
    tables = map(pd.read_csv, sorted(folder.glob("*.csv")))
    return pd.concat([table for table in tables if "target" in table], ignore_index=True)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per network, with means over the pictures; percentages where they are shares of pictures."""
    found = []
    for _, its in rows.groupby("network", sort=False):
        same = its[its["target"] == "same"]
        agrees = same["predicted"] == same["reference_predicted"]
        own = pd.concat([same[agrees], its[its["target"] == "own"]])
        labelled = same[same["label"].notna()]
        first = same.iloc[0]
        found.append({
            **{name: first[name] for name in ("network", "kind", "tau", "compression")},
            "accuracy": 100 * (labelled["predicted"] == labelled["label"]).mean(),
            "agreement": 100 * agrees.mean(),
            "pictures": len(same),
            "undefined": int((~same["defined"]).sum()),
            **{name: same[name].mean() for name in MEANS},
            "pearson_own": own["pearson"].mean(),
            "gain": (same["insertion"] - same["deletion"]).mean(),
            "milliseconds": first[["forward_ms", "backward_ms", "assembly_ms"]].sum(),
        })  # fmt: skip
    summary = pd.DataFrame(found)
    summary["order"] = summary["kind"].map(KINDS.index)
    return summary.sort_values(["order", "tau", "network"]).drop(columns="order").reset_index(drop=True)


def against_seeds(summary: pd.DataFrame) -> pd.Series:
    """Whether each low-rank network's maps are above, inside or below the band of other seeds."""
    seeds = summary.loc[summary["kind"] == "other seed", "pearson"]
    low_rank = summary["kind"].isin(("low-rank", "SVD"))
    if seeds.empty:
        return pd.Series("", index=summary.index)
    band = summary["pearson"].map(
        lambda value: "above" if value > seeds.max() else "below" if value < seeds.min() else "inside"
    )
    return band.where(low_rank, "")


def readable(study: str, config: dict, summary: pd.DataFrame) -> pd.DataFrame:
    """The summary of a study as text."""

    def text(column: str, form: str) -> pd.Series:
        return summary[column].map(lambda value: "" if pd.isna(value) else form.format(value))

    def three(column: str) -> pd.Series:
        return text(column, "{:.3f}")

    return pd.DataFrame({
        "study": study,
        "method": config["method"],
        "network": summary["network"],
        "kind": summary["kind"],
        "τ": text("tau", "{:g}"),
        "compression [%]": text("compression", "{:.1f}"),
        "accuracy [%]": text("accuracy", "{:.1f}"),
        "reference's class [%]": text("agreement", "{:.1f}"),
        "undefined": summary["undefined"].astype(str) + " of " + summary["pictures"].astype(str),
        "Pearson raw": three("pearson_raw"),
        "Spearman raw": three("spearman_raw"),
        "SSIM raw": three("ssim_raw"),
        "IoU raw": three("iou_raw"),
        "Pearson": three("pearson"),
        "Spearman": three("spearman"),
        "SSIM": three("ssim"),
        "IoU": three("iou"),
        "Pearson own": three("pearson_own"),
        "seeds": against_seeds(summary),
        "deletion": three("deletion"),
        "insertion": three("insertion"),
        "ROAD": three("road"),
        "pointing": three("pointing"),
        "energy": three("energy"),
        "ms per map": text("milliseconds", "{:.2f}"),
    })  # fmt: skip


def main() -> None:
    args = results.parse(__doc__, Path(__file__).parent)
    studies = sorted(
        path.parent for path in args.results.glob("*/config.json") if (path.parent / LAST).exists()
    )
    if not studies:
        sys.exit(
            f"produce_results.py: no comparisons in {args.results}; make one with: "
            "python pytorch-grad-cam/compare_cams.py --help"
        )
    tables, figures = [], {}
    for folder in studies:
        config = json.loads((folder / "config.json").read_text())["options"]
        summary = summarise(read_study(folder))
        tables.append(readable(folder.name, config, summary))
        figures[f"gradcam_{folder.name}_grid"] = drawings.grid(folder, summary)
        figures[f"gradcam_{folder.name}"] = drawings.over_compression(summary)
        if (folder / "times.csv").exists():
            figures[f"gradcam_{folder.name}_time"] = drawings.time_over_rank(
                pd.read_csv(folder / "times.csv")
            )
    results.publish(args, pd.concat(tables, ignore_index=True), CAPTION, figures)


if __name__ == "__main__":
    main()

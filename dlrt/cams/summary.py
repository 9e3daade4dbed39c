"""The records of comparisons of maps as a table: a row per network, with means over the pictures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dlrt import tables

KINDS = ["reference", "low-rank", "SVD", "other seed", "full rank", "random weights", "RandomCAM"]
LAST = "randomcam.csv"  # a comparison is complete when it has its last table
TIMES = "times.csv"
FINISH = "delete what is damaged, call compare_cams.py again as it was called, and it goes on"
MEANS = (
    *("pearson_raw", "spearman_raw", "ssim_raw", "iou_raw", "pearson", "spearman", "ssim", "iou"),
    *("deletion", "insertion", "road", "pointing", "energy"),
)
COLUMNS = {  # title: a column of the summary, and its format
    "study": ("study", "{}"),
    "method": ("method", "{}"),
    "network": ("network", "{}"),
    "kind": ("kind", "{}"),
    "τ": ("tau", "{:g}"),
    "compression [%]": ("compression", "{:.1f}"),
    "labelled": ("labelled", "{}"),
    "accuracy [%]": ("accuracy", "{:.1f}"),
    "reference's class [%]": ("agreement", "{:.1f}"),
    "undefined": ("undefined", "{}"),
    "Pearson raw": ("pearson_raw", "{:.3f}"),
    "Spearman raw": ("spearman_raw", "{:.3f}"),
    "SSIM raw": ("ssim_raw", "{:.3f}"),
    "IoU raw": ("iou_raw", "{:.3f}"),
    "Pearson": ("pearson", "{:.3f}"),
    "Spearman": ("spearman", "{:.3f}"),
    "SSIM": ("ssim", "{:.3f}"),
    "IoU": ("iou", "{:.3f}"),
    "Pearson own": ("pearson_own", "{:.3f}"),
    "seeds": ("seeds", "{}"),
    "deletion": ("deletion", "{:.3f}"),
    "insertion": ("insertion", "{:.3f}"),
    "ROAD": ("road", "{:.3f}"),
    "pointing": ("pointing", "{:.3f}"),
    "energy": ("energy", "{:.3f}"),
}
CAPTION = (
    "Means over the pictures; of the accuracy over the labelled ones. Of every network the map of the class "
    "that the reference predicts, compared with the reference's map: correlations, SSIM and the IoU of the "
    "highest fifths, raw (the method's own map) and displayed (without what is negative, scaled to [0, 1]); "
    "own: of the class that the network itself predicts. Deletion (low is good), insertion and ROAD (high is "
    "good) are of the network on its own maps, and small where it gives that class a small probability: they "
    "compare maps only among networks of like accuracy. Undefined: maps without anything positive, left out "
    "of all that needs a displayed one. Seeds: whether the displayed map is as similar (Pearson) as those of "
    f"dense networks of other seeds. {tables.COUNTED}"
)


def read_study(folder: Path) -> pd.DataFrame:
    """All rows of a comparison, of every network and picture; FileNotFoundError where it is not complete."""
    if not (folder / LAST).exists():
        raise FileNotFoundError(f"there is no {LAST} yet")
    texts = {"network": str, "file": str}  # names may be numbers
    found = (pd.read_csv(path, dtype=texts) for path in sorted(folder.glob("*.csv")) if path.name != TIMES)
    return pd.concat(found, ignore_index=True)


def read_times(folder: Path) -> pd.DataFrame | None:
    """The times of a comparison, where they were measured."""
    return pd.read_csv(folder / TIMES) if (folder / TIMES).exists() else None


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per network, with means over the pictures; percentages where they are shares of pictures."""
    found = []
    for _, group in rows.groupby("network", sort=False):
        same = group[group["target"] == "same"]
        agrees = same["predicted"] == same["reference_predicted"]
        own = pd.concat([same[agrees], group[group["target"] == "own"]])
        labelled = same[same["label"].notna()]
        first = same.iloc[0]
        found.append({
            **{name: first[name] for name in ("network", "kind", "tau", "compression")},
            "labelled": len(labelled),
            "accuracy": 100 * (labelled["predicted"] == labelled["label"]).mean(),
            "agreement": 100 * agrees.mean(),
            "pictures": len(same),
            "undefined": int((~same["defined"]).sum()),
            **{name: same[name].mean() for name in MEANS},
            "pearson_own": own["pearson"].mean(),
            "gain": (same["insertion"] - same["deletion"]).mean(),
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
    summary = summary.assign(study=study, method=config["method"], seeds=against_seeds(summary))
    summary["undefined"] = summary["undefined"].astype(str) + " of " + summary["pictures"].astype(str)
    columns = {title: tables.text(summary[name], form) for title, (name, form) in COLUMNS.items()}
    return pd.DataFrame(columns)

"""Tables of runs, as text to read and as files to publish."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

COUNTED = "Weights only, biases and norms left out; a layer of rank r counts r (m + n), a dense one m n."


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns by which runs are compared, a row per run of `runs.read_runs`."""
    return pd.DataFrame(
        {
            "network": runs["network"],
            "data": runs["dataset"],
            "run": runs["name"],
            "test accuracy [%]": runs["test_accuracy"].map("{:.2f}".format),
            "epoch": runs["epoch"],
            "ranks": runs["ranks"].replace("", "dense"),
            "evaluation parameters": runs["evaluation_parameters"].map("{:,}".format),
            "compression [%]": runs["evaluation_compression"].map("{:.2f}".format),
            "seconds per epoch": runs["seconds_per_epoch"].map("{:.2f}".format),
        }
    )


def markdown(table: pd.DataFrame, caption: str = "") -> str:
    """A table in Markdown with aligned columns, its caption below."""
    rows = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + (f"\n\n{caption}" if caption else "") + "\n"


def write(table: pd.DataFrame, folder: Path, caption: str = "") -> None:
    """table.csv and table.md in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "table.csv", index=False)
    (folder / "table.md").write_text(markdown(table, caption))

"""Tables of runs, as text to read and as files to publish."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
from torch import nn

from dlrt.costs import compression, singular_values
from dlrt.errors import RunError
from dlrt.records import one_line, same_option

COUNTED = "Weights only, biases and norms left out; a layer of rank r counts r (m + n), a dense one m n."


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns by which runs are compared, a row per run of `records.read_runs`."""
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


def over_seeds(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means and standard deviations over the runs of each setting, a row per value of the columns `by`.

    Accuracies and compressions in %; the ranks are those of the first seed. RunError where the runs of a
    setting differ in more than the seed, or not even in that.
    """
    groups = runs.sort_values("seed").groupby(by, sort=False, dropna=False)
    for _, rows in groups:
        _check_difference(rows, "seed")
    table = groups.agg(
        seeds=("seed", "nunique"),
        validation=("validation_accuracy", "mean"),
        accuracy=("test_accuracy", "mean"),
        accuracy_std=("test_accuracy", "std"),
        last_accuracy=("last_test_accuracy", "mean"),
        last_accuracy_std=("last_test_accuracy", "std"),
        ranks=("ranks", "first"),
        evaluation_parameters=("evaluation_parameters", "mean"),
        compression=("evaluation_compression", "mean"),
        compression_std=("evaluation_compression", "std"),
        training_parameters=("training_parameters", "mean"),
        training_compression=("training_compression", "mean"),
    )
    if "epochs" not in by:
        table["epochs"] = groups["epochs"].first()
    return table.reset_index()


def best_lrs(runs: pd.DataFrame, by: str) -> pd.Series:
    """The learning rate with which the first seed validates best, for every value of the column `by`.

    RunError where the runs of that seed and one value differ in more than lr, or not even in that.
    """
    tried = runs[runs["seed"] == runs["seed"].min()]
    for _, rows in tried.groupby(by):
        _check_difference(rows, "lr")
    tried = tried.sort_values(["validation_accuracy", "validation_loss"], ascending=[True, False])
    return tried.groupby(by)["lr"].last()


def _check_difference(rows: pd.DataFrame, name: str) -> None:
    """Runs of one mean, or of one choice, differ in one option, `name`: else they would say nothing of it."""
    first, *others = rows[["run", "options"]].itertuples(index=False)
    for other in others:
        changed = [
            f"{option} {first.options.get(option)!r} and {other.options.get(option)!r}"
            for option in {**first.options, **other.options}
            if option not in (name, "name", "from_checkpoint")
            and not same_option(option, first.options.get(option), other.options.get(option))
        ]
        if changed:
            both = f"{first.run} and {other.run}"
            raise RunError(f"{both} must differ in the {name} only, got {', '.join(changed)}: move one away")
    if rows[name].duplicated().any():
        raise RunError(
            f"runs of one setting need a {name} each, got {', '.join(rows['run'])}: move some away"
        )


def dense_or_tau(runs: pd.DataFrame) -> pd.Series:
    """The tolerance of each run, NaN for a dense one."""
    return runs["tau"].where(runs["ranks"] != "")


def readable(summary: pd.DataFrame, settings: dict[str, pd.Series]) -> pd.DataFrame:
    """The rows of `over_seeds` as text, behind columns that say what the setting of each is."""
    return pd.DataFrame({
        **settings,
        "epochs": summary["epochs"].map(str),
        "seeds": summary["seeds"].map(str),
        "test accuracy [%]": spread(summary["accuracy"], summary["accuracy_std"]),
        "at the last epoch [%]": spread(summary["last_accuracy"], summary["last_accuracy_std"]),
        "ranks (first seed)": summary["ranks"].replace("", "dense"),
        "evaluation parameters": summary["evaluation_parameters"].map("{:,.0f}".format),
        "compression [%]": summary["compression"].map("{:.2f}".format),
        "training parameters": summary["training_parameters"].map("{:,.0f}".format),
        "training compression [%]": summary["training_compression"].map("{:.2f}".format),
    })  # fmt: skip


def text(values: pd.Series, form: str, missing: str = "") -> pd.Series:
    """Numbers as text in that format, and `missing` where there is none."""

    def one(value: float) -> str:
        told = form.format(value)
        return told.removeprefix("-") if not told.strip("-0.") else told  # no -0.00

    return values.map(lambda value: missing if pd.isna(value) else one(value)).astype(object)


def spread(mean: pd.Series, std: pd.Series) -> list[str]:
    """ "98.71 ± 0.05" for every row; the mean alone where there is one run only."""
    return [f"{m:.2f}" if pd.isna(s) else f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, std, strict=True)]


def layers(model: nn.Module) -> pd.DataFrame:
    """A row per linear and convolutional layer: its matrix, rank, parameters and how its spectrum decays."""
    ranks, rows = compression(model).ranks, []
    for name, sigma in singular_values(model).items():
        module = model.get_submodule(name)
        m, n = module.shape if name in ranks else module.weight.flatten(1).shape
        parameters = ranks[name] * (m + n) if name in ranks else m * n
        rows.append({
            "layer": name,
            "matrix": f"{m} x {n}",
            "rank": ranks.get(name, "dense"),
            "parameters": f"{parameters:,}",
            "compression [%]": f"{100 * (1 - parameters / (m * n)):.2f}",
            "largest sigma": f"{sigma[0]:.3g}",
            "smallest / largest": f"{sigma[-1] / sigma[0]:.2g}",
            "above a tenth": int((sigma > sigma[0] / 10).sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, caption: str = "") -> str:
    """A table in Markdown with aligned columns, its caption below."""
    rows = [list(table.columns), *([MARKDOWN.sub(r"\\\g<0>", cell) for cell in row] for row in _cells(table))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + (f"\n\n{caption}" if caption else "") + "\n"


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [[one_line(cell) for cell in row] for row in table.astype(str).to_numpy().tolist()]


# what Markdown would take for markup: an underscore within a word it does not
MARKDOWN = re.compile(r"[\\`*<|~$&\[]|(?<![^\W_])_|_(?![^\W_])")
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        '"': r"\char34{}",
        "%": r"\%",
        "&": r"\&",
        "_": r"\_",
        "#": r"\#",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "τ": r"$\tau$",
        "^": r"\textasciicircum{}",
        "²": r"$^2$",
        "ᵀ": r"$^\top$",
    }
)
# else -- is a dash, '' a quotation mark, and the first cell an argument of the line break before it
APART = re.compile(r"([-'`])(?=[-'`])|^(?=[\[*])")

WIDE = 8  # columns that a page holds


def latex(table: pd.DataFrame, caption: str = "") -> str:
    """A table environment in LaTeX; it needs the package booktabs, and graphicx where the table is wide."""
    rows = [[APART.sub(r"\1{}", cell.translate(LATEX)) for cell in row] for row in _cells(table)]
    head = " & ".join(column.translate(LATEX) for column in table.columns)
    wide = len(table.columns) > WIDE
    lines = [
        r"\begin{table}",
        r"\centering",
        *([r"\resizebox{\textwidth}{!}{"] if wide else []),
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"\toprule",
    ]
    lines += [head + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows), r"\bottomrule"]
    lines += [
        r"\end{tabular}" + ("}" if wide else ""),
        *([rf"\caption{{{caption.translate(LATEX)}}}"] if caption else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def write(table: pd.DataFrame, folder: Path, caption: str = "", name: str = "table") -> None:
    """name.csv, name.md and name.tex in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, encoding="utf-8", errors="backslashreplace")
    (folder / f"{name}.md").write_text(markdown(table, caption), encoding="utf-8")
    (folder / f"{name}.tex").write_text(latex(table, caption), encoding="utf-8")

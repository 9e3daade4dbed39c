"""Tables in Markdown and in LaTeX."""

import re

import pandas as pd

from dlrt.errors import one_line

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


def markdown(table: pd.DataFrame, caption: str = "") -> str:
    """A table in Markdown with aligned columns, its caption below."""
    rows = [list(table.columns), *([MARKDOWN.sub(r"\\\g<0>", cell) for cell in row] for row in _cells(table))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines) + (f"\n\n{caption}" if caption else "") + "\n"


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [[one_line(cell) for cell in row] for row in table.astype(str).to_numpy().tolist()]


def latex(table: pd.DataFrame, caption: str = "") -> str:
    """A table environment in LaTeX; it needs the package booktabs."""
    rows = [[APART.sub(r"\1{}", cell.translate(LATEX)) for cell in row] for row in _cells(table)]
    head = " & ".join(column.translate(LATEX) for column in table.columns)
    tabular = rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}"
    lines = [r"\begin{table}", r"\centering", tabular, r"\toprule"]
    lines += [head + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows), r"\bottomrule"]
    lines += [r"\end{tabular}", *([rf"\caption{{{caption.translate(LATEX)}}}"] if caption else [])]
    return "\n".join([*lines, r"\end{table}"]) + "\n"

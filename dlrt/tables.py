"""What every produce_results.py shares: its flags, its runs, and tables as text and as files to publish."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from torch import nn

from dlrt import errors, markup, plots
from dlrt.costs import singular_values
from dlrt.errors import RunError, one_line
from dlrt.factors import Factors
from dlrt.flags import HelpFormatter, Parser, flag
from dlrt.layers import LowRankLayer
from dlrt.options import ROOT
from dlrt.plots import Figure
from dlrt.ranks import parameters
from dlrt.summaries import read_runs

DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "stdlib": "Python's standard library"}
COUNTED = (
    "Weights only, biases and norms left out; a layer of rank r counts r (m + n), or m n where that is less, "
    "a dense one m n."
)


def parse(description: str, folder: Path, of_runs: bool = True, **switches: str) -> argparse.Namespace:
    """The flags of a produce_results.py: where the runs are, and where tables and figures go.

    of_runs: they are those of training scripts, on one data set or another. switches: others, and their help.
    """
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=folder / "results", help="where the run folders are")
    add(
        "--output-dir",
        type=Path,
        help="of table and figures; by default that of other --results, else this one, and figures/",
    )
    if of_runs:
        add("--dataset", help="whose runs to show; by default that of the committed ones, where it is there")
    for name, told in switches.items():
        add(flag(name), action="store_true", help=told)
    args = parser.parse_args()
    if args.results.resolve() != (folder / "results").resolve():  # tables of other runs stay beside them
        args.output_dir = args.output_dir or args.results
    args.figures = [args.output_dir] if args.output_dir else [folder, ROOT / "figures"]
    args.output_dir = args.output_dir or folder
    return args


@contextmanager
def boundary() -> Iterator[None]:
    """`errors.boundary` of a produce_results.py, to whose main function records may be anything."""
    with errors.boundary():
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise RunError(
                f"the records are damaged, or of another experiment ({reason}): "
                "give --results of this one, or move away what does not belong to it"
            ) from error


def read(
    args: argparse.Namespace,
    command: str,
    reader: Callable[[Path], pd.DataFrame] = read_runs,
    dataset: str = "mnist",
    needs: Sequence[str] = (),
) -> pd.DataFrame:
    """What the reader finds, and a line for each of its warnings. All runs must have the options in `needs`.

    Runs in a folder "tuning" chose options only, and are left out. The others are all of one data set,
    that one where it is there; those on others are named and left out. RunError where there is nothing, which
    says which command makes the runs.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = reader(args.results)
        except FileNotFoundError:
            found = None
    if found is not None and reader is read_runs:
        found = found[~_of_tuning(found)]
    for warning in caught:
        errors.report(warning.message)
    if found is None or found.empty:
        raise RunError(f"no finished runs in {args.results}; make them with: {command}")
    if reader is not read_runs:
        return found
    for option in ("name", "network", "dataset", "seed", "lr", *needs):
        without = found["run"] if option not in found else found.loc[found[option].isna(), "run"]
        if len(without):
            folder = args.results / without.iloc[0]
            raise RunError(f"{folder} has no {option}: it must be a run of {command}; move it away")
    if args.dataset and not (found["dataset"] == args.dataset).any():
        there = ", ".join(sorted(found["dataset"].unique()))
        raise RunError(f"--dataset must be one of the runs in {args.results}, {there}, got {args.dataset}")
    wanted = args.dataset or (dataset if (found["dataset"] == dataset).any() else found["dataset"].iloc[0])
    others = found.loc[found["dataset"] != wanted, "run"]
    if len(others):
        errors.report(f"left out, since not on {wanted} (--dataset): {', '.join(others)}")
    return found[found["dataset"] == wanted].reset_index(drop=True)


def tried(results: Path, dataset: str) -> pd.DataFrame:
    """The finished runs on a data set that `read` leaves out, since they chose options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `read` has told of those
        found = read_runs(results)
    return found[_of_tuning(found) & (found["dataset"] == dataset)]


def _of_tuning(found: pd.DataFrame) -> pd.Series:
    return found["run"].map(lambda run: "tuning" in Path(run).parent.parts)


def data(found: pd.DataFrame) -> str:
    """What a caption calls the data set of the runs that `read` gave."""
    return DATA.get(found["dataset"].iloc[0], found["dataset"].iloc[0])


def integrators(found: pd.DataFrame) -> str:
    """What a caption says of the integrators of the low-rank runs that `read` gave, if there are any."""
    runs = found[found["ranks"] != ""]
    used = runs["options"].map(lambda options: options.get("integrator"))
    most, *others = [*used.value_counts().index] or [""]
    told = "; ".join(f"{other} of {', '.join(runs.loc[used == other, 'run'])}" for other in others)
    return f"Integrator: {most}{f' ({told})' if told else ''}. " if most else ""


def publish(
    args: argparse.Namespace,
    table: pd.DataFrame,
    caption: str,
    figures: dict[str, Figure],
    short: Sequence[str] = (),
) -> None:
    """Print a table and `write` it, and figures by their names as PDF and PNG."""
    write(table, args.output_dir, caption, short=short)
    print(markup.markdown(table, caption))
    for name, figure in figures.items():
        print(f"figure: {plots.save(figure, args.figures, name)}")


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns by which runs are compared, a row per run of `summaries.read_runs`."""
    plain = (runs["evaluation_compression"] > 0).map({True: "plain factors", False: "dense"})
    return pd.DataFrame(
        {
            "network": runs["network"],
            "data": runs["dataset"],
            "run": runs["name"],
            "test accuracy [%]": runs["test_accuracy"].map("{:.2f}".format),
            "epoch": runs["epoch"],
            "ranks": runs["ranks"].where(runs["ranks"] != "", plain),
            "evaluation parameters": runs["evaluation_parameters"].map("{:,}".format),
            "compression [%]": runs["evaluation_compression"].map("{:.2f}".format),
        }
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
        "compression [%]": text(summary["compression"], "{:.2f}"),
        "training parameters": summary["training_parameters"].map("{:,.0f}".format),
        "training compression [%]": text(summary["training_compression"], "{:.2f}"),
    })  # fmt: skip


def text(values: pd.Series, form: str, missing: str = "") -> pd.Series:
    """Numbers as text in that format, and `missing` where there is none."""

    def one(value: float) -> str:
        shown = form.format(value)
        return shown.removeprefix("-") if not shown.strip("-0.") else shown  # no -0.00

    return values.map(lambda value: missing if pd.isna(value) else one(value)).astype(object)


def spread(mean: pd.Series, std: pd.Series, digits: int = 2) -> list[str]:
    """ "98.71 ± 0.05" for every row; the mean alone where there is one run, nothing without."""
    between = std.map(lambda s: "" if pd.isna(s) else f" ± {s:.{digits}f}")
    return list(text(mean, f"{{:.{digits}f}}") + between)


def layers(model: nn.Module) -> pd.DataFrame:
    """A row per linear and convolutional layer: its matrix, rank, parameters and how its spectrum decays."""
    rows = []
    for name, sigma in singular_values(model).items():
        module = model.get_submodule(name)
        in_factors = isinstance(module, (LowRankLayer, Factors))
        m, n = module.shape if in_factors else module.weight.flatten(1).shape
        held = parameters(module.rank, (m, n)) if in_factors else m * n
        rows.append({
            "layer": name,
            "matrix": f"{m} x {n}",
            "rank": module.rank if in_factors else "dense",
            "parameters": f"{held:,}",
            "compression [%]": f"{100 * (1 - held / (m * n)):.2f}",
            "largest sigma": f"{sigma[0]:.3g}",
            "smallest / largest": f"{sigma[-1] / sigma[0]:.2g}",
            "above a tenth": int((sigma > sigma[0] / 10).sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def write(
    table: pd.DataFrame, folder: Path, caption: str = "", name: str = "table", short: Sequence[str] = ()
) -> None:
    """name.csv, name.md and name.tex in a folder.

    `short` names the columns for LaTeX, by default all; a page holds six.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, encoding="utf-8", errors="backslashreplace")
    (folder / f"{name}.md").write_text(markup.markdown(table, caption), encoding="utf-8")
    note = f" {name}.md has more columns." if short else ""
    tex = markup.latex(table[list(short or table.columns)], (caption + note).strip())
    (folder / f"{name}.tex").write_text(tex, encoding="utf-8")

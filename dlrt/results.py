"""What every produce_results.py does around its own table and figures."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from dlrt import errors, plots, records, tables
from dlrt.errors import RunError
from dlrt.options import ROOT, HelpFormatter, Parser
from dlrt.plots import Figure
from dlrt.records import read_runs

DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def parse(description: str, folder: Path) -> argparse.Namespace:
    """The flags of a produce_results.py: where the runs are, and where tables and figures go."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=folder / "results", help="where the run folders are")
    add(
        "--output-dir",
        type=Path,
        help="of table and figures; by default this folder, and figures/ for the figures",
    )
    args = parser.parse_args()
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
            reason = records.one_line(f"{type(error).__name__}: {error}")
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

    All of one data set, that one where it is there; the runs on others are named and left out. RunError where
    there is nothing, which says which command makes the runs.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = reader(args.results)
        except FileNotFoundError:
            found = None
    for warning in caught:
        errors.report(warning.message)
    if found is None:
        raise RunError(f"no finished runs in {args.results}; make them with: {command}")
    if reader is not read_runs:
        return found
    for option in ("name", "network", "dataset", "seed", "lr", *needs):
        runs = found["run"] if option not in found else found.loc[found[option].isna(), "run"]
        if len(runs):
            folder = args.results / runs.iloc[0]
            raise RunError(f"{folder} has no {option}: it must be a run of {command}; move it away")
    wanted = dataset if (found["dataset"] == dataset).any() else found["dataset"].iloc[0]
    others = found.loc[found["dataset"] != wanted, "run"]
    if len(others):
        errors.report(f"left out, since not on {wanted}: {', '.join(others)}")
    return found[found["dataset"] == wanted].reset_index(drop=True)


def data(found: pd.DataFrame) -> str:
    """What a caption calls the data set of the runs that `read` gave."""
    return DATA.get(found["dataset"].iloc[0], found["dataset"].iloc[0])


def over_seeds(found: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """`tables.over_seeds`, ordered."""
    return tables.over_seeds(found, by).sort_values(by, na_position="first")


def publish(args: argparse.Namespace, table: pd.DataFrame, caption: str, figures: dict[str, Figure]) -> None:
    """Print a table and write it as CSV, Markdown and LaTeX, and figures by their names as PDF and PNG."""
    try:
        tables.write(table, args.output_dir, caption)
    except OSError as error:
        why = f"cannot be written to ({error.strerror}): take another"
        raise RunError(f"{args.output_dir} {why}") from error
    print(tables.markdown(table, caption))
    for name, figure in figures.items():
        print(f"figure: {plots.save(figure, args.figures, name)}")

"""Quick comparisons, tuned alike: all settings of every row with seed 0, more seeds with the best.

Validation chooses. All runs go to NAME.csv as they finish, and their table to NAME.md.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TypedDict

import pandas as pd
import torch
from torch import Tensor

from dlrt import markup, tables
from dlrt.data import Dataset, Split, augmented_batch, epoch_seed
from dlrt.errors import RunError
from dlrt.flags import NATURAL, HelpFormatter, Parser
from dlrt.options import DATA_DIR
from dlrt.runs import damaged, lock, read_table

COPY = " (the runs that are committed: a JPEG copy of it)"  # of CIFAR-10, in captions
CAPTION = (
    f"CIFAR-10{COPY}, mean and standard deviation over the seeds "
    f"after the last epoch, at the setting that validated best with seed 0. {tables.COUNTED}"
)
AGAIN = "delete what is damaged, and make those runs again, with --tune"


class Made(TypedDict):
    """A run, as its row in the CSV file has it; a comparison may add columns. Accuracies are in %."""

    row: str
    seed: int
    setting: str
    validation_accuracy: float
    test_accuracy: float
    ranks: str
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """`settings` are those of each row, `column` is a number of each run that the table shows, and its head.

    `train` makes a run, of a row, a seed, a setting, the data folder and a number of threads.
    """

    name: str
    train: Callable[[str, int, dict, Path, int], Made]
    settings: Mapping[str, Sequence[dict]]
    column: tuple[str, str]

    def main(self, description: str, folder: Path) -> None:
        """The program: make the runs that are asked for and not recorded, and write the table."""
        parser = Parser(description=description, formatter_class=HelpFormatter)
        add = parser.add_argument
        add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
        add("--jobs", type=NATURAL, default=1, help="runs at a time, which share the CPU's cores")
        add("--seeds", type=NATURAL, default=3, help="runs of every row at its best setting")
        rows = list(self.settings)
        add("--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help="to make")
        add("--tune", action="store_true", help="first try every setting of every row with seed 0")
        add("--output-dir", type=Path, default=folder, help=f"of {self.name}.csv and {self.name}.md")
        args = parser.parse_args()
        args.output_dir.mkdir(parents=True, exist_ok=True)
        lock(args.output_dir, "--output-dir", args)
        record = args.output_dir / f"{self.name}.csv"

        def make(wanted: list[tuple[str, int, dict]]) -> None:
            self._make(wanted, record, args.data_dir, args.jobs)

        if args.tune:
            make([(row, 0, setting) for row in args.rows for setting in self.settings[row]])
        best = best_settings(recorded(record, self.column[0]))
        if untuned := [row for row in args.rows if row not in best]:
            parser.error(f"no settings have been tried for {'; '.join(untuned)}: add --tune")
        make([(row, seed, best[row]) for seed in range(args.seeds) for row in args.rows])
        text = self.table(recorded(record, self.column[0]))
        record.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)

    def _make(self, wanted: list[tuple[str, int, dict]], record: Path, data_dir: Path, jobs: int) -> None:
        """Make and record what is not recorded yet."""
        runs, threads = recorded(record, self.column[0]), max(1, torch.get_num_threads() // jobs)
        done = set(zip(runs["row"], runs["seed"], runs["setting"], strict=True))
        missing = [run for run in wanted if (run[0], run[1], json.dumps(run[2])) not in done]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        ignored = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), **ignored) as pool:
            try:
                futures = [pool.submit(self.train, *run, data_dir, threads) for run in missing]
                for future in as_completed(futures):
                    made = pd.DataFrame([future.result()])
                    form = {"header": not record.exists(), "index": False, "float_format": "%.6g"}
                    made.to_csv(record, mode="a", **form)
                    print(made.drop(columns="ranks").to_string(index=False, header=False), flush=True)
            except BaseException:  # whatever ends this program ends its runs
                for process in active_children():
                    process.terminate()
                raise

    def table(self, runs: pd.DataFrame) -> str:
        """Means over the seeds at the best settings, as Markdown."""
        best = {row: json.dumps(setting) for row, setting in best_settings(runs).items()}
        chosen = runs[runs["setting"] == runs["row"].map(best)]
        (column, head), order = self.column, [row for row in self.settings if row in best]
        rows = chosen.groupby("row")
        mean, std = rows.mean(numeric_only=True).loc[order], rows.std(numeric_only=True).loc[order]
        settings = [json.loads(best[row]) for row in order]
        return markup.markdown(pd.DataFrame({
            "trained": order,
            "seeds": rows.size().loc[order].map(str).tolist(),
            head: [f"{at:.1f}" if at < 1000 else f"{at:,.0f}" for at in mean[column]],
            "validation [%]": tables.spread(mean["validation_accuracy"], std["validation_accuracy"]),
            "test [%]": tables.spread(mean["test_accuracy"], std["test_accuracy"]),
            "setting": [
                ", ".join(f"{key} {value}" for key, value in setting.items()) for setting in settings
            ],
        }), CAPTION)  # fmt: skip


def training_batches(
    split: Split, dataset: Dataset, seed: int, epochs: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images and labels of all epochs, shuffled by the seed."""
    for epoch in range(epochs):
        shuffle = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        for x, y in split.batches(size, shuffle):
            yield augmented_batch(x, dataset.shift, dataset.flip, shuffle), y


def recorded(path: Path, column: str = "seed") -> pd.DataFrame:
    """The runs in a file, none where it is not there.

    RunError where it is damaged, has no such column, or has a run twice.
    """
    if not path.exists():
        return pd.DataFrame(columns=list(Made.__annotations__))
    runs = read_table(path, Made, AGAIN)
    try:
        settings = [json.loads(setting) for setting in runs["setting"]]
    except (TypeError, ValueError) as error:
        raise damaged(path, AGAIN) from error
    whole = runs["validation_accuracy"].notna().all() and column in runs and runs[column].notna().all()
    if not whole or not all(isinstance(setting, dict) for setting in settings):
        raise damaged(path, AGAIN)
    if (twice := runs.duplicated(["row", "seed", "setting"])).any():
        raise RunError(
            f"{path}, line {runs.index[twice][0] + 2}: every run must be there once: delete that line"
        )
    return runs


def best_settings(runs: pd.DataFrame) -> dict[str, dict]:
    """For each row the setting that is best on the validation pictures with seed 0, of equals the first."""
    tuned = runs[runs["seed"] == 0]
    best = tuned.loc[tuned.groupby("row")["validation_accuracy"].idxmax()]
    return {row: json.loads(setting) for row, setting in zip(best["row"], best["setting"], strict=True)}

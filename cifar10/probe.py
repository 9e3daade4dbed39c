"""A quick comparison on CIFAR-10: a ResNet of three blocks, 10,000 pictures, 8 epochs, from scratch.

    python cifar10/probe.py --jobs 2        every run that is not recorded yet, 3 minutes each and core

Every way to train is tuned alike, on the validation pictures with seed 0 (`--tune` makes those runs), and the
best setting of each is reported on the test pictures over the seeds. All runs go to probe.csv as they finish,
the table to probe.md.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dlrt import DLRT, compression, errors, to_low_rank
from dlrt.baselines import Muon, plain_factors
from dlrt.data import Split, augmented_batch
from dlrt.datasets import load
from dlrt.models import ResNet8
from dlrt.options import DATA_DIR, NATURAL, HelpFormatter, Parser
from dlrt.runs import damaged, read_table

HERE = Path(__file__).parent
SAMPLES, EPOCHS, BATCH = 10_000, 8, 128
DENSE = ("conv1", "linear")  # layers that stay so
COMMON = {"momentum": 0.9, "weight_decay": 5e-4}
LRS = (0.05, 0.1, 0.2, 0.4)
AGAIN = "delete it and make the runs again, with --tune"
MUON = tuple({"lr": 0.1, "update_lr": update_lr} for update_lr in (0.05, 0.08, 0.12, 0.2))


@dataclass(frozen=True)
class Row:
    """A way to train: the settings among which validation chooses, and what they have in common."""

    kind: str
    update: str = "sgd"
    width: float = 1.0
    compression: float = 0.0
    spatial: bool = False

    @property
    def choices(self) -> list[dict]:
        """The same number of settings for everybody, and the same momentum and decay."""
        return [{"lr": lr} for lr in LRS] if self.update == "sgd" else list(MUON)


ROWS = {
    "DLRT, budget 75 %, Muon": Row("DLRT", "muon", compression=0.75),
    "DLRT, budget 75 %, spatially separable, Muon": Row("DLRT", "muon", compression=0.75, spatial=True),
    "dense, Muon": Row("dense", "muon"),
    "plain factors, 75 %, Muon": Row("factors", "muon", compression=0.75),
    "dense, half the width, Muon": Row("dense", "muon", width=0.5),
    "dense, SGD": Row("dense"),
    "DLRT, budget 75 %, SGD": Row("DLRT", compression=0.75),
    "plain factors, 75 %, SGD": Row("factors", compression=0.75),
    "dense, half the width, SGD": Row("dense", width=0.5),
    "DLRT, budget 43 %, Muon": Row("DLRT", "muon", compression=0.43),
    "DLRT, budget 90 %, Muon": Row("DLRT", "muon", compression=0.90),
    "DLRT, budget 90 %, spatially separable, Muon": Row("DLRT", "muon", compression=0.90, spatial=True),
    "plain factors, 43 %, Muon": Row("factors", "muon", compression=0.43),
    "plain factors, 43 %, SGD": Row("factors", compression=0.43),
}


def make(
    row: Row, shape: tuple[int, int, int], steps: int, setting: dict
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Network and optimizer for so many steps in all."""
    model = ResNet8(shape, width=row.width)
    if row.kind == "DLRT":
        model = to_low_rank(model, skip=DENSE, spatial=row.spatial)
        budget = {"compression": row.compression, "ramp": round(0.6 * steps)}
        nesterov = row.update == "muon"
        optimizer = DLRT(
            model, torch.optim.SGD, update=row.update, nesterov=nesterov, **budget, **COMMON, **setting
        )
    else:
        model = plain_factors(model, row.compression, DENSE) if row.kind == "factors" else model
        hidden = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name not in DENSE]
        if row.update == "muon":
            optimizer = Muon(model.parameters(), hidden, nesterov=True, **COMMON, **setting)
        else:
            optimizer = torch.optim.SGD(model.parameters(), **COMMON, **setting)
    return model.to(memory_format=torch.channels_last), optimizer


class Made(TypedDict):
    """A row of probe.csv. Accuracies and compression are in %."""

    row: str
    seed: int
    setting: str
    validation_accuracy: float
    test_accuracy: float
    compression: float
    ranks: str
    seconds: float


def train(name: str, seed: int, setting: dict, data_dir: Path, threads: int) -> Made:
    """One run: accuracy on 5,000 validation and 10,000 test pictures after the last epoch, and the cost."""
    torch.set_num_threads(threads)
    dataset, row, start = load("cifar10", data_dir, 0), ROWS[name], time.perf_counter()
    split = Split(dataset.train.images[:SAMPLES], dataset.train.labels[:SAMPLES])
    steps = EPOCHS * split.steps(BATCH)
    torch.manual_seed(seed)
    model, optimizer = make(row, dataset.shape, steps, setting)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        shuffle = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for x, y in split.batches(BATCH, shuffle):
            optimizer.zero_grad()
            cross_entropy(model(augmented_batch(x, dataset.shift, dataset.flip, shuffle)), y).backward()
            optimizer.step()
            scheduler.step()
    cost, whole = compression(model), compression(ResNet8(dataset.shape)).dense_parameters
    return {
        "row": name,
        "seed": seed,
        "setting": json.dumps(setting),
        "validation_accuracy": accuracy(model, dataset.validation),
        "test_accuracy": accuracy(model, dataset.test),
        "compression": 100 * (1 - cost.evaluation_parameters / whole),
        "ranks": "/".join(map(str, cost.ranks.values())),
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    hits: list[Tensor] = [(model(x).argmax(1) == y).sum() for x, y in split.batches(500)]
    return 100 * sum(hits).item() / len(split)


def recorded(path: Path) -> pd.DataFrame:
    """The runs in probe.csv, none where it is not there; RunError where it is damaged."""
    if not path.exists():
        return pd.DataFrame(columns=list(Made.__annotations__))
    runs = read_table(path, Made, AGAIN)
    try:
        settings = [json.loads(setting) for setting in runs["setting"]]
    except (TypeError, ValueError) as error:
        raise damaged(path, AGAIN) from error
    accurate = runs["validation_accuracy"].notna().all()
    if not accurate or not all(isinstance(setting, dict) for setting in settings):
        raise damaged(path, AGAIN)
    return runs


def best_settings(runs: pd.DataFrame) -> dict[str, dict]:
    """For each row the setting that is best on the validation pictures with seed 0, of equals the first."""
    tuned = runs[runs["seed"] == 0]
    best = tuned.loc[tuned.groupby("row")["validation_accuracy"].idxmax()]
    return {name: json.loads(setting) for name, setting in zip(best["row"], best["setting"], strict=True)}


def table(runs: pd.DataFrame) -> str:
    """Means over the seeds at the best settings, as Markdown."""
    best = {name: json.dumps(setting) for name, setting in best_settings(runs).items()}
    chosen = runs[runs["setting"] == runs["row"].map(best)]
    lines = [
        "| trained | seeds | compression [%] | validation [%] | test [%] | setting |",
        "| --- " * 6 + "|",
    ]
    for name in (name for name in ROWS if name in best):
        of = chosen[chosen["row"] == name]
        spread = [mean_and_spread(of[c]) for c in ("validation_accuracy", "test_accuracy")]
        setting = ", ".join(f"{key} {value}" for key, value in json.loads(best[name]).items())
        cells = [name, str(len(of)), f"{of['compression'].mean():.1f}", *spread, setting]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_spread(values: pd.Series) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


@errors.boundary()
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--jobs", type=NATURAL, default=1, help="runs at a time, which share the CPU's cores")
    add("--seeds", type=NATURAL, default=3, help="runs of every row at its best setting")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="to make")
    add("--tune", action="store_true", help="first try every setting of every row with seed 0")
    add("--output-dir", type=Path, default=HERE, help="of probe.csv and probe.md")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = args.output_dir / "probe.csv"
    threads = max(1, torch.get_num_threads() // args.jobs)

    def make_runs(wanted: list[tuple[str, int, dict]]) -> None:
        runs = recorded(record)
        done = set(zip(runs["row"], runs["seed"], runs["setting"], strict=True))
        missing = [run for run in wanted if (run[0], run[1], json.dumps(run[2])) not in done]
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed(pool.submit(train, *run, args.data_dir, threads) for run in missing):
                made = pd.DataFrame([future.result()])
                made.to_csv(record, mode="a", header=not record.exists(), index=False, float_format="%.6g")
                print(made.drop(columns="ranks").to_string(index=False, header=False), flush=True)

    if args.tune:
        make_runs([(name, 0, setting) for name in args.rows for setting in ROWS[name].choices])
    best = best_settings(recorded(record))
    if untuned := [name for name in args.rows if name not in best]:
        parser.error(f"no settings have been tried for {', '.join(untuned)}: add --tune")
    make_runs([(name, seed, best[name]) for seed in range(args.seeds) for name in args.rows])
    text = table(recorded(record))
    (record.with_suffix(".md")).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

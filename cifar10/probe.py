"""A quick comparison on CIFAR-10: a ResNet of three blocks, 10,000 pictures, 8 epochs, from scratch.

    python cifar10/probe.py --jobs 2        every run that is not recorded yet, 3 minutes each and core

Every way to train is tuned alike, on the validation pictures with seed 0 (`--tune` makes those runs), and the
best setting of each is reported on the test pictures over the seeds. All runs go to probe.csv as they finish,
the table to probe.md.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tuned_runs import Comparison, Made, training_batches

from dlrt import DLRT, compression, errors, to_low_rank
from dlrt.baselines import Muon, plain_factors, product_decay
from dlrt.data import Split
from dlrt.datasets import load
from dlrt.models import ResNet8
from dlrt.training import evaluate

SAMPLES, EPOCHS, BATCH = 10_000, 8, 128
DENSE = ("conv1", "linear")  # layers that stay so
COMMON = {"momentum": 0.9, "weight_decay": 5e-4}
LRS = (0.05, 0.1, 0.2, 0.4)
MUON = tuple({"lr": 0.1, "update_lr": update_lr} for update_lr in (0.05, 0.08, 0.12, 0.2))


@dataclass(frozen=True)
class Row:
    """A way to train: the settings among which validation chooses, and what they have in common."""

    kind: str
    update: str = "sgd"
    width: float = 1.0
    compression: float = 0.0
    spatial: bool = False
    cut_by: str = "weights"

    @property
    def choices(self) -> list[dict]:
        """The same number of settings for everybody, and the same momentum and decay."""
        return [{"lr": lr} for lr in LRS] if self.update == "sgd" else list(MUON)


ROWS = {
    "DLRT, budget 75 %, Muon": Row("DLRT", "muon", compression=0.75),
    "DLRT, budget 75 %, spatially separable, Muon": Row("DLRT", "muon", compression=0.75, spatial=True),
    "DLRT, budget 75 %, spatially separable, by the loss, Muon": Row(
        "DLRT", "muon", compression=0.75, spatial=True, cut_by="loss"
    ),
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
        budget = {"compression": row.compression, "ramp": round(0.6 * steps), "cut_by": row.cut_by}
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
        if row.kind == "factors":
            product_decay(optimizer, model)
    return model.to(memory_format=torch.channels_last), optimizer


def train(name: str, seed: int, setting: dict, data_dir: Path, threads: int) -> Made:
    """One run: accuracy on 5,000 validation and 10,000 test pictures after the last epoch, and the cost."""
    torch.set_num_threads(threads)
    dataset, row, start = load("cifar10", data_dir, 0), ROWS[name], time.perf_counter()
    split = Split(dataset.train.images[:SAMPLES], dataset.train.labels[:SAMPLES])
    steps = EPOCHS * split.steps(BATCH)
    torch.manual_seed(seed)
    model, optimizer = make(row, dataset.shape, steps, setting)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in training_batches(split, dataset, seed, EPOCHS, BATCH):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    cost, whole = compression(model), compression(ResNet8(dataset.shape)).dense_parameters
    return {
        "row": name,
        "seed": seed,
        "setting": json.dumps(setting),
        "validation_accuracy": evaluate(model, dataset.validation)[1],
        "test_accuracy": evaluate(model, dataset.test)[1],
        "compression": 100 * (1 - cost.evaluation_parameters / whole),
        "ranks": "/".join(map(str, cost.ranks.values())),
        "seconds": time.perf_counter() - start,
    }


@errors.boundary()
def main() -> None:
    settings = {name: row.choices for name, row in ROWS.items()}
    study = Comparison("probe", train, settings, ("compression", "compression [%]"))
    study.main(__doc__, Path(__file__).parent)


if __name__ == "__main__":
    main()

"""Runs made up for the tests of what is made of runs, and those that are committed."""

import importlib.util
import json
import math
import shutil
import subprocess

import pandas as pd

from dlrt.options import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(runs, name, validation, test, epochs=None, tau=0.2, ranks="3/4", loss=1.0, **options):
    """A finished run with these accuracies, epoch by epoch; with weights to begin with from epoch 0 on."""
    folder = runs / name
    folder.mkdir(parents=True)
    first = 0 if options.get("from_checkpoint") else 1
    count = len(test) - 1 + first
    options = {"seed": 0, "lr": 0.1, "from_checkpoint": None, "name": name, **options}
    options["epochs"] = epochs or count
    frozen = options.get("finetune_epochs", 0)
    options = {"network": "LeNet5", "dataset": "mnist", **({"tau": tau} if ranks else {}), **options}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    rows = pd.DataFrame({
        "epoch": range(first, count + 1),
        "frozen_bases": [epoch > count - frozen for epoch in range(first, count + 1)],
        "tau": tau if ranks else 0.0,
        "validation_loss": loss,
        "validation_accuracy": validation,
        "test_accuracy": test,
        "ranks": ranks,
        "evaluation_parameters": 100,
        "evaluation_compression": 50.0 if ranks else 0.0,
        "training_parameters": 200,
        "training_compression": 25.0 if ranks else 0.0,
        "seconds": 1.0,
    })  # fmt: skip
    rows.to_csv(folder / "metrics.csv", index=False)


def makes(loss_of):
    """A grid.make that trains nothing, and the options of the runs that it was asked for, by name.

    loss_of: the validation loss of a run by its options, inf where it diverges; the accuracy is 100 - loss.
    """
    made = {}

    def make(plans, results, jobs=1, may_diverge=False, then=()):
        for plan in plans:
            assert plan.name not in made  # one that diverged is not made again
            loss = loss_of(plan.options)
            (results / plan.name).mkdir(parents=True, exist_ok=True)
            if loss < math.inf:
                record = {"epoch": plan.epochs, "ranks": "", "validation_loss": loss}
                record["validation_accuracy"] = 100 - loss
                pd.DataFrame([record]).to_csv(results / plan.name / "metrics.csv", index=False)
            made[plan.name] = plan.options

    return make, made


def copy_committed(place, folder):
    """What is committed below a place of the tree, to the same one in a folder; nothing without git."""
    listing = ["git", "ls-files", "-z", place]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    for path in filter(None, listed):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)

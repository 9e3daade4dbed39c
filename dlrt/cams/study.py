"""What the study of maps measures of a network: a row per method, as its protocol.md says."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from dlrt.cams import Maps, explain, known
from dlrt.cams.compare import in_boxes, pearson
from dlrt.cams.faithfulness import curves
from dlrt.cams.networks import Network
from dlrt.cams.targets import of_classes
from dlrt.cluttered_digits import HARD, Clutter, held_out
from dlrt.runs import chosen_epoch, epochs_done, read_metrics, read_options

METHODS = ("gradcam", "layercam", "eigencam")
KINDS = ("dense", "lowrank", "narrow", "continued", "compressed")
FROM_DENSE = ("continued", "compressed")
PICTURES = 100


@functools.cache
def pictures() -> Clutter:
    """The first test pictures."""
    test = held_out(HARD)
    return Clutter(test.images[:PICTURES], test.labels[:PICTURES], test.boxes[:PICTURES])


def inputs(network: Network) -> torch.Tensor:
    images = torch.from_numpy(pictures().images)[:, None] / 255
    return (images - network.mean[0]) / network.std[0]


def maps_of(network: Network, method: str) -> Maps:
    return explain(network.model, inputs(network), of_classes(pictures().labels), method)


def difference(one: Maps, other: Maps) -> float:
    """1 - r of raw maps, mean over the pictures; those that do not vary, or are not finite, are left out."""
    return float(1 - np.nanmean(pearson(one.raw, other.raw)))


def energy(maps: Maps) -> float:
    test = pictures()
    pairs = zip(maps.displayed, test.boxes, strict=True)
    boxes = (in_boxes(shown, [box], test.images.shape[1:]) for shown, box in pairs)
    return float(np.nanmean([scores["energy"] for scores in boxes]))


def insertion_minus_deletion(network: Network, maps: Maps) -> float:
    """Divided by the probability of the true class; of the defined maps."""
    kept = maps.defined
    x, shown = inputs(network)[torch.from_numpy(kept)], maps.displayed[kept]
    classes = pictures().labels[kept].tolist()
    found, p = curves(network.model, x, shown, classes)
    return float((found["insertion"] - found["deletion"]).mean() / p.mean())


def measure(folder: Path, references: dict[str, list[Maps]]) -> list[dict[str, object]]:
    """A row per method, of the network of a run; references are the maps to compare with, by method."""
    network, metrics = known.from_run(folder), read_metrics(folder)
    chosen = metrics.loc[chosen_epoch(metrics)]
    kind, seed = folder.name.split("_seed")
    random = insertion_minus_deletion(network, maps_of(network, "randomcam"))
    rows = []
    for method in METHODS:
        maps = maps_of(network, method)
        rows.append({
            "kind": kind, "seed": int(seed), "method": method,
            "accuracy": chosen["test_accuracy"], "parameters": int(chosen["evaluation_parameters"]),
            "undefined": int((~maps.defined).sum()),
            "difference": np.mean([difference(maps, other) for other in references[method]]),
            "energy": energy(maps),
            "faithfulness": insertion_minus_deletion(network, maps) - random,
        })  # fmt: skip
    return rows


def complete(results: Path) -> list[int]:
    """The seeds of which all networks are trained to the end."""
    seeds = sorted(int(path.name.split("_seed")[1]) for path in results.glob(f"{KINDS[-1]}_seed*"))
    names = {seed: [results / f"{kind}_seed{seed}" for kind in KINDS] for seed in seeds}
    return [
        seed
        for seed, runs in names.items()
        if all(epochs_done(run) == read_options(run).get("epochs") for run in runs)
    ]

"""What the study of maps measures of a network: a row per method, as its protocol.md says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from dlrt.cams import Maps, explain, known
from dlrt.cams.compare import in_boxes, pearson
from dlrt.cams.faithfulness import curves
from dlrt.cams.networks import Network
from dlrt.cams.study_results import TITLES
from dlrt.cams.targets import of_classes
from dlrt.cluttered_digits import HARD, held_out
from dlrt.datasets import load
from dlrt.runs import chosen_epoch, epochs_done, epochs_planned, read_metrics, read_options, read_table

METHODS = tuple(TITLES)
KINDS = ("dense", "lowrank", "narrow", "continued", "compressed")
FROM_DENSE = ("continued", "compressed")
REFERENCES = range(200, 204)  # seeds of dense networks to which all others are compared
PICTURES = 100


class Measured(TypedDict):
    """What a row of a table of measurements must say, for one that goes on."""

    kind: str
    seed: int
    method: str
    accuracy: float
    parameters: int
    difference: float
    faithfulness: float


def kept(path: Path) -> list[dict[str, object]]:
    """The rows that were measured before; RunError where their table is damaged."""
    return (
        read_table(path, Measured, "delete it and measure again").to_dict("records") if path.exists() else []
    )


@dataclass(frozen=True)
class Sample:
    """Pictures (N, C, H, W) in [0, 1], their classes (N,), and, if known, boxes (N, 4) of what is shown."""

    images: Tensor
    labels: np.ndarray
    boxes: np.ndarray | None = None

    def inputs(self, network: Network) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (network.mean, network.std))
        return (self.images - mean) / std


def clutter() -> Sample:
    """The first test pictures of the hard cluttered digits."""
    test = held_out(HARD)
    images = torch.from_numpy(test.images[:PICTURES])[:, None] / 255
    return Sample(images, test.labels[:PICTURES], test.boxes[:PICTURES])


def of_dataset(name: str, count: int, data_dir: Path) -> Sample:
    """The first test pictures of a data set; DataError where it is not there."""
    data = load(name, data_dir, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return Sample(data.test.images[:count] * std + mean, data.test.labels[:count].numpy())


def maps_of(network: Network, sample: Sample, method: str) -> Maps:
    """Maps of the true classes."""
    return explain(network.model, sample.inputs(network), of_classes(sample.labels), method)


def difference(one: Maps, other: Maps) -> float:
    """1 - r of raw maps, mean over the pictures; those that do not vary, or are not finite, are left out."""
    return float(1 - np.nanmean(pearson(one.raw, other.raw)))


def energy(maps: Maps, sample: Sample) -> float:
    """The share of the displayed maps that lies in the boxes; NaN where there are none."""
    if sample.boxes is None:
        return float("nan")
    pairs = zip(maps.displayed, sample.boxes, strict=True)
    boxes = (in_boxes(shown, [box], sample.images.shape[2:]) for shown, box in pairs)
    return float(np.nanmean([scores["energy"] for scores in boxes]))


def insertion_minus_deletion(network: Network, maps: Maps, sample: Sample) -> float:
    """Divided by the probability of the true class; of the defined maps."""
    defined = maps.defined
    x, shown = sample.inputs(network)[torch.from_numpy(defined)], maps.displayed[defined]
    found, p = curves(network.model, x, shown, sample.labels[defined].tolist())
    return float((found["insertion"] - found["deletion"]).mean() / p.mean())


def measure(folder: Path, references: dict[str, list[Maps]], sample: Sample) -> list[dict[str, object]]:
    """A row per method, of the network of a run; references are the maps to compare with, by method."""
    network, metrics = known.from_run(folder), read_metrics(folder)
    chosen = metrics.loc[chosen_epoch(metrics)]
    kind, seed = folder.name.split("_seed")
    random = insertion_minus_deletion(network, maps_of(network, sample, "randomcam"), sample)
    rows = []
    for method in METHODS:
        maps = maps_of(network, sample, method)
        rows.append({
            "kind": kind, "seed": int(seed), "method": method,
            "accuracy": chosen["test_accuracy"], "parameters": int(chosen["evaluation_parameters"]),
            "undefined": int((~maps.defined).sum()),
            "difference": np.mean([difference(maps, other) for other in references[method]]),
            "energy": energy(maps, sample),
            "faithfulness": insertion_minus_deletion(network, maps, sample) - random,
        })  # fmt: skip
    return rows


def complete(results: Path) -> list[int]:
    """The seeds of which all networks are trained to the end."""
    return [
        seed
        for seed in runs_of(KINDS[-1], results)
        if all(finished(results / f"{kind}_seed{seed}") for kind in KINDS)
    ]


def runs_of(kind: str, results: Path) -> dict[int, Path]:
    """The runs of a kind, by their seeds: folders called KIND_seedN."""
    named = ((re.fullmatch(rf"{re.escape(kind)}_seed(\d+)", path.name), path) for path in results.glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def finished(run: Path) -> bool:
    """Whether a run is trained to the end, and has its weights."""
    if not (run / "checkpoint.pt").is_file():
        return False
    options = read_options(run)
    return "epochs" in options and epochs_done(run) >= epochs_planned(options)

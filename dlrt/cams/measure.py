"""A network's maps beside those of the reference: a row of numbers for each picture and target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from dlrt.cams import Maps, explain
from dlrt.cams.build_networks import Candidate, describe
from dlrt.cams.compare import in_boxes, similarity
from dlrt.cams.faithfulness import MEASURES, faithfulness
from dlrt.cams.load_pictures import batches
from dlrt.cams.networks import Network
from dlrt.cams.pictures import Picture
from dlrt.cams.targets import of_classes


@dataclass(frozen=True)
class Settings:
    """How maps are made: the layer, the batch size, and whether they are tested."""

    layer: str
    batch_size: int
    faithfulness: bool


def make_maps(
    network: Network,
    pictures: Sequence[Picture],
    classes: Sequence[int] | None,
    method: str,
    settings: Settings,
) -> Maps:
    """Maps of all pictures, in batches, of given classes or of the predicted ones."""
    parts = []
    for part in batches(len(pictures), settings.batch_size, [method]):
        targets = of_classes([number] for number in classes[part]) if classes is not None else None
        x = network.images(pictures[part])
        parts.append(explain(network.model, x, targets, method, settings.layer, seed=part.start))
    return Maps(
        raw=np.concatenate([maps.raw for maps in parts]),
        displayed=np.concatenate([maps.displayed for maps in parts]),
        logits=torch.cat([maps.logits for maps in parts]).cpu(),
        milliseconds={},  # times of networks that were not called in turn tell little
    )


def measure(
    candidate: Candidate, pictures: Sequence[Picture], reference: Maps, settings: Settings
) -> tuple[pd.DataFrame, Maps]:
    """A row per picture for the class that the reference predicts ("same"), and the maps of these.

    Where the network predicts another class there is a row for that, too ("own"). Both are compared with the
    reference's map of what it predicts itself. Faithfulness, pointing and energy are of "same" only.
    """
    network = candidate.network
    asked = reference.logits.argmax(1).tolist()
    same = make_maps(network, pictures, asked, candidate.method, settings)
    predicted = same.logits.argmax(1).tolist()
    own = _own_maps(candidate, pictures, asked, predicted, settings)
    tested = _faithfulness(network, pictures, same.displayed, asked, settings)
    rows = []
    for index, picture in enumerate(pictures):
        maps = same.raw[index], same.displayed[index]
        reference_maps = reference.raw[index], reference.displayed[index]
        about = _about(network, picture, predicted[index], asked[index])
        boxes = in_boxes(maps[1], picture.boxes_of(asked[index]), (picture.image.height, picture.image.width))
        first = {**about, "target": "same", "class": about["reference_predicted"]}
        first |= _compared(maps, reference_maps)
        rows.append({**first, **boxes, **{name: values[index] for name, values in tested.items()}})
        if index in own:
            second = {**about, "target": "own", "class": about["predicted"]}
            rows.append({**second, **_compared(own[index], reference_maps)})
    table = pd.DataFrame(rows)
    for position, (name, value) in enumerate(describe(candidate).items()):
        table.insert(position, name, value)
    return table, same


def _own_maps(
    candidate: Candidate,
    pictures: Sequence[Picture],
    asked: Sequence[int],
    predicted: Sequence[int],
    settings: Settings,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The raw and the displayed map of the predicted class where another was asked for, by the index."""
    differing = [index for index, (a, b) in enumerate(zip(asked, predicted, strict=True)) if a != b]
    if not differing:
        return {}
    others, classes = [pictures[index] for index in differing], [predicted[index] for index in differing]
    maps = make_maps(candidate.network, others, classes, candidate.method, settings)
    return {index: (maps.raw[place], maps.displayed[place]) for place, index in enumerate(differing)}


def _about(network: Network, picture: Picture, predicted: int, asked: int) -> dict[str, str]:
    """What each row about a picture begins with; of several classes the label is the predicted one."""
    label = predicted if predicted in picture.classes else next(iter(picture.classes), None)
    return {
        "file": picture.name,
        "label": "" if label is None else network.classes[label],
        "predicted": network.classes[predicted],
        "reference_predicted": network.classes[asked],
    }


def _compared(
    maps: tuple[np.ndarray, np.ndarray], reference_maps: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """How alike two pairs of a raw and a displayed map are, the raw ones by columns that end in _raw."""
    (raw, displayed), (reference_raw, reference_displayed) = maps, reference_maps
    return {
        "defined": bool(np.isfinite(displayed).all()),
        "largest_difference": float(np.abs(displayed - reference_displayed).max()),
        **{f"{name}_raw": value for name, value in similarity(raw, reference_raw).items()},
        **similarity(displayed, reference_displayed),
    }


def _faithfulness(
    network: Network,
    pictures: Sequence[Picture],
    shown: np.ndarray,
    classes: Sequence[int],
    settings: Settings,
) -> dict[str, np.ndarray]:
    if not settings.faithfulness:
        return {name: np.full(len(pictures), np.nan) for name in MEASURES}
    parts = []
    for part in batches(len(pictures), settings.batch_size):
        parts.append(faithfulness(network.model, network.images(pictures[part]), shown[part], classes[part]))
    return {name: np.concatenate([scores[name] for scores in parts]) for name in MEASURES}

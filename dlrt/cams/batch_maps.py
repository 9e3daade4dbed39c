"""Maps of a batch of pictures by several networks and methods: their files, numbers and figure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlrt.cams import CLASSLESS, Maps, explain
from dlrt.cams.compare import pearson
from dlrt.cams.figure import Cell, Row
from dlrt.cams.guided import guided_gradients, visible
from dlrt.cams.networks import Network
from dlrt.cams.pictures import Picture, PictureError, overlay, read_labels
from dlrt.cams.targets import of_classes
from dlrt.checkpoint import atomic_write
from dlrt.errors import KEPT

LEAST = 256  # pixels of the longer side of what is drawn
Classes = tuple[int, ...]  # what a map explains: a class, or the sum of several


@dataclass(frozen=True)
class Wanted:
    """A picture, the classes that a map of it explains, and what the files of the map are called."""

    picture: Picture
    classes: Classes
    name: str


def chosen_classes(
    texts: Sequence[str] | None, network: Network, paths: Sequence[Path]
) -> dict[str, list[Classes]] | None:
    """What to explain of each file, None for the predicted class; ValueError where a class is unknown."""
    if texts is None:
        return None
    chosen: dict[str, list[Classes]] = {path.name: [] for path in paths}
    for text in texts:
        if Path(text).is_file():
            labels = read_labels(Path(text), network.class_number)
            lines = {name: [classes for classes, _ in entries if classes] for name, entries in labels.items()}
        elif text.endswith(".csv"):
            raise PictureError(f"--targets: there is no {text}")
        else:
            classes = tuple(dict.fromkeys(network.class_number(part) for part in text.split(",")))
            lines = {name: [classes] for name in chosen}
        if missing := [name for name in chosen if not lines.get(name)]:
            raise PictureError(
                f"--targets {text} names no class for {', '.join(missing)}: add a line for each"
            )
        for name, targets in chosen.items():
            targets += lines[name]
    return {name: list(dict.fromkeys(targets)) for name, targets in chosen.items()}


def wanted(
    network: Network, pictures: Sequence[Picture], chosen: dict[str, list[Classes]] | None
) -> list[Wanted]:
    """What is to be explained of each picture: what was chosen, or the class that the network predicts."""
    if chosen is None:
        with torch.no_grad():
            predicted = network.model(network.images(pictures)).argmax(1).tolist()
        chosen = {picture.name: [(number,)] for picture, number in zip(pictures, predicted, strict=True)}
    found = []
    for picture in pictures:
        several = len(chosen[picture.name]) > 1
        for classes in chosen[picture.name]:
            numbers = "+".join(map(str, classes))
            found.append(Wanted(picture, classes, f"{picture.name}.{numbers}" if several else picture.name))
    return found


def explained(
    nets: Sequence[Network],
    pictures: Sequence[Picture],
    chosen: dict[str, list[Classes]] | None,
    layer: str,
    seed: int,
    args: argparse.Namespace,
) -> tuple[list[dict[str, object]], list[Row]]:
    """Explain a batch of pictures, write the files of each map and print its line.

    What comes back are the rows of cams.csv and those of the figure.
    """
    items = wanted(nets[0], pictures, chosen)
    shown, targets = [item.picture for item in items], of_classes(item.classes for item in items)
    table, rows = [], [figure_row(item, nets[0]) for item in items]
    for method in args.method:
        first = None
        for net, label in zip(nets, labels(nets), strict=True):
            x = net.images(shown)
            maps = explain(net.model, x, targets, method, layer, args.aug_smooth, args.eigen_smooth, seed)
            first = first or maps
            gradients = guided_gradients(net.model, x, targets) if args.guided else [None] * len(items)
            for index, item in enumerate(items):
                record = numbers(item, index, maps, first, net, method)
                name = ".".join(filter(None, [item.name, method if len(args.method) > 1 else "", label]))
                write_map(args.output_dir / f"{name}.cam.png", item.picture, maps, index, gradients[index])
                print(line(record, args.output_dir / f"{name}.cam.png"), flush=True)
                table.append(record)
                changed = maps.logits[index].argmax() != first.logits[index].argmax()
                about = (
                    record["predicted"],
                    bool(changed),
                    record["target_probability"],
                    record["correlation"],
                )
                rows[index].cells.append(Cell(maps.displayed[index], *about))
    return table, rows


def labels(nets: Sequence[Network]) -> list[str]:
    """What tells the files of networks apart; where one was cut alone, its files have the plain name."""
    return [""] if len(nets) == 1 else [nets[0].label, ""] if len(nets) == 2 else [net.label for net in nets]


def figure_row(item: Wanted, network: Network) -> Row:
    image = item.picture.enlarged(LEAST).image.convert("RGB")
    image.thumbnail((2 * LEAST, 2 * LEAST))
    target = " + ".join(network.classes[number] for number in item.classes)
    return Row(np.asarray(image, dtype=np.float32) / 255, item.picture.name, target, [])


def write_map(path: Path, picture: Picture, maps: Maps, index: int, gradient: np.ndarray | None) -> None:
    """The map over the picture, the map itself, and with a gradient their product."""
    picture, shown = picture.enlarged(LEAST), maps.displayed[index]
    arrays = {"raw": maps.raw[index], "displayed": shown}
    save_png(path, Image.fromarray(overlay(picture.pixels(), shown)))
    if gradient is not None:
        arrays["guided"] = gradient * shown[..., None]
        product = Image.fromarray(visible(arrays["guided"])).resize(picture.image.size)
        save_png(path.with_suffix("").with_suffix(".guided.png"), product)
    atomic_write(path.with_suffix(".npz"), partial(np.savez_compressed, **arrays), KEPT)


def save_png(path: Path, image: Image.Image) -> None:
    atomic_write(path, partial(image.save, format="PNG"), KEPT)


def line(record: dict[str, object], path: Path) -> str:
    """A line about a map: picture, network, prediction, what it explains, and its file."""
    about = "map of the picture" if record["method"] in CLASSLESS else f"map of {record['target']}"
    about += f" ({record['target_probability']:.3f})"
    if not record["defined"]:
        about += ": undefined, nothing speaks for it, and the picture is left bare"
    elif np.isfinite(record["correlation"]):
        about += f", r = {record['correlation']:.3f}"
    return f"{record['file']}: {record['predicted']} {record['probability']:.3f}, {about}; {path}"


def numbers(
    item: Wanted, index: int, maps: Maps, first: Maps, network: Network, method: str
) -> dict[str, object]:
    """A row of cams.csv: prediction, target, what the map is like, and times."""
    probabilities, raw = maps.probabilities[index], maps.raw[index]
    predicted = int(maps.logits[index].argmax())  # probabilities may be equal where logits differ
    shown, defined = maps.displayed[index], bool(maps.defined[index])
    height, width = shown.shape
    peak = np.unravel_index(np.argmax(shown), shown.shape) if defined else (np.nan, np.nan)
    image = item.picture.image
    return {
        "file": item.picture.name,
        "network": network.label,
        "method": method,
        "predicted": network.classes[predicted],
        "probability": float(probabilities[predicted]),
        "target": " + ".join(network.classes[number] for number in item.classes),
        "target_probability": float(probabilities[list(item.classes)].sum()),
        "correlation": np.nan
        if maps is first
        else float(pearson(shown[None], first.displayed[index : index + 1])[0]),
        "defined": defined,
        "raw_min": raw.min(),
        "raw_max": raw.max(),
        "raw_sum": raw.sum(),
        "share_above_half": float((shown >= 0.5).mean()) if defined else np.nan,
        "peak_x": (peak[1] + 0.5) / width * image.width,
        "peak_y": (peak[0] + 0.5) / height * image.height,
        **{f"{stage}_ms": milliseconds for stage, milliseconds in maps.milliseconds.items()},
    }

"""Where pictures come from: the test split of a data set, or files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dlrt import errors
from dlrt.cams.networks import Network
from dlrt.cams.pictures import Labels, Picture, PictureError, files, labelled, read, read_labels
from dlrt.cluttered_digits import EASY, HARD, held_out
from dlrt.datasets import DATASETS, load

LAYOUTS = {"clutter": EASY, "hard_clutter": HARD}  # of the data sets whose boxes are known


def pictures_of(source: str, count: int, data_dir: Path, network: Network) -> tuple[list[Picture], bool]:
    """The first `count` pictures, and whether one could not be read; that is told on stderr.

    A data set is named DATASET-test. In a folder, labels.csv names classes and boxes where it is there; a
    class that the network does not have is left out. PictureError where there are no pictures.
    """
    name = source.removesuffix("-test")
    if source.endswith("-test") and name in DATASETS:
        return _of_dataset(name, count, data_dir), False
    folder = Path(source)
    table = folder / "labels.csv"
    paths, labels = files(folder), _labels(table, network) if table.is_file() else {}
    if strange := sorted(labels.keys() - {path.name for path in paths}):
        print(f"{table}: there is no picture {', '.join(strange)}", file=sys.stderr)
    paths = paths[:count]
    pictures, failed = readable(paths, labels)
    if not pictures:
        raise PictureError(f"no picture in {folder} can be read")
    return pictures, failed


def _labels(table: Path, network: Network) -> Labels:
    unknown = {}

    def number(text: str) -> int | None:
        try:
            return network.class_number(text)
        except ValueError:
            unknown[text] = True
            return None

    labels = read_labels(table, number)
    if unknown:
        print(f"{table}: {network.label} has no class {', '.join(unknown)}: left out", file=sys.stderr)
    return labels


def readable(paths: Sequence[Path], labels: Labels | None = None) -> tuple[list[Picture], bool]:
    """The pictures that can be read, with their labels, and whether one could not; that is told on stderr."""
    pictures = []
    for path in paths:
        try:
            pictures.append(labelled(read(path), labels or {}))
        except PictureError as error:
            errors.report(error)
    return pictures, len(pictures) < len(paths)


def batches(count: int, size: int, methods: Sequence[str] = ()) -> Iterator[slice]:
    """Where the batches of so many pictures lie; RandomCAM draws for each alone, so that size has no part."""
    size = 1 if "randomcam" in methods else size
    return (slice(start, start + size) for start in range(0, count, size))


def digest(pictures: Sequence[Picture]) -> str:
    """Twelve letters that change with pictures, their names, classes and boxes."""
    sums = hashlib.sha256()
    for picture in pictures:
        image = picture.image
        about = picture.name, image.mode, image.size, picture.shows
        sums.update(repr(about).encode() + image.tobytes())
    return sums.hexdigest()[:12]


def _of_dataset(name: str, count: int, data_dir: Path) -> list[Picture]:
    dataset = load(name, data_dir, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = ((dataset.test.images[:count] * std + mean) * 255).round().to(torch.uint8)
    boxes = held_out(LAYOUTS[name]).boxes if name in LAYOUTS else ()
    pictures = []
    for number, (image, label) in enumerate(zip(pixels, dataset.test.labels.tolist(), strict=False)):
        array = image.permute(1, 2, 0).numpy().squeeze()
        shows = ((label,), (tuple(boxes[number].tolist()),) if len(boxes) else ())
        image = Image.fromarray(np.ascontiguousarray(array))
        pictures.append(Picture(f"{name}_{number:05d}", image, (shows,)))
    return pictures

"""Where the pictures of a comparison come from: the test split of a data set, or a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from networks import Network
from PIL import Image

from dlrt.cams.pictures import Picture, PictureError, files, labelled, read, read_labels
from dlrt.clutter import clutter
from dlrt.data import DATASETS, load


def pictures_of(source: str, count: int, data_dir: Path, network: Network) -> tuple[list[Picture], bool]:
    """The first `count` pictures, and whether one could not be read; that is told on stderr.

    A data set is named DATASET-test. In a folder, labels.csv names classes and boxes where it is there.
    PictureError where there are no pictures.
    """
    name = source.removesuffix("-test")
    if source.endswith("-test") and name in DATASETS:
        return _of_dataset(name, count, data_dir), False
    folder, failed = Path(source), False
    paths = files(folder)[:count]
    table = folder / "labels.csv"
    labels = read_labels(table, network.class_number) if table.is_file() else {}
    pictures = []
    for path in paths:
        try:
            pictures.append(labelled(read(path), labels))
        except PictureError as error:
            print(f"compare_cams.py: {error}", file=sys.stderr)
            failed = True
    if not pictures:
        raise PictureError(f"no picture in {folder} can be read")
    return pictures, failed


def _of_dataset(name: str, count: int, data_dir: Path) -> list[Picture]:
    dataset = load(name, data_dir, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = ((dataset.test.images[:count] * std + mean) * 255).round().to(torch.uint8)
    boxes = clutter(500, seed=0, test=True).boxes if name == "clutter" else ()
    pictures = []
    for number, (image, label) in enumerate(zip(pixels, dataset.test.labels.tolist(), strict=False)):
        array = image.permute(1, 2, 0).numpy().squeeze()
        its = (tuple(boxes[number].tolist()),) if len(boxes) else ()
        pictures.append(
            Picture(f"{name}_{number:05d}", Image.fromarray(np.ascontiguousarray(array)), (label,), its)
        )
    return pictures

"""Pictures and labels as a data set: checked, normalised, and split."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from dlrt.data import Dataset, Split
from dlrt.data_files import Arrays
from dlrt.errors import DataError


def picture_set(
    name: str, arrays: Arrays, seed: int, validation: int, shift: int = 2, flip: bool = False
) -> Dataset:
    """Normalise by the training images' mean and deviation, and set part of them aside for validation.

    shift and flip: what `--augment` may do to a picture, see `Dataset`.
    """
    images, labels, test_images, test_labels = arrays = tuple(map(torch.as_tensor, arrays))
    for part, part_labels in ((images, labels), (test_images, test_labels)):
        if len(part) != len(part_labels):
            raise DataError(
                f"{name}: as many labels as images are needed, got {len(part_labels)} for {len(part)}"
            )
    if len(images) <= validation:
        raise DataError(f"{name}: more than {validation} training images are needed, got {len(images)}")
    if len(test_images) == 0:
        raise DataError(f"{name}: test images are needed, got none")
    _check(name, arrays)
    pixels = images.float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    if std.min() < 1e-5:  # of a constant one it is at rounding
        raise DataError(
            f"{name}: every channel must vary over the training images, channel {int(std.argmin())} does "
            "not: leave it out, or look at how the file was made"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def split(part: Tensor, part_labels: Tensor) -> Split:
        return Split((part.float() / 255 - mean[:, None, None]) / std[:, None, None], part_labels.long())

    train, held_out = order[validation:], order[:validation]
    return Dataset(
        name=name,
        train=split(images[train], labels[train]),
        validation=split(images[held_out], labels[held_out]),
        test=split(test_images, test_labels),
        classes=int(labels.max()) + 1,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        shift=shift,
        flip=flip,
        checksum=_checksum(arrays),
    )


def _checksum(arrays: Arrays) -> str:
    found = 0
    for array, kind in zip(arrays, 2 * (torch.uint8, torch.int64), strict=True):
        found = zlib.crc32(array.to(kind).contiguous().numpy(), found)
    return f"{found:08x}"


def _check(name: str, arrays: Arrays) -> None:
    """DataError where arrays are no pictures of one shape, or not every class has one to train on."""
    images, labels, test_images, test_labels = arrays
    for kind, part, part_labels in (("training", images, labels), ("test", test_images, test_labels)):
        told = f"{name}, {kind} data"
        if part.shape[1] not in (1, 3):
            raise DataError(
                f"{told}: images must have 1 channel or 3, which come last in an .npz file, got "
                f"{part.shape[1]}: transpose them"
            )
        if part.dtype != torch.uint8 or part.shape[1:] != images.shape[1:]:
            raise DataError(
                f"{told}: pixels must be uint8 from 0 to 255 in images of {tuple(images.shape[1:])} as in "
                f"training, got {part.dtype} and {tuple(part.shape[1:])}: convert them"
            )
        if part_labels.is_floating_point() or part_labels.is_complex() or part_labels.dim() != 1:
            shape = tuple(part_labels.shape)
            raise DataError(
                f"{told}: labels must be whole numbers (N,), got {part_labels.dtype} {shape}: convert them"
            )
    classes, tested = (set(part_labels.tolist()) for part_labels in (labels, test_labels))
    if classes != set(range(len(classes))):
        raise DataError(
            f"{name}: training labels must be 0, 1, 2, ... without a gap, got {len(classes)} classes from "
            f"{min(classes)} to {max(classes)}: number them anew"
        )
    if unknown := sorted(tested - classes):
        raise DataError(
            f"{name}: classes of the test need training images, got none of {', '.join(map(str, unknown))}: "
            "add some, or leave these classes out"
        )

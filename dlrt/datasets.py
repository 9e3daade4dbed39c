"""MNIST, CIFAR-10, the digits bundled with scikit-learn, and those in clutter.

One function each, the same return type. All are small enough to live in memory as one tensor, so a batch is
one indexing operation and no loader fetches single samples.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlrt.cluttered_digits import HARD, Clutter, clutter, held_out
from dlrt.data import Dataset, Split
from dlrt.errors import DataError, one_line
from dlrt.text import stdlib, text

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR10_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
Arrays = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # training images (N, C, H, W) uint8, labels (N,); the same of the test


def load(name: str, folder: Path, seed: int) -> Dataset:
    """The data set of that name in `DATASETS` or `TEXTS`; the seed draws the validation split."""
    dataset = (DATASETS | TEXTS)[name](folder, seed)
    if dataset.name != name:  # a checkpoint names its data
        raise DataError(f"a data set must be called what its key is, {name}, got {dataset.name!r}")
    return dataset


def mnist(folder: Path, seed: int) -> Dataset:
    """MNIST: 50,000 / 10,000 / 10,000 digits of 28 x 28 pixels.

    Read from folder/MNIST/raw or folder/mnist.npz, downloaded where neither is there. DataError if that
    fails.
    """
    import torchvision.datasets as tv  # here, since it takes as long to import as the digits to train on
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw, npz = folder / "MNIST" / "raw", folder / "mnist.npz"
    idx_files_are_there = all((raw / name).is_file() for names in MNIST_FILES.values() for name in names)
    if not idx_files_are_there and npz.is_file():  # a failed download leaves an empty folder behind
        return _split("mnist", _read_npz(npz), seed, validation=10_000)
    if not idx_files_are_there:
        files = ", ".join(name for names in MNIST_FILES.values() for name in names)
        _download(lambda: tv.MNIST(folder, download=True), raw, f"{files} in {raw}, or {npz}")
    arrays = []
    for images, labels in MNIST_FILES.values():
        arrays.append(_read(read_image_file, raw / images)[:, None])
        arrays.append(_read(read_label_file, raw / labels))
    return _split("mnist", tuple(arrays), seed, validation=10_000)


def cifar10(folder: Path, seed: int) -> Dataset:
    """CIFAR-10: 45,000 / 5,000 / 10,000 pictures of 3 x 32 x 32.

    Read from folder/cifar-10-batches-py or folder/cifar10.npz, downloaded where neither is there. DataError
    if that fails.
    """
    import torchvision.datasets as tv
    from torchvision.datasets.utils import check_integrity

    batches, npz = folder / "cifar-10-batches-py", folder / "cifar10.npz"
    split = partial(_split, "cifar10", seed=seed, validation=5_000, shift=4, flip=True)
    if not batches.is_dir() and npz.is_file():
        return split(_read_npz(npz))
    if not batches.is_dir():
        files = f"{', '.join((*CIFAR10_FILES, 'test_batch'))} in {batches}, or {npz}"
        _download(lambda: tv.CIFAR10(folder, download=True), folder, files)
    for name, md5 in (*tv.CIFAR10.train_list, *tv.CIFAR10.test_list):
        if not check_integrity(batches / name, md5):
            raise DataError(f"{batches / name} is missing or damaged: delete {batches} and fetch it again")
    arrays = []
    for train in (True, False):
        part = tv.CIFAR10(folder, train=train)
        arrays += [torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)]
    return split(tuple(arrays))


def digits(folder: Path | None, seed: int) -> Dataset:
    """The 1,797 handwritten digits bundled with scikit-learn, 8 x 8 pixels made 28 x 28; needs no folder.

    1,077 / 360 / 360; the last 360 in scikit-learn's order are the test.
    """
    return _split("digits", _bundled_digits(28, test=360), seed, validation=360)


def digits32(folder: Path | None, seed: int) -> Dataset:
    """250 of the bundled digits in the shape of CIFAR-10, 3 x 32 x 32, to try its networks; needs no folder.

    150 / 50 / 50; the last 50 are the test.
    """
    images, labels, test_images, test_labels = _bundled_digits(32, test=50)
    images, test_images = (part.expand(-1, 3, -1, -1) for part in (images[:200], test_images))
    arrays = images, labels[:200], test_images, test_labels
    return _split("digits32", arrays, seed, validation=50, shift=4)


def _bundled_digits(size: int, test: int) -> Arrays:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8), torch.from_numpy(labels)
    return images[:-test], labels[:-test], images[-test:], labels[-test:]


def digits_in_clutter(folder: Path | None, seed: int) -> Dataset:
    """4,000 / 500 / 500 `cluttered_digits` of 32 x 32 pixels, made on the spot; needs no folder."""
    return _split("clutter", _arrays(clutter(4500, seed=0), held_out()), seed, validation=500)


def digits_in_hard_clutter(folder: Path | None, seed: int) -> Dataset:
    """1,000 / 300 / 500 harder ones of 20 x 20 pixels, for a study of many small networks."""
    made = _arrays(clutter(1300, seed=0, layout=HARD), held_out(HARD))
    return _split("hard_clutter", made, seed, validation=300)


def _arrays(trained: Clutter, test: Clutter) -> Arrays:
    return tuple(
        torch.from_numpy(array) for part in (trained, test) for array in (part.images[:, None], part.labels)
    )


DATASETS: dict[str, Callable[[Path, int], Dataset]] = {
    "mnist": mnist,
    "cifar10": cifar10,
    "digits": digits,
    "digits32": digits32,
    "clutter": digits_in_clutter,
    "hard_clutter": digits_in_hard_clutter,
}
TEXTS: dict[str, Callable[[Path, int], Dataset]] = {"stdlib": stdlib, "text": text}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASS_NAMES = {"cifar10": CIFAR10_CLASSES}  # of the others a class's number is its name


def _split(
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
    )


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


def _read(reader: Callable, path: Path):
    try:
        return reader(str(path))
    except Exception as error:  # the readers fail in many ways on damaged bytes; whichever it was, it is told
        reason = f"{type(error).__name__} {error}".strip()
        raise DataError(f"{path} is damaged ({reason}): delete it and fetch it again") from error


def _read_npz(path: Path) -> Arrays:
    """x_train, y_train, x_test, y_test as Keras writes them: (N, H, W[, C]) uint8, labels (N,) or (N, 1)."""

    keys = "x_train", "y_train", "x_test", "y_test"

    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(name) as file:
            return {key: file[key] for key in keys if key in file}

    if not path.is_file():
        raise DataError(f"{path} is not there: put it there, or name its folder with --data-dir or DLRT_DATA")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is damaged (not an .npz file, or cut short): delete it and fetch it again")
    found = _read(read, path)
    if missing := [key for key in keys if key not in found]:
        raise DataError(f"{path} must hold {', '.join(keys)}, but lacks {', '.join(missing)}")
    if strange := [key for key in keys if found[key].dtype.kind not in "biuf"]:
        raise DataError(f"{path}: {', '.join(strange)} must hold numbers, got {found[strange[0]].dtype}")
    arrays = [torch.from_numpy(found[key]) for key in keys]
    for i, key in ((0, "train"), (2, "test")):
        images, labels = arrays[i : i + 2]
        if (
            images.dim() not in (3, 4)
            or 0 in images.shape[1:]
            or labels.dim() == 0
            or labels.shape[1:] not in ((), (1,))
        ):
            raise DataError(
                f"{path}: x_{key} must be (N, height, width[, channels]) and y_{key} (N,) or (N, 1), got "
                f"{tuple(images.shape)} and {tuple(labels.shape)}: reshape them"
            )
        arrays[i] = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        arrays[i + 1] = labels.flatten()
    return tuple(arrays)


def _download(fetch: Callable, into: Path, needed: str) -> None:
    missing = [folder for folder in (into, *into.parents) if not folder.exists()]
    try:
        fetch()
    except Exception as error:  # no network, no mirror, no space: whichever it was, it is told
        for folder in missing:  # it may be a name with a slip
            with suppress(OSError):
                folder.rmdir()
        raise DataError(
            f"needed: {needed}; downloading them failed ({one_line(str(error))}). Put them there "
            "(--data-dir or DLRT_DATA name another data folder), or take --dataset digits, which needs none"
        ) from error

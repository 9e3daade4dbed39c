"""MNIST, CIFAR-10, the digits bundled with scikit-learn, and those in clutter.

One function each, the same return type. All are small enough to live in memory as one tensor, so a batch is
one indexing operation and no loader fetches single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dlrt.cluttered_digits import HARD, Clutter, clutter, held_out
from dlrt.data import Dataset
from dlrt.data_files import Arrays, download, read_npz, read_with
from dlrt.errors import DataError
from dlrt.picture_sets import picture_set
from dlrt.text import stdlib, text

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR10_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))


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
        return picture_set("mnist", read_npz(npz), seed, validation=10_000)
    if not idx_files_are_there:
        files = ", ".join(name for names in MNIST_FILES.values() for name in names)
        download(lambda: tv.MNIST(folder, download=True), raw, f"{files} in {raw}, or {npz}")
    arrays = []
    for images, labels in MNIST_FILES.values():
        arrays.append(read_with(read_image_file, raw / images)[:, None])
        arrays.append(read_with(read_label_file, raw / labels))
    return picture_set("mnist", tuple(arrays), seed, validation=10_000)


def cifar10(folder: Path, seed: int) -> Dataset:
    """CIFAR-10: 45,000 / 5,000 / 10,000 pictures of 3 x 32 x 32.

    Read from folder/cifar-10-batches-py or folder/cifar10.npz, downloaded where neither is there. DataError
    if that fails.
    """
    import torchvision.datasets as tv
    from torchvision.datasets.utils import check_integrity

    batches, npz = folder / "cifar-10-batches-py", folder / "cifar10.npz"
    as_data_set = partial(picture_set, "cifar10", seed=seed, validation=5_000, shift=4, flip=True)
    if not batches.is_dir() and npz.is_file():
        return as_data_set(read_npz(npz))
    if not batches.is_dir():
        files = f"{', '.join((*CIFAR10_FILES, 'test_batch'))} in {batches}, or {npz}"
        download(lambda: tv.CIFAR10(folder, download=True), folder, files)
    for name, md5 in (*tv.CIFAR10.train_list, *tv.CIFAR10.test_list):
        if not check_integrity(batches / name, md5):
            raise DataError(f"{batches / name} is missing or damaged: delete {batches} and fetch it again")
    arrays = []
    for train in (True, False):
        part = tv.CIFAR10(folder, train=train)
        arrays += [torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)]
    return as_data_set(tuple(arrays))


def digits(folder: Path | None, seed: int) -> Dataset:
    """The 1,797 handwritten digits bundled with scikit-learn, 8 x 8 pixels made 28 x 28; needs no folder.

    1,077 / 360 / 360; the last 360 in scikit-learn's order are the test.
    """
    return picture_set("digits", _bundled_digits(28, test=360), seed, validation=360)


def digits32(folder: Path | None, seed: int) -> Dataset:
    """250 of the bundled digits in the shape of CIFAR-10, 3 x 32 x 32, to try its networks; needs no folder.

    150 / 50 / 50; the last 50 are the test.
    """
    images, labels, test_images, test_labels = _bundled_digits(32, test=50)
    images, test_images = (part.expand(-1, 3, -1, -1) for part in (images[:200], test_images))
    arrays = images, labels[:200], test_images, test_labels
    return picture_set("digits32", arrays, seed, validation=50, shift=4)


def _bundled_digits(size: int, test: int) -> Arrays:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8), torch.from_numpy(labels)
    return images[:-test], labels[:-test], images[-test:], labels[-test:]


def digits_in_clutter(folder: Path | None, seed: int) -> Dataset:
    """4,000 / 500 / 500 `cluttered_digits` of 32 x 32 pixels, made on the spot; needs no folder.

    Training and validation are other pictures of the same handwritten digits, the test is of digits of its
    own.
    """
    return picture_set("clutter", _arrays(clutter(4500, seed=0), held_out()), seed, validation=500)


def digits_in_hard_clutter(folder: Path | None, seed: int) -> Dataset:
    """1,000 / 300 / 500 harder ones of 20 x 20 pixels, for a study of many small networks; of such digits."""
    made = _arrays(clutter(1300, seed=0, layout=HARD), held_out(HARD))
    return picture_set("hard_clutter", made, seed, validation=300)


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

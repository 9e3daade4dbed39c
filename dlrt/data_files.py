"""Files of data: read, fetched, and what is said where that fails."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrt.errors import DataError, one_line

# training images (N, C, H, W) uint8, labels (N,); the same of the test
Arrays = tuple[Tensor, Tensor, Tensor, Tensor]


def read_with(reader: Callable[[str], Any], path: Path) -> Any:
    """What a reader makes of a file; DataError where it fails."""
    try:
        return reader(str(path))
    except Exception as error:  # the readers fail in many ways on damaged bytes; whichever it was, it is told
        reason = f"{type(error).__name__} {error}".strip()
        raise DataError(f"{path} is damaged ({reason}): delete it and fetch it again") from error


def read_npz(path: Path) -> Arrays:
    """x_train, y_train, x_test, y_test as Keras writes them: (N, H, W[, C]) uint8, labels (N,) or (N, 1)."""
    keys = "x_train", "y_train", "x_test", "y_test"

    def known(name: str) -> dict[str, np.ndarray]:
        with np.load(name) as file:
            return {key: file[key] for key in keys if key in file}

    if not path.is_file():
        raise DataError(f"{path} is not there: put it there, or name its folder with --data-dir or DLRT_DATA")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is damaged (not an .npz file, or cut short): delete it and fetch it again")
    found = read_with(known, path)
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


def download(fetch: Callable[[], object], into: Path, needed: str) -> None:
    """Fetch files; where that fails, DataError names those needed, and no empty folder is left behind."""
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

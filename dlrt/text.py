"""Text as bytes, in windows: the sources of Python's own standard library, or files of one's own."""

from __future__ import annotations

import sysconfig
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dlrt.data import Dataset, Split
from dlrt.errors import DataError

WINDOW = 128  # bytes
MOST = 1_800_000  # bytes of the standard library, of which five in six are for training
PIECE = 20_000  # bytes: longer files of one's own are several documents


def stdlib(folder: Path | None, seed: int) -> Dataset:
    """The modules of Python's standard library that are one file: 1.5 MB / 150 kB / 150 kB; needs no folder.

    Which modules these are, and what is in them, depends on the version of Python.
    """
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return _split("stdlib", [path.read_bytes() for path in paths], seed, MOST)


def text(folder: Path, seed: int) -> Dataset:
    """All files *.txt below the data folder, ten twelfths / a twelfth / a twelfth of them.

    DataError where there is no such folder, or they are too short for a window in every split.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir must be a folder with *.txt files, got {folder}")
    files = [path.read_bytes() for path in sorted(folder.rglob("*.txt")) if path.is_file()]
    pieces = [file[start : start + PIECE] for file in files for start in range(0, len(file), PIECE)]
    return _split("text", pieces, seed, sum(map(len, pieces)), f", *.txt below {folder}")


def _split(name: str, documents: Sequence[bytes], seed: int, most: int, where: str = "") -> Dataset:
    """Whole documents for each split; the test is the same for every seed."""
    whole = min(most, sum(map(len, documents)))
    test, rest = _take(_shuffled(documents, 0), whole // 12)
    validation, rest = _take(_shuffled(rest, seed), whole // 12)
    train, _ = _take(rest, whole - 2 * (whole // 12))
    if min(map(len, (test, validation, train))) <= WINDOW:
        raise DataError(
            f"{name}: each of three splits needs whole documents of more than {WINDOW} bytes, got "
            f"{len(documents)} of {whole} bytes in all{where}: add some"
        )
    splits = map(_windows, (train, validation, test))
    checksum = f"{zlib.crc32(repr(documents).encode()):08x}"
    return Dataset(name, *splits, 256, (), (), shift=0, flip=False, checksum=checksum)


def _shuffled(documents: Sequence[bytes], seed: int) -> list[bytes]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[i] for i in order]


def _take(documents: Sequence[bytes], size: int) -> tuple[bytes, list[bytes]]:
    """The first documents until they have that size, as one text, and those that are left."""
    ends = list(accumulate(map(len, documents)))
    count = min(bisect_left(ends, size) + 1, len(documents)) if size else 0
    return b"".join(documents[:count]), list(documents[count:])


def _windows(content: bytes) -> Split:
    """Inputs (N, WINDOW), and as labels the byte after each; what is left at the end is left out."""
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    count = (len(tokens) - 1) // WINDOW
    return Split(*(tokens[start : start + count * WINDOW].view(count, WINDOW) for start in (0, 1)))


def as_tokens(words: str) -> Tensor:
    """A text as tokens (T,); bytes of a command line that are not UTF-8 stay what they are."""
    return torch.frombuffer(bytearray(words.encode(errors="surrogateescape")), dtype=torch.uint8).long()


def as_text(tokens: Tensor) -> str:
    """Tokens as a text; what is not UTF-8 is replaced."""
    return bytes(tokens.tolist()).decode(errors="replace")

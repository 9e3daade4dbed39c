"""Digits in clutter: handwritten digits somewhere among fragments of others, and the exact box of each.

Made of the digits bundled with scikit-learn, without a download, to see where a network looks: only the digit
tells its class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

TEST_DIGITS = 360  # the last of scikit-learn's order are for the test pictures only


@dataclass(frozen=True)
class Layout:
    """Pixels a side of a picture, a digit and a fragment; how many fragments; the faintest contrast."""

    side: int
    digit: int
    fragment: int
    fragments: int
    faintest: float


EASY, HARD = Layout(32, 14, 5, 8, 1.0), Layout(20, 10, 4, 10, 0.5)


@dataclass(frozen=True)
class Clutter:
    """Pictures (N, side, side) uint8, labels (N,) and tight boxes (N, 4): left, top, right, bottom."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def clutter(count: int, seed: int, test: bool = False, layout: Layout = EASY) -> Clutter:
    """That many pictures; the digits of training and test pictures are of different people's hands."""
    import cv2  # here, as scikit-learn below: most users of the library's data want neither
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    part = slice(-TEST_DIGITS, None) if test else slice(None, -TEST_DIGITS)
    small, labels = small[part].reshape(-1, 8, 8) * (255 / 16), labels[part]
    size = (layout.digit, layout.digit)
    digits = [cv2.resize(digit, size, interpolation=cv2.INTER_LINEAR) for digit in small]
    random = np.random.default_rng([seed, test])
    chosen = random.integers(len(digits), size=count)
    images, boxes = zip(*(_picture(digits, number, random, layout) for number in chosen), strict=True)
    return Clutter(np.stack(images), labels[chosen], np.array(boxes))


def held_out(layout: Layout = EASY) -> Clutter:
    """The test split of `datasets.digits_in_clutter`, or of `digits_in_hard_clutter`."""
    return clutter(500, seed=0, test=True, layout=layout)


def _picture(
    digits: list[np.ndarray], number: int, random: Generator, layout: Layout
) -> tuple[np.ndarray, tuple[int, ...]]:
    side, size, fragment = layout.side, layout.digit, layout.fragment
    picture = random.uniform(0, 40, size=(side, side))
    top, left = random.integers(side - size + 1, size=2)
    for _ in range(layout.fragments):
        other = digits[random.integers(len(digits))]
        row, column = random.integers(size - fragment + 1, size=2)
        piece = other[row : row + fragment, column : column + fragment]
        row, column = random.integers(side - fragment + 1, size=2)
        place = picture[row : row + fragment, column : column + fragment]
        np.maximum(place, piece, out=place)
    digit = digits[number]
    contrast = random.uniform(layout.faintest, 1) if layout.faintest < 1 else 1
    place = picture[top : top + size, left : left + size]
    # nothing of the clutter is left behind the digit: it alone is in its place
    place[:] = np.maximum(random.uniform(0, 40, size=digit.shape), contrast * digit)
    rows, columns = (np.flatnonzero((digit.round() > 64).any(axis)) for axis in (1, 0))
    box = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    return np.uint8(picture.round()), tuple(map(int, box))

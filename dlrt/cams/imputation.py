"""Pixels that are missing, filled in from those around them: ROAD's linear imputation, solved directly."""

from __future__ import annotations

import functools

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

KERNEL = np.array([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12  # how much a pixel resembles those around it


def fill(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """An image (C, H, W) in which each pixel that is not known (H, W) is the weighted mean of its neighbours.

    One sparse factorization for all channels (Rong et al. 2022, equation 3, without its noise).
    """
    weights, order = _grid(*known.shape)
    flat, known = image.reshape(len(image), -1).T.astype(np.float64), known.ravel()
    missing = order[~known[order]]
    if not len(missing):
        return image
    rows = weights[missing]
    laplacian = sparse.diags(np.asarray(rows.sum(1)).ravel()) - rows[:, missing]
    options = {"SymmetricMode": True}
    factors = splu(laplacian.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=0.0, options=options)
    flat[missing] = factors.solve(rows[:, known] @ flat[known])
    return flat.T.reshape(image.shape).astype(image.dtype)


@functools.lru_cache(maxsize=4)
def _grid(height: int, width: int) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The weights of all pixels' neighbours, and the order in which unknowns are eliminated."""
    index = np.arange(height * width).reshape(height, width)
    blocks = []
    for dy, dx in np.argwhere(KERNEL) - 1:
        ys, xs = (slice(max(0, -d), size - max(0, d)) for d, size in ((dy, height), (dx, width)))
        pixels = index[ys, xs].ravel()
        blocks.append((np.full(pixels.size, KERNEL[dy + 1, dx + 1]), pixels, pixels + dy * width + dx))
    weight, row, column = map(np.concatenate, zip(*blocks, strict=True))
    weights = sparse.csr_matrix((weight, (row, column)), shape=(index.size, index.size))
    return weights, np.concatenate(_dissected(index))


def _dissected(index: np.ndarray) -> list[np.ndarray]:
    """Nested dissection: the two halves of a grid, and then the line between them (George 1973)."""
    if index.size <= 16:
        return [index.ravel()]
    if index.shape[0] < index.shape[1]:
        return _dissected(index.T)
    middle = len(index) // 2
    return _dissected(index[:middle]) + _dissected(index[middle + 1 :]) + [index[middle].ravel()]

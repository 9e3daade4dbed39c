"""How much the maps of two networks agree, and whether a map lies where the object does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from dlrt.cams.pictures import Box

TOP = 0.2  # the share of pixels that a map's top is


def pearson(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Pearson's correlation (N,) of maps (N, H, W), NaN for those that are not finite or do not vary.

    And for all where the maps have different sizes.
    """
    if some.shape != others.shape:
        return np.full(len(some), np.nan)
    whole = [np.isfinite(maps).all((1, 2)) & (np.ptp(maps, axis=(1, 2)) > 0) for maps in (some, others)]
    with np.errstate(invalid="ignore", divide="ignore"):
        pair = (maps.astype(np.float64) / np.abs(maps).max((1, 2), keepdims=True) for maps in (some, others))
        a, b = (maps - maps.mean((1, 2), keepdims=True) for maps in pair)
        r = (a * b).sum((1, 2)) / np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))
    return np.where(whole[0] & whole[1], r.clip(-1, 1), np.nan)


def similarity(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, SSIM, and the IoU of the highest fifths of two maps (H, W).

    NaN for what is not defined: of a map that is not finite or does not vary, of maps of different sizes (raw
    ones of FullGrad beside RandomCAM's). SSIM, which knows no scale, compares the maps divided by their
    largest absolute values.
    """
    names = ("pearson", "spearman", "ssim", "iou")
    if one.shape != other.shape or not all(
        np.isfinite(values).all() and np.ptp(values) > 0 for values in (one, other)
    ):
        return dict.fromkeys(names, float("nan"))
    a, b = (np.asarray(values, dtype=np.float64) / np.abs(values).max() for values in (one, other))
    side = min(a.shape)
    window = min(7, side - 1 + side % 2)  # odd, and not larger than the map
    return {
        "pearson": float(pearson(a[None], b[None])[0]),
        "spearman": float(spearmanr(a.ravel(), b.ravel()).statistic),
        "ssim": float(structural_similarity(a, b, win_size=window, data_range=2.0))
        if window >= 3
        else np.nan,
        "iou": iou(top(a), top(b)),
    }


def top(values: np.ndarray) -> np.ndarray:
    """The highest pixels of a map, as a mask; of many that are equally lowest, none."""
    return (values >= np.quantile(values, 1 - TOP)) & (values > values.min())


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """The intersection of two masks over their union; NaN where both are empty."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else float("nan")


def in_boxes(shown: np.ndarray, boxes: Sequence[Box], size: tuple[int, int]) -> dict[str, float]:
    """Whether a map (H, W) of a picture of a size (height, width) points into a box, and its energy there.

    pointing is 1 where the middle of the highest pixel lies in a box, else 0 (Zhang et al. 2018, without
    their tolerance); energy the share of the map's sum that lies in boxes (Wang et al. 2020, Score-CAM), of a
    pixel in part the part. NaN without boxes and for an undefined map.
    """
    if not boxes or not np.isfinite(shown).all():
        return {"pointing": float("nan"), "energy": float("nan")}
    height, width = shown.shape
    scales = np.array([width / size[1], height / size[0]] * 2)
    inside = np.zeros_like(shown)
    hit = False
    row, column = np.unravel_index(np.argmax(shown), shown.shape)
    for box in boxes:
        left, top_, right, bottom = np.array(box) * scales
        part = np.outer(_overlap(height, top_, bottom), _overlap(width, left, right))
        inside = np.maximum(inside, part)
        hit |= bool(left <= column + 0.5 < right and top_ <= row + 0.5 < bottom)
    return {"pointing": float(hit), "energy": float((shown * inside).sum() / shown.sum())}


def _overlap(pixels: int, low: float, high: float) -> np.ndarray:
    """The share of each of a row of pixels that lies in an interval."""
    edges = np.arange(pixels)
    return np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, 1)

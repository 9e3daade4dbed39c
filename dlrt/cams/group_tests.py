"""Do two groups of networks differ, and by how much? Tests in which a network is one sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL, PERMUTATIONS, DRAWS = 0.05, 20_000, 10_000


def permutation_p(x: np.ndarray, y: np.ndarray, paired: bool) -> float:
    """Two-sided, of the difference of means: labels are permuted, or of pairs the signs flipped."""

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis) - y.mean(axis)

    options = {"permutation_type": "samples" if paired else "independent", "vectorized": True}
    rng = np.random.default_rng(0)
    return float(
        stats.permutation_test((x, y), difference, n_resamples=PERMUTATIONS, rng=rng, **options).pvalue
    )


def equivalence_p(x: np.ndarray, y: np.ndarray, bound: float, paired: bool) -> float:
    """That the means differ by less than the bound: the larger p of two one-sided t tests (Welch's)."""
    test = stats.ttest_rel if paired else stats.ttest_ind
    options = {} if paired else {"equal_var": False}
    lower = test(x + bound, y, alternative="greater", **options)
    upper = test(x - bound, y, alternative="less", **options)
    return float(max(lower.pvalue, upper.pvalue))


def holm(p: Sequence[float]) -> np.ndarray:
    """P values after Holm's correction for their number, in their order."""
    p = np.asarray(p)
    order = p.argsort()
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected


def mean_difference(x: np.ndarray, y: np.ndarray, paired: bool) -> np.ndarray:
    """Of groups (..., 2, networks) of an outcome and a covariate; the covariate has no part."""
    return x[..., 0, :].mean(-1) - y[..., 0, :].mean(-1)


def adjusted_difference(x: np.ndarray, y: np.ndarray, paired: bool) -> np.ndarray:
    """The difference at equal covariate, by least squares: one slope for both groups, or for the pairs."""
    groups = [x - y] if paired else [x, y]
    centred = [group - group.mean(-1, keepdims=True) for group in groups]
    products = sum((group[..., 0, :] * group[..., 1, :]).sum(-1) for group in centred)
    slope = products / sum((group[..., 1, :] ** 2).sum(-1) for group in centred)
    return mean_difference(x, y, paired) - slope * (x[..., 1, :].mean(-1) - y[..., 1, :].mean(-1))


def interval(
    statistic: Callable[..., np.ndarray], x: np.ndarray, y: np.ndarray, paired: bool
) -> tuple[float, float]:
    """The 95 % percentile bootstrap over networks, or over pairs, of a difference of groups (2, networks)."""
    rng = np.random.default_rng(0)
    first = rng.integers(x.shape[-1], size=(DRAWS, x.shape[-1]))
    second = first if paired else rng.integers(y.shape[-1], size=(DRAWS, y.shape[-1]))
    with np.errstate(invalid="ignore", divide="ignore"):  # of few networks a draw may be one alone
        drawn = statistic(np.moveaxis(x[:, first], 0, 1), np.moveaxis(y[:, second], 0, 1), paired)
    low, high = np.nanpercentile(drawn, [50 * LEVEL, 100 - 50 * LEVEL])
    return float(low), float(high)

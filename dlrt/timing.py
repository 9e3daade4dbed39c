"""Time measured side by side: on a machine where other programs run, only ratios of such times mean much."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each, run in turn, so that a slow moment of the machine strikes all alike.

    A function that starts work on a GPU must wait for it itself.
    """
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(-3, repeats):  # the first three warm up
        for function, its in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= 0:
                its.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(its) for its in times]

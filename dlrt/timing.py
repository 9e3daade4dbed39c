"""Time measured side by side: on a machine where other programs run, only ratios of such times mean much."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch

AT_LEAST = 3  # calls, however long they take: fewer have no median


class Timing(TypedDict):
    """A row of the times over ranks: of a training step or inference, and of the dense network beside it."""

    phase: Literal["training", "inference"]
    integrator: str
    s_steps: int
    adaptive: bool
    rank: int
    repeats: int
    ranks: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    gflops: float
    peak_mb: float
    dense_median_ms: float
    dense_lower_ms: float
    dense_upper_ms: float
    dense_gflops: float
    dense_peak_mb: float


def wait_for(device: str) -> None:
    """Let a GPU finish what it was asked to do; a CPU has finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    functions: Sequence[Callable[[], object]], repeats: int, seconds: float = math.inf, device: str = "cpu"
) -> list[list[float]]:
    """Milliseconds of each call of each function, called in turn: a slow moment strikes all alike.

    A function is called `repeats` times, or less often where that takes longer than `seconds`, but thrice at
    least. The first one, with which the others are compared, takes part in every round.
    """
    times: list[list[float]] = [[] for _ in functions]

    def unfinished(elapsed: list[float]) -> bool:
        enough = repeats if sum(elapsed) < 1e3 * seconds else min(repeats, AT_LEAST)
        return len(elapsed) < enough

    while any(map(unfinished, times)):
        for function, elapsed in zip(functions, times, strict=True):
            if elapsed is times[0] or unfinished(elapsed):
                wait_for(device)
                start = time.perf_counter()
                function()
                wait_for(device)
                elapsed.append(1e3 * (time.perf_counter() - start))
    return times


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each, called in turn, after three rounds that warm up."""
    in_turn(functions, 3)
    return [statistics.median(elapsed) for elapsed in in_turn(functions, repeats)]

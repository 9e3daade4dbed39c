"""Options that validation data choose, by runs of a grid."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlrt import grid
from dlrt.errors import RunError
from dlrt.grid import RunSpec
from dlrt.runs import epochs_done, read_metrics
from dlrt.summaries import best_lrs, read_runs


def choose_lrs(plans: Sequence[RunSpec], results: Path, by: str) -> dict[Any, float]:
    """`summaries.best_lrs` of the runs of these plans; RunError where all of a value diverged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out, since unfinished or diverged")
        found = read_runs(results)
    best = best_lrs(found[found["run"].isin([plan.name for plan in plans])], by).to_dict()
    if hopeless := {f"{plan.options[by]:g}" for plan in plans if plan.options[by] not in best}:
        raise RunError(
            f"every learning rate diverges at {by} {', '.join(sorted(hopeless))}: add smaller ones"
        )
    return best


def choose(
    first: Mapping[Any, Sequence[float]],
    short_run: Callable[[Any, float], RunSpec],
    results: Path,
    metric: str,
    sign: int = 1,
    jobs: int = 1,
) -> dict[Any, float]:
    """For each choice the value whose short run ends with the largest metric times sign.

    first[choice] are two values or more to begin with. While the best is the smallest or the largest of those
    tried, and better than its neighbour, a further one is. RunError where all runs of a choice diverge.
    """
    tried = {choice: sorted(values) for choice, values in first.items()}
    best: dict[Any, float] = {}
    made: set[str] = set()
    while missing := [choice for choice in tried if choice not in best]:
        runs = {choice: {value: short_run(choice, value) for value in tried[choice]} for choice in missing}
        # one that diverged is not tried again
        new = [run for of_choice in runs.values() for run in of_choice.values() if run.name not in made]
        grid.make(new, results, jobs, may_diverge=True)
        made.update(run.name for run in new)
        for choice, of_choice in runs.items():
            scores = {
                value: sign * read_metrics(results / run.name)[metric].iloc[-1]
                for value, run in of_choice.items()
                if epochs_done(results / run.name) == run.epochs
            }
            if not scores:
                names = ", ".join(run.name for run in of_choice.values())
                raise RunError(f"all of these diverge: {names}: add smaller step sizes")
            if further := _beyond(tried[choice], scores):
                tried[choice] = sorted([*tried[choice], further])
            else:
                best[choice] = max(scores, key=scores.get)
    return best


def _beyond(tried: Sequence[float], scores: Mapping[float, float]) -> float | None:
    """The value to try next, as far from the best as that is from its neighbour; None between two.

    None, too, where the neighbour is as good; one that diverged has no score.
    """
    best = max(scores, key=scores.get)
    neighbour = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best)
    if neighbour is None or scores.get(neighbour) == scores[best]:
        return None
    return float(f"{best**2 / neighbour:.2g}")

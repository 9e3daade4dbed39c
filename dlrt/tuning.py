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


def try_values(
    first: Mapping[Any, Sequence[float]],
    run_of: Callable[[Any, float], RunSpec],
    results: Path,
    metric: str,
    smallest: bool = False,
    jobs: int = 1,
) -> dict[Any, float]:
    """Make a run of each; for each case the value whose run ends with the largest metric, or the smallest.

    first[case] are two values or more to begin with. While the best is the smallest or the largest of those
    tried, and better than its neighbour, a further one is. Of equals it is the smallest. RunError where all
    runs of a case diverge.
    """
    tried = {case: sorted(values) for case, values in first.items()}
    best: dict[Any, float] = {}
    made: set[str] = set()
    while missing := [case for case in tried if case not in best]:
        runs = {case: {value: run_of(case, value) for value in tried[case]} for case in missing}
        # one that diverged in this call is not tried again
        new = {run.name: run for of_case in runs.values() for run in of_case.values() if run.name not in made}
        grid.make(list(new.values()), results, jobs, may_diverge=True)
        made |= new.keys()
        scores = {case: _scores(of_case, results, metric, smallest) for case, of_case in runs.items()}
        if hopeless := [run.name for case in missing if not scores[case] for run in runs[case].values()]:
            raise RunError(f"all of these diverge: {', '.join(hopeless)}: begin with other values")
        for case in missing:
            if further := _beyond(tried[case], scores[case]):
                tried[case] = sorted([*tried[case], further])
            else:
                best[case] = max(scores[case], key=scores[case].get)
    return best


def _scores(runs: Mapping[float, RunSpec], results: Path, metric: str, smallest: bool) -> dict[float, float]:
    """For each value whose run is finished how good its last epoch is; the larger the better."""
    sign = -1 if smallest else 1
    return {
        value: sign * read_metrics(results / run.name)[metric].iloc[-1]
        for value, run in runs.items()
        if epochs_done(results / run.name) == run.epochs
    }


def _beyond(tried: Sequence[float], scores: Mapping[float, float]) -> float | None:
    """The value to try next, as far from the best as that is from its neighbour; None between two.

    None, too, where the neighbour is as good; one that diverged has no score.
    """
    best = max(scores, key=scores.get)
    neighbour = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best)
    if neighbour is None or scores.get(neighbour) == scores[best]:
        return None
    return float(f"{best**2 / neighbour:.2g}")

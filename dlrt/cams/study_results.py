"""Table and figure of the study of maps, from what was measured of its networks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dlrt import plots
from dlrt.cams import group_tests as tests
from dlrt.errors import RunError
from dlrt.plots import Figure, plt

NAMES = {"lowrank": "low-rank", "compressed": "dense → low-rank", "continued": "dense → dense"}
COMPARISONS = {"A": ("lowrank", "dense"), "B": ("lowrank", "narrow"), "C": ("compressed", "continued")}
PAIRED = ("C",)
TITLES = {"gradcam": "Grad-CAM", "layercam": "LayerCAM", "eigencam": "EigenCAM"}
OUTCOMES = {"difference": "1 − r", "energy": "energy in the box", "faithfulness": "faithfulness"}


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each comparison, outcome and method, with tests, intervals and the verdict.

    RunError where a measurement is not finite: a test would call that a difference.
    """
    numbers = rows[[*OUTCOMES, "accuracy"]].to_numpy(float)
    if (broken := ~np.isfinite(numbers).all(axis=1)).any():
        first = rows[broken].iloc[0]
        raise RunError(
            f"measurements must be finite, got {', '.join(f'{name} {first[name]}' for name in OUTCOMES)} for "
            f"{first['kind']}, seed {first['seed']}, {first['method']}: delete its rows, and measure it again"
        )
    found = []
    for label, (one, other) in COMPARISONS.items():
        for outcome in OUTCOMES:
            for method in TITLES:
                runs = rows[rows["method"] == method].sort_values("seed")
                x, y, dense = (
                    runs.loc[runs["kind"] == kind, [outcome, "accuracy"]].to_numpy(float).T
                    for kind in (one, other, "dense")
                )
                paired, bound = label in PAIRED, dense[0].std(ddof=1)
                low, high = tests.interval(tests.mean_difference, x, y, paired)
                at_equal = tests.interval(tests.adjusted_difference, x, y, paired)
                found.append({
                    "comparison": label, "outcome": outcome, "method": method,
                    "one": x[0].mean(), "other": y[0].mean(), "bound": bound,
                    "difference": x[0].mean() - y[0].mean(), "low": low, "high": high,
                    "p": tests.permutation_p(x[0], y[0], paired),
                    "p_equivalent": tests.equivalence_p(x[0], y[0], bound, paired),
                    "adjusted": float(tests.adjusted_difference(x, y, paired)),
                    "adjusted_low": at_equal[0], "adjusted_high": at_equal[1],
                })  # fmt: skip
    table = pd.DataFrame(found)
    table["p"] = tests.holm(table["p"])
    differs, equivalent = table["p"] < tests.LEVEL, table["p_equivalent"] < tests.LEVEL
    both = np.where(differs & equivalent, "differs, equivalent", "open")
    table["verdict"] = np.select(
        [differs & ~equivalent, equivalent & ~differs], ["differs", "equivalent"], both
    )
    return table


def readable(table: pd.DataFrame) -> pd.DataFrame:
    names = {
        label: " − ".join(NAMES.get(kind, kind) for kind in kinds) for label, kinds in COMPARISONS.items()
    }

    def p_value(p: float) -> str:
        return "< 0.001" if p < 0.001 else f"{p:.3f}"

    def between(name: str, low: str, high: str) -> list[str]:
        intervals = zip(table[name], table[low], table[high], strict=True)
        return [f"{value:.3f} [{a:.3f}, {b:.3f}]" for value, a, b in intervals]

    return pd.DataFrame({
        "comparison": table["comparison"].map(names),
        "outcome": table["outcome"].map(OUTCOMES),
        "method": table["method"].map(TITLES),
        "means": [f"{one:.3f}, {other:.3f}" for one, other in zip(table["one"], table["other"], strict=True)],
        "difference": between("difference", "low", "high"),
        "p": table["p"].map(p_value),
        "bound": table["bound"].map("{:.3f}".format),
        "p equivalence": table["p_equivalent"].map(p_value),
        "at equal accuracy": between("adjusted", "adjusted_low", "adjusted_high"),
        "verdict": table["verdict"],
    })  # fmt: skip


def caption(rows: pd.DataFrame) -> str:
    """What the table shows, and of how many seeds."""
    seeds = rows["seed"].nunique()
    accuracy = rows.groupby("kind", sort=False)["accuracy"].mean()
    told = ", ".join(f"{NAMES.get(kind, kind)} {value:.1f}" for kind, value in accuracy.items())
    fewer = "" if seeds >= 20 else ", fewer than the 20 of the protocol"
    return (
        f"Networks of {seeds} seeds each{fewer}; test accuracies in %: {told}. Differences of means with "
        "95 % bootstrap intervals over networks; p of permutation tests, with Holm's correction over all "
        "rows, and of equivalence within ± bound, without correction; bound: the standard deviation over the "
        "seeds of the dense networks."
    )


def figure(table: pd.DataFrame, seeds: int) -> Figure:
    """Every difference with its interval, in units of the bound."""
    with plt.rc_context(plots.LOOK):
        drawn, all_axes = plt.subplots(1, 3, figsize=(10, 3.6), sharex=True, sharey=True)
        for axes, (label, kinds) in zip(all_axes, COMPARISONS.items(), strict=True):
            axes.axvspan(-1, 1, color="0.9", lw=0, label="within one deviation between seeds")
            axes.axvline(0, color="0.5", lw=1)
            for number, outcome in enumerate(OUTCOMES):
                results = table[(table["comparison"] == label) & (table["outcome"] == outcome)]
                middle, bound = results["difference"] / results["bound"], results["bound"]
                bars = middle - results["low"] / bound, results["high"] / bound - middle
                places = [-(4 * number + row) for row in range(len(results))]
                look = {"fmt": "o", "ms": 4, "capsize": 2, "color": plots.style(number)["color"]}
                axes.errorbar(middle, places, xerr=bars, label=OUTCOMES[outcome], **look)
            axes.set_title(" − ".join(NAMES.get(kind, kind) for kind in kinds), fontsize=10)
        rows = [-(4 * number + row) for number in range(3) for row in range(3)]
        all_axes[0].set_yticks(rows, [*TITLES.values()] * 3)
        drawn.supxlabel(
            f"difference of means over {seeds} seeds / deviation between seeds of dense networks; bars: 95 %",
            fontsize=10,
        )
        drawn.legend(
            *all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9
        )
    return drawn

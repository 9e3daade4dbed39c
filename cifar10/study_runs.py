"""The runs of the study of CIFAR-10: what each way to train is, and its step sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuned_runs import best_settings, recorded

from dlrt.errors import RunError
from dlrt.grid import RunSpec

HERE = Path(__file__).parent
DENSE = "dense"
# of the probe's rows those whose step sizes the ways take
WAYS = {
    "matrices": "DLRT, budget 75 %, {}",
    "separable": "DLRT, budget 75 %, spatially separable, {}",
    "factors": "plain factors, 75 %, {}",
    "separable_factors": "plain factors, 75 %, {}",
    "narrow": "dense, half the width, {}",
    DENSE: "dense, {}",
}
LOW_RANK = ("matrices", "separable")
CUT = "cut_"  # of the trained dense net, to either of these
STARTED = "started_"  # ways that begin dense are called so, and take the same step sizes as those that do not
START = STARTED + DENSE  # their dense epochs
BY_WEIGHTS = "_by_weights"  # ways whose budget keeps the largest singular values, not what the loss needs
WAYS |= {f"{STARTED}{way}": WAYS[way] for way in ("matrices", "separable", "factors", "separable_factors")}
WAYS |= {f"{way}{BY_WEIGHTS}": WAYS[way] for way in LOW_RANK}
DENSE_SHARE = 0.4  # of their epochs
RULES = {"muon": {"update": "muon", "nesterov": True}, "sgd": {"update": "sgd"}}
Choice = tuple[str, str]  # a way and a rule


def step_sizes(way: str, rule: str, scale: float = 1.0) -> dict[str, float]:
    """What validation chose in the probe for a way to train, times a scale."""
    row, scaled = {"muon": ("Muon", "update_lr"), "sgd": ("SGD", "lr")}[rule]
    best = best_settings(recorded(HERE / "probe.csv"))
    name = WAYS[way].format(row)
    if "separable" in way and name not in best:  # not tried there with both rules
        name = WAYS["matrices"].format(row)
    if name not in best:
        raise RunError(f"{HERE / 'probe.csv'} has no {name}: make it with python cifar10/probe.py --tune")
    return {**best[name], scaled: scale * best[name][scaled]}


def narrower(compression: float) -> float:
    """The share of the channels that a net of as few parameters has: so many sixteenths."""
    return round(16 * (1 - compression / 100) ** 0.5) / 16


def plan(
    network: str, way: str, rule: str, compression: float, common: dict, scales: Mapping[Choice, float]
) -> RunSpec:
    """A run from scratch that ends at a compression, or that of the dense network.

    scales: of the probe's step sizes, by way and rule, 1 unless given. Epochs that are dense have a step size
    of their own, that of `START`, as far as Muon goes; SGD has one for all.
    """
    options = {**common, **RULES[rule], **step_sizes(way, rule, scales.get((way, rule), 1.0))}
    kind = way.removeprefix(STARTED).removesuffix(BY_WEIGHTS)
    if kind in LOW_RANK:
        options["cut_by"] = "weights" if way.endswith(BY_WEIGHTS) else "loss"
    if way.startswith(STARTED):
        options["dense_epochs"] = max(1, round(DENSE_SHARE * common["epochs"]))
        if rule == "muon":
            of_dense = step_sizes(DENSE, rule, scales.get((START, rule), 1.0))
            options["dense_update_lr"] = of_dense["update_lr"]
    options |= {
        DENSE: {},
        "factors": {"factors": compression},
        "separable_factors": {"factors": compression, "spatial": True},
        "narrow": {"width": narrower(compression)},
        "matrices": {"compression": compression},
        "separable": {"compression": compression, "spatial": True},
    }[kind]
    size = "" if way == DENSE else f"{compression:g}"
    return _named(network, f"{way}{size}_{rule}", options, low_rank=kind in LOW_RANK)


def cut(
    network: str,
    kind: str,
    by: str,
    compression: float,
    common: dict[str, Any],
    results: Path,
    scales: Mapping[Choice, float],
) -> RunSpec:
    """The trained dense network cut to a budget by its weights or by the loss, and trained on.

    scales are as those of `plan`, but half of the probe's step size serves unless given.
    """
    options = {**common, **RULES["muon"], **step_sizes(kind, "muon", scales.get((CUT + kind, "muon"), 0.5))}
    options |= {"epochs": -(-common["epochs"] // 3), "compression": compression, "ramp": 0.0, "cut_by": by}
    options |= {"from_checkpoint": results / network / f"dense_muon_seed{common['seed']}"}
    options |= {"tau": 0.0, "tau_warmup": 0, "max_rank": "initial"}
    if kind == "separable":
        options["spatial"] = True
    return _named(network, f"{CUT}{kind}_by_{by}{compression:g}", options, low_rank=True)


def published(network: str, common: dict[str, Any]) -> RunSpec:
    """A tolerance, two passes and a decision of ranks in each step; without momentum, as there."""
    options = {"tau": 0.15, "tau_warmup": 0, "lr": 0.2, "momentum": 0.0}
    options |= {"integrator": "augmented", "allot_every": 1}
    return _named(network, "published", {**common, **options}, low_rank=True)


def _named(network: str, name: str, options: dict[str, Any], low_rank: bool) -> RunSpec:
    script = HERE / f"{network}_cifar10{'' if low_rank else '_baseline'}.py"
    return RunSpec(f"{network}/{name}_seed{options['seed']}", script, options)

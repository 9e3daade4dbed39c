"""The study behind the tables of CIFAR-10: ways to train a small network from scratch, at equal epochs.

    python cifar10/run.py --jobs 2 --tune 1                ResNet20; 45 minutes a run and core
    python cifar10/run.py --preset gpu --device cuda       all three networks, 30 to 60 epochs

What is compared: the dense net, a narrower one at the parameters of each budget, plain factors and DLRT
under that budget, both with kernels as matrices and spatially separable, and both also after a dense start:
the dense net for two fifths of the epochs, and then cut; each with SGD and with Muon; the trained dense net
cut to the budget and trained on for a third of the epochs; and DLRT as published. (DLRT whose budget keeps
the largest singular values, and not what the loss needs, is trained where `--ways` asks for it.) The first
budget comes first, seed by seed, and cuts of trained nets after all its seeds. Each preset has a folder of
its own, results/ and results_gpu/.

Step sizes are those that validation chose for each way on a smaller network (probe.csv; separable kernels
have those of matrices where it lacks them; cuts half of them; the published method always 0.2). With
`--tune EPOCHS` validation on seed 0 chooses here, too, at the first budget, until the best lies between two:

- Short runs begin at the probe's step size, a half, a quarter and an eighth of it.
- With Muon whole runs begin at the best of these and at twice that, since longer runs gain from larger steps.
- Ways that begin dense have whole runs only, at one, a half and a quarter to begin with; their dense epochs
  have the step size that short runs chose for the dense net.
- Cuts by the loss have whole runs, at one and two to begin with; those by weights take the same.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import FrameType

from study_runs import (
    BY_WEIGHTS,
    CUT,
    DENSE,
    LOW_RANK,
    RULES,
    START,
    STARTED,
    WAYS,
    Choice,
    cut,
    narrower,
    plan,
    published,
)

from dlrt import errors, grid, tuning
from dlrt.flags import COUNT, PERCENT, number
from dlrt.grid import RunSpec

HERE = Path(__file__).parent
EPOCHS = {  # of each network
    "cpu": {"resnet20": 10},
    "gpu": {"resnet20": 60, "vgg16": 30, "alexnet": 30},
}
JOBS = {"cpu": 2, "gpu": 8}  # runs at a time
RESULTS = {"cpu": "results", "gpu": "results_gpu"}
DIVISORS = (1, 2, 4, 8)  # of the probe's step size, with --tune: a deeper network may want less
CUT_DIVISORS = (0.5, 1)  # in whole runs larger steps may pay, which short ones cannot show


def choose_scales(network: str, epochs: int, args: argparse.Namespace, jobs: int) -> dict[Choice, float]:
    """For each way and rule the scale of its step size that validates best in runs of seed 0.

    These are runs at the first budget; their scales serve for all. With Muon, which is the better rule for
    each way, short runs only tell where whole ones begin; but for ways that begin dense, where the epoch
    after the cut alone would favour small steps.
    """
    choices = _choices(args)
    started = [choice for choice in choices if choice[0].startswith(STARTED)]
    others = [choice for choice in choices if choice not in started]
    scales: dict[Choice, float] = {}

    def tried(length: int, kind: str) -> Callable[[Choice, float], RunSpec]:
        common = {**grid.shared_options(args), "seed": 0, "epochs": length}

        def run(choice: Choice, divisor: float) -> RunSpec:
            made = plan(network, *choice, args.compressions[0], common, {**scales, choice: 1 / divisor})
            return _for_tuning(made, choice, kind, divisor)

        return run

    dense = [(DENSE, "muon")] if any(rule == "muon" for _, rule in started) else []
    short = _best(dict.fromkeys([*others, *dense], DIVISORS), tried(args.tune, "short"), args, jobs)
    if dense:
        scales[START, "muon"] = 1 / short[DENSE, "muon"]
    scales |= {choice: 1 / short[choice] for choice in others}
    first = {choice: (short[choice] / 2, short[choice]) for choice in others if choice[1] == "muon"}
    first |= dict.fromkeys(started, DIVISORS[:3])
    return scales | _scales(_best(first, tried(epochs, "whole"), args, jobs))


def choose_scales_of_cuts(
    network: str, epochs: int, args: argparse.Namespace, jobs: int
) -> dict[Choice, float]:
    """As `choose_scales`, for cuts of the dense network of seed 0 by the loss; those by weights take them."""
    common = {**grid.shared_options(args), "epochs": epochs, "seed": 0}

    def run(choice: Choice, divisor: float) -> RunSpec:
        kind, scales = choice[0].removeprefix(CUT), {choice: 1 / divisor}
        made = cut(network, kind, "loss", args.compressions[0], common, args.output_dir, scales)
        return _for_tuning(made, choice, "whole", divisor)

    return _scales(_best({(CUT + kind, "muon"): CUT_DIVISORS for kind in LOW_RANK}, run, args, jobs))


def _choices(args: argparse.Namespace) -> list[Choice]:
    return [(way, rule) for rule in RULES if rule in args.rules for way in WAYS if way in args.ways]


def _for_tuning(run: RunSpec, choice: Choice, kind: str, divisor: float) -> RunSpec:
    name = "_".join((*choice, kind, f"x{1 / divisor:g}"))
    return replace(run, name=f"{Path(run.name).parent}/tuning/{name}")


def _best(
    first: Mapping[Choice, Sequence[float]],
    run_of: Callable[[Choice, float], RunSpec],
    args: argparse.Namespace,
    jobs: int,
) -> dict[Choice, float]:
    return tuning.try_values(first, run_of, args.output_dir, "validation_accuracy", jobs=jobs)


def _scales(divisors: Mapping[Choice, float]) -> dict[Choice, float]:
    return {choice: 1 / divisor for choice, divisor in divisors.items()}


def pack(results: Path, archive: Path) -> None:
    """The records of all runs, without weights, in one archive."""
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted((*results.glob("**/config.json"), *results.glob("**/metrics.csv"))):
            file.add(path, path.relative_to(results))
    print(f"records: {archive}")


def stop(number: int, frame: FrameType | None) -> None:
    print("the time is up; the same command goes on", file=sys.stderr)
    sys.exit(0)


def make(network: str, epochs: int, jobs: int, args: argparse.Namespace) -> None:
    """All runs of a network, budget by budget and seed by seed; those that cut dense nets come after them."""
    scales = choose_scales(network, epochs, args, jobs) if args.tune else {}
    choices = _choices(args)
    shared = {**grid.shared_options(args), "epochs": epochs}
    seeds = [{**shared, "seed": seed} for seed in range(args.seeds)]

    def cuts(compression: float) -> list[RunSpec]:
        asked = product(seeds, LOW_RANK, ("weights", "loss")) if "cut" in args.ways else ()
        return [
            cut(network, kind, by, compression, common, args.output_dir, scales) for common, kind, by in asked
        ]

    for compression in args.compressions:
        runs = []
        for common in seeds:
            runs += [plan(network, *choice, compression, common, scales) for choice in choices]
            if "published" in args.ways and compression == args.compressions[0]:
                runs.append(published(network, common))
        grid.make(runs, args.output_dir, jobs, may_diverge=True, then=cuts(compression))
        if args.tune and "cut" in args.ways and compression == args.compressions[0]:
            scales |= choose_scales_of_cuts(network, epochs, args, jobs)
        grid.make(cuts(compression), args.output_dir, jobs, may_diverge=True)


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=None)
    add = parser.add_argument
    add("--preset", choices=EPOCHS, default="cpu", help="networks, their epochs, runs at a time")
    add("--networks", choices=EPOCHS["gpu"], nargs="+", help="to train; by default those of the preset")
    percent = {"type": PERCENT, "metavar": "PERCENT", "nargs": "+"}
    add("--compressions", **percent, default=[75.0, 60.0, 90.0], help="budgets, the most important first")
    all_ways = [*WAYS, "cut", "published"]
    usual = [way for way in all_ways if not way.endswith(BY_WEIGHTS)]
    add("--ways", choices=all_ways, nargs="+", default=usual, help="to train; cut needs dense, too")
    add("--rules", choices=RULES, nargs="+", default=list(RULES), help="update rules")
    add("--tune", type=COUNT, default=0, metavar="EPOCHS", help="of the runs that choose step sizes")
    add("--minutes", type=number(float, "(0, 10000]"), help="stop after that time; the same command goes on")
    add("--archive", type=Path, metavar="PATH", help="pack the records of all runs into this .tar.gz")
    parser.set_defaults(dataset="cifar10", jobs=None, output_dir=None)
    args = parser.parse_args()
    args.output_dir = args.output_dir or HERE / RESULTS[args.preset]
    if "cut" in args.ways and not ("dense" in args.ways and "muon" in args.rules):
        parser.error("--ways cut begins with the dense net that muon trained: add dense, and --rules muon")
    if "narrow" in args.ways and (bad := [c for c in args.compressions if narrower(c) in (0, 1)]):
        parser.error(
            f"--compressions must be 7 to 99.9 for a narrower net, got {bad[0]:g}: leave narrow out of --ways"
        )
    if args.epochs == 1 and any(way.startswith(STARTED) for way in args.ways):
        parser.error(f"--epochs must be 2 or more, or --ways without those called {STARTED}…")
    epochs = EPOCHS["gpu"] | EPOCHS[args.preset]
    if args.minutes:
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(max(1, round(60 * args.minutes)))
    try:
        for network in args.networks or EPOCHS[args.preset]:
            make(network, args.epochs or epochs[network], args.jobs or JOBS[args.preset], args)
    finally:
        if args.archive:
            pack(args.output_dir, args.archive)


if __name__ == "__main__":
    main()

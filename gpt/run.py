"""The study behind the table of this folder: ways to train a GPT from scratch, on equally many tokens.

    python gpt/run.py --jobs 2                                         ten minutes a run and core
    python gpt/run.py --device cuda --width 512 --depth 8 --jobs 4 --output-dir gpt/wide

The dense net with AdamW and with Muon; for each budget DLRT with three rules, and plain factors and a
narrower dense net with both optimizers. AdamW steps norms and the embedding, which is the head, too, in all
of them. The step size of each is the one that validates best in an epoch of seed 0: of those below, and of
further ones until the best lies between two that are no better.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from gpt_text import Options

from dlrt import errors, grid, tuning
from dlrt.flags import NATURAL, PERCENT
from dlrt.grid import RunSpec

HERE = Path(__file__).parent
RULES = {
    "dense": ("adamw", "muon"),
    "narrow": ("adamw", "muon"),
    "factors": ("adamw", "muon"),
    "dlrt": ("muon", "sgd", "adam"),
}
STEP_SIZES = {  # that of AdamW is for all weights, the others for those that the rule steps
    "adamw": ("lr", (3e-4, 1e-3, 3e-3, 6e-3)),
    "muon": ("update_lr", (0.005, 0.01, 0.02, 0.04)),
    "sgd": ("update_lr", (0.1, 0.3, 1.0)),
    "adam": ("update_lr", (3e-4, 1e-3, 3e-3)),
}
TUNING_EPOCHS = 1


def plan(way: str, rule: str, compression: float, args: argparse.Namespace, **options: object) -> RunSpec:
    """A run that ends at a compression, or that of the dense network."""
    options = {**grid.shared_options(args), "width": args.width, "depth": args.depth, **options}
    options |= {} if rule == "adamw" else {"update": rule}
    options |= {
        "dense": {},
        "narrow": {"width": max(8, 8 * round(args.width * (1 - compression / 100) ** 0.5 / 8))},
        "factors": {"factors": compression},
        "dlrt": {"compression": compression, "cut_by": "weights"},
    }[way]
    size = "" if way == "dense" else f"{compression:g}"
    script = HERE / f"gpt_text{'' if way == 'dlrt' else '_baseline'}.py"
    return RunSpec(f"{way}{size}_{rule}_seed{options['seed']}", script, options)


def best_step_sizes(
    ways: list[tuple[str, str]], compression: float, args: argparse.Namespace
) -> dict[tuple[str, str], dict[str, float]]:
    """For each way and rule the step size that validates best in short runs of seed 0, as its option."""

    def short_run(choice: tuple[str, str], size: float) -> RunSpec:
        name, _ = STEP_SIZES[choice[1]]
        run = plan(*choice, compression, args, epochs=TUNING_EPOCHS, seed=0, **{name: size})
        return replace(run, name=f"tuning/{run.name}_{name}{size:g}")

    first = {choice: STEP_SIZES[choice[1]][1] for choice in ways}
    best = tuning.try_values(
        first, short_run, args.output_dir, "validation_loss", smallest=True, jobs=args.jobs
    )
    return {choice: {STEP_SIZES[choice[1]][0]: size} for choice, size in best.items()}


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=3, options=Options)
    add = parser.add_argument
    percent = {"type": PERCENT, "metavar": "PERCENT", "nargs": "+"}
    add("--compressions", **percent, default=[50.0, 75.0], help="budgets, the most important first")
    add("--ways", choices=RULES, nargs="+", default=list(RULES), help="to train")
    add("--width", type=NATURAL, default=128, help="of the residual stream, a multiple of 8")
    add("--depth", type=NATURAL, default=4, help="blocks")
    args = parser.parse_args()
    if args.width % 8:
        parser.error(f"--width must be a multiple of 8, got {args.width}")
    ways = [(way, rule) for way in args.ways for rule in RULES[way]]
    for compression in args.compressions:
        best = best_step_sizes(ways, compression, args)
        plans = [
            plan(*choice, compression, args, epochs=args.epochs, seed=seed, **best[choice])
            for seed in range(args.seeds)
            for choice in ways
        ]
        grid.make(plans, args.output_dir, args.jobs, may_diverge=True)


if __name__ == "__main__":
    main()

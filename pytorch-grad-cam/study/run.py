"""The networks of the study of protocol.md, on hard cluttered digits.

    python pytorch-grad-cam/study/run.py

Reference networks first, then seed by seed. About 45 seconds a seed on one core, a quarter of an hour in all;
the same command goes on where it broke off. Afterwards call measure.py and produce_results.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlrt import errors, grid
from dlrt.cams.study import REFERENCES
from dlrt.flags import COUNT
from dlrt.grid import RunSpec

HERE = Path(__file__).parent
BASELINE, LOW_RANK = HERE.parent / "convnet_clutter_baseline.py", HERE.parent / "convnet_clutter.py"
BUDGET = {"compression": 75.0}


def trained(seed: int, common: dict[str, Any]) -> list[RunSpec]:
    """Networks trained from random weights: dense, low-rank, and a narrow dense one of as many parameters."""
    options = {**common, "seed": seed}
    return [
        RunSpec(f"dense_seed{seed}", BASELINE, options),
        RunSpec(f"lowrank_seed{seed}", LOW_RANK, {**options, **BUDGET}),
        RunSpec(f"narrow_seed{seed}", BASELINE, {**options, "width": 0.5}),
    ]


def continued(seed: int, common: dict[str, Any], results: Path) -> list[RunSpec]:
    """Networks that begin with the dense one of that seed, and train half as long again."""
    options = {**common, "seed": seed, "lr": 0.05, "from_checkpoint": results / f"dense_seed{seed}"}
    options["epochs"] = -(-common["epochs"] // 2)
    return [
        RunSpec(f"continued_seed{seed}", BASELINE, options),
        RunSpec(f"compressed_seed{seed}", LOW_RANK, {**options, **BUDGET}),
    ]


@errors.boundary()
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=8, seeds=20)
    parser.add_argument("--first-seed", type=COUNT, default=0, help="a pilot takes others than the study")
    parser.set_defaults(dataset="hard_clutter")
    args = parser.parse_args()
    common = {**grid.shared_options(args), "epochs": args.epochs, "batch_size": 32}
    references = [RunSpec(f"reference_seed{seed}", BASELINE, {**common, "seed": seed}) for seed in REFERENCES]
    grid.make(references, args.output_dir, args.jobs)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        after = continued(seed, common, args.output_dir)
        grid.make(trained(seed, common), args.output_dir, args.jobs, then=after)
        grid.make(after, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

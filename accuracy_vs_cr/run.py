"""The five-layer nets of width 500 and 784 on MNIST over many tolerances, and a dense one pruned by the SVD.

    python accuracy_vs_cr/run.py --jobs 2        about 2 hours on two CPU cores

All nets, dense or not, are trained on shifted digits at a learning rate of 0.1. DLRT begins with a quarter
of the full rank and updates its bases in every 40th step: at the same compression that is more accurate than
in every tenth, and faster (measured before momentum followed the bases, and not against every step).
`pruned` runs start from the truncated SVD of the dense net of width 784: their epoch 0 is the truncation
alone, then DLRT trains on at that rank for half of the epochs. The first seed is run with each of
`--retraining-lrs`, the others with the one that is best for their rank on the validation split.
"""

from itertools import product
from pathlib import Path
from typing import Any

from dlrt import errors, grid, tuning
from dlrt.flags import NATURAL, POSITIVE

HERE = Path(__file__).parent
TAUS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15, 0.17)
TRAINING = {"lr": 0.1}
DLRT = {"rank": 0.25, "s_steps": 40, "integrator": "parallel"}
RETRAINING = {"tau": 0, "tau_warmup": 0, "s_steps": 10, "integrator": "parallel", "cut_by": "weights"}


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=20, taus=TAUS)
    parser.add_argument("--widths", type=NATURAL, nargs="+", default=(500, 784), help="of the hidden layers")
    ranks = (10, 20, 40, 60, 80, 100)
    parser.add_argument("--pruned-ranks", type=NATURAL, nargs="*", default=ranks, help="of the largest width")
    lrs = (0.01, 0.03, 0.1, 0.3)
    parser.add_argument("--retraining-lrs", type=POSITIVE, nargs="+", default=lrs, help="of the pruned nets")
    args = parser.parse_args()
    low_rank, dense = (HERE.parent / "mnist" / f"mlp_mnist{end}.py" for end in ("", "_baseline"))

    def plan(script: Path, width: int, variant: str, seed: int, **options: Any) -> grid.RunSpec:
        shared = {**grid.shared_options(args), **TRAINING, "epochs": args.epochs, "width": width}
        return grid.RunSpec(f"width{width}_{variant}_seed{seed}", script, {**shared, "seed": seed, **options})

    def pruned(rank: int, lr: float, seed: int) -> grid.RunSpec:
        width = max(args.widths)
        start = {"from_checkpoint": args.output_dir / f"width{width}_dense_seed{seed}"}
        fixed = {"rank": rank, "min_rank": rank, "max_rank": rank, "epochs": max(1, args.epochs // 2)}
        return plan(low_rank, width, f"pruned{rank}_lr{lr:g}", seed, lr=lr, **RETRAINING, **start, **fixed)

    def make_pruned(plans: list[grid.RunSpec]) -> None:
        grid.make(trained, args.output_dir, args.jobs, then=plans)
        grid.make(plans, args.output_dir, args.jobs, may_diverge=True)  # a step size may be too large

    trained = []
    for width, seed in product(args.widths, range(args.seeds)):
        trained.append(plan(dense, width, "dense", seed))
        trained += [plan(low_rank, width, f"tau{tau}", seed, tau=tau, **DLRT) for tau in args.taus]
    tried = [pruned(rank, lr, seed=0) for rank in args.pruned_ranks for lr in args.retraining_lrs]
    make_pruned(tried)
    if tried:
        best = tuning.choose_lrs(tried, args.output_dir, by="rank")
        seeds = product(range(args.seeds), args.pruned_ranks)
        make_pruned([pruned(rank, best[rank], seed) for seed, rank in seeds])


if __name__ == "__main__":
    main()

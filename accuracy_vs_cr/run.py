"""The five-layer nets of width 500 and 784 on MNIST over many tolerances, and a dense one pruned by the SVD.

    python accuracy_vs_cr/run.py --jobs 2        about 2 hours on two CPU cores

All nets, dense or not, are trained on shifted digits at a learning rate of 0.1. DLRT begins with a quarter
of the full rank and moves its bases in every 40th step: at the same compression that is more accurate than in
every tenth, and faster. `pruned` runs start from the truncated SVD of the dense net of width 784: their epoch
0 is the truncation alone, then the factors are trained at that rank for half of the epochs.
"""

from pathlib import Path

from dlrt import cli, grid

HERE = Path(__file__).parent
TAUS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15, 0.17)
TRAINING = {"lr": 0.1}
DLRT = {"rank": 0.25, "s_steps": 40}
RETRAINING = {"lr": 0.01, "tau": 0, "tau_warmup": 0, "cut_by": "weights"}


def main() -> None:
    parser = cli.grid_parser(__doc__, HERE, epochs=20, taus=TAUS)
    parser.add_argument(
        "--widths", type=cli.NATURAL, nargs="+", default=(500, 784), help="of the hidden layers"
    )
    ranks = (10, 20, 40, 60, 80, 100)
    parser.add_argument(
        "--pruned-ranks", type=cli.NATURAL, nargs="*", default=ranks, help="of the largest width"
    )
    args = parser.parse_args()
    low_rank, dense = (HERE.parent / "mnist" / f"mlp_mnist{end}.py" for end in ("", "_baseline"))
    trained, pruned = [], []
    for width in args.widths:
        for seed in range(args.seeds):
            shared = {**cli.shared_options(args), **TRAINING}
            shared |= {"epochs": args.epochs, "width": width, "seed": seed}
            name = f"width{width}_{{}}_seed{seed}".format
            trained.append(grid.Plan(name("dense"), dense, shared))
            for tau in args.taus:
                trained.append(grid.Plan(name(f"tau{tau}"), low_rank, {**shared, **DLRT, "tau": tau}))
            if width != max(args.widths):
                continue
            start = {"from_checkpoint": args.output_dir / name("dense"), "epochs": max(1, args.epochs // 2)}
            for rank in args.pruned_ranks:
                fixed = {"rank": rank, "min_rank": rank, "max_rank": rank}
                options = {**shared, **RETRAINING, **start, **fixed}
                pruned.append(grid.Plan(name(f"pruned{rank}"), low_rank, options))
    grid.make(trained, args.output_dir, args.jobs, then=pruned)
    grid.make(pruned, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

"""LeNet5 on MNIST over many tolerances, and the dense net, over seeds: the runs behind table and frontier.

    python Lenet_experiment/run.py --jobs 2        about 3 hours on two CPU cores

Two sweeps: "plain", with the whole tolerance from the first step on, and "best", a recipe chosen on the
validation split, where the tolerance rises and training is longer. The dense net is trained with both.
"""

from pathlib import Path

from dlrt import cli, grid

HERE = Path(__file__).parent
TAUS = (0.09, 0.11, 0.13, 0.15, 0.2, 0.3, 0.4, 0.45)
BEST_TAUS = (0.12, 0.15, 0.18, 0.22, 0.26, 0.3)
PLAIN = ["--tau-warmup", "0"]
BEST = ["--s-steps", "10"]


def main() -> None:
    parser = cli.grid_parser(__doc__, HERE, epochs=15, taus=TAUS)
    parser.add_argument(
        "--best-taus", type=cli.TOLERANCE, nargs="*", default=BEST_TAUS, help="of the best recipe"
    )
    parser.add_argument("--best-epochs", type=cli.NATURAL, default=30, help="of every run of the best recipe")
    args = parser.parse_args()
    low_rank, dense = (HERE.parent / "mnist" / f"lenet5_mnist{end}.py" for end in ("", "_baseline"))
    plans = []
    for seed in range(args.seeds):
        shared = [*cli.shared_flags(args), "--seed", seed]
        for sweep, taus, recipe, epochs in (
            ("plain", args.taus, PLAIN, args.epochs),
            ("best", args.best_taus, BEST, args.best_epochs),
        ):
            for tau in taus:
                flags = [*shared, *recipe, "--tau", tau]
                plans.append(grid.Plan(f"{sweep}/tau{tau}_seed{seed}", low_rank, epochs, flags))
            plans.append(grid.Plan(f"{sweep}/dense_seed{seed}", dense, epochs, shared))
    grid.make(plans, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

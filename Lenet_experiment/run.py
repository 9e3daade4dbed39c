"""LeNet5 on MNIST over many tolerances, and the dense net, over seeds: the runs behind table and frontier.

    python Lenet_experiment/run.py --jobs 2        about 3 hours on two CPU cores

Two sweeps: "plain", with the whole tolerance from the first step on, bases that move at every step, a
low-rank first layer, and digits and targets as they are; and "best", with the defaults of the training
scripts, which were chosen on the validation split, but smaller batches and no weight decay. The dense net is
trained with both.
"""

from pathlib import Path

from dlrt import cli, grid

HERE = Path(__file__).parent
TAUS = (0.09, 0.11, 0.13, 0.15, 0.2, 0.3, 0.4, 0.45)
BEST_TAUS = (0.12, 0.15, 0.18, 0.22, 0.28, 0.35)
BEST = ["--batch-size", 64, "--lr", 0.03, "--weight-decay", 0]
PLAIN = ["--weight-decay", 0, "--no-augment", "--label-smoothing", 0]
PLAIN_DLRT = ["--tau-warmup", 0, "--s-steps", 1, "--skip", "fc2"]


def main() -> None:
    parser = cli.grid_parser(__doc__, HERE, epochs=10, taus=TAUS)
    parser.add_argument(
        "--best-taus", type=cli.TOLERANCE, nargs="*", default=BEST_TAUS, help="of the best recipe"
    )
    parser.add_argument("--best-epochs", type=cli.NATURAL, default=20, help="of the best recipe")
    args = parser.parse_args()
    low_rank, dense = (HERE.parent / "mnist" / f"lenet5_mnist{end}.py" for end in ("", "_baseline"))
    plans = []
    for seed in range(args.seeds):
        for sweep, taus, epochs, recipe, of_dlrt in (
            ("best", args.best_taus, args.best_epochs, BEST, []),
            ("plain", args.taus, args.epochs, PLAIN, PLAIN_DLRT),
        ):
            flags = [*cli.shared_flags(args), "--seed", seed, *recipe]
            plans.append(grid.Plan(f"{sweep}/dense_seed{seed}", dense, epochs, flags))
            plans += [
                grid.Plan(f"{sweep}/tau{tau}_seed{seed}", low_rank, epochs, [*flags, *of_dlrt, "--tau", tau])
                for tau in taus
            ]
    grid.make(plans, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

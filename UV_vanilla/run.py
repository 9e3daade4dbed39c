"""DLRT at rank 20 against plain factors U Vᵀ with SGD, from the same decaying weights, over seeds.

    python UV_vanilla/run.py --jobs 2        about 3 hours on two CPU cores

DLRT has the step size of the paper, 0.01. The plain factors have the one that is best for them: every decay
is run with each of `--lrs` and the first seed, and with the winner of the validation split for the others.
"""

from pathlib import Path

from factored import DECAY

from dlrt import cli, grid
from dlrt.runs import read_runs

HERE = Path(__file__).parent


def main() -> None:
    parser = cli.grid_parser(__doc__, HERE, epochs=20, seeds=5)
    add = parser.add_argument
    add("--decays", nargs="+", **DECAY | {"default": (1.0, 2.0, 10.0)})
    add("--lrs", type=cli.POSITIVE, nargs="+", default=(0.003, 0.01, 0.03, 0.1), help="for the plain factors")
    args = parser.parse_args()

    def plan(decay: float, seed: int, lr: float | None = None) -> grid.Plan:
        flags = [*cli.shared_flags(args), "--decay", decay, "--seed", seed]
        if lr is None:
            return grid.Plan(f"dlrt_decay{decay:g}_seed{seed}", HERE / "lenet5_mnist.py", args.epochs, flags)
        name = f"vanilla_decay{decay:g}_lr{lr:g}_seed{seed}"
        return grid.Plan(name, HERE / "lenet5_mnist_baseline.py", args.epochs, [*flags, "--lr", lr])

    plans = [plan(decay, seed) for seed in range(args.seeds) for decay in args.decays]
    plans += [plan(decay, 0, lr) for decay in args.decays for lr in args.lrs]
    grid.make(plans, args.output_dir, args.jobs)
    best = best_lrs(args.output_dir)
    others = range(1, args.seeds)
    grid.make([plan(d, seed, best[d]) for d in args.decays for seed in others], args.output_dir, args.jobs)


def best_lrs(results: Path) -> dict[float, float]:
    """For every decay the step size with which the plain factors of seed 0 do best in validation."""
    runs = read_runs(results)
    runs = runs[(runs["network"] == "vanilla_lenet5") & (runs["seed"] == 0)]
    return runs.sort_values("validation_accuracy").groupby("decay")["lr"].last().to_dict()


if __name__ == "__main__":
    main()

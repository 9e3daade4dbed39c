"""DLRT at rank 20 against plain factors U Vᵀ with SGD, from the same decaying weights, over seeds.

    python UV_vanilla/run.py --jobs 2        about 3 hours on two CPU cores

DLRT has the step size of the paper, 0.01. The plain factors have the one that is best for them: every decay
is run with each of `--lrs` and the first seed, and with the winner of the validation split for the others.
"""

import sys
import warnings
from pathlib import Path

from factored import DECAY, best_lrs

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
        options = {**cli.shared_options(args), "epochs": args.epochs, "decay": decay, "seed": seed}
        if lr is None:
            name = f"dlrt_decay{decay:g}_seed{seed}"
            return grid.Plan(name, HERE / "lenet5_mnist.py", options)
        name = f"vanilla_decay{decay:g}_lr{lr:g}_seed{seed}"
        return grid.Plan(name, HERE / "lenet5_mnist_baseline.py", {**options, "lr": lr})

    grid.make([plan(d, seed) for seed in range(args.seeds) for d in args.decays], args.output_dir, args.jobs)
    tried = [plan(decay, 0, lr) for decay in args.decays for lr in args.lrs]
    grid.make(tried, args.output_dir, args.jobs, may_diverge=True)  # a step size may be too large
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out, since unfinished or diverged")
        best = best_lrs(read_runs(args.output_dir)).get("vanilla_lenet5", {})
    if hopeless := [f"{decay:g}" for decay in args.decays if decay not in best]:
        sys.exit(
            f"run.py: with every one of --lrs U Vᵀ diverges at decay {', '.join(hopeless)}: add smaller ones"
        )
    others = [plan(decay, seed, best[decay]) for decay in args.decays for seed in range(1, args.seeds)]
    grid.make(others, args.output_dir, args.jobs, may_diverge=True)


if __name__ == "__main__":
    main()

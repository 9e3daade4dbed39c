"""DLRT at rank 20 against plain factors U Vᵀ with SGD, from the same decaying weights, over seeds.

    python UV_vanilla/run.py --jobs 2        about 3 hours on two CPU cores

DLRT has the step size of the paper, 0.01. The plain factors have the one that is best for them: every decay
is run with each of `--lrs` and the first seed, and with the winner of the validation split for the others.
With that one DLRT is run as well.
"""

from pathlib import Path

from factored import AS_IN_THE_PAPER, DECAY, OF_DECAY

from dlrt import errors, grid, tuning
from dlrt.flags import POSITIVE

HERE = Path(__file__).parent
SCRIPTS = {"dlrt": "lenet5_mnist.py", "vanilla": "lenet5_mnist_baseline.py"}


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=20, seeds=5)
    add = parser.add_argument
    add("--decays", type=DECAY, nargs="+", default=(1.0, 2.0, 10.0), help=OF_DECAY)
    add("--lrs", type=POSITIVE, nargs="+", default=(0.01, 0.03, 0.1, 0.3), help="for the plain factors")
    args = parser.parse_args()

    def plan(method: str, decay: float, lr: float, seed: int) -> grid.RunSpec:
        options = {**grid.shared_options(args), "epochs": args.epochs, "decay": decay, "lr": lr, "seed": seed}
        options |= {"integrator": "parallel"} if method == "dlrt" else {}
        return grid.RunSpec(f"{method}_decay{decay:g}_lr{lr:g}_seed{seed}", HERE / SCRIPTS[method], options)

    seeds = [(decay, seed) for seed in range(args.seeds) for decay in args.decays]
    as_in_the_paper = [plan("dlrt", decay, AS_IN_THE_PAPER["lr"], seed) for decay, seed in seeds]
    grid.make(as_in_the_paper, args.output_dir, args.jobs)
    tried = [plan("vanilla", decay, lr, 0) for decay in args.decays for lr in args.lrs]
    grid.make(tried, args.output_dir, args.jobs, may_diverge=True)  # a step size may be too large
    best = tuning.choose_lrs(tried, args.output_dir, by="decay")
    both = [plan(method, decay, best[decay], seed) for decay, seed in seeds for method in SCRIPTS]
    grid.make(both, args.output_dir, args.jobs, may_diverge=True)


if __name__ == "__main__":
    main()

"""LeNet5 on MNIST over many tolerances, and the dense net, over seeds: the runs behind table and frontier.

    python Lenet_experiment/run.py --jobs 2        about 4 hours on two CPU cores

Two sweeps: "plain", with the whole tolerance from the first step on, bases updated in every step, a
low-rank first layer, and digits and targets as they are; and "best", with the defaults of the training
scripts, which were chosen on the validation split, but longer, with bases that are updated in every
tenth step, smaller batches and steps and less weight decay. The dense net is trained with both.
"""

from pathlib import Path

from dlrt import errors, grid
from dlrt.flags import NATURAL, TOLERANCE

HERE = Path(__file__).parent
TAUS = (0.09, 0.11, 0.13, 0.15, 0.2, 0.3, 0.4, 0.45)
BEST_TAUS = (0.15, 0.2, 0.27, 0.35, 0.4)
BEST = {"batch_size": 64, "lr": 0.03, "weight_decay": 3e-4}
BEST_DLRT = {"s_steps": 10, "integrator": "parallel"}
PLAIN = {"weight_decay": 0, "augment": False, "label_smoothing": 0}
PLAIN_DLRT = {"tau_warmup": 0, "skip": ["fc2"], "integrator": "parallel"}


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=10, taus=TAUS, runs="the plain sweep")
    parser.add_argument(
        "--best-taus", type=TOLERANCE, nargs="*", default=BEST_TAUS, help="of the best recipe"
    )
    parser.add_argument("--best-epochs", type=NATURAL, default=30, help="of the best recipe")
    args = parser.parse_args()
    low_rank, dense = (HERE.parent / "mnist" / f"lenet5_mnist{end}.py" for end in ("", "_baseline"))
    plans = []
    for seed in range(args.seeds):
        for sweep, taus, epochs, recipe, of_dlrt in (
            ("best", args.best_taus, args.best_epochs, BEST, BEST_DLRT),
            ("plain", args.taus, args.epochs, PLAIN, PLAIN_DLRT),
        ):
            options = {**grid.shared_options(args), "epochs": epochs, "seed": seed, **recipe}
            plans.append(grid.RunSpec(f"{sweep}/dense_seed{seed}", dense, options))
            for tau in taus:
                name = f"{sweep}/tau{tau}_seed{seed}"
                plans.append(grid.RunSpec(name, low_rank, {**options, **of_dlrt, "tau": tau}))
    grid.make(plans, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

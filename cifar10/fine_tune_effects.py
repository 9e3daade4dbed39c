"""What fine-tuning adds at high compression: DLRT, then S and the rest trained on in bases that are frozen.

    python cifar10/fine_tune_effects.py --networks lenet5 --seeds 3 --jobs 2         an hour on two CPU cores
    python cifar10/fine_tune_effects.py --seeds 3 --jobs 8 --device cuda

Beside each run stands its control, of as many epochs without freezing. The larger networks want a GPU.
`produce_results.py` makes the table of accuracy before and after.
"""

from pathlib import Path

from dlrt import errors, grid
from dlrt.flags import NATURAL, RANK

HERE = Path(__file__).parent
FOLDER = "fine_tuned"  # of the runs, below that of the results
SCRIPTS = {
    "lenet5": HERE.parent / "mnist" / "lenet5_mnist.py",
    "alexnet": HERE / "alexnet_cifar10.py",
    "vgg16": HERE / "vgg16_cifar10.py",
    "resnet20": HERE / "resnet20_cifar10.py",
}
TAUS = {"lenet5": 0.25, "alexnet": 0.2, "vgg16": 0.25, "resnet20": 0.4}


@errors.boundary("the same command goes on")
def main() -> None:
    parser = grid.make_parser(__doc__, HERE, epochs=20, seeds=1)
    parser.set_defaults(dataset="cifar10")
    add = parser.add_argument
    add("--finetune-epochs", type=NATURAL, default=20, help="of every run, after --epochs")
    add("--networks", choices=SCRIPTS, nargs="+", default=list(SCRIPTS), help="to train")
    add("--rank", type=RANK, default=0.25, help="to begin with, a share of the full rank")
    args = parser.parse_args()
    plans = []
    for seed in range(args.seeds):
        for network in args.networks:
            options = {**grid.shared_options(args), "seed": seed, "rank": args.rank, "s_steps": 10}
            options |= {"tau": TAUS[network], "tau_warmup": args.epochs / 2, "integrator": "parallel"}
            frozen = {"epochs": args.epochs, "finetune_epochs": args.finetune_epochs}
            control = {"epochs": args.epochs + args.finetune_epochs}
            for kind, epochs in (("", frozen), ("_control", control)):
                name = f"{FOLDER}/{network}_{args.epochs}+{args.finetune_epochs}{kind}_seed{seed}"
                plans.append(grid.RunSpec(name, SCRIPTS[network], {**options, **epochs}))
    grid.make(plans, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

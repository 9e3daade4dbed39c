"""The runs behind the tables of CIFAR-10: from scratch, and from trained weights, dense and over tolerances.

    python cifar10/run.py --weights resnet20-12fca82f.pt        about 3 hours on two CPU cores

`--weights` is a file of a trained dense ResNet20. It is first trained on for `--adapt-epochs`, since the
pictures and their normalisation may be others; from there DLRT begins, cut across space to each of the
`--compressions` and with kernels as matrices to the first of them, and beside it the dense net goes on for as
long. Without `--weights` there are the runs from scratch only, at each of the `--taus`.
"""

from pathlib import Path

from dlrt import cli, grid

HERE = Path(__file__).parent
NETWORKS = ("resnet20", "alexnet", "vgg16")
GENTLE = {"lr": 0.02}  # more would first undo what dense weights have learned
# what is cut at once has all epochs to heal
COMPRESSING = {"ramp": 0.0, "spatial": True, "tau": 0.03, "tau_warmup": 0, "max_rank": "initial"}
# as matrices (out, in * height * width) kernels lose much at once, and a larger step is the better one then
MATRICES = {"ramp": 0.0, "spatial": False, "lr": 0.05, "tau": 0.1, "tau_warmup": 0, "max_rank": "initial"}


def twins(name: str, options: dict, low_rank: dict[str, dict]) -> list[grid.Plan]:
    """A dense run and low-rank ones, {end of the name: options}; name is "network/start"."""
    network, seed = name.split("/")[0], options["seed"]
    scripts = [HERE / f"{network}_cifar10{end}.py" for end in ("_baseline", "")]
    plans = [grid.Plan(f"{name}_dense_seed{seed}", scripts[0], options)]
    for end, more in low_rank.items():
        plans.append(grid.Plan(f"{name}_{end}_seed{seed}", scripts[1], {**options, **more}))
    return plans


def main() -> None:
    parser = cli.grid_parser(__doc__, HERE, epochs=12, seeds=1, taus=(0.15, 0.2))
    parser.set_defaults(dataset="cifar10")
    add = parser.add_argument
    add("--weights", type=Path, metavar="PATH", help="of a trained dense ResNet20, to begin with")
    percent = {"type": cli.number(float, "(0, 100)"), "metavar": "PERCENT"}
    add("--compressions", **percent, nargs="*", default=(60, 75), help="of what begins with --weights")
    add("--adapt-epochs", type=cli.NATURAL, default=2, help="of the dense net, before all that begin with it")
    add("--scratch-epochs", type=cli.NATURAL, default=5, help="of the runs from scratch")
    networks = "to train from scratch; all but resnet20 want a GPU"
    add("--networks", choices=NETWORKS, nargs="*", default=("resnet20",), help=networks)
    args = parser.parse_args()
    if args.weights and not args.weights.is_file():
        parser.error(f"--weights must be a file of trained weights, got {args.weights}, which is not there")
    first, then = [], []
    for seed in range(args.seeds):
        options = {**cli.shared_options(args), "seed": seed}
        if args.weights:
            adapted = f"resnet20/adapted_seed{seed}"
            script = HERE / "resnet20_cifar10_baseline.py"
            begin = {"epochs": args.adapt_epochs, "from_checkpoint": args.weights.resolve()}
            first.append(grid.Plan(adapted, script, {**options, **GENTLE, **begin}))
            begin = {"epochs": args.epochs, "from_checkpoint": args.output_dir / adapted}
            cuts = {f"compression{c:g}": {**COMPRESSING, "compression": float(c)} for c in args.compressions}
            for c in args.compressions[:1]:
                cuts[f"matrix_compression{c:g}"] = {**MATRICES, "compression": float(c)}
            then += twins("resnet20/adapted", {**options, **GENTLE, **begin}, cuts)
        options["epochs"] = args.scratch_epochs
        for network in args.networks:
            then += twins(f"{network}/scratch", options, {f"tau{tau}": {"tau": tau} for tau in args.taus})
    grid.make(first, args.output_dir, args.jobs, then=then)
    grid.make(then, args.output_dir, args.jobs)


if __name__ == "__main__":
    main()

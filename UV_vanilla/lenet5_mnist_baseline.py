"""LeNet5 with plain factors U Vᵀ and SGD, from the same weights: the twin of lenet5_mnist.py.

python UV_vanilla/lenet5_mnist_baseline.py --decay 10
"""

from pathlib import Path

from factored import vanilla_lenet5

from dlrt import cli


def main() -> None:
    parser = cli.training_parser(__doc__, low_rank=False, lr=0.01, momentum=0.0, schedule="constant")
    parser.add_argument("--rank", type=cli.NATURAL, default=20, help="of every layer large enough")
    parser.add_argument(
        "--decay", type=cli.number(float, "[1, inf)"), default=1.0, help="of the singular values"
    )
    args = cli.parse(parser)
    settings = {"rank": args.rank, "decay": args.decay}
    cli.run_script(args, vanilla_lenet5, Path(__file__).parent / "results", settings)


if __name__ == "__main__":
    main()

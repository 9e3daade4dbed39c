"""LeNet5 with plain factors U Vᵀ and SGD, from the same weights: the twin of lenet5_mnist.py.

python UV_vanilla/lenet5_mnist_baseline.py --decay 10 --lr 0.1        5 minutes on a CPU core, to 98.6 %
"""

from pathlib import Path

from factored import AS_IN_THE_PAPER, DECAY, vanilla_lenet5

from dlrt import cli, script


def main() -> None:
    parser = cli.training_parser(__doc__, low_rank=False, **AS_IN_THE_PAPER)
    parser.add_argument("--rank", type=cli.NATURAL, default=20, help="of every layer large enough")
    parser.add_argument("--decay", **DECAY)
    args = cli.parse(parser)
    script.run(args, vanilla_lenet5, Path(__file__).parent / "runs", {"rank": args.rank, "decay": args.decay})


if __name__ == "__main__":
    main()

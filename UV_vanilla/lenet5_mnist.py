"""LeNet5 with DLRT at fixed rank, from weights whose singular values decay.

python UV_vanilla/lenet5_mnist.py --decay 10
"""

from pathlib import Path

from factored import decayed_lenet5

from dlrt import cli


def main() -> None:
    parser = cli.training_parser(
        __doc__, low_rank=True, tau=0.0, tau_warmup=0.0, rank=20, lr=0.01, momentum=0.0
    )
    parser.set_defaults(schedule="constant", min_rank=20, max_rank=20)
    parser.add_argument(
        "--decay", type=cli.number(float, "[1, inf)"), default=1.0, help="of the singular values"
    )
    args = cli.parse(parser)
    settings = {"rank": args.rank, "decay": args.decay}
    cli.run_script(args, decayed_lenet5, Path(__file__).parent / "results", settings)


if __name__ == "__main__":
    main()

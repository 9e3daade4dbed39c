"""LeNet5 with DLRT at fixed rank, from weights whose singular values decay.

python UV_vanilla/lenet5_mnist.py --decay 10        6 minutes on a CPU core, to 98.3 %
"""

from pathlib import Path

from factored import AS_IN_THE_PAPER, DECAY, decayed_lenet5

from dlrt import cli, script


def main() -> None:
    fixed = {"tau": 0.0, "tau_warmup": 0.0, "s_steps": 1, "rank": 20}
    parser = cli.training_parser(__doc__, low_rank=True, **fixed, **AS_IN_THE_PAPER)
    parser.add_argument("--decay", **DECAY)
    args = cli.parse(parser)
    of_other_ranks = [args.skip, args.tau, args.max_rank, args.min_rank != parser.get_default("min_rank")]
    if not isinstance(args.rank, int) or any(of_other_ranks):
        parser.error(
            f"here all layers have one rank, --rank, a whole number (got {args.rank}), to the end: "
            "leave out --skip, --tau, --min-rank and --max-rank"
        )
    args.min_rank = args.max_rank = args.rank
    script.run(args, decayed_lenet5, Path(__file__).parent / "runs", {"rank": args.rank, "decay": args.decay})


if __name__ == "__main__":
    main()

"""AlexNet with ordinary dense layers, on CIFAR-10: the twin of alexnet_cifar10.py.

python cifar10/alexnet_cifar10_baseline.py --epochs 30
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import AlexNet


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    parser = cli.training_parser(__doc__, low_rank=False, skip=["conv1", "fc3"], **defaults)
    share = "of its channels that each hidden layer has"
    parser.add_argument("--width", type=cli.POSITIVE, default=1.0, metavar="SHARE", help=share)
    args = cli.parse(parser)
    settings = {} if args.width == 1 else {"width": args.width}
    script.run(args, AlexNet, Path(__file__).parent / "results" / "alexnet", settings)


if __name__ == "__main__":
    main()

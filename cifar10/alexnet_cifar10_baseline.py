"""AlexNet with ordinary dense layers, on CIFAR-10: the twin of alexnet_cifar10.py.

python cifar10/alexnet_cifar10_baseline.py --epochs 30
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import AlexNet


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    parser = cli.training_parser(__doc__, low_rank=False, **defaults)
    script.run(cli.parse(parser), AlexNet, Path(__file__).parent / "results" / "alexnet")


if __name__ == "__main__":
    main()

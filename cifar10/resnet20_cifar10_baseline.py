"""ResNet20 with ordinary dense layers, on CIFAR-10: the twin of resnet20_cifar10.py.

python cifar10/resnet20_cifar10_baseline.py --epochs 30

About two minutes an epoch on two CPU cores that do nothing else.
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import ResNet20


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    parser = cli.training_parser(__doc__, low_rank=False, **defaults)
    script.run(cli.parse(parser), ResNet20, Path(__file__).parent / "results" / "resnet20")


if __name__ == "__main__":
    main()

"""ResNet20 with ordinary dense layers, on CIFAR-10: the twin of resnet20_cifar10.py.

python cifar10/resnet20_cifar10_baseline.py --epochs 30

About two minutes an epoch on two CPU cores that do nothing else.
"""

from dataclasses import dataclass
from pathlib import Path

from dlrt import script
from dlrt.flags import POSITIVE
from dlrt.models import ResNet20
from dlrt.option_fields import option
from dlrt.options import DenseOptions


@dataclass(kw_only=True)
class Options(DenseOptions):
    width: float = option(1.0, "of its channels that each hidden layer has", POSITIVE, metavar="SHARE")


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    options = Options.parse(__doc__, skip=["conv1", "linear"], **defaults)
    settings = {} if options.width == 1 else {"width": options.width}
    script.run(options, ResNet20, Path(__file__).parent / "results" / "resnet20", settings)


if __name__ == "__main__":
    main()

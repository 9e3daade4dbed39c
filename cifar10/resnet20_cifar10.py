"""ResNet20 with dynamical low-rank training, on CIFAR-10.

python cifar10/resnet20_cifar10.py --tau 0.17 --epochs 30

About two minutes an epoch on two CPU cores that do nothing else.
"""

from pathlib import Path

from dlrt import script
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import ResNet20


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    options = LowRankOptions.parse(__doc__, tau=0.17, skip=["conv1", "linear"], **defaults)
    script.run(options, ResNet20, Path(__file__).parent / "results" / "resnet20")


if __name__ == "__main__":
    main()

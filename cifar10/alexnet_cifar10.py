"""AlexNet with dynamical low-rank training, on CIFAR-10.

python cifar10/alexnet_cifar10.py --tau 0.1 --epochs 30
"""

from pathlib import Path

from dlrt import script
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import AlexNet


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    options = LowRankOptions.parse(__doc__, tau=0.1, skip=["conv1", "fc3"], **defaults)
    script.run(options, AlexNet, Path(__file__).parent / "results" / "alexnet")


if __name__ == "__main__":
    main()

"""VGG16 with dynamical low-rank training, on CIFAR-10.

python cifar10/vgg16_cifar10.py --tau 0.1 --epochs 30
"""

from pathlib import Path

from dlrt import script
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import VGG16


def main() -> None:
    defaults = {"dataset": "cifar10", "epochs": 30, "weight_decay": 5e-4}
    options = LowRankOptions.parse(__doc__, tau=0.1, skip=["features.0", "classifier"], **defaults)
    script.run(options, VGG16, Path(__file__).parent / "results" / "vgg16")


if __name__ == "__main__":
    main()

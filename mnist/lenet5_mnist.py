"""LeNet5 with dynamical low-rank training, on MNIST.

python mnist/lenet5_mnist.py --tau 0.15 --epochs 20

6 minutes on two CPU cores; prints a test accuracy of 99.5 % at a compression of 92 %.
"""

from pathlib import Path

from dlrt import script
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import LeNet5


def main() -> None:
    options = LowRankOptions.parse(__doc__, tau=0.15, skip=["conv1", "fc2"], weight_decay=5e-4)
    script.run(options, LeNet5, Path(__file__).parent / "results" / "lenet5")


if __name__ == "__main__":
    main()

"""LeNet5 with ordinary dense layers, on MNIST: the twin of lenet5_mnist.py.

python mnist/lenet5_mnist_baseline.py --epochs 20

4 minutes on two CPU cores; prints a test accuracy of 99.6 %.
"""

from pathlib import Path

from dlrt import script
from dlrt.models import LeNet5
from dlrt.options import DenseOptions


def main() -> None:
    options = DenseOptions.parse(__doc__, skip=["conv1", "fc2"], weight_decay=5e-4)
    script.run(options, LeNet5, Path(__file__).parent / "results" / "lenet5")


if __name__ == "__main__":
    main()

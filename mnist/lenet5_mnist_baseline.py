"""LeNet5 with ordinary dense layers, on MNIST: the twin of lenet5_mnist.py.

python mnist/lenet5_mnist_baseline.py --epochs 20

4 minutes on two CPU cores; prints a test accuracy of 99.6 %.
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import LeNet5


def main() -> None:
    parser = cli.training_parser(__doc__, low_rank=False, skip=["conv1", "fc2"], weight_decay=5e-4)
    script.run(cli.parse(parser), LeNet5, Path(__file__).parent / "results" / "lenet5")


if __name__ == "__main__":
    main()

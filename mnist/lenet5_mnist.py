"""LeNet5 with dynamical low-rank training, on MNIST.

python mnist/lenet5_mnist.py --tau 0.15 --epochs 20

5 minutes on two CPU cores; prints a test accuracy of 99.4 % at a compression of 92.4 %.
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import LeNet5


def main() -> None:
    parser = cli.training_parser(__doc__, low_rank=True, tau=0.15, skip=["conv1", "fc2"], weight_decay=5e-4)
    script.run(cli.parse(parser), LeNet5, Path(__file__).parent / "results" / "lenet5")


if __name__ == "__main__":
    main()

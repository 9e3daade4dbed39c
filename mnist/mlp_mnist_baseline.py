"""The paper's five-layer net 784-w-w-w-w-10 with ordinary dense layers, on MNIST: the twin of mlp_mnist.py.

python mnist/mlp_mnist_baseline.py --width 500 --epochs 20

2 minutes on two CPU cores; prints a test accuracy of 99.1 %.
"""

from dataclasses import dataclass
from pathlib import Path

from dlrt import script
from dlrt.flags import NATURAL
from dlrt.models import MLP
from dlrt.option_fields import option
from dlrt.options import DenseOptions


@dataclass(kw_only=True)
class Options(DenseOptions):
    width: int = option(500, "of the hidden layers", NATURAL)


def main() -> None:
    options = Options.parse(__doc__, skip=["fc5"], weight_decay=3e-4)
    script.run(options, MLP, Path(__file__).parent / "results" / "mlp")


if __name__ == "__main__":
    main()

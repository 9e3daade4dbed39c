"""The paper's five-layer net 784-w-w-w-w-10 with ordinary dense layers, on MNIST: the twin of mlp_mnist.py.

python mnist/mlp_mnist_baseline.py --width 500 --epochs 20

2 minutes on two CPU cores; prints a test accuracy of 99.1 %.
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import MLP


def main() -> None:
    parser = cli.training_parser(__doc__, low_rank=False, skip=["fc5"], weight_decay=3e-4)
    parser.add_argument("--width", type=cli.NATURAL, default=500, help="of the hidden layers")
    args = cli.parse(parser)
    results = Path(__file__).parent / "results" / "mlp"
    script.run(args, MLP, results, settings={"width": args.width})


if __name__ == "__main__":
    main()

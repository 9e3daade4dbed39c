"""ConvNet with dynamical low-rank training, on digits in clutter: a network to explain in seconds.

    python pytorch-grad-cam/convnet_clutter.py

Half a minute on one CPU core; prints a test accuracy of about 93 % at 49 % compression.
"""

from pathlib import Path

from dlrt import cli, script
from dlrt.models import ConvNet


def main() -> None:
    defaults = {"dataset": "clutter", "epochs": 6, "batch_size": 64, "lr": 0.1, "augment": False}
    parser = cli.training_parser(__doc__, low_rank=True, tau=0.1, skip=["features.0"], **defaults)
    script.run(cli.parse(parser), ConvNet, Path(__file__).parent / "results" / "convnet")


if __name__ == "__main__":
    main()

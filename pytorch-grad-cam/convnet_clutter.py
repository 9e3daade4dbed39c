"""ConvNet with dynamical low-rank training, on digits in clutter: a network to explain in seconds.

    python pytorch-grad-cam/convnet_clutter.py

Half a minute on one CPU core; prints a test accuracy of about 93 % at 49 % compression.
"""

from pathlib import Path

from dlrt import script
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import ConvNet


def main() -> None:
    defaults = {"dataset": "clutter", "epochs": 6, "batch_size": 64, "lr": 0.1, "augment": False}
    options = LowRankOptions.parse(__doc__, tau=0.1, skip=["features.0"], **defaults)
    script.run(options, ConvNet, Path(__file__).parent / "results" / "convnet")


if __name__ == "__main__":
    main()

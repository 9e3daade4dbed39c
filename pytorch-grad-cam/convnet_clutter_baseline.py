"""ConvNet with ordinary dense layers, on digits in clutter: the twin of convnet_clutter.py.

    python pytorch-grad-cam/convnet_clutter_baseline.py

Half a minute on one CPU core; prints a test accuracy of about 95 %.
"""

from dataclasses import dataclass
from pathlib import Path

from dlrt import script
from dlrt.flags import POSITIVE
from dlrt.models import ConvNet
from dlrt.option_fields import option
from dlrt.options import DenseOptions


@dataclass(kw_only=True)
class Options(DenseOptions):
    width: float = option(1.0, "of its channels that each layer has", POSITIVE, metavar="SHARE")


def main() -> None:
    defaults = {"dataset": "clutter", "epochs": 6, "batch_size": 64, "lr": 0.1, "augment": False}
    options = Options.parse(__doc__, skip=["features.0"], **defaults)
    settings = {} if options.width == 1 else {"width": options.width}
    script.run(options, ConvNet, Path(__file__).parent / "results" / "convnet", settings)


if __name__ == "__main__":
    main()

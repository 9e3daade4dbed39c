"""A plain GPT with ordinary dense layers, on the sources of Python's own standard library.

python gpt/gpt_text_baseline.py --update muon --update-lr 0.02

About ten minutes on a CPU core. For texts of one's own: --dataset text --data-dir FOLDER
"""

from dataclasses import dataclass
from pathlib import Path

from dlrt import script
from dlrt.datasets import TEXTS
from dlrt.flags import NATURAL
from dlrt.models import GPT
from dlrt.option_fields import option
from dlrt.options import DenseOptions


@dataclass(kw_only=True)
class Options(DenseOptions):
    dataset: str = option("stdlib", "text is every *.txt below --data-dir", choices=TEXTS)
    width: int = option(128, "of the residual stream, a multiple of 8", NATURAL)
    depth: int = option(4, "blocks", NATURAL)


def main() -> None:
    defaults = {"epochs": 3, "batch_size": 32, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.1}
    options = Options.parse(__doc__, skip=["head"], label_smoothing=0.0, augment=False, **defaults)
    script.run(options, GPT, Path(__file__).parent / "runs")


if __name__ == "__main__":
    main()

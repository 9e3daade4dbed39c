"""LeNet5 with plain factors U Vᵀ and SGD, from the same weights: the twin of lenet5_mnist.py.

python UV_vanilla/lenet5_mnist_baseline.py --decay 10 --lr 0.1        5 minutes on a CPU core, to 98.6 %
"""

from dataclasses import dataclass
from pathlib import Path

from factored import AS_IN_THE_PAPER, DECAY, OF_DECAY, vanilla_lenet5

from dlrt import script
from dlrt.errors import OptionError
from dlrt.flags import NATURAL
from dlrt.option_fields import option
from dlrt.options import DenseOptions


@dataclass(kw_only=True)
class Options(DenseOptions):
    rank: int = option(20, "of every layer large enough", NATURAL)
    decay: float = option(1.0, OF_DECAY, DECAY)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors:
            raise OptionError(
                "here all layers are in factors from the beginning, of --rank: leave --factors out"
            )


def main() -> None:
    options = Options.parse(__doc__, **AS_IN_THE_PAPER)
    script.run(options, vanilla_lenet5, Path(__file__).parent / "runs")


if __name__ == "__main__":
    main()

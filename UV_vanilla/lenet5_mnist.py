"""LeNet5 with DLRT at fixed rank, from weights whose singular values decay.

python UV_vanilla/lenet5_mnist.py --decay 10        6 minutes on a CPU core, to 98.3 %
"""

from dataclasses import dataclass
from pathlib import Path

from factored import AS_IN_THE_PAPER, DECAY, OF_DECAY, decayed_lenet5

from dlrt import script
from dlrt.errors import OptionError
from dlrt.low_rank_options import LowRankOptions
from dlrt.option_fields import option


@dataclass(kw_only=True)
class Options(LowRankOptions):
    decay: float = option(1.0, OF_DECAY, DECAY)

    def __post_init__(self) -> None:
        fixed = self.max_rank in (None, self.rank) and self.min_rank in (2, self.rank)
        changed = self.skip or self.tau or self.compression is not None or not fixed
        if not isinstance(self.rank, int) or changed:
            raise OptionError(
                f"here all layers have one rank, --rank, a whole number (got {self.rank}), to the end: "
                "leave out --skip, --tau, --compression, --min-rank and --max-rank"
            )
        self.min_rank = self.max_rank = self.rank
        super().__post_init__()


def main() -> None:
    fixed = {"tau": 0.0, "tau_warmup": 0.0, "rank": 20}
    options = Options.parse(__doc__, **fixed, **AS_IN_THE_PAPER)
    settings = {"rank": options.rank, "decay": options.decay}  # rank is an option of all low-rank scripts
    script.run(options, decayed_lenet5, Path(__file__).parent / "runs", settings)


if __name__ == "__main__":
    main()

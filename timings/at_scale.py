"""What a training step of a 7-billion-parameter transformer holds, sends and computes: by count, not by run.

    python timings/at_scale.py      half a minute

Data-parallel training in float32 with momentum, bases updated in every step. Counted are matrix products:
those of forward and backward passes by their formula, those of an update of bases in real steps of layers a
quarter as wide, of a quarter of the rank. QR and SVD are not counted. The table goes to at_scale.csv and
at_scale.md.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from measure import ROUND, flops
from networks import decaying, resting_dlrt
from torch import nn

from dlrt import LowRankLinear, errors, markup, tables
from dlrt.flags import NATURAL, HelpFormatter, Parser
from dlrt.ranks import parameters

FLOAT = 4  # bytes
PASSES = 3  # forwards, and backwards to inputs and to weights: each 2 operations a number and token
SMALLER = 4  # operations of an update grow with the third power of all sizes


class Transformer(NamedTuple):
    """Blocks of four square projections and a gated feed-forward; embedding and head stay dense."""

    blocks: int = 32
    width: int = 4096
    hidden: int = 11008
    vocabulary: int = 32000

    @property
    def weights(self) -> list[tuple[int, int]]:
        """The shapes of the matrices that become low-rank."""
        square, gate, down = (self.width,) * 2, (self.hidden, self.width), (self.width, self.hidden)
        return self.blocks * [*4 * [square], gate, gate, down]

    @property
    def rest(self) -> int:
        """How many parameters embedding and head have."""
        return 2 * self.vocabulary * self.width


@cache
def update(m: int, n: int, rank: int, smaller: int = SMALLER) -> float:
    """Operations of an update of the bases of an m x n weight, the mean of a round of steps."""
    m, n, rank = m // smaller, n // smaller, max(1, rank // smaller)
    layer = decaying(LowRankLinear(n, m, rank, bias=False))
    optimizer = resting_dlrt(nn.Sequential(layer), "parallel")
    counted = 0
    for _ in range(ROUND):
        optimizer.zero_grad()
        (layer(torch.randn(2 * rank, n)) * torch.randn(2 * rank, m)).mean().backward()  # of any direction
        counted += flops(optimizer.step)
    return smaller**3 * counted / ROUND


def count(net: Transformer, rank: int | None, tokens: int) -> dict[str, str]:
    """The row of a rank, of a step on so many tokens for each GPU; None is the dense net."""
    sides, dense = sum(m + n for m, n in net.weights), sum(m * n for m, n in net.weights)
    weights = dense if rank is None else sum(parameters(rank, shape) for shape in net.weights)
    factors = dense if rank is None else rank * sides + rank**2 * len(net.weights)
    numbers = net.rest + factors
    passes = 2 * PASSES * tokens * (weights + net.rest // 2)  # to look up an embedding costs nothing
    bases = 0 if rank is None else sum(update(m, n, rank) for m, n in net.weights)
    return {
        "rank": "dense" if rank is None else str(rank),
        "parameters": f"{(net.rest + weights) / 1e9:.2f} billion",
        "held [GB]": f"{3 * FLOAT * numbers / 1e9:.1f}",
        "to be summed [GB]": f"{FLOAT * numbers / 1e9:.1f}",
        "passes [TFLOP]": f"{passes / 1e12:.0f}",
        "update of bases [TFLOP]": f"{bases / 1e12:.1f}",
        "on top [%]": f"{100 * bases / passes:.1f}",
    }


def table(net: Transformer, ranks: list[int], tokens: int) -> pd.DataFrame:
    return pd.DataFrame([count(net, rank, tokens) for rank in (None, *ranks)])


@errors.boundary("nothing is written yet")
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--ranks", type=NATURAL, nargs="+", default=(128, 256, 512, 1024), help="of all matrices")
    add("--tokens", type=NATURAL, default=4096, help="of a batch, for each GPU")
    add("--output-dir", type=Path, default=Path(__file__).parent, help="where it writes to")
    args, net = parser.parse_args(), Transformer()
    if (largest := max(args.ranks)) > net.width:
        parser.error(f"--ranks must be at most the width, {net.width}, got {largest}")
    args.output_dir.mkdir(parents=True, exist_ok=True)  # before anything is counted
    torch.manual_seed(0)
    found = table(net, args.ranks, args.tokens)
    caption = (
        f"{net.blocks} blocks of width {net.width}, {net.hidden} hidden, a vocabulary of {net.vocabulary}; "
        f"{args.tokens} tokens on each GPU. What every GPU holds (weights, gradients, velocity), gives to be "
        f"summed and computes in a step, without activations and attention scores. {tables.COUNTED}"
    )
    tables.write(found, args.output_dir, caption, "at_scale", [*found.columns.drop("parameters")])
    print(markup.markdown(found, caption))


if __name__ == "__main__":
    main()

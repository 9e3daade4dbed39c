"""How long a map takes at each share of the full rank, against the dense network, in one process.

    python pytorch-grad-cam/map_times.py --arch ResNet20 --weights random

Half a minute on two CPU cores. Medians of maps made in turn; all that a call does is counted, prediction and
map. Sixteen pictures of 32 x 32 at a time, fewer of larger ones.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import network_flags
import pandas as pd
import torch

import dlrt
from dlrt import errors
from dlrt.cams import explain, networks
from dlrt.cams.networks import Network
from dlrt.errors import RunError
from dlrt.options import NATURAL, HelpFormatter, Parser, number
from dlrt.timing import medians

PIXELS = 16 * 32 * 32  # at a time


def map_times(
    network: Network, layer: str, method: str, shares: list[float], sizes: list[int], repeats: int = 15
) -> pd.DataFrame:
    """A row per size and share of the full rank: milliseconds per picture, dense ones, and low-rank / dense.

    Sizes that the network cannot see are left out. ValueError for a network that is low-rank itself.
    """
    if dlrt.compression(network.model).ranks:
        raise ValueError(f"times are measured against a dense network, got {network.label}: give a dense run")
    models = [network.model] + [dlrt.to_low_rank(deepcopy(network.model), rank=share) for share in shares]
    rows = []
    for size in sizes:
        count = max(1, PIXELS // size**2)
        x = torch.randn(count, network.shape[0], size, size, device=network.device)
        try:
            networks.placed(network, size, network.device)
        except ValueError as error:
            print(f"{error}: its time is not measured there")
            continue
        dense, *others = medians(
            [partial(explain, model, x, None, method, layer) for model in models], repeats
        )
        for share, model, milliseconds in zip(shares, models[1:], others, strict=True):
            compression = dlrt.compression(model).evaluation_compression
            row = {"pixels": size, "pictures": count, "share": share, "compression": round(compression, 2)}
            row |= {"milliseconds": milliseconds / count, "dense_milliseconds": dense / count}
            rows.append({**row, "ratio": milliseconds / dense})
            print(
                f"{size:3} pixels, {share:5.3f} of the full rank: {milliseconds / count:7.2f} ms per map, "
                f"dense {dense / count:7.2f} ms, {milliseconds / dense:.2f} of it",
                flush=True,
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    network_flags.add_flags(parser)
    add = parser.add_argument
    share = number(float, "(0, 1]")
    add("--shares", type=share, nargs="+", default=[1.0, 0.5, 0.25, 0.125], help="of the full rank")
    add("--sizes", type=NATURAL, nargs="+", default=[32, 224], help="pixels a side")
    add("--repeats", type=NATURAL, default=15, help="timed maps of each network")
    args = parser.parse_args()
    try:
        network = network_flags.read(args)
        layer = network_flags.target_layer(network, None, args.method)
        with errors.boundary(code=errors.STOPPED):
            map_times(network, layer, args.method, args.shares, args.sizes, args.repeats)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""How long a map takes at each share of the full rank, against the dense network, in one process."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pandas as pd
import torch

import dlrt
from dlrt.cams import explain, networks
from dlrt.cams.explain import target_maps
from dlrt.cams.networks import Network
from dlrt.timing import medians

PIXELS = 16 * 32 * 32  # at a time


def map_times(
    network: Network, layer: str, method: str, shares: list[float], sizes: list[int], repeats: int = 15
) -> pd.DataFrame:
    """A row per size and share of the full rank: milliseconds per picture, dense ones, and low-rank / dense.

    Sizes that the network cannot see are left out. ValueError for a network that is low-rank itself.
    """
    if dlrt.compression(network.model).compressed:
        raise ValueError(f"times are measured against a dense network, got {network.label}: give a dense run")
    models = [network.model] + [dlrt.to_low_rank(deepcopy(network.model), rank=share) for share in shares]
    rows = []
    for size in sizes:
        count = max(1, PIXELS // size**2)
        x = torch.randn(count, network.shape[0], size, size, device=network.device)
        try:
            networks.placed(network, size, network.device)
            target_maps(network.model, layer, x[:1], method)
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

"""A folder of comparisons: a table and maps of each network, which goes on where it broke off."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd

from dlrt.cams import Maps, build_networks, measure
from dlrt.cams.load_pictures import digest
from dlrt.cams.pictures import Picture
from dlrt.checkpoint import atomic_write, save_table
from dlrt.errors import KEPT, RunError
from dlrt.runs import read_table

FULL_RANK_TOLERANCE = 2e-5
COLUMNS = ("pearson", "deletion", "insertion", "road")
SHOWN = 8  # pictures in the grid
DELETE = "delete it and call this again"


class Weighed(TypedDict):
    """What a row of a table must say of its network, for a comparison that goes on."""

    weights: str


class Compared(TypedDict):
    """What a row of a table must say of its map, for the control of full rank."""

    file: str
    target: Literal["same", "own"]
    defined: bool
    largest_difference: float


def recorded(
    args: argparse.Namespace, reference: build_networks.Candidate, layer: str, pictures: Sequence[Picture]
) -> dict[str, Any]:
    """The options that a comparison must share with one that it continues."""
    return {
        "images": Path(args.images).resolve().name,
        "count": len(pictures),
        "pictures": digest(pictures),
        "reference": reference.network.label,
        "reference_weights": reference.fingerprint(),
        "input": list(reference.network.shape),
        "method": args.method,
        "target_layer": layer,
        "faithfulness": not args.no_faithfulness,
    }


def compare(
    found: Sequence[build_networks.Candidate],
    pictures: Sequence[Picture],
    settings: measure.Settings,
    folder: Path,
) -> None:
    """Measure every network that is not there yet: its table NETWORK.csv, and its part of the grid.

    The files of networks that were compared in an earlier call stay.
    """
    reference = measure.make_maps(found[0].network, pictures, None, found[0].method, settings)
    save_pictures(folder / "pictures.npz", pictures[:SHOWN])
    for candidate in found:
        path = folder / f"{candidate.network.label}.csv"
        start = time.perf_counter()
        if path.exists() and (read_table(path, Weighed, DELETE)["weights"] == candidate.fingerprint()).all():
            print(f"{candidate.network.label}: is there")
            continue
        table, maps = measure.measure(candidate, pictures, reference, settings)
        save_maps(folder / f"{candidate.network.label}.npz", maps)
        save_table(path, table)
        print(f"{line(table)}; {time.perf_counter() - start:.0f} s", flush=True)


def save_pictures(path: Path, pictures: Sequence[Picture]) -> None:
    """The pictures of the grid, at most 256 pixels a side, by name."""
    small = {}
    for picture in pictures:
        image = picture.image.convert("RGB")
        image.thumbnail((256, 256))
        small[picture.name] = np.asarray(image)
    atomic_write(path, partial(np.savez_compressed, **small), KEPT)


def save_maps(path: Path, maps: Maps) -> None:
    """The displayed maps of the grid's pictures."""
    shown = maps.displayed[:SHOWN].astype(np.float16)
    atomic_write(path, partial(np.savez_compressed, displayed=shown), KEPT)


def line(table: pd.DataFrame) -> str:
    """A line about a network."""
    same = table[table["target"] == "same"]
    agreement = (same["predicted"] == same["reference_predicted"]).mean()
    numbers = [f"{name} {same[name].mean():.3f}" for name in COLUMNS if same[name].notna().any()]
    undefined = f"undefined maps {int((~same['defined']).sum())} of {len(same)}"
    return (
        f"{same['network'].iloc[0]}: same class {100 * agreement:.1f} %, {', '.join([*numbers, undefined])}"
    )


def check_full_rank(folder: Path, reference: str, method: str) -> None:
    """RunError where the reference in low-rank layers of full rank has other maps, or leaves out others."""
    full, dense = (
        read_table(folder / f"{name}.csv", Compared, DELETE).set_index("file")
        for name in ("full_rank", reference)
    )
    full, dense = (table[table["target"] == "same"] for table in (full, dense))
    if other := list(full.index[full["defined"] != dense["defined"]]):
        raise RunError(
            f"of {', '.join(other)} only one of the full-rank and the dense map is defined: "
            f"the figures in {folder} cannot be trusted, and it is a fault of dlrt to be reported"
        )
    largest = max(full.loc[full["defined"], "largest_difference"].fillna(np.inf), default=0.0)
    if largest > FULL_RANK_TOLERANCE:
        if method == "fullgrad":  # its gradients jump where a ReLU's input is 0 but for rounding
            print(f"full rank: maps differ by up to {largest:.2g}, by rounding at the kinks of ReLUs")
            return
        raise RunError(
            f"full-rank maps differ by {largest:.2g}, more than {FULL_RANK_TOLERANCE}: "
            f"the figures in {folder} cannot be trusted, and it is a fault of dlrt to be reported"
        )
    print(f"full rank: maps agree with the dense ones within {largest:.2g}")

"""Compare the class-activation maps of low-rank networks with those of a dense reference.

    python pytorch-grad-cam/compare_cams.py --reference DENSE --low-rank RUN RUN --seeds OTHER_DENSE \\
        --images cifar10-test --count 200 --name cifar10

DENSE, RUN, OTHER_DENSE are run folders; --taus cuts low-rank networks from the reference by its SVD. Every
network explains the class that the reference predicts and, separately, its own. Beside them stand controls:
the reference at full rank in low-rank layers, with random weights, and RandomCAM. Prints a line per network
and leaves pytorch-grad-cam/results/NAME/, which produce_results.py draws. About 40 seconds for a
ResNet20 and 200 pictures of 32 x 32 on one core; networks that are there already are not measured again. It
ends with 1 where a picture was left out, with 2 for a mistake, before anything is made, and with 3 where it
cannot go on or where the maps of full rank are not the dense ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import candidates
import measure
import network_flags
import numpy as np
import pandas as pd
from map_times import map_times
from sources import digest, pictures_of

from dlrt import errors
from dlrt.cams import Maps, networks
from dlrt.cams.pictures import Picture
from dlrt.checkpoint import atomic_write
from dlrt.datasets import DATASETS
from dlrt.errors import KEPT, LEFT_OUT, DataError, RunError
from dlrt.options import DATA_DIR, FOLDER_NAME, NATURAL, TOLERANCE, HelpFormatter, Parser, number
from dlrt.runs import Run, read_table

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


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    network_flags.add_flags(parser, run_flag="--reference")
    network_flags.add_size_flag(parser)
    add("--low-rank", type=Path, nargs="*", default=[], metavar="RUN", help="trained low-rank networks")
    add("--taus", type=TOLERANCE, nargs="*", default=[], help="tolerances at which the reference is cut")
    add("--seeds", type=Path, nargs="*", default=[], metavar="RUN", help="dense networks of other seeds")
    tests = ", ".join(f"{name}-test" for name in DATASETS)
    add("--images", required=True, help=f"a folder of pictures (labels.csv there is read), or {tests}")
    add("--count", type=NATURAL, default=200, help="of pictures, the first ones")
    add("--target-layer", metavar="NAME", help="by default the output of the last convolutional block")
    add(
        "--no-faithfulness",
        action="store_true",
        help="leave out ROAD, deletion and insertion, nine tenths of the time",
    )
    shares = "shares of the full rank at which the time per map is measured; none: not measured"
    add(
        "--time-shares",
        type=number(float, "(0, 1]"),
        nargs="*",
        default=[1.0, 0.5, 0.25, 0.125],
        help=shares,
    )
    sizes = "pixels a side at which it is measured; by default the input's and 224"
    add("--time-sizes", type=NATURAL, nargs="*", help=sizes)
    add("--batch-size", type=NATURAL, default=50, help="pictures at a time")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--output-dir", type=Path, default=Path(__file__).parent / "results", help="where the folder goes")
    add("--name", type=FOLDER_NAME, help="of the folder; by default that of --images")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        reference = network_flags.read(args, args.image_size)
        layer = network_flags.target_layer(reference, args.target_layer, args.method)
        found = candidates.gather(
            reference, args.method, args.low_rank, args.taus, args.seeds, args.image_size
        )
        candidates.check(found, layer)
        pictures, failed = pictures_of(args.images, args.count, args.data_dir, reference)
        options = recorded(args, found[0], layer, pictures)
        run = Run(args.output_dir / (args.name or options["images"]))
        run.start(options, resume=True)
    except (RunError, DataError, ValueError, OSError) as error:
        parser.error(str(error))
    for network in {one.network.trained: one.network for one in reversed(found)}.values():
        networks.warn(network)  # once of each size
    settings = measure.Settings(layer, args.batch_size, not args.no_faithfulness)
    with errors.boundary(code=errors.STOPPED):
        compare(found, pictures, settings, run.folder)
        if args.time_shares:
            sizes = args.time_sizes or sorted({reference.shape[1], 224})
            times = map_times(reference, layer, args.method, args.time_shares, sizes)
            if len(times):
                save_table(run.folder / "times.csv", times)
        check_full_rank(run.folder, reference.label, args.method)
    where = "" if args.output_dir == parser.get_default("output_dir") else f" --results {args.output_dir}"
    print(f"{run.folder}: draw it with python pytorch-grad-cam/produce_results.py{where}")
    sys.exit(LEFT_OUT if failed else 0)


def recorded(
    args: argparse.Namespace, reference: candidates.Candidate, layer: str, pictures: Sequence[Picture]
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
    found: Sequence[candidates.Candidate],
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


def save_table(path: Path, table: pd.DataFrame) -> None:
    atomic_write(path, lambda file: table.to_csv(file, index=False, float_format="%.6g"), KEPT)


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


if __name__ == "__main__":
    main()

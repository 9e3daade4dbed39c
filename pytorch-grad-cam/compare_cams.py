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

import sys
from collections.abc import Sequence
from pathlib import Path

from dlrt import errors
from dlrt.cams import build_networks, measure, network_flags, networks
from dlrt.cams.comparison import check_full_rank, compare, recorded
from dlrt.cams.load_pictures import pictures_of
from dlrt.cams.map_times import map_times
from dlrt.cams.page import write_page
from dlrt.checkpoint import save_table
from dlrt.datasets import DATASETS
from dlrt.errors import LEFT_OUT, DataError, RunError
from dlrt.flags import FOLDER_NAME, NATURAL, SHARE, TOLERANCE, HelpFormatter, Parser
from dlrt.options import DATA_DIR
from dlrt.runs import Run


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
    faithfulness = "leave out ROAD, deletion and insertion, nine tenths of the time"
    add("--no-faithfulness", action="store_true", help=faithfulness)
    shares = "shares of the full rank at which the time per map is measured; none: not measured"
    add("--time-shares", type=SHARE, nargs="*", default=[1.0, 0.5, 0.25, 0.125], help=shares)
    add("--html", action="store_true", help="also page.html: a slider over compression, a table to sort")
    sizes = "pixels a side at which it is measured; by default the input's and 224"
    add("--time-sizes", type=NATURAL, nargs="*", help=sizes)
    add("--batch-size", type=NATURAL, default=50, help="pictures at a time")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--output-dir", type=Path, default=Path(__file__).parent / "results", help="where the folder goes")
    add("--name", type=FOLDER_NAME, help="of the folder; by default that of --images")
    return parser


@errors.boundary(code=errors.STOPPED)
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        reference = network_flags.read(args, args.image_size)
        layer = network_flags.target_layer(reference, args.target_layer, args.method)
        found = build_networks.gather(
            reference, args.method, args.low_rank, args.taus, args.seeds, args.image_size
        )
        build_networks.check(found, layer)
        pictures, failed = pictures_of(args.images, args.count, args.data_dir, reference)
        options = recorded(args, found[0], layer, pictures)
        run = Run(args.output_dir / (args.name or options["images"]))
        run.start(options, resume=True, device=args.device)
    except (RunError, DataError, ValueError, OSError) as error:
        parser.error(str(error))
    networks.warn([one.network for one in found])
    settings = measure.Settings(layer, args.batch_size, not args.no_faithfulness)
    compare(found, pictures, settings, run.folder)
    if args.time_shares:
        sizes = args.time_sizes or sorted({reference.shape[1], 224})
        times = map_times(reference, layer, args.method, args.time_shares, sizes)
        if len(times):
            save_table(run.folder / "times.csv", times)
    check_full_rank(run.folder, reference.label, args.method)
    if args.html:
        print(f"page: {write_page(run.folder)}")
    where = "" if args.output_dir == parser.get_default("output_dir") else f" --results {args.output_dir}"
    print(f"{run.folder}: draw it with python pytorch-grad-cam/produce_results.py{where}")
    sys.exit(LEFT_OUT if failed else 0)


if __name__ == "__main__":
    main()

"""Draw what a network looked at: class-activation maps of dense and low-rank networks on your own pictures.

    python pytorch-grad-cam/cam.py --image-path test_images --compression 10 25
    python pytorch-grad-cam/cam.py --checkpoint RUN --image-path cat.png --method gradcam,layercam

By default it explains EfficientNet-Lite0, trained on ImageNet. Networks that are cut are drawn beside the
dense one, and explain the class that it predicts. A second or two for a folder of ten pictures. Prints a
line per map and leaves in --output-dir the map over the picture (.cam.png) and the map itself (.cam.npz:
raw, displayed); where a picture has several maps, their names say which, and cams.png and cams.pdf show the
first pictures with all of them. Of the last call, all numbers are in cams.csv and the options in
config.json. A picture that cannot be read is told, the others are done, and the program ends with 1; for
all other mistakes with 2, before anything is made; with 3 where a file cannot be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dlrt import errors, plots
from dlrt.cams import METHODS, check_options, network_flags, networks
from dlrt.cams.batch_maps import chosen_classes, explained
from dlrt.cams.figure import figure
from dlrt.cams.guided import check_guided
from dlrt.cams.load_pictures import batches, readable
from dlrt.cams.map_records import warn_of_changes, write_records
from dlrt.cams.pictures import files
from dlrt.errors import LEFT_OUT, RunError
from dlrt.flags import NATURAL, HelpFormatter, Parser

FIGURE_ROWS = 12


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    network_flags.add_flags(parser, several=True)
    network_flags.add_size_flag(parser)
    network_flags.add_flags_beside(parser)
    several = {"nargs": "+", "action": "extend"}  # of a flag that is given twice no value is lost
    add = parser.add_argument
    add("--image-path", type=Path, required=True, help="a picture, or a folder, read in sorted order")
    add("--target-layer", metavar="NAME", help="by default the output of the last convolutional block")
    targets = (
        "classes to explain, by name or number, a map for each: cat dog; cat,dog is one map of their sum; or "
    )
    targets += 'a file of lines "file,class[,class...]"; by default the class that the first network predicts'
    add("--targets", metavar="CLASS", help=targets, **several)
    add("--aug-smooth", action="store_true", help="mean over mirrored and brighter or darker pictures")
    add("--eigen-smooth", action="store_true", help="the first principal component in place of the sum")
    add("--guided", action="store_true", help="also the map times guided backpropagation (.guided.png)")
    add("--output-dir", type=Path, default=Path("cams"), help="made if it is not there")
    add("--batch-size", type=NATURAL, default=16, help="pictures at a time")
    return parser


@errors.boundary(code=errors.STOPPED)
def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    args.method = list(dict.fromkeys(args.method or ["gradcam"]))
    try:
        for method in args.method:
            check_options(method, args.aug_smooth, args.eigen_smooth)
        paths = files(args.image_path)
        if args.output_dir.resolve() == paths[0].parent.resolve():
            raise ValueError("--output-dir must be another folder than that of the pictures")
        nets = network_flags.read_all(args)
        layer, *_ = (network_flags.target_layer(nets[0], args.target_layer, method) for method in args.method)
        networks.check_alike(nets, layer)
        for network in nets if args.guided else ():
            check_guided(network.model)
        classes = chosen_classes(args.targets, nets[0], paths)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))
    networks.warn(nets)
    for network in nets:
        networks.warn_if_larger(network)
    table, rows, failed = [], [], False
    for part in batches(len(paths), args.batch_size, args.method):
        pictures, unread = readable(paths[part])
        failed |= unread
        if pictures:
            more, drawn = explained(nets, pictures, classes, layer, part.start, args)
            table += more
            rows += drawn[: FIGURE_ROWS - len(rows)]
    if table:
        write_records(pd.DataFrame(table), nets, layer, args)
        warn_of_changes(pd.DataFrame(table), nets[0])
    if len(table) > len({record["file"] for record in table}):
        kinds = [f"{METHODS[method].__name__}\n" * (len(args.method) > 1) for method in args.method]
        headers = [f"{kind}{net.title}" for kind in kinds for net in nets]
        print(f"figure: {plots.save(figure(rows, headers), [args.output_dir], 'cams')}")
    sys.exit(LEFT_OUT if failed else 0)


if __name__ == "__main__":
    main()

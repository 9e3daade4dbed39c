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

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import network_flags
import pandas as pd
from batch_maps import Classes, explained
from sources import batches, readable

import dlrt
from dlrt import errors, plots
from dlrt.cams import METHODS, check_options, known, networks
from dlrt.cams.figure import figure
from dlrt.cams.networks import Network
from dlrt.cams.pictures import PictureError, files, read_labels
from dlrt.checkpoint import atomic_write
from dlrt.errors import KEPT, LEFT_OUT, RunError
from dlrt.options import NATURAL, NOT_PART_OF_THE_EXPERIMENT, PERCENT, RANK, TOLERANCE, HelpFormatter, Parser
from dlrt.runs import environment

FIGURE_ROWS = 12


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    network_flags.add_flags(parser, several=True)
    network_flags.add_size_flag(parser)
    several = {"nargs": "+", "action": "extend"}  # of a flag that is given twice no value is lost
    add = parser.add_argument
    add("--compare", type=Path, default=[], metavar="RUN", help="runs to draw beside the network", **several)
    tau = "cut the network by the SVD of each layer at these tolerances"
    add("--low-rank", type=TOLERANCE, default=[], metavar="TAU", help=tau, **several)
    rank = "the same, to these ranks: 20, or a share of the full one: 0.5"
    add("--rank", type=RANK, default=[], metavar="RANK", help=rank, **several)
    compression = "the same, to these compressions, for which the singular values of all layers compete"
    add("--compression", type=PERCENT, default=[], metavar="PERCENT", help=compression, **several)
    skip = "layers that are not cut, with all that they contain"
    add("--skip", default=[], metavar="LAYER", help=skip, **several)
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
        nets = networks_to_draw(args)
        layer, *_ = (network_flags.target_layer(nets[0], args.target_layer, method) for method in args.method)
        networks.check_alike(nets, layer)
        classes = chosen_classes(args.targets, nets[0], paths)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))
    networks.warn(nets[0])
    for network in nets:
        networks.warn_if_larger(network)
    table, rows, failed = [], [], False
    with errors.boundary(code=errors.STOPPED):
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
        if len(table) > len({its["file"] for its in table}):
            kinds = [f"{METHODS[method].__name__}\n" * (len(args.method) > 1) for method in args.method]
            headers = [f"{kind}{net.title}" for kind in kinds for net in nets]
            print(f"figure: {plots.save(figure(rows, headers), [args.output_dir], 'cams')}")
    sys.exit(LEFT_OUT if failed else 0)


def networks_to_draw(args: argparse.Namespace) -> list[Network]:
    """The network that the flags name, and all that are drawn beside it."""
    first = network_flags.read(args, args.image_size)
    ways = ("compression", args.compression), ("tau", args.low_rank), ("rank", args.rank)
    cuts = [{way: value} for way, values in ways for value in dict.fromkeys(values)]
    if args.skip and not cuts:
        raise ValueError("--skip must come with --low-rank, --rank or --compression: nothing is cut")
    runs = [networks.placed(known.from_run(run), args.image_size, args.device) for run in args.compare]
    return [first, *runs, *(networks.truncated(first, skip=args.skip, **cut) for cut in cuts)]


def chosen_classes(
    texts: Sequence[str] | None, network: Network, paths: Sequence[Path]
) -> dict[str, list[Classes]] | None:
    """What to explain of each file, None for the predicted class; ValueError where a class is unknown."""
    if texts is None:
        return None
    chosen: dict[str, list[Classes]] = {path.name: [] for path in paths}
    for text in texts:
        if Path(text).is_file():
            labels = read_labels(Path(text), network.class_number)
            lines = {name: [classes for classes, _ in its if classes] for name, its in labels.items()}
        elif text.endswith(".csv"):
            raise PictureError(f"--targets: there is no {text}")
        else:
            classes = tuple(dict.fromkeys(network.class_number(part) for part in text.split(",")))
            lines = {name: [classes] for name in chosen}
        if missing := [name for name in chosen if not lines.get(name)]:
            raise PictureError(
                f"--targets {text} names no class for {', '.join(missing)}: add a line for each"
            )
        for name, its in chosen.items():
            its += lines[name]
    return {name: list(dict.fromkeys(its)) for name, its in chosen.items()}


def warn_of_changes(table: pd.DataFrame, first: Network) -> None:
    """Say on stderr which networks predict something else than the first one."""
    once = table.drop_duplicates(["file", "network"]).set_index("file")
    expected = once.loc[once["network"] == first.label, "predicted"]
    for label, its in once.groupby("network", sort=False):
        changed = its.index[its["predicted"] != expected[its.index]]
        if len(changed):
            told_of = f"something else than {first.label} on {len(changed)} of {len(its)} pictures"
            print(f"warning: {label} predicts {told_of}: {', '.join(changed)}", file=sys.stderr)


def write_records(table: pd.DataFrame, nets: Sequence[Network], layer: str, args: argparse.Namespace) -> None:
    """cams.csv and config.json; of files and folders the names alone, since records can be published."""
    form = {"index": False, "float_format": "%.6g"}
    atomic_write(args.output_dir / "cams.csv", lambda file: table.to_csv(file, **form), KEPT)
    options = {key: its for key, its in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["target_layer"] = layer if args.method != ["fullgrad"] else None
    config = {
        "networks": [about(network) for network in nets],
        "input": list(nets[0].shape),
        "device": str(nets[0].device),
        "options": {key: published(value) for key, value in options.items()},
        **environment(),
    }
    text = json.dumps(config, indent=2) + "\n"
    atomic_write(args.output_dir / "config.json", lambda file: file.write(text.encode()), KEPT)


def about(network: Network) -> dict[str, object]:
    count = dlrt.compression(network.model)
    compression = round(count.evaluation_compression, 3)
    return {"network": network.label, "ranks": count.ranks, "evaluation_compression": compression}


def published(value: object) -> object:
    """An option without the folders of files that are there."""
    if isinstance(value, list):
        return [published(its) for its in value]
    there = isinstance(value, (str, Path)) and Path(value).exists()
    return Path(value).resolve().name if there else value


if __name__ == "__main__":
    main()

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import network_flags
import numpy as np
import pandas as pd
import torch
from endings import KEPT, LEFT_OUT, told
from PIL import Image
from sources import batches, readable

import dlrt
from dlrt import cli, plots
from dlrt.cams import CLASSLESS, METHODS, Maps, check_options, explain, known, networks
from dlrt.cams.compare import similarity
from dlrt.cams.figure import Cell, Row, figure
from dlrt.cams.guided import guided_gradients, visible
from dlrt.cams.networks import Network
from dlrt.cams.pictures import Picture, PictureError, files, overlay, read_labels
from dlrt.cams.targets import of_classes
from dlrt.records import RunError
from dlrt.runs import NOT_PART_OF_THE_EXPERIMENT, surroundings, write_whole

FIGURE_ROWS = 12
LEAST = 256  # pixels of the longer side of what is drawn
Classes = tuple[int, ...]  # what a map explains: a class, or the sum of several


def make_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=cli.HelpFormatter)
    network_flags.add_flags(parser, several=True)
    network_flags.add_size_flag(parser)
    several = {"nargs": "+", "action": "extend"}  # of a flag that is given twice no value is lost
    add = parser.add_argument
    add("--compare", type=Path, default=[], metavar="RUN", help="runs to draw beside the network", **several)
    tau = "cut the network by the SVD of each layer at these tolerances"
    add("--low-rank", type=cli.TOLERANCE, default=[], metavar="TAU", help=tau, **several)
    rank = "the same, to these ranks: 20, or a share of the full one: 0.5"
    add("--rank", type=cli.rank, default=[], metavar="RANK", help=rank, **several)
    compression = "the same, to these compressions, for which the singular values of all layers compete"
    add("--compression", type=cli.percent, default=[], metavar="PERCENT", help=compression, **several)
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
    add("--batch-size", type=cli.NATURAL, default=16, help="pictures at a time")
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
    with told(parser):
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


@dataclass(frozen=True)
class Wanted:
    """A picture, the classes that a map of it explains, and what the files of the map are called."""

    picture: Picture
    classes: Classes
    name: str


def wanted(
    network: Network, pictures: Sequence[Picture], chosen: dict[str, list[Classes]] | None
) -> list[Wanted]:
    """What is to be explained of each picture: what was chosen, or the class that the network predicts."""
    if chosen is None:
        with torch.no_grad():
            predicted = network.model(network.images(pictures)).argmax(1).tolist()
        chosen = {picture.name: [(number,)] for picture, number in zip(pictures, predicted, strict=True)}
    found = []
    for picture in pictures:
        several = len(chosen[picture.name]) > 1
        for classes in chosen[picture.name]:
            numbers = "+".join(map(str, classes))
            found.append(Wanted(picture, classes, f"{picture.name}.{numbers}" if several else picture.name))
    return found


def explained(
    nets: Sequence[Network],
    pictures: Sequence[Picture],
    chosen: dict[str, list[Classes]] | None,
    layer: str,
    seed: int,
    args: argparse.Namespace,
) -> tuple[list[dict[str, object]], list[Row]]:
    """Explain a batch of pictures, write the files of each map and print its line.

    What comes back are the rows of cams.csv and those of the figure.
    """
    items = wanted(nets[0], pictures, chosen)
    x, targets = nets[0].images([it.picture for it in items]), of_classes(it.classes for it in items)
    table, rows = [], [figure_row(it, nets[0]) for it in items]
    for method in args.method:
        first = None
        for net, label in zip(nets, labels(nets), strict=True):
            maps = explain(net.model, x, targets, method, layer, args.aug_smooth, args.eigen_smooth, seed)
            first = first or maps
            gradients = guided_gradients(net.model, x, targets) if args.guided else [None] * len(items)
            for index, it in enumerate(items):
                its = numbers(it, index, maps, first, net, method)
                name = ".".join(filter(None, [it.name, method if len(args.method) > 1 else "", label]))
                write_map(args.output_dir / f"{name}.cam.png", it.picture, maps, index, gradients[index])
                print(line(its, args.output_dir / f"{name}.cam.png"), flush=True)
                table.append(its)
                changed = maps.logits[index].argmax() != first.logits[index].argmax()
                about = its["predicted"], bool(changed), its["target_probability"], its["correlation"]
                rows[index].cells.append(Cell(maps.displayed[index], *about))
    return table, rows


def labels(nets: Sequence[Network]) -> list[str]:
    """What tells the files of networks apart; where one was cut alone, its files have the plain name."""
    return [""] if len(nets) == 1 else [nets[0].label, ""] if len(nets) == 2 else [net.label for net in nets]


def figure_row(it: Wanted, network: Network) -> Row:
    image = it.picture.enlarged(LEAST).image.convert("RGB")
    image.thumbnail((2 * LEAST, 2 * LEAST))
    target = " + ".join(network.classes[number] for number in it.classes)
    return Row(np.asarray(image, dtype=np.float32) / 255, it.picture.name, target, [])


def write_map(path: Path, picture: Picture, maps: Maps, index: int, gradient: np.ndarray | None) -> None:
    """The map over the picture, the map itself, and with a gradient their product."""
    picture, shown = picture.enlarged(LEAST), maps.displayed[index]
    arrays = {"raw": maps.raw[index], "displayed": shown}
    save_png(path, Image.fromarray(overlay(picture.pixels(), shown)))
    if gradient is not None:
        arrays["guided"] = gradient * shown[..., None]
        product = Image.fromarray(visible(arrays["guided"])).resize(picture.image.size)
        save_png(path.with_suffix("").with_suffix(".guided.png"), product)
    write_whole(path.with_suffix(".npz"), partial(np.savez_compressed, **arrays), KEPT)


def save_png(path: Path, image: Image.Image) -> None:
    write_whole(path, partial(image.save, format="PNG"), KEPT)


def line(its: dict[str, object], path: Path) -> str:
    """A line about a map: picture, network, prediction, what it explains, and its file."""
    about = "map of the picture" if its["method"] in CLASSLESS else f"map of {its['target']}"
    about += f" ({its['target_probability']:.3f})"
    if not its["defined"]:
        about += ": undefined, nothing speaks for it, and the picture is left bare"
    elif np.isfinite(its["correlation"]):
        about += f", r = {its['correlation']:.3f}"
    return f"{its['file']}: {its['predicted']} {its['probability']:.3f}, {about}; {path}"


def numbers(
    it: Wanted, index: int, maps: Maps, first: Maps, network: Network, method: str
) -> dict[str, object]:
    """A row of cams.csv: prediction, target, what the map is like, and times."""
    probabilities, raw = maps.probabilities[index], maps.raw[index]
    predicted = int(maps.logits[index].argmax())  # probabilities may be equal where logits differ
    shown, defined = maps.displayed[index], bool(maps.defined[index])
    height, width = shown.shape
    peak = np.unravel_index(np.argmax(shown), shown.shape) if defined else (np.nan, np.nan)
    image = it.picture.image
    return {
        "file": it.picture.name,
        "network": network.label,
        "method": method,
        "predicted": network.classes[predicted],
        "probability": float(probabilities[predicted]),
        "target": " + ".join(network.classes[number] for number in it.classes),
        "target_probability": float(probabilities[list(it.classes)].sum()),
        "correlation": np.nan if maps is first else similarity(shown, first.displayed[index])["pearson"],
        "defined": defined,
        "raw_min": raw.min(),
        "raw_max": raw.max(),
        "raw_sum": raw.sum(),
        "share_above_half": float((shown >= 0.5).mean()) if defined else np.nan,
        "peak_x": (peak[1] + 0.5) / width * image.width,
        "peak_y": (peak[0] + 0.5) / height * image.height,
        **{f"{stage}_ms": milliseconds for stage, milliseconds in maps.milliseconds.items()},
    }


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
    write_whole(args.output_dir / "cams.csv", lambda file: table.to_csv(file, **form), KEPT)
    options = {key: its for key, its in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["target_layer"] = layer if args.method != ["fullgrad"] else None
    config = {
        "networks": [about(network) for network in nets],
        "input": list(nets[0].shape),
        "device": str(nets[0].device),
        "options": {key: published(value) for key, value in options.items()},
        **surroundings(),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_whole(args.output_dir / "config.json", lambda file: file.write(text.encode()), KEPT)


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

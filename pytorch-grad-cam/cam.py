"""Draw what a network looked at: class-activation maps of dense and low-rank networks on your own pictures.

    python pytorch-grad-cam/cam.py --arch resnet18 --weights random --image-path test_images --output-dir cams
    python pytorch-grad-cam/cam.py --checkpoint RUN --image-path cat.png --method layercam --targets cat,dog

A second or two for a folder of ten pictures. Prints a line per picture and leaves in --output-dir, for each,
the map over the picture (.cam.png) and the map itself (.cam.npz: raw, displayed); of the last call, all
numbers in cams.csv and the options in config.json. A picture that cannot be read is told, the others are
done, and the program ends with 1; for all other mistakes with 2, before anything is made; with 3 where a file
cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import networks
import numpy as np
import pandas as pd
from endings import KEPT, LEFT_OUT, told
from PIL import Image
from sources import batches, readable

import dlrt
from dlrt import cli
from dlrt.cams import CLASSLESS, Maps, check_options, explain
from dlrt.cams.guided import guided_gradients, visible
from dlrt.cams.pictures import Picture, PictureError, files, overlay, read_labels
from dlrt.cams.targets import of_classes
from dlrt.records import RunError
from dlrt.runs import NOT_PART_OF_THE_EXPERIMENT, surroundings, write_whole


def make_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    networks.add_flags(parser)
    networks.add_size_flag(parser)
    low_rank = parser.add_mutually_exclusive_group()
    tau = "truncate the SVD of each layer of a dense network at this tolerance"
    low_rank.add_argument("--low-rank", type=cli.TOLERANCE, metavar="TAU", help=tau)
    rank = "the same, to a rank: 20, or a share of the full one: 0.5"
    low_rank.add_argument("--rank", type=cli.rank, help=rank)
    add("--image-path", type=Path, required=True, help="a picture, or a folder, read in sorted order")
    add("--target-layer", metavar="NAME", help="by default the output of the last convolutional block")
    targets = "classes to explain, by name or number: cat, or cat,dog (their sum), or a file of lines "
    add(
        "--targets", metavar="CLASS", help=f'{targets}"file,class[,class...]"; by default the predicted class'
    )
    add("--aug-smooth", action="store_true", help="mean over mirrored and brighter or darker pictures")
    add("--eigen-smooth", action="store_true", help="the first principal component in place of the sum")
    add("--guided", action="store_true", help="also the map times guided backpropagation (.guided.png)")
    add("--output-dir", type=Path, default=Path("cams"), help="made if it is not there")
    add("--batch-size", type=cli.NATURAL, default=16, help="pictures at a time")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        check_options(args.method, args.aug_smooth, args.eigen_smooth)
        paths = files(args.image_path)
        if args.output_dir.resolve() == paths[0].parent.resolve():
            raise ValueError("--output-dir must be another folder than that of the pictures")
        network = networks.read(args, args.image_size)
        if args.low_rank is not None or args.rank is not None:
            network = networks.truncated(network, args.low_rank, args.rank)
        layer = networks.target_layer(network, args.target_layer, args.method)
        classes = chosen_classes(args.targets, network, paths)
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except (RunError, ValueError, OSError) as error:
        parser.error(str(error))
    networks.warn(network)
    rows, failed = [], False
    with told(parser):
        for part in batches(len(paths), args.batch_size, args.method):
            pictures, unread = readable(paths[part])
            failed |= unread
            if pictures:
                rows += explained(network, pictures, classes, layer, part.start, args)
        if rows:
            write_records(rows, network, layer, args)
    sys.exit(LEFT_OUT if failed else 0)


def chosen_classes(
    text: str | None, network: networks.Network, paths: Sequence[Path]
) -> dict[str, tuple[int, ...]] | None:
    """The classes to explain for each file, None for the predicted ones; ValueError where one is unknown."""
    if text is None:
        return None
    if not Path(text).is_file():
        if text.endswith(".csv"):
            raise PictureError(f"--targets: there is no {text}")
        classes = tuple(dict.fromkeys(network.class_number(part) for part in text.split(",")))
        return {path.name: classes for path in paths}
    labels = {
        name: tuple(dict.fromkeys(number for classes, _ in lines for number in classes))
        for name, lines in read_labels(Path(text), network.class_number).items()
    }
    if missing := [path.name for path in paths if not labels.get(path.name)]:
        raise PictureError(f"--targets {text} names no class for {', '.join(missing)}: add a line for each")
    return labels


def explained(
    network: networks.Network,
    pictures: Sequence[Picture],
    classes: dict[str, tuple[int, ...]] | None,
    layer: str,
    seed: int,
    args: argparse.Namespace,
) -> list[dict[str, object]]:
    """Explain a batch of pictures, write its files and print its lines; the rows of cams.csv."""
    x = network.images(pictures)
    numbers = [classes[picture.name] for picture in pictures] if classes else None
    targets = of_classes(numbers) if numbers else None
    smoothing = args.aug_smooth, args.eigen_smooth
    maps = explain(network.model, x, targets, args.method, layer, *smoothing, seed=seed)
    numbers = numbers or [(number,) for number in maps.logits.argmax(1).tolist()]
    rows = [
        row(picture, index, its, maps, network)
        for index, (picture, its) in enumerate(zip(pictures, numbers, strict=True))
    ]
    if args.guided:
        gradients = guided_gradients(network.model, x, of_classes(numbers))
    for index, (picture, its) in enumerate(zip(pictures, rows, strict=True)):
        shown = maps.displayed[index]
        arrays = {"raw": maps.raw[index], "displayed": shown}
        file = args.output_dir / f"{picture.name}.cam.png"
        save_png(file, Image.fromarray(overlay(picture.pixels(), shown)))
        if args.guided:
            arrays["guided"] = gradients[index] * shown[..., None]
            large = Image.fromarray(visible(arrays["guided"])).resize(picture.image.size)
            save_png(args.output_dir / f"{picture.name}.guided.png", large)
        write_whole(file.with_suffix(".npz"), partial(np.savez_compressed, **arrays), KEPT)
        about = "map of the picture" if args.method in CLASSLESS else f"map of {its['target']}"
        state = "" if its["defined"] else ": undefined, nothing speaks for it, and the picture is left bare"
        seen = f"{its['predicted']} {its['probability']:.3f}"
        print(f"{picture.name}: {seen}, {about}{state}; {file}", flush=True)
    return rows


def save_png(path: Path, image: Image.Image) -> None:
    write_whole(path, partial(image.save, format="PNG"), KEPT)


def row(
    picture: Picture, index: int, classes: tuple[int, ...], maps: Maps, network: networks.Network
) -> dict[str, object]:
    """A row of cams.csv: prediction, target, what the map is like, and times."""
    probabilities, raw = maps.probabilities[index], maps.raw[index]
    predicted = int(maps.logits[index].argmax())  # probabilities may be equal where logits differ
    shown, defined = maps.displayed[index], bool(maps.defined[index])
    height, width = shown.shape
    peak = np.unravel_index(np.argmax(shown), shown.shape) if defined else (np.nan, np.nan)
    return {
        "file": picture.name,
        "predicted": network.classes[predicted],
        "probability": float(probabilities[predicted]),
        "target": " + ".join(network.classes[number] for number in classes),
        "target_probability": float(probabilities[list(classes)].sum()),
        "defined": defined,
        "raw_min": raw.min(),
        "raw_max": raw.max(),
        "raw_sum": raw.sum(),
        "share_above_half": float((shown >= 0.5).mean()) if defined else np.nan,
        "peak_x": (peak[1] + 0.5) / width * picture.image.width,
        "peak_y": (peak[0] + 0.5) / height * picture.image.height,
        **{f"{stage}_ms": milliseconds for stage, milliseconds in maps.milliseconds.items()},
    }


def write_records(
    rows: list[dict[str, object]], network: networks.Network, layer: str, args: argparse.Namespace
) -> None:
    """cams.csv and config.json; of files and folders the names alone, since records can be published."""
    form = {"index": False, "float_format": "%.6g"}
    write_whole(args.output_dir / "cams.csv", lambda file: pd.DataFrame(rows).to_csv(file, **form), KEPT)
    count = dlrt.compression(network.model)
    options = {key: its for key, its in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["target_layer"] = layer if args.method != "fullgrad" else None
    for key, value in options.items():
        if isinstance(value, (str, Path)) and Path(value).exists():
            options[key] = Path(value).resolve().name
    config = {
        "network": network.label,
        "ranks": count.ranks,
        "evaluation_compression": round(count.evaluation_compression, 3),
        "input": list(network.shape),
        "device": str(network.device),
        "options": options,
        **surroundings(),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_whole(args.output_dir / "config.json", lambda file: file.write(text.encode()), KEPT)


if __name__ == "__main__":
    main()

"""Look at a trained network, or take it elsewhere.

python -m dlrt info RUN
python -m dlrt export RUN --format onnx

RUN is the folder of a run, or its checkpoint.pt.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import dlrt
from dlrt import errors, plots, tables
from dlrt.checkpoint import load_network
from dlrt.errors import RunError
from dlrt.options import HelpFormatter, Parser

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "state_dict": ".pt"}


@errors.boundary("")
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    args.command(args)


def _parser() -> Parser:
    parser = Parser(prog="python -m dlrt", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="ranks, parameters and singular values, with a figure")
    export = commands.add_parser("export", help="plain layers, thin ones in pairs, in a file")
    for command, action in ((info, _info), (export, _export)):
        command.add_argument("run", type=Path, metavar="RUN", help="a run's folder or its checkpoint.pt")
        command.set_defaults(command=action)
    info.add_argument("--output-dir", type=Path, help="of the figure; by default the run's folder")
    export.add_argument("--format", choices=SUFFIXES, required=True, help="pt2 is torch.export's")
    export.add_argument("--output", type=Path, help="by default a file in the run's folder")
    return parser


def _info(args: argparse.Namespace) -> None:
    """Print a network's layers and draw how their singular values decay."""
    model, about = load_network(args.run)
    count = dlrt.compression(model)
    print(f"{_describe(about)}\n\n{tables.markdown(tables.layers(model), tables.COUNTED)}")
    print(
        f"evaluation parameters {count.evaluation_parameters:,} of {count.dense_parameters:,}, "
        f"compression {count.evaluation_compression:.2f} %"
    )
    figure = plots.singular_values(dlrt.singular_values(model))
    folder = args.output_dir or _folder(args.run)
    try:
        print(f"figure: {plots.save(figure, [folder], 'singular_values')}")
    except OSError as error:
        raise RunError(f"no figure in {folder} ({error.strerror}): give another --output-dir") from error


def _export(args: argparse.Namespace) -> None:
    """Write a network as plain layers and say what it wants to be fed."""
    model, about = load_network(args.run)
    default = _folder(args.run) / f"{about['network'].lower()}{SUFFIXES[args.format]}"
    path = args.output or default
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written: give --output a file in a folder that can be written to")
    plain = dlrt.export(model)
    images = torch.zeros(2, *about["shape"])  # of two, since torch takes a dimension of one for a constant
    part = path.with_name(f"unfinished-{path.name}")  # a file appears whole or not at all
    if args.format == "state_dict":
        torch.save(plain.state_dict(), part)
    elif args.format == "pt2":
        torch.export.save(torch.export.export(plain, (images,), dynamic_shapes=_any_batch()), part)
    else:
        _to_onnx(plain, images, part)
    part.replace(path)
    print(f"{_describe(about)}\n{path}")


def _to_onnx(plain: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        plain,
        (images,),
        path,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _any_batch() -> tuple[dict[int, torch.export.Dim], ...]:
    return ({0: torch.export.Dim("batch")},)


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _describe(about: dict) -> str:
    """One line about a network and its input."""
    settings = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
    shape = " x ".join(map(str, about["shape"]))
    mean, std = (" ".join(f"{value:.4f}" for value in about[key]) for key in ("mean", "std"))
    return (
        f"{about['network']}{f' ({settings})' if settings else ''} for {about['dataset']}: images {shape} in "
        f"[0, 1] minus {mean} over {std}, {about['classes']} classes"
    )


if __name__ == "__main__":
    main()

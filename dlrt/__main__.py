"""Look at a trained network, or take it elsewhere.

python -m dlrt info RUN
python -m dlrt export RUN --format onnx

RUN is the folder of a run, its checkpoint.pt, or the name of a network that dlrt brings along.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import dlrt
from dlrt import errors, markup, plots, tables
from dlrt.checkpoint import atomic_write, checkpoint_of, load_checkpoint, load_network
from dlrt.errors import RunError
from dlrt.flags import HelpFormatter, Parser
from dlrt.runs import chosen_epoch

FORMATS = "pt2 is torch.export's; checkpoint has the factors, and nothing that going on would need"
ELSEWHERE = "give --output a file in a folder that can be written to"
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "state_dict": ".pt", "checkpoint": "_checkpoint.pt"}


@errors.boundary("")
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    args.command(args)


def _parser() -> Parser:
    parser = Parser(prog="python -m dlrt", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="ranks, parameters and singular values, with a figure")
    export = commands.add_parser("export", help="plain layers, thin ones in pairs, or factors, in a file")
    for command, action in ((info, _info), (export, _export)):
        command.add_argument(
            "run", type=Path, metavar="RUN", help="a run's folder, its checkpoint.pt or a name"
        )
        command.set_defaults(command=action)
    info.add_argument(
        "--output-dir", type=Path, help="of the figure; by default the run's folder, or the current one"
    )
    export.add_argument("--format", choices=SUFFIXES, required=True, help=FORMATS)
    export.add_argument(
        "--output", type=Path, help="by default a file in the run's folder, or the current one"
    )
    return parser


def _info(args: argparse.Namespace) -> None:
    """Print a network's layers and draw how their singular values decay."""
    model, about = load_network(args.run)
    count = dlrt.compression(model)
    print(f"{_describe(about)}\n\n{markup.markdown(tables.layers(model), tables.COUNTED)}")
    print(
        f"evaluation parameters {count.evaluation_parameters:,} of {count.dense_parameters:,}, "
        f"compression {count.evaluation_compression:.2f} %"
    )
    figure = plots.singular_values(dlrt.singular_values(model))
    print(f"figure: {plots.save(figure, [args.output_dir or _folder(args.run)], 'singular_values')}")


def _export(args: argparse.Namespace) -> None:
    """Write a network as plain layers and say what its input is."""
    model, about = load_network(args.run)
    default = _folder(args.run) / f"{about['network'].lower()}{SUFFIXES[args.format]}"
    path = args.output or default
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written: {ELSEWHERE}")
    plain = dlrt.export(model)
    # a batch of two, since torch takes a dimension of one for a constant
    inputs = torch.zeros(2, *about["shape"], dtype=torch.long if _of_text(about) else torch.float32)
    batch = ({0: torch.export.Dim("batch")},)  # any number of them
    if args.format == "checkpoint":
        write = partial(torch.save, _slim(args.run))
    elif args.format == "state_dict":
        write = partial(torch.save, plain.state_dict())
    elif args.format == "pt2":
        write = partial(torch.export.save, torch.export.export(plain, (inputs,), dynamic_shapes=batch))
    else:
        names = {"input_names": ["tokens" if _of_text(about) else "images"], "output_names": ["logits"]}
        try:
            program = torch.onnx.export(plain, (inputs,), dynamic_shapes=batch, verbose=False, **names)
        except ModuleNotFoundError as error:
            raise RunError(f"--format onnx needs {error.name}: pip install 'dlrt[export]'") from error
        content = program.model_proto.SerializeToString()
        write = lambda file: file.write(content)  # noqa: E731
    atomic_write(path, write, ELSEWHERE)
    print(f"{_describe(about)}\n{path}")


def _slim(run: Path) -> dict[str, object]:
    """A checkpoint of the chosen epoch alone: its weights, its metrics, and what they are of."""
    state = load_checkpoint(checkpoint_of(run))
    rows = pd.DataFrame(state["metrics"])
    chosen = [state["metrics"][chosen_epoch(rows)]] if len(rows) else []
    return {"model": {}, "metrics": chosen, "chosen": state["chosen"], "about": state["about"]}


def _folder(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _describe(about: dict) -> str:
    """One line about a network and its input."""
    settings = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
    shape = " x ".join(map(str, about["shape"]))
    mean, std = (" ".join(f"{value:.4f}" for value in about[key]) for key in ("mean", "std"))
    takes = f"images {shape} in [0, 1] minus {mean} over {std}"
    if _of_text(about):
        takes = f"windows of {shape} tokens"
    network = f"{about['network']}{f' ({settings})' if settings else ''}"
    return f"{network} for {about['dataset']}: {takes}, {about['classes']} classes"


def _of_text(about: dict) -> bool:
    return len(about["shape"]) == 1


if __name__ == "__main__":
    main()

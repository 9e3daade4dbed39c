"""The flags that scripts share."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from dlrt.datasets import DATASETS
from dlrt.settings import INTEGRATORS, UPDATES
from dlrt.training import AMP

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("DLRT_DATA", ROOT / "data"))
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "plateau")
S_STEPS, RAMP = 10, 0.6


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line and not the whole usage, and no output stops the program."""

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        for name in ("stdout", "stderr"):
            _never_stops(name)
        return super().parse_known_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


class _Pipe(io.FileIO):
    """Output of which the rest is dropped once nobody reads it any more, as with `| head`."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def _never_stops(name: str) -> None:
    """Replace what sys.stdout or sys.stderr cannot encode, and let a pipe be closed at its other end."""
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's
        return
    stream.reconfigure(errors="replace")
    if stream is getattr(sys, f"__{name}__") and not stream.isatty():
        stream.flush()
        pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
        lines = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, "replace", line_buffering=lines))


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every default that says something.

    A help text tells after "; by default" what None stands for: where a script has another default, not that.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is silent for silent in (None, False, argparse.SUPPRESS)):
            return action.help
        told = action.help.split("; by default")[0]
        return told if "%(default)" in told else f"{told} (default: %(default)s)"


def number(kind: type, interval: str) -> Callable[[str], float]:
    """An argparse type: an int or float in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text: str) -> float:
        value = kind(text)
        if not (
            low < value < high or (value == low and "[" in interval) or (value == high and "]" in interval)
        ):
            raise argparse.ArgumentTypeError(f"must lie in {interval}, got {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's "invalid ... value"
    return parse


NATURAL, COUNT = number(int, "[1, inf)"), number(int, "[0, inf)")
TOLERANCE, POSITIVE = number(float, "[0, 1)"), number(float, "(0, inf)")


def rank(text: str) -> int | float:
    """An argparse type: a whole number is a rank, a number with a point a share of the full rank."""
    try:
        if text.isdigit():
            return NATURAL(text)
        return number(float, "(0, 1]")(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        told = f"must be a whole number from 1 on, or a share with a point in (0, 1], got {text}"
        raise argparse.ArgumentTypeError(told) from error


def percent(text: str) -> float:
    """An argparse type: a compression in %."""
    value = number(float, "(0, 100)")(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is a percentage, got {text}: {100 * value:g} for that fraction")
    return value


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder, which every file system and terminal takes."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(
            f"must name one folder, got {text!r}: --output-dir says where it goes"
        )
    if not text.isprintable() or len(text.encode()) > 200:
        told = f"at most 200 bytes of printable characters, got {len(text)} characters, {text[:20]!r} ..."
        raise argparse.ArgumentTypeError(f"must be {told}: take a shorter or plainer one")
    return text


def max_rank(text: str) -> int | str:
    """An argparse type: a whole number, or "initial"."""
    if text == "initial":
        return text
    try:
        return NATURAL(text)
    except ValueError as error:
        told = f"must be a whole number from 1 on, or initial, got {text}"
        raise argparse.ArgumentTypeError(told) from error


def device(text: str) -> str:
    """An argparse type: a device that torch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({reason}); cpu always can") from error
    return text


def training_parser(description: str, low_rank: bool, **defaults: Any) -> Parser:
    """A parser with the flags that training scripts share; those of a dense one are for baselines."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=NATURAL, default=20, help="passes over the training split")
    add("--batch-size", type=NATURAL, default=128, help="samples per step")
    add("--lr", type=POSITIVE, default=0.05, help="step size h")
    add("--momentum", type=number(float, "[0, 1)"), default=0.9, help="of SGD; first beta of Adam")
    add("--weight-decay", type=number(float, "[0, inf)"), default=0.0, help="of S, biases and dense layers")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="the inner one, of a low-rank network")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False, help="momentum of SGD and muon")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of lr over all epochs")
    smoothing = "share of the target that all classes get alike"
    add("--label-smoothing", type=TOLERANCE, default=0.1, help=smoothing)
    shifted = "shift training images at random, mirror half of CIFAR-10's"
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help=shifted)
    start = "weights to begin with"
    start += ", cut to --rank or --compression" if low_rank else ""
    where = "a dense run's folder or checkpoint, or a state dict"
    add("--from-checkpoint", type=Path, metavar="PATH", help=f"{start}: {where}")
    (_add_low_rank_flags if low_rank else _add_dense_flags)(parser)
    _add_place_flags(parser)
    add(
        "--workers",
        type=NATURAL,
        help="CPU threads of torch; the data lie in memory, none are needed to load them",
    )
    amp = "autocast to bfloat16, or to float16 with a loss scale; factors and their algebra stay in float32"
    add("--amp", nargs="?", choices=AMP, const="bfloat16", default=False, help=amp)
    add(
        "--seed",
        type=number(int, "[0, 4294967295]"),
        default=0,
        help="of initial weights, validation split and order",
    )
    add("--name", type=folder_name, help="of the run's folder; by default made of the settings and the seed")
    add("--output-dir", type=Path, help="where the run's folder goes; by default results/ beside the script")
    add("--resume", action="store_true", help="continue a run that broke off, after its last complete epoch")
    add("--quiet", action="store_true", help="print the result only")
    parser.set_defaults(**defaults)
    return parser


def _add_place_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="digits and digits32 need no download")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--device", type=device, default=DEFAULT_DEVICE, help="where to train")


def _add_dense_flags(parser: Parser) -> None:
    add = parser.add_argument
    rule = "how the weights of all layers but --skip step; by default as the optimizer"
    add("--update", choices=("sgd", "muon"), help=rule)
    add("--update-lr", type=POSITIVE, help="step size with --update muon; by default 0.3 lr")
    factors = "layers become plain factors A B, of uniform ranks, at this compression of the whole network"
    add("--factors", type=percent, metavar="PERCENT", help=f"{factors}; weight decay is that of A B")
    add("--skip", nargs="*", default=[], metavar="LAYER", help="layers that --factors and muon leave alone")


def _add_low_rank_flags(parser: Parser) -> None:
    add = parser.add_argument
    tolerance = "relative truncation tolerance, which is 0 with --compression unless given"
    add("--tau", "--theta", type=TOLERANCE, default=0.1, help=tolerance)
    warmup = "over which the tolerance rises from 0 to tau; by default half of all"
    add("--tau-warmup", type=number(float, "[0, inf)"), metavar="EPOCHS", help=warmup)
    two = "augmented and bug take two passes a step, and bug keeps the rank"
    add("--integrator", choices=INTEGRATORS, default="parallel", help=two)
    rule = "how low-rank weights step; by default as the optimizer"
    add("--update", choices=UPDATES, help=rule)
    update_lr = "step size of low-rank weights; by default lr, and 0.3 lr with muon"
    add("--update-lr", type=POSITIVE, help=update_lr)
    start = (
        "to begin with: 20 is a rank, 0.5 a share of the full rank; by default 0.5, full with --compression"
    )
    add("--rank", type=rank, help=start)
    budget = "of the whole network at the end, instead of --tau: a budget that layers compete for"
    add("--compression", type=percent, metavar="PERCENT", help=budget)
    falls = "share of --epochs over which the budget falls; 0 cuts --from-checkpoint at the start"
    add("--ramp", type=number(float, "[0, 1]"), help=f"{falls}; by default {RAMP:g}")
    needed = "what is kept of --from-checkpoint: what the loss needs, or what is largest in the weights"
    add("--cut-by", choices=("loss", "weights"), default="loss", help=needed)
    add("--skip", nargs="*", default=[], metavar="LAYER", help="layers that stay dense")
    across = "convolutions are low-rank across space, a horizontal and a vertical one, of which half the "
    across += "full rank has as many parameters as the kernel: take --compression, or --rank 0.2"
    add("--spatial", action=argparse.BooleanOptionalAction, default=False, help=across)
    add("--min-rank", type=NATURAL, default=2, help="of every layer that --max-rank lets have it")
    steps = f"of S for each basis update; by default {S_STEPS}, or 1 with --compression"
    add("--s-steps", type=NATURAL, help=steps)
    largest = "of every layer, or initial: what it begins with; by default only its size limits it"
    add("--max-rank", type=max_rank, metavar="{RANK,initial}", help=largest)
    add("--finetune-epochs", type=COUNT, default=0, help="afterwards, of S and the rest, bases frozen")


def grid_parser(
    description: str,
    folder: Path,
    epochs: int,
    seeds: int = 3,
    taus: Sequence[float] = (),
    runs: str = "every run",
) -> Parser:
    """A parser for the run.py of an experiment, which makes a grid of runs in the folder's results/.

    runs says of which of them --epochs and --taus are.
    """
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=NATURAL, default=epochs, help=f"of {runs}")
    add("--seeds", type=NATURAL, default=seeds, help="runs of every setting")
    if taus:
        add("--taus", type=TOLERANCE, nargs="*", default=taus, help=f"tolerances of {runs}")
    add("--jobs", type=NATURAL, default=1, help="runs at a time, which share the CPU's cores")
    _add_place_flags(parser)
    add("--output-dir", type=Path, default=folder / "results", help="where the run folders go")
    return parser


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a grid that every one of its runs gets."""
    return {name: getattr(args, name) for name in ("dataset", "data_dir", "device")}


def parse(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what one flag alone does not show."""
    args = parser.parse_args(arguments)
    low_rank = hasattr(args, "tau")
    if args.nesterov and (args.optimizer != "sgd" or not args.momentum):
        parser.error("--nesterov must come with --optimizer sgd and a --momentum: leave it out")
    if not low_rank:
        _settle_baseline(parser, args)
    if low_rank and isinstance(args.max_rank, int) and args.max_rank < args.min_rank:
        parser.error(f"--max-rank must be at least --min-rank, got {args.max_rank} < {args.min_rank}")
    if low_rank and args.s_steps is None:
        budget = args.compression and args.ramp != 0
        args.s_steps = 1 if budget or args.integrator != "parallel" else S_STEPS
    if low_rank and args.s_steps > 1 and args.integrator != "parallel":
        parser.error(f"--s-steps must be 1 with --integrator {args.integrator}, got {args.s_steps}")
    if low_rank and args.tau_warmup is None:
        args.tau_warmup = args.epochs / 2
    if low_rank and args.tau_warmup > args.epochs:
        parser.error(f"--tau-warmup must be at most --epochs, got {args.tau_warmup:g} > {args.epochs}")
    if low_rank:
        _settle_budget(parser, args)
    if low_rank and args.cut_by == "weights" and not args.from_checkpoint:
        parser.error("--cut-by must come with --from-checkpoint: random weights have nothing to keep")
    if low_rank and args.integrator != "parallel" and args.amp == "float16":
        parser.error(
            f"--integrator {args.integrator} takes two gradients a step, a loss scale one: --amp bfloat16"
        )
    return args


def _settle_baseline(parser: Parser, args: argparse.Namespace) -> None:
    """Let a dense run that has no use for --skip have none; end with 2 where flags contradict."""
    if args.update == "muon" and args.optimizer != "sgd":
        parser.error(f"--update muon must come with --optimizer sgd, got {args.optimizer}")
    if args.update_lr and args.update != "muon":
        parser.error("--update-lr must come with --update muon: --lr is for all else")
    if args.factors and args.from_checkpoint:
        parser.error("--factors begins with random weights: leave --from-checkpoint out")
    if args.update != "muon" and not args.factors:
        args.skip = []


def _settle_budget(parser: Parser, args: argparse.Namespace) -> None:
    """Give the flags of a budget the values that depend on one another; end with 2 where they contradict."""
    if not args.compression:
        if args.ramp is not None:
            parser.error("--ramp must come with --compression: it is the budget's")
        args.rank = 0.5 if args.rank is None else args.rank
        return
    if args.integrator == "bug":
        parser.error("--compression changes ranks, and --integrator bug keeps them: take another")
    cuts = args.ramp == 0
    args.ramp = RAMP if args.ramp is None else args.ramp
    if cuts and not args.from_checkpoint:
        parser.error("--ramp 0 must come with --from-checkpoint: random weights have nothing to keep")
    if cuts and args.rank is not None:
        parser.error("--ramp 0 cuts to ranks of its own: leave --rank out")
    if not cuts and args.rank is None:
        args.rank = 1.0
    if not cuts and args.tau is parser.get_default("tau"):  # what is given is another object
        args.tau, args.tau_warmup = 0.0, 0.0

"""The flags that every training script shares, and the way from them to a finished run."""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from torch import nn

from dlrt import distributed
from dlrt.convert import to_low_rank
from dlrt.data import DATASETS, DataError, load
from dlrt.distributed import ProcessError
from dlrt.optimizer import DLRT, INTEGRATORS
from dlrt.runs import Run, RunError, chosen_epoch, trained_weights
from dlrt.training import AMP, Recipe, evaluate, fit

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(os.environ.get("DLRT_DATA", ROOT / "data"))
HERE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "plateau")
S_STEPS = 10
NOT_PART_OF_THE_EXPERIMENT = ("data_dir", "output_dir", "resume", "quiet", "device", "workers")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


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
    return NATURAL(text) if text.isdigit() else number(float, "(0, 1]")(text)


def device(text: str) -> str:
    """An argparse type: a device that torch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({reason}); cpu always can") from error
    return text


def training_parser(description: str, low_rank: bool, **defaults: Any) -> Parser:
    """A parser with the flags that training scripts share; a dense script has no low-rank ones."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=NATURAL, default=20, help="passes over the training split")
    add("--batch-size", type=NATURAL, default=128, help="samples per step")
    add("--lr", type=POSITIVE, default=0.05, help="step size h")
    add("--momentum", type=number(float, "[0, 1)"), default=0.9, help="of SGD; first beta of Adam")
    add("--weight-decay", type=number(float, "[0, inf)"), default=0.0, help="of S, biases and dense layers")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="the inner one, of a low-rank network")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of lr over all epochs")
    smoothing = "share of the target that all classes get alike"
    add("--label-smoothing", type=TOLERANCE, default=0.1, help=smoothing)
    shifted = "shift training images at random, mirror half of CIFAR-10's"
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help=shifted)
    start = "weights to begin with, truncated to --rank" if low_rank else "weights to begin with"
    where = "a dense run's folder or checkpoint, or a state dict"
    add("--from-checkpoint", type=Path, metavar="PATH", help=f"{start}: {where}")
    if low_rank:
        _add_low_rank_flags(parser)
    add("--dataset", choices=DATASETS, default="mnist", help="digits and digits32 need no download")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add(
        "--workers",
        type=NATURAL,
        help="CPU threads of torch; the data lie in memory, none are needed to load them",
    )
    add("--device", type=device, default=HERE, help="where to train")
    amp = "autocast to bfloat16, or to float16 with a loss scale; factors and their algebra stay in float32"
    add("--amp", nargs="?", choices=AMP, const="bfloat16", default=False, help=amp)
    add(
        "--seed",
        type=number(int, "[0, 4294967295]"),
        default=0,
        help="of initial weights, validation split and order",
    )
    add("--name", help="of the run's folder; by default made of the settings and the seed")
    add("--output-dir", type=Path, help="where the run's folder goes; by default results/ beside the script")
    add("--resume", action="store_true", help="continue a run that broke off, after its last complete epoch")
    add("--quiet", action="store_true", help="print the result only")
    parser.set_defaults(**defaults)
    return parser


def _add_low_rank_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--tau", "--theta", type=TOLERANCE, default=0.1, help="relative truncation tolerance")
    warmup = "over which the tolerance rises from 0 to tau; by default half of all"
    add("--tau-warmup", type=number(float, "[0, inf)"), metavar="EPOCHS", help=warmup)
    add("--integrator", choices=INTEGRATORS, default="augmented", help="bug keeps the rank")
    add("--rank", type=rank, default=0.5, help="to begin with: 20 is a rank, 0.5 a share of the full rank")
    add("--skip", nargs="*", default=[], metavar="LAYER", help="layers that stay dense")
    add("--min-rank", type=NATURAL, default=2, help="of every layer")
    s_steps = f"steps of S in each move of the bases; by default {S_STEPS}, and 1 where the integrator is bug"
    add("--s-steps", type=NATURAL, help=s_steps)
    add("--max-rank", type=NATURAL, help="of every layer; by default only its size limits it")
    add("--finetune-epochs", type=COUNT, default=0, help="afterwards, of S and the rest, bases frozen")


def grid_parser(
    description: str, folder: Path, epochs: int, seeds: int = 3, taus: Sequence[float] = ()
) -> Parser:
    """A parser for the run.py of an experiment, which makes a grid of runs in the folder's results/."""
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--epochs", type=NATURAL, default=epochs, help="of every run")
    add("--seeds", type=NATURAL, default=seeds, help="runs of every setting")
    if taus:
        add("--taus", type=TOLERANCE, nargs="*", default=taus, help="tolerances")
    add("--jobs", type=NATURAL, default=1, help="runs at a time, which share the CPU's cores")
    add("--dataset", choices=DATASETS, default="mnist", help="digits and digits32 need no download")
    add("--data-dir", type=Path, default=DATA_DIR, help="or set DLRT_DATA")
    add("--device", type=device, default=HERE, help="where to train")
    add("--output-dir", type=Path, default=folder / "results", help="where the run folders go")
    return parser


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a grid that every one of its runs gets."""
    return {name: getattr(args, name) for name in ("dataset", "data_dir", "device")}


def parse(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what one flag alone does not show."""
    args = parser.parse_args(arguments)
    low_rank = hasattr(args, "tau")
    if low_rank and args.max_rank is not None and args.max_rank < args.min_rank:
        parser.error(f"--max-rank must be at least --min-rank, got {args.max_rank} < {args.min_rank}")
    if low_rank and args.s_steps is None:
        args.s_steps = 1 if args.integrator == "bug" else S_STEPS
    if low_rank and args.s_steps > 1 and args.integrator == "bug":
        parser.error(f"--s-steps must be 1 with --integrator bug, got {args.s_steps}")
    if low_rank and args.tau_warmup is None:
        args.tau_warmup = args.epochs / 2
    if low_rank and args.tau_warmup > args.epochs:
        parser.error(f"--tau-warmup must be at most --epochs, got {args.tau_warmup:g} > {args.epochs}")
    if low_rank and args.integrator == "bug" and args.amp == "float16":
        parser.error("--integrator bug takes two gradients a step, a loss scale one: take --amp bfloat16")
    return args


def run_script(
    args: argparse.Namespace,
    network: Callable[..., nn.Module],
    results: Path,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train a network as the flags say, print the result and leave a run's folder.

    network is called with the data's shape, its number of classes and `settings`. Ctrl-C exits with 130.
    """
    _check_skip(args, network, settings or {})
    try:
        args.device = distributed.start(args.device)
        _run(args, network, results, settings or {})
        distributed.stop()
    except FloatingPointError as error:  # all processes have the same loss
        sys.exit(1 if distributed.process_rank() else f"{Path(sys.argv[0]).name}: {error}")
    except (DataError, RunError, OSError, ProcessError) as error:
        process = f", process {distributed.process_rank()}" if distributed.world_size() > 1 else ""
        sys.exit(f"{Path(sys.argv[0]).name}{process}: {error}")
    except KeyboardInterrupt:
        if distributed.process_rank() == 0:
            print(
                "\ninterrupted; the epochs that were completed are kept: continue with --resume",
                file=sys.stderr,
            )
        sys.exit(130)


def _check_skip(
    args: argparse.Namespace, network: Callable[..., nn.Module], settings: dict[str, Any]
) -> None:
    """End with 2 where --skip names no layer of the network."""
    if not getattr(args, "skip", ()):
        return
    with torch.device("meta"):
        modules = dict(network(**settings).named_modules())
    if unknown := sorted(set(args.skip) - modules.keys()):
        layers = ", ".join(
            name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))
        )
        script = Path(sys.argv[0]).name
        print(f"{script}: --skip takes layers of {layers}, got {', '.join(unknown)}", file=sys.stderr)
        sys.exit(2)


def _run(
    args: argparse.Namespace,
    network: Callable[..., nn.Module],
    results: Path,
    settings: dict[str, Any],
) -> None:
    if args.workers:
        torch.set_num_threads(args.workers)
    options = {key: value for key, value in vars(args).items() if key not in NOT_PART_OF_THE_EXPERIMENT}
    options["network"] = network.__name__
    args.name = options["name"] = args.name or _name(args, settings)
    run = Run((args.output_dir or results) / args.name)
    dataset = distributed.first_before_others(lambda: load(args.dataset, args.data_dir, args.seed))
    dataset = dataset.to(args.device)
    torch.manual_seed(args.seed)
    model = network(dataset.shape, dataset.classes, **settings)
    if args.from_checkpoint:
        options["from_checkpoint"] = _take_weights(model, args.from_checkpoint, run)
    distributed.first(lambda: run.start(options, args.resume))
    if hasattr(args, "tau"):
        model = to_low_rank(model, rank=args.rank, skip=args.skip)
    model.to(args.device, memory_format=torch.channels_last)  # on a CPU convolutions take half the time
    optimizer, recipe = make_optimizer(model, args), make_recipe(args)
    scheduler = make_scheduler(optimizer, args.schedule, recipe.epochs + recipe.finetune_epochs)
    about = {
        "network": network.__name__,
        "settings": settings,
        "shape": list(dataset.shape),
        "classes": dataset.classes,
        "dataset": dataset.name,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }
    quiet = args.quiet or distributed.process_rank() > 0
    metrics = fit(model, optimizer, scheduler, dataset, recipe, run, about, quiet)
    accuracy = evaluate(model, dataset.test, recipe.amp)[1]
    if distributed.process_rank() == 0:
        print(_result(metrics, accuracy, run.folder))


def _name(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What a run's folder is called where nobody says."""
    prefix = "".join(f"{key}{value}_" for key, value in settings.items())
    return f"{prefix}{f'tau{args.tau}' if hasattr(args, 'tau') else 'dense'}_seed{args.seed}"


def _result(metrics: pd.DataFrame, accuracy: float, folder: Path) -> str:
    row = metrics.loc[chosen_epoch(metrics)]
    ranks = f", ranks {row['ranks']}" if row["ranks"] else ""
    return (
        f"test accuracy {accuracy:.2f} % (epoch {row['epoch']}, chosen on the validation split){ranks}, "
        f"evaluation parameters {row['evaluation_parameters']:,}, "
        f"compression {row['evaluation_compression']:.2f} %; {folder}"
    )


def _take_weights(model: nn.Module, path: Path, run: Run) -> str:
    """Load the weights to begin with; give what the run records of them, a name and a checksum.

    Records can be published, so there is no path in it. A run that continues has weights of its own, and goes
    on without the file; so does one that recorded no checksum.
    """
    recorded = run.options().get("from_checkpoint") or ""
    if run.checkpoint.exists() and (
        recorded == path.name or (recorded.startswith(f"{path.name} ") and not path.exists())
    ):
        return recorded
    weights = trained_weights(path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"--from-checkpoint {path} does not fit {type(model).__name__}: {reason}") from error
    sums = [(name, distributed.checksum(value)) for name, value in model.state_dict().items()]
    return f"{path.name} {zlib.crc32(repr(sums).encode()):08x}"


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that the flags describe: DLRT around it for a low-rank run."""
    inner = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        inner["momentum"] = args.momentum
    else:
        inner["betas"] = (args.momentum, 0.999)
    kind = OPTIMIZERS[args.optimizer]
    if not hasattr(args, "tau"):
        return kind(model.parameters(), **inner)
    ranks = {"min_rank": args.min_rank, "max_rank": args.max_rank, "s_steps": args.s_steps}
    return DLRT(model, kind, tau=args.tau, integrator=args.integrator, **ranks, **inner)


def make_recipe(args: argparse.Namespace) -> Recipe:
    """How to train as the flags describe it; a dense network has no tolerance and no bases to freeze."""
    of_dlrt = ("tau", "tau_warmup", "finetune_epochs")
    return Recipe(
        args.epochs,
        args.batch_size,
        args.seed,
        label_smoothing=args.label_smoothing,
        augment=args.augment,
        measure_first=args.from_checkpoint is not None,
        amp=args.amp or None,
        **{name: getattr(args, name) for name in of_dlrt if hasattr(args, name)},
    )


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, epochs: int):
    """The learning rate over the epochs; plateau divides it by ten where the validation loss rests."""
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    if schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=3)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

"""Training step and inference of the net 784-w-w-w-w-10 over ranks, against dense: the figures' records.

    python timings/run.py        about an hour on two CPU cores that have nothing else to do

Timed are all integrators: adaptive, with bases updated in every step and in every tenth, and at fixed rank;
a low-rank step is the mean of those from one decision of ranks to the next. Beside them stand plain factors
U Vᵀ of the same ranks with SGD.
Every device has its folder in results/ with a row for each setting and rank. What is there is not measured
again, so the same command continues a grid that broke off, and a GPU is recorded beside the CPU. A setting
that was slower than dense by the factor `--slowest`, and used up its `--seconds`, is not measured at larger
ranks.
"""

import argparse
import copy
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import BATCHES, ROUND, device_name, evaluation, flops, inference, shares, training_steps
from memory import peak
from networks import FACTORS, RESTING, low_rank, make_parser, mlp_ranks, parse, resting_dlrt
from torch import Tensor, nn
from tqdm import tqdm

from dlrt import DLRT, compression, errors
from dlrt.baselines import as_factors
from dlrt.convert import replace_layers
from dlrt.errors import RunError
from dlrt.flags import FOLDER_NAME, NATURAL, POSITIVE, device
from dlrt.models import MLP
from dlrt.options import DEFAULT_DEVICE
from dlrt.runs import Run, read_config, read_metrics
from dlrt.settings import INTEGRATORS
from dlrt.timing import Timing, in_turn

RANKS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
Row = dict[str, Any]


class Setting(NamedTuple):
    """What is timed at every rank; inference has no integrator."""

    phase: str
    integrator: str = ""
    s_steps: int = 1
    adaptive: bool = False


def settings(integrators: Iterable[str], s_steps: Iterable[int]) -> list[Setting]:
    """Inference and all ways to train; all but "parallel" update the bases at every step."""
    training = [
        Setting("training", name, steps, adaptive=True)
        for name, steps in product(integrators, s_steps)
        if name == "parallel" or (name != "bug" and steps == 1)
    ]
    return [Setting("inference"), *training, *(Setting("training", name) for name in (*integrators, FACTORS))]


@dataclass
class Contender:
    """A network at work: `call` is what is timed, `steps` training steps or one pass of inference."""

    model: nn.Module
    call: Callable[[], None]
    steps: int = 1
    optimizer: torch.optim.Optimizer | None = None
    closure: Callable[[], Tensor] | None = None


def contender(model: nn.Module, data: tuple[Tensor, Tensor], setting: Setting, rank: int | None) -> Contender:
    """A network in one of the settings, after its first pass or step; rank = None is the dense one."""
    if setting.phase == "inference":
        x, y = data
        made = Contender(model, inference(model, x[: len(y)]))
        made.call()
        return made
    optimizer = optimizer_of(model, setting, rank)
    closure = evaluation(model, optimizer, *data)
    optimizer.step(closure)  # now momentum exists
    if isinstance(optimizer, DLRT):
        optimizer.truncate()
    steps = steps_at_once(setting) if isinstance(optimizer, DLRT) else 1
    return Contender(model, training_steps(optimizer, closure, steps), steps, optimizer, closure)


def steps_at_once(setting: Setting) -> int:
    """Training steps that are timed together: those of a DLRT from one decision of ranks to the next."""
    low_rank = setting.phase == "training" and setting.integrator != FACTORS
    return math.lcm(ROUND, setting.s_steps) if low_rank else 1


def optimizer_of(model: nn.Module, setting: Setting, rank: int | None) -> torch.optim.Optimizer:
    if rank is None or setting.integrator == FACTORS:
        return torch.optim.SGD(model.parameters(), **RESTING)
    fixed = {} if setting.adaptive else {"tau": 0.0, "min_rank": rank, "max_rank": rank}
    return resting_dlrt(model, setting.integrator, setting.s_steps, **fixed)


def counted(
    network: nn.Module, data: tuple[Tensor, Tensor], setting: Setting, rank: int | None = None
) -> tuple[Contender, Row]:
    """A contender with a copy of the network; the FLOPs of one of its steps, and their peak memory."""
    gc.collect()  # a DLRT and its layers hold each other: those before would go in the midst of the counting
    device, made, counts = str(data[0].device), [], []

    def prepare() -> Callable[[], None]:
        made.append(contender(copy.deepcopy(network), data, setting, rank))
        return lambda: counts.append(flops(made[0].call))

    x, y = data
    most = peak(prepare, device, warm_up=0) + x[: len(y)].nbytes + y.nbytes
    return made[0], {"gflops": counts[0] / made[0].steps / 1e9, "peak_mb": most / 1e6}


def measure(
    rank: int,
    chosen: Sequence[Setting],
    dense: tuple[Contender, Row],
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> list[Row]:
    """A row for each setting of one phase at one rank, all of them and dense timed in turn."""
    network = low_rank(MLP(width=args.width), mlp_ranks(rank)).to(args.device)
    factors = replace_layers(copy.deepcopy(network), as_factors)
    others = [
        counted(factors if setting.integrator == FACTORS else network, data, setting, rank)
        for setting in chosen
    ]
    calls = [other.call for other, _ in (dense, *others)]
    of_dense, *times = in_turn(calls, args.repeats, args.seconds, args.device)
    beside = {f"dense_{name}": value for name, value in {**quartiles(of_dense), **dense[1]}.items()}
    rows = []
    for setting, (other, counts), elapsed in zip(chosen, others, times, strict=True):
        row = {**setting._asdict(), "rank": rank, "repeats": len(elapsed)}
        row["ranks"] = "/".join(
            map(str, (compression(other.model).ranks or compression(network).ranks).values())
        )
        row.update({**quartiles(elapsed, other.steps), **counts, **beside})
        if isinstance(other.optimizer, DLRT):
            watched = int(np.clip(1e3 / np.median(elapsed), 1, args.repeats)) * other.steps  # about a second
            parts = shares(other.optimizer, other.closure, watched, args.device)
            row.update({f"share_{part}": share for part, share in parts.items()})
        rows.append(row)
    return rows


def quartiles(times: Sequence[float], steps: int = 1) -> Row:
    """Median and quartiles of the milliseconds of a step."""
    lower, median, upper = np.quantile(times, (0.25, 0.5, 0.75)) / steps
    return {"median_ms": median, "lower_ms": lower, "upper_ms": upper}


def wanted(rank: int, rows: list[Row], among: Iterable[Setting], args: argparse.Namespace) -> list[Setting]:
    """The settings without a row at this rank that were not too slow at a smaller one."""

    def setting_of(row: Row) -> Setting:
        return Setting(*(row[name] for name in Setting._fields))

    def too_slow(row: Row) -> bool:
        took = row["repeats"] * steps_at_once(setting_of(row)) * row["median_ms"] / 1e3
        return took > args.seconds and row["median_ms"] > args.slowest * row["dense_median_ms"]

    done = [row for row in rows if row["rank"] == rank or (row["rank"] < rank and too_slow(row))]
    left_out = {setting_of(row) for row in done}
    return [setting for setting in among if setting not in left_out]


def make(args: argparse.Namespace) -> str:
    """Measure all that is missing, and say what there is."""
    device, ranks = device_name(args.device), sorted(set(args.ranks))
    run = Run(args.output_dir / (args.name or device.replace(",", "").replace(" ", "_").lower()))
    options = {"device": device, "kind": torch.device(args.device).type, "width": args.width}
    run.start({**options, "batch_size": args.batch_size}, True, args.device)
    was = read_config(run.folder)["versions"]["torch"]
    if was != torch.__version__:
        raise RunError(
            f"{run.folder} was measured with torch {was}, this is {torch.__version__}: take another --name"
        )
    found = read_metrics(run.folder, Timing)
    rows = [] if found is None else found.fillna({"integrator": ""}).to_dict("records")
    torch.manual_seed(0)
    x, y = torch.randn(BATCHES * args.batch_size, 1, 28, 28), torch.randint(0, 10, (args.batch_size,))
    data = x.to(args.device), y.to(args.device)
    among = settings(dict.fromkeys(args.integrators), sorted(set(args.s_steps)))
    if any(wanted(rank, rows, among, args) for rank in ranks):
        network = MLP(width=args.width).to(args.device)
        dense = {phase: counted(network, data, Setting(phase)) for phase in ("training", "inference")}
    with tqdm(total=len(ranks) * len(among), unit="point", disable=None) as bar:
        for rank in ranks:
            bar.set_postfix_str(f"rank {rank}")
            for phase in ("inference", "training"):
                phase_settings = [setting for setting in among if setting.phase == phase]
                if missing := wanted(rank, rows, phase_settings, args):
                    rows += measure(rank, missing, dense[phase], data, args)
                    run.write_metrics(rows)
                bar.update(len(phase_settings))
    return f"{len(rows)} measurements are in {run.folder}"


@errors.boundary("the same command measures what is missing")
def main() -> None:
    parser = make_parser(__doc__, RANKS)
    add = parser.add_argument
    add("--batch-size", type=NATURAL, default=256, help="samples per step and per inference")
    add("--integrators", choices=INTEGRATORS, nargs="+", default=INTEGRATORS, help="to train with")
    every = "steps of S for each basis update, of the adaptive integrators"
    add("--s-steps", type=NATURAL, nargs="+", default=(1, 10), help=every)
    add("--repeats", type=NATURAL, default=10, help="timed calls at each point")
    longest = "after which a point is called no more, once it has been called three times"
    add("--seconds", type=POSITIVE, default=10.0, help=longest)
    enough = "times dense: no larger rank for a setting that needs more, and more than --seconds"
    add("--slowest", type=POSITIVE, default=1.2, help=enough)
    add("--device", type=device, default=DEFAULT_DEVICE, help="where to train; cpu or a GPU as cuda")
    add("--name", type=FOLDER_NAME, help="of the device's folder; by default what the device calls itself")
    parser.set_defaults(output_dir=Path(__file__).parent / "results")
    args = parse(parser)
    print(make(args))


if __name__ == "__main__":
    main()

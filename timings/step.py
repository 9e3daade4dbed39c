"""How long a training step and inference take at rank r, against the dense network, in one process.

    python timings/step.py        about 15 minutes on two CPU cores
    python timings/step.py --peers       LoRA (peft) and Tucker convolutions (tensorly-torch) as well

Medians of calls in turn, of ten steps for DLRT and of one for the others, three at least; all that `--runs`
times, and a ratio is the median of the runs, with the least and the largest. Beside DLRT stand plain factors
U Vᵀ of the same ranks with SGD, and beside the times the counted FLOPs of all matrix products and
convolutions: the limit that small matrices, memory and Python keep a step from. The table goes to step.csv
and step.md.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from statistics import median
from typing import Any

import pandas as pd
import torch
from measure import BATCHES, ROUND, device_name, evaluation, flops, inference, training_steps
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse, resting
from torch import nn

from dlrt import compression, errors, tables, to_low_rank
from dlrt.baselines import as_factors
from dlrt.convert import replace_layers
from dlrt.flags import NATURAL
from dlrt.models import MLP, LeNet5, ResNet20
from dlrt.timing import AT_LEAST, medians

RESNET20_SHARES = {False: 0.34, True: 0.197}  # of the full ranks, by spatial: 60 % compression
Key = tuple[str, int]  # a method, and which of the low-rank networks it goes with
Measured = tuple[list[float], float]  # milliseconds in each run, and operations
Peer = Callable[[nn.Module, nn.Module], nn.Module]  # makes it of the dense network and the low-rank one


def compare(
    title: str,
    dense: nn.Module,
    others: list[nn.Module],
    x: torch.Tensor,
    args: argparse.Namespace,
    s_steps: int = 1,
    peer: Peer | None = None,
) -> list[dict[str, Any]]:
    """Time and count all networks on the same batches; a row for each low-rank one, which is printed as well.

    A low-rank training step is the mean of those from one decision of ranks to the next.
    """
    models: dict[Key, nn.Module] = {("dense", 0): dense}
    for i, low in enumerate(others):
        models["factors", i] = replace_layers(deepcopy(low), as_factors)
        models |= {("peer", i): peer(dense, low)} if peer else {}
        models["DLRT", i] = low
    y, rows = torch.randint(0, 10, (len(x) // BATCHES,)), []
    phases = {"training step": training(models, x, y, args, s_steps)}
    if s_steps == 1:  # to inference it is all the same
        passes = {key: (inference(model, x[: len(y)]), 1) for key, model in models.items()}
        phases["inference"] = measure(passes, args.repeats, args.runs)
    for phase, measured in phases.items():
        for i, low in enumerate(others):
            rows.append({
                "network": title,
                "ranks": "/".join(dict.fromkeys(map(str, compression(low).ranks.values()))),
                "what": phase,
                "S-steps": str(s_steps) if phase == "training step" else "",
            })  # fmt: skip
            rows[-1] |= row(
                *(measured.get(key) for key in (("dense", 0), ("factors", i), ("DLRT", i), ("peer", i)))
            )
            rows[-1] |= {"peer": peer.__name__} if peer else {}
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def training(
    models: dict[Key, nn.Module], x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace, s_steps: int
) -> dict[Key, Measured]:
    """What a training step of each takes."""
    functions = {}
    for key, model in models.items():
        steps = ROUND if key[0] == "DLRT" else 1
        optimizer = resting(model, "parallel" if key[0] == "DLRT" else None, s_steps)
        functions[key] = training_steps(optimizer, evaluation(model, optimizer, x, y), steps), steps
    return measure(functions, max(AT_LEAST, args.repeats // ROUND), args.runs)


def measure(functions: dict[Key, tuple[Callable, int]], repeats: int, runs: int) -> dict[Key, Measured]:
    """Median milliseconds of each run, and operations, of functions that do a thing so many times."""
    calls = [call for call, _ in functions.values()]
    times = zip(*(medians(calls, repeats) for _ in range(runs)), strict=True)
    return {
        key: ([ms / n for ms in found], flops(call) / n)
        for (key, (call, n)), found in zip(functions.items(), times, strict=True)
    }


def row(dense: Measured, factors: Measured, own: Measured, peer: Measured | None) -> dict[str, str]:
    """What one low-rank network takes beside the others."""
    shown = {
        "dense [ms]": f"{median(dense[0]):.2f}",
        "plain factors [ms]": f"{median(factors[0]):.2f}",
        "DLRT [ms]": f"{median(own[0]):.2f}",
        "faster than dense": ratio(dense[0], own[0]),
        "fewer FLOPs": f"{dense[1] / own[1]:.2f} x",
        "slower than factors": ratio(own[0], factors[0]),
    }
    return shown | ({"faster than the peer": ratio(peer[0], own[0])} if peer else {})


def ratio(times: Sequence[float], others: Sequence[float]) -> str:
    """The ratio of two times in each run: their median, and the least and the largest of several."""
    ratios = sorted(time / other for time, other in zip(times, others, strict=True))
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f} x{spread}"


@errors.boundary("nothing is written yet")
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--repeats", type=NATURAL, default=20, help="timed steps of DLRT, and passes of inference, in a run"
    )
    parser.add_argument("--runs", type=NATURAL, default=3, help="of which the spread is shown")
    networks = ("lenet5", "resnet20", "mlp")
    parser.add_argument("--networks", choices=networks, nargs="+", default=networks, help="to time")
    parser.add_argument("--peers", action="store_true", help="time layers of other libraries as well")
    args = parse(parser)
    peers = {}
    if args.peers:
        try:
            from peers import PEERS as peers
        except ModuleNotFoundError as error:
            parser.error(f"--peers needs {error.name}: pip install peft tensorly-torch")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    for name in args.networks:
        for s_steps in (1, 10):
            for title, dense, others, x in contenders(name, args):
                rows += compare(title, dense, others, x, args, s_steps, peers.get(name))
    about = f"torch {torch.__version__}, {device_name('cpu')}; medians in one process, momentum 0.9"
    short = ("network", "ranks", "what", "S-steps", "faster than dense", "slower than factors")
    tables.write(pd.DataFrame(rows).fillna(""), args.output_dir, f"{about}.", "step", short)


def contenders(
    name: str, args: argparse.Namespace
) -> list[tuple[str, nn.Module, list[nn.Module], torch.Tensor]]:
    """Of a network: a title, the dense one, low-rank ones to compare with it, and batches for all of them.

    LeNet5 is dense in channels-last, as the training scripts have it, and in torch's default layout.
    """
    if name == "lenet5":
        x, low = torch.randn(BATCHES * 128, 1, 28, 28), low_rank(LeNet5(), LENET5_RANKS)
        low.to(memory_format=torch.channels_last)
        layouts = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
        return [
            (f"LeNet5 {at}", LeNet5().to(memory_format=layout), [low], x) for at, layout in layouts.items()
        ]
    if name == "resnet20":
        dense, x, found = (
            ResNet20().to(memory_format=torch.channels_last),
            torch.randn(BATCHES * 128, 3, 32, 32),
            [],
        )
        for spatial, share in RESNET20_SHARES.items():
            low = to_low_rank(ResNet20(), share, skip=["conv1", "linear"], spatial=spatial)
            low.to(memory_format=torch.channels_last)
            found.append(("ResNet20 spatial" if spatial else "ResNet20", dense, [low], x))
        return found
    mlps = [low_rank(MLP(width=args.width), mlp_ranks(rank)) for rank in args.ranks]
    return [(f"MLP {args.width}", MLP(width=args.width), mlps, torch.randn(BATCHES * 256, 1, 28, 28))]


if __name__ == "__main__":
    main()

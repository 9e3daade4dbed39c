"""How long a training step and inference take at rank r, against the dense network, in one process.

    python timings/step.py        about 3 minutes on two CPU cores

Medians over `--repeats` steps; "x faster" is dense / low-rank, and beside it stands the same ratio of the
counted FLOPs of all matrix products and convolutions, which is the limit that small matrices, memory and
Python keep it from.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from dlrt import DLRT, LowRankConv2d, LowRankLinear, compression
from dlrt.models import MLP, LeNet5


def low_rank(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Random low-rank layers in the places named: time does not ask what the weights are."""
    for name, rank in ranks.items():
        dense = getattr(model, name)
        if isinstance(dense, nn.Conv2d):
            layer = LowRankConv2d(dense.in_channels, dense.out_channels, dense.kernel_size, rank)
        else:
            layer = LowRankLinear(dense.in_features, dense.out_features, rank)
        setattr(model, name, layer)
    return model


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> Callable:
    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def repeated(function: Callable, calls: int) -> Callable:
    def several() -> None:
        for _ in range(calls):
            function()

    return several


def inference(model: nn.Module, x: torch.Tensor) -> Callable:
    @torch.inference_mode()
    def forward() -> None:
        model.eval()(x)
        model.train()

    return forward


def medians(functions: list[Callable], repeats: int) -> list[float]:
    """Median milliseconds of each, run in turn, so that a slow moment of the machine strikes all alike."""
    times = [[] for _ in functions]
    for repeat in range(-3, repeats):  # the first three warm up
        for function, its in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= 0:
                its.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(its) for its in times]


def flops(function: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def compare(
    title: str,
    dense: nn.Module,
    others: list[nn.Module],
    x: torch.Tensor,
    args: argparse.Namespace,
    s_steps: int = 1,
) -> None:
    """Time and count all networks on the same input, and print a line for each low-rank one.

    A low-rank training step is the mean of those from one move of the bases to the next.
    """
    y = torch.randint(0, 10, (len(x),))
    optimizers = [torch.optim.SGD(dense.parameters(), lr=1e-4, momentum=0.9)]
    for model in others:
        # equal singular values, a small lr and tau: the rank stays what it is
        optimizers.append(
            DLRT(
                model,
                torch.optim.SGD,
                lr=1e-4,
                momentum=0.9,
                tau=1e-3,
                integrator=args.integrator,
                s_steps=s_steps,
            )
        )
    models = [dense, *others]
    for what, functions in (
        ("training step", [training_step(m, o, x, y) for m, o in zip(models, optimizers, strict=True)]),
        ("inference", [inference(model, x) for model in models]),
    ):
        calls = s_steps if what == "training step" else 1
        functions[1:] = [repeated(function, calls) for function in functions[1:]]
        repeats = max(1, args.repeats // calls)
        times, counts = medians(functions, repeats), [flops(function) for function in functions]
        times[1:], counts[1:] = [ms / calls for ms in times[1:]], [count / calls for count in counts[1:]]
        for model, ms, count in zip(others, times[1:], counts[1:], strict=True):
            ranks = "/".join(dict.fromkeys(map(str, compression(model).ranks.values())))
            low = f"ranks {ranks:9} S-steps {s_steps:2} dense {times[0]:7.2f} ms  low-rank {ms:7.2f} ms"
            limit = f"(FLOPs {counts[0] / count:6.2f} x fewer)"
            print(f"{title:11} {what:13} {low}  {times[0] / ms:6.2f} x faster  {limit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed steps of each network (default %(default)s)"
    )
    parser.add_argument("--integrator", choices=("augmented", "parallel"), default="augmented")
    parser.add_argument("--width", type=int, default=5120, help="of the five-layer net (default %(default)s)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[5, 20, 80, 320], help="of the five-layer net"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, integrator {args.integrator}")
    lenet = [low_rank(LeNet5(), {"conv1": 10, "conv2": 23, "fc1": 62})]
    names = ("fc1", "fc2", "fc3", "fc4")
    mlps = [low_rank(MLP(width=args.width), dict.fromkeys(names, rank)) for rank in args.ranks]
    for s_steps in (1, 10):
        # the dense network channels-last, as the training scripts have it, and in torch's default layout
        for layout, name in ((torch.channels_last, "NHWC"), (torch.contiguous_format, "NCHW")):
            dense = LeNet5().to(memory_format=layout)
            compare(f"LeNet5 {name}", dense, lenet, torch.randn(128, 1, 28, 28), args, s_steps)
    for s_steps in (1, 10):
        compare(f"MLP {args.width}", MLP(width=args.width), mlps, torch.randn(256, 1, 28, 28), args, s_steps)


if __name__ == "__main__":
    main()

"""How much memory a training step takes at rank r, against the dense network, at its peak.

    python timings/memory.py                about a minute on two CPU cores
    python timings/memory.py --vgg16        VGG16 as well, on pictures of 32 x 32 pixels: two minutes more

The peak counts every tensor: weights, velocity, activations, gradients, and what the step makes of them. On a
CPU torch's profiler reports each allocation and release; on a GPU the caching allocator keeps count. The
table goes to memory.csv and memory.md.
"""

import os
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from measure import device_name, evaluation
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse, resting
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from dlrt import errors, tables, to_low_rank
from dlrt.flags import device
from dlrt.models import MLP, VGG16, LeNet5
from dlrt.options import DEFAULT_DEVICE

WARM_UP = 2  # momentum exists after the first step
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start and stop


def peak(prepare: Callable[[], Callable[[], None]], device: str, warm_up: int = WARM_UP) -> int:
    """The most bytes in use at one time in a step, where prepare() makes all that it needs and gives it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        step = prepare()
        for _ in range(warm_up):
            step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare()
        for _ in range(warm_up):
            step()
        with record_function("measured"):
            step()
    return peak_of(profiler)


def peak_of(profiler: profile) -> int:
    """The most bytes in use from the start of what is called "measured" on; nothing was before it all."""
    events = profiler.profiler.kineto_results.experimental_event_tree()
    changes = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
        elif event.name == "measured":
            start = event.start_time_ns
    in_use = most = 0
    for at, change in sorted(changes, key=lambda change: change[0]):
        in_use += change
        most = max(most, in_use) if at >= start else in_use
    return most


def measure(network: Callable[[], nn.Module], data: tuple, integrator: str | None) -> int:
    """Peak of a training step with momentum, in bytes; None trains it dense."""
    device, x, y = data

    def prepare() -> Callable[[], None]:
        model = network().to(device)
        optimizer = resting(model, integrator)
        inputs, labels = x.to(device, copy=True), y.to(device, copy=True)

        closure = evaluation(model, optimizer, inputs, labels)

        def step() -> None:
            optimizer.step(closure)

        return step

    return peak(prepare, device)


def compare(
    title: str,
    dense: Callable[[], nn.Module],
    others: dict[str, Callable[[], nn.Module]],
    data: tuple[str, Tensor, Tensor],
) -> list[dict[str, str]]:
    """A row for each low-rank network, by its ranks, beside the dense one; each is printed as well."""
    most_dense, rows = measure(dense, data, None), []
    for ranks, network in others.items():
        peaks = [measure(network, data, integrator) for integrator in ("augmented", "parallel")]
        row = {"network": title, "ranks": ranks, "dense": f"{most_dense / 1e6:.1f} MB"}
        row |= {
            name: f"{most / 1e6:.1f} MB" for name, most in zip(("augmented", "parallel"), peaks, strict=True)
        }
        rows.append(row | {"less than dense": f"{most_dense / peaks[1]:.2f} x"})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def batch(device: str, samples: int, *shape: int) -> tuple[str, Tensor, Tensor]:
    return device, torch.randn(samples, *shape), torch.randint(0, 10, (samples,))


def vgg16(share: float) -> nn.Module:
    """VGG16 with the layers low-rank that its training script has, at that share of the full ranks."""
    return to_low_rank(VGG16(), share, skip=["features.0", "classifier"])


@errors.boundary("nothing is written yet")
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--vgg16", action="store_true", help="measure VGG16, too")
    parser.add_argument("--device", type=device, default=DEFAULT_DEVICE, help="where to train")
    args = parse(parser)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, SGD with momentum")
    lenet5 = {"/".join(map(str, LENET5_RANKS.values())): lambda: low_rank(LeNet5(), LENET5_RANKS)}
    rows = compare("LeNet5", LeNet5, lenet5, batch(args.device, 128, 1, 28, 28))
    dense = partial(MLP, width=args.width)
    mlps = {str(rank): lambda rank=rank: low_rank(dense(), mlp_ranks(rank)) for rank in args.ranks}
    rows += compare(f"MLP {args.width}", dense, mlps, batch(args.device, 256, 1, 28, 28))
    if args.vgg16:
        vggs = {f"{share} of the full ones": partial(vgg16, share) for share in (0.5, 0.25, 0.1)}
        rows += compare("VGG16", VGG16, vggs, batch(args.device, 128, 3, 32, 32))
    about = f"Peak of a training step with momentum; torch {torch.__version__}, {device_name(args.device)}."
    tables.write(pd.DataFrame(rows), args.output_dir, about, name="memory")


if __name__ == "__main__":
    main()

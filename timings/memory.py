"""How much memory a training step takes at rank r, against the dense network, at its peak.

    python timings/memory.py                about a minute on two CPU cores
    python timings/memory.py --vgg16        VGG16 as well, on pictures of 32 x 32 pixels: two minutes more

The peak counts every tensor: weights, the inner optimizer's momentum, activations, gradients, what the layers
record, and what the step makes of it. On a CPU torch's profiler reports each allocation and release; on a GPU
the caching allocator keeps count. "recorded" is what waits for the step after the backward pass.
"""

import argparse
from collections.abc import Callable, Iterable

import torch
from step import low_rank
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from dlrt import DLRT, LowRankLayer, to_low_rank
from dlrt.models import MLP, VGG16, LeNet5

WARM_UP = 2  # momentum exists after the first step


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Memory held by tensors, of which several may share one."""
    return sum({T.untyped_storage().data_ptr(): T.untyped_storage().nbytes() for T in tensors}.values())


def peak(prepare: Callable[[], Callable[[], None]], device: str) -> int:
    """The most bytes in use at one time in a step, where prepare() makes all that it needs and gives it."""
    if device != "cpu":
        step = prepare()
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = prepare()
        for _ in range(WARM_UP):
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


def measure(network: Callable[[], nn.Module], data: tuple, integrator: str | None) -> tuple[int, int]:
    """Peak of a training step with momentum, and what is recorded for it, in bytes; None trains it dense."""
    recorded = []
    device, x, y = data

    def prepare() -> Callable[[], None]:
        model = network().to(device)
        options = {"lr": 1e-4, "momentum": 0.9}
        if integrator is None:
            optimizer = torch.optim.SGD(model.parameters(), **options)
        else:
            # equal singular values, a small lr and tau: the rank stays what it is
            optimizer = DLRT(model, torch.optim.SGD, tau=1e-3, integrator=integrator, **options)
        inputs, labels = x.to(device, copy=True), y.to(device, copy=True)

        def step() -> None:
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            recorded.append(nbytes([*records(model), inputs]) - nbytes([inputs]))  # those are there anyway
            optimizer.step()

        return step

    return peak(prepare, device), max(recorded)


def records(model: nn.Module) -> list[Tensor]:
    """All tensors that the layers' recorded gradients hold."""
    tensors = []
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            G = layer.gradient
            tensors += [T for pair in G.samples for T in pair]
            tensors += [T for T in (G.GV, G.GtU, G.dense) if T is not None]
    return tensors


def compare(
    title: str,
    network: Callable[[], nn.Module],
    ranks: list[dict[str, int]],
    samples: int,
    device: str,
    shape: tuple[int, int, int] = (1, 28, 28),
    convert: Callable[[nn.Module, dict], nn.Module] = low_rank,
) -> None:
    """A line for the dense network, and one for each choice of ranks and integrator."""
    data = device, torch.randn(samples, *shape), torch.randint(0, 10, (samples,))
    dense, _ = measure(network, data, None)
    print(f"{title:10} {'dense':28} peak {dense / 1e6:8.1f} MB", flush=True)
    for chosen in ranks:
        text = "/".join(dict.fromkeys(map(str, chosen.values())))
        for integrator in ("augmented", "parallel"):
            most, recorded = measure(lambda chosen=chosen: convert(network(), chosen), data, integrator)
            print(
                f"{title:10} ranks {text:9} {integrator:12} peak {most / 1e6:8.1f} MB, "
                f"{dense / most:5.2f} x less  (recorded {recorded / 1e6:6.1f} MB)",
                flush=True,
            )


def vgg16_at(model: nn.Module, share: dict[str, float]) -> nn.Module:
    """VGG16 with the layers low-rank that its training script has."""
    return to_low_rank(model, skip=["features.0", "classifier"], **share)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=5120, help="of the five-layer net (default %(default)s)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[5, 20, 80, 320], help="of the five-layer net"
    )
    parser.add_argument("--vgg16", action="store_true", help="measure VGG16, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, SGD with momentum")
    compare("LeNet5", LeNet5, [{"conv1": 10, "conv2": 23, "fc1": 62}], 128, args.device)
    choices = [dict.fromkeys(("fc1", "fc2", "fc3", "fc4"), rank) for rank in args.ranks]
    compare(f"MLP {args.width}", lambda: MLP(width=args.width), choices, 256, args.device)
    if args.vgg16:
        shares = [{"rank": share} for share in (0.5, 0.25, 0.1)]  # of the full rank of each layer
        compare("VGG16", VGG16, shares, 128, args.device, (3, 32, 32), vgg16_at)


if __name__ == "__main__":
    main()

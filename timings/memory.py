"""How much memory a training step takes at rank r, against the dense network, at its peak.

    python timings/memory.py      about a minute on two CPU cores

The peak counts every tensor: weights, the inner optimizer's momentum, activations, gradients, what the layers
record, and what the step makes of it. On a CPU torch's profiler reports each allocation and release; on a GPU
the caching allocator keeps count. "recorded" is what waits for the step after the backward pass.
"""

import os
from collections.abc import Callable, Iterable

import torch
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from dlrt import DLRT, LowRankLayer, cli
from dlrt.models import MLP, LeNet5

WARM_UP = 2  # momentum exists after the first step
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of every start and stop


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Memory held by tensors, of which several may share one."""
    return sum({T.untyped_storage().data_ptr(): T.untyped_storage().nbytes() for T in tensors}.values())


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
            # a small lr and tau: the rank stays what it is
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
    title: str, network: Callable[[], nn.Module], ranks: list[dict[str, int]], samples: int, device: str
) -> None:
    """A line for the dense network, and one for each choice of ranks and integrator."""
    data = device, torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))
    dense, _ = measure(network, data, None)
    print(f"{title:10} {'dense':28} peak {dense / 1e6:8.1f} MB", flush=True)
    for chosen in ranks:
        text = "/".join(dict.fromkeys(map(str, chosen.values())))
        for integrator in ("augmented", "parallel"):
            most, recorded = measure(lambda chosen=chosen: low_rank(network(), chosen), data, integrator)
            print(
                f"{title:10} ranks {text:9} {integrator:12} peak {most / 1e6:8.1f} MB, "
                f"{dense / most:5.2f} x less  (recorded {recorded / 1e6:6.1f} MB)",
                flush=True,
            )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", type=cli.device, default=cli.HERE, help="where to train")
    args = parse(parser)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, SGD with momentum")
    compare("LeNet5", LeNet5, [LENET5_RANKS], 128, args.device)
    choices = [mlp_ranks(rank) for rank in args.ranks]
    compare(f"MLP {args.width}", lambda: MLP(width=args.width), choices, 256, args.device)


if __name__ == "__main__":
    main()

"""What a process gives to be summed in a training step: messages and bytes, against dense training.

    torchrun --nproc-per-node 2 timings/communication.py      about a minute on two CPU cores

Counted where they are handed over, for one step of each network. Dense training is torch's
DistributedDataParallel, which sums in buckets that close at 25 MB, the first at 1 MB, while the backward pass
goes on. DLRT, with the default integrator and bases updated in every step, sums all gradients in one message.
The number of processes changes neither. The table goes to communication.csv and communication.md.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
import torch.distributed as dist
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dlrt import DLRT, distributed, errors, tables
from dlrt.models import MLP, LeNet5


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every message that this process hands over to be summed, within the block."""
    messages, all_reduce = [], dist.all_reduce

    def counting(tensor: torch.Tensor, *args, **options):
        messages.append(tensor.nbytes)
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counting
    try:
        yield messages
    finally:
        dist.all_reduce = all_reduce


def backward(model: nn.Module) -> None:
    """The backward pass of this process's share of a batch."""
    x, y, weight = distributed.own_part(torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,)))
    (weight * cross_entropy(model(x), y)).backward()


def dense_messages(model: nn.Module) -> list[int]:
    """Bytes of each message of DistributedDataParallel in a step."""
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, allreduce_hook)  # in Python, so that it is counted
    backward(parallel)  # after which the buckets are made anew
    with counted() as messages:
        backward(parallel)
    return messages


def low_rank_messages(model: nn.Module) -> list[int]:
    """Bytes of each message in a step of DLRT that takes one pass."""
    optimizer = DLRT(model, torch.optim.SGD, lr=1e-4, tau=0.0)
    backward(model)
    with counted() as messages:
        distributed.reduce_gradients(model)
    optimizer.step()
    return messages


def compare(
    title: str, network: Callable[[], nn.Module], ranks: list[dict[str, int]]
) -> list[dict[str, str]]:
    """A row for each choice of ranks; process 0 prints it as well."""
    dense, rows = dense_messages(network()), []
    for chosen in ranks:
        sent = low_rank_messages(low_rank(network(), chosen))
        rows.append({
            "network": title,
            "ranks": "/".join(dict.fromkeys(map(str, chosen.values()))),
            "dense": f"{sum(dense) / 1e6:.3f} MB",
            "dense messages": str(len(dense)),
            "low-rank": f"{sum(sent) / 1e6:.3f} MB",
            "low-rank messages": str(len(sent)),
            "fewer bytes": f"{sum(dense) / sum(sent):.2f} x",
        })  # fmt: skip
        if distributed.process_rank() == 0:
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


@errors.boundary("nothing is written yet")
def main() -> None:
    parser = make_parser(__doc__)
    args = parse(parser)
    distributed.start("cpu")
    if distributed.world_size() == 1:
        parser.error("start it with torchrun --nproc-per-node 2: one process has nothing to sum")
    torch.manual_seed(0)
    rows = compare("LeNet5", LeNet5, [LENET5_RANKS])
    choices = [mlp_ranks(rank) for rank in args.ranks]
    rows += compare(f"MLP {args.width}", lambda: MLP(width=args.width), choices)
    if distributed.process_rank() == 0:
        short = ("network", "ranks", "dense", "low-rank", "low-rank messages", "fewer bytes")
        about = "Given to be summed in a step, float32."
        tables.write(pd.DataFrame(rows), args.output_dir, about, "communication", short)
    distributed.stop()


if __name__ == "__main__":
    main()

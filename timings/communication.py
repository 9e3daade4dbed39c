"""How many bytes a training step gives to be summed over the processes, against data-parallel dense training.

    torchrun --nproc-per-node 2 timings/communication.py      about a minute on two CPU cores

Counted where they are handed over, for one step of each network; dense training hands over every gradient.
"""

from collections.abc import Callable

import torch
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse
from torch import nn
from torch.nn.functional import cross_entropy

from dlrt import DLRT, distributed
from dlrt.models import MLP, LeNet5


def bytes_of(action: Callable[[], object]) -> int:
    """How many bytes this process hands over to be summed in the action."""
    before = distributed.bytes_reduced
    action()
    return distributed.bytes_reduced - before


def dense_step(model: nn.Module) -> None:
    """Sum the gradients of a dense network; what they are does not matter here."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    distributed.reduce_gradients(model)


def low_rank_step(model: nn.Module, integrator: str) -> None:
    """One step of DLRT on this process's share of 32 samples."""
    optimizer = DLRT(model, torch.optim.SGD, lr=1e-4, tau=0.0, integrator=integrator)
    x, y, weight = distributed.share(torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,)))
    (weight * cross_entropy(model(x), y)).backward()
    distributed.reduce_gradients(model)
    optimizer.step()


def compare(title: str, network: Callable[[], nn.Module], ranks: list[dict[str, int]]) -> None:
    """Print a line for each choice of ranks and each integrator that runs on several processes."""
    dense = bytes_of(lambda: dense_step(network()))
    for chosen in ranks:
        text = "/".join(dict.fromkeys(map(str, chosen.values())))
        for integrator in ("augmented", "parallel"):
            model = low_rank(network(), chosen)
            sent = bytes_of(lambda model=model, integrator=integrator: low_rank_step(model, integrator))
            if distributed.process_rank() == 0:
                print(
                    f"{title:10} ranks {text:9} {integrator:12} {sent / 1e6:8.3f} MB a step, dense "
                    f"{dense / 1e6:8.3f} MB, {dense / sent:6.2f} x fewer",
                    flush=True,
                )


def main() -> None:
    parser = make_parser(__doc__)
    args = parse(parser)
    distributed.start("cpu")
    if distributed.world_size() == 1:
        parser.error("start it with torchrun --nproc-per-node 2: one process has nothing to sum")
    torch.manual_seed(0)
    compare("LeNet5", LeNet5, [LENET5_RANKS])
    choices = [mlp_ranks(rank) for rank in args.ranks]
    compare(f"MLP {args.width}", lambda: MLP(width=args.width), choices)
    distributed.stop()


if __name__ == "__main__":
    main()

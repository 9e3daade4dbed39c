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


def bytes_of(model: nn.Module) -> int:
    """How many bytes this process hands over to be summed after a backward pass: those of all gradients."""
    x, y, weight = distributed.share(torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,)))
    (weight * cross_entropy(model(x), y)).backward()
    distributed.reduce_gradients(model)
    return sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)


def compare(title: str, network: Callable[[], nn.Module], ranks: list[dict[str, int]]) -> None:
    """Print a line for each choice of ranks; a pass takes as many whatever the integrator."""
    dense = bytes_of(network())
    for chosen in ranks:
        text = "/".join(dict.fromkeys(map(str, chosen.values())))
        model = low_rank(network(), chosen)
        DLRT(model, torch.optim.SGD, lr=1e-4, tau=0.0)
        sent = bytes_of(model)
        if distributed.process_rank() == 0:
            print(
                f"{title:10} ranks {text:9} {sent / 1e6:8.3f} MB a step, dense {dense / 1e6:8.3f} MB, "
                f"{dense / sent:6.2f} x fewer",
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

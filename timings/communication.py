"""How many bytes a training step gives to be summed over the processes, against data-parallel dense training.

    torchrun --nproc-per-node 2 timings/communication.py      about a minute on two CPU cores

Counted where they are handed over, for one step of each network; dense training hands over every gradient.
The table goes to communication.csv and communication.md.
"""

from collections.abc import Callable

import pandas as pd
import torch
from networks import LENET5_RANKS, low_rank, make_parser, mlp_ranks, parse
from torch import nn
from torch.nn.functional import cross_entropy

from dlrt import DLRT, distributed, tables
from dlrt.models import MLP, LeNet5


def bytes_of(model: nn.Module) -> int:
    """How many bytes this process hands over to be summed after a backward pass: those of all gradients."""
    x, y, weight = distributed.own_part(torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,)))
    (weight * cross_entropy(model(x), y)).backward()
    distributed.reduce_gradients(model)
    return sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)


def compare(
    title: str, network: Callable[[], nn.Module], ranks: list[dict[str, int]]
) -> list[dict[str, str]]:
    """A row for each choice of ranks, the same whatever the integrator; process 0 prints it as well."""
    dense, rows = bytes_of(network()), []
    for chosen in ranks:
        text = "/".join(dict.fromkeys(map(str, chosen.values())))
        model = low_rank(network(), chosen)
        DLRT(model, torch.optim.SGD, lr=1e-4, tau=0.0)
        sent = bytes_of(model)
        row = {
            "network": title,
            "ranks": text,
            "dense": f"{dense / 1e6:.3f} MB",
            "low-rank": f"{sent / 1e6:.3f} MB",
        }
        rows.append(row | {"fewer": f"{dense / sent:.2f} x"})
        if distributed.process_rank() == 0:
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


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
        tables.write(
            pd.DataFrame(rows), args.output_dir, "Given to be summed in a step, float32.", "communication"
        )
    distributed.stop()


if __name__ == "__main__":
    main()

"""How long a training step and inference take at rank r, against the dense network, in one process.

    python timings/step.py        about 5 minutes on two CPU cores

Medians over `--repeats` steps, in turn. Beside DLRT stand plain factors U Vᵀ of the same ranks with SGD, and
beside the times the counted FLOPs of all matrix products and convolutions: the limit that small matrices,
memory and Python keep a step from. The table goes to step.csv and step.md.
"""

import argparse
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from measure import BATCHES, ROUND, device_name, evaluation, flops, inference, training_steps
from networks import LENET5_RANKS, RESTING, low_rank, make_parser, mlp_ranks, parse, resting_dlrt
from torch import nn

from dlrt import compression, tables, to_low_rank
from dlrt.baselines import as_factors
from dlrt.convert import replace_layers
from dlrt.models import MLP, LeNet5, ResNet20
from dlrt.options import NATURAL
from dlrt.timing import AT_LEAST, medians

RESNET20_SHARES = {False: 0.34, True: 0.197}  # of the full ranks, by spatial: 60 % compression


def compare(
    title: str,
    dense: nn.Module,
    others: list[nn.Module],
    x: torch.Tensor,
    args: argparse.Namespace,
    s_steps: int = 1,
) -> list[dict[str, Any]]:
    """Time and count all networks on the same batches; a row for each low-rank one, which is printed as well.

    A low-rank training step is the mean of those from one decision of ranks to the next.
    """
    y = torch.randint(0, 10, (len(x) // BATCHES,))
    factors = [replace_layers(deepcopy(model), as_factors) for model in others]
    optimizers = [torch.optim.SGD(dense.parameters(), **RESTING)]
    optimizers += [resting_dlrt(model, "parallel", s_steps) for model in others]
    optimizers += [torch.optim.SGD(model.parameters(), **RESTING) for model in factors]
    models, rows = [dense, *others, *factors], []
    closures = [evaluation(m, o, x, y) for m, o in zip(models, optimizers, strict=True)]
    steps = [1, *(ROUND for _ in others), *(1 for _ in factors)]
    training = [training_steps(*each) for each in zip(optimizers, closures, steps, strict=True)]
    for phase, functions, calls, repeats in (
        ("training step", training, ROUND, max(AT_LEAST, args.repeats // ROUND)),
        ("inference", [inference(model, x[: len(y)]) for model in models], 1, args.repeats),
    ):
        times, counts = (
            medians(functions, repeats),
            [flops(function) for function in functions],
        )
        for i, model in enumerate(others, start=1):
            ms, plain = times[i] / calls, times[i + len(others)]
            rows.append({
                "network": title,
                "ranks": "/".join(dict.fromkeys(map(str, compression(model).ranks.values()))),
                "what": phase,
                "S-steps": str(s_steps) if phase == "training step" else "",
                "dense [ms]": f"{times[0]:.2f}",
                "plain factors [ms]": f"{plain:.2f}",
                "DLRT [ms]": f"{ms:.2f}",
                "faster than dense": f"{times[0] / ms:.2f} x",
                "fewer FLOPs": f"{counts[0] / (counts[i] / calls):.2f} x",
                "slower than factors": f"{ms / plain:.2f} x",
            })  # fmt: skip
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=NATURAL, default=20, help="timed steps of each network")
    networks = ("lenet5", "resnet20", "mlp")
    parser.add_argument("--networks", choices=networks, nargs="+", default=networks, help="to time")
    args = parse(parser)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    for name in args.networks:
        for s_steps in (1, 10):
            for title, dense, others, x in contenders(name, args):
                made = compare(title, dense, others, x, args, s_steps)
                rows += made if s_steps == 1 else [row for row in made if row["S-steps"]]
    about = f"torch {torch.__version__}, {device_name('cpu')}; medians in one process, momentum 0.9"
    short = ("network", "ranks", "what", "S-steps", "faster than dense", "slower than factors")
    tables.write(pd.DataFrame(rows), args.output_dir, f"{about}.", "step", short)


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

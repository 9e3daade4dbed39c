"""How long a training step and inference take at rank r, against the dense network, in one process.

    python timings/step.py        about 5 minutes on two CPU cores

Medians over `--repeats` steps; "x faster" is dense / low-rank, and beside it stands the same ratio of the
counted FLOPs of all matrix products and convolutions, which is the limit that small matrices, memory and
Python keep it from.
"""

import argparse

import torch
from measure import evaluation, flops, inference, training_steps
from networks import LENET5_RANKS, RESTING, low_rank, make_parser, mlp_ranks, parse, resting_dlrt
from torch import nn

from dlrt import compression, to_low_rank
from dlrt.cli import NATURAL
from dlrt.models import MLP, LeNet5, ResNet20
from dlrt.timing import AT_LEAST, medians

RESNET20_SHARES = {False: 0.34, True: 0.197}  # of the full ranks, by spatial: 60 % compression


def compare(
    title: str,
    dense: nn.Module,
    others: list[nn.Module],
    x: torch.Tensor,
    args: argparse.Namespace,
    s_steps: int = 1,
) -> None:
    """Time and count all networks on the same input, and print a line for each low-rank one.

    A low-rank training step is the mean of those from one basis update to the next.
    """
    y = torch.randint(0, 10, (len(x),))
    optimizers = [torch.optim.SGD(dense.parameters(), **RESTING)]
    optimizers += [resting_dlrt(model, "parallel", s_steps) for model in others]
    models = [dense, *others]
    closures = [evaluation(m, o, x, y) for m, o in zip(models, optimizers, strict=True)]
    steps = [1, *(s_steps for _ in others)]
    training = [training_steps(*each) for each in zip(optimizers, closures, steps, strict=True)]
    for what, functions, calls, repeats in (
        ("training step", training, s_steps, max(AT_LEAST, args.repeats // s_steps)),
        ("inference", [inference(model, x) for model in models], 1, args.repeats),
    ):
        times, counts = medians(functions, repeats), [flops(function) for function in functions]
        times[1:], counts[1:] = [ms / calls for ms in times[1:]], [count / calls for count in counts[1:]]
        for model, ms, count in zip(others, times[1:], counts[1:], strict=True):
            ranks = "/".join(dict.fromkeys(map(str, compression(model).ranks.values())))
            low = f"ranks {ranks:9} S-steps {s_steps:2} dense {times[0]:7.2f} ms  low-rank {ms:7.2f} ms"
            limit = f"(FLOPs {counts[0] / count:6.2f} x fewer)"
            print(f"{title:16} {what:13} {low}  {times[0] / ms:6.2f} x faster  {limit}", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=NATURAL, default=20, help="timed steps of each network")
    networks = ("lenet5", "resnet20", "mlp")
    parser.add_argument("--networks", choices=networks, nargs="+", default=networks, help="to time")
    args = parse(parser)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in args.networks:
        for s_steps in (1, 10):
            for title, dense, others, x in contenders(name, args):
                compare(title, dense, others, x, args, s_steps)


def contenders(
    name: str, args: argparse.Namespace
) -> list[tuple[str, nn.Module, list[nn.Module], torch.Tensor]]:
    """Of a network: a title, the dense one, low-rank ones to compare with it, and a batch for all of them.

    LeNet5 is dense in channels-last, as the training scripts have it, and in torch's default layout.
    """
    if name == "lenet5":
        x, low = torch.randn(128, 1, 28, 28), low_rank(LeNet5(), LENET5_RANKS)
        low.to(memory_format=torch.channels_last)
        layouts = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
        return [
            (f"LeNet5 {at}", LeNet5().to(memory_format=layout), [low], x) for at, layout in layouts.items()
        ]
    if name == "resnet20":
        dense, x, found = ResNet20().to(memory_format=torch.channels_last), torch.randn(128, 3, 32, 32), []
        for spatial, share in RESNET20_SHARES.items():
            low = to_low_rank(ResNet20(), share, skip=["conv1", "linear"], spatial=spatial)
            low.to(memory_format=torch.channels_last)
            found.append(("ResNet20 spatial" if spatial else "ResNet20", dense, [low], x))
        return found
    mlps = [low_rank(MLP(width=args.width), mlp_ranks(rank)) for rank in args.ranks]
    return [(f"MLP {args.width}", MLP(width=args.width), mlps, torch.randn(256, 1, 28, 28))]


if __name__ == "__main__":
    main()

"""Adapters beside those of peft: EfficientNet-Lite0 of ImageNet learns CIFAR-10 from 1,000 pictures.

    python cifar10/fine_tune_adapters.py --tune --jobs 2    pip install peft; 1 to 4 minutes a run and core

The weights rest; a new head, and adapters of the 1 x 1 convolutions, are trained for five epochs, by pictures
of 64 pixels. All adapters have as many parameters as LoRA of rank 4, but those of AdaLoRA, which counts
ranks; those whose ranks move begin with 6. For comparison, the head alone and all weights. Step sizes are
chosen as in probe.py; a head beside others has one for all.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tuned_runs import Comparison, Made, training_batches

from dlrt import DLRT, add_adapters, errors
from dlrt.adapters import adapters
from dlrt.data import Dataset, Split
from dlrt.datasets import CIFAR10_CLASSES, load
from dlrt.errors import RunError
from dlrt.models import EfficientNetLite0, efficientnet
from dlrt.ranks import parameters
from dlrt.training import evaluate

SAMPLES, TEST_SAMPLES, EPOCHS, BATCH, PIXELS = 1000, 3000, 5, 50, 64
RANK, FIRST_RANK, HEAD_LR = 4, 6, 3e-3
SMALL, USUAL, WIDE = (
    [{"lr": lr} for lr in lrs]
    for lrs in ((1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 0.01, 0.03), (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3))
)
SETTINGS = {
    "DLRT, Muon": WIDE,
    "DLRT, Adam": USUAL,
    "LoRA, AdamW": USUAL,
    "AdaLoRA, AdamW": WIDE,
    "AdaLoRA, AdamW, lr 0.01": [{"lr": 0.01}],  # of what is tried the largest that no seed diverges with
    "the head alone, AdamW": WIDE,
    "all weights, AdamW": SMALL,
}


class Pointwise(nn.Module):
    """A 1 x 1 convolution as nn.Linear over the channels, of which every library has adapters."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.in_channels, conv.out_channels, bias=False)
        self.linear.weight = nn.Parameter(conv.weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class WithLoss(nn.Module):
    """Logits, or where labels are given an object with the loss, as a network of transformers has it.

    peft adds to that loss what AdaLoRA asks of its factors.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | SimpleNamespace:
        logits = self.network(interpolate(x, size=(PIXELS, PIXELS), mode="bilinear"))
        return logits if y is None else SimpleNamespace(loss=cross_entropy(logits, y))


def pretrained() -> WithLoss:
    """The network that rests, with a new head. It stays in evaluation mode: its statistics rest as well."""
    network = EfficientNetLite0()
    network.load_state_dict(efficientnet.imagenet_weights())
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, Pointwise(module))
    network.fc = nn.Linear(network.fc.in_features, len(CIFAR10_CLASSES))
    return WithLoss(network.requires_grad_(False)).eval().to(memory_format=torch.channels_last)


def make(row: str, steps: int, lr: float) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[int], object]]:
    """What is trained in so many steps, by which optimizer, and what is called after each step."""
    model = pretrained()
    if row.startswith("DLRT"):
        return *with_dlrt(model, row.split()[1].lower(), steps, lr), lambda step: None
    if "LoRA" in row:
        model = with_peft(model, steps if row.startswith("AdaLoRA") else None)
    else:
        model.requires_grad_(row.startswith("all"))
        model.network.fc.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if ".fc." in name]
    others = [p for name, p in trained.items() if ".fc." not in name]
    groups = [{"params": head, "lr": HEAD_LR}, {"params": others}] if others else head
    after = model.base_model.update_and_allocate if row.startswith("AdaLoRA") else lambda step: None
    return model, torch.optim.AdamW(groups, lr=lr, weight_decay=0.0), after


def with_dlrt(model: WithLoss, update: str, steps: int, lr: float) -> tuple[nn.Module, DLRT]:
    """Adapters under a budget: that of adapters of one rank, and the head."""
    layers, head = [m.linear for m in model.modules() if isinstance(m, Pointwise)], model.network.fc
    ends = sum(sum(layer.weight.shape) for layer in layers)  # parameters of adapters of rank 1
    weights = sum(layer.weight.numel() for layer in layers)
    add_adapters(model, FIRST_RANK, target="linear")
    head.requires_grad_(True)
    own = head.weight.numel()
    budget = {"compression": 1 - (RANK * ends + own) / (weights + own), "ramp": steps // 2, "min_rank": 1}
    rule = {"update": update, "update_lr": lr}
    return model, DLRT(model, torch.optim.AdamW, lr=HEAD_LR, weight_decay=0.0, **rule, **budget)


def with_peft(model: WithLoss, steps: int | None) -> nn.Module:
    """LoRA, or AdaLoRA for so many steps, which has its final ranks after half of them."""
    import peft

    where = {"target_modules": r".*\.linear", "modules_to_save": ["fc"]}
    if steps is None:
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, **where)
    else:
        moves = {"tinit": steps // 10, "tfinal": steps // 2, "deltaT": 1, "total_step": steps}
        config = peft.AdaLoraConfig(init_r=FIRST_RANK, target_r=RANK, lora_alpha=FIRST_RANK, **moves, **where)
    return peft.get_peft_model(model, config).eval()


def adapter_ranks(model: nn.Module) -> list[tuple[int, tuple[int, int]]]:
    """The rank of each adapter, of AdaLoRA without what it masks, and the shape of the weight beside it."""
    if ours := adapters(model):
        return [(layer.rank, layer.shape) for layer in ours.values()]
    layers = [module for module in model.modules() if getattr(module, "lora_A", None)]
    scales = [getattr(module, "lora_E", {"default": torch.ones(RANK)})["default"] for module in layers]
    return [(int((E != 0).sum()), m.base_layer.weight.shape) for m, E in zip(layers, scales, strict=True)]


def pictures(split: Split, dataset: Dataset, samples: int) -> Split:
    """The first of a split, normalised as the network wants them."""
    mean, std, new_mean, new_std = (
        torch.tensor(numbers).view(3, 1, 1)
        for numbers in (dataset.mean, dataset.std, efficientnet.MEAN, efficientnet.STD)
    )
    return Split((split.images[:samples] * std + mean - new_mean) / new_std, split.labels[:samples])


def train(row: str, seed: int, setting: dict, data_dir: Path, threads: int) -> Made:
    """One run: accuracy on as many validation pictures as it trains with, and on test pictures."""
    torch.set_num_threads(threads)
    dataset, start = load("cifar10", data_dir, 0), time.perf_counter()
    split = pictures(dataset.train, dataset, SAMPLES)
    steps = EPOCHS * split.steps(BATCH)
    torch.manual_seed(seed)
    model, optimizer, after = make(row, steps, **setting)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (x, y) in enumerate(training_batches(split, dataset, seed, EPOCHS, BATCH), start=1):
        model(x, y).loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        scheduler.step()
    ranks = adapter_ranks(model)
    others = [p for name, p in model.named_parameters() if not re.search("lora_|adapter", name)]
    rest = sum(p.numel() for p in others if p.requires_grad and p.dim() > 1)
    return {
        "row": row,
        "seed": seed,
        "setting": json.dumps(setting),
        "validation_accuracy": evaluate(model, pictures(dataset.validation, dataset, SAMPLES))[1],
        "test_accuracy": evaluate(model, pictures(dataset.test, dataset, TEST_SAMPLES))[1],
        "parameters": sum(parameters(r, shape) for r, shape in ranks) + rest,
        "ranks": "/".join(str(r) for r, _ in ranks),
        "seconds": time.perf_counter() - start,
    }


@errors.boundary()
def main() -> None:
    study = Comparison("adapters", train, SETTINGS, ("parameters", "parameters"))
    try:
        study.main(__doc__, Path(__file__).parent)
    except ModuleNotFoundError as error:
        raise RunError(f"{error}: pip install peft, and what requirements.txt has") from error


if __name__ == "__main__":
    main()

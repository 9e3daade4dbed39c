"""Small networks, their batches, and the loop that trains them."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import LowRank

NETS = {  # what makes it, the shape of its input, that of its output
    "wide": (lambda: nn.Linear(12, 5), (20, 12), (20, 5)),
    "tall": (lambda: nn.Linear(5, 12), (20, 5), (20, 12)),
    "square": (lambda: nn.Linear(7, 7), (20, 7), (20, 7)),
    "strided convolution": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (4, 3, 9, 9), (4, 6, 5, 5)),
    "two layers": (
        lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)),
        (20, 12),
        (20, 5),
    ),
}
OPTIONS = {  # of SGD
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "maximize": {"momentum": 0.5, "weight_decay": 0.01, "maximize": True},
}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 12), nn.Tanh(), nn.Linear(12, 4)
    )


def batch(size=16):
    return torch.randn(size, 1, 8, 8), torch.randint(0, 4, (size,))


def low_rank_layers(model):
    return [module for module in model.modules() if isinstance(module, dlrt.LowRankLayer)]


def train(model, optimizer, batches, parts=1):
    """A step on every batch, whose gradient is accumulated over so many parts."""
    for x, y in batches:
        if getattr(optimizer, "group", {"integrator": "parallel"})["integrator"] != "parallel":
            loss = optimizer.step(closure_of(model, optimizer, x, y))
            continue
        optimizer.zero_grad()
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = cross_entropy(model(inputs), labels) / parts
            loss.backward()  # the loss stays alive into the next forward pass, as in everybody's loop
        optimizer.step()
    return loss


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def dense_gradients(model, x, y):
    """The gradients for the weights, from a dense copy of the model."""
    dense = dlrt.to_dense(copy.deepcopy(model))
    dense.zero_grad()
    cross_entropy(dense(x), y).backward()
    return [
        (layer if isinstance(layer, dlrt.LowRankLayer) else dlrt.LowRankLayer).as_matrix(same.weight.grad)
        for layer, same in zip(model, dense, strict=True)
        if isinstance(same, nn.Linear | nn.Conv2d)
    ]


def factors_of(model):
    return [LowRank(*(T.detach().clone() for T in (L.U, L.S, L.V))) for L in low_rank_layers(model)]


def apart(dense, model):
    """The largest relative difference of a parameter."""
    other = dlrt.to_dense(copy.deepcopy(model))
    pairs = zip(dense.parameters(), other.parameters(), strict=True)
    return max(float(((a - b).norm() / a.norm()).detach()) for a, b in pairs)

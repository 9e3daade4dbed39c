"""Nothing grows while training: neither what Python holds nor what torch has allocated."""

import ctypes
import gc
import platform
import tracemalloc
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dlrt import DLRT, LowRankConv2d, LowRankLinear

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc how much is allocated")
STEPS, STRETCHES = 600, 4
FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """What glibc's allocator says of itself; torch takes the memory of CPU tensors from it."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def allocated():
    """Bytes in use, of all kinds of objects: in the heaps, and mapped on their own."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def trainer(integrator, s_steps):
    """A step of a small network whose ranks go up and down."""
    torch.manual_seed(0)
    layers = [LowRankConv2d(1, 4, 3, rank=2), nn.ReLU(), nn.Flatten(), LowRankLinear(4 * 36, 64, 8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 4))
    options = {"lr": 0.02, "momentum": 0.9, "tau": 0.1, "integrator": integrator, "s_steps": s_steps}
    optimizer = DLRT(model, torch.optim.SGD, max_rank=8, **options)
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 4

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def in_use():
    gc.collect()
    return tracemalloc.get_traced_memory()[0], allocated()


@pytest.mark.parametrize(("integrator", "s_steps"), [("augmented", 1), ("parallel", 2)])
def test_nothing_grows_over_hundreds_of_steps(integrator, s_steps):
    step = trainer(integrator, s_steps)
    tracemalloc.start()
    try:
        for _ in range(100):  # torch remembers some things for every new shape
            step()
        readings = [in_use()]
        for _ in range(STRETCHES):
            for _ in range(STEPS // STRETCHES):
                step()
            readings.append(in_use())
    finally:
        tracemalloc.stop()
    # what grows does so in every stretch; what is made once, by whatever else is loaded, in one of them
    traced, held = (min(then - now for now, then in pairwise(which)) for which in zip(*readings, strict=True))
    # bytes a step: 20 to 40 are seen in the last stretch, ever fewer, as torch renews older things
    assert traced < STEPS // STRETCHES * 64  # one tensor is more, its numbers apart
    assert held < STEPS // STRETCHES * 200  # the input of the linear layer alone is 9 KB


def test_a_record_that_is_kept_would_be_seen():
    step, kept = trainer("augmented", 1), []
    for _ in range(20):
        step()
    tracemalloc.start()
    try:
        for _ in range(100):
            step()
            kept.append(torch.zeros(16, 4 * 36))
        size = kept[0].nbytes
        kept_too = in_use()
        kept.clear()
        traced, held = (then - now for then, now in zip(kept_too, in_use(), strict=True))
    finally:
        tracemalloc.stop()
    assert traced > 100 * 64
    assert held > 100 * size / 2

"""Several processes that train one network: each takes its share of every batch, and products are summed.

Under `torchrun` a step sums, for an m x n layer of rank r, the (m + n) r + r² numbers of G V, Gᵀ U and
Uᵀ G V, and never the m n numbers of G. All that follows is computed by every process alike, so that
all keep the same bases; `check_identical` makes sure of it. Without torchrun there is one process, and
nothing here does anything.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlrt.errors import ProcessError

TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once

T = TypeVar("T")


def start(device: str) -> str:
    """Join the other processes, where torchrun started this one; give the device that this one is to use.

    On "cuda" every process of a machine takes a GPU of its own (NCCL), on a CPU they share the cores (gloo).
    ProcessError where there are more processes than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device
    if not device.startswith("cuda"):
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return device
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ProcessError(f"every process needs a GPU of its own, {gpus} are here: --nproc-per-node {gpus}")
    torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    return f"cuda:{local}"


def stop() -> None:
    """Leave the other processes, after the work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process_rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """This process's part of a batch, and the weight of its mean loss: the share of the samples it holds.

    No part has a single sample unless the batch has, for the sake of batch normalisation. A process that is
    left over then takes a part that counts with weight 0, so that all processes do the same.
    """
    parts = max(1, min(world_size(), len(y) // 2))
    index = process_rank() % parts
    part = y.tensor_split(parts)[index]
    weight = len(part) / len(y) if process_rank() < parts else 0.0
    return x.tensor_split(parts)[index], part, weight


@torch.no_grad()
def reduce_gradients(model: nn.Module) -> None:
    """Between backward pass and step: sum all gradients over the processes.

    Weigh every process's loss first, as `own_part` says, and the sum is the gradient of the joined batch. K-,
    L- and S-gradients are gradients like all others. The same parameters must have taken part everywhere.
    RuntimeError where it was done already.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if any(hasattr(gradient, "is_sum") for gradient in gradients):
        raise RuntimeError(
            "these gradients are summed already: once between the last backward pass and the step, and "
            "zero_grad() after it, which sets them to None"
        )
    sum_over_processes(gradients)
    for gradient in gradients:
        gradient.is_sum = True


def remember_sums(parameters: Iterable[Tensor]) -> None:
    """Before a step uses their gradients: whether these are sums, for what changes ranks without any."""
    for parameter in parameters if world_size() > 1 else ():
        parameter.had_sum = hasattr(parameter.grad, "is_sum")


def check_ranks_may_move(S: Tensor, name: str) -> None:
    """RuntimeError where processes would not change the rank alike, as they do after `reduce_gradients`.

    What was remembered of the last step tells.
    """
    if S.device.type == "cpu" and S.is_shared():
        raise RuntimeError(
            f"the rank of {name} would change, and its factors are in memory shared with other processes: "
            'keep ranks (s_steps=1, tau=0, max_rank="initial"), or train a copy.deepcopy of the model'
        )
    if world_size() > 1 and not getattr(S, "had_sum", True):
        raise RuntimeError(
            f"the rank of {name} would change, and DistributedDataParallel cannot follow: keep ranks "
            '(tau=0, max_rank="initial"), or call dlrt.distributed.reduce_gradients(model) before each step'
        )


def check_bases_may_rest(S: Tensor, name: str) -> None:
    """RuntimeError under DistributedDataParallel, which waits for all parameters that it was made with."""
    if world_size() > 1 and not getattr(S, "had_sum", True):
        raise RuntimeError(
            f"the bases of {name} would rest, and DistributedDataParallel would wait for their gradients: "
            "wrap the model after optimizer.freeze_bases(), keep s_steps=1, or call "
            "dlrt.distributed.reduce_gradients(model) before each step instead"
        )


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics, which saw different shares of the batches."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    sum_over_processes(buffers)
    for buffer in buffers:
        buffer /= world_size()


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over the processes, in place, in one message for each type of number."""
    tensors = list(tensors)
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with _lost_process_reported():
            dist.all_reduce(flat)
        for tensor, total in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(total.view(tensor.shape))


def sums(*values: float) -> list[float]:
    """Each of these numbers, summed over the processes."""
    totals = torch.tensor(values, dtype=torch.float64)
    sum_over_processes([totals])
    return totals.tolist()


def on_first_process(action: Callable[[], T]) -> T:
    """Run an action on process 0 alone and give its result to all; an error ends all of them."""
    if world_size() == 1:
        return action()
    result, error = None, None
    if process_rank() == 0:
        try:
            result = action()
        except Exception as reason:  # whichever it is, it is raised below, when the others know of it
            error = reason
    message = [error is None, result]
    with _lost_process_reported():
        dist.broadcast_object_list(message)
    if error is not None:
        raise error
    if not message[0]:
        sys.exit(1)
    return message[1]


def first_process_first(action: Callable[[], T]) -> T:
    """Run an action on every process, on process 0 before the others: it may have to download."""
    results: list[T] = []
    on_first_process(lambda: results.append(action()))
    return results[0] if results else action()


def check_identical(model: nn.Module) -> None:
    """ProcessError unless all processes hold the same bases and parameters, to the last bit."""
    if world_size() == 1:
        return
    names, sums = zip(*((name, checksum(value)) for name, value in model.named_parameters()), strict=True)
    least, most = torch.tensor(sums), torch.tensor(sums)
    with _lost_process_reported():
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if other := [name for name, a, b in zip(names, least, most, strict=True) if a != b]:
        raise ProcessError(
            f"the processes hold different values of {', '.join(other[:3])}{' ...' if other[3:] else ''}: "
            "they must run on machines and libraries of one kind; --resume continues from the last epoch"
        )


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's shape and values."""
    values = tensor.detach().cpu().reshape(-1).view(torch.uint8)
    return zlib.crc32(values.numpy().tobytes(), zlib.crc32(repr(tuple(tensor.shape)).encode()))


@contextmanager
def _lost_process_reported() -> Iterator[None]:
    """Around what waits for the other processes."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no common type for it
        reason = str(error).splitlines()[0].split("] ")[-1].split(". ")[0]
        raise ProcessError(
            f"another process was lost or does not answer ({reason}): --resume continues from the last epoch"
        ) from error

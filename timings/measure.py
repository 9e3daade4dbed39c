"""Times, floating-point operations and shares of a training step or of inference."""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from dlrt import integrators, network_step, weight_step
from dlrt.timing import wait_for

# the functions in which a step spends its time; one that is called by another counts for itself only
PARTS = {
    "qr": ((integrators, "augmented"), (torch.linalg, "qr")),
    # K-, L- and S-step without what is orthogonalised; Uᵀ G V itself comes from the backward pass
    "s_gradient": tuple((weight_step, name) for name in ("parallel_step", "augment", "update_bases")),
    "svd": ((network_step, "truncated_svd"), (network_step, "leading_subspace")),
}
ROUND = 10  # steps from one decision of ranks to the next
BATCHES = 8  # through which steps go in turn
SHARES = ("forward_backward", *PARTS, "rest")  # the rest: new bases and velocity, inner optimizer


def evaluation(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable:
    """A closure for `optimizer.step`: one forward and backward pass, on the next of the batches in x.

    As in training no two steps in a row have one batch, or the velocity would have its rank.
    """
    batches = cycle(x.split(len(y)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(next(batches)), y)
        loss.backward()
        return loss

    return closure


def training_steps(optimizer: torch.optim.Optimizer, closure: Callable, steps: int = 1) -> Callable:
    """As many steps in one call; a low-rank one is timed from one decision of ranks to the next."""

    def several() -> None:
        for _ in range(steps):
            optimizer.step(closure)

    return several


def inference(model: nn.Module, x: Tensor) -> Callable:
    @torch.inference_mode()
    def forward() -> None:
        model.eval()(x)
        model.train()

    return forward


def flops(function: Callable) -> int:
    """Floating-point operations of all matrix products and convolutions; QR and SVD are not counted."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        function()
    return counter.get_total_flops()


def _in_place(_: Sequence[int], A: Sequence[int], B: Sequence[int], **options: object) -> int:
    """Operations of C.addmm_(A, B), by the shapes; torch counts those of addmm alone."""
    return 2 * A[0] * A[1] * B[1]


class Stopwatch:
    """Seconds spent in named parts; while an inner part runs, the outer one rests."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def wrapped(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **options):
            with self.part(name):
                return function(*args, **options)

        return timed

    @contextmanager
    def over(self, parts: dict[str, tuple]) -> Iterator[None]:
        """Within it, the functions of these modules are timed, whoever calls them."""
        originals = [(part, *place, getattr(*place)) for part, places in parts.items() for place in places]
        for part, module, name, function in originals:
            setattr(module, name, self.wrapped(part, function))
        try:
            yield
        finally:
            for _, module, name, function in originals:
                setattr(module, name, function)


def shares(optimizer: torch.optim.Optimizer, closure: Callable, steps: int, device: str) -> dict[str, float]:
    """What share of the time of so many training steps goes into each of `SHARES`.

    It waits for the device at every change of parts, so the whole takes longer than it does unwatched.
    """
    watch = Stopwatch(device)
    with watch.over(PARTS):
        for _ in range(steps):
            with watch.part("rest"):
                optimizer.step(watch.wrapped("forward_backward", closure))
    return {part: watch.seconds[part] / watch.seconds.total() for part in SHARES}


def device_name(device: str) -> str:
    """What a device calls itself, and how many threads where it is a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name, linux = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if linux.exists():
        text = linux.read_text(encoding="utf-8", errors="replace")
        models = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
        name = models[0] if models else name
    name = " ".join(re.sub(r"\((R|TM)\)|@", " ", name).split())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"

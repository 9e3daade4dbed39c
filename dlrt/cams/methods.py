"""The methods of the package grad-cam, and what its maps are before they are scaled.

Each is used as it is, through a subclass that keeps the raw map, takes the time of every stage and gives
principal components a sign.
"""

from __future__ import annotations

import inspect
import time

import numpy as np
import pytorch_grad_cam
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import nn


def _takes_model_and_layers(kind: object) -> bool:
    """Whether something is a class that needs a model, target layers and nothing else."""
    if not inspect.isclass(kind):
        return False
    needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return [name for name in needed if name != "kwargs"] == ["model", "target_layers"]


METHODS: dict[str, type] = {  # of one layer RefineCAM, which multiplies the maps of several, is Grad-CAM++
    name.lower(): kind
    for name, kind in vars(pytorch_grad_cam).items()
    if _takes_model_and_layers(kind) and name != "RefineCAM"
}
COMPONENTS = ("eigencam", "eigengradcam", "kpca_cam")  # maps that are a principal component
CLASSLESS = ("eigencam", "kpca_cam", "fem", "randomcam")  # maps that are the same for every class
# those take no other component, FEM looks at no weights, and the sign of FullGrad's component is arbitrary
NOT_SMOOTHED = (*COMPONENTS, "segeigencam", "fem", "fullgrad")
PROGRESS_BARS = ("scorecam", "ablationcam")


class Record:
    """The raw maps of one call, (N, h, w) of each pass, and the seconds of its stages."""

    def __init__(self, device: torch.device) -> None:
        self.raws: list[np.ndarray] = []
        self.seconds = {"forward": 0.0, "backward": 0.0, "assembly": 0.0}
        self._device = device
        self.start()

    def start(self) -> None:
        self._last = self._now()

    def lap(self, stage: str) -> None:
        """Count the time since the last call to a stage."""
        now = self._now()
        self.seconds[stage] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":  # kernels are still running when their calls return
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def make(method: str, model: nn.Module, layer: nn.Module, record: Record) -> object:
    """The explainer of that name in `METHODS`; what it makes goes into the record."""
    kind = METHODS[method]
    if issubclass(kind, BaseCAM):
        layers = [] if method == "fullgrad" else [layer]  # it finds its own, and says so of any other
        return _recording(kind, record)(model, layers)
    base = inspect.signature(kind).parameters["base_method"].default
    return kind(model, [layer], base_method=_recording(base, record))


def inner(explainer: object) -> BaseCAM:
    """The one that holds the hooks: the explainer, or the one inside it."""
    if isinstance(explainer, BaseCAM):
        return explainer
    return explainer.base_cam if hasattr(explainer, "base_cam") else explainer.base_cam_per_layer[0]


def _recording(kind: type[BaseCAM], record: Record) -> type[BaseCAM]:
    component = kind.__name__.lower() in COMPONENTS

    class Recording(kind):
        def save_activation(self, module, x, output) -> None:
            """AblationCAM's hook; a function in place may change the output afterwards."""
            super().save_activation(module, x, output.clone())

        def get_cam_weights(self, *arguments) -> np.ndarray:
            if self.weights is None:
                self.weights = super().get_cam_weights(*arguments)
            return self.weights

        def get_cam_image(
            self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False
        ) -> np.ndarray:
            arguments = input_tensor, target_layer, targets, activations, grads
            self.weights = None  # computed once: RandomCAM would draw others, ShapleyCAM has freed its graph
            raw = super().get_cam_image(*arguments, eigen_smooth)
            if component:
                weights = 1 if grads is None else grads
                raw = oriented(raw, (weights * activations).sum(1))
            elif eigen_smooth:
                raw = oriented(raw, super().get_cam_image(*arguments, False))
            record.raws.append(raw)
            return raw

        def compute_cam_per_layer(self, input_tensor, targets, eigen_smooth):
            record.lap("backward")
            before = len(record.raws)
            maps = super().compute_cam_per_layer(input_tensor, targets, eigen_smooth)
            if len(record.raws) == before:  # FullGrad has no image of one layer, but their sum
                record.raws.append(np.asarray(maps).sum(1))
            record.lap("assembly")
            return maps

    return Recording


def oriented(component: np.ndarray, total: np.ndarray) -> np.ndarray:
    """A principal component (N, h, w), whose sign is arbitrary, along the sum over channels (N, h, w)."""
    centred = total - total.mean((1, 2), keepdims=True)
    against = (component * centred).sum((1, 2), keepdims=True) < 0
    return np.where(against, -component, component)

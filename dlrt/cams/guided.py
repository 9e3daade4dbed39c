"""Guided backpropagation (Springenberg et al. 2015), whose product with a map is guided Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from pytorch_grad_cam.utils.image import deprocess_image
from torch import Tensor, nn

from dlrt.cams.targets import SumOfTargets, Target


def guided_gradients(model: nn.Module, images: Tensor, targets: Sequence[Sequence[Target]]) -> np.ndarray:
    """Gradients (N, H, W, C) of the summed targets in which nothing negative passes a ReLU or a ReLU6.

    That holds for every such module of the model, not for functions called in its forward pass.
    """
    copy = deepcopy(model).float().eval().requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False
            module.register_full_backward_hook(lambda module, into, out: (into[0].clamp(min=0),))
    images = images.detach().float().requires_grad_()
    with torch.enable_grad():
        rows = zip(targets, copy(images.clone()), strict=True)  # a first layer may work in place
        (gradients,) = torch.autograd.grad(sum(SumOfTargets(group)(row) for group, row in rows), images)
    return gradients.permute(0, 2, 3, 1).cpu().numpy()


def check_guided(model: nn.Module) -> None:
    """ValueError where a network has no such module: its gradients would be the plain ones."""
    if not any(isinstance(module, (nn.ReLU, nn.ReLU6)) for module in model.modules()):
        raise ValueError(f"--guided needs nn.ReLU modules, {type(model).__name__} has none: leave it out")


def visible(gradients: np.ndarray) -> np.ndarray:
    """A gradient (H, W, C) as an 8-bit picture around grey; grey alone where it is undefined (NaN)."""
    if not np.isfinite(gradients).all():
        return np.full(gradients.shape, 128, np.uint8).squeeze()
    return deprocess_image(gradients).squeeze()

"""Guided backpropagation (Springenberg et al. 2015), whose product with a map is guided Grad-CAM."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from pytorch_grad_cam import GuidedBackpropReLUModel
from pytorch_grad_cam.utils.image import deprocess_image
from torch import Tensor, nn

from dlrt.cams.targets import SumOfTargets, Target


class _OneOutput(nn.Module):
    """A network whose only logit is what a target makes of the others."""

    def __init__(self, network: nn.Module, target: Target) -> None:
        super().__init__()
        self.network, self.target = network, target

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.network(x.clone())).reshape(len(x), 1)


def guided_gradients(model: nn.Module, images: Tensor, targets: Sequence[Sequence[Target]]) -> np.ndarray:
    """Gradients (N, H, W, C) of the summed targets in which nothing negative passes a ReLU.

    That holds for every nn.ReLU of the model, not for functions called in its forward pass. The package
    leaves other ReLUs behind than it found, so it works on a copy.
    """
    copy = deepcopy(model).requires_grad_(False)
    gradients = []
    for image, its in zip(images, targets, strict=True):
        one = _OneOutput(copy, SumOfTargets(its))
        with torch.enable_grad():
            gradients.append(GuidedBackpropReLUModel(one)(image[None].detach().clone(), 0))
    return np.stack(gradients)


def visible(gradients: np.ndarray) -> np.ndarray:
    """A gradient (H, W, C) as an 8-bit picture around grey; grey alone where it is undefined (NaN)."""
    if not np.isfinite(gradients).all():
        return np.full(gradients.shape, 128, np.uint8).squeeze()
    return deprocess_image(gradients).squeeze()

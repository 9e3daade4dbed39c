"""Whether a network needs what its map shows: its confidence as pixels leave and come in the map's order."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor, nn

MEASURES = ("deletion", "insertion", "road")
PERCENTILES = (20, 40, 60, 80)


def faithfulness(
    model: nn.Module, images: Tensor, shown: np.ndarray, classes: list[int], steps: int = 10
) -> dict[str, np.ndarray]:
    """deletion, insertion and road of maps (N, H, W) of normalised images (N, C, H, W), each (N,).

    deletion: the mean probability of the class while the highest pixels turn into the blurred picture, in
    steps; low is good. insertion: the reverse, from the blurred picture to the picture; high is good (Petsiuk
    et al. 2018, with blur on both ways). road: (least relevant first - most relevant first) / 2, pixels
    replaced by noisy linear interpolation (Rong et al. 2022); high is good. NaN where a map is undefined.
    """
    result = {name: np.full(len(images), np.nan) for name in MEASURES}
    kept = np.isfinite(shown).all((1, 2))
    if not kept.any():
        return result
    images = images[torch.from_numpy(kept)]
    shown, chosen = shown[kept], [number for number, keep in zip(classes, kept, strict=True) if keep]
    blurred = blur(images)
    result["deletion"][kept] = replacing(model, images, blurred, shown, chosen, steps)
    result["insertion"][kept] = replacing(model, blurred, images, shown, chosen, steps)
    result["road"][kept] = _road(model, images, shown, chosen)
    return result


@torch.no_grad()
def replacing(
    model: nn.Module, before: Tensor, after: Tensor, shown: np.ndarray, classes: list[int], steps: int
) -> np.ndarray:
    """The mean probability (N,) of each class on the way from one picture to another, highest pixels first.

    By the trapezoidal rule over the share of pixels, in [0, 1].
    """
    place, pixels = _places(shown)[:, None].to(before.device), shown[0].size
    curve = []
    for step in range(steps + 1):
        mixed = torch.where(place < pixels * step / steps, after, before)
        probabilities = model(mixed).softmax(1)
        curve.append(probabilities[torch.arange(len(mixed)), classes].cpu().numpy())
    return np.trapezoid(np.array(curve), dx=1 / steps, axis=0)


def _places(shown: np.ndarray) -> Tensor:
    """The place (N, H, W) of each pixel in the order of its map; 0 is the highest, equals come in turn."""
    order = torch.from_numpy(shown).flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1).view(shown.shape)


def blur(images: Tensor) -> Tensor:
    """Images (N, C, H, W) without detail: a Gaussian whose deviation is an eighth of the shorter side."""
    sigma = min(images.shape[2:]) / 8
    smooth = [
        np.stack([cv2.GaussianBlur(channel, (0, 0), sigma) for channel in image])
        for image in images.cpu().numpy()
    ]
    return torch.from_numpy(np.stack(smooth)).to(images)


def _road(model: nn.Module, images: Tensor, shown: np.ndarray, classes: list[int]) -> np.ndarray:
    targets = [ClassifierOutputSoftmaxTarget(number) for number in classes]
    # ranks, since the package finds no percentile among pixels that are equal, as those cut at 0 are
    ranks = 1 - (_places(shown).double().numpy() + 0.5) / shown[0].size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the noise, which is small; the same call gives the same number
        return ROADCombined(percentiles=list(PERCENTILES))(images, ranks, targets, model)

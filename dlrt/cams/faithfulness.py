"""Whether a network needs what its map shows: its confidence as pixels leave and come in the map's order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from dlrt.cams.imputation import fill

MEASURES = ("deletion", "insertion", "road")
STEPS = 10  # in which pixels leave and come
CACHED = 2**18  # pixels at a time: of more a CPU's caches do not hold what layers make of them
SHARES, NOISE = (0.2, 0.4, 0.6, 0.8), 0.01  # of pixels that ROAD keeps, and what it adds to the others


def faithfulness(
    model: nn.Module, images: Tensor, shown: np.ndarray, classes: list[int]
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
    found, _ = curves(model, images, shown, chosen)
    found["road"] = _road(model, images, shown, chosen)
    for name, values in found.items():
        result[name][kept] = values
    return result


def curves(
    model: nn.Module, images: Tensor, shown: np.ndarray, classes: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """deletion and insertion (N,) of defined maps, as `faithfulness` has them; probability of the class."""
    blurred = blur(images)
    ends = [probability(model, batch, classes) for batch in (images, blurred)]
    found = {
        "deletion": _replacing(model, images, blurred, shown, classes, ends),
        "insertion": _replacing(model, blurred, images, shown, classes, ends[::-1]),
    }
    return found, ends[0]


@torch.no_grad()
def probability(model: nn.Module, images: Tensor, classes: list[int]) -> np.ndarray:
    """That of each picture's class (N,)."""
    on_cpu = images.device.type == "cpu"
    parts = images.split(max(1, CACHED // images[0, 0].numel()) if on_cpu else len(images))
    scores = torch.cat([model(part) for part in parts]).softmax(1)
    return scores[torch.arange(len(images)), classes].cpu().numpy()


def _replacing(
    model: nn.Module,
    before: Tensor,
    after: Tensor,
    shown: np.ndarray,
    classes: list[int],
    ends: Sequence[np.ndarray],
) -> np.ndarray:
    """The mean probability (N,) of each class on the way from one picture to another, highest pixels first.

    By the trapezoidal rule over the share of pixels, in [0, 1]; ends are the probabilities of the two.
    """
    place, pixels = _places(shown)[:, None].to(before.device), shown[0].size
    curve = [ends[0]]
    for step in range(1, STEPS):
        mixed = torch.where(place < pixels * step / STEPS, after, before)
        curve.append(probability(model, mixed, classes))
    return np.trapezoid(np.array([*curve, ends[1]]), dx=1 / STEPS, axis=0)


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
    """Half of how much higher the probability (N,) is without the lowest pixels than without the highest."""
    places, pixels, total = _places(shown).numpy(), images.cpu().numpy(), 0.0
    noise = NOISE * np.random.default_rng(0).normal(size=pixels.shape[1:])  # the same for every picture
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a factorization has one thread
        for share in SHARES:
            for sign, known in ((1, places < share * shown[0].size), (-1, places >= share * shown[0].size)):
                filled = np.stack(list(pool.map(fill, pixels, known)))
                filled += (noise * ~known[:, None]).astype(filled.dtype)
                total = total + sign * probability(model, torch.from_numpy(filled).to(images), classes)
    return total / len(SHARES) / 2

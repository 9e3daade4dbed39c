"""A data set in memory: three splits of images and labels, batches, random shifts and mirror images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def epoch_seed(seed: int, epoch: int) -> int:
    """What the order and the random shifts of an epoch are drawn from, the same for all runs of a seed."""
    return 1_000_003 * seed + epoch


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32, normalised, and their labels (N,), int64.

    Of text they are windows of tokens and the token after each, both (N, T), int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in batches of the given size, in order or in a random one; the last may be smaller.

        A single sample that is left over joins the batch before: batch normalisation can do nothing with it.
        """
        order = torch.arange(len(self)) if shuffle is None else torch.randperm(len(self), generator=shuffle)
        ends = [size * step for step in range(1, self.steps(size))]
        for chosen in order.to(self.labels.device).tensor_split(ends):
            yield self.images[chosen], self.labels[chosen]

    def steps(self, size: int) -> int:
        """How many batches of that size there are."""
        alone = size > 1 and len(self) > 1 and len(self) % size == 1
        return math.ceil(len(self) / size) - alone

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in three disjoint splits.

    mean and std, per channel and of pixels in [0, 1], are what the images were normalised by; text has none.
    A shift by up to `shift` pixels, and a mirror image where flip is set, leave the class what it is.
    checksum tells data apart that have one name, whatever the seed of the split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    flip: bool
    checksum: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image, (T,) of a window."""
        return tuple(self.train.images.shape[1:])

    def check(self) -> None:
        """ValueError where a split is empty, or has labels out of range or pixels that are not finite."""
        for name in ("train", "validation", "test"):
            split, told = getattr(self, name), f"{self.name}, {name} split"
            if len(split) == 0:
                raise ValueError(f"training needs samples in every split, {self.name} has none for {name}")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"{told}: labels must lie in [0, {self.classes}), got {low} to {high}: number the "
                    "classes of the training split from 0"
                )
            if not split.images.isfinite().all():
                raise ValueError(f"{told}: pixels must be finite, got NaN or infinity: look at the images")

    def to(self, device: torch.device | str) -> Dataset:
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)


def augmented_batch(x: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """A batch (N, C, H, W), each image shifted by up to `shift` pixels; with flip half of them mirrored.

    What comes in at the edge is the image reflected. The generator is one of the CPU, on any device.
    """
    n, _, height, width = x.shape
    down, right = torch.randint(2 * shift + 1, (2, n), generator=generator).to(x.device)
    padded = torch.nn.functional.pad(x, [shift] * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, down, right, H, W), a view
    x = windows[torch.arange(n, device=x.device), :, down, right]
    if not flip:
        return x
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)

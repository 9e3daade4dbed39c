"""What a map explains: a class, or several on one picture."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget
from torch import Tensor

Target = Callable[[Tensor], Tensor]
NEAREST = 3  # classes, from which FinerCAM tells one


class SumOfTargets:
    """The sum of several targets on one picture; of a list the package would take the first alone."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self.targets = list(targets)

    def __call__(self, logits: Tensor) -> Tensor:
        return sum(target(logits) for target in self.targets)


def of_classes(classes: Tensor | Iterable[int | Iterable[int]]) -> list[list[ClassifierOutputTarget]]:
    """A list of targets for each picture, from its label, or from a list of its classes."""
    lists = (torch.as_tensor(labels).flatten().tolist() for labels in classes)
    return [[ClassifierOutputTarget(number) for number in numbers] for numbers in lists]


def per_picture(targets: Sequence[Sequence[Target]] | None, logits: Tensor) -> list[list[Target]]:
    """As many lists of targets as there are logits (N, classes); None stands for the predicted classes.

    ValueError where they are no lists of targets, fewer or more, where a picture has none, or where a class
    does not exist.
    """
    if targets is None:
        return of_classes(logits.argmax(1))
    try:
        lists = [list(group) for group in targets]
    except TypeError:
        lists = None
    if lists is None or not all(map(_is_target, (target for group in lists for target in group))):
        raise ValueError(
            "targets must be None or a list of lists as [[ClassifierOutputTarget(3)], ...], one for each "
            f"picture, got {str(targets)[:80]}: dlrt.cams.targets.of_classes makes them of labels"
        )
    if len(lists) != len(logits):
        raise ValueError(
            f"as many lists of targets as pictures are needed, got {len(lists)} for {len(logits)}"
        )
    if empty := [number for number, group in enumerate(lists) if not group]:
        raise ValueError(f"every picture needs a target, picture {empty[0]} has none")
    last = logits.shape[1] - 1
    for number in (getattr(target, "category", 0) for group in lists for target in group):
        if isinstance(number, bool) or not hasattr(number, "__index__") or not 0 <= number <= last:
            raise ValueError(f"a class must be a whole number in [0, {last}], got {number!r}")
    return lists


def _is_target(target: object) -> bool:
    return callable(target) and not isinstance(target, type)


def finer(targets: list[list[Target]], logits: Tensor) -> list[list[Target]]:
    """In place of each class the difference between it and those with the nearest logits, for FinerCAM."""
    result = []
    for group, row in zip(targets, logits, strict=True):
        new = []
        for target in group:
            if not isinstance(target, ClassifierOutputTarget):
                new.append(target)
                continue
            distance = (row - row[target.category]).abs()
            distance[target.category] = torch.inf
            nearest = distance.argsort()[: min(NEAREST, len(row) - 1)].tolist()
            new.append(FinerWeightedTarget(target.category, nearest, 1.0))
        result.append(new)
    return result


def class_number(text: str, names: Sequence[str]) -> int:
    """The number of a class from its name or its number; ValueError where there is none of that name."""
    text = text.strip()
    if text in names:
        return names.index(text)
    lower = [name.lower() for name in names]
    if text.lower() in lower:
        return lower.index(text.lower())
    if text.isdigit() and int(text) < len(names):
        return int(text)
    within = [name for name in names if text.lower() in name.lower()]
    near = (within or difflib.get_close_matches(text.lower(), lower, cutoff=0.5))[:5]
    known = ", ".join(near or names[:10]) + ("" if near or len(names) <= 10 else ", ...")
    raise ValueError(f"unknown class {text!r}; classes are 0 to {len(names) - 1}, by name {known}")

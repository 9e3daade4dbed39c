"""Pictures as people have them: any size, grey or transparent, rotated by a tag, with labels and boxes."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import Tensor

from dlrt.errors import one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DEEP = ("I", "F")  # modes with more than eight bits, which PIL would cut off and not scale
TURNS = {  # by the value of the tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom are outside
Shown = tuple[tuple[int, ...], tuple[Box, ...]]  # a thing in a picture: its classes, and its boxes
Labels = dict[str, list[Shown]]  # by the name of a file


class PictureError(ValueError):
    """A picture, or a file about pictures, cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Picture:
    """An upright picture, grey (mode L) or in colour (RGB), and what it shows, where that is known."""

    name: str
    image: Image.Image
    shows: tuple[Shown, ...] = ()

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(number for classes, _ in self.shows for number in classes))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(box for _, boxes in self.shows for box in boxes)

    def boxes_of(self, number: int) -> tuple[Box, ...]:
        """The boxes of what has that class; where nothing has it, all."""
        own = tuple(box for classes, boxes in self.shows if number in classes for box in boxes)
        return own or self.boxes

    def pixels(self) -> np.ndarray:
        """(height, width, 3) float32 in [0, 1]."""
        return np.asarray(self.image.convert("RGB"), dtype=np.float32) / 255

    def enlarged(self, least: int) -> Picture:
        """With at least so many pixels on its longer side."""
        width, height = self.image.size
        factor = -(-least // max(width, height))
        larger = self.image.resize((factor * width, factor * height), Image.Resampling.BICUBIC)
        return self if factor == 1 else replace(self, image=larger)

    def tensor(self, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """The whole picture as a network sees it, (channels, height, width): resized and normalised."""
        channels, height, width = shape
        image = self.image.convert("L" if channels == 1 else "RGB")
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # it averages where it makes smaller
        x = (
            torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, -1).permute(2, 0, 1)
            / 255
        )
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def read(path: Path) -> Picture:
    """A picture from a file, upright, transparency on white. PictureError where it cannot be read.

    Damaged metadata are passed over, damaged pixels are not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; a picture that is shown is good enough
            with _open(path) as file:
                file.load()
                return Picture(path.name, _plain(_upright(file)))
    except Exception as error:  # of damaged files Pillow raises errors of every kind
        reason = one_line(str(error).replace(str(path), "the file"))
        raise PictureError(f"{path} cannot be read ({reason}): it is left out") from error


def _open(path: Path) -> Image.Image:
    """Open a file whatever the checksums of its metadata; pixels are checked when they are loaded."""
    strict = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        return Image.open(_without_metadata(path.read_bytes()))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict


def _without_metadata(jpeg: bytes) -> BytesIO:
    """A JPEG without the segments of applications; EXIF stays, and Adobe's, which tells of the colours."""
    place, kept = 2, jpeg[:2]
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":  # the pixels
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if not b"\xe2" <= jpeg[place + 1 : place + 2] <= b"\xed":
            kept += jpeg[place:end]
        place = end
    return BytesIO(kept + jpeg[place:])


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its tag says, or as it is where the tags cannot be read."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as above
        turn = None
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith(DEEP):
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(values), values, 0)
        # integers have 8 or 16 bits; beyond, and of floats that exceed 1, the largest is white
        largest = 255 if values.max() <= 255 else max(65535, values.max())
        largest = max(1.0, values.max()) if image.mode == "F" else largest
        return Image.fromarray(np.uint8(np.clip(values / largest, 0, 1) * 255))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def files(path: Path) -> list[Path]:
    """A file, or all pictures of a folder in sorted order. PictureError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PictureError(f"{path} is not there: give a picture or a folder of pictures")
    named = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    found = sorted(file for file in named if not file.name.startswith(".") and not file.is_dir())
    if not found:
        raise PictureError(f"{path} holds no pictures ({' '.join(SUFFIXES)})")
    return found


def read_labels(path: Path, number: Callable[[str], int | None]) -> Labels:
    """Classes and boxes of pictures by file name, from lines "file,class[,class...][,box=x y x y...]".

    A picture of several things has a line for each. number makes a class of a name; for one that there is
    not, it gives None, and the class is left out, or raises a ValueError. A box is left, top, right, bottom
    in pixels of the upright picture. A first line "file,class" is a title. PictureError where a line makes
    no sense.
    """
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise PictureError(f"{path} cannot be read ({error})") from error
    labels: Labels = {}
    for count, cells in enumerate(lines, start=1):
        cells = [cell.strip() for cell in cells]
        if not any(cells) or cells[0].startswith("#") or (count == 1 and cells[:2] == ["file", "class"]):
            continue
        name, *rest = cells
        try:
            boxes = tuple(_box(cell) for cell in rest if cell.startswith("box="))
            numbers = [number(cell) for cell in rest if cell and not cell.startswith("box=")]
        except ValueError as error:
            raise PictureError(f"{path}, line {count}: {error}") from error
        classes = tuple(dict.fromkeys(label for label in numbers if label is not None))
        labels.setdefault(name, []).append((classes, boxes))
    return labels


def _box(cell: str) -> Box:
    values = cell.removeprefix("box=").split()
    if len(values) != 4:
        raise ValueError(f"a box is box=LEFT TOP RIGHT BOTTOM, got {cell}")
    left, top, right, bottom = map(float, values)
    if not (left < right and top < bottom):
        raise ValueError(f"a box needs left < right and top < bottom, got {cell}")
    return left, top, right, bottom


def labelled(picture: Picture, labels: Labels) -> Picture:
    """A picture with what a file of labels says about it. PictureError for a box that is not inside it."""
    picture = replace(picture, shows=tuple(labels.get(picture.name, ())))
    width, height = picture.image.size
    if outside := [box for box in picture.boxes if min(box[:2]) < 0 or box[2] > width or box[3] > height]:
        raise PictureError(
            f"a box must lie in the {width} x {height} pixels of {picture.name}, got "
            f"{' '.join(f'{value:g}' for value in outside[0])}: the picture is left out"
        )
    return picture


def overlay(pixels: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """A map (H, W) in [0, 1] over a picture (height, width, 3) in [0, 1], as 8 bits.

    Where the map is undefined (NaN), the picture alone: no colour would be true.
    """
    if not np.isfinite(shown).all():
        return np.uint8(pixels * 255)
    height, width = pixels.shape[:2]
    large = np.clip(cv2.resize(shown, (width, height), interpolation=cv2.INTER_LINEAR), 0, 1)
    return show_cam_on_image(pixels, large, use_rgb=True, colormap=cv2.COLORMAP_INFERNO)

"""Pendulums as data and as pictures for pca_experiments.ipynb: a cloud, a video, double pendulums.

Every rod is 1 m long; an angle is that to the vertical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dlrt.fields import rk4
from dlrt.lowrank import LowRank
from dlrt.plots import COLOURS, Axes, Figure, mpl, plt

Arc = mpl.patches.Arc

GRAVITY = 9.81  # m/s²
SOFTNESS, ROD, BOB = 0.03, 0.03, 0.15  # m: of edges in the video; half the rod's width; the bob's radius


def swing(
    angle: float, frames: int, duration: float, push: Callable[[float], float] = lambda t: 0.0
) -> Tensor:
    """Angles of a pendulum let go at rest, in equal steps of time; push is the pivot's acceleration in x."""

    def slope(t: float, state: Tensor) -> Tensor:
        angle, velocity = state
        return torch.stack([velocity, -GRAVITY * torch.sin(angle) - push(t) * torch.cos(angle)])

    h = duration / (frames - 1)
    states = [torch.tensor([angle, 0.0])]
    for n in range(frames - 1):
        states.append(rk4(slope, states[-1], n * h, h))
    return torch.stack(states)[:, 0]


def period(angle: float) -> float:
    """Seconds of a full swing there and back, by Gauss's arithmetic-geometric mean."""
    a, b = 1.0, math.cos(angle / 2)
    while abs(a - b) > 1e-15:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return 2 * math.pi / math.sqrt(GRAVITY) / a


def cloud(angles: Tensor, points: int = 100, spread: float = 0.2, seed: int = 0) -> Tensor:
    """Points (frames, points, 2) around the rod, in metres: their angles scatter by spread (rad)."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.rand(points, generator=generator)
    direction = angles[:, None] + spread * torch.randn(points, generator=generator)
    return torch.stack([radius * torch.sin(direction), -radius * torch.cos(direction)], dim=2)


def render(angles: Tensor, size: int = 64) -> Tensor:
    """Frames (number, size, size) of a rod and a bob, 0 to 1, with soft edges."""
    x, y = torch.meshgrid(torch.linspace(-1.2, 1.2, size), torch.linspace(0.6, -1.8, size), indexing="xy")
    tip_x, tip_y = torch.sin(angles)[:, None, None], -torch.cos(angles)[:, None, None]
    along = (x * tip_x + y * tip_y).clamp(0, 1)  # the nearest point of the rod
    to_rod = torch.hypot(x - along * tip_x, y - along * tip_y)
    to_bob = torch.hypot(x - tip_x, y - tip_y)
    return torch.maximum(torch.sigmoid((ROD - to_rod) / SOFTNESS), torch.sigmoid((BOB - to_bob) / SOFTNESS))


def double_pendulum(t: float, state: Tensor) -> Tensor:
    """The slope of states (4, N): the angles a, b of both rods and their velocities; equal masses."""
    a, b, a_dot, b_dot = state
    d = a - b
    common = 3 - torch.cos(2 * d)
    a_pull = -GRAVITY * (3 * torch.sin(a) + torch.sin(a - 2 * b))
    a_push = -2 * torch.sin(d) * (b_dot**2 + a_dot**2 * torch.cos(d))
    b_push = 2 * torch.sin(d) * (2 * a_dot**2 + 2 * GRAVITY * torch.cos(a) + b_dot**2 * torch.cos(d))
    return torch.stack([a_dot, b_dot, (a_pull + a_push) / common, b_push / common])


def crowd(
    pendulums: int,
    frames: int = 300,
    duration: float = 4.0,
    start: float = 2.0,
    spread: float = 0.05,
    substeps: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """x, y (frames, pendulums) of outer bobs let go at rest, their angles scattered by spread about start.

    Frames are duration / frames apart, from 0 on: the last is one before duration.
    """
    generator = torch.Generator().manual_seed(seed)
    angles = start + spread * torch.randn(2, pendulums, generator=generator)
    states = [torch.cat([angles, torch.zeros(2, pendulums)])]
    h = duration / frames / substeps
    for _ in range(frames - 1):
        state = states[-1]
        for _ in range(substeps):
            state = rk4(double_pendulum, state, 0.0, h)
        states.append(state)
    a, b = torch.stack(states)[:, :2].unbind(1)
    return torch.sin(a) + torch.sin(b), -torch.cos(a) - torch.cos(b)


def occupancy(x: Tensor, y: Tensor, size: int = 24, width: float = 0.25) -> Tensor:
    """Features (frames, pendulums, size²): how near a bob is to each node of a grid, by a Gaussian."""
    grid = torch.linspace(-2.1, 2.1, size)
    near_x, near_y = ((-((z[..., None] - grid) ** 2) / (2 * width**2)).exp() for z in (x, y))
    return (near_y[..., :, None] * near_x[..., None, :]).flatten(-2)


def draw_axis(axes: Axes, Y: LowRank, mean: Tensor, reach: float = 0.75, **look: object) -> None:
    """The line through the mean along the one basis vector of Y."""
    ends = mean + torch.outer(torch.tensor([-reach, reach]), Y.V[:, 0])
    axes.plot(ends[:, 0], ends[:, 1], **look)


def draw_points(axes: Axes, points: Tensor, pivot: Sequence[float] = (0.0, 0.0)) -> None:
    """A frame of the cloud (points, 2), in grey, below its pivot."""
    axes.scatter(points[:, 0], points[:, 1], s=6, color="0.6", linewidths=0)
    axes.plot(*pivot, "k^", markersize=5)
    axes.set(aspect="equal", xlabel="x [m]")


def sketch(angle: float = math.pi / 5) -> Figure:
    """The pendulum, its cloud, and what PCA makes of it."""
    points = cloud(torch.tensor([angle]), points=150)[0]
    mean = points.mean(dim=0)
    _, sigma, Vh = torch.linalg.svd(points - mean, full_matrices=False)
    rod = torch.tensor([math.sin(angle), -math.cos(angle)])
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    axes.scatter(points[:, 0], points[:, 1], s=9, color="0.65", linewidths=0)
    axes.plot([0, 0], [0, -1.05], color="0.4", linestyle=(0, (4, 3)), linewidth=1)
    axes.plot([0, rod[0]], [0, rod[1]], color="k", linewidth=2.5, solid_capstyle="round")
    axes.plot(*rod, "o", color="k", markersize=22)
    axes.plot(0, 0, "k^", markersize=12)
    degrees = math.degrees(angle)
    axes.add_patch(Arc((0, 0), 0.8, 0.8, theta1=270, theta2=270 + degrees, color="k", linewidth=1.2))
    text = {"ha": "center", "va": "center", "fontsize": 13}
    axes.text(0.3 * math.sin(angle / 2), -0.3 * math.cos(angle / 2), "θ", **text)
    for direction, length, name, colour in zip(Vh, sigma, ("r₁", "r₂"), COLOURS, strict=False):
        direction = direction * torch.sign(direction @ torch.tensor([1.0, 0.1]))
        tip = mean + 1.7 * length / math.sqrt(len(points)) * direction
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "mutation_scale": 16}
        axes.annotate("", tip, mean, arrowprops=arrow, zorder=4)
        beside = mean + 0.8 * (tip - mean) + 0.09 * torch.stack([-direction[1], direction[0]])
        axes.text(*beside, name, color=colour, **text)
    axes.plot(*mean, "o", color="w", markeredgecolor="k", markersize=7, zorder=5)
    axes.annotate("", (-0.42, -0.55), (-0.42, -0.2), arrowprops={"arrowstyle": "-|>", "color": "0.3"})
    axes.text(-0.49, -0.37, "g", color="0.3", **text)
    axes.text(0.03, 0.1, "pivot", ha="left", va="center", fontsize=11)
    axes.annotate("mean", mean, (0.72, -0.62), fontsize=11, arrowprops={"arrowstyle": "-", "color": "0.5"})
    axes.annotate(
        "rod, 1 m", 0.2 * rod, (0.45, -0.02), fontsize=11, arrowprops={"arrowstyle": "-", "color": "0.5"}
    )
    axes.set(xlim=(-0.6, 1.05), ylim=(-1.15, 0.2), aspect="equal")
    axes.set_axis_off()
    return figure


def animate(
    figure: Figure, draw: Callable[[int], None], frames: Iterable[int], path: Path, duration: int = 80
) -> Path:
    """A gif of draw(n) for n in frames, each shown for that many ms; one palette for all keeps it small."""
    pictures = []
    for n in frames:
        draw(n)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # once laid out, nothing moves
        pictures.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
    plt.close(figure)
    palette = pictures[len(pictures) // 2].quantize(256, Image.Quantize.MAXCOVERAGE)
    first, *rest = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, optimize=True)
    return path


def video_panels(
    frames: Tensor, films: dict[str, Tensor], times: Tensor, **size: object
) -> tuple[Figure, Callable[[int], None]]:
    """Frames (number, height, width) beside films of them, their errors below: the figure and draw(n)."""
    figure, grid = plt.subplots(2, 1 + len(films), **size)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], ("frame", *films), strict=True):
        axes.set_title(title, fontsize=9)
    pictures = [axes.imshow(frames[0], cmap="gray", vmin=0, vmax=1) for axes in grid[0]]
    maps = [axes.imshow(0 * frames[0], cmap="RdBu_r", vmin=-0.5, vmax=0.5) for axes in grid[1, 1:]]
    clock = grid[1, 0].text(0.5, 0.5, "", ha="center", va="center", transform=grid[1, 0].transAxes)
    bar = figure.colorbar(maps[-1], ax=grid[1, 1:], shrink=0.9, ticks=(-0.5, 0, 0.5))
    bar.set_label("approximation − frame", fontsize=8)
    bar.ax.tick_params(labelsize=8)

    def draw(n: int) -> None:
        for image, film in zip(pictures, (frames, *films.values()), strict=True):
            image.set_data(film[n])
        for image, film in zip(maps, films.values(), strict=True):
            image.set_data(film[n] - frames[n])
        clock.set_text(f"{times[n]:.2f} s\n\nerror maps →")

    return figure, draw

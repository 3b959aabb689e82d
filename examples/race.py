"""The demo's pictures: the loss curves, and a race of the optimizers down three surfaces.

The paths of the race are made by onepass itself: a parameter of one or two elements, and one step of the real kernels
for each point. ``python examples/race.py`` draws the race alone, into the folder ``demo``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

import onepass

Array: TypeAlias = npt.NDArray[Any]

# Colours from Paul Tol's "muted" scheme, which colour-blind readers can tell apart, darkened where they were too light
# for a thin line. Within a family the dashes differ too, since its members often run side by side.
STYLES: dict[str, tuple[str, Any, str]] = {
    "SGD": ("#000000", "-", "o"),
    "Momentum": ("#cc3311", "-", "s"),
    "NAG": ("#ee8866", (0, (4, 1.5)), "D"),
    "AdaGrad": ("#117733", "-", "^"),
    "AdaSqrt": ("#999933", (0, (4, 1.5)), "v"),
    "RMSprop": ("#aa4499", "-", "P"),
    "Adam": ("#332288", "-", "X"),
    "AdamW": ("#0099dd", (0, (4, 1.5)), "*"),
    "AMSGrad": ("#33aa99", (0, (1, 1)), "<"),
    "Nadam": ("#882255", (0, (5, 1, 1, 1)), ">"),
}

FRAMES = 60
FRAME_MS = 70
LAST_FRAME_MS = 1600
DENSE = 16  # points drawn for each step along a curve
LIFT = 0.4  # between the lanes of two optimizers on a curve, whose paths would hide each other
INCHES = (9.0, 4.3)


@dataclass(frozen=True)
class Surface:
    """A function to descend, and how each optimizer is set up for it."""

    title: str
    value: Callable[..., Array]
    gradient: Callable[[Array], Array]
    start: tuple[float, ...]
    limits: tuple[tuple[float, float], ...]
    steps: int
    settings: Mapping[str, Mapping[str, float]]
    marks: tuple[tuple[float, float, str, int], ...] = ()  # x, y, label, height of the label above it in points


def quartic(x: Array) -> Array:
    """Return the curve of the lecture."""
    return np.asarray(x**4 + x**3 - 2 * x**2 - 2 * x + 2)


def quartic_gradient(x: Array) -> Array:
    """Return the gradient as the lecture prints it.

    The true derivative of :func:`quartic` has a -2 more. The lecture's tables follow the printed one, and so does the
    race: its rest points, -1.443 and 0.693, are not the valleys of the curve.
    """
    return np.asarray(4 * x**3 + 3 * x**2 - 4 * x)


def beale(x: Array, y: Array) -> Array:
    """Return Beale's function, whose minimum 0 is at (3, 0.5)."""
    return np.asarray(sum((c - x + x * y**k) ** 2 for k, c in enumerate((1.5, 2.25, 2.625), start=1)))


def beale_gradient(point: Array) -> Array:
    """Return the gradient of :func:`beale`."""
    x, y = point
    dx = dy = 0.0
    for k, c in enumerate((1.5, 2.25, 2.625), start=1):
        residual = c - x + x * y**k
        dx += 2 * residual * (y**k - 1)
        dy += 2 * residual * k * x * y ** (k - 1)
    return np.array([dx, dy], point.dtype)


def saddle(x: Array, y: Array) -> Array:
    """Return a saddle, from whose middle the way down is along y."""
    return np.asarray(x**2 - y**2)


def saddle_gradient(point: Array) -> Array:
    """Return the gradient of :func:`saddle`."""
    return np.array([2 * point[0], -2 * point[1]], point.dtype)


SURFACES = (
    Surface(
        "Quartic",
        quartic,
        quartic_gradient,
        start=(-2.0,),
        limits=((-2.25, 1.6),),
        steps=40,
        # SGD, Momentum and NAG as in the lecture's tables.
        settings={
            "SGD": {"lr": 0.1},
            "Momentum": {"lr": 0.1, "momentum": 0.8},
            "NAG": {"lr": 0.1, "momentum": 0.9},
            "AdaGrad": {"lr": 0.4},
            "AdaSqrt": {"lr": 1.0},
            "RMSprop": {"lr": 0.05},
            "Adam": {"lr": 0.7},
            "AdamW": {"lr": 0.7, "weight_decay": 0.2},
            "AMSGrad": {"lr": 0.25},
            "Nadam": {"lr": 0.2},
        },
    ),
    Surface(
        "Beale",
        beale,
        beale_gradient,
        marks=((3.0, 0.5, "minimum", 13),),
        start=(1.0, 1.6),
        limits=((0.0, 4.0), (-1.0, 2.0)),
        steps=300,
        settings={
            "SGD": {"lr": 0.01},
            "Momentum": {"lr": 0.0005},
            "NAG": {"lr": 0.001},
            "AdaGrad": {"lr": 0.3},
            "AdaSqrt": {"lr": 1.0},
            "RMSprop": {"lr": 0.02},
            "Adam": {"lr": 0.06},
            "AdamW": {"lr": 0.06, "weight_decay": 0.02},
            "AMSGrad": {"lr": 0.02},
            "Nadam": {"lr": 0.06},
        },
    ),
    Surface(
        "Saddle",
        saddle,
        saddle_gradient,
        marks=((0.0, 0.0, "saddle point", -12),),
        start=(-0.9, 0.01),
        limits=((-1.0, 1.0), (-0.3, 1.0)),
        steps=50,
        settings={
            "SGD": {"lr": 0.05},
            "Momentum": {"lr": 0.01},
            "NAG": {"lr": 0.01},
            "AdaGrad": {"lr": 0.05},
            "AdaSqrt": {"lr": 0.01},
            "RMSprop": {"lr": 0.012},
            "Adam": {"lr": 0.02},
            "AdamW": {"lr": 0.02, "weight_decay": 1.0},
            "AMSGrad": {"lr": 0.002},
            "Nadam": {"lr": 0.02},
        },
    ),
)


def path(name: str, surface: Surface) -> Array:
    """Return the points that an optimizer of onepass visits, of shape (steps + 1, dimensions).

    Who leaves the picture stays on its border from there on.
    """
    point = np.array(surface.start)
    optimizer = getattr(onepass, name)(point, **surface.settings[name])
    low, high = np.array(surface.limits).T
    points = [point.copy()]
    for _ in range(surface.steps):
        optimizer.step(surface.gradient(point))
        # NAG stores the look-ahead point, where it wants the gradient; what the lecture draws are the weights.
        new = optimizer.weights() if isinstance(optimizer, onepass.NAG) else point.copy()
        old = points[-1]
        if not (np.all(new >= low) and np.all(new <= high)):
            border = np.clip(new, low, high)
            moved = new - old
            share = np.divide(border - old, moved, out=np.ones_like(moved), where=moved != 0).min()
            points.extend([old + share * moved] * (surface.steps + 1 - len(points)))
            break
        points.append(new)
    return np.array(points)


class _Panel:
    """One surface with the moving parts of its paths: a line behind each optimizer, a marker at its head."""

    def __init__(self, axes: Axes, surface: Surface, names: Sequence[str]) -> None:
        self.axes = axes
        self.surface = surface
        self.coordinates: dict[str, Array] = {}
        self.lines: dict[str, tuple[Line2D, Line2D]] = {}
        axes.set_title(f"{surface.title} ({surface.steps} steps)", fontsize=10.5, pad=8)
        axes.set_xlabel("x", labelpad=0)
        axes.set_xlim(*surface.limits[0])
        (self._draw_contours if len(surface.start) == 2 else self._draw_curve)(len(names))
        for lane, name in enumerate(names):
            points = path(name, surface)
            if len(surface.start) == 1:  # along the curve, not across it
                steps = np.arange(len(points))
                x = np.interp(np.arange(len(points) * DENSE - DENSE + 1) / DENSE, steps, points[:, 0])
                points = np.stack([x, surface.value(x) + LIFT * (lane + 1)], axis=1)
            self.coordinates[name] = points
            colour, dashes, marker = STYLES[name]
            (tail,) = axes.plot([], [], color=colour, linestyle=dashes, linewidth=1.5, alpha=0.9)
            (head,) = axes.plot(
                [], [], color=colour, marker=marker, markersize=7, markeredgecolor="white", clip_on=False, zorder=5
            )
            self.lines[name] = tail, head

    def _draw_curve(self, lanes: int) -> None:
        x = np.linspace(*self.surface.limits[0], 300)
        self.axes.plot(x, self.surface.value(x), color="0.25", linewidth=2)
        for lane in range(lanes):
            self.axes.plot(x, self.surface.value(x) + LIFT * (lane + 1), color="0.88", linewidth=0.8, zorder=0)
        self.axes.set_ylabel("f(x), lifted by one lane each", labelpad=2)
        self.axes.set_ylim(-0.8, 6.6 + LIFT * lanes)
        for rest in (-1.443, 0.693):
            self.axes.axvline(rest, color="0.5", linestyle=":", linewidth=1.2, zorder=0)
        note = "dotted: where the\nprinted gradient is 0"
        self.axes.text(-0.37, 9.9, note, ha="center", va="top", color="0.3", fontsize=8)

    def _draw_contours(self, lanes: int) -> None:
        x, y = np.meshgrid(*(np.linspace(*limits, 240) for limits in self.surface.limits))
        z = self.surface.value(x, y)
        if z.min() >= 0:  # a minimum of 0: the interesting heights lie orders of magnitude apart
            z = np.log10(z + 1e-2)
        levels = np.linspace(z.min(), z.max(), 15)
        self.axes.contourf(x, y, z, levels=levels, cmap="bone", alpha=0.35)
        self.axes.contour(x, y, z, levels=levels, colors="0.6", linewidths=0.6, linestyles="-")
        self.axes.set_ylabel("y", labelpad=0)
        self.axes.set_ylim(*self.surface.limits[1])
        for x_mark, y_mark, label, above in self.surface.marks:
            self.axes.plot(x_mark, y_mark, marker="+", color="black", markersize=9, markeredgewidth=1.5)
            self.axes.annotate(
                label,
                (x_mark, y_mark),
                xytext=(0, above),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8,
            )

    def draw(self, fraction: float) -> None:
        """Draw the paths up to a fraction of the steps."""
        for name, (tail, head) in self.lines.items():
            points = self.coordinates[name]
            x, y = points[: 1 + round(fraction * (len(points) - 1))].T
            tail.set_data(x, y)
            head.set_data(x[-1:], y[-1:])
        for parts in zip(*self.lines.values(), strict=True):  # all tails, then all heads
            for part in parts:
                self.axes.draw_artist(part)


def draw_race(names: Sequence[str], out: Path, advance: Callable[[], object] = lambda: None) -> list[Path]:
    """Write ``race.gif``, and its last frame as ``race.png``.

    Parameters
    ----------
    names : sequence of str
        The optimizers that take part.
    out : Path
        The folder.
    advance : callable, optional
        Called after each of the ``FRAMES`` frames.

    Returns
    -------
    list of Path
        The files.
    """
    frames = _frames(names, dpi=100, fractions=np.linspace(0, 1, FRAMES), advance=advance)
    # One palette for all frames, so that a frame stores only the rectangle that changed.
    palette = frames[-1].quantize(256, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    files = [out / "race.gif", out / "race.png"]
    frames[0].save(files[0], save_all=True, append_images=frames[1:], duration=durations, loop=0)
    (still,) = _frames(names, dpi=200, fractions=np.ones(1))
    still.quantize(256, dither=Image.Dither.NONE).save(files[1], optimize=True)
    return files


def _frames(
    names: Sequence[str], dpi: int, fractions: Array, advance: Callable[[], object] = lambda: None
) -> list[Image.Image]:
    with mpl.rc_context({"font.size": 9, "path.simplify": False}):
        figure = Figure(figsize=INCHES, dpi=dpi)
        canvas: Any = FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3)
        panels = [_Panel(ax, surface, names) for ax, surface in zip(axes, SURFACES, strict=True)]
        figure.legend(handles=_legend(names), loc="lower center", ncols=min(5, len(names)), frameon=False, fontsize=9.5)
        figure.subplots_adjust(left=0.055, right=0.985, top=0.915, bottom=0.235, wspace=0.22)
        canvas.draw()
        # Only the paths change: everything else is drawn once (60 frames in 2 s instead of 20 s).
        background = canvas.copy_from_bbox(figure.bbox)
        frames = []
        for fraction in fractions:
            canvas.restore_region(background)
            for panel in panels:
                panel.draw(float(fraction))
            frames.append(Image.fromarray(np.array(canvas.buffer_rgba())[..., :3]))
            advance()
        return frames


def _legend(names: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, linestyle=dashes, marker=marker, markersize=7, markeredgecolor="white", label=name)
        for name, (colour, dashes, marker) in STYLES.items()
        if name in names
    ]


def draw_losses(losses: Mapping[str, Sequence[float]], title: str, out: Path) -> Path:
    """Write ``losses.png``: the training loss before the first epoch and after each.

    Parameters
    ----------
    losses : mapping of str to sequence of float
        For each optimizer.
    title : str
        What was trained on what.
    out : Path
        The folder.

    Returns
    -------
    Path
        The file.
    """
    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(9.0, 4.6), dpi=200)
        canvas: Any = FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, values in losses.items():
            colour, dashes, marker = STYLES[name]
            axes.plot(
                values,
                color=colour,
                linestyle=dashes,
                marker=marker,
                markevery=max(1, len(values) // 6),
                markersize=6,
                markeredgecolor="white",
                linewidth=1.6,
                label=name,
            )
        axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss (mean cross-entropy, nats)")
        axes.grid(color="0.9")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        figure.legend(handles=_legend(list(losses)), loc="center right", frameon=False)
        figure.subplots_adjust(left=0.085, right=0.825, top=0.925, bottom=0.11)
        file = out / "losses.png"
        buffer = io.BytesIO()
        canvas.print_png(buffer)
        Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    return file


if __name__ == "__main__":
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    for file in draw_race(list(STYLES), folder):
        print(file)

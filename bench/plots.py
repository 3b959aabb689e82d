"""The pictures of docs/performance.md, drawn from the records of bench/results; bench/report.py writes them.

Each contender has one colour and one marker in all pictures. Most colours are of the palette of Okabe and Ito, which
the colour-blind can tell apart. What a wide interval makes doubtful is hollow. A file has no date and no version in it,
but the digest of the records that it was drawn from, so that `bench/report.py --check` can tell whether it is up to
date.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

import records
from method import ROTATED, WARM
from records import CONTENDERS, OURS, Results, Row, extra, part, rank, wide

STYLE = {
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11,
    "grid.color": "#e4e4e4",
    "legend.fontsize": 10,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
OUR_WIDTH = 4.0  # points
WIDTH = 8.0  # inches: 1280 pixels, shown at about 800

# One for each of CONTENDERS: a colour, and a marker for those who cannot rely on colours.
LOOKS = {
    OURS: ("#D55E00", "o"),
    "torch fused": ("#0072B2", "s"),
    "torch fused, flush_denormal": ("#332288", "p"),
    "torch compiled": ("#009E73", "D"),
    "torch foreach": ("#56B4E9", "^"),
    "torch for-loop": ("#7F7F7F", "v"),
    "torch": ("#0072B2", "s"),
    "DeepSpeed": ("#CC79A7", "P"),
    "Optax": ("#8C6D1F", "X"),
    "NumPy in place": ("#9A9A9A", "<"),
    "NumPy": ("#000000", ">"),
}
UNKNOWN = (("#4B3F72", "h"), ("#A50F15", "*"), ("#1B7837", "d"))
# Of levels of memory, with the size of a marker: where points coincide all are seen.
LEVELS = (
    ("#440154", "o", 11.0),
    ("#31688E", "s", 8.5),
    ("#35A16B", "^", 7.0),
    ("#A68A00", "D", 5.5),
    ("#7F7F7F", "v", 5.0),
)


def look(name: str, index: int = 0) -> tuple[str, str]:
    """Return a contender's colour and marker; `index` tells unknown ones apart."""
    return LOOKS.get(records.contender(name), UNKNOWN[index % len(UNKNOWN)])


# --- What all pictures share ------------------------------------------------------------------------------------------


def new_figure(height: float, title: str, subtitle: str) -> Any:
    """Make an empty picture with its headline."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    # An empty line keeps the place of the second one.
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13, fontweight="bold", linespacing=1.4)
    figure.text(0.012, 1.0 - 0.38 / height, subtitle, ha="left", va="center", fontsize=10, color="#555555")
    return figure


def machine(results: Results, name: str, rows: Sequence[Row] = ()) -> str:
    """Say where a file was measured, with the threads of these rows."""
    environment = results.environment(name)
    threads = sorted({row["threads"] for row in rows}) or [environment.get("threads", "?")]
    plural = "" if threads == [1] else "s"
    return (
        f"{environment.get('cpu', 'unknown processor')}, {environment.get('isa', '?')}, "
        f"{', '.join(map(str, threads))} thread{plural}"
    )


HOLLOW = "; hollow: interval wider than 15 %"


def marked(estimates: Iterable[Mapping[str, float] | None]) -> str:
    """Say what hollow means where something is."""
    return HOLLOW if any(map(wide, estimates)) else ""


def values(rows: Iterable[Row]) -> list[Mapping[str, float] | None]:
    """Return the figures of rows."""
    return [row["value"] for row in rows]


def seconds_label(value: float, _: int = 0) -> str:
    """Write a tick of an axis of seconds."""
    factor, unit = (
        (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs") if value >= 1e-6 else (1e9, "ns")
    )
    return f"{value * factor:g} {unit}"


def plain_label(value: float, _: int = 0) -> str:
    """Write a tick as a plain number."""
    return f"{value:g}"


def logarithmic(axis: Any, low: float, high: float, label: Callable[[float, int], str]) -> None:
    """Let an axis have a tick at each power of ten, and at 2 and 5 times these where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) <= 2 else (1, 3) if math.log10(high / low) <= 3 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]))
    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plot(
    axes: Any, name: str, points: Mapping[float, tuple[float, bool]], index: int = 0, places: Iterable[float] = ()
) -> None:
    """Draw a contender's line: for each x its y, and whether that is noisy. Ours is wide and lies under the others.

    The line has a gap at those of `places` between its points where it has none.
    """
    colour, marker = look(name, index)
    ours = name == OURS
    xs = sorted(points)
    gaps = [x for x in places if xs and xs[0] < x < xs[-1] and x not in points]
    line = sorted([*xs, *gaps])
    ys = [points[x][0] if x in points else math.nan for x in line]
    above = 3 if ours else 5
    axes.plot(line, ys, color=colour, linewidth=OUR_WIDTH if ours else 1.5, zorder=above, label=name)
    for noisy in (False, True):
        chosen = [x for x in xs if points[x][1] is noisy]
        axes.plot(
            chosen,
            [points[x][0] for x in chosen],
            linestyle="none",
            marker=marker,
            markersize=9 if ours else 5.5,
            color=colour,
            markerfacecolor="white" if noisy else colour,
            markeredgewidth=1.3,
            zorder=above + 1,
            label="_",
        )


def legend(figure: Any, axes: Any, names: Sequence[str], others: Sequence[Any] = ()) -> None:
    """Show under the axes which line and marker is whose, ours first, and then what `others` are."""
    handles = []
    for index, name in enumerate(names):
        colour, marker = look(name, index)
        (handle,) = axes.plot(
            [],
            [],
            color=colour,
            marker=marker,
            linewidth=OUR_WIDTH if name == OURS else 1.5,
            markersize=6,
            label=records.shown(name),
        )
        handles.append(handle)
    figure.legend(handles=[*handles, *others], loc="outside lower center", ncols=4)


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Return the peers that were measured, in the order of the legend."""
    return sorted({row["peer"] for row in rows if row["value"] is not None and row["peer"] != OURS}, key=rank)


# --- Lines: time against size, or against the number of tensors -------------------------------------------------------


def best_threads(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the largest number of threads."""
    most = max((row["threads"] for row in rows), default=0)
    return [row for row in rows if row["threads"] == most]


def sweep_rows(results: Results, kind: str, rule: str = "Adam") -> list[Row]:
    """Return the measured rows of a sweep, of one rule and the largest number of threads."""
    rows = [row for row in results.rows("sweeps", kind) if row["value"] is not None and part(row, 1) == rule]
    return best_threads(rows)


def elements_of(row: Row) -> float:
    """Return how many elements a row's arrays have."""
    return float(row["elements"])


def tensors_of(row: Row) -> float:
    """Return how many tensors a row has."""
    return float(row["tensors"])


WARM_TOO = (OURS, "torch fused", "DeepSpeed")  # whose second, thin line shows what warm arrays take
DASHES = (0, (2.5, 1.5))


def thin(axes: Any, name: str, points: Mapping[float, float]) -> None:
    """Draw a second line of a contender: dashed, without markers."""
    xs = sorted(points)
    width = 1.6 if name == OURS else 1.1
    axes.plot(xs, [points[x] for x in xs], color=look(name)[0], linewidth=width, linestyle=DASHES, zorder=4, label="_")


def times_and_ratios(
    rows: Sequence[Row], x_of: Callable[[Row], float], height: float, title: str, subtitle: str
) -> tuple[Any, Any, Any]:
    """Draw the time of everybody above, and how many times longer than ours below.

    Lines are of rotated arrays wherever such were measured; dashed ones show warm arrays, if both were.
    """
    main = records.cold_first(rows, x_of)
    warm = [row for row in rows if records.buffers(row) == WARM] if len(main) < len(rows) else []
    names = [OURS, *peers_of(main)]
    ours, share = {}, {}
    for x, group in records.grouped(main, x_of).items():
        seconds = records.our_seconds(group)
        if seconds is not None:
            ours[x] = (seconds, all(wide(row.get("ours_estimate")) for row in group))
            share[x] = (1.0, False)
    hollow = any(noisy for _, noisy in ours.values()) or any(map(wide, values(main)))
    figure = new_figure(height, title, subtitle + (HOLLOW if hollow else ""))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.9, 1.0))
    times: list[float] = [seconds for seconds, _ in ours.values()]
    ratios = [1.0]
    plot(upper, OURS, ours)
    lower.plot(sorted(share), [1.0] * len(share), color=look(OURS)[0], linewidth=OUR_WIDTH, zorder=3, label="_")
    for index, name in enumerate(names[1:], 1):
        own = [row for row in main if row["peer"] == name]
        plot(upper, name, {x_of(row): (row["peer_seconds"], wide(row["value"])) for row in own}, index, ours)
        plot(lower, name, {x_of(row): (row["value"]["value"], wide(row["value"])) for row in own}, index, ours)
        times += [row["peer_seconds"] for row in own]
        ratios += [row["value"]["value"] for row in own]
    groups = records.grouped(warm, x_of)
    if warm:
        own_times = {x: seconds for x, group in groups.items() if (seconds := records.our_seconds(group)) is not None}
        thin(upper, OURS, own_times)
        times += own_times.values()
    for name in WARM_TOO[1:]:
        own = [row for row in warm if row["peer"] == name]
        thin(upper, name, {x_of(row): row["peer_seconds"] for row in own})
        thin(lower, name, {x_of(row): row["value"]["value"] for row in own})
        times += [row["peer_seconds"] for row in own]
        ratios += [row["value"]["value"] for row in own]
    for axes in (upper, lower):
        axes.set_xscale("log", base=2 if max(map(x_of, rows)) > 1e6 else 10)
        axes.set_yscale("log")
    low, high = min(times) / 1.6, max(times) * 1.6
    upper.set_ylim(low, high)
    logarithmic(upper.yaxis, low, high, seconds_label)
    low, high = min(ratios) / 1.3, max(ratios) * 1.5
    lower.set_ylim(low, high)
    logarithmic(lower.yaxis, low, high, lambda value, _: f"{value:g}x")
    upper.set_ylabel("time of a step")
    lower.set_ylabel("time relative\nto onepass")
    border(upper, lower, main, x_of)
    dashed = Line2D([], [], color="#444444", linewidth=1.4, linestyle=DASHES, label="the same, warm arrays")
    legend(figure, upper, names, [dashed] if warm else [])
    figure.align_ylabels()
    return figure, upper, lower


def border(upper: Any, lower: Any, rows: Sequence[Row], x_of: Callable[[Row], float]) -> None:
    """Show from where on the arrays are rotated."""
    cold = [x_of(row) for row in rows if records.buffers(row) == ROTATED]
    before = [x_of(row) for row in rows if records.buffers(row) == WARM and cold and x_of(row) < min(cold)]
    if not before:
        return
    place = math.sqrt(max(before) * min(cold))
    for axes in (upper, lower):
        axes.axvline(place, color="#777777", linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
    for text, side, offset in ((WARM, "right", -5), (f"arrays {ROTATED}", "left", 5)):
        upper.annotate(
            text,
            (place, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(offset, 0),
            textcoords="offset points",
            ha=side,
            va="top",
            fontsize=9,
            color="#555555",
        )


def draw_size(results: Results) -> Any:
    """Step time against the number of elements."""
    rows = sweep_rows(results, "size")
    figure, _, lower = times_and_ratios(
        rows,
        elements_of,
        6.6,
        "One step of Adam on one float32 array",
        machine(results, "sweeps", rows),
    )
    sizes = sorted({row["elements"] for row in rows})
    lower.set_xticks(
        sizes[:: max(1, len(sizes) // 9)], [records.count(size) for size in sizes[:: max(1, len(sizes) // 9)]]
    )
    lower.xaxis.set_minor_locator(NullLocator())
    lower.set_xlabel("number of elements (K = 1024, M = 1024²)")
    return figure


def draw_tensors(results: Results) -> Any:
    """Step time against the number of tensors."""
    rows = sweep_rows(results, "tensors")
    each = {row["elements"] // row["tensors"] for row in rows}
    figure, _, lower = times_and_ratios(
        rows,
        tensors_of,
        6.0,
        "One step of Adam on many small float32 arrays",
        machine(results, "sweeps", rows),
    )
    counts = sorted({row["tensors"] for row in rows})
    lower.set_xticks(counts, [f"{number:,}" for number in counts])
    lower.xaxis.set_minor_locator(NullLocator())
    lower.set_xlabel("number of tensors" + (f", each of {each.pop()} elements" if len(each) == 1 else ""))
    return figure


# --- Subnormal numbers ------------------------------------------------------------------------------------------------


def draw_subnormal(results: Results) -> Any:
    """Step time, relative to that without subnormal moments, against their fraction."""
    rows = sweep_rows(results, "subnormal")
    figure = new_figure(
        4.4,
        "Steps with subnormal moments: Adam",
        machine(results, "sweeps", rows)
        + marked(records.slowdown(row, whose) for row in rows for whose in ("ours", "peer")),
    )
    axes = figure.subplots()
    ours = {
        100.0 * fraction: (slow["value"], wide(slow))
        for fraction, group in records.grouped(rows, lambda row: extra(row, "fraction")).items()
        if (slow := records.our_slowdown(group)) is not None
    }
    names = [OURS, *peers_of(rows)]
    plot(axes, OURS, ours)
    highest = max(value for value, _ in ours.values())
    for index, name in enumerate(names[1:], 1):
        points = {}
        for row in rows:
            fraction, slow = extra(row, "fraction"), records.slowdown(row, "peer")
            if row["peer"] == name and fraction is not None and slow is not None:
                points[100.0 * fraction] = (slow["value"], wide(slow))
                highest = max(highest, slow["value"])
        plot(axes, name, points, index)
    axes.set_ylim(0.0, max(1.5, 1.12 * highest))
    axes.set_xlim(-3.0, 103.0)
    axes.set_xlabel("elements whose moments are subnormal (%)")
    axes.set_ylabel("time of a step\nrelative to none subnormal")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=highest > 4.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    legend(figure, axes, names)
    return figure


# --- Bars -------------------------------------------------------------------------------------------------------------


def bar(axes: Any, y: float, height: float, row: Row, colour: str, label: str, start: float = 0.0) -> float:
    """Draw a ratio with its interval, from `start` on, and return how far it reaches."""
    value = row["value"]
    noisy = wide(value)
    axes.barh(
        y,
        value["value"] - start,
        height,
        left=start,
        color="white" if noisy else colour,
        edgecolor=colour,
        linewidth=1.2,
        label=label,
    )
    axes.errorbar(
        value["value"],
        y,
        xerr=[[value["value"] - value["low"]], [value["high"] - value["value"]]],
        color="#222222",
        linewidth=1.0,
        capsize=2.5,
        label="_",
    )
    axes.annotate(
        f"{value['value']:.{2 if value['value'] < 10 else 1}f}x",
        (value["high"], y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    return float(value["high"])


BATCHNORM = (
    ("forward/NCHW", None, "forward, NCHW"),
    ("forward/NHWC", None, "forward, NHWC"),
    ("backward/NCHW", "backward-recycled/NCHW", "backward, NCHW"),
    ("backward/NHWC", "backward-recycled/NHWC", "backward, NHWC"),
)
AS_CALLED, FASTEST = "torch into given arrays (out=)", "torch's faster form, its memory recycled"
PALE, GOAL = "#F0B98D", "#0072B2"


def shapes_of(rows: Sequence[Row], group: str) -> dict[str, Row]:
    """Return the measured rows of a pass and layout by shape."""
    found = {}
    for row in rows:
        before, _, shape = row["case"].rpartition("/")
        if before == group and "x" in shape and row["value"] is not None:
            found[shape] = row
    return found


def draw_batchnorm(results: Results) -> Any:
    """Ratios to torch, for each pass, layout and shape."""
    rows = results.rows("batchnorm")
    panels = [(shapes_of(rows, group), shapes_of(rows, other or "-"), name) for group, other, name in BATCHNORM]
    drawn = [row for panel in panels for own in panel[:2] for row in own.values()]
    shapes = list(dict.fromkeys(shape for panel in panels for shape in panel[0]))
    figure = new_figure(
        6.0,
        "Batch normalization: time of torch over time of onepass",
        machine(results, "batchnorm", drawn) + ", float32; whiskers: 95 %" + marked(values(drawn)),
    )
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    colour, farthest = look(OURS)[0], 1.0
    for axes, (given, recycled, name) in zip(grid.flat, panels, strict=True):
        height = 0.36 if recycled else 0.62
        for index, shape in enumerate(shapes):
            for own, offset, tint, label in (
                (given, -0.2 if recycled else 0.0, colour, AS_CALLED),
                (recycled, 0.2, PALE, FASTEST),
            ):
                if shape in own:
                    reach = bar(axes, index + offset, height, own[shape], tint, label)
                    farthest = max(farthest, reach)
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold", pad=7)
        goals = sorted({row["goal"]["bound"] for row in given.values() if row["goal"] is not None})
        for bound in goals:
            axes.axvline(bound, color=GOAL, linestyle=(0, (4, 2)), linewidth=1.5, zorder=2.5)
        if goals:
            text = f"goal {', '.join(f'{bound:g}x' for bound in goals)}"
            axes.set_title(text, loc="right", fontsize=10, color=GOAL, pad=7)
        axes.axvline(1.0, color="#444444", linewidth=1.0, zorder=0.6)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(shapes)), shapes)
    grid[0, 0].set_ylim(len(shapes) - 0.45, -0.55)
    grid[0, 0].set_xlim(0.0, 1.13 * farthest)
    for axes in grid[:, 0]:
        axes.set_ylabel("N x C x H x W")
    for axes in grid[1, :]:
        axes.set_xlabel("time of torch relative to onepass")
    if any(recycled for _, recycled, _ in panels):
        handles = [Patch(color=tint, label=label) for tint, label in ((colour, AS_CALLED), (PALE, FASTEST))]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def draw_models(results: Results) -> Any:
    """Time of each peer relative to ours, for the parameters of real models."""
    rows = best_threads([row for row in results.rows("sweeps", "model") if row["value"] is not None])
    models = records.grouped(rows, records.model)
    names = peers_of(rows)
    figure = new_figure(
        1.7 + 0.27 * (len(names) + 1.3) * len(models),
        "A step of AdamW over the parameters of real models",
        machine(results, "sweeps", rows) + ", float32; whiskers: 95 %" + marked(values(rows)),
    )
    axes = figure.subplots()
    step = 1.0 / (len(names) + 1.3)
    farthest, least, ticks, labels = 1.0, 1.0, [], []
    for index, (model, group) in enumerate(models.items()):
        for place, name in enumerate(names):
            for row in group:
                if row["peer"] == name:
                    y = index + (place - (len(names) - 1) / 2) * step
                    farthest = max(farthest, bar(axes, y, 0.86 * step, row, look(name, place)[0], name, 1.0))
                    least = min(least, row["value"]["low"])
        seconds = records.our_seconds(group)
        ticks.append(index)
        labels.append(
            f"{model}\n{group[0]['tensors']} tensors, {group[0]['elements'] / 1e6:.3g} million\n"
            f"onepass: {seconds_label(float(f'{seconds:.2g}'))}"
        )
    axes.axvline(1.0, color=look(OURS)[0], linewidth=OUR_WIDTH, zorder=3)
    axes.set_xscale("log")
    low, high = min(0.7, 0.9 * least), 1.6 * farthest
    axes.set_xlim(low, high)
    logarithmic(axes.xaxis, low, high, lambda value, _: f"{value:g}x")
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_yticks(ticks, labels)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time of a step relative to onepass")
    axes.set_ylabel("model")
    looks = {name: look(name, index)[0] for index, name in enumerate([OURS, *names], -1)}
    handles = [Patch(color=colour, label=records.shown(name)) for name, colour in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


# --- Roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A rule at a level of the memory: flops for each byte, and what it does in a second."""

    rule: str
    level: str
    intensity: float
    flops_per_second: float


def is_yardstick(row: Row) -> bool:
    """Whether a rule is none that computes anything."""
    return records.YARDSTICK.match(part(row, 1)) is not None


def roofline_threads(results: Results) -> int:
    """Return for how many threads the roofline is drawn: those with the most measured rules, or the most threads."""
    groups = records.grouped(results.rows("roofline", "rule"), lambda row: row["threads"])
    return max(groups, key=lambda threads: (len(groups[threads]), threads), default=0)


def levels(results: Results, threads: int) -> dict[str, float]:
    """Return the bytes per second of each level, from the smallest to main memory."""
    rows = [row for row in results.rows("roofline", "bandwidth") if row["threads"] == threads]
    rows.sort(key=lambda row: row["bytes"] or 0)
    return {part(row, 1): speed for row in rows if (speed := extra(row, "bytes_per_second")) is not None}


def flops(results: Results, rule: str) -> int | None:
    """Return the arithmetic of a parameter's update, as it was counted."""
    counted = results.contents.get("counts", {}).get(rule)
    if counted is None:
        return None
    return sum(int(counted.get(name, 0)) for name in ("adds", "multiplies", "divides", "roots"))


MULTIPLY_ADD, DIVIDE_ROOT = "float32", "divide"


def peak_rates(results: Results, threads: int) -> dict[str, float]:
    """Return what arithmetic alone reaches on the instruction set that the rules ran on, by its kind."""
    isa = results.environment("roofline").get("isa")
    return {
        part(row, 1): speed
        for row in results.rows("roofline", "peak")
        if row["threads"] == threads and part(row, 2) == isa and (speed := extra(row, "flops_per_second")) is not None
    }


def divide_limits(results: Results, peak: float | None) -> dict[str, float]:
    """Return the arithmetic of each rule in a second if its divisions and roots were all that takes time."""
    limits = {}
    for rule, counted in results.contents.get("counts", {}).items():
        slow, each = counted.get("divides", 0) + counted.get("roots", 0), flops(results, rule)
        if peak is not None and slow and each:
            limits[rule] = peak * each / slow
    return limits


def roofline_points(results: Results, threads: int) -> list[Point]:
    """Return what the roofline shows of the rules."""
    points = []
    for row in results.rows("roofline", "rule"):
        speed, each = extra(row, "parameters_per_second"), flops(results, part(row, 1))
        if row["threads"] == threads and not is_yardstick(row) and speed is not None and each and row["bytes"]:
            intensity = each * row["elements"] / row["bytes"]
            points.append(Point(part(row, 1), part(row, 2), intensity, each * speed))
    return points


NAMES = 0.31  # of the height of the axes: for the names of rules


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Move numbers in ascending order apart until neighbours have their distance, all of them as little as it takes."""
    clusters: list[list[float]] = []  # sum of wished starts, number
    for index, place in enumerate(places):
        clusters.append([place - index * distance, 1.0])
        while len(clusters) > 1 and clusters[-2][0] / clusters[-2][1] > clusters[-1][0] / clusters[-1][1]:
            total, number = clusters.pop()
            clusters[-1][0] += total
            clusters[-1][1] += number
    starts = [total / number for total, number in clusters for _ in range(int(number))]
    return [start + index * distance for index, start in enumerate(starts)]


def draw_roofline(results: Results) -> Any:
    """Arithmetic against its density, under the roofs of memory and arithmetic."""
    threads = roofline_threads(results)
    points, bandwidth = roofline_points(results, threads), levels(results, threads)
    peaks = peak_rates(results, threads)
    rows = [row for row in results.rows("roofline") if row["threads"] == threads]
    figure = new_figure(
        6.4, "Roofline: each rule in float32 at each level of memory", machine(results, "roofline", rows)
    )
    axes = figure.subplots()
    places = sorted({point.intensity for point in points})
    low, high = min(places) / 1.9, max(places) * 2.6
    ceiling = peaks.get(MULTIPLY_ADD, math.inf) / 1e9
    limits = divide_limits(results, peaks.get(DIVIDE_ROOT))
    drawn = [(point.intensity, limits[point.rule] / 1e9) for point in points if point.rule in limits]
    top = max(point.flops_per_second for point in points) / 1e9
    top = max(top, *(limit for _, limit in drawn), *([ceiling] if math.isfinite(ceiling) else [])) if drawn else top
    bottom = min(point.flops_per_second for point in points) / 1e9
    looks = {level: LEVELS[index % len(LEVELS)] for index, level in enumerate(bandwidth)}
    floor = bottom / 2.2
    # Where two roofs are close their names are not.
    ascending = sorted(bandwidth, key=lambda level: bandwidth[level])
    apart = spread([math.log(bandwidth[level]) for level in ascending], 0.3)
    beside = {level: math.exp(place) for level, place in zip(ascending, apart, strict=True)}
    for level, speed in bandwidth.items():
        colour = looks[level][0]
        end = min(high, ceiling / (speed / 1e9))
        axes.plot([low, end], [speed / 1e9 * low, speed / 1e9 * end], color=colour, linewidth=1.6, label="_")
        axes.text(
            low * 1.05,
            beside[level] / 1e9 * low * 1.16,
            f"{level}: {speed / 1e9:.0f} GB/s",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
            rotation=math.degrees(math.atan(speed / 1e9)),  # in the data's units; on paper along the line
            rotation_mode="anchor",
            transform_rotates_text=True,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
        )
        floor = min(floor, speed / 1e9 * low / 1.1)
    if math.isfinite(ceiling):
        axes.axhline(ceiling, color="#444444", linewidth=1.4)
        axes.annotate(
            f"multiplications and additions: {ceiling:.0f} Gflop/s",
            (high, ceiling),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
            color="#444444",
        )
    if drawn:
        axes.plot(
            [intensity for intensity, _ in drawn],
            [limit for _, limit in drawn],
            linestyle="none",
            marker="_",
            markersize=16,
            markeredgewidth=2.0,
            color="#444444",
            label="limit by divisions and roots",
        )
    for level in bandwidth:
        own = [point for point in points if point.level == level]
        colour, marker, size = looks[level]
        axes.plot(
            [point.intensity for point in own],
            [point.flops_per_second / 1e9 for point in own],
            linestyle="none",
            marker=marker,
            markersize=size,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=level,
            zorder=4,
        )
    _name_rules(axes, points, low, high, floor)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    bounds = (floor * (floor / (2.2 * top)) ** (NAMES / (1.0 - NAMES)), 2.2 * top)
    axes.set_ylim(*bounds)
    logarithmic(axes.xaxis, low, high, plain_label)
    logarithmic(axes.yaxis, *bounds, plain_label)
    axes.set_xlabel("arithmetic intensity (flop per byte that a step must move)")
    axes.set_ylabel("arithmetic (Gflop/s)")
    handles, labels = axes.get_legend_handles_labels()
    in_order = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] not in bandwidth)
    named = [f"arrays in {label}" if label in bandwidth else label for label, _ in in_order]
    figure.legend([handle for _, handle in in_order], named, loc="outside lower center", ncols=3)
    return figure


def _words(rule: str) -> str:
    """Write a rule's name in one or two lines."""
    _, found, rest = rule.partition("second_moment")
    return f"second moment\n{rest.strip('_').replace('_', ', ')}".strip() if found else rule


def _name_rules(axes: Any, points: Sequence[Point], low: float, high: float, floor: float) -> None:
    """Write the rules' names under their points, apart from one another, with lines that lead there."""
    lowest: dict[str, Point] = {}
    for point in points:
        if point.rule not in lowest or point.flops_per_second < lowest[point.rule].flops_per_second:
            lowest[point.rule] = point
    ordered = sorted(lowest.values(), key=lambda point: (point.intensity, point.rule))
    wanted = spread([math.log(point.intensity) for point in ordered], 0.052 * math.log(high / low))
    for point, place in zip(ordered, wanted, strict=True):
        bottom = point.flops_per_second / 1e9
        axes.annotate(
            _words(point.rule),
            (point.intensity, bottom / 1.1),
            xytext=(math.exp(place), floor / 1.15),
            ha="center",
            va="top",
            rotation=90,
            multialignment="right",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 2},
        )


# --- The list ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A file in docs/images: what it shows, from which records, and how it is drawn."""

    name: str
    alt: str
    sources: tuple[str, ...]
    has: Callable[[Results], bool]
    make: Callable[[Results], Any]

    @property
    def file(self) -> str:
        """Return the file's name."""
        return f"performance-{self.name}.png"

    def draw(self, results: Results) -> Any:
        """Return the figure, drawn in this module's style whatever the user's is."""
        with matplotlib.style.context(["default", STYLE]):
            figure = self.make(results)
            figure.canvas.draw()
            return figure

    def write(self, results: Results, folder: Path) -> None:
        """Draw the picture into a file."""
        figure = self.draw(results)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"Software": None, DIGEST: results.digest(self.sources)}
        with matplotlib.style.context(["default", STYLE]):
            figure.savefig(folder / self.file, metadata=metadata)

    def is_current(self, results: Results, folder: Path) -> bool:
        """Whether the file is there and was drawn from these records."""
        file = folder / self.file
        return file.exists() and text_in(file.read_bytes()).get(DIGEST) == results.digest(self.sources)


DIGEST = "Records"


def text_in(png: bytes) -> dict[str, str]:
    """Return what a PNG file says in words: PNG specification, 11.3.4.3 tEXt."""
    found = {}
    at = 8
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        body = png[at + 8 : at + 8 + length]
        (check,) = struct.unpack_from(">I", png, at + 8 + length)
        if check != zlib.crc32(kind + body):
            raise ValueError(f"a damaged PNG: the sum of its {kind.decode('ascii', 'replace')} is wrong")
        if kind == b"tEXt":
            name, _, text = body.partition(b"\0")
            found[name.decode("latin-1")] = text.decode("latin-1")
        at += 12 + length
    return found


PICTURES = (
    Picture(
        "size",
        "Time of a step of Adam against the number of elements, for onepass and its peers",
        ("sweeps",),
        lambda results: bool(sweep_rows(results, "size")),
        draw_size,
    ),
    Picture(
        "tensors",
        "Time of a step of Adam against the number of tensors, for onepass and its peers",
        ("sweeps",),
        lambda results: bool(sweep_rows(results, "tensors")),
        draw_tensors,
    ),
    Picture(
        "batchnorm",
        "How many times faster than torch batch normalization is, for each pass, layout and shape",
        ("batchnorm",),
        lambda results: any(shapes_of(results.rows("batchnorm"), group) for group, *_ in BATCHNORM),
        draw_batchnorm,
    ),
    Picture(
        "subnormal",
        "Time of a step against the fraction of subnormal moments, relative to none",
        ("sweeps",),
        lambda results: bool(sweep_rows(results, "subnormal")),
        draw_subnormal,
    ),
    Picture(
        "models",
        "Time of a step of AdamW over the parameters of real models, relative to onepass",
        ("sweeps",),
        lambda results: any(row["value"] is not None for row in results.rows("sweeps", "model")),
        draw_models,
    ),
    Picture(
        "roofline",
        "Each rule's arithmetic against its arithmetic intensity, under the roofs of each level of memory",
        ("roofline", "counts"),
        lambda results: bool(roofline_points(results, roofline_threads(results))),
        draw_roofline,
    ),
)
assert set(LOOKS) == set(CONTENDERS)

"""Turn the records of bench/results into docs/performance.md, its pictures and the figures in README.md.

``python bench/report.py`` draws the pictures and rewrites what stands between marks (``<!-- goals -->`` to
``<!-- end of goals -->``) in both pages; no figure is typed by hand. What has not been measured says so, so that a
report can be made of a part. ``--check`` changes nothing and fails

* if a block is not what the records give,
* if a picture is missing, was drawn from other records, or shows what is no longer there,
* if a goal is missed and the page's section about that has no cause for it, or one that was "not found", or has a
  cause for a goal that is met. A cause is an entry of a list that begins with the names of its cases in code marks, or
  with what their names begin with, and a colon,
* if the records of the CPU are of different commits, of sources that no commit holds, quick, or of a part of the cases.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu
import plots
from method import format_seconds
from records import (
    COMPARED,
    FILES,
    ITSELF,
    OURS,
    STORAGE,
    Results,
    Row,
    buffers,
    count,
    extra,
    figure,
    goal,
    grouped,
    interval,
    is_against_peer,
    is_share,
    load,
    model,
    our_seconds,
    our_slowdown,
    part,
    rank,
    shown,
    slowdown,
    wide,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs") / "performance.md"
README = Path("README.md")
IMAGES = Path("docs") / "images"
MISSED_SECTION = "Where a goal is missed"
COMMANDS = {
    "optimizers": "python bench/peers/optimizers.py",
    "batchnorm": "python bench/peers/batchnorm.py",
    "whole_step": "python bench/peers/whole_step.py",
    "sweeps": "python bench/peers/sweeps.py",
    "gpu": "python bench/gpu.py",
    "roofline": "make bench-roofline",
    "micro": "make bench-micro",
}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells) + "\n"


def code(name: str) -> str:
    """Mark a name as code."""
    return f"`{name}`"


def listed(names: Iterable[str]) -> str:
    """Write names one after the other."""
    return ", ".join(code(name) for name in names)


def picture(name: str, results: Results, folder: str) -> str:
    """Show a picture, if there are records for it."""
    found = next(picture for picture in plots.PICTURES if picture.name == name)
    return f"![{found.alt}]({folder}/{found.file})\n\n" if found.has(results) else ""


def not_measured(name: str) -> str:
    """Say that there are no records, and how to get them."""
    return f"Not measured; `{COMMANDS[name]}` does it.\n"


def where(results: Results, name: str) -> str:
    """Say on what the rows of a file were measured, and where all of them are."""
    environment = results.environment(name)
    versions = [
        f"{title} {environment[key]}" for key, title in PACKAGES.items() if environment.get(key, MISSING) != MISSING
    ]
    return (
        f"Measured on {environment.get('cpu', 'an unknown processor')} ({environment.get('isa', '?')}, "
        f"{environment.get('threads', '?')} threads)" + (f" with {', '.join(versions)}" if versions else "") + "; "
        f"`~`: noisy. Every row with its interval: [{name}.md](../bench/results/{name}.md).\n\n"
    )


# --- The tables of goals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a table: the rows whose case matches. A group in the pattern names each of them in the line."""

    what: str
    pattern: str
    spread: bool = False

    def of(self, rows: Iterable[Row]) -> list[Row]:
        """Return the line's rows."""
        return [row for row in rows if re.match(self.pattern, row["case"])]

    def name(self, row: Row) -> str:
        """Return what the line calls one of its rows."""
        found = re.match(self.pattern, row["case"])
        return " ".join(filter(None, found.groups())) if found else ""

    def arrays(self, rows: Sequence[Row]) -> str:
        """Say which of the line's rows had warm arrays, and which rotated ones."""
        groups = grouped((row for row in rows if buffers(row)), buffers)
        known = sum(map(len, groups.values())) == len(rows)
        if self.spread or not groups or (known and len(groups) == 1):
            return ", ".join(sorted(groups))
        return "; ".join(f"{how}: {', '.join(filter(None, map(self.name, own)))}" for how, own in groups.items())

    def figures(self, rows: Sequence[Row]) -> str:
        """Write the figures of the line's rows."""
        measured = [row for row in rows if row["value"] is not None and not row["failed"]]
        if not measured:
            return "not measured" if not any(row["failed"] for row in rows) else "FAILED"
        if not self.spread:
            return ", ".join(f"{self.name(row)} {figure(row)}".strip() for row in rows)
        measured.sort(key=lambda row: row["value"]["value"])
        least, most = measured[0], measured[-1]
        text = figure(least) if len(measured) == 1 else f"{figure(least)} to {figure(most)}"
        lost = len(rows) - len(measured)
        return text + (f"; {lost} of {len(rows)} not measured" if lost else "")

    def cells(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """Write the line as HEADER says."""
        goals = [goal(row) for row in rows if goal(row)]
        wanted = goals[0] if len(set(goals)) == 1 else ", ".join(goals)
        return (self.what, self.arrays(rows), self.figures(rows), wanted, verdict(rows))


def verdict(rows: Iterable[Row]) -> str:
    """Say whether the goals of rows are met."""
    judged = [row for row in rows if row["goal"] is not None or row["failed"]]
    missed = [row for row in judged if row["met"] is False]
    unsure = [row for row in judged if row["met"] is None and row["value"] is not None]
    if missed:
        return "**NO**" if len(judged) == 1 else f"**NO** ({len(missed)} of {len(judged)})"
    if unsure:
        return "open" if len(judged) == 1 else f"open ({len(unsure)} of {len(judged)})"
    return "yes" if judged and all(row["met"] for row in judged) else ""


OPTIMIZERS = (
    Line(
        "every rule, 16M and 64M elements, 1 and 2 threads: share of the yardstick's speed",
        r"traffic/",
        spread=True,
    ),
    *(
        line
        for name in ("SGD", "Momentum", "Adam", "AMSGrad", "AdaGrad")
        for line in (
            Line(f"{name}, against torch fused", rf"fused/{name}/([^/]+)$"),
            Line(f"{name}, 1M elements, arrays rotated", rf"fused/{name}/1M/rotated$"),
        )
    ),
    Line("16M elements, against torch's fastest, which is not fused", r"unfused/([^/]+)/"),
    Line("1000 tensors of 1000, Adam, against torch fused", r"many/Adam/"),
    Line("one tensor of 64, the whole call, Adam, against torch fused", r"small/Adam/64(?!/seconds)"),
    Line("the same: time of a call", r"small/Adam/64/seconds"),
    Line("Adam with all moments subnormal, time relative to a normal step", r"subnormal/Adam/16M/onepass"),
    Line("the same of torch fused, relative to its own normal step", r"subnormal/Adam/16M/torch"),
    Line("Adam, 16M elements, against its formula in NumPy, which uses one thread", r"numpy/Adam/16M/formula"),
    Line("the same, memory given back to the system as Python comes", r"numpy/Adam/16M/memory-given-back"),
    Line("the same, written without temporary arrays", r"numpy/Adam/16M/in-place"),
    Line("`import onepass` beyond NumPy's own", r"import"),
)
SHAPE = r"(\d\S*x\d+)$"
ROTATED = r"(\d\S*x\d+)/rotated$"
GOAL_SHAPE = "32x64x56x56"


def batchnorm_lines() -> Iterator[Line]:
    """Yield the lines about batch normalization."""
    against = {
        "NCHW": "forward, NCHW, against torch",
        "NHWC": "forward, NHWC, against torch channels_last",
        "NC": "forward, N x C, against torch",
    }
    for layout, what in against.items():
        yield Line(what, rf"forward/{layout}/{SHAPE}")
        yield Line("the same, arrays rotated", rf"forward/{layout}/{ROTATED}")
        if layout != "NC":
            yield Line("the same, against torch compiled", rf"compiled/{layout}/forward/{SHAPE}")
    for kind, layout, what in (
        ("backward", "NCHW", "backward, NCHW, against torch"),
        ("backward", "NHWC", "backward, NHWC, against torch channels_last"),
        ("backward-recycled", "NCHW", "backward, NCHW, against torch's fastest, memory recycled"),
        ("backward-recycled", "NHWC", "backward, NHWC, against torch's fastest, memory recycled"),
    ):
        yield Line(what, rf"{kind}/{layout}/{SHAPE}")
        yield Line("the same, geometric mean", rf"{kind}/{layout}/geometric")
    yield Line("forward, NCHW: share of a copy's speed", rf"copy/{SHAPE}")
    yield Line("forward, NHWC: share of a copy's speed", rf"copy/NHWC/{SHAPE}")
    yield Line("forward, N x C: share of a copy's speed", rf"copy/NC/{SHAPE}")
    yield Line("forward with residual and ReLU, against three passes", rf"fused/({GOAL_SHAPE})$")
    yield Line("the same, another shape", rf"fused/(?!{GOAL_SHAPE}$){SHAPE}")
    yield Line("forward with residual and ReLU, NCHW, against torch compiled", rf"compiled/NCHW/fused/{SHAPE}")
    yield Line("forward with residual and ReLU, NHWC, against torch compiled", rf"compiled/NHWC/fused/{SHAPE}")
    yield Line("forward without `out=`, time relative to with it", r"without-out/")
    yield Line("forward, against the formula in NumPy, which uses one thread", r"numpy/\S+/formula")
    yield Line("the same, written without temporary arrays", r"numpy/\S+/in-place")


BATCHNORM = tuple(batchnorm_lines())
WHOLE_STEP = (
    Line(
        "clip, unscale, AdamW, average, bfloat16 copy, zeroed gradients: against torch's six calls",
        r"whole/AdamW/torch$",
    ),
    Line("the same: share of the yardstick's speed", r"whole/AdamW/traffic"),
    Line(
        "every rule, bfloat16 parameters and gradients, AVX-512: share of the yardstick's speed",
        r"rules/\w+/avx512",
        True,
    ),
    Line("the same with AVX2", r"rules/\w+/avx2", True),
    Line("Adam, everything in bfloat16, against everything in float32", r"storage/Adam/"),
    Line("Adam, parameters and gradients in bfloat16, against torch fused", r"torch/Adam/bfloat16"),
    Line("Adam, stochastic rounding, time relative to rounding to nearest, for each storage", r"stochastic/Adam/(\S+)"),
    Line("Adam, bfloat16 parameters with a split master, against float32 and a bfloat16 copy", r"split/Adam"),
)
GOALS: Mapping[str, tuple[str, Sequence[Line]]] = {
    "optimizers": ("Goals of the optimizers", OPTIMIZERS),
    "batchnorm": ("Goals of batch normalization", BATCHNORM),
    "whole_step": ("Goals of the whole step, and of fewer bits", WHOLE_STEP),
}
HEADER = ("case", "arrays", "figure", "goal", "met")


def goal_table(lines: Sequence[Line], rows: Sequence[Row]) -> str:
    """Compare with the goals; a row with a goal that no line has gets a line of its own."""
    made, seen = [], set()
    for line in lines:
        own = line.of(rows)
        seen |= {row["case"] for row in own}
        made.append(line.cells(own) if own else (line.what, "", "not measured", "", ""))
    made += [
        Line(code(row["case"]), re.escape(row["case"]) + "$").cells([row])
        for row in rows
        if row["goal"] is not None and row["case"] not in seen
    ]
    return table(HEADER, made)


def goals_block(results: Results) -> str:
    """All tables of goals, one for each file."""
    parts = []
    for name, (title, lines) in GOALS.items():
        rows = results.rows(name)
        body = where(results, name) + goal_table(lines, rows) if rows else not_measured(name)
        parts.append(f"### {title}\n\n{body}")
    parts.append(f"### Goals on a CUDA device\n\n{gpu_part(results)}")
    return "\n".join(parts)


def gpu_part(results: Results) -> str:
    """The table that bench/gpu.py has made."""
    if not results.rows("gpu"):
        return f"No run on a device has been recorded; `{COMMANDS['gpu']}` makes one.\n"
    environment = results.environment("gpu")
    return (
        f"Measured on {environment.get('device', 'an unknown device')}, CuPy {environment.get('cupy', '?')}, "
        f"torch {environment.get('torch', '?')}. Every row with its interval: [gpu.md](../bench/results/gpu.md).\n\n"
        + gpu.goal_table(gpu.goals(results.rows("gpu")))
        + "\n"
    )


# --- Where a goal is missed, where a peer wins ------------------------------------------------------------------------


def every_row(results: Results) -> Iterator[tuple[str, Row]]:
    """Yield all rows that compare, by the name that the page gives them: file and case."""
    for name in COMPARED:
        for row in results.rows(name):
            yield f"{name}/{row['case']}", row


def missed(results: Results) -> dict[str, Row]:
    """Return the rows whose goal is missed, by name."""
    return {name: row for name, row in every_row(results) if row["met"] is False and row["goal"] is not None}


def failed(results: Results) -> dict[str, Row]:
    """Return the cases without a goal that went wrong, by name."""
    return {name: row for name, row in every_row(results) if row["failed"] and row["goal"] is None}


def undecided(results: Results) -> dict[str, Row]:
    """Return the rows whose goal is neither met nor missed, by name."""
    return {
        name: row
        for name, row in every_row(results)
        if row["goal"] is not None and row["value"] is not None and row["met"] is None
    }


def missed_block(results: Results) -> str:
    """List the goals that are missed and those that are open."""
    text = ""
    rows = missed(results)
    if rows:
        text += table(
            ("missed", "arrays", "figure", "95 %", "goal"),
            (
                (code(name), buffers(row), figure(row), interval(row) if row["value"] else "", goal(row))
                for name, row in rows.items()
            ),
        )
    else:
        text += "No goal is missed.\n"
    rows = undecided(results)
    if rows:
        text += "\nOpen, because the goal lies within the interval:\n\n" + table(
            ("open", "arrays", "figure", "95 %", "goal"),
            ((code(name), buffers(row), figure(row), interval(row), goal(row)) for name, row in rows.items()),
        )
    rows = failed(results)
    if rows:
        text += "\nFailed, and so without a figure; there is no goal for them:\n\n" + table(
            ("failed", "arrays", "what the record says"),
            ((code(name), buffers(row), row["note"]) for name, row in rows.items()),
        )
    return text


def times_cells(name: str, row: Row) -> tuple[str, ...]:
    """Write a comparison with its times."""
    return (
        code(name),
        buffers(row),
        format_seconds(row["ours_seconds"]),
        f"{shown(row['peer'])} {format_seconds(row['peer_seconds'])}".strip(),
        figure(row),
        interval(row),
    )


def peers_block(results: Results) -> str:
    """List what a peer does faster, in less memory, or as fast, and whom nobody met."""
    compared = [(name, row) for name, row in every_row(results) if is_against_peer(row) and row["value"] is not None]
    header = ("case", "arrays", "onepass", "peer", "peer / onepass", "95 %")
    slower = [(name, row) for name, row in compared if row["value"]["high"] < 1.0]
    equal = [(name, row) for name, row in compared if row["value"]["low"] <= 1.0 <= row["value"]["high"]]
    faster = len(compared) - len(slower) - len(equal)
    text = (
        f"Of {len(compared)} comparisons with a peer, onepass is faster in {faster}, a peer in {len(slower)}, and "
        f"{len(equal)} cannot be told apart. The yardstick and onepass itself are no peers.\n\n### A peer is faster\n\n"
    )
    text += table(header, (times_cells(*pair) for pair in slower)) if slower else "In no case that was measured.\n"
    text += "\n### Within the noise\n\n"
    text += table(header, (times_cells(*pair) for pair in equal)) if equal else "None.\n"
    leaner = list(lean_peers(results))
    if leaner:
        text += "\n### A peer needs less memory\n\n" + table(("case", "onepass", "peer"), leaner)
    text += f"\n### Peers that were not measured\n\n{absent(results)}"
    return text


def lean_peers(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield where the states of a peer take fewer bytes than ours."""
    for group in memory_groups(results).values():
        own = next((row for row in group if row["peer"] == OURS), None)
        for row in group:
            for name, what in (("state_bytes", "state"), ("peak_bytes", "peak")):
                ours, theirs = (None if own is None else extra(own, name)), extra(row, name)
                if ours is not None and theirs is not None and theirs < 0.99 * ours:
                    yield (
                        code(f"sweeps/{row['case']}"),
                        f"{what} {ours:.2f} bytes",
                        f"{row['peer']} {theirs:.2f} bytes",
                    )


def absent(results: Results) -> str:
    """List the peers of rows without a figure, with the reasons that the rows give."""
    rows = [(name, row) for name, row in every_row(results) if row["value"] is None and not row["failed"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in rows:
        if row["note"] and not row.get("extra") and not ITSELF.match(row["peer"]):
            reasons.setdefault((row["peer"], row["note"]), []).append(name)
    lines = []
    for (peer, note), names in sorted(reasons.items(), key=lambda item: rank(item[0][0])):
        cases = listed(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"* {peer}: {note} ({cases})\n")
    return "".join(lines) or "None: every peer of every case was measured.\n"


# --- Causes -----------------------------------------------------------------------------------------------------------


CAUSE = re.compile(r"^\* ((?:`[^`]+`(?:,\s+|(?=:)))+):[ \n]*(.*)", re.MULTILINE)
NO_CAUSE = "not found"


def causes(text: str) -> dict[str, str]:
    """Return the names, or beginnings of names, for which the page has a cause, with that cause's first line."""
    _, found, section = text.partition(f"\n## {MISSED_SECTION}\n")
    if not found:
        return {}
    section = section.partition("\n## ")[0]
    _, _, section = section.partition(Block.end_of("missed"))
    return {name: match[2] for match in CAUSE.finditer(section) for name in re.findall(r"`([^`]+)`", match[1])}


def complaints_about_causes(text: str, results: Results) -> list[str]:
    """Say which missed goal has no cause, which cause no missed goal, and which was not found."""
    given = causes(text)
    lost, unsure = missed(results) | failed(results), undecided(results)
    found = [f"{name}: missed, and the page gives no cause" for name in lost if not name.startswith(tuple(given))]
    names = [*lost, *unsure]
    for name, cause in given.items():
        if not any(case.startswith(name) for case in names):
            found.append(f"{name}: the page gives a cause, but no goal of that name is missed or open")
        elif cause.lower().startswith(NO_CAUSE):
            found.append(f"{name}: the page says that the cause was not found; find it")
    return found


# --- Sweeps -----------------------------------------------------------------------------------------------------------


def threads_text(*counts: int) -> str:
    """Write numbers of threads."""
    return f"{', '.join(map(str, counts))} thread{'' if counts == (1,) else 's'}"


def threads_of(rows: Iterable[Row]) -> str:
    """Say with how many threads rows were measured."""
    return threads_text(*sorted({row["threads"] for row in rows}))


def sweep_table(
    rows: Sequence[Row], first: str, label: Callable[[Row], str], cell: Callable[[Row], str] | None = None
) -> str:
    """Write a line for each case, with the time of ours and a column for each peer."""
    names = sorted({row["peer"] for row in rows if row["peer"] != OURS}, key=rank)
    lines = []
    for key, group in grouped(rows, label).items():
        own = {row["peer"]: row for row in group}
        cells = [(cell or peer_cell)(own[name]) if name in own else "" for name in names]
        lines.append((key, format_seconds(our_seconds(group)), *cells))
    return table((first, OURS, *map(shown, names)), lines)


def peer_cell(row: Row) -> str:
    """Write a peer's time and how many times that of ours it is."""
    return f"{format_seconds(row['peer_seconds'])}, {figure(row)}" if row["value"] is not None else "-"


def sweep_block(kind: str, first: str, label: Callable[[Row], str]) -> Callable[[Results], str]:
    """Make the function that writes a sweep: its picture, and a table for each rule and number of threads."""

    def block(results: Results) -> str:
        rows = [row for row in results.rows("sweeps", kind) if not row["failed"]]  # missed_block() has those
        name = {"size": "size", "tensors": "tensors", "model": "models"}.get(kind, "")
        text = picture(name, results, "images") if name else ""
        if not rows:
            return text + not_measured("sweeps")
        split = (lambda row: row["threads"]) if kind != "threads" else (lambda row: 0)
        subject = (lambda row: part(row, 1)) if kind != "model" else (lambda row: "AdamW")
        for (rule, _), group in grouped(rows, subject, split).items():
            how = sorted({buffers(row) for row in group} - {""})
            said = "" if not how or kind in ("size", "tensors") else f"; arrays {' or '.join(how)}"
            text += f"{rule}, {threads_of(group)}{said}:\n\n{sweep_table(group, first, label)}\n"
        return text.rstrip("\n") + "\n"

    return block


def size_label(row: Row) -> str:
    """Write a number of elements, and whether the arrays were warm."""
    return ", ".join(filter(None, (count(row["elements"]), buffers(row))))


def tensors_label(row: Row) -> str:
    """Write how many tensors of how many elements, and whether the arrays were warm."""
    number = f"{row['tensors']:,} x {row['elements'] // row['tensors']:,}"
    return ", ".join(filter(None, (number, buffers(row))))


def threads_label(row: Row) -> str:
    """Write size and threads."""
    return f"{part(row, 2)}, {row['threads']}"


def model_label(row: Row) -> str:
    """Write a model with its size."""
    return f"{model(row)}: {row['tensors']} tensors, {row['elements'] / 1e6:.1f} million"


SLOW = 1.5


def subnormal_block(results: Results) -> str:
    """Say how much slower steps become as moments become subnormal."""
    text = picture("subnormal", results, "images")
    rows = results.rows("sweeps", "subnormal")
    if not rows:
        return text + not_measured("sweeps")

    def cell(slow: Mapping[str, float] | None) -> str:
        return "-" if slow is None else f"{slow['value']:.2f}x{'~' if wide(slow) else ''}"

    for (rule, _), group in grouped(rows, lambda row: part(row, 1), lambda row: row["threads"]).items():
        names = sorted({row["peer"] for row in group if row["peer"] != OURS}, key=rank)
        lines = []
        most = dict.fromkeys((OURS, *names), 0.0)
        for fraction, same in grouped(group, lambda row: extra(row, "fraction")).items():
            by_name = {OURS: our_slowdown(same), **{row["peer"]: slowdown(row, "peer") for row in same}}
            cells = [cell(by_name[name]) if name in by_name else "" for name in (OURS, *names)]
            lines.append(("-" if fraction is None else f"{100 * fraction:g} %", *cells))
            for name, slow in by_name.items():
                most[name] = max(most[name], slow["value"] if slow else 0.0)
        slowed = [f"{shown(name)} ({value:.1f}x)" for name, value in most.items() if value > SLOW]
        text += (
            f"{rule}, {threads_of(group)}: subnormal moments make steps more than {SLOW:g}x slower of "
            f"{'; '.join(slowed)}.\n\n"
            if slowed
            else f"{rule}, {threads_of(group)}: on this processor subnormal moments make nobody's step more than "
            f"{SLOW:g}x slower.\n\n"
        )
        text += "Time relative to no subnormal moment:\n\n"
        text += table(("subnormal", OURS, *map(shown, names)), lines) + "\n"
    return text.rstrip("\n") + "\n"


def whole_block(results: Results) -> str:
    """List everybody who takes the whole step, or why not."""
    rows = [row for row in results.rows("whole_step", "whole") if not is_share(row)]
    if not rows:
        return not_measured("whole_step")
    lines = []
    for row in sorted(rows, key=lambda row: rank(row["peer"])):
        known = row["value"] is not None
        lines.append(
            (
                shown(row["peer"]),
                buffers(row),
                format_seconds(row["ours_seconds"]),
                format_seconds(row["peer_seconds"]),
                figure(row)
                + (
                    ""
                    if known or not row["note"]
                    else f": {row['note'].removeprefix('not measured: ').removeprefix('no peer: ')}"
                ),
                interval(row) if known else "",
            )
        )
    header = ("peer", "arrays", OURS, "peer", "peer / onepass", "95 %")
    return f"AdamW, {count(rows[0]['elements'])} elements, {threads_of(rows)}:\n\n{table(header, lines)}"


def optimizers_block(results: Results) -> str:
    """Show every optimizer beside everybody who has it."""
    rows = results.rows("optimizers", "peers")
    if not rows:
        return not_measured("optimizers")
    how = sorted({buffers(row) for row in rows} - {""})
    said = f"; arrays {' or '.join(how)}" if how else ""
    return (
        f"{part(rows[0], 2)} elements, {threads_of(rows)}{said}; `-`: "
        "[not measured](#peers-that-were-not-measured):\n\n" + sweep_table(rows, "optimizer", lambda row: part(row, 1))
    )


def memory_groups(results: Results) -> dict[str, list[Row]]:
    """Return the rows about memory by what is stored."""
    return grouped(results.rows("sweeps", "memory"), lambda row: row["case"].rpartition("/")[0].partition("/")[2])


def memory_block(results: Results) -> str:
    """Say what states take."""
    groups = memory_groups(results)
    if not groups:
        return not_measured("sweeps")
    names = sorted({row["peer"] for group in groups.values() for row in group}, key=rank)

    def cell(row: Row) -> str:
        state, peak = extra(row, "state_bytes"), extra(row, "peak_bytes")
        return ", ".join("-" if value is None else f"{value:.2f}" for value in (state, peak))

    lines = []
    for key, group in groups.items():
        own = {row["peer"]: row for row in group}
        lines.append((key.replace("/", ", "), *(cell(own[name]) if name in own else "" for name in names)))
    return (
        "Bytes for each parameter: of the states, and at the peak of a process beyond parameters and gradients.\n\n"
        + table(("storage", *names), lines)
    )


# --- Roofline, kernels, counts ----------------------------------------------------------------------------------------


def roofline_block(results: Results) -> str:
    """Write bandwidths and each rule's share of them."""
    text = picture("roofline", results, "images")
    rows = results.rows("roofline")
    if not rows:
        return text + not_measured("roofline")
    counts = sorted({row["threads"] for row in rows if row["kind"] == "bandwidth"})
    bandwidths = {threads: plots.levels(results, threads) for threads in counts}
    names = list(dict.fromkeys(level for found in bandwidths.values() for level in found))
    sizes = grouped((row for row in rows if row["kind"] == "bandwidth"), lambda row: part(row, 1))
    text += "The triad `a[i] += s * b[i]`, GB/s:\n\n" + table(
        ("level", "working set", *map(threads_text, counts)),
        (
            (
                level,
                working_sets(sizes[level]),
                *(f"{found[level] / 1e9:.1f}" if level in found else "-" for found in bandwidths.values()),
            )
            for level in names
        ),
    )
    peaks = grouped((row for row in rows if row["kind"] == "peak"), lambda row: row["case"].rpartition("/")[0])
    if peaks:
        kinds = {plots.MULTIPLY_ADD: "multiplications and additions", plots.DIVIDE_ROOT: "divisions and roots"}
        lines = []
        for group in peaks.values():
            speeds = {row["threads"]: extra(row, "flops_per_second") or 0.0 for row in group}
            kind = part(group[0], 1)
            rates = (f"{speeds[threads] / 1e9:.1f}" if threads in speeds else "-" for threads in counts)
            lines.append((kinds.get(kind, kind), part(group[0], 2), *rates))
        text += "\nArithmetic without memory, Gflop/s:\n\n"
        text += table(("what", "instruction set", *map(threads_text, counts)), lines)
    for threads, group in grouped((row for row in rows if row["kind"] == "rule"), lambda row: row["threads"]).items():
        found = bandwidths.get(threads, {})
        lines = []
        for rule, own in grouped(group, lambda row: part(row, 1)).items():
            by_level = {part(row, 2): extra(row, "bytes_per_second") for row in own}
            cells = []
            for level in names:
                speed, roof = by_level.get(level), found.get(level)
                share = f" ({speed / roof:.2f})" if speed and roof else ""
                cells.append(f"{speed / 1e9:.1f}{share}" if speed else "-")
            lines.append((code(rule), *cells))
        text += f"\nEach rule, {threads_text(threads)}: GB/s, and that over the triad's:\n\n"
        text += table(("rule", *names), lines)
    return text


def working_sets(rows: Iterable[Row]) -> str:
    """Write the working set of a level: one for each number of threads, where it grows with their caches."""
    return ", ".join(dict.fromkeys(byte_count(row["extra"].get("working_set", row["bytes"])) for row in rows))


def byte_count(number: int) -> str:
    """Write a number of bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} B"


MICRO = re.compile(r"^(?P<what>.+)/(?P<isa>scalar|avx2|avx512)(?:/(?P<size>[^/:]+))?/threads:(?P<threads>\d+)")
ISAS = ("scalar", "avx2", "avx512")
MICRO_SIZES = ("32K", "1M", "16M")


@dataclass(frozen=True)
class Micro:
    """One measurement of a kernel alone."""

    what: str
    isa: str
    size: str
    threads: int
    counters: Mapping[str, Any]


def micro(results: Results) -> list[Micro]:
    """Return the measurements by google-benchmark: of repeated ones the medians."""
    found: dict[str, Micro] = {}
    for entry in results.contents.get("micro", {}).get("benchmarks", []):
        name = entry.get("run_name", entry["name"])
        match = MICRO.match(name)
        kind = entry.get("aggregate_name")
        if match is None or kind not in (None, "median") or entry.get("error_occurred"):
            continue
        if kind == "median" or name not in found:
            found[name] = Micro(match["what"], match["isa"], match["size"] or "", int(match["threads"]), entry)
    return list(found.values())


def micro_block(results: Results) -> str:
    """Summarize the kernels alone: shares of the yardstick, and what the others move in a second."""
    measured = micro(results)
    if not measured:
        return not_measured("micro")
    most = max(one.threads for one in measured)
    chosen = {(one.what, one.isa, one.size): one.counters for one in measured if one.threads == most}
    isas = [isa for isa in ISAS if any(key[1] == isa for key in chosen)]
    sizes = [size for size in MICRO_SIZES if any(key[2] == size for key in chosen)]
    header = [f"{isa}, {size}" for isa in isas for size in sizes]

    def cells(what: str, counter: str, unit: float, digits: int) -> list[str]:
        found = [chosen.get((what, isa, size), {}).get(counter) for isa in isas for size in sizes]
        return ["-" if value is None else f"{value / unit:.{digits}f}" for value in found]

    updates = list(dict.fromkeys(key[0] for key in chosen if key[0].startswith("update/")))
    plain = [what for what in updates if what.endswith(f"/{STORAGE}")]
    shown = [what for what in plain if any(cell != "-" for cell in cells(what, "share_of_traffic", 1.0, 2))]
    text = (
        f"Every rule in float32, {threads_text(most)}: share of the speed of the yardstick `traffic` with the same "
        "streams, for each instruction set and number of elements:\n\n"
    )
    text += table(
        ("rule", *header), ((code(what.split("/")[1]), *cells(what, "share_of_traffic", 1.0, 2)) for what in shown)
    )
    storages = grouped_names(updates, 2)
    lines = []
    for storage, names in storages.items():
        line = [code(storage)]
        for isa in isas:
            for size in sizes:
                counters = (chosen.get((what, isa, size), {}) for what in names)
                found = [value for one in counters if (value := one.get("share_of_traffic")) is not None]
                line.append(f"{min(found):.2f} to {max(found):.2f}" if found else "-")
        if any(cell != "-" for cell in line[1:]):
            lines.append(line)
    if lines:
        text += "\nThe least and the largest share of all rules, for each storage (parameter, gradient, states):\n\n"
        text += table(("storage", *header), lines)
    return text + other_kernels([key for key in chosen if key[0] not in updates], chosen, isas, most)


def other_kernels(
    keys: Sequence[tuple[str, str, str]],
    chosen: Mapping[tuple[str, str, str], Mapping[str, Any]],
    isas: Sequence[str],
    threads: int,
) -> str:
    """Write what the kernels that are no updates move in a second."""
    lines = []
    for what, size in dict.fromkeys((key[0], key[2]) for key in keys):
        speeds = [chosen.get((what, isa, size), {}).get("bytes_per_second") for isa in isas]
        if any(speeds):
            lines.append((code(what), size, *("-" if not speed else f"{speed / 1e9:.1f}" for speed in speeds)))
    if not lines:
        return ""
    return f"\nThe other kernels, {threads_text(threads)}, GB/s:\n\n" + table(("kernel", "size", *isas), lines)


def grouped_names(names: Iterable[str], index: int) -> dict[str, list[str]]:
    """Return names by one of their words."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.split("/")
        groups.setdefault(words[index] if index < len(words) else "", []).append(name)
    return groups


OPERATIONS = ("reads", "writes", "adds", "multiplies", "divides", "roots", "others")


def counts_block(results: Results) -> str:
    """Write what was counted of each rule, in float32."""
    counts = results.contents.get("counts", {})
    compilers = results.contents.get("instructions", {}).get("compilers", {})
    if not counts and not compilers:
        return "Not counted; `make bench-guard` does it.\n"
    columns = [(compiler, isa) for compiler, found in compilers.items() for isa in ISAS if isa in found]
    operations = OPERATIONS if counts else ()
    suffix = f"/{STORAGE}"
    rules = list(counts) or sorted(
        {name.removesuffix(suffix) for _, isas in compilers.items() for isa in isas.values() for name in isa}
    )
    lines = []
    for rule in rules:
        own = [str(counts[rule].get(name, 0)) for name in operations]
        found = [compilers[compiler][isa].get(rule + suffix) for compiler, isa in columns]
        own += ["-" if value is None else f"{value:.2f}" for value in found]
        if "-" not in rule:
            lines.append((code(rule), *own))
    return table(("rule", *operations, *(f"instructions, {isa}, {compiler}" for compiler, isa in columns)), lines)


# --- How it was measured ----------------------------------------------------------------------------------------------

MISSING = "not installed"
SHORT = 12  # characters of a commit
PACKAGES = {
    "torch": "torch",
    "numpy": "NumPy",
    "jax": "JAX",
    "optax": "Optax",
    "deepspeed": "DeepSpeed",
    "cupy": "CuPy",
}


def commit_of(environment: Mapping[str, Any]) -> str:
    """Return the commit that was measured."""
    return str(environment.get("commit", environment.get("onepass_commit", "-")))


ON_CPU = tuple(name for name in FILES if name != "gpu")
PARTIAL = re.compile(r"--(filter|peers)\b")


def complaints_about_records(results: Results) -> list[str]:
    """Say which records of the CPU cannot stand beside the others."""
    environments = {name: results.environment(name) for name in ON_CPU if name in results.contents}
    found = []
    for name, environment in environments.items():
        if commit_of(environment) in ("-", "", "unknown") or commit_of(environment).endswith("-dirty"):
            found.append(f"{name}: the records are of sources that no commit holds: {commit_of(environment)}")
        if environment.get("complete") is False:
            found.append(f"{name}: the run was stopped before its end")
        if environment.get("quick"):
            found.append(f"{name}: the records are of a quick run, whose figures mean nothing")
        if PARTIAL.search(str(environment.get("command", ""))):
            found.append(f"{name}: the records are of a part of the cases: {environment['command']}")
    commits: dict[str, list[str]] = {}
    for name, environment in environments.items():
        commits.setdefault(commit_of(environment)[:SHORT], []).append(name)
    if len(commits) > 1:
        said = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in commits.items())
        found.append(f"the records are of several commits, and must be of one: {said}")
    return found


def environment_block(results: Results) -> str:
    """Say for each file from where it comes."""
    lines = []
    for name in FILES:
        environment = results.environment(name)
        if not environment:
            lines.append((code(name), "not measured", "", "", "", code(COMMANDS[name])))
            continue
        cpus = environment.get("cpus", environment.get("num_cpus"))
        cpus = cpus.get("usable") if isinstance(cpus, Mapping) else cpus
        kind = environment.get("device") or environment.get("cpu")
        place = [*([str(kind)] if kind else []), *([f"{cpus} CPUs"] if cpus else [])]
        place += [str(environment["isa"])] if "isa" in environment else []
        place += [f"{environment['threads']} threads"] if "threads" in environment else []
        versions = [f"Python {environment['python']}"] if "python" in environment else []
        versions += [
            f"{title} {environment[key]}" for key, title in PACKAGES.items() if environment.get(key, MISSING) != MISSING
        ]
        command = environment.get("command", "").strip() or COMMANDS[name]
        lines.append(
            (
                code(name),
                commit_of(environment)[:SHORT],
                ", ".join(place),
                ", ".join(versions),
                str(environment.get("date", "-"))[:10],
                code(command),
            )
        )
    return table(("records", "commit", "machine", "versions", "date", "command"), lines)


# --- README -----------------------------------------------------------------------------------------------------------


def headlines(results: Results) -> list[str]:
    """Return the figures that say most, as far as they were measured."""

    def of(name: str, pattern: str, spread: bool = True, quiet: bool = False) -> str | None:
        line = Line("", pattern, spread)
        rows = [row for row in line.of(results.rows(name)) if row["value"] is not None and not row["failed"]]
        if quiet:  # where one that is not would say more than all others
            rows = [row for row in rows if not wide(row["value"])] or rows
        if not rows:
            return None
        equal = (
            len(rows) == 1 and is_against_peer(rows[0]) and rows[0]["value"]["low"] <= 1.0 <= rows[0]["value"]["high"]
        )
        return line.figures(rows) + (" (within the noise)" if equal else "")

    def nearest(name: str, start: str) -> str | None:
        rows = [
            row
            for row in results.rows(name)
            if row["case"].startswith(start) and row["value"] is not None and is_against_peer(row)
        ]
        best = min(rows, key=lambda row: row["value"]["value"], default=None)
        return None if best is None else f"{figure(best)} ({shown(best['peer'])})"

    wanted: Sequence[tuple[str, Sequence[str | None]]] = (
        (
            "From memory, 16M and 64M elements, every rule runs at {} of the speed of a kernel that moves the same "
            "bytes and computes next to nothing.",
            [of("optimizers", r"traffic/")],
        ),
        (
            "Adam on 16M elements: its formula in NumPy, which uses one thread, takes {} as long, torch's fused "
            "kernel, which moves the same bytes, {}. Rules that torch has not fused: {}.",
            [
                of("optimizers", r"numpy/Adam/16M/formula"),
                of("optimizers", r"fused/Adam/16M$"),
                of("optimizers", "unfused/"),
            ],
        ),
        (
            "Adam on one tensor of 64 elements: torch's fused kernel takes {} as long as the {} here. On 1000 tensors "
            "of 1000 that a cache holds: {}.",
            [
                of("optimizers", r"small/Adam/64(?!/seconds)"),
                of("optimizers", r"small/Adam/64/seconds"),
                of("optimizers", r"many/Adam/"),
            ],
        ),
        (
            "Clipping, unscaling, AdamW, a weight average, a bfloat16 copy and clearing the gradients, in one pass: "
            "torch's six calls take {} as long, the fastest of all others {}.",
            [of("whole_step", r"whole/AdamW/torch$"), nearest("whole_step", "whole/AdamW/")],
        ),
        (
            "Batch normalization: torch takes {} as long forward (NCHW; NHWC: {}). Backward it takes {} (NHWC: {}) "
            "into given arrays, much of it page faults for memory of its own, and {} (NHWC: {}) in its faster form "
            "where such memory is kept.",
            [
                of("batchnorm", rf"{way}/{layout}/{SHAPE}", quiet=way == "backward-recycled")
                for way in ("forward", "backward", "backward-recycled")
                for layout in ("NCHW", "NHWC")
            ],
        ),
    )
    return [text.format(*figures) for text, figures in wanted if all(figures)]


def readme_block(results: Results) -> str:
    """Two pictures, some figures, and how many goals are met."""
    text = "".join(picture(name, results, IMAGES.as_posix()) for name in ("size", "batchnorm"))
    found = headlines(results)
    if found:
        environment = next(results.environment(name) for name in COMPARED if results.rows(name))
        versions = [f"{title} {environment[key]}" for key, title in list(PACKAGES.items())[:2] if key in environment]
        text += (
            f"On {environment.get('cpu')} ({environment.get('isa')}, {environment.get('threads')} threads), float32, "
            f"against {' and '.join(versions)}; `~`: noisy.\n\n" + "".join(f"* {line}\n" for line in found) + "\n"
        )
    judged = [row for _, row in every_row(results) if row["goal"] is not None and (row["value"] or row["failed"])]
    against = [row["value"] for _, row in every_row(results) if row["value"] and is_against_peer(row)]
    slower = sum(value["high"] < 1.0 for value in against)
    equal = sum(value["low"] <= 1.0 <= value["high"] for value in against)
    lost, unsure = len(missed(results)), len(undecided(results))
    if judged:
        text += (
            f"Of {len(judged)} goals {len(judged) - lost - unsure} are met, {lost} are "
            f"[missed]({PAGE.as_posix()}#where-a-goal-is-missed), and {unsure} are open: the goal lies "
            f"within the figure's interval. Of {len(against)} comparisons, [a peer is faster]"
            f"({PAGE.as_posix()}#where-a-peer-wins) in {slower or 'none'}, and {equal} cannot be told apart.\n"
        )
    return text or "Nothing has been measured.\n"


# --- The pages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What stands between two marks of a page."""

    name: str
    make: Callable[[Results], str]

    @staticmethod
    def end_of(name: str) -> str:
        """Return the mark behind a block."""
        return f"<!-- end of {name} -->\n"

    def rewritten(self, text: str, results: Results) -> str:
        """Put the block between its marks."""
        begin, end = f"<!-- {self.name} -->\n", self.end_of(self.name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page has not the marks of the block {self.name!r}, or has them twice")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        return f"{before}{begin}\n{self.make(results).strip(chr(10))}\n\n{end}{after}"


def batchnorm_block(results: Results) -> str:
    """Show the bars."""
    return picture("batchnorm", results, "images") or not_measured("batchnorm")


PAGES: Mapping[Path, Sequence[Block]] = {
    PAGE: (
        Block("records", environment_block),
        Block("goals", goals_block),
        Block("missed", missed_block),
        Block("peers", peers_block),
        Block("sizes", sweep_block("size", "elements", size_label)),
        Block("tensors", sweep_block("tensors", "tensors", tensors_label)),
        Block("models", sweep_block("model", "model", model_label)),
        Block("whole step", whole_block),
        Block("optimizers", optimizers_block),
        Block("threads", sweep_block("threads", "elements, threads", threads_label)),
        Block("subnormal", subnormal_block),
        Block("memory", memory_block),
        Block("batch normalization", batchnorm_block),
        Block("roofline", roofline_block),
        Block("kernels", micro_block),
        Block("counts", counts_block),
    ),
    README: (Block("speed", readme_block),),
}


def rewritten(file: Path, text: str, results: Results) -> str:
    """Return one of the pages with its blocks as the records make them."""
    for block in PAGES[file]:
        text = block.rewritten(text, results)
    return text


def complaints(root: Path, results: Results) -> list[str]:
    """Say what is not as the records make it."""
    found = []
    for file in PAGES:
        text = (root / file).read_text(encoding="utf-8")
        if text != rewritten(file, text, results):
            found.append(f"{file}: not what bench/results holds; run `make bench-report`")
    for drawn in plots.PICTURES:
        file = IMAGES / drawn.file
        if drawn.has(results) and not drawn.is_current(results, root / IMAGES):
            found.append(f"{file}: missing, or drawn from other records; run `make bench-report`")
        elif not drawn.has(results) and (root / file).exists():
            found.append(f"{file}: there are no records that it could show")
    found += complaints_about_records(results)
    return found + complaints_about_causes((root / PAGE).read_text(encoding="utf-8"), results)


def write(root: Path, results: Results) -> None:
    """Draw the pictures and rewrite the pages."""
    for drawn in plots.PICTURES:
        if drawn.has(results):
            drawn.write(results, root / IMAGES)
        else:
            (root / IMAGES / drawn.file).unlink(missing_ok=True)
    for file in PAGES:
        text = (root / file).read_text(encoding="utf-8")
        (root / file).write_text(rewritten(file, text, results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if something is not as it should be"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the records")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder in which README.md and docs/performance.md are")
    options = parser.parse_args(arguments)
    results = load(options.results)
    if not options.check:
        write(options.out, results)
    found = complaints(options.out, results)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())

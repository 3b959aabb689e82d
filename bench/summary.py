"""Write the figures of the last benchmark runs into README.md, between its marks; no figure is typed by hand.

``python bench/summary.py`` rewrites README.md; with ``--check`` it fails if README.md does not show what bench/results
holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"

Row = Mapping[str, Any]
Results = Mapping[str, Any]


def times(row: Row) -> str:
    """Say how many times faster, and with `~` that the interval is wide."""
    if row["value"] is None:
        return "not measured"
    value = row["value"]["value"]
    return f"{value:.{2 if value < 10 else 1}f}x{'~' if row['noisy'] else ''}"


def spread(rows: Iterable[Row], digits: int = 2) -> str:
    """Say the least and the largest value of several rows."""
    values = [row["value"]["value"] for row in rows if row["value"] is not None]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else "not measured"


def by_case(results: Results) -> dict[str, Row]:
    """Return the rows under their names."""
    return {row["case"]: row for row in results["rows"]}


def heading(results: Results, what: str = "float32, against torch {torch} and NumPy {numpy}") -> list[str]:
    """Say where and what was measured, and begin the table."""
    environment = results["environment"]
    return [
        f"Measured on {environment['cpu']} ({environment['isa']}, {environment['threads']} threads), "
        f"{what.format_map(environment)}; `~`: noisy.",
        "",
        "| case | figure | goal |",
        "|---|---|---|",
    ]


def optimizers(results: Results) -> str:
    """Make the Markdown table from the records of one run."""
    rows = by_case(results)

    def of(prefix: str) -> list[Row]:
        return [row for case, row in rows.items() if case.startswith(prefix)]

    small, own = rows["small/Adam/64"], rows["small/Adam/64/seconds"]["value"]["value"]
    lines = [
        *heading(results),
        "| every rule, 16M and 64M elements, 1 and 2 threads: share of the yardstick's speed "
        f"| {spread(of('traffic/'))} | 0.93 |",
    ]
    for name in ("SGD", "Momentum", "Adam", "AMSGrad", "AdaGrad"):
        figures = [times(rows[f"fused/{name}/{size}"]) for size in ("1M", "16M", "64M")]
        lines.append(f"| {name}, 1M / 16M / 64M elements, against torch fused | {', '.join(figures)} | 1.3x, 1x, 1x |")
    unfused = ", ".join(f"{row['case'].split('/')[1]} {times(row)}" for row in of("unfused/"))
    lines += [
        f"| 16M elements, against torch's fastest: {unfused} | {spread(of('unfused/'), 1)}x | 2.5x |",
        f"| 1000 tensors of 1000, Adam, against torch fused | {times(rows['many/Adam/1000x1000'])} | 12x |",
        f"| one tensor of 64, the whole call, Adam, against torch fused "
        f"| {times(small)}, {own * 1e6:.1f} us | 10x, 3 us |",
        f"| Adam with all moments subnormal, time relative to a normal step | "
        f"{times(rows['subnormal/Adam/16M/onepass'])} | 1.1x |",
        f"| Adam's formula in NumPy, 16M elements | {times(rows['numpy/Adam/16M/formula'])} | 10x |",
        f"| `import onepass` beyond NumPy's own | {rows['import']['value']['value'] * 1e3:.0f} ms | 50 ms |",
    ]
    return "\n".join(lines) + "\n"


SHAPES = ("32x64x56x56", "64x256x28x28", "32x64x112x112", "128x512x14x14", "128x2048x7x7")


def batchnorm(results: Results) -> str:
    """Make the Markdown table from the records of one run."""
    rows = by_case(results)

    def all_shapes(group: str) -> str:
        return ", ".join(times(rows[f"{group}/{shape}"]) for shape in SHAPES)

    def with_mean(group: str) -> str:
        return f"{all_shapes(group)}; geometric mean {times(rows[f'{group}/geometric mean'])}"

    lines = [
        f"The five figures of a line are for N, C, H, W = {', '.join(SHAPES)}; the others for {SHAPES[0]}. torch's "
        "backward pass into given arrays makes its own and copies them; the lines without a goal are against its "
        "fastest variant, in a process in which freed memory is used again and costs no page faults.",
        "",
        *heading(results),
        f"| forward, NCHW, against torch | {all_shapes('forward/NCHW')} | 3x |",
        f"| forward, NHWC, against torch channels_last | {all_shapes('forward/NHWC')} | 1.6x |",
        f"| forward, 4096 x 1024, against torch | {times(rows['forward/NC/4096x1024'])} | 1.5x |",
        f"| backward, NCHW, against torch | {with_mean('backward/NCHW')} | 1.8x, mean 4x |",
        f"| the same against torch's fastest, memory recycled | {with_mean('backward-recycled/NCHW')} | |",
        f"| backward, NHWC, against torch channels_last | {with_mean('backward/NHWC')} | 3x |",
        f"| the same against torch's fastest, memory recycled | {with_mean('backward-recycled/NHWC')} | |",
        f"| forward: share of a copy's speed | {times(rows[f'copy/{SHAPES[0]}']).replace('x', '')} | 0.65 |",
        f"| forward with residual and ReLU, against three passes | {times(rows[f'fused/{SHAPES[0]}'])} | 1.8x |",
        f"| forward without `out=`, time relative to with it | {times(rows[f'without-out/{SHAPES[0]}'])} | 1.15x |",
        f"| forward, the formula in NumPy | {times(rows[f'numpy/{SHAPES[0]}/formula'])} | 15x |",
    ]
    return "\n".join(lines) + "\n"


ISAS = {"AVX-512": "avx512", "AVX2": "avx2"}


def whole_step(results: Results) -> str:
    """Make the Markdown table from the records of one run."""
    rows = by_case(results)

    def share(row: Row) -> str:
        return times(row).replace("x", "")

    def of(prefix: str, suffix: str) -> list[Row]:
        return [row for case, row in rows.items() if case.startswith(prefix) and case.endswith(suffix)]

    rules = "; ".join(f"{name} {spread(of('rules/', f'/{isa}'))}" for name, isa in ISAS.items())
    stochastic = ", ".join(times(row) for row in of("stochastic/", ""))
    all_bfloat16 = rows["storage/Adam/bfloat16-bfloat16-bfloat16"]
    lines = [
        *heading(results, "16M elements, against torch {torch}"),
        "| clip, unscale, AdamW, average, bfloat16 copy, zeroed gradients, float32: against torch's six calls "
        f"| {times(rows['whole/AdamW/torch'])} | 1.6x |",
        f"| the same: share of the yardstick's speed | {share(rows['whole/AdamW/traffic'])} | 0.9 |",
        f"| every rule, bfloat16 parameters and gradients: share of the yardstick's speed | {rules} | 0.9 |",
        f"| Adam, everything in bfloat16, against everything in float32 | {times(all_bfloat16)} | 1.7x |",
        "| Adam, parameters and gradients in bfloat16, against torch fused "
        f"| {times(rows['torch/Adam/bfloat16'])} | 1.8x |",
        "| Adam, stochastic rounding of bfloat16 parameters, of the states too: time relative to rounding to nearest "
        f"| {stochastic} | 1.3x |",
        "| Adam, bfloat16 parameters with a split master, against float32 parameters and a bfloat16 copy "
        f"| {times(rows['split/Adam'])} | 1.1x |",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Table:
    """One table: the name of its results, its marks in README.md, and how it is made."""

    name: str
    mark: str
    make: Callable[[Results], str]

    def block(self, folder: Path) -> str:
        """Return the table, or a line that says that nothing was measured yet."""
        results = folder / f"{self.name}.json"
        if not results.exists():
            return f"Not measured yet; `python bench/peers/{self.name}.py` does it.\n"
        return self.make(json.loads(results.read_text(encoding="utf-8")))

    def rewritten(self, text: str, block: str) -> str:
        """Put the block between the marks of a page."""
        begin, end = f"<!-- {self.mark} -->\n", f"<!-- end of {self.mark} -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        return f"{before}{begin}\n{block}\n{end}{after}"


TABLES = (
    Table("optimizers", "speed table", optimizers),
    Table("batchnorm", "batch normalization table", batchnorm),
    Table("whole_step", "whole step table", whole_step),
)


def page(text: str, folder: Path = RESULTS) -> str:
    """Return the page with all tables as the results in `folder` make them."""
    for table in TABLES:
        text = table.rewritten(text, table.block(folder))
    return text


def main() -> int:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if README.md is not up to date"
    )
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = page(text)
    if options.check:
        if text != wanted:
            print("README.md does not show the figures of bench/results; run python bench/summary.py", file=sys.stderr)
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the figures of the last benchmark run into README.md, between its two marks; no figure is typed by hand.

``python bench/summary.py`` rewrites README.md; with ``--check`` it fails if README.md does not show what bench/results
holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "optimizers.json"
BEGIN, END = "<!-- speed table -->\n", "<!-- end of speed table -->\n"

Row = Mapping[str, Any]


def times(row: Row) -> str:
    """Say how many times faster, and with `~` that the interval is wide."""
    value = row["value"]["value"]
    return f"{value:.{2 if value < 10 else 1}f}x{'~' if row['noisy'] else ''}"


def spread(rows: Iterable[Row], digits: int = 2) -> str:
    """Say the least and the largest value of several rows."""
    values = [row["value"]["value"] for row in rows]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def table(results: Mapping[str, Any]) -> str:
    """Make the Markdown table from the records of one run."""
    rows = {row["case"]: row for row in results["rows"]}

    def of(prefix: str) -> list[Row]:
        return [row for case, row in rows.items() if case.startswith(prefix)]

    environment = results["environment"]
    small, own = rows["small/Adam/64"], rows["small/Adam/64/seconds"]["value"]["value"]
    lines = [
        f"Measured on {environment['cpu']} ({environment['isa']}, {environment['threads']} threads), float32, against "
        f"torch {environment['torch']} and NumPy {environment['numpy']}; `~`: noisy.",
        "",
        "| case | figure | goal |",
        "|---|---|---|",
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


def rewritten(text: str, block: str) -> str:
    """Put the block between the marks of a page."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> int:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if README.md is not up to date"
    )
    options = parser.parse_args()
    text = README.read_text()
    wanted = rewritten(text, table(json.loads(RESULTS.read_text())))
    if options.check:
        if text != wanted:
            print("README.md does not show the figures of bench/results; run python bench/summary.py", file=sys.stderr)
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())

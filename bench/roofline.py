"""What this machine can do, and where each rule stands on that: the roofline, as JSON and Markdown.

The measuring is done in C++ (``bench/micro/roofline.cpp``, which says how); ``make bench-roofline`` builds and runs all
of it. Here are the statistics and the files. ``--quick`` takes small arrays for large ones: its figures mean nothing.

Rows
----
bandwidth : ``bandwidth/L2/1``
    The triad, ``a += s * b``, at a level of the memory, with so many threads: over the level's middle working set, as
    the rules run; the note names it. `bytes` are 12 for each element, 8 read and 4 written: like a rule, the triad
    writes what it has read, so nothing is moved that is not counted.
triad : ``triad/64K/1``
    Each working set by itself.
peak : ``peak/float32/avx512/1``, ``peak/divide/avx512/1``
    Multiplications and additions, never fused; divisions and roots. What limits Adam in a cache is the latter.
rule : ``rule/adam/L2/1``
    A rule's kernel over float32 arrays that fill a level's middle working set. `bytes` are read and written in a step.

``extra`` has ``bytes_per_second`` or ``flops_per_second``, and ``low`` and ``high``, the quartiles of that figure; of
what is in memory, ``working_set``, too, in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import method
from method import Plan, Row, Samples

OURS = "onepass"
PROGRAM = method.ROOT / "build" / "bench" / "bench" / "micro" / "roofline"


def make_row(measured: Mapping[str, Any], samples_of: Mapping[str, Samples]) -> Row:
    """Make a row of what the program says of a case; `samples_of` has the seconds of all cases."""
    samples = samples_of[measured["case"]]
    row = Row(
        measured["case"],
        measured["kind"],
        measured["threads"],
        measured["elements"],
        OURS,
        "",
        measure="ours",
        bytes=measured["bytes"] or None,
        buffers="warm",
        note=measured["note"],
    )
    row.take({OURS: samples}, OURS, None)
    row.value = row.ours_estimate
    work = measured["operations"] or measured["bytes"]
    slow, middle, fast = (work / float(seconds) for seconds in np.percentile(samples, (75, 50, 25)))
    row.extra = {"low": slow, "high": fast}
    if measured["operations"]:
        row.extra["flops_per_second"] = middle
    else:
        row.extra["bytes_per_second"] = middle
        row.extra["working_set"] = measured["working_set"]
    if measured["kind"] == "rule":
        row.extra["parameters_per_second"] = middle * measured["elements"] / measured["bytes"]
    if measured["yardstick"]:
        _, _, *place = measured["case"].split("/")
        yardstick = samples_of["/".join(("rule", measured["yardstick"], *place))]
        row.traffic_share = method.ratio(yardstick, samples)
    return row


def run(program: Path, quick: bool) -> dict[str, Any]:
    """Run the program, and return what it printed."""
    if not program.exists():
        sys.exit(f"{program} does not exist: `make bench-roofline` builds it")
    command = [str(program), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{program} failed with status {done.returncode}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    out = method.ROOT / "bench" / "results" / "roofline.json"
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="for the results; .md is written beside")
    parser.add_argument("--program", type=Path, default=PROGRAM, metavar="FILE", help="what was built of roofline.cpp")
    parser.add_argument("--quick", action="store_true", help="small arrays, few samples: only shows that it runs")
    options = parser.parse_args(arguments)

    printed = run(options.program, options.quick)
    samples_of = {measured["case"]: np.array(measured["samples"]) for measured in printed["rows"]}
    rounds = max(samples.size for samples in samples_of.values())
    environment = {
        **method.environment(Plan(0.0, rounds, rounds, 0.0002 if options.quick else 0.005, 0.0)),
        "isa": printed["isa"],
        "threads": printed["cpus"],
        "levels": printed["caches"],
        "quick": options.quick,
    }
    rows = [make_row(measured, samples_of) for measured in printed["rows"]]
    method.print_table(rows, f"roofline at {environment['commit'][:12]}, {environment['cpu']}, {environment['isa']}")
    method.write_results(rows, environment, options.out.parent, options.out.stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmark scripts share: cases, the command line, the thread counts, and torch.

A script lists its cases and calls :func:`main`. A case that computes something wrong becomes a row that says so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import track

import method
import onepass
from method import Contender, Plan, Row, Samples

THREADS = min(2, len(method.usable_cpus()))
OURS = "onepass"
EVERYBODY = re.compile("")
QUICK = Plan(0.02, 3, 5, 0.0005, 0.001)

Step: TypeAlias = Callable[[], object]
Steps: TypeAlias = Step | Sequence[Step]  # several work on sets of arrays of their own, in turn


class CheckError(Exception):
    """A contender computed something else than it should; its time means nothing."""


@dataclass(frozen=True)
class Bench:
    """How long to measure, and whom. A quick one has tiny sizes, and its figures are not held against goals."""

    plan: Plan
    quick: bool = False
    peers: re.Pattern[str] = EVERYBODY


@dataclass(frozen=True)
class Case:
    """One or more rows that are measured together."""

    name: str
    kind: str
    run: Callable[[Bench, Case], list[Row]]
    threads: int = THREADS


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let ours use `count` threads."""
    onepass.set_num_threads(count)
    try:
        yield
    finally:
        onepass.set_num_threads(None)


def load_torch(threads: int) -> tuple[Any, str]:
    """Return torch, set to `threads`, or None and why not. Cases that do not call this never meet torch's threads."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        return None, f"no peer: {type(error).__name__}: {error}"
    torch.set_num_threads(threads)
    return torch, ""


def compare(
    plan: Plan,
    row: Row,
    ours: Steps,
    peers: Mapping[str, Steps],
    *,
    against: str | None = None,
    others: Mapping[str, Steps] | None = None,
    prepare: Step | None = None,
) -> dict[str, Samples]:
    """Time ours, the peers and the others in turns; enter into `row` the comparison with one of the peers.

    Without `against` that is the fastest. Without peers ours is timed without a comparison. `prepare` runs before each
    call of each of them, and is not timed; it is for those that work on one set of arrays.
    """
    steps = {row.ours: ours, **peers, **(others or {})}
    contenders = [
        Contender(name, step, prepare) if callable(step) else Contender.over_sets(name, step)
        for name, step in steps.items()
    ]
    samples = method.interleave(contenders, plan)
    peer = against if against in peers else min(peers, key=lambda name: float(np.median(samples[name])), default=None)
    row.take(samples, row.ours, peer)
    if peer is not None:
        row.peer = peer
        row.value = method.ratio(samples[peer], samples[row.ours])
    return samples


def times(row: Row, names: Iterable[str]) -> str:
    """Say what several contenders of a row took."""
    return ", ".join(f"{name} {method.format_seconds(row.all_seconds[name])}" for name in names)


# For the C library: huge pages, as NumPy asks for, and nothing is given back to the system. Who makes temporary arrays
# would otherwise spend more time in page faults than on its work (torch's RMSprop over 16M elements twice as much).
TUNABLES = "GLIBC_TUNABLES"
KEPT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def keep_memory() -> None:
    """Begin again as a process that keeps the memory which it frees, where the C library can be told to."""
    if platform.libc_ver()[0] == "glibc" and TUNABLES not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, TUNABLES: KEPT})


@contextmanager
def environment_variables(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or take them away where they are None, for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


def run_case(bench: Bench, case: Case) -> list[Row]:
    """Return the case's rows, or one that says which check failed."""
    try:
        with thread_count(case.threads):
            return case.run(bench, case)
    except CheckError as error:
        return [Row(case.name, case.kind, case.threads, 0, OURS, "", note=str(error), failed=True)]


def parse_arguments(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; bench/results, or build/bench-results if only a part is measured, or quickly",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: only shows that it runs")
    parser.add_argument("--filter", type=re.compile, default=EVERYBODY, help="only cases in which REGEX is found")
    parser.add_argument(
        "--peers",
        type=re.compile,
        default=EVERYBODY,
        help="where a case has a row for each peer, only these",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(arguments)
    if options.out is None:
        is_all = not (options.quick or options.filter.pattern or options.peers.pattern)
        options.out = method.ROOT / ("bench/results" if is_all else "build/bench-results")
    return options


def main(
    name: str,
    document: str | None,
    all_cases: Sequence[Case],
    arguments: Sequence[str] | None,
    conclude: Callable[[Sequence[Row]], list[Row]] = lambda rows: [],
    keeps_memory: bool = True,
) -> int:
    """Run the chosen cases; 1 if a check failed or nothing was chosen. A missed goal is a row, not an error.

    `conclude` makes rows of what was measured: figures over several cases. `keeps_memory`: freed memory is used again
    by everybody, in the whole process.
    """
    options = parse_arguments((document or "").partition("\n")[0], arguments)
    if keeps_memory and arguments is None and not options.list:
        keep_memory()
    cases = [case for case in all_cases if options.filter.search(case.name)]
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if not cases:
        print("--filter: no case is left", file=sys.stderr)
        return 1
    bench = Bench(QUICK if options.quick else Plan(), options.quick, options.peers)
    environment = {**method.environment(bench.plan), "malloc": os.environ.get(TUNABLES, ""), "quick": options.quick}
    rows: list[Row] = []
    for case in track(cases, name, console=Console(stderr=True)):
        rows += run_case(bench, case)
        for row in rows:
            row.goal = None if bench.quick else row.goal
        method.write_results(rows, {**environment, "complete": False}, options.out, name)  # if it should be stopped
    concluded = conclude(rows)
    for row in concluded:
        row.goal = None if bench.quick else row.goal
    rows += concluded
    environment["complete"] = True
    method.print_table(rows, f"{name} at {environment['commit'][:12]}, {environment['cpu']}, {environment['isa']}")
    method.write_results(rows, environment, options.out, name)
    return int(any(row.failed for row in rows))

"""How the benchmarks measure and report; no benchmark is in here.

Contenders run interleaved, A B A B, in one process, so that what disturbs the machine disturbs them alike. Results are
medians of the ratios of single rounds, with a bootstrap interval over the rounds. Every sample begins after a pause:
worker threads that another contender left spinning have gone to sleep by then (torch's burn a core for 4 to 8 ms after
their last region).
A contender that is quicker than one sample is called several times for it, after as many calls that are not timed, so
that everybody is measured with its own threads warm, and with its own data warm too if it works on the same arrays at
each call. (One call is not enough: a step over 1000 tensors, 16 MB, takes 1.5 ms after the pause, and reaches its 0.47
ms in the tenth call, because others have taken the cache; a peer that is slow has its arrays back before it is timed.)
Those figures flatter where the arrays fit into a cache: in training, other work has taken it since the last
step. So a contender may have several sets of arrays, of which each call takes the next. Together they are larger than
the last-level cache (:func:`sets_for`), and everybody walks all of them, in the same order, in each sample. A row says
which of the two it is (`buffers`).
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import onepass

ROOT = Path(__file__).resolve().parents[1]

CACHE_LINE = 64
UNKNOWN_CACHE = 32 << 20  # where the system does not say how large its last-level cache is
ROTATED_OVER = 2  # times the last-level cache: between two visits of an array it has been replaced, whole
LEAST_ROTATED = 64 << 20
MOST_SETS = 512
WARM, ROTATED = "warm", "rotated"
PEERS = ("torch", "jax", "jaxlib", "optax", "deepspeed")
NOISY = 0.15  # of the value: an interval wider than this says that the machine was not quiet

Clock: TypeAlias = Callable[[], float]
Samples: TypeAlias = "npt.NDArray[np.float64]"
Floats: TypeAlias = "npt.NDArray[np.float32]"


# --- Memory -----------------------------------------------------------------------------------------------------------


def aligned(count: int) -> Floats:
    """Return `count` float32 zeros that begin at a cache line; every page of them has been touched."""
    room = CACHE_LINE // 4
    raw = np.empty(count + room, np.float32)
    start = -raw.ctypes.data % CACHE_LINE // 4
    result = raw[start : start + count]
    result.fill(0.0)
    return result


def fill_with(array: Floats, block: Floats) -> None:
    """Repeat `block` until `array` is full: random numbers for large arrays at the price of few."""
    for start in range(0, array.size, block.size):
        part = array[start : start + block.size]
        part[:] = block[: part.size]


@dataclass(frozen=True)
class Cache:
    """A cache of this machine, and the CPUs that share it, as Linux lists them."""

    level: int
    kind: str
    bytes: int
    cpus: str


def caches() -> list[Cache]:
    """Return the caches that the CPUs of this process use; none where the system does not say."""
    found = set()
    for cpu in usable_cpus():
        for folder in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, kind, size, cpus = (
                    (folder / name).read_text(encoding="ascii").strip()
                    for name in ("level", "type", "size", "shared_cpu_list")
                )
            except OSError:
                continue
            found.add(Cache(int(level), kind, int(size.removesuffix("K")) << 10, cpus))
    return sorted(found, key=lambda cache: (cache.level, cache.kind, cache.cpus))


def cache_sizes() -> dict[str, int]:
    """Return the bytes of one cache of each level that holds data: L1d, L2, and so on."""
    return {
        f"L{cache.level}{'d' if cache.kind == 'Data' else ''}": cache.bytes
        for cache in caches()
        if cache.kind != "Instruction"
    }


def last_level_cache() -> int:
    """Return the bytes of the last-level caches of this process's CPUs, all of them together."""
    known = [cache for cache in caches() if cache.kind != "Instruction"]
    last = max((cache.level for cache in known), default=0)
    return sum(cache.bytes for cache in known if cache.level == last) or UNKNOWN_CACHE


def rotated_bytes() -> int:
    """Return how many bytes of arrays no cache keeps from one walk over them to the next."""
    return max(LEAST_ROTATED, ROTATED_OVER * last_level_cache())


def sets_for(bytes_each: int) -> int | None:
    """Return how many sets of arrays, of so many bytes each, no cache keeps: 1 if one alone is large enough.

    None if that were more than `MOST_SETS`: arrays so small are measured warm.
    """
    sets = -(-rotated_bytes() // bytes_each)
    return sets if sets <= MOST_SETS else None


def buffers(bytes_together: int) -> str:
    """Say what a row must about arrays of so many bytes, all of a contender's sets together."""
    return ROTATED if bytes_together >= rotated_bytes() else WARM


# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """What is timed: `run`, after `prepare` (never timed) if the work changes its own conditions.

    `others` do the same work on sets of arrays of their own: each call takes the next of `runs`. `rewind` is never
    timed either: once before each sample, where work can be repeated often, but not for ever.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    others: Sequence[Callable[[], object]] = ()
    rewind: Callable[[], object] | None = None

    @classmethod
    def over_sets(
        cls, name: str, runs: Sequence[Callable[[], object]], rewind: Callable[[], object] | None = None
    ) -> Contender:
        """Make a contender with one function for each set of arrays."""
        return cls(name, runs[0], others=runs[1:], rewind=rewind)

    @property
    def runs(self) -> Sequence[Callable[[], object]]:
        """One function for each set of arrays."""
        return [self.run, *self.others]


@dataclass(frozen=True)
class Plan:
    """How long one case is measured, in rounds of one sample for each contender.

    Attributes
    ----------
    seconds : float
        Rounds begin until so much time has passed.
    min_rounds, max_rounds : int
        But no fewer and no more than these.
    sample_seconds : float
        A contender without `prepare` is called as often as this takes for one sample, and walks all of its sets of
        arrays at least once.
    pause : float
        Seconds slept before each sample; longer than other people's threads spin.
    """

    seconds: float = 2.0
    min_rounds: int = 11
    max_rounds: int = 101
    sample_seconds: float = 0.01
    pause: float = 0.02


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample(contender: Contender, walks: int, clock: Clock) -> float:
    """Seconds of one call, as the mean of `walks` calls in a row, or as many walks over all sets of arrays.

    Whole walks, so that nobody finds in a cache what the contender before has left there: it left the last sets.
    """
    runs = contender.runs
    if contender.rewind is not None:
        contender.rewind()
        for run in runs:  # or some would find in a cache what was just written
            run()
    if contender.prepare is not None:
        contender.prepare()
    elif len(runs) > 1:
        runs[-1]()
    elif walks > 1:
        for _ in itertools.repeat(None, walks):
            runs[0]()
    start = clock()
    for run in itertools.chain.from_iterable(itertools.repeat(runs, walks)):
        run()
    return (clock() - start) / (walks * len(runs))


def _walks_for(contender: Contender, seconds: float, clock: Clock) -> int:
    """Warm up, and find how many calls, or walks over all sets, make one sample of at least `seconds`."""
    _sample(contender, 1, clock)
    if contender.prepare is not None:
        return 1
    walks, sets = 1, len(contender.runs)
    while True:
        once = _sample(contender, walks, clock) * sets
        if once * walks >= seconds:
            return walks
        walks = max(2 * walks, min(16 * walks, int(seconds / max(once, 1e-9)) + 1))


def interleave(
    contenders: Sequence[Contender],
    plan: Plan,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Samples]:
    """Time the contenders in turn, round after round.

    Returns
    -------
    dict
        For each name the seconds of one call, one entry for each round; entries of one round belong together.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders: names repeat: {', '.join(names)}")
    sets = {contender.name: len(contender.runs) for contender in contenders}
    if len(set(sets.values())) > 1:
        raise ValueError(f"contenders: numbers of sets of arrays differ: {sets}")
    if any(contender.prepare is not None and len(contender.runs) > 1 for contender in contenders):
        raise ValueError("contenders: what is prepared is warm; it cannot have several sets of arrays")
    taken: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        walks = [_walks_for(contender, plan.sample_seconds, clock) for contender in contenders]
        start = clock()
        for done in range(plan.max_rounds):
            if done >= plan.min_rounds and clock() - start >= plan.seconds:
                break
            for contender, count in zip(contenders, walks, strict=True):
                sleep(plan.pause)
                taken[contender.name].append(_sample(contender, count, clock))
    return {name: np.array(seconds) for name, seconds in taken.items()}


# --- Statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is too wide for the figure to be quoted."""
        return self.high - self.low > NOISY * abs(self.value)


def median(samples: Samples, resamples: int = 2000, seed: int = 20240101) -> Estimate:
    """Median over rounds, with the percentile interval of the bootstrap: of the medians of rounds drawn anew."""
    drawn = np.random.default_rng(seed).integers(samples.size, size=(resamples, samples.size))
    low, high = np.percentile(np.median(samples[drawn], axis=1), (2.5, 97.5))
    return Estimate(float(np.median(samples)), float(low), float(high))


def ratio(over: Samples, under: Samples) -> Estimate:
    """Median of the ratios of each round: what disturbs a round disturbs both sides of its ratio."""
    return median(over / under)


def difference(of: Samples, less: Samples) -> Estimate:
    """Median of the differences of each round."""
    return median(of - less)


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Take the geometric mean of ratios of different cases, whose errors have nothing to do with each other."""
    value, low, high = (np.log([getattr(estimate, end) for estimate in estimates]) for end in ("value", "low", "high"))
    below, above = (np.sqrt(np.sum(distance**2)) / value.size for distance in (value - low, high - value))
    mean = value.mean()
    return Estimate(*(float(np.exp(end)) for end in (mean, mean - below, mean + above)))


# --- Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What a row's value shall be at least or at most."""

    sense: Literal[">=", "<="]
    bound: float

    def met(self, estimate: Estimate) -> bool | None:
        """Judge a figure by its whole interval: None if the bound lies within."""
        sign = 1.0 if self.sense == ">=" else -1.0
        ends = (sign * estimate.low, sign * estimate.high)
        bound = sign * self.bound
        if min(ends) >= bound:
            return True
        return False if max(ends) < bound else None


@dataclass
class Row:
    """One line of the table. Seconds are medians of one call.

    `measure` says what `value` is: ``"peer / ours"`` (how many times faster), ``"ours / peer"`` (a slowdown),
    ``"ours - peer"`` or ``"ours"`` (seconds). Without `value` the row was not measured, and `note` says why.
    `buffers` is ``"warm"`` (the same arrays at each call) or ``"rotated"`` (more than the last-level cache holds).
    `extra` has figures that only rows of one kind have, `samples` the seconds of ours and the peer in each round.
    """

    case: str
    kind: str
    threads: int
    elements: int
    ours: str
    peer: str
    goal: Goal | None = None
    measure: str = "peer / ours"
    ours_seconds: float | None = None
    peer_seconds: float | None = None
    value: Estimate | None = None
    traffic_share: Estimate | None = None
    bytes: int | None = None
    ours_estimate: Estimate | None = None
    rounds: int = 0
    note: str = ""
    failed: bool = False
    buffers: str = ""
    tensors: int = 1
    all_seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        """Whether one of the row's figures has a wide interval."""
        return any(estimate is not None and estimate.noisy for estimate in (self.value, self.traffic_share))

    @property
    def bytes_per_second(self) -> float | None:
        """What one call must read and write at the least, by the time of ours."""
        return self.bytes / self.ours_seconds if self.bytes and self.ours_seconds else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none, nothing was measured, or it is open."""
        if self.failed:
            return False
        return None if self.goal is None or self.value is None else self.goal.met(self.value)

    def take(self, samples: Mapping[str, Samples], ours: str, peer: str | None) -> None:
        """Note the medians of all contenders; `value` is the caller's."""
        self.all_seconds = {name: float(np.median(seconds)) for name, seconds in samples.items()}
        self.ours_seconds = self.all_seconds[ours]
        self.ours_estimate = median(samples[ours])
        self.peer_seconds = None if peer is None else self.all_seconds[peer]
        self.rounds = samples[ours].size
        kept = [ours] if peer is None else [ours, peer]
        self.samples = {name: [float(f"{seconds:.4g}") for seconds in samples[name]] for name in kept}

    def record(self) -> dict[str, Any]:
        """Return the row for JSON, with what is derived from its fields."""
        return {**asdict(self), "bytes_per_second": self.bytes_per_second, "met": self.met, "noisy": self.noisy}


HEADER = ("case", "threads", "ours", "peer", "ratio", "95 %", "GB/s", "of traffic", "goal", "met", "note")


def format_seconds(seconds: float | None) -> str:
    """Return three digits and a unit, or nothing."""
    if seconds is None:
        return ""
    factor, unit = (1.0, "s") if abs(seconds) >= 1.0 else (1e3, "ms") if abs(seconds) >= 1e-3 else (1e6, "us")
    return f"{seconds * factor:.3g} {unit}"


def _in_unit(row: Row, value: float) -> str:
    return f"{value:.2f}x" if "/" in row.measure else format_seconds(value)


def _met(row: Row) -> str:
    if row.failed:
        return "FAILED"
    if row.goal is None or row.value is None:
        return ""
    return {True: "yes", False: "NO", None: "open"}[row.met]


def cells(row: Row) -> tuple[str, ...]:
    """Return one cell for each entry of the header."""
    value, share, speed = row.value, row.traffic_share, row.bytes_per_second
    return (
        row.case,
        str(row.threads),
        format_seconds(row.ours_seconds),
        f"{row.peer} {format_seconds(row.peer_seconds)}".strip(),
        "" if value is None else _in_unit(row, value.value),
        "" if value is None else f"{_in_unit(row, value.low)} .. {_in_unit(row, value.high)}",
        "" if speed is None else f"{speed / 1e9:.1f}",
        "" if share is None else f"{share.value:.3f}",
        "" if row.goal is None else f"{row.goal.sense} {_in_unit(row, row.goal.bound)}",
        _met(row),
        "; ".join(filter(None, ("noisy" if row.noisy else "", row.note))),
    )


def rich_table(rows: Iterable[Row], title: str) -> Table:
    """Lay the table out for a terminal."""
    table = Table(title=title)
    for name in HEADER:
        table.add_column(name, overflow="fold", no_wrap=name == "case", max_width=40 if name == "note" else None)
    for row in rows:
        style = "red" if row.met is False else "yellow" if row.noisy or row.value is None else ""
        table.add_row(*cells(row), style=style)
    return table


def markdown_table(rows: Iterable[Row]) -> str:
    """Write the same table in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(cells, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the table, as wide as it needs to be where standard output is no terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=210)
    console.print(rich_table(rows, title))


def write_results(rows: Sequence[Row], environment: Mapping[str, Any], folder: Path, name: str) -> None:
    """Write ``name.json`` and ``name.md`` into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    # A line for each row, of which there are hundreds.
    lines = ",\n".join(json.dumps(row.record(), allow_nan=False) for row in rows)
    text = f'{{"environment": {json.dumps(dict(environment), indent=1, allow_nan=False)},\n"rows": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    facts = "\n".join(f"* {key}: {value}" for key, value in environment.items())
    (folder / f"{name}.md").write_text(f"# {name}\n\n{markdown_table(rows)}\n\n{facts}\n", encoding="utf-8")


# --- Where it was measured --------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("-dirty" if _git("status", "--porcelain", "--", ".", ":!bench/results") else "")


def usable_cpus() -> list[int]:
    """Return the CPUs that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_counts() -> dict[str, int]:
    """Count cores, what they show as CPUs, and those that this process may use. Cores are 0 where nobody says."""
    cores = set()
    for siblings in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        cores.add(siblings.read_text(encoding="ascii").strip())
    return {"physical": len(cores), "logical": os.cpu_count() or 1, "usable": len(usable_cpus())}


def _huge_pages() -> str:
    """Say when the system gives huge pages: always, to those that ask for them (madvise), or never."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return modes.partition("[")[2].partition("]")[0]


def _compiler() -> str:
    """Say which C++ compiler peers find that compile their kernels here."""
    try:
        done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return done.stdout.partition("\n")[0]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(plan: Plan) -> dict[str, Any]:
    """Collect what a reader needs to judge the figures and to repeat them. Threads of a row are in the row."""
    return {
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpus": _cpu_counts(),
        "caches": cache_sizes(),
        "last_level_cache": last_level_cache(),
        "threads": onepass.get_num_threads(),
        "isa": onepass.isa(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{package: _version(package) for package in PEERS},
        "compiler": _compiler(),
        "onepass": onepass.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "C library": " ".join(platform.libc_ver()),
        "huge pages": _huge_pages(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plan": asdict(plan),
    }

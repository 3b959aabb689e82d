"""Batch normalization side by side with torch, a copy and NumPy: one table, printed, JSON and Markdown.

``python bench/peers/batchnorm.py`` takes some minutes on two quiet cores and 2 GB of memory. ``--quick`` only shows
that everything runs: its figures mean nothing, and no goal is judged by them.

Fair play
---------
* Everybody reads the very same arrays and writes into the very same output, cache-line aligned and with every page
  touched. All of it comes from NumPy, which asks for huge pages.
* Everybody uses two threads, torch and the copy too; the NumPy formula cannot. For NHWC torch gets the same memory as
  channels_last, the layout that it is fast in.
* torch's forward pass writes into arrays that are given (``out=``). So does the variant of its backward pass that the
  goals are held against (``torch out=``), but it makes arrays of its own first and then copies; torch has no other.
  Where the C library hands such memory back after each call, the next one pays with page faults, often more than for
  the arithmetic. (glibc learns to keep arrays of up to 32 MB; the note counts the page faults that were left.) The
  variant that returns new arrays (``torch returning``) is timed beside it, and the note has both times.
* The rows ``backward-recycled`` show torch at its best, in a process of its own: memory that is freed is kept and used
  again, without page faults, and torch asks for huge pages (``RECYCLED``). They compare with the faster variant. They
  have no goal; they are there for whoever runs torch in that way.
* A forward pass is all of it: output, statistics of the batch, running statistics. Before the timing each contender
  must arrive at the same arrays as ours, where NaN stood before: no element may be off by more than 3e-4 of itself and
  of the array's root mean square together. After it, everything must be finite. Gradients go along with the inputs, so
  that their sums do not cancel: of such a sum torch's channels_last kernel has only three digits left.
"""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import method
import suite
from method import Contender, Floats, Goal, Row
from onepass import functional
from suite import OURS, Bench, Case, CheckError, Step, load_torch

SHAPES = ((32, 64, 56, 56), (64, 256, 28, 28), (32, 64, 112, 112), (128, 512, 14, 14), (128, 2048, 7, 7))
IN_CACHE = SHAPES[0]  # a channel has 392 KiB
LAYOUTS = ("NCHW", "NHWC")
EPS = 1e-5
MOMENTUM = 0.1
TOLERANCE = 3e-4

TORCH = "torch"
TORCH_OUT, TORCH_RETURNING = "torch out=", "torch returning"
COMPILED = "torch compiled"

# For a process that keeps the memory that it frees: nothing from mmap, no trimming (glibc); huge pages (torch).
RECYCLED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "THP_MEM_ALLOC_ENABLE": "1"}

NOT_GLIBC = "not measured: only glibc can be told to keep memory"

Shape: TypeAlias = tuple[int, ...]


# --- Arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What contenders share: inputs, parameters, running statistics, and the one output that they all write."""

    channel_axis: int
    x: Floats
    dy: Floats
    out: Floats
    weight: Floats
    bias: Floats
    running_mean: Floats
    running_var: Floats

    @property
    def channels_last(self) -> bool:
        """Whether there are axes between the batch's and the channels'."""
        return self.channel_axis != 1

    def outcome(self, step: Step) -> list[Floats]:
        """Take a step from fresh statistics and a spoiled output: copies of the arrays that it made."""
        self.out.fill(np.nan)
        self.running_mean.fill(0.0)
        self.running_var.fill(1.0)
        returned: Any = step()
        arrays = returned[:3]
        if not isinstance(arrays[0], np.ndarray):
            like_x, *per_channel = (tensor.numpy() for tensor in arrays)
            arrays = (np.moveaxis(like_x, 1, self.channel_axis), *per_channel)
        return [np.array(array, np.float32) for array in (*arrays, self.running_mean, self.running_var)]

    def require_finite(self) -> None:
        """Raise if a NaN or an infinity is among what steps wrote."""
        if not all(np.isfinite(array).all() for array in (self.out, self.running_mean, self.running_var)):
            raise CheckError("an output or a running statistic is not finite after the timed calls")


def shape_of(bench: Bench, shape: Shape) -> Shape:
    """Return the shape, with fewer and smaller batches for a quick look."""
    return (max(shape[0] // 16, 2), max(shape[1] // 16, 4), *shape[2:]) if bench.quick else shape


def _array(shape: Shape, rng: np.random.Generator | None = None, deviation: float = 1.0, mean: float = 0.0) -> Floats:
    """Make zeros, or numbers drawn at random."""
    array = method.aligned(math.prod(shape)).reshape(shape)
    if rng is not None:
        rng.standard_normal(dtype=np.float32, out=array)
        array *= np.float32(deviation)
        array += np.float32(mean)
    return array


def make_batch(bench: Bench, shape: Shape, layout: str = "NCHW", backward: bool = False) -> Batch:
    """Make the arrays for a shape that is given as (N, C, ...). `dy` is empty if there is no backward pass."""
    n, channels, *rest = shape_of(bench, shape)
    in_memory = (n, *rest, channels) if layout == "NHWC" else (n, channels, *rest)
    rng = np.random.default_rng(7)
    x = _array(in_memory, rng, 2.0, 1.0)
    dy = _array(in_memory if backward else (0,), rng, 1.0, 0.5)
    if backward:
        dy += np.float32(0.25) * x
    return Batch(
        -1 if layout == "NHWC" else 1,
        x=x,
        dy=dy,
        out=_array(in_memory),
        weight=_array((channels,), rng, 0.1, 1.0),
        bias=_array((channels,), rng),
        running_mean=_array((channels,)),
        running_var=_array((channels,)),
    )


# --- Contenders -------------------------------------------------------------------------------------------------------


def our_forward(batch: Batch, **options: Any) -> Step:
    """Make our forward pass; without `out` among the options the output is a new array."""
    statistics = (batch.running_mean, batch.running_var)
    return functools.partial(
        functional.batch_norm,
        *(batch.x, batch.weight, batch.bias, *statistics),
        **{"channel_axis": batch.channel_axis, "momentum": MOMENTUM, "eps": EPS, **options},
    )


def our_backward(batch: Batch) -> Step:
    """Make our backward pass."""
    _, mean, invstd = functional.batch_norm(batch.x, eps=EPS, channel_axis=batch.channel_axis, out=batch.out)
    return functools.partial(
        functional.batch_norm_backward,
        *(batch.dy, batch.x, mean, invstd, batch.weight, batch.bias),
        channel_axis=batch.channel_axis,
        out=batch.out,
    )


def as_tensor(torch: Any, batch: Batch, array: Floats) -> Any:
    """Return torch's view of an array like `x`: (N, C, ...), and channels_last if it is so in memory."""
    tensor = torch.from_numpy(array)
    if not batch.channels_last:
        return tensor
    tensor = tensor.movedim(batch.channel_axis, 1)
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise CheckError("torch's tensor is not channels_last")
    return tensor


def torch_forward(torch: Any, batch: Batch) -> Step:
    """Make torch's forward pass, with all of its outputs preallocated."""
    x, out = (as_tensor(torch, batch, array) for array in (batch.x, batch.out))
    channels = map(torch.from_numpy, (batch.weight, batch.bias, batch.running_mean, batch.running_var))
    saved = [torch.from_numpy(np.zeros_like(batch.weight)) for _ in ("mean", "invstd")]
    return functools.partial(torch.native_batch_norm, x, *channels, True, MOMENTUM, EPS, out=(out, *saved))


def torch_compiled(torch: Any, batch: Batch, residual: Floats | None = None) -> Step:
    """Make a compiled forward pass, with a ReLU behind a residual: torch makes one loop of what it can."""
    x, out = (as_tensor(torch, batch, array) for array in (batch.x, batch.out))
    added = None if residual is None else as_tensor(torch, batch, residual)
    channels = tuple(map(torch.from_numpy, (batch.weight, batch.bias, batch.running_mean, batch.running_var)))

    def forward(x: Any, added: Any, out: Any, *channels: Any) -> Any:
        y, mean, invstd = torch.native_batch_norm(x, *channels, True, MOMENTUM, EPS)
        out.copy_(y if added is None else torch.relu(y + added))
        return out, mean, invstd

    return functools.partial(torch.compile(forward, dynamic=False), x, added, out, *channels)


def torch_backward(torch: Any, batch: Batch) -> dict[str, Step]:
    """Make both variants of torch's backward pass; the forward pass before them is torch's own."""
    forward: Any = torch_forward(torch, batch)()
    _, mean, invstd = forward
    x, dy, out = (as_tensor(torch, batch, array) for array in (batch.x, batch.dy, batch.out))
    weight, *running = map(torch.from_numpy, (batch.weight, batch.running_mean, batch.running_var))
    arguments = (dy, x, weight, *running, mean, invstd, True, EPS, [True, True, True])
    gradients = {"out1": torch.zeros_like(weight), "out2": torch.zeros_like(weight)}
    operator = torch.ops.aten.native_batch_norm_backward
    return {
        TORCH_OUT: functools.partial(operator.out, *arguments, out0=out, **gradients),
        TORCH_RETURNING: functools.partial(operator.default, *arguments),
    }


class NumpyForward:
    """The formula as one writes it in NumPy, each operation a pass over memory."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.axes = tuple(axis for axis in range(batch.x.ndim) if axis != batch.channel_axis % batch.x.ndim)
        rest = (1,) * (batch.x.ndim - 1 - batch.channel_axis % batch.x.ndim)
        self.weight, self.bias = (array.reshape(-1, *rest) for array in (batch.weight, batch.bias))
        self.values = batch.x.size // batch.weight.size

    def finish(self, y: Floats, mean: Any, var: Any) -> tuple[Floats, Floats, Floats]:
        """Update the running statistics, and return what a forward pass returns."""
        mean, var = mean.ravel(), var.ravel()
        batch, unbiased = self.batch, self.values / (self.values - 1)
        batch.running_mean[:] = (1 - MOMENTUM) * batch.running_mean + MOMENTUM * mean
        batch.running_var[:] = (1 - MOMENTUM) * batch.running_var + MOMENTUM * unbiased * var
        return y, mean, 1 / np.sqrt(var + EPS)

    def step(self) -> tuple[Floats, Floats, Floats]:
        """Normalize by the lines of the paper: Ioffe and Szegedy, 2015, algorithm 1."""
        x = self.batch.x
        mean = x.mean(axis=self.axes, keepdims=True)
        var = x.var(axis=self.axes, keepdims=True)
        x_hat = (x - mean) / np.sqrt(var + EPS)
        return self.finish(self.weight * x_hat + self.bias, mean, var)


class NumpyForwardInPlace(NumpyForward):
    """The same with one array for what lies between: what NumPy can do at best."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.squares = _array(batch.x.shape)

    def step(self) -> tuple[Floats, Floats, Floats]:
        """Normalize without a temporary array."""
        y = self.batch.out
        mean = self.batch.x.mean(axis=self.axes, keepdims=True)
        np.subtract(self.batch.x, mean, out=y)
        var = np.multiply(y, y, out=self.squares).mean(axis=self.axes, keepdims=True)
        y *= self.weight / np.sqrt(var + EPS)
        y += self.bias
        return self.finish(y, mean, var)


class Halves:
    """Does work in two Python threads, half in each: NumPy lets go of the interpreter lock in its loops."""

    def __init__(self, work: Callable[[int], object]) -> None:
        self._work = work
        self._todo: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._todo.get():
            self._done.put(self._second_half())

    def _second_half(self) -> Exception | None:
        try:
            self._work(1)
        except Exception as error:
            return error
        return None

    def __call__(self) -> None:
        """Do both halves."""
        self._todo.put(True)
        try:
            self._work(0)
        finally:
            error = self._done.get()
        if error is not None:
            raise error

    def close(self) -> None:
        """End the thread."""
        self._todo.put(False)
        self._thread.join()

    def __enter__(self) -> Halves:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def split(array: Floats) -> tuple[Floats, Floats]:
    """Return views of both halves, cut at a cache line."""
    flat = array.reshape(-1)
    middle = flat.size // 2 // 16 * 16
    return flat[:middle], flat[middle:]


# --- Checks and rows --------------------------------------------------------------------------------------------------


def require_close(name: str, got: Sequence[Floats], expected: Sequence[Floats]) -> None:
    """Raise unless all arrays are the same but for rounding."""
    for index, (array, right) in enumerate(zip(got, expected, strict=True)):
        scale = float(np.sqrt(np.mean(np.square(right, dtype=np.float64))))
        if array.shape != right.shape or not np.allclose(array, right, TOLERANCE, TOLERANCE * scale):
            raise CheckError(f"{name} makes another array {index} than ours")


def require_same(batch: Batch, ours: Step, peers: Mapping[str, Step]) -> None:
    """Raise unless every peer makes the arrays that ours makes."""
    expected = batch.outcome(ours)
    if not all(np.isfinite(array).all() for array in expected) or not np.ptp(expected[0]):
        raise CheckError("ours left its output where it was, or made it NaN or infinite")
    for name, step in peers.items():
        require_close(name, batch.outcome(step), expected)


def page_faults(step: Step) -> int:
    """Count how often a call, after others, touches memory that it has to get from the system."""
    if sys.platform == "win32":
        return 0
    resource: Any = importlib.import_module("resource")
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def new_row(case: Case, batch: Batch, peer: str, goal: Goal | None, streams: int, **fields: Any) -> Row:
    """Make a row of `case` without figures. `streams`: arrays like `x` that must be read or written."""
    size = batch.x.size
    return Row(case.name, case.kind, case.threads, size, OURS, peer, goal, bytes=4 * streams * size, **fields)


# --- Cases ------------------------------------------------------------------------------------------------------------


def run_forward(
    layout: str, shape: Shape, goal: float | None, bench: Bench, case: Case, rotated: bool = False
) -> list[Row]:
    """Compare forward passes with torch's, on one batch or on several in turn."""
    first = make_batch(bench, shape, layout)
    sets = (method.sets_for(first.x.nbytes + first.out.nbytes) or 1) if rotated and not bench.quick else 1 + rotated
    batches = [first, *(make_batch(bench, shape, layout) for _ in range(sets - 1))]
    row = new_row(case, first, TORCH, None if goal is None else Goal(">=", goal), 2)
    row.buffers = method.buffers(sets * (first.x.nbytes + first.out.nbytes))
    ours = [our_forward(batch, out=batch.out) for batch in batches]
    torch, row.note = load_torch(case.threads)
    peers = {} if torch is None else {TORCH: [torch_forward(torch, batch) for batch in batches]}
    for index, batch in enumerate(batches):
        require_same(batch, ours[index], {name: steps[index] for name, steps in peers.items()})
    suite.compare(bench.plan, row, ours, peers)
    for batch in batches:
        batch.require_finite()
    return [row]


def run_backward(layout: str, shape: Shape, goal: float | None, bench: Bench, case: Case) -> list[Row]:
    """Compare backward passes: with torch's into given arrays, or, without a goal, with torch's fastest."""
    batch = make_batch(bench, shape, layout, backward=True)
    row = new_row(case, batch, TORCH, None if goal is None else Goal(">=", goal), 3)
    ours = our_backward(batch)
    torch, row.note = load_torch(case.threads)
    peers = {} if torch is None else torch_backward(torch, batch)
    require_same(batch, ours, peers)
    suite.compare(bench.plan, row, ours, peers, against=None if goal is None else TORCH_OUT)
    batch.require_finite()
    if peers:
        faults = " and ".join(str(page_faults(step)) for step in peers.values())
        row.note = f"{suite.times(row, peers)}, with {faults} page faults a call; the ratio is against {row.peer}"
    return [row]


def run_backward_recycled(layout: str, shape: Shape, bench: Bench, case: Case) -> list[Row]:
    """Compare backward passes in a process of its own that uses freed memory again."""
    if platform.libc_ver()[0] != "glibc":
        row = Row(case.name, case.kind, case.threads, math.prod(shape_of(bench, shape)), OURS, TORCH)
        return [replace(row, note=NOT_GLIBC)]
    with suite.environment_variables(RECYCLED), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_recycled, layout, shape, bench, case).result()


def _recycled(layout: str, shape: Shape, bench: Bench, case: Case) -> list[Row]:
    with suite.thread_count(case.threads):
        (row,) = run_backward(layout, shape, None, bench, case)
    return [row]


def run_copy(layout: str, shape: Shape, goal: Goal | None, bench: Bench, case: Case) -> list[Row]:
    """Compare with the fastest copy of the input to the output, on as many threads."""
    batch = make_batch(bench, shape, layout)
    row = new_row(case, batch, "copy", goal, 2)
    ours = our_forward(batch, out=batch.out)
    require_same(batch, ours, {})
    sources, targets = split(batch.x), split(batch.out)
    with Halves(lambda half: np.copyto(targets[half], sources[half])) as halves:
        peers: dict[str, Step] = {"copy by NumPy": halves}
        torch, _ = load_torch(case.threads)
        if torch is not None:
            tensors = [torch.from_numpy(array) for array in (batch.out, batch.x)]
            peers["copy by torch"] = functools.partial(tensors[0].copy_, tensors[1])
        for name, copy in peers.items():
            batch.out.fill(np.nan)
            copy()
            require_close(name, [batch.out], [batch.x])
        suite.compare(bench.plan, row, ours, peers)
    batch.require_finite()
    kib = batch.x.nbytes // batch.weight.size // 1024
    row.note = f"a channel has {kib} KiB; {suite.times(row, peers)}"
    return [row]


def run_compiled(layout: str, fused: bool, shape: Shape, bench: Bench, case: Case) -> list[Row]:
    """Compare a forward pass, with ReLU and residual if `fused`, with torch's when it is compiled."""
    batch = make_batch(bench, shape, layout)
    residual = _array(batch.x.shape, np.random.default_rng(8)) if fused else None
    row = new_row(case, batch, COMPILED, None, 3 if fused else 2)
    options: dict[str, Any] = {"activation": "relu", "residual": residual} if fused else {}
    ours = our_forward(batch, **options, out=batch.out)
    torch, row.note = load_torch(case.threads)
    peers = {} if torch is None else {COMPILED: torch_compiled(torch, batch, residual)}
    require_same(batch, ours, peers)
    suite.compare(bench.plan, row, ours, peers)
    batch.require_finite()
    return [row]


def run_fused(shape: Shape, goal: Goal | None, bench: Bench, case: Case) -> list[Row]:
    """Compare ReLU and residual in one pass with the fastest of three separate ones, the first of them ours."""
    batch = make_batch(bench, shape)
    residual = _array(batch.x.shape, np.random.default_rng(8))
    row = new_row(case, batch, "three passes", goal, 3)
    ours = our_forward(batch, activation="relu", residual=residual, out=batch.out)
    first: Any = our_forward(batch, out=batch.out)
    targets, added = split(batch.out), split(residual)

    def half_of_the_rest(half: int) -> None:
        np.add(targets[half], added[half], out=targets[half])
        np.maximum(targets[half], np.float32(0), out=targets[half])

    with Halves(half_of_the_rest) as halves:

        def by_numpy() -> Any:
            result = first()
            halves()
            return result

        peers: dict[str, Step] = {"three passes, two by NumPy": by_numpy}
        torch, _ = load_torch(case.threads)
        if torch is not None:
            out, other = (torch.from_numpy(array) for array in (batch.out, residual))

            def by_torch() -> Any:
                result = first()
                out.add_(other)
                out.relu_()
                return result

            peers["three passes, two by torch"] = by_torch
        require_same(batch, ours, peers)
        suite.compare(bench.plan, row, ours, peers)
    batch.require_finite()
    row.note = suite.times(row, peers)
    return [row]


def run_without_out(shape: Shape, bench: Bench, case: Case) -> list[Row]:
    """Show what it costs not to give `out`, in a loop that holds each result until it has the next."""
    batch = make_batch(bench, shape)
    with_out, without = f"{OURS} with out=", f"{OURS} without"
    new = our_forward(batch)
    held: object = None

    def hold() -> object:
        nonlocal held
        held = new()
        return held

    row = new_row(case, batch, with_out, Goal("<=", 1.15), 2, measure="ours / peer")
    row.ours = without
    given = our_forward(batch, out=batch.out)
    require_same(batch, given, {without: hold})
    samples = method.interleave([Contender(without, hold), Contender(with_out, given)], bench.plan)
    batch.require_finite()
    row.take(samples, without, with_out)
    row.value = method.ratio(samples[without], samples[with_out])
    row.note = "time without out= over time with it"
    return [row]


def run_numpy(shape: Shape, bench: Bench, case: Case) -> list[Row]:
    """Compare with two ways to write it in NumPy."""
    batch = make_batch(bench, shape)
    ours = our_forward(batch, out=batch.out)
    rows = []
    for name, peer, goal in (("formula", NumpyForward, Goal(">=", 15.0)), ("in-place", NumpyForwardInPlace, None)):
        peers: dict[str, Step] = {"numpy": peer(batch).step}
        require_same(batch, ours, peers)
        row = new_row(case, batch, "numpy", goal, 2, note="NumPy uses one thread")
        row.case = f"{case.name}/{name}"
        suite.compare(bench.plan, row, ours, peers)
        batch.require_finite()
        rows.append(row)
    return rows


def _name(*parts: str | Shape) -> str:
    return "/".join(part if isinstance(part, str) else "x".join(map(str, part)) for part in parts)


def all_cases() -> list[Case]:
    """In an order that imports torch as late as possible, and runs what needs a process of its own at the end."""
    cases = [
        Case(_name("numpy", IN_CACHE), "numpy", functools.partial(run_numpy, IN_CACHE)),
        Case(_name("without-out", IN_CACHE), "without-out", functools.partial(run_without_out, IN_CACHE)),
    ]
    for layout, goal in zip(LAYOUTS, (3.0, 1.6), strict=True):
        for shape in SHAPES:
            run = functools.partial(run_forward, layout, shape, goal)
            cases.append(Case(_name("forward", layout, shape), "forward", run))
    matrix = (4096, 1024)
    cases.append(Case(_name("forward", "NC", matrix), "forward", functools.partial(run_forward, "NC", matrix, 1.5)))
    in_turn: list[tuple[str, Shape]] = [*((layout, IN_CACHE) for layout in LAYOUTS), ("NC", matrix)]
    for layout, each in in_turn:
        rotated = functools.partial(run_forward, layout, each, None, rotated=True)
        cases.append(Case(_name("forward", layout, each, "rotated"), "forward", rotated))
    for layout, goal in zip(LAYOUTS, (1.8, 3.0), strict=True):
        for shape in SHAPES:
            backward = functools.partial(run_backward, layout, shape, goal)
            cases.append(Case(_name("backward", layout, shape), "backward", backward))
    # Beside the goals: what a copy says of the layouts that are read twice, and batches that no cache holds.
    large = SHAPES[2]
    copies: list[tuple[str, str, Shape, Goal | None]] = [
        (_name("copy", IN_CACHE), "NCHW", IN_CACHE, Goal(">=", 0.65)),
        (_name("copy", "NHWC", IN_CACHE), "NHWC", IN_CACHE, None),
        (_name("copy", "NHWC", large), "NHWC", large, None),
        (_name("copy", "NC", matrix), "NC", matrix, None),
    ]
    for name, layout, copied, least in copies:
        cases.append(Case(name, "copy", functools.partial(run_copy, layout, copied, least)))
    for shape, faster in ((IN_CACHE, Goal(">=", 1.8)), (large, None)):
        cases.append(Case(_name("fused", shape), "fused", functools.partial(run_fused, shape, faster)))
    for layout in LAYOUTS:
        for fused in (False, True):
            name = _name("compiled", layout, "fused" if fused else "forward", IN_CACHE)
            cases.append(Case(name, "compiled", functools.partial(run_compiled, layout, fused, IN_CACHE)))
    for layout in LAYOUTS:
        for shape in SHAPES:
            recycled = functools.partial(run_backward_recycled, layout, shape)
            cases.append(Case(_name("backward-recycled", layout, shape), "backward-recycled", recycled))
    return cases


def means(rows: Sequence[Row]) -> list[Row]:
    """Make a row for the geometric mean of each kind of backward pass of which all shapes were chosen."""
    made = []
    for kind in ("backward", "backward-recycled"):
        for layout in LAYOUTS:
            wanted = {_name(kind, layout, shape) for shape in SHAPES}
            parts = [row for row in rows if row.case in wanted]
            if len(parts) < len(SHAPES):
                continue
            goal = Goal(">=", 4.0) if (kind, layout) == ("backward", "NCHW") else None
            row = Row(_name(kind, layout, "geometric mean"), kind, parts[0].threads, 0, OURS, TORCH, goal)
            values = [row.value for row in parts if row.value is not None]
            if len(values) < len(SHAPES):
                row.note = "not all shapes were measured"
            else:
                row.value, row.note = method.geometric_mean(values), f"over {len(values)} shapes"
            made.append(row)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    # Page faults are one of the things that are measured here.
    return suite.main("batchnorm", __doc__, all_cases(), arguments, means, keeps_memory=False)


if __name__ == "__main__":
    sys.exit(main())

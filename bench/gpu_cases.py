"""What is measured on a CUDA device, one case after the other; ``python bench/gpu.py`` runs this and makes the tables.

Every line that this writes into ``--lines`` is a JSON object: the environment, the name of a case that begins, a row.
So a case that takes the process with it costs its own rows alone.

Fair play
---------
* Time is that of the device: two CUDA events around the calls of one sample. Before them the device is kept busy for as
  long as the host needs to enqueue the calls, so that the host's time is not part of it. Where the host's time is what
  a row is about, it says so: then it is that of one call which nobody waits for.
* Contenders run interleaved, A B A B, in one process, after a warm-up, on the same stream, and by as many calls as make
  a sample of `Plan.sample_seconds`. Results are ratios of medians with a bootstrap interval over whole rounds.
* Arrays are larger than the second-level cache, or several sets of them are used in turn, so that a call does not find
  what the call before has left. The case ``many`` is the exception: 1000 small arrays are what it is about.
* The copy is one from device to device by the runtime, of 1 GiB, in turns with what is compared with it. Its bytes are
  those that are read plus those that are written, as for ours.
* torch works on the very same parameters and gradients, with states of its own. Peers take the same three steps as ours
  from parameters 0 before the timing, and must arrive where ours does: 1e-4 of each number, in bfloat16 three units in
  the last place (3/256). Batch normalization: no element is off by more than 3e-4 (bfloat16: 1/128; sums of a backward
  pass: 2e-3) of itself and of the array's root mean square together. Of arrays of more than a million elements eight
  pieces are compared, the first and the last among them.
* Gradients are positive and not zero. Numbers are drawn once and repeated with a period that fits no shape.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import gc
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import optimizers
from optimizers import LR, Data, Pair
from whole_step import ADAMW, EMA_DECAY, LOSS_SCALE, ROUNDING

import method
import onepass
from method import Contender, Goal, Plan, Row, Samples
from numpy_rules import RULES, new_state
from onepass import _cpu, functional
from onepass.optim.options import bfloat16
from suite import OURS, CheckError, Step

BIG, MIDDLE, SMALL = 256 << 20, 64 << 20, 1 << 20  # elements
NAMES = {BIG: "256M", MIDDLE: "64M", SMALL: "1M"}
COPY_BYTES = 1 << 30
PERIOD = 1_000_003  # of the numbers in large arrays; a prime
PIECES, PIECE = 8, 1 << 17
MAX_CALLS = 200
MOST_ENQUEUED = 0.02  # seconds of the host's that one sample may take to be enqueued
CAPTURED_STEPS = 100_000
TENSORS, TENSOR_SIZE = 1000, 1000

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(bfloat16())
COPY = "copy"

PLAN = Plan(seconds=0.6, min_rounds=15, max_rounds=101, sample_seconds=0.003, pause=0.0)
QUICK = Plan(seconds=0.05, min_rounds=3, max_rounds=5, sample_seconds=0.0005, pause=0.0)

EPS, MOMENTUM = 1e-5, 0.1
BATCH = 128
SHAPES = ((64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))  # of ResNet-50
ON_CHIP = SHAPES[2:]
LAYOUTS = ("NCHW", "NHWC")
BATCHNORM_ERROR = {FLOAT32: 3e-4, BFLOAT16: 1 / 128}
SUM_ERROR = 2e-3

Array = Any


# --- Time -------------------------------------------------------------------------------------------------------------


class Timer(Protocol):
    """Tells how long a device works."""

    def interleave(self, contenders: Sequence[Contender], plan: Plan) -> dict[str, Samples]:
        """Return for each name the seconds of one call, one entry for each round."""

    def host_seconds(self, steps: Mapping[str, Step], calls: int) -> dict[str, Samples]:
        """Return for each name the host's seconds of each of `calls` calls, which nobody waits for."""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class WallTimer:
    """By the host's clock. For kernels that run on the host; figures of a device need :class:`EventTimer`."""

    def synchronize(self) -> None:
        """Wait for what was enqueued."""

    def seconds(self, run: Step, calls: int, hold: float) -> float:
        """Time `calls` calls, of which the first begins when the device has worked for `hold` seconds."""
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            run()
        return time.perf_counter() - start

    def sample(self, contender: Contender, calls: int, hold: float) -> float:
        """Time one call, in the mean of several."""
        if contender.prepare is not None:
            contender.prepare()
        return self.seconds(contender.run, calls, hold) / calls

    def warm_up(self, contender: Contender, plan: Plan) -> tuple[int, float]:
        """Return how many calls make a sample, and how long it takes to enqueue them."""
        enqueued = math.inf
        for _ in range(3):
            if contender.prepare is not None:
                contender.prepare()
            self.synchronize()
            start = time.perf_counter()
            contender.run()
            enqueued = min(enqueued, time.perf_counter() - start)
            self.synchronize()
        once = self.sample(contender, 1, 2.0 * enqueued + 1e-4)
        calls = 1
        if contender.prepare is None:
            wanted = math.ceil(plan.sample_seconds / max(once, 1e-7))
            calls = max(1, min(wanted, MAX_CALLS, int(MOST_ENQUEUED / enqueued)))
        return calls, 1.5 * enqueued * calls + 5e-5

    def interleave(self, contenders: Sequence[Contender], plan: Plan) -> dict[str, Samples]:
        """Time the contenders in turn, round after round."""
        names = [contender.name for contender in contenders]
        if len(set(names)) != len(names):
            raise ValueError(f"contenders: names repeat: {', '.join(names)}")
        if any(contender.others or contender.rewind for contender in contenders):
            raise ValueError("contenders: no sets of arrays and nothing to rewind on a device")
        taken: dict[str, list[float]] = {name: [] for name in names}
        with _no_garbage_collection():
            prepared = [self.warm_up(contender, plan) for contender in contenders]
            start = time.perf_counter()
            for done in range(plan.max_rounds):
                if done >= plan.min_rounds and time.perf_counter() - start >= plan.seconds:
                    break
                for contender, (calls, hold) in zip(contenders, prepared, strict=True):
                    taken[contender.name].append(self.sample(contender, calls, hold))
        return {name: np.array(seconds) for name, seconds in taken.items()}

    def host_seconds(self, steps: Mapping[str, Step], calls: int) -> dict[str, Samples]:
        """Time the calls one by one, in blocks that the device can keep up with."""
        taken: dict[str, list[int]] = {name: [] for name in steps}
        with _no_garbage_collection():
            for block in range(-(-calls // 10) + 1):
                for name, step in steps.items():
                    self.synchronize()
                    for _ in range(10):
                        start = time.perf_counter_ns()
                        step()
                        if block:  # the first one warms up
                            taken[name].append(time.perf_counter_ns() - start)
            self.synchronize()
        return {name: 1e-9 * np.array(seconds[:calls], np.float64) for name, seconds in taken.items()}


class EventTimer(WallTimer):
    """By CUDA events on the current stream. `scratch` is what the device is kept busy with: it is overwritten."""

    def __init__(self, cupy: Any, scratch: Array) -> None:
        self.cuda, self.scratch = cupy.cuda, scratch
        self.start, self.end = cupy.cuda.Event(), cupy.cuda.Event()
        self.fill_seconds = 1e-9
        self.fill_seconds = min(self.seconds(self._fill, 4, 0.0) for _ in range(3)) / 4

    def _fill(self) -> None:
        self.scratch.data.memset_async(0, self.scratch.nbytes)

    def synchronize(self) -> None:
        self.cuda.get_current_stream().synchronize()

    def seconds(self, run: Step, calls: int, hold: float) -> float:
        if hold > 0.0:
            for _ in range(min(math.ceil(hold / self.fill_seconds) + 1, 400)):
                self._fill()
        self.start.record()
        for _ in itertools.repeat(None, calls):
            run()
        self.end.record()
        self.end.synchronize()
        return float(self.cuda.get_elapsed_time(self.start, self.end)) * 1e-3


# --- The machine ------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What cases run on. `divisor`: by how much sizes are smaller than they should be."""

    cupy: Any
    timer: Timer
    copy: Copy
    torch: Any = None
    no_torch: str = ""
    plan: Plan = PLAN
    divisor: int = 1
    l2_bytes: int = 60 << 20

    def elements(self, count: int) -> int:
        """Return as many elements as a size stands for."""
        return max(count // self.divisor, min(count, 2000))

    def free(self) -> None:
        """Give back what the case before has left in the pools."""
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Whether the device still works; after some errors no call to it does."""
        try:
            self.cupy.cuda.Device().synchronize()
        except Exception:
            return False
        return True


class Copy:
    """A copy from device to device: what every other kernel's bytes a second are held against."""

    def __init__(self, cupy: Any, nbytes: int = COPY_BYTES) -> None:
        self.source, self.target = (cupy.empty(nbytes, np.uint8) for _ in range(2))
        self.source.fill(77)
        self.bytes = 2 * nbytes
        self.step()
        for piece in pieces(self.target):
            if not np.all(piece == 77.0):
                raise CheckError("the copy has not copied")

    def step(self) -> None:
        """Copy once."""
        self.target.data.copy_from_device_async(self.source.data, self.source.nbytes)


def on_host() -> bool:
    """Whether CUDA is the runtime of tests/cuda_on_host: kernels are loops on the host, and times mean nothing."""
    return "ONEPASS_CUDA_ON_HOST" in os.environ


def make_machine(quick: bool) -> Machine:
    """Find the device, CuPy and torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's about installations of CUDA
        cupy: Any = importlib.import_module("cupy")
    if on_host():
        copy = Copy(cupy, 1 << 16)
        return Machine(cupy, WallTimer(), copy, None, "no peer: CUDA runs on the host", QUICK, 1 << 17, 0)
    copy = Copy(cupy, COPY_BYTES // (8 if quick else 1))
    machine = Machine(cupy, EventTimer(cupy, copy.target), copy)
    if quick:
        machine.plan, machine.divisor = QUICK, 16
    machine.l2_bytes = int(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["l2CacheSize"])
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        machine.no_torch = f"no peer: {type(error).__name__}: {error}"
        return machine
    if torch.cuda.is_available():
        machine.torch = torch
    else:
        machine.no_torch = "no peer: torch sees no CUDA device"
    return machine


def _smi(fields: str) -> str:
    """Ask nvidia-smi; an empty string where it is not there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0]


def clocks() -> str:
    """Return what the device runs at now, and at most."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit")
    values = _smi(",".join(names)).split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=False) if value) or "unknown"


def environment(machine: Machine) -> dict[str, Any]:
    """Collect what a reader needs to judge the figures and to repeat them."""
    cupy, torch = machine.cupy, machine.torch
    index = cupy.cuda.Device().id
    name, (major, minor), memory = _cpu.cuda_devices()[index]
    facts: dict[str, Any] = {
        **{key: value for key, value in method.environment(machine.plan).items() if key not in ("threads", "isa")},
        "device": f"{name}, sm_{major}{minor}, {memory / 2**30:.0f} GiB",
        "quick": machine.divisor > 1,
        "driver": _smi("driver_version") or "unknown",
        "cuda driver, runtime": [cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()],
        "cupy": cupy.__version__,
        "architectures built": _cpu.cuda_architectures(),
        "clocks at the beginning": clocks(),
    }
    if not on_host():
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        facts["processors"] = properties["multiProcessorCount"]
        facts["second-level cache"] = f"{machine.l2_bytes / 2**20:.0f} MiB"
    if torch is not None:
        facts["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return facts


# --- Arrays -----------------------------------------------------------------------------------------------------------


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"i{dtype.itemsize}")


def repeated(cupy: Any, block: npt.NDArray[Any], count: int, dtype: np.dtype[Any]) -> Array:
    """Make a device array of `count` elements of the numbers in `block`, again and again."""
    source = cupy.asarray(block.astype(dtype).view(_bits(dtype)))
    flat = cupy.empty(count, _bits(dtype))
    for start in range(0, count, block.size):
        end = min(start + block.size, count)
        flat[start:end] = source[: end - start]
    return flat.view(dtype)


def zeros(cupy: Any, count: int, dtype: np.dtype[Any]) -> Array:
    """Make zeros; CuPy's own kernels never see the dtype."""
    return cupy.zeros(count, _bits(dtype)).view(dtype)


def pieces(array: Array) -> list[npt.NDArray[np.float64]]:
    """Return all of a small array, and eight pieces of a large one, as numbers on the host."""
    flat = array.reshape(-1)
    if flat.size <= PIECES * PIECE:
        starts = [0]
        size = flat.size
    else:
        starts = [round(k * (flat.size - PIECE) / (PIECES - 1)) for k in range(PIECES)]
        size = PIECE
    as_bits = flat.view(_bits(array.dtype))
    return [as_bits[start : start + size].get().view(array.dtype).astype(np.float64) for start in starts]


def require_finite(arrays: Iterator[Array] | Sequence[Array]) -> None:
    """Raise if a NaN or an infinity is among what steps wrote."""
    if not all(np.isfinite(piece).all() for array in arrays for piece in pieces(array)):
        raise CheckError("a parameter or state is not finite after the timed steps")


def gradient_block(count: int) -> npt.NDArray[np.float32]:
    """Return numbers between 0.0005 and 0.0015."""
    rng = np.random.default_rng(7)
    return (0.0005 + 0.001 * rng.random(min(count, PERIOD))).astype(np.float32)


def make_data(
    machine: Machine, counts: Sequence[int], slots: int = 0, storage: Sequence[np.dtype[Any]] = (FLOAT32,) * 3
) -> Data:
    """Parameters 0, slots 0, gradients between 0.0005 and 0.0015; `storage`: the dtypes of the three."""
    param, grad, state = storage
    block = gradient_block(max(counts))
    data = Data([], [], [])
    for count in counts:
        data.params.append(zeros(machine.cupy, count, param))
        data.grads.append(repeated(machine.cupy, block, count, grad))
        data.slots.append(tuple(zeros(machine.cupy, count, state) for _ in range(slots)))
    return data


def clear(arrays: Sequence[Array]) -> None:
    """Set to zero."""
    for array in arrays:
        array.data.memset_async(0, array.nbytes)


def states_of(optimizer: onepass.Optimizer) -> list[tuple[Array, ...]]:
    """Return the states of each parameter."""
    return [tuple(state.values()) for state in optimizer.state]


# --- Rows and checks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One or more rows that are measured together. `kind` is the row of the goals' table that they belong to."""

    name: str
    kind: str
    run: Callable[[Machine, Case], list[Row]]


def new_row(case: Case, elements: int, peer: str, goal: Goal | None = None, **fields: Any) -> Row:
    """Make a row of `case` without figures."""
    return Row(case.name, case.kind, 0, elements, OURS, peer, goal, **fields)


def share_of_copy(machine: Machine, row: Row, copied: Samples, ours: Samples) -> method.Estimate:
    """Compare bytes a second with those of the copy."""
    if not row.bytes:
        raise ValueError("row: bytes are missing")
    scale = row.bytes / machine.copy.bytes
    return method.median(copied * scale / ours)


def against_copy(machine: Machine, row: Row, ours: Step) -> None:
    """Time ours in turns with the copy; the share of its rate is the row's value."""
    samples = machine.timer.interleave([Contender(OURS, ours), Contender(COPY, machine.copy.step)], machine.plan)
    row.take(samples, OURS, COPY)
    row.value = row.traffic_share = share_of_copy(machine, row, samples[COPY], samples[OURS])
    row.measure = "share of the copy's rate"


def compare(
    machine: Machine,
    row: Row,
    ours: Step,
    peers: Mapping[str, Step],
    *,
    against: str | None = None,
    prepare: Step | None = None,
) -> dict[str, Samples]:
    """Time ours, the peers and the copy in turns; enter the comparison with one of the peers, or the fastest."""
    contenders = [Contender(name, step, prepare) for name, step in {row.ours: ours, **peers}.items()]
    samples = machine.timer.interleave([*contenders, Contender(COPY, machine.copy.step)], machine.plan)
    peer = against if against in peers else min(peers, key=lambda name: float(np.median(samples[name])), default=None)
    row.take(samples, row.ours, peer)
    if row.bytes:
        row.traffic_share = share_of_copy(machine, row, samples[COPY], samples[row.ours])
    if peer is not None:
        row.peer = peer
        row.value = method.ratio(samples[peer], samples[row.ours])
    if len(peers) > 1:
        times = ", ".join(f"{name} {method.format_seconds(row.all_seconds[name])}" for name in peers)
        row.note = "; ".join(filter(None, (row.note, times)))
    return samples


def three_steps(arrays: Sequence[Array], step: Step) -> None:
    """Step from parameters 0."""
    clear(arrays)
    for _ in range(3):
        step()


def outcome(arrays: Sequence[Array]) -> list[list[npt.NDArray[np.float64]]]:
    """Read what steps made."""
    return [pieces(array) for array in arrays]


def require_moved(arrays: Sequence[Sequence[npt.NDArray[np.float64]]]) -> None:
    """Raise unless every element is finite and not 0."""
    if not all(np.isfinite(piece).all() and np.all(piece != 0.0) for array in arrays for piece in array):
        raise CheckError("ours left a parameter where it was, or made it NaN or infinite")


def require_close(
    message: str,
    got: Sequence[Sequence[npt.NDArray[np.float64]]],
    expected: Sequence[Sequence[npt.NDArray[np.float64]]],
    tolerance: float,
) -> None:
    """Raise unless every element is right but for a share of itself."""
    for array, right in zip(got, expected, strict=True):
        for piece, right_piece in zip(array, right, strict=True):
            if not np.allclose(piece, right_piece, tolerance, 0.0):
                with np.errstate(all="ignore"):
                    worst = float(np.max(np.abs(piece - right_piece) / np.abs(right_piece)))
                raise CheckError(f"{message} (by {worst:.2g} of itself; the tolerance is {tolerance:.2g})")


def require_same(data: Data, ours: Step, peers: dict[str, Step], tolerance: float = 1e-4) -> str:
    """Raise unless every peer's first three steps arrive where ours do; peers that cannot run are left out.

    Returns
    -------
    str
        Which of them, and why.
    """
    three_steps(data.params, ours)
    expected = outcome(data.params)
    require_moved(expected)
    notes = []
    for name, step in list(peers.items()):
        _, why = _tried(functools.partial(three_steps, data.params, step))
        if why:
            notes.append(f"{name} cannot: {why}")
            del peers[name]
            continue
        require_close(f"{name} arrives at other parameters than ours", outcome(data.params), expected, tolerance)
    return "; ".join(notes)


def _tried(run: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a peer returns, or why it cannot do it."""
    try:
        return run(), ""
    except Exception as error:
        return None, _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


# --- torch ------------------------------------------------------------------------------------------------------------

FUSED: Mapping[str, Mapping[str, bool]] = {"torch fused": {"fused": True}}
UNFUSED: Mapping[str, Mapping[str, bool]] = {"torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}
ANY = {**FUSED, **UNFUSED}


def as_tensor(torch: Any, array: Array) -> Any:
    """Return torch's view of a device array."""
    if array.dtype == BFLOAT16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def torch_optimizer(torch: Any, pair: Pair, data: Data, how: Mapping[str, bool]) -> Any:
    """Make torch's optimizer over the parameters and gradients of `data`; its states are its own."""
    params = [as_tensor(torch, param).requires_grad_() for param in data.params]
    for param, grad in zip(params, data.grads, strict=True):
        param.grad = as_tensor(torch, grad)
    return getattr(torch.optim, pair.torch)(params, lr=LR, **pair.options, **how)


def torch_steps(
    machine: Machine, pair: Pair, data: Data, implementations: Mapping[str, Mapping[str, bool]]
) -> tuple[dict[str, Step], str]:
    """Make the steps of those of torch's implementations that exist, and say which do not."""
    if machine.torch is None:
        return {}, machine.no_torch
    steps: dict[str, Step] = {}
    notes = []
    for name, how in implementations.items():
        optimizer, why = _tried(functools.partial(torch_optimizer, machine.torch, pair, data, how))
        if optimizer is None:
            notes.append(f"{name} cannot: {why}")
        else:
            steps[name] = optimizer.step
    return steps, "; ".join(notes)


# --- Cases: the update ------------------------------------------------------------------------------------------------


def run_copy(machine: Machine, case: Case) -> list[Row]:
    """Measure the yardstick itself, beside torch's."""
    row = new_row(case, machine.copy.source.size, "", bytes=machine.copy.bytes, measure="ours")
    row.ours = COPY
    peers: dict[str, Step] = {}
    if machine.torch is not None:
        target, source = (as_tensor(machine.torch, array) for array in (machine.copy.target, machine.copy.source))
        peers["copy by torch"] = functools.partial(target.copy_, source)
    contenders = [Contender(COPY, machine.copy.step), *(Contender(name, step) for name, step in peers.items())]
    samples = machine.timer.interleave(contenders, machine.plan)
    row.take(samples, COPY, None)
    row.value = row.ours_estimate
    row.note = ", ".join(f"{name} {method.format_seconds(row.all_seconds[name])}" for name in peers)
    return [row]


def run_rule(rule: str, machine: Machine, case: Case) -> list[Row]:
    """One rule's kernel against the copy."""
    slots = len(optimizers.rules()[rule]["slots"])
    data = make_data(machine, [machine.elements(BIG)], slots)
    step = optimizers.kernel_step(rule, data)
    three_steps(list(data.written()), step)
    require_moved(outcome(data.params))
    row = new_row(case, data.elements, COPY, Goal(">=", 0.92), bytes=data.bytes)
    against_copy(machine, row, step)
    require_finite(data.written())
    return [row]


def run_torch(
    pair: Pair,
    size: int,
    goal: Goal | None,
    implementations: Mapping[str, Mapping[str, bool]],
    storage: Sequence[np.dtype[Any]],
    machine: Machine,
    case: Case,
) -> list[Row]:
    """One large array against torch."""
    data = make_data(machine, [machine.elements(size)], 0, storage)
    tolerance = 1e-4 if storage[0] == FLOAT32 else ROUNDING
    row = new_row(case, data.elements, "torch", goal)
    peers: dict[str, Step] = {}
    notes: list[str] = []
    for variants in (implementations, UNFUSED):  # the latter if there is none of the former
        optimizer = pair.ours(data.params, lr=LR, grads=data.grads, state_dtype=storage[2])
        peers, note = torch_steps(machine, pair, data, variants)
        notes += [note, require_same(data, optimizer.step, peers, tolerance)]
        if peers or machine.torch is None:
            break
    row.note = "; ".join(filter(None, notes))
    own = replace(data, slots=states_of(optimizer))
    row.bytes = own.bytes
    compare(machine, row, optimizer.step, peers)
    require_finite(own.written())
    return [row]


class Expressions:
    """A rule as one writes it in CuPy: the very NumPy expressions of ``examples/numpy_rules.py``, on device arrays."""

    def __init__(self, name: str, data: Data) -> None:
        self.rule, self.param, self.grad = RULES[name], data.params[0], data.grads[0]
        self.state, self.t = new_state(), 0

    def step(self) -> None:
        """Take one step."""
        self.t += 1
        self.rule(self.param, self.grad, self.state, self.t, lr=LR)


def run_expressions(name: str, size: int, machine: Machine, case: Case) -> list[Row]:
    """A rule against the same in CuPy's operators."""
    data = make_data(machine, [machine.elements(size)])
    optimizer = getattr(onepass, name)(data.params, lr=LR, grads=data.grads)
    peers: dict[str, Step] = {"CuPy expressions": Expressions(name, data).step}
    row = new_row(case, data.elements, "CuPy expressions", Goal(">=", 6.0))
    row.note = require_same(data, optimizer.step, peers)
    own = replace(data, slots=states_of(optimizer))
    row.bytes = own.bytes
    compare(machine, row, optimizer.step, peers)
    require_finite(own.written())
    return [row]


# --- Cases: many tensors, and graphs ----------------------------------------------------------------------------------


def many_data(machine: Machine) -> Data:
    """1000 arrays of 1000 elements; a few where kernels run on the host."""
    return make_data(machine, [TENSOR_SIZE] * (TENSORS if machine.divisor < 1000 else 7))


def short_name(kernel: str) -> str:
    """Return the name of a kernel without what it returns, takes, and is a template of."""
    name = re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""))[0].strip()
    return name.rpartition(" ")[2] or kernel


def launches_by_profiler(torch: Any, step: Step) -> list[str]:
    """Name everything that a step starts on the device, as torch's profiler sees it (also what is not torch's)."""
    profiler: Any = importlib.import_module("torch.profiler")
    for _ in range(2):  # the first one sets the profiler up
        step()
        torch.cuda.synchronize()
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


def captured(machine: Machine, optimizer: onepass.Optimizer) -> Any:
    """Return a graph of one step."""
    optimizer.prepare_capture(CAPTURED_STEPS)
    stream = machine.cupy.cuda.Stream(non_blocking=True)
    optimizer.step()  # makes what the first step makes
    machine.cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        try:
            optimizer.step()
        finally:
            graph = stream.end_capture()
    machine.cupy.cuda.Device().synchronize()
    return graph


def nodes_of(graph: Any) -> int:
    """Count the nodes of a graph by asking the driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t()
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.graph), None, ctypes.byref(count))
    if status != 0:
        raise RuntimeError(f"cuGraphGetNodes returned {status}")
    return count.value


def launches_on_host(step: Step) -> list[str]:
    """Count what a step starts where kernels run on the host."""
    library = importlib.import_module("cupy._host").library
    before = library.onepass_host_launches(None)
    step()
    return ["kernel"] * (library.onepass_host_launches(None) - before)


def count_launches(machine: Machine, optimizer: onepass.Optimizer) -> tuple[int, str]:
    """Return how many things a step starts on the device, and how that was found out."""
    if on_host():
        return len(launches_on_host(optimizer.step)), "counted by the host's runtime"
    why = machine.no_torch
    if machine.torch is not None:
        try:
            names = launches_by_profiler(machine.torch, optimizer.step)
        except Exception as error:
            why = f"the profiler failed: {_first_line(error)}"
        else:
            if names:
                kinds = collections.Counter(short_name(name) for name in names)
                listed = ", ".join(f"{name} x{count}" for name, count in kinds.items())
                return len(names), f"as the profiler sees it: {listed}"
            why = "the profiler saw nothing"
    return nodes_of(captured(machine, optimizer)), f"nodes of a captured step, its counting included; {why}"


def run_many(machine: Machine, case: Case) -> list[Row]:
    """Many small arrays: launches, time of the device, time of the host."""
    data = many_data(machine)
    pair = optimizers.ADAM
    optimizer = pair.ours(data.params, lr=LR, grads=data.grads)
    device = new_row(case, data.elements, "torch fused", Goal(">=", 2.0))
    device.case = f"{case.name}/device"
    peers, device.note = torch_steps(machine, pair, data, FUSED)
    device.note = "; ".join(filter(None, (device.note, require_same(data, optimizer.step, peers))))
    own = replace(data, slots=states_of(optimizer))
    device.bytes = own.bytes
    compare(machine, device, optimizer.step, peers)
    device.note = "; ".join(filter(None, (device.note, "all arrays fit into the second-level cache")))

    host = new_row(case, data.elements, "", Goal("<=", 60e-6), measure="ours")
    host.case, host.kind = f"{case.name}/host", "host"
    samples = machine.timer.host_seconds({OURS: optimizer.step, **peers}, 300)
    host.take(samples, OURS, next(iter(peers), None))
    host.peer, host.value = next(iter(peers), ""), host.ours_estimate
    host.note = "the host's time of one call, which nobody waits for"

    launches = new_row(case, data.elements, "", Goal("<=", 4.0), measure="launches")
    launches.case, launches.kind = f"{case.name}/launches", "launches"
    count, launches.note = count_launches(machine, optimizer)
    launches.value = method.Estimate(count, count, count)
    require_finite(own.written())
    return [launches, device, host]


def run_graph(machine: Machine, case: Case) -> list[Row]:
    """A captured step, replayed: the same bits, in less of the host's time."""
    data, other = many_data(machine), many_data(machine)
    replayed, plain = (onepass.Adam(each.params, lr=LR, grads=each.grads) for each in (data, other))
    graph = captured(machine, replayed)
    plain.step()
    for _ in range(10):
        graph.launch()
        plain.step()
    for left, right in zip(outcome(data.params), outcome(other.params), strict=True):
        if not all(np.array_equal(*pair) for pair in zip(left, right, strict=True)):
            raise CheckError("replayed steps arrive at other parameters than plain ones")
    require_moved(outcome(data.params))

    device = new_row(case, data.elements, "step()")
    device.case, device.ours = f"{case.name}/device", "replay"
    compare(machine, device, graph.launch, {"step()": plain.step})
    host = new_row(case, data.elements, "step()")
    host.case, host.ours = f"{case.name}/host", "replay"
    samples = machine.timer.host_seconds({"replay": graph.launch, "step()": plain.step}, 300)
    host.take(samples, "replay", "step()")
    host.value = method.ratio(samples["step()"], samples["replay"])
    host.note = "the host's time of one call, which nobody waits for"
    if set(replayed.step_counts) != {replayed.step_counts[0]}:
        raise CheckError("the counts of replayed steps differ")
    return [device, host]


# --- Cases: what surrounds the update ---------------------------------------------------------------------------------


class TorchWholeStep:
    """The step as a sequence of torch's calls."""

    def __init__(self, torch: Any, data: Data, ema: Array, mirror: Array, max_norm: float) -> None:
        self.torch, self.max_norm = torch, max_norm
        self.optimizer = torch_optimizer(torch, ADAMW, data, {"fused": True})
        self.params = self.optimizer.param_groups[0]["params"]
        self.grads = [param.grad for param in self.params]
        self.ema, self.mirror = ([as_tensor(torch, each)] for each in (ema, mirror))
        self.averages = False

    def step(self) -> None:
        """Unscale as a GradScaler does, clip, update, average as an AveragedModel does, copy, zero."""
        torch = self.torch
        with torch.no_grad():
            torch._foreach_mul_(self.grads, 1.0 / LOSS_SCALE)
            torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
            self.optimizer.step()
            if self.averages:
                torch._foreach_lerp_(self.ema, self.params, 1.0 - EMA_DECAY)
            else:
                torch._foreach_copy_(self.ema, self.params)
                self.averages = True
            torch._foreach_copy_(self.mirror, self.params)
            self.optimizer.zero_grad(set_to_none=False)


class Gradients:
    """Scaled gradients, which differ from step to step, and the limit to which they are clipped."""

    def __init__(self, cupy: Any, array: Array) -> None:
        block = np.float32(LOSS_SCALE) * gradient_block(array.size)
        self.array = array
        self.sources = [repeated(cupy, np.roll(block, 997 * k), array.size, array.dtype) for k in range(2)]
        self.max_norm = 0.25e-3 * float(np.sqrt(array.size))
        self.steps = 0

    def refill(self) -> None:
        """Write the next step's."""
        self.steps += 1
        self.array.data.copy_from_device_async(self.sources[self.steps % 2].data, self.array.nbytes)


def whole_outcome(
    gradients: Gradients, step: Step, param: Array, written: Sequence[Array], mirror: Array
) -> list[list[npt.NDArray[np.float64]]]:
    """Take three whole steps from parameters 0, and read what they made."""
    clear([param])
    gradients.steps = 0
    for _ in range(3):
        gradients.refill()
        step()
    if any(piece.any() for piece in pieces(gradients.array)):
        raise CheckError("a gradient is not zero after the step")
    for copy, right in zip(pieces(mirror), pieces(param), strict=True):
        if not np.array_equal(copy, right.astype(BFLOAT16).astype(np.float64)):
            raise CheckError("the copy is not the rounded parameter")
    return outcome([param, *written])


def run_whole(machine: Machine, case: Case) -> list[Row]:
    """Everything around AdamW against torch's sequence of calls."""
    cupy = machine.cupy
    data = make_data(machine, [machine.elements(MIDDLE)])
    param, count = data.params[0], data.elements
    gradients = Gradients(cupy, data.grads[0])
    mirror = zeros(cupy, count, BFLOAT16)
    optimizer = ADAMW.ours(data.params, lr=LR, **ADAMW.options, ema_decay=EMA_DECAY, mirror=[mirror])
    step: Step = functools.partial(
        optimizer.step,
        data.grads,
        grad_scale=1.0 / LOSS_SCALE,
        max_grad_norm=gradients.max_norm,
        zero_grads=True,
    )
    exp_avg, exp_avg_sq, ema = (optimizer.state[0][name] for name in ("exp_avg", "exp_avg_sq", "ema"))
    expected = whole_outcome(gradients, step, param, [exp_avg, exp_avg_sq, ema], mirror)
    require_moved(expected)
    norm = float(optimizer.grad_norm)
    if not norm > 2.0 * gradients.max_norm:
        raise CheckError("the gradients are within the limit")

    row = new_row(case, count, "torch, six calls", Goal(">=", 1.8), note=machine.no_torch)
    # Gradient twice, and out as zeros; parameter, moments and average in and out; the copy out.
    row.bytes = 3 * data.grads[0].nbytes + 2 * sum(a.nbytes for a in (param, exp_avg, exp_avg_sq, ema)) + mirror.nbytes
    peers: dict[str, Step] = {}
    if machine.torch is not None:
        their_ema, their_mirror = zeros(cupy, count, FLOAT32), zeros(cupy, count, BFLOAT16)
        theirs = TorchWholeStep(machine.torch, data, their_ema, their_mirror, gradients.max_norm)
        got = whole_outcome(gradients, theirs.step, param, [their_ema], their_mirror)
        require_close(f"{row.peer}: other parameters or averages", got, [expected[0], expected[3]], 1e-3)
        peers[row.peer] = theirs.step
    compare(machine, row, step, peers, prepare=gradients.refill)
    require_finite([param, exp_avg, exp_avg_sq, ema, mirror])
    return [row]


def run_storage(machine: Machine, case: Case) -> list[Row]:
    """Everything in bfloat16 against everything in float32."""
    count = machine.elements(BIG)
    data, wide = (make_data(machine, [count], 0, (dtype,) * 3) for dtype in (BFLOAT16, FLOAT32))
    ours, peer = (
        onepass.Adam(each.params, lr=LR, grads=each.grads, state_dtype=dtype)
        for each, dtype in ((data, BFLOAT16), (wide, FLOAT32))
    )
    three_steps(data.params, ours.step)
    three_steps(wide.params, peer.step)
    require_moved(outcome(data.params))
    require_close("float32 arrives elsewhere than bfloat16", outcome(wide.params), outcome(data.params), ROUNDING)
    own = replace(data, slots=states_of(ours))
    row = new_row(case, count, f"{OURS} float32", Goal(">=", 1.8), bytes=own.bytes)
    compare(machine, row, ours.step, {row.peer: peer.step})
    require_finite([*own.written(), *wide.params])
    return [row]


def run_norm(name: str, machine: Machine, case: Case) -> list[Row]:
    """A step that measures the norm of its gradients: a second read of them."""
    data = make_data(machine, [machine.elements(BIG)])
    optimizer = getattr(onepass, name)(data.params, lr=LR, grads=data.grads)
    step = functools.partial(optimizer.step, max_grad_norm=math.inf)
    three_steps(data.params, step)
    require_moved(outcome(data.params))
    block = gradient_block(data.elements).astype(np.float64) ** 2
    whole, rest = divmod(data.elements, block.size)
    expected = math.sqrt(whole * block.sum() + block[:rest].sum())
    if not math.isclose(float(optimizer.grad_norm), expected, rel_tol=1e-9):
        raise CheckError(f"the norm is {float(optimizer.grad_norm)!r} instead of {expected!r}")
    own = replace(data, slots=states_of(optimizer))
    row = new_row(case, data.elements, COPY, bytes=own.bytes + data.grads[0].nbytes)
    against_copy(machine, row, step)
    require_finite(own.written())
    return [row]


# --- Cases: batch normalization ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Inputs, outputs and parameters of one call."""

    channel_axis: int
    x: Array
    dy: Array
    out: Array
    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array

    def reset(self) -> None:
        """Take the running statistics back to 0 and 1."""
        clear([self.running_mean])
        self.running_var.fill(1.0)

    @property
    def bytes(self) -> int:
        """Of an array like `x`."""
        return int(self.x.nbytes)


class InTurn:
    """Calls one after the other of several steps."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = itertools.cycle(steps)

    def __call__(self) -> object:
        """Call the next."""
        return next(self.steps)()


def make_batches(
    machine: Machine, shape: tuple[int, ...], layout: str, dtype: np.dtype[Any], backward: bool
) -> list[Batch]:
    """Make as many sets of arrays as the second-level cache cannot hold a part of."""
    cupy, batch = machine.cupy, BATCH
    if machine.divisor > 1000:
        batch, shape = 3, (max(shape[0] // 128, 3), *(min(side, 9) for side in shape[1:]))
    elif machine.divisor > 1:
        batch = BATCH // 8
    channels, *rest = shape
    in_memory = (batch, *rest, channels) if layout == "NHWC" else (batch, *shape)
    count = math.prod(in_memory)
    rng = np.random.default_rng(7)
    x, dy = (rng.standard_normal(min(count, PERIOD), np.float32) for _ in range(2))
    x = 2.0 * x + 1.0
    dy = dy + 0.5 + 0.25 * x  # along with x, so that the sums do not cancel
    weight, bias = rng.standard_normal((2, channels)).astype(np.float32)
    size = count * dtype.itemsize * (3 if backward else 2)
    sets = min(max(-(-4 * machine.l2_bytes // size), 1), 16)
    return [
        Batch(
            -1 if layout == "NHWC" else 1,
            x=repeated(cupy, x, count, dtype).reshape(in_memory),
            dy=repeated(cupy, dy, count if backward else 1, dtype).reshape(in_memory if backward else (1,)),
            out=zeros(cupy, count, dtype).reshape(in_memory),
            weight=cupy.asarray(1.0 + np.float32(0.1) * weight),
            bias=cupy.asarray(bias),
            running_mean=cupy.zeros(channels, np.float32),
            running_var=cupy.asarray(np.ones(channels, np.float32)),
        )
        for _ in range(sets)
    ]


def our_forward(batch: Batch) -> Step:
    """Make our forward pass."""
    return functools.partial(
        functional.batch_norm,
        *(batch.x, batch.weight, batch.bias, batch.running_mean, batch.running_var),
        channel_axis=batch.channel_axis,
        momentum=MOMENTUM,
        eps=EPS,
        out=batch.out,
    )


def our_backward(batch: Batch) -> Step:
    """Make our backward pass."""
    forward: Any = our_forward(batch)()
    _, mean, invstd = forward
    return functools.partial(
        functional.batch_norm_backward,
        *(batch.dy, batch.x, mean, invstd, batch.weight, batch.bias),
        channel_axis=batch.channel_axis,
        out=batch.out,
    )


class TorchBatchNorm:
    """Both passes by torch's operators, on the same input: cuDNN's, or torch's own kernels.

    What a pass returned is kept until its next call, so that the outputs of several go into different memory, as ours.
    """

    def __init__(self, torch: Any, batch: Batch, cudnn: bool) -> None:
        self.torch, self.cudnn = torch, cudnn
        self.x, self.dy = (self._nchw(batch, array) for array in (batch.x, batch.dy))
        self.weight, self.bias = (as_tensor(torch, array) for array in (batch.weight, batch.bias))
        self.running = [torch.zeros_like(self.weight), torch.ones_like(self.weight)]
        self.saved: Sequence[Any] = ()
        self.kept: Any = None

    def _nchw(self, batch: Batch, array: Array) -> Any:
        tensor = as_tensor(self.torch, array)
        return tensor.permute(0, 3, 1, 2) if batch.channel_axis == -1 and tensor.ndim == 4 else tensor

    def forward(self) -> Any:
        """Return y, mean, invstd."""
        operators = self.torch.ops.aten
        operator = operators.cudnn_batch_norm if self.cudnn else operators.native_batch_norm
        self.kept = operator(self.x, self.weight, self.bias, *self.running, True, MOMENTUM, EPS)
        return self.kept[:3]

    def prepare_backward(self) -> None:
        """Keep what the backward pass needs."""
        self.forward()
        self.saved = self.kept[1:]

    def backward(self) -> Any:
        """Return the gradients of x, weight and bias."""
        operators = self.torch.ops.aten
        if self.cudnn:
            mean, invstd, reserve = self.saved
            self.kept = operators.cudnn_batch_norm_backward(
                self.x, self.dy, self.weight, *self.running, mean, invstd, EPS, reserve
            )
        else:
            self.kept = operators.native_batch_norm_backward(
                *(self.dy, self.x, self.weight, *self.running, *self.saved, True, EPS, [True, True, True])
            )
        return self.kept


def require_close_tensors(
    torch: Any, name: str, got: Sequence[Any], expected: Sequence[Any], errors: Sequence[float]
) -> None:
    """Raise unless all tensors are the same but for rounding; compared on the device, in float32."""
    for index, (tensor, right, error) in enumerate(zip(got, expected, errors, strict=True)):
        wide, right_wide = tensor.detach().float(), right.detach().float()
        scale = right_wide.square().mean().sqrt()
        bound = error * (right_wide.abs() + scale)
        if tensor.shape != right.shape or not bool(((wide - right_wide).abs() <= bound).all()):
            raise CheckError(f"{name} makes another array {index} than ours")


def _first_result(passes: Sequence[TorchBatchNorm], backward: bool) -> Sequence[Any]:
    """Return what the first of several makes, after it was prepared for all."""
    if not backward:
        return [*passes[0].forward(), *passes[0].running]
    for each in passes:
        each.prepare_backward()
    return [*passes[0].backward()]


def _torch_batchnorm(
    machine: Machine, batches: Sequence[Batch], backward: bool, expected: Sequence[Array], errors: Sequence[float]
) -> tuple[dict[str, Step], str]:
    """Make torch's passes that can run and that arrive where ours does."""
    torch = machine.torch
    if torch is None:
        return {}, machine.no_torch
    steps: dict[str, Step] = {}
    notes = []
    for name, cudnn in (("cuDNN", True), ("torch's own", False)):
        passes = [TorchBatchNorm(torch, batch, cudnn) for batch in batches]
        got, why = _tried(functools.partial(_first_result, passes, backward))
        if why:
            notes.append(f"{name} cannot: {why}")
            continue
        ours = [as_tensor(torch, array) for array in expected]
        if batches[0].channel_axis == -1:
            ours[0] = ours[0].permute(0, 3, 1, 2)
        require_close_tensors(torch, name, got, ours, errors)
        steps[name] = InTurn([each.backward if backward else each.forward for each in passes])
    return steps, "; ".join(notes)


def _named(dtype: np.dtype[Any]) -> str:
    return str(dtype.name)


def run_batchnorm(
    backward: bool, layout: str, dtype: np.dtype[Any], shape: tuple[int, ...], machine: Machine, case: Case
) -> list[Row]:
    """One pass against cuDNN's through torch."""
    batches = make_batches(machine, shape, layout, dtype, backward)
    row = new_row(case, batches[0].x.size, "cuDNN", Goal(">=", 1.0), bytes=batches[0].bytes * (3 if backward else 2))
    error = BATCHNORM_ERROR[dtype]
    errors: tuple[float, ...]
    first = batches[0]
    first.reset()
    if backward:
        steps = [our_backward(batch) for batch in batches]
        gradients: Any = steps[0]()
        expected, errors = list(gradients)[:3], (error, SUM_ERROR, SUM_ERROR)
    else:
        steps = [our_forward(batch) for batch in batches]
        made: Any = steps[0]()
        statistics = [array.astype(np.float32) for array in made[1:]]
        expected = [made[0], *statistics, first.running_mean, first.running_var]
        errors = (error, *[BATCHNORM_ERROR[FLOAT32]] * 4)
    if not all(np.isfinite(piece).all() for array in expected for piece in pieces(array)):
        raise CheckError("ours made a NaN or an infinity")
    if not np.ptp(pieces(expected[0])[0]):
        raise CheckError("ours left its output where it was")
    with _no_grad(machine.torch):
        peers, row.note = _torch_batchnorm(machine, batches, backward, expected, errors)
        compare(machine, row, InTurn(steps), peers, against="cuDNN")
    if row.value is not None and row.peer != "cuDNN":
        row.note = f"{row.note}; against {row.peer}"
    require_finite([first.out, first.running_mean, first.running_var])
    return [row]


@contextmanager
def _no_grad(torch: Any) -> Iterator[None]:
    if torch is None:
        yield
        return
    with torch.no_grad():
        yield


def run_on_chip(dtype: np.dtype[Any], shape: tuple[int, ...], machine: Machine, case: Case) -> list[Row]:
    """A forward pass whose channels fit on the chip, against the copy."""
    batches = make_batches(machine, shape, "NCHW", dtype, False)
    steps = [our_forward(batch) for batch in batches]
    row = new_row(case, batches[0].x.size, COPY, Goal(">=", 0.75), bytes=2 * batches[0].bytes)
    against_copy(machine, row, InTurn(steps))
    kib = batches[0].bytes / batches[0].weight.size / 1024
    row.note = f"a channel has {kib:.0f} KiB"
    require_finite([batches[0].out])
    return [row]


# --- All cases --------------------------------------------------------------------------------------------------------

FUSED_PAIRS = (*optimizers.FUSED_PAIRS, ADAMW)
NO_GOAL = ("Momentum",)  # among those against torch fused


def all_cases() -> list[Case]:
    """Those that say most come first."""
    narrow, wide = (BFLOAT16,) * 3, (FLOAT32,) * 3

    def case(kind: str, name: str, run: Callable[..., list[Row]], *arguments: Any) -> Case:
        return Case(f"{kind}/{name}", kind, functools.partial(run, *arguments) if arguments else run)

    cases = [case("copy", "1GiB", run_copy)]
    cases += [case("rules", rule, run_rule, rule) for rule in optimizers.rules()]
    cases.append(case("many", f"Adam/{TENSORS}x{TENSOR_SIZE}", run_many))
    cases += [
        case(
            "fused",
            f"{pair.name}/64M",
            run_torch,
            *(pair, MIDDLE, None if pair.name in NO_GOAL else Goal(">=", 1.0), FUSED, wide),
        )
        for pair in FUSED_PAIRS
    ]
    cases += [
        case("unfused", f"{pair.name}/64M", run_torch, pair, MIDDLE, Goal(">=", 2.5), ANY, wide)
        for pair in optimizers.UNFUSED_PAIRS
    ]
    cases.append(case("whole", "AdamW/64M", run_whole))
    cases.append(case("storage", "Adam/256M", run_storage))
    for passes in ("forward", "backward"):
        for layout in LAYOUTS:
            for dtype in (BFLOAT16, FLOAT32):
                for shape in SHAPES:
                    name = f"{passes}/{layout}/{_named(dtype)}/{shape_name(shape)}"
                    cases.append(case("batchnorm", name, run_batchnorm, passes == "backward", layout, dtype, shape))
    cases += [
        case("on-chip", f"{_named(dtype)}/{shape_name(shape)}", run_on_chip, dtype, shape)
        for dtype in (FLOAT32, BFLOAT16)
        for shape in ON_CHIP
    ]
    cases += [
        case("expressions", f"{name}/{NAMES[size]}", run_expressions, name, size)
        for size in (MIDDLE, SMALL)
        for name in RULES
    ]
    cases.append(case("graph", f"Adam/{TENSORS}x{TENSOR_SIZE}", run_graph))
    cases += [case("norms", f"{name}/256M", run_norm, name) for name in ("SGD", "Adam")]
    cases.append(case("fused-bfloat16", "Adam/64M", run_torch, optimizers.ADAM, MIDDLE, None, FUSED, narrow))
    return cases


def shape_name(shape: tuple[int, ...]) -> str:
    """Write a shape as the table does."""
    return "x".join(map(str, (BATCH, *shape)))


def means(rows: Sequence[Row]) -> list[Row]:
    """Make the rows of geometric means: of each pass, layout and dtype, and of all."""
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row.kind == "batchnorm" and row.value is not None and not row.failed:
            groups[row.case.rpartition("/")[0]].append(row)
    made = []
    whole = len(SHAPES) * len(LAYOUTS) * 2 * 2
    measured = [row for group in groups.values() for row in group]
    for name, parts, size, goal in (
        *((name, parts, len(SHAPES), None) for name, parts in groups.items()),
        ("batchnorm", measured, whole, Goal(">=", 1.3)),
    ):
        if len(parts) == size:
            row = Row(f"{name}/geometric mean", "batchnorm-mean", 0, 0, OURS, "cuDNN", goal)
            row.value = method.geometric_mean([part.value for part in parts if part.value is not None])
            row.note = f"over {size} rows"
            made.append(row)
    return made


def run_case(machine: Machine, case: Case) -> list[Row]:
    """Return the case's rows, or one that says what went wrong."""
    try:
        return case.run(machine, case)
    except CheckError as error:
        note = str(error)
    except Exception as error:
        note = _first_line(error)
    finally:
        if machine.alive():
            machine.free()
    return [Row(case.name, case.kind, 0, 0, OURS, "", note=note, failed=True)]


# --- A small run, for compute-sanitizer -------------------------------------------------------------------------------

SMALL_SIZES = (0, 1, 3, 1000, 4097)


def small_run(cupy: Any) -> int:
    """Launch every kernel over small arrays, each in memory of its own; return how many steps were taken."""
    if hasattr(cupy.cuda, "set_allocator"):
        cupy.cuda.set_allocator(None)  # no pool: a tool sees where an array ends
    rng = np.random.default_rng(3)
    steps = 0

    def arrays(dtype: np.dtype[Any], positive: bool = False) -> list[Array]:
        made = []
        for offset, size in enumerate(SMALL_SIZES):
            host = rng.standard_normal(size + offset).astype(np.float32)
            raw = cupy.asarray((abs(host) if positive else host).astype(dtype).view(_bits(dtype)))
            made.append(raw.view(dtype)[offset:])  # aligned to its items alone
        return made

    options: list[dict[str, Any]] = [
        {},
        {"max_grad_norm": 0.5, "grad_scale": 0.25},
        {"clip_norm": 0.5, "nonfinite": "skip", "zero_grads": True},
        {"clip_value": 0.1},
    ]
    for name in RULES:
        optimizer = getattr(onepass, name)(arrays(FLOAT32), lr=1e-3, ema_decay=0.9, mirror=arrays(BFLOAT16))
        for option in options:
            optimizer.step(arrays(FLOAT32), **option)
            steps += 1
    for storage in _cpu.storages():
        param, grad, state = (BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in storage)
        optimizer = onepass.Adam(arrays(param), lr=1e-3, state_dtype=state)
        for option in options:
            optimizer.step(arrays(grad), **option)
            steps += 1
    more: list[dict[str, Any]] = [
        {"rounding": "stochastic", "seed": 1},
        {"master": "split"},
        {"accumulate": 2},
        {"gradient_noise": (0.1, 0.5), "seed": 2},
    ]
    for keywords in more:
        optimizer = onepass.Adam(arrays(BFLOAT16), lr=1e-3, **keywords)
        for _ in range(2):
            optimizer.step(arrays(BFLOAT16), max_grad_norm=1.0)
            steps += 1
    matrix = cupy.asarray(rng.standard_normal((37, 19)).astype(np.float32))
    onepass.SGD(matrix, lr=0.1, max_unit_norm=(1.0, 0)).step(matrix.copy())
    centered = onepass.RMSprop(matrix, centered=True, momentum=0.9)
    centered.step(cupy.asarray(rng.standard_normal((19, 37)).astype(np.float32)).T)  # gathered
    steps += 2
    for dtype in (FLOAT32, BFLOAT16, np.dtype(np.float16), np.dtype(np.float64)):
        for shape, axis in (((64, 5), 1), ((3, 4, 7, 7), 1), ((5, 9, 9, 12), -1), ((2, 2, 40, 40), 1)):
            host = rng.standard_normal(shape).astype(np.float32)
            x = cupy.asarray(host.astype(dtype).view(_bits(dtype))).view(dtype)
            y, mean, invstd = functional.batch_norm(x, channel_axis=axis, activation="relu", residual=x)
            functional.batch_norm_backward(x, x, mean, invstd, channel_axis=axis, activation="relu", y=y)
            steps += 2
    cupy.cuda.Device().synchronize()
    return steps


# --- The command line -------------------------------------------------------------------------------------------------


@dataclass
class Lines:
    """Writes one JSON object after the other, each of them at once."""

    path: Path | None
    rows: list[Row] = field(default_factory=list)

    def write(self, **entry: Any) -> None:
        """Append an object."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")

    def add(self, rows: Sequence[Row], quick: bool) -> None:
        """Append rows; figures of a quick run are held against no goal."""
        for row in rows:
            row.goal = None if quick else row.goal
            try:
                self.write(row=row.record())
            except ValueError:
                row = Row(row.case, row.kind, 0, 0, OURS, "", note="a figure is not finite", failed=True)
                self.write(row=row.record())
            self.rows.append(row)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=Path, help="file that gets a JSON object for whatever happens")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: only shows that it runs")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="only cases in which REGEX is found")
    parser.add_argument("--skip", type=Path, help="file with the names of cases to leave out, one in each line")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case later than this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--small-run", action="store_true", help="launch every kernel once over small arrays, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 3 if the device stopped working, 1 if there is none."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    skipped = set(options.skip.read_text(encoding="utf-8").split()) if options.skip else set()
    cases = [case for case in all_cases() if options.only.search(case.name) and case.name not in skipped]
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    try:
        if not _cpu.cuda_devices():
            raise RuntimeError("there is no CUDA device, or onepass was built without CUDA kernels")
        if options.small_run:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cupy = importlib.import_module("cupy")
            print(f"{small_run(cupy)} steps")
            return 0
        machine = make_machine(options.quick)
    except (ImportError, RuntimeError) as error:
        print(f"gpu_cases.py: {_first_line(error)}", file=sys.stderr)
        return 1
    quick = machine.divisor > 1
    lines = Lines(options.lines)
    lines.write(environment=environment(machine))
    for case in cases:
        if time.monotonic() - start > options.seconds:
            lines.add([Row(case.name, case.kind, 0, 0, OURS, "", note="not measured: no time was left")], quick)
            continue
        lines.write(begin=case.name)
        begun = time.monotonic()
        rows = run_case(machine, case)
        lines.add(rows, quick)
        lines.write(end=case.name, seconds=round(time.monotonic() - begun, 3))
        for row in rows:
            value = "" if row.value is None else f"{row.value.value:.4g}"
            print(f"{time.monotonic() - start:6.1f} s  {row.case}: {value} {row.note}", flush=True)
        if not machine.alive():
            return 3
    lines.add(means(lines.rows), quick)
    lines.write(clocks=clocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Optimizers over sizes, numbers of tensors and of threads, subnormal moments, models; their memory: one table.

``python bench/peers/sweeps.py`` takes a quarter of an hour on two quiet cores and 14 GB of memory. ``--quick`` only
shows that everything runs: its figures mean nothing. There are no goals.

Fair play
---------
* What `contenders.py` says of each peer holds. Each row compares with one peer; those of one case were measured in
  turns. NumPy, which is slow, meets ours apart from the others.
* Arrays that the last-level cache would keep are measured twice: ``rotated``, on so many sets of them in turn that
  together they are more than it holds twice, and ``warm``, on one set. The tiniest would need thousands of sets and are
  only measured warm; the largest do not fit anyway.
* Numbers of threads are measured in a process of their own, because XLA keeps the threads that it begins with.
* Subnormal moments are spread evenly at random among normal ones, with gradients 0, and are written anew before each
  sample, because ours flushes them. `ours_slowdown` and `peer_slowdown` are relative to a step without any.
* Models are the lists of shapes in `bench/models`. They are stepped by AdamW.
* torch flushes subnormal numbers where a program asks for it, in the threads that begin afterwards, so that contender
  has a process of its own, too. That none is left is checked.
* Memory is that of a process that does nothing else: `memory.py`.
* Before the timing each peer takes the same three steps as ours from parameters 0, and must arrive at the same
  parameters (1e-4 relative), none of them 0, and at the same states, where it takes them from outside. After it,
  everything must be finite.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import contenders
import memory
from arrays import Array, Shape, kept_bytes, parts_of
from contenders import (
    ADAM,
    ADAMW,
    COMPILED,
    DEEPSPEED,
    FLUSHING,
    MAKERS,
    NUMPY_IN_PLACE,
    OPTAX,
    PAIRS,
    Pair,
)

import method
import suite
from method import Contender, Plan, Row
from suite import OURS, Bench, Case, CheckError

SIZES = tuple(64 << 2 * power for power in range(12))  # to 256M
TENSORS = (1, 10, 100, 1000, 10_000)
TENSOR_ELEMENTS = 1000
LARGE = 1 << 24
FRACTIONS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
MODELS = {
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_b_16",
    "GPT-2 124M": "gpt2_124m",
    "Llama-3-8B layer": "llama3_8b_layer",
}
MEMORY_ELEMENTS = 1 << 26

TORCH = ("torch fused", "torch for-loop", "torch foreach", COMPILED)
MODEL_PEERS = ("torch fused", "torch foreach", COMPILED, DEEPSPEED, OPTAX)
SUBNORMAL_PEERS = ("torch fused", NUMPY_IN_PLACE)
SUBNORMAL = np.float32(1e-40)


def plan_for(bench: Bench, elements: int, slow: bool = False) -> Plan:
    """Return the plan for arrays of a size: few rounds where each takes seconds."""
    if bench.quick:
        return bench.plan
    rounds = 11 if elements < LARGE else 7 if elements <= 4 * LARGE else 5
    return replace(bench.plan, min_rounds=min(rounds, 5) if slow else rounds)


def compare(
    bench: Bench,
    case: Case,
    pair: Pair,
    shapes: Sequence[Shape],
    names: Sequence[str] | None = None,
    sets: int = 1,
) -> list[Row]:
    """Compare an optimizer with peers: a row for each."""
    count = sum(shape if isinstance(shape, int) else math.prod(shape) for shape in shapes)
    slots = len(pair.states)
    row = Row(case.name, case.kind, case.threads, count, OURS, "", bytes=4 * count * (3 + 2 * slots))
    row.buffers = method.buffers(sets * kept_bytes(count, slots))
    row.tensors = len(shapes)
    plans = functools.partial(plan_for, bench, count)
    return contenders.compare_all(bench, plans, row, pair, shapes, names, sets)


# --- Cases ------------------------------------------------------------------------------------------------------------


def run_size(pair: Pair, elements: int, sets: int, names: Sequence[str] | None, bench: Bench, case: Case) -> list[Row]:
    """One array, or several sets of one in turn; the largest in a process of its own, which gives its memory back."""
    if bench.quick:
        elements, sets = min(elements, 4096), min(sets, 2)
    if elements <= LARGE:
        return compare(bench, case, pair, [elements], names, sets)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_size_alone, pair.name, elements, names, bench, sendable(case)).result()


def sendable(case: Case) -> Case:
    """Return the case without what runs it, which has functions in it that no process can send to another."""
    return replace(case, run=run_threads)


def _size_alone(pair: str, elements: int, names: Sequence[str] | None, bench: Bench, case: Case) -> list[Row]:
    with suite.thread_count(case.threads):
        return compare(bench, case, PAIRS[pair], [elements], names)


def run_tensors(tensors: int, sets: int, bench: Bench, case: Case) -> list[Row]:
    """Many small arrays, or several sets of them in turn."""
    if bench.quick:
        tensors, sets = min(tensors, 5), min(sets, 2)
    return compare(bench, case, ADAM, [TENSOR_ELEMENTS] * tensors, None, sets)


def run_threads(bench: Bench, case: Case) -> list[Row]:
    """One large array, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_with_threads, bench, case).result()


def _with_threads(bench: Bench, case: Case) -> list[Row]:
    with suite.thread_count(case.threads):
        names = [name for name in MAKERS if name not in contenders.SLOW]
        return compare(bench, case, ADAM, [4096 if bench.quick else LARGE], names)


def run_model(model: str, bench: Bench, case: Case) -> list[Row]:
    """All parameters of a model."""
    shapes = [shape for _, shape in read_model(model)]
    if bench.quick:
        shapes = [tuple(min(size, 8) for size in shape) for shape in shapes[:6]]
    return compare(bench, case, ADAMW, shapes, MODEL_PEERS)


def read_model(model: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a model's parameters."""
    file = method.ROOT / "bench" / "models" / f"{MODELS[model]}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    return [(name, tuple(shape)) for name, shape in content[model]]


# --- Subnormal moments ------------------------------------------------------------------------------------------------


class Moments:
    """What is written before each sample: parameters, gradients and moments, some of them subnormal."""

    def __init__(self, params: Array, grads: Array, fraction: float) -> None:
        self.params, self.grads = params, grads
        size = min(params.size, 1 << 20)
        chosen = np.random.default_rng(11).permutation(size) < round(fraction * size)
        self.m, self.v, self.g = (
            np.where(chosen, low, np.float32(high)) for low, high in ((SUBNORMAL, 1e-3), (SUBNORMAL, 1e-6), (0.0, 1e-3))
        )

    def refill(self, m: Array, v: Array) -> None:
        """Write all of it."""
        self.params.fill(1.0)
        for array, block in ((self.grads, self.g), (m, self.m), (v, self.v)):
            method.fill_with(array, block.astype(np.float32, copy=False))


def run_subnormal(fraction: float, bench: Bench, case: Case) -> list[Row]:
    """Steps with a fraction of subnormal moments, and without, of ours and of peers."""
    rows = _subnormal(fraction, [name for name in SUBNORMAL_PEERS if bench.peers.search(name)], bench, case)
    if bench.peers.search(FLUSHING):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows += process.submit(_subnormal_flushed, fraction, bench, case).result()
    return rows


def _subnormal_flushed(fraction: float, bench: Bench, case: Case) -> list[Row]:
    with suite.thread_count(case.threads):
        return _subnormal(fraction, [FLUSHING], bench, case)


def _subnormal(fraction: float, names: Sequence[str], bench: Bench, case: Case) -> list[Row]:
    count = 4096 if bench.quick else LARGE
    made = contenders.contest(ADAM, [count], names, case.threads)
    (data,), (optimizer,) = made.data_sets, made.ours
    state = optimizer.state[0]
    moments = {OURS: (state["exp_avg"], state["exp_avg_sq"]), **dict.fromkeys(made.peers, data.slots[0])}
    steps = {OURS: optimizer.step, **{name: peers[0].step for name, peers in made.peers.items()}}
    filled = {share: Moments(data.params[0], data.grads[0], share) for share in (0.0, fraction)}
    timed = [
        Contender(f"{name} {share:g}", step, functools.partial(values.refill, *moments[name]))
        for share, values in filled.items()
        for name, step in steps.items()
    ]
    samples = method.interleave(timed, plan_for(bench, count, slow=True))
    made.check()
    for name in {OURS, FLUSHING} & steps.keys():
        filled[fraction].refill(*moments[name])
        steps[name]()
        if any(has_subnormal(part) for moment in moments[name] for part in parts_of(moment)):
            raise CheckError(f"{name} leaves subnormal moments")

    base = Row(case.name, case.kind, case.threads, count, OURS, "", bytes=28 * count)
    base.buffers = method.buffers(kept_bytes(count, 2))
    rows = []
    for name in names:
        row = replace(base, case=f"{case.name}/{name}", peer=name, note=made.missing.get(name, ""))
        row.extra = {"fraction": fraction}
        if name in made.peers:
            ours, peer = f"{OURS} {fraction:g}", f"{name} {fraction:g}"
            row.take(samples, ours, peer)
            row.value = method.ratio(samples[peer], samples[ours])
            for side, slow, normal in (("ours", ours, f"{OURS} 0"), ("peer", peer, f"{name} 0")):
                slowdown = method.ratio(samples[slow], samples[normal])
                row.extra[f"{side}_slowdown"] = slowdown.value
                row.extra[f"{side}_slowdown_low"] = slowdown.low
                row.extra[f"{side}_slowdown_high"] = slowdown.high
        rows.append(row)
    return rows


def has_subnormal(values: Array) -> bool:
    """Judge by bits, since arithmetic may flush in this thread."""
    bits = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bool(np.any((bits != 0) & (bits < 0x00800000)))


# --- Memory -----------------------------------------------------------------------------------------------------------


def run_memory(name: str, storage: str, bench: Bench, case: Case) -> list[Row]:
    """Bytes of states and of the peak, in a process of its own."""
    if not bench.peers.search(name):
        return []
    count = 1 << 16 if bench.quick else MEMORY_ELEMENTS
    row = Row(case.name, case.kind, case.threads, count, OURS, name)
    command = [sys.executable, str(Path(memory.__file__)), name, storage, str(count)]
    environment = {**os.environ, "ONEPASS_NUM_THREADS": str(case.threads)}
    environment.pop(suite.TUNABLES, None)  # memory that is kept would count
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"memory of {name}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row.note = result.pop("missing", "")
    row.extra = result
    row.note = row.note or "{state_bytes:.1f} bytes of states and a peak of {peak_bytes:.1f} per parameter".format(
        **result
    )
    return [row]


# --- All of them ------------------------------------------------------------------------------------------------------


def size_cases(pair: Pair, sizes: Iterable[int], names: Sequence[str] | None, both: bool) -> list[Case]:
    """Return cases for all sizes, rotated and, if `both`, also warm; warm alone where arrays are too small."""
    cases = []
    for size in sizes:
        each = kept_bytes(size, len(pair.states))
        sets = method.sets_for(each)
        name = f"size/{pair.name}/{size}"
        if sets is not None:
            cases.append(Case(name, "size", functools.partial(run_size, pair, size, sets, names)))
        if sets is None or (both and sets > 1):
            warm = name if sets is None else f"{name}/warm"
            cases.append(Case(warm, "size", functools.partial(run_size, pair, size, 1, names)))
    return cases


def tensor_cases() -> list[Case]:
    """Return cases for all numbers of tensors, as size_cases() does."""
    cases = []
    for count in TENSORS:
        sets = method.sets_for(kept_bytes(count * TENSOR_ELEMENTS, len(ADAM.states)))
        name = f"tensors/Adam/{count}x{TENSOR_ELEMENTS}"
        if sets is not None:
            cases.append(Case(name, "tensors", functools.partial(run_tensors, count, sets)))
        if sets is None or sets > 1:
            warm = name if sets is None else f"{name}/warm"
            cases.append(Case(warm, "tensors", functools.partial(run_tensors, count, 1)))
    return cases


def thread_counts() -> list[int]:
    """Return 1 to as many threads as this process may use: all of the first eight, then powers of two."""
    most = len(method.usable_cpus())
    return [count for count in range(1, most + 1) if count <= 8 or count & (count - 1) == 0 or count == most]


def all_cases() -> list[Case]:
    """Peers are loaded by the first cases; what needs a process of its own comes last."""
    cases = size_cases(ADAM, SIZES, None, both=True)
    for name in ("SGD", "RMSprop-centered"):
        cases += size_cases(PAIRS[name], SIZES[::2], TORCH, both=False)
    cases += tensor_cases()
    cases += [
        Case(f"subnormal/Adam/{fraction:g}", "subnormal", functools.partial(run_subnormal, fraction))
        for fraction in FRACTIONS
    ]
    cases += [Case(f"model/{model}", "model", functools.partial(run_model, model)) for model in MODELS]
    cases += [Case(f"threads/Adam/16M/{count}", "threads", run_threads, count) for count in thread_counts()]
    cases += [
        Case(f"memory/Adam/{storage}/{name}", "memory", functools.partial(run_memory, name, storage))
        for storage in memory.STORAGES
        for name in ((OURS, *contenders.names_for(ADAM)) if storage == "float32" else (OURS,))
    ]
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    return suite.main("sweeps", __doc__, all_cases(), arguments)


if __name__ == "__main__":
    sys.exit(main())

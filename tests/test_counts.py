"""Promise: one pass. What a step reads, writes, computes, launches and allocates is counted, not timed."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import builds
import onepass
from helpers import CLASSES, Producer
from onepass import _cpu

COUNTING = builds.ROOT / "tests" / "cpp" / "counting"
SLOTS = {row["name"]: row["slots"] for row in _cpu.registry() if not row["yardstick"]}


# Passes and regions: the package's loops, compiled for an instruction set that counts


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    return builds.cmake_build(tmp_path_factory, "counting", COUNTING, targets=["counting"]) / "counting"


def test_each_element_is_read_and_written_as_often_as_the_library_says(counting):
    """And how work is divided: a step is one region of threads, whatever it steps."""
    checks, wrong = map(int, re.findall(r"\d+", builds.tool(counting).splitlines()[-1]))
    assert checks > 50_000
    assert wrong == 0


def test_the_counts_of_rules_are_those_that_are_published(counting):
    counted = json.loads(builds.tool(counting, "--json"))
    published = json.loads((builds.ROOT / "bench" / "counts.json").read_text())
    assert counted == published, "`make bench-guard ARGS=--update` counts them anew"
    assert list(counted) == list(SLOTS)
    for rule, counts in counted.items():
        slots = len(SLOTS[rule])
        assert (counts["slots"], counts["reads"], counts["writes"]) == (slots, 2 + slots, 1 + slots), rule
        assert counts["adds"] > 0, rule


def rows_of_readme() -> list[tuple[str, int]]:
    """The optimizers of README's table as one constructs them, and the bytes that they move."""
    text = (builds.ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## The optimizers") :].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith(("| `", "| [`"))]
    return [(re.findall("`(.*?)`", cells[0])[0], int(cells[-1])) for cells in rows]


def test_readme_tells_the_bytes_that_are_counted():
    counts = json.loads((builds.ROOT / "bench" / "counts.json").read_text())
    rows = rows_of_readme()
    assert {name.partition("(")[0] for name, _ in rows} == {cls.__name__ for cls in CLASSES}
    rules = set()
    for name, told in rows:
        made = name if "(" in name else f"{name}()"
        optimizer = eval(made.replace("(", "(np.ones(3, np.float32), "), {"np": np}, vars(onepass))
        (rule,) = optimizer._rules
        assert told == 4 * (counts[rule]["reads"] + counts[rule]["writes"]), name
        rules.add(rule)
    assert rules == set(SLOTS)


# Allocations


GLIBC = platform.libc_ver()[0] == "glibc"
counts_allocations = pytest.mark.skipif(
    not GLIBC or "LD_PRELOAD" in os.environ,
    reason="counts calls of malloc(), which only glibc lets be replaced, and not behind a sanitizer",
)


@pytest.fixture(scope="module")
def allocations(tmp_path_factory):
    folder = builds.folder_of_package() or builds.consumer(tmp_path_factory)
    (library,) = folder.rglob("libonepass_cpu.a")
    targets = ["allocations", "allocations_counter"]
    return builds.cmake_build(
        tmp_path_factory, "allocations", COUNTING, f"-DONEPASS_LIBRARY={library}", targets=targets
    )


@counts_allocations
def test_the_library_asks_for_no_memory_once_it_has_it(allocations):
    """Every call of the C++ interface, with 1 and 2 threads. Batch normalization keeps nothing between two calls."""
    builds.tool(allocations / "allocations")


STEPS = 200
TENSORS = 5
BFLOAT16 = ml_dtypes.bfloat16

Call = Callable[[], Any]


def filled(count: int = TENSORS, dtype: Any = np.float32, **order: Any) -> list[np.ndarray]:
    return [np.full((20, 30 + k), 0.5, dtype, **order) for k in range(count)]


def bound(cls: type[onepass.Optimizer] = onepass.Adam, dtype: Any = np.float32, **options: Any) -> onepass.Optimizer:
    return cls(filled(dtype=dtype), grads=filled(dtype=dtype), **options)


def stepping(optimizer: onepass.Optimizer, *grads: Any, **options: Any) -> Call:
    return functools.partial(optimizer.step, *grads, **options)


def batch_norm(backward: bool) -> Call:
    layer = onepass.BatchNorm(16)
    x = np.random.default_rng(0).normal(size=(8, 16, 10, 10)).astype(np.float32)
    out, dx = np.empty_like(x), np.empty_like(x)

    def call() -> None:
        layer.forward(x, out=out)
        if backward:
            layer.backward(x, out=dx)

    return call


def functional_adam() -> Call:
    arrays = filled()[0], filled()[0], filled()[0], filled()[0]
    return functools.partial(onepass.functional.adam, *arrays, step=3)


def mirrored() -> Call:
    return stepping(bound(mirror=[np.empty(p.shape, BFLOAT16) for p in filled()]))


def structured() -> Call:
    params = {f"name{k}": param for k, param in enumerate(filled())}
    return stepping(onepass.Adam(params), {name: param.copy() for name, param in params.items()})


def grouped() -> Call:
    params = filled()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    return stepping(onepass.Adam(groups), [filled()[:2], filled()[2:]])


# Calls that ask for no memory at all: neither of ours nor of Python's, whose small objects have pools.
NOTHING: dict[str, Callable[[], Call]] = {
    **{f"{cls.__name__}, bound": functools.partial(lambda c: stepping(bound(c)), cls) for cls in CLASSES},
    **{f"{cls.__name__}": functools.partial(lambda c: stepping(c(filled()), filled()), cls) for cls in CLASSES},
    "max_grad_norm": lambda: stepping(bound(), max_grad_norm=1.0),
    "clip_norm": lambda: stepping(bound(), clip_norm=1.0),
    "clip_value": lambda: stepping(bound(), clip_value=1.0, grad_scale=0.5),
    "nonfinite": lambda: stepping(bound(), nonfinite="skip"),
    "ema": lambda: stepping(bound(ema_decay=0.9)),
    "rounding": lambda: stepping(bound(dtype=BFLOAT16, rounding="stochastic")),
    "split master": lambda: stepping(bound(dtype=BFLOAT16, master="split")),
    "noise": lambda: stepping(bound(gradient_noise=(0.1, 0.55))),
    "accumulate": lambda: stepping(bound(accumulate=4)),
    "zero_grads": lambda: stepping(bound(), zero_grads=True, max_grad_norm=1.0),
    "mirror": mirrored,
    "dict": structured,
    "groups": grouped,
    "schedule": lambda: stepping(bound(lr=lambda t: 0.1 / t)),
    "100 tensors, bound": lambda: stepping(onepass.Adam(filled(100), grads=filled(100))),
}

# And those that ask for a few bytes at each call, with the most that it may be: what they are is said beside each.
FEW: dict[str, tuple[int, Callable[[], Call]]] = {
    # Python's, for the tuple in which a list of gradients is kept during the step.
    "100 tensors": (1, lambda: stepping(onepass.Adam(filled(100)), filled(100))),
    # How each gradient is walked, found anew (batch.cpp, Batch::read() and layout.cpp, walk_axes()).
    "another order": (22, lambda: stepping(onepass.Adam(filled()), filled(order="F"))),
    # Which axes are a unit's, of the setting and of each parameter (read_setting() and read_units()).
    "units": (23, lambda: stepping(bound(max_unit_norm=(1.0, 0)))),
    # Three for each producer: two are its own.
    "DLPack": (15, lambda: stepping(onepass.Adam(filled()), [Producer(grad) for grad in filled()])),
    # A batch of one call, with the names of its arrays for messages (module_cpu.cpp, update_owned()).
    "functional": (36, functional_adam),
    # Shapes, strides, names of arguments (bindings/batchnorm.cpp); constants and sums of channels (cpu/batchnorm.cpp).
    "BatchNorm, forward": (16, lambda: batch_norm(backward=False)),
    "BatchNorm, both": (26, lambda: batch_norm(backward=True)),
}


def print_allocations() -> None:
    """In a process of its own, where malloc() counts: a line of JSON."""
    counter = ctypes.CDLL(None).onepass_allocations
    counter.restype = ctypes.c_ulong
    _cpu.set_serial_bytes(0)
    made = {}
    for threads in (1, 2):
        onepass.set_num_threads(threads)
        for name, prepare in {**NOTHING, **{name: prepare for name, (_, prepare) in FEW.items()}}.items():
            call = prepare()
            for _ in range(20):
                call()
            before = counter()
            for _ in range(STEPS):
                call()
            made[f"{name}, threads={threads}"] = counter() - before
    print(json.dumps(made))


def counted_in_a_process(folder: Path, code: str) -> str:
    counter = folder / "liballocations_counter.so"
    paths = [str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ONEPASS"))}
    environment = {**kept, "LD_PRELOAD": str(counter), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@counts_allocations
def test_steps_ask_for_no_memory(allocations):
    made = json.loads(counted_in_a_process(allocations, "import test_counts; test_counts.print_allocations()"))
    most = {**dict.fromkeys(NOTHING, 0), **{name: limit for name, (limit, _) in FEW.items()}}
    assert set(made) == {f"{name}, threads={threads}" for name in most for threads in (1, 2)}
    too_many = {
        name: f"{count} in {STEPS} calls"
        for name, count in made.items()
        if count > STEPS * most[name.rpartition(", threads=")[0]]
    }
    assert not too_many


@counts_allocations
def test_allocations_are_counted(allocations):
    """Or the test above could not fail."""
    code = (
        "import ctypes, numpy as np\n"
        "count = ctypes.CDLL(None).onepass_allocations\n"
        "before = count()\n"
        "for _ in range(100): np.empty(100_000)\n"
        "print(count() - before)\n"
    )
    assert 100 <= int(counted_in_a_process(allocations, code)) <= 110


# Launches


# The rest of what may wait, copy or fill, next to what cuda_arrays counts.
QUIET = (
    "cudaMemcpy",
    "cudaMemcpyPeerAsync",
    "cudaMemsetAsync",
    "cudaStreamWaitEvent",
    "cudaFree",
    "cudaFreeHost",
    "cudaGraphLaunch",
    "cudaLaunchKernelExC",
)


@pytest.fixture(scope="module")
def capacities(tmp_path_factory) -> dict[str, int]:
    """Of the tables that are passed to launches: tensors, as csrc/cuda/tables.h has them."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("capacities")
    tables = {"plain": "PlainTable<float>", "whole": "WholeTable<float>", "measure": "MeasureTable", "sum": "SumTable"}
    printed = "".join(f'  std::printf("{name} %zu\\n", {table}::capacity);\n' for name, table in tables.items())
    source = folder / "capacities.cpp"
    source.write_text(
        f'#include <cstdio>\n#include "cuda/tables.h"\nusing namespace onepass::cuda;\nint main() {{\n{printed}}}\n'
    )
    builds.tool(compiler, "-std=c++20", f"-I{builds.ROOT / 'csrc'}", source, "-o", folder / "capacities")
    words = builds.tool(folder / "capacities").split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def calls(opt: onepass.Optimizer, grads: Sequence[Any], **options: Any) -> dict[str, int]:
    """What a step in the steady state calls of the runtime: whatever launches, waits, copies, fills or allocates."""
    import cuda_arrays

    runtime = cuda_arrays.host_runtime()
    for _ in range(2):
        opt.step(grads, **options)
    before = runtime.calls(*QUIET)
    with runtime.counted() as counts:
        opt.step(grads, **options)
    counts |= {name: count - before[name] for name, count in runtime.calls(*QUIET).items()}
    assert len(counts) > len(QUIET) + 4
    return {name: count for name, count in counts.items() if count > 0}


def launches(count: int) -> dict[str, int]:
    return {"cudaLaunchKernel": count}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("cls", "count"),
    [*((cls, count) for cls in CLASSES for count in (1, TENSORS)), (onepass.Adam, 300), (onepass.Adam, 2000)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_step_is_one_launch_for_each_full_table(cls, count, capacities):
    import cuda_arrays

    def tables(kind: str) -> int:
        return math.ceil(count / capacities[kind])

    assert count > 300 or {tables(kind) for kind in capacities} == {1}
    arrays = [np.full(3 + k % 5, 0.5, np.float32) for k in range(count)]
    params, grads = cuda_arrays.on_device(arrays), cuda_arrays.on_device(arrays)
    assert calls(cls(params), grads) == launches(tables("plain"))
    # What else belongs to the step rides on the same pass.
    mirror = cuda_arrays.on_device([np.empty(array.shape, BFLOAT16) for array in arrays])
    whole = cls(params, ema_decay=0.5, mirror=mirror, weight_decay=0.1)
    assert calls(whole, grads, clip_value=1.0, grad_scale=0.5, zero_grads=True) == launches(tables("whole"))
    # A norm is a pass over the gradients, then a sum of each and one of all, before the step's own.
    judged = tables("measure") + tables("sum") + 1 + tables("plain")
    for options in ({"max_grad_norm": 1.0}, {"clip_norm": 1.0}):
        assert calls(cls(params), grads, **options) == launches(judged), options
    # Whether the step is one, and so its number, only the device knows: one launch more settles the coefficients.
    assert calls(cls(params), grads, nonfinite="skip") == launches(judged + 1)

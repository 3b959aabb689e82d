"""Memory of outputs: used again, but never while anybody can see it, and no more of it is kept than was allowed."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import onepass
from helpers import assert_same_bits, numbers
from onepass import _cpu, functional
from processes import run_all

SMALLEST = 128 << 10  # bytes
LINE = 64
MiB = 1 << 20


@pytest.fixture(autouse=True)
def _an_empty_pool():
    onepass.set_cache_limit(None)
    onepass.empty_cache()
    yield
    onepass.set_cache_limit(None)
    onepass.empty_cache()


def batch(nbytes, dtype=np.float32, *, seed=0):
    """A batch of so many bytes, of 8 channels, at the start of a cache line.

    An output shares the place of its input within a line, so the same buffer has the same address only for such inputs.
    """
    count = nbytes // np.dtype(dtype).itemsize
    assert count % 8 == 0
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    x = memory[start : start + nbytes].view(dtype).reshape(count // 8, 8)
    x[...] = np.resize(numbers(4096, dtype, seed=seed), x.shape)
    return x


def output(x):
    return functional.batch_norm(x)[0]


def address(array):
    return array.ctypes.data


# Used again


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nbytes", [SMALLEST, 3 * SMALLEST, MiB, 2 * MiB, 5 * MiB, 5 * MiB + 64])
def test_memory_is_used_again(nbytes, dtype):
    x = batch(nbytes, dtype)
    y = output(x)
    want, place = y.copy(), address(y)
    assert _cpu.cached_bytes() == 0  # what is in use does not count
    for _ in range(3):
        y.fill(np.nan)
        del y
        assert nbytes <= _cpu.cached_bytes() <= nbytes * 9 / 8 + 128
        y = output(x)
        assert address(y) == place
        assert _cpu.cached_bytes() == 0
        assert_same_bits(y, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("byte", [1, 3, 6])
def test_outputs_are_aligned_where_inputs_are_not(byte, dtype):
    values = batch(MiB, dtype)
    memory = np.zeros(values.nbytes + 64, np.uint8)
    x = memory[byte : byte + values.nbytes].view(dtype).reshape(values.shape)
    x[...] = values
    assert not x.flags.aligned
    y = output(x)
    assert y.flags.aligned
    assert_same_bits(y, output(values))


def test_what_was_used_last_is_used_first():
    x = batch(MiB)
    a, b, c = (output(x) for _ in range(3))
    places = [address(array) for array in (a, b, c)]
    assert len(set(places)) == 3
    del b, a, c
    again = [output(x) for _ in range(3)]
    assert [address(array) for array in again] == [places[2], places[0], places[1]]


def test_batches_of_nearly_the_same_size_share():
    """The last batch of an epoch is shorter: it does not take memory of its own."""
    x = batch(7 * MiB + MiB // 4)
    place = address(output(x))
    y = output(x[:-1000])
    assert address(y) == place
    assert _cpu.cached_bytes() == 0
    del y
    small = output(batch(MiB))  # not with one that is much smaller
    assert address(small) != place
    assert _cpu.cached_bytes() >= x.nbytes


def test_sizes_and_dtypes_come_from_one_pool():
    place = address(output(batch(MiB)))
    y = output(batch(MiB, np.float64))
    assert address(y) == place
    assert (y.dtype, y.shape) == (np.float64, (MiB // 64, 8))
    kept = output(np.resize(numbers(4096), (8, 8, MiB // 256)))
    assert address(kept) != place
    assert _cpu.cached_bytes() == 0


def test_all_outputs_take_part():
    x, dy, r = batch(MiB, seed=1), batch(MiB, seed=2), batch(MiB, seed=3)
    layer = onepass.BatchNorm(8, activation="relu")
    places, want = [], None
    for _ in range(3):
        arrays = [layer(x, residual=r), layer.backward(dy), layer.residual_grad]
        if want is None:
            want = [array.copy() for array in arrays]
        assert_same_bits(arrays, want)
        places.append({address(array) for array in arrays})
        assert len(places[-1]) == 3
        for array in arrays:
            array.fill(np.nan)
        del array, arrays
        layer(x, training=False)  # lets go of the residual's gradient
        layer.backward(dy)
        layer.reset_running_stats()
    assert places[1:] == places[:1] * 2


def test_a_training_loop_needs_no_new_memory():
    layers = [onepass.BatchNorm(8, activation="relu"), onepass.BatchNorm(8)]
    x, dy = batch(MiB, seed=1), batch(MiB, seed=2)

    def step():
        y = layers[1](layers[0](x, residual=x))
        layers[0].backward(layers[1].backward(dy))
        return address(y)

    for _ in range(3):
        step()
    seen, kept = set(), set()
    for _ in range(20):
        seen.add(step())
        kept.add(_cpu.cached_bytes())
    assert len(kept) == 1
    assert len(seen) <= 6


@pytest.mark.parametrize("nbytes", [0, 64, 4096, SMALLEST - 4096])
def test_small_arrays_are_not_kept(nbytes):
    x = batch(nbytes)
    for _ in range(3):
        y = output(x)
        assert y.shape == x.shape
        del y
        assert _cpu.cached_bytes() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("shape", [(0, 8), (3, 8), (40_000, 8), (4, 8, 20_000), (2, 3, 8, 50, 60)], ids=str)
def test_what_outputs_are(shape, offset, dtype):
    axis = shape.index(8)
    memory = np.resize(numbers(4096, dtype), np.prod(shape) + offset)
    x = memory[offset:].reshape(shape)
    for _ in range(2):  # new memory, and used memory
        y, mean, invstd = functional.batch_norm(x, channel_axis=axis)
        grads = functional.batch_norm_backward(x, x, mean, invstd, channel_axis=axis, activation="relu", y=y)
        for array in (y, grads.x, grads.residual):
            assert type(array) is np.ndarray
            assert (array.shape, array.dtype) == (x.shape, x.dtype)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.flags.aligned
            assert not array.flags.owndata
            assert not np.shares_memory(array, x)
            array.fill(np.nan)
            assert np.isnan(array).all()
        del array, y, grads


# Not while anybody can see it


def views():
    torch = None
    with contextlib.suppress(ImportError):
        import torch
    return {
        "slice": lambda y: y[1:2],
        "transposed": lambda y: y.T,
        "reshaped": lambda y: y.reshape(-1),
        "other-dtype": lambda y: y.view(np.int32),
        "element": lambda y: y[0, :1],
        "subclass": lambda y: y.view(np.recarray),
        "memoryview": memoryview,
        "memoryview-of-bytes": lambda y: memoryview(y).cast("B"),
        "frombuffer": lambda y: np.frombuffer(y, np.float32),
        "iterator": lambda y: y.flat,
        "nditer": np.nditer,
        "base": lambda y: y.base,
        "capsule": lambda y: y.__dlpack__(),
        "from-dlpack": np.from_dlpack,
        "broadcast": lambda y: np.broadcast_to(y, (2, *y.shape)),
        "strided": lambda y: np.lib.stride_tricks.as_strided(y, (4,), (4,)),
        "interface": lambda y: y.__array_interface__ and y.__array_struct__,
        "list": lambda y: [y],
        **({} if torch is None else {"torch": torch.from_numpy, "torch-view": lambda y: torch.from_numpy(y)[3:].t()}),
    }


@pytest.mark.parametrize("view", views())
def test_memory_is_not_used_again_while_a_view_lives(view):
    x = batch(MiB)
    y = output(x)
    place, want = address(y), y.copy()
    held = views()[view](y)
    del y
    assert _cpu.cached_bytes() == 0
    others = [output(x) for _ in range(3)]
    assert place not in {address(other) for other in others}
    for other in others:
        other.fill(np.nan)
    del other
    if isinstance(held, np.ndarray):
        assert np.isfinite(held.view(np.float32)).all()
    del held
    y = output(x)
    assert address(y) == place
    assert_same_bits(y, want)


def test_memory_in_a_cycle_comes_back_with_the_garbage_collector():
    x = batch(MiB)
    gc.disable()
    try:
        y = output(x)
        place = address(y)
        cycle = [y]
        cycle.append(cycle)
        del y, cycle
        other = output(x)
        assert address(other) != place
    finally:
        gc.enable()
    gc.collect()
    assert address(output(x)) == place


def test_arrays_outlive_the_layer():
    x, dy = batch(MiB, seed=1), batch(MiB, seed=2)
    layer = onepass.BatchNorm(8, activation="relu")
    arrays = [layer(x, residual=dy), layer.backward(dy), layer.residual_grad]
    want = [array.copy() for array in arrays]
    del layer
    gc.collect()
    others = [output(x) for _ in range(4)]
    for other in others:
        other.fill(np.nan)
    onepass.empty_cache()
    onepass.set_cache_limit(0)
    assert_same_bits(arrays, want)


def test_the_output_that_a_layer_keeps_is_not_used_again():
    """With a residual the output decides the mask of the backward pass."""
    x, r, dy = batch(MiB, seed=1), batch(MiB, seed=2), batch(MiB, seed=3)
    layer, twin = onepass.BatchNorm(8, activation="relu"), onepass.BatchNorm(8, activation="relu")
    layer(x, residual=r)  # nobody else has the output
    others = [output(dy) for _ in range(3)]
    for other in others:
        other.fill(np.nan)
    dx = layer.backward(dy)
    y = twin(x, residual=r)
    assert_same_bits(dx, twin.backward(dy))
    assert_same_bits(layer.residual_grad, np.where(y > 0, dy, np.float32(0)))


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e-40, -0.0])
def test_what_used_memory_held_does_not_count(fill):
    x, dy, r = batch(3 * MiB, seed=1), batch(3 * MiB, seed=2), batch(3 * MiB, seed=3)

    def passes():
        layer = onepass.BatchNorm(8, activation="relu")
        return [layer(x, residual=r), layer.backward(dy), layer.residual_grad]

    want = [array.copy() for array in passes()]
    onepass.empty_cache()
    dirty = [output(x) for _ in range(3)]
    places = {address(array) for array in dirty}
    for array in dirty:
        array.fill(fill)
    del array, dirty
    again = passes()
    assert {address(array) for array in again} == places
    assert_same_bits(again, want)


# The limit


def test_the_limit():
    assert onepass.get_cache_limit() == 1 << 30
    for limit in (0, 1, 10 * MiB, 2**62, np.int64(MiB)):
        onepass.set_cache_limit(limit)
        assert onepass.get_cache_limit() == limit
        assert type(onepass.get_cache_limit()) is int
    onepass.set_cache_limit(None)
    assert onepass.get_cache_limit() == 1 << 30


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (-1, 2**62 + 1, 2**64, 2**100, np.int64(-1))),
        *((value, TypeError) for value in (1.0, True, np.False_, "1", [1], np.array([1]), 1j)),
    ],
    ids=repr,
)
def test_a_bad_limit(value, error):
    del_later = output(batch(MiB))
    del del_later
    onepass.set_cache_limit(2 * MiB)
    kept = _cpu.cached_bytes()
    assert kept > 0
    with pytest.raises(error) as caught:
        onepass.set_cache_limit(value)
    assert str(caught.value) == f"count: expected an integer from 0 to 2**62 or None, got {value!r}"
    assert onepass.get_cache_limit() == 2 * MiB
    assert _cpu.cached_bytes() == kept


def test_arguments_of_the_cache():
    for call in (lambda: onepass.empty_cache(1), lambda: onepass.get_cache_limit(1), lambda: onepass.set_cache_limit()):
        with pytest.raises(TypeError, match="argument"):
            call()


def test_a_limit_of_0_keeps_nothing():
    onepass.set_cache_limit(0)
    x = batch(MiB)
    want = output(x).copy()
    for _ in range(3):
        y = output(x)
        assert_same_bits(y, want)
        del y
        assert _cpu.cached_bytes() == 0


def test_no_more_is_kept_than_allowed():
    x = batch(MiB)
    onepass.set_cache_limit(3 * MiB + MiB // 2)
    arrays = [output(x) for _ in range(6)]
    while arrays:
        arrays.pop()
        assert _cpu.cached_bytes() <= 3 * MiB + MiB // 2
    assert _cpu.cached_bytes() >= 3 * MiB
    too_large = output(batch(4 * MiB))
    kept = _cpu.cached_bytes()
    del too_large
    assert _cpu.cached_bytes() == kept  # and nothing was dropped for its sake


def test_lowering_the_limit_frees_what_waited_longest():
    arrays = [output(batch(size * MiB)) for size in (1, 2, 4)]
    places = [address(array) for array in arrays]
    sizes = []
    while arrays:
        before = _cpu.cached_bytes()
        arrays.pop(0)
        sizes.append(_cpu.cached_bytes() - before)
    assert _cpu.cached_bytes() == sum(sizes)
    onepass.set_cache_limit(sizes[1] + sizes[2])
    assert _cpu.cached_bytes() == sizes[1] + sizes[2]
    onepass.set_cache_limit(sizes[2] + 1)
    assert _cpu.cached_bytes() == sizes[2]
    y = output(batch(4 * MiB))
    assert address(y) == places[2]
    del y
    onepass.set_cache_limit(0)
    assert _cpu.cached_bytes() == 0
    onepass.set_cache_limit(None)  # what is freed does not come back
    assert _cpu.cached_bytes() == 0


def test_a_newcomer_displaces_what_waited_longest():
    x = batch(MiB)
    a, b, c = (output(x) for _ in range(3))
    del a
    each = _cpu.cached_bytes()
    onepass.set_cache_limit(2 * each)
    places = [address(array) for array in (b, c)]
    del b, c
    assert _cpu.cached_bytes() == 2 * each
    again = [output(x), output(x)]
    assert [address(array) for array in again] == places[::-1]


def test_empty_cache():
    x = batch(MiB)
    used, unused = output(x), output(x)
    want = used.copy()
    del unused
    assert _cpu.cached_bytes() > 0
    assert onepass.empty_cache() is None
    assert _cpu.cached_bytes() == 0
    onepass.empty_cache()
    assert_same_bits(used, want)
    del used
    assert _cpu.cached_bytes() > 0  # the limit is as it was
    assert onepass.get_cache_limit() == 1 << 30


def test_the_limit_does_not_bound_what_is_in_use():
    onepass.set_cache_limit(MiB)
    x = batch(2 * MiB)
    arrays = [output(x) for _ in range(5)]
    assert_same_bits(arrays[1:], arrays[:1] * 4)
    assert _cpu.cached_bytes() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux' /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps what is freed")
def test_memory_really_goes_back():
    code = """
import numpy as np, onepass
from onepass import functional

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def outputs(count):
    return [functional.batch_norm(x)[0] for _ in range(count)]

x = np.resize(np.sin(np.arange(4096, dtype=np.float32)), (9 << 15, 32))
outputs(1)
low = resident()
for _ in range(20):
    outputs(1)
assert resident() < low + x.nbytes, "grows"
arrays = outputs(3)
assert resident() > low + x.nbytes
del arrays
assert resident() > low + x.nbytes, "not kept"
onepass.empty_cache()
assert resident() < low, "not freed"
arrays = outputs(3)
onepass.set_cache_limit(0)
del arrays
assert resident() < low, "not freed"
"""
    python(code)


# Threads


def test_threads_that_take_and_give():
    """Each marks its arrays and finds its marks; some are given back by another thread than took them."""
    sizes = [SMALLEST, 2 * SMALLEST, 2 * SMALLEST + 64, 5 * SMALLEST]
    batches = [batch(size, seed=k) for k, size in enumerate(sizes)]
    want = [output(x).copy() for x in batches]
    onepass.set_num_threads(1)
    shared: list[np.ndarray] = []

    def body(number):
        def work():
            rng = np.random.default_rng(number)
            held = []
            for t in range(150):
                k = int(rng.integers(len(batches)))
                y = output(batches[k])
                assert (y == want[k]).all()
                mark = np.float32(1000 * number + t)
                y.fill(mark)
                held.append((y, mark))
                while len(held) > rng.integers(6):
                    array, mark = held.pop(int(rng.integers(len(held))))
                    assert (array == mark).all()
                    shared.append(array)
                if len(shared) > 4:
                    shared.clear()
                if t % 40 == number:
                    onepass.empty_cache()
                if t % 25 == number:
                    onepass.set_cache_limit(int(rng.integers(4 * MiB)))
            for array, mark in held:
                assert (array == mark).all()

        return work

    run_all(*(body(number) for number in range(6)))
    shared.clear()
    onepass.set_cache_limit(None)
    onepass.empty_cache()
    assert _cpu.cached_bytes() == 0
    for x, y in zip(batches, want, strict=True):
        assert_same_bits(output(x), y)


def test_an_array_may_be_freed_by_a_thread_that_ends():
    x = batch(MiB)
    place = []

    def body():
        local = threading.local()
        local.y = output(x)
        place.append(address(local.y))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60)
    gc.collect()
    assert address(output(x)) == place[0]


# Processes

PRELUDE = """
import atexit, gc, os, signal, sys, threading, warnings
warnings.simplefilter("ignore")  # threads and fork
import numpy as np
import onepass
from onepass import _cpu, functional

x = np.resize(np.sin(np.arange(4096, dtype=np.float32)), (1 << 15, 16))

def output():
    return functional.batch_norm(x)[0]

want = output().copy()

def in_child(body):
    # The exit code of a forked child that runs `body`; a child that hangs is killed by its alarm.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            body()
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def python(code, *options):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONEPASS_")}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], env=clean, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_fork():
    python(
        PRELUDE
        + """
held = output()
place = output().ctypes.data  # of the one that waits in the pool

def use():
    mine = output()
    assert mine.ctypes.data == place, "the child has what waited"
    assert (mine == want).all()
    mine.fill(np.nan)
    held.fill(np.nan)
    more = [output() for _ in range(3)]
    assert all((y == want).all() for y in more)
    del mine, more
    onepass.empty_cache()
    assert _cpu.cached_bytes() == 0

for _ in range(3):
    assert in_child(use) == 0
assert (held == want).all(), "memory of the parent is its own"
y = output()
assert y.ctypes.data == place
assert (y == want).all()
"""
    )


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_fork_while_other_threads_take_and_give():
    python(
        PRELUDE
        + """
stop = threading.Event()

def work():
    while not stop.is_set():
        assert (output()[-1] == want[-1]).all()
        onepass.set_cache_limit(1 << 22)

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()

def use():
    assert all((output() == want).all() for _ in range(3))
    onepass.empty_cache()
    assert _cpu.cached_bytes() == 0

codes = [in_child(use) for _ in range(10)]
stop.set()
for thread in threads:
    thread.join()
assert codes == [0] * 10, codes
"""
    )


EXITS = {
    "global": "y = output()",
    "module": "sys.modules['keep'] = [output(), output()]",
    "builtin": "import builtins; builtins.keep = output()",
    "cycle": "cycle = [output()]; cycle.append(cycle); del cycle",
    "atexit": "y = output(); atexit.register(lambda: print((y == want).all() and (output() == want).all()))",
    "del": """
class Last:
    def __init__(self):
        self.y = output()
    def __del__(self):
        self.y[0] = 1
last = Last()
""",
    "layer": """
bn = onepass.BatchNorm(16, activation="relu")
y = bn(x, residual=x)
dx = bn.backward(x)
bn(x, residual=x)
""",
    "thread-local": "local = threading.local(); local.y = output()",
    "daemon": """
started = threading.Event()
def work():
    y = [output()]
    while True:
        y = [output(), output()]
        started.set()
threading.Thread(target=work, daemon=True).start()
assert started.wait(30)
""",
    "default-argument": "exec('def f(y=output()): pass')",
    "torch": """
try:
    import torch
    tensor = torch.from_numpy(output())
except ImportError:
    pass
""",
    "emptied": "y = output(); del output; onepass.empty_cache(); onepass.set_cache_limit(0)",
}


@pytest.mark.parametrize("case", EXITS)
def test_a_process_that_ends_with_arrays_alive(case):
    done = python(PRELUDE + EXITS[case] + "\nprint('last words', flush=True)\n")
    assert done.stdout.startswith("last words\n")
    assert done.stdout[11:] == ("True\n" if case == "atexit" else "")
    assert done.stderr == ""

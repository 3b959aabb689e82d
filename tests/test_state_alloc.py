"""Promise: states live where the user wants them, in files larger than memory too; what cannot be used is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import onepass
from helpers import bits, numbers
from training import BFLOAT16, FEW_MACHINES, OPTIMIZERS, Call, Kind, check, make


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_in_files_have_the_bits_of_states_in_memory(name, tmp_path):
    made = []

    def allocate(label, shape, dtype):
        made.append(label)
        path = tmp_path / f"{len(made)}"
        if 0 in shape:
            return np.empty(shape, dtype)
        array = np.memmap(path, dtype, "w+", shape=shape)
        array.view(np.uint8 if array.ndim else array.dtype)[...] = 255  # not zeros: the optimizer fills them
        return array

    def factory(params, **options):
        return make(name, params, state_alloc=allocate, **options)

    options = {"ema_decay": 0.5, "accumulate": 2, "seed": 3, "rounding": "stochastic"}
    kinds = [
        Kind((37,), "float32", "bfloat16"),
        Kind((0, 3), "float32"),
        Kind((23, 31), "float64", axes=(1, 0)),
        Kind((5, 4, 33), "bfloat16", axes=(1, 2, 0)),
    ]
    check(factory, kinds, options, [Call()] * 4, machines=FEW_MACHINES, what=name)
    assert made


def test_names_shapes_and_dtypes():
    asked = []

    def allocate(*what):
        asked.append(what)
        return np.zeros(*what[1:])

    narrow = numbers((2, 3), BFLOAT16)
    options = {"master": "split", "ema_decay": 0.5, "accumulate": 2, "state_dtype": BFLOAT16}
    onepass.Momentum({"fc.w": narrow, 7: numbers((), BFLOAT16)}, state_alloc=allocate, **options)
    assert asked == [
        (f"{key}.{name}", shape, np.dtype(dtype))
        for key, shape in (("fc.w", (2, 3)), ("7", ()))
        for name, dtype in (
            ("velocity", BFLOAT16),
            ("remainder", np.uint16),
            ("ema", np.float32),
            ("accumulator", np.float32),
        )
    ]
    for params, names in (
        (numbers(3), ["0"]),
        ([numbers(3), numbers(4)], ["0", "1"]),
        ([{"params": numbers(3)}, {"params": {"a": numbers(1), "b": numbers(2)}}], ["0.0", "1.a", "1.b"]),
    ):
        asked.clear()
        onepass.Momentum(params, state_alloc=allocate)
        assert [name for name, _, _ in asked] == [f"{name}.velocity" for name in names]
    asked.clear()
    onepass.SGD(numbers(3), state_alloc=allocate)
    assert not asked


def test_initial_values_are_written_and_holes_stay_holes(tmp_path):
    def allocate(name, shape, dtype):
        return np.memmap(tmp_path / name, dtype, "w+", shape=shape)

    opt = onepass.Adam(np.zeros(1 << 20, np.float32), state_alloc=allocate)
    for name in ("exp_avg", "exp_avg_sq"):
        status = os.stat(tmp_path / f"0.{name}")
        assert status.st_size == 4 << 20
        assert 512 * status.st_blocks <= 1 << 14  # NumPy itself writes the last byte
    assert all(isinstance(array, np.memmap) for array in opt.state[0].values())
    opt = onepass.AdaGrad(numbers(5), initial_accumulator=0.5, state_alloc=allocate)
    (name,) = opt.state[0]
    assert (np.fromfile(tmp_path / f"0.{name}", np.float32) == np.full(5, 0.5, np.float32)).all()


def test_zeros_with_a_sign_are_written_over():
    opt = onepass.Momentum(numbers(3), state_alloc=lambda name, shape, dtype: np.full(shape, -0.0, dtype))
    assert not np.signbit(opt.state[0]["velocity"]).any()


def shared(function):
    array = np.full(12, 7.0, np.float32)
    return lambda name, shape, dtype: function(array, name)


PARAM = numbers(3)
BAD = {
    "a list": (lambda name, shape, dtype: [0.0] * 3, TypeError, "expected a NumPy array, got list"),
    "None": (lambda name, shape, dtype: None, TypeError, "expected a NumPy array, got NoneType"),
    "masked": (lambda name, shape, dtype: np.ma.zeros(shape, dtype), TypeError, "got MaskedArray"),
    "shape": (lambda name, shape, dtype: np.full((1, *shape), 7.0, dtype), ValueError, r"returned shape \(1, 3\)"),
    "dtype": (lambda name, shape, dtype: np.full(shape, 7.0), TypeError, "returned dtype <f8"),
    "byte order": (lambda name, shape, dtype: np.full(shape, 7.0, ">f4"), TypeError, "returned dtype >f4"),
    "gaps": (shared(lambda array, name: array[::4]), ValueError, r"state\[0\]\['exp_avg'\]: strides"),
    "one for two": (shared(lambda array, name: array[:3]), ValueError, "share memory|overlap"),
    "overlapping": (shared(lambda array, name: array[2 * name.endswith("sq") :][:3]), ValueError, "memory|overlap"),
    "the parameter": (lambda name, shape, dtype: PARAM, ValueError, "memory|overlap"),
}


@pytest.mark.parametrize("bad", BAD)
def test_memory_that_cannot_be_used_is_refused_before_it_is_written(bad):
    allocate, exception, message = BAD[bad]
    before = bits(PARAM)
    given = []

    def keep(*what):
        given.append(allocate(*what))
        return given[-1]

    with pytest.raises(exception, match=message):
        onepass.Adam(PARAM, state_alloc=keep)
    assert bits(PARAM) == before
    for array in given:
        if isinstance(array, np.ndarray) and array is not PARAM and not isinstance(array, np.ma.MaskedArray):
            assert (array == 7.0).all()


def test_read_only_memory_is_refused():
    def allocate(name, shape, dtype):
        array = np.full(shape, 7.0, dtype)
        array.flags.writeable = False
        return array

    with pytest.raises(ValueError, match=r"state\[0\]\['exp_avg'\]: is read-only"):
        onepass.Adam(numbers(3), state_alloc=allocate)


def test_what_the_function_raises_comes_through():
    def allocate(name, shape, dtype):
        raise OSError(28, f"no room for {name}")

    with pytest.raises(OSError, match=r"no room for w\.exp_avg"):
        onepass.Adam({"w": numbers(3)}, state_alloc=allocate)


def test_two_parameters_of_one_name_are_refused():
    made = []

    def allocate(*what):
        made.append(what)
        return np.zeros(*what[1:])

    with pytest.raises(ValueError, match=r"state_alloc: two parameters have the name '1'"):
        onepass.Adam({1: numbers(3), "1": numbers(3)}, state_alloc=allocate)
    assert not made


def test_a_subclass_that_takes_no_assignment():
    class Stubborn(np.ndarray):
        def __setitem__(self, key, value):
            pass

    opt = onepass.Momentum(numbers(3), state_alloc=lambda name, *what: np.full(*what[:1], 7.0, what[1]).view(Stubborn))
    assert not np.asarray(opt.state[0]["velocity"]).any()


@pytest.mark.parametrize("value", [3, "memmap", np.zeros(3)])
def test_no_function(value):
    with pytest.raises(TypeError, match="state_alloc: expected a function"):
        onepass.Adam(numbers(3), state_alloc=value)


TRAINING = """
import os, resource, sys
import numpy as np, onepass, safetensors.numpy

SIZE = 20_000_000  # 80 MB for each of three states
folder = sys.argv[1]
param = np.memmap(os.path.join(folder, "param"), np.float32, "w+", shape=SIZE)
param[:] = 1.0
grad = np.memmap(os.path.join(folder, "grad"), np.float32, "w+", shape=SIZE)
pattern = np.random.default_rng(3).uniform(-1, 1, 1000).astype(np.float32)
grad.reshape(-1, 1000)[:] = pattern

def allocate(name, shape, dtype):
    return np.memmap(os.path.join(folder, name), dtype, "w+", shape=shape)

# What is a process's own, and neither file nor code: 50 MB more than it has now.
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (now + (50 << 20),) * 2)
try:
    onepass.Adam(param)
except MemoryError:
    pass
else:
    raise AssertionError("the states fit into memory: this shows nothing")

opt = onepass.Adam(param, lr=0.125, ema_decay=0.5, state_alloc=allocate)
small = np.ones(1000, np.float32)
reference = onepass.Adam(small, lr=0.125, ema_decay=0.5)

def compare():
    for array, want in ((param, small), *((opt.state[0][name], reference.state[0][name]) for name in opt.state[0])):
        rows = array.reshape(-1, 1000)
        assert (rows[::97] == want).all() and (rows[-1] == want).all()

for step in range(3):
    opt.step(grad)
    reference.step(pattern)
    compare()
path = os.path.join(folder, "run.safetensors")
onepass.save(path, opt)
for array in (param, *opt.state[0].values()):
    array[::4097] = 5.0
opt.lr = 7.0
onepass.load(path, opt)
compare()
opt.step(grad)
reference.step(pattern)
compare()
print("trained")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mapped memory on Linux")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer maps memory for itself")
def test_states_that_exceed_memory_train_are_saved_and_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    for path in tmp_path.iterdir():
        path.unlink()  # 700 MB, which pytest would keep
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained\n"

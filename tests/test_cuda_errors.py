"""Promise: nothing silent. What cannot be done on a CUDA device says so by name, and leaves all as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import types

import numpy as np
import pytest

import cuda_arrays
import onepass
from cuda_arrays import DlpackOnly, InterfaceOnly, assert_same, cp, on_device, on_host, require_two_devices
from helpers import HandMade, OnGpu, numbers
from onepass import __main__ as command
from onepass import _cpu, functional
from training import BFLOAT16, FEW, FUNCTIONS, make

pytestmark = pytest.mark.cuda

OLD_DRIVER = 35
EVERYTHING = {"ema_decay": 0.5, "gradient_noise": (0.1, 0.5)}


def arrays(device=0):
    return on_device([numbers((4, 5)), numbers(9, seed=1), numbers(7, np.float64, seed=2)], device)


def gradients(device=0):
    return on_device([numbers((4, 5), seed=3), numbers(9, seed=4), numbers(7, np.float64, seed=5)], device)


class Unchanged:
    """What an optimizer and its arrays are now, to be compared after a call that failed."""

    def __init__(self, opt, *structures):
        self.opt, self.structures = opt, structures
        self.was = self.read()

    def read(self):
        opt = self.opt
        states = [] if opt is None else [dict(state) for state in opt.state]
        numbers = () if opt is None else (opt.step_counts, opt.skipped, opt.accumulated)
        return on_host([list(self.structures), states]), numbers

    def check(self):
        arrays, numbers = self.read()
        assert numbers == self.was[1]
        for now, was in zip(flat(arrays), flat(self.was[0]), strict=True):
            assert now.tobytes() == was.tobytes()


def flat(structure):
    if isinstance(structure, np.ndarray):
        return [structure]
    values = structure.values() if isinstance(structure, dict) else structure
    return [array for value in values for array in flat(value)] if isinstance(structure, (dict, list, tuple)) else []


# Places


def test_parameters_on_the_host_and_on_a_device():
    for params, other, first in (
        ([numbers(3), cp.ones(3)], "device 0", "the host"),
        ([cp.ones(3), numbers(3)], "the host", "device 0"),
    ):
        with pytest.raises(ValueError, match=rf"^params\[1\]: is on {other}, and params\[0\] on {first}; .*all on"):
            onepass.Adam(params)
        named = {"w": params[0], "b": params[1]}
        with pytest.raises(ValueError, match=rf"^params\[1\] \('b'\): is on {other}, and params\[0\] \('w'\)"):
            onepass.Adam(named)


@pytest.mark.parametrize("step", [{}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}])
def test_a_host_gradient_among_device_arrays_and_the_other_way_round(step):
    params, grads = arrays(), gradients()
    opt = onepass.Adam(params, **EVERYTHING)
    opt.step(grads)
    before = Unchanged(opt, params, grads)
    for k in range(3):
        mixed = list(grads)
        mixed[k] = mixed[k].get()
        with pytest.raises(ValueError, match=rf"^grads\[{k}\]: is on the host, and its parameter on device 0"):
            opt.step(mixed, **step)
        before.check()
    host = [array.get() for array in params]
    opt = onepass.Adam(host, **EVERYTHING)
    mixed = [grads[0].get(), grads[1], grads[2].get()]
    with pytest.raises(ValueError, match=r"^grads\[1\]: is on device 0, and its parameter on the host"):
        opt.step(mixed, **step)
    assert opt.step_counts == (0, 0, 0)
    assert_same(params, host)
    with pytest.raises(ValueError, match=r"^grads\[1\]: is on device 0"):
        onepass.Adam(host, grads=mixed)


def test_mirrors_and_states_at_other_places():
    param, grad = cp.ones(5, np.float32), cp.ones(5, np.float32)
    with pytest.raises(ValueError, match=r"^mirror: is on the host, and its parameter on device 0"):
        onepass.Adam(param, mirror=np.zeros(5, np.float16))
    with pytest.raises(ValueError, match=r"^mirror: is on device 0, and its parameter on the host"):
        onepass.Adam(np.ones(5), mirror=cp.zeros(5, np.float16))
    m, v, there = cp.zeros(5, np.float32), cp.zeros(5, np.float32), np.zeros(5, np.float32)
    for given, name in (((there, v), "exp_avgs"), ((m, there), "exp_avg_sqs")):
        with pytest.raises(ValueError, match=rf"^{name}: is on the host, and its parameter on device 0"):
            functional.adam(param, grad, *given, step=1)
    with pytest.raises(ValueError, match=r"^emas: is on the host"):
        functional.adam(param, grad, m, v, step=1, emas=there, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"^exp_avgs: is on device 0, and its parameter on the host"):
        functional.adam(there.copy(), there.copy(), m, there.copy(), step=1)
    assert_same([param, m, v], [np.ones(5, np.float32), there, there])


def test_arrays_on_another_device_than_their_parameter():
    require_two_devices()
    params = arrays(0)
    opt = onepass.Adam(params, **EVERYTHING)
    before = Unchanged(opt, params)
    for k in range(3):
        mixed = gradients(0)
        mixed[k] = gradients(1)[k]
        for step in ({}, {"max_grad_norm": 1.0}):
            with pytest.raises(ValueError, match=rf"^grads\[{k}\]: is on device 1, and its parameter on device 0"):
                opt.step(mixed, **step)
    before.check()
    one = cp.zeros(5, np.float32)
    with cp.cuda.Device(1):
        other = [cp.zeros(5, np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match=r"^exp_avgs: is on device 1, and its parameter on device 0"):
        functional.adam(one, one.copy(), other[0], other[1], step=1)
    with pytest.raises(ValueError, match=r"^exp_avgs: is on device 0, and its parameter on device 1"):
        functional.adam(other[0], other[1], one, other[2], step=1)
    with pytest.raises(ValueError, match=r"^mirror: is on device 0, and its parameter on device 1"):
        onepass.Adam(other[0], mirror=cp.zeros(5, np.float16))
    with pytest.raises((TypeError, ValueError), match=r"device 0.*device 1|device 1.*device 0"):
        onepass.Adam(other[0], state_alloc=lambda _name, shape, dtype: cp.zeros(shape, dtype))


# What arrays must be


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.bool_, np.uint8], ids=str)
def test_dtypes_that_are_no_storage(dtype):
    other = cp.zeros(8, dtype)
    exporters = [lambda a: a, InterfaceOnly] + ([DlpackOnly] if dtype != np.bool_ else [])
    for given in [export(other) for export in exporters]:
        for call in (
            lambda given: onepass.Adam(given),
            lambda given: onepass.Adam(cp.zeros(8)).step(given),
            lambda given: functional.momentum(cp.ones(8), cp.ones(8), given, step=1),
            lambda given: onepass.Adam(cp.zeros(8), mirror=given),
        ):
            with pytest.raises(TypeError, match=r"^(params|grads|velocities|mirror): dtype .*not supported"):
                call(given)


def test_dtypes_that_do_not_go_together():
    opt = onepass.Adam(cp.zeros(8, np.float16))
    with pytest.raises(TypeError, match=r"(?s)^grads: dtype float64 .*float16, float16, float32"):
        opt.step(cp.zeros(8, np.float64))
    with pytest.raises(TypeError, match=r"^state_dtype"):
        onepass.Adam(cp.zeros(8, np.float64), state_dtype="bfloat16")
    with pytest.raises(TypeError, match="master: 'split' needs parameters of bfloat16"):
        onepass.Adam(cp.zeros(8), master="split")


def test_bfloat16_cannot_be_told_by_the_interface_alone():
    with pytest.raises(TypeError, match=r"^params: dtype"):
        onepass.SGD(InterfaceOnly(cp.zeros(8, BFLOAT16)))


def test_arrays_with_gaps():
    base = cp.zeros((6, 8), np.float32)
    for view in (base[:, :5], base[::2], base[:, ::-1], cp.broadcast_to(base[0], (6, 8))):
        with pytest.raises(ValueError, match=r"^params\[1\]: strides .* leave gaps, repeat or run backwards"):
            onepass.Adam([cp.zeros(3), view])
        for export in (DlpackOnly, InterfaceOnly):
            with pytest.raises(ValueError, match=r"^params: strides"):
                onepass.Adam(export(view))
    with pytest.raises(ValueError, match=r"^velocities: strides"):
        functional.momentum(cp.zeros((6, 5)), cp.zeros((6, 5)), cp.zeros((6, 8))[:, :5], step=1)
    opt = onepass.SGD(cp.zeros((6, 8), np.float32), lr=1.0)
    opt.step(cp.broadcast_to(cp.ones(8, np.float32), (6, 8)), max_grad_norm=1000.0)  # a gradient may
    with pytest.raises(ValueError, match=r"^grads: .*zero"):
        opt.step(cp.broadcast_to(cp.ones(8, np.float32), (6, 8)), zero_grads=True)


def test_shapes_that_differ():
    opt = onepass.Adam({"w": cp.zeros((4, 10)), "b": cp.zeros(10)})
    with pytest.raises(
        ValueError, match=r"^grads\[0\] \('w'\): shape \(10, 4\) does not match its parameter's \(4, 10\)"
    ):
        opt.step({"w": cp.zeros((10, 4)), "b": cp.zeros(10)})
    assert opt.step_counts == (0, 0)


def test_arrays_that_overlap():
    memory = cp.zeros(100, np.float32)
    with pytest.raises(ValueError, match=r"params\[1\].*params\[0\]|params\[0\].*params\[1\]"):
        onepass.Adam([memory[:60], memory[50:]])
    opt = onepass.Adam([memory[:40], memory[40:60]])
    grads = [cp.ones(40, np.float32), memory[50:70]]
    for step in ({}, {"max_grad_norm": 1.0, "nonfinite": "skip"}):
        with pytest.raises(ValueError, match=r"grads\[1\]"):
            opt.step(grads, **step)
    assert opt.step_counts == (0, 0)
    assert not bool(memory.any())


class AsIfHost:
    """What `HandMade` asks of an array, from one on a device."""

    def __init__(self, array):
        self.shape, self.strides, self.ndim, self.itemsize = array.shape, array.strides, array.ndim, array.itemsize
        self.array, self.ctypes = array, types.SimpleNamespace(data=array.data.ptr)


def memory_of_ones():
    return AsIfHost(cp.ones(8, np.float32))


def test_read_only_exports():
    memory = AsIfHost(cp.zeros(8, np.float32))
    for flags, words in ((1, "read-only"), (2, "copy")):
        with pytest.raises(ValueError, match=rf"^params: .*{words}"):
            onepass.Adam(HandMade(memory, device=(2, 0), flags=flags))
    onepass.SGD(HandMade(memory, device=(2, 0)), lr=1.0).step(HandMade(memory_of_ones(), device=(2, 0), flags=1))
    assert_same(memory.array, np.full(8, -1, np.float32))
    array = cp.zeros(8, np.float32)
    locked = InterfaceOnly(array, data=(array.data.ptr, True))
    with pytest.raises(ValueError, match=r"^params: is read-only"):
        onepass.Adam(locked)
    with pytest.raises(ValueError, match=r"^velocities: is read-only"):
        functional.momentum(array, array.copy(), locked, step=1)
    opt = onepass.SGD(cp.zeros(8, np.float32), lr=1.0)
    opt.step(locked)
    with pytest.raises(ValueError, match=r"^grads: .*(read-only|zero)"):
        opt.step(locked, zero_grads=True)
    assert opt.step_counts == (1,)


BROKEN = {
    "mask": ({"mask": cp}, TypeError, "has a mask"),
    "strides": ({"strides": (4, 4)}, ValueError, "a stride too many or too few"),
    "no-shape": ({"shape": 5}, TypeError, "interface"),
    "typestr": ({"typestr": "nonsense"}, TypeError, "interface"),
    "no-data": ({"data": None}, TypeError, "interface"),
    "foreign": ({"typestr": ">f4"}, TypeError, "dtype|byte order"),
    "stream": ({"stream": "default"}, TypeError, "interface"),
}


@pytest.mark.parametrize(("changes", "error", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_interfaces(changes, error, words):
    array = cp.zeros(8, np.float32)
    for call, name in (
        (lambda given: onepass.SGD(given), "params"),
        (lambda given: onepass.SGD(array).step(given), "grads"),
    ):
        with pytest.raises((error, TypeError, ValueError), match=rf"^{name}: .*({words})"):
            call(InterfaceOnly(array, **changes))
    assert not bool(array.any())


def test_host_memory_that_claims_to_be_a_devices():
    memory = np.zeros(8, np.float32)
    for given in (
        InterfaceOnly(cp.zeros(8, np.float32), data=(memory.ctypes.data, False)),
        HandMade(memory, device=(2, 0)),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^params: .*its memory is not that of a CUDA device"):
            onepass.SGD(given)
    assert not memory.any()
    with pytest.raises((ValueError, TypeError), match=r"^params: "):
        onepass.SGD(OnGpu((3,)))


def test_other_devices_of_dlpack():
    for kind in (8, 10, 14):
        with pytest.raises(TypeError, match=rf"^params: is on a device \(DLPack type {kind}\)"):
            onepass.SGD(HandMade(np.zeros(3, np.float32), device=(kind, 0)))


def test_states_of_the_wrong_kind():
    opt = onepass.Adam(cp.zeros(5, np.float32))
    saved = opt.state_dict()
    before = Unchanged(opt)
    for value, error, words in (
        (cp.zeros(4, np.float32), ValueError, "shape"),
        (cp.zeros(5), TypeError, "dtype"),
        (np.zeros(5), TypeError, "dtype"),
        ([0.0] * 5, TypeError, "NumPy or CuPy"),
    ):
        with pytest.raises(error, match=rf"^state\[0\]\['exp_avg_sq'\]: .*{words}"):
            opt.load_state_dict({**saved, "state": {0: {**saved["state"][0], "exp_avg_sq": value}}})
    before.check()
    host = onepass.Adam(np.zeros(5, np.float32))
    with pytest.raises(TypeError, match=r"^state\[0\]\['exp_avg'\]: expected a NumPy array, got ndarray"):
        host.load_state_dict(saved)


# Memory


def until_there_is_enough(function, call, unchanged, error=MemoryError):
    """Lets each allocation fail in turn until `call` succeeds; returns how many failed."""
    runtime = cuda_arrays.host_runtime()
    for n in range(1, 200):
        runtime.fail(function, runtime.OUT_OF_MEMORY, n)
        try:
            call()
        except error:
            runtime.fail(function, runtime.OUT_OF_MEMORY, 0)
            unchanged()
        else:
            runtime.fail(function, runtime.OUT_OF_MEMORY, 0)
            return n - 1
    raise AssertionError("it asks for memory without end")


STEPS = {
    "plain": ({}, {}),
    "norm": ({}, {"max_grad_norm": 1.0}),
    "skip": ({}, {"nonfinite": "skip", "zero_grads": True}),
    "raise": ({}, {"nonfinite": "raise"}),
    "everything": ({**EVERYTHING, "accumulate": 2}, {"max_grad_norm": 1.0, "nonfinite": "skip", "zero_grads": True}),
    "units": ({"max_unit_norm": (0.5, 0)}, {"clip_norm": 1.0}),
}


@pytest.mark.parametrize(("options", "step"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("odd", [False, True])
def test_no_memory_for_a_step(options, step, odd):
    """At each allocation: parameters, states, gradients and counts are as before, and the next call succeeds."""
    cuda_arrays.host_runtime()
    host = [numbers((4, 5)), numbers(9, seed=1)]
    params, twins = on_device(host), [array.copy() for array in host]
    grads = [numbers((4, 5), seed=2), numbers(9, seed=3)]
    given = on_device([np.asfortranarray(grads[0]), grads[1]] if odd else grads)
    opts = [make("AdamW", arrays, **options) for arrays in (twins, params)]
    before = Unchanged(opts[1], params, given)
    failed = until_there_is_enough("cudaMalloc", lambda: opts[1].step(given, **step), before.check)
    assert failed >= (1 if step or odd else 0)
    opts[0].step(grads, **step)
    assert_same(params, twins)
    for x, y in zip(opts[1].state, opts[0].state, strict=True):
        for name in y:
            if name != "accumulator" or "accumulate" in options:
                assert_same(x[name], y[name], name)
    assert opts[1].step_counts == opts[0].step_counts


def test_no_pinned_memory_for_counts():
    cuda_arrays.host_runtime()
    _cpu.forget_feedback_words()
    params, grads = arrays(), gradients()
    opt = onepass.Adam(params)
    before = Unchanged(opt, params)
    error = (MemoryError, cp.cuda.runtime.CUDARuntimeError)
    assert until_there_is_enough("cudaHostAlloc", lambda: opt.step(grads, nonfinite="skip"), before.check, error) == 1
    assert opt.step_counts == (1, 1, 1)


def test_no_memory_for_an_optimizer():
    cuda_arrays.host_runtime()
    params = arrays()
    before = Unchanged(None, params)
    made = []
    failed = until_there_is_enough(
        "cudaMalloc", lambda: made.append(make("AMSGrad", params, **EVERYTHING)), before.check
    )
    assert failed == 3 * 4
    assert len(made) == 1


def test_no_memory_for_other_calls(tmp_path):
    cuda_arrays.host_runtime()
    params, grads = on_device([numbers(33, BFLOAT16), numbers((4, 5), BFLOAT16, seed=1)]), None
    grads = on_device([numbers(33, BFLOAT16, seed=2), numbers((4, 5), BFLOAT16, seed=3)])
    opt = make("NAG", params, master="split", ema_decay=0.5)
    for _ in range(2):
        opt.step(grads, nonfinite="skip")
    before = Unchanged(opt, params)
    saved = opt.state_dict()
    results = []
    for call in (
        lambda: results.append(opt.master),
        lambda: results.append(opt.weights()),
        lambda: results.append(opt.state_dict()),
        lambda: onepass.save(tmp_path / "c", opt),
    ):
        until_there_is_enough("cudaMalloc", call, before.check)
        before.check()
    until_there_is_enough("cudaMalloc", lambda: opt.load_state_dict(saved), before.check)
    before.check()
    until_there_is_enough("cudaMalloc", lambda: onepass.load(tmp_path / "c", opt), before.check)
    before.check()
    failed = until_there_is_enough("cudaMalloc", lambda: opt.prepare_capture(10), before.check)
    assert failed > 0
    before.check()
    opt.step(grads)
    assert opt.step_counts == (3, 3)
    opt.prepare_capture(0)
    opt.step(grads)
    assert opt.step_counts == (4, 4)


def test_no_memory_for_a_function():
    cuda_arrays.host_runtime()
    params, grads, states = arrays(), gradients(), [cp.zeros_like(array) for array in arrays()]
    before = Unchanged(None, params, grads, states)
    call = functional.momentum
    step = {"step": 1, "max_grad_norm": 1.0, "nonfinite": "skip"}
    assert until_there_is_enough("cudaMalloc", lambda: call(params, grads, states, **step), before.check) >= 2


# Launches


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_launch_that_fails_names_the_rule(name):
    runtime = cuda_arrays.host_runtime()
    params, grads = arrays(), gradients()
    opt = make(name, params)
    before = Unchanged(opt, params)
    rule = opt.rule(opt.param_groups[0])
    runtime.fail("cudaLaunchKernel", runtime.LAUNCH_FAILURE)
    with pytest.raises(RuntimeError, match=rf"launching {rule} failed: .*\(cudaErrorLaunchFailure\)"):
        opt.step(grads)
    before.check()
    opt.step(grads)
    assert opt.step_counts == (1, 1, 1)


STAGES = {
    "norms": ({}, {"max_grad_norm": 1.0}, "the norms of gradients"),
    "judgement": ({}, {"max_grad_norm": 1.0}, "the judgement of gradients"),
    "coefficients": ({}, {"nonfinite": "skip"}, "the coefficients of a step"),
    "sum": ({"accumulate": 2}, {}, "the sum of gradients"),
    "units": ({"max_unit_norm": (1.0, 0)}, {}, "the norms of units"),
    "limit": ({"max_unit_norm": (1.0, 0)}, {}, "the limit of units"),
}


@pytest.mark.parametrize(("options", "step", "words"), STAGES.values(), ids=STAGES)
def test_every_launch_has_a_name(options, step, words):
    """A launch that fails before the first write leaves all as it was."""
    runtime = cuda_arrays.host_runtime()
    seen, reads = [], ("the norms of gradients", "the judgement")
    for n in range(1, 20):
        params, grads = arrays(), gradients()
        opt = make("Adam", params, **options)
        before = Unchanged(opt, params)
        runtime.fail("cudaLaunchKernel", runtime.INVALID_CONFIGURATION, n)
        try:
            opt.step(grads, **step)
        except RuntimeError as error:
            assert "(cudaErrorInvalidConfiguration)" in str(error)  # noqa: PT017
            if all(message.startswith(tuple(f"launching {read}" for read in reads)) for message in seen):
                before.check()
                assert opt.step_counts == (0, 0, 0)
            seen.append(str(error))
        else:
            runtime.fail("cudaLaunchKernel", runtime.INVALID_CONFIGURATION, 0)
            break
    assert any(f"launching {words} failed" in message for message in seen), seen


def test_a_step_that_failed_behind_its_count():
    """Whether it counts or not, the optimizer can be used on."""
    runtime = cuda_arrays.host_runtime()
    for n in range(1, 12):
        params, grads = arrays(), gradients()
        opt = make("Adam", params, lr=lambda t: 0.1 / t)
        opt.step(grads, nonfinite="skip")
        runtime.fail("cudaLaunchKernel", runtime.INVALID_CONFIGURATION, n)
        try:
            opt.step(grads, nonfinite="skip")
        except RuntimeError:
            for _ in range(3):
                opt.step(grads, nonfinite="skip")
            assert opt.step_counts in ((4, 4, 4), (5, 5, 5))
            assert opt.skipped == 0
            assert all(np.isfinite(array.get()).all() for array in params)
        else:
            runtime.fail("cudaLaunchKernel", runtime.INVALID_CONFIGURATION, 0)
            break
    assert n > 4


def test_other_operations_have_names(tmp_path):
    runtime = cuda_arrays.host_runtime()
    params, grads = arrays(), gradients()
    mirror = [cp.zeros(array.shape, np.float16) for array in params]
    opt = make("Adam", params, ema_decay=0.5, mirror=mirror)
    opt.step(grads)
    onepass.save(tmp_path / "c", opt)
    for call, words in (
        (opt.swap_ema, "the exchange of averages"),
        (lambda: onepass.load(tmp_path / "c", opt), "the mirrors of parameters"),
    ):
        runtime.fail("cudaLaunchKernel", runtime.LAUNCH_FAILURE)
        with pytest.raises(RuntimeError, match=f"launching {words} failed"):
            call()
    assert opt.step_counts == (1, 1, 1)


def test_a_device_for_which_nothing_was_compiled():
    runtime = cuda_arrays.host_runtime()
    opt = onepass.Adam(arrays())
    runtime.fail("cudaLaunchKernel", runtime.NO_KERNEL_IMAGE)
    with pytest.raises(RuntimeError, match=r"launching adam .*without code for this device.*CUDAARCHS"):
        opt.step(gradients())
    assert opt.step_counts == (0, 0, 0)


@pytest.mark.parametrize("name", FEW)
def test_a_stream_that_was_destroyed(name):
    cuda_arrays.host_runtime()  # the real runtime may crash
    params, grads = arrays(), gradients()
    opt = make(name, params)
    before = Unchanged(opt, params, grads)
    stream = cp.cuda.Stream(non_blocking=True)
    gone = cp.cuda.ExternalStream(stream.ptr)
    del stream
    gc.collect()
    for step in ({}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}):
        with gone, pytest.raises(RuntimeError, match=r"(stream|launching).*stream was destroyed"):
            opt.step(grads, **step)
        before.check()
    opt.step(grads)
    assert opt.step_counts == (1, 1, 1)


def test_an_error_is_told_once():
    """It is not found again by the next call, nor by CuPy."""
    runtime = cuda_arrays.host_runtime()
    opt = onepass.Adam(arrays())
    runtime.fail("cudaLaunchKernel", runtime.INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match="launching"):
        opt.step(gradients())
    assert runtime.library.cudaGetLastError() == 0
    opt.step(gradients())


# Installations


def report(capsys):
    command.main([])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda"))
    return line.removeprefix("cuda").strip()


def test_the_devices_are_listed(capsys):
    line = report(capsys)
    assert line.startswith("0: ")
    assert "sm_" in line
    assert "; built for " in line


def test_no_device(capsys):
    runtime = cuda_arrays.host_runtime()
    runtime.library.onepass_host_set_devices(0)
    assert "no device" in report(capsys)
    assert cuda_arrays.why_not.__wrapped__() == "no CUDA device: there is none on this machine"
    runtime.reset()
    assert "no device" not in report(capsys)


def test_a_driver_that_is_too_old(capsys):
    runtime = cuda_arrays.host_runtime()
    runtime.fail("cudaGetDeviceCount", OLD_DRIVER)
    assert "there is no CUDA driver, or it is older than the CUDA that onepass was built with" in report(capsys)
    assert "older" not in report(capsys)
    runtime.fail("cudaGetDeviceCount", OLD_DRIVER)
    assert cuda_arrays.why_not.__wrapped__().startswith("no CUDA device: looking for CUDA devices failed: ")
    opt = onepass.Adam(arrays())
    runtime.fail("cudaLaunchKernel", OLD_DRIVER)
    with pytest.raises(RuntimeError, match=r"launching adam .*there is no CUDA driver, or it is older"):
        opt.step(gradients())
    assert opt.step_counts == (0, 0, 0)


def run(source):
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_cupy():
    """What is on a device needs it; the error says so, and how to get it."""
    out = run(
        "import sys; sys.modules['cupy'] = None\n"
        "import numpy as np, onepass\n"
        "from helpers import HandMade, OnGpu\n"
        "for array in (HandMade(np.zeros(3, np.float32), device=(2, 0)), OnGpu((3,))):\n"
        "    try: onepass.SGD(array)\n"
        "    except TypeError as error: print(error)\n"
        "from cuda_arrays import why_not\n"
        "print(why_not())\n"
        "p = np.ones(3); onepass.SGD(p, lr=1.0).step(np.ones(3)); print(p)\n"
    )
    lines = out.splitlines()
    assert len(lines) == 4
    for line in lines[:2]:
        assert line.startswith("params: is on a CUDA device, and CuPy, ")
        assert "cannot be imported" in line
        assert "install cupy-cuda" in line
    assert lines[2].startswith("no CuPy: ")
    assert lines[3] == "[0. 0. 0.]"


def test_without_kernels(tmp_path):
    """A build without `_cuda` says what to do, and `python -m onepass` that it has none."""
    out = run(
        "import sys; sys.modules['onepass._cuda'] = None\n"
        "import numpy as np, onepass, cupy\n"
        "from helpers import HandMade, OnGpu\n"
        "from cuda_arrays import why_not\n"
        "for array in (cupy.zeros(3), HandMade(np.zeros(3, np.float32), device=(2, 0)), OnGpu((3,))):\n"
        "    try: onepass.SGD(array)\n"
        "    except TypeError as error: print(error)\n"
        "try: onepass.SGD(np.zeros(3)).step(cupy.zeros(3))\n"
        "except TypeError as error: print(error)\n"
        "print(why_not())\n"
        "from onepass.__main__ import main; main([])\n"
    )
    lines = out.splitlines()
    for line, name in zip(lines[:4], ("params", "params", "params", "grads"), strict=True):
        assert line.startswith(f"{name}: is on a CUDA device, and this build of onepass has no CUDA kernels; ")
        assert "nvcc" in line
    assert lines[4] == "onepass was built without CUDA kernels"
    assert any(line.split() == ["cuda", "not", "built"] for line in lines[5:])


def test_modules_of_two_versions():
    out = run(
        "import sys, types\n"
        "fake = types.ModuleType('onepass._cuda'); fake.__version__ = '0.0.0'\n"
        "sys.modules['onepass._cuda'] = fake\n"
        "try: import onepass\n"
        "except ImportError as error: print(error)\n"
    )
    assert "onepass._cuda is of version 0.0.0" in out
    assert "install onepass anew" in out


def test_importing_touches_neither_driver_nor_cupy():
    out = run(
        "import sys, onepass\n"
        "print('cupy' in sys.modules)\n"
        "from onepass import _cpu; print(_cpu.cuda_architectures() is not None)\n"
    )
    assert out.split() == ["False", "True"]

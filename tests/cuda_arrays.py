"""What the CUDA tests share: whether they can run, arrays on devices, trainings there next to the CPU's.

CuPy may be the stand-in of tests/cuda_on_host, where kernels run on the host. What only that runtime can tell or do
(how often a function was called, a failure on demand, the order of threads) is behind `host_runtime()`, which skips
elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onepass
import training
from helpers import GUARD
from onepass import _cpu
from reference import narrow
from reference.expressions import assert_same_bits

ON_HOST = "ONEPASS_CUDA_ON_HOST" in os.environ


def _import_cupy() -> tuple[Any, str | None]:
    if ON_HOST and not any(Path(path).name == "cuda_on_host" for path in sys.path):
        sys.path.insert(0, str(Path(__file__).parent / "cuda_on_host"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an installation of CUDA that CuPy looked for
            import cupy
    except ImportError as error:
        return None, str(error)
    return cupy, None


cp, _no_cupy = _import_cupy()


@functools.cache
def why_not() -> str | None:
    """Why tests marked `cuda` cannot run here; None where they can."""
    if _cpu.cuda_architectures() is None:
        return "onepass was built without CUDA kernels"
    if cp is None:
        return f"no CuPy: {_no_cupy}"
    try:
        devices = _cpu.cuda_devices()
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    return None if devices else "no CUDA device: there is none on this machine"


def device_count() -> int:
    return 0 if why_not() else len(_cpu.cuda_devices())


def require_two_devices() -> None:
    if device_count() < 2:
        pytest.skip("needs two CUDA devices")


# The runtime that runs CUDA on the host


class HostRuntime:
    """Counts, faults and orders of the runtime in tests/cuda_on_host."""

    SYNCHRONIZING = (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpyAsync",  # of ours: copies from and to the host, which wait
    )
    ALLOCATING = ("cudaMalloc", "cudaHostAlloc")
    OUT_OF_MEMORY, NO_KERNEL_IMAGE, LAUNCH_FAILURE, INVALID_CONFIGURATION = 2, 209, 719, 9

    def __init__(self) -> None:
        from cupy._host import LaunchInfo, library

        self.library, self._launch_info = library, LaunchInfo

    def reset(self) -> None:
        self.library.onepass_host_reset()

    def verify(self) -> None:
        self.library.onepass_host_verify()

    def calls(self, *functions: str) -> dict[str, int]:
        return {name: self.library.onepass_host_calls(name.encode()) for name in functions}

    def fail(self, function: str, error: int, call: int = 1) -> None:
        """Let the `call`-th next call of a function of the runtime fail."""
        self.library.onepass_host_fail(function.encode(), error, call)

    def launches(self) -> list[Any]:
        infos = []
        for k in range(self.library.onepass_host_launches(None)):
            info = self._launch_info()
            assert self.library.onepass_host_launch(k, ctypes.byref(info))
            infos.append(info)
        return infos

    @contextlib.contextmanager
    def order(self, blocks: int, threads: int, seed: int = 0) -> Iterator[None]:
        """0 forwards, 1 backwards, 2 shuffled."""
        self.library.onepass_host_order(blocks, threads, seed)
        try:
            yield
        finally:
            self.library.onepass_host_order(0, 0, 0)

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """How often functions that wait or allocate are called in the block, and kernels launched."""
        names = (*self.SYNCHRONIZING, *self.ALLOCATING, "cudaLaunchKernel")
        before, counts = self.calls(*names), {}
        yield counts
        counts.update({name: count - before[name] for name, count in self.calls(*names).items()})


@functools.cache
def _host_runtime() -> HostRuntime:
    return HostRuntime()


def host_runtime() -> HostRuntime:
    """Skips the test where CUDA does not run on the host."""
    if not ON_HOST:
        pytest.skip("asks the runtime that runs CUDA on the host")
    return _host_runtime()


# Arrays


class Twin:
    """A device array that lies in memory as a host array does: layout, offset from 64 bytes, guards, gaps.

    `offset`: another one, of its first byte.
    """

    MARGIN = 256

    def __init__(self, host: np.ndarray, device: int = 0, *, offset: int | None = None) -> None:
        reach = [(length - 1) * stride for length, stride in zip(host.shape, host.strides, strict=True)]
        low = sum(min(r, 0) for r in reach)
        nbytes = 0 if host.size == 0 else sum(max(r, 0) for r in reach) + host.itemsize - low
        address = host.ctypes.data + (low if nbytes else 0)
        with cp.cuda.Device(device):
            self.buffer = cp.empty(nbytes + 2 * self.MARGIN + 64, np.uint8)
            place = address if offset is None else offset
            self._start = self.MARGIN + (place - self.buffer.data.ptr - self.MARGIN) % 64
            self._first = self._start - (low if nbytes else 0)
            self._image = np.full(self.buffer.size, GUARD, np.uint8)
            if nbytes:
                memory = (ctypes.c_ubyte * nbytes).from_address(address)
                self._image[self._start : self._start + nbytes] = np.frombuffer(memory, np.uint8)
            self.buffer.set(self._image)
            self.array = cp.ndarray(host.shape, host.dtype, self.buffer.data + self._first, host.strides)
        self._like = (host.shape, host.dtype, host.strides)

    def _view(self, image: np.ndarray) -> np.ndarray:
        shape, dtype, strides = self._like
        return np.ndarray(shape, dtype, image, self._first, strides)

    def _bytes(self) -> np.ndarray:
        with self.buffer.device:  # bytes can be read at any offset
            return self.buffer.get()

    def get(self) -> np.ndarray:
        """Its numbers, on the host, in the same layout."""
        return self._view(self._bytes())

    def set(self, values: Any) -> None:
        image = self._bytes()
        self._view(image)[...] = values
        with self.buffer.device:
            self.buffer.set(image)

    def untouched(self) -> bool:
        """Whether guards and gaps are what they were."""
        now, then = self._bytes(), self._image.copy()
        for image in (now, then):
            self._view(image)[...] = np.zeros((), self._like[1])
        return bool((now == then).all())


def on_device(structure: Any, device: int = 0) -> Any:
    """The same structure with device arrays for host arrays."""
    if isinstance(structure, np.ndarray):
        return Twin(structure, device).array
    if isinstance(structure, Mapping):
        return {key: on_device(value, device) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(on_device(value, device) for value in structure)
    return structure


def on_host(structure: Any) -> Any:
    """The same structure with host arrays for device arrays, of any place and layout."""
    if cp is not None and isinstance(structure, cp.ndarray):
        return _read(structure)
    if isinstance(structure, Mapping):
        return {key: on_host(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(on_host(value) for value in structure)
    return structure


def _read(array: Any) -> np.ndarray:
    """By bytes: CuPy's own kernels want addresses of whole items."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    low = sum(min(r, 0) for r in reach)
    nbytes = sum(max(r, 0) for r in reach) + array.itemsize - low
    with array.device:
        flat = cp.ndarray((nbytes,), np.uint8, array.data + low)
        return np.ndarray(array.shape, array.dtype, flat.get(), -low, array.strides).copy()


class DlpackOnly:
    """Exports a device array through `__dlpack__`, and is no array of CuPy's."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class InterfaceOnly:
    """Exports a device array through `__cuda_array_interface__` alone."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array, self.changes = array, changes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.array.__cuda_array_interface__, **self.changes}


class TorchLike(DlpackOnly):
    """Both, as torch's tensors."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__cuda_array_interface__

    def is_neg(self) -> bool:
        return False

    def is_conj(self) -> bool:
        return False


def assert_same(device: Any, host: Any, what: str = "") -> None:
    """Structures of device arrays and of host arrays have the same bits."""
    if isinstance(host, np.ndarray):
        assert isinstance(device, cp.ndarray), f"{what}: expected a CuPy array, got {type(device).__name__}"
        assert_same_bits(_read(device), host, what)
    elif isinstance(host, Mapping):
        assert list(device) == list(host), what
        for key, value in host.items():
            assert_same(device[key], value, f"{what}[{key!r}]")
    elif isinstance(host, (list, tuple)):
        assert len(device) == len(host), what
        for k, value in enumerate(host):
            assert_same(device[k], value, f"{what}[{k}]")
    else:
        assert device is host is None or device == host, what


def assert_same_number(device: Any, host: Any, what: str = "") -> None:
    """The norm of a step: None twice, or the same bits."""
    if host is None:
        assert device is None, f"{what}: {device!r} instead of None"
        return
    assert isinstance(device, cp.ndarray), f"{what}: {device!r} is no CuPy array"
    assert (device.shape, device.dtype) == ((), np.float64)
    got = float(device)
    assert got == host or (np.isnan(got) and np.isnan(host)), f"{what}: {got!r} instead of {host!r}"


# Trainings


def _placed(k: int, host: np.ndarray, *, shift: int) -> Twin:
    """The twin of the k-th array, for each of the ways in which a kernel goes through arrays.

    Of three tensors one lies at whole vectors, one at whole items, and one at the bytes where the host's does, which is
    copied into order if these are odd.
    """
    if k % 3 == 2:
        return Twin(host)
    return Twin(host, offset=0 if k % 3 == 0 else (k // 3 + shift) * host.itemsize % 64)


class Pair:
    """The same training twice, on host arrays and on device arrays."""

    def __init__(self, factory: Callable[..., Any], kinds: Sequence[training.Kind], options: Mapping[str, Any]) -> None:
        self.kinds = kinds
        self.host = training.begin(factory, kinds, options)
        self.start = [param.copy(order="K") for param in self.host.params]
        self.params = [_placed(k, param, shift=0) for k, param in enumerate(self.host.params)]
        self.mirrors = [
            None if mirror is None else _placed(k, mirror, shift=2) for k, mirror in enumerate(self.host.mirrors)
        ]
        mirrors = [None if mirror is None else mirror.array for mirror in self.mirrors]
        arrays = [param.array for param in self.params]
        if isinstance(self.host.opt, training.Functional):
            self.opt: Any = copy.copy(self.host.opt)
            self.opt.params = arrays
            self.opt.state = on_device(self.host.opt.state)
            self.opt.options = dict(self.host.opt.options)
            if self.opt.options.get("mirror") is not None:
                self.opt.options["mirror"] = mirrors
        else:
            more = {"mirror": mirrors} if any(mirror is not None for mirror in mirrors) else {}
            self.opt = factory(arrays, **{**options, **more})
        self.calls = 0

    def step(self, call: training.Call, what: str = "") -> None:
        """One call on both, and what can be compared without waiting for counts."""
        here = f"{what}, call {self.calls}"
        grads = call.gradients(self.kinds, self.calls)
        twins = [None if grad is None else _placed(k, grad, shift=self.calls) for k, grad in enumerate(grads)]
        self.host.opt.step(grads, **call.options)
        self.opt.step([None if twin is None else twin.array for twin in twins], **call.options)
        if isinstance(self.opt, training.Functional) and all(grad is None for grad in grads):
            assert self.opt.grad_norm == self.host.opt.grad_norm  # of no gradient, which has no device
        else:
            assert_same_number(self.opt.grad_norm, self.host.opt.grad_norm, f"{here}: grad_norm")
        for k, (twin, grad) in enumerate(zip(twins, grads, strict=True)):
            if twin is not None:
                assert_same_bits(twin.get(), grad, f"{here}: grads[{k}]")
                assert twin.untouched(), f"{here}: grads[{k}] was written beside its elements"
        self.calls += 1

    def compare(self, what: str = "") -> None:
        """All arrays and counts."""
        host = self.host
        assert self.opt.skipped == host.opt.skipped, what
        assert self.opt.accumulated == host.opt.accumulated, what
        if not isinstance(host.opt, training.Functional):
            assert self.opt.step_counts == host.opt.step_counts, what
        for k, kind in enumerate(self.kinds):
            here = f"{what}: {kind}, params[{k}]"
            assert_same_bits(self.params[k].get(), host.params[k], here)
            assert self.params[k].untouched(), f"{here} was written beside its elements"
            assert list(self.opt.state[k]) == list(host.opt.state[k])
            for name, want in host.opt.state[k].items():
                array = self.opt.state[k][name]
                assert isinstance(array, cp.ndarray)
                if name == "accumulator" and self._holds_nothing(k):
                    continue
                assert_same_bits(_read(array), want, f"{here}, {name}")
            if self.mirrors[k] is not None:
                assert_same_bits(self.mirrors[k].get(), host.mirrors[k], f"{here}, mirror")
                assert self.mirrors[k].untouched(), f"{here}: mirror was written beside its elements"

    def _holds_nothing(self, k: int) -> bool:
        opt = self.host.opt
        if isinstance(opt, training.Functional):
            return opt.accumulated == 0
        return opt._updater.received[k] == 0

    def require_moves(self, what: str = "") -> None:
        for k, (before, now) in enumerate(zip(self.start, self.host.params, strict=True)):
            assert np.isfinite(narrow.widen(now.reshape(-1), np.float64)).all(), f"{what}: params[{k}]"
            moved = np.count_nonzero(before != now)
            assert moved >= 0.3 * now.size or now.size < 10, f"{what}: params[{k}] did not move"


def check(
    factory: Callable[..., Any],
    kinds: Sequence[training.Kind],
    options: Mapping[str, Any],
    calls: Sequence[training.Call],
    *,
    what: str = "",
    moves: bool = True,
) -> Pair:
    """A training on the device has the bits of the same one on the host."""
    pair = Pair(factory, kinds, options)
    for call in calls:
        pair.step(call, what)
    pair.compare(what)
    if moves:
        pair.require_moves(what)
    return pair


def read_optimizer(opt: onepass.Optimizer) -> list[dict[str, np.ndarray]]:
    """All states, on the host."""
    return [{name: on_host(array) for name, array in state.items()} for state in opt.state]

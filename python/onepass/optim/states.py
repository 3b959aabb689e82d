"""New state arrays of a parameter, in memory of our own or where the user wants them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from onepass import _cpu, devices
from onepass.optim.options import Storage, compute_dtype, state_dtype_for


class NewStates:
    """The states of one parameter: `arrays` by name, and in `fills` what has yet to be written into them.

    Memory that the user gave is not touched before it is known to be nobody else's.
    """

    def __init__(self, param: npt.NDArray[Any], name: str, path: str, storage: Storage) -> None:
        self._param = param
        self._name = name
        self._path = path
        self._storage = storage
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.fills: list[tuple[npt.NDArray[Any], Any]] = []

    def add(self, slots: Iterable[str], start: float, *, ema: bool) -> None:
        """A rule's states, each element `start`, and those that the options ask for."""
        param, storage = self._param, self._storage
        compute = compute_dtype(param.dtype)
        dtype = state_dtype_for(param.dtype, storage.state_dtype, self._name)
        if storage.split and param.dtype.name != "bfloat16":
            raise TypeError(f"master: 'split' needs parameters of bfloat16, and {self._name} is {param.dtype}")
        for slot in slots:
            self._new(slot, dtype, start)
        if storage.split:
            self._new("remainder", np.dtype(np.uint16), 0.0)
        if ema:
            self._new("ema", compute if storage.split else param.dtype, param)
        if storage.accumulate > 1:
            self._new("accumulator", compute, 0.0)

    def _new(self, slot: str, dtype: np.dtype[Any], start: float | npt.NDArray[Any]) -> None:
        if self._storage.state_alloc is None:
            array = self.arrays[slot] = _cpu.state_like(self._param, start if isinstance(start, float) else 0.0, dtype)
            if not isinstance(start, float):
                self.fills.append((array, start))
            return
        label = f"{self._path}.{slot}"
        array = self._storage.state_alloc(label, self._param.shape, dtype)
        given = f"state_alloc({label!r}, {self._param.shape}, {dtype})"
        here, kind = (devices.on_device, "CuPy") if devices.on_device(self._param) else (_is_plain, "NumPy")
        if not here(array):
            raise TypeError(f"{given}: expected a {kind} array, got {type(array).__name__}")
        if array.shape != self._param.shape:
            raise ValueError(f"{given}: returned shape {array.shape}")
        if array.dtype != dtype or not array.dtype.isnative:
            raise TypeError(f"{given}: returned dtype {array.dtype.str if array.dtype.kind in 'fu' else array.dtype}")
        self.arrays[slot] = array
        self.fills.append((array, start))


def _is_plain(array: Any) -> bool:
    return isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray)


def fill(array: npt.NDArray[Any], value: Any) -> None:
    """Write `value` into all of `array`; zeros that are there already are left alone, and with them holes in a file."""
    if devices.on_device(array):
        values = np.asarray(devices.to_host(value)).astype(array.dtype)
        _cpu.overwrite(array, np.broadcast_to(values, array.shape))
        return
    if isinstance(value, float) and value == 0.0 and not _has_bits(array):
        return
    np.ndarray.__setitem__(array, ..., value)  # whatever a subclass makes of it


def _has_bits(array: npt.NDArray[Any]) -> bool:
    """Whether any bit is set."""
    flat = np.asarray(array).transpose(_slowest_first(array)).reshape(-1).view(np.uint8)
    step = 1 << 24  # without a copy of all of it, and without reading on after the first hit
    return any(flat[start : start + step].any() for start in range(0, flat.size, step))


def memory_order(array: npt.NDArray[Any]) -> tuple[int, ...]:
    """The axes of a dense array from the slowest to the fastest, without those of length 1; none for C order."""
    axes = tuple(axis for axis in _slowest_first(array) if array.shape[axis] > 1)
    return () if array.size == 0 or axes == tuple(sorted(axes)) else axes


def _slowest_first(array: npt.NDArray[Any]) -> list[int]:
    """A dense array is C-contiguous in this order of its axes."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])

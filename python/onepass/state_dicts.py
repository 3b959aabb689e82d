"""Reading what a ``state_dict`` holds: structure and arrays are checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onepass import _cpu, devices
from onepass.integers import integer, is_integer

Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

#: Stands for a function that was a hyper-parameter and is in no file: the optimizer's own takes its place.
OWN_FUNCTION = object()


def assignment(array: npt.NDArray[Any], value: npt.NDArray[Any]) -> Call:
    """The call that copies `value` of NumPy into `array`, of the same shape and dtype."""
    if devices.on_device(array):
        return _cpu.overwrite, (array, value)
    return np.ndarray.__setitem__, (array, ..., value)


def carry_out(calls: Sequence[Call]) -> None:
    """Make all calls, of compiled functions that do not fail: an interrupt comes before or after them."""
    _cpu.call_all(calls)


def entries(value: Any, label: str, keys: Any) -> Mapping[Any, Any]:
    """`value`, if it is a mapping with these keys and no other."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{label}: expected a dict, got {type(value).__name__}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{label}: {key!r} is missing")
    if len(value) != len(keys):
        unknown = next(key for key in value if key not in keys)
        raise ValueError(f"{label}: {unknown!r} is unknown")
    return value


def matching_array(value: Any, array: npt.NDArray[Any], label: str) -> npt.NDArray[Any]:
    """`value` as a plain array of NumPy, if it is one that can be copied into `array`."""
    on_device = devices.on_device(array)
    if on_device and devices.on_device(value):
        value = devices.to_host(value)
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        kind = "an array of NumPy or CuPy" if on_device else "a NumPy array"
        raise TypeError(f"{label}: expected {kind}, got {type(value).__name__}")
    plain = np.asarray(value)  # a subclass may have a way of its own of being copied
    if plain.shape != array.shape:
        raise ValueError(f"{label}: shape {plain.shape} does not match {array.shape}")
    if not on_device and not array.flags.writeable:
        raise ValueError(f"{label}: the array that it would be copied into has been made read-only")
    if plain.dtype != array.dtype:
        raise TypeError(f"{label}: dtype {plain.dtype} does not match {array.dtype}")
    return plain


def scalar(value: Any) -> Any:
    """A scalar as it is; files give back a 0-d array for it."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def same_scalar(value: Any, own: str | int) -> bool:
    """Whether `value` is this word or number. (Of an array ``==`` is not a truth value.)"""
    return (isinstance(value, str) if isinstance(own, str) else is_integer(value)) and bool(value == own)


def count(value: Any, label: str) -> int:
    """`value` as an int, if it can be a number of steps."""
    return integer(scalar(value), label, 0, 2**62)

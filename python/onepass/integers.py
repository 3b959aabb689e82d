"""What counts as a whole number, and the range of one."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether it is an integer: no truth value, and no span of time, which NumPy derives from its integers."""
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_, np.timedelta64))


def integer(value: Any, name: str, low: int, high: int, need: str | None = None) -> int:
    """`value` as an int, if it is one from `low` to `high`; `need` says it in other words."""
    need = need or f"an integer from {low} to {_power(high)}"
    if not is_integer(value):
        raise TypeError(f"{name}: expected {need}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {need}, got {value!r}")
    return int(value)


def _power(value: int) -> str:
    for shift in (0, 1):
        if value > 2**20 and (value + shift).bit_count() == 1:
            return f"2**{(value + shift).bit_length() - 1}" + (" - 1" if shift else "")
    return str(value)

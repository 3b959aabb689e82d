"""NumPy arithmetic in the kernels' floating-point mode: subnormals are zero, on input and on output.

That is the one difference between a kernel and the plain NumPy expression. An expression over `Flushed` values reads as
the formula does; each operation is NumPy's own, in the array's dtype, with its result flushed.
"""

from __future__ import annotations

import numpy as np


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals replaced by zeros of their sign."""
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)


class Flushed:
    """An array, or a coefficient rounded once from float64 to the array's dtype."""

    __array_ufunc__ = None  # NumPy must not take an operation over

    def __init__(self, value, dtype):
        with np.errstate(all="ignore"):
            self.value = flush(np.asarray(value, dtype=dtype))

    def _apply(self, function, *operands):
        with np.errstate(all="ignore"):
            return Flushed(function(self.value, *(x.value for x in operands)), self.value.dtype)

    def __add__(self, other):
        return self._apply(np.add, other)

    def __sub__(self, other):
        return self._apply(np.subtract, other)

    def __mul__(self, other):
        return self._apply(np.multiply, other)

    def __truediv__(self, other):
        return self._apply(np.divide, other)


def sqrt(x: Flushed) -> Flushed:
    return x._apply(np.sqrt)


def maximum(a: Flushed, b: Flushed) -> Flushed:
    """``a > b ? a : b``: not `np.maximum`, which returns a NaN from either side."""
    return a._apply(lambda x, y: np.where(x > y, x, y), b)


def sign(x: Flushed) -> Flushed:
    return x._apply(np.sign)


def zero(like: Flushed) -> Flushed:
    return Flushed(0, like.value.dtype)

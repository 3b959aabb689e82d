"""Widening and narrowing of bfloat16 and float16, and the float32 master that is split in two, on the bits of numbers.

Nothing here rests on a cast to a narrow type: those of `ml_dtypes` round a float64 twice. All arrays have one dimension
or more.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)


class Format(NamedTuple):
    precision: int  # bits of a significand, the leading one included
    min_exponent: int  # of the smallest normal number
    infinity: int  # bits

    @property
    def nan(self):
        return self.infinity | 1 << (self.precision - 2)


FORMATS = {BFLOAT16: Format(8, -126, 0x7F80), FLOAT16: Format(11, -14, 0x7C00)}


def is_narrow(dtype):
    return np.dtype(dtype) in FORMATS


def compute_dtype(dtype):
    """In which a parameter of a dtype is calculated."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def widen(x, dtype):
    """The same numbers in float32 or float64. Subnormals are kept: arithmetic is what makes those of `dtype` zero."""
    if not is_narrow(x.dtype):
        return x.astype(dtype)
    precision, min_exponent, infinity = FORMATS[x.dtype]
    bits = x.view(np.uint16).astype(np.int64)
    magnitude = bits & 0x7FFF
    field, fraction = magnitude >> (precision - 1), magnitude & (2 ** (precision - 1) - 1)
    significand = np.where(field > 0, fraction + 2 ** (precision - 1), fraction)
    exponent = np.maximum(field, 1) - 1 + min_exponent - (precision - 1)  # of the last bit
    value = np.ldexp(significand.astype(np.float64), exponent)
    value = np.where(magnitude == infinity, np.inf, np.where(magnitude > infinity, np.nan, value))
    return np.where(bits & 0x8000 != 0, -value, value).astype(dtype)


def _cut(x, dtype):
    """|x| cut off towards zero: the bits, what was cut off, and half a unit in the last place, both in the same unit.

    A magnitude below the smallest normal number of float32 is zero.
    """
    precision, min_exponent, infinity = FORMATS[np.dtype(dtype)]
    with np.errstate(invalid="ignore"):  # of a signaling NaN
        magnitude = np.abs(x.astype(np.float64))  # exact
    magnitude[magnitude < 2.0**-126] = 0
    bits = magnitude.view(np.int64)
    exponent = (bits >> 52) - 1023
    significand = bits & (2**52 - 1) | 2**52
    # Below the normal numbers of the narrow type one bit more goes with each exponent, until nothing is left.
    dropped = np.minimum(53 - precision + np.maximum(min_exponent - exponent, 0), 60)
    whole = (np.maximum(exponent, min_exponent) - min_exponent << (precision - 1)) + (significand >> dropped)
    rest = significand & (np.int64(1) << dropped) - 1
    return np.minimum(whole, infinity), rest, np.int64(1) << (dropped - 1)


def _assembled(x, magnitude, dtype):
    """Bits of |x| with the sign of x; NaN where x is one."""
    magnitude = np.where(np.isnan(x), FORMATS[np.dtype(dtype)].nan, magnitude)
    return (magnitude | np.where(np.signbit(x), 0x8000, 0)).astype(np.uint16).view(dtype)


def nearest(x, dtype):
    """Float32 or float64, rounded once to nearest, ties to even."""
    whole, rest, half = _cut(x, dtype)
    up = (rest > half) | (rest == half) & (whole & 1 == 1)
    return _assembled(x, np.minimum(whole + up, FORMATS[np.dtype(dtype)].infinity), dtype)


def stochastic(x, dtype, r):
    """Float32 rounded up in magnitude if random bits `r` (0 .. 65535) say so, down otherwise."""
    assert x.dtype == np.float32
    x = np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)
    if np.dtype(dtype) == BFLOAT16:
        bits = (x.view(np.uint32).astype(np.int64) + r) >> 16
        return _assembled(x, bits & 0x7FFF, dtype)
    infinity = FORMATS[np.dtype(dtype)].infinity
    h = np.where(np.isinf(x), infinity, np.minimum(_cut(x, dtype)[0], infinity - 1))
    b = widen(h.astype(np.uint16).view(dtype), np.float32)
    with np.errstate(invalid="ignore"):  # inf - inf
        d = np.abs(x) - b
    power = (b.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # 2 to the exponent of b
    q = np.maximum(power * np.float32(2.0**-10), np.float32(2.0**-24))
    up = d >= q * ((65536 - r.astype(np.int64)).astype(np.float32) * np.float32(2.0**-16))
    return _assembled(x, h + up, dtype)


def narrow(x, dtype, r=None):
    """`x` as an array of `dtype`: as it is where that is no narrower, else to nearest, or with random bits."""
    if not is_narrow(dtype):
        return x.astype(dtype)
    return nearest(x, dtype) if r is None else stochastic(x, dtype, r)


def split(master):
    """A float32 master as (bfloat16, uint16 remainder).

    Ties go away from zero: were they to go to even, 16 bits could not tell which way a tie was rounded.
    """
    assert master.dtype == np.float32
    bits = master.view(np.uint32)
    sign = bits >> np.uint32(16) & np.uint32(0x8000)
    lost = np.isnan(master)  # its payload could carry into the sign
    high = np.where(lost, sign | np.uint32(0x7FC0), (bits.astype(np.uint64) + np.uint64(0x8000)) >> np.uint64(16))
    low = np.where(lost, np.uint32(0), bits & np.uint32(0xFFFF))
    return high.astype(np.uint16).view(BFLOAT16), low.astype(np.uint16)


def joined(high, low):
    """The float32 master of a split one.

    Beside a zero, and beside an infinity with a positive one, `split` leaves no remainder (but of a subnormal, which is
    zero): somebody wrote the high half by hand, and it counts alone.
    """
    high, low = high.view(np.uint16).astype(np.int64), low.view(np.int16).astype(np.int64)
    magnitude = high & 0x7FFF
    low = np.where((magnitude == 0) | (magnitude == FORMATS[BFLOAT16].infinity) & (low > 0), 0, low)
    return ((high << 16) + low & 0xFFFFFFFF).astype(np.uint32).view(np.float32)

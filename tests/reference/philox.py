"""Random numbers as a function of (seed, parameter, step, purpose, element): Philox 4x32-10.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The numbers of an
element do not depend on which other elements are asked for. Elements that share a block are 16 apart, so that 16 blocks
side by side give those of neighbours.
"""

from __future__ import annotations

import numpy as np

NOISE, PARAMETER, PARAMETER_AFTER_NORM, EMA, FIRST_SLOT = range(5)
# What is rounded for one element in one step makes its bits from one number, by an odd factor of its own.
ROUNDING = 1
FACTORS = {PARAMETER: 0x0001, PARAMETER_AFTER_NORM: 0x1657, EMA: 0x27D5, FIRST_SLOT: 0x9E37, 5: 0x85EB, 6: 0xC2B3}

LANES = 16
MASK = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def philox4x32(counter, key):
    """Four words of output from four words of counter (each an array) and two of key (numbers)."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            product1 >> WORD ^ c1 ^ np.uint64(k0),
            product1 & MASK,
            product0 >> WORD ^ c3 ^ np.uint64(k1),
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _words(seed, index, t, purpose, block):
    """Words of the blocks in an array."""
    last = (block >> WORD & np.uint64(0xFFF)) << np.uint64(20) | np.uint64(purpose << 16 | (t >> 32) & 0xFFFF)
    constant = np.ones_like(block)
    counter = (block & MASK, constant * np.uint64(index), constant * np.uint64(t & 0xFFFFFFFF), last)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _places(begin, end, uses):
    """For each element: its block, and which of the block's `uses` it is."""
    e = np.arange(begin, end, dtype=np.uint64)
    lanes = np.uint64(LANES)
    group, which, lane = e // np.uint64(LANES * uses), e // lanes % np.uint64(uses), e % lanes
    return group * lanes + lane, which.astype(np.int64)


def rounding_bits(seed, index, t, purpose, begin, end):
    """16 random bits (0 .. 65535) for each of the elements [begin, end)."""
    block, which = _places(begin, end, uses=8)
    word = np.choose(which // 2, _words(seed, index, t, ROUNDING, block))
    r = np.where(which % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16)).astype(np.uint32)
    return r * np.uint32(FACTORS[purpose]) & np.uint32(0xFFFF)


def normals(seed, index, t, begin, end):
    """A float32 of the standard normal distribution for each of the elements [begin, end)."""
    block, which = _places(begin, end, uses=4)
    words = _words(seed, index, t, NOISE, block)
    n0, n1 = box_muller(np.where(which < 2, words[0], words[2]), np.where(which < 2, words[1], words[3]))
    return np.where(which % 2 == 0, n0, n1)


def box_muller(a, b):
    """Two independent normals from two random words (G. Box and M. Muller, 1958), all in float32, in this order.

    `a` gives the radius. `b` gives an angle in a quarter turn around 0, and two bits that say which quarter turn.
    """
    u = ((a >> np.uint64(8)) + np.uint64(1)).astype(np.float32) * np.float32(2.0**-24)  # in (0, 1]
    # ln(u) = e ln(2) + ln(m), m in [sqrt(1/2), sqrt(2)), ln(m) = 2 artanh(s)
    i = u.view(np.int32)
    e = i - np.int32(0x3F3504F3) >> np.int32(23)
    m = (i - (e << np.int32(23))).view(np.float32)
    f = m - 1
    s = f / (2 + f)
    w = s * s
    ln = e.astype(np.float32) * 0.6931472 + (s + s) * (1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9)))))
    r = np.sqrt(-2 * ln)
    x = (b >> np.uint64(6) & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)
    q = x * 1.5707964
    y = q * q
    sn = q * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cs = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    swap, negative = b & np.uint64(1) != 0, b & np.uint64(2) != 0
    n0, n1 = r * np.where(swap, sn, cs), r * np.where(swap, cs, sn)
    assert n0.dtype == n1.dtype == np.float32, "every operation is one of float32"
    return np.where(negative, -n0, n0), np.where(negative, -n1, n1)

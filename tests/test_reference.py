"""The NumPy reference of the whole step: its random numbers, its rounding, its sums, and what they make together.

Figures are calculated anew here, in other ways: by NumPy's and ml_dtypes' own casts, by exact sums, by theory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from reference import expressions, narrow, philox
from reference.expressions import assert_same_bits
from reference.flushed import Flushed
from reference.narrow import BFLOAT16, FLOAT16, FORMATS
from reference.whole_step import MemoryOrder, Tensor, step, sum_of_squares, unit_factors

NARROW = (BFLOAT16, FLOAT16)
COMPUTE = (np.float32, np.float64)
COUNT = 1_000_000


def patterns(dtype):
    """Each bit pattern of a narrow type."""
    return np.arange(65536, dtype=np.uint16).view(dtype)


def random_patterns(dtype, count, seed=0):
    """Random bits: numbers of all magnitudes, NaN among them."""
    itemsize = np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, count * itemsize, dtype=np.uint8).view(dtype)


def wide(x):
    """In float64, exactly, by a cast that is not the reference's own."""
    with np.errstate(invalid="ignore"):  # of a signaling NaN
        return x.astype(np.float64)


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, output):
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    counter, key, output = ([int(word, 16) for word in words.split()] for words in (counter, key, output))
    got = philox.philox4x32([np.array([word], np.uint64) for word in counter], key)
    assert [int(word[0]) for word in got] == output


def one_block(seed, index, t, purpose, block):
    """The documented counter, in Python's integers."""
    last = ((block >> 32) & 0xFFF) << 20 | purpose << 16 | (t >> 32) & 0xFFFF
    counter = (block & 0xFFFFFFFF, index, t & 0xFFFFFFFF, last)
    words = philox.philox4x32([np.array([word], np.uint64) for word in counter], (seed & 0xFFFFFFFF, seed >> 32))
    return [int(word[0]) for word in words]


@pytest.mark.parametrize("start", [0, 2**36 - 500, 2**45 + 3])
@pytest.mark.parametrize(("seed", "t"), [(0, 1), (2**64 - 2, 2**32 + 7)])
def test_random_numbers_of_an_element(seed, t, start):
    index = 3
    bits = philox.rounding_bits(seed, index, t, 5, start, start + 300)
    normals = philox.normals(seed, index, t, start, start + 300)
    for offset in range(0, 300, 7):
        e = start + offset
        words = one_block(seed, index, t, 1, e // 128 * 16 + e % 16)
        word = words[e // 16 % 8 // 2]
        number = word & 0xFFFF if e // 16 % 2 == 0 else word >> 16
        assert bits[offset] == number * 0x85EB % 2**16  # the factor of the second slot
        words = one_block(seed, index, t, 0, e // 64 * 16 + e % 16)
        pair = words[:2] if e // 16 % 4 < 2 else words[2:]
        exact = box_muller_in_double(*pair)[e // 16 % 2]
        assert abs(normals[offset] - exact) <= 4e-6 * max(abs(exact), 1e-3)


def test_random_numbers_do_not_depend_on_the_range():
    whole_bits, whole = philox.rounding_bits(1, 2, 3, 4, 0, 1000), philox.normals(1, 2, 3, 0, 1000)
    for begin, end in ((0, 0), (0, 1), (17, 18), (15, 129), (64, 700), (999, 1000)):
        np.testing.assert_array_equal(philox.rounding_bits(1, 2, 3, 4, begin, end), whole_bits[begin:end])
        assert_same_bits(philox.normals(1, 2, 3, begin, end), whole[begin:end])


def test_every_argument_changes_the_numbers():
    start = {"seed": 1, "index": 2, "t": 3, "purpose": 4}
    others = [start, *({**start, name: value + 1} for name, value in start.items())]
    others += [{**start, "seed": 1 + 2**32}, {**start, "t": 3 + 2**32}]
    numbers = [philox.rounding_bits(**other, begin=0, end=4096) for other in others]
    numbers.append(philox.rounding_bits(**start, begin=2**39, end=2**39 + 4096))  # block 2**32 more
    for k, a in enumerate(numbers):
        for b in numbers[:k]:
            assert np.count_nonzero(a == b) < 10


def test_rounding_bits_are_uniform():
    bits = philox.rounding_bits(1, 0, 1, philox.PARAMETER, 0, COUNT)
    assert bits.max() == 65535
    assert bits.min() == 0
    for shift in (0, 4, 8, 12):
        counts = np.bincount(bits >> np.uint32(shift) & np.uint32(15), minlength=16)
        chi_squared = np.sum((counts - COUNT / 16) ** 2) / (COUNT / 16)
        assert 3 < chi_squared < 40, "15 degrees of freedom"
    scaled = bits / 65536
    for distance in (1, 2, 16, 32, 64, 128):
        assert abs(np.corrcoef(scaled[distance:], scaled[:-distance])[0, 1]) < 4.5 / math.sqrt(COUNT)


# Normals


def box_muller_in_double(a, b):
    radius = np.sqrt(-2 * np.log(((a >> 8) + 1) / 2**24))
    angle = ((b >> 6 & 0xFFFFFF) / 2**24 - 0.5) * np.pi / 2
    pair = np.cos(angle), np.sin(angle)
    swap, negative = b & 1 != 0, b & 2 != 0
    pair = np.where(swap, pair[1], pair[0]), np.where(swap, pair[0], pair[1])
    return [np.where(negative, -radius, radius) * n for n in pair]


def test_normals_are_accurate():
    rng = np.random.default_rng(0)
    special = [0, 255, 256, 511, 2**32 - 1, 2**32 - 256, 2**31, int(2**31.5), int(2**31.5) + 256]
    a = np.concatenate([np.array(special, np.uint64), rng.integers(0, 2**32, 200_000, dtype=np.uint64)])
    b = np.concatenate([np.array(special, np.uint64)[::-1], rng.integers(0, 2**32, 200_000, dtype=np.uint64)])
    got = philox.box_muller(a, b)
    radius = np.hypot(*(wide(n) for n in got))
    for n, exact in zip(got, box_muller_in_double(a.astype(np.int64), b.astype(np.int64)), strict=True):
        assert np.isfinite(n).all()
        assert (np.abs(n - exact) <= 1e-6 * radius).all()


def test_extreme_normals():
    zero, one = np.zeros(1, np.uint64), np.ones(1, np.uint64)
    full = np.array([2**32 - 1], np.uint64)
    middle = np.array([1 << 29], np.uint64)  # the angle 0
    largest = math.sqrt(2 * 24 * math.log(2))
    assert abs(philox.box_muller(zero, middle)[0][0] - largest) < 1e-6
    assert abs(philox.box_muller(zero, middle + 2 * one)[0][0] + largest) < 1e-6
    assert abs(philox.box_muller(zero, middle + one)[1][0] - largest) < 1e-6
    for b in (zero, middle, full):
        for n in philox.box_muller(full, b):
            assert n[0] == 0, "u = 1 gives the radius 0"


@functools.cache
def million_normals(seed=11, index=0, t=1):
    return wide(philox.normals(seed, index, t, 0, COUNT))


def test_moments_of_the_normals():
    z = million_normals()
    error = 4 / math.sqrt(COUNT)
    assert abs(z.mean()) < error
    assert abs(np.mean(z**2) - 1) < error * math.sqrt(2)
    assert abs(np.mean(z**3)) < error * math.sqrt(15)
    assert abs(np.mean(z**4) - 3) < error * math.sqrt(96)
    assert 4.3 < np.abs(z).max() < 5.78


def test_distribution_of_the_normals():
    """Kolmogorov-Smirnov: the distance that one sample in 1000 exceeds is 1.95 / sqrt(n)."""
    z = np.sort(million_normals())[:: COUNT // 50_000]
    below = np.arange(0, COUNT, COUNT // 50_000) / COUNT
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    assert np.abs(normal - below).max() < 1.95 / math.sqrt(COUNT)
    for low, probability in ((2.0, 0.0227501), (3.0, 1.3499e-3), (4.0, 3.1671e-5)):
        for side in (1, -1):
            count = np.count_nonzero(side * million_normals() > low)
            assert abs(count - COUNT * probability) < 4 * math.sqrt(COUNT * probability)


@pytest.mark.parametrize("distance", [1, 2, 15, 16, 17, 32, 48, 64, 128])
def test_neighbouring_normals_are_independent(distance):
    """In a pair of one radius too: neither they nor their squares are correlated."""
    z = million_normals()
    a, b = z[distance:], z[:-distance]
    for f in (lambda x: x, np.square, np.abs, np.sign):
        assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 4.5 / math.sqrt(COUNT)
    assert abs(np.corrcoef(a, b**2)[0, 1]) < 4.5 / math.sqrt(COUNT)


def test_normals_of_other_steps_and_parameters_are_independent():
    z = million_normals()
    for other in (million_normals(t=2), million_normals(index=1), million_normals(seed=12)):
        assert abs(np.corrcoef(z, other)[0, 1]) < 4.5 / math.sqrt(COUNT)


# Narrow numbers


def magnitudes(dtype):
    """The finite magnitudes in order, as bits; bfloat16 without subnormals, which are zero in arithmetic."""
    bits = np.arange(FORMATS[dtype].infinity, dtype=np.int64)
    return bits if dtype == FLOAT16 else np.delete(bits, slice(1, 128))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", NARROW)
def test_widening_is_exact(dtype, compute):
    x = patterns(dtype)
    got = narrow.widen(x, compute)
    assert got.dtype == compute
    with np.errstate(invalid="ignore"):  # of a signaling NaN
        assert_same_bits(got, x.astype(compute), "the cast of NumPy or ml_dtypes")


@pytest.mark.parametrize(("compute", "r"), [(np.float64, None), *((np.float32, r) for r in (None, 0, 1, 32768, 65535))])
@pytest.mark.parametrize("dtype", NARROW)
def test_narrowing_undoes_widening(dtype, compute, r):
    x = patterns(dtype)
    got = narrow.narrow(narrow.widen(x, compute), dtype, None if r is None else np.full(65536, r, np.uint32))
    bits = x.view(np.uint16)
    if dtype == BFLOAT16:  # its subnormals become zeros of their sign
        x = np.where((bits & 0x7FFF) < 128, bits & 0x8000, bits).astype(np.uint16).view(dtype)
    assert_same_bits(got, x)
    assert (np.isnan(wide(x)) == np.isnan(wide(got))).all()
    assert np.array_equal(got.view(np.uint16) & 0x8000, bits & 0x8000), "NaN keeps its sign too"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", NARROW)
def test_ties_go_to_even_and_their_neighbours_do_not(dtype, compute, sign):
    """Also with a float64 so near to a tie that float32 would see the tie."""
    below = magnitudes(dtype)
    above = np.append(below[1:], FORMATS[dtype].infinity)
    numbers = wide(below.astype(np.uint16).view(dtype))
    upper = np.append(numbers[1:], 2.0 ** (128 if dtype == BFLOAT16 else 16))  # where infinity would be, were it finite
    tie = (numbers + upper) / 2
    keep = tie >= 2.0**-126
    below, above, tie = below[keep], above[keep], tie[keep].astype(compute)
    for x, want in (
        (tie, np.where(below % 2 == 0, below, above)),
        (np.nextafter(tie, compute(np.inf)), above),
        (np.nextafter(tie, compute(0)), below),
    ):
        want = (want | (0x8000 if sign < 0 else 0)).astype(np.uint16).view(dtype)
        assert_same_bits(narrow.nearest(sign * x, dtype), want)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("dtype", NARROW)
def test_nearest_is_the_cast(dtype, compute):
    """NumPy's own to float16 rounds once from either type; that of ml_dtypes does from float32."""
    x = random_patterns(compute, 300_000)
    near = np.random.default_rng(1).standard_normal(300_000) * 10.0 ** np.random.default_rng(2).uniform(-9, 6, 300_000)
    x = np.concatenate([x, near.astype(compute), np.array([0.0, -0.0, np.inf, -np.inf, np.nan], compute)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if dtype == BFLOAT16:
            x = x.astype(np.float32).astype(compute)
            want = x.astype(np.float32).astype(dtype)
        else:
            want = x.astype(dtype)
    zero = np.abs(x) < 2.0**-126
    want = np.where(zero, np.signbit(x) * np.uint16(0x8000), want.view(np.uint16)).astype(np.uint16).view(dtype)
    assert_same_bits(narrow.nearest(x, dtype), want)


def test_float64_is_rounded_once():
    """1 + 2**-8 is a tie of bfloat16. What is behind it in a float64 is lost in float32, and would be in ml_dtypes."""
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40])
    assert wide(narrow.nearest(x, BFLOAT16)).tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-7]
    x = np.array([1 + 2.0**-11 + 2.0**-40, 2.0**-25 + 2.0**-60, 2.0**-25, 65520 - 2.0**-30, 65520.0, 1e300])
    assert wide(narrow.nearest(x, FLOAT16)).tolist() == [1 + 2.0**-10, 2.0**-24, 0.0, 65504.0, np.inf, np.inf]


@pytest.mark.parametrize("dtype", NARROW)
def test_what_float32_cannot_hold_is_zero(dtype):
    x = np.array([2.0**-126 * (1 - 2.0**-53), -(2.0**-130), 5e-324])
    assert narrow.nearest(x, dtype).view(np.uint16).tolist() == [0, 0x8000, 0]


# Stochastic rounding


def between(dtype, count=60):
    """Float32 numbers of all magnitudes between the narrow ones; for float16 also above the largest."""
    rng = np.random.default_rng(5)
    low, high = (-126, 127) if dtype == BFLOAT16 else (-14, 16)
    x = 2.0 ** rng.uniform(low, high, count) * rng.choice([-1.0, 1.0], count)
    x = x.astype(np.float32)
    return np.append(x, np.array([1 + 2.0**-23, -1 - 2.0**-12, 2 - 2.0**-23, 3.0, -0.0], np.float32))


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_has_no_bias(dtype):
    """The mean over all 65536 random bits is the number itself; each result is one of the two neighbours."""
    r = np.arange(65536, dtype=np.uint32)
    for x in between(dtype):
        got = narrow.stochastic(np.full(65536, x), dtype, r)
        bits = got.view(np.uint16).astype(np.int64)
        assert bits.max() - bits.min() <= 1
        assert (np.diff(bits) >= 0).all(), "more random bits never round down what fewer round up"
        down, up = (wide(np.array([k], np.uint16).view(dtype))[0] for k in (bits.min(), bits.max()))
        if math.isinf(up):
            up = math.copysign(2.0 ** (128 if dtype == BFLOAT16 else 16), up)
        assert abs(down) <= abs(x) <= abs(up)
        share = np.count_nonzero(bits == bits.max()) / 65536
        dropped = 16 if dtype == BFLOAT16 else 13
        assert share * 2**dropped == int(share * 2**dropped)
        assert down + (up - down) * share == x


def test_stochastic_rounding_of_float16_subnormals():
    """Within 2**-16 of a unit in the last place: 16 random bits resolve no more."""
    r = np.arange(65536, dtype=np.uint32)
    for x in np.array([2.0**-25, 2.0**-24 * 1.7, -(2.0**-20) * 1.00001, 2.0**-15 * 1.9999999, 1e-9], np.float32):
        mean = wide(narrow.stochastic(np.full(65536, x), FLOAT16, r)).mean()
        assert 0 <= abs(x) - abs(mean) < 2.0**-24 * 2.0**-16
        assert mean == 0 or np.sign(mean) == np.sign(x)
    assert (narrow.stochastic(np.full(65536, np.float32(2.0**-41)), FLOAT16, r).view(np.uint16) == 0).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_of_special_values(dtype):
    x = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, np.nan, -np.nan], np.float32)
    infinity = FORMATS[dtype].infinity
    for r in (0, 65535):
        bits = narrow.stochastic(x, dtype, np.full(x.size, r, np.uint32)).view(np.uint16)
        assert bits[:6].tolist() == [infinity, infinity | 0x8000, 0, 0x8000, 0, 0x8000]
        assert np.isnan(wide(bits.view(dtype)[6:])).all()


def test_float16_above_the_largest_is_rounded_to_either():
    x = np.array([65504, 65536 - 2**-8, 65536, 1e30, -65520], np.float32)
    down, up = (wide(narrow.stochastic(x, FLOAT16, np.full(5, r, np.uint32))) for r in (0, 65535))
    assert down.tolist() == [65504, 65504, np.inf, np.inf, -65504]
    assert up.tolist() == [65504, np.inf, np.inf, np.inf, -np.inf]


# The split master


def masters():
    special = [0, 0x8000, 0x7FFF, 0x00800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x3F808000, 0x3F818000]
    special = np.array(special, np.uint32)
    return np.concatenate([special, special | np.uint32(0x80000000), random_patterns(np.uint32, 1 << 20)])


def test_a_split_master_comes_back():
    bits = masters()
    master = bits.view(np.float32)
    high, low = narrow.split(master)
    assert (high.dtype, low.dtype) == (BFLOAT16, np.uint16)
    back = narrow.joined(high, low)
    nan, small = np.isnan(master), np.abs(master) < np.finfo(np.float32).tiny  # subnormals are zero
    assert np.array_equal(back.view(np.uint32)[~nan & ~small], bits[~nan & ~small])
    assert np.isnan(back[nan]).all()
    assert (np.abs(back[small]) <= np.finfo(np.float32).tiny).all()


def test_no_two_masters_share_a_split():
    """All float32 of some neighbouring bfloat16, at the border of two binades."""
    master = np.arange(0x3F7E0000, 0x3F820000, dtype=np.uint32).view(np.float32)
    high, low = narrow.split(master)
    assert np.array_equal(narrow.joined(high, low), master)
    pairs = high.view(np.uint16).astype(np.int64) << 16 | low
    assert np.unique(pairs).size == master.size


def test_a_nan_master_is_one_nan():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0xFFFFFFFF], np.uint32)
    high, low = narrow.split(bits.view(np.float32))
    assert high.view(np.uint16).tolist() == [0x7FC0] * 3 + [0xFFC0] * 2
    assert not low.any()


def test_the_high_half_is_the_nearest():
    master = masters().view(np.float32)
    master = master[np.abs(master) >= 2.0**-126]
    master = master[np.abs(master) < 3.38e38]  # what rounds to infinity has no half unit
    high, low = narrow.split(master)
    half_unit = 2.0 ** (np.floor(np.log2(np.abs(wide(master)))) - 8)
    distance = np.abs(wide(high) - wide(master))
    assert (distance <= half_unit).all()
    assert np.array_equal(low == 0x8000, distance == half_unit)
    assert (np.abs(wide(high)) > np.abs(master))[low == 0x8000].all(), "ties go away from zero"
    cast = master.astype(ml_dtypes.bfloat16)
    assert_same_bits(high[low != 0x8000], cast[low != 0x8000])


# Sums of squares


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 33, 4095, 4096, 4097, 8192, 10_007])
@pytest.mark.parametrize("dtype", COMPUTE)
def test_sum_of_squares(dtype, count):
    x = np.random.default_rng(count).standard_normal(count).astype(dtype)
    got = float(sum_of_squares(Flushed(x, dtype)))
    lanes = [[0.0] * 16 for _ in range(max(1, -(-count // 4096)))]
    for i, value in enumerate(x.tolist()):
        lanes[i // 4096][i % 16] += value * value
    for a in lanes:
        for width in (8, 4, 2, 1):
            for k in range(width):
                a[k] += a[k + width]
    total = lanes[0][0]
    for a in lanes[1:]:
        total += a[0]
    assert got == total
    exact = math.fsum(value * value for value in x.tolist())
    assert abs(got - exact) <= 1e-13 * exact


def test_sums_of_squares_of_rows():
    x = np.random.default_rng(0).standard_normal((3, 2, 5000)).astype(np.float32)
    rows = [[float(sum_of_squares(Flushed(row, np.float32))) for row in pair] for pair in x]
    assert sum_of_squares(Flushed(x, np.float32)).tolist() == rows


# Memory order

LAYOUTS = ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (2, 0, 3, 1))


def laid_out(values, axes):
    """The same values in an array whose axes lie in memory in that order, the slowest first."""
    return np.ascontiguousarray(values.transpose(axes)).transpose(np.argsort(axes))


@pytest.mark.parametrize("axes", LAYOUTS)
def test_memory_order(axes):
    values = np.arange(2 * 1 * 3 * 4, dtype=np.float32).reshape(2, 1, 3, 4)
    array = laid_out(values, axes)
    order = MemoryOrder(array)
    assert np.array_equal(order.flat(array), array.ravel(order="K"))
    assert np.array_equal(order.flat(values), array.ravel(order="K")), "another layout is gathered"
    back = order.shaped(order.flat(values))
    assert np.array_equal(back, values)
    assert [s for s, n in zip(back.strides, back.shape, strict=True) if n > 1] == [
        s for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    ]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (5, 1)])
def test_memory_order_of_small_shapes(shape):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    order = MemoryOrder(values)
    assert np.array_equal(order.shaped(order.flat(values)), values)


# The whole step

SGD = {"coefficients": {"step": 0.125}}
ADAM = {
    "beta1": 0.9,
    "one_minus_beta1": 0.1,
    "beta2": 0.99,
    "one_minus_beta2": 0.01,
    "step_m": 0.02,
    "step_g": 0.0,
    "inv_bias2": 1.7,
    "eps_root": 0.0,
    "eps": 1e-8,
}


def numbers(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def adam(shape=(33, 7), dtype=np.float32, seed=0, *, state=np.float32, grad=None, **more):
    """A parameter of Adam with a gradient and started states."""
    slots = {name: numbers(shape, np.float64, seed + 2 + k) * 0.1 for k, name in enumerate(("exp_avg", "exp_avg_sq"))}
    slots = {name: np.abs(x).astype(state) if "sq" in name else x.astype(state) for name, x in slots.items()}
    return Tensor(
        "adam", numbers(shape, dtype, seed), numbers(shape, grad or dtype, seed + 1), slots, coefficients=ADAM, **more
    )


def only(report):
    (tensor,) = report.tensors
    return tensor


@pytest.mark.parametrize("dtype", COMPUTE)
def test_plain_step_is_the_expression_of_the_rule(dtype):
    tensor = adam(dtype=dtype, state=dtype, l1=0.01, l2=0.02, decay=0.99, maximize=True)
    got = only(step([tensor], grad_scale=0.25))
    around = {"scale": -0.25, "l1": 0.01, "l2": 0.02, "decay": 0.99}
    param, slots = expressions.update("adam", tensor.param, tensor.grad, tensor.slots, ADAM, **around)
    assert_same_bits(got.param, param)
    for name, slot in slots.items():
        assert_same_bits(got.slots[name], slot)
    assert got.updates == 1


@pytest.mark.parametrize("axes", LAYOUTS[1:])
def test_layout_changes_no_element_but_of_random_numbers_and_sums(axes):
    tensor = adam((6, 1, 5, 4))
    want = only(step([tensor], clip_value=0.5))
    other = dataclasses.replace(tensor, param=laid_out(tensor.param, axes))
    got = only(step([other], clip_value=0.5))
    assert_same_bits(got.param, want.param)
    noise = {"gradient_noise": (0.5, 0.5)}
    sgd = Tensor("sgd", laid_out(tensor.param, axes), np.zeros_like(tensor.grad), **SGD, **noise)
    got = only(step([sgd], seed=3)).param
    flat = Tensor("sgd", sgd.param.ravel(order="K"), np.zeros(120, np.float32), **SGD, **noise)
    assert_same_bits(got.ravel(order="K"), only(step([flat], seed=3)).param)


def test_clipping_by_the_norm_of_all():
    tensors = [Tensor("sgd", numbers(n), numbers(n, seed=n), **SGD) for n in (5, 5000, 1)]
    tensors.insert(1, Tensor("sgd", numbers(3), None, **SGD))
    norm = math.sqrt(math.fsum(float(x) ** 2 for t in tensors if t.grad is not None for x in t.grad)) * 2
    report = step(tensors, grad_scale=-2.0, max_grad_norm=0.5)
    assert abs(report.grad_norm - norm) < 1e-12 * norm
    for old, new in zip(tensors, report.tensors, strict=True):
        if old.grad is None:
            assert new is old
            continue
        factor = np.float32(-2.0 * (0.5 / report.grad_norm))
        assert_same_bits(new.param, old.param - np.float32(0.125) * (factor * old.grad))
    within = step(tensors, max_grad_norm=1e9).tensors[0]
    assert_same_bits(within.param, tensors[0].param - np.float32(0.125) * tensors[0].grad)


def test_clipping_by_the_norm_of_each():
    tensors = [Tensor("sgd", numbers(n), numbers(n, seed=n), **SGD) for n in (3, 3000)]
    report = step(tensors, clip_norm=4.0)
    assert_same_bits(report.tensors[0].param, only(step(tensors[:1])).param)
    assert_same_bits(report.tensors[1].param, only(step(tensors[1:], max_grad_norm=4.0)).param)


def test_clipping_by_value_keeps_nan():
    grad = np.array([np.nan, np.inf, -np.inf, 0.25, -3.0], np.float32)
    got = only(step([Tensor("sgd", np.zeros(5, np.float32), grad, **SGD)], clip_value=0.5)).param
    assert_same_bits(got, -np.array([np.nan, 0.5, -0.5, 0.25, -0.5], np.float32) / 8)


def test_nonfinite_elements():
    good, bad = (
        Tensor("sgd", numbers(5), numbers(5, seed=1), **SGD),
        Tensor("sgd", numbers(3), np.full(3, np.inf, np.float16), **SGD),
    )
    report = step([good, bad], nonfinite="skip", zero_grads=True)
    assert report.skipped
    for old, new in zip((good, bad), report.tensors, strict=True):
        assert new.param is old.param
        assert (new.updates, new.grad.dtype, new.grad.any()) == (0, old.grad.dtype, False)
    with pytest.raises(FloatingPointError, match=r"grads\[1\]"):
        step([good, bad], nonfinite="raise")
    propagated = step([good, bad], max_grad_norm=1.0)
    assert propagated.grad_norm == math.inf
    assert np.isnan(propagated.tensors[1].param).all(), "0 * inf"
    huge = Tensor("sgd", numbers(3, np.float64), np.full(3, 1e200), **SGD)
    assert not step([huge], nonfinite="skip").skipped, "a norm that overflows is no non-finite element"


def test_accumulation():
    """Sum / k for what got any gradient; nothing for what got none."""
    arrays = [numbers(40, seed=k) for k in range(4)]
    tensors = [
        Tensor("sgd", numbers(40, seed=9), None, accumulator=np.full(40, np.nan, np.float32), **SGD),
        Tensor("sgd", numbers(40, seed=8), None, accumulator=np.full(40, np.nan, np.float32), **SGD),
        Tensor("sgd", numbers(40, seed=7), None, accumulator=np.full(40, np.nan, np.float32), **SGD),
    ]
    start, accumulated = tensors, 0
    for call in range(4):
        grads = (arrays[call], arrays[call] if call == 1 else None, None)
        tensors = [dataclasses.replace(t, grad=g) for t, g in zip(tensors, grads, strict=True)]
        report = step(tensors, grad_scale=0.5, accumulate=4, accumulated=accumulated, max_grad_norm=1e9)
        tensors, accumulated = report.tensors, report.accumulated
        assert (report.grad_norm is None) == (call < 3)
        assert accumulated == (call + 1) % 4
    half = np.float32(0.5)
    total = ((half * arrays[0] + half * arrays[1]) + half * arrays[2]) + half * arrays[3]
    for new, old, g in zip(tensors, start, (total, half * arrays[1], None), strict=True):
        want = old.param if g is None else old.param - np.float32(0.125) * (np.float32(0.25) * g)
        assert_same_bits(new.param, want)
        assert (new.updates, new.holds) == (int(g is not None), False)
    norm = math.sqrt(math.fsum(float(x) ** 2 for g in (total, half * arrays[1]) for x in g)) / 4
    assert abs(report.grad_norm - norm) < 1e-12


def test_a_skipped_call_does_not_count():
    tensor = Tensor("sgd", numbers(4), numbers(4, seed=1), accumulator=np.zeros(4, np.float32), **SGD)
    first = step([tensor], accumulate=2, nonfinite="skip")
    bad = dataclasses.replace(only(first), grad=np.full(4, np.nan, np.float32))
    for calls in (0, 1):
        skipped = step([bad], accumulate=2, accumulated=calls, nonfinite="skip")
        assert skipped.skipped
        assert skipped.accumulated == calls
        assert only(skipped) is bad


def test_noise():
    n = 100_000
    tensor = Tensor("sgd", np.zeros(n, np.float64), np.zeros(n), updates=3, gradient_noise=(0.5, 0.55), **SGD)
    z = only(step([tensor], seed=7)).param / -0.125
    sigma = math.sqrt(0.5 / 5**0.55)
    assert abs(z.std() - sigma) < 4 * sigma / math.sqrt(2 * n)
    assert_same_bits(z, sigma * wide(philox.normals(7, 0, 4, 0, n)))
    none = dataclasses.replace(tensor, gradient_noise=(0.0, 0.55))
    assert not only(step([none])).param.any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state", [np.float32, BFLOAT16])
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_storage_is_the_wide_step_rounded(dtype, state, rounding):
    tensor = adam((333,), dtype, state=state, ema_decay=0.9, updates=4)
    tensor = dataclasses.replace(tensor, ema=numbers(333, dtype, 7), mirror=np.empty(333, FLOAT16))
    in_wide = dataclasses.replace(
        tensor,
        param=tensor.param.astype(np.float32),
        slots={name: slot.astype(np.float32) for name, slot in tensor.slots.items()},
        ema=None,
        mirror=None,
    )
    got, want = only(step([tensor], seed=5, rounding=rounding)), only(step([in_wide]))

    def rounded(x, storage, purpose):
        r = philox.rounding_bits(5, 0, 5, purpose, 0, 333)
        return narrow.narrow(x, storage, r if rounding == "stochastic" else None)

    assert_same_bits(got.param, rounded(want.param, dtype, 1))
    for k, name in enumerate(tensor.slots):
        assert_same_bits(got.slots[name], rounded(want.slots[name], state, 4 + k))
    p = got.param.astype(np.float32)
    e = np.float32(0.9) * tensor.ema.astype(np.float32) + np.float32(1 - 0.9) * p
    assert_same_bits(got.ema, rounded(e, dtype, 3))
    assert_same_bits(got.mirror, narrow.nearest(p, FLOAT16))
    changed = np.mean(got.param.view(np.uint16) != narrow.nearest(want.param, dtype).view(np.uint16))
    assert 0.05 < changed < 0.5 if rounding == "stochastic" else changed == 0


def test_stochastic_rounding_lets_small_steps_count():
    """Steps of 1/64 of a unit in the last place: to nearest nothing moves, by chance the mean does."""
    tensor = Tensor("sgd", np.ones(20_000, BFLOAT16), np.ones(20_000, BFLOAT16), coefficients={"step": 2.0**-14})
    for rounding in ("nearest", "stochastic"):
        now = tensor
        for _ in range(64):
            now = only(step([now], rounding=rounding, seed=2))
        moved = 1 - wide(now.param).mean()
        assert moved == 0 if rounding == "nearest" else abs(moved - 2.0**-8) < 2e-4


def test_a_split_master_is_a_float32_parameter():
    """The trajectory of the float32 parameter, bit for bit; the parameter is its high half."""
    split, plain = adam((99, 3), np.float32, grad=BFLOAT16, ema_decay=0.9, max_unit_norm=(1.5, 0)), None
    ema = np.zeros((99, 3), np.float32)
    plain = dataclasses.replace(split, ema=ema, mirror=np.empty((99, 3), BFLOAT16))
    order = MemoryOrder(plain.param)
    high, low = (order.shaped(x) for x in narrow.split(order.flat(plain.param)))
    split = dataclasses.replace(plain, param=high, remainder=low)
    for _ in range(4):
        plain, split = only(step([plain])), only(step([split], rounding="stochastic"))
        assert split.param.dtype == BFLOAT16
        assert_same_bits(narrow.joined(split.param, split.remainder), plain.param)
        assert_same_bits(split.mirror, plain.mirror)
        assert_same_bits(split.ema, plain.ema)
        for name, slot in plain.slots.items():
            assert_same_bits(split.slots[name], slot)


@pytest.mark.parametrize("axes", LAYOUTS)
@pytest.mark.parametrize("axis", [0, -1, (0, 2), (1, 2, 3), (0, 1, 2, 3), (0, 2, 3), ()])
def test_unit_norms(axis, axes):
    values = laid_out(numbers((4, 3, 1, 5)), axes)
    order = MemoryOrder(values)
    factor = order.shaped(unit_factors(Flushed(order.flat(values), np.float32), order, 1.25, axis).value)
    norm = np.sqrt(np.sum(wide(values) ** 2, axis=axis, keepdims=True))
    np.testing.assert_allclose(factor, np.broadcast_to(np.minimum(1, 1.25 / norm), values.shape), rtol=1e-7)
    assert ((factor == 1) == (norm <= 1.25)).all()
    after = np.sqrt(np.sum(wide(values * factor) ** 2, axis=axis))
    assert (after < 1.25 + 1e-6).all()


def test_unit_norms_are_summed_in_memory_order():
    """A unit's elements in one run are summed in lanes, those that lie apart one after the other."""
    values = numbers((1000, 7))
    for array, axis, unit, runs in (
        (values, 0, values[:, 3], 1000),
        (np.asfortranarray(values), 0, values[:, 3], 1),
        (values, 1, values[3], 1),
        (values.reshape(10, 20, 5, 7), (1, 2, 3), values[300:400], 1),
        (values.reshape(10, 20, 5, 7), (0, 2, 3), values.reshape(10, 20, 35)[:, 3], 10),
        (values.reshape(10, 100, 1, 7), (0, 1), values[:, 3], 1000),
        (values.reshape(1000, 1, 7), (0, 2), values, 1),
    ):
        total = 0.0
        for run in unit.reshape(runs, -1):
            total += float(sum_of_squares(Flushed(run, np.float32)))
        limit = math.sqrt(total) / 3
        order = MemoryOrder(array)
        factors = unit_factors(Flushed(order.flat(array), np.float64), order, limit, axis).value
        assert limit / math.sqrt(total) in factors


def test_unit_norms_of_narrow_parameters():
    """The norm is that of the parameter as stored, which is then rounded again with other random bits."""
    tensor = Tensor("sgd", numbers((50, 40), BFLOAT16), numbers((50, 40), BFLOAT16, 1), **SGD)
    before = only(step([tensor], seed=5, rounding="stochastic"))
    limited = dataclasses.replace(tensor, max_unit_norm=(2.5, 1), mirror=np.empty((50, 40), FLOAT16))
    got = only(step([limited], seed=5, rounding="stochastic"))
    p = before.param.astype(np.float32)
    norm = np.array([[math.sqrt(float(sum_of_squares(Flushed(row, np.float32))))] for row in p])
    p = np.where(norm > 2.5, 2.5 / norm, 1.0).astype(np.float32) * p
    r = philox.rounding_bits(5, 0, 1, philox.PARAMETER_AFTER_NORM, 0, 2000)
    assert_same_bits(got.param, narrow.stochastic(p.ravel(), BFLOAT16, r).reshape(50, 40))
    assert_same_bits(got.mirror, got.param.astype(FLOAT16))


def test_average_and_mirror():
    tensor = Tensor("sgd", numbers(9), numbers(9, seed=1), ema_decay=0.75, ema=np.full(9, np.nan, np.float32), **SGD)
    tensor = dataclasses.replace(tensor, mirror=np.zeros(9, BFLOAT16))
    first = only(step([tensor]))
    assert_same_bits(first.ema, first.param)
    second = only(step([first]))
    assert_same_bits(second.ema, np.float32(0.75) * first.ema + np.float32(0.25) * second.param)
    assert_same_bits(second.mirror, second.param.astype(BFLOAT16))
    assert second.updates == 2


def test_mirror_of_float64_is_rounded_once():
    tensor = Tensor("sgd", np.array([1 + 2.0**-8 + 2.0**-40]), np.zeros(1), mirror=np.zeros(1, BFLOAT16), **SGD)
    assert wide(only(step([tensor])).mirror)[0] == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", [np.float32, np.float64, *NARROW])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (1, 1)])
def test_small_shapes(shape, dtype):
    options = {"ema_decay": 0.5, "gradient_noise": (0.1, 0.5), "max_unit_norm": (1.0, tuple(range(len(shape))))}
    wide_type = narrow.compute_dtype(dtype)
    tensor = adam(shape, dtype, state=wide_type, ema=np.ones(shape, dtype), mirror=np.ones(shape, BFLOAT16), **options)
    report = step([tensor], max_grad_norm=0.1, clip_value=1.0, rounding="stochastic", zero_grads=True)
    new = only(report)
    for old, now in ((tensor.param, new.param), (tensor.ema, new.ema), (tensor.mirror, new.mirror)):
        assert (now.shape, now.dtype) == (old.shape, old.dtype)
    assert not new.grad.any()
    assert np.isfinite(wide(new.param)).all()

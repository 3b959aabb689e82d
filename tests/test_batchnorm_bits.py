"""Promise: batch normalization gives the same bits everywhere. Both passes equal their NumPy expression.

The order of all sums follows from the shape alone, so each shape is tested with every instruction set and thread count.
The arrays lie at any byte of memory, between guard bytes.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest

import onepass
from helpers import guarded
from onepass import _cpu
from onepass.functional import batch_norm, batch_norm_backward
from reference import batchnorm as reference
from reference.expressions import assert_same_bits

DTYPES = _cpu.compute_dtypes()
ISAS = onepass.available_isas()
THREADS = (1, 2, 5)
EVERYWHERE = tuple(itertools.product(ISAS, THREADS))
MOMENTUM, EPS = 0.3, 1e-4
NOTHING_YET = 7.5e7  # what outputs hold before a call


class Variant(NamedTuple):
    training: bool = True
    affine: bool = True
    activation: str | None = None
    residual: bool = False
    unbiased: bool = True

    @property
    def needs_y(self):
        return self.activation is not None and self.residual


VARIANTS = {
    "plain": Variant(),
    "relu": Variant(activation="relu", unbiased=False),
    "residual": Variant(residual=True),
    "residual-relu": Variant(activation="relu", residual=True),
    "bare": Variant(affine=False),
    "bare-relu": Variant(affine=False, activation="relu"),
    "bare-residual-relu": Variant(affine=False, activation="relu", residual=True, unbiased=False),
    "frozen": Variant(training=False),
    "frozen-relu": Variant(training=False, activation="relu"),
    "frozen-residual-relu": Variant(training=False, activation="relu", residual=True),
    "frozen-bare-residual": Variant(training=False, affine=False, residual=True),
}


def canonical_axes(shape, channel_axis):
    return tuple(k for k in range(len(shape)) if k != channel_axis % len(shape))


def along(values, shape, channel_axis):
    """Values of channels in a shape that broadcasts over the batch."""
    return np.expand_dims(values, canonical_axes(shape, channel_axis))


@functools.lru_cache(maxsize=4)
def ordinary(shape, dtype, channel_axis=1):
    """All arrays of both passes by name: finite, and each channel with a mean and a deviation of its own."""
    rng = np.random.default_rng(math.prod(shape) + len(shape))
    channels = shape[channel_axis]
    mean, deviation = rng.uniform(-20.0, 20.0, channels), rng.uniform(0.5, 4.0, channels)
    x = rng.standard_normal(shape) * along(deviation, shape, channel_axis) + along(mean, shape, channel_axis)
    arrays = {
        "x": x,
        "dy": rng.standard_normal(shape) + 0.1,
        "residual": rng.standard_normal(shape),
        "weight": rng.uniform(0.3, 2.0, channels) * rng.choice([-1.0, 1.0], channels),
        "bias": rng.uniform(-1.0, 1.0, channels),
        "running_mean": mean + rng.uniform(-1.0, 1.0, channels),
        "running_var": deviation**2 * rng.uniform(0.5, 2.0, channels),
    }
    arrays = {name: value.astype(dtype) for name, value in arrays.items()}
    for value in arrays.values():
        value.flags.writeable = False
    return arrays


class Expected(NamedTuple):
    forward: reference.Forward
    backward: reference.Backward


def expected(arrays, variant, channel_axis=1):
    weight, bias = (arrays["weight"], arrays["bias"]) if variant.affine else (None, None)
    forward = reference.forward(
        arrays["x"],
        weight,
        bias,
        arrays["running_mean"],
        arrays["running_var"],
        training=variant.training,
        momentum=MOMENTUM,
        eps=EPS,
        unbiased=variant.unbiased,
        channel_axis=channel_axis,
        activation=variant.activation,
        residual=arrays["residual"] if variant.residual else None,
    )
    backward = reference.backward(
        arrays["dy"],
        arrays["x"],
        forward.mean,
        forward.invstd,
        weight,
        bias,
        training=variant.training,
        channel_axis=channel_axis,
        activation=variant.activation,
        y=forward.y if variant.needs_y else None,
    )
    return Expected(forward, backward)


class Placed:
    """Copies of the arrays of both passes, and room for their outputs, each at its own offset between guard bytes."""

    OUTPUTS = ("y", "dx", "weight_grad", "bias_grad")

    def __init__(self, given, offsets):
        self.given = {**given, **dict.fromkeys(("y", "dx"), given["x"])}
        self.given |= dict.fromkeys(("weight_grad", "bias_grad"), given["weight"])
        self.arrays, self.untouched = {}, {}
        for (name, value), offset in zip(self.given.items(), itertools.cycle(offsets)):
            self.arrays[name], self.untouched[name] = guarded(value.shape, value.dtype, offset=offset)
            self.arrays[name][...] = value

    def __getitem__(self, name):
        return self.arrays[name]

    def prepare(self):
        """As if nothing had run yet."""
        for name in self.OUTPUTS:
            self.arrays[name].fill(NOTHING_YET)
        for name in ("running_mean", "running_var"):
            self.arrays[name][...] = self.given[name]

    def assert_intact(self, what):
        for name, untouched in self.untouched.items():
            assert untouched(), f"{what}: bytes beside {name} were written"
        for name in ("x", "dy", "residual", "weight", "bias"):
            assert self.arrays[name].tobytes() == self.given[name].tobytes(), f"{what}: {name} was written"


def run_forward(placed, variant, channel_axis=1):
    """The outputs of a forward pass, and the instruction set that ran."""
    y, mean, invstd, *_, isa = _cpu.batch_norm_forward(
        placed["x"],
        weight=placed["weight"] if variant.affine else None,
        bias=placed["bias"] if variant.affine else None,
        running_mean=placed["running_mean"],
        running_var=placed["running_var"],
        residual=placed["residual"] if variant.residual else None,
        out=placed["y"],
        training=variant.training,
        momentum=MOMENTUM,
        unbiased=variant.unbiased,
        eps=EPS,
        channel_axis=channel_axis,
        relu=variant.activation == "relu",
        layer=None,
    )
    assert y is placed["y"]
    return reference.Forward(y, mean, invstd, placed["running_mean"], placed["running_var"]), isa


def run_backward(placed, forward, variant, channel_axis=1):
    """The outputs of a backward pass, and the instruction set that ran."""
    dx, dweight, dbias, dresidual, isa = _cpu.batch_norm_backward(
        placed["dy"],
        placed["x"],
        forward.mean,
        forward.invstd,
        weight=placed["weight"] if variant.affine else None,
        bias=placed["bias"] if variant.affine else None,
        y=forward.y if variant.needs_y else None,
        out=placed["dx"],
        weight_grad=placed["weight_grad"],
        bias_grad=placed["bias_grad"],
        training=variant.training,
        channel_axis=channel_axis,
        relu=variant.activation == "relu",
    )
    assert dx is placed["dx"]
    assert (dresidual is not None) == variant.needs_y
    return reference.Backward(dx, dweight, dbias, dresidual), isa


def assert_same_pass(actual, desired, what):
    for name, want in desired._asdict().items():
        if want is not None and getattr(actual, name) is not None:
            assert_same_bits(getattr(actual, name), want, f"{what}: {name}")


def assert_passes(placed, want, variant, what, channel_axis=1):
    """Run both passes as the settings are now, and compare all that they write."""
    placed.prepare()
    forward, isa = run_forward(placed, variant, channel_axis)
    assert isa == onepass.isa(), what
    assert_same_pass(forward, want.forward, f"{what}: forward")
    backward, isa = run_backward(placed, forward, variant, channel_axis)
    assert isa == onepass.isa(), what
    assert_same_pass(backward, want.backward, f"{what}: backward")
    placed.assert_intact(what)


def assert_meaningful(given, want, variant, what):
    """Agreement on untouched memory, on NaN or on nothing but zeros would prove nothing."""
    for name, value in (*want.forward._asdict().items(), *want.backward._asdict().items()):
        if value is not None:
            assert np.isfinite(value).all(), f"{what}: {name} is not finite"
            assert (value != value.dtype.type(NOTHING_YET)).all(), f"{what}: {name}"
    assert (want.forward.y != given["x"]).mean() > 0.9, what
    assert (want.backward.x != given["dy"]).mean() > 0.9, what
    moved = (want.forward.running_mean != given["running_mean"]) & (want.forward.running_var != given["running_var"])
    assert moved.all() == variant.training, what
    if given["x"].size >= 40:
        zeros = 0.98 if variant.activation else 0.02
        assert np.mean(want.forward.y == 0) <= zeros, what
        assert np.mean(want.backward.x == 0) <= zeros, what


def assert_everywhere(shape, dtype, channel_axis=1, *, variants=VARIANTS, offsets=None, everywhere=EVERYWHERE):
    given = ordinary(shape, dtype, channel_axis)
    itemsize = np.dtype(dtype).itemsize
    placed = Placed(given, offsets or (0, itemsize, 3, 2 * itemsize + 1, 60, 8, 64 - itemsize))
    _cpu.set_serial_bytes(0)  # so that the smallest arrays are divided among the threads too
    for name in variants:
        variant = VARIANTS[name]
        want = expected(given, variant, channel_axis)
        assert_meaningful(given, want, variant, f"{name} {shape} {dtype}")
        for isa, threads in everywhere:
            onepass.set_isa(isa)
            onepass.set_num_threads(threads)
            what = f"{name}, shape {shape}, axis {channel_axis}, {dtype}, {isa}, {threads} threads"
            assert_passes(placed, want, variant, what, channel_axis)


# Every inner size, and every number of channels, with one outer index and with many.
SMALL = (
    # Short runs. Rows are folded where C * inner is below 1024: most have a last row that is not full.
    (2, 1, 1),  # a single channel is one run
    (1, 1, 2),
    (11, 1, 5),
    (51, 1, 5),
    (2, 3, 1),  # less than a row
    (700, 3, 1),
    (2, 17, 1),
    (130, 17, 1),
    (64, 64, 1),
    (2, 1000, 1),
    (19, 1000, 1),
    (9, 1500, 1),  # two tiles
    (1, 3, 2),
    (345, 17, 2),
    (1, 1000, 2),
    (5, 1000, 2),
    (1, 64, 3),
    (21, 64, 3),
    (40, 17, 3),
    (1, 3, 49),
    (8, 3, 49),
    (5, 17, 49),
    (3, 64, 49),  # four tiles
    (1, 3, 196),
    (7, 17, 196),
    (2, 64, 196),
    (3, 5, 255),
    (5, 17, 255),
    (1, 64, 255),
    # Long runs, several to a block where they have at most 2048 elements.
    (1, 1, 256),
    (1, 3, 256),
    (37, 3, 256),
    (4, 17, 257),
    (11, 3, 700),
    (1, 17, 1023),
    (1, 1, 3136),
    (1, 3, 3136),
    (5, 3, 3136),
    (2, 3, 4096),
    (1, 3, 4097),  # two blocks, the second of one element
    (1, 1, 5000),
    (3, 3, 5000),
    (1, 2, 12288),
    (1, 1, 20000),
    (5, 1, 4001),  # a single channel: not 5 runs but one
)

# More of everything: blocks, tiles, chunks of several blocks. Only what differs between the loops is run over these.
LARGE = (
    (9000, 3, 1),
    (3 * 64 * 48 + 5, 17, 1),
    (150, 1000, 1),
    (500, 1000, 1),
    (2, 20_000, 1),
    (140, 65, 15),
    (70, 1000, 2),
    (300, 64, 49),
    (70, 3, 196),
    (131, 9, 255),
    (2, 1000, 49),
    (2, 1000, 256),
    (20, 17, 3136),
    (131, 2, 2049),  # chunks of four blocks and of three
    (515, 2, 2049),  # more than 512 blocks: chunks of five blocks and of four
    (75, 2, 5000),
    (1, 1, 600_001),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_equals_expression(shape, dtype):
    assert_everywhere(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_equals_expression_over_many_blocks(shape, dtype):
    assert_everywhere(shape, dtype, variants=("residual-relu", "frozen-relu"))


@pytest.mark.parametrize("variant", ["plain", "relu", "bare", "frozen-residual-relu"])
def test_equals_expression_over_more_than_128_blocks_of_rows(variant):
    """131 blocks of 64 rows of 513 floats: 17 MB."""
    assert_everywhere((131 * 64 - 3, 513, 1), "float32", variants=(variant,), everywhere=[(ISAS[-1], 2), (ISAS[0], 1)])


AXES = [
    (shape, axis)
    for ndim in range(2, 6)
    for shape in [(7, 6, 5, 4, 3)[:ndim], (2, 3, 1, 17, 20)[:ndim], (1, 2, 3, 300, 2)[:ndim]]
    for axis in range(ndim)
    if math.prod(shape) > shape[axis]
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), AXES, ids=str)
def test_channel_axis_anywhere(shape, axis, dtype):
    everywhere = [(isa, threads) for isa, threads in EVERYWHERE if threads != 1]
    variants = ("residual-relu", "frozen-relu")
    assert_everywhere(shape, dtype, axis, variants=variants, everywhere=everywhere)
    assert_everywhere(shape, dtype, axis - len(shape), variants=variants[:1], everywhere=everywhere[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", range(5))
def test_only_outer_channels_and_inner_matter(axis, dtype):
    """A shape of many dimensions has the bits of the three that it amounts to."""
    shape = (3, 4, 5, 6, 7)
    given = ordinary(shape, dtype, axis)
    flat = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    y, mean, invstd = batch_norm(given["x"], given["weight"], given["bias"], channel_axis=axis)
    flat_y, flat_mean, flat_invstd = batch_norm(given["x"].reshape(flat), given["weight"], given["bias"])
    assert_same_bits(y.reshape(flat), flat_y)
    assert_same_bits(mean, flat_mean)
    assert_same_bits(invstd, flat_invstd)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_statistics_in_any_layout(dtype):
    """To rounding, not to the bit: the order of the sums follows the layout."""
    shape = (6, 5, 20, 20)
    x = ordinary(shape, dtype)["x"]
    mean, invstd = batch_norm(x)[1:]
    digits = 8 * np.finfo(dtype).eps
    for position in range(4):
        moved = np.ascontiguousarray(np.moveaxis(x, 1, position))
        y, other_mean, other_invstd = batch_norm(moved, channel_axis=position)
        np.testing.assert_allclose(other_mean, mean, rtol=digits)
        np.testing.assert_allclose(other_invstd, invstd, rtol=digits)
        tolerance = 32 * np.finfo(dtype).eps
        np.testing.assert_allclose(np.moveaxis(y, position, 1), batch_norm(x)[0], rtol=tolerance, atol=tolerance)


# Where arrays lie


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(23, 17, 3), (701, 3, 1), (3, 40, 49), (3, 3, 300), (1, 2, 4500)], ids=str)
def test_any_byte_offset(shape, dtype, isa):
    onepass.set_isa(isa)
    onepass.set_num_threads(2)
    _cpu.set_serial_bytes(0)
    given, variant = ordinary(shape, dtype), VARIANTS["residual-relu"]
    want = expected(given, variant)
    for offset in range(65):
        placed = Placed(given, offsets=(offset, 0, 65 - offset, 13 * offset % 64, 7 * offset % 64))
        assert_passes(placed, want, variant, f"{shape} {dtype} {isa}, offset {offset}")
        placed = Placed(given, offsets=(offset,))
        assert_passes(placed, want, variant, f"{shape} {dtype} {isa}, all at offset {offset}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_block_shorter_than_a_cache_line(dtype):
    """The second block has two elements of each of 3 channels, and begins at any place within a cache line."""
    shape = (64 * 336 + 2, 3, 1)
    given, variant = ordinary(shape, dtype), VARIANTS["relu"]
    want = expected(given, variant)
    for isa in ISAS:
        onepass.set_isa(isa)
        for offset in range(0, 64, np.dtype(dtype).itemsize):
            placed = Placed(given, offsets=(offset,))
            assert_passes(placed, want, variant, f"{shape} {dtype} {isa}, offset {offset}")


@pytest.mark.parametrize("isa", ISAS)
def test_last_block_shorter_than_a_cache_line_behind_another_of_its_chunk(isa):
    """A chunk of three full blocks and one with one row."""
    onepass.set_isa(isa)
    shape = (3 * 64 * 64 + 1, 13)
    division = reference.Division(*shape, 1)
    assert division.folds == 64
    assert division.chunks == [range(4)]
    assert division.counts[-1] == 1
    x, untouched = guarded((math.prod(shape) + 16,), np.float32)
    rng = np.random.default_rng(1)
    values = np.resize(rng.standard_normal(13 * 10_007).astype(np.float32), shape) + np.arange(13, dtype=np.float32)
    dy = np.zeros(shape, np.float32)
    dy[-1] = 1 + np.arange(13)
    first = None
    for offset in (0, 1, 2, 3, 5, 9, 15):
        here = x[offset : offset + values.size].reshape(shape)
        here[...] = values
        if first is None:
            _, mean, invstd = batch_norm(here)
        gradients = batch_norm_backward(dy, here, mean, invstd, activation="relu", y=None)
        sums = {"dweight": gradients.weight, "dbias": gradients.bias, "dx": gradients.x[-100:]}
        first = first or sums
        for name, value in sums.items():
            assert_same_bits(value, first[name], f"{isa}, {offset} elements off a cache line: {name}")
    xhat = (values[-1] - mean) * invstd
    np.testing.assert_allclose(sums["dbias"], np.where(xhat > 0, dy[-1], 0), rtol=1e-6)
    np.testing.assert_allclose(sums["dweight"], np.where(xhat > 0, dy[-1] * xhat, 0), rtol=1e-5)
    assert np.count_nonzero(sums["dbias"]) > 2
    assert untouched()


# At least 4 MiB, from which on outputs are written past the caches.
OUT_OF_CACHE = (
    (1050, 1000, 1),
    (64_007, 17, 1),
    (360, 61, 49),
    (2100, 2, 255),
    (21, 17, 3136),
    (3, 3, 123_457),
)


@pytest.mark.parametrize("place", ["aligned", "by-elements", "by-bytes"])
@pytest.mark.parametrize("shape", OUT_OF_CACHE, ids=str)
def test_outputs_that_bypass_the_caches(shape, place):
    assert 4 * math.prod(shape) >= 4 << 20
    offsets = {"aligned": (0,), "by-elements": (12,), "by-bytes": (7, 0, 21)}[place]
    everywhere = [(isa, 1 + k % 2) for k, isa in enumerate(ISAS)]
    variants = {
        "aligned": ("residual-relu",),
        "by-elements": ("relu", "residual", "frozen-relu"),
        "by-bytes": ("plain",),
    }
    assert_everywhere(shape, "float32", variants=variants[place], offsets=offsets, everywhere=everywhere)


@pytest.mark.parametrize("shape", [(525, 1000, 1), (180, 61, 49), (11, 17, 3136)], ids=str)
def test_float64_outputs_that_bypass_the_caches(shape):
    for name, offsets in (("residual-relu", (0,)), ("frozen-relu", (24,)), ("plain", (4,))):
        everywhere = [(isa, 1 + k % 2) for k, isa in enumerate(ISAS)]
        assert_everywhere(shape, "float64", variants=(name,), offsets=offsets, everywhere=everywhere)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", OUT_OF_CACHE, ids=str)
def test_outputs_of_its_own(shape, isa):
    """Without `out`: also the gradient of the residual is then written past the caches."""
    onepass.set_isa(isa)
    given, variant = ordinary(shape, "float32"), VARIANTS["residual-relu"]
    want = expected_once(shape, "residual-relu")
    layer = onepass.BatchNorm(shape[1], EPS, MOMENTUM, activation="relu")
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name)[...] = given[name]
    for _ in range(2):  # the second time into memory that was used before
        layer.running_mean[...], layer.running_var[...] = given["running_mean"], given["running_var"]
        y = layer.forward(given["x"], residual=given["residual"])
        dx = layer.backward(given["dy"])
        assert_same_bits(y, want.forward.y, "y")
        assert_same_bits(layer.running_mean, want.forward.running_mean, "running_mean")
        assert_same_bits(layer.running_var, want.forward.running_var, "running_var")
        assert_same_bits(dx, want.backward.x, "dx")
        assert_same_bits(layer.residual_grad, want.backward.residual, "residual_grad")
        assert_same_bits(layer.weight_grad, want.backward.weight, "weight_grad")
        assert_same_bits(layer.bias_grad, want.backward.bias, "bias_grad")
        del y, dx
    assert variant.needs_y


@functools.cache
def expected_once(shape, variant):
    return expected(ordinary(shape, "float32"), VARIANTS[variant])


# Special values

SPECIAL = ("nan", "inf", "-inf", "0", "-0", "1e20", "-1e20", "1e38", "-1e38", "max", "1e-20", "tiny", "small", "-small")


def special_values(dtype):
    info = np.finfo(dtype)
    named = {"max": info.max, "tiny": info.tiny, "small": info.tiny / 8, "-small": -info.tiny / 8}
    if dtype == "float64":  # as far out in its range
        named |= {"1e20": 1e160, "-1e20": -1e160, "1e38": 1e308, "-1e38": -1e308, "1e-20": 1e-160}
    return np.array([named[name] if name in named else float(name) for name in SPECIAL], dtype)


def with_specials(shape, dtype, roles):
    """Ordinary arrays where each channel meets another special value in each of the roles.

    An array of a batch has it once, twice, in every third place or everywhere.
    """
    given = {name: value.copy() for name, value in ordinary(shape, dtype).items()}
    rng = np.random.default_rng(len(roles))
    special = special_values(dtype)
    for role in roles:
        array = given[role]
        for c in range(shape[1]):
            value = special[c % len(special)] if len(roles) == 1 else rng.choice(special)
            if array.ndim == 1:
                array[c] = value
                continue
            channel = np.ascontiguousarray(array[:, c]).ravel()
            places = rng.permutation(channel.size)
            how_many = (1, 2, channel.size // 3, channel.size)[c // len(special) % 4]
            channel[places[:how_many]] = value
            if c % 5 == 3:
                channel[places[-1]] = -value
            array[:, c] = channel.reshape(array[:, c].shape)
    return given


ROLES = ("x", "dy", "residual", "weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("roles", [*((role,) for role in ROLES), ROLES], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 60, 1), (5, 60, 49), (3, 60, 300)], ids=str)
def test_special_values(shape, dtype, roles):
    given = with_specials(shape, dtype, roles)
    placed = Placed(given, offsets=(0, 4, 3))
    _cpu.set_serial_bytes(0)
    onepass.set_num_threads(2)
    seen = set()
    for name, variant in VARIANTS.items():
        want = expected(given, variant)
        for result in (*want.forward, *want.backward):
            if result is not None:
                seen |= {"nan"} if np.isnan(result).any() else set()
                seen |= {"finite"} if np.isfinite(result).any() else set()
        for isa in ISAS:
            onepass.set_isa(isa)
            assert_passes(placed, want, variant, f"{name} {shape} {dtype} {isa}, special values in {roles}")
    assert seen == {"nan", "finite"}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 28, 1), (5, 28, 49), (3, 28, 300)], ids=str)
def test_special_values_in_the_output_that_masks(shape, dtype, isa):
    """Gradients pass where y > 0 and where it is NaN; a subnormal y is a zero, a masked gradient a positive zero."""
    onepass.set_isa(isa)
    given = with_specials(shape, dtype, ("dy",))
    mean, invstd = batch_norm(given["x"], eps=EPS)[1:]
    y = with_specials(shape, dtype, ("residual",))["residual"][:, ::-1].copy()
    want = reference.backward(given["dy"], given["x"], mean, invstd, activation="relu", y=y)
    actual = batch_norm_backward(given["dy"], given["x"], mean, invstd, activation="relu", y=y)
    assert_same_pass(reference.Backward(*actual), want, f"{shape} {dtype} {isa}")
    closed = y < np.finfo(dtype).tiny
    assert closed.any()
    assert not closed.all()
    assert np.isnan(y).any()
    assert_same_bits(actual.residual[closed], np.zeros(np.count_nonzero(closed), dtype))
    assert (actual.residual[~closed & np.isfinite(given["dy"])] != 0).mean() > 0.5


def test_moved_far_out_of_range_shows():
    """Where the squares are beyond the range the variance is not known: NaN and not 1 / sqrt(inf) = 0."""
    for dtype, large in (("float32", 1e20), ("float64", 1e160)):
        for shape in ((40, 3), (5, 3, 300)):
            x = np.zeros(shape, dtype)
            x[::2, 1] = large
            y, mean, invstd = batch_norm(x)
            assert np.isnan(y[:, 1]).all()
            assert np.isfinite(mean).all()
            assert list(np.isnan(invstd)) == [False, True, False]


def test_squares_below_the_range_are_no_negative_variance():
    """Each deviation squared is zero in float32, and the rest of the mean squared is not in float64."""
    for shape in ((40, 3, 1), (5, 3, 300), (3, 3, 4500)):
        x = ordinary(shape, "float32")["x"] * np.float32(1e-24)
        variant = Variant(affine=False)
        given = {**ordinary(shape, "float32"), "x": x, "running_var": np.zeros(3, np.float32)}
        want = expected(given, variant)
        assert_same_bits(want.forward.running_var, np.zeros(3, np.float32))
        for isa in ISAS:
            onepass.set_isa(isa)
            assert_passes(Placed(given, offsets=(0,)), want, variant, f"{shape} {isa}")


# Fused against apart


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(60, 33, 1), (9, 20, 49), (4, 7, 300), (2, 3, 5000)], ids=str)
def test_fused_equals_unfused(shape, training, dtype, isa):
    onepass.set_isa(isa)
    given = ordinary(shape, dtype)
    x, dy, residual = given["x"], given["dy"], given["residual"]
    affine = (given["weight"], given["bias"])

    def forward(**options):
        running = given["running_mean"].copy(), given["running_var"].copy()
        return batch_norm(x, *affine, *running, training=training, **options)

    def backward(gradient, **options):
        return batch_norm_backward(gradient, x, mean, invstd, *affine, training=training, **options)

    zero = x.dtype.type(0)
    plain, mean, invstd = forward()
    with_relu, with_residual = forward(activation="relu")[0], forward(residual=residual)[0]
    with_both = forward(activation="relu", residual=residual)[0]
    assert_same_bits(with_relu, np.where(zero > plain, zero, plain), "relu")
    assert_same_bits(with_residual, plain + residual, "residual")
    assert_same_bits(with_both, np.where(zero > with_residual, zero, with_residual), "both")
    assert 0.2 < np.mean(with_both == 0) < 0.8

    for y, options in ((with_relu, {"y": None}), (with_relu, {"y": with_relu}), (with_both, {"y": with_both})):
        masked = np.where(y <= 0, zero, dy)
        fused, apart = backward(dy, activation="relu", **options), backward(masked)
        for name in ("x", "weight", "bias"):
            assert_same_bits(getattr(fused, name), getattr(apart, name), name)
            assert np.isfinite(getattr(fused, name)).all()
        if options["y"] is not None:
            assert_same_bits(fused.residual, masked, "residual")
        else:
            assert fused.residual is None
    assert backward(dy).residual is dy


# The public face


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_equals_expression(variant, dtype, isa):
    onepass.set_isa(isa)
    shape, axis = (5, 7, 6, 9), 2
    given, variant = ordinary(shape, dtype, axis), VARIANTS[variant]
    affine = (given["weight"], given["bias"]) if variant.affine else (None, None)
    running = [given["running_mean"].copy(), given["running_var"].copy()]
    options = {
        "training": variant.training,
        "channel_axis": axis,
        "activation": variant.activation,
    }
    more = {"residual": given["residual"] if variant.residual else None, "unbiased": variant.unbiased}
    want = reference.forward(given["x"], *affine, *running, **options, **more)  # the same defaults
    y, mean, invstd = batch_norm(given["x"], *affine, *running, **options, **more)
    assert mean.dtype == invstd.dtype == np.float64
    assert_same_pass(reference.Forward(y, mean, invstd, *running), want, "forward")
    options["y"] = y if variant.needs_y else None
    gradients = batch_norm_backward(given["dy"], given["x"], mean, invstd, *affine, **options)
    want_gradients = reference.backward(given["dy"], given["x"], mean, invstd, *affine, **options)
    assert_same_pass(reference.Backward(*gradients), want_gradients, "backward")
    assert_meaningful(given, Expected(want, want_gradients), variant, "functional")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.9, 1.0, 0.0, None])
def test_layer_equals_expression_over_batches(momentum, unbiased, dtype):
    """Running statistics too, as they are rounded to the dtype after each batch; then inference with them."""
    channels = 9
    layer = onepass.BatchNorm(channels, 1e-3, momentum, unbiased=unbiased, activation="relu", dtype=dtype)
    given = ordinary((2, channels), dtype)
    layer.weight[...], layer.bias[...] = given["weight"], given["bias"]
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    affine = given["weight"], given["bias"]
    for t, shape in enumerate([(6, 9, 5), (40, 9), (3, 9, 300), (2, 9, 17, 17), (64, 9, 2, 2)]):
        batch = ordinary(shape, dtype)
        weight = 1.0 / (t + 1) if momentum is None else momentum
        want = reference.forward(
            batch["x"], *affine, mean, var, momentum=weight, eps=1e-3, unbiased=unbiased, activation="relu"
        )
        assert_same_bits(layer(batch["x"]), want.y, f"y of batch {t}")
        dx = layer.backward(batch["dy"])
        gradients = reference.backward(batch["dy"], batch["x"], want.mean, want.invstd, *affine, activation="relu")
        assert_same_bits(dx, gradients.x, f"dx of batch {t}")
        assert_same_bits(layer.weight_grad, gradients.weight, f"weight_grad of batch {t}")
        assert_same_bits(layer.bias_grad, gradients.bias, f"bias_grad of batch {t}")
        mean, var = want.running_mean, want.running_var
        assert_same_bits(layer.running_mean, mean, f"running_mean after batch {t}")
        assert_same_bits(layer.running_var, var, f"running_var after batch {t}")
        assert layer.num_batches_tracked == t + 1
    assert (mean != 0).all() == (momentum != 0.0)
    layer.eval()
    want = reference.forward(batch["x"], *affine, mean, var, training=False, eps=1e-3, activation="relu")
    assert_same_bits(layer(batch["x"]), want.y, "y in inference")
    gradients = reference.backward(
        batch["dy"], batch["x"], want.mean, want.invstd, *affine, training=False, activation="relu"
    )
    assert_same_bits(layer.backward(batch["dy"]), gradients.x, "dx in inference")
    assert_same_bits(layer.running_mean, mean)
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 33, 1), (9, 20, 49), (2, 3, 5000), (1050, 1000, 1)], ids=str)
def test_inference_in_place(shape, dtype, isa):
    onepass.set_isa(isa)
    given = ordinary(shape, dtype)
    arguments = (given["weight"], given["bias"], given["running_mean"], given["running_var"])
    want = batch_norm(given["x"], *arguments, training=False, activation="relu", residual=given["residual"])[0]
    for offset in (0, 4, 11):
        x, untouched = guarded(shape, dtype, offset=offset)
        x[...] = given["x"]
        y, *_ = batch_norm(x, *arguments, training=False, activation="relu", residual=given["residual"], out=x)
        assert y is x
        assert_same_bits(x, want, f"offset {offset}")
        assert untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 0)])
def test_empty_batch_leaves_the_statistics_alone(shape, dtype):
    layer = onepass.BatchNorm(3, dtype=dtype)
    layer(ordinary((5, 3), dtype)["x"])
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    layer.weight_grad.fill(1)
    layer.bias_grad.fill(1)
    x = np.empty(shape, dtype)
    want = reference.forward(x, layer.weight, layer.bias, mean, var)
    y = layer(x)
    assert y.shape == shape
    assert y.dtype == dtype
    assert_same_bits(layer.running_mean, want.running_mean)
    assert_same_bits(layer.running_var, want.running_var)
    assert layer.num_batches_tracked == 1
    assert layer.backward(np.empty(shape, dtype)).shape == shape
    assert_same_bits(layer.weight_grad, np.zeros(3, dtype))
    assert_same_bits(layer.bias_grad, np.zeros(3, dtype))
    _, mean, invstd = batch_norm(x)
    assert np.isnan(mean).all()
    assert np.isnan(invstd).all()
    assert mean.shape == invstd.shape == (3,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", [(2, 3), (40, 30, 20), (4, 3, 3000)])
def test_the_forced_isa_really_runs(shape, threads, isa):
    """The loop itself says what it was compiled for, by a constant that only its own SIMD header defines."""
    onepass.set_num_threads(threads)
    _cpu.set_serial_bytes(0)
    given = ordinary(shape, "float32")
    for now in (isa, *ISAS):
        onepass.set_isa(now)
        placed = Placed(given, offsets=(0,))
        for variant in VARIANTS.values():
            forward, ran = run_forward(placed, variant)
            assert ran == now
            assert run_backward(placed, forward, variant)[1] == now


def test_divisions_are_all_met():
    """The shapes above reach every way in which a batch is divided."""
    divisions = {shape: reference.Division(*reference.canonical(shape, 1)) for shape in (*SMALL, *LARGE, *OUT_OF_CACHE)}
    short = {shape: d for shape, d in divisions.items() if not d.long}
    long = {shape: d for shape, d in divisions.items() if d.long}
    assert any(d.folds > 1 and shape[0] % d.folds for shape, d in short.items()), "a last row that is not full"
    assert any(d.folds > 1 and shape[0] < d.folds for shape, d in short.items()), "a row that is not full"
    assert any(d.folds > 1 and d.blocks > 1 for d in short.values()), "folded rows in several blocks"
    assert any(d.folds * math.prod(shape[1:]) % 16 for shape, d in short.items()), "rows that are no whole lines"
    assert any(math.prod(shape[1:]) > 1024 and d.blocks > 1 for shape, d in short.items()), "tiles and blocks"
    assert any(d.pieces > 1 and d.blocks > 1 for d in long.values()), "a run of several blocks"
    assert any(d.pieces == 1 and d.runs > 1 and d.groups > 1 for d in long.values()), "several blocks of runs"
    assert any(d.pieces == 1 and shape[0] % d.runs for shape, d in long.items()), "a last block of fewer runs"
    assert any(len({len(chunk) for chunk in d.chunks}) > 1 for d in long.values()), "chunks of several blocks"
    assert {1, 2, 3, 49, 196, 255, 256, 3136, 5000} <= {shape[2] for shape in divisions}
    assert {1, 3, 17, 64, 1000} <= {shape[1] for shape in divisions}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24, 49), (300, 5, 300), (5000, 40, 1), (700, 1500, 1), (3, 2, 20_000)])
def test_caches_decide_the_way_and_not_the_bits(shape, dtype):
    """Channel by channel where a channel fits into a cache, block by block where it does not."""
    rng = np.random.default_rng(3)
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) + 1 for _ in range(3))
    _cpu.set_serial_bytes(0)
    first = None
    for level2, level3 in ((1, 1), (1 << 14, 1 << 14), (1 << 18, 1 << 20), (1 << 40, 1 << 40)):
        _cpu.set_cache_sizes(level2, level3)
        for threads in (1, 3):
            onepass.set_num_threads(threads)
            y, mean, invstd = batch_norm(x, activation="relu", residual=residual)
            gradients = batch_norm_backward(dy, x, mean, invstd, activation="relu", y=y)
            results = (y, mean, invstd, *gradients)
            first = first or results
            for name, result, same in zip(("y", "mean", "invstd", *gradients._fields), results, first, strict=True):
                assert_same_bits(result, same, f"caches {level2}, {level3}, {threads} threads: {name}")

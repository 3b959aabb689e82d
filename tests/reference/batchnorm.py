"""The NumPy expression of batch normalization, in the documented order, over arithmetic that flushes subnormals.

The arguments are those of `onepass.functional`, and nothing is changed in place. S is the dtype of x: elements are
calculated in S, what belongs to a channel in float64. Nothing here knows of the C++ code.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from reference.flushed import Flushed, maximum, sqrt, zero

LANES = 32  # accumulators of a sum along a run
LONG_RUN = 256  # elements; shorter runs are summed across
BLOCK_RUN = 4096  # elements of a block of long runs
BLOCK_ROWS = 64  # rows of a block of short runs
ROW = 1024  # the most elements of a row that is made of several
GRANULE = 16  # such a row has a multiple of it, if some number of rows has
SAMPLE_RUN = 512  # elements of a block of long runs, of its first run, that give the center of its sums
SAMPLE_ROWS = 8  # the same for short runs
CHUNK = 4  # blocks of a chunk, at least
MAX_CHUNKS = 128


class Forward(NamedTuple):
    y: np.ndarray
    mean: np.ndarray
    invstd: np.ndarray
    running_mean: np.ndarray | None
    running_var: np.ndarray | None


class Backward(NamedTuple):
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    residual: np.ndarray | None


# Values


def double(value) -> Flushed:
    """In float64, exactly; a subnormal of the given dtype is zero."""
    if not isinstance(value, Flushed):
        value = Flushed(value, np.asarray(value).dtype)
    return Flushed(value.value, np.float64)


def rounded(value: Flushed, dtype) -> Flushed:
    return Flushed(value.value, dtype)


def spread(per_channel: Flushed) -> Flushed:
    """Over the elements of (..., channels, inner)."""
    return Flushed(per_channel.value[..., None], per_channel.value.dtype)


def canonical(shape, channel_axis) -> tuple[int, int, int]:
    """(outer, channels, inner). A single channel is one run."""
    channel_axis %= len(shape)
    outer, channels, inner = math.prod(shape[:channel_axis]), shape[channel_axis], math.prod(shape[channel_axis + 1 :])
    return (1, 1, outer * inner) if channels == 1 else (outer, channels, inner)


# Sums over a channel


def divided(count, unit):
    """Rounded up."""
    return -(-count // unit)


def padded(array, *shape):
    """With zeros behind, along each axis, up to a shape."""
    result = np.zeros(shape, array.dtype)
    result[tuple(map(slice, array.shape))] = array
    return result


class Division:
    """How (outer, channels, inner) is divided for the sums over each channel. It follows from the shape alone.

    `arranged` brings the elements into the shape (blocks, steps, folds, channels, lanes), with zeros where there is no
    element.
    """

    def __init__(self, outer, channels, inner):
        self.long = inner >= LONG_RUN
        if self.long:
            self.pieces = divided(inner, BLOCK_RUN)  # of a run, each of them a block
            self.piece = BLOCK_RUN if self.pieces > 1 else divided(inner, LANES) * LANES
            self.runs = max(1, BLOCK_RUN // inner)  # of a block
            self.groups = divided(outer, self.runs)
            self.blocks = self.groups * self.pieces
            self.sample = min(SAMPLE_RUN, self.piece) // LANES  # steps
        else:
            width = channels * inner
            most = max(1, ROW // width)
            self.inner = inner
            self.folds = next((fold for fold in range(most, 0, -1) if fold * width % GRANULE == 0), most)
            rows = divided(outer, self.folds)
            self.blocks = divided(rows, BLOCK_ROWS)
            self.rows = min(rows, BLOCK_ROWS)  # of a block
            self.sample = SAMPLE_ROWS
        self.present = self.arranged(np.ones((outer, 1, inner), bool))
        self.counts = self.present.sum(axis=(1, 2, 3, 4))  # elements of a channel in each block
        self.sampled = self.present[:, : self.sample].sum(axis=(1, 2, 3, 4))
        parts = min(divided(self.blocks, CHUNK), MAX_CHUNKS)
        ends = [k * (self.blocks // parts) + min(k, self.blocks % parts) for k in range(parts + 1)]
        self.chunks = [range(*pair) for pair in itertools.pairwise(ends)]

    def arranged(self, array):
        channels = array.shape[1]
        if self.long:
            array = padded(array, self.groups * self.runs, channels, self.pieces * self.piece)
            array = array.reshape(self.groups, self.runs, channels, self.pieces, self.piece // LANES, LANES)
            return array.transpose(0, 3, 1, 4, 2, 5).reshape(self.blocks, -1, 1, channels, LANES)
        array = padded(array, self.blocks * self.rows * self.folds, channels, self.inner)
        return array.reshape(self.blocks, self.rows, self.folds, channels, self.inner)

    def of_blocks(self, per_block: Flushed) -> Flushed:
        """A value for each block and channel, over arranged elements."""
        return spread(Flushed(per_block.value[:, None, None], per_block.value.dtype))

    def sums(self, terms: Flushed) -> Flushed:
        """Of arranged terms, for each block and channel."""
        present = self.present[:, : terms.value.shape[1]]
        values = np.where(present, terms.value, terms.value.dtype.type(0))
        columns = in_order(values, axis=1)
        return along_lanes(in_order(columns.value, axis=1))


def in_order(values, axis) -> Flushed:
    """The sum along an axis, from +0 on, one term after the other."""
    total = Flushed(0, values.dtype)
    for term in np.moveaxis(values, axis, 0):
        total = total + Flushed(term, values.dtype)
    return total


def along_lanes(run: Flushed) -> Flushed:
    """The sum over the last axis: element i goes to accumulator i % LANES, and these are added in a tree."""
    *others, count = run.value.shape
    steps = divided(count, LANES)
    lanes = in_order(padded(run.value, *others, steps * LANES).reshape(*others, steps, LANES), axis=-2).value
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = (Flushed(lanes[..., :half], lanes.dtype) + Flushed(lanes[..., half:], lanes.dtype)).value
    return Flushed(lanes[..., 0], lanes.dtype)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a part of each channel."""

    count: int
    mean: Flushed
    m2: Flushed

    def merged(self, more: Moments) -> Moments:
        """Chan, Golub and LeVeque (1979), eq. 2.1."""
        if self.count == 0:
            return more
        share = double(float(more.count)) / double(float(self.count + more.count))
        weight = double(float(self.count)) * share
        delta = more.mean - self.mean
        mean = self.mean + delta * share
        m2 = (self.m2 + more.m2) + delta * delta * weight
        return Moments(self.count + more.count, mean, m2)


NOTHING = Moments(0, double(0.0), double(0.0))


def moments_of_blocks(x, division: Division) -> list[Moments]:
    dtype = x.dtype
    arranged = division.arranged(x)
    elements = Flushed(arranged, dtype)
    counts = double(division.counts[:, None].astype(np.float64))
    first = Flushed(arranged[:, 0, 0, :, 0], dtype)
    sample = Flushed(arranged[:, : division.sample], dtype)
    sampled = double(division.sampled[:, None].astype(np.float64))
    center = rounded(double(first) + double(division.sums(sample - division.of_blocks(first))) / sampled, dtype)
    deviation = elements - division.of_blocks(center)
    rest = double(division.sums(deviation))
    mean = double(center) + rest / counts
    squares = double(division.sums(deviation * deviation)) - rest * rest / counts
    m2 = np.where(squares.value < 0, 0.0, squares.value)
    return [
        Moments(int(count), double(mean_b), double(m2_b))
        for count, mean_b, m2_b in zip(division.counts, mean.value, m2, strict=True)
    ]


def moments(x) -> Moments:
    """Of each channel of (outer, channels, inner)."""
    division = Division(*x.shape)
    blocks = moments_of_blocks(x, division)
    total = NOTHING
    for chunk in division.chunks:
        part = NOTHING
        for block in chunk:
            part = part.merged(blocks[block])
        total = total.merged(part)
    known = total.m2.value <= np.finfo(np.float64).max
    return total._replace(m2=double(np.where(known, total.m2.value, np.nan)))


def totals(division: Division, terms: Flushed) -> Flushed:
    """Sums of blocks added up in float64."""
    blocks = [double(block) for block in division.sums(terms).value]
    chunks = []
    for chunk in division.chunks:
        part = double(0.0)
        for block in chunk:
            part = part + blocks[block]
        chunks.append(part)
    total = chunks[0]
    for part in chunks[1:]:
        total = total + part
    return total


# The passes


class Normalization:
    """What maps x to y: (x - high) * scale + offset."""

    def __init__(self, mean: Flushed, invstd: Flushed, weight, bias, dtype):
        self.high = rounded(mean, dtype)
        self.low = mean - double(self.high)
        factor = invstd if weight is None else double(weight) * invstd
        self.scale = rounded(factor, dtype)
        self.offset = rounded(double(0.0 if bias is None else bias) - self.low * factor, dtype)

    def centered(self, x: Flushed) -> Flushed:
        return x - spread(self.high)

    def __call__(self, x: Flushed) -> Flushed:
        return self.centered(x) * spread(self.scale) + spread(self.offset)


def forward(
    x,
    weight=None,
    bias=None,
    running_mean=None,
    running_var=None,
    *,
    training=True,
    momentum=0.1,
    eps=1e-5,
    unbiased=True,
    channel_axis=1,
    activation=None,
    residual=None,
) -> Forward:
    dtype, shape = x.dtype, canonical(x.shape, channel_axis)
    if x.size == 0:
        unknown = np.full(shape[1], np.nan)
        return Forward(x.copy(), unknown, unknown, running_mean, running_var)
    if training:
        n, mean, m2 = moments(x.reshape(shape))
        var = m2 / double(float(n))

        def mixed(running, now):
            if running is None:
                return None
            if momentum == 0.0:  # a term without weight is left out
                return Flushed(running, dtype).value
            if momentum == 1.0:
                return rounded(now, dtype).value
            return rounded(double(1.0 - momentum) * double(running) + double(momentum) * now, dtype).value

        running_mean = mixed(running_mean, mean)
        running_var = mixed(running_var, m2 / double(float(n - 1 if unbiased else n)))
    else:
        mean, var = double(running_mean), double(running_var)
    invstd = double(1.0) / sqrt(var + double(eps))
    y = Normalization(mean, invstd, weight, bias, dtype)(Flushed(x.reshape(shape), dtype))
    if residual is not None:
        y = y + Flushed(residual.reshape(shape), dtype)
    if activation == "relu":
        y = maximum(zero(y), y)
    return Forward(y.value.reshape(x.shape), mean.value, invstd.value, running_mean, running_var)


def backward(
    dy, x, mean, invstd, weight=None, bias=None, *, training=True, channel_axis=1, activation=None, y=None
) -> Backward:
    """`y`: the output, where a residual was added before the activation."""
    dtype, shape = x.dtype, canonical(x.shape, channel_axis)
    if x.size == 0:
        nothing = np.zeros(shape[1], dtype)
        return Backward(dy.copy(), nothing, nothing, None if activation and y is None else dy)
    mean, invstd = double(mean), double(invstd)
    normalization = Normalization(mean, invstd, weight, bias, dtype)
    elements = Flushed(x.reshape(shape), dtype)
    residual = None
    if activation == "relu":
        output = normalization(elements) if y is None else Flushed(y.reshape(shape), dtype)
        flushed = Flushed(dy.reshape(shape), dtype).value
        g = Flushed(np.where(output.value <= 0, dtype.type(0), flushed), dtype)
        if y is not None:
            residual = g.value.reshape(x.shape)
    else:
        g = Flushed(dy.reshape(shape), dtype)
        residual = dy
    division = Division(*shape)
    n = double(float(shape[0] * shape[2]))
    deviation = normalization.centered(elements)
    sum_g = totals(division, Flushed(division.arranged(g.value), dtype))
    sum_gx = totals(division, Flushed(division.arranged((g * deviation).value), dtype))
    dweight = (sum_gx - normalization.low * sum_g) * invstd
    slope = invstd * (dweight / n)
    level = sum_g / n - normalization.low * slope
    if training:
        inner = g - spread(rounded(level, dtype)) - deviation * spread(rounded(slope, dtype))
        dx = spread(normalization.scale) * inner
    else:
        dx = g * spread(normalization.scale)
    return Backward(dx.value.reshape(x.shape), rounded(dweight, dtype).value, rounded(sum_g, dtype).value, residual)

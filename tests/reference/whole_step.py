"""The NumPy expression of a whole step, from raw gradients to parameters, averages and mirrors.

Arrays in, new arrays out. Each operation is NumPy's own in the compute type, over arithmetic that flushes subnormals.
The rules are those of `expressions`. Nothing here knows of the C++ code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from reference import expressions, narrow, philox
from reference.flushed import Flushed, maximum, sign

BLOCK = 4096  # elements of a block of a sum of squares
LANES = 16  # accumulators of a block


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter with the arrays that belong to it, and what its group says at this call. None: there is none."""

    rule: str
    param: np.ndarray
    grad: np.ndarray | None = None
    slots: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # in the rule's order
    ema: np.ndarray | None = None
    mirror: np.ndarray | None = None
    remainder: np.ndarray | None = None  # uint16; given: the parameter is the high half of a split master
    accumulator: np.ndarray | None = None
    holds: bool = False  # whether the accumulator has a gradient of this round
    updates: int = 0  # made so far; t of the next one is one more
    coefficients: Mapping[str, float] = dataclasses.field(default_factory=dict)
    l1: float = 0.0
    l2: float = 0.0
    decay: float = 1.0
    maximize: bool = False
    gradient_noise: tuple[float, float] | None = None  # eta, gamma
    max_unit_norm: tuple[float, Any] | None = None  # limit, axis or axes
    ema_decay: float | None = None

    @property
    def compute(self):
        return narrow.compute_dtype(self.param.dtype)

    @property
    def order(self):
        return MemoryOrder(self.param)

    def flat(self, array):
        """In the compute type, in the parameter's memory order."""
        return Flushed(narrow.widen(self.order.flat(array), self.compute), self.compute)


class Report(NamedTuple):
    tensors: list[Tensor]  # with new arrays
    grad_norm: float | None  # None: it was not measured
    skipped: bool  # because of a non-finite element
    accumulated: int  # calls that the accumulators hold


class MemoryOrder:
    """The order of an array's elements in memory."""

    def __init__(self, array):
        long = [axis for axis in range(array.ndim) if array.shape[axis] != 1]
        self.axes = sorted(long, key=lambda axis: -array.strides[axis])  # that matter, the slowest first
        self.lengths = [array.shape[axis] for axis in self.axes]
        self.shape = array.shape
        self._all = [*self.axes, *(axis for axis in range(array.ndim) if axis not in self.axes)]

    def flat(self, array):
        """Elements of an array of any layout, in this order."""
        return array.transpose(self._all).reshape(-1)

    def shaped(self, flat):
        """The inverse of `flat`: an array of this shape and layout."""
        array = flat.reshape([self.shape[axis] for axis in self._all])
        return array.transpose(np.argsort(np.array(self._all, int)))


def step(
    tensors,
    *,
    grad_scale=1.0,
    max_grad_norm=None,
    clip_norm=None,
    clip_value=None,
    nonfinite="propagate",
    zero_grads=False,
    accumulate=1,
    accumulated=0,
    seed=0,
    rounding="nearest",
):
    """One call. `accumulated`: the calls of this round before it. The index of a tensor is its position in the list."""
    last = accumulated + 1 == accumulate
    totals = [total_gradient(tensor, grad_scale, accumulate) for tensor in tensors]
    # A call that only adds to a sum leaves those without gradient alone.
    read = [x if last or tensor.grad is not None else None for tensor, x in zip(tensors, totals, strict=True)]
    lost = [k for k, x in enumerate(read) if x is not None and not np.isfinite(x.value).all()]
    if lost and nonfinite == "raise":
        raise FloatingPointError(f"grads[{lost[0]}]")
    skipped = bool(lost) and nonfinite == "skip"

    sums = [None if x is None else float(sum_of_squares(x)) for x in read]
    total = float(in_order(np.array([term for term in sums if term is not None])))

    def norm(squares):
        return math.sqrt(squares) / accumulate if accumulate > 1 else abs(grad_scale) * math.sqrt(squares)

    measured = max_grad_norm is not None or clip_norm is not None or nonfinite != "propagate"
    grad_norm = norm(total) if last and measured else None

    result = []
    for index, (tensor, g, squares) in enumerate(zip(tensors, totals, sums, strict=True)):
        new = tensor
        if g is not None and not skipped:
            if last:
                clip = 1.0
                if max_grad_norm is not None:
                    clip = clipping(norm(total), max_grad_norm)
                elif clip_norm is not None:
                    clip = clipping(norm(squares), clip_norm)
                scale = (-1 if tensor.maximize else 1) * (clip / accumulate if accumulate > 1 else grad_scale * clip)
                g = scaled(scale, g)
                new = updated(tensor, g, index=index, clip_value=clip_value, seed=seed, rounding=rounding)
            else:
                new = dataclasses.replace(tensor, accumulator=tensor.order.shaped(g.value), holds=True)
        if zero_grads and tensor.grad is not None:
            new = dataclasses.replace(new, grad=np.zeros_like(tensor.grad))
        result.append(new)
    if not skipped:
        accumulated = 0 if last else accumulated + 1
    return Report(result, grad_norm, skipped, accumulated)


# Gradients


def coefficient(value, dtype, neutral):
    """Rounded to the compute type; None if that is neutral."""
    rounded = Flushed(value, dtype)
    return None if rounded.value == neutral else rounded


def scaled(scale, x):
    scale = coefficient(scale, x.value.dtype, neutral=1.0)
    return x if scale is None else scale * x


def total_gradient(tensor, grad_scale, accumulate):
    """The gradient of this call; with accumulation the scaled sum of this round's, this call's included."""
    g = None if tensor.grad is None else tensor.flat(tensor.grad)
    if accumulate == 1:
        return g
    acc = tensor.flat(tensor.accumulator) if tensor.holds else None
    if g is None:
        return acc
    g = scaled(grad_scale, g)
    return g if acc is None else acc + g


def sum_of_squares(x):
    """Over the last axis, in float64."""
    *others, count = x.value.shape
    blocks = max(1, -(-count // BLOCK))
    steps = -(-count // LANES) if blocks == 1 else BLOCK // LANES
    padded = np.zeros((*others, blocks * steps * LANES))  # a square of zero changes no sum of squares
    padded[..., :count] = x.value
    padded = padded.reshape(*others, blocks, steps, LANES)
    lanes = Flushed(np.zeros((*others, blocks, LANES)), np.float64)
    for k in range(steps):
        term = Flushed(padded[..., k, :], np.float64)
        lanes = lanes + term * term
    return in_order(tree(lanes.value))


def tree(a):
    """The sum over the last axis, whose length is a power of two: the upper half onto the lower one, and so on."""
    while a.shape[-1] > 1:
        half = a.shape[-1] // 2
        a = (Flushed(a[..., :half], np.float64) + Flushed(a[..., half:], np.float64)).value
    return a[..., 0]


def in_order(values):
    """The sum over the last axis: term i to lane i % 32, then the lanes as a tree."""
    lanes = Flushed(np.zeros((*values.shape[:-1], 32)), np.float64)
    for first in range(0, values.shape[-1], 32):
        part = values[..., first : first + 32]
        some = Flushed(lanes.value[..., : part.shape[-1]], np.float64) + Flushed(part, np.float64)
        lanes.value[..., : part.shape[-1]] = some.value
    return tree(lanes.value)


def clipping(norm, limit):
    """By what a gradient is multiplied: NaN if the norm is."""
    return 1.0 if norm <= limit else limit / norm


def minimum(a, b):
    """``a < b ? a : b``"""
    return a._apply(lambda x, y: np.where(x < y, x, y), b)


def clipped(g, limit):
    c, minus_c = Flushed(limit, g.value.dtype), Flushed(-limit, g.value.dtype)
    return minimum(c, maximum(minus_c, g))


def noisy(g, eta, gamma, *, seed, index, t):
    """Neelakantan et al. (2015), "Adding gradient noise improves learning for very deep networks", eq. 1."""
    dtype = g.value.dtype
    try:
        variance = eta / (1 + t) ** gamma
    except OverflowError:  # of the power
        variance = 0.0
    sigma = coefficient(math.sqrt(variance), dtype, neutral=0.0)
    if sigma is None:
        return g
    z = philox.normals(seed, index, t, 0, g.value.size)
    return g + sigma * Flushed(z.astype(dtype), dtype)


# The update


def updated(tensor, g, *, index, clip_value, seed, rounding):
    """A tensor after the update with `g`, the scaled gradient."""
    dtype, order, t = tensor.compute, tensor.order, tensor.updates + 1

    def store(x, storage, purpose):
        r = None
        if rounding == "stochastic" and narrow.is_narrow(storage):
            r = philox.rounding_bits(seed, index, t, purpose, 0, x.value.size)
        return narrow.narrow(x.value, storage, r)

    def store_parameter(p, purpose):
        """The arrays, and the parameter as they have it."""
        if tensor.remainder is None:
            param, remainder = store(p, tensor.param.dtype, purpose), None
        else:
            param, remainder = narrow.split(p.value)
        return param, remainder, load_parameter(param, remainder)

    def load_parameter(param, remainder):
        if remainder is None:
            return Flushed(narrow.widen(param, dtype), dtype)
        return Flushed(narrow.joined(param, remainder), dtype)

    p = load_parameter(order.flat(tensor.param), None if tensor.remainder is None else order.flat(tensor.remainder))
    s = {name: tensor.flat(slot) for name, slot in tensor.slots.items()}

    if clip_value is not None:
        g = clipped(g, clip_value)
    if tensor.gradient_noise is not None:
        g = noisy(g, *tensor.gradient_noise, seed=seed, index=index, t=t)
    if (l1 := coefficient(tensor.l1, dtype, neutral=0.0)) is not None:
        g = g + l1 * sign(p)
    if (l2 := coefficient(tensor.l2, dtype, neutral=0.0)) is not None:
        g = g + l2 * p
    c = SimpleNamespace(**{name: Flushed(value, dtype) for name, value in tensor.coefficients.items()})
    u = getattr(expressions, tensor.rule)(g, s, c)
    p = scaled(tensor.decay, p) - u

    param, remainder, p = store_parameter(p, philox.PARAMETER)
    if tensor.max_unit_norm is not None:
        p = unit_factors(p, order, *tensor.max_unit_norm) * p
        param, remainder, p = store_parameter(p, philox.PARAMETER_AFTER_NORM)

    ema = mirror = None
    if tensor.ema is not None:
        e = p
        d = coefficient(tensor.ema_decay, dtype, neutral=0.0)
        if t > 1 and d is not None:
            e = d * tensor.flat(tensor.ema) + Flushed(1.0 - tensor.ema_decay, dtype) * p
        ema = order.shaped(store(e, tensor.ema.dtype, philox.EMA))
    if tensor.mirror is not None:
        mirror = order.shaped(narrow.narrow(p.value, tensor.mirror.dtype))
    slots = {
        name: order.shaped(store(s[name], old.dtype, philox.FIRST_SLOT + k))
        for k, (name, old) in enumerate(tensor.slots.items())
    }
    return dataclasses.replace(
        tensor,
        param=order.shaped(param),
        remainder=None if remainder is None else order.shaped(remainder),
        slots=slots,
        ema=ema,
        mirror=mirror,
        holds=False,
        updates=t,
    )


def unit_factors(p, order, limit, axes):
    """For each element: by what its unit is multiplied to have no greater norm than `limit`."""
    if p.value.size == 0:
        return p
    ndim = len(order.shape)
    axes = {axis % ndim for axis in ((axes,) if isinstance(axes, int) else axes)}
    within = [k for k, axis in enumerate(order.axes) if axis in axes]
    across = [k for k, axis in enumerate(order.axes) if axis not in axes]
    run, rest = 1, list(range(len(order.axes)))
    while rest and rest[-1] in within:  # the fastest axes, as long as they are a unit's own
        run *= order.lengths[rest.pop()]
    count = math.prod(order.lengths[k] for k in within)
    places = np.arange(p.value.size).reshape(order.lengths).transpose(across + within).reshape(-1, count // run, run)
    total = Flushed(0, np.float64)
    squares = sum_of_squares(Flushed(p.value[places], p.value.dtype))
    for k in range(count // run):
        total = total + Flushed(squares[:, k], np.float64)
    with np.errstate(all="ignore"):
        norm = np.sqrt(total.value)
        factor = np.where(norm > limit, limit / norm, 1.0)
    factors = np.empty(p.value.size)
    factors[places] = factor[:, None, None]
    return Flushed(factors, p.value.dtype)

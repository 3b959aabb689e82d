r"""Learning-rate schedules: plain callables of the 1-based step count `t`, to pass as `lr`.

Each multiplies a learning rate, a number or another schedule, by a factor of `t`; so they compose:
``linear_warmup(cosine(1e-3, steps=10_000), steps=500)`` warms up into a cosine. They are immutable, compare by value,
and can be pickled. `t` is the number of gradients that the parameter has received.

Examples
--------
>>> from onepass import schedules
>>> lr = schedules.linear_warmup(schedules.step(0.1, every=100, factor=0.5), steps=10)
>>> [round(lr(t), 6) for t in (1, 10, 100, 101)]
[0.01, 0.1, 0.1, 0.05]
>>> import numpy as np, onepass
>>> opt = onepass.Adam(np.zeros(3), lr=lr)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from onepass.integers import is_integer
from onepass.optim.hyper import LearningRate, checked, learning_rate, real

__all__ = ["Schedule", "cosine", "exponential", "inverse_time", "linear_warmup", "step"]


@dataclass(frozen=True)
class _Field:
    """The range of a schedule's own parameter, and the plain Python number that it becomes."""

    need: str
    inside: Callable[[float], bool]
    integer: bool = False

    def read(self, value: Any, name: str) -> float | int:
        if self.integer and not is_integer(value):
            raise TypeError(f"{name}: expected {self.need}, got {value!r}")
        number = real(value, name, self.need, self.inside)
        return int(value) if self.integer else number


_NONNEGATIVE = _Field("a finite number >= 0", lambda x: 0 <= x < math.inf)
_POSITIVE_FRACTION = _Field("a number in (0, 1]", lambda x: 0 < x <= 1)
_FRACTION = _Field("a number in [0, 1]", lambda x: 0 <= x <= 1)
_COUNT = _Field("an integer >= 1", lambda x: x >= 1, integer=True)


@dataclass(frozen=True)
class Schedule:
    """A learning rate, a number or a schedule, times a factor of the step count."""

    lr: LearningRate

    _fields: ClassVar[Mapping[str, _Field]] = {}

    def __post_init__(self) -> None:
        # Frozen, so by this way: NumPy's numbers become Python's, and rates are float64 whatever they came as.
        object.__setattr__(self, "lr", checked({"lr": self.lr})["lr"])
        for name, field in self._fields.items():
            object.__setattr__(self, name, field.read(getattr(self, name), name))

    def scale_at(self, t: int) -> float:
        """What the learning rate is multiplied by at step `t`."""
        raise TypeError("Schedule is the base of the schedules; use one of them")

    def __call__(self, t: int) -> float:
        """The learning rate at step `t`, 1 for the first."""
        lr = learning_rate(self.lr(t), f"lr({t})") if callable(self.lr) else self.lr
        return lr * self.scale_at(t)

    def __repr__(self) -> str:
        first, *rest = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{type(self).__name__}({', '.join([first.removeprefix('lr='), *rest])})"


@dataclass(frozen=True, repr=False)
class inverse_time(Schedule):  # noqa: N801 - used like a function
    r""":math:`\mathrm{lr} / (1 + \mathrm{decay} \cdot t)`: its sum diverges and the sum of its squares does not.

    Parameters
    ----------
    lr : float or callable
        The rate, or another schedule.
    decay : float
        >= 0.

    References
    ----------
    .. [1] H. Robbins and S. Monro, "A stochastic approximation method", Annals of Mathematical Statistics 22 (1951),
       400-407: the conditions under which the rates lead to the optimum.

    Examples
    --------
    >>> inverse_time(0.5, decay=1.0)(4)
    0.1
    """

    decay: float

    _fields: ClassVar[Mapping[str, _Field]] = {"decay": _NONNEGATIVE}

    def scale_at(self, t: int) -> float:
        return 1.0 / (1.0 + self.decay * t)


@dataclass(frozen=True, repr=False)
class exponential(Schedule):  # noqa: N801
    r""":math:`\mathrm{lr} \cdot \mathrm{rate}^{(t - 1) / \mathrm{steps}}`: smooth decay.

    Parameters
    ----------
    lr : float or callable
        The rate of the first step, or another schedule.
    rate : float
        The factor that `steps` steps make, in (0, 1].
    steps : int, default 1
        >= 1.

    Examples
    --------
    >>> [exponential(0.8, rate=0.5)(t) for t in (1, 2, 3)]
    [0.8, 0.4, 0.2]
    """

    rate: float
    steps: int = 1

    _fields: ClassVar[Mapping[str, _Field]] = {"rate": _POSITIVE_FRACTION, "steps": _COUNT}

    def scale_at(self, t: int) -> float:
        return float(self.rate ** ((t - 1) / self.steps))


@dataclass(frozen=True, repr=False)
class step(Schedule):  # noqa: N801
    r""":math:`\mathrm{lr} \cdot \mathrm{factor}^{\lfloor (t - 1) / \mathrm{every} \rfloor}`: stairs.

    Parameters
    ----------
    lr : float or callable
        The rate of the first `every` steps, or another schedule.
    every : int
        The length of a stair in steps, >= 1.
    factor : float, default 0.1
        The height of the next stair relative to the last one, in (0, 1].

    Examples
    --------
    >>> [step(0.4, every=2, factor=0.5)(t) for t in (1, 2, 3, 4, 5)]
    [0.4, 0.4, 0.2, 0.2, 0.1]
    """

    every: int
    factor: float = 0.1

    _fields: ClassVar[Mapping[str, _Field]] = {"every": _COUNT, "factor": _POSITIVE_FRACTION}

    def scale_at(self, t: int) -> float:
        return float(self.factor ** ((t - 1) // self.every))


@dataclass(frozen=True, repr=False)
class cosine(Schedule):  # noqa: N801
    r"""Half a cosine from `lr` at the first step to ``final * lr`` at step ``steps + 1``, and that from then on.

    :math:`\mathrm{lr} \cdot \left(\mathrm{final} + (1 - \mathrm{final})\, \tfrac12 (1 + \cos(\pi x))\right)` with
    :math:`x = \min(1, (t - 1) / \mathrm{steps})`.

    Parameters
    ----------
    lr : float or callable
        The rate of the first step, or another schedule.
    steps : int
        Length of the descent, >= 1.
    final : float, default 0
        Where it ends, as a fraction of `lr`, in [0, 1].

    References
    ----------
    .. [1] I. Loshchilov and F. Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, eq. 5,
       without restarts.

    Examples
    --------
    >>> [round(cosine(0.1, steps=10)(t), 6) for t in (1, 6, 11, 12)]
    [0.1, 0.05, 0.0, 0.0]
    """

    steps: int
    final: float = 0.0

    _fields: ClassVar[Mapping[str, _Field]] = {"steps": _COUNT, "final": _FRACTION}

    def scale_at(self, t: int) -> float:
        x = min(1.0, (t - 1) / self.steps)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * x))


@dataclass(frozen=True, repr=False)
class linear_warmup(Schedule):  # noqa: N801
    r""":math:`\mathrm{lr} \cdot \min(1, t / \mathrm{steps})`: a straight rise to `lr` at step `steps`.

    Parameters
    ----------
    lr : float or callable
        The rate after the rise, or the schedule that goes on from there (it sees the same `t`).
    steps : int
        Length of the rise, >= 1.

    References
    ----------
    .. [1] P. Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", arXiv:1706.02677 (2017),
       section 2.2, gradual warmup.

    Examples
    --------
    >>> [linear_warmup(0.4, steps=4)(t) for t in (1, 2, 4, 5)]
    [0.1, 0.2, 0.4, 0.4]
    """

    steps: int

    _fields: ClassVar[Mapping[str, _Field]] = {"steps": _COUNT}

    def scale_at(self, t: int) -> float:
        return min(1.0, t / self.steps)

"""Hyper-parameters: the range of each name, checked wherever a value enters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from onepass.integers import is_integer

Hyper: TypeAlias = dict[str, Any]
LearningRate: TypeAlias = float | Callable[[int], float]


def real(value: Any, name: str, need: str, inside: Callable[[float], bool]) -> float:
    """`value` as a float, if it is a number `inside` its range; `need` says in words which one that is."""
    if isinstance(value, (bool, np.bool_, np.timedelta64)) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {need}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of float64
        number = math.nan
    if not inside(number):  # NaN is inside nothing
        raise ValueError(f"{name}: expected {need}, got {value!r}")
    return number


def _nonnegative(value: Any, name: str) -> float:
    return real(value, name, "a finite number >= 0", lambda x: 0.0 <= x < math.inf)


def _fraction(value: Any, name: str) -> float:
    return real(value, name, "a number in [0, 1)", lambda x: 0.0 <= x < 1.0)


def _closed_fraction(value: Any, name: str) -> float:
    return real(value, name, "a number in [0, 1]", lambda x: 0.0 <= x <= 1.0)


def _nonnegative_or_inf(value: Any, name: str) -> float:
    return real(value, name, "a number >= 0 or inf", lambda x: x >= 0.0)


def flag(value: Any, name: str) -> bool:
    """`value` as a bool, if it is one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _betas(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (beta1, beta2), got {value!r}")
    return _fraction(value[0], f"{name}[0]"), _fraction(value[1], f"{name}[1]")


def learning_rate(value: Any, name: str) -> float:
    """The value of a learning rate or of a schedule at one step, checked."""
    return _nonnegative(value, name)


def _learning_rate_or_schedule(value: Any, name: str) -> LearningRate:
    if callable(value) and not isinstance(value, type):
        schedule: Callable[[int], float] = value
        return schedule
    return real(value, name, "a finite number >= 0 or a callable of the step count", lambda x: 0.0 <= x < math.inf)


def _average_decay(value: Any, name: str) -> LearningRate | None:
    if value is None:
        return None
    if callable(value) and not isinstance(value, type):
        schedule: Callable[[int], float] = value
        return schedule
    return real(value, name, "a number in [0, 1), a callable of the step count or None", lambda x: 0.0 <= x < 1.0)


def average_decay(value: Any, name: str) -> float:
    """The value of an average's decay or of its schedule at one step, checked."""
    return _fraction(value, name)


def _unit_norm(value: Any, name: str) -> tuple[float, tuple[int, ...]] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (limit, axis) or None, got {value!r}")
    limit = real(value[0], f"{name}[0]", "a finite number > 0", lambda x: 0.0 < x < math.inf)
    given = value[1] if isinstance(value[1], (tuple, list)) else (value[1],)
    if not given or not all(map(is_integer, given)):
        raise TypeError(f"{name}[1]: expected an axis or a tuple of axes, got {value[1]!r}")
    axes = tuple(int(axis) for axis in given)
    if not all(-64 <= axis < 64 for axis in axes):
        raise ValueError(f"{name}[1]: expected an axis or a tuple of axes, got {value[1]!r}")
    return limit, axes


def _noise(value: Any, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (eta, gamma) or None, got {value!r}")
    return _nonnegative(value[0], f"{name}[0]"), _nonnegative(value[1], f"{name}[1]")


RANGES: dict[str, Callable[[Any, str], Any]] = {
    "lr": _learning_rate_or_schedule,
    "betas": _betas,
    "momentum": _fraction,
    "dampening": _closed_fraction,
    "rho": _fraction,
    "eps": _nonnegative,
    "eps_root": _nonnegative,
    "initial_accumulator": _nonnegative,
    "lr_decay": _nonnegative,
    "momentum_decay": _nonnegative_or_inf,
    "weight_decay": _nonnegative,
    "l1": _nonnegative,
    "decoupled_weight_decay": flag,
    "maximize": flag,
    "lr_in_velocity": flag,
    "centered": flag,
    "bias_correction": flag,
    "eps_hat": flag,
    "amsgrad": flag,
    "max_of_corrected": flag,
    "ema_decay": _average_decay,
    "max_unit_norm": _unit_norm,
    "gradient_noise": _noise,
}


def checked(values: Mapping[str, Any], prefix: str = "{}") -> Hyper:
    """A copy of `values`, each in its range and of its plain type; `prefix` is a format for names in messages."""
    hyper = {name: RANGES[name](value, prefix.format(name)) for name, value in values.items()}
    if hyper.get("eps") == 0.0 and hyper.get("eps_root", 0.0) == 0.0:
        eps = prefix.format("eps")
        what = f"{eps} and {prefix.format('eps_root')} are both 0; one" if "eps_root" in hyper else "it is 0; it"
        raise ValueError(f"{eps}: {what} must be positive, or 0 / 0 is NaN")
    if hyper.get("max_of_corrected", False) and not hyper["amsgrad"]:
        raise ValueError(f"{prefix.format('max_of_corrected')}: needs amsgrad=True")
    return hyper


def shown(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The hyper-parameters that a repr shows: options that are not used are left out."""
    return [(name, value) for name, value in values.items() if value is not None]


def require_representable(hyper: Mapping[str, Any], dtypes: set[np.dtype[Any]], prefix: str = "{}") -> None:
    """Raise if a positive eps, eps_root or initial_accumulator is zero (as subnormals are) or infinite in a dtype."""
    for name in ("eps", "eps_root", "initial_accumulator"):
        value = hyper.get(name, 0.0)
        if value == 0.0:
            continue
        for dtype in dtypes:
            limits = np.finfo(dtype)
            if value < float(limits.tiny):
                raise ValueError(
                    f"{prefix.format(name)}: {value!r} is zero in {dtype}, where the smallest positive number that "
                    f"counts is {float(limits.tiny):.3g}"
                )
            if value > float(limits.max):
                raise ValueError(f"{prefix.format(name)}: {value!r} is infinite in {dtype}")


class ParamGroup(MutableMapping[str, Any]):
    """The hyper-parameters of a group of parameters, by name; assigning to one checks it and takes effect at once.

    ``group["params"]`` lists the group's arrays and cannot be assigned. Nor can what decides which states exist, or
    what is only read at construction: a new optimizer is needed for that.

    Raises
    ------
    KeyError
        For a name that the optimizer does not have.
    TypeError, ValueError
        For a value of the wrong type or out of range. Nothing has changed then.
    """

    def __init__(self, params: tuple[Any, ...], hyper: Hyper, check: Callable[[Hyper, Hyper], Hyper]) -> None:
        self._params = params
        self._hyper = hyper
        self._check = check

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return self._params
        return self._hyper[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several hyper-parameters, all or none of them."""
        changes: Hyper = dict(*args, **kwargs)
        for name in changes:
            if name == "params":
                raise ValueError("params: the parameters of a group are fixed when the optimizer is made")
            if name not in self._hyper:
                raise KeyError(f"{name!r} is not a hyper-parameter; there are {', '.join(self._hyper)}")
        self._hyper.update(self._check(self._hyper, changes))

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name!r}: hyper-parameters cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        yield "params"
        yield from self._hyper

    def __len__(self) -> int:
        return 1 + len(self._hyper)

    # Two groups are the same only if they are one: comparing as mappings would compare arrays.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in shown(self._hyper))
        return f"ParamGroup({len(self._params)} parameters, {values})"

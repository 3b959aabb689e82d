"""What surrounds the update: what an optimizer is made with, and what a step is asked to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np

from onepass import _cpu
from onepass.integers import integer
from onepass.optim import hyper as hp

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Unpack as Unpack
else:
    try:
        from typing import Unpack
    except ImportError:  # before Python 3.11

        class Unpack:
            """Stands for the real one in annotations, which nobody evaluates."""

            def __class_getitem__(cls, item: Any) -> Any:
                return item


GROUP_OPTIONS = ("ema_decay", "max_unit_norm", "gradient_noise")
"""Options of a group, which live among its hyper-parameters; None for those that are not used."""

StateAlloc: TypeAlias = "Callable[[str, tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]"

_POLICIES = ("propagate", "skip", "raise")


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes; see :class:`onepass.Optimizer`."""

    ema_decay: float | Callable[[int], float] | None
    max_unit_norm: tuple[float, int | tuple[int, ...]] | None
    gradient_noise: tuple[float, float] | None
    mirror: Any
    accumulate: int
    seed: int
    state_dtype: npt.DTypeLike | None
    rounding: Literal["nearest", "stochastic"]
    master: Literal["split"] | None
    state_alloc: StateAlloc | None


class StepOptions(TypedDict, total=False):
    """Keyword arguments of a step; see :meth:`onepass.Optimizer.step`."""

    grad_scale: float
    max_grad_norm: float | None
    clip_norm: float | None
    clip_value: float | None
    nonfinite: Literal["propagate", "skip", "raise"]
    zero_grads: bool


@dataclass(frozen=True)
class Storage:
    """The options of a whole optimizer, checked; the arrays of `mirror` are checked with all others."""

    mirror: Any = None
    accumulate: int = 1
    seed: int = 0
    state_dtype: np.dtype[Any] | None = None
    stochastic: bool = False
    split: bool = False
    state_alloc: StateAlloc | None = None


def choice(value: Any, name: str, among: tuple[Any, ...]) -> Any:
    """`value`, if it is one of those."""
    if not any(value is known or (isinstance(value, str) and value == known) for known in among):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: expected {' or '.join(map(repr, among))}, got {value!r}")
    return value


def seed_number(value: Any) -> int:
    """`value`, if it can be the seed of the random numbers."""
    return integer(value, "seed", 0, 2**64 - 1)


def bfloat16() -> np.dtype[Any]:
    """NumPy's dtype of that name, which is that of the package ml_dtypes."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def storage_table() -> str:
    """The combinations of dtypes that can be stored together, one to a line."""
    rows = "".join(f"\n    {', '.join(row)}" for row in _cpu.storages())
    return f"parameter, gradient and states can be stored as{rows}"


def _state_dtype(value: Any) -> np.dtype[Any] | None:
    if value is None:
        return None
    try:
        dtype = bfloat16() if value == "bfloat16" else np.dtype(value)
    except (TypeError, ValueError):
        raise TypeError(f"state_dtype: expected a dtype or None, got {value!r}") from None
    if not any(dtype.name == state for _, _, state in _cpu.storages()) or not dtype.isnative:
        raise TypeError(f"state_dtype: {dtype} is not among those of states; {storage_table()}")
    return dtype


def state_dtype_for(param: np.dtype[Any], state_dtype: np.dtype[Any] | None, name: str) -> np.dtype[Any]:
    """The dtype of the states of a parameter: the wanted one, if it goes with the parameter's."""
    wanted = state_dtype or compute_dtype(param)
    if not any((param.name, wanted.name) == (row[0], row[2]) for row in _cpu.storages()):
        raise TypeError(f"state_dtype: {wanted} does not go with {param}, the dtype of {name}; {storage_table()}")
    return wanted


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """In which dtype a parameter of this dtype is computed."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def split_options(given: Mapping[str, Any], owner: str) -> tuple[dict[str, Any], Storage]:
    """The options of groups, with their defaults, and those of the whole optimizer; names unknown to both raise."""
    values = dict(given)
    of_group = {name: values.pop(name, None) for name in GROUP_OPTIONS}
    known = [name for name in Options.__annotations__ if name not in GROUP_OPTIONS]
    for name in values:
        if name not in known:
            raise TypeError(
                f"{name}: is not an argument of {owner}; the options are {', '.join(Options.__annotations__)}"
            )
    state_alloc = values.get("state_alloc")
    if state_alloc is not None and not callable(state_alloc):
        raise TypeError(f"state_alloc: expected a function (name, shape, dtype) -> array, got {state_alloc!r}")
    return of_group, Storage(
        mirror=values.get("mirror"),
        accumulate=integer(values.get("accumulate", 1), "accumulate", 1, 2**31 - 1),
        seed=seed_number(values.get("seed", 0)),
        state_dtype=_state_dtype(values.get("state_dtype")),
        stochastic=choice(values.get("rounding", "nearest"), "rounding", ("nearest", "stochastic")) == "stochastic",
        split=choice(values.get("master"), "master", ("split", None)) is not None,
        state_alloc=state_alloc,
    )


def _limit(value: Any, name: str, *, infinite: bool) -> float | None:
    if value is None:
        return None
    if infinite:
        return hp.real(value, name, "a number > 0 (inf: only measure) or None", lambda x: x > 0.0)
    return hp.real(value, name, "a finite number > 0 or None", lambda x: 0.0 < x < math.inf)


_DEFAULTS: dict[str, Any] = {
    "grad_scale": 1.0,
    "max_grad_norm": None,
    "clip_norm": None,
    "clip_value": None,
    "nonfinite": "propagate",
    "zero_grads": False,
}

StepTuple = tuple[float, "float | None", "float | None", "float | None", int, bool]


def step_options(given: Mapping[str, Any], owner: str) -> StepTuple | None:
    """The options of a step, checked, as the compiled module takes them; None where all have their defaults."""
    if not given:
        return None
    for name in given:
        if name not in _DEFAULTS:
            raise TypeError(f"{name}: is not an argument of {owner}; the options are {', '.join(_DEFAULTS)}")
    values = {**_DEFAULTS, **given}
    limits = [name for name in ("max_grad_norm", "clip_norm", "clip_value") if values[name] is not None]
    if len(limits) > 1:
        raise ValueError(f"{limits[1]}: cannot be combined with {limits[0]}; give one of them")
    return (
        hp.real(values["grad_scale"], "grad_scale", "a finite number > 0", lambda x: 0.0 < x < math.inf),
        _limit(values["max_grad_norm"], "max_grad_norm", infinite=True),
        _limit(values["clip_norm"], "clip_norm", infinite=True),
        _limit(values["clip_value"], "clip_value", infinite=False),
        _POLICIES.index(choice(values["nonfinite"], "nonfinite", _POLICIES)),
        hp.flag(values["zero_grads"], "zero_grads"),
    )

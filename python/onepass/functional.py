"""Update rules and batch normalization as functions over arrays that the caller owns, for backends that keep the state.

:func:`batch_norm` and :func:`batch_norm_backward` are described with themselves. Each of the other functions is an
update rule: it updates `params` and the states in place, in one pass over memory, by the kernels and with the checks of
the optimizer class of the same name; the class's docstring has the formula and the ranges of the hyper-parameters.

Parameters that all update rules share:

params, grads : sequence of arrays, or one array
    As in :class:`onepass.Optimizer`. ``None`` in the place of a gradient leaves that parameter and its states alone.
states (``exp_avgs``, ``velocities``, ...) : sequence of arrays, or one array
    One for each parameter, of its shape, writable and dense, of a dtype that goes with the parameter's (the table is
    in :class:`onepass.Optimizer`). All zeros before the first step (for AdaGrad: whatever the accumulator shall begin
    with).
step : int
    The 1-based count of this step, the same for all arrays of the call. The caller counts.
lr : float or callable
    Learning rate >= 0, or a schedule, called with `step`.

What surrounds the update is asked for by the names of :class:`onepass.Optimizer` and :meth:`onepass.Optimizer.step`:
`grad_scale`, `max_grad_norm`, `clip_norm`, `clip_value`, `nonfinite`, `zero_grads`, `ema_decay`, `max_unit_norm`,
`gradient_noise`, `seed`, `rounding`. What an optimizer keeps, the caller passes, as arrays or None:

emas : of the parameters' dtypes (float32 with `remainders`); needed with `ema_decay`
mirrors : bfloat16 or float16; receive the new parameters
remainders : uint16, zeros before the first step; makes of bfloat16 parameters halves of float32 ones
accumulators : of the dtype in which steps are computed, with any content; needed with ``accumulate=k`` > 1
micro_step : int
    Which of the `k` calls this is, from 1; the last one updates. `step` counts updates. Each parameter of these calls
    needs a gradient in all of them.

Random numbers depend on a parameter's position in the list. The functions return None, or a :class:`StepReport` where a
norm was limited or `nonfinite` was not "propagate".

All raise `TypeError` or `ValueError` that names the argument, or `FloatingPointError` for ``nonfinite="raise"``;
nothing has been written then.

Examples
--------
>>> import numpy as np
>>> from onepass import functional
>>> params = [np.ones(3, np.float32), np.ones((2, 2), np.float32)]
>>> velocities = [np.zeros_like(p) for p in params]
>>> for step in (1, 2):
...     grads = [p.copy() for p in params]
...     functional.momentum(params, grads, velocities, step=step, lr=0.5, momentum=0.5)
>>> params[0]
array([0., 0., 0.], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from onepass import _cpu
from onepass.batchnorm import BatchNormGradients, batch_norm, batch_norm_backward
from onepass.integers import integer
from onepass.optim import NAG, SGD, AdaGrad, Adam, AdaSqrt, Momentum, Nadam, Optimizer, RMSprop
from onepass.optim import hyper as hp
from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Array
from onepass.optim.options import (
    GROUP_OPTIONS,
    StepOptions,
    Unpack,
    choice,
    compute_dtype,
    seed_number,
    step_options,
)
from onepass.optim.structure import is_sequence

__all__ = [
    "BatchNormGradients",
    "StepReport",
    "adagrad",
    "adam",
    "adamw",
    "adasqrt",
    "amsgrad",
    "batch_norm",
    "batch_norm_backward",
    "momentum",
    "nadam",
    "nag",
    "rmsprop",
    "sgd",
]

Arrays: TypeAlias = "Array | Sequence[Any]"


class FunctionOptions(StepOptions, total=False):
    """Keyword arguments that every update rule takes beyond its own."""

    emas: Arrays | None
    ema_decay: float | Callable[[int], float] | None
    mirrors: Arrays | None
    max_unit_norm: tuple[float, int | tuple[int, ...]] | None
    gradient_noise: tuple[float, float] | None
    seed: int
    rounding: Literal["nearest", "stochastic"]
    remainders: Arrays | None
    accumulators: Arrays | None
    accumulate: int
    micro_step: int


class StepReport(NamedTuple):
    """What happened in a step that measured its gradients.

    Attributes
    ----------
    grad_norm : float or None
        The norm of all gradients together, after scaling and before clipping; None if the call only added to a sum.
    skipped : bool
        Whether ``nonfinite="skip"`` left everything as it was.
    """

    grad_norm: float | None
    skipped: bool


_STEP_OPTIONS = tuple(StepOptions.__annotations__)
_OPTIONS = tuple(FunctionOptions.__annotations__)  # those of a step among them
_STREAMS = ("emas", "mirrors", "remainders", "accumulators")  # in the order of the compiled module
_MAX_SLOTS = 3


def _apply(
    cls: type[Optimizer],
    params: Arrays,
    grads: Arrays,
    states: Mapping[str, Arrays],
    step: int,
    hyper: Mapping[str, Any],
    options: Mapping[str, Any],
) -> StepReport | None:
    """Update by the rule of `cls`. `states`: the states by argument name, in the order of the rule's slots."""
    step = integer(step, "step", 1, 2**62)
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{name}: is not an argument of this function; options are {', '.join(_OPTIONS)}")
    single = not is_sequence(params)
    if params is None or isinstance(params, (Mapping, str)) or hasattr(params, "__next__"):
        raise TypeError(
            f"params: expected a NumPy array or an object with __dlpack__, or a list or tuple of those, got "
            f"{type(params).__name__}"
        )

    def as_list(name: str, value: Any) -> Sequence[Any] | None:
        if value is None and name in _STREAMS:
            return None
        if is_sequence(value) == single:
            need = "one array, as params is" if single else "a list or tuple of arrays, as params is"
            raise TypeError(f"{name}: expected {need}, got {type(value).__name__}")
        return [value] if single else cast("Sequence[Any]", value)

    slots = [as_list(name, value) for name, value in states.items()]
    unused = [None] * (_MAX_SLOTS - len(slots))
    extras = [as_list(name, options.get(name)) for name in _STREAMS]
    listed = cast("Sequence[Any]", as_list("params", params))
    gradients = cast("Sequence[Any]", as_list("grads", grads))
    streams = [listed, None, *slots, *unused, *extras]
    names = ("params", "grads", *states, *("" for _ in unused), *_STREAMS)

    values = hp.checked({**hyper, **{name: options.get(name) for name in GROUP_OPTIONS}})
    if (extras[0] is None) != (values["ema_decay"] is None):
        raise ValueError("emas: needed with ema_decay, and only then")
    seed = seed_number(options.get("seed", 0))
    rounding = choice(options.get("rounding", "nearest"), "rounding", ("nearest", "stochastic"))
    accumulate = integer(options.get("accumulate", 1), "accumulate", 1, 2**31 - 1)
    if (extras[3] is None) != (accumulate == 1):
        raise ValueError("accumulators: needed with accumulate > 1, and only then")
    micro_step = options.get("micro_step")
    if (micro_step is None) != (accumulate == 1):
        raise TypeError("micro_step: which of the calls of a sum this is, needed with accumulate > 1, and only then")
    micro_step = 1 if micro_step is None else integer(micro_step, "micro_step", 1, accumulate)
    step_tuple = step_options({name: options[name] for name in _STEP_OPTIONS if name in options}, "step")

    rule = cls.rule(values)
    if any(not 1e-37 < values.get(name, 1.0) < 1e38 for name in ("eps", "eps_root")):  # else no dtype needs a look
        names_of = ["params"] if single else [f"params[{index}]" for index in range(len(listed))]
        dtypes = {
            compute_dtype(_cpu.as_ndarray(param, name).dtype)
            for param, name, grad in zip(listed, names_of, gradients, strict=False)
            if grad is not None
        }
        hp.require_representable(values, dtypes)
    recipe = cls.surround(values, step)
    report = _cpu.update(
        rule,
        gradients,
        streams,
        recipe,
        step,
        step_tuple,
        seed,
        rounding == "stochastic",
        (accumulate, micro_step),
        names,
        single,
    )
    measured = any(options.get(name) is not None for name in ("max_grad_norm", "clip_norm"))
    return StepReport(*report) if measured or options.get("nonfinite", "propagate") != "propagate" else None


def sgd(
    params: Arrays,
    grads: Arrays,
    *,
    step: int,
    lr: LearningRate = 0.01,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Stochastic gradient descent; see :class:`onepass.SGD`."""
    return _apply(
        SGD,
        params,
        grads,
        {},
        step,
        {
            "lr": lr,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def momentum(
    params: Arrays,
    grads: Arrays,
    velocities: Arrays,
    *,
    step: int,
    lr: LearningRate = 0.01,
    momentum: float = 0.9,
    dampening: float = 0.0,
    lr_in_velocity: bool = True,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Gradient descent with momentum; see :class:`onepass.Momentum`."""
    return _apply(
        Momentum,
        params,
        grads,
        {"velocities": velocities},
        step,
        {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "lr_in_velocity": lr_in_velocity,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def nag(
    params: Arrays,
    grads: Arrays,
    velocities: Arrays,
    *,
    step: int,
    lr: LearningRate = 0.01,
    momentum: float = 0.9,
    lr_in_velocity: bool = True,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Nesterov's accelerated gradient; `params` are the look-ahead points. See :class:`onepass.NAG`."""
    return _apply(
        NAG,
        params,
        grads,
        {"velocities": velocities},
        step,
        {
            "lr": lr,
            "momentum": momentum,
            "lr_in_velocity": lr_in_velocity,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def adagrad(
    params: Arrays,
    grads: Arrays,
    square_avgs: Arrays,
    *,
    step: int,
    lr: LearningRate = 0.01,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """AdaGrad; see :class:`onepass.AdaGrad`."""
    return _apply(
        AdaGrad,
        params,
        grads,
        {"square_avgs": square_avgs},
        step,
        {
            "lr": lr,
            "eps": eps,
            "eps_root": eps_root,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def adasqrt(
    params: Arrays,
    grads: Arrays,
    square_sums: Arrays,
    *,
    step: int,
    lr: LearningRate = 0.001,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """AdaSqrt; see :class:`onepass.AdaSqrt`."""
    return _apply(
        AdaSqrt,
        params,
        grads,
        {"square_sums": square_sums},
        step,
        {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def rmsprop(
    params: Arrays,
    grads: Arrays,
    square_avgs: Arrays,
    *,
    step: int,
    grad_avgs: Arrays | None = None,
    velocities: Arrays | None = None,
    lr: LearningRate = 0.01,
    rho: float = 0.9,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    momentum: float = 0.0,
    lr_in_velocity: bool = True,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """RMSprop; see :class:`onepass.RMSprop`.

    With `grad_avgs` it is the centered form; `velocities` are needed with momentum > 0, and only then.
    """
    momentum = hp.checked({"momentum": momentum})["momentum"]
    states = {"square_avgs": square_avgs}
    if grad_avgs is not None:
        states["grad_avgs"] = grad_avgs
    if velocities is not None:
        states["velocities"] = velocities
    if (velocities is None) != (momentum == 0.0):
        raise ValueError("velocities: needed with momentum > 0, and only then")
    return _apply(
        RMSprop,
        params,
        grads,
        states,
        step,
        {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "eps_root": eps_root,
            "momentum": momentum,
            "centered": grad_avgs is not None,
            "lr_in_velocity": lr_in_velocity,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def adam(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    *,
    step: int,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 0.0,
    bias_correction: bool = True,
    eps_hat: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Adam; see :class:`onepass.Adam`, and :func:`amsgrad` for its `amsgrad`."""
    return _apply(
        Adam,
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        step,
        {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "bias_correction": bias_correction,
            "eps_hat": eps_hat,
            "amsgrad": False,
            "max_of_corrected": False,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def adamw(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    *,
    step: int,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 0.0,
    bias_correction: bool = True,
    eps_hat: bool = False,
    weight_decay: float = 0.01,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Adam with decoupled weight decay; see :class:`onepass.AdamW`."""
    return _apply(
        Adam,
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        step,
        {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "bias_correction": bias_correction,
            "eps_hat": eps_hat,
            "amsgrad": False,
            "max_of_corrected": False,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def amsgrad(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    max_exp_avg_sqs: Arrays,
    *,
    step: int,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 0.0,
    bias_correction: bool = False,
    eps_hat: bool = False,
    max_of_corrected: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """AMSGrad; see :class:`onepass.AMSGrad`, whose default is the paper's: no bias correction.

    With ``bias_correction=True`` it is ``Adam(amsgrad=True)``, torch's form; `eps_hat` and `max_of_corrected` as there.
    """
    return _apply(
        Adam,
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs},
        step,
        {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "bias_correction": bias_correction,
            "eps_hat": eps_hat,
            "amsgrad": True,
            "max_of_corrected": max_of_corrected,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )


def nadam(
    params: Arrays,
    grads: Arrays,
    exp_avgs: Arrays,
    exp_avg_sqs: Arrays,
    *,
    step: int,
    lr: LearningRate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_root: float = 0.0,
    momentum_decay: float = 0.004,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    l1: float = 0.0,
    maximize: bool = False,
    **options: Unpack[FunctionOptions],
) -> StepReport | None:
    """Nadam; see :class:`onepass.Nadam`."""
    return _apply(
        Nadam,
        params,
        grads,
        {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        step,
        {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "momentum_decay": momentum_decay,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "maximize": maximize,
        },
        options,
    )

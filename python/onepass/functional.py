"""Update rules and batch normalization as functions over arrays that the caller owns, for backends that keep the state.

:func:`batch_norm` and :func:`batch_norm_backward` are described with themselves. Each of the other functions is an
update rule: it updates `params` and the states in place, in one pass over memory, by the kernels and with the checks of
the optimizer class of the same name; the class's docstring has the formula and the ranges of the hyper-parameters.

Parameters that all update rules share:

params, grads : sequence of arrays, or one array
    As in :class:`onepass.Optimizer`. ``None`` in the place of a gradient leaves that parameter and its states alone.
states (``exp_avgs``, ``velocities``, ...) : sequence of arrays, or one array
    One for each parameter, of its shape and dtype, writable and dense. All zeros before the first step (for AdaGrad:
    whatever the accumulator shall begin with).
step : int
    The 1-based count of this step, the same for all arrays of the call. The caller counts.
lr : float or callable
    Learning rate >= 0, or a schedule, called with `step`.

All raise `TypeError` or `ValueError` that names the argument; nothing has been written then.

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

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from onepass import _cpu
from onepass.batchnorm import BatchNormGradients, batch_norm, batch_norm_backward
from onepass.optim import NAG, SGD, AdaGrad, Adam, AdaSqrt, Momentum, Nadam, Optimizer, RMSprop
from onepass.optim import hyper as hp
from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Array
from onepass.optim.structure import is_sequence

__all__ = [
    "BatchNormGradients",
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


def _apply(
    cls: type[Optimizer],
    params: Arrays,
    grads: Arrays,
    states: Mapping[str, Arrays],
    step: int,
    hyper: Mapping[str, Any],
) -> None:
    """Update by the rule of `cls`. `states`: the states by argument name, in the order of the rule's slots."""
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
        raise TypeError(f"step: expected an integer from 1 to 2**62, got {step!r}")
    if not 1 <= step <= 2**62:
        raise ValueError(f"step: expected an integer from 1 to 2**62, got {step!r}")
    single = not is_sequence(params)
    names = ("params", "grads", *states)
    lists: list[Sequence[Any]] = []
    for name, value in zip(names, (params, grads, *states.values()), strict=True):
        if is_sequence(value) == single:
            need = "one array, as params is" if single else "a list or tuple of arrays, as params is"
            raise TypeError(f"{name}: expected {need}, got {type(value).__name__}")
        lists.append([value] if single else cast("Sequence[Any]", value))
    values = hp.checked(hyper)
    rule = cls.rule(values)
    if any(not 1e-37 < values.get(name, 1.0) < 1e38 for name in ("eps", "eps_root")):  # else no dtype needs a look
        names_of = ["params"] if single else [f"params[{index}]" for index in range(len(lists[0]))]
        dtypes = {_cpu.as_ndarray(param, name).dtype for param, name in zip(lists[0], names_of, strict=True)}
        hp.require_representable(values, dtypes)
    coefficients, scale, l1, l2, decay = cls.surround(values, int(step))
    _cpu.update(rule, lists[0], lists[1], lists[2:], coefficients, scale, l1, l2, decay, names, single)


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
) -> None:
    """Stochastic gradient descent; see :class:`onepass.SGD`."""
    _apply(
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
) -> None:
    """Gradient descent with momentum; see :class:`onepass.Momentum`."""
    _apply(
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
) -> None:
    """Nesterov's accelerated gradient; `params` are the look-ahead points. See :class:`onepass.NAG`."""
    _apply(
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
) -> None:
    """AdaGrad; see :class:`onepass.AdaGrad`."""
    _apply(
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
) -> None:
    """AdaSqrt; see :class:`onepass.AdaSqrt`."""
    _apply(
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
) -> None:
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
    _apply(
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
) -> None:
    """Adam; see :class:`onepass.Adam`, and :func:`amsgrad` for its `amsgrad`."""
    _apply(
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
) -> None:
    """Adam with decoupled weight decay; see :class:`onepass.AdamW`."""
    _apply(
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
) -> None:
    """AMSGrad; see :class:`onepass.AMSGrad`, whose default is the paper's: no bias correction.

    With ``bias_correction=True`` it is ``Adam(amsgrad=True)``, torch's form; `eps_hat` and `max_of_corrected` as there.
    """
    _apply(
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
) -> None:
    """Nadam; see :class:`onepass.Nadam`."""
    _apply(
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
    )

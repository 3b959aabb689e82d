"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class Momentum(Optimizer):
    r"""Gradient descent with momentum (the heavy ball).

    .. math::
        v_t &= \mu v_{t-1} + \mathrm{lr} (1 - d_t) g_t \\
        p_t &= p_{t-1} - v_t

    with :math:`d_t` the dampening, 0 at :math:`t = 1`. With ``lr_in_velocity=False`` the learning rate stands outside:

    .. math::
        v_t &= \mu v_{t-1} + (1 - d_t) g_t \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot v_t

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.01
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    momentum : float, default 0.9
        :math:`\mu`, in [0, 1).
    dampening : float, default 0
        In [0, 1]. Not applied to a parameter's first gradient.
    lr_in_velocity : bool, default True
        Whether the velocity accumulates steps (True: the lectures, Keras) or gradients (False: torch).
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    Libraries differ in where the learning rate stands. At a constant rate both forms give the same path; as soon as the
    rate changes they do not: here the velocity remembers the rates under which it was gathered. ``torch.optim.SGD`` is
    ``lr_in_velocity=False``, ``keras.optimizers.SGD`` the default.

    Notes
    -----
    State: ``velocity``, which has the sign of the descent (the parameter moves by minus it). 20 bytes a step and
    float32.

    References
    ----------
    .. [1] B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational
       Mathematics and Mathematical Physics 4 (1964), 1-17, eq. 9.
    .. [2] I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
       eq. 1, 2.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0], dtype=np.float32)
    >>> opt = onepass.Momentum(p, lr=0.25, momentum=0.5)
    >>> for _ in range(2):
    ...     opt.step(np.ones(1, np.float32))
    >>> p, opt.state[0]["velocity"]
    (array([0.375], dtype=float32), array([0.375], dtype=float32))
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.0,
        lr_in_velocity: bool = True,
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        l1: float = 0.0,
        maximize: bool = False,
        grads: Grads = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            grads,
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

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "momentum"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        weight = 1.0 if t == 1 else 1.0 - hyper["dampening"]
        inside = hyper["lr_in_velocity"]
        return {
            "mu": hyper["momentum"],
            "weight": lr * weight if inside else weight,
            "step_v": 1.0 if inside else lr,
            "step_g": 0.0,
        }

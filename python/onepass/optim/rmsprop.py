"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class RMSprop(Optimizer):
    r"""RMSprop: steps divided by the root of the averaged squares; centered and with momentum on demand.

    .. math::
        r_t &= \rho r_{t-1} + (1 - \rho) g_t^2 \\
        a_t &= \rho a_{t-1} + (1 - \rho) g_t \quad\text{(centered; else } a_t = 0\text{)} \\
        q_t &= \sqrt{\max(0, r_t - a_t^2) + \mathrm{eps\_root}} + \mathrm{eps} \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot g_t / q_t

    With momentum the divided steps are accumulated, and the last line becomes

    .. math::
        b_t &= \mu b_{t-1} + \mathrm{lr} \cdot g_t / q_t \\
        p_t &= p_{t-1} - b_t

    or, with ``lr_in_velocity=False``, :math:`b_t = \mu b_{t-1} + g_t / q_t` and
    :math:`p_t = p_{t-1} - \mathrm{lr}\, b_t`.

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.01
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    rho : float, default 0.9
        Decay of the averages, in [0, 1).
    eps, eps_root : float, default 1e-8 and 0
        Added outside and inside the root, >= 0, not both 0.
    momentum : float, default 0
        :math:`\mu`, in [0, 1). Zero and non-zero need different states: fixed at construction.
    centered : bool, default False
        Subtract the squared mean of the gradients. Fixed at construction.
    lr_in_velocity : bool, default True
        With momentum: whether the velocity accumulates steps (True: Keras, the lectures) or directions (False: torch).
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    Keras and Optax have the epsilon inside the root (``eps=0, eps_root=1e-7`` and ``1e-8``). torch's decay is 0.99, and
    its centered form turns parameters into NaN once rounding makes :math:`r - a^2` negative (constant gradients do it,
    in float32 after 132 steps for a decay of 0.9); this one clamps it at 0.

    Notes
    -----
    States: ``square_avg``, then ``grad_avg`` (centered), then ``velocity`` (momentum). 20, 28 or 36 bytes a step and
    float32.

    References
    ----------
    .. [1] G. Hinton, "Neural networks for machine learning", lecture 6e (2012).
    .. [2] A. Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850 (2013), eq. 38-45:
       centered, with momentum.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0])
    >>> opt = onepass.RMSprop(p, lr=0.5, rho=0.75, momentum=0.9, centered=True)
    >>> opt.step(np.array([3.0]))
    >>> sorted(opt.state[0])
    ['grad_avg', 'square_avg', 'velocity']
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.01,
        rho: float = 0.9,
        eps: float = 1e-8,
        eps_root: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
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
                "rho": rho,
                "eps": eps,
                "eps_root": eps_root,
                "momentum": momentum,
                "centered": centered,
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
        centered = "_centered" if hyper["centered"] else ""
        momentum = "_momentum" if hyper["momentum"] > 0.0 else ""
        return f"second_moment{centered}{momentum}"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        rho = hyper["rho"]
        coefficients = {
            "rho": rho,
            "weight": 1.0 - rho,
            "step": lr,
            "eps_root": hyper["eps_root"],
            "eps": hyper["eps"],
        }
        if hyper["momentum"] > 0.0:
            inside = hyper["lr_in_velocity"]
            coefficients["mu"] = hyper["momentum"]
            coefficients["step_b"] = lr if inside else 1.0
            coefficients["step"] = 1.0 if inside else lr
        return coefficients

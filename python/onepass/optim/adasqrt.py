"""AdaSqrt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class AdaSqrt(Optimizer):
    r"""AdaSqrt: AdaGrad without the root, with a learning rate that grows with the root of the step count.

    .. math::
        s_t &= s_{t-1} + g_t^2 \\
        p_t &= p_{t-1} - \mathrm{lr} \sqrt{t} \cdot \frac{g_t}{s_t + \mathrm{eps}}

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.001
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    eps : float, default 1e-8
        Added to the sum of squares, > 0.
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    The step is proportional to 1 / g: a parameter whose gradients are all tiny takes huge steps. Scale the learning
    rate to the gradients.

    Notes
    -----
    State: ``square_sum``. 20 bytes a step and float32.

    References
    ----------
    .. [1] Y. Hu, L. Lin and S. Tang, "Second-order information in first-order optimization methods", arXiv:1912.09926
       (2019), algorithm 1.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0])
    >>> opt = onepass.AdaSqrt(p, lr=0.5)
    >>> opt.step(np.array([2.0]))
    >>> p.round(6)
    array([0.75])
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.001,
        eps: float = 1e-8,
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
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "l1": l1,
                "maximize": maximize,
            },
            options,
        )

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "adasqrt"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        return {"step": lr * math.sqrt(t), "eps": hyper["eps"]}

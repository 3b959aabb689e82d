"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class SGD(Optimizer):
    r"""Stochastic gradient descent.

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \cdot g_t

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.01
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    See Also
    --------
    Momentum, NAG : with a velocity.

    Notes
    -----
    State: none. One step reads the gradient and reads and writes the parameter: 12 bytes for a float32.

    References
    ----------
    .. [1] H. Robbins and S. Monro, "A stochastic approximation method", Annals of Mathematical Statistics 22 (1951),
       400-407, eq. 6.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0, -2.0], dtype=np.float32)
    >>> opt = onepass.SGD(p, lr=0.5)
    >>> opt.step(2 * p)
    >>> p
    array([0., 0.], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.01,
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
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "l1": l1,
                "maximize": maximize,
            },
            options,
        )

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "sgd"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        return {"step": lr}

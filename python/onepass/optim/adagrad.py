"""AdaGrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class AdaGrad(Optimizer):
    r"""AdaGrad: steps divided by the root of the sum of all squared gradients.

    .. math::
        r_t &= r_{t-1} + g_t^2 \\
        p_t &= p_{t-1} - \frac{\mathrm{lr}}{1 + (t - 1)\,\mathrm{lr\_decay}} \cdot
               \frac{g_t}{\sqrt{r_t + \mathrm{eps\_root}} + \mathrm{eps}}

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.01
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    eps, eps_root : float, default 1e-10 and 0
        Added outside and inside the root, >= 0, not both 0.
    initial_accumulator : float, default 0
        The value of :math:`r_0`, >= 0. Read at construction only.
    lr_decay : float, default 0
        >= 0; divides the learning rate as the formula says.
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    Keras and Optax start the accumulator at 0.1 and have the epsilon inside the root: pass
    ``initial_accumulator=0.1, eps=0, eps_root=1e-7`` for their numbers. torch's are the defaults.

    Notes
    -----
    State: ``square_avg`` (here a sum). 20 bytes a step and float32.

    References
    ----------
    .. [1] J. Duchi, E. Hazan and Y. Singer, "Adaptive subgradient methods for online learning and stochastic
       optimization", JMLR 12 (2011), 2121-2159, eq. 1 with the diagonal matrix.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0, 1.0])
    >>> opt = onepass.AdaGrad(p, lr=0.5)
    >>> opt.step(np.array([0.01, 100.0]))  # the first step has the size of lr, whatever the gradient's
    >>> p.round(6)
    array([0.5, 0.5])
    """

    _construction_only = frozenset({"initial_accumulator"})

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.01,
        eps: float = 1e-10,
        eps_root: float = 0.0,
        initial_accumulator: float = 0.0,
        lr_decay: float = 0.0,
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
                "eps_root": eps_root,
                "initial_accumulator": initial_accumulator,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "l1": l1,
                "maximize": maximize,
            },
            options,
        )

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "second_moment"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        return {
            "rho": 1.0,
            "weight": 1.0,
            "step": lr / (1.0 + (t - 1) * hyper["lr_decay"]),
            "eps_root": hyper["eps_root"],
            "eps": hyper["eps"],
        }

    @classmethod
    def _initial_state(cls, hyper: Mapping[str, Any]) -> float:
        return float(hyper["initial_accumulator"])

"""Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class Adam(Optimizer):
    r"""Adam: the averaged gradient divided by the root of the averaged squares, both corrected for their start at 0.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\mathrm{lr}}{1 - \beta_1^t} \cdot
               \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t) + \mathrm{eps\_root}} + \mathrm{eps}}

    With ``amsgrad=True`` the largest second moment so far, :math:`w_t = \max(w_{t-1}, v_t)`, stands in the place of
    :math:`v_t` in the last line.

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 1e-3
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    betas : (float, float), default (0.9, 0.999)
        Decays of the averages, each in [0, 1).
    eps, eps_root : float, default 1e-8 and 0
        Added outside and inside the root, >= 0, not both 0.
    bias_correction : bool, default True
        False leaves out both divisions by :math:`1 - \beta^t` (the form before the correction).
    eps_hat : bool, default False
        Divide `eps` by :math:`\sqrt{1 - \beta_2^t}`: the paper's epsilon-hat, and Keras' form.
    amsgrad : bool, default False
        Divide by the largest second moment. Fixed at construction.
    max_of_corrected : bool, default False
        With `amsgrad`: take the maximum after the correction (Optax) instead of before it (torch).
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    Libraries of the same name compute different things: the place of epsilon differs (torch, Optax: here the defaults;
    Keras: ``eps_hat=True, eps=1e-7``), and `weight_decay` is coupled here and in torch's Adam but decoupled in Keras.

    Notes
    -----
    States: ``exp_avg``, ``exp_avg_sq`` and, with `amsgrad`, ``max_exp_avg_sq``. 28 or 36 bytes a step and float32.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1; epsilon-hat:
       end of section 2.
    .. [2] S. J. Reddi, S. Kale and S. Kumar, "On the convergence of Adam and beyond", ICLR 2018, algorithm 2.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0, 1.0])
    >>> opt = onepass.Adam(p, lr=0.5)
    >>> opt.step(np.array([0.01, -100.0]))  # the first step has the size of lr, whatever the gradient's
    >>> p.round(6)
    array([0.5, 1.5])
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        *,
        bias_correction: bool = True,
        eps_hat: bool = False,
        amsgrad: bool = False,
        max_of_corrected: bool = False,
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
                "betas": betas,
                "eps": eps,
                "eps_root": eps_root,
                "bias_correction": bias_correction,
                "eps_hat": eps_hat,
                "amsgrad": amsgrad,
                "max_of_corrected": max_of_corrected,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "l1": l1,
                "maximize": maximize,
            },
            options,
        )

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "amsgrad" if hyper["amsgrad"] else "adam"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        beta1, beta2 = hyper["betas"]
        corrected = hyper["bias_correction"]
        b1 = 1.0 - beta1**t if corrected else 1.0
        b2 = 1.0 - beta2**t if corrected else 1.0
        coefficients = {
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "step_m": lr / b1,
            "step_g": 0.0,
            "inv_bias2": 1.0 / b2,
            "eps_root": hyper["eps_root"],
            "eps": hyper["eps"] / math.sqrt(b2) if hyper["eps_hat"] else hyper["eps"],
        }
        if hyper["amsgrad"]:
            after = hyper["max_of_corrected"]
            coefficients["pre"] = 1.0 / b2 if after else 1.0
            coefficients["inv_bias2"] = 1.0 if after else 1.0 / b2
        return coefficients

"""Nadam."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack


class Nadam(Optimizer):
    r"""Nadam: Adam with Nesterov's look-ahead in the first moment, under a warming momentum.

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac12 \cdot 0.96^{t \cdot \mathrm{momentum\_decay}}),
        \qquad M_t = \mu_1 \cdots \mu_t \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\mathrm{lr}\,\mu_{t+1} / (1 - M_t \mu_{t+1}) \cdot m_t
               + \mathrm{lr}\,(1 - \mu_t) / (1 - M_t) \cdot g_t}
               {\sqrt{v_t / (1 - \beta_2^t) + \mathrm{eps\_root}} + \mathrm{eps}}

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 2e-3
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    betas : (float, float), default (0.9, 0.999)
        Decays of the averages, each in [0, 1).
    eps, eps_root : float, default 1e-8 and 0
        Added outside and inside the root, >= 0, not both 0.
    momentum_decay : float, default 0.004
        >= 0. How fast :math:`\mu_t` rises from about :math:`\beta_1 / 2` to :math:`\beta_1`; ``math.inf``: at once.
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    torch's numbers are the defaults. Keras is ``momentum_decay=1.0, eps=1e-7, lr=1e-3``; Optax has no schedule,
    ``momentum_decay=math.inf``.

    Notes
    -----
    States: ``exp_avg``, ``exp_avg_sq``; the product :math:`M_t` is computed from `t` and the hyper-parameters of the
    step. 28 bytes a step and float32.

    References
    ----------
    .. [1] T. Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop, algorithm 2; the schedule:
       section 3.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0, 1.0])
    >>> opt = onepass.Nadam(p, lr=0.5)
    >>> opt.step(np.array([0.01, -100.0]))
    >>> p.round(3)
    array([0.472, 1.528])
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        momentum_decay: float = 0.004,
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

    @classmethod
    def rule(cls, hyper: Mapping[str, Any]) -> str:
        return "adam"

    @classmethod
    def recipe(cls, hyper: Mapping[str, Any], lr: float, t: int) -> Coefficients:
        beta1, beta2 = hyper["betas"]
        decay = hyper["momentum_decay"]
        mu, next_mu = _mu(beta1, decay, t), _mu(beta1, decay, t + 1)
        product = _mu_product(beta1, decay, t)
        return {
            "beta1": beta1,
            "one_minus_beta1": 1.0 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1.0 - beta2,
            "step_m": lr * next_mu / (1.0 - product * next_mu),
            "step_g": lr * (1.0 - mu) / (1.0 - product),
            "inv_bias2": 1.0 / (1.0 - beta2**t),
            "eps_root": hyper["eps_root"],
            "eps": hyper["eps"],
        }


def _mu(beta1: float, decay: float, t: int) -> float:
    return float(beta1 * (1.0 - 0.5 * 0.96 ** (t * decay)))


@functools.lru_cache(maxsize=64)
def _mu_products(beta1: float, decay: float) -> tuple[float, ...]:
    """mu_1, mu_1 * mu_2, ..., in this order, until the product no longer counts beside 1 or mu has become beta1.

    That is soon: after some 400 factors for 0.9, and at most a few thousand for any values.
    """
    products, product, t = [], 1.0, 0
    while product >= 2.0**-60 and (t == 0 or _mu(beta1, decay, t) != beta1):
        t += 1
        product *= _mu(beta1, decay, t)
        products.append(product)
    return tuple(products)


def _mu_product(beta1: float, decay: float, t: int) -> float:
    """mu_1 * ... * mu_t."""
    products = _mu_products(beta1, decay)
    if t <= len(products):
        return products[t - 1]
    return products[-1] * beta1 ** (t - len(products))  # or nothing beside 1, whatever the factor

"""Nesterov's accelerated gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onepass import _cpu, devices
from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Coefficients, Grads, Optimizer, Params
from onepass.optim.options import Options, Unpack, compute_dtype


class NAG(Optimizer):
    r"""Nesterov's accelerated gradient.

    .. math::
        v_t &= \mu v_{t-1} + \mathrm{lr} \cdot g_t \\
        p_t &= p_{t-1} - (\mu v_t + \mathrm{lr} \cdot g_t)

    The parameter is the look-ahead point, where the gradient belongs; :meth:`weights` gives the plain weights. With
    ``lr_in_velocity=False`` the learning rate stands outside:

    .. math::
        v_t &= \mu v_{t-1} + g_t \\
        p_t &= p_{t-1} - (\mathrm{lr} \mu v_t + \mathrm{lr} \cdot g_t)

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr : float or callable, default 0.01
        Learning rate, finite and >= 0, or a schedule: a callable of the 1-based step count `t`.
    momentum : float, default 0.9
        :math:`\mu`, in [0, 1).
    lr_in_velocity : bool, default True
        Whether the velocity accumulates steps (True: the lectures, Keras) or gradients (False: torch).
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    Lectures print the plain weights :math:`W`, and evaluate the gradient at :math:`W - \mu v`; torch, Keras and this
    class store the look-ahead point. To compare with a printed table use :meth:`weights`.

    Notes
    -----
    State: ``velocity``. 20 bytes a step and float32.

    References
    ----------
    .. [1] Y. Nesterov, "A method of solving a convex programming problem with convergence rate O(1/k^2)", Soviet
       Mathematics Doklady 27 (1983), 372-376.
    .. [2] I. Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
       eq. 3, 4.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0], dtype=np.float32)
    >>> opt = onepass.NAG(p, lr=0.25, momentum=0.5)
    >>> opt.step(np.ones(1, np.float32))
    >>> p, opt.weights()
    (array([0.625], dtype=float32), array([0.75], dtype=float32))
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 0.01,
        momentum: float = 0.9,
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
        mu = hyper["momentum"]
        inside = hyper["lr_in_velocity"]
        return {
            "mu": mu,
            "weight": lr if inside else 1.0,
            "step_v": mu if inside else lr * mu,
            "step_g": lr,
        }

    def weights(self) -> Any:
        r"""Return the plain weights :math:`W = p + \mu v` as new arrays, in the structure of the parameters.

        They are in the type in which steps are computed: float32, or float64 for parameters of that dtype.

        With ``lr_in_velocity=False`` they are :math:`p + \mathrm{lr} \mu v`. Momentum and learning rate are those that
        are set now; a schedule is asked for the rate of the parameter's last step.
        """
        flat = []
        names = self._structure.names("params", "['params']")
        groups = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        with self._updater:
            for index, (param, t) in enumerate(zip(self._flat, self.step_counts, strict=True)):
                # The coefficient with which the velocity enters the parameter.
                mu_v = self.surround(self._hyper[groups[index]], max(1, t))[0]["step_v"]
                array = _cpu.as_ndarray(param, names[index])
                compute = compute_dtype(array.dtype)
                value = self._master_of(index) if self._storage.split else array.astype(compute, copy=False)
                velocity = self.state[index]["velocity"].astype(compute, copy=False)
                weights = devices.to_host(value) + compute.type(mu_v) * devices.to_host(velocity)
                flat.append(devices.like(array, np.asarray(weights)))
        return self._structure.rebuild(flat)

"""AMSGrad."""

from __future__ import annotations

from onepass.optim.adam import Adam
from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Grads, Params
from onepass.optim.options import Options, Unpack


class AMSGrad(Adam):
    r"""AMSGrad, the paper's form: Adam by the root of the largest second moment so far, without bias correction.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        w_t &= \max(w_{t-1}, v_t) \\
        p_t &= p_{t-1} - \mathrm{lr} \cdot \frac{m_t}{\sqrt{w_t + \mathrm{eps\_root}} + \mathrm{eps}}

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
    bias_correction : bool, default False
        True divides :math:`m_t` by :math:`1 - \beta_1^t` and :math:`w_t` by :math:`1 - \beta_2^t`.
    weight_decay, decoupled_weight_decay, l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    torch, Keras and Optax correct the bias: use ``Adam(amsgrad=True)`` for their numbers (with
    ``max_of_corrected=True`` for Optax's).

    Notes
    -----
    States: ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``. 36 bytes a step and float32. A NaN in the second moment
    stays in the maximum.

    References
    ----------
    .. [1] S. J. Reddi, S. Kale and S. Kumar, "On the convergence of Adam and beyond", ICLR 2018, algorithm 2.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0])
    >>> opt = onepass.AMSGrad(p, lr=0.5, betas=(0.5, 0.75))
    >>> opt.step(np.array([1.0]))
    >>> p.round(6)
    array([0.5])
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        bias_correction: bool = False,
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
            lr,
            betas,
            eps,
            eps_root,
            bias_correction=bias_correction,
            amsgrad=True,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            l1=l1,
            maximize=maximize,
            grads=grads,
            **options,
        )

"""Adam with decoupled weight decay."""

from __future__ import annotations

from onepass.optim.adam import Adam
from onepass.optim.hyper import LearningRate
from onepass.optim.optimizer import Grads, Params
from onepass.optim.options import Options, Unpack


class AdamW(Adam):
    r"""Adam with decoupled weight decay: the decay acts on the parameter and does not pass through the moments.

    .. math::
        p_t = (1 - \mathrm{lr} \cdot \mathrm{weight\_decay})\, p_{t-1} - u_t

    with :math:`u_t` the step of :class:`Adam`.

    Parameters
    ----------
    params : array, sequence, dict or list of groups
        What is updated in place; see :class:`Optimizer`.
    lr, betas, eps, eps_root, bias_correction, eps_hat, amsgrad, max_of_corrected
        As in :class:`Adam`.
    weight_decay : float, default 0.01
        Finite and >= 0; multiplied by the learning rate of the step.
    l1, maximize, grads, **options
        As for every optimizer, see :class:`Optimizer`.

    Warnings
    --------
    The paper multiplies the decay by the schedule's factor alone; torch, Keras, Optax and this class by the whole
    learning rate. Optax's default for `weight_decay` is 1e-4.

    Notes
    -----
    States: as in :class:`Adam`. 28 bytes a step and float32: the decay costs no memory traffic.

    References
    ----------
    .. [1] I. Loshchilov and F. Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> p = np.array([1.0])
    >>> opt = onepass.AdamW(p, lr=0.5, weight_decay=0.5)
    >>> opt.step(np.array([0.0]))
    >>> p
    array([0.75])
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        eps_hat: bool = False,
        amsgrad: bool = False,
        max_of_corrected: bool = False,
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
            eps_hat=eps_hat,
            amsgrad=amsgrad,
            max_of_corrected=max_of_corrected,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            l1=l1,
            maximize=maximize,
            grads=grads,
            **options,
        )

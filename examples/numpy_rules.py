"""The update rules as one would write them in NumPy: what the demo times onepass against.

Each function changes `param` in place for its `t`-th gradient. The order of the operations is the documented one of
onepass, and the scalars are computed in Python's float64 and rounded once, when they meet an array: so the results are
the same bits (but for subnormal numbers, which onepass takes for 0).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
State: TypeAlias = defaultdict[str, Any]


def new_state() -> State:
    """Return the state of one parameter before its first step: whatever is asked for is 0."""
    return defaultdict(float)


def sgd(param: Array, grad: Array, state: State, t: int, *, lr: float) -> None:
    """Gradient descent."""
    param -= lr * grad


def momentum(param: Array, grad: Array, state: State, t: int, *, lr: float, mu: float = 0.9) -> None:
    """Gradient descent with momentum (Polyak, 1964)."""
    state["velocity"] = mu * state["velocity"] + lr * grad
    param -= state["velocity"]


def nag(param: Array, grad: Array, state: State, t: int, *, lr: float, mu: float = 0.9) -> None:
    """Nesterov's accelerated gradient (1983); `param` is the look-ahead point."""
    state["velocity"] = mu * state["velocity"] + lr * grad
    param -= mu * state["velocity"] + lr * grad


def adagrad(param: Array, grad: Array, state: State, t: int, *, lr: float, eps: float = 1e-10) -> None:
    """AdaGrad (Duchi, Hazan and Singer, 2011)."""
    state["square_avg"] = state["square_avg"] + grad**2
    param -= lr * grad / (np.sqrt(state["square_avg"]) + eps)


def adasqrt(param: Array, grad: Array, state: State, t: int, *, lr: float, eps: float = 1e-8) -> None:
    """AdaSqrt (Hu, Lin and Tang, 2019)."""
    state["square_sum"] = state["square_sum"] + grad**2
    param -= lr * math.sqrt(t) * grad / (state["square_sum"] + eps)


def rmsprop(param: Array, grad: Array, state: State, t: int, *, lr: float, rho: float = 0.9, eps: float = 1e-8) -> None:
    """RMSprop (Hinton, 2012)."""
    state["square_avg"] = rho * state["square_avg"] + (1 - rho) * grad**2
    param -= lr * grad / (np.sqrt(state["square_avg"]) + eps)


def adam(
    param: Array,
    grad: Array,
    state: State,
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """Adam (Kingma and Ba, 2015)."""
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2
    param -= lr / (1 - beta1**t) * m / (np.sqrt(v * (1 / (1 - beta2**t))) + eps)


def adamw(param: Array, grad: Array, state: State, t: int, *, lr: float, weight_decay: float = 0.01) -> None:
    """AdamW (Loshchilov and Hutter, 2019): the decay beside the gradient, not in it."""
    param *= 1 - lr * weight_decay
    adam(param, grad, state, t, lr=lr)


def amsgrad(
    param: Array,
    grad: Array,
    state: State,
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """AMSGrad (Reddi, Kale and Kumar, 2018): the paper's form, without a correction of the start at 0."""
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2
    w = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    param -= lr * m / (np.sqrt(w) + eps)


def nadam(
    param: Array,
    grad: Array,
    state: State,
    t: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    momentum_decay: float = 0.004,
) -> None:
    """Nadam (Dozat, 2016), with the schedule of its section 3."""
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    next_mu = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * grad
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2
    look_ahead = lr * next_mu / (1 - product * next_mu) * m + lr * (1 - mu) / (1 - product) * grad
    param -= look_ahead / (np.sqrt(v * (1 / (1 - beta2**t))) + eps)


#: Under the names of onepass' classes.
RULES: dict[str, Callable[..., None]] = {
    "SGD": sgd,
    "Momentum": momentum,
    "NAG": nag,
    "AdaGrad": adagrad,
    "AdaSqrt": adasqrt,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adamw,
    "AMSGrad": amsgrad,
    "Nadam": nadam,
}

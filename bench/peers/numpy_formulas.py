"""The optimizers as one writes them in NumPy, from their papers; each operation is a pass over memory.

Each formula takes a gradient, the states of its parameter by name (missing before the first step: 0) and the number of
the step, and returns what is subtracted from the parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from arrays import Array, Data

LR = 1e-4
WEIGHT_DECAY = 0.01

State: TypeAlias = dict[str, Any]
Formula: TypeAlias = Callable[[Array, State, int], Any]


def sgd(g: Array, s: State, t: int) -> Any:
    """Robbins and Monro, 1951."""
    return LR * g


def momentum(g: Array, s: State, t: int) -> Any:
    """Polyak, 1964, with the rate outside of the velocity."""
    s["v"] = 0.9 * s.get("v", 0.0) + g
    return LR * s["v"]


def nag(g: Array, s: State, t: int) -> Any:
    """Nesterov, 1983, as Sutskever and others, 2013, write it."""
    s["v"] = 0.9 * s.get("v", 0.0) + g
    return LR * (g + 0.9 * s["v"])


def adagrad(g: Array, s: State, t: int) -> Any:
    """Duchi, Hazan and Singer, 2011."""
    s["h"] = s.get("h", 0.0) + g**2
    return LR * g / (np.sqrt(s["h"]) + 1e-10)


def rmsprop(g: Array, s: State, t: int, centered: bool = False, momentum: float = 0.0) -> Any:
    """Tieleman and Hinton, 2012; centered: Graves, 2013, equations 38 to 41."""
    s["v"] = 0.99 * s.get("v", 0.0) + 0.01 * g**2
    mean_square = s["v"]
    if centered:
        s["m"] = 0.99 * s.get("m", 0.0) + 0.01 * g
        mean_square = mean_square - s["m"] ** 2
    step = g / (np.sqrt(mean_square) + 1e-8)
    if momentum:
        step = s["b"] = momentum * s.get("b", 0.0) + step
    return LR * step


def _moments(g: Array, s: State) -> tuple[Array, Array]:
    s["m"] = 0.9 * s.get("m", 0.0) + (1 - 0.9) * g
    s["v"] = 0.999 * s.get("v", 0.0) + (1 - 0.999) * g**2
    return s["m"], s["v"]


def adam(g: Array, s: State, t: int) -> Any:
    """Kingma and Ba, 2015, algorithm 1."""
    m, v = _moments(g, s)
    m_hat = m / (1 - 0.9**t)
    v_hat = v / (1 - 0.999**t)
    return LR * m_hat / (np.sqrt(v_hat) + 1e-8)


def amsgrad(g: Array, s: State, t: int) -> Any:
    """Reddi, Kale and Kumar, 2018, with the corrections of Adam."""
    m, v = _moments(g, s)
    s["max"] = np.maximum(s.get("max", 0.0), v)
    return LR * (m / (1 - 0.9**t)) / (np.sqrt(s["max"] / (1 - 0.999**t)) + 1e-8)


def nadam(g: Array, s: State, t: int) -> Any:
    """Dozat, 2016, with the schedule of his equation 3."""
    m, v = _moments(g, s)
    mu, next_mu = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))
    product = s["product"] = s.get("product", 1.0) * mu
    m_hat = next_mu * m / (1 - product * next_mu) + (1 - mu) * g / (1 - product)
    return LR * m_hat / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


class NumpyFormula:
    """Steps by a formula. `weight_decay`: decoupled, as Loshchilov and Hutter, 2019, have it."""

    def __init__(self, data: Data, formula: Formula, weight_decay: float = 0.0) -> None:
        self.data, self.formula, self.weight_decay = data, formula, weight_decay
        self.restart()

    def restart(self) -> None:
        """Forget all steps."""
        self.states: list[State] = [{} for _ in self.data.params]
        self.t = 0

    def step(self) -> None:
        """Update all parameters."""
        self.t += 1
        for param, grad, state in zip(self.data.params, self.data.grads, self.states, strict=True):
            update = self.formula(grad, state, self.t)
            if self.weight_decay:
                param *= 1 - LR * self.weight_decay
            param -= update


class NumpyAdamInPlace:
    """Adam with two arrays for all intermediate results: what NumPy can do at best. The slots are its moments.

    The operations are those of the documented expression, so that every bit is the same.
    """

    def __init__(self, data: Data, weight_decay: float = 0.0) -> None:
        self.data, self.weight_decay = data, weight_decay
        largest = max(param.size for param in data.params)
        self.scratch = np.zeros(largest, np.float32), np.zeros(largest, np.float32)
        self.restart()

    def restart(self) -> None:
        """Forget the number of steps; the slots are cleared with the parameters."""
        self.t = 0

    def step(self) -> None:
        """Update without a temporary array."""
        self.t += 1
        beta1, beta2 = 0.9, 0.999
        step_m, inv_bias2 = LR / (1.0 - beta1**self.t), 1.0 / (1.0 - beta2**self.t)
        coefficients = (beta1, 1.0 - beta1, beta2, 1.0 - beta2, step_m, inv_bias2, 1e-8)
        decay = np.float32(1.0 - LR * self.weight_decay)
        for param, grad, (m, v) in zip(self.data.params, self.data.grads, self.data.slots, strict=True):
            a, b = (scratch[: param.size].reshape(param.shape) for scratch in self.scratch)
            if self.weight_decay:
                param *= decay
            self._update(param, grad, m, v, a, b, *map(np.float32, coefficients))

    @staticmethod
    def _update(param: Array, g: Array, m: Array, v: Array, a: Array, b: Array, *coefficients: np.float32) -> None:
        beta1, one_minus_beta1, beta2, one_minus_beta2, step_m, inv_bias2, eps = coefficients
        m *= beta1
        m += np.multiply(one_minus_beta1, g, out=a)
        v *= beta2
        np.multiply(g, g, out=a)
        v += np.multiply(one_minus_beta2, a, out=a)
        np.multiply(v, inv_bias2, out=a)
        np.sqrt(a, out=a)
        a += eps
        np.multiply(step_m, m, out=b)
        b /= a
        param -= b

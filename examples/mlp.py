"""A multi-layer perceptron for classification: forward and backward in plain NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class MLP:
    """Fully connected layers with ReLU between them and a softmax at the end.

    Parameters
    ----------
    sizes : sequence of int
        Number of inputs, of the units of each hidden layer, of classes.
    rng : numpy.random.Generator
        Draws the initial weights: normal, with variance 2 / inputs (K. He et al., 2015, eq. 10). Biases start at 0.
    dtype : dtype, default float32
        Of the parameters, and so of the whole computation.

    Attributes
    ----------
    params : dict of str to array
        ``fc1.weight`` of shape (inputs, outputs), ``fc1.bias`` of shape (outputs,), ``fc2.weight``, ...
    """

    def __init__(self, sizes: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32) -> None:
        self.depth = len(sizes) - 1
        self.params: dict[str, Array] = {}
        for layer, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            weight = rng.standard_normal((inputs, outputs)) * np.sqrt(2.0 / inputs)
            self.params[f"fc{layer}.weight"] = weight.astype(dtype)
            self.params[f"fc{layer}.bias"] = np.zeros(outputs, dtype)

    def forward(self, x: Array) -> list[Array]:
        """Return the input of every layer, then the logits."""
        values = [x]
        for layer in range(1, self.depth + 1):
            x = x @ self.params[f"fc{layer}.weight"] + self.params[f"fc{layer}.bias"]
            if layer < self.depth:
                x = np.maximum(x, 0)
            values.append(x)
        return values

    def backward(self, x: Array, y: Array) -> dict[str, Array]:
        """Return the gradients of the mean cross-entropy, under the names of the parameters."""
        values = self.forward(x)
        # Softmax and cross-entropy together: their gradient by the logits is (probability - one hot) / samples.
        delta = np.exp(_log_softmax(values.pop()))
        delta[np.arange(len(y)), y] -= 1
        delta /= len(y)
        grads = {}
        for layer in range(self.depth, 0, -1):
            inputs = values.pop()
            grads[f"fc{layer}.weight"] = inputs.T @ delta
            grads[f"fc{layer}.bias"] = delta.sum(axis=0)
            if layer > 1:  # the ReLU passed on what is positive now
                delta = (delta @ self.params[f"fc{layer}.weight"].T) * (inputs > 0)
        return grads

    def evaluate(self, x: Array, y: Array) -> tuple[float, float]:
        """Return the mean cross-entropy and the fraction of samples that are classified correctly."""
        logits = self.forward(x)[-1]
        loss = -_log_softmax(logits)[np.arange(len(y)), y].mean()
        return float(loss), float((logits.argmax(axis=1) == y).mean())


def _log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(axis=1, keepdims=True)  # the exponential of a large logit would overflow
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))

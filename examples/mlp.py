"""A multi-layer perceptron for classification: plain NumPy, or CuPy; batch normalization by onepass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import onepass

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
    xp : module, default NumPy
        Whose arrays the parameters are: with CuPy all work is done on its current device.
    batch_norm : bool, default False
        Whether to normalize what goes into each ReLU. The bias before it would have no effect then, and is left out.

    Attributes
    ----------
    params : dict of str to array
        ``fc1.weight`` of shape (inputs, outputs), ``fc1.bias`` of shape (outputs,), ``fc2.weight``, ... With
        `batch_norm` each hidden layer has ``bn1.weight`` and ``bn1.bias`` of shape (outputs,) in the place of
        ``fc1.bias``.
    norms : dict of int to onepass.BatchNorm
        By the number of the hidden layer; empty without `batch_norm`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
        *,
        xp: Any = np,
        batch_norm: bool = False,
    ) -> None:
        self.xp = xp
        self.depth = len(sizes) - 1
        self.params: dict[str, Array] = {}
        self.norms: dict[int, onepass.BatchNorm] = {}
        for layer, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            weight = rng.standard_normal((inputs, outputs)) * np.sqrt(2.0 / inputs)
            self.params[f"fc{layer}.weight"] = xp.asarray(weight.astype(dtype))
            if batch_norm and layer < self.depth:
                device = "cpu" if xp is np else "cuda"
                norm = self.norms[layer] = onepass.BatchNorm(outputs, activation="relu", dtype=dtype, device=device)
                # The arrays of the layer itself: what an optimizer does to them, it does to the layer.
                self.params |= {f"bn{layer}.{name}": param for name, param in norm.parameters().items()}
            else:
                self.params[f"fc{layer}.bias"] = xp.zeros(outputs, dtype)

    def forward(self, x: Array, *, training: bool = False) -> list[Array]:
        """Return the input of every layer, then the logits.

        In training a batch is normalized by its own mean and variance, and the running averages of both follow it;
        otherwise those averages are used, and stay as they are.
        """
        values = [x]
        for layer in range(1, self.depth + 1):
            x = x @ self.params[f"fc{layer}.weight"]
            if layer in self.norms:
                x = self.norms[layer].forward(x, training=training)  # and the ReLU, in the same pass
            else:
                x = x + self.params[f"fc{layer}.bias"]
                if layer < self.depth:
                    x = self.xp.maximum(x, 0)
            values.append(x)
        return values

    def backward(self, x: Array, y: Array) -> dict[str, Array]:
        """Go forward in training and back; return the gradients of the mean cross-entropy, named as the parameters."""
        values = self.forward(x, training=True)
        # Softmax and cross-entropy together: their gradient by the logits is (probability - one hot) / samples.
        delta = self.xp.exp(self._log_softmax(values[-1]))
        delta -= self._one_hot(y, delta.shape[1])
        delta /= len(y)
        grads: dict[str, Array] = {}
        for layer in range(self.depth, 0, -1):
            inputs, outputs = values[layer - 1], values[layer]
            if layer in self.norms:
                norm = self.norms[layer]
                delta = norm.backward(delta)  # through the ReLU, too
                # Copies, since the next call writes into the same arrays.
                grads |= {f"bn{layer}.{name}": grad.copy() for name, grad in norm.gradients().items()}
            else:
                if layer < self.depth:
                    delta = delta * (outputs > 0)  # the ReLU passed on what is positive now
                grads[f"fc{layer}.bias"] = delta.sum(axis=0)
            grads[f"fc{layer}.weight"] = inputs.T @ delta
            if layer > 1:
                delta = delta @ self.params[f"fc{layer}.weight"].T
        return grads

    def evaluate(self, x: Array, y: Array) -> tuple[float, float]:
        """Return the mean cross-entropy and the fraction of samples that are classified correctly."""
        logits = self.forward(x)[-1]
        chosen = self.xp.where(self._one_hot(y, logits.shape[1]), self._log_softmax(logits), 0)
        loss = -chosen.sum(axis=1).mean()
        return float(loss), float((logits.argmax(axis=1) == y).mean())

    def _one_hot(self, y: Array, classes: int) -> Array:
        is_class: Array = y[:, None] == self.xp.arange(classes)
        return is_class

    def _log_softmax(self, logits: Array) -> Array:
        logits = logits - logits.max(axis=1, keepdims=True)  # the exponential of a large logit would overflow
        log_softmax: Array = logits - self.xp.log(self.xp.exp(logits).sum(axis=1, keepdims=True))
        return log_softmax

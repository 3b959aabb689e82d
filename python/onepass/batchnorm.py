"""Batch normalization: a layer that keeps parameters and running statistics, and the two functions beneath it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from onepass import _cpu
from onepass.integers import integer
from onepass.optim.hyper import flag, real
from onepass.optim.optimizer import Array
from onepass.state_dicts import Call, assignment, carry_out, count, entries, matching_array

FloatArray: TypeAlias = npt.NDArray[Any]
Activation: TypeAlias = Literal["relu"] | None


_NOT_GIVEN: Any = object()


class BatchNormGradients(NamedTuple):
    """The gradients of a batch normalization, in the order of its arguments.

    Attributes
    ----------
    x : array
        Of the input.
    weight, bias : array of shape (C,)
        Of scale and shift, in the dtype of the input (float32 for one of 16 bits), whether there were such parameters
        or not.
    residual : array or None
        Of the residual: the masked `dy`; `dy` itself without an activation; None with one where no `y` was given,
        because there was no residual then.
    """

    x: FloatArray
    weight: FloatArray
    bias: FloatArray
    residual: Any


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased: bool = True,
    channel_axis: int = 1,
    activation: Activation = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> tuple[FloatArray, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    r"""Normalize each channel of a batch to mean 0 and variance 1, then scale and shift it.

    .. math::
        y = (x - \mathrm{mean}) \cdot \mathrm{weight} / \sqrt{\mathrm{var} + \mathrm{eps}} + \mathrm{bias}

    With `training` mean and (biased) variance are those of the batch, for each channel over all other axes; otherwise
    the running ones. Then `residual` is added, and ``activation="relu"`` takes ``max(0, y)``, in the same pass over
    memory. NaN survives.

    Parameters
    ----------
    x : array
        C-contiguous, float32 or float64, of 2 or more dimensions. On a CUDA device (a CuPy array, or any that exports
        its memory) bfloat16 and float16 too; all other arrays are on the same device then, and new ones are CuPy's.
    weight, bias : array of shape (C,), optional
        Scale and shift of each channel, in the dtype of `x`, or float32 for one of 16 bits; 1 and 0 where they are left
        out.
    running_mean, running_var : array of shape (C,), optional
        Both or neither. In training updated in place, ``(1 - momentum) * running + momentum * batch``; otherwise read,
        and needed.
    training : bool, default True
        Whether to use the statistics of the batch.
    momentum : float, default 0.1
        Weight of the new value in the running statistics, in [0, 1].
    eps : float, default 1e-5
        Added to the variance, finite and > 0.
    unbiased : bool, default True
        Whether the variance that enters `running_var` is divided by n - 1 (else by n).
    channel_axis : int, default 1
        The axis of `x` that counts channels; from the end if negative. -1 for (N, H, W, C).
    activation : None or "relu", default None
    residual : array, optional
        Like `x`: added before the activation.
    out : array, optional
        Where the result goes: like `x`, C-contiguous and writable. Outside of training it may be `x` itself. By default
        a new array, whose memory is recycled (:func:`onepass.empty_cache`).

    Returns
    -------
    y : array
        Of the shape and dtype of `x`; `out` if that was given.
    mean, invstd : float64 array of shape (C,)
        The statistics that were used, :math:`1 / \sqrt{\mathrm{var} + \mathrm{eps}}` in the place of the variance:
        what :func:`batch_norm_backward` needs. NaN for an empty batch, which leaves the running statistics alone.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument; nothing has been written then. Among them: one value for each channel in training
        (its variance has no meaning), an array that is not C-contiguous, outputs that overlap other arrays.

    Warnings
    --------
    `momentum` weighs the new value, as in torch. In Keras it weighs the old one, and the running variance is biased:
    ``momentum=0.01, unbiased=False, eps=1e-3`` is Keras' default.

    Notes
    -----
    Sums are taken about a center near the channel's mean, and what is subtracted from `x` is the mean rounded to its
    dtype; the rest of the mean is part of the shift. So a mean that is large beside the deviation costs no digits: at
    mean / deviation = 1000 the variance is off by 1e-7 of itself in float32. Squares of deviations are summed over up
    to 32,768 values: in float32 those of deviations above 1e17 may overflow, and the result is NaN then.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch normalization: accelerating deep network training by reducing internal
       covariate shift", ICML 2015, algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np
    >>> from onepass import functional
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, mean, invstd = functional.batch_norm(x)
    >>> y.round(4)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean
    array([ 2., 20.])
    """
    y, mean, invstd, _ = _cpu.batch_norm_forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        out,
        flag(training, "training"),
        _momentum(momentum),
        flag(unbiased, "unbiased"),
        _eps(eps),
        _axis(channel_axis),
        _is_relu(activation),
        None,
    )
    return y, mean, invstd


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    activation: Activation = None,
    y: Array | None = _NOT_GIVEN,
    out: Array | None = None,
) -> BatchNormGradients:
    r"""Go back through :func:`batch_norm`: the gradients of its input, parameters and residual.

    .. math::
        \hat x &= (x - \mathrm{mean}) \cdot \mathrm{invstd} \\
        d\mathrm{bias} &= \sum dy, \quad d\mathrm{weight} = \sum dy \cdot \hat x \\
        dx &= \mathrm{weight} \cdot \mathrm{invstd} \cdot
              (dy - d\mathrm{bias} / n - \hat x \cdot d\mathrm{weight} / n)

    where n is the number of values of a channel. Without `training` the statistics do not depend on `x`:
    :math:`dx = \mathrm{weight} \cdot \mathrm{invstd} \cdot dy`. With ``activation="relu"``, `dy` counts only where the
    output was positive (or NaN).

    Parameters
    ----------
    dy : array
        Gradient of the output, like `x`.
    x, mean, invstd, weight, bias, training, channel_axis, activation
        As they were in the forward pass, and as it returned them.
    y : array or None
        To be given with an activation: the output of the forward pass if a residual was added before it; None if not,
        and the output is computed again from `x`, which costs no memory traffic.
    out : array, optional
        Where the gradient of the input goes, like `x`. By default a new array, whose memory is recycled.

    Returns
    -------
    BatchNormGradients
        Named tuple ``(x, weight, bias, residual)``.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument; nothing has been written then.

    Examples
    --------
    >>> import numpy as np
    >>> from onepass import functional
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = functional.batch_norm(x)
    >>> grads = functional.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, mean, invstd)
    >>> grads.bias
    array([1.])
    >>> print(abs(grads.x.sum()) < 1e-12)  # a shift of all values changes nothing
    True
    """
    relu = _is_relu(activation)
    if y is _NOT_GIVEN:
        if relu:
            raise TypeError("y: expected the output of the forward pass, or None if no residual was added to it")
        y = None
    dx, dweight, dbias, residual, _ = _cpu.batch_norm_backward(
        dy,
        x,
        mean,
        invstd,
        weight,
        bias,
        y,
        out,
        None,
        None,
        flag(training, "training"),
        _axis(channel_axis),
        relu,
        None,
    )
    return BatchNormGradients(dx, dweight, dbias, residual if relu else dy)


class _Kept(NamedTuple):
    """What the layer itself keeps for the backward pass."""

    training: bool
    residual: bool


class BatchNorm:
    r"""Batch normalization of each channel, with learned scale and shift and running statistics for inference.

    The formula is that of :func:`onepass.functional.batch_norm`. In training each call of :meth:`forward` updates

    .. math::
        r = (1 - \mathrm{momentum}) \cdot r + \mathrm{momentum} \cdot \text{batch statistic}

    or, with ``momentum=None``, the plain average over the batches since :meth:`reset_running_stats`: a last run over
    some batches without an optimizer gives the population's statistics for inference. The average is kept in the
    layer's dtype and rounded at each batch: some thousand batches are averaged well.

    Parameters
    ----------
    num_features : int
        Number of channels, >= 1.
    eps : float, default 1e-5
        Added to the variance, finite and > 0.
    momentum : float or None, default 0.1
        Weight of the new value in the running statistics, in [0, 1]; None for the plain average.
    channel_axis : int, default 1
        The axis that counts channels; from the end if negative.
    affine : bool, default True
        Whether the layer has `weight` and `bias`.
    activation : None or "relu", default None
        Taken in the same pass.
    unbiased : bool, default True
        Whether the variance that enters `running_var` is divided by n - 1 (else by n).
    dtype : dtype, default float32
        Of parameters, statistics and inputs: float32 or float64. On a device inputs of a float32 layer may be bfloat16
        or float16 as well, each batch as it likes.
    device : str or int, optional
        Where parameters and statistics are, and inputs have to be: "cpu", the default, for NumPy arrays; "cuda" for
        CuPy arrays on CuPy's current device, "cuda:1" or 1 for another one.

    Attributes
    ----------
    weight, bias : array of shape (num_features,) or None
        Parameters, at first 1 and 0; None without `affine`. Write into them, or let an optimizer do it.
    weight_grad, bias_grad : array of shape (num_features,) or None
        Their gradients, at first 0; overwritten by each :meth:`backward`.
    residual_grad : array or None
        Gradient of the residual of the last :meth:`backward`; None if there was none. Without an activation it is the
        `dy` that was given.
    running_mean, running_var : array of shape (num_features,)
        Statistics for inference, at first 0 and 1.
    num_batches_tracked : int
        Batches that the running statistics have seen.
    training : bool
        Set by :meth:`train` and :meth:`eval`.

    Warnings
    --------
    The layer keeps a reference to `x` (and, with a residual and an activation, to its own output) until
    :meth:`backward`. Neither may be changed in between.

    Examples
    --------
    >>> import numpy as np, onepass
    >>> bn = onepass.BatchNorm(2)
    >>> opt = onepass.SGD(bn.parameters(), lr=0.5)
    >>> x = np.array([[1, 10], [3, 30]], np.float32)
    >>> y = bn.forward(x)
    >>> dx = bn.backward(np.array([[1, 0], [1, 0]], np.float32))
    >>> opt.step(bn.gradients())
    >>> bn.bias
    array([-1.,  0.], dtype=float32)
    >>> bn.eval().forward(x).round(2)  # with the running statistics
    array([[-0.24,  1.75],
           [ 1.67,  6.12]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        channel_axis: int = 1,
        affine: bool = True,
        activation: Activation = None,
        unbiased: bool = True,
        dtype: npt.DTypeLike = np.float32,
        device: str | int | None = None,
    ) -> None:
        self._channels = _channel_count(num_features)
        self._eps = _eps(eps)
        self._momentum = None if momentum is None else _momentum(momentum)
        self._channel_axis = _axis(channel_axis)
        self._affine = flag(affine, "affine")
        _is_relu(activation)
        self._activation = activation
        self._unbiased = flag(unbiased, "unbiased")
        self._dtype = _dtype(dtype)
        _require_eps(self._eps, self._dtype)
        self._device = _device_number(device)
        xp = np if self._device is None else _cupy()
        with self._on_device():
            ones = [xp.ones(self._channels, self._dtype) for _ in range(2)]
            zeros = [xp.zeros(self._channels, self._dtype) for _ in range(4)]
        self._weight: FloatArray | None = ones[0] if self._affine else None
        self._bias: FloatArray | None = zeros[0] if self._affine else None
        self._weight_grad: FloatArray | None = zeros[1] if self._affine else None
        self._bias_grad: FloatArray | None = zeros[2] if self._affine else None
        self._running_mean: FloatArray = zeros[3]
        self._running_var: FloatArray = ones[1]
        self._training = True
        # What the backward pass needs, or why there is nothing; batches that the running statistics have seen; the
        # gradient of the residual. The compiled passes write them together with the arrays.
        self._record: list[Any] = [_NO_FORWARD, 0, None]
        self._turn = _cpu.Turn()

    def _on_device(self) -> Any:
        """A context in which CuPy's current device is the layer's."""
        return contextlib.nullcontext() if self._device is None else _cupy().cuda.Device(self._device)

    # What it is

    @property
    def num_features(self) -> int:
        """Number of channels."""
        return self._channels

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._eps

    @property
    def channel_axis(self) -> int:
        """The axis that counts channels."""
        return self._channel_axis

    @property
    def activation(self) -> Activation:
        """What follows in the same pass."""
        return self._activation

    @property
    def device(self) -> str:
        """Where parameters and statistics are: "cpu", or "cuda:0" and so on."""
        return "cpu" if self._device is None else f"cuda:{self._device}"

    # What it holds

    @property
    def weight(self) -> FloatArray | None:
        """Scale of each channel; None without `affine`."""
        return self._weight

    @property
    def bias(self) -> FloatArray | None:
        """Shift of each channel; None without `affine`."""
        return self._bias

    @property
    def weight_grad(self) -> FloatArray | None:
        """Gradient of `weight`, overwritten by each :meth:`backward`."""
        return self._weight_grad

    @property
    def bias_grad(self) -> FloatArray | None:
        """Gradient of `bias`, overwritten by each :meth:`backward`."""
        return self._bias_grad

    @property
    def residual_grad(self) -> Any:
        """Gradient of the residual of the last :meth:`backward`; None if there was none."""
        return self._record[2]

    @property
    def running_mean(self) -> FloatArray:
        """Mean of each channel for inference."""
        return self._running_mean

    @property
    def running_var(self) -> FloatArray:
        """Variance of each channel for inference."""
        return self._running_var

    @property
    def num_batches_tracked(self) -> int:
        """Batches that the running statistics have seen since they were reset."""
        batches: int = self._record[1]
        return batches

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in the running statistics; None for the plain average. May be set."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = None if value is None else _momentum(value)

    @property
    def training(self) -> bool:
        """Whether :meth:`forward` uses, and tracks, the statistics of the batch."""
        return self._training

    def train(self, mode: bool = True) -> BatchNorm:
        """Use the statistics of each batch from here on (or, with False, the running ones). Returns the layer."""
        self._training = flag(mode, "mode")
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics from here on. Returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, FloatArray]:
        """The arrays to train, for an optimizer: ``{"weight": ..., "bias": ...}``; empty without `affine`."""
        return _named(weight=self._weight, bias=self._bias)

    def gradients(self) -> dict[str, FloatArray]:
        """The gradients of :meth:`parameters`, under the same names. Always the same arrays."""
        return _named(weight=self._weight_grad, bias=self._bias_grad)

    # Passes

    def forward(
        self, x: Array, *, training: bool | None = None, residual: Array | None = None, out: Array | None = None
    ) -> FloatArray:
        """Normalize a batch; see :func:`onepass.functional.batch_norm`.

        Parameters
        ----------
        x : array
            C-contiguous, in the layer's dtype, with `num_features` channels along `channel_axis`.
        training : bool, optional
            In the place of the attribute, for this call.
        residual, out : array, optional
            As in the function.

        Returns
        -------
        array
            Of the shape of `x`; `out` if that was given.

        Raises
        ------
        TypeError, ValueError
            With the name of the argument. Nothing has been written then, and the running statistics are as before.
        RuntimeError
            If this layer is in the middle of a pass already (of another thread).
        """
        training = self._training if training is None else flag(training, "training")
        with self._turn:
            momentum = self._momentum
            if momentum is None:
                momentum = 1.0 / (self._record[1] + 1)
            kept = _Kept(training, residual is not None)
            y, _, _, _ = _cpu.batch_norm_forward(
                x,
                self._weight,
                self._bias,
                self._running_mean,
                self._running_var,
                residual,
                out,
                training,
                momentum,
                self._unbiased,
                self._eps,
                self._channel_axis,
                self._relu,
                (self._channels, self._dtype.name, self._record, kept, _OVERWRITTEN, self._turn),
            )
            return y

    def __call__(
        self, x: Array, *, training: bool | None = None, residual: Array | None = None, out: Array | None = None
    ) -> FloatArray:
        """The same as :meth:`forward`."""
        return self.forward(x, training=training, residual=residual, out=out)

    def backward(self, dy: Array, *, out: Array | None = None) -> FloatArray:
        """Go back through the last :meth:`forward`; see :func:`onepass.functional.batch_norm_backward`.

        Writes `weight_grad`, `bias_grad` and `residual_grad`, and lets go of what the forward pass had kept.

        Parameters
        ----------
        dy : array
            Gradient of the output.
        out : array, optional
            Where the gradient of the input goes.

        Returns
        -------
        array
            Gradient of the input; `out` if that was given.

        Raises
        ------
        TypeError, ValueError
            With the name of the argument. Nothing has been written then.
        RuntimeError
            If there is no forward pass to go back through: there was none, its backward pass has been made already, or
            its input was overwritten by ``out=x``. Or if this layer is in the middle of a pass already.
        """
        with self._turn:
            saved = self._record[0]
            if isinstance(saved, str):
                raise RuntimeError(f"backward: {saved}")
            x, y, mean, invstd, weight, bias, kept = saved
            dx, _, _, _, _ = _cpu.batch_norm_backward(
                dy,
                x,
                mean,
                invstd,
                weight,
                bias,
                y,
                out,
                self._weight_grad,
                self._bias_grad,
                kept.training,
                self._channel_axis,
                self._relu,
                (self._record, _TWICE, kept.residual, self._turn),
            )
            return dx

    # State

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1, none tracked."""
        with self._turn, self._on_device():
            carry_out(
                [
                    (self._turn.writes, ()),
                    (self._running_mean.fill, (0.0,)),
                    (self._running_var.fill, (1.0,)),
                    (self._record.__setitem__, (1, 0)),
                ]
            )

    def state_dict(self) -> dict[str, Any]:
        """A snapshot that :meth:`load_state_dict` restores exactly.

        Returns
        -------
        dict
            ``weight``, ``bias`` (with `affine`), ``running_mean``, ``running_var``: copies, on the layer's device;
            ``num_batches_tracked``.
        """
        with self._turn, self._on_device():
            arrays = {name: array.copy() for name, array in self._state().items()}
            return {**arrays, "num_batches_tracked": self._record[1]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore parameters and statistics, in place, from a :meth:`state_dict`.

        A layer on a device takes CuPy arrays of any device, and NumPy arrays; one on the CPU takes NumPy arrays.

        An interrupt finds all of it done or nothing.

        Raises
        ------
        TypeError, ValueError
            If it is of a layer of another size, dtype or `affine`. Nothing has changed then.
        """
        with self._turn, self._on_device():
            carry_out(self._loading(state_dict))

    def _saved(self) -> dict[str, Any]:
        return {**self._state(), "num_batches_tracked": self._record[1]}

    def _loading(self, saved: Mapping[str, Any]) -> list[Call]:
        """What has to be done to restore a snapshot, which has been checked; none of it can fail."""
        own = self._state()
        given = entries(saved, "state_dict", (*own, "num_batches_tracked"))
        calls: list[Call] = [(self._turn.writes, ())]
        calls += [self._restoring(given[name], array, name) for name, array in own.items()]
        batches = count(given["num_batches_tracked"], "num_batches_tracked")
        return [*calls, (self._record.__setitem__, (1, batches))]

    def _restoring(self, value: Any, array: FloatArray, name: str) -> Call:
        if self._device is None:
            return assignment(array, matching_array(value, array, name).copy())
        cupy = _cupy()
        if isinstance(value, cupy.ndarray):
            if value.shape != array.shape:
                raise ValueError(f"{name}: shape {value.shape} does not match {array.shape}")
            if value.dtype != array.dtype:
                raise TypeError(f"{name}: dtype {value.dtype} does not match {array.dtype}")
        else:
            value = matching_array(value, np.empty(array.shape, array.dtype), name)
        with self._on_device():
            return cupy.ndarray.__setitem__, (array, ..., cupy.array(value))

    def _state(self) -> dict[str, FloatArray]:
        return {**self.parameters(), "running_mean": self._running_mean, "running_var": self._running_var}

    @property
    def _relu(self) -> bool:
        return self._activation == "relu"

    def __getstate__(self) -> dict[str, Any]:
        with self._turn:
            state = {**self.__dict__, "_record": [_NO_FORWARD, self._record[1], None]}
            del state["_turn"]
            return state

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchNorm:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = self.__getstate__()
        with self._turn:  # so that arrays and their count are of the same batch
            state["_record"][1] = self._record[1]
            twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def __copy__(self) -> BatchNorm:
        return copy.deepcopy(self)  # two layers that share arrays, and not their counts, would be neither

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _turn=_cpu.Turn())
        self.__dict__.setdefault("_device", None)  # of a version that knew no other
        if self._device is None:
            return
        with self._on_device():  # CuPy unpickles to its current device
            for name, value in self.__dict__.items():
                if isinstance(value, _cupy().ndarray) and value.device.id != self._device:
                    self.__dict__[name] = _cupy().array(value)

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self._channels}, eps={self._eps!r}, momentum={self._momentum!r}, "
            f"channel_axis={self._channel_axis}, affine={self._affine}, activation={self._activation!r}, "
            f"unbiased={self._unbiased}, dtype={self._dtype}"
            + ("" if self._device is None else f", device={self.device!r}")
            + ")"
        )


_NO_FORWARD = "there was no forward pass to go back through"
_TWICE = "the last forward pass has been gone back through already, and its input is no longer kept"
_OVERWRITTEN = "the last forward pass overwrote its input (out=x), which the gradient needs"


def _named(**arrays: FloatArray | None) -> dict[str, FloatArray]:
    return {name: array for name, array in arrays.items() if array is not None}


def _channel_count(value: Any) -> int:
    return integer(value, "num_features", 1, 2**62, "an integer >= 1")


def _axis(value: Any) -> int:
    return integer(value, "channel_axis", -64, 64, "an integer, an axis of x")  # NumPy has no more dimensions


def _eps(value: Any) -> float:
    return real(value, "eps", "a finite number > 0", lambda x: 0.0 < x < math.inf)


def _momentum(value: Any) -> float:
    return real(value, "momentum", "a number in [0, 1]", lambda x: 0.0 <= x <= 1.0)


def _require_eps(eps: float, dtype: np.dtype[Any]) -> None:
    if eps < np.finfo(np.float64).tiny or 1.0 / math.sqrt(eps) > float(np.finfo(dtype).max):
        raise ValueError(f"eps: {eps!r} is too small for {dtype}, where 1 / sqrt(eps) would be infinite")


def _dtype(value: Any) -> np.dtype[Any]:
    supported = ", ".join(_cpu.compute_dtypes())
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"dtype: expected one of {supported}, got {value!r}") from None
    if value is None or dtype.name not in _cpu.compute_dtypes() or not dtype.isnative:
        raise TypeError(f"dtype: expected one of {supported}, got {value!r}")
    return dtype


def _cupy() -> Any:
    return importlib.import_module("cupy")


def _device_number(device: Any) -> int | None:
    """The number of a CUDA device; None for the host."""
    if device is None or (isinstance(device, str) and device == "cpu"):
        return None
    need = "'cpu', 'cuda', or the number of a CUDA device, as in 'cuda:1' or 1"
    number: int | None = device
    if isinstance(device, str):
        kind, colon, digits = device.partition(":")
        if kind != "cuda" or (colon and not (digits.isascii() and digits.isdecimal())):
            raise ValueError(f"device: expected {need}, got {device!r}")
        number = int(digits) if colon else None
    if number is not None:
        number = integer(number, "device", 0, 2**31 - 1, need)
    if _cpu.cuda_architectures() is None:
        raise RuntimeError(f"device: {device!r} cannot be used, because this build of onepass has no CUDA kernels")
    devices = len(_cpu.cuda_devices())
    if devices == 0:
        raise RuntimeError(f"device: {device!r} cannot be used, because there is no CUDA device")
    if number is None:
        current: int = _cupy().cuda.Device().id
        return current
    if number >= devices:
        raise ValueError(f"device: expected {need}, of which there are {devices}, got {device!r}")
    return number


def _is_relu(activation: Any) -> bool:
    if activation is None:
        return False
    if not isinstance(activation, str):
        raise TypeError(f"activation: expected None or 'relu', got {activation!r}")
    if activation != "relu":
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return True


def empty_cache() -> None:
    """Free the memory that is kept for the outputs of coming calls. Arrays in use are not touched.

    :class:`BatchNorm` and :func:`onepass.functional.batch_norm` take new outputs of 128 KiB and more from a pool, to
    which their memory returns when they are garbage collected.
    """
    _cpu.empty_cache()


def get_cache_limit() -> int:
    """The most bytes that are kept for the outputs of coming calls: 1 GiB, unless it was set."""
    return _cpu.cache_limit()


def set_cache_limit(count: int | None) -> None:
    """Set the most bytes that are kept for the outputs of coming calls; ``None`` goes back to 1 GiB.

    Parameters
    ----------
    count : int or None
        Bytes, >= 0; 0 keeps nothing. Arrays in use do not count. What is above the limit is freed at once.
    """
    need = "an integer from 0 to 2**62 or None"
    _cpu.set_cache_limit(2**30 if count is None else integer(count, "count", 0, 2**62, need))

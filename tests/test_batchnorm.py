"""Batch normalization as a user meets it: a layer with parameters and statistics, and two functions without a state."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import MappingProxyType

import numpy as np
import pytest

import onepass
from helpers import (
    BareProducer,
    HandMade,
    OldProducer,
    Producer,
    assert_moved,
    assert_same_bits,
    bits,
    copied,
    numbers,
)
from onepass import _cpu, functional
from processes import run_all

DTYPES = [np.float32, np.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

SHAPE, AXIS, CHANNELS = (6, 5, 4, 3), 1, 5

# What a layer and its calls may be told, apart from sizes.
LAYERS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "bare": {"affine": False},
    "bare-relu": {"affine": False, "activation": "relu"},
    "biased": {"unbiased": False, "eps": 1e-3},
    "average": {"momentum": None},
    "heavy": {"momentum": 0.75, "activation": "relu"},
}


def make(dtype=np.float32, channels=CHANNELS, **options):
    """A layer with parameters that are its own."""
    layer = onepass.BatchNorm(channels, dtype=dtype, **options)
    for k, array in enumerate(layer.parameters().values()):
        array[...] = numbers(array.shape, dtype, seed=80 + k)
    return layer


def batch(t=0, dtype=np.float32, shape=SHAPE):
    """One in which each channel has another mean than 0 and another deviation than 1."""
    return np.asarray(3.0 * numbers(shape, np.float64, seed=t) + 0.5, dtype)


def gradient(t=0, dtype=np.float32, shape=SHAPE):
    return numbers(shape, dtype, seed=40 + t)


def state_of(layer):
    """All that calls can change, as bits."""
    return {
        **{name: bits(value) for name, value in layer.state_dict().items() if name != "num_batches_tracked"},
        **{f"{name}_grad": bits(value) for name, value in layer.gradients().items()},
        "num_batches_tracked": layer.num_batches_tracked,
        "training": layer.training,
        "momentum": layer.momentum,
    }


def assert_same_layers(a, b):
    assert state_of(a) == state_of(b)


# The formula, in the plainest words


def over(values, axis, ndim):
    """Values of channels, in a shape that broadcasts over a batch."""
    return np.expand_dims(values, tuple(k for k in range(ndim) if k != axis % ndim))


class Textbook:
    """Ioffe and Szegedy (2015), algorithm 1 and the gradients of section 3, in float64."""

    def __init__(self, x, weight=1.0, bias=0.0, *, axis=AXIS, eps=1e-5, frozen=None, residual=0.0, relu=False):
        self.axes = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
        channels = x.shape[axis]
        self.n = x.size // channels
        self.mean, self.var = (x.mean(self.axes), x.var(self.axes)) if frozen is None else frozen
        self.frozen, self.relu = frozen is not None, relu
        self.invstd = 1.0 / np.sqrt(self.var + eps)
        wide = [over(np.broadcast_to(v, channels), axis, x.ndim) for v in (weight, bias, self.mean, self.invstd)]
        self.weight, bias, mean, self.wide_invstd = wide
        self.normal = (x - mean) * self.wide_invstd
        self.y = self.normal * self.weight + bias + residual
        if relu:
            self.y = np.maximum(self.y, 0.0)

    def backward(self, dy):
        dy = np.where(self.y > 0, dy, 0.0) if self.relu else dy
        dnormal = dy * self.weight
        dx = dnormal * self.wide_invstd
        if not self.frozen:
            means = [v.mean(self.axes, keepdims=True) for v in (dnormal, dnormal * self.normal)]
            dx = (dnormal - means[0] - self.normal * means[1]) * self.wide_invstd
        return dx, (dy * self.normal).sum(self.axes), dy.sum(self.axes), dy


def assert_close(actual, desired):
    """Other formulas, so other roundings: of float64, with the cancellation of a few dozen terms."""
    assert np.isfinite(desired).all()
    np.testing.assert_allclose(actual, desired, rtol=1e-11, atol=1e-12)


# Training


def test_the_example_of_the_class():
    layer = onepass.BatchNorm(2)
    opt = onepass.SGD(layer.parameters(), lr=0.5)
    x = np.array([[1, 10], [3, 30]], np.float32)
    y = layer.forward(x)
    np.testing.assert_allclose(y, [[-1, -1], [1, 1]], rtol=1e-5)
    layer.backward(np.array([[1, 0], [1, 0]], np.float32))
    opt.step(layer.gradients())
    np.testing.assert_array_equal(layer.bias, np.array([-1, 0], np.float32))
    np.testing.assert_allclose(layer.running_mean, [0.2, 2.0], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, [1.1, 20.9], rtol=1e-6)


@pytest.mark.parametrize("bound", [False, True], ids=["passed", "bound"])
@every_dtype
def test_an_optimizer_finds_scale_and_shift(dtype, bound):
    """The targets are a normalized batch, scaled and shifted: there is one layer that reaches them."""
    layer = onepass.BatchNorm(CHANNELS, unbiased=False, dtype=dtype)
    x = batch(dtype=dtype)
    weight, bias = numbers(CHANNELS, dtype, seed=1), numbers(CHANNELS, dtype, seed=2)
    target = functional.batch_norm(x, weight, bias)[0]
    opt = onepass.Adam(layer.parameters(), lr=0.05, grads=layer.gradients() if bound else None)
    losses = []
    for _ in range(300):
        error = layer(x) - target
        losses.append(float((error**2).mean()))
        layer.backward((2.0 / error.size * error).astype(dtype))
        opt.step(*([] if bound else [layer.gradients()]))
    assert losses[0] > 0.5
    assert losses[-1] < 1e-6
    np.testing.assert_allclose(layer.weight, weight, atol=1e-3)
    np.testing.assert_allclose(layer.bias, bias, atol=1e-3)
    # The statistics have arrived at those of the only batch, and with them inference at training.
    np.testing.assert_allclose(layer.eval()(x), layer.train()(x), rtol=1e-5, atol=1e-5)


def test_bound_gradients_are_passed_gradients():
    first, second = make(), make()
    bound = onepass.Adam(first.parameters(), lr=0.01, grads=first.gradients())
    passed = onepass.Adam(second.parameters(), lr=0.01)
    for t in range(4):
        before = copied(first.parameters())
        for layer in (first, second):
            layer(batch(t))
            layer.backward(gradient(t))
        bound.step()
        passed.step(second.gradients())
        assert_moved(before, first.parameters())
        assert_same_layers(first, second)


def test_layers_in_a_network_train():
    """Two layers with weights between them, all trained by one optimizer, on a task that needs the second one."""
    rng = np.random.default_rng(3)
    x = np.asarray(rng.normal(3.0, 2.0, (128, 2)), np.float32)
    target = np.asarray((x[:, :1] - 3.0) * (x[:, 1:] - 3.0) > 0, np.float32)
    weights = {"in": numbers((2, 16), seed=1), "out": 0.25 * numbers((16, 1), seed=2)}
    first, second = onepass.BatchNorm(2), onepass.BatchNorm(16, activation="relu")
    layers = {"first": first, "second": second}
    own = {f"{name}.{key}": array for name, layer in layers.items() for key, array in layer.parameters().items()}
    opt = onepass.Adam({**weights, **own}, lr=0.02)

    def forward():
        h0 = first(x)
        h1 = second(h0 @ weights["in"])
        return h0, h1, h1 @ weights["out"]

    losses = []
    for _ in range(150):
        h0, h1, out = forward()
        error = out - target
        losses.append(float((error**2).mean()))
        derror = (2 / error.size) * error
        grads = {"out": h1.T @ derror}
        dpre = second.backward(derror @ weights["out"].T)
        grads["in"] = h0.T @ dpre
        first.backward(dpre @ weights["in"].T)
        grads |= {f"{name}.{key}": g for name, layer in layers.items() for key, g in layer.gradients().items()}
        opt.step(grads)
    assert losses[-1] < 0.25 * losses[0]
    assert first.num_batches_tracked == second.num_batches_tracked == 150
    for layer in layers.values():
        layer.eval()
    accuracy = ((forward()[-1] > 0.5) == (target > 0.5)).mean()
    assert accuracy > 0.85


# The class is the functions with a memory


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", LAYERS)
@every_dtype
def test_the_class_equals_the_functions(options, training, residual, dtype):
    options = LAYERS[options]
    layer = make(dtype, **options).train(training)
    running = [layer.running_mean.copy(), layer.running_var.copy()]
    relu = options.get("activation")
    both = {"training": training, "activation": relu}
    for t in range(3):
        x, r, dy = batch(t, dtype), batch(20 + t, dtype) if residual else None, gradient(t, dtype)
        affine = copied([layer.weight, layer.bias])
        momentum = options.get("momentum", 0.1)
        y, mean, invstd = functional.batch_norm(
            x,
            *affine,
            *running,
            **both,
            residual=r,
            momentum=1.0 / (t + 1) if momentum is None else momentum,
            eps=options.get("eps", 1e-5),
            unbiased=options.get("unbiased", True),
        )
        assert_same_bits(layer(x, residual=r), y)
        assert_same_bits([layer.running_mean, layer.running_var], running)
        given = y if residual and relu else None
        grads = functional.batch_norm_backward(dy, x, mean, invstd, *affine, **both, y=given)
        assert_same_bits(layer.backward(dy), grads.x)
        if options.get("affine", True):
            assert_same_bits([layer.weight_grad, layer.bias_grad], [grads.weight, grads.bias])
            layer.weight[...] -= dtype(0.25) * layer.weight_grad
        if residual:
            assert_same_bits(layer.residual_grad, grads.residual)
        else:
            assert layer.residual_grad is None
        assert_moved([x, dy], [y + (y == 0), grads.x + (grads.x == 0)])
    assert layer.num_batches_tracked == (3 if training else 0)


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("relu", [None, "relu"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -4])
def test_equals_the_textbook_at_every_channel_axis(axis, relu, residual, frozen):
    x, dy = batch(1, np.float64), gradient(1, np.float64)
    r = batch(2, np.float64) if residual else None
    layer = make(np.float64, SHAPE[axis], channel_axis=axis, activation=relu).train(not frozen)
    layer.running_mean[...] = numbers(SHAPE[axis], np.float64, seed=3)
    layer.running_var[...] = np.abs(numbers(SHAPE[axis], np.float64, seed=4))
    statistics = (layer.running_mean.copy(), layer.running_var.copy()) if frozen else None
    want = Textbook(
        x, layer.weight, layer.bias, axis=axis, frozen=statistics, residual=0.0 if r is None else r, relu=bool(relu)
    )
    assert_close(layer(x, residual=r), want.y)
    dx, dweight, dbias, dresidual = want.backward(dy)
    assert_close(layer.backward(dy), dx)
    assert_close(layer.weight_grad, dweight)
    assert_close(layer.bias_grad, dbias)
    if residual:
        assert_close(layer.residual_grad, dresidual)
    assert (np.abs(dx) > 1e-6).mean() > (0.1 if relu else 0.9)


@pytest.mark.parametrize("axis", range(4))
def test_an_axis_from_the_end_is_the_same_axis(axis):
    passes = []
    for channel_axis in (axis, axis - 4, np.int64(axis), np.int8(axis - 4)):
        layer = make(channels=SHAPE[axis], channel_axis=channel_axis)
        passes.append([layer(batch()), layer.backward(gradient()), *layer.gradients().values()])
        y, mean, invstd = functional.batch_norm(batch(), *layer.parameters().values(), channel_axis=channel_axis)
        passes[-1] += [y, mean, invstd]
    for other in passes[1:]:
        assert_same_bits(other, passes[0])


@every_dtype
def test_what_the_functions_give_back(dtype):
    x, dy = batch(dtype=dtype), gradient(dtype=dtype)
    y, mean, invstd = functional.batch_norm(x)
    assert type(y) is type(mean) is type(invstd) is np.ndarray
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.flags.c_contiguous
    assert y.flags.writeable
    assert mean.shape == invstd.shape == (CHANNELS,)
    assert mean.dtype == invstd.dtype == np.float64
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(wide.var((0, 2, 3)) + 1e-5), rtol=1e-6)
    grads = functional.batch_norm_backward(dy, x, mean, invstd)
    assert isinstance(grads, functional.BatchNormGradients)
    assert grads._fields == ("x", "weight", "bias", "residual")
    assert (grads.x.shape, grads.x.dtype) == (x.shape, x.dtype)
    for value in (grads.weight, grads.bias):  # also where there are no such parameters
        assert (value.shape, value.dtype) == ((CHANNELS,), x.dtype)
    assert grads.residual is dy
    with_ones = functional.batch_norm_backward(dy, x, mean, invstd, np.ones(CHANNELS, dtype), np.zeros(CHANNELS, dtype))
    assert_same_bits(list(with_ones), list(grads))
    assert_same_bits(functional.batch_norm(x, np.ones(CHANNELS, dtype), np.zeros(CHANNELS, dtype))[0], y)


@pytest.mark.parametrize("one", ["weight", "bias"])
def test_a_scale_without_a_shift_and_a_shift_without_a_scale(one):
    x, dy = batch(dtype=np.float64), gradient(dtype=np.float64)
    value = {one: numbers(CHANNELS, np.float64, seed=5)}
    want = Textbook(x, **value, relu=True)
    y, mean, invstd = functional.batch_norm(x, **value, activation="relu")
    grads = functional.batch_norm_backward(dy, x, mean, invstd, **value, activation="relu", y=None)
    assert_close(y, want.y)
    for got, wanted in zip(grads[:3], want.backward(dy)[:3], strict=True):
        assert_close(got, wanted)
    assert grads.residual is None


# Modes


def test_train_and_eval():
    layer = make()
    assert layer.training is True
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False) is layer
    assert layer.training is False
    assert layer.train(np.True_).training is True
    with pytest.raises(AttributeError):
        layer.training = False


def test_training_for_one_call():
    layer, twin = make(), make()
    x = batch(1)
    for mode in (True, False):
        for override in (True, False, np.bool_(mode)):
            got = layer.train(mode).forward(x, training=override)
            assert layer.training is mode
            assert_same_bits(got, twin.train(bool(override))(x))
            assert_same_bits(layer.backward(gradient()), twin.backward(gradient()))
    assert layer.num_batches_tracked == twin.num_batches_tracked == 3
    twin.train(False)
    assert_same_layers(layer, twin)
    assert_same_bits(layer.forward(x, training=None), layer(x, training=False))


def test_inference_changes_nothing():
    layer = make(momentum=None)
    layer(batch(1))
    before = state_of(layer.eval())
    layer(batch(2))
    layer(batch(3), out=np.empty(SHAPE, np.float32))
    assert state_of(layer) == before


# Running statistics


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, 1.0, 1, np.float32(0.5), None])
def test_running_statistics(momentum, unbiased):
    layer = onepass.BatchNorm(CHANNELS, momentum=momentum, unbiased=unbiased, dtype=np.float64)
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    held = layer.running_mean, layer.running_var
    for t in range(1, 11):
        x = batch(t, np.float64, (3 + t, CHANNELS, 2))
        layer(x)
        new = float(momentum) if momentum is not None else 1.0 / t
        mean = (1 - new) * mean + new * x.mean((0, 2))
        var = (1 - new) * var + new * x.var((0, 2), ddof=int(unbiased))
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)
        assert layer.num_batches_tracked == t
        assert type(layer.num_batches_tracked) is int
    assert layer.running_mean is held[0]
    assert layer.running_var is held[1]
    if momentum == 0.0:
        assert_same_bits([layer.running_mean, layer.running_var], [np.zeros(CHANNELS), np.ones(CHANNELS)])


@every_dtype
def test_the_plain_average_is_the_population(dtype):
    """Ioffe and Szegedy (2015), algorithm 2: the statistics of inference, from batches of one size."""
    layer = onepass.BatchNorm(CHANNELS, momentum=None, dtype=dtype)
    batches = [batch(t, dtype) for t in range(8)]
    for x in batches:
        layer(x)
    wide = np.concatenate(batches).astype(np.float64)
    # In float32 each of the 8 roundings may be half a unit of the last place.
    tolerance = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(layer.running_mean, wide.mean((0, 2, 3)), rtol=tolerance, atol=tolerance)
    expected = np.mean([x.astype(np.float64).var((0, 2, 3), ddof=1) for x in batches], axis=0)
    np.testing.assert_allclose(layer.running_var, expected, rtol=tolerance)


def test_reset_running_stats():
    for momentum in (0.25, None):
        layer, fresh = make(momentum=momentum), make(momentum=momentum)
        held = layer.running_mean, layer.running_var
        for t in range(3):
            layer(batch(t))
        assert layer.num_batches_tracked == 3
        layer.reset_running_stats()
        assert layer.num_batches_tracked == 0
        assert held[0] is layer.running_mean
        assert held[1] is layer.running_var
        assert_same_layers(layer, fresh)
        for t in range(2):
            assert_same_bits(layer(batch(t)), fresh(batch(t)))
        assert_same_layers(layer, fresh)


def test_the_momentum_may_be_set():
    layer = make(np.float64)
    assert layer.momentum == 0.1
    mean = np.zeros(CHANNELS)
    for t, momentum in enumerate((0.5, None, 1.0, 0, None, 0.125), 1):
        layer.momentum = momentum
        assert layer.momentum == momentum
        x = batch(t, np.float64)
        layer(x)
        new = 1.0 / t if momentum is None else momentum
        mean = (1 - new) * mean + new * x.mean((0, 2, 3))
        assert_close(layer.running_mean, mean)
    for bad, error in (
        (-0.5, ValueError),
        (1.5, ValueError),
        (np.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match=r"^momentum: expected a number in \[0, 1\], got "):
            layer.momentum = bad
        assert layer.momentum == 0.125


def test_a_population_from_a_last_run():
    """Trained with a moving average; then a run over some batches without an optimizer."""
    layer = make(np.float64)
    for t in range(5):
        layer(batch(t, np.float64))
    layer.momentum = None
    layer.reset_running_stats()
    batches = [batch(10 + t, np.float64) for t in range(4)]
    for x in batches:
        layer(x)
    assert_close(layer.running_mean, np.concatenate(batches).mean((0, 2, 3)))


def test_functions_update_the_arrays_that_are_given():
    x = batch(1)
    mean, var = numbers(CHANNELS, seed=1), np.abs(numbers(CHANNELS, seed=2))
    before = copied([mean, var])
    functional.batch_norm(x, running_mean=mean, running_var=var, momentum=0.5)
    assert_moved(before, [mean, var])
    now = copied([mean, var])
    functional.batch_norm(x, running_mean=mean, running_var=var, training=False)
    assert_same_bits([mean, var], now)


def test_written_parameters_and_statistics_count():
    layer = make(np.float64).eval()
    layer.weight[...] = 2.0
    layer.bias[...] = -1.0
    layer.running_mean[...] = np.arange(CHANNELS)
    layer.running_var.fill(3.0)
    x = batch(1, np.float64)
    assert_close(layer(x), (x - over(np.arange(CHANNELS), 1, 4)) / np.sqrt(3.0 + 1e-5) * 2.0 - 1.0)


# Backward


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_backward_pass_is_of_the_forward_pass(options, mode):
    """What happens to the layer between the passes does not count: a step, another mode, other statistics."""
    layer, twin = make(**LAYERS[options]).train(mode), make(**LAYERS[options]).train(mode)
    x, r, dy = batch(1), batch(2), gradient(1)
    assert_same_bits(layer(x, residual=r), twin(x, residual=r))
    for array in layer.parameters().values():
        array[...] = 50.0
    layer.train(not mode)
    layer.momentum = 0.875
    layer.reset_running_stats()
    layer.running_mean.fill(9.0)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": 77})
    assert_same_bits(layer.backward(dy), twin.backward(dy))
    assert_same_bits(layer.gradients(), twin.gradients())
    assert_same_bits(layer.residual_grad, twin.residual_grad)
    assert layer.num_batches_tracked == 77


def test_the_backward_pass_is_of_the_last_forward_pass():
    layer, twin = make(), make()
    layer(batch(1))
    layer(batch(2)[:3])
    layer(batch(3))
    twin(batch(3))
    assert_same_bits(layer.backward(gradient()), twin.backward(gradient()))


def test_frozen_statistics_are_constants():
    layer = make(np.float64).eval()
    layer.running_mean[...] = numbers(CHANNELS, np.float64, seed=1)
    layer.running_var[...] = np.abs(numbers(CHANNELS, np.float64, seed=2))
    x, dy = batch(1, np.float64), gradient(1, np.float64)
    layer(x)
    factor = layer.weight / np.sqrt(layer.running_var + 1e-5)
    assert_close(layer.backward(dy), dy * over(factor, 1, 4))


def test_gradients_are_always_the_same_arrays():
    layer = make()
    weight_grad, bias_grad = layer.weight_grad, layer.bias_grad
    assert not weight_grad.any()
    assert not bias_grad.any()
    assert weight_grad.shape == bias_grad.shape == (CHANNELS,)
    assert weight_grad.dtype == bias_grad.dtype == np.float32
    for t in range(3):
        layer(batch(t))
        before = copied(layer.gradients())
        layer.backward(gradient(t))
        assert_moved(before, layer.gradients())  # overwritten
        assert layer.gradients()["weight"] is layer.weight_grad is weight_grad
        assert layer.gradients()["bias"] is layer.bias_grad is bias_grad
    twin = make()
    twin(batch(2))
    twin.backward(gradient(2))
    assert_same_bits(layer.gradients(), twin.gradients())  # and not added up


def test_parameters_are_always_the_same_arrays():
    layer = make()
    held = layer.parameters()
    assert list(held) == list(layer.gradients()) == ["weight", "bias"]
    opt = onepass.SGD(layer.parameters(), lr=0.5)
    for t in range(2):
        layer(batch(t))
        layer.backward(gradient(t))
        opt.step(layer.gradients())
        layer.load_state_dict(make(momentum=0.5).state_dict())
        layer.reset_running_stats()
        for name, array in layer.parameters().items():
            assert array is held[name] is getattr(layer, name)
    held.clear()  # a dict of its own
    assert list(layer.parameters()) == ["weight", "bias"]
    for name in ("weight", "bias", "weight_grad", "bias_grad", "running_mean", "running_var", "residual_grad"):
        with pytest.raises(AttributeError):
            setattr(layer, name, np.ones(CHANNELS, np.float32))
    with pytest.raises(AttributeError):
        layer.num_batches_tracked = 0


def test_a_fresh_layer():
    layer = onepass.BatchNorm(np.int64(3))
    for array, value in ((layer.weight, 1), (layer.bias, 0), (layer.running_mean, 0), (layer.running_var, 1)):
        np.testing.assert_array_equal(array, np.full(3, value, np.float32), strict=True)
        assert array.flags.writeable
    assert layer.residual_grad is None
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_gradient_of_the_residual(mode):
    x, r, dy = batch(1), batch(2), gradient(1)
    plain, relu = make().train(mode), make(activation="relu").train(mode)
    for layer in (plain, relu):
        layer(x)
        layer.backward(dy)
        assert layer.residual_grad is None
    plain(x, residual=r)
    assert plain.residual_grad is None  # not of a pass that is not finished
    plain.backward(dy)
    assert plain.residual_grad is dy
    given = Producer(dy)
    plain(x, residual=r)
    plain.backward(given)
    assert plain.residual_grad is given

    y = relu(x, residual=r)
    relu.backward(dy)
    assert_same_bits(relu.residual_grad, np.where(y > 0, dy, np.float32(0)))
    assert 0.2 < (y > 0).mean() < 0.8
    kept = relu.residual_grad
    held = kept.copy()
    relu(x, residual=r)
    assert relu.residual_grad is kept
    relu.backward(-dy)
    assert_same_bits(relu.residual_grad, -held + np.float32(0))
    assert_same_bits(kept, held)  # a new array each time
    relu(x)
    relu.backward(dy)
    assert relu.residual_grad is None


def test_the_gradient_of_the_residual_of_the_function():
    x, r, dy = batch(1), batch(2), gradient(1)
    y, mean, invstd = functional.batch_norm(x, residual=r, activation="relu")
    backward = functional.batch_norm_backward
    masked = backward(dy, x, mean, invstd, activation="relu", y=y)
    assert_same_bits(masked.residual, np.where(y > 0, dy, np.float32(0)))
    assert backward(dy, x, mean, invstd, activation="relu", y=None).residual is None
    assert backward(dy, x, mean, invstd).residual is dy
    assert backward(dy, x, mean, invstd, y=y).residual is dy


def test_the_residual_may_be_the_input():
    x, dy = batch(1), gradient(1)
    layer, twin = make(activation="relu"), make(activation="relu")
    assert_same_bits(layer(x, residual=x), twin(x, residual=x.copy()))
    assert_same_bits(layer.backward(dy), twin.backward(dy))
    assert_same_bits(layer.residual_grad, twin.residual_grad)
    # And the gradient may be the input, or the output.
    y = layer(x)
    twin(x)
    assert_same_bits(layer.backward(y), twin.backward(y.copy()))
    layer(x)
    twin(x)
    assert_same_bits(layer.backward(x), twin.backward(x.copy()))


def test_without_parameters():
    layer = onepass.BatchNorm(CHANNELS, affine=False)
    assert layer.weight is layer.bias is layer.weight_grad is layer.bias_grad is None
    assert layer.parameters() == layer.gradients() == {}
    assert list(layer.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]
    full = onepass.BatchNorm(CHANNELS)
    x, dy = batch(1), gradient(1)
    assert_same_bits(layer(x), full(x))
    assert_same_bits(layer.backward(dy), full.backward(dy))
    assert_same_bits([layer.running_mean, layer.running_var], [full.running_mean, full.running_var])


# Outputs of the caller


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_outputs_of_the_caller(options, mode):
    layer, twin = make(**LAYERS[options]).train(mode), make(**LAYERS[options]).train(mode)
    y, dx = np.full(SHAPE, np.nan, np.float32), np.full(SHAPE, np.nan, np.float32)
    for t in range(2):
        x, r = batch(t), batch(10 + t)
        assert layer(x, residual=r, out=y) is y
        assert_same_bits(y, twin(x, residual=r))
        assert layer.backward(gradient(t), out=dx) is dx
        assert_same_bits(dx, twin.backward(gradient(t)))
        assert_same_bits(layer.residual_grad, twin.residual_grad)
        assert_same_layers(layer, twin)
    affine = copied([layer.weight, layer.bias])
    got, mean, invstd = functional.batch_norm(x, *affine, out=y)
    assert got is y
    assert functional.batch_norm_backward(gradient(), x, mean, invstd, *affine, out=dx).x is dx


def test_an_output_that_is_the_input():
    layer, twin = make(activation="relu").eval(), make(activation="relu").eval()
    for same in (lambda x: x, lambda x: x[...], Producer, lambda x: x.view(Marked)):
        x, r = batch(1), batch(2)
        want = twin(x, residual=r)
        given = same(x)
        assert layer(x, residual=r, out=given) is given
        assert_same_bits(x, want)
        with pytest.raises(RuntimeError, match=r"^backward: the last forward pass overwrote its input \(out=x\)"):
            layer.backward(gradient())
    # The next pass is as usual, and so is a training pass of the same call.
    assert_same_bits(layer(batch(3)), twin(batch(3)))
    assert_same_bits(layer.backward(gradient()), twin.backward(gradient()))
    x = batch(1)
    want = functional.batch_norm(
        batch(1), running_mean=layer.running_mean, running_var=layer.running_var, training=False
    )
    got = functional.batch_norm(
        x, running_mean=layer.running_mean, running_var=layer.running_var, training=False, out=x
    )
    assert got[0] is x
    assert_same_bits(list(got), list(want))
    with pytest.raises(ValueError, match=r"^out: overlaps x in memory"):
        layer(x, training=True, out=x)


def test_outputs_one_after_the_other_in_one_block():
    """Neighbours share no memory."""
    slab = np.full(6 * np.prod(SHAPE), np.nan, np.float32)
    x, r, y, dx, dy, other = slab.reshape(6, *SHAPE)
    x[...], r[...], dy[...] = batch(1), batch(2), gradient(1)
    layer, twin = make(activation="relu"), make(activation="relu")
    layer(x, residual=r, out=y)
    assert_same_bits(y, twin(batch(1), residual=batch(2)))
    layer.backward(dy, out=dx)
    assert_same_bits(dx, twin.backward(gradient(1)))
    assert np.isnan(other).all()
    assert_same_bits([x, r, dy], [batch(1), batch(2), gradient(1)])


# Which arrays


class Marked(np.ndarray):
    """A subclass that would betray NumPy's arithmetic, or a copy made by it."""

    def __array_ufunc__(self, *_args, **_kwargs):
        raise AssertionError("nobody asked for NumPy's arithmetic")

    def __array_finalize__(self, obj):
        self.made_from = obj


PRODUCERS = {
    "versioned": Producer,
    "old": OldProducer,
    "bare": BareProducer,
    "hand-made": HandMade,
    "hand-made-old": lambda a: HandMade(a, version=None),
    "without-strides": lambda a: HandMade(a, c_order=True),
    "pinned": lambda a: HandMade(a, device=(3, 0)),
    "subclass": lambda a: a.view(Marked),
    "recarray": lambda a: a.view(np.recarray),
    "view": lambda a: a[...],
}


@pytest.mark.parametrize("producer", PRODUCERS)
@every_dtype
def test_arrays_of_any_kind_in_every_place(producer, dtype):
    wrap = PRODUCERS[producer]
    names = ("x", "weight", "bias", "running_mean", "running_var", "residual")
    arrays = dict(zip(names, [batch(1, dtype), *(numbers(CHANNELS, dtype, seed=k) for k in range(4))], strict=False))
    arrays["residual"], arrays["running_var"] = batch(2, dtype), np.abs(arrays["running_var"])
    plain = copied(arrays)
    for training in (True, False):
        options = {"training": training, "activation": "relu"}
        y = np.full(SHAPE, np.nan, dtype)
        given = {name: wrap(value) for name, value in arrays.items()}
        out = wrap(y)
        before = copied(plain)
        want = functional.batch_norm(**plain, **options)
        got = functional.batch_norm(**given, **options, out=out)
        assert got[0] is out
        assert_same_bits([y, *got[1:]], list(want))
        assert_same_bits(arrays, plain)
        if training:
            for name in ("running_mean", "running_var"):
                assert_moved(before[name], plain[name])

        dy, dx = gradient(1, dtype), np.full(SHAPE, np.nan, dtype)
        mean, invstd = (wrap(value) for value in got[1:])
        affine = {name: plain[name] for name in ("weight", "bias")}
        want_grads = functional.batch_norm_backward(dy, plain["x"], *want[1:], **affine, **options, y=want[0])
        given_affine = {name: given[name] for name in affine}
        grads = functional.batch_norm_backward(
            wrap(dy), given["x"], mean, invstd, **given_affine, **options, y=wrap(y), out=wrap(dx)
        )
        assert_same_bits([dx, *grads[1:]], list(want_grads))
        assert type(grads.weight) is type(grads.bias) is type(grads.residual) is np.ndarray


@pytest.mark.parametrize("producer", PRODUCERS)
def test_arrays_of_any_kind_in_a_layer(producer):
    wrap = PRODUCERS[producer]
    layer, twin = make(activation="relu"), make(activation="relu")
    x, r, dy = batch(1), batch(2), gradient(1)
    y = layer(wrap(x), residual=wrap(r))
    assert type(y) is np.ndarray
    assert_same_bits(y, twin(x, residual=r))
    dx = layer.backward(wrap(dy))
    assert type(dx) is np.ndarray
    assert_same_bits(dx, twin.backward(dy))
    assert_same_bits(layer.residual_grad, twin.residual_grad)
    assert_same_layers(layer, twin)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is a test extra")
    layer, twin = make(activation="relu"), make(activation="relu")
    x, r, dy = (torch.from_numpy(array) for array in (batch(1), batch(2), gradient(1)))
    y, dx = torch.full(SHAPE, torch.nan), torch.full(SHAPE, torch.nan)
    assert layer(x, residual=r, out=y) is y
    assert_same_bits(y.numpy(), twin(batch(1), residual=batch(2)))
    assert layer.backward(dy, out=dx) is dx
    assert_same_bits(dx.numpy(), twin.backward(gradient(1)))
    assert_same_bits(layer.residual_grad, twin.residual_grad)
    assert_same_layers(layer, twin)
    assert type(layer(x)) is np.ndarray

    own = {name: torch.from_numpy(array.copy()) for name, array in make().state_dict().items() if "num" not in name}
    assert functional.batch_norm(x, **own, out=y)[0] is y
    want = make()
    assert_same_bits(y.numpy(), want(batch(1)))
    assert_same_bits(own["running_mean"].numpy(), want.running_mean)
    assert_same_bits(own["running_var"].numpy(), want.running_var)
    assert layer.eval()(x, out=x) is x
    assert (x.numpy() != batch(1)).all()


def test_torch_tensors_in_another_memory_format():
    """channels_last is not C-contiguous: as a permuted tensor it is."""
    torch = pytest.importorskip("torch", reason="torch is a test extra")
    x = torch.from_numpy(batch(1)).contiguous(memory_format=torch.channels_last)
    layer = make()
    with pytest.raises(ValueError, match=r"^x: strides .* pass np.ascontiguousarray\(x\)"):
        layer(x)
    last = make(channel_axis=-1)
    y = last(x.permute(0, 2, 3, 1))
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), layer(batch(1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"^x: Tensor.__dlpack__\(\) failed: "):
        layer(torch.from_numpy(batch(1)).requires_grad_())
    with pytest.raises(TypeError, match=r"^x: dtype torch.bfloat16 is not supported"):
        layer(torch.from_numpy(batch(1)).bfloat16())


@every_dtype
def test_axes_of_length_1_may_have_any_stride(dtype):
    values = batch(1, dtype, (6, 1, 4))
    item = values.itemsize
    odd = np.lib.stride_tricks.as_strided(values, (6, 1, 4), (4 * item, -3 * item, item))
    assert odd.strides != values.strides
    layer, twin = make(dtype, 1), make(dtype, 1)
    assert_same_bits(layer(odd), twin(values))
    assert_same_bits(layer.backward(gradient(1, dtype, (6, 1, 4))), twin.backward(gradient(1, dtype, (6, 1, 4))))


@every_dtype
def test_arrays_at_odd_addresses(dtype):
    """float64 mean and invstd too."""
    memory = np.full(1 << 16, 0xA5, np.uint8)
    place = iter(range(64, 1 << 16, 1 << 12))

    def moved(array, offset):
        start = next(place) + offset
        there = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        there[...] = array
        return there

    x, dy = batch(1, dtype), gradient(1, dtype)
    y, mean, invstd = functional.batch_norm(x)
    got, *statistics = functional.batch_norm(moved(x, 1), out=moved(np.zeros_like(x), 3))
    assert_same_bits([got, *statistics], [y, mean, invstd])
    grads = functional.batch_norm_backward(moved(dy, 5), moved(x, 7), moved(mean, 3), moved(invstd, 1))
    assert_same_bits(list(grads)[:3], list(functional.batch_norm_backward(dy, x, mean, invstd))[:3])


def test_read_only_inputs():
    x, r, dy = batch(1), batch(2), gradient(1)
    layer, twin = make(activation="relu"), make(activation="relu")
    for array in (x, r, dy, layer.weight, layer.bias):
        array.flags.writeable = False
    assert_same_bits(layer(x, residual=r), twin(x, residual=r))
    assert_same_bits(layer.backward(dy), twin.backward(dy))
    layer.running_mean.flags.writeable = layer.running_var.flags.writeable = False
    layer.eval()(x)


# Nothing


@every_dtype
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (4, 5, 0, 7), (0, 5, 0)])
def test_an_empty_batch(shape, mode, dtype):
    layer = make(dtype, activation="relu", momentum=None)
    layer(batch(1, dtype))
    layer.train(mode)
    before = state_of(layer)
    x = np.empty(shape, dtype)
    y = layer(x, residual=x)
    assert (y.shape, y.dtype) == (shape, x.dtype)
    assert state_of(layer) == before
    layer.weight_grad.fill(7)
    layer.bias_grad.fill(7)
    dx = layer.backward(np.empty(shape, dtype))
    assert dx.shape == shape
    assert layer.residual_grad.shape == shape
    assert not layer.weight_grad.any()
    assert not layer.bias_grad.any()
    out = np.empty(shape, dtype)
    assert layer(x, out=out) is out
    assert layer.backward(x, out=out) is out
    # What is tracked goes on where it was.
    twin = make(dtype, activation="relu", momentum=None)
    twin(batch(1, dtype))
    for each in (layer.train(), twin):
        each(batch(2, dtype))
    assert_same_bits([layer.running_mean, layer.running_var], [twin.running_mean, twin.running_var])
    assert layer.num_batches_tracked == 2


@every_dtype
def test_empty_batches_of_the_functions(dtype):
    running = [np.zeros(3, dtype), np.ones(3, dtype)]
    x = np.empty((0, 3), dtype)
    for training in (True, False):
        y, mean, invstd = functional.batch_norm(x, None, None, *running, training=training)
        assert y.shape == (0, 3)
        assert mean.shape == invstd.shape == (3,)
        assert np.isnan([mean, invstd]).all()
        grads = functional.batch_norm_backward(x, x, mean, invstd, training=training)
        assert grads.x.shape == (0, 3)
        assert_same_bits([grads.weight, grads.bias], [np.zeros(3, dtype)] * 2)
    assert_same_bits(running, [np.zeros(3, dtype), np.ones(3, dtype)])
    with pytest.raises(ValueError, match=r"^x: shape .* has 4 channels"):
        make(dtype, 3)(np.empty((0, 4), dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(4, 0), (1, 0), (4, 0, 3), (0, 0), (1, 0, 1)])
def test_no_channels(shape, dtype):
    x, none = np.empty(shape, dtype), np.empty(0, dtype)
    for training in (True, False):
        y, mean, invstd = functional.batch_norm(x, none, none, none.copy(), none.copy(), training=training)
        assert y.shape == shape
        assert mean.shape == invstd.shape == (0,)
        grads = functional.batch_norm_backward(x, x, mean, invstd, none, none, training=training)
        assert grads.x.shape == shape
        assert grads.weight.shape == grads.bias.shape == (0,)
    with pytest.raises(ValueError, match=r"^weight: shape \(3,\), expected \(0,\)"):
        functional.batch_norm(x, np.ones(3, dtype))


def test_one_value_for_each_channel():
    layer = make().eval()
    x = batch(1)[:1, :, 0, 0].copy()
    assert layer(x).shape == (1, 5)
    layer.backward(x)
    before = state_of(layer.train())
    with pytest.raises(ValueError, match=r"^x: shape \(1, 5\) has one value for each channel.*at least two$"):
        layer(x)
    assert state_of(layer) == before


def test_two_values_for_each_channel():
    for unbiased, var in ((True, 2.0), (False, 1.0)):
        layer = onepass.BatchNorm(1, momentum=1.0, unbiased=unbiased, dtype=np.float64)
        y = layer(np.array([[1.0], [3.0]]))
        np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-5)
        assert layer.running_mean == 2.0
        assert layer.running_var == var


def test_nan_and_infinity_show():
    x = batch(1)
    x[2, 1, 0, 0], x[3, 2, 1, 1] = np.nan, np.inf
    layer = make(activation="relu")
    y = layer(x)
    assert np.isnan(y[:, 1:3]).all()
    rest = np.delete(y, [1, 2], axis=1)
    assert np.isfinite(rest).all()
    assert np.isnan(layer.running_var[1:3]).all()
    dx = layer.backward(gradient())
    assert np.isnan(dx[:, 1:3]).all()
    assert np.isfinite(np.delete(dx, [1, 2], axis=1)).all()
    assert np.isnan(layer.weight_grad[1:3]).all()


def test_no_floating_point_error_of_numpy():
    with np.errstate(all="raise"):
        layer = make(eps=1e-30)
        x = batch(1)
        x[0, 0], x[:, 1], x[:, 2] = np.inf, 1e-40, 1e30
        layer(x)
        layer.backward(gradient())
        np.add(x, x)


# Saving


ARRAYS = ("weight", "bias", "running_mean", "running_var")


def trained(dtype=np.float32, steps=4, **options):
    layer = make(dtype, **options)
    opt = onepass.SGD(layer.parameters(), lr=0.05) if layer.parameters() else None
    for t in range(steps):
        layer(batch(t, dtype))
        layer.backward(gradient(t, dtype))
        if opt is not None:
            opt.step(layer.gradients())
    return layer


@pytest.mark.parametrize("options", LAYERS)
@every_dtype
def test_state_dict_round_trip(options, dtype):
    options = LAYERS[options]
    layer, other = trained(dtype, **options), onepass.BatchNorm(CHANNELS, dtype=dtype, **options)
    saved = layer.state_dict()
    assert list(saved) == [*(ARRAYS if options.get("affine", True) else ARRAYS[2:]), "num_batches_tracked"]
    assert saved["num_batches_tracked"] == 4
    assert type(saved["num_batches_tracked"]) is int
    kept = copy.deepcopy(saved)
    held = {name: getattr(other, name) for name in ARRAYS}
    other.load_state_dict(saved)
    assert all(getattr(other, name) is held[name] for name in ARRAYS)
    assert_same_bits(other.state_dict(), saved)
    assert other.num_batches_tracked == 4
    for mode in (True, False):
        for t in range(4, 7):
            assert_same_bits(layer.train(mode)(batch(t, dtype)), other.train(mode)(batch(t, dtype)))
            assert_same_bits(layer.backward(gradient(t, dtype)), other.backward(gradient(t, dtype)))
    assert_same_layers(layer, other)
    # Copies: what the layers did since is not in them.
    assert_same_bits(saved, kept)
    for name, array in saved.items():
        if name != "num_batches_tracked":
            assert type(array) is np.ndarray
            assert array.dtype == dtype
            assert not np.shares_memory(array, getattr(layer, name))
            assert not np.shares_memory(array, getattr(other, name))
            array.fill(7)
    assert_same_layers(layer, other)


def test_load_of_its_own_state_is_the_identity():
    layer = trained()
    before = state_of(layer)
    layer.load_state_dict(layer.state_dict())
    assert state_of(layer) == before
    assert all(before[name] != bits(array) for name, array in make().state_dict().items() if name in ARRAYS)


def test_a_state_of_the_layers_own_arrays():
    """Loading what shares memory with the layer: all is read before anything is written."""
    layer = trained()
    was = layer.state_dict()
    crossed = {"weight": layer.bias, "bias": layer.weight, "running_mean": layer.running_var}
    layer.load_state_dict({**was, **crossed, "running_var": layer.running_mean[::-1]})
    assert_same_bits(layer.weight, was["bias"])
    assert_same_bits(layer.bias, was["weight"])
    assert_same_bits(layer.running_mean, was["running_var"])
    assert_same_bits(layer.running_var, was["running_mean"][::-1].copy())


def test_options_are_not_part_of_the_state():
    layer = onepass.BatchNorm(CHANNELS, 1e-2, 0.5, activation="relu").eval()
    layer.load_state_dict(trained().state_dict())
    assert repr(layer).startswith("BatchNorm(5, eps=0.01, momentum=0.5,")
    assert layer.training is False


def test_states_from_files_and_other_kinds_of_arrays(tmp_path):
    layer = trained()
    saved = layer.state_dict()
    np.savez(tmp_path / "state.npz", **saved)
    with np.load(tmp_path / "state.npz") as file:
        loaded = {name: file[name] for name in file}
    loaded["num_batches_tracked"] = int(loaded["num_batches_tracked"])
    views = {name: saved[name].view(Marked) if name in ARRAYS else np.int64(saved[name]) for name in saved}
    frozen = {name: read_only(saved[name]) if name in ARRAYS else saved[name] for name in saved}
    strided = {name: np.repeat(saved[name], 2)[::2] if name in ARRAYS else saved[name] for name in saved}
    for given in (loaded, views, frozen, strided, dict(reversed(saved.items())), MappingProxyType(saved)):
        other = make()
        other.load_state_dict(given)
        assert_same_bits(other.state_dict(), saved)
        assert type(other.num_batches_tracked) is int


def read_only(array):
    return np.frombuffer(array.tobytes(), array.dtype)


def without(name):
    return lambda saved: saved.pop(name)


def changed(name, change):
    def edit(saved):
        saved[name] = change(saved[name]) if callable(change) else change

    return edit


BAD_ENTRIES = {
    **{f"no-{name}": (without(name), ValueError, f"state_dict: '{name}' is missing") for name in ARRAYS},
    "no-count": (without("num_batches_tracked"), ValueError, "state_dict: 'num_batches_tracked' is missing"),
    "unknown": (changed("momentum", 0.1), ValueError, "state_dict: 'momentum' is unknown"),
    "empty": (lambda saved: saved.clear(), ValueError, "state_dict: 'weight' is missing"),
    **{
        f"count-{value!r}": (
            changed("num_batches_tracked", value),
            error,
            f"num_batches_tracked: expected an integer from 0 to 2**62, got {value!r}",
        )
        for value, error in [
            (-1, ValueError),
            (2**62 + 1, ValueError),
            (2**70, ValueError),
            (np.int64(-3), ValueError),
            (1.0, TypeError),
            (True, TypeError),
            (np.True_, TypeError),
            (None, TypeError),
            ("4", TypeError),
            ([4], TypeError),
        ]
    },
    **{
        f"{name}-{defect}": (changed(name, change), error, f"{name}: {message}")
        for name in ARRAYS
        for defect, change, error, message in [
            ("list", lambda a: a.tolist(), TypeError, "expected a NumPy array, got list"),
            ("none", None, TypeError, "expected a NumPy array, got NoneType"),
            ("float", 1.0, TypeError, "expected a NumPy array, got float"),
            ("scalar", np.float32(1), TypeError, "expected a NumPy array, got float32"),
            ("producer", Producer, TypeError, "expected a NumPy array, got Producer"),
            ("masked", np.ma.masked_array, TypeError, "expected a NumPy array, got MaskedArray"),
            ("0-d", lambda a: a[:1].reshape(()), ValueError, "shape () does not match (5,)"),
            ("short", lambda a: a[:4], ValueError, "shape (4,) does not match (5,)"),
            ("one", lambda a: a[:1], ValueError, "shape (1,) does not match (5,)"),
            ("2-d", lambda a: a[None], ValueError, "shape (1, 5) does not match (5,)"),
            ("none-left", lambda a: a[:0], ValueError, "shape (0,) does not match (5,)"),
            ("float64", lambda a: a.astype(np.float64), TypeError, "dtype float64 does not match float32"),
            ("float16", lambda a: a.astype(np.float16), TypeError, "dtype float16 does not match float32"),
            ("integer", lambda a: a.astype(np.int32), TypeError, "dtype int32 does not match float32"),
            ("swapped", lambda a: a.astype(">f4"), TypeError, "dtype >f4 does not match float32"),
            ("object", lambda a: a.astype(object), TypeError, "dtype object does not match float32"),
        ]
    },
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_state_changes_nothing(case):
    edit, error, message = BAD_ENTRIES[case]
    layer, twin = trained(steps=2), trained(steps=2)
    for each in (layer, twin):
        each(batch(7))
    before, saved = state_of(layer), trained(steps=5).state_dict()
    edit(saved)
    with pytest.raises(error) as caught:
        layer.load_state_dict(saved)
    assert str(caught.value) == message
    assert state_of(layer) == before
    # It also goes on as if nothing had been.
    assert_same_bits(layer.backward(gradient(7)), twin.backward(gradient(7)))
    layer.load_state_dict(trained(steps=5).state_dict())
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("wrong", [None, [], 3, "weight", np.zeros(5)], ids=lambda value: type(value).__name__)
def test_no_state_dict(wrong):
    layer = trained()
    before = state_of(layer)
    with pytest.raises(TypeError, match=r"^state_dict: expected a dict, got "):
        layer.load_state_dict(wrong)
    assert state_of(layer) == before


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: make(affine=False), ValueError, "^state_dict: 'weight' is missing$"),
        (lambda: make(channels=4), ValueError, r"^weight: shape \(4,\) does not match \(5,\)$"),
        (lambda: make(np.float64), TypeError, "^weight: dtype float64 does not match float32$"),
        (lambda: onepass.Adam(np.zeros(5)), ValueError, "^state_dict: 'weight' is missing$"),
    ],
    ids=["bare", "narrow", "float64", "optimizer"],
)
def test_the_state_of_another_layer(other, error, message):
    layer = trained()
    before = state_of(layer)
    with pytest.raises(error, match=message):
        layer.load_state_dict(other().state_dict())
    assert state_of(layer) == before


def test_the_state_of_a_layer_with_parameters_for_one_without():
    layer = make(affine=False)
    with pytest.raises(ValueError, match=r"^state_dict: 'weight' is unknown$"):
        layer.load_state_dict(make().state_dict())


@pytest.mark.parametrize("name", ARRAYS)
def test_a_state_for_arrays_that_are_read_only(name):
    layer = trained()
    before = state_of(layer)
    getattr(layer, name).flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name}: the array that it would be copied into has been made read-only$"):
        layer.load_state_dict(trained(steps=5).state_dict())
    assert state_of(layer) == before


@pytest.mark.parametrize("how", ["copy", "deepcopy", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
@pytest.mark.parametrize("options", LAYERS)
def test_pickle_and_deepcopy(options, how):
    layer = trained(**LAYERS[options])
    layer.momentum = layer.momentum and 0.5
    layer.eval()
    layer(batch(8), residual=batch(9))
    again = getattr(copy, how)(layer) if isinstance(how, str) else pickle.loads(pickle.dumps(layer, how))
    assert_same_layers(again, layer)
    assert repr(again) == repr(layer)
    for name in (*ARRAYS, "weight_grad", "bias_grad"):
        one, other = getattr(layer, name), getattr(again, name)
        assert (one is None) == (other is None)
        assert one is None or not np.shares_memory(one, other)
    # A copy has no pass to go back through; the original still has.
    with pytest.raises(RuntimeError, match=r"^backward: there was no forward pass"):
        again.backward(gradient(8))
    assert again.residual_grad is None
    layer.backward(gradient(8))
    for mode in (True, False):
        y, dx = layer.train(mode)(batch(4)), layer.backward(gradient(4))
        assert_same_bits(again.train(mode)(batch(4)), y)
        assert_same_bits(again.backward(gradient(4)), dx)
    assert_same_layers(again, layer)


def test_a_copy_in_the_middle_of_a_pass_is_small():
    """It takes no activations along."""
    layer = make()
    layer(batch(1))
    layer.backward(gradient(1))
    small = len(pickle.dumps(layer))
    layer(np.zeros((1000, CHANNELS, 7), np.float32), residual=np.zeros((1000, CHANNELS, 7), np.float32))
    assert len(pickle.dumps(layer)) <= small
    layer.backward(np.zeros((1000, CHANNELS, 7), np.float32))
    assert len(pickle.dumps(layer)) <= small


def test_a_model_is_copied_as_a_whole():
    layer = trained()
    model = {"layer": layer, "params": layer.parameters(), "grads": layer.gradients()}
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again["layer"].weight is again["params"]["weight"]
        assert again["layer"].bias_grad is again["grads"]["bias"]
        assert again["layer"].weight is not layer.weight


@pytest.mark.parametrize("options", LAYERS)
@every_dtype
def test_repr_makes_the_same_layer(options, dtype):
    layer = make(dtype, channel_axis=-1, **LAYERS[options])
    names = {"BatchNorm": onepass.BatchNorm, "float32": np.float32, "float64": np.float64}
    again = eval(repr(layer), names)
    assert repr(again) == repr(layer)
    again.load_state_dict(layer.state_dict())
    x, dy = batch(1, dtype, (6, 4, 3, 5)), gradient(1, dtype, (6, 4, 3, 5))
    assert_same_bits(again(x), layer(x))
    assert_same_bits(again.backward(dy), layer.backward(dy))


def test_repr():
    assert repr(onepass.BatchNorm(np.int64(64), np.float32(0.5), None, activation="relu")) == (
        "BatchNorm(64, eps=0.5, momentum=None, channel_axis=1, affine=True, activation='relu', unbiased=True, "
        "dtype=float32)"
    )
    layer = onepass.BatchNorm(2, dtype="f8")
    layer.momentum = np.float64(0.25)
    assert "momentum=0.25" in repr(layer)
    assert repr(layer).endswith("dtype=float64)")


@pytest.mark.parametrize("dtype", ["float64", "f8", "d", float, np.float64, np.dtype("f8"), np.dtype("=f8")], ids=repr)
def test_spellings_of_a_dtype(dtype):
    layer = onepass.BatchNorm(3, dtype=dtype)
    assert layer.weight.dtype == layer.running_var.dtype == layer.bias_grad.dtype == np.float64
    assert layer(batch(1, np.float64, (4, 3))).dtype == np.float64


def test_statistics_for_inference_by_hand():
    """A layer from elsewhere: its arrays are copied in, and the count need not be known."""
    layer, twin = trained(), make()
    for name in ARRAYS:
        getattr(twin, name)[...] = getattr(layer, name)
    assert_same_bits(twin.eval()(batch(1)), layer.eval()(batch(1)))


# What it holds


def test_the_input_is_kept_until_the_backward_pass_and_no_longer():
    for mode, activation in itertools.product((True, False), (None, "relu")):
        layer = make(activation=activation).train(mode)
        x, dy = batch(1), gradient(1)
        y = weakref.ref(layer(x))
        assert y() is None  # the output is not needed
        kept, given = weakref.ref(x), weakref.ref(dy)
        del x
        assert kept() is not None
        layer.backward(dy)
        del dy
        assert kept() is None
        assert given() is None


def test_the_next_pass_replaces_the_input():
    layer = make(activation="relu")
    x, r = batch(1), batch(2)
    y = layer(x, residual=r)
    kept = [weakref.ref(array) for array in (x, y)]
    residual = weakref.ref(r)
    del x, y, r
    assert all(ref() is not None for ref in kept)  # the output decides the mask
    assert residual() is None
    layer(batch(3))
    assert all(ref() is None for ref in kept)


def test_an_output_that_is_the_input_is_not_kept():
    layer = make().eval()
    x = batch(1)
    layer(x, out=x)
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_a_failed_call_keeps_nothing():
    layer = make()
    layer(batch(1))
    for call in (layer, layer.backward):
        bad = batch(1)[:, :4].copy()
        kept = weakref.ref(bad)
        with contextlib.suppress(ValueError):
            call(bad)
        del bad
        gc.collect()
        assert kept() is None
    layer.backward(gradient(1))


def test_a_layer_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        layer = make(activation="relu")
        layer(batch(1), residual=batch(2))
        layer.backward(gradient(1))
        layer(batch(1), residual=batch(2))
        alive = weakref.ref(layer)
        weight = weakref.ref(layer.weight)
        del layer
        assert alive() is None
        assert weight() is None
    finally:
        gc.enable()


def test_capsules_are_let_go_of():
    class Counted(np.ndarray):
        pass

    layer = make()
    x, dy = batch(1).view(Counted), gradient(1).view(Counted)
    counts = sys.getrefcount(x), sys.getrefcount(dy)
    for _ in range(3):
        layer(BareProducer(x))
        with pytest.raises(ValueError, match=r"^dy: shape"):
            layer.backward(BareProducer(dy[:2]))
        layer.backward(BareProducer(dy))
        assert (sys.getrefcount(x), sys.getrefcount(dy)) == counts


# Threads

LARGE = (64, 40, 28, 28)  # 8 MB: divided among threads, without the interpreter lock


@pytest.mark.parametrize("shape", [(6, 40, 3), (16, 40, 28, 28)], ids=str)
def test_two_threads_in_two_layers_at_once(shape):
    _cpu.set_serial_bytes(0)
    onepass.set_num_threads(2)
    rounds = 200 if len(shape) == 3 else 8
    x, dy = [batch(t, shape=shape) for t in range(2)], [gradient(t, shape=shape) for t in range(2)]
    layers, twins = ([make(channels=40, activation=a) for a in (None, "relu")] for _ in range(2))

    def train(layer, k, found):
        def body():
            for t in range(rounds):
                y = layer(x[t % 2], residual=x[k])
                found.append((hash(y.tobytes()), hash(layer.backward(dy[k]).tobytes())))
                layer.weight[...] -= np.float32(1e-3) * np.sign(layer.weight_grad)

        return body

    expected, got = ([], []), ([], [])
    for k, twin in enumerate(twins):
        train(twin, k, expected[k])()
    run_all(*(train(layer, k, got[k]) for k, layer in enumerate(layers)))
    assert got == expected
    for layer, twin in zip(layers, twins, strict=True):
        assert layer.num_batches_tracked == rounds
        assert_same_layers(layer, twin)


def test_one_layer_from_several_threads_is_never_corrupted():
    """Each call is turned away or done as a whole; with one batch only the number of updates counts."""
    onepass.set_num_threads(2)
    shape = (16, 40, 28, 28)
    layer, twin = make(channels=40), make(channels=40)
    x = batch(1, shape=shape)
    want, done, turned_away = make(channels=40)(x).tobytes(), [], []

    def try_once():
        try:
            done.append(layer(x).tobytes() == want)
        except RuntimeError as error:
            turned_away.append(str(error))

    def body():
        for _ in range(15):
            try_once()

    run_all(body, body, body)
    assert len(done) + len(turned_away) == 45
    assert all(done)
    assert set(turned_away) <= {"this layer is in the middle of a pass; nothing was done"}
    assert layer.num_batches_tracked == len(done) > 0
    for _ in done:
        twin(x)
    assert_same_layers(layer, twin)


class Gate:
    """An array whose export waits, so that a call stands still in its middle."""

    def __init__(self, array):
        self.array = array
        self.entered, self.leave = threading.Event(), threading.Event()

    def __dlpack__(self, **options):
        self.entered.set()
        assert self.leave.wait(30)
        return self.array.__dlpack__(**options)


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_a_second_thread_in_the_middle_of_a_pass_is_turned_away(call):
    layer, twin = trained(), trained()
    saved = layer.state_dict()
    if call == "backward":
        assert_same_bits(layer(batch(5)), twin(batch(5)))
    gate, result = Gate(batch(6)), []
    thread = threading.Thread(target=lambda: result.append(getattr(layer, call)(gate)))
    thread.start()
    assert gate.entered.wait(30)
    held = {name: bits(getattr(layer, name)) for name in (*ARRAYS, "weight_grad", "bias_grad")}
    for intrude in (
        lambda: layer(batch(1)),
        lambda: layer.forward(batch(1), training=False),
        lambda: layer.backward(gradient(1)),
        lambda: layer.load_state_dict(saved),
        layer.state_dict,
        layer.reset_running_stats,
    ):
        with pytest.raises(RuntimeError, match=r"^this layer is in the middle of a pass; nothing was done$"):
            intrude()
    assert {name: bits(getattr(layer, name)) for name in held} == held
    gate.leave.set()
    thread.join(30)
    assert_same_bits(result[0], getattr(twin, call)(batch(6)))
    assert_same_layers(layer, twin)
    layer(batch(1))
    layer.backward(gradient(1))


def test_an_array_that_calls_the_layer_it_is_given_to():
    layer, caught = make(), []

    class Nested(BareProducer):
        def __dlpack__(self, **options):
            with pytest.raises(RuntimeError, match=r"nothing was done$"):
                layer(batch(2))
            caught.append(True)
            return super().__dlpack__(**options)

    assert_same_bits(layer(Nested(batch(1))), make()(batch(1)))
    assert caught == [True]
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_a_call_that_is_broken_off_leaves_the_layer_usable(error):
    class Broken:
        def __dlpack__(self, **_options):
            raise error("now")

    layer, twin = trained(), trained()
    for each in (layer, twin):
        each(batch(5))
    before = state_of(layer)
    for call in (layer, layer.backward):
        with pytest.raises(TypeError if error is ValueError else error, match="now"):
            call(Broken())
        assert state_of(layer) == before
    assert_same_bits(layer.backward(gradient(5)), twin.backward(gradient(5)))
    assert_same_bits(layer(batch(6)), twin(batch(6)))


def test_passes_let_other_threads_run():
    """Switching by time is turned off: another thread counts only while a pass has given up the interpreter lock."""
    onepass.set_num_threads(1)
    layer, x = make(channels=40), batch(1, shape=LARGE)
    layer.eval()
    out = np.empty_like(x)
    count, stop = [0], threading.Event()
    ready = threading.Event()

    def counting():
        ready.set()
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # gives the lock back at once

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=counting, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        sys.setswitchinterval(1000)
        released = []
        for call in (lambda: layer(x, out=out), lambda: layer.backward(x, out=out)):
            for _ in range(200):
                layer(x, out=out)
                start = count[0]
                call()
                if count[0] != start:
                    released.append(True)
                    break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join(30)
    assert released == [True, True]


# Processes

posix = pytest.mark.skipif(sys.platform == "win32", reason="fork")

PRELUDE = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore")  # threads and fork
import numpy as np
import onepass

SHAPE = (32, 24, 28, 28)
X = np.sin(np.arange(np.prod(SHAPE), dtype=np.float32)).reshape(SHAPE)
DY = np.cos(np.arange(np.prod(SHAPE), dtype=np.float32)).reshape(SHAPE)

def passes(bn):
    y = bn(X, residual=DY)
    dx = bn.backward(DY)
    return [a.tobytes() for a in (y, dx, bn.residual_grad, bn.weight_grad, bn.bias_grad, bn.running_mean)]

def in_child(body):
    # The exit code of a forked child that runs `body`; a child that hangs is killed by its alarm.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            body()
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

onepass.set_num_threads(2)
def new():
    return onepass.BatchNorm(24, activation="relu")
other = new()
goal = [passes(other), passes(other)]
assert goal[0] != goal[1]
"""


def python(code):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONEPASS_")}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=clean, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@posix
def test_a_forked_child_goes_on():
    python(
        """
bn = new()
assert passes(bn) == goal[0]

def go_on():
    assert passes(bn) == goal[1], "the inherited layer"
    assert passes(new()) == goal[0], "a new one"

def twice():
    go_on()
    assert in_child(lambda: passes(new())) == 0

assert in_child(twice) == 0
assert passes(bn) == goal[1], "the parent"

# Between the passes of one batch.
bn = new()
bn(X, residual=DY)
def finish():
    dx = bn.backward(DY)
    assert dx.tobytes() == goal[0][1]
assert in_child(finish) == 0
finish()
"""
    )


@posix
def test_a_child_forked_while_another_thread_is_in_another_layer():
    python(
        """
stop = threading.Event()

def train():
    busy = new()
    while not stop.is_set():
        passes(busy)

thread = threading.Thread(target=train)
thread.start()
bn = new()
passes(bn)

def go_on():
    assert passes(bn) == goal[1]
    assert passes(new()) == goal[0]

codes = [in_child(go_on) for _ in range(6)]
stop.set()
thread.join()
assert codes == [0] * 6, codes
assert passes(bn) == goal[1]
"""
    )


@posix
def test_a_process_exits_while_a_daemon_thread_is_in_a_pass():
    done = python(
        """
started = threading.Event()

def train():
    busy = new()
    while True:
        passes(busy)
        started.set()

threading.Thread(target=train, daemon=True).start()
assert started.wait(30)
print("last words", flush=True)
"""
    )
    assert done.stdout == "last words\n"


# What a hostile caller found


def test_parameters_that_change_while_the_input_is_read():
    """An array's own export may do what it likes: both passes still use the same parameters."""

    class Meddler:
        def __init__(self, array, meddle):
            self.array, self.meddle = array, meddle

        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            self.meddle()
            return self.array.__dlpack__(**options)

    x, dy = batch(), gradient()
    layer, twin = onepass.BatchNorm(CHANNELS), onepass.BatchNorm(CHANNELS)
    twin.weight.fill(5)
    y = layer(Meddler(x, lambda: layer.weight.fill(5)))
    assert_same_bits(y, twin(x))
    assert_same_bits(layer.backward(dy), twin.backward(dy))


def test_a_subclass_that_overrides_forward_is_called():
    class Louder(onepass.BatchNorm):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    x = batch()
    assert_same_bits(Louder(CHANNELS)(x), 2 * onepass.BatchNorm(CHANNELS)(x))


def test_the_count_of_batches_stays_loadable():
    layer = onepass.BatchNorm(CHANNELS)
    layer.load_state_dict({**layer.state_dict(), "num_batches_tracked": 2**62})
    layer(batch())
    assert layer.num_batches_tracked == 2**62
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_what_has_no_weight_is_left_out(momentum):
    layer = onepass.BatchNorm(CHANNELS, momentum=momentum)
    x = batch()
    x[0, 0] = np.inf
    layer.running_mean[1] = np.inf
    layer(x)
    assert np.isfinite(layer.running_mean[0]) == (momentum == 0.0)
    assert np.isfinite(layer.running_mean[1]) == (momentum == 1.0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_an_interrupt_never_leaves_a_layer_locked():
    class InterruptError(Exception):
        pass

    def interrupt(number, frame):
        raise InterruptError

    x, dy, layer = batch(), gradient(), onepass.BatchNorm(CHANNELS)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for k in range(3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 20e-6 + k % 100 * 1e-6)
                while True:
                    layer.forward(x)
                    layer.backward(dy)
            except InterruptError:
                pass
            batches = layer.num_batches_tracked
            layer.forward(x)
            assert layer.num_batches_tracked == batches + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

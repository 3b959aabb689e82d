"""Batch normalization on a CUDA device: the CPU's bits where no sum is in between, and sums within a bound.

Where CuPy is the stand-in of tests/cuda_on_host, kernels run on the host, and what it counts is tested as well.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle

import numpy as np
import pytest

import onepass
from helpers import assert_same_bits, bits
from onepass import _cpu, functional
from reference import batchnorm as reference
from reference.flushed import Flushed, maximum, zero

cupy = pytest.importorskip("cupy", reason="needs CuPy")
ml_dtypes = pytest.importorskip("ml_dtypes")

ON_HOST = "ONEPASS_CUDA_ON_HOST" in os.environ
if ON_HOST:
    from cupy._host import library


def _devices():
    try:
        return len(_cpu.cuda_devices())
    except RuntimeError as error:
        return str(error)


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_devices() == 0, reason="this build has no CUDA kernels, or there is no CUDA device"),
    pytest.mark.skipif(isinstance(_devices(), str), reason=f"CUDA cannot be used: {_devices()}"),
]
two_devices = pytest.mark.skipif(_devices() == 1, reason="needs two CUDA devices")
on_host = pytest.mark.skipif(not ON_HOST, reason="asks the runtime that runs CUDA on the host")

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_compute_type = pytest.mark.parametrize("dtype", [np.float32, np.float64])

# (shape, channel axis). Runs of whole vectors, of half ones, and of single elements; one channel; columns; one element
# more or less than what a warp, a batch of vectors or a tile takes.
SHAPES = [
    ((2, 3), 1),
    ((64, 32), 1),
    ((129, 40), 1),
    ((1100, 7), 1),
    ((2, 1), 1),
    ((2, 1, 33), 1),
    ((4, 3, 5, 7), 1),
    ((8, 8, 4, 4), 1),
    ((9, 6, 14, 14), 1),
    ((16, 20, 7, 7), 1),
    ((3, 2, 40, 60), 1),
    ((1, 3, 8209), 1),
    ((1, 2, 8192), 1),
    ((3, 5, 6, 64), 3),
    ((30, 33, 12), -1),
    ((5, 4, 6), 0),
]
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)

# What a call may use of a device: (bytes of shared memory, blocks of a cluster).
WAYS = {"resident": (None, None), "one-block": (None, 1), "clusters": (50_000, 8), "streaming": (0, 1)}

OPTIONS = {
    "plain": {},
    "relu": {"relu": True},
    "residual": {"residual": True},
    "residual-relu": {"residual": True, "relu": True},
    "bare": {"affine": False},
    "bare-residual-relu": {"affine": False, "residual": True, "relu": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def _whole_device():
    yield
    _cpu.set_batch_norm_limits(None, None)
    if ON_HOST:
        library.onepass_host_reset()
        library.onepass_host_verify()


def compute_type(dtype):
    return np.float64 if dtype == np.float64 else np.float32


class Batch:
    """Arrays of one call, on the host."""

    def __init__(self, shape, axis, dtype, *, relu=False, residual=False, affine=True, mean=0.5, seed=0):
        rng = np.random.default_rng(seed)
        self.axis, self.relu, self.compute = axis % len(shape), relu, compute_type(dtype)
        channels = shape[self.axis]
        self.x = (2.0 * rng.standard_normal(shape) + mean).astype(dtype)
        self.dy = rng.standard_normal(shape).astype(dtype)
        self.weight = rng.uniform(0.5, 2.0, channels).astype(self.compute) if affine else None
        self.bias = rng.standard_normal(channels).astype(self.compute) if affine else None
        self.running_mean = rng.standard_normal(channels).astype(self.compute)
        self.running_var = rng.uniform(0.5, 2.0, channels).astype(self.compute)
        self.residual = rng.standard_normal(shape).astype(dtype) if residual else None
        self.axes = tuple(k for k in range(len(shape)) if k != self.axis)
        self.n = self.x.size // channels
        self.activation = "relu" if relu else None

    def forward(self, put=None, *, training=True, **options):
        """(y, mean, invstd, running_mean, running_var) from the device, or without `put` from the host."""
        put = put or (lambda array: array)
        given = [
            None if array is None else put(array.copy())
            for array in (self.x, self.weight, self.bias, self.running_mean, self.running_var, self.residual)
        ]
        results = functional.batch_norm(
            *given[:5],
            residual=given[5],
            training=training,
            channel_axis=self.axis,
            activation=self.activation,
            **options,
        )
        return [to_host(array) for array in (*results, given[3], given[4])]

    def backward(self, mean, invstd, y, put=None, *, training=True):
        """(x, weight, bias, residual) of the gradients, on the host."""
        put = put or (lambda array: array)
        given = [
            None if array is None else put(array.copy())
            for array in (self.dy, self.x, mean, invstd, self.weight, self.bias)
        ]
        more = {"y": None if self.residual is None else put(y.copy())} if self.relu else {}
        grads = functional.batch_norm_backward(
            *given, training=training, channel_axis=self.axis, activation=self.activation, **more
        )
        return [None if grad is None else to_host(grad) for grad in grads]

    def wide(self, per_channel):
        return np.expand_dims(per_channel, self.axes)

    def canonical(self, array):
        return array.reshape(reference.canonical(self.x.shape, self.axis))

    def mapped(self, mean, invstd):
        """What the CPU computes from these statistics, to the last bit, rounded once to the dtype."""
        normalization = reference.Normalization(
            reference.double(mean), reference.double(invstd), self.weight, self.bias, self.compute
        )
        y = normalization(Flushed(self.canonical(self.x).astype(self.compute), self.compute))
        if self.residual is not None:
            y = y + Flushed(self.canonical(self.residual).astype(self.compute), self.compute)
        if self.relu:
            y = maximum(zero(y), y)
        return y.value.astype(self.x.dtype).reshape(self.x.shape)

    def exact(self):
        """Mean and variance, in numbers of 64 bits or more."""
        x = self.x.astype(np.longdouble)
        return x.mean(self.axes), x.var(self.axes)


def to_host(array):
    return array if isinstance(array, np.ndarray) else cupy.asnumpy(array)


def put(array):
    return cupy.asarray(array)


def put_askew(array):
    """At an address that is aligned to one item alone."""
    room = cupy.empty(array.size + 1, array.dtype)
    view = room[1:].reshape(array.shape)
    view[...] = cupy.asarray(array)
    return view


def limit(way):
    _cpu.set_batch_norm_limits(*WAYS[way])


def assert_identical(actual, desired):
    """All bits, NaN included."""
    for a, d in zip(actual, desired, strict=True):
        assert (a is None) == (d is None)
        assert a is None or bits(a) == bits(d)


# Bits


@every_shape
@every_dtype
@every_option
def test_all_ways_have_the_same_bits(shape, axis, dtype, options):
    batch = Batch(shape, axis, dtype, **options)
    results = []
    for way, place in [*itertools.product(WAYS, [put]), ("resident", put_askew)]:
        limit(way)
        forward = batch.forward(place)
        results.append([*forward, *batch.backward(forward[1], forward[2], forward[0], place)])
    assert all(np.isfinite(array.astype(np.float64)).all() for array in results[0] if array is not None)
    for other in results[1:]:
        assert_identical(other, results[0])


@pytest.mark.parametrize(("shape", "axis"), [((1, 257, 4200), 1), ((1, 257, 4111), 1), ((33_000, 17), 1)], ids=str)
def test_deep_tiles(shape, axis):
    """Large batches: a thread takes more vectors of a tile than it loads at a time."""
    batch = Batch(shape, axis, np.float32, relu=True, mean=100.0)
    results = []
    for way in ("resident", "streaming"):
        limit(way)
        forward = batch.forward(put)
        results.append([*forward, *batch.backward(forward[1], forward[2], None, put)])
    assert_identical(*results)
    y, mean, invstd = results[0][:3]
    assert bits(y) == bits(batch.mapped(mean, invstd))
    exact_mean, exact_var = batch.exact()
    np.testing.assert_allclose(mean, exact_mean.astype(float), rtol=1e-8)
    np.testing.assert_allclose(invstd**-2.0 - 1e-5, exact_var.astype(float), rtol=1e-6)
    g = np.where(y > 0, batch.dy, 0).astype(float)
    xhat = (batch.x - batch.wide(mean)) * batch.wide(invstd)
    np.testing.assert_allclose(results[0][6], (g * xhat).sum(batch.axes), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(results[0][7], g.sum(batch.axes), rtol=1e-5, atol=1e-3)


@every_shape
@every_dtype
@every_option
def test_the_map_has_the_bits_of_the_cpu(shape, axis, dtype, options):
    batch = Batch(shape, axis, dtype, **options)
    y, mean, invstd, *_ = batch.forward(put)
    assert bits(y) == bits(batch.mapped(mean, invstd))


@every_shape
@every_compute_type
@every_option
def test_inference_has_the_bits_of_the_cpu(shape, axis, dtype, options):
    batch = Batch(shape, axis, dtype, **options)
    expected = batch.forward(training=False)
    y, mean, invstd = expected[:3]
    grads = batch.backward(mean, invstd, y, training=False)
    for place in (put, put_askew):
        assert_same_bits(batch.forward(place, training=False), expected)
        actual = batch.backward(mean, invstd, y, place, training=False)
        assert_identical([actual[0], actual[3]], [grads[0], grads[3]])
        for k in (1, 2):
            np.testing.assert_allclose(actual[k], grads[k], rtol=0, atol=sum_bound(batch))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@every_option
def test_inference_of_narrow_types_rounds_once(dtype, options):
    for shape, axis in (((9, 6, 14, 14), 1), ((30, 33, 12), -1), ((16, 20, 7, 7), 1)):
        batch = Batch(shape, axis, dtype, **options)
        y, mean, invstd, *_ = batch.forward(put, training=False)
        assert_same_bits(mean, batch.running_mean.astype(np.float64))
        assert bits(y) == bits(batch.mapped(mean, invstd))
        wide = copy.copy(batch)  # float32 gradients of the same numbers
        for name in ("x", "dy", "residual"):
            value = getattr(batch, name)
            setattr(wide, name, None if value is None else value.astype(np.float32))
        dx, _, _, dresidual = wide.backward(mean, invstd, y.astype(np.float32), training=False)
        actual = batch.backward(mean, invstd, y, put, training=False)
        assert bits(actual[0]) == bits(dx.astype(dtype))
        if dresidual is not None:
            assert bits(actual[3]) == bits(dresidual.astype(dtype))


@every_shape
@every_dtype
@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_sum_exactly_have_the_bits_of_the_cpu(shape, axis, dtype, way):
    """Sums of small integers are exact in any order, so all that follows from them is the CPU's."""
    batch = Batch(shape, axis, dtype, relu=True)
    rng = np.random.default_rng(1)
    batch.x = rng.integers(-4, 5, shape).astype(dtype)
    batch.dy = rng.integers(-4, 5, shape).astype(dtype)
    channels = batch.x.shape[batch.axis]
    mean = rng.integers(-1, 2, channels).astype(np.float64)
    invstd = rng.uniform(0.5, 2.0, channels)
    wide = copy.copy(batch)
    wide.x, wide.dy = batch.x.astype(batch.compute), batch.dy.astype(batch.compute)
    expected = wide.backward(mean, invstd, None)
    limit(way)
    actual = batch.backward(mean, invstd, None, put)
    assert_same_bits(actual[1:3], expected[1:3])
    assert bits(actual[0]) == bits(expected[0].astype(dtype))


# Sums


def sum_bound(batch):
    """A sum of n terms of about 1: a thread adds 128 of them at most in the compute type, the rest is float64."""
    return 131 * np.finfo(batch.compute).eps * batch.n


@every_shape
@every_dtype
@pytest.mark.parametrize("mean", [0.5, 1000.0])
def test_statistics_are_within_the_bound(shape, axis, dtype, mean):
    """With K = 128 terms added in the compute type, of roundoff u: the variance to 126 (K + 3) u of itself, the mean to
    6 (K + 1) u deviations; in float64 both to another 4 n u for the pivot."""
    batch = Batch(shape, axis, dtype, mean=mean)
    exact_mean, exact_var = batch.exact()
    _, actual, invstd, running_mean, running_var = batch.forward(put, momentum=1.0, unbiased=False)
    u = np.finfo(batch.compute).eps / 2
    bound = (6 * 129 * u + 4 * batch.n * 2.0**-53) * np.sqrt(exact_var) + np.abs(exact_mean) * 2.0**-52
    assert (np.abs(actual - exact_mean) <= bound).all()
    var = exact_var + 1e-5
    assert (np.abs(invstd**-2.0 - var) <= (126 * 131 * u + 4 * batch.n * 2.0**-53) * var).all()
    # What is seen is much less, and that is the CPU's accuracy.
    assert (np.abs(invstd**-2.0 - var) <= 24 * u * var).all()
    assert_same_bits(running_mean, actual.astype(batch.compute))
    np.testing.assert_allclose(running_var, invstd**-2.0 - 1e-5, rtol=4 * u + 1e-13, atol=1e-17)


def test_a_first_value_far_from_all_others_costs_little():
    """The pivot of all sums is a channel's first value, and the center of a thread's sums is the mean of its first."""
    for shape, axis in (((8, 3, 64, 64), 1), ((64, 512, 12), 2)):
        batch = Batch(shape, axis, np.float32)
        batch.x = np.moveaxis(batch.x, batch.axis, 0).copy()
        batch.x.reshape(shape[axis], -1)[:, 0] = 1e6
        batch.x = np.ascontiguousarray(np.moveaxis(batch.x, 0, batch.axis))
        exact_mean, exact_var = batch.exact()
        _, mean, invstd, *_ = batch.forward(put)
        np.testing.assert_allclose(mean, exact_mean.astype(float), rtol=1e-6)
        np.testing.assert_allclose(invstd**-2.0, exact_var.astype(float), rtol=1e-6)


@every_shape
@every_dtype
@every_option
def test_gradients_are_those_of_the_textbook(shape, axis, dtype, options):
    batch = Batch(shape, axis, dtype, **options)
    y, mean, invstd, *_ = batch.forward(put)
    dx, dweight, dbias, dresidual = batch.backward(mean, invstd, y, put)
    xhat = (batch.x.astype(np.float64) - batch.wide(mean)) * batch.wide(invstd)
    g = batch.dy.astype(np.float64)
    if batch.relu:
        inner = batch.mapped(mean, invstd) if batch.residual is None else y
        g = np.where(inner.astype(np.float64) > 0, g, 0.0)
    eps = np.finfo(batch.compute).eps
    np.testing.assert_allclose(dbias, g.sum(batch.axes), rtol=1e-5, atol=16 * eps * np.sqrt(batch.n))
    np.testing.assert_allclose(dweight, (g * xhat).sum(batch.axes), rtol=1e-5, atol=32 * eps * np.sqrt(batch.n))
    weight = 1.0 if batch.weight is None else batch.wide(batch.weight.astype(np.float64))
    means = [v.mean(batch.axes, keepdims=True) for v in (g, g * xhat)]
    expected = (g - means[0] - xhat * means[1]) * weight * batch.wide(invstd)
    error = ml_dtypes.finfo(dtype).eps
    scale = np.abs(weight * batch.wide(invstd)) * (1 + np.abs(expected))
    assert (np.abs(dx.astype(np.float64) - expected) <= 16 * max(float(error), eps) * scale).all()
    if batch.relu and batch.residual is not None:
        assert bits(dresidual) == bits(g.astype(dtype))


# Running statistics


@every_compute_type
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("way", ["resident", "clusters", "streaming"])
def test_running_statistics(dtype, momentum, unbiased, way):
    limit(way)
    batch = Batch((9, 6, 14, 14), 1, dtype)
    _, mean, invstd, running_mean, running_var = batch.forward(put, momentum=momentum, unbiased=unbiased)
    var = (invstd**-2.0 - 1e-5) * (batch.n / (batch.n - 1) if unbiased else 1.0)
    for actual, before, now in ((running_mean, batch.running_mean, mean), (running_var, batch.running_var, var)):
        expected = (1 - momentum) * before.astype(float) + momentum * now
        np.testing.assert_allclose(actual, expected, rtol=2 * np.finfo(dtype).eps)
        assert actual.dtype == dtype
        if momentum == 0.0:
            assert_same_bits(actual, before)


def test_the_plain_average():
    device, host = (onepass.BatchNorm(5, momentum=None, device=device) for device in ("cuda", "cpu"))
    for seed in range(3):
        x = Batch((6, 5, 4, 3), 1, np.float32, seed=seed).x
        device.forward(put(x))
        host.forward(x)
    assert device.num_batches_tracked == 3
    np.testing.assert_allclose(to_host(device.running_var), host.running_var, rtol=1e-6)


# Values that are none


@every_dtype
@pytest.mark.parametrize("way", ["resident", "clusters", "streaming"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((9, 6, 14, 14), 1), ((30, 33, 12), -1)])
def test_one_such_value_makes_nan_of_its_channel_alone(dtype, way, value, shape, axis):
    limit(way)
    for position in (0, 17, -1):
        batch = Batch(shape, axis, dtype)
        channels = np.moveaxis(batch.x, batch.axis, 0)
        where = np.unravel_index(position % channels[2].size, channels[2].shape)
        channels[2][where] = value
        y, mean, invstd, running_mean, running_var = (np.asarray(a, np.float64) for a in batch.forward(put))
        others = np.arange(len(mean)) != 2
        for array in (mean, invstd, running_mean, running_var):
            assert np.isfinite(array[others]).all()
        assert np.isnan(invstd[2])
        assert np.isnan(running_var[2])
        y = np.moveaxis(y, batch.axis, 0)
        assert np.isnan(y[2]).all()
        assert np.isfinite(y[others]).all()


def test_squares_that_overflow_show():
    batch = Batch((8, 4, 4, 4), 1, np.float32)
    batch.x[:, 1] *= np.float32(1e30)
    y, _, invstd, *_ = batch.forward(put)
    assert np.isnan(invstd[1])
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2, 3]]).all()


@every_compute_type
def test_relu_lets_nan_pass_and_keeps_no_negative_zero(dtype):
    x = np.zeros((4, 2), dtype)
    x[:, 0], x[1, 1] = [-1, 0, 1, np.nan], -0.0
    arguments = {"running_mean": np.zeros(2, dtype), "running_var": np.ones(2, dtype)}
    options = {"training": False, "activation": "relu"}
    expected, *_ = functional.batch_norm(x, **arguments, **options)
    actual, *_ = functional.batch_norm(put(x), **{name: put(value) for name, value in arguments.items()}, **options)
    assert bits(to_host(actual)) == bits(expected)


@every_compute_type
def test_subnormals_are_zeros(dtype):
    tiny = np.finfo(dtype).tiny
    batch = Batch((4, 3, 8), 1, dtype, relu=True, residual=True)
    batch.x[0], batch.x[1] = tiny / 2, -tiny / 4
    batch.residual[0], batch.residual[2] = tiny / 8, -tiny
    batch.dy[::2] = tiny / 2
    batch.weight[0], batch.bias[1] = tiny / 2, tiny / 2
    batch.running_mean[2], batch.running_var[1] = tiny / 2, tiny / 2
    expected = batch.forward(training=False)
    assert_identical(batch.forward(put, training=False), expected)
    grads = batch.backward(expected[1], expected[2], expected[0], training=False)
    actual = batch.backward(expected[1], expected[2], expected[0], put, training=False)
    assert_identical([actual[0], actual[3]], [grads[0], grads[3]])


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (4, 3, 0), (4, 0)])
def test_empty_batches(dtype, shape):
    channels = shape[1]
    x, compute = put(np.empty(shape, dtype)), compute_type(dtype)
    running = [put(np.ones(channels, compute)) for _ in range(2)]
    y, mean, invstd = functional.batch_norm(x, None, None, *running)
    assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
    assert np.isnan(to_host(mean)).all()
    assert np.isnan(to_host(invstd)).all()
    assert mean.shape == invstd.shape == (channels,)
    assert all((to_host(array) == 1).all() for array in running)
    grads = functional.batch_norm_backward(put(np.empty(shape, dtype)), x, mean, invstd)
    assert grads.x.shape == shape
    assert bits(to_host(grads.weight)) == bits(to_host(grads.bias)) == bits(np.zeros(channels, compute))


# Layers


@pytest.mark.parametrize("residual", [False, True])
@every_dtype
def test_a_layer_does_what_the_functions_do(dtype, residual):
    batch = Batch((9, 6, 14, 14), 1, dtype, relu=True, residual=residual)
    layer = onepass.BatchNorm(6, activation="relu", dtype=batch.compute, device="cuda")
    assert layer.device.startswith("cuda:")
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(layer, name)[...] = put(getattr(batch, name))
    y, mean, invstd, running_mean, running_var = batch.forward(put)
    dx, dweight, dbias, dresidual = batch.backward(mean, invstd, y, put)
    more = {"residual": put(batch.residual)} if residual else {}
    assert_identical([to_host(layer.forward(put(batch.x), **more))], [y])
    assert_identical([to_host(layer.running_mean), to_host(layer.running_var)], [running_mean, running_var])
    layer.weight[...] = 7  # an optimizer steps in between
    layer.bias[...] = -7
    assert_identical([to_host(layer.backward(put(batch.dy)))], [dx])
    assert_identical([to_host(layer.weight_grad), to_host(layer.bias_grad)], [dweight, dbias])
    assert (layer.residual_grad is None) == (not residual)
    if residual:
        assert_identical([to_host(layer.residual_grad)], [dresidual])
    with pytest.raises(RuntimeError, match="gone back through already"):
        layer.backward(put(batch.dy))


def test_a_layer_in_inference_in_place():
    batch = Batch((9, 6, 14, 14), 1, np.float32)
    layer = onepass.BatchNorm(6, device="cuda").eval()
    host = onepass.BatchNorm(6).eval()
    x = put(batch.x)
    assert layer.forward(x, out=x) is x
    assert_same_bits(to_host(x), host.forward(batch.x))
    with pytest.raises(RuntimeError, match="overwrote its input"):
        layer.backward(put(batch.dy))
    layer.forward(put(batch.x))
    host.forward(batch.x)
    assert_same_bits(to_host(layer.backward(put(batch.dy))), host.backward(batch.dy))


def test_snapshots_of_a_layer():
    batch = Batch((9, 6, 14, 14), 1, np.float32)
    layer = onepass.BatchNorm(6, device="cuda")
    layer.forward(put(batch.x))
    state = layer.state_dict()
    assert all(isinstance(value, cupy.ndarray) for name, value in state.items() if name != "num_batches_tracked")
    on_host_too = {name: to_host(v) if isinstance(v, cupy.ndarray) else v for name, v in state.items()}

    def now(one):
        return {name: bits(to_host(v)) for name, v in one.state_dict().items() if name != "num_batches_tracked"}

    saved = now(layer)
    layer.forward(put(batch.x))
    assert now(layer) != saved
    for given in (state, on_host_too):
        layer.reset_running_stats()
        assert (to_host(layer.running_mean) == 0).all()
        assert layer.num_batches_tracked == 0
        layer.load_state_dict(given)
        assert now(layer) == saved
        assert layer.num_batches_tracked == 1
    onepass.BatchNorm(6).load_state_dict(on_host_too)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert now(twin) == saved
        assert (twin.device, twin.num_batches_tracked) == (layer.device, 1)
        twin.weight[...] = 3
        assert now(layer) == saved
    for name, value, error, message in (
        ("weight", put(np.ones(5, np.float32)), ValueError, "weight: shape"),
        ("bias", put(np.ones(6, np.float64)), TypeError, "bias: dtype"),
        ("running_var", np.ones(6, np.float64), TypeError, "running_var: dtype"),
        ("running_mean", [0.0] * 6, TypeError, "running_mean: expected"),
    ):
        with pytest.raises(error, match=message):
            layer.load_state_dict({**state, name: value})
        assert now(layer) == saved


def test_devices_of_a_layer():
    assert onepass.BatchNorm(3).device == onepass.BatchNorm(3, device="cpu").device == "cpu"
    for device in ("cuda", "cuda:0", 0):
        layer = onepass.BatchNorm(3, device=device)
        assert layer.device == "cuda:0"
        assert "device='cuda:0'" in repr(layer)
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:99", 99, -1):
        with pytest.raises(ValueError, match=r"^device: expected "):
            onepass.BatchNorm(3, device=wrong)
    for wrong in (True, 1.0, []):
        with pytest.raises(TypeError, match=r"^device: expected "):
            onepass.BatchNorm(3, device=wrong)


@two_devices
def test_another_device():
    batch = Batch((9, 6, 14, 14), 1, np.float32)
    y, *_ = batch.forward(put)
    layer = onepass.BatchNorm(6, device="cuda:1")
    layer.load_state_dict(onepass.BatchNorm(6).state_dict())
    with cupy.cuda.Device(1):
        x, dy = put(batch.x), put(batch.dy)
        layer.weight[...], layer.bias[...] = put(batch.weight), put(batch.bias)
    assert layer.weight.device.id == 1
    there = layer.forward(x)  # with device 0 as the current one
    assert there.device.id == 1
    assert_same_bits(to_host(there), y)
    assert layer.backward(dy).device.id == 1
    assert layer.state_dict()["weight"].device.id == 1
    assert pickle.loads(pickle.dumps(layer)).weight.device.id == 1
    assert copy.deepcopy(layer).running_mean.device.id == 1
    with pytest.raises(ValueError, match="x: is on device 0, and this layer on device 1"):
        layer.forward(put(batch.x))


# Errors


def arguments(dtype=np.float32):
    batch = Batch((6, 5, 4, 3), 1, dtype)
    names = ("x", "weight", "bias", "running_mean", "running_var")
    return {**{name: put(getattr(batch, name)) for name in names}, "residual": put(batch.dy), "out": put(batch.dy)}


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual", "out"])
def test_arguments_are_on_one_device_and_of_one_kind(name):
    given = arguments()
    before = {key: bits(to_host(value)) for key, value in given.items()}

    def fails(error, message, value):
        with pytest.raises(error, match=message):
            functional.batch_norm(**{**given, name: value})
        assert {key: bits(to_host(v)) for key, v in given.items()} == before

    good = given[name]
    fails(ValueError, f"^{name}: is on the host, and x on device 0$", to_host(good))
    other = np.float16 if name in ("residual", "out") else np.float64
    fails(TypeError, f"^{name}: dtype {np.dtype(other).name}, expected float32, the dtype of x$", good.astype(other))
    fails(ValueError, f"^{name}: shape ", cupy.empty((*good.shape, 2), good.dtype))
    if good.ndim > 1:
        strided = cupy.empty((*good.shape[:-1], 6), good.dtype)[..., ::2]
        fails(ValueError, f"^{name}: strides .*cupy.ascontiguousarray", strided)
    if name == "out":
        fails(ValueError, "^out: overlaps x in memory", given["x"])
    room = cupy.empty(good.nbytes + 8, np.uint8)
    skew = cupy.ndarray(good.shape, good.dtype, memptr=room.data + 2)
    fails(ValueError, f"^{name}: its address is no multiple of its dtype's 4 bytes", skew)
    if _devices() > 1:
        with cupy.cuda.Device(1):
            elsewhere = put(to_host(good))
        fails(ValueError, f"^{name}: is on device 1, and x on device 0$", elsewhere)


def test_parameters_of_narrow_inputs_are_float32():
    given = arguments(np.float16)
    given["weight"] = given["weight"].astype(np.float16)
    with pytest.raises(TypeError, match=r"^weight: dtype float16, expected float32, which goes with x of float16$"):
        functional.batch_norm(**given)


def test_a_host_array_of_a_narrow_type_is_refused_as_ever():
    with pytest.raises(TypeError, match=r"^x: dtype float16 is not supported; supported are float32, float64$"):
        functional.batch_norm(np.ones((4, 3), np.float16))


def test_layers_take_arrays_of_their_device():
    batch = Batch((6, 5, 4, 3), 1, np.float32)
    layer = onepass.BatchNorm(5, device="cuda")
    with pytest.raises(ValueError, match=r"^x: is on the host, and this layer on device 0$"):
        layer.forward(batch.x)
    with pytest.raises(ValueError, match=r"^x: is on device 0, and this layer on the host$"):
        onepass.BatchNorm(5).forward(put(batch.x))
    with pytest.raises(TypeError, match=r"^x: dtype float64, expected float32"):
        layer.forward(put(batch.x.astype(np.float64)))
    assert layer.num_batches_tracked == 0
    layer.forward(put(batch.x))
    with pytest.raises(ValueError, match=r"^dy: is on the host, and x on device 0$"):
        layer.backward(batch.dy)
    layer.backward(put(batch.dy))


# What the runtime sees


def launches():
    return library.onepass_host_launches(None)


@on_host
@pytest.mark.parametrize(
    ("way", "training", "forward", "backward"),
    [
        ("resident", True, 1, 1),
        ("clusters", True, 1, 1),
        ("streaming", True, 3, 3),
        ("resident", False, 1, 2),
        ("streaming", False, 1, 2),
    ],
)
@pytest.mark.parametrize(("shape", "axis"), [((9, 6, 14, 14), 1), ((64, 33, 12), -1)])
def test_launches(way, training, forward, backward, shape, axis):
    """And nobody waits for them, except for the copies that the test itself makes."""
    limit(way)
    batch = Batch(shape, axis, np.float32, relu=True)
    x, dy, weight, bias, mean, var = (
        put(a) for a in (batch.x, batch.dy, batch.weight, batch.bias, batch.running_mean, batch.running_var)
    )
    library.onepass_host_reset()
    options = {"channel_axis": axis, "training": training, "activation": "relu"}
    _, mean, invstd = functional.batch_norm(x, weight, bias, mean, var, **options)
    assert launches() == forward
    functional.batch_norm_backward(dy, x, mean, invstd, weight, bias, y=None, **options)
    assert launches() == forward + backward
    for wait in (b"cudaStreamSynchronize", b"cudaDeviceSynchronize", b"cudaMemcpy"):
        assert library.onepass_host_calls(wait) == 0


@on_host
def test_the_ways_are_those_that_the_tests_mean():
    import ctypes

    info = (ctypes.c_ulonglong * 14)()
    library.onepass_host_launch.argtypes = [ctypes.c_ulonglong, ctypes.c_void_p]
    library.onepass_host_launch.restype = ctypes.c_bool
    clusters = {}
    for way in WAYS:
        limit(way)
        for shape, axis in SHAPES:
            batch = Batch(shape, axis, np.float32)
            library.onepass_host_reset()
            batch.forward(put)
            assert library.onepass_host_launch(0, info)
            clusters.setdefault(way, set()).add(info[6])
    assert clusters["one-block"] == clusters["streaming"] == {1}
    assert clusters["clusters"] >= {2, 4}


@on_host
@pytest.mark.parametrize("order", [(1, 1), (2, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_no_order_of_blocks_and_threads_shows(order, way):
    for shape, axis in (((9, 6, 14, 14), 1), ((64, 33, 12), -1)):
        batch = Batch(shape, axis, np.float32, relu=True, residual=True)
        limit(way)
        results = []
        for blocks, threads in ((0, 0), order):
            library.onepass_host_order(blocks, threads, 7)
            forward = batch.forward(put)
            results.append([*forward, *batch.backward(forward[1], forward[2], forward[0], put)])
        assert_identical(*results)


@on_host
@pytest.mark.parametrize("way", ["clusters", "resident", "streaming"])
def test_a_launch_that_fails_names_what_it_was(way):
    limit(way)
    layer = onepass.BatchNorm(6, device="cuda")
    x = put(Batch((9, 6, 14, 14), 1, np.float32).x)
    for function in (b"cudaLaunchKernel", b"cudaLaunchKernelExC"):
        library.onepass_host_fail(function, 719, 1)
    with pytest.raises(RuntimeError, match="launching batch norm"):
        layer.forward(x)
    library.onepass_host_reset()
    assert layer.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.backward(x)
    layer.forward(x)


@on_host
@pytest.mark.parametrize("nth", range(1, 7))
def test_a_lack_of_memory_changes_nothing(nth):
    limit("streaming")
    layer = onepass.BatchNorm(6, device="cuda")
    x = put(Batch((9, 6, 14, 14), 1, np.float32).x)
    cupy.get_default_memory_pool().free_all_blocks()
    library.onepass_host_fail(b"cudaMalloc", 2, nth)
    with pytest.raises((MemoryError, RuntimeError), match=r"(?i)memory"):
        layer.forward(x)
    library.onepass_host_reset()
    assert layer.num_batches_tracked == 0
    assert (to_host(layer.running_mean) == 0).all()
    layer.forward(x)
    assert layer.num_batches_tracked == 1

"""Batch normalization against plain formulas in float64, against torch, and where float32 is in need.

The textbook here takes the means of whole arrays in float64. It knows nothing of blocks, shifts or pairs of numbers.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

import onepass
from onepass.functional import batch_norm, batch_norm_backward

LAYOUTS = {
    "long runs": ((3, 4, 70, 71), 1),
    "many long runs": ((23, 4, 17, 18), 1),
    "short runs": ((90, 33, 7, 7), 1),
    "short rows": ((500, 5, 3), 1),
    "NC": ((300, 40), 1),
    "NHWC": ((6, 9, 10, 17), 3),
    "3-d": ((2, 5, 4, 6, 7), 1),
    "channel first": ((4, 3, 11), 0),
    "one channel": ((30, 1, 40), 1),
}
EXTRAS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "residual-relu": {"residual": True, "activation": "relu"},
}


def axes_without(shape, channel_axis):
    return tuple(k for k in range(len(shape)) if k != channel_axis % len(shape))


def along(values, shape, channel_axis):
    """Values of channels in a shape that broadcasts over the batch."""
    values = np.broadcast_to(np.asarray(values, np.float64), shape[channel_axis])
    return np.expand_dims(values, axes_without(shape, channel_axis))


def textbook(x, dy, weight=1.0, bias=0.0, *, eps=1e-5, channel_axis=1, running=None, residual=None, activation=None):
    """Both passes in float64: Ioffe and Szegedy (2015), algorithm 1 and section 3. `running`: mean and variance."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    axes = axes_without(x.shape, channel_axis)
    n = x.size // x.shape[channel_axis]
    weight, bias = (np.broadcast_to(value, x.shape[channel_axis]) for value in (weight, bias))

    def spread(values):
        return along(values, x.shape, channel_axis)

    mean, var = (x.mean(axes), x.var(axes)) if running is None else (np.float64(value) for value in running)
    invstd = 1 / np.sqrt(var + eps)
    xhat = (x - spread(mean)) * spread(invstd)
    y = spread(weight) * xhat + spread(bias)
    if residual is not None:
        y = y + residual
    if activation == "relu":
        dy = np.where(y > 0, dy, 0.0)
        y = np.maximum(y, 0.0)
    dbias, dweight = dy.sum(axes), (dy * xhat).sum(axes)
    dx = dy - spread(dbias) / n - xhat * spread(dweight) / n if running is None else dy
    dx = spread(weight * invstd) * dx
    return SimpleNamespace(
        y=y, mean=mean, var=var, invstd=invstd, xhat=xhat, dx=dx, dweight=dweight, dbias=dbias, dresidual=dy, n=n
    )


def draw(shape, channel_axis=1, *, mean=0.0, deviation=1.0, dtype=np.float64, seed=0):
    """Normal values, and gradients for them: x and dy."""
    rng = np.random.default_rng(seed)
    x = along(mean, shape, channel_axis) + along(deviation, shape, channel_axis) * rng.standard_normal(shape)
    return x.astype(dtype), (rng.standard_normal(shape) + 0.2).astype(dtype)


def parameters(channels, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.5, 1.5, channels) * rng.choice([-1.0, 1.0], channels)
    return weight.astype(dtype), rng.uniform(-1.0, 1.0, channels).astype(dtype)


def assert_close(actual, desired, tolerance, what):
    """Within `tolerance` of the largest value."""
    assert actual.shape == desired.shape, what
    assert np.isfinite(actual).all(), what
    worst = np.abs(actual - desired).max() / np.abs(desired).max()
    assert worst <= tolerance, f"{what}: off by {worst:.3g} of the largest value"


# The textbook


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_follows_the_textbook_in_float64(layout, extra, training):
    shape, axis = LAYOUTS[layout]
    channels = shape[axis]
    rng = np.random.default_rng(5)
    mean, deviation = rng.uniform(-30, 30, channels), rng.uniform(0.1, 10, channels)
    x, dy = draw(shape, axis, mean=mean, deviation=deviation)
    weight, bias = parameters(channels)
    running = mean + 0.3 * deviation, deviation**2 * rng.uniform(0.5, 2.0, channels)
    options = dict(EXTRAS[extra])
    if "residual" in options:
        options["residual"] = rng.standard_normal(shape)
    eps = 0.013
    want = textbook(x, dy, weight, bias, eps=eps, channel_axis=axis, running=None if training else running, **options)
    y, got_mean, got_invstd = batch_norm(
        x, weight, bias, *(value.copy() for value in running), training=training, eps=eps, channel_axis=axis, **options
    )
    assert_close(y, want.y, 1e-12, "y")
    assert_close(got_mean, want.mean, 1e-13, "mean")
    assert_close(got_invstd, want.invstd, 1e-13, "invstd")
    added = options.pop("residual", None) is not None
    if options:
        options["y"] = y if added else None
    got = batch_norm_backward(
        dy, x, got_mean, got_invstd, weight, bias, training=training, channel_axis=axis, **options
    )
    assert_close(got.x, want.dx, 1e-12, "dx")
    assert_close(got.weight, want.dweight, 1e-12, "dweight")
    assert_close(got.bias, want.dbias, 1e-12, "dbias")
    if got.residual is not None:
        np.testing.assert_array_equal(got.residual, want.dresidual)
    assert (got.residual is None) == (extra == "relu")
    if "activation" in options:
        assert 0.1 < np.mean(y == 0) < 0.9


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 5), 1), ((2, 2, 300), 1), ((11, 4), 1), ((2, 3, 4), 2)])
def test_gradients_are_central_differences(shape, axis, extra, training):
    """Of a weighted sum of the layer's output, in each of up to 60 elements of x and of the residual."""
    channels = shape[axis]
    x, direction = draw(shape, axis, mean=np.arange(channels), deviation=1.0 + np.arange(channels), seed=3)
    layer = onepass.BatchNorm(
        channels, 1e-2, 0.0, channel_axis=axis, activation=EXTRAS[extra].get("activation"), dtype=np.float64
    ).train(training)
    layer.weight[...], layer.bias[...] = parameters(channels)
    layer.running_mean[...], layer.running_var[...] = np.arange(channels) + 0.1, np.arange(channels) ** 2 + 1.5
    arrays = {"x": x, "weight": layer.weight, "bias": layer.bias}
    if "residual" in EXTRAS[extra]:
        arrays["residual"] = draw(shape, axis, seed=4)[0]
    y = layer(x, residual=arrays.get("residual"))
    assert np.abs(y[y != 0]).min() > 1e-4, "no output may cross the kink"
    gradients = {"x": layer.backward(direction), "weight": layer.weight_grad, "bias": layer.bias_grad}
    if "residual" in arrays:
        gradients["residual"] = layer.residual_grad
    gradients = {name: gradient.copy() for name, gradient in gradients.items()}
    step = 1e-5
    for name, array in arrays.items():
        flat = array.reshape(-1)
        largest = np.abs(gradients[name]).max()
        for k in range(0, flat.size, -(-flat.size // 60)):
            ends = []
            value = flat[k]
            for signed in (step, -step):
                flat[k] = value + signed
                ends.append(np.sum(direction * layer(x, residual=arrays.get("residual"))))
            flat[k] = value
            difference = (ends[0] - ends[1]) / (2 * step)
            assert abs(difference - gradients[name].flat[k]) <= 1e-8 * max(1.0, largest), f"{name}[{k}]"


# Where float32 is in need


# The same count of values in each channel.
COUNT = 65_536
NEEDY = {
    "one run": ((1, 3, COUNT), 1),
    "long runs": ((16, 3, 64, 64), 1),
    "many long runs": ((128, 3, 512), 1),
    "short runs": ((1024, 3, 8, 8), 1),
    "NC": ((COUNT, 3), 1),
    "NHWC": ((64, 32, 32, 3), 3),
    "many channels": ((COUNT, 24), 1),
    "one channel": ((COUNT, 1), 1),
}


# Fewer, so that nothing hides what the sums of one block lose.
ONE_BLOCK = {
    "one block of a run": ((1, 3, 4096), 1),
    "one block of short runs": ((60, 33, 7, 7), 1),
    "one block of short rows": ((21_504, 3), 1),
    "few short rows": ((4000, 3), 1),
}


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, -1e3])
@pytest.mark.parametrize("layout", NEEDY)
def test_variance_at_a_large_mean(layout, ratio):
    shape, axis = NEEDY[layout]
    deviation = np.geomspace(0.01, 100.0, shape[axis])
    x, dy = draw(shape, axis, mean=ratio * deviation, deviation=deviation, dtype=np.float32, seed=2)
    want = textbook(x, dy, channel_axis=axis)
    assert want.n == COUNT
    running_mean, running_var = np.zeros(shape[axis], np.float32), np.ones(shape[axis], np.float32)
    _, mean, invstd = batch_norm(
        x, None, None, running_mean, running_var, momentum=1.0, unbiased=False, eps=1e-12, channel_axis=axis
    )
    np.testing.assert_allclose(1 / invstd**2 - 1e-12, want.var, rtol=5e-6)
    np.testing.assert_allclose(running_var, want.var, rtol=5e-6)
    assert (np.abs(mean - want.mean) <= 1e-6 * deviation).all()
    np.testing.assert_allclose(running_mean, mean, rtol=1e-7)


def needy(layout, ratio, *, outlier=None):
    """float32 values whose mean is `ratio` deviations. `outlier`: deviations of a channel's first value."""
    shape, axis = (NEEDY | ONE_BLOCK)[layout]
    deviation = np.geomspace(0.01, 100.0, shape[axis])
    x, dy = draw(shape, axis, mean=ratio * deviation, deviation=deviation, dtype=np.float32, seed=6)
    if outlier is not None:
        first = tuple(slice(None) if k == axis else 0 for k in range(len(shape)))
        x[first] = (ratio + outlier) * deviation
    return x, dy, axis, deviation


@pytest.mark.parametrize("outlier", [None, 30.0, -1e4, 1e6])  # -1e4: the first value is 0
@pytest.mark.parametrize("layout", NEEDY | ONE_BLOCK)
def test_output_at_a_very_large_mean(layout, outlier):
    x, dy, axis, _ = needy(layout, 1e4, outlier=outlier)
    weight, bias = parameters(x.shape[axis], np.float32)
    for given in ((), (weight, bias)):
        want = textbook(x, dy, *given, eps=1e-12, channel_axis=axis).y
        y = batch_norm(x, *given, eps=1e-12, channel_axis=axis)[0]
        error = np.abs(y - want) / (1 + np.abs(want))
        assert error.max() <= 1e-5, f"off by {error.max():.3g} * (1 + |y|)"


@pytest.mark.parametrize("layout", NEEDY | ONE_BLOCK)
def test_gradients_at_a_very_large_mean(layout):
    x, dy, axis, _ = needy(layout, 1e4)
    weight, bias = parameters(x.shape[axis], np.float32)
    want = textbook(x, dy, weight, bias, eps=1e-12, channel_axis=axis)
    _, mean, invstd = batch_norm(x, weight, bias, eps=1e-12, channel_axis=axis)
    got = batch_norm_backward(dy, x, mean, invstd, weight, bias, channel_axis=axis)
    # Relative to what is added up: the sums themselves are small beside it.
    axes = axes_without(x.shape, axis)
    scale = along(np.abs(weight * want.invstd), x.shape, axis)
    error = np.abs(got.x - want.dx) / (scale * (1 + np.abs(dy)))
    assert error.max() <= 1e-6, f"dx: off by {error.max():.3g} * |scale| * (1 + |dy|)"
    for gradient, desired, terms in ((got.weight, want.dweight, dy * want.xhat), (got.bias, want.dbias, dy)):
        error = np.abs(gradient - desired) / np.abs(terms).sum(axes, dtype=np.float64)
        assert error.max() <= 1e-6, f"off by {error.max():.3g} of the sum of magnitudes"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", NEEDY)
def test_constant_channels_are_exactly_the_bias(layout, dtype):
    shape, axis = NEEDY[layout]
    for constants in ((0.0, 0.1, -0.3), (1e4, 1e7 / 3, -1e30)):
        values = np.resize(constants, shape[axis])
        x = np.empty(shape, dtype)
        x[...] = along(values, shape, axis)
        dy = draw(shape, axis, dtype=dtype)[1]
        weight, bias = parameters(shape[axis], dtype)
        y, mean, invstd = batch_norm(x, weight, bias, channel_axis=axis)
        np.testing.assert_array_equal(y, np.broadcast_to(along(bias, shape, axis).astype(dtype), shape))
        np.testing.assert_array_equal(mean, values.astype(dtype))
        np.testing.assert_array_equal(invstd, 1 / np.sqrt(1e-5))
        got = batch_norm_backward(dy, x, mean, invstd, weight, bias, channel_axis=axis)
        want = textbook(np.zeros_like(x), dy, weight, bias, channel_axis=axis)
        np.testing.assert_array_equal(got.weight, 0)
        assert_close(got.x, want.dx, 1e-6 if dtype == np.float32 else 1e-13, "dx")


@pytest.mark.parametrize("layout", [layout for layout in NEEDY if layout != "one channel"])
def test_one_constant_channel_among_others(layout):
    """Neither a large constant beside them, nor one large value in another channel costs the others a digit."""
    x, _, axis, _ = needy(layout, 1e4)
    alone = batch_norm(x, channel_axis=axis)[0]
    channels = np.moveaxis(x, axis, 0)  # a view
    channels[1] = 1e30
    channels[2].flat[77] = -1e18
    y = batch_norm(x, channel_axis=axis)[0]
    np.testing.assert_array_equal(np.take(y, 1, axis), 0)
    others = [c for c in range(x.shape[axis]) if c not in (1, 2)]
    np.testing.assert_array_equal(np.take(y, others, axis), np.take(alone, others, axis))
    assert (np.take(y, 2, axis) != np.take(alone, 2, axis)).any()


def exact_moments(x):
    """Mean and variance of each channel of (outer, C, inner) in float64, without a copy of all of it in float64."""
    outer, channels, inner = x.shape
    mean, var = np.zeros(channels), np.zeros(channels)
    n = outer * inner
    for c in range(channels):
        step = -(-(1 << 20) // min(outer, 1 << 20))
        rows = 1 << 20
        pieces = [x[r : r + rows, c, k : k + step] for r in range(0, outer, rows) for k in range(0, inner, step)]
        mean[c] = math.fsum(piece.sum(dtype=np.float64) for piece in pieces) / n
        var[c] = math.fsum(np.square(piece - mean[c], dtype=np.float64).sum() for piece in pieces) / n
    return mean, var


@pytest.fixture(scope="module")
def huge():
    """2**26 values in [1000, 1001): 256 MB, once for all shapes."""
    x = np.empty(1 << 26, np.float32)
    rng = np.random.default_rng(8)
    for piece in x.reshape(64, -1):
        rng.random(out=piece, dtype=np.float32)
    x += 1000
    x.flags.writeable = False
    yield x
    onepass.empty_cache()


@pytest.mark.parametrize("shape", [(1, 1, 1 << 26), (1 << 24, 4, 1), (16, 2, 1 << 21), (1 << 18, 16, 16)])
def test_huge_counts_lose_no_accuracy(huge, shape):
    x = huge.reshape(shape)
    want_mean, want_var = exact_moments(x)
    y, mean, invstd = batch_norm(x, eps=1e-9)
    deviation = np.sqrt(want_var)
    assert np.abs((mean - want_mean) / deviation).max() <= 1e-8
    np.testing.assert_allclose(1 / invstd**2 - 1e-9, want_var, rtol=1e-7)
    places = np.random.default_rng(0).integers(0, x.size, 1000)
    channel = places // shape[2] % shape[1]
    want = (x.reshape(-1)[places].astype(np.float64) - want_mean[channel]) / deviation[channel]
    np.testing.assert_allclose(y.reshape(-1)[places], want, rtol=0, atol=1e-6)
    del y  # its memory is the gradient's
    n = x.size // shape[1]
    gradients = batch_norm_backward(x, x, mean, invstd)  # gradients whose exact sums are known
    np.testing.assert_allclose(gradients.bias, n * want_mean, rtol=1e-7)
    np.testing.assert_allclose(gradients.weight, n * deviation, rtol=0, atol=1e-7 * n * want_mean.max())


# Running statistics


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_over_ten_batches(momentum, unbiased, dtype):
    """Exponential or plain average, of batches of different sizes and layouts, with the biased or unbiased variance."""
    channels = 6
    layer = onepass.BatchNorm(channels, momentum=momentum, unbiased=unbiased, dtype=dtype)
    shapes = [(5, 6), (2, 6, 3), (40, 6, 7, 7), (3, 6, 300), (2, 6, 70, 70)] * 2
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    for restart in range(2):
        means, variances, mean, var = [], [], np.zeros(channels), np.ones(channels)
        for t, shape in enumerate(shapes):
            assert layer.num_batches_tracked == t
            x, dy = draw(shape, mean=np.arange(6) - t, deviation=1 + 0.1 * t, dtype=dtype, seed=t + 100 * restart)
            batch = textbook(x, dy)
            means.append(batch.mean)
            variances.append(batch.var * (batch.n / (batch.n - 1) if unbiased else 1.0))
            if momentum is None:
                mean, var = np.mean(means, axis=0), np.mean(variances, axis=0)
            else:
                mean = (1 - momentum) * mean + momentum * means[-1]
                var = (1 - momentum) * var + momentum * variances[-1]
            layer(x)
            assert_close(layer.running_mean, mean, tolerance, f"running_mean after batch {t}")
            assert_close(layer.running_var, var, tolerance, f"running_var after batch {t}")
        before = layer.running_mean.copy(), layer.running_var.copy()
        want = textbook(x, dy, running=(mean, var))
        assert_close(layer(x, training=False), want.y, 2e-6 if dtype == np.float32 else 1e-13, "y in inference")
        assert_close(layer.backward(dy), want.dx, 1e-6 if dtype == np.float32 else 1e-13, "dx in inference")
        np.testing.assert_array_equal((layer.running_mean, layer.running_var), before)
        assert layer.num_batches_tracked == 10
        layer.reset_running_stats()
        np.testing.assert_array_equal(layer.running_mean, 0)
        np.testing.assert_array_equal(layer.running_var, 1)


def test_the_modes_of_the_running_statistics_differ():
    """Or the test above would pass for a layer that knows one of them."""
    ends = []
    for momentum, unbiased in ((0.1, True), (0.1, False), (None, True), (None, False)):
        layer = onepass.BatchNorm(2, momentum=momentum, unbiased=unbiased, dtype=np.float64)
        for t in range(10):
            layer(draw((5, 2), mean=t, deviation=1 + t)[0])
        ends.append((layer.running_mean[0], layer.running_var[0]))
    assert len({mean for mean, _ in ends}) == 2
    assert len({var for _, var in ends}) == 4


def test_a_batch_that_is_not_finite_is_a_batch():
    layer = onepass.BatchNorm(2, momentum=None)
    layer(np.full((4, 2), np.nan, np.float32))
    assert layer.num_batches_tracked == 1
    assert np.isnan(layer.running_mean).all()
    assert np.isnan(layer.running_var).all()
    layer.reset_running_stats()
    layer(np.array([[1, 2], [3, 6]], np.float32))
    np.testing.assert_array_equal(layer.running_mean, [2, 4])
    np.testing.assert_array_equal(layer.running_var, [2, 8])
    assert layer.num_batches_tracked == 1


# Other libraries


TORCH = {
    "BatchNorm1d": (64, 10),
    "BatchNorm1d-sequence": (9, 10, 33),
    "BatchNorm2d": (4, 10, 19, 21),
    "BatchNorm2d-small": (16, 10, 3, 3),
    "BatchNorm3d": (3, 10, 5, 4, 6),
}


def torch_close(actual, tensor, what):
    array = tensor.detach().numpy()
    assert actual.dtype == array.dtype, what
    tolerance = 2e-5 if array.dtype == np.float32 else 1e-12
    assert_close(actual, array, tolerance, what)


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name, dtype, affine, momentum):
    torch = pytest.importorskip("torch")
    shape = TORCH[name]
    channels = shape[1]
    theirs = getattr(torch.nn, name.partition("-")[0])(
        channels, eps=1e-4, momentum=momentum, affine=affine, dtype=getattr(torch, dtype)
    )
    ours = onepass.BatchNorm(channels, eps=1e-4, momentum=momentum, affine=affine, dtype=dtype)
    if affine:
        ours.weight[...], ours.bias[...] = parameters(channels, dtype)
        with torch.no_grad():
            theirs.weight.copy_(torch.from_numpy(ours.weight))
            theirs.bias.copy_(torch.from_numpy(ours.bias))
    for t in range(6):
        if t == 4:
            ours.eval()
            theirs.eval()
        x, dy = draw(shape, mean=np.arange(channels) / 4, deviation=1 + t, dtype=dtype, seed=t)
        tensor = torch.tensor(x, requires_grad=True)
        out = theirs(tensor)
        torch_close(ours(x), out, f"y of batch {t}")
        theirs.zero_grad()
        out.backward(torch.from_numpy(dy))
        torch_close(ours.backward(dy), tensor.grad, f"dx of batch {t}")
        if affine:
            torch_close(ours.weight_grad, theirs.weight.grad, f"dweight of batch {t}")
            torch_close(ours.bias_grad, theirs.bias.grad, f"dbias of batch {t}")
        torch_close(ours.running_mean, theirs.running_mean, f"running_mean after batch {t}")
        torch_close(ours.running_var, theirs.running_var, f"running_var after batch {t}")
        assert ours.num_batches_tracked == theirs.num_batches_tracked == min(t + 1, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TORCH)
def test_fused_passes_equal_torch_autograd(name, dtype, extra, training):
    torch = pytest.importorskip("torch")
    shape = TORCH[name]
    channels = shape[1]
    relu, has_residual = "activation" in EXTRAS[extra], "residual" in EXTRAS[extra]
    x, dy = draw(shape, mean=0.5, deviation=2.0, dtype=dtype)
    ours = onepass.BatchNorm(channels, activation="relu" if relu else None, dtype=dtype).train(training)
    ours.weight[...], ours.bias[...] = parameters(channels, dtype)
    ours.running_var[...] = 3.0
    weight, bias, tensor = (torch.tensor(value, requires_grad=True) for value in (ours.weight, ours.bias, x))
    running = torch.tensor(ours.running_mean), torch.tensor(ours.running_var)
    out = torch.nn.functional.batch_norm(tensor, *running, weight, bias, training)
    residual = draw(shape, dtype=dtype, seed=9)[0] if has_residual else None
    added = None
    if has_residual:
        added = torch.tensor(residual, requires_grad=True)
        out = out + added
    if relu:
        out = torch.relu(out)
    out.backward(torch.from_numpy(dy))
    y = ours.forward(x, residual=residual)
    torch_close(y, out, "y")
    if relu:
        np.testing.assert_array_equal(y > 0, out.detach().numpy() > 0)
        assert 0.2 < np.mean(y > 0) < 0.8
    torch_close(ours.backward(dy), tensor.grad, "dx")
    torch_close(ours.weight_grad, weight.grad, "dweight")
    torch_close(ours.bias_grad, bias.grad, "dbias")
    if has_residual:
        np.testing.assert_array_equal(ours.residual_grad, added.grad.numpy())
    else:
        assert ours.residual_grad is None


def test_settings_of_keras():
    """As `BatchNormalization` of Keras 3 writes it: axis -1, momentum 0.99 of the old value, epsilon 1e-3."""
    channels = 5
    rng = np.random.default_rng(3)
    gamma, beta = rng.uniform(0.5, 1.5, channels), rng.uniform(-1.0, 1.0, channels)
    moving_mean, moving_variance, momentum, epsilon = np.zeros(channels), np.ones(channels), 0.99, 1e-3
    layer = onepass.BatchNorm(channels, 1e-3, 0.01, unbiased=False, channel_axis=-1, dtype=np.float64)
    layer.weight[...], layer.bias[...] = gamma, beta

    def batch_normalization(x, mean, variance):
        inv = gamma / np.sqrt(variance + epsilon)
        return x * inv + (beta - mean * inv)

    for t in range(10):
        x = rng.normal(t, 1.0 + t, (4, 6, 3, channels))
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        moving_mean = moving_mean * momentum + mean * (1.0 - momentum)
        moving_variance = moving_variance * momentum + variance * (1.0 - momentum)
        np.testing.assert_allclose(layer(x), batch_normalization(x, mean, variance), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(layer.running_mean, moving_mean, rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, moving_variance, rtol=1e-13)
    layer.eval()
    want = batch_normalization(x, moving_mean, moving_variance)
    np.testing.assert_allclose(layer(x), want, rtol=1e-12, atol=1e-12)


# What is not finite shows


SHOWING = {name: LAYOUTS[name] for name in ("long runs", "short runs", "short rows", "NC", "NHWC")}


class Showing:
    """A layer, its arrays, and the outputs of both passes by name. Channel 2 is the one to spoil."""

    def __init__(self, layout, dtype, *, training, activation=None):
        self.shape, self.axis = SHOWING[layout]
        self.training = training
        channels = self.shape[self.axis]
        self.layer = onepass.BatchNorm(channels, channel_axis=self.axis, activation=activation, dtype=dtype)
        self.x, self.dy = draw(self.shape, self.axis, mean=1.0, deviation=2.0, dtype=dtype)
        self.residual = draw(self.shape, self.axis, dtype=dtype, seed=7)[0]
        self.layer.weight[...], self.layer.bias[...] = parameters(channels, dtype)

    def channel(self, array):
        return np.moveaxis(array, self.axis, 0)[2] if array.ndim > 1 else array[2:3]

    def spoil(self, array, value):
        """One element of the channel, or the channel's one value."""
        self.channel(array)[(-1,) * (array.ndim - 1) if array.ndim > 1 else 0] = value

    def run(self):
        """The outputs that belong to the spoiled channel, and those of all others."""
        layer = self.layer
        outputs = {"y": layer(self.x, residual=self.residual, training=self.training)}
        outputs |= {"running_mean": layer.running_mean.copy(), "running_var": layer.running_var.copy()}
        outputs["dx"] = layer.backward(self.dy)
        outputs["weight_grad"], outputs["bias_grad"] = layer.weight_grad.copy(), layer.bias_grad.copy()
        own = {name: self.channel(array) for name, array in outputs.items()}
        rest = {
            name: np.delete(array, 2, self.axis if array.ndim > 1 else 0).tobytes() for name, array in outputs.items()
        }
        return own, rest


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", SHOWING)
def test_what_is_not_finite_shows_in_its_channel_and_nowhere_else(layout, dtype, value, activation):
    def run(spoiled=None, *, training=True):
        case = Showing(layout, dtype, training=training, activation=activation)
        if spoiled is not None:
            where = getattr(case, spoiled, None)
            case.spoil(getattr(case.layer, spoiled) if where is None else where, value)
        return case.run()

    def count(array):
        return np.count_nonzero(~np.isfinite(array))

    clean, rest = run()
    assert all(count(array) == 0 for array in clean.values())

    own, others = run("x")
    assert others == rest
    for name in ("y", "running_var", "dx", "weight_grad"):
        assert np.isnan(own[name]).all(), name
    assert count(own["running_mean"]) == 1

    own, others = run("dy")
    assert others == rest
    shows = activation is None or own["y"].flat[-1] > 0  # a masked gradient is none
    for name in ("dx", "weight_grad", "bias_grad"):
        assert count(own[name]) == (own[name].size if shows else 0), name
    for name in ("y", "running_mean", "running_var"):
        np.testing.assert_array_equal(own[name], clean[name])

    own, others = run("residual")
    assert others == rest
    hidden = activation is not None and value == -np.inf  # max(0, -inf)
    assert count(own["y"]) == (0 if hidden else 1)

    own, others = run("weight")
    assert others == rest
    assert (~np.isfinite(own["y"])).mean() >= (0.99 if activation is None or np.isnan(value) else 0.2)
    assert count(own["running_mean"]) == count(own["running_var"]) == 0

    own, others = run("bias")
    assert others == rest
    hidden = activation is not None and value == -np.inf
    assert count(own["y"]) == (0 if hidden else own["y"].size)

    clean, rest = run(training=False)
    own, others = run("x", training=False)
    assert others == rest
    if activation is None or np.isnan(value):
        assert count(own["y"]) == 1
        assert np.isnan(own["weight_grad"]).all() or not np.isnan(value)
    for name in ("running_mean", "running_var", "bias_grad") if activation is None else ("running_mean", "running_var"):
        np.testing.assert_array_equal(own[name], clean[name])

    own, others = run("running_mean", training=False)
    assert others == rest
    if activation is None or np.isnan(value):
        assert count(own["y"]) == own["y"].size
    if np.isnan(value):
        own, others = run("running_var", training=False)
        assert others == rest
        assert np.isnan(own["y"]).all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", SHOWING)
def test_squares_out_of_range_show(layout, activation):
    """1 / sqrt(inf) would be 0, and the output the bias: nobody would notice."""
    for dtype, large in ((np.float32, 1e20), (np.float64, 1e155)):
        case = Showing(layout, dtype, training=True, activation=activation)
        rest = case.run()[1]
        case = Showing(layout, dtype, training=True, activation=activation)
        case.spoil(case.x, large)
        own, others = case.run()
        assert others == rest
        for name in ("y", "running_var", "dx", "weight_grad"):
            assert np.isnan(own[name]).all(), name
        assert np.isfinite(own["running_mean"]).all()

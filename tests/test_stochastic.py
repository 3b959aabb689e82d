"""Promise: stochastic rounding has no bias, and its bits depend on seed, step, parameter and element alone."""

from __future__ import annotations

import functools
import math
import os
import re

import numpy as np
import pytest

import builds
import onepass
from helpers import numbers
from onepass import _cpu, functional
from reference import narrow, philox
from reference.expressions import assert_same_bits
from training import BFLOAT16, FEW_MACHINES, ISAS, MACHINES, OPTIMIZERS, Call, Kind, check, make

FLOAT16 = np.dtype(np.float16)
NARROW = (BFLOAT16, FLOAT16)
SEEDS = 200
COUNT = 500

# Distances from a narrow number, in units in its last place; 2**-16 is what 16 random bits resolve of a bfloat16.
FRACTIONS = (0.0, 2.0**-12, 0.1, 0.25, 0.5, 0.5 + 2.0**-10, 0.75, 0.999)
# Values of all magnitudes; subnormals of float16 too.
VALUES = {
    BFLOAT16: (1.0, -1.0, 1.9921875, 3e-5, -7e8, 1e-30, -2e30),
    FLOAT16: (1.0, -1.0, 1.9990234375, 3e-3, -7e3, 2.0**-14, 5 * 2.0**-24, -(2.0**-17), 0.0, 65472.0),
}


def unit(x, dtype):
    """In the last place of a number, upwards in magnitude."""
    bits = np.abs(np.array([x], dtype)).view(np.uint16)
    pair = [narrow.widen(np.array([b], np.uint16).view(dtype), np.float64)[0] for b in (bits[0], bits[0] + 1)]
    return pair[1] - pair[0]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_mean_over_many_seeds_is_the_number(dtype, fraction):
    """Each result is one of the two neighbours; their mean is within 5 standard deviations of the number itself.

    A float32 state takes what is to be rounded, because a narrow gradient could not hold it.
    """
    total = 0
    for value in VALUES[dtype]:
        low = np.array([value], dtype)[0]
        distance = unit(low, dtype)
        x = math.copysign(abs(float(low)) + fraction * distance, float(value))
        x = float(np.float32(x))
        share = (abs(x) - abs(float(low))) / distance  # after the rounding to float32
        samples = []
        for seed in range(SEEDS):
            param = np.zeros(COUNT, dtype)
            velocity = np.full(COUNT, -x, np.float32)
            functional.momentum(
                param,
                np.zeros(COUNT, dtype),
                velocity,
                step=1,
                lr=1.0,
                momentum=math.nextafter(1.0, 0.0),  # 1 in float32
                rounding="stochastic",
                seed=seed,
            )
            samples.append(param)
        samples = np.concatenate(samples)
        values = narrow.widen(samples, np.float64)
        up = np.abs(values) > abs(float(low))
        n = samples.size
        total += n
        np.testing.assert_array_equal(values[~up], float(low))
        if up.any():
            assert (np.abs(values[up]) - abs(float(low)) == distance).all()
        assert np.all(np.signbit(values) == (math.copysign(1.0, x) < 0)) or x == 0
        assert abs(np.mean(up) - share) <= 5 * math.sqrt(max(share * (1 - share), 1e-9) / n) + 2.0**-16
        if fraction == 0.0:
            assert not up.any(), "what can be represented stays"
    assert total >= SEEDS * COUNT


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_have_no_bias(name):
    """The mean of bfloat16 states over many elements, after some steps, is that of float32 states."""
    count = 20_000
    param, wide = np.ones(count, np.float32), np.ones(count, np.float32)
    opt = make(name, param, state_dtype="bfloat16", rounding="stochastic", seed=1)
    exact = make(name, wide)
    for t in range(1, 9):
        grad = np.full(count, 0.3 + 0.01 * t, np.float32)
        opt.step(grad)
        exact.step(grad)
    for slot, array in opt.state[0].items():
        got, want = narrow.widen(array, np.float64), float(exact.state[0][slot][0])
        spread = got.std()
        assert spread > 0, f"{slot}: rounded by chance"
        assert abs(got.mean() - want) < 6 * spread / math.sqrt(count) + (0.002 * abs(want) if "max" in slot else 0), (
            slot
        )
    assert np.isfinite(param).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_parameters_have_no_bias_in_the_long_run(dtype):
    """A walk of 300 steps of 1/20 of a unit in the last place, and back."""
    count = 20_000
    param = np.full(count, 1.5, dtype)
    opt = onepass.SGD(param, lr=float(unit(1.5, dtype)) / 20, rounding="stochastic", seed=6)
    for direction in (1, -1):
        for _ in range(300):
            opt.step(np.full(count, direction, dtype))
        mean = narrow.widen(param, np.float64).mean()
        want = 1.5 - 15 * unit(1.5, dtype) if direction > 0 else 1.5
        spread = narrow.widen(param, np.float64).std()
        assert abs(mean - want) < 5 * spread / math.sqrt(count)
        assert spread > unit(1.5, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_averages_have_no_bias(dtype):
    count = 50_000
    param = np.ones(count, dtype)
    opt = onepass.SGD(param, lr=1.0, ema_decay=0.9, rounding="stochastic", seed=8)
    opt.step(np.zeros(count, dtype))
    opt.step(np.full(count, 2.0**-6, dtype))
    assert (param == np.array(1 - 2.0**-6, dtype)).all(), "exact, so it is not rounded"
    want = float(np.float32(0.9) + np.float32(1 - 0.9) * np.float32(1 - 2.0**-6))
    got = narrow.widen(opt.ema, np.float64)
    assert np.unique(got).size == 2
    assert abs(got.mean() - want) < 5 * got.std() / math.sqrt(count)
    assert abs(got.mean() - want) < 0.1 * unit(0.99, dtype)


# The bits


def trained(
    dtype, values, *, index=0, offset=0, strided=False, state_dtype=None, name="Adam", steps=3, ema_decay=0.5, **options
):
    """Parameters and states after some steps, of an array that lies somewhere."""
    raw = np.zeros(values.nbytes + 128, np.uint8)
    start = (-raw.ctypes.data) % 64 + offset
    param = raw[start : start + values.nbytes].view(dtype)
    param[...] = values
    others = [numbers(3, dtype) for _ in range(index)]
    opt = make(name, [*others, param], rounding="stochastic", state_dtype=state_dtype, ema_decay=ema_decay, **options)
    for step in range(steps):
        grad = numbers(values.size, dtype, seed=step)
        if strided:
            grad = np.repeat(grad, 2)[::2]
        opt.step([*(np.zeros_like(other) for other in others), grad])
    return [param.copy(), *(array.copy() for array in opt.state[index].values())]


@pytest.mark.parametrize("ema_decay", [0.5, None], ids=["averaged", "alone"])
@pytest.mark.parametrize("state_dtype", [None, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_bits_do_not_depend_on_machine_place_or_chunking(dtype, state_dtype, ema_decay):
    if dtype == FLOAT16 and state_dtype is not None:
        dtype = np.dtype(np.float32)
    values = numbers(5003, dtype)
    want = trained(dtype, values, state_dtype=state_dtype, ema_decay=ema_decay)
    assert np.mean(want[0] != values) > 0.9
    with_average = trained(dtype, values, state_dtype=state_dtype)  # takes the same numbers, in another loop
    for a, b in zip(want, with_average, strict=ema_decay is not None):
        assert_same_bits(a, b)
    for isa, threads in MACHINES:
        onepass.set_isa(isa)
        onepass.set_num_threads(threads)
        for serial_bytes, offset, strided in ((0, 0, False), (1 << 30, 2, False), (0, 7, True), (0, 62, False)):
            _cpu.set_serial_bytes(serial_bytes)
            where = {"offset": offset, "strided": strided}
            got = trained(dtype, values, state_dtype=state_dtype, ema_decay=ema_decay, **where)
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a, b, f"{isa} {threads} {offset} {strided}")


def test_bits_do_not_depend_on_where_in_a_tensor_a_part_begins(tmp_path, tmp_path_factory):
    """Behind 2**32 elements and 2**32 counters, too, where no array of a test reaches."""
    folder = builds.folder_of_package() or builds.consumer(tmp_path_factory)
    (library,) = folder.rglob("libonepass_cpu.a")
    source = builds.ROOT / "tests" / "cpp" / "rounding_places.cpp"
    flags = ("-std=c++20", "-O1", f"-I{builds.ROOT / 'csrc'}", "-pthread")
    builds.tool(os.environ.get("CXX", "c++"), *flags, source, library, "-o", tmp_path / "places")
    compared, wrong = map(int, re.findall(r"\d+", builds.tool(tmp_path / "places").splitlines()[-1]))
    assert compared > 30 * 10 * len(ISAS)
    assert wrong == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 1000, 1023, 1024, 1025])
@pytest.mark.parametrize("isa", ISAS)
def test_bits_of_the_first_elements_do_not_depend_on_how_many_follow(isa, length):
    onepass.set_isa(isa)
    values = numbers(5003, BFLOAT16)
    whole, part = values.copy(), values[:length].copy()
    grad = numbers(5003, np.float32, seed=1)
    for param, size in ((whole, 5003), (part, length)):
        onepass.SGD(param, lr=1e-3, rounding="stochastic", seed=2**40 + 1).step(grad[:size])
    assert_same_bits(part, whole[:length])


def test_each_purpose_step_parameter_and_seed_has_bits_of_its_own():
    count = 4000
    values = np.full(count, 1.0, BFLOAT16)

    def run(**changes):
        given = {"steps": 1, "name": "Momentum", "seed": 5, **changes}
        return trained(BFLOAT16, values, state_dtype=BFLOAT16, lr=1e-3, **given)

    base = run()
    for other in (run(seed=6), run(seed=5 + 2**32), run(seed=2**64 - 1), run(index=1), run(index=2)):
        for a, b in zip(base[:2], other[:2], strict=True):
            assert np.mean(a != b) > 0.1
    params = []
    opt = make("SGD", param := values.copy(), lr=1e-3, rounding="stochastic", seed=5)
    for _ in range(3):  # the same numbers at another step
        param[...] = 1
        opt.step(np.ones(count, BFLOAT16))
        params.append(param.copy())
    for k, a in enumerate(params):
        for b in params[:k]:
            assert 0.1 < np.mean(a != b) < 0.9
    first = params[0]
    for period in (1, 2, 8, 16, 32, 64, 128, 256, 1024):
        assert np.mean(first[period:] != first[:-period]) > 0.05, "neighbours have other numbers"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_bits_are_the_documented_ones(dtype):
    """Purposes: 1 parameter, 3 average, 4 and on the states; the element's place in memory, the parameter's step."""
    count = 700
    params = [numbers(3, dtype), np.asfortranarray(numbers((20, 35), dtype))]
    start = params[1].copy(order="K")
    opt = onepass.SGD(params, lr=2.0**-6, rounding="stochastic", seed=2**64 - 3, ema_decay=0.5)
    grads = [numbers((20, 35), dtype, seed=step) for step in range(2)]
    p = narrow.widen(start.ravel(order="K"), np.float32)
    average = None
    for t, grad in enumerate(grads, start=1):
        opt.step([None, grad])
        x = p - np.float32(2.0**-6) * narrow.widen(grad.ravel(order="F"), np.float32)
        bits = philox.rounding_bits(2**64 - 3, 1, t, 1, 0, count)
        stored = narrow.stochastic(x, dtype, bits)
        assert_same_bits(params[1].ravel(order="K"), stored)
        p = narrow.widen(stored, np.float32)
        e = p if average is None else np.float32(0.5) * average + np.float32(0.5) * p
        stored = narrow.stochastic(e, dtype, philox.rounding_bits(2**64 - 3, 1, t, 3, 0, count))
        assert_same_bits(opt.ema[1].ravel(order="K"), stored)
        average = narrow.widen(stored, np.float32)
    assert np.mean(params[1] != start) > 0.5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_can_be_represented_stays(dtype, isa):
    """Every number of the type, subnormals of float16 included: a step of nothing changes none, whatever the seed."""
    onepass.set_isa(isa)
    patterns = np.arange(65536, dtype=np.uint16).view(dtype)
    wide = narrow.widen(patterns, np.float32)
    subnormal = np.abs(wide) < np.finfo(np.float32).tiny
    want = (
        np.where(subnormal, patterns.view(np.uint16) & 0x8000, patterns.view(np.uint16)).astype(np.uint16).view(dtype)
    )
    for seed in range(5):
        param = patterns.copy()
        opt = onepass.SGD(param, lr=1.0, rounding="stochastic", seed=seed, ema_decay=0.5)
        opt.step(np.zeros(65536, dtype))
        assert_same_bits(param, want)
        assert_same_bits(opt.ema, want)


@pytest.mark.parametrize("isa", ISAS)
def test_the_borders_of_the_narrow_types(isa):
    onepass.set_isa(isa)
    count = 4096
    for dtype, x, below, above in (
        (FLOAT16, 65520.0, 65504.0, math.inf),
        (FLOAT16, -65535.0, -65504.0, -math.inf),
        (FLOAT16, 2.0**-25, 0.0, 2.0**-24),
        (FLOAT16, -1.5 * 2.0**-24, -(2.0**-24), -(2.0**-23)),
        (FLOAT16, 2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-24, 2.0**-14),
        (BFLOAT16, 2.0 - 2.0**-9, 2.0 - 2.0**-7, 2.0),
    ):
        param, velocity = np.zeros(count, dtype), np.full(count, -x, np.float32)
        functional.momentum(
            param,
            np.zeros(count, dtype),
            velocity,
            step=1,
            lr=1.0,
            momentum=math.nextafter(1.0, 0.0),
            rounding="stochastic",
            seed=3,
        )
        values = narrow.widen(param, np.float64)
        assert set(np.unique(values)) == {below, above}
        upper = 65536.0 if math.isinf(above) else abs(above)
        share = (abs(x) - abs(below)) / (upper - abs(below))
        assert abs(np.mean(values == above) - share) < 5 * math.sqrt(0.25 / count)


def test_wide_arrays_are_not_rounded():
    for dtype in (np.float32, np.float64):
        a, b = numbers(333, dtype), numbers(333, dtype)
        onepass.Adam(a, rounding="stochastic", seed=1).step(numbers(333, dtype, seed=1))
        onepass.Adam(b).step(numbers(333, dtype, seed=1))
        assert_same_bits(a, b)


def test_mirrors_are_rounded_to_nearest():
    for dtype in (np.float32, BFLOAT16):
        param, mirror = numbers(999, dtype), np.zeros(999, np.float16 if dtype == BFLOAT16 else BFLOAT16)
        onepass.SGD(param, mirror=mirror, rounding="stochastic", seed=1).step(numbers(999, dtype, seed=1))
        assert_same_bits(mirror, narrow.nearest(narrow.widen(param, np.float32), mirror.dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_by_the_reference(name):
    """Parameters, states and averages at once, each with bits of its own."""
    options = {"rounding": "stochastic", "seed": 2**63, "state_dtype": "bfloat16", "ema_decay": 0.75}
    kinds = [Kind((n,), "bfloat16", offset=n % 5) for n in (1, 17, 33, 1100)]
    kinds.append(Kind((29, 41), "bfloat16", axes=(1, 0), layout="reversed"))
    check(functools.partial(make, name), kinds, options, [Call()] * 3, machines=FEW_MACHINES, what=name)


def test_seeds_and_steps_beyond_32_bits():
    """The step count as a state_dict can set it."""
    for t in (1, 2**32 - 2, 2**32 + 5, 2**40):
        param = np.ones(300, BFLOAT16)
        opt = onepass.SGD(param, lr=2.0**-10, rounding="stochastic", seed=2**64 - 1)
        state = opt.state_dict()
        state["state"][0]["step"] = t - 1
        opt.load_state_dict(state)
        opt.step(np.ones(300, BFLOAT16))
        bits = philox.rounding_bits(2**64 - 1, 0, t, 1, 0, 300)
        assert_same_bits(param, narrow.stochastic(np.full(300, np.float32(1 - 2.0**-10)), BFLOAT16, bits))
        assert 0 < np.mean(param != 1) < 1

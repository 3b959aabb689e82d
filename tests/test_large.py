"""Promise: right results in tensors of more than 2**32 elements, and in optimizers of 100,000 tensors."""

from __future__ import annotations

import gc
import math
import pathlib
import time

import numpy as np
import pytest

import onepass
from helpers import assert_same_bits, bits, numbers, settings
from reference import narrow, philox, whole_step
from training import BFLOAT16, ISAS

pytestmark = pytest.mark.large

GIB = 2**30
LR = 2.0**-4
# Prime: no block, chunk or thread's share begins twice at the same place of a pattern of so many elements.
PERIOD = 999_983


def available_bytes():
    """What the machine has left, or the control group of this process where that is less."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    available = next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))
    limit, used = (pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def need_memory(need):
    available = available_bytes()
    if available is None:
        pytest.skip(f"needs {need / GIB:.1f} GiB of memory, and this system does not say how much there is")
    if available < need:
        pytest.skip(f"needs {need / GIB:.1f} GiB of memory, and {available / GIB:.1f} are available")
    gc.collect()


def patterns():
    """Of a parameter, and of a gradient of powers of two: in any order the sum of their squares is exact."""
    rng = np.random.default_rng(0)
    param = (rng.uniform(0.5, 4.0, PERIOD) * rng.choice([-1.0, 1.0], PERIOD)).astype(np.float32).astype(BFLOAT16)
    grad = (2.0 ** rng.integers(-2, 3, PERIOD) * rng.choice([-1.0, 1.0], PERIOD)).astype(BFLOAT16)
    return param, grad


def tile(array, pattern):
    for start in range(0, array.size, pattern.size):
        array[start : start + pattern.size] = pattern[: array.size - start]


def assert_tiled(array, pattern, what):
    """In bits, every element."""
    got, want = array.view(np.uint16), pattern.view(np.uint16)
    for start in range(0, got.size, want.size):
        chunk = got[start : start + want.size]
        if not np.array_equal(chunk, want[: chunk.size]):
            first = int(np.flatnonzero(chunk != want[: chunk.size])[0])
            raise AssertionError(f"{what}: element {start + first} is {array[start + first]}, not {pattern[first]}")


def exact_norm(grad, count):
    squares = np.square(grad.astype(np.float64))
    whole, rest = divmod(count, grad.size)
    return math.sqrt(whole * math.fsum(squares) + math.fsum(squares[:rest]))


def reference_step(param, grad, scale):
    tensor = whole_step.Tensor("sgd", param, grad=grad, coefficients={"step": LR})
    return whole_step.step([tensor], grad_scale=scale).tensors[0].param


def test_more_elements_than_31_bits_count_in_parameter_and_gradient():
    need_memory(int(8.6 * GIB))
    count = 2**31 + 12_347
    param_pattern, grad_pattern = patterns()
    param, grad = np.empty(count, BFLOAT16), np.empty(count, BFLOAT16)
    tile(param, param_pattern)
    tile(grad, grad_pattern)
    norm = exact_norm(grad_pattern, count)
    opt = onepass.SGD(param, lr=LR)
    want = param_pattern
    for number, (threads, limit) in enumerate([(2, norm / 2), (1, None)]):
        isa = ISAS[-1 - number % len(ISAS)]
        with settings(threads=threads, isa=isa):
            opt.step(grad, max_grad_norm=limit)
        assert opt.grad_norm == (None if limit is None else norm)
        before, want = want, reference_step(want, grad_pattern, 1.0 if limit is None else 0.5)
        assert np.mean(before != want) > 0.8
        assert_tiled(param, want, f"{isa}, {threads} threads")


def test_random_numbers_and_strides_beyond_32_bits_of_elements():
    """The gradient repeats one row in memory, so that there is room for a parameter of more than 2**32 elements."""
    need_memory(int(9 * GIB))
    rows = 2**32 // PERIOD + 2
    count = rows * PERIOD
    param_pattern, grad_pattern = patterns()
    flat = np.empty(count, BFLOAT16)
    tile(flat, param_pattern)
    grad = np.lib.stride_tricks.as_strided(grad_pattern, (rows, PERIOD), (0, 2), writeable=False)
    seed, norm = 2**40 + 17, exact_norm(grad_pattern, count)
    opt = onepass.SGD(flat.reshape(rows, PERIOD), lr=LR, rounding="stochastic", seed=seed)
    with settings(threads=2):
        opt.step(grad, max_grad_norm=norm / 2)
    assert opt.grad_norm == norm
    exact = narrow.widen(param_pattern, np.float32) - np.float32(LR) * (
        np.float32(0.5) * narrow.widen(grad_pattern, np.float32)
    )
    # Everywhere one of the two neighbours: the bits of the number that was cut off, or one more.
    low = (exact.view(np.uint32) >> 16).astype(np.uint16)
    up, distance = 0, np.empty(PERIOD, np.uint16)
    for row in range(rows):
        np.subtract(flat[row * PERIOD : (row + 1) * PERIOD].view(np.uint16), low, out=distance)
        assert distance.max() <= 1, f"row {row}"
        up += int(np.count_nonzero(distance))
    share = (exact.view(np.uint32) & 0xFFFF).astype(np.float64) / 65536
    assert abs(up - rows * share.sum()) < 6 * math.sqrt(rows * (share * (1 - share)).sum())
    # And where elements are counted by larger and larger numbers, the one that their place decides.
    width = 5000
    places = [0, count // 2 - width // 2, count - width, *(2**k - width // 2 for k in (16, 24, 29, 30, 31, 32))]
    places += np.random.default_rng(1).integers(2**32, count - width, 10).tolist()
    for begin in places:
        window = exact[np.arange(begin, begin + width) % PERIOD]
        r = philox.rounding_bits(seed, 0, 1, philox.PARAMETER, begin, begin + width)
        want = narrow.narrow(window, BFLOAT16, r)
        assert bits(flat[begin : begin + width]) == bits(want), f"elements from {begin}"


TENSORS = 100_000


def sizes():
    return np.array([(0, 1, 3, 7, 0, 16, 33)[k % 7] for k in range(TENSORS)])


def test_a_hundred_thousand_tensors():
    """They have the bits of the same numbers in one tensor, or in two where some have no gradient."""
    lengths = sizes()
    ends = np.cumsum(lengths)
    flat = numbers(int(ends[-1]), seed=1)
    rng = np.random.default_rng(2)
    grad = (2.0 ** rng.integers(-2, 3, flat.size) * rng.choice([-1.0, 1.0], flat.size)).astype(np.float32)
    norm = math.sqrt(math.fsum(np.square(grad.astype(np.float64))))

    def pieces(array):
        return [array[end - length : end].copy() for length, end in zip(lengths, ends, strict=True)]

    params, grads = pieces(flat), pieces(grad)
    sparse = [g if k % 3 else None for k, g in enumerate(grads)]
    given = np.repeat(np.arange(TENSORS) % 3 != 0, lengths)
    twin_params = [flat[given], flat[~given]]
    twin_grads = [grad[given], grad[~given]]

    opt = onepass.AdamW(params, lr=LR)
    twin = onepass.AdamW(twin_params, lr=LR)
    assert len(opt.state) == TENSORS

    def assert_same(opt, twin, params):
        for name, arrays, wanted in [
            ("params", params, twin_params),
            *((name, [s[name] for s in opt.state], [s[name] for s in twin.state]) for name in opt.state[0]),
        ]:
            together = np.concatenate(arrays)
            assert_same_bits([together[given], together[~given]], wanted)
            assert [array.size for array in arrays] == lengths.tolist(), name

    steps = [
        (grads, twin_grads, {}),
        (sparse, [twin_grads[0], None], {}),
        (grads, twin_grads, {"max_grad_norm": norm / 2}),
        ([None] * TENSORS, [None, None], {}),
        (sparse, [twin_grads[0], None], {"max_grad_norm": norm, "nonfinite": "raise"}),
    ]
    for number, (ours, theirs, options) in enumerate(steps):
        with settings(threads=1 + number % 2):
            before = np.concatenate(params)
            opt.step(ours, **options)
            twin.step(theirs, **options)
        assert opt.grad_norm == twin.grad_norm == (norm if number == 2 else opt.grad_norm)
        moved = np.concatenate(params) != before
        want = np.repeat([g is not None for g in ours], lengths)
        np.testing.assert_array_equal(moved, want)
        assert_same(opt, twin, params)
    assert set(opt.step_counts[::3]) == {2}
    assert set(opt.step_counts[1::3]) == {4}

    state = opt.state_dict()
    assert len(state["state"]) == TENSORS
    loaded_params = [p.copy() for p in params]
    loaded = onepass.AdamW(loaded_params)
    loaded.load_state_dict(state)
    assert loaded.step_counts == opt.step_counts
    for number in range(2):
        for each in (opt, loaded):
            each.step(grads if number else sparse)
        twin.step(twin_grads if number else [twin_grads[0], None])
    assert_same(opt, twin, params)
    assert_same(loaded, twin, loaded_params)


def test_a_bad_gradient_among_a_hundred_thousand():
    lengths = sizes()
    params = [numbers(int(n), seed=k % 100) for k, n in enumerate(lengths)]
    grads = [p.copy() for p in params]
    opt = onepass.SGD(params)
    before = np.concatenate(params)
    last = TENSORS - 1 - int(np.argmax(lengths[::-1] > 0))
    for index in (0, last):
        for bad, error, what in [
            (np.zeros(5, np.float32), ValueError, r"shape \(5,\) does not match its parameter's"),
            (np.zeros(lengths[index]), TypeError, "dtype float64 does not match its parameter's float32"),
            (None if lengths[index] == 0 else params[index], ValueError, r"overlaps params\["),
        ]:
            if bad is None:
                continue
            with pytest.raises(error, match=rf"^grads\[{index}\]: {what}"):
                opt.step([*grads[:index], bad, *grads[index + 1 :]])
            assert np.concatenate(params).tobytes() == before.tobytes()
    with pytest.raises(ValueError, match=rf"^params\[{TENSORS}\]: overlaps params\[{last}\] in memory"):
        onepass.SGD([*params, params[last]])
    assert set(opt.step_counts) == {0}


def test_an_unknown_name_among_a_hundred_thousand_takes_no_time():
    """An error is not the place for a quadratic search."""
    params = {f"layer{k}": np.ones(1, np.float32) for k in range(TENSORS)}
    opt = onepass.SGD(params)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"^grads: 'weight' is not the name of a parameter$"):
        opt.step({**params, "weight": np.ones(1, np.float32)})
    assert time.perf_counter() - start < 5.0

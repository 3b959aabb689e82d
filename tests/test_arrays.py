"""Promise: the user's own arrays, whatever their layout, in place, and not a byte beside them."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import warnings
import weakref

import numpy as np
import pytest

import onepass
from helpers import (
    CASES,
    FEW,
    BareProducer,
    HandMade,
    OldProducer,
    Producer,
    Snapshot,
    arrays_of,
    assert_equal_optimizers,
    assert_moved,
    assert_same_bits,
    copied,
    guarded,
    make,
    numbers,
)

STEPS = 3
DTYPES = ("float32", "float64")

# Shape and memory order (axes from the slowest to the fastest): below, at and above the widest vector of 16 lanes, and
# above a block of 512 gathered elements.
LAYOUTS = {
    "0d": ((), ()),
    "1": ((1,), (0,)),
    "17": ((17,), (0,)),
    "1100": ((1100,), (0,)),
    "C-5x7": ((5, 7), (0, 1)),
    "F-5x7": ((5, 7), (1, 0)),
    "F-40x33": ((40, 33), (1, 0)),
    "C-3x4x5": ((3, 4, 5), (0, 1, 2)),
    "F-3x4x5": ((3, 4, 5), (2, 1, 0)),
    "permuted-3x4x5": ((3, 4, 5), (1, 2, 0)),
    "channels-last": ((2, 3, 8, 9), (0, 2, 3, 1)),
    "permuted-5d": ((2, 3, 4, 3, 5), (3, 0, 4, 2, 1)),
    "with-ones": ((1, 4, 1, 6), (3, 0, 1, 2)),
    "empty": ((0,), (0,)),
    "empty-F": ((3, 0, 2), (2, 1, 0)),
}


def in_order(values, axes):
    """A copy whose axes lie in memory from `axes[0]`, the slowest, to `axes[-1]`."""
    array = np.ascontiguousarray(values.transpose(axes)).reshape([values.shape[a] for a in axes])
    return array.transpose(np.argsort(np.array(axes, dtype=int)))


def with_gaps(values):
    """The same values with two unused elements after each and unused rows after each row."""
    big = np.full([3 * n for n in values.shape], np.nan, values.dtype)
    view = big[tuple(slice(1, None, 3) for _ in values.shape)] if values.ndim else big.reshape(())
    view[...] = values
    return view


def backwards(values):
    flip = (..., *[slice(None, None, -1)] * values.ndim)
    return values[flip].copy()[flip]


def backwards_with_gaps(values):
    flip = (..., *[slice(None, None, -1)] * values.ndim)
    return with_gaps(values[flip])[flip]


def misaligned(values, order="C"):
    buffer = np.zeros(values.nbytes + 8, np.uint8)
    view = np.ndarray(values.shape, values.dtype, buffer, offset=3, order=order)
    view[...] = values
    return view


def every_other_byte_order_of_axes(values):
    return in_order(values, tuple(np.random.default_rng(values.size).permutation(values.ndim)))


def negative_first_axis(values):
    return values[::-1].copy()[::-1] if values.ndim else values


def of_a_field(values):
    records = np.zeros(values.shape, [("skip", np.uint8), ("value", values.dtype), ("more", np.uint16)])  # packed
    records["value"] = values
    return records["value"]


def read_only(values):
    copy = values.copy()
    copy.flags.writeable = False
    return copy


GRADIENTS = {
    "C": lambda v: v.copy(order="C"),
    "F": lambda v: v.copy(order="F"),
    "gaps": with_gaps,
    "backwards": backwards,
    "backwards-gaps": backwards_with_gaps,
    "negative-first": negative_first_axis,
    "permuted": every_other_byte_order_of_axes,
    "misaligned": misaligned,
    "misaligned-F": lambda v: misaligned(v, "F"),
    "field": of_a_field,
    "read-only": read_only,
    "dlpack": lambda v: Producer(v.copy()),
    "dlpack-F-old": lambda v: OldProducer(v.copy(order="F")),
    "dlpack-backwards": lambda v: Producer(backwards(v)),
    "dlpack-read-only": lambda v: HandMade(v.copy(), flags=1),
}


def trained(case, param, gradients):
    """The optimizer after a step for each gradient, each of which moved every element."""
    opt = make(case, [param])
    for gradient in gradients:
        before = copied(arrays_of([param]))
        opt.step([gradient])
        if before[0].size:
            assert_moved(before, arrays_of([param]))
    return opt


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_any_dense_parameter_and_any_gradient_give_the_bits_of_contiguous_ones(case, layout, dtype):
    shape, axes = LAYOUTS[layout]
    gradients = [numbers(shape, dtype, seed=20 + k) for k in range(STEPS)]
    plain = numbers(shape, dtype, seed=1)
    expected = trained(case, plain, gradients)
    for name, form in GRADIENTS.items():
        param, untouched = guarded(shape, dtype, axes=axes, offset=4 * (len(name) % 2), seed=1)
        address = param.ctypes.data
        given = [form(g) for g in gradients]
        was = [g.tobytes() for g in arrays_of(given)]
        opt = trained(case, param, given)
        assert untouched(), name
        assert param.ctypes.data == address
        assert [g.tobytes() for g in arrays_of(given)] == was, name
        assert_same_bits(param, plain)
        assert_equal_optimizers(opt, expected)
        for state in opt.state[0].values():
            assert state.shape == shape
            if plain.size > 1:  # it lies in memory as its parameter does
                strides = zip(shape, state.strides, param.strides, strict=True)
                assert all(a == b for n, a, b in strides if n > 1), name


def test_the_layouts_are_what_they_are_called():
    values = numbers((3, 4))
    assert with_gaps(values).strides == (4 * 36, 12)
    assert backwards(values).strides == (-16, -4)
    assert not misaligned(values).flags.aligned
    assert of_a_field(values).strides == (28, 7)
    for form in GRADIENTS.values():
        assert_same_bits(arrays_of([form(values)])[0].copy(order="C"), values)
    for shape, axes in LAYOUTS.values():
        array, untouched = guarded(shape, axes=axes)
        assert untouched()
        lengths = [n for n in shape if n > 1]
        assert array.size == math.prod(shape)
        steps = [array.strides[a] for a in axes if shape[a] > 1]
        assert array.size == 0 or steps == sorted(steps, reverse=True)
        assert len(steps) == len(lengths) or array.size == 0


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 5)])
def test_a_gradient_of_stride_0(case, shape):
    for kept in itertools.product([False, True], repeat=len(shape)):
        small = numbers([n if k else 1 for n, k in zip(shape, kept, strict=True)], seed=4)
        gradient = np.broadcast_to(small, shape)
        for axes in itertools.permutations(range(len(shape))):
            param, untouched = guarded(shape, axes=axes, seed=1)
            plain = numbers(shape, seed=1)
            opt = trained(case, param, [gradient, gradient])
            expected = trained(case, plain, [gradient.copy()] * 2)
            assert untouched()
            assert_same_bits(param, plain)
            assert_equal_optimizers(opt, expected)


@pytest.mark.parametrize("case", FEW)
def test_a_gradient_of_overlapping_windows(case):
    line = numbers(40, seed=4)
    gradient = np.lib.stride_tricks.sliding_window_view(line, 8)  # (33, 8), strides (4, 4)
    param, plain = numbers((33, 8), seed=1), numbers((33, 8), seed=1)
    opt = trained(case, param, [gradient, gradient.T[::-1, ::-1].T])
    expected = trained(case, plain, [gradient.copy(), gradient[::-1, ::-1].copy()])
    assert_same_bits(param, plain)
    assert_equal_optimizers(opt, expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_all_orders_of_five_axes(order):
    shape = (2, 3, 2, 4, 3)
    plain = numbers(shape, seed=1)
    gradient = numbers(shape, seed=2)
    expected = trained("Adam", plain, [gradient, gradient])
    for axes in itertools.permutations(range(5)):
        param = numbers(shape, seed=1, order=order)
        opt = trained("Adam", param, [in_order(gradient, axes), in_order(gradient, axes)[..., ::-1].copy()[..., ::-1]])
        assert_same_bits(param, plain)
        assert_equal_optimizers(opt, expected)
        param = in_order(numbers(shape, seed=1), axes)
        opt = trained("Adam", param, [gradient.copy(order=order)] * 2)
        assert_same_bits(param, plain)
        assert_equal_optimizers(opt, expected)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 7])
def test_a_parameter_that_starts_at_any_byte(case, dtype, offset):
    for size in (1, 3, 16, 33, 700):
        param, untouched = guarded((size,), dtype, offset=offset, seed=1)
        assert param.ctypes.data % 64 == offset
        plain = numbers((size,), dtype, seed=1)
        gradient = numbers((size,), dtype, seed=2)
        opt = trained(case, param, [misaligned(gradient), gradient])
        assert_equal_optimizers(opt, trained(case, plain, [gradient, gradient]))
        assert_same_bits(param, plain)
        assert untouched()


def test_a_parameter_from_a_buffer():
    memory = bytearray(b"\xa5" * 3 + numbers(21).tobytes() + b"\xa5" * 5)
    param = np.frombuffer(memory, np.float32, count=21, offset=3)
    plain = numbers(21)
    opt = trained("Adam", param, [numbers(21, seed=2)])
    assert_equal_optimizers(opt, trained("Adam", plain, [numbers(21, seed=2)]))
    assert memory == b"\xa5" * 3 + plain.tobytes() + b"\xa5" * 5


@pytest.mark.parametrize("case", FEW)
def test_axes_of_length_1_may_have_any_stride(case):
    for strides in [(4, 7, -12), (0, 4, 0), (-4, 4, 2**40), (4, 4, 4)]:
        param = np.lib.stride_tricks.as_strided(numbers(6, seed=1), (1, 6, 1), (strides[0], 4, strides[2]))
        plain = numbers((1, 6, 1), seed=1)
        gradient = np.lib.stride_tricks.as_strided(numbers(6, seed=2), (1, 6, 1), (strides[2], 4, strides[0]))
        opt = trained(case, param, [gradient, gradient])
        assert_equal_optimizers(opt, trained(case, plain, [gradient.copy()] * 2))
        assert_same_bits(param, plain)


@pytest.mark.parametrize("case", FEW)
def test_empty_arrays_among_others(case):
    shapes = [(0,), (5,), (0, 3), (2, 0, 4), (3, 4), (), (0,)]
    params = [numbers(shape, seed=k) for k, shape in enumerate(shapes)]
    grads = [numbers(shape, seed=10 + k) for k, shape in enumerate(shapes)]
    alone = [k for k, shape in enumerate(shapes) if math.prod(shape) > 0]
    others = copied([params[k] for k in alone])
    opt, expected = make(case, params), make(case, others)
    for _ in range(STEPS):
        before = copied(others)
        opt.step(grads)
        expected.step([grads[k] for k in alone])
        assert_moved(before, others)
    assert_same_bits([params[k] for k in alone], others)
    assert opt.step_counts == (STEPS,) * len(shapes)
    for k, state in enumerate(opt.state):
        assert all(array.shape == shapes[k] for array in state.values())
    only = make(case, [params[0], params[2]])
    only.step([grads[0], np.ones((0, 3), np.float32, order="F")[::-1]])
    assert only.step_counts == (1, 1)


def test_empty_arrays_overlap_nothing():
    param = numbers(6)
    opt = onepass.Momentum([param, param[2:2], param[3:3], param[:0].reshape(0, 4)])
    before = param.copy()
    opt.step([numbers(6, seed=1), param[1:1], opt.state[0]["velocity"][:0], np.empty((0, 4), np.float32)])
    assert_moved(before, param)


@pytest.mark.parametrize("case", FEW)
def test_a_gradient_around_what_is_written(case):
    # Their ranges meet, their elements do not.
    big = numbers((6, 8), seed=1)
    param, gradient = big[2], big[1::2, 3:7][:2]  # the rows 1 and 3: around the parameter in row 2
    other = numbers((2, 4), seed=2)
    assert gradient.ctypes.data < param.ctypes.data < gradient[1:].ctypes.data
    plain, plain_other = copied([param, other])
    opt, expected = make(case, [param, other]), make(case, [plain, plain_other])
    mine = numbers(8, seed=3)
    values, rest = gradient.copy(), big.copy()
    for _ in range(STEPS):
        before = copied([param, other])
        opt.step([mine, gradient])
        expected.step([mine, values])
        assert_moved(before, [param, other])
    assert_same_bits([param, other], [plain, plain_other])
    assert_equal_optimizers(opt, expected)
    rest[2] = plain
    np.testing.assert_array_equal(big, rest)


def test_gradients_that_lie_among_parameters_and_among_each_other():
    slab = numbers(200, seed=1)
    comb = numbers(80, seed=2)
    params = [numbers(40, seed=3), numbers(40, seed=4), slab[100:140], slab[160:180].reshape(2, 10), slab[180:200]]
    around = np.lib.stride_tricks.as_strided(slab[90:], (2, 10), (4 * 60, 4))  # 90..99 and 150..159
    one = np.lib.stride_tricks.as_strided(slab[95:], (40,), (0,))
    grads = [comb[0::2], comb[1::2], one, around, np.broadcast_to(around[1:, 9], (20,))]
    plain, values, before = copied(params), [g.copy() for g in grads], slab.copy()
    opt, expected = make("Adam", params), make("Adam", plain)
    for _ in range(2):
        start = copied(params)
        opt.step(grads)
        expected.step(values)
        assert_moved(start, params)
    assert_same_bits(params, plain)
    assert_equal_optimizers(opt, expected)
    np.testing.assert_array_equal(slab[:100], before[:100])
    np.testing.assert_array_equal(slab[140:160], before[140:160])


@pytest.mark.parametrize("case", FEW)
def test_one_gradient_for_two_parameters(case):
    params = [numbers((2, 3), seed=1), numbers((2, 3), seed=2, order="F"), numbers((3, 2), seed=3)]
    plain = copied(params)
    shared = numbers((2, 3), seed=4)
    opt, expected = make(case, params), make(case, plain)
    for _ in range(STEPS):
        before = copied(params)
        opt.step([shared, shared, shared.T])
        expected.step([shared.copy(), shared.copy(), shared.T.copy()])
        assert_moved(before, params)
    assert_same_bits(params, plain)
    assert_equal_optimizers(opt, expected)


# Kinds of arrays


class Marked(np.ndarray):
    """A subclass that would betray a copy."""

    def __array_finalize__(self, obj):
        self.made_from = obj


@pytest.mark.parametrize("case", FEW)
def test_subclasses_of_ndarray(case, tmp_path):
    mapped = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(4, 6))
    mapped[...] = numbers((4, 6), seed=1)
    params = [mapped, numbers((4, 6), seed=1).view(Marked), numbers((4, 6), seed=1).view(np.recarray)]
    addresses = [p.ctypes.data for p in params]
    plain = numbers((4, 6), seed=1)
    gradients = [numbers((4, 6), seed=2), numbers((4, 6), seed=3)]
    opt = make(case, params)
    for g in gradients:
        before = copied(params)
        opt.step([g.view(Marked), g.view(np.recarray), g])
        assert_moved(before, params)
    expected = trained(case, plain, gradients)
    for p, state in zip(params, opt.state, strict=True):
        assert_same_bits(np.asarray(p), plain)
        for name, array in state.items():
            assert type(array) is np.ndarray
            assert_same_bits(array, expected.state[0][name])
    assert [p.ctypes.data for p in params] == addresses
    mapped.flush()
    assert_same_bits(np.fromfile(tmp_path / "weights", np.float32).reshape(4, 6), plain)


@pytest.mark.parametrize("case", FEW)
def test_a_subclass_that_lies_about_its_arithmetic(case):
    class Lying(np.ndarray):
        def __array_ufunc__(self, *_args, **_kwargs):
            raise AssertionError("nobody asked for NumPy's arithmetic")

    param, plain = numbers(9, seed=1).view(Lying), numbers(9, seed=1)
    gradient = numbers(9, seed=2)
    opt = make(case, param)
    opt.step(gradient.view(Lying))
    expected = trained(case, plain, [gradient])
    assert_same_bits(param.view(np.ndarray), plain)
    assert_equal_optimizers(opt, expected)


PRODUCERS = {
    "versioned": Producer,
    "old": OldProducer,
    "bare": BareProducer,
    "hand-made": HandMade,
    "hand-made-old": lambda a: HandMade(a, version=None),
    "hand-made-offset": lambda a: HandMade(a, byte_offset=256),
    "pinned": lambda a: HandMade(a, device=(3, 0)),
    "list-device": lambda a: HandMade(a, device=[1, 0]),
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_arrays_that_come_by_dlpack(case, producer):
    wrap = PRODUCERS[producer]
    params, guards = zip(
        guarded((4, 6), seed=1),
        guarded((3, 4, 5), np.float64, axes=(1, 2, 0), seed=2),
        guarded((), seed=3),
        guarded((0, 2), seed=4),
        strict=True,
    )
    plain = copied(list(params))
    gradients = [numbers(p.shape, p.dtype, seed=10 + k) for k, p in enumerate(params)]
    opt = make(case, [wrap(p) for p in params])
    expected = make(case, plain)
    for _ in range(STEPS):
        before = copied(list(params))
        opt.step([wrap(g) for g in gradients])
        expected.step(gradients)
        assert_moved(before[:3], list(params[:3]))
    assert_same_bits(list(params), plain)
    assert_equal_optimizers(opt, expected)
    assert all(untouched() for untouched in guards)


@pytest.mark.parametrize("version", [None, 1])
def test_a_capsule_without_strides_is_in_c_order(version):
    param, plain = numbers((3, 4, 5), seed=1), numbers((3, 4, 5), seed=1)
    gradient = numbers((3, 4, 5), seed=2)
    opt = make("Adam", HandMade(param, c_order=True, version=version))
    opt.step(HandMade(gradient, c_order=True, version=version))
    assert_equal_optimizers(opt, trained("Adam", plain, [gradient]))
    assert_same_bits(param, plain)


def test_a_producer_may_hand_out_other_memory_at_each_step():
    class Moving:
        """A framework's tensor, whose storage another part of the program replaces."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

    gradient = numbers((4, 6), seed=2)
    for case in FEW:
        holder, plain = Moving(numbers((4, 6), seed=1)), numbers((4, 6), seed=1)
        opt, expected = make(case, [holder]), make(case, [plain])
        for step in range(4):
            # New memory, in another order than the states have: C, F, C, F.
            old, holder.array = holder.array, np.array(holder.array, order="CF"[step % 2], copy=True)
            was, before = old.copy(), plain.copy()
            opt.step([gradient])
            expected.step([gradient])
            assert_moved(before, plain)
            assert_same_bits(old, was)
            assert_same_bits(holder.array, plain)
        assert_equal_optimizers(opt, expected)


def test_capsules_are_let_go_of():
    class Counted(np.ndarray):
        pass

    param, grad = numbers(4).view(Counted), numbers(4, seed=1).view(Counted)
    opt = onepass.Adam([BareProducer(param)])
    plain_count = sys.getrefcount(param)
    for k in range(3):
        opt.step([BareProducer(grad)])
        with pytest.raises(ValueError, match="shape"):
            opt.step([BareProducer(grad[:2])])
        assert opt.step_counts == (k + 1,)
    assert sys.getrefcount(param) == plain_count
    seen = weakref.ref(grad)
    del grad
    gc.collect()
    assert seen() is None  # a step keeps no gradient
    inner = weakref.ref(param)
    del opt, param
    gc.collect()
    assert inner() is None


def test_gradients_are_not_kept():
    param = numbers(4)
    opt = onepass.Adam(param)
    for bad in (False, True):
        grad = numbers(3 if bad else 4, seed=1)
        seen = weakref.ref(grad)
        if bad:
            with pytest.raises(ValueError, match="shape"):
                opt.step(grad)
        else:
            opt.step(grad)
        del grad
        gc.collect()
        assert seen() is None


def test_torch_tensors_are_updated_in_place():
    torch = pytest.importorskip("torch")
    for case in FEW:
        weight = torch.from_numpy(numbers((4, 6), seed=1)).clone()
        last = weight.t().contiguous().t()  # Fortran order
        empty = torch.ones(0, 3)
        plain = [numbers((4, 6), seed=1), numbers((4, 6), seed=1), np.ones((0, 3), np.float32)]
        address = weight.data_ptr()
        gradient = numbers((4, 6), seed=2)
        opt, expected = make(case, [weight, last, empty]), make(case, plain)
        given = torch.from_numpy(gradient.copy())
        for _ in range(STEPS):
            before = copied(plain)
            opt.step([given, torch.from_numpy(gradient.T.copy()).t(), empty.clone()])
            expected.step([gradient, gradient, np.ones((0, 3), np.float32)])
            assert_moved(before[:2], plain[:2])
        assert weight.data_ptr() == address
        assert_same_bits([weight.numpy(), last.numpy(), empty.numpy()], plain)
        assert_equal_optimizers(opt, expected)


# Arrays that change between steps


@pytest.mark.parametrize("shape", [(40,), (3,), (5, 4)])
def test_a_resized_parameter_without_states_is_seen_as_it_is(shape):
    param = numbers(6)
    opt = onepass.SGD(param, lr=0.5)
    opt.step(numbers(6, seed=1))
    param.resize(shape, refcheck=False)
    param[...] = numbers(shape, seed=2)
    plain = param.copy()
    gradient = numbers(shape, seed=3)
    snapshot = Snapshot(opt, param)
    with pytest.raises(ValueError, match=r"^grads: shape .* does not match its parameter's"):
        opt.step(numbers(6))
    snapshot.assert_unchanged()
    opt.step(gradient)
    assert_same_bits(param, (plain - np.float32(0.5) * gradient).astype(np.float32))
    assert_moved(plain, param)


def test_arrays_that_move_in_memory_are_found_where_they_are():
    param, plain = numbers(50, seed=1), numbers(50, seed=1)
    gradient = numbers(50, seed=2)
    buffer = gradient.copy()
    opt = onepass.Adam(param, grads=buffer)
    expected = onepass.Adam(plain)
    for k in range(5):
        opt.step()
        expected.step(gradient)
        assert_same_bits(param, plain)
        for array in (param, buffer):
            values = array.copy()
            array.resize(100_000 * (k + 1), refcheck=False)
            array.resize(50, refcheck=False)
            array[...] = values
    assert_equal_optimizers(opt, expected)


def test_a_reshaped_gradient_is_noticed():
    param, gradient = numbers((4, 6)), numbers((4, 6), seed=1)
    opt = onepass.Adam(param, grads=gradient)
    opt.step()
    snapshot = Snapshot(opt, param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        gradient.shape = (6, 4)
    with pytest.raises(ValueError, match=r"^grads: shape \(6, 4\) does not match its parameter's \(4, 6\)$"):
        opt.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("case", [case for case in FEW if case != "SGD"])
def test_writing_to_a_state_counts(case):
    first, second = numbers(20, seed=1), numbers(20, seed=1)
    a, b = make(case, first), make(case, second)
    a.step(numbers(20, seed=2))
    b.step(numbers(20, seed=2))
    for name in a.state[0]:
        a.state[0][name][...] = np.abs(numbers(20, seed=3))
        b.state[0][name][...] = np.abs(numbers(20, seed=3))
        a.step(numbers(20, seed=4))
        b.step(numbers(20, seed=4))
        assert_same_bits(first, second)
        a.state[0][name][...] *= 2
        a.step(numbers(20, seed=5))
        b.step(numbers(20, seed=5))
        assert (first != second).any()
        for key, array in a.state[0].items():
            array[...] = b.state[0][key]
        first[...] = second


def test_nan_and_infinity_reach_the_parameter():
    for case in CASES:
        param = numbers(40)
        gradient = numbers(40, seed=1)
        gradient[[3, 17, 39]] = np.nan, np.inf, -np.nan
        opt = make(case, param)
        before = param.copy()
        opt.step(gradient)
        assert np.isnan(param[[3, 39]]).all(), case
        # The step of an infinite gradient is 0 (g / v), infinite (g) or NaN (g / sqrt(v)); never another number.
        assert param[17] == before[17] or not np.isfinite(param[17]), case
        rest = np.delete(np.arange(40), [3, 17, 39])
        assert np.isfinite(param[rest]).all(), case
        assert (param[rest] != before[rest]).all(), case

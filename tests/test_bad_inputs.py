"""Promise: nothing silent. Whatever is wrong raises, names the argument, and leaves everything as it was."""

from __future__ import annotations

import fractions
import math
import re
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import onepass
from helpers import (
    CASES,
    CLASSES,
    FEW,
    NO_CUDA,
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
    hyper_names,
    make,
    numbers,
    rules_of_registry,
)
from onepass import _cpu

NAN, INF = math.nan, math.inf
BAD = "fc1.weight"  # the fourth of four: all others would have been written before its turn
LABEL = r"grads[3] ('fc1.weight')"
SUPPORTED = set(_cpu.dtypes())


def exactly(text: str) -> str:
    return "^" + re.escape(text) + "$"


def starts(text: str) -> str:
    return "^" + re.escape(text)


class World:
    """An optimizer in the middle of a training, and a twin that nothing bad happens to.

    The parameter `BAD` lies in the middle of a slab, so that gradients can be made that touch it in part.
    """

    def __init__(self, case: str, **more):
        self.slab = numbers(120, seed=9)
        self.params = {
            "fc0.weight": numbers((3, 5), seed=1),
            "fc0.bias": numbers((5,), seed=2),
            "scale": numbers((2, 3), np.float64, seed=3, order="F"),
            BAD: self.slab[40:80].reshape(4, 10),
        }
        self.grads = {name: numbers(p.shape, p.dtype, seed=10 + k) for k, (name, p) in enumerate(self.params.items())}
        self.twin_params = copied(self.params)
        self.opt = make(case, self.params, **more)
        self.twin = make(case, self.twin_params, **more)
        self.good_step()

    def good_step(self):
        before = copied(self.params)
        self.opt.step(self.grads)
        self.twin.step(self.grads)
        assert_moved(before, self.params)
        assert_same_bits(self.params, self.twin_params)
        assert_equal_optimizers(self.opt, self.twin)

    def assert_raises(self, exception, match, call, *also):
        """`call` raises so; nothing has changed; and the training goes on as the twin's does."""
        snapshot = Snapshot(self.opt, self.params, self.grads, self.slab, *also)
        with pytest.raises(exception, match=match):
            call()
        snapshot.assert_unchanged()
        self.good_step()

    def assert_grad_raises(self, exception, what, bad):
        grads = {**self.grads, BAD: bad}
        self.assert_raises(exception, starts(f"{LABEL}: ") + what, lambda: self.opt.step(grads), bad)


def test_the_cases_are_all_classes_and_all_rules():
    assert {cls for cls, _ in CASES.values()} == set(CLASSES)
    rules = {make(case, np.ones(2))._rules[0] for case in CASES}
    assert rules == rules_of_registry()


# One bad gradient among good ones: what it is, the exception, and how its message goes on after the argument's name

GOOD = numbers((4, 10), seed=77)
UNSUPPORTED = [
    *("bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "complex64", "complex128"),
    *("longdouble", "object", "datetime64[s]", "timedelta64[s]", "U4", "S4"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.dtype([("a", np.float32)])),
]
UNSUPPORTED = [dtype for dtype in map(np.dtype, UNSUPPORTED) if dtype.name not in SUPPORTED]


class RaisesWhenExported:
    def __init__(self, error):
        self.error = error

    def __dlpack__(self, **_options):
        raise self.error


class Exports:
    """Its __dlpack__ returns anything."""

    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **_options):
        return self.value


class OnDevice(BareProducer):
    def __init__(self, array, device):
        super().__init__(array)
        self.device = device

    def __dlpack_device__(self):
        if isinstance(self.device, Exception):
            raise self.device
        return self.device


class OnGpu:
    def __init__(self, shape):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (0x7F0000000000, False),
            "version": 3,
        }


def not_an_array(name):
    return TypeError, re.escape(f"expected a NumPy array or an object with __dlpack__, got {name}") + "$"


NOT_ARRAYS = {
    "list": GOOD.tolist(),
    "list-of-arrays": list(GOOD),
    "tuple": (1.0, 2.0),
    "dict": {"fc1.weight": GOOD},
    "set": {1.0},
    "str": "fc1.weight",
    "bytes": GOOD.tobytes(),
    "float": 1.0,
    "int": 0,
    "bool": False,
    "complex": 1j,
    "memoryview": memoryview(GOOD),
    "class": np.ndarray,
    "class-with-dlpack": Producer,
    "function": len,
    "ellipsis": ...,
    "NotImplemented": NotImplemented,
    "object": object(),
    "range": range(40),
}

NO_CAPSULE = re.escape("Exports.__dlpack__() returned no DLPack capsule") + "$"

# (what is given, exception, message after "argument: "). What is given must fail as a parameter and as a gradient.
BAD_ARRAYS = {
    **{name: (value, *not_an_array(type(value).__name__)) for name, value in NOT_ARRAYS.items()},
    "generator": ((row for row in GOOD), *not_an_array("generator")),
    "scalar": (np.float32(1.0), TypeError, "expected a NumPy array or an object with __dlpack__, got float32"),
    **{
        f"dtype-{dtype.name}": (np.zeros((4, 10), dtype), TypeError, f"dtype {re.escape(str(dtype))} is not supported")
        for dtype in UNSUPPORTED
    },
    "foreign-byte-order": (GOOD.astype(GOOD.dtype.newbyteorder("S")), TypeError, "dtype .f4 has foreign byte order"),
    "masked": (np.ma.masked_array(GOOD, GOOD > 0), TypeError, "is a masked array"),
    "masked-nothing": (np.ma.masked_array(GOOD), TypeError, "is a masked array"),
    "dlpack-raises": (
        RaisesWhenExported(RuntimeError("out of luck")),
        TypeError,
        re.escape("RaisesWhenExported.__dlpack__() failed: out of luck") + "$",
    ),
    "dlpack-refuses": (
        RaisesWhenExported(BufferError("no")),
        TypeError,
        r"RaisesWhenExported.__dlpack__\(\) failed: no$",
    ),
    "dlpack-type-error": (
        RaisesWhenExported(TypeError("no")),
        TypeError,
        r"RaisesWhenExported.__dlpack__\(\) failed: no$",
    ),
    "dlpack-returns-none": (Exports(None), TypeError, NO_CAPSULE),
    "dlpack-returns-array": (Exports(GOOD), TypeError, NO_CAPSULE),
    "dlpack-returns-number": (Exports(7), TypeError, NO_CAPSULE),
    "dlpack-not-callable": (type("Odd", (), {"__dlpack__": 3})(), TypeError, r"Odd.__dlpack__\(\) failed: "),
    "dlpack-used": (HandMade(GOOD, capsule=b"used_dltensor_versioned"), TypeError, r".*returned no DLPack capsule$"),
    "dlpack-future": (HandMade(GOOD, version=2), TypeError, "exports DLPack version 2, not 0 or 1$"),
    "dlpack-int32": (HandMade(GOOD, dtype=(0, 32, 1)), TypeError, r"dtype \(DLPack code 0, 32 bits\) is not supported"),
    "dlpack-lanes": (HandMade(GOOD, dtype=(2, 32, 4)), TypeError, "dtype .* is not supported"),
    "dlpack-complex": (HandMade(GOOD, dtype=(5, 64, 1)), TypeError, "dtype .* is not supported"),
    "dlpack-float8": (HandMade(GOOD, dtype=(2, 8, 1), version=None), TypeError, "dtype .* is not supported"),
    "dlpack-named-dtype": (Producer(np.zeros((4, 10), np.int64)), TypeError, "dtype .* is not supported"),
    "dlpack-cuda": (HandMade(GOOD, device=(2, 0)), TypeError, NO_CUDA),
    "dlpack-cuda-managed": (HandMade(GOOD, device=(13, 0)), TypeError, NO_CUDA),
    "dlpack-rocm": (
        HandMade(GOOD, device=(10, 1)),
        TypeError,
        r"is on a device \(DLPack type 10\) that onepass does not",
    ),
    "cuda-array-interface": (OnGpu((4, 10)), TypeError, NO_CUDA),
}

BAD_GRADIENTS = {
    **BAD_ARRAYS,
    "nested-none": ([None], *not_an_array("list")),
    "float64": (GOOD.astype(np.float64), TypeError, "dtype float64 does not match its parameter's float32( and|;)"),
    "foreign-float64": (
        GOOD.astype(np.dtype(np.float64).newbyteorder("S")),
        TypeError,
        "dtype .f8 has foreign byte order",
    ),
    "dlpack-float64": (
        Producer(GOOD.astype(np.float64)),
        TypeError,
        "dtype float64 does not match its parameter's float32( and|;)",
    ),
    **{
        f"shape-{'x'.join(map(str, shape))}": (
            numbers(shape),
            ValueError,
            re.escape(f"shape {shape} does not match its parameter's (4, 10)") + "$",
        )
        for shape in [
            (10, 4),
            (4, 10, 1),
            (1, 4, 10),
            (40,),
            (10,),
            (4,),
            (),
            (1, 10),
            (4, 1),
            (4, 11),
            (0, 10),
            (5, 10),
        ]
    },
    "dlpack-shape": (
        OldProducer(numbers((10, 4))),
        ValueError,
        r"shape \(10, 4\) does not match its parameter's \(4, 10\)$",
    ),
}


def as_if_given(given):
    """Generators are used up by one test: each gets its own."""
    return (row for row in GOOD) if hasattr(given, "__next__") else given


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_a_bad_gradient_among_good_ones(case, bad):
    given, exception, what = BAD_GRADIENTS[bad]
    World(case).assert_grad_raises(exception, what, as_if_given(given))


@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_validates_all_before_it_writes(case):
    world = World(case)
    bad = numbers((10, 4))
    message = r"grads[3] ('fc1.weight'): shape (10, 4) does not match its parameter's (4, 10)"
    world.assert_raises(ValueError, exactly(message), lambda: world.opt.step({**world.grads, BAD: bad}))
    world.assert_grad_raises(ValueError, "overlaps ", world.params[BAD])
    world.assert_grad_raises(*not_an_array("list"), GOOD.tolist())


@pytest.mark.parametrize("device", [RuntimeError("gone"), None, (), ("cuda", 0), 1], ids=repr)
def test_a_device_that_cannot_be_read(device):
    given = OnDevice(GOOD, device)
    World("Adam").assert_grad_raises(TypeError, re.escape("OnDevice.__dlpack_device__() "), given)
    with pytest.raises(TypeError, match=starts("params[1]: OnDevice.__dlpack_device__() ")):
        onepass.Adam([numbers(3), given])


def overlaps(label):
    return re.escape(f"overlaps {label} in memory, which the step writes") + "$"


SELF = "params[3] ('fc1.weight')"
OVERLAPPING = {
    "itself": (lambda w: w.params[BAD], SELF),
    "a-view-of-itself": (lambda w: w.params[BAD][...], SELF),
    "itself-backwards": (lambda w: w.params[BAD][::-1, ::-1], SELF),
    "itself-by-dlpack": (lambda w: Producer(w.params[BAD]), SELF),
    "one-element-in-front": (lambda w: w.slab[1:41].reshape(4, 10), SELF),
    "one-element-behind": (lambda w: w.slab[79:119].reshape(4, 10), SELF),
    "one-byte": (
        lambda w: np.frombuffer(w.slab.data, np.float32, offset=80 * 4 - 1, count=40).reshape(4, 10),
        SELF,
    ),
    "one-element-repeated": (lambda w: np.broadcast_to(w.params[BAD][2:3, 3:4], (4, 10)), SELF),
    "one-row-repeated": (lambda w: np.broadcast_to(w.params[BAD][2], (4, 10)), SELF),
    "every-second": (lambda w: w.slab[0:80:2].reshape(4, 10), SELF),
    "backwards-into-it": (lambda w: w.slab[118:78:-1].reshape(4, 10), SELF),
    "fortran-into-it": (lambda w: w.slab[1:41].reshape(10, 4).T, SELF),
    "only-the-last-column": (lambda w: np.lib.stride_tricks.as_strided(w.slab[40 - 9 :], (4, 10), (4, 4)), SELF),
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("bad", OVERLAPPING)
def test_a_gradient_overlaps_its_parameter(case, bad):
    world = World(case)
    given, label = OVERLAPPING[bad]
    world.assert_grad_raises(ValueError, overlaps(label), given(world))


@pytest.mark.parametrize("case", [case for case in FEW if case != "SGD"])
def test_a_gradient_overlaps_a_state(case):
    world = World(case)
    for name, state in world.opt.state[3].items():
        world.assert_grad_raises(ValueError, overlaps(f"state[3]['{name}']"), state)
        world.assert_grad_raises(ValueError, overlaps(f"state[3]['{name}']"), state[::-1, ::-1])
        world.assert_grad_raises(ValueError, overlaps(f"state[3]['{name}']"), np.broadcast_to(state[3:, 9:], (4, 10)))


@pytest.mark.parametrize("case", FEW)
def test_a_gradient_overlaps_another_parameter(case):
    params = [numbers(6, seed=1), numbers(6, seed=2), numbers((2, 2), seed=3)]
    good = [numbers(6, seed=4), numbers(6, seed=5), numbers((2, 2), seed=6)]
    opt = make(case, params)
    opt.step(good)
    snapshot = Snapshot(opt, params, good)
    for grads, match in [
        ([params[1], good[1], good[2]], "grads[0]: overlaps params[1] in memory, which the step writes"),
        ([good[0], params[0], good[2]], "grads[1]: overlaps params[0] in memory, which the step writes"),
        (
            [good[0], good[1], params[0][:4].reshape(2, 2)],
            "grads[2]: overlaps params[0] in memory, which the step writes",
        ),
        ([good[0], params[1][::-1], good[2]], "grads[1]: overlaps params[1] in memory, which the step writes"),
    ]:
        with pytest.raises(ValueError, match=exactly(match)):
            opt.step(grads)
        snapshot.assert_unchanged()
    # A parameter that this step leaves alone may be read.
    before = copied(params)
    opt.step([None, params[0], good[2]])
    assert_moved(before[1:], params[1:])
    assert_same_bits(before[0], params[0])


def test_an_overlap_is_found_though_the_step_before_had_none():
    # What has not moved since the last step is not looked at again: what has moved must be.
    slab = numbers(12)
    other = numbers(4, seed=1)
    opt = onepass.Momentum([slab[:4], other])
    good = [numbers(4, seed=2), numbers(4, seed=3)]
    for bad in [slab[3:7], slab[0:8:2], slab[3::-1], np.broadcast_to(slab[3:4], (4,)), slab[:4]]:
        opt.step(good)
        opt.step([slab[4:8], good[1]])  # a neighbour is no overlap
        opt.step([slab[4:12:2], good[1]])  # the same beginning, with gaps
        snapshot = Snapshot(opt, slab, other)
        for _ in range(2):  # having raised it raises again
            for k in range(2):
                grads = [*good]
                grads[k] = bad
                with pytest.raises(ValueError, match=rf"^grads\[{k}\]: overlaps params\[0\] in memory"):
                    opt.step(grads)
        snapshot.assert_unchanged()
    before = slab.copy()
    opt.step(good)
    assert_moved(before[:4], slab[:4])


def test_an_overlap_is_found_when_only_the_strides_have_changed():
    grid = numbers((6, 6))
    param = grid[2:3].reshape(2, 3)
    around = np.lib.stride_tricks.as_strided(grid, (2, 3), (4 * 30, 4))  # of the first and the last row
    through = np.lib.stride_tricks.as_strided(grid, (2, 3), (4 * 2, 4 * 15))  # the same first and last element
    assert np.shares_memory(through, param)
    assert not np.shares_memory(around, param)
    opt = onepass.SGD([param])
    for _ in range(2):
        before = grid.copy()
        opt.step([around])
        assert_moved(before[2], grid[2])
        snapshot = Snapshot(opt, grid)
        with pytest.raises(ValueError, match=r"^grads\[0\]: overlaps params\[0\] in memory"):
            opt.step([through])
        snapshot.assert_unchanged()


# Structure of the gradients


def three(case, kind):
    params = [numbers(4, seed=1), numbers((2, 3), seed=2), numbers((), seed=3)]
    names = ("a", "b", "c")
    forms = {
        "array": lambda arrays: arrays[0],
        "list": list,
        "tuple": tuple,
        "dict": lambda arrays: dict(zip(names, arrays, strict=True)),
        "groups": lambda arrays: [{"params": arrays[:1]}, {"params": {"b": arrays[1], "c": arrays[2]}}],
    }
    grads = [numbers(p.shape, seed=20 + k) for k, p in enumerate(params)]
    good = [grads[:1], dict(zip("bc", grads[1:], strict=True))] if kind == "groups" else forms[kind](grads)
    given = forms[kind](params)
    return make(case, given), arrays_of(given), good


A, B, C = (numbers(s, seed=30) for s in [(4,), (2, 3), ()])
LIST_WANTED = "expected a list or tuple, as the parameters are, got "
BAD_STRUCTURES = {
    # kind of parameters, what is given, exception, message
    "array-list": ("array", [A], TypeError, "grads: expected one array, as the parameter is, got list"),
    "array-tuple": ("array", (A,), TypeError, "grads: expected one array, as the parameter is, got tuple"),
    "array-dict": ("array", {"a": A}, TypeError, "grads: expected one array, as the parameter is, got dict"),
    "array-shape": ("array", B, ValueError, "grads: shape (2, 3) does not match its parameter's (4,)"),
    "list-array": ("list", A, TypeError, f"grads: {LIST_WANTED}ndarray"),
    "list-stacked": ("list", np.ones((3, 4), np.float32), TypeError, f"grads: {LIST_WANTED}ndarray"),
    "list-dict": ("list", {0: A, 1: B, 2: C}, TypeError, f"grads: {LIST_WANTED}dict"),
    "list-none": ("list", None, TypeError, f"grads: {LIST_WANTED}NoneType"),
    "list-generator": ("list", (x for x in (A, B, C)), TypeError, f"grads: {LIST_WANTED}generator"),
    "list-zip": ("list", zip((A, B, C), strict=True), TypeError, f"grads: {LIST_WANTED}zip"),
    "list-values": ("list", {0: A, 1: B, 2: C}.values(), TypeError, f"grads: {LIST_WANTED}dict_values"),
    "list-str": ("list", "abc", TypeError, f"grads: {LIST_WANTED}str"),
    "list-too-few": ("list", [A, B], ValueError, "grads: 2 given for 3 parameters"),
    "list-too-many": ("list", [A, B, C, C], ValueError, "grads: 4 given for 3 parameters"),
    "list-empty": ("list", [], ValueError, "grads: 0 given for 3 parameters"),
    "list-nested": (
        "list",
        [A, B, [C]],
        TypeError,
        "grads[2]: expected a NumPy array or an object with __dlpack__, got list",
    ),
    "list-swapped": ("list", [B, A, C], ValueError, "grads[0]: shape (2, 3) does not match its parameter's (4,)"),
    "tuple-array": ("tuple", A, TypeError, f"grads: {LIST_WANTED}ndarray"),
    "tuple-too-many": ("tuple", (A, B, C, None), ValueError, "grads: 4 given for 3 parameters"),
    "dict-list": ("dict", [A, B, C], TypeError, "grads: expected a dict, as the parameters are, got list"),
    "dict-array": ("dict", A, TypeError, "grads: expected a dict, as the parameters are, got ndarray"),
    "dict-none": ("dict", None, TypeError, "grads: expected a dict, as the parameters are, got NoneType"),
    "dict-items": (
        "dict",
        {"a": A}.items(),
        TypeError,
        "grads: expected a dict, as the parameters are, got dict_items",
    ),
    "dict-missing": (
        "dict",
        {"a": A, "c": C},
        ValueError,
        "grads: 'b' is missing; pass None for a parameter without a gradient",
    ),
    "dict-empty": ("dict", {}, ValueError, "grads: 'a' is missing; pass None for a parameter without a gradient"),
    "dict-unknown": ("dict", {"z": A, "a": A, "b": B, "c": C}, ValueError, "grads: 'z' is not the name of a parameter"),
    "dict-instead": (
        "dict",
        {"a": A, "b": B, "C": C},
        ValueError,
        "grads: 'c' is missing; pass None for a parameter without a gradient",
    ),
    "dict-swapped": (
        "dict",
        {"a": A, "c": B, "b": C},
        ValueError,
        "grads[1] ('b'): shape () does not match its parameter's (2, 3)",
    ),
    "groups-array": ("groups", A, TypeError, "grads: expected a list with one entry for each group, got ndarray"),
    "groups-dict": ("groups", {"b": B}, TypeError, "grads: expected a list with one entry for each group, got dict"),
    "groups-flat": ("groups", [A, B, C], ValueError, "grads: 3 given for 2 groups"),
    "groups-one": ("groups", [[A]], ValueError, "grads: 1 given for 2 groups"),
    "groups-inner-array": ("groups", [A, {"b": B, "c": C}], TypeError, f"grads[0]: {LIST_WANTED}ndarray"),
    "groups-inner-none": ("groups", [None, {"b": B, "c": C}], TypeError, f"grads[0]: {LIST_WANTED}NoneType"),
    "groups-inner-few": ("groups", [[], {"b": B, "c": C}], ValueError, "grads[0]: 0 given for 1 parameters"),
    "groups-inner-key": (
        "groups",
        [[A], {"b": B, "z": C}],
        ValueError,
        "grads[1]: 'c' is missing; pass None for a parameter without a gradient",
    ),
    "groups-inner-list": (
        "groups",
        [[A], [B, C]],
        TypeError,
        "grads[1]: expected a dict, as the parameters are, got list",
    ),
    "groups-shape": (
        "groups",
        [[A], {"b": B, "c": A}],
        ValueError,
        "grads[1][1] ('c'): shape (4,) does not match its parameter's ()",
    ),
    "groups-as-params": (
        "groups",
        [{"params": [A]}, {"params": {"b": B, "c": C}}],
        TypeError,
        f"grads[0]: {LIST_WANTED}dict",
    ),
}


@pytest.mark.parametrize("bound", [False, True], ids=["step", "bound"])
@pytest.mark.parametrize("case", ["SGD", "Adam"])
@pytest.mark.parametrize("bad", BAD_STRUCTURES)
def test_gradients_that_do_not_mirror_the_parameters(bad, case, bound):
    kind, given, exception, message = BAD_STRUCTURES[bad]
    opt, params, good = three(case, kind)
    twin, twin_params, _ = three(case, kind)
    opt.step(good)
    twin.step(good)
    if hasattr(given, "__next__"):
        given = iter([A, B, C]) if bad.endswith("zip") else (x for x in (A, B, C))
        message = message.replace("got zip", "got list_iterator")
    snapshot = Snapshot(opt, params, given, good)
    if not bound:
        with pytest.raises(exception, match=exactly(message)):
            opt.step(given)
    elif given is not None:
        form = opt._structure.rebuild(params)
        if kind == "groups":
            form = [{"params": part} for part in form]
        with pytest.raises(exception, match=exactly(message)):
            make(case, form, grads=given)
    snapshot.assert_unchanged()
    before = copied(params)
    opt.step(good)
    twin.step(good)
    assert_moved(before, params)
    assert_same_bits(params, twin_params)
    assert_equal_optimizers(opt, twin)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_step_without_gradients(cls):
    param = numbers(4)
    opt = cls(param)
    snapshot = Snapshot(opt, param)
    with pytest.raises(
        TypeError, match=exactly("grads: step() needs gradients, because none were bound at construction")
    ):
        opt.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_a_bad_gradient_is_not_bound(case, bad):
    given, exception, what = BAD_GRADIENTS[bad]
    world = World(case)
    match = starts(f"{LABEL}: ") + what
    grads = {**world.grads, BAD: as_if_given(given)}
    world.assert_raises(exception, match, lambda: make(case, world.params, grads=grads))


@pytest.mark.parametrize("case", FEW)
def test_bound_gradients_that_go_bad(case):
    params = {"w": numbers((2, 6), seed=1), "b": numbers(6, seed=2)}
    buffers = {"w": numbers((2, 6), seed=3), "b": numbers(6, seed=4)}
    opt = make(case, params, grads=buffers)
    opt.step()
    buffers["b"].resize(5, refcheck=False)
    snapshot = Snapshot(opt, params, buffers)
    with pytest.raises(ValueError, match=exactly("grads[1] ('b'): shape (5,) does not match its parameter's (6,)")):
        opt.step()
    snapshot.assert_unchanged()
    buffers["b"].resize(6, refcheck=False)
    buffers["b"][...] = 1
    before = copied(params)
    opt.step()
    assert_moved(before, params)
    assert opt.step_counts == (2, 2)


# Parameters

SLAB = numbers(200, seed=5)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


NOT_DENSE = "strides .* leave gaps, repeat or run backwards; arrays that are updated must be dense"
BAD_PARAMS = {
    **BAD_ARRAYS,
    "read-only": (lambda: read_only(GOOD), ValueError, "is read-only and cannot be updated in place$"),
    "read-only-bytes": (lambda: np.frombuffer(GOOD.tobytes(), np.float32), ValueError, "is read-only"),
    "dlpack-copy": (lambda: HandMade(GOOD, flags=2), ValueError, r"its __dlpack__\(\) exports a copy; an update would"),
    "dlpack-read-only": (lambda: HandMade(GOOD, flags=1), ValueError, "is read-only and cannot be updated in place$"),
    "dlpack-gaps": (lambda: Producer(SLAB[:80:2]), ValueError, NOT_DENSE),
    "gaps": (lambda: SLAB[:80:2], ValueError, NOT_DENSE),
    "row-gaps": (lambda: SLAB.reshape(10, 20)[:, :19], ValueError, NOT_DENSE),
    "column": (lambda: SLAB.reshape(10, 20)[:, 3], ValueError, NOT_DENSE),
    "column-gaps-permuted": (lambda: SLAB.reshape(5, 10, 4)[:, :, 1:].transpose(2, 0, 1), ValueError, NOT_DENSE),
    "backwards": (lambda: SLAB[::-1], ValueError, NOT_DENSE),
    "backwards-2d": (lambda: SLAB.reshape(10, 20)[:, ::-1], ValueError, NOT_DENSE),
    "broadcast": (lambda: np.broadcast_to(SLAB[:1], (7,)), ValueError, "is read-only|" + NOT_DENSE),
    "stride-0": (lambda: np.lib.stride_tricks.as_strided(SLAB, (7,), (0,)), ValueError, NOT_DENSE),
    "stride-0-2d": (lambda: np.lib.stride_tricks.as_strided(SLAB, (3, 4), (0, 4)), ValueError, NOT_DENSE),
    "sliding-window": (lambda: np.lib.stride_tricks.as_strided(SLAB, (3, 4), (4, 4)), ValueError, NOT_DENSE),
    "overlapping-rows": (lambda: np.lib.stride_tricks.as_strided(SLAB, (3, 4), (12, 4)), ValueError, NOT_DENSE),
    "odd-stride": (
        lambda: np.ndarray((5,), np.float32, np.zeros(64, np.uint8), strides=(6,)),
        ValueError,
        NOT_DENSE,
    ),
    "field": (lambda: np.zeros(5, [("a", np.float32), ("b", np.float32)])["a"], ValueError, NOT_DENSE),
    "real-part": (lambda: np.zeros(5, np.complex64).real, ValueError, NOT_DENSE),
}

FORMS = {
    "array": (lambda bad, _good: bad, "params"),
    "list": (lambda bad, good: [good, bad], "params[1]"),
    "dict": (lambda bad, good: {"a": good, "fc1.weight": bad}, "params[1] ('fc1.weight')"),
    "groups": (lambda bad, good: [{"params": good}, {"params": [bad], "lr": 0.5}], "params[1]['params'][0]"),
}


@pytest.mark.parametrize("case", ["SGD", "AdaGrad-keras", "Adam"])
@pytest.mark.parametrize(
    ("bad", "form"),
    [
        (bad, form)
        for bad in BAD_PARAMS
        for form in FORMS
        if not (form == "array" and bad in ("list", "list-of-arrays", "tuple", "dict"))  # structures, not arrays
    ],
)
def test_a_bad_parameter(bad, form, case):
    given, exception, what = BAD_PARAMS[bad]
    if callable(given) and getattr(given, "__name__", "") == "<lambda>":
        given = given()
    given = as_if_given(given)
    build, label = FORMS[form]
    good = numbers(4, seed=8)
    match = starts(f"{label}: ") + what
    if form == "array" and bad == "generator":
        match = starts(
            "params: expected an array, a list, a dict or a list of groups, got a generator; wrap it in list()"
        )
    snapshot = Snapshot(None, good, given)
    with pytest.raises(exception, match=match):
        make(case, build(given, good))
    snapshot.assert_unchanged()


# What is made of good arrays and is wrong as a whole
EXPECTED = "expected a NumPy array or an object with __dlpack__, got "
NO_SEQUENCE = "expected an array, a list, a dict or a list of groups, got a "
SHARED = "arrays that a step writes must not share memory"
BAD_PARAMS_TOGETHER = {
    "empty-list": (list, ValueError, "params: there are no parameters"),
    "empty-tuple": (lambda: (), ValueError, "params: there are no parameters"),
    "empty-dict": (dict, ValueError, "params: there are no parameters"),
    "empty-groups": (lambda: [{"params": []}, {"params": {}}], ValueError, "params: there are no parameters"),
    "none": (lambda: None, TypeError, "params: expected a NumPy array or an object with __dlpack__, got NoneType"),
    "none-in-list": (
        lambda: [A, None],
        TypeError,
        "params[1]: expected a NumPy array or an object with __dlpack__, got NoneType",
    ),
    "generator": (
        lambda: (x for x in (A, B)),
        TypeError,
        "params: expected an array, a list, a dict or a list of groups, got a generator; wrap it in list()",
    ),
    "map": (
        lambda: map(np.asarray, [A, B]),
        TypeError,
        f"params: {NO_SEQUENCE}map; wrap it in list()",
    ),
    "group-without-params": (lambda: [{"lr": 0.1}], ValueError, "params[0]: a group needs the key 'params'"),
    "second-group-without-params": (
        lambda: [{"params": A}, {"param": B}],
        ValueError,
        "params[1]: a group needs the key 'params'",
    ),
    "group-generator": (
        lambda: [{"params": (x for x in (A, B))}],
        TypeError,
        f"params[0]['params']: {NO_SEQUENCE}generator; wrap it in list()",
    ),
    "group-of-groups": (
        lambda: [{"params": [{"params": A}]}],
        TypeError,
        "params[0]['params'][0]: " + EXPECTED + "dict",
    ),
    "group-among-arrays": (
        lambda: [A, {"params": B}],
        TypeError,
        "params[1]: " + EXPECTED + "dict",
    ),
    "array-among-groups": (
        lambda: [{"params": A}, B],
        TypeError,
        "params[0]: " + EXPECTED + "dict",
    ),
    "twice": (lambda: [A, A], ValueError, "params[1]: overlaps params[0] in memory; " + SHARED),
    "twice-by-name": (
        lambda: {"a": A, "b": B, "tied": A},
        ValueError,
        "params[2] ('tied'): overlaps params[0] ('a') in memory; " + SHARED,
    ),
    "twice-in-groups": (
        lambda: [{"params": [B, A]}, {"params": {"tied": A}}],
        ValueError,
        "params[1]['params'][0] ('tied'): overlaps params[0]['params'][1] in memory; " + SHARED,
    ),
    "view": (
        lambda: [A[1:3], B, A],
        ValueError,
        "params[2]: overlaps params[0] in memory; " + SHARED,
    ),
    "transposed": (
        lambda: [B, B.T],
        ValueError,
        "params[1]: overlaps params[0] in memory; " + SHARED,
    ),
    "by-dlpack": (
        lambda: [B, Producer(B)],
        ValueError,
        "params[1]: overlaps params[0] in memory; " + SHARED,
    ),
    "one-element": (
        lambda: [SLAB[:10], SLAB[20:30], SLAB[9:15]],
        ValueError,
        "params[2]: overlaps params[0] in memory; " + SHARED,
    ),
    "inside": (
        lambda: [SLAB[5:6], SLAB[0:20], C],
        ValueError,
        "params[1]: overlaps params[0] in memory; " + SHARED,
    ),
    "other-dtype": (
        lambda: [SLAB[:10], SLAB[4:10].view(np.float64)],
        ValueError,
        "params[1]: overlaps params[0] in memory; " + SHARED,
    ),
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("bad", BAD_PARAMS_TOGETHER)
def test_bad_parameters_together(bad, cls):
    build, exception, message = BAD_PARAMS_TOGETHER[bad]
    snapshot = Snapshot(None, A, B, C, SLAB)
    with pytest.raises(exception, match=exactly(message)):
        cls(build())
    snapshot.assert_unchanged()


@pytest.mark.parametrize("case", FEW)
def test_a_parameter_that_becomes_read_only(case):
    world = World(case)
    world.params[BAD].flags.writeable = False
    snapshot = Snapshot(world.opt, world.params, world.grads)
    with pytest.raises(ValueError, match=exactly(f"params[3] ('{BAD}'): is read-only and cannot be updated in place")):
        world.opt.step(world.grads)
    snapshot.assert_unchanged()
    world.params[BAD].flags.writeable = True
    world.good_step()


@pytest.mark.parametrize("case", [case for case in FEW if case != "SGD"])
def test_a_state_that_goes_bad(case):
    world = World(case)
    for name, state in world.opt.state[3].items():
        state.flags.writeable = False
        snapshot = Snapshot(world.opt, world.params, world.grads)
        with pytest.raises(
            ValueError, match=exactly(f"state[3]['{name}']: is read-only and cannot be updated in place")
        ):
            world.opt.step(world.grads)
        snapshot.assert_unchanged()
        state.flags.writeable = True
        world.good_step()


@pytest.mark.parametrize("case", [case for case in FEW if case != "SGD"])
def test_an_array_that_is_resized_between_steps(case):
    param = numbers((4, 6))
    opt = make(case, [param])
    opt.step([numbers((4, 6), seed=1)])
    name = next(iter(opt.state[0]))
    param.resize((6, 4), refcheck=False)  # as many elements
    snapshot = Snapshot(opt, param)
    for grad in (numbers((6, 4)), numbers((4, 6))):
        with pytest.raises(ValueError, match=r"\(4, 6\) does not match its parameter's \(6, 4\)$"):
            opt.step([grad])
        snapshot.assert_unchanged()
    param.resize((9, 9), refcheck=False)  # more than there were: the memory has moved
    snapshot = Snapshot(opt, param)
    with pytest.raises(
        ValueError, match=exactly(f"state[0]['{name}']: shape (4, 6) does not match its parameter's (9, 9)")
    ):
        opt.step([numbers((9, 9))])
    snapshot.assert_unchanged()


def test_an_interrupt_is_not_taken_for_a_bad_gradient():
    param, grad = numbers(4), RaisesWhenExported(KeyboardInterrupt())
    opt = onepass.SGD(param)
    snapshot = Snapshot(opt, param)
    with pytest.raises(KeyboardInterrupt):
        opt.step(grad)
    snapshot.assert_unchanged()


def test_torch_tensors_that_cannot_be_updated():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(4)
    for bad, match in [
        (torch.ones(4, requires_grad=True), r"^params: Tensor.__dlpack__\(\) failed: .*require"),
        (torch.ones(4, dtype=torch.int32), r"^params: dtype torch.int32 is not supported"),
        (torch.ones(4, dtype=torch.complex64), r"^params: dtype torch.complex64 is not supported"),
        (torch.ones(4).to_sparse(), r"^params: "),
    ]:
        with pytest.raises(TypeError, match=match):
            onepass.Adam(bad)
    with pytest.raises(ValueError, match=r"^params: strides .* leave gaps"):
        onepass.Adam(torch.ones(8)[::2])
    opt = onepass.Adam(tensor)
    with pytest.raises(TypeError, match=r"^grads: Tensor.__dlpack__\(\) failed: .*require"):
        opt.step(torch.ones(4, requires_grad=True))
    assert (tensor == 1).all()
    assert opt.step_counts == (0,)
    opt.step(torch.ones(4))
    assert (tensor < 1).all()


def test_a_torch_tensor_without_memory():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^params: Tensor.__dlpack_device__\(\) "):
        onepass.Adam(torch.ones(4, device="meta"))


SHRINKS = """
import numpy as np, onepass

params = [np.ones(1 << 20, np.float32), np.ones(4, np.float32)]

class Shrinking:
    def __dlpack__(self, **options):
        params[0].resize(4, refcheck=False)
        return np.ones(4, np.float32).__dlpack__(**options)

opt = onepass.SGD(params)
try:
    opt.step([np.ones(1 << 20, np.float32), Shrinking()])
except ValueError as error:
    print(error)
print([p.tolist() for p in params], opt.step_counts)
"""


def test_a_gradient_whose_export_takes_away_the_memory_of_a_parameter():
    # Foreign code runs while a step reads its arguments: what was read of other arrays before it may be stale.
    done = subprocess.run([sys.executable, "-c", SHRINKS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"died of signal {-done.returncode}"
    message, rest = done.stdout.splitlines()
    assert message == "grads[0]: shape (1048576,) does not match its parameter's (4,)"
    assert rest == "[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]] (0, 0)"


# Hyper-parameters

NOT_NUMBERS = (None, "0.1", b"1", True, np.True_, [0.1], (0.1,), {}, 1j, np.array(0.1), np.array([0.1]), object())
NEGATIVE = (NAN, -INF, -1e-300, -1, np.float32(-0.5), np.float64(NAN))
BAD_NUMBERS = {
    **dict.fromkeys(
        ("lr", "eps", "eps_root", "initial_accumulator", "lr_decay", "weight_decay", "l1"),
        [(value, TypeError) for value in NOT_NUMBERS] + [(value, ValueError) for value in (*NEGATIVE, INF)],
    ),
    **dict.fromkeys(
        ("momentum", "rho"),
        [(value, TypeError) for value in NOT_NUMBERS]
        + [(value, ValueError) for value in (*NEGATIVE, INF, 1, 1.0, 1.5, np.float32(1))],
    ),
    "dampening": [(value, TypeError) for value in NOT_NUMBERS]
    + [(value, ValueError) for value in (*NEGATIVE, INF, 1.0000001, 2)],
    "momentum_decay": [(value, TypeError) for value in NOT_NUMBERS] + [(value, ValueError) for value in NEGATIVE],
    "betas": [
        (value, TypeError)
        for value in (
            None,
            0.9,
            "ab",
            (),
            (0.9,),
            (0.9, 0.99, 0.999),
            {0.9, 0.99},
            {"a": 1, "b": 2},
            np.array([0.9, 0.9]),
        )
    ]
    + [((a, b), TypeError) for a, b in [("0.9", 0.9), (0.9, None), (True, 0.9), (0.9, False), ([0.9], 0.9), (0.9, 1j)]]
    + [((a, b), ValueError) for a, b in [(1, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (INF, 0.9), (0.9, 2)]],
}
FLAGS = {
    *("decoupled_weight_decay", "maximize", "lr_in_velocity", "centered"),
    *("bias_correction", "eps_hat", "amsgrad", "max_of_corrected"),
}
BAD_FLAGS = [(value, TypeError) for value in ("True", "", 1, 0, 1.0, None, [], np.array(True), object())]

HUGE = (10**400, -(10**400), fractions.Fraction(10) ** 400)  # no float64 holds them

BAD_HYPER = [
    pytest.param(cls, name, value, exception, id=f"{cls.__name__}-{name}-{k}")
    for cls in CLASSES
    for name in hyper_names(cls)
    for k, (value, exception) in enumerate(BAD_FLAGS if name in FLAGS else BAD_NUMBERS[name])
]


@pytest.mark.parametrize(("cls", "name", "value", "exception"), BAD_HYPER)
def test_a_bad_hyper_parameter(cls, name, value, exception):
    param, other, grad = numbers(4, seed=1), numbers(4, seed=2), numbers(4, seed=3)
    element = r"(\[[01]\])?" if name == "betas" else ""
    expected = r": expected (a |an )?(finite )?(number|pair|True or False)"
    with pytest.raises(exception, match=f"^{name}{element}{expected}"):
        cls(param, **{name: value})
    with pytest.raises(exception, match=f"^{re.escape(f'params[1][{name!r}]')}{element}{expected}"):
        cls([{"params": param}, {"params": other, name: value}])

    opt, twin_param = cls([param]), param.copy()
    twin = cls([twin_param])
    opt.step([grad])
    twin.step([grad])
    snapshot = Snapshot(opt, param, other, grad)
    if name in opt._construction_only:
        with pytest.raises(ValueError, match=f"^{name}: is only read when"):
            opt.param_groups[0][name] = value
    else:
        with pytest.raises(exception, match=f"^{name}{element}{expected}"):
            opt.param_groups[0][name] = value
        with pytest.raises(exception, match=f"^{name}{element}{expected}"):
            opt.param_groups[0].update({"maximize": True, "lr": 0.25} | {name: value})
    if name == "lr" and not isinstance(value, (list, tuple)):  # a list has one for each group
        with pytest.raises(exception, match=f"^lr{expected}"):
            opt.lr = value
    snapshot.assert_unchanged()
    before = param.copy()
    opt.step([grad])
    twin.step([grad])
    assert_moved(before, param)
    assert_same_bits(param, twin_param)
    assert_equal_optimizers(opt, twin)


@pytest.mark.parametrize("rates", [[], [0.5], [0.5, 0.25, 0.125], (0.5, -1.0), [0.5, NAN], (None, 0.5), [0.5, [0.5]]])
def test_bad_learning_rates_for_all_groups(rates):
    opt = onepass.SGD([{"params": numbers(3)}, {"params": numbers(3), "lr": 0.75}])
    snapshot = Snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=r"^lr: "):
        opt.lr = rates
    snapshot.assert_unchanged()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_number_that_float64_does_not_hold(cls):
    for name in set(hyper_names(cls)) - FLAGS:
        for value in HUGE:
            if name == "momentum_decay" and value > 0:
                continue  # infinity is one of its values
            with pytest.raises(ValueError, match=rf"^{name}(\[1\])?: expected "):
                cls(numbers(4), **{name: (0.9, value) if name == "betas" else value})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_hyper_parameter_that_does_not_exist(cls):
    param, other = numbers(4, seed=1), numbers(4, seed=2)
    with pytest.raises(TypeError, match="learning_rate"):
        cls(param, learning_rate=0.1)
    with pytest.raises(
        ValueError, match=rf"^params\[1\]: 'LR' is not a hyper-parameter of {cls.__name__}; there are lr, "
    ):
        cls([{"params": param}, {"params": other, "LR": 0.1}])
    opt = cls([param, other])
    snapshot = Snapshot(opt, param, other)
    group = opt.param_groups[0]
    with pytest.raises(KeyError, match="'LR' is not a hyper-parameter; there are lr, "):
        group["LR"] = 0.1
    with pytest.raises(KeyError, match="'LR' is not a hyper-parameter"):
        group.update(lr=0.5, LR=0.1)
    with pytest.raises(KeyError, match="LR"):
        group["LR"]
    with pytest.raises(ValueError, match=r"^params: the parameters of a group are fixed"):
        group["params"] = [param]
    with pytest.raises(ValueError, match=r"^params: the parameters of a group are fixed"):
        group.update(lr=0.5, params=[param])
    for take_away in (lambda: group.__delitem__("lr"), lambda: group.pop("lr"), group.clear, group.popitem):
        with pytest.raises(TypeError, match="hyper-parameters cannot be deleted"):
            take_away()
    snapshot.assert_unchanged()


WITH_EPS = [cls for cls in CLASSES if "eps" in hyper_names(cls)]
WITH_ROOT = [cls for cls in WITH_EPS if "eps_root" in hyper_names(cls)]


def test_nearly_all_classes_have_an_epsilon():
    assert {cls.__name__ for cls in set(CLASSES) - set(WITH_EPS)} == {"SGD", "Momentum", "NAG"}


@pytest.mark.parametrize("cls", WITH_EPS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("eps", [1e-46, 1e-40, 1.1754942e-38])
def test_an_epsilon_that_float32_does_not_hold(cls, eps):
    single, double = numbers(4), numbers(4, np.float64)
    for name in ("eps", "eps_root") if cls in WITH_ROOT else ("eps",):
        what = re.escape(f": {eps!r} is zero in float32, where the smallest positive number that counts is 1.18e-38")
        with pytest.raises(ValueError, match=f"^{name}{what}$"):
            cls(single, **{name: eps})
        with pytest.raises(ValueError, match=f"^{name}{what}$"):
            cls([double, single], **{name: eps})
        with pytest.raises(ValueError, match=rf"^params\[1\]\['{name}'\]{what}$"):
            cls([{"params": double}, {"params": single, name: eps}], **{name: eps})
        # In float64 it is a number like any other, and float32 may have its own.
        before = copied([double, single])
        opt = cls([{"params": double}, {"params": single, name: 1e-6}], **{name: eps})
        opt.step([numbers(4, np.float64, seed=1), numbers(4, seed=1)])
        assert_moved(before, [double, single])
        snapshot = Snapshot(opt, single, double)
        with pytest.raises(ValueError, match=f"^{name}{what}$"):
            opt.param_groups[1][name] = eps
        snapshot.assert_unchanged()


@pytest.mark.parametrize("cls", WITH_EPS, ids=lambda cls: cls.__name__)
def test_no_epsilon_at_all(cls):
    param, other = numbers(4), numbers(4, seed=1)
    if cls not in WITH_ROOT:
        with pytest.raises(ValueError, match=r"^eps: .*must be positive"):
            cls(param, eps=0.0)
        return
    match = "^eps: eps and eps_root are both 0; one must be positive, or 0 / 0 is NaN$"
    with pytest.raises(ValueError, match=match):
        cls(param, eps=0.0)
    with pytest.raises(ValueError, match=match):
        cls(param, eps=0, eps_root=0)
    with pytest.raises(
        ValueError, match=r"^params\[1\]\['eps'\]: params\[1\]\['eps'\] and params\[1\]\['eps_root'\] are both 0"
    ):
        cls([{"params": param}, {"params": other, "eps": 0.0}])
    for ok in ({"eps": 0.0, "eps_root": 1e-7}, {"eps": 1e-7, "eps_root": 0.0}):
        opt = cls(param, **ok)
        snapshot = Snapshot(opt, param)
        with pytest.raises(ValueError, match=match):
            opt.param_groups[0].update(eps=0.0, eps_root=0.0)
        snapshot.assert_unchanged()
        before = param.copy()
        opt.step(numbers(4, seed=3))
        assert_moved(before, param)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (onepass.Adam, {"amsgrad": True}),
        (onepass.AdamW, {"amsgrad": True}),
        (onepass.RMSprop, {"centered": True}),
        (onepass.RMSprop, {"momentum": 0.9}),
        (onepass.RMSprop, {"momentum": 0.9, "centered": True, "lr": 0.5}),
    ],
)
def test_what_decides_which_states_exist_is_fixed(cls, changes):
    param = numbers(4)
    opt = cls(param)
    snapshot = Snapshot(opt, param)
    with pytest.raises(
        ValueError, match=f"^{', '.join(changes)}: decides which states exist, and cannot be changed later$"
    ):
        opt.param_groups[0].update(changes)
    snapshot.assert_unchanged()


def test_options_that_need_another():
    param = numbers(4)
    with pytest.raises(ValueError, match=r"^max_of_corrected: needs amsgrad=True$"):
        onepass.Adam(param, max_of_corrected=True)
    with pytest.raises(ValueError, match=r"^params\[0\]\['max_of_corrected'\]: needs amsgrad=True$"):
        onepass.Adam([{"params": param, "max_of_corrected": True}])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lr", [1e300, 1e40])
def test_a_learning_rate_that_float32_does_not_hold(case, lr):
    world = World(case)
    world.opt.lr = lr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot = Snapshot(world.opt, world.params, world.grads)
        message = r"^params.*: the coefficient '\w+' of \w+ would be .*e\+\d+, which is not finite"
        with pytest.raises(ValueError, match=message):
            world.opt.step(world.grads)
        snapshot.assert_unchanged()
    world.opt.lr = 0.0625
    world.good_step()
    wide = numbers(4, np.float64)
    before = wide.copy()
    opt = make(case, wide, lr=1e200)
    opt.step(numbers(4, np.float64, seed=1))
    assert_moved(before, wide)  # nothing is wrong with it in float64


def test_weight_decay_that_float32_does_not_hold():
    for more, name in [
        ({"weight_decay": 1e300}, "l2"),
        ({"weight_decay": 1e300, "decoupled_weight_decay": True}, "decay"),
        ({"l1": 1e300}, "l1"),
    ]:
        world = World("SGD")
        world.opt.param_groups[0].update(more)
        snapshot = Snapshot(world.opt, world.params, world.grads)
        message = f"^params.*: the coefficient '{name}' of sgd would be .* not finite in float32"
        with pytest.raises(ValueError, match=message):
            world.opt.step(world.grads)
        snapshot.assert_unchanged()


# Schedules


class Failing:
    """A schedule that goes bad at its second step."""

    def __init__(self, value):
        self.value = value

    def __call__(self, t):
        if t == 1:
            return 0.0625
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("value", "exception", "match"),
    [
        (NAN, ValueError, r"^lr\(2\): expected a finite number >= 0, got nan$"),
        (INF, ValueError, r"^lr\(2\): expected a finite number >= 0, got inf$"),
        (-0.5, ValueError, r"^lr\(2\): expected a finite number >= 0, got -0.5$"),
        (10**400, ValueError, r"^lr\(2\): expected a finite number >= 0"),
        (None, TypeError, r"^lr\(2\): expected a finite number >= 0, got None$"),
        ("0.1", TypeError, r"^lr\(2\): expected a finite number >= 0, got '0.1'$"),
        (True, TypeError, r"^lr\(2\): expected a finite number >= 0, got True$"),
        (1j, TypeError, r"^lr\(2\): expected a finite number >= 0, got 1j$"),
        (ZeroDivisionError("mine"), ZeroDivisionError, "^mine$"),
        (KeyboardInterrupt("mine"), KeyboardInterrupt, "^mine$"),
        (1e300, ValueError, r"is 1e\+300, which is not finite in float32|not finite in float32"),
    ],
    ids=["nan", "inf", "negative", "huge", "None", "str", "bool", "complex", "error", "interrupt", "not-in-float32"],
)
def test_a_schedule_that_fails(cls, value, exception, match):
    params = [numbers(4, seed=1), numbers(3, seed=2), numbers(2, seed=3)]
    twin_params = copied(params)
    grads = [numbers(4, seed=4), numbers(3, seed=5), numbers(2, seed=6)]
    groups = [{"params": params[:2], "lr": 0.0625}, {"params": params[2:], "lr": Failing(value)}]
    opt, twin = cls(groups), cls([{"params": twin_params[:2]}, {"params": twin_params[2:]}], lr=0.0625)
    nested = [grads[:2], grads[2:]]
    opt.step(nested)
    twin.step(nested)
    snapshot = Snapshot(opt, params, grads)
    for _ in range(2):
        with pytest.raises(exception, match=match):
            opt.step(nested)
        snapshot.assert_unchanged()
    opt.lr = 0.0625
    before = copied(params)
    opt.step(nested)
    twin.step(nested)
    assert_moved(before, params)
    assert_same_bits(params, twin_params)
    assert_equal_optimizers(opt, twin)


# State dicts


def test_a_bad_state_dict():
    opt = onepass.Adam({"w": numbers((2, 3)), "b": numbers(3)})
    opt.step({"w": numbers((2, 3), seed=1), "b": numbers(3, seed=2)})
    good = opt.state_dict()
    opt.step({"w": numbers((2, 3), seed=3), "b": numbers(3, seed=4)})

    def changed(path, value):
        state = opt.state_dict()
        *way, last = path
        inner = state
        for key in way:
            inner = inner[key]
        inner[last] = value
        return state

    first = good["state"][0]
    for bad, exception, match in [
        (None, TypeError, "^state_dict: expected a dict, got NoneType$"),
        ([], TypeError, "^state_dict: expected a dict, got list$"),
        ({}, ValueError, "^state_dict: 'optimizer' is missing$"),
        ({**good, "extra": 1}, ValueError, "^state_dict: 'extra' is unknown$"),
        (changed(["optimizer"], "SGD"), ValueError, "^optimizer: the state is of 'SGD', not of 'Adam'$"),
        (changed(["param_groups"], []), ValueError, "^param_groups: expected a list of 1 groups$"),
        (changed(["param_groups"], None), ValueError, "^param_groups: expected a list of 1 groups$"),
        (
            changed(["param_groups", 0, "params"], [0]),
            ValueError,
            r"^param_groups\[0\]\['params'\]: expected \[0, 1\]$",
        ),
        (changed(["param_groups", 0, "lr"], -1), ValueError, r"^param_groups\[0\]\['lr'\]: expected a finite"),
        (changed(["param_groups", 0, "amsgrad"], True), ValueError, r"^param_groups\[0\]: needs the states of amsgrad"),
        (changed(["param_groups", 0, "eps"], 1e-46), ValueError, r"^param_groups\[0\]\['eps'\]: 1e-46 is zero"),
        (changed(["state"], {0: first}), ValueError, "^state: 1 is missing$"),
        (changed(["state", 2], first), ValueError, "^state: 2 is unknown$"),
        (changed(["state", 0, "step"], -1), ValueError, r"^state\[0\]\['step'\]: expected an integer .*, got -1$"),
        (changed(["state", 1, "step"], 2**70), ValueError, r"^state\[1\]\['step'\]: expected an integer"),
        (
            changed(["state", 1, "exp_avg"], [0.0]),
            TypeError,
            r"^state\[1\]\['exp_avg'\]: expected a NumPy array, got list$",
        ),
        (
            changed(["state", 1, "exp_avg"], np.zeros(4, np.float32)),
            ValueError,
            r"^state\[1\]\['exp_avg'\]: shape \(4,\)",
        ),
        (changed(["state", 1, "exp_avg"], np.zeros(3)), TypeError, r"^state\[1\]\['exp_avg'\]: dtype float64"),
        (changed(["state", 1, "velocity"], np.zeros(3)), ValueError, r"^state\[1\]: 'velocity' is unknown$"),
    ]:
        snapshot = Snapshot(opt, opt._flat)
        with pytest.raises(exception, match=match):
            opt.load_state_dict(bad)
        snapshot.assert_unchanged()


def test_a_state_dict_for_a_state_that_cannot_be_written():
    opt = onepass.Adam({"w": numbers((2, 3)), "b": numbers(3)})
    opt.step({"w": numbers((2, 3), seed=1), "b": numbers(3, seed=2)})
    good = opt.state_dict()
    opt.step({"w": numbers((2, 3), seed=3), "b": numbers(3, seed=4)})
    opt.state[1]["exp_avg_sq"].flags.writeable = False
    snapshot = Snapshot(opt, opt._flat)
    with pytest.raises(ValueError, match="read-only"):
        opt.load_state_dict(good)
    snapshot.assert_unchanged()
    opt.state[1]["exp_avg_sq"].flags.writeable = True
    opt.load_state_dict(good)
    assert opt.step_counts == (1, 1)


def test_the_base_is_no_optimizer():
    with pytest.raises(TypeError, match=r"^Optimizer is the base of the optimizers; use one of them$"):
        onepass.Optimizer(numbers(3), None, {}, {})


SPAN = np.timedelta64(3)
SPANS = {
    "lr": lambda: onepass.SGD(numbers(3), lr=SPAN),
    "accumulate": lambda: onepass.SGD(numbers(3), accumulate=SPAN),
    "seed": lambda: onepass.SGD(numbers(3), seed=SPAN),
    "max_unit_norm": lambda: onepass.SGD(numbers(3), max_unit_norm=(1.0, np.timedelta64(0))),
    "num_features": lambda: onepass.BatchNorm(SPAN),
    "channel_axis": lambda: onepass.BatchNorm(3, channel_axis=SPAN),
    "every": lambda: onepass.schedules.step(0.5, every=SPAN),
    "count": lambda: onepass.set_num_threads(SPAN),
}


@pytest.mark.parametrize("name", SPANS)
def test_a_span_of_time_is_no_number_though_numpy_derives_it_from_its_integers(name):
    with pytest.raises(TypeError, match=name):
        SPANS[name]()

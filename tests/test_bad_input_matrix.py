"""Promise: every argument of every callable refuses every defect by its name, and nothing has changed then.

Which callables there are, and which arguments they have, is read from the registry, the storage table and signatures:
what is added later is in the matrix, or a test here says what has yet to be told of it.
"""

from __future__ import annotations

import contextlib
import copy
import decimal
import fractions
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

import onepass
from helpers import (
    CASES,
    CLASSES,
    NO_CUDA,
    UPDATE_RULES,
    Exports,
    HandMade,
    OnGpu,
    Snapshot,
    arrays_of,
    assert_equal_optimizers,
    assert_moved,
    assert_same_bits,
    copied,
    hyper_names,
    make,
    numbers,
)
from onepass import _cpu, functional
from onepass.optim import hyper as hp
from onepass.optim import options as op

NAN, INF = math.nan, math.inf
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in (*_cpu.dtypes(), "uint16")}
ROWS = [tuple(DTYPES[name] for name in row) for row in _cpu.storages()]
ROW_NAMES = ["-".join(row) for row in _cpu.storages()]


def compute_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


# What is asked of each case


class Everything(Snapshot):
    """All that can be read of an optimizer."""

    def _read(self):
        read = super()._read()
        if self.opt is not None:
            inner = self.opt._updater
            read["sums"] = inner.accumulated, inner.received
            read["rest"] = inner.seed, inner.skipped, inner.swapped, inner.grad_norm
        return read


def refused(what, call, error, labels, text, snapshot):
    """`call` raises exactly `error`, whose message names one of `labels`, if any, and says `text`; all is as it was."""
    try:
        call()
    except BaseException as raised:
        if not isinstance(raised, Exception) and type(raised) is not error:
            raise
        message = str(raised)
        told = f"{what}: {type(raised).__name__}: {message}"
        if type(raised) is not error:
            raise AssertionError(f"{told}\nexpected {error.__name__}") from raised
        rests = [message] if not labels else []
        rests += [message[len(label) + 2 :] for label in labels if message.startswith(f"{label}: ")]
        if not any(re.search(text, rest) for rest in rests):
            raise AssertionError(f"{told}\nexpected {' or '.join(labels)}: {text}") from raised
    else:
        raise AssertionError(f"{what}: was accepted")
    for part, now in snapshot._read().items():
        assert now == snapshot.was[part], f"{what}: {part} changed"


# What an array can be that is none, or the wrong one


def plain(given):
    """What Snapshot can read: a masked array shows its fill value in the place of its memory."""
    return np.asarray(given) if isinstance(given, np.ma.MaskedArray) else given


def by_dlpack(array, **fields):
    code = {BFLOAT16: 4, DTYPES["uint16"]: 1}.get(array.dtype, 2)
    return HandMade(array, **{"dtype": (code, 8 * array.itemsize, 1), **fields})


def is_no_array(build):
    return (
        build,
        TypeError,
        "^expected a NumPy array or an object with __dlpack__(, or a list or tuple of those)?, got ",
    )


UNSUPPORTED = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "complex64", "complex128"),
    *("longdouble", "object", "datetime64[s]", "timedelta64[s]", "U4", "S4"),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.int4, np.dtype([("a", np.float32)])),
]

# How it is made of the good array, the exception, what the message says after the name.
KINDS = {
    "list": is_no_array(lambda good: good.tolist()),
    "list-of-arrays": is_no_array(list),
    "tuple": is_no_array(lambda good: tuple(good.reshape(-1))),
    "dict": is_no_array(lambda good: {"a": good}),
    "set": is_no_array(lambda good: {1.0}),
    "str": is_no_array(lambda good: "weight"),
    "bytes": is_no_array(lambda good: good.tobytes()),
    "bytearray": is_no_array(lambda good: bytearray(good.tobytes())),
    "memoryview": is_no_array(lambda good: memoryview(good.tobytes())),
    "float": is_no_array(lambda good: 1.0),
    "int": is_no_array(lambda good: 0),
    "bool": is_no_array(lambda good: False),
    "complex": is_no_array(lambda good: 1j),
    "scalar": is_no_array(lambda good: good.dtype.type(1)),
    "generator": is_no_array(lambda good: (row for row in good)),
    "range": is_no_array(lambda good: range(good.size)),
    "ndarray-itself": is_no_array(lambda good: np.ndarray),
    "class-with-dlpack": is_no_array(lambda good: Exports),
    "ellipsis": is_no_array(lambda good: ...),
    "object": is_no_array(lambda good: object()),
    **{
        f"dtype-{dtype.name}": (lambda good, dtype=dtype: np.zeros(good.shape, dtype), TypeError, "^dtype ")
        for dtype in map(np.dtype, UNSUPPORTED)
    },
    "foreign-byte-order": (
        lambda good: good.astype(good.dtype.newbyteorder("S")),
        TypeError,
        "has foreign byte order|is not supported",
    ),
    "masked": (
        lambda good: np.ma.masked_array(good.copy(), np.ones(good.shape, bool)),
        TypeError,
        "^is a masked array",
    ),
    "masked-nothing": (lambda good: np.ma.masked_array(good.copy()), TypeError, "^is a masked array"),
    "dlpack-raises": (lambda good: Exports(BufferError("no")), TypeError, r"^Exports.__dlpack__\(\) failed: no$"),
    "dlpack-returns-none": (lambda good: Exports(None), TypeError, r"^Exports.__dlpack__\(\) returned no DLPack"),
    "dlpack-future": (lambda good: by_dlpack(good, version=2), TypeError, "^exports DLPack version 2"),
    "dlpack-integer": (lambda good: by_dlpack(good, dtype=(0, 32, 1)), TypeError, r"^dtype \(DLPack code 0, 32 bits\)"),
    "dlpack-lanes": (lambda good: by_dlpack(good, dtype=(2, 32, 4)), TypeError, "^dtype "),
    "dlpack-cuda": (lambda good: by_dlpack(good, device=(2, 0)), TypeError, f"^({NO_CUDA})"),
    "dlpack-rocm": (lambda good: by_dlpack(good, device=(10, 0)), TypeError, r"^is on a device \(DLPack type 10\)"),
    "cuda-array-interface": (lambda good: OnGpu(good.shape), TypeError, f"^({NO_CUDA})"),
}
NONE = is_no_array(lambda good: None)


def kinds_of(good):
    for name, (build, error, text) in KINDS.items():
        if name == f"dtype-{good.dtype.name}" or (name == "foreign-byte-order" and good.dtype == BFLOAT16):
            continue  # as it has to be; a type of ml_dtypes knows no other order
        yield name, build(good), error, text


def shapes_of(good):
    first, *rest = good.shape
    shapes = [
        (*good.shape, 1),
        (1, *good.shape),
        (first + 1, *rest),
        (first - 1, *rest),
        (0, *rest),
        (),
        good.shape[:-1],
    ]
    shapes += [good.shape[::-1], (good.size,), (good.size + 1,), (*good.shape[:-1], 1)]
    for shape in dict.fromkeys(shapes):
        if shape != good.shape:
            yield f"shape-{shape}", np.ones(shape, good.dtype), ValueError, r"^shape \("


def read_only(good):
    good = good.copy()
    good.flags.writeable = False
    return good


def spread(good):
    return np.repeat(good, 2, axis=-1)[..., ::2]


def strided(good, strides):
    """Over memory of its own, in units of an element."""
    memory = np.ones(4 * good.size, good.dtype)
    return np.lib.stride_tricks.as_strided(memory, good.shape, tuple(good.itemsize * s for s in strides))


def with_odd_bytes_between(good):
    memory = np.zeros(8 * good.nbytes, np.uint8)
    strides = [s // good.itemsize * (good.itemsize + 1) for s in good.strides]
    return np.ndarray(good.shape, good.dtype, memory, strides=strides)


GAPS = "^strides "
LAYOUTS = {
    "gaps": (spread, GAPS),
    "gaps-between-rows": (lambda good: np.repeat(good, 2, axis=0)[::2], GAPS),
    "backwards": (lambda good: good[..., ::-1].copy()[..., ::-1], GAPS),
    "all-backwards": (lambda good: np.flip(np.flip(good).copy()), GAPS),
    "stride-0": (lambda good: strided(good, [0] * good.ndim), GAPS),
    "last-stride-0": (lambda good: strided(good, [*[good.shape[-1]] * (good.ndim - 1), 0]), GAPS),
    "sliding-window": (lambda good: strided(good, [1 + (good.ndim == 1)] * good.ndim), GAPS),
    "odd-bytes-between": (with_odd_bytes_between, GAPS),
    "broadcast": (lambda good: np.broadcast_to(good[..., :1].copy(), good.shape), "^is read-only|^strides "),
    "dlpack-gaps": (lambda good: by_dlpack(spread(good)), GAPS),
}
UNWRITABLE = {
    "read-only": (read_only, "^is read-only"),
    "of-bytes": (lambda good: np.frombuffer(good.tobytes(), good.dtype).reshape(good.shape), "^is read-only"),
    "dlpack-read-only": (lambda good: by_dlpack(good.copy(), flags=1), "^is read-only"),
    "dlpack-copy": (lambda good: by_dlpack(good.copy(), flags=2), r"^its __dlpack__\(\) exports a copy"),
}


def layouts_of(good):
    for name, (build, text) in LAYOUTS.items():
        yield name, build(good), ValueError, text


def unwritable_of(good):
    for name, (build, text) in UNWRITABLE.items():
        yield name, build(good), ValueError, text


BYTE_BOUNDS = np.lib.array_utils.byte_bounds if hasattr(np.lib, "array_utils") else np.byte_bounds  # noqa: NPY201


def test_the_defects_are_defects():
    for dtype in DTYPES.values():
        good = numbers((3, 4), dtype)
        for name, bad, *_ in [*kinds_of(good), *shapes_of(good)]:
            if isinstance(bad, np.ndarray) and not isinstance(bad, np.ma.MaskedArray):
                assert (bad.shape, bad.dtype.str) != (good.shape, good.dtype.str), name
        for name, bad, *_ in layouts_of(good):
            if isinstance(bad, np.ndarray):
                assert (bad.shape, bad.dtype) == (good.shape, good.dtype), name
                assert bad.strides not in (good.strides, np.asfortranarray(good).strides), name
                low, high = BYTE_BOUNDS(bad)
                assert bad.base is not None, name
                assert low < high, name


# The dtypes that go together


def go_together(dtypes):
    """Whether arrays of these dtypes belong to one parameter: by the storage table and the docstring."""
    param, split = dtypes["params"], "remainders" in dtypes
    states = {dtype for name, dtype in dtypes.items() if name not in SURROUNDINGS and name not in ("params", "grads")}
    if len(states) > 1:
        return False
    rows = [row for row in ROWS if row[0] == param and row[1] == dtypes["grads"] and states <= {row[2]}]
    return (
        bool(rows)
        and dtypes.get("emas", param) == (compute_dtype(param) if split else param)
        and dtypes.get("mirrors", BFLOAT16) in (BFLOAT16, np.float16)
        and dtypes.get("accumulators", compute_dtype(param)) == compute_dtype(param)
        and (not split or (param == BFLOAT16 and dtypes["remainders"] == np.uint16))
    )


# Numbers, flags and names: what they can be, and which of it is in a range

VALUES = (
    *(None, "0.1", "", b"1", True, False, np.True_, [], [0.1], (0.1,), (), {}, {0.1}, 1j, np.complex64(1)),
    *(np.array(0.1), np.array([0.1]), np.array([0.1, 0.2]), np.array(["a", "b"]), object(), decimal.Decimal("0.1")),
    *(
        float,
        NotImplemented,
        ...,
        NAN,
        np.float32(NAN),
        INF,
        -INF,
        np.float64(INF),
        -1e-300,
        -1,
        -1.0,
        np.float32(-0.5),
    ),
    *(
        np.int64(-7),
        10**400,
        -(10**400),
        fractions.Fraction(10) ** 400,
        0,
        0.0,
        -0.0,
        np.int32(0),
        1,
        1.0,
        np.float32(1),
    ),
    *(math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), 2, 1.5, 0.5, np.float32(0.25), fractions.Fraction(1, 2), 3),
    *(2**31, 2**64, 2**70, "relu", "skip", "stochastic", "split", "nearest", "raise", "propagate", "RELU", "Skip"),
)


def is_real(value):
    kinds = int, float, np.integer, np.floating, fractions.Fraction
    return isinstance(value, kinds) and not isinstance(value, (bool, np.bool_))


def is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def is_beyond_float(value):
    """Refused as infinity is."""
    return isinstance(value, (int, fractions.Fraction)) and abs(value) > 2**1024


def outside(value, low, high, *, low_open=False, high_open=False):
    """Of a number: exact also where no float holds it."""
    if isinstance(value, (float, np.floating)) and math.isnan(value):
        return True
    return value < low or value > high or (low_open and value == low) or (high_open and value == high)


def a_number(low, high, **ends):
    def judge(value):
        if not is_real(value):
            return TypeError
        return ValueError if is_beyond_float(value) or outside(value, low, high, **ends) else None

    return judge


def an_integer(low, high):
    def judge(value):
        if not is_integer(value):
            return TypeError
        return ValueError if not low <= value <= high else None

    return judge


def one_of(*names):
    def judge(value):
        if any(value is name for name in names) or (isinstance(value, str) and value in names):
            return None
        return ValueError if isinstance(value, str) else TypeError

    return judge


def a_pair(first, second):
    def judge(value):
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            return TypeError
        return first(value[0]) or second(value[1])

    return judge


def or_none(judge):
    return lambda value: None if value is None else judge(value)


def or_callable(judge):
    return lambda value: None if callable(value) and not isinstance(value, type) else judge(value)


def axes(value):
    given = value if isinstance(value, (tuple, list)) else (value,)
    if not given or not all(is_integer(axis) for axis in given):
        return TypeError
    return None if all(-64 <= axis < 64 for axis in given) else ValueError


def a_dtype(*names):
    return lambda value: None if value is float and "float64" in names else TypeError


NONNEGATIVE = a_number(0, INF, high_open=True)
FRACTION = a_number(0, 1, high_open=True)
RANGES = {
    "flag": lambda value: None if isinstance(value, (bool, np.bool_)) else TypeError,
    "closed fraction": a_number(0, 1),
    "positive": a_number(0, INF, low_open=True, high_open=True),
    "axis": an_integer(-64, 64),
    "relu": one_of("relu", None),
    "count": an_integer(1, 2**62),
    "compute dtype": a_dtype(*_cpu.compute_dtypes()),
    "device": lambda value: None if value is None else (one_of("cpu") if isinstance(value, str) else NUMBERED)(value),
}
NUMBERED = an_integer(0, 2**31 - 1)


def judged(name, value):
    """The exception that a value of this range deserves; None for a good one."""
    return RANGES[name](value)


# The ranges that the docstrings give.
HYPER_RANGES = {
    **dict.fromkeys(("eps", "eps_root", "initial_accumulator", "lr_decay", "weight_decay", "l1"), NONNEGATIVE),
    **dict.fromkeys(("momentum", "rho"), FRACTION),
    "lr": or_callable(NONNEGATIVE),
    "dampening": a_number(0, 1),
    "momentum_decay": a_number(0, INF),
    "betas": a_pair(FRACTION, FRACTION),
    **dict.fromkeys(
        (
            *("decoupled_weight_decay", "maximize", "lr_in_velocity", "centered"),
            *("bias_correction", "eps_hat", "amsgrad", "max_of_corrected"),
        ),
        RANGES["flag"],
    ),
    "ema_decay": or_none(or_callable(FRACTION)),
    "max_unit_norm": or_none(a_pair(a_number(0, INF, low_open=True, high_open=True), axes)),
    "gradient_noise": or_none(a_pair(NONNEGATIVE, NONNEGATIVE)),
}
LIMIT = or_none(a_number(0, INF, low_open=True))
STEP_RANGES = {
    "grad_scale": RANGES["positive"],
    "max_grad_norm": LIMIT,
    "clip_norm": LIMIT,
    "clip_value": or_none(RANGES["positive"]),
    "nonfinite": one_of("propagate", "skip", "raise"),
    "zero_grads": RANGES["flag"],
}
SEED = an_integer(0, 2**64 - 1)
ROUNDING = one_of("nearest", "stochastic")
ACCUMULATE = an_integer(1, 2**31 - 1)
FUNCTION_RANGES = {
    "step": an_integer(1, 2**62),
    "seed": SEED,
    "rounding": ROUNDING,
    "accumulate": ACCUMULATE,
    "micro_step": an_integer(1, 2),  # of the two that the matrix sums
}
CONSTRUCTION_RANGES = {
    "accumulate": ACCUMULATE,
    "seed": SEED,
    "rounding": ROUNDING,
    "master": one_of("split", None),
    "state_dtype": or_none(a_dtype("float32", "bfloat16")),  # for parameters of float32
    "state_alloc": or_none(lambda value: None if callable(value) else TypeError),
}


def values_for(name):
    """What a hyper-parameter or option is given: for pairs, pairs of it too."""
    good = {"betas": (0.9, 0.5), "max_unit_norm": (2.0, 0), "gradient_noise": (0.1, 0.5)}.get(name)
    yield from VALUES
    if good is not None:
        for value in VALUES:
            yield value, good[1]
            yield [good[0], value]
        yield from ((*good, 0.5), dict(zip("ab", good, strict=True)), np.array(good))
        yield from ((good[0], (0, value)) for value in ("a", None, 64, 0.5) if name == "max_unit_norm")


def test_each_range_is_told():
    assert set(HYPER_RANGES) == set(hp.RANGES)
    assert set(STEP_RANGES) == set(op.StepOptions.__annotations__)
    construction = set(op.Options.__annotations__) - {"mirror"} - set(op.GROUP_OPTIONS)
    assert set(CONSTRUCTION_RANGES) == construction
    for cls in CLASSES:
        assert set(hyper_names(cls)) <= set(HYPER_RANGES)
    for name, judge in {**HYPER_RANGES, **STEP_RANGES, **CONSTRUCTION_RANGES}.items():
        verdicts = [judge(value) for value in values_for(name)]
        assert TypeError in verdicts, name
        assert None in verdicts, name


# Functions of onepass.functional that update

# Arrays that are optional, and what has to come with each.
SURROUNDINGS = {
    "emas": {"ema_decay": 0.5},
    "mirrors": {},
    "remainders": {},
    "accumulators": {"accumulate": 2, "micro_step": 2},
}
OPTIONAL_STATES = {"grad_avgs": {}, "velocities": {"momentum": 0.5}}
TOGETHER = {**SURROUNDINGS, **OPTIONAL_STATES}
SHAPES = ((5,), (3, 4), (2, 3))
BAD = 1  # the position of the bad one, between two good ones


def annotation(value):
    return getattr(value, "__forward_arg__", value)


def arguments_of(name):
    """The arrays, and the other arguments, of an update rule as a function."""
    parameters = inspect.signature(getattr(functional, name)).parameters
    kinds = {key: annotation(value.annotation) for key, value in parameters.items() if key != "options"}
    kinds |= {key: annotation(value) for key, value in functional.FunctionOptions.__annotations__.items()}
    # The options of a step are inherited, which annotations do not show on every version of Python.
    kinds |= {key: annotation(value) for key, value in op.StepOptions.__annotations__.items()}
    arrays = [key for key, kind in kinds.items() if kind in ("Arrays", "Arrays | None")]
    return arrays, [key for key in kinds if key not in arrays]


def required_arrays(name):
    arrays, _ = arguments_of(name)
    parameters = inspect.signature(getattr(functional, name)).parameters
    return [key for key in arrays if key in parameters and parameters[key].default is inspect.Parameter.empty]


def test_each_function_and_each_of_its_arrays_is_in_the_matrix():
    for name in UPDATE_RULES:
        arrays, others = arguments_of(name)
        assert arrays[:2] == ["params", "grads"], name
        assert set(arrays) - set(required_arrays(name)) <= set(TOGETHER), f"{name}: what comes with its new array?"
        assert set(SURROUNDINGS) < set(arrays)
        known = {*hp.RANGES, *STEP_RANGES, *FUNCTION_RANGES}
        assert set(others) <= known, f"{name}: what is the range of {set(others) - known}?"


class Function:
    """A function of `functional` with good arrays of one row of the storage table, and a twin of the arrays."""

    def __init__(self, name, row, *, single=False, full=True):
        self.name, self.single = name, single
        self.function = getattr(functional, name)
        param, grad, state = row
        self.split = full and param == BFLOAT16
        dtypes = {
            "params": param,
            "grads": grad,
            "emas": compute_dtype(param) if self.split else param,
            "mirrors": BFLOAT16,
            "remainders": np.dtype(np.uint16),
            "accumulators": compute_dtype(param),
        }
        taken = arguments_of(name)[0] if full else required_arrays(name)
        if not self.split:
            taken = [key for key in taken if key != "remainders"]
        shapes = SHAPES[BAD : BAD + 1] if single else SHAPES
        self.arrays, self.options = {}, {}
        for k, key in enumerate(taken):
            of_state = key not in dtypes
            self.arrays[key] = [
                np.zeros(shape, dtypes.get(key, state))
                if of_state or key in ("remainders", "accumulators")
                else numbers(shape, dtypes[key], seed=10 * k + n, order="CF"[n == 2])
                for n, shape in enumerate(shapes)
            ]
            self.options |= TOGETHER.get(key, {})
        self.position = 0 if single else BAD
        self.dtypes = {key: arrays[self.position].dtype for key, arrays in self.arrays.items()}
        self.twins, self.start = copied(self.arrays), copied(self.arrays)
        self.steps = self.refusals = 0
        self.where = f"functional.{name} {'-'.join(map(str, row))}"

    def good(self, name):
        return self.arrays[name][self.position]

    def label(self, name, index=None):
        return name if self.single else f"{name}[{self.position if index is None else index}]"

    def call(self, arrays, **options):
        given = {key: value[0] if self.single else value for key, value in arrays.items()}
        self.function(**given, **{"step": self.steps + 1, "lr": 2.0**-3, **self.options, **options})

    def replaced(self, *changes):
        """The arrays with others in the places (name, index)."""
        arrays = {key: list(value) for key, value in self.arrays.items()}
        for name, index, array in changes:
            arrays[name][index] = array
        return arrays

    def refuses(self, what, changes, error, labels, text, *also, **options):
        arrays = self.replaced(*changes)
        snapshot = Snapshot(None, self.arrays, [plain(array) for _, _, array in changes], *also)
        refused(f"{self.where}: {what}", lambda: self.call(arrays, **options), error, labels, text, snapshot)
        self.refusals += 1

    def goes_on(self):
        """As a twin that nothing bad has happened to."""
        assert self.refusals > 0
        for _ in range(3):
            self.call(self.arrays)
            self.call(self.twins)
            self.steps += 1
        assert_same_bits(self.arrays, self.twins)
        for name in self.arrays:
            if name not in ("grads", "remainders", "accumulators"):
                assert_moved(self.start[name], self.arrays[name])


@pytest.mark.parametrize("row", ROWS, ids=ROW_NAMES)
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_each_array_of_each_function(name, row):
    ways = [(False, True)]
    if (UPDATE_RULES.index(name) + ROWS.index(row)) % 3 == 0:  # the same code in all rows
        ways += [(True, True), (False, False)]
    for single, full in ways:
        world = Function(name, row, single=single, full=full)
        everyone = [world.label(other) for other in world.arrays]
        for argument in world.arrays:
            good, own = world.good(argument), [world.label(argument)]
            place = argument, world.position
            for what, bad, error, text in kinds_of(good):
                if single and isinstance(bad, (list, tuple)):
                    labels, text = (
                        (everyone, "") if argument == "params" else (own, "^expected one array, as params is")
                    )
                    labels = [*labels, *world.arrays]
                else:
                    labels = own
                world.refuses(f"{argument} {what}", [(*place, bad)], error, labels, text)
            for what, bad, error, text in shapes_of(good):
                labels = everyone if argument == "params" else own
                world.refuses(f"{argument} {what}", [(*place, bad)], error, labels, text)
            if argument not in ("grads", "mirrors") and not (single and argument in TOGETHER):
                world.refuses(f"{argument} None", [(*place, None)], TypeError, own, NONE[2])
            for dtype in DTYPES.values():
                if not go_together({**world.dtypes, argument: dtype}):
                    bad = numbers(good.shape, dtype)
                    text = "dtype|split master"
                    world.refuses(f"{argument} {dtype}", [(*place, bad)], TypeError, everyone, text)
            writes = [*layouts_of(good), *unwritable_of(good)]
            for what, bad, error, text in writes if argument != "grads" else ():
                world.refuses(f"{argument} {what}", [(*place, bad)], error, own, text)
            for what, bad, error, _ in writes if argument == "grads" else ():
                if what not in ("dlpack-gaps", "gaps", "gaps-between-rows", "backwards", "all-backwards"):
                    text = "cannot be zeroed|^strides .* may repeat" if what != "odd-bytes-between" else ""
                    if text:
                        world.refuses(f"zeroed {what}", [(*place, bad)], error, own, text, zero_grads=True)
        world.goes_on()


# How far behind the start of one array another one starts, in bytes, from both.
MEETING = {
    "same-start": lambda a, b: 0,
    "last-element": lambda a, b: a.nbytes - a.itemsize,
    "last-byte": lambda a, b: a.nbytes - 1,
    "first-byte": lambda a, b: 1 - b.nbytes,
}


def meeting(a, b, shift):
    """Two arrays like these, at this distance in memory."""
    margin = a.nbytes + b.nbytes
    memory = np.zeros(3 * margin, np.uint8)
    return memory, *(np.ndarray(x.shape, x.dtype, memory, margin + at) for x, at in ((a, 0), (b, shift)))


@pytest.mark.parametrize("row", ROWS, ids=ROW_NAMES)
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_each_pair_of_arrays_of_each_function_that_overlaps(name, row):
    world = Function(name, row)
    places = [(argument, index) for argument in world.arrays for index in (0, BAD)]
    for (one, i), (other, j) in itertools.combinations(places, 2):
        if i == j == 0:
            continue
        labels = [world.label(one, i), world.label(other, j)]
        reads = [label for label in labels if label.startswith("grads")]
        a, b = world.arrays[one][i], world.arrays[other][j]
        options = {"zero_grads": True} if len(reads) == 2 else {}
        for what, shift in MEETING.items():
            memory, x, y = meeting(a, b, shift(a, b))
            changes = [(one, i, x), (other, j, y)]
            world.refuses(f"{labels} {what}", changes, ValueError, reads or labels, "^overlaps ", memory, **options)
        if a.dtype == b.dtype and i == j:
            text = f"^overlaps {re.escape(labels[0])} in memory|^overlaps {re.escape(labels[1])} in memory"
            world.refuses(f"{labels} are one", [(one, i, b)], ValueError, reads or labels, text, **options)
            world.refuses(f"{labels} view", [(one, i, b[::1])], ValueError, reads or labels, text, **options)
    world.goes_on()


@pytest.mark.parametrize("row", ROWS, ids=ROW_NAMES)
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_each_list_of_each_function(name, row):
    world = Function(name, row)
    required = required_arrays(name)
    for argument, good in world.arrays.items():
        for what, bad, error, text in [
            ("too few", good[:-1], ValueError, " given for "),
            ("too many", [*good, good[0].copy()], ValueError, " given for "),
            ("empty", [], ValueError, " given for "),
            ("generator", (array for array in good), TypeError, "^expected .*got generator"),
            ("zip", zip(good, strict=True), TypeError, "^expected .*got zip"),
            ("dict", dict(enumerate(good)), TypeError, "^expected .*got dict"),
            ("array", good[0], TypeError, "^expected "),
            ("str", "weight", TypeError, "^expected "),
            ("None", None, TypeError if argument in required else None, "^expected "),
            ("nested", [good[0], [good[1]], good[2]], TypeError, "^expected a NumPy array .*, got list$"),
        ]:
            arrays = {**world.arrays, argument: bad}
            labels = [argument, f"{argument}[1]"]
            if argument == "params" and what in ("too few", "too many", "empty", "array"):
                labels += world.arrays  # which of them was meant, nobody knows
            if error is None:
                text = "^needed with "
                if not TOGETHER[argument]:
                    continue  # one may do without it
                error = ValueError
            snapshot = Snapshot(None, world.arrays)
            call = lambda arrays=arrays: world.call(arrays)  # noqa: E731
            refused(f"{world.where}: {argument} {what}", call, error, labels, text, snapshot)
            world.refusals += 1
    world.goes_on()


# Batch normalization

CHANNELS = 3
BATCH_SHAPE = (4, CHANNELS, 5)
OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")
OF_STATISTICS = ("mean", "invstd")
OF_BATCH = ("x", "dy", "y", "residual", "out")


def batch_arguments(function):
    """The arrays that a function or method takes, and what else it takes."""
    parameters = inspect.signature(function).parameters
    arrays = [name for name, value in parameters.items() if value.annotation in ("Array", "Array | None")]
    return arrays, [name for name in parameters if name not in arrays and name != "self"]


def batch_array(name, dtype):
    if name in OF_BATCH:
        return numbers(BATCH_SHAPE, dtype, seed=OF_BATCH.index(name))
    if name in OF_STATISTICS:
        return np.abs(numbers(CHANNELS, np.float64, seed=len(name)))
    assert name in OF_CHANNELS, f"what is {name}?"
    return np.abs(numbers(CHANNELS, dtype, seed=len(name)))


BATCH_FUNCTIONS = {
    **{name: getattr(functional, name) for name in functional.__all__ if name.startswith("batch_norm")},
    **{
        f"BatchNorm.{name}": function
        for name, function in inspect.getmembers(onepass.BatchNorm, inspect.isfunction)
        if batch_arguments(function)[0]
    },
}


class Batch:
    """A call of batch normalization with good arrays, and a twin of all."""

    def __init__(self, name, training, dtype):
        self.name, self.training = name, training
        self.where = f"{name} training={training} {dtype}"
        taken, self.others = batch_arguments(BATCH_FUNCTIONS[name])
        self.arrays = {key: batch_array(key, dtype) for key in taken}
        self.twins = copied(self.arrays)
        self.needed = [
            key
            for key, value in inspect.signature(BATCH_FUNCTIONS[name]).parameters.items()
            if key in taken and value.default is inspect.Parameter.empty
        ]
        if name == "batch_norm":
            self.needed += ["running_mean", "running_var"]  # both or none
        self.layer, self.twin = self.new_layer(dtype), self.new_layer(dtype)

    def new_layer(self, dtype):
        layer = onepass.BatchNorm(CHANNELS, activation="relu", dtype=dtype)
        layer.forward(numbers(BATCH_SHAPE, dtype, seed=7), residual=numbers(BATCH_SHAPE, dtype, seed=8))
        return layer

    def written(self, name):
        return name == "out" or (name.startswith("running") and self.training and self.name == "batch_norm")

    def call(self, arrays, layer, **options):
        if "training" in self.others:
            options = {"training": self.training, **options}
        if "." not in self.name:
            options = {"activation": "relu", **options}
        first, *rest = arrays
        owner = [layer] if "." in self.name else []
        return BATCH_FUNCTIONS[self.name](*owner, arrays[first], **{key: arrays[key] for key in rest}, **options)

    def watched(self, *also):
        layer = self.layer
        arrays = {**layer.parameters(), **layer.gradients(), "mean": layer.running_mean, "var": layer.running_var}
        return Snapshot(None, self.arrays, arrays, np.array(layer.num_batches_tracked), [plain(a) for a in also])

    def refuses(self, what, changes, error, labels, text, *also, **options):
        given = {**self.arrays, **changes}
        snapshot = self.watched(*changes.values(), *also)
        call = lambda: self.call(given, self.layer, **options)  # noqa: E731
        refused(f"{self.where}: {what}", call, error, labels, text, snapshot)

    def goes_on(self):
        for _ in range(2):
            got, want = self.call(self.arrays, self.layer), self.call(self.twins, self.twin)
            assert_same_bits(list(arrays_of(got)), list(arrays_of(want)))
            assert arrays_of(got)
            assert_same_bits(self.arrays, self.twins)
            if self.name == "BatchNorm.backward":
                for layer in (self.layer, self.twin):
                    layer.forward(numbers(BATCH_SHAPE, self.arrays["dy"].dtype, seed=9))


BATCH_CALLS = [
    (name, training, np.dtype(dtype))
    for name in BATCH_FUNCTIONS
    for training in (True, False)
    for dtype in _cpu.compute_dtypes()
    if training or name != "BatchNorm.backward"
]


@pytest.mark.parametrize(("name", "training", "dtype"), BATCH_CALLS, ids=str)
def test_each_array_of_batch_normalization(name, training, dtype):
    world = Batch(name, training, dtype)
    everyone = list(world.arrays)
    for argument, good in world.arrays.items():
        own = [argument]
        for what, bad, error, text in kinds_of(good):
            world.refuses(f"{argument} {what}", {argument: bad}, error, own, text)
        for what, bad, error, text in shapes_of(good):
            text += "|^x:" if argument == "x" else ""
            world.refuses(f"{argument} {what}", {argument: bad}, error, everyone if argument == "x" else own, text)
        for other in DTYPES.values():
            if other != good.dtype:
                labels = everyone if argument == "x" else own
                bad = numbers(good.shape, other)
                world.refuses(f"{argument} {other}", {argument: bad}, TypeError, labels, "^dtype ")
        if argument in world.needed:
            _, error, _ = NONE
            world.refuses(f"{argument} None", {argument: None}, error, own, "^expected ")
        orders = [("fortran", np.asfortranarray(good), ValueError, GAPS)] if good.ndim > 1 else []
        for what, bad, error, text in [*layouts_of(good), *orders]:
            world.refuses(f"{argument} {what}", {argument: bad}, error, own, text)
        for what, bad, error, text in unwritable_of(good) if world.written(argument) else ():
            world.refuses(f"{argument} {what}", {argument: bad}, error, own, text)
    for one, other in itertools.combinations(world.arrays, 2):
        written = [argument for argument in (one, other) if world.written(argument)]
        a, b = world.arrays[one], world.arrays[other]
        for what, shift in MEETING.items() if written else ():
            if {one, other} == {"x", "out"} and not world.training and what == "same-start" and name[-8:] != "backward":
                continue  # in place
            memory, x, y = meeting(a, b, shift(a, b))
            world.refuses(f"{one} {other} {what}", {one: x, other: y}, ValueError, written, "^overlaps ", memory)
    world.goes_on()


BATCH_RANGES = {
    "training": "flag",
    "momentum": "closed fraction",
    "eps": "positive",
    "unbiased": "flag",
    "channel_axis": "axis",
    "activation": "relu",
    "affine": "flag",
    "num_features": "count",
    "dtype": "compute dtype",
    "device": "device",
    "mode": "flag",
}


@pytest.mark.parametrize(("name", "training", "dtype"), BATCH_CALLS, ids=str)
def test_each_option_of_batch_normalization(name, training, dtype):
    world = Batch(name, training, dtype)
    for option in world.others:
        for value in VALUES:
            error = judged(BATCH_RANGES[option], value)
            if "." in name and value is None:
                continue  # whatever the layer has
            if error is not None:
                world.refuses(f"{option}={value!r}", {}, error, [option], "^expected ", **{option: value})
    if "channel_axis" in world.others:
        for axis in (3, -4, 64, -64):
            world.refuses(f"axis {axis}", {}, ValueError, ["channel_axis"], "is not an axis of x", channel_axis=axis)
    if "eps" in world.others:
        world.refuses("eps", {}, ValueError, ["eps"], "^1e-320 is too small", eps=1e-320)
    with pytest.raises(TypeError, match="learning_rate"):
        world.call(world.arrays, world.layer, learning_rate=0.1)
    world.goes_on()


def test_each_option_of_a_layer():
    taken = dict(inspect.signature(onepass.BatchNorm).parameters)
    assert set(taken) <= set(BATCH_RANGES)
    good = {"num_features": CHANNELS}
    nothing = Snapshot(None)
    for option in taken:
        for value in VALUES:
            if option == "momentum" and value is None:
                continue  # the plain average
            if option == "dtype" and hasattr(value, "dtype"):
                continue  # stands for its dtype, in some versions of NumPy
            error = judged(BATCH_RANGES[option], value)
            if option == "device" and error is None and value is not None and value != "cpu":
                continue  # whether there is such a device depends on the machine
            call = lambda: onepass.BatchNorm(**{**good, option: value})  # noqa: B023, E731
            if error is None and option == "num_features" and value > 3:
                continue  # more memory than there is
            if error is not None:
                refused(f"BatchNorm {option}={value!r}", call, error, [option], "^expected ", nothing)
            else:
                call()
    layer = onepass.BatchNorm(CHANNELS)
    snapshot = Snapshot(None, layer.parameters(), layer.running_mean, layer.running_var)
    for value in VALUES:
        error = None if value is None else judged("closed fraction", value)
        if error is not None:
            call = lambda: setattr(layer, "momentum", value)  # noqa: B023, E731
            refused(f"momentum={value!r}", call, error, ["momentum"], "^expected ", snapshot)
            assert layer.momentum == 0.1
        error = judged("flag", value)
        if error is not None:
            call = lambda: layer.train(value)  # noqa: B023, E731
            refused(f"train({value!r})", call, error, ["mode"], "^expected ", snapshot)
            assert layer.training


LAYER_ARRAYS = ("weight", "bias", "weight_grad", "bias_grad", "running_mean", "running_var")


@pytest.mark.parametrize("name", LAYER_ARRAYS)
def test_each_array_of_a_layer_that_goes_bad(name):
    world = Batch("BatchNorm.forward", True, np.dtype(np.float32))
    array = getattr(world.layer, name)
    backward = name.endswith("grad")
    dy = numbers(BATCH_SHAPE, seed=3)
    refusals = 0
    for what, spoil, error in SPOILINGS:
        with spoiled(array, spoil) as done:
            if not done or (what == "read-only" and name in ("weight", "bias")):
                continue
            label = [name, f"np.ascontiguousarray({name})"]
            call = (lambda: world.layer.backward(dy)) if backward else (lambda: world.call(world.arrays, world.layer))
            refused(f"{name} {what}", call, error, label, "", world.watched(dy))
            refusals += 1
    assert refusals > 4
    if backward:
        assert_same_bits(world.layer.backward(dy), world.twin.backward(dy))
    world.goes_on()


def test_an_input_that_a_layer_keeps_and_that_goes_bad():
    for what, spoil, error in SPOILINGS:
        layer, twin = onepass.BatchNorm(CHANNELS), onepass.BatchNorm(CHANNELS)
        x, dy = numbers(BATCH_SHAPE, seed=1), numbers(BATCH_SHAPE, seed=2)
        layer.forward(x)
        twin.forward(x.copy())
        if what == "read-only":
            continue  # it is only read
        with spoiled(x, spoil) as done:
            assert done
            snapshot = Snapshot(None, layer.gradients(), layer.parameters(), x, dy)
            labels = ["x", "dy", "mean", "channel_axis"]
            refused(f"x {what}", lambda: layer.backward(dy), error, labels, "", snapshot)  # noqa: B023
        assert_same_bits(layer.backward(dy), twin.backward(dy))


# Arrays that go bad in place, between steps


def _resize(*shape):
    return lambda array: array.resize(shape, refcheck=False)


SPOILINGS = [
    ("read-only", lambda array: setattr(array.flags, "writeable", False), ValueError),
    ("shrunk", lambda array: array.resize((*array.shape[:-1], array.shape[-1] - 1), refcheck=False), ValueError),
    ("grown", lambda array: array.resize((*array.shape[:-1], array.shape[-1] + 50), refcheck=False), ValueError),
    ("emptied", lambda array: array.resize((0,) * array.ndim, refcheck=False), ValueError),
    ("emptied-to-0-d", lambda array: array.resize((), refcheck=False), ValueError),
    ("other-shape", lambda array: setattr(array, "shape", (1, *array.shape[::-1])), ValueError),
    ("integers", lambda array: setattr(array, "dtype", f"i{array.itemsize}"), TypeError),
    ("foreign", lambda array: setattr(array, "dtype", array.dtype.newbyteorder("S")), TypeError),
]


@contextlib.contextmanager
def spoiled(array, spoil):
    """Yields whether NumPy let it happen; afterwards the array is as it was."""
    shape, dtype, strides, values = array.shape, array.dtype, array.strides, array.copy(order="K")
    done = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy does not recommend it
        try:
            spoil(array)
        except (ValueError, AttributeError):
            done = False
        if (
            array.dtype.name == dtype.name
            and array.dtype.isnative
            and array.shape == shape
            and array.strides == strides
        ):
            done = done and not array.flags.writeable
    try:
        yield done
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array.flags.writeable = True
            if array.dtype != dtype:
                array.dtype = dtype
            if array.size != math.prod(shape):
                array.resize(shape, refcheck=False)
            if array.shape != shape:
                array.shape = shape
        array[...] = values


# Optimizers

FORMS = {
    "list": list,
    "dict": lambda arrays: dict(zip("abc", arrays, strict=True)),
    "groups": lambda arrays: [arrays[:1], dict(zip("bc", arrays[1:], strict=True))],
    "array": lambda arrays: arrays[BAD],
}


def form_of_params(form, arrays):
    given = FORMS[form](arrays)
    return [{"params": part} for part in given] if form == "groups" else given


def label_of(form, argument):
    """What the array at `BAD` is called."""
    if form == "groups":
        return "params[1]['params'][0] ('b')" if argument == "params" else f"{argument}[1][0] ('b')"
    return argument + {"list": f"[{BAD}]", "dict": f"[{BAD}] ('b')", "array": ""}[form]


def own_states(name, shape, dtype):
    return np.zeros(shape, dtype)


class Trained:
    """An optimizer of one row of the storage table in the middle of a training, and a twin of it."""

    def __init__(self, case, row, *, form="list", full=True):
        self.case, self.form = case, form
        param, grad, state = row
        self.where = f"{case} {'-'.join(map(str, row))} {form}"
        self.params = [numbers(s, param, seed=k, order="CF"[k == 2]) for k, s in enumerate(SHAPES)]
        self.grads = [numbers(s, grad, seed=5 + k) for k, s in enumerate(SHAPES)]
        self.mirrors = [numbers(s, BFLOAT16, seed=9) for s in SHAPES]
        self.options = {} if state == compute_dtype(param) else {"state_dtype": state}
        self.full = full
        if full:
            self.options |= {"ema_decay": 0.5, "accumulate": 2, "state_alloc": own_states}
            self.options |= {"master": "split"} if param == BFLOAT16 else {}
        self.twin_params, self.twin_mirrors = copied(self.params), copied(self.mirrors)
        self.opt = self.make(self.params, mirror=self.mirrors if full else None)
        self.twin = self.make(self.twin_params, mirror=self.twin_mirrors if full else None)
        self.start = copied(self.params)
        self.refusals = 0
        for _ in range(3):
            self.step()
        self.position = 0 if form == "array" else BAD

    def make(self, params, *, grads=None, mirror=None, form=None, **more):
        form = form or self.form
        others = {"grads": grads, "mirror": mirror}
        others = {name: FORMS[form](arrays) for name, arrays in others.items() if arrays is not None}
        return make(self.case, form_of_params(form, params), **{**others, **self.options, **more})

    def state_label(self, name):
        return f"state[{self.position}]['{name}']"

    def step(self, **options):
        self.opt.step(FORMS[self.form](self.grads), **options)
        self.twin.step(FORMS[self.form](self.grads), **options)

    def refuses(self, what, call, error, labels, text, *also):
        arrays = self.params, self.grads, self.mirrors, [plain(array) for array in also]
        refused(f"{self.where}: {what}", call, error, labels, text, Everything(self.opt, *arrays))
        self.refusals += 1

    def goes_on(self):
        assert self.refusals > 0
        for _ in range(5):
            self.step()
        place = slice(BAD, BAD + 1) if self.form == "array" else slice(None)
        assert_same_bits(self.params, self.twin_params)
        assert_same_bits(self.mirrors, self.twin_mirrors)
        assert_equal_optimizers(self.opt, self.twin)
        assert_moved(self.start[place], self.params[place])


def with_bad(arrays, bad):
    return [*arrays[:BAD], bad, *arrays[BAD + 1 :]]


def is_structure(given):
    return isinstance(given, (list, tuple, Mapping)) or hasattr(given, "__next__")


# Every class in all rows, and each other case of its options in some.
CASES_AND_ROWS = [
    (case, k)
    for i, case in enumerate(CASES)
    for k in range(len(ROWS))
    if case in {cls.__name__ for cls in CLASSES} or (i + k) % 4 == 0
]
EVERY_CASE_ROW_AND_FORM = [
    pytest.param(case, ROWS[k], list(FORMS)[(i + k) % len(FORMS)], id=f"{case}-{ROW_NAMES[k]}")
    for i, (case, k) in enumerate(CASES_AND_ROWS)
]


@pytest.mark.parametrize(("case", "row", "form"), EVERY_CASE_ROW_AND_FORM)
def test_each_gradient_of_each_optimizer(case, row, form):
    for full in (True, False):
        world = Trained(case, row, form=form, full=full)
        good, label = world.grads[BAD], label_of(form, "grads")
        step = lambda bad, **options: world.opt.step(FORMS[form](with_bad(world.grads, bad)), **options)  # noqa: B023, E731
        dtypes = {name: state.dtype for name, state in world.opt.state[world.position].items()}
        dtypes = {"params": row[0], **{k: d for k, d in dtypes.items() if k not in ("ema", "remainder", "accumulator")}}
        for what, bad, error, text in [*kinds_of(good), *shapes_of(good)]:
            text = f"{text}|^expected one array, as the parameter is" if form == "array" and is_structure(bad) else text
            world.refuses(what, lambda: step(bad), error, [label], text, bad)  # noqa: B023
        for dtype in DTYPES.values():
            if not go_together({**dtypes, "grads": dtype}):
                bad = numbers(good.shape, dtype)
                world.refuses(str(dtype), lambda: step(bad), TypeError, [label], "^dtype ", bad)  # noqa: B023
        for what in ("stride-0", "last-stride-0", "sliding-window", "broadcast"):
            bad = LAYOUTS[what][0](good)
            text = "^strides .* may repeat|^is read-only and cannot be zeroed"
            world.refuses(f"zeroed {what}", lambda: step(bad, zero_grads=True), ValueError, [label], text, bad)  # noqa: B023
        for what, bad, error, text in unwritable_of(good):
            text = "^is read-only and cannot be zeroed"
            world.refuses(f"zeroed {what}", lambda: step(bad, zero_grads=True), error, [label], text, bad)  # noqa: B023
        written = {
            label_of(form, "params"): world.params[BAD],
            **{world.state_label(name): state for name, state in world.opt.state[world.position].items()},
            **({label_of(form, "mirror"): world.mirrors[BAD]} if full else {}),
        }
        for other, array in written.items():
            text = f"^overlaps {re.escape(other)} in memory, which the step writes$"
            bytes_of = np.frombuffer(
                array.data.cast("B") if array.dtype != BFLOAT16 else array.view("u2").data.cast("B"), "u1"
            )
            for place in range(0, array.nbytes - good.itemsize + 1, 7):
                bad = np.ndarray(good.shape, good.dtype, bytes_of[place:], strides=(0, 0))
                world.refuses(f"over {other}", lambda: step(bad), ValueError, [label], text)  # noqa: B023
            if array.dtype == good.dtype:
                for bad in (array, array[...], array[::-1, ::-1]):
                    world.refuses(f"is {other}", lambda: step(bad), ValueError, [label], text)  # noqa: B023
        world.goes_on()


@pytest.mark.parametrize(
    ("case", "row"),
    [
        pytest.param(cls.__name__, ROWS[k], id=f"{cls.__name__}-{ROW_NAMES[k]}")
        for i, cls in enumerate(CLASSES)
        for k in range(i % 2, len(ROWS), 2)
    ],
)
def test_each_array_of_each_constructor(case, row):
    world = Trained(case, row)
    forms = itertools.cycle(FORMS)
    arrays = {"params": world.params, "grads": world.grads, "mirror": world.mirrors}

    def construct(form, **changes):
        return lambda: world.make(**{**arrays, **changes}, form=form)

    for argument, good_arrays in arrays.items():
        good = good_arrays[BAD]
        writes = [*layouts_of(good), *unwritable_of(good)] if argument != "grads" else []
        defects = [*kinds_of(good), *shapes_of(good), *writes]
        if argument == "params":
            defects += [("None", None, TypeError, NONE[2])]
        for what, bad, error, text in defects:
            form = next(forms)
            if form == "array" and is_structure(bad):
                form = "list"
            if what.startswith("shape") and argument == "params":  # any parameter will do: the others do not fit it
                label = label_of(form, "mirror")
            else:
                label = label_of(form, argument)
            call = construct(form, **{argument: with_bad(good_arrays, bad)})
            world.refuses(f"{argument} {what}", call, error, [label], text, bad)
        for dtype in DTYPES.values():
            dtypes = {"params": row[0], "grads": row[1], "mirrors": BFLOAT16}
            dtypes |= {"state": row[2]} if world.opt.state[BAD].keys() - {"ema", "remainder", "accumulator"} else {}
            dtypes |= {"emas": compute_dtype(row[0]), "remainders": DTYPES["uint16"]} if row[0] == BFLOAT16 else {}
            changed = "mirrors" if argument == "mirror" else argument
            if argument != "params" and not go_together({**dtypes, changed: dtype}):
                bad, form = numbers(good.shape, dtype), next(forms)
                call = construct(form, **{argument: with_bad(good_arrays, bad)})
                world.refuses(f"{argument} {dtype}", call, TypeError, [label_of(form, argument)], "^dtype ", bad)
    for one, other in itertools.combinations_with_replacement(arrays, 2):
        places = [(BAD, 0), (0, BAD)] if one == other else [(BAD, BAD), (BAD, 0), (0, BAD)]
        for i, j in places if (one, other) != ("grads", "grads") else ():
            a, b = arrays[one][i], arrays[other][j]
            labels = [f"{one}[{i}]", f"{other}[{j}]"]
            for what, shift in MEETING.items():
                memory, x, y = meeting(a, b, shift(a, b))
                changes = {one: list(arrays[one])}
                changes.setdefault(other, list(arrays[other]))
                changes[one][i], changes[other][j] = x, y
                reads = [label for label in labels if label.startswith("grads")]
                call = construct("list", **changes)
                world.refuses(f"{labels} {what}", call, ValueError, reads or labels, "^overlaps ", memory)
    world.goes_on()


@pytest.mark.parametrize("case", CASES)
def test_each_state_that_state_alloc_returns(case):
    row = ROWS[list(CASES).index(case) % len(ROWS)]
    world = Trained(case, row)
    for name, good in world.opt.state[BAD].items():
        path = f"{BAD}.{name}"
        labels = [f"state_alloc({path!r}, {good.shape}, {good.dtype})", world.state_label(name)]
        others = {key: state for key, state in world.opt.state[BAD].items() if key != name}

        def construct(bad):
            def alloc(label, shape, dtype):
                return bad if label == path else np.zeros(shape, dtype)  # noqa: B023

            return lambda: world.make(world.params, mirror=world.mirrors, state_alloc=alloc)

        defects = [*kinds_of(good), *shapes_of(good), *layouts_of(good), *unwritable_of(good)]
        defects += [(f"dtype {d}", np.zeros(good.shape, d), TypeError, "") for d in DTYPES.values() if d != good.dtype]
        defects += [("None", None, TypeError, "")]
        for what, bad, error, text in defects:
            if not isinstance(bad, np.ndarray) or isinstance(bad, np.ma.MaskedArray):
                error, text = TypeError, "^expected a NumPy array"
            elif error is TypeError:
                text = "^returned dtype "
            elif what.startswith("shape"):
                text = r"^returned shape \("
            world.refuses(f"{path} {what}", construct(bad), error, labels, text, bad)
        for other in (world.params[BAD], world.params[0], world.mirrors[BAD], world.mirrors[2], *others.values()):
            memory, _, bad = meeting(other, good, 0)
            if other.nbytes >= good.nbytes:
                lying = np.frombuffer(other.view("u1").data.cast("B") if other.ndim == 1 else other.view("u1"), "u1")
                bad = np.ndarray(good.shape, good.dtype, lying)
                if any(other is state for state in others.values()):
                    continue  # the states of another optimizer are nobody's here
                world.refuses(
                    f"{path} in the way", construct(bad), ValueError, [*labels, "mirror[1]", "mirror[2]"], "^overlaps "
                )
            del memory

        class MyError(Exception):
            pass

        def failing(label, shape, dtype):
            if label == path:  # noqa: B023
                raise MyError("no room")
            return np.zeros(shape, dtype)

        call = lambda: world.make(world.params, mirror=world.mirrors, state_alloc=failing)  # noqa: E731
        world.refuses(f"{path} raises", call, MyError, [], "^no room$")
    if not world.refusals:
        world.refusals = 1
    world.goes_on()


@pytest.mark.parametrize(("case", "row", "form"), EVERY_CASE_ROW_AND_FORM)
def test_each_array_that_goes_bad_between_steps(case, row, form):
    for full in (True, False):
        world = Trained(case, row, form=form, full=full)
        place = world.position
        arrays = {label_of(form, "params"): world.params[BAD]}
        arrays |= {label_of(form, "mirror"): world.mirrors[BAD]} if full else {}
        arrays |= {world.state_label(name): state for name, state in world.opt.state[place].items()}
        bound = world.make(copied(world.params), grads=world.grads)
        for label, array in arrays.items():
            for what, spoil, error in SPOILINGS:
                with spoiled(array, spoil) as done:
                    if not done:
                        assert what == "foreign" or not array.flags.owndata, f"{label} {what}: NumPy refused it"
                        continue
                    blamed = [label]
                    if array is world.params[BAD] and error is ValueError:
                        blamed += [label_of(form, "grads"), *arrays]
                    step = lambda: world.opt.step(FORMS[form](world.grads))  # noqa: B023, E731
                    world.refuses(f"{label} {what}", step, error, blamed, "")
                    if full:
                        text = "swap_ema "
                        world.refuses(f"{text}{label} {what}", world.opt.swap_ema, error, blamed, "")
        for what, spoil, error in SPOILINGS:
            with spoiled(world.grads[BAD], spoil) as done:
                if done and what != "read-only":  # which a gradient may be
                    label = label_of(form, "grads")
                    world.refuses(f"bound {what}", bound.step, error, [label], "")
        world.goes_on()


# Every hyper-parameter and every option


def test_each_value_of_each_hyper_parameter_of_each_class():
    for cls in CLASSES:
        for name in (*hyper_names(cls), *op.GROUP_OPTIONS):
            judge = HYPER_RANGES[name]
            given = {"ema_decay": 0.5} if name == "ema_decay" else {}
            param, other, grad = numbers((3, 4), seed=1), numbers((3, 4), seed=2), numbers((3, 4), seed=3)
            opt = cls([param], **given)
            opt.step([grad])
            state = opt.state_dict()
            label = f"{cls.__name__} {name}"
            for value in values_for(name):
                if name == "momentum_decay" and is_beyond_float(value):
                    continue  # it is nearly infinity, which is a value of it
                error = judge(value)
                what = f"{label}={value!r}"
                snapshot = Everything(opt, param, other, grad)
                if error is None:
                    if needs_nothing_else(cls, name, value):
                        cls(param.copy(), **{name: value})
                    continue
                told = r"^expected |^it is 0|^eps and eps_root"
                whole = [name, f"{name}[0]", f"{name}[1]"]
                group = [f"params[1]['{name}']{k}" for k in ("", "[0]", "[1]")]
                saved = [f"param_groups[0]['{name}']{k}" for k in ("", "[0]", "[1]")]
                refused(what, lambda: cls(param, **{name: value}), error, whole, told, snapshot)  # noqa: B023
                groups = [{"params": param}, {"params": other, name: value}]
                refused(what, lambda: cls(groups), error, group, told, snapshot)  # noqa: B023
                late = (error, told) if name not in cls._construction_only else (ValueError, "^is only read when")
                call = lambda: opt.param_groups[0].__setitem__(name, value)  # noqa: B023, E731
                refused(what, call, late[0], whole, late[1], snapshot)
                call = lambda: opt.param_groups[0].update({"maximize": True, name: value})  # noqa: B023, E731
                if name != "maximize" and name not in cls._construction_only:
                    refused(what, call, error, whole, told, snapshot)
                if name == "lr" and not isinstance(value, (list, tuple)):
                    refused(what, lambda: setattr(opt, "lr", value), error, whole, told, snapshot)  # noqa: B023
                good = state["param_groups"][0][name]
                state["param_groups"][0][name] = value
                refused(what, lambda: opt.load_state_dict(state), error, saved, told, snapshot)  # noqa: B023
                state["param_groups"][0][name] = good
            before = param.copy()
            opt.load_state_dict(state)
            opt.step([grad])
            assert_moved(before, param)


def needs_nothing_else(cls, name, value):
    """Whether a good value is good with the other defaults too."""
    if name == "eps" and value == 0:
        return False
    if name == "max_unit_norm" and value is not None:
        given = value[1] if isinstance(value[1], (tuple, list)) else (value[1],)
        return all(-2 <= axis < 2 for axis in given)
    return not (name == "max_of_corrected" and value)


HUGE = (1e39, 1e160, 1e308)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_huge_number_raises_or_counts(cls):
    """Where a number is in its range and yet too large, a step says so; it never makes NaN of the parameters."""
    outcomes = set()
    for name in (*hyper_names(cls), *op.GROUP_OPTIONS, *STEP_RANGES):
        judge = {**HYPER_RANGES, **STEP_RANGES}[name]
        for huge, dtype in itertools.product(HUGE, (np.float32, np.float64)):
            value = {"max_unit_norm": (huge, 0), "gradient_noise": (huge, 0.5)}.get(name, huge)
            if judge(value) is not None:
                continue
            param, grad = numbers((3, 4), dtype), numbers((3, 4), dtype, seed=1)
            given, options = ({}, {name: value}) if name in STEP_RANGES else ({name: value}, {})
            try:
                opt = cls(param, **given)
            except ValueError as error:
                told = str(error)
            else:
                told = ""
            if told:
                assert told.startswith(f"{name}: {huge!r} is infinite in float32"), name
                outcomes.add("refused at construction")
                continue
            told, snapshot = "", Everything(opt, param, grad)
            try:
                opt.step(grad, **options)
                snapshot = Everything(opt, param, grad)
                opt.step(grad, **options)
            except ValueError as error:
                told = str(error)
            if told:
                assert re.search("coefficient '.*' of .* would be .* not finite in float", told), name
                snapshot.assert_unchanged()
                outcomes.add("refused at the step")
                continue
            if dtype == np.float64 and name not in ("grad_scale", "lr", "weight_decay", "l1", "gradient_noise"):
                assert np.isfinite(param).all(), f"{name}={value!r}"
                outcomes.add("counts")
    assert {"refused at the step", "counts"} <= outcomes


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_value_of_each_option_of_each_class(cls):
    world = Trained(cls.__name__, ROWS[0])
    for name, judge in STEP_RANGES.items():
        for value in values_for(name):
            error = judge(value)
            call = lambda: world.opt.step(world.grads, **{name: value})  # noqa: B023, E731
            if error is not None:
                world.refuses(f"step({name}={value!r})", call, error, [name], "^expected ")
    for name, judge in CONSTRUCTION_RANGES.items():
        for value in values_for(name):
            if name == "state_dtype" and hasattr(value, "dtype"):
                continue  # stands for its dtype, in some versions of NumPy
            error = judge(value)
            call = lambda: cls(world.params, **{name: value})  # noqa: B023, E731
            if error is not None:
                world.refuses(
                    f"{name}={value!r}", call, error, [name], "^expected |is not among those of states|does not go with"
                )
            elif name not in ("master", "state_alloc"):
                cls(numbers(4), **{name: value})
    for limits in itertools.combinations(("max_grad_norm", "clip_norm", "clip_value"), 2):
        call = lambda: world.opt.step(world.grads, **dict.fromkeys(limits, 1.0))  # noqa: B023, E731
        world.refuses(f"{limits}", call, ValueError, [limits[1]], f"^cannot be combined with {limits[0]}")
    for name in ("learning_rate", "LR", "Params", "closure", ""):
        what = "^is not an argument of "
        world.refuses(name, lambda: world.opt.step(world.grads, **{name: 1}), TypeError, [name], what)  # noqa: B023
        world.refuses(name, lambda: cls(world.params, **{name: 1}), TypeError, [name], what)  # noqa: B023
        groups = [{"params": world.params, name: 0.1}]
        what = "is not a hyper-parameter of "
        world.refuses(name, lambda: cls(groups), ValueError, ["params[0]"], what)  # noqa: B023
        call = lambda: world.opt.param_groups[0].__setitem__(name, 0.1)  # noqa: B023, E731
        world.refuses(name, call, KeyError, [], "is not a hyper-parameter; there are lr, ")
    world.goes_on()


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_each_value_of_each_option_of_each_function(name):
    world = Function(name, ROWS[0])
    _, others = arguments_of(name)
    ranges = {**HYPER_RANGES, **STEP_RANGES, **FUNCTION_RANGES}
    for option in others:
        for value in values_for(option):
            error = ranges[option](value)
            if option == "momentum_decay" and is_beyond_float(value):
                continue
            if option in ("ema_decay", "micro_step") and value is None:
                error = ValueError if option == "ema_decay" else TypeError  # for there are averages and sums
            if error is None:
                continue
            labels = [option, f"{option}[0]", f"{option}[1]", *(["emas"] if value is None else [])]
            world.refuses(f"{option}={value!r}", [], error, labels, "^expected |^needed |^which ", **{option: value})
    for option in ("learning_rate", "LR", "exp_avg", "mirror", "closure", ""):
        world.refuses(option, [], TypeError, [option], "^is not an argument of this function", **{option: 1})
    world.goes_on()


SETTERS = {
    onepass.set_num_threads: (onepass.get_num_threads, or_none(an_integer(1, 1024)), "count"),
    onepass.set_cache_limit: (onepass.get_cache_limit, or_none(an_integer(0, 2**62)), "count"),
    onepass.set_isa: (onepass.isa, one_of(*onepass.available_isas()), "name"),
}


def test_each_value_of_each_setting_of_the_process():
    assert {setter.__name__ for setter in SETTERS} == {name for name in onepass.__all__ if name.startswith("set_")}
    for setter, (getter, judge, argument) in SETTERS.items():
        before = getter()
        values = [*VALUES, "AVX2", "sse2", "avx2\0", "é", "avx512,avx2", 1025, -(2**70), 2**62 + 1]
        for value in values:
            error = judge(value)
            if error is not None:
                what = f"{setter.__name__}({value!r})"
                refused(what, lambda: setter(value), error, [argument], "expected|", Snapshot(None))  # noqa: B023
                assert getter() == before, what
        setter(before)


# Schedules

CALLABLE = [name for name in hp.RANGES if HYPER_RANGES[name](lambda t: 0.5) is None]
SCHEDULED = {"lr": NONNEGATIVE, "ema_decay": FRACTION}
RAISED = (Exception, ValueError, StopIteration, KeyError, RecursionError, MemoryError, KeyboardInterrupt, SystemExit)


class GoesBad:
    """A schedule that gives a number, until `bad` is set."""

    def __init__(self):
        self.bad = None
        self.calls = 0

    def __call__(self, t):
        self.calls += 1
        return 0.25 if self.bad is None else self.bad(t)


def raising(error):
    def schedule(t):
        raise error("mine")

    return schedule


def test_each_hyper_parameter_that_may_be_a_schedule_is_in_the_matrix():
    assert set(CALLABLE) == set(SCHEDULED)


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("case", CASES)
def test_each_schedule_that_fails(case, name):
    schedules = GoesBad(), GoesBad()
    params = [numbers(s, seed=k) for k, s in enumerate(SHAPES)]
    grads = [numbers(s, seed=5 + k) for k, s in enumerate(SHAPES)]
    twin_params, mirrors = copied(params), [numbers(s, BFLOAT16) for s in SHAPES]

    def groups(arrays, schedule):
        return [{"params": arrays[:2], name: 0.25}, {"params": arrays[2:], name: schedule}]

    def mirror():
        return [copied(mirrors[:2]), copied(mirrors[2:])]

    given = [grads[:2], grads[2:]]
    opt = make(case, groups(params, schedules[0]), **{"ema_decay": 0.5, name: 0.25}, mirror=mirror())
    twin = make(case, groups(twin_params, schedules[1]), **{"ema_decay": 0.5, name: 0.25}, mirror=mirror())
    state, tried = opt.state_dict(), 0

    def refuses(what, bad, error, labels, text):
        nonlocal tried
        schedules[0].bad = bad
        snapshot = Everything(opt, params, grads, opt._storage.mirror)
        calls = schedules[0].calls
        for options in ({}, {"max_grad_norm": 1.0, "zero_grads": True}):
            step = lambda: opt.step(given, **options)  # noqa: B023, E731
            refused(f"{case} {name} {what}", step, error, labels, text, snapshot)
        assert schedules[0].calls == calls + 2, "it was asked"
        schedules[0].bad = None
        tried += 1

    for t in (1, 2):
        label = [f"{name}({t})"]
        for value in VALUES:
            error = SCHEDULED[name](value)
            if error is not None:
                refuses(repr(value), lambda _t: value, error, label, "^expected ")  # noqa: B023
        for error in RAISED:
            # Python makes another exception of a StopIteration only in a generator.
            refuses(error.__name__, raising(error), error, [], "mine")
        busy = "^this optimizer is in the middle of a step"
        for what, call in {
            "step": lambda: opt.step(given),
            "step without gradients": lambda: opt.step([[None, None], [None]]),
            "swap_ema": opt.swap_ema,
            "state_dict": opt.state_dict,
            "load_state_dict": lambda: opt.load_state_dict(state),
        }.items():
            refuses(what, lambda _t: call(), RuntimeError, [], busy)  # noqa: B023
        deeper = lambda t: make(case, np.ones(2, np.float32), lr=lambda t: None).step(np.ones(2, np.float32))  # noqa: E731
        refuses("a step of another optimizer that fails", deeper, TypeError, ["lr(1)"], "^expected ")
        for array in (grads[2], params[2], params[0], *opt.state[2].values()):
            if array.flags.owndata:
                for what, spoil, _ in SPOILINGS[1:5]:
                    refuses_spoiled(opt, given, schedules[0], array, spoil, (params, grads), f"{case} {name} {what}")
                    tried += 1
        for each in (opt, twin):
            each.step(given)
        assert_same_bits(params, twin_params)

    def caught(t):
        for call in (lambda: opt.step(given), opt.swap_ema, opt.state_dict):
            with pytest.raises(RuntimeError, match="middle of a step"):
                call()
        return 0.25

    schedules[0].bad = caught
    opt.step(given)
    twin.step(given)
    assert_same_bits(params, twin_params)
    assert_equal_optimizers(opt, twin)
    assert tried > 60


def refuses_spoiled(opt, given, schedule, array, spoil, structures, what):
    """The schedule itself takes an array's memory away, in the middle of a step."""
    with contextlib.ExitStack() as stack:

        def spoils(t):
            stack.enter_context(spoiled(array, spoil))
            spoils.snapshot = Everything(opt, *structures)
            return 0.25

        schedule.bad = spoils
        with pytest.raises(ValueError, match=r"^(grads|params|state|mirror).*: "):
            opt.step(given)
        schedule.bad = None
        spoils.snapshot.assert_unchanged()


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_each_schedule_of_each_function_that_fails(name):
    for row in ROWS[:2]:
        world = Function(name, row)
        for option, judge in SCHEDULED.items():
            for value in VALUES:
                error = judge(value)
                if error is not None:
                    given = {option: lambda _t: value}  # noqa: B023
                    world.refuses(
                        f"{option} {value!r}", [], error, [f"{option}({world.steps + 1})"], "^expected ", **given
                    )
            for error in RAISED:
                world.refuses(f"{option} {error}", [], error, [], "mine", **{option: raising(error)})
        world.goes_on()


# Structures

PARTS = [numbers(shape, seed=3) for shape in SHAPES]
WRONG_STRUCTURES = {
    # form of the parameters: name -> how it is made of good arrays, exception, message
    "list": {
        "array": (lambda a: a[0], TypeError, "^expected a list or tuple, as the parameters are, got ndarray$"),
        "dict": (lambda a: dict(enumerate(a)), TypeError, "^expected a list or tuple.*got dict$"),
        "generator": (lambda a: (x for x in a), TypeError, "^expected a list or tuple.*got generator$"),
        "map": (lambda a: map(np.asarray, a), TypeError, "^expected a list or tuple.*got map$"),
        "set": (lambda a: {1, 2, 3}, TypeError, "^expected a list or tuple.*got set$"),
        "str": (lambda a: "abc", TypeError, "^expected a list or tuple.*got str$"),
        "too-few": (lambda a: a[:-1], ValueError, "^2 given for 3 parameters$"),
        "too-many": (lambda a: [*a, a[0]], ValueError, "^4 given for 3 parameters$"),
        "empty": (lambda a: [], ValueError, "^0 given for 3 parameters$"),
        "a-million": (lambda a: [None] * 10**6, ValueError, "^1000000 given for 3 parameters$"),
    },
    "dict": {
        "array": (lambda a: a[0], TypeError, "^expected a dict, as the parameters are, got ndarray$"),
        "list": (lambda a: a, TypeError, "^expected a dict.*got list$"),
        "items": (lambda a: dict(zip("abc", a, strict=True)).items(), TypeError, "^expected a dict.*got dict_items$"),
        "missing": (lambda a: dict(zip("ab", a, strict=False)), ValueError, "^'c' is missing"),
        "unknown": (
            lambda a: dict(zip("abcd", [*a, a[0]], strict=True)),
            ValueError,
            "^'d' is not the name of a param",
        ),
        "renamed": (lambda a: dict(zip("abC", a, strict=True)), ValueError, "^'c' is missing"),
        "numbered": (lambda a: dict(enumerate(a)), ValueError, "^'a' is missing"),
        "empty": (lambda a: {}, ValueError, "^'a' is missing"),
    },
    "groups": {
        "array": (lambda a: a[0], TypeError, "^expected a list with one entry for each group, got ndarray$"),
        "dict": (lambda a: {"params": a}, TypeError, "^expected a list with one entry for each group, got dict$"),
        "generator": (lambda a: (x for x in a), TypeError, "^expected a list with one entry.*got generator$"),
        "flat": (lambda a: a, ValueError, "^3 given for 2 groups$"),
        "too-few": (lambda a: [a[:1]], ValueError, "^1 given for 2 groups$"),
        "empty": (lambda a: [], ValueError, "^0 given for 2 groups$"),
        "a-million": (lambda a: [[]] * 10**6, ValueError, "^1000000 given for 2 groups$"),
    },
    "array": {
        "list": (lambda a: a[:1], TypeError, "^expected one array, as the parameter is, got list$"),
        "tuple": (lambda a: (a[0],), TypeError, "^expected one array, as the parameter is, got tuple$"),
        "dict": (lambda a: {"a": a[0]}, TypeError, "^expected one array, as the parameter is, got dict$"),
        "generator": (lambda a: (x for x in a), TypeError, "^expected a NumPy array .* got generator$"),
    },
}
WRONG_MEMBERS = {  # of the second group, a dict
    "list": (lambda a: a[1:], TypeError, "^expected a dict, as the parameters are, got list$"),
    "generator": (lambda a: (x for x in a), TypeError, "^expected a dict.*got generator$"),
    "missing": (lambda a: {"b": a[1]}, ValueError, "^'c' is missing"),
    "unknown": (lambda a: {"b": a[1], "c": a[2], "d": a[0]}, ValueError, "^'d' is not the name of a parameter$"),
    "None": (lambda a: None, TypeError, "^expected a dict.*got NoneType$"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_structure_that_does_not_mirror_the_parameters(cls, form):
    world = Trained(cls.__name__, ROWS[0], form=form)
    defects = {what: (build, error, text, "") for what, (build, error, text) in WRONG_STRUCTURES[form].items()}
    if form == "groups":
        for what, (build, error, text) in WRONG_MEMBERS.items():
            defects[f"member-{what}"] = (lambda a, build=build: [a[:1], build(a)], error, text, "[1]")
    for what, (build, error, text, path) in defects.items():
        good = {"grads": world.grads, "mirror": world.mirrors}
        step = lambda: world.opt.step(build(world.grads))  # noqa: B023, E731
        world.refuses(f"step {what}", step, error, [f"grads{path}"], text)
        for argument, arrays in good.items():
            call = lambda: make(  # noqa: E731
                world.case,
                form_of_params(form, world.params),
                **{argument: build(arrays)},  # noqa: B023
            )
            world.refuses(f"{argument} {what}", call, error, [f"{argument}{path}"], text)
    if form != "array":
        world.refuses("None", lambda: world.opt.step(None), TypeError, ["grads"], "^expected .*got NoneType$")
    text = "^step\\(\\) needs gradients, because none were bound"
    world.refuses("nothing", world.opt.step, TypeError, ["grads"], text)
    world.goes_on()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_containers_that_their_owner_changes_between_steps(cls, form):
    """They were read when the optimizer was made: the arrays count, wherever the list that held them goes."""
    world = Trained(cls.__name__, ROWS[0], form=form, full=False)
    params, grads = copied(world.params), copied(world.grads)
    given, bound, mirrored = form_of_params(form, params), FORMS[form](grads), FORMS[form](copied(world.mirrors))
    mirror = arrays_of(mirrored)
    opt = cls(given, grads=bound, mirror=mirrored)
    twin_params = copied(params)
    twin = cls(form_of_params(form, twin_params))
    before = copied(params)
    for change in ("clear", "append", "swap"):
        for container in (given, bound, mirrored):
            _change(container, change)
        opt.step()
        twin.step(FORMS[form](grads))
    assert_same_bits(params, twin_params)
    place = slice(BAD, BAD + 1) if form == "array" else slice(None)
    assert_moved(before[place], params[place])
    taken = params[place] if form == "array" else params
    assert_same_bits(mirror, [array.astype(BFLOAT16) for array in taken])
    assert len(opt.param_groups) == len(twin.param_groups)


def _change(container, change):
    if isinstance(container, list):
        for inner in container:
            if isinstance(inner, (list, dict)):
                _change(inner, change)
        if change == "clear":
            container.clear()
        elif change == "append":
            container.append(np.ones(3))
        else:
            container.reverse()
    elif isinstance(container, dict):
        if change == "clear":
            container.clear()
        else:
            container[change] = np.ones(3)


def test_many_groups():
    """Twenty thousand of them make an optimizer, and one bad one among a hundred thousand is named."""
    count = 20_000
    flat = numbers(count)
    params = list(flat.copy().reshape(count, 1))
    opt = onepass.Momentum([{"params": p, "lr": 0.25 if k % 2 else 0.5} for k, p in enumerate(params)])
    twin_params = [flat[::2].copy(), flat[1::2].copy()]
    twin = onepass.Momentum([{"params": twin_params[0], "lr": 0.5}, {"params": twin_params[1], "lr": 0.25}])
    for _ in range(2):
        opt.step(list(flat.reshape(count, 1)))
        twin.step([flat[::2], flat[1::2]])
    together = np.concatenate(params)
    assert_same_bits([together[::2], together[1::2]], twin_params)
    good = {"params": np.ones(1, np.float32)}
    many = [good] * 10**5
    snapshot = Snapshot(None, good["params"])
    for bad, error, label, text in [
        ({}, ValueError, "params[99999]", "^a group needs the key 'params'$"),
        ({"params": (x for x in ())}, TypeError, "params[99999]['params']", "got a generator"),
    ]:
        many[-1] = bad
        refused("many groups", lambda: onepass.Adam(many), error, [label], text, snapshot)
    many[:2] = [{"params": 7}, good]
    many[-1] = good
    text = "^expected a NumPy array .* got int$"
    refused("many groups", lambda: onepass.Adam(many), TypeError, ["params[0]['params']"], text, snapshot)
    many[0] = {"params": np.ones(1, np.float32), "LR": 1}
    refused("many groups", lambda: onepass.Adam(many), ValueError, ["params[0]"], "^'LR' is not", snapshot)
    many[:] = [{"params": []}] * 10**5
    refused("no parameters", lambda: onepass.Adam(many), ValueError, ["params"], "^there are no parameters$", snapshot)


# What load_state_dict is given

JUNK = (
    *(None, "x", b"x", [], {}, (), True, 1.5, NAN, -1, 2**70, 1j, object(), [1, 2], {"a": 1}, {0: 1}, len, ...),
    *(np.array([1, 2]), np.array(["x", "y"]), np.array(1.5), np.zeros((0,)), np.zeros((2, 2, 2)), np.array(None)),
)
COUNT = an_integer(0, 2**62)


def places(inner, path=()):
    """The path of every entry in dicts and lists."""
    items = inner.items() if isinstance(inner, dict) else enumerate(inner)
    for key, value in list(items):
        yield inner, key, (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def is_good_there(path, value, good):
    """Whether junk is no junk at this place. A scalar may come as a 0-d array, as files give it back."""
    *way, key = path
    if way[:1] == ["param_groups"] and len(path) == 3 and key != "params":
        return HYPER_RANGES[key](value) is None
    scalar = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if len(path) == 4 and way[:1] == ["param_groups"]:
        return isinstance(value, int) and value == good
    if len(path) == 3 and key == "params":
        return isinstance(value, list) and value == good
    if key in ("step", "skipped", "num_batches_tracked"):
        return COUNT(scalar) is None
    if key == "seed":
        return SEED(scalar) is None
    if key in ("received", "accumulated"):
        return an_integer(0, 1)(scalar) is None
    if key == "accumulate":
        return is_integer(scalar) and scalar == good
    if key == "ema_swapped":
        return isinstance(scalar, bool)
    return False


def array_defects(good):
    yield from ((what, bad, error) for what, bad, error, _ in shapes_of(good))
    for dtype in DTYPES.values():
        if dtype != good.dtype:
            yield str(dtype), np.ones(good.shape, dtype), TypeError
    if good.dtype != BFLOAT16:
        yield "foreign", good.astype(good.dtype.newbyteorder("S")), TypeError
    yield "masked", np.ma.masked_array(good.copy()), TypeError
    yield "list", good.tolist(), TypeError
    yield "object", good.astype(object), TypeError
    yield "dlpack", by_dlpack(good), TypeError


def refuses_each_defect(what, load, state, snapshot):
    """Each entry is deleted, renamed, joined by another one, and replaced by junk."""
    tried = 0

    def tries(label, keys, error, text=""):
        nonlocal tried
        tried += 1
        raised = None
        try:
            load(state)
        except Exception as caught:
            raised = caught
        told = f"{what} {label}: {type(raised).__name__}: {raised}"
        assert raised is not None, f"{what} {label}: was accepted"
        assert type(raised) in ((TypeError, ValueError) if error is None else (error,)), told
        name, _, rest = str(raised).partition(": ")
        assert any(str(key) in str(raised) for key in keys), told
        assert name.split("[")[0] in ("state_dict", *state, *ALL_ENTRIES), told
        assert re.search(text, rest), told
        for part, now in snapshot._read().items():
            assert now == snapshot.was[part], f"{what} {label}: {part} changed"

    for inner, key, path in list(places(state)):
        good = inner[key]
        if isinstance(inner, dict):
            del inner[key]
            tries(f"without {path}", [key], ValueError, "is missing$")
            inner[f"{key}x"] = good
            tries(f"renamed {path}", [key], ValueError, "is missing$")
            del inner[f"{key}x"]
            inner[key] = good
            inner["unknown"] = good
            tries(f"one more beside {path}", ["unknown"], ValueError, "^'unknown' is unknown$")
            del inner["unknown"]
        else:
            inner.append(good)
            tries(f"one more beside {path}", path, ValueError, "expected ")
            inner.pop()
        keys = path if len(path) < 2 else path[-2:]
        for junk in JUNK:
            if not is_good_there(path, junk, good):
                inner[key] = junk
                error = None
                if path[0] == "param_groups" and len(path) == 3 and key != "params":
                    error = HYPER_RANGES[key](junk)
                tries(f"{path} = {junk!r}", keys, error)
        for label, bad, error in array_defects(good) if isinstance(good, np.ndarray) else ():
            inner[key] = bad
            tries(f"{path} is {label}", [key], error)
        inner[key] = good
    for junk in (*JUNK, 7, "state", np.zeros(3)):
        with pytest.raises((TypeError, ValueError), match=r"^state_dict: (expected a dict|'.*' is missing)"):
            load(junk)
        tried += 1
    return tried


ALL_ENTRIES = ("optimizer", "param_groups", "state", "seed", "skipped", "accumulated", "ema_swapped", "rounding")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_entry_of_each_state_dict(cls):
    row = ROWS[CLASSES.index(cls) % len(ROWS)]
    world = Trained(cls.__name__, row, form="groups")
    state = world.opt.state_dict()
    world.step()
    snapshot = Everything(world.opt, world.params, world.mirrors)
    world.refusals = refuses_each_defect(world.where, world.opt.load_state_dict, state, snapshot)
    assert world.refusals > 500
    world.goes_on()
    for each in (world.opt, world.twin):
        each.load_state_dict(state)
    world.goes_on()


def test_each_entry_of_the_state_dict_of_a_layer():
    world = Batch("BatchNorm.forward", True, np.dtype(np.float32))
    state = world.layer.state_dict()
    world.call(world.arrays, world.layer)
    world.call(world.twins, world.twin)
    layer = world.layer
    snapshot = Snapshot(None, layer.parameters(), layer.gradients(), layer.running_mean, layer.running_var)
    assert refuses_each_defect("BatchNorm", layer.load_state_dict, state, snapshot) > 100
    assert layer.num_batches_tracked == 2
    world.goes_on()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_odd_arrays_that_a_state_dict_may_hold(cls):
    """Whatever the layout, and even if they lie in this optimizer's own states."""
    row = ROWS[CLASSES.index(cls) % len(ROWS)]
    for build in (read_only, spread, np.asfortranarray, lambda a: np.flip(np.flip(a).copy()), lambda a: a.view(Sub)):
        world = Trained(cls.__name__, row)
        state = world.opt.state_dict()
        odd = copy.deepcopy(state)
        for entry in odd["state"].values():
            entry.update({name: build(value) for name, value in entry.items() if isinstance(value, np.ndarray)})
        world.step()
        world.opt.load_state_dict(odd)
        world.twin.load_state_dict(state)
        assert_equal_optimizers(world.opt, world.twin)


class Sub(np.ndarray):
    pass


# What is odd and good: none of it may be refused

ODD_PARAMS = {
    "0-d": lambda d: numbers((), d),
    "empty": lambda d: np.empty((0,), d),
    "empty-in-the-middle": lambda d: np.empty((3, 0, 2), d),
    "empty-with-odd-strides": lambda d: np.lib.stride_tricks.as_strided(np.ones(9, d), (0, 3), (-5, 7)),
    "empty-with-gaps": lambda d: np.ones((6, 0), d)[::2],
    "one": lambda d: numbers((1,), d),
    "one-in-many-axes": lambda d: numbers((1,) * 32, d),
    "size-1-axes": lambda d: np.lib.stride_tricks.as_strided(numbers(12, d), (1, 12, 1), (-999, d.itemsize, 12345)),
    "size-1-axis-of-stride-0": lambda d: np.lib.stride_tricks.as_strided(numbers(12, d), (12, 1), (d.itemsize, 0)),
    "a-slice-of-one": lambda d: numbers((7, 5), d)[3:4, ::-1][:, 2:3],
    "fortran": lambda d: numbers((3, 5), d, order="F"),
    "permuted": lambda d: numbers((2, 3, 4), d).transpose(1, 2, 0),
    "channels-last": lambda d: numbers((2, 4, 5, 3), d).transpose(0, 3, 1, 2),
    "off-by-a-byte": lambda d: off_by_a_byte(numbers((3, 5), d)),
    "part-of-a-slab": lambda d: numbers((9, 5), d)[2:6],
    "subclass": lambda d: numbers((3, 5), d).view(Sub),
    "dlpack": lambda d: by_dlpack(numbers((3, 5), d)),
    "of-bytearray": lambda d: np.frombuffer(bytearray(numbers(8, d).tobytes()), d),
}


def off_by_a_byte(good):
    bad = np.ndarray(good.shape, good.dtype, np.zeros(good.nbytes + 1, np.uint8), 1)
    bad[...] = good
    return bad


def nothing(good):
    return good.copy(order="K")


ODD_GRADIENTS = {
    "plain": nothing,
    "fortran": lambda a: np.array(a, order="F"),
    "backwards": lambda a: np.flip(np.flip(a).copy()) if a.ndim else a,
    "gaps": lambda a: spread(a) if a.ndim else a,
    "stride-0": lambda a: np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), a.shape) if a.size else a,
    "read-only": read_only,
    "off-by-a-byte": off_by_a_byte,
    "subclass": lambda a: a.view(Sub),
    "dlpack": lambda a: by_dlpack(a.copy()),
    "dlpack-read-only": lambda a: by_dlpack(a.copy(), flags=1),
    "of-bytes": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) if a.size else a,
}


@pytest.mark.parametrize(
    ("case", "row"), [pytest.param(case, ROWS[k], id=f"{case}-{ROW_NAMES[k]}") for case, k in CASES_AND_ROWS]
)
def test_odd_arrays_that_are_good(case, row):
    param_dtype, grad_dtype, state_dtype = row
    options = {} if state_dtype == compute_dtype(param_dtype) else {"state_dtype": state_dtype}
    given = [build(param_dtype) for build in ODD_PARAMS.values()]
    arrays = arrays_of(given)
    twins = [np.array(array, order="C", subok=False) for array in arrays]
    opt, twin = make(case, given, **options), make(case, twins, **options)
    start = copied(twins)
    for what, build in ODD_GRADIENTS.items():
        before = copied(twins)
        plain_grads = [numbers(array.shape, grad_dtype, seed=k) for k, array in enumerate(arrays)]
        if what == "stride-0":
            plain_grads = [np.full(array.shape, 0.5, grad_dtype) for array in arrays]
        opt.step([build(grad) for grad in plain_grads])
        twin.step(plain_grads)
        for name, array, want, was in zip(ODD_PARAMS, arrays, twins, before, strict=True):
            assert np.asarray(array).tobytes() == want.tobytes(), f"{case} {row} {name} {what}"
            assert want.size <= 1 or want.tobytes() != was.tobytes(), f"{case} {row} {name} {what}: did not move"
    assert_moved(start, twins)
    assert opt.step_counts == (len(ODD_GRADIENTS),) * len(given)
    snapshot = Everything(opt, arrays)
    for options in ({}, {"max_grad_norm": 1.0}, {"zero_grads": True}, {"nonfinite": "raise"}, {"clip_value": 1.0}):
        opt.step([None] * len(given), **options)
        assert opt.grad_norm in (None, 0.0)
    read = snapshot._read()
    assert {**read, "rest": 0} == {**snapshot.was, "rest": 0}


@pytest.mark.parametrize("row", ROWS, ids=ROW_NAMES)
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_odd_arrays_that_are_good_for_functions(name, row):
    for shape in ((), (0,), (2, 0), (1, 7, 1), (3, 4)):
        for what, build in ODD_PARAMS_OF.items():
            world = Function(name, row, single=True)
            for argument, arrays in world.arrays.items():
                state = argument not in ("params", "grads", "emas", "mirrors", "accumulators")
                good = np.zeros(shape, arrays[0].dtype) if state else numbers(shape, arrays[0].dtype, seed=3)
                world.arrays[argument], world.twins[argument] = [build(good)], [good]
            before = world.twins["params"][0].copy()
            for _ in range(2):
                world.call(world.arrays)
                world.call(world.twins)
                world.steps += 1
            for argument, (array,) in world.arrays.items():
                got, (want,) = np.asarray(array), world.twins[argument]
                assert got.tobytes() == want.tobytes(), f"{name} {row} {shape} {what} {argument}"
            assert before.size == 0 or before.tobytes() != world.twins["params"][0].tobytes()


ODD_PARAMS_OF = {
    "fortran": lambda a: np.array(a, order="F"),
    "off-by-a-byte": off_by_a_byte,
    "odd-strides-of-size-1": lambda a: np.lib.stride_tricks.as_strided(
        a.copy(), a.shape, [s if n != 1 else -12345 for n, s in zip(a.shape, a.strides, strict=True)]
    ),
    "permuted": lambda a: a.transpose(*range(a.ndim)[::-1]).copy().transpose(*range(a.ndim)[::-1]),
}


@pytest.mark.parametrize("dtype", _cpu.compute_dtypes())
def test_odd_batches_that_are_good(dtype):
    good = numbers((4, CHANNELS, 5), dtype)
    want = functional.batch_norm(good)
    for build in (read_only, off_by_a_byte, lambda a: a.view(Sub), by_dlpack):
        got = functional.batch_norm(build(good))
        assert_same_bits([np.asarray(array) for array in got], list(want))
    for shape in ((0, CHANNELS), (0, CHANNELS, 5), (4, CHANNELS, 0), (4, 0, 5), (2, CHANNELS, 1, 1)):
        x = numbers(shape, dtype)
        y, mean, invstd = functional.batch_norm(x)
        assert y.shape == shape
        assert mean.shape == invstd.shape == (shape[1],)
        grads = functional.batch_norm_backward(np.ones(shape, dtype), x, mean, invstd)
        assert grads.x.shape == shape
    odd = np.lib.stride_tricks.as_strided(good, (1, *good.shape, 1), (-7, *good.strides, 999))
    got = functional.batch_norm(odd, channel_axis=2)
    assert_same_bits(got[0].reshape(good.shape), want[0])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_strides_that_are_changed_in_place(cls):
    """NumPy lets it happen, and not be undone."""
    probe = Trained(cls.__name__, ROWS[0])
    for name in ("params", "mirror", *probe.opt.state[BAD]):
        world = Trained(cls.__name__, ROWS[0])
        arrays = {"params": world.params[BAD], "mirror": world.mirrors[BAD], **world.opt.state[BAD]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays[name].strides = (0, 0)
        label = f"{name}[{BAD}]" if name in ("params", "mirror") else world.state_label(name)
        world.refuses(f"{name} strides", lambda: world.opt.step(world.grads), ValueError, [label], GAPS)  # noqa: B023

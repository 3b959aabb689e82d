"""Promise: nothing silent in batch normalization. What is wrong raises, names the argument, and changes nothing."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest

import onepass
from helpers import (
    NO_CUDA,
    BareProducer,
    Exports,
    HandMade,
    OnGpu,
    Producer,
    arrays_of,
    assert_same_bits,
    bits,
    copied,
    numbers,
)
from onepass import functional

NAN, INF = math.nan, math.inf
SHAPE, CHANNELS = (4, 3, 5), 3

# The calls, and the arrays of each. Those in `WRITTEN` are written by it.
FULL = ("x", "residual", "out", "dy", "y")
FORWARD = ("x", "weight", "bias", "running_mean", "running_var", "residual", "out")
BACKWARD = ("dy", "x", "mean", "invstd", "weight", "bias", "y", "out")
ENTRIES = {
    "train": FORWARD,
    "infer": FORWARD,
    "back": BACKWARD,
    "back-frozen": BACKWARD,
    "layer-train": ("x", "residual", "out"),
    "layer-infer": ("x", "residual", "out"),
    "layer-back": ("dy", "out"),
}
WRITTEN = {**dict.fromkeys(ENTRIES, ("out",)), "train": ("running_mean", "running_var", "out")}
EVERY_ARGUMENT = [(entry, name) for entry, names in ENTRIES.items() for name in names]


def value_of(name, dtype=np.float32):
    """Good arrays for each place."""
    if name in FULL:
        return numbers(SHAPE, dtype, seed=FULL.index(name))
    if name in ("mean", "invstd"):
        return np.abs(numbers(CHANNELS, np.float64, seed=20 + len(name)))
    return np.abs(numbers(CHANNELS, dtype, seed=30 + len(name)))


def make_layer(dtype=np.float32):
    """In the middle of a training: with a step behind it, and a forward pass that waits for its backward pass."""
    layer = onepass.BatchNorm(CHANNELS, activation="relu", dtype=dtype)
    opt = onepass.SGD(layer.parameters(), lr=0.5)
    x = numbers(SHAPE, dtype, seed=51)
    layer(x)
    layer.backward(numbers(SHAPE, dtype, seed=52))
    opt.step(layer.gradients())
    layer(x, residual=numbers(SHAPE, dtype, seed=53))
    return layer


def state_of(layer):
    arrays = {**layer.parameters(), "running_mean": layer.running_mean, "running_var": layer.running_var}
    grads = {f"{name}_grad": array for name, array in layer.gradients().items()}
    return {
        **{name: bits(array) for name, array in (arrays | grads).items()},
        "num_batches_tracked": layer.num_batches_tracked,
        "training": layer.training,
        "momentum": layer.momentum,
        "residual_grad": id(layer.residual_grad),
    }


class World:
    """One of the calls with good arrays, and a twin of everything that nothing bad happens to."""

    def __init__(self, entry, dtype=np.float32):
        self.entry = entry
        self.arrays = {name: value_of(name, dtype) for name in ENTRIES[entry]}
        self.twins = copied(self.arrays)
        self.options = {"training": entry in ("train", "back"), "activation": "relu"}
        self.layer, self.twin = make_layer(dtype), make_layer(dtype)

    def call(self, arrays, layer, **options):
        """All that the call gives back."""
        if self.entry.startswith("layer"):
            arrays = dict(arrays)
            training = {} if self.entry == "layer-back" else {"training": self.entry == "layer-train"}
            method = layer.backward if self.entry == "layer-back" else layer.forward
            return [method(arrays.pop("dy" if self.entry == "layer-back" else "x"), **arrays, **training, **options)]
        function = functional.batch_norm_backward if self.entry.startswith("back") else functional.batch_norm
        return list(function(**arrays, **{**self.options, **options}))

    def assert_raises(self, error, message, *also, **changes):
        """The call with these changes raises so, and nothing has changed; and afterwards all goes on."""
        given = {name: value for name, value in changes.items() if name in self.arrays}
        options = {name: value for name, value in changes.items() if name not in self.arrays}
        watched = arrays_of([self.arrays, given, *also])
        before, state = [bits(array) for array in watched], state_of(self.layer)
        with pytest.raises(error, match=message):
            self.call({**self.arrays, **given}, self.layer, **options)
        assert [bits(array) for array in watched] == before
        assert state_of(self.layer) == state
        self.goes_on()

    def goes_on(self):
        """What waits for its backward pass can have it, and the call works."""
        if self.entry != "layer-back":
            dy = numbers(SHAPE, self.layer.weight.dtype, seed=54)
            assert_same_bits(self.layer.backward(dy), self.twin.backward(dy))
            assert_same_bits(self.layer.residual_grad, self.twin.residual_grad)
        assert_same_bits(self.call(self.arrays, self.layer), self.call(self.twins, self.twin))
        assert_same_bits(self.arrays, self.twins)
        assert {**state_of(self.layer), "residual_grad": 0} == {**state_of(self.twin), "residual_grad": 0}


def starts(name, text):
    return f"^{re.escape(f'{name}: {text}')}"


def is_written(entry, name):
    return name in WRITTEN[entry]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_good_calls_do_something(entry):
    """Or nothing would be shown by what follows."""
    world = World(entry)
    for name in WRITTEN[entry]:
        before = world.arrays[name].copy()
        world.goes_on()
        changed = world.arrays[name] != before
        assert changed.all() if name != "out" else changed.mean() > 0.3
        world = World(entry)


# One bad array among good ones


UNSUPPORTED = [
    *("bool", "int8", "uint8", "int32", "int64", "uint64", "float16", "complex64", "complex128", "longdouble"),
    *("object", "datetime64[s]", "U4", "S4", ml_dtypes.bfloat16, np.dtype([("a", np.float32)])),
]
UNSUPPORTED = [dtype for dtype in map(np.dtype, UNSUPPORTED) if dtype.name not in ("float32", "float64")]


def no_array(make, name):
    return make, TypeError, f"expected a NumPy array or an object with __dlpack__, got {name}"


# What no argument may be: how it is made of the good array, the exception, how the message goes on after the name.
BAD_KINDS = {
    "list": no_array(np.ndarray.tolist, "list"),
    "list-of-arrays": no_array(list, "list"),
    "tuple": no_array(tuple, "tuple"),
    "dict": no_array(lambda good: {"x": good}, "dict"),
    "float": no_array(lambda good: 1.0, "float"),
    "int": no_array(lambda good: 0, "int"),
    "false": no_array(lambda good: False, "bool"),
    "str": no_array(lambda good: "x", "str"),
    "bytes": no_array(np.ndarray.tobytes, "bytes"),
    "memoryview": no_array(memoryview, "memoryview"),
    "generator": no_array(lambda good: (row for row in good), "generator"),
    "class": no_array(lambda good: np.ndarray, "type"),
    "class-with-dlpack": no_array(lambda good: Producer, "type"),
    "ellipsis": no_array(lambda good: ..., "ellipsis"),
    "scalar": no_array(lambda good: good.dtype.type(1), "float"),
    **{
        f"dtype-{dtype.name}": (
            lambda good, dtype=dtype: np.zeros(good.shape, dtype),
            TypeError,
            f"dtype {dtype} is not supported; supported are float32, float64",
        )
        for dtype in UNSUPPORTED
    },
    "foreign-byte-order": (lambda good: good.astype(good.dtype.newbyteorder("S")), TypeError, "dtype "),
    "masked": (lambda good: np.ma.masked_array(good, good > 0), TypeError, "is a masked array"),
    "masked-nothing": (np.ma.masked_array, TypeError, "is a masked array"),
    "dlpack-raises": (lambda good: Exports(BufferError("no")), TypeError, "Exports.__dlpack__() failed: no"),
    "dlpack-returns-none": (lambda good: Exports(None), TypeError, "Exports.__dlpack__() returned no DLPack capsule"),
    "dlpack-future": (lambda good: HandMade(good, version=2), TypeError, "exports DLPack version 2, not 0 or 1"),
    "dlpack-integer": (lambda good: HandMade(good, dtype=(0, 32, 1)), TypeError, "dtype (DLPack code 0, 32 bits) is"),
    "dlpack-lanes": (lambda good: HandMade(good, dtype=(2, 32, 4)), TypeError, "dtype (DLPack code 2, 32 bits) is"),
    "dlpack-cuda": (lambda good: HandMade(good, device=(2, 0)), TypeError, NO_CUDA),
    "cuda-array-interface": (lambda good: OnGpu(SHAPE), TypeError, NO_CUDA),
}


@pytest.mark.parametrize("bad", BAD_KINDS)
@pytest.mark.parametrize(("entry", "name"), EVERY_ARGUMENT)
def test_a_bad_kind_of_array(entry, name, bad):
    world = World(entry)
    make, error, message = BAD_KINDS[bad]
    expected = f"^{name}: ({NO_CUDA})" if message == NO_CUDA else starts(name, message)
    world.assert_raises(error, expected, **{name: make(world.arrays[name])})


NEEDED = [("train", "x"), ("infer", "x"), ("layer-train", "x"), ("layer-infer", "x"), ("layer-back", "dy")]
NEEDED += [(entry, name) for entry in ("back", "back-frozen") for name in ("dy", "x", "mean", "invstd")]
NEEDED += [("infer", "running_mean"), ("infer", "running_var"), ("train", "running_mean"), ("train", "running_var")]


@pytest.mark.parametrize(("entry", "name"), NEEDED)
def test_an_array_that_is_needed(entry, name):
    World(entry).assert_raises(TypeError, starts(name, "expected "), **{name: None})


def test_statistics_come_together():
    x, mean, var = value_of("x"), value_of("running_mean"), value_of("running_var")
    for training in (True, False):
        with pytest.raises(TypeError, match=r"^running_var: expected "):
            functional.batch_norm(x, running_mean=mean, training=training)
        with pytest.raises(TypeError, match=r"^running_mean: expected "):
            functional.batch_norm(x, running_var=var, training=training)
    with pytest.raises(TypeError, match=r"^running_mean: expected .*training is False$"):
        functional.batch_norm(x, training=False)
    assert_same_bits([mean, var], [value_of("running_mean"), value_of("running_var")])


# Shapes and dtypes

OTHER_SHAPES = [(5, 3, 4), (4, 3), (4, 3, 5, 1), (1, 4, 3, 5), (60,), (), (4, 3, 1), (1, 3, 5), (4, 3, 6), (0, 3, 5)]
OTHER_COUNTS = [(), (2,), (4,), (1,), (0,), (3, 1), (1, 3), (3, 3)]
REST = [(entry, name) for entry, name in EVERY_ARGUMENT if name != "x"]


@pytest.mark.parametrize(
    ("entry", "name", "shape"),
    [(entry, name, shape) for entry, name in REST for shape in (OTHER_SHAPES if name in FULL else OTHER_COUNTS)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_a_shape_that_does_not_match(entry, name, shape):
    world = World(entry)
    good = world.arrays[name]
    if name in FULL:
        message = f"shape {shape} does not match that of x, {SHAPE}"
    else:
        message = f"shape {shape}, expected (3,), one value for each channel of x"
    for wrap in (lambda array: array, Producer):
        world.assert_raises(ValueError, starts(name, message) + "$", **{name: wrap(numbers(shape, good.dtype, seed=7))})
        world = World(entry)


@pytest.mark.parametrize(("entry", "name"), REST)
def test_a_dtype_that_does_not_match(entry, name):
    for dtype, other in ((np.float32, np.float64), (np.float64, np.float32)):
        world = World(entry, dtype)
        if name in ("mean", "invstd"):
            bad, message = world.arrays[name].astype(np.float32), "dtype float32, expected float64"
        else:
            message = f"dtype {np.dtype(other)}, expected {np.dtype(dtype)}, the dtype of x"
            bad = world.arrays[name].astype(other)
        world.assert_raises(TypeError, starts(name, message) + "$", **{name: bad})


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if "x" in ENTRIES[entry]])
def test_an_x_that_is_no_batch(entry):
    world = World(entry)
    for shape in ((), (3,), (60,), (0,)):
        message = starts("x", f"shape {shape}, expected 2 or more dimensions") + "$"
        world.assert_raises(ValueError, message, x=numbers(shape))
        world = World(entry)


@pytest.mark.parametrize("entry", ["layer-train", "layer-infer"])
def test_an_x_that_is_not_of_the_layer(entry):
    for shape, count in (((4, 5), 5), ((4, 1), 1), ((4, 0), 0), ((4, 5, 3), 5), ((0, 4), 4)):
        message = starts("x", f"shape {shape} has {count} channels along channel_axis; this layer has 3") + "$"
        World(entry).assert_raises(ValueError, message, x=numbers(shape), residual=None, out=None)
    message = starts("x", "dtype float64, expected float32, the dtype of this layer") + "$"
    World(entry).assert_raises(TypeError, message, x=numbers(SHAPE, np.float64), residual=None, out=None)


@pytest.mark.parametrize("entry", ["train", "infer", "back", "back-frozen"])
def test_x_decides_what_the_others_are(entry):
    """Whichever of two that do not match was meant, the message has both."""
    first = "dy" if entry.startswith("back") else "weight"  # the first that is compared with x
    message = starts(first, "shape ") + ".* x"
    World(entry).assert_raises(ValueError, message, x=numbers((4, 2, 5)))
    message = starts(first, "dtype float32, expected float64, the dtype of x") + "$"
    World(entry).assert_raises(TypeError, message, x=numbers(SHAPE, np.float64))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_one_value_for_each_channel_in_training(shape):
    """Their variance has no meaning."""
    world = World("train")
    x, out, residual = numbers(shape), np.full(shape, 7, np.float32), numbers(shape, seed=1)
    message = starts("x", f"shape {shape} has one value for each channel")
    world.assert_raises(ValueError, message, x=x, out=out, residual=residual)
    World("layer-train").assert_raises(ValueError, message, x=x, out=out, residual=residual)
    with pytest.raises(ValueError, match=starts("x", "shape (3, 1) has one value for each channel")):
        functional.batch_norm(numbers((3, 1)), channel_axis=0)


# Memory


def spread(good):
    """The same values with gaps between them."""
    return np.repeat(good, 2, axis=-1)[..., ::2]


def backwards(good):
    return good[..., ::-1].copy()[..., ::-1]


def repeated(good):
    """Writable, though one element is all."""
    return np.lib.stride_tricks.as_strided(good, good.shape, (0,) * good.ndim)


STRIDED = {
    "gaps": spread,
    "backwards": backwards,
    "repeated": repeated,
    "dlpack-gaps": lambda good: Producer(spread(good)),
    "dlpack-repeated": lambda good: HandMade(repeated(good)),
}
STRIDED_BATCH = {
    "fortran": np.asfortranarray,
    "first-axis-backwards": lambda good: good[::-1].copy()[::-1],
    "first-axis-with-gaps": lambda good: np.repeat(good, 2, axis=0)[::2],
    "transposed": lambda good: good.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "channels-last": lambda good: good.transpose(0, 2, 1).copy().transpose(0, 2, 1),
    "rows-repeated": lambda good: np.lib.stride_tricks.as_strided(good, good.shape, (0, *good.strides[1:])),
    "part-of-rows": lambda good: np.concatenate([good, good], axis=2)[:, :, :5],
    "part-of-channels": lambda good: np.concatenate([good, good], axis=1)[:, 1:4],
}


@pytest.mark.parametrize(
    ("entry", "name", "bad"),
    [
        (entry, name, bad)
        for entry, name in EVERY_ARGUMENT
        for bad in (*STRIDED, *(STRIDED_BATCH if name in FULL else ()))
    ],
)
def test_an_array_that_is_not_c_contiguous(entry, name, bad):
    world = World(entry)
    given = {**STRIDED, **STRIDED_BATCH}[bad](world.arrays[name])
    advice = "would be lost, so make it contiguous from the start" if is_written(entry, name) else ""
    message = starts(name, "strides (") + ".*not those of a C-contiguous array; .*"
    message += re.escape(f"np.ascontiguousarray({name})")
    message += ".*" + advice + "$"
    world.assert_raises(ValueError, message, **{name: given})


@pytest.mark.parametrize(("entry", "name"), EVERY_ARGUMENT)
def test_a_broadcast_array(entry, name):
    """NumPy makes them read-only."""
    world = World(entry)
    given = np.broadcast_to(world.arrays[name][:1], world.arrays[name].shape)
    text = "is read-only and cannot be written" if is_written(entry, name) else "strides ("
    world.assert_raises(ValueError, starts(name, text), **{name: given})


def read_only(good):
    good = good.copy()
    good.flags.writeable = False
    return good


UNWRITABLE = {
    "read-only": (read_only, "is read-only and cannot be written"),
    "bytes": (lambda good: np.frombuffer(good.tobytes(), good.dtype).reshape(good.shape), "is read-only and"),
    "dlpack-read-only": (lambda good: HandMade(good, flags=1), "is read-only and cannot be written"),
    "dlpack-copy": (lambda good: HandMade(good, flags=2), "its __dlpack__() exports a copy; the result would land"),
}


@pytest.mark.parametrize("bad", UNWRITABLE)
@pytest.mark.parametrize(("entry", "name"), [(entry, name) for entry in ENTRIES for name in WRITTEN[entry]])
def test_an_output_that_cannot_be_written(entry, name, bad):
    world = World(entry)
    make, message = UNWRITABLE[bad]
    world.assert_raises(ValueError, starts(name, message), **{name: make(world.arrays[name])})


@pytest.mark.parametrize("bad", UNWRITABLE)
@pytest.mark.parametrize(("entry", "name"), [(e, name) for e, name in EVERY_ARGUMENT if name not in WRITTEN[e]])
def test_an_input_need_not_be_writable(entry, name, bad):
    world = World(entry)
    given = {**world.arrays, name: UNWRITABLE[bad][0](world.arrays[name])}
    assert_same_bits(world.call(given, world.layer), world.call(world.twins, world.twin))


PAIRS = [
    (entry, written, other)
    for entry, names in ENTRIES.items()
    for written in WRITTEN[entry]
    for other in names
    if other != written and not (other in WRITTEN[entry] and names.index(other) > names.index(written))
]


class Slab:
    """Memory in which two arrays lie at any bytes of each other."""

    def __init__(self, first, second, shift):
        margin = first.nbytes + second.nbytes
        self.memory = np.zeros(3 * margin, np.uint8)
        self.arrays = [
            np.ndarray(array.shape, array.dtype, self.memory, margin + offset)
            for array, offset in ((first, 0), (second, shift))
        ]


# How far behind the start of one the other starts, in bytes, from the sizes of both.
MEETING = {
    "same-start": lambda a, b: 0,
    "one-element-on": lambda a, b: a.itemsize,
    "one-element-before": lambda a, b: -b.itemsize,
    "last-element": lambda a, b: a.nbytes - a.itemsize,
    "first-element": lambda a, b: b.itemsize - b.nbytes,
    "last-byte": lambda a, b: a.nbytes - 1,
    "first-byte": lambda a, b: 1 - b.nbytes,
    "same-end": lambda a, b: a.nbytes - b.nbytes,
}


@pytest.mark.parametrize(("entry", "written", "other"), PAIRS)
def test_an_output_that_overlaps_another_array(entry, written, other):
    for place, shift in MEETING.items():
        world = World(entry)
        good = world.arrays[other], world.arrays[written]
        slab = Slab(*good, shift(*good))
        given = dict(zip((other, written), slab.arrays, strict=True))
        if entry.endswith("infer") and (written, other) == ("out", "x") and place in ("same-start", "same-end"):
            given["x"][...] = world.arrays["x"]
            want = world.call({**world.twins, "out": None}, world.twin)
            got = world.call({**world.arrays, **given}, world.layer)
            assert got[0] is given["out"]
            assert_same_bits(got, want)
            continue
        message = starts(written, f"overlaps {other} in memory; what is written must not share memory")
        world.assert_raises(ValueError, message, slab.memory, **given)
        foreign = {name: Producer(array) for name, array in given.items()}
        World(entry).assert_raises(ValueError, message, slab.memory, **foreign)


@pytest.mark.parametrize(("entry", "written", "other"), PAIRS)
def test_an_output_beside_another_array(entry, written, other):
    """Neighbours are no overlap, on either side."""
    for front in (True, False):
        world = World(entry)
        good = world.arrays[other], world.arrays[written]
        slab = Slab(*good, good[0].nbytes if front else -good[1].nbytes)
        for place, value in zip(slab.arrays, good, strict=True):
            place[...] = value
        world.arrays |= dict(zip((other, written), slab.arrays, strict=True))
        world.goes_on()


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("infer", ("x", "residual")),
        ("infer", ("weight", "bias", "running_mean", "running_var")),
        ("train", ("x", "residual")),
        ("train", ("weight", "bias")),
        ("back", ("dy", "x", "y")),
        ("back", ("mean", "invstd")),
        ("layer-train", ("x", "residual")),
    ],
    ids=str,
)
def test_inputs_may_share_memory(entry, names):
    world = World(entry)
    value = world.arrays[names[0]]
    shared = {**world.arrays, **dict.fromkeys(names, value)}
    apart = {**world.twins, **{name: value.copy() for name in names}}
    assert_same_bits(world.call(shared, world.layer), world.call(apart, world.twin))


def test_a_layers_own_arrays_as_outputs():
    """What the layer reads or writes in a call cannot be that call's output."""
    layer = make_layer()
    x = numbers((1, CHANNELS), seed=3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        before = state_of(layer)
        with pytest.raises(ValueError, match=rf"^out: overlaps {name} in memory"):
            layer.forward(x, training=False, out=getattr(layer, name).reshape(1, CHANNELS))
        assert state_of(layer) == before
    layer.forward(x, training=False)
    for name in ("weight_grad", "bias_grad"):
        before = state_of(layer)
        row = getattr(layer, name).reshape(1, CHANNELS)
        with pytest.raises(ValueError, match=rf"^{name}: overlaps out in memory"):
            layer.backward(x, out=row)
        with pytest.raises(ValueError, match=rf"^{name}: overlaps dy in memory"):
            layer.backward(row)
        assert state_of(layer) == before
    with pytest.raises(ValueError, match=r"^out: overlaps x in memory"):
        layer.backward(x.copy(), out=x)
    y = layer.forward(x, training=False, residual=x)
    with pytest.raises(ValueError, match=r"^out: overlaps y in memory"):
        layer.backward(x, out=y)
    layer.backward(x)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_layer_whose_statistics_are_read_only(name):
    layer, twin = make_layer(), make_layer()
    getattr(layer, name).flags.writeable = False
    before = state_of(layer)
    x = numbers(SHAPE, seed=61)
    with pytest.raises(ValueError, match=rf"^{name}: is read-only and cannot be written$"):
        layer(x)
    assert state_of(layer) == before
    assert_same_bits(layer.backward(x), twin.backward(x))
    assert_same_bits(layer(x, training=False), twin(x, training=False))
    getattr(layer, name).flags.writeable = True
    assert_same_bits(layer(x), twin(x))


@pytest.mark.parametrize("name", ["weight_grad", "bias_grad"])
def test_a_layer_whose_gradients_are_read_only(name):
    layer, twin = make_layer(), make_layer()
    getattr(layer, name).flags.writeable = False
    before = state_of(layer)
    dy = numbers(SHAPE, seed=61)
    with pytest.raises(ValueError, match=rf"^{name}: is read-only and cannot be written$"):
        layer.backward(dy)
    assert state_of(layer) == before
    getattr(layer, name).flags.writeable = True
    assert_same_bits(layer.backward(dy), twin.backward(dy))


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_layer_whose_arrays_were_resized(name):
    layer, twin = make_layer(), make_layer()
    x = numbers(SHAPE, seed=61)
    getattr(layer, name).resize(2, refcheck=False)
    with pytest.raises(ValueError, match=rf"^{name}: shape \(2,\), expected \(3,\)"):
        layer(x)
    assert layer.num_batches_tracked == twin.num_batches_tracked
    assert_same_bits(layer.backward(x), twin.backward(x))  # it is of the parameters as they were


def test_an_input_that_is_no_longer_what_it_was():
    """Its values cannot be guarded, its shape can."""
    layer = make_layer()
    x = numbers(SHAPE, seed=1)
    layer(x)
    x.resize((4, 3, 4), refcheck=False)
    with pytest.raises(ValueError, match=r"^dy: shape \(4, 3, 5\) does not match that of x, \(4, 3, 4\)$"):
        layer.backward(numbers(SHAPE))
    x.resize(SHAPE, refcheck=False)
    layer.backward(numbers(SHAPE))


# Options

FLAGS = [(1, TypeError), (0, TypeError), (0.0, TypeError), ("yes", TypeError), ((), TypeError), (np.int8(1), TypeError)]
MOMENTA = [
    *((value, ValueError) for value in (-0.1, 1.1, -1, 2, NAN, INF, -INF, 10**400, np.float32(-1))),
    *((value, TypeError) for value in (True, np.False_, "0.1", 1j, [0.1], np.array([0.1]))),
]
EPSILONS = [
    *((value, ValueError) for value in (0, 0.0, -0.0, -1e-5, NAN, INF, -INF, 10**400, np.float64(0))),
    *((value, TypeError) for value in (True, None, "1e-5", 1j, [1e-5], np.array([1e-5]))),
]
AXES = [(value, TypeError) for value in (True, np.True_, 1.0, np.float64(1), None, "1", (1,), 1j, np.array([1]))]
HUGE_AXES = [(value, ValueError) for value in (100, -100, 2**31, 2**63, 2**70, -(2**70))]
ACTIVATIONS = [
    *((value, ValueError) for value in ("gelu", "ReLU", "", "relu ", "None", "linear")),
    *((value, TypeError) for value in (1, True, False, b"relu", ["relu"], functional.batch_norm, 0.0)),
]
COUNTS = [
    *((value, ValueError) for value in (0, -1, np.int64(0), -(2**70), 2**70)),
    *((value, TypeError) for value in (2.0, True, np.True_, None, "3", [3], (3,), NAN, np.array([3]))),
]
BAD_DTYPES = [
    *(int, "int32", np.float16, "e", ">f4", ">f8", complex, object, bool, "U4", [("a", "f4")], ml_dtypes.bfloat16),
    *("x", 3, 3.5, "f4,f4", np.ones(3, np.float32), "bfloat15"),
]

WORDS = {
    "training": "expected True or False, got {!r}",
    "unbiased": "expected True or False, got {!r}",
    "affine": "expected True or False, got {!r}",
    "momentum": "expected a number in [0, 1], got {!r}",
    "eps": "expected a finite number > 0, got {!r}",
    "channel_axis": "expected an ",
    "activation": "expected None or 'relu', got {!r}",
    "num_features": "expected an integer >= 1, got {!r}",
    "dtype": "expected ",
}
OPTIONS = {
    "training": [*FLAGS, (None, TypeError)],
    "unbiased": [*FLAGS, (None, TypeError)],
    "momentum": [*MOMENTA, (None, TypeError)],
    "eps": EPSILONS,
    "channel_axis": AXES + HUGE_AXES,
    "activation": ACTIVATIONS,
}
OF_CALL = {
    "train": OPTIONS,
    "infer": OPTIONS,
    "back": {name: OPTIONS[name] for name in ("training", "channel_axis", "activation")},
    "layer-train": {"training": FLAGS},
}
OF_LAYER = {
    **{name: OPTIONS[name] for name in ("unbiased", "eps", "channel_axis", "activation")},
    "momentum": MOMENTA,
    "affine": OPTIONS["unbiased"],
    "num_features": COUNTS,
    "dtype": [(value, TypeError) for value in BAD_DTYPES],
}


def short(value):
    return getattr(value, "__name__", repr(value))[:40]  # no addresses: workers must agree on the names of tests


@pytest.mark.parametrize(
    ("entry", "name", "value", "error"),
    [
        (entry, name, value, error)
        for entry, options in OF_CALL.items()
        for name, values in options.items()
        for value, error in values
    ],
    ids=short,
)
def test_a_bad_option_of_a_call(entry, name, value, error):
    world = World(entry)
    if entry == "layer-train":
        before = state_of(world.layer)
        with pytest.raises(error, match=starts(name, WORDS[name].format(value))):
            world.layer.forward(world.arrays["x"], training=value)
        assert state_of(world.layer) == before
        world.goes_on()
    else:
        world.assert_raises(error, starts(name, WORDS[name].format(value)), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [(name, value, error) for name, values in OF_LAYER.items() for value, error in values],
    ids=short,
)
def test_a_bad_option_of_a_layer(name, value, error):
    with pytest.raises(error, match=starts(name, WORDS[name].format(value))):
        onepass.BatchNorm(**{"num_features": 3, name: value})


@pytest.mark.parametrize("value", [1, 0, None, "train", 1.0], ids=repr)
def test_a_bad_mode(value):
    layer = make_layer()
    for mode in (True, False):
        layer.train(mode)
        with pytest.raises(TypeError, match=starts("mode", f"expected True or False, got {value!r}")):
            layer.train(value)
        assert layer.training is mode


@pytest.mark.parametrize("entry", ["train", "infer", "back", "back-frozen"])
def test_a_channel_axis_that_x_does_not_have(entry):
    for axis in (3, -4, 60, np.int64(7), np.int8(-5)):
        message = starts("channel_axis", f"{int(axis)} is not an axis of x, whose shape is {SHAPE}") + "$"
        World(entry).assert_raises(ValueError, message, channel_axis=axis)
    with pytest.raises(ValueError, match=r"^channel_axis: 2 is not an axis of x, whose shape is \(4, 3\)$"):
        onepass.BatchNorm(3, channel_axis=2)(numbers((4, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "eps", "good"), [(np.float32, 1e-300, 1e-70), (np.float32, 1e-78, 1e-76), (np.float64, 1e-310, 1e-300)]
)
def test_an_eps_that_is_lost(dtype, eps, good, training):
    """A channel without variance would be 0 * inf."""
    world = World("train" if training else "infer", dtype)
    x = np.ones(SHAPE, dtype)
    given = {**world.arrays, "x": x, "running_var": np.zeros(CHANNELS, dtype)}
    message = starts("eps", f"{eps!r} is ")
    world.assert_raises(ValueError, message, x=x, running_var=given["running_var"], eps=eps)
    options = {"weight": None, "bias": None, "residual": None}
    y, _, invstd = world.call({**given, **options}, None, eps=good)
    assert np.isfinite(y).all()
    assert np.isfinite(invstd.astype(dtype)).all()

    def layer():
        onepass.BatchNorm(CHANNELS, eps, dtype=dtype).train(training)(x)

    with pytest.raises(ValueError, match=message):
        layer()


# The order of calls


def test_backward_before_forward():
    layer = onepass.BatchNorm(CHANNELS)
    before = state_of(layer)
    for given in (numbers(SHAPE), None, "dy"):
        with pytest.raises(RuntimeError, match=r"^backward: there was no forward pass to go back through$"):
            layer.backward(given)
    assert state_of(layer) == before


def test_backward_twice():
    layer = make_layer()
    dy = numbers(SHAPE)
    layer.backward(dy)
    for _ in range(2):
        before = state_of(layer)
        with pytest.raises(RuntimeError, match=r"^backward: the last forward pass has been gone back through already"):
            layer.backward(dy)
        assert state_of(layer) == before
    layer(numbers(SHAPE, seed=1))
    layer.backward(dy)


def test_backward_after_a_forward_pass_in_place():
    layer = make_layer()
    x = numbers(SHAPE)
    layer(x, training=False, out=x)
    before = state_of(layer)
    for _ in range(2):
        message = r"^backward: the last forward pass overwrote its input \(out=x\), which the gradient needs$"
        with pytest.raises(RuntimeError, match=message):
            layer.backward(numbers(SHAPE))
        assert state_of(layer) == before
    layer(x)
    layer.backward(numbers(SHAPE))


def test_a_failed_pass_in_place_is_none():
    layer, twin = make_layer(), make_layer()
    x = numbers(SHAPE)
    with pytest.raises(ValueError, match=r"^residual: shape"):
        layer(x, training=False, residual=x[:2], out=x)
    with pytest.raises(ValueError, match=r"^out: overlaps x"):
        layer(x, out=x)
    assert_same_bits(x, numbers(SHAPE))
    assert_same_bits(layer.backward(x), twin.backward(x))


def test_arguments_by_position():
    """Options have names: (x, True) does not train, (dy, out) does not write."""
    layer = make_layer()
    before = state_of(layer)
    x = numbers(SHAPE)
    for call in (
        lambda: layer(x, True),
        lambda: layer.backward(x, x.copy()),
        lambda: onepass.BatchNorm(3, 1e-5, 0.1, 1),
        lambda: functional.batch_norm(x, None, None, None, None, True),
        lambda: functional.batch_norm_backward(x, x, np.ones(3), np.ones(3), None, None, True),
        lambda: layer(x, activation="relu"),
        lambda: onepass.BatchNorm(),
    ):
        with pytest.raises(TypeError, match="argument"):
            call()
    assert state_of(layer) == before


def test_an_array_whose_export_changes_another_one():
    """Foreign arrays are asked first: what their code does to NumPy's is seen."""

    class Meddler(BareProducer):
        def __dlpack__(self, **options):
            out.resize((2, 3), refcheck=False)
            return super().__dlpack__(**options)

    for place in ("x", "residual"):
        out = np.zeros(SHAPE, np.float32)
        arrays = {"x": value_of("x"), "residual": value_of("residual")}
        arrays[place] = Meddler(arrays[place])
        with pytest.raises(ValueError, match=r"^out: shape \(2, 3\) does not match that of x, \(4, 3, 5\)$"):
            functional.batch_norm(**arrays, out=out)
        assert not out.any()

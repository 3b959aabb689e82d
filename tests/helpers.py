"""What several test files share: optimizers to try, arrays to try them on, comparisons that nothing trivial passes."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import onepass
from onepass import _cpu

CLASSES: tuple[type[onepass.Optimizer], ...] = tuple(
    value
    for value in (getattr(onepass, name) for name in sorted(onepass.__all__))
    if isinstance(value, type) and issubclass(value, onepass.Optimizer) and value is not onepass.Optimizer
)

# The functions of `onepass.functional` that are update rules.
UPDATE_RULES = tuple(name for name in onepass.functional.__all__ if "batch_norm" not in name and name.islower())

# Each class with its defaults, and each option that leads to other arithmetic or other states.
CASES: dict[str, tuple[type[onepass.Optimizer], dict[str, Any]]] = {
    **{cls.__name__: (cls, {}) for cls in CLASSES},
    "SGD-l1": (onepass.SGD, {"l1": 0.125}),
    "SGD-decoupled": (onepass.SGD, {"weight_decay": 0.25, "decoupled_weight_decay": True}),
    "Momentum-dampened": (onepass.Momentum, {"momentum": 0.75, "dampening": 0.5}),
    "Momentum-outside": (onepass.Momentum, {"lr_in_velocity": False}),
    "NAG-outside": (onepass.NAG, {"lr_in_velocity": False, "maximize": True}),
    "AdaGrad-keras": (onepass.AdaGrad, {"initial_accumulator": 0.1, "eps": 0.0, "eps_root": 1e-7, "lr_decay": 0.5}),
    "RMSprop-centered": (onepass.RMSprop, {"centered": True}),
    "RMSprop-momentum": (onepass.RMSprop, {"momentum": 0.9}),
    "RMSprop-centered-momentum": (onepass.RMSprop, {"centered": True, "momentum": 0.5, "lr_in_velocity": False}),
    "Adam-uncorrected": (onepass.Adam, {"bias_correction": False, "maximize": True}),
    "Adam-hat": (onepass.Adam, {"eps_hat": True, "eps": 1e-7, "weight_decay": 0.1}),
    "Adam-amsgrad": (onepass.Adam, {"amsgrad": True, "l1": 0.01}),
    "Adam-optax": (onepass.Adam, {"amsgrad": True, "max_of_corrected": True}),
    "Nadam-inf": (onepass.Nadam, {"momentum_decay": math.inf}),
}

# One for each number of states, and with each kind of surroundings.
FEW = ("SGD", "Momentum", "AdamW", "Adam-amsgrad", "RMSprop-centered-momentum")


def make(case: str, params: Any, **more: Any) -> onepass.Optimizer:
    """The optimizer of that name in `CASES`, at a learning rate that shows."""
    cls, options = CASES[case]
    return cls(params, **{"lr": 0.0625, **options, **more})


def hyper_names(cls: type[onepass.Optimizer]) -> list[str]:
    """The names of the hyper-parameters that the constructor takes by themselves."""
    return [name for name in inspect.signature(cls).parameters if name not in ("params", "grads", "options")]


def update(
    rule: str,
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    coefficients: Mapping[str, float],
    *,
    scale: float = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
    decay: float = 1.0,
) -> None:
    """A step of any rule of the registry, yardsticks included, by its coefficients."""
    missing = 3 - len(slots)
    streams = [params, None, *slots, *[None] * missing, None, None, None, None]
    recipe = (dict(coefficients), scale, l1, l2, decay, None, 0.0, None)
    names = ("params", "grads", "slot0", "slot1", "slot2", "emas", "mirrors", "remainders", "accumulators")
    _cpu.update(rule, grads, streams, recipe, 1, None, 0, False, (1, 1), names)


def rules_of_registry() -> set[str]:
    return {row["name"] for row in _cpu.registry() if not row["yardstick"]}


# Arrays


def numbers(shape: Any, dtype: Any = np.float32, *, seed: int = 0, order: str = "C") -> np.ndarray:
    """Finite numbers of both signs, none of them zero or small, none equal to its neighbour."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.25, 2.0, size=shape) * rng.choice([-1.0, 1.0], size=shape)
    return np.array(values, dtype=dtype, order=order)  # type: ignore[call-overload]


def numbers_like(param: np.ndarray, *, seed: int = 0) -> np.ndarray:
    return numbers(param.shape, param.dtype, seed=seed)


GUARD = 0xA5


def guarded(
    shape: Sequence[int], dtype: Any = np.float32, *, axes: Sequence[int] | None = None, offset: int = 0, seed: int = 0
) -> tuple[np.ndarray, Callable[[], bool]]:
    """An array between guard bytes, and a function that says whether these are untouched.

    `axes`: the axes from the slowest to the fastest in memory (default: C order). `offset`: bytes by which its start is
    off a 64-byte line.
    """
    dtype = np.dtype(dtype)
    axes = tuple(range(len(shape))) if axes is None else tuple(axes)
    nbytes = dtype.itemsize * math.prod(shape)
    margin = 256
    buffer = np.full(nbytes + 2 * margin + 64, GUARD, np.uint8)
    start = margin + (-(buffer.ctypes.data + margin)) % 64 + offset
    stop = start + nbytes
    flat = buffer[start:stop].view(dtype) if nbytes else np.empty(0, dtype)
    array = flat.reshape([shape[a] for a in axes]).transpose(np.argsort(np.array(axes, dtype=int)))
    array[...] = numbers(shape, dtype, seed=seed)

    def untouched() -> bool:
        return bool((buffer[:start] == GUARD).all() and (buffer[stop:] == GUARD).all())

    return array, untouched


class Producer:
    """Exports a NumPy array by DLPack and is none itself."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class OldProducer(Producer):
    """One of the time before versions: knows no `max_version`, and its capsule holds no version."""

    def __dlpack__(self, stream: Any = None) -> Any:
        assert stream is None
        return self.array.__dlpack__()


class BareProducer:
    """One that does not even tell its device."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class HandMade:
    """A DLPack producer of which every field can be set: also to what NumPy cannot express."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        device: tuple[int, int] = (1, 0),
        dtype: tuple[int, int, int] | None = None,
        version: int | None = 1,
        flags: int = 0,
        c_order: bool = False,
        byte_offset: int = 0,
        capsule: bytes | None = None,
    ) -> None:
        self.array = array  # alive as long as the capsule's memory is used
        self.device = device
        ndim = array.ndim
        self._shape = (ctypes.c_int64 * max(ndim, 1))(*array.shape)
        self._strides = (ctypes.c_int64 * max(ndim, 1))(*(s // array.itemsize for s in array.strides))
        code, bits, lanes = dtype or (2, 8 * array.itemsize, 1)
        tensor = _Tensor(
            array.ctypes.data - byte_offset,
            *device,
            ndim,
            code,
            bits,
            lanes,
            self._shape,
            None if c_order else self._strides,
            byte_offset,
        )
        if version is None:
            self._managed: ctypes.Structure = _Managed(tensor, None, None)
            self._name = capsule or b"dltensor"
        else:
            self._managed = _ManagedVersioned(version, 0, None, None, flags, tensor)
            self._name = capsule or b"dltensor_versioned"

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_options: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), self._name, None)


class Exports:
    """Its __dlpack__ returns or raises anything."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __dlpack__(self, **_options: Any) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class OnGpu:
    """Says of itself that it lies on a GPU."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (1 << 46, False), "version": 3}


#: What such an array is answered with, whatever the build and the machine have, if it does not lie on a GPU at all.
NO_CUDA = (
    r"is on a CUDA device, and this build of onepass has no CUDA kernels; .* or pass host arrays$"
    r"|is on a CUDA device, and CuPy, .* cannot be imported .* or pass host arrays$"
    r"|is on a CUDA device, .*: (its memory is not that of a CUDA device|asking where memory lies failed: .*)$"
)


# Comparisons


def arrays_of(structure: Any) -> list[np.ndarray]:
    """The NumPy arrays in lists, tuples, dicts and DLPack producers, nested or not, and nothing else."""
    if isinstance(structure, np.ndarray):
        return [structure]
    if isinstance(structure, (Producer, BareProducer, HandMade)):
        return [structure.array]
    if isinstance(structure, Mapping):
        return [array for value in structure.values() for array in arrays_of(value)]
    if isinstance(structure, (list, tuple)):
        return [array for value in structure for array in arrays_of(value)]
    return []


def bits(array: np.ndarray) -> tuple[Any, ...]:
    """All that an array is: two are equal if no program can tell them apart by their elements."""
    return array.shape, array.dtype.str, array.tobytes()


def assert_same_bits(actual: Any, desired: Any) -> None:
    """Equal bit for bit in every array, and finite: agreement on NaN proves nothing."""
    a, d = arrays_of(actual), arrays_of(desired)
    assert len(a) == len(d)
    for k, (x, y) in enumerate(zip(a, d, strict=True)):
        assert np.isfinite(y).all(), f"array {k} is not finite"
        assert x.dtype == y.dtype, f"array {k}"
        np.testing.assert_array_equal(x, y, err_msg=f"array {k}", strict=True)
        assert bits(x) == bits(y), f"array {k}: zeros of different sign"


def assert_moved(before: Any, after: Any) -> None:
    """Every element is another one than before."""
    b, a = arrays_of(before), arrays_of(after)
    assert len(b) == len(a) > 0
    for k, (x, y) in enumerate(zip(b, a, strict=True)):
        assert np.isfinite(y).all(), f"array {k} is not finite"
        assert (x != y).all(), f"array {k} did not move"


def copied(structure: Any) -> Any:
    """The same structure with copies of the arrays, in the same memory order; groups keep their hyper-parameters."""
    if isinstance(structure, np.ndarray):
        return np.array(structure, order="K", copy=True, subok=False)
    if isinstance(structure, Mapping):
        return {key: copied(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(copied(value) for value in structure)
    return structure


def assert_equal_optimizers(a: onepass.Optimizer, b: onepass.Optimizer) -> None:
    """The same states bit for bit, the same step counts."""
    assert a.step_counts == b.step_counts
    for x, y in zip(a.state, b.state, strict=True):
        assert list(x) == list(y)
        assert_same_bits(dict(x), dict(y))


class Snapshot:
    """What an optimizer and some arrays are now, to be compared with what they are after a call that failed."""

    def __init__(self, opt: onepass.Optimizer | None, *structures: Any) -> None:
        self.opt = opt
        self.structures = structures
        self.was = self._read()

    def _read(self) -> dict[str, Any]:
        read: dict[str, Any] = {"arrays": [bits(array) for array in arrays_of(self.structures)]}
        if self.opt is not None:
            read["counts"] = self.opt.step_counts
            read["hyper"] = [
                {name: value for name, value in group.items() if name != "params"} for group in self.opt.param_groups
            ]
            read["members"] = [list(map(id, group["params"])) for group in self.opt.param_groups]
            read["repr"] = repr(self.opt)
            read["state"] = [{name: bits(array) for name, array in state.items()} for state in self.opt.state]
        return read

    def assert_unchanged(self) -> None:
        now = self._read()
        for what, was in self.was.items():
            assert now[what] == was, f"{what} changed"


# Settings of the process


@contextlib.contextmanager
def settings(*, threads: int | None = None, isa: str | None = None) -> Iterator[None]:
    """Run with that many threads and on that instruction set; afterwards all is as it was."""
    isa_before = onepass.isa()
    try:
        if threads is not None:
            onepass.set_num_threads(threads)
        if isa is not None:
            onepass.set_isa(isa)
        yield
    finally:
        onepass.set_isa(isa_before)
        onepass.set_num_threads(None)

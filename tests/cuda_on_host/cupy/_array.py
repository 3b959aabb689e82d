"""Arrays: memory of the fake devices, with NumPy doing the work of CuPy's kernels."""

import ctypes
import math
import operator

import numpy as np

from . import _dlpack
from .cuda import memory, runtime
from .cuda.stream import Event, ExternalStream, get_current_stream


class Flags:
    def __init__(self, c_contiguous, f_contiguous, owndata):
        self.c_contiguous, self.f_contiguous, self.owndata = c_contiguous, f_contiguous, owndata

    @property
    def fnc(self):
        return self.f_contiguous and not self.c_contiguous

    @property
    def forc(self):
        return self.f_contiguous or self.c_contiguous

    def __getitem__(self, name):
        names = {"C_CONTIGUOUS": "c_contiguous", "F_CONTIGUOUS": "f_contiguous", "OWNDATA": "owndata"}
        if name not in names:
            raise KeyError(f"{name} is not defined for cupy.ndarray.flags")
        return getattr(self, names[name])

    def __repr__(self):
        return (
            f"  C_CONTIGUOUS : {self.c_contiguous}\n  F_CONTIGUOUS : {self.f_contiguous}\n  OWNDATA : {self.owndata}\n"
        )


def _contiguous(shape, strides, itemsize):
    """Whether elements follow each other without gaps, the last axis first."""
    if 0 in shape:
        return True
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _contiguous_strides(shape, itemsize, order):
    strides, step = [], itemsize
    for length in shape if order == "F" else reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(strides if order == "F" else reversed(strides))


def _must_not_capture(stream, what):
    if stream.is_capturing():
        raise RuntimeError(what)


_SYNCHRONOUS = "the current stream is capturing, so synchronous API calls are disallowed"
_UNRECORDED = "the host's stand-in for CuPy cannot record kernels of CuPy's own in a capture"


class ndarray:  # noqa: N801
    __slots__ = ("__weakref__", "_shape", "_strides", "base", "data", "dtype")
    __module__ = "cupy"
    __hash__ = None
    __array_priority__ = 100

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        self._shape = (operator.index(shape),) if np.ndim(shape) == 0 else tuple(map(operator.index, shape))
        if any(length < 0 for length in self._shape):
            raise ValueError("Negative dimensions are not allowed")
        if order not in ("C", "F", None):
            raise ValueError(f"order not understood. order={order}")
        if strides is not None and memptr is None:
            raise ValueError("memptr is required if strides is given.")
        self.dtype = np.dtype(dtype)
        self._strides = (
            _contiguous_strides(self._shape, self.dtype.itemsize, order) if strides is None else tuple(strides)
        )
        self.base = None
        self.data = memory.alloc(self.nbytes) if memptr is None else memptr

    # --- What it is -------------------------------------------------------------------------------------------------

    @property
    def shape(self):
        return self._shape

    @property
    def strides(self):
        return self._strides

    @property
    def ndim(self):
        return len(self._shape)

    @property
    def size(self):
        return math.prod(self._shape)

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def nbytes(self):
        return self.size * self.itemsize

    @property
    def device(self):
        return self.data.device

    @property
    def flags(self):
        return Flags(
            _contiguous(self._shape, self._strides, self.itemsize),
            _contiguous(self._shape[::-1], self._strides[::-1], self.itemsize),
            self.base is None,
        )

    @property
    def __cuda_array_interface__(self):
        # bfloat16 is "<V2" there, as in NumPy: it cannot be told from other types of two bytes.
        return {
            "shape": self._shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": get_current_stream().ptr or runtime.streamLegacy,
            "version": 3,
            "strides": None if self.flags.c_contiguous else self._strides,
            "data": (self.data.ptr if self.size > 0 else 0, False),
        }

    def __dlpack_device__(self):
        return 2, self.data.device_id

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError("the host's stand-in for CuPy exports to its own device alone")
        if stream is None:
            stream = runtime.streamLegacy
        if not isinstance(stream, int):
            raise TypeError(f"stream must be an int or None, got {type(stream).__name__}")
        if stream < -1 or stream == 0:
            raise ValueError(
                f"On CUDA, the valid stream for the DLPack protocol is -1, 1, 2, or any larger value, got {stream}"
            )
        array = self.copy() if copy else self
        current = get_current_stream(self.data.device_id)
        if stream != -1 and stream != (current.ptr or runtime.streamLegacy):
            with self.device:
                event = Event(disable_timing=True)
                event.record(current)
                ExternalStream(stream).wait_event(event)
        return _dlpack.export(array, max_version is not None and max_version[0] >= 1, bool(copy))

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __reduce__(self):
        return _from_host, (self.get(order="A"),)

    def __deepcopy__(self, memo):
        with self.device:
            return self.copy()

    # --- Views --------------------------------------------------------------------------------------------------------

    def _host(self):
        """The memory itself, as NumPy sees it."""
        mem = self.data.mem
        if self.size == 0:
            return np.empty(self._shape, self.dtype)
        buffer = (ctypes.c_ubyte * mem.size).from_address(mem.ptr)
        return np.ndarray(self._shape, self.dtype, buffer, self.data.ptr - mem.ptr, self._strides)

    def _like(self, host, view):
        """An array on this one's memory, as `view` lies in `host`."""
        pointer = self.data + (view.ctypes.data - host.ctypes.data if self.size > 0 else 0)
        new = ndarray(view.shape, view.dtype, pointer, view.strides)
        new.base = self if self.base is None else self.base
        return new

    def __getitem__(self, key):
        parts = key if isinstance(key, tuple) else (key,)
        for part in parts:
            if not (part is None or part is Ellipsis or isinstance(part, slice)) and (
                isinstance(part, bool | np.bool_) or not hasattr(part, "__index__") or isinstance(part, ndarray)
            ):
                raise NotImplementedError("the host's stand-in for CuPy has slices and integers alone")
        host = self._host()
        return self._like(host, host[parts if Ellipsis in parts else (*parts, Ellipsis)])

    def __setitem__(self, key, value):
        self[key]._assign(value)

    @property
    def T(self):  # noqa: N802
        return self.transpose()

    def transpose(self, *axes):
        host = self._host()
        return self._like(host, host.transpose(*axes))

    def swapaxes(self, one, other):
        host = self._host()
        return self._like(host, host.swapaxes(one, other))

    def squeeze(self, axis=None):
        host = self._host()
        return self._like(host, host.squeeze(axis))

    def view(self, dtype=None):
        host = self._host()
        return self._like(host, host.view() if dtype is None else host.view(dtype))

    def reshape(self, *shape, order="C"):
        host = self._host()
        new = host.reshape(*shape, order=order)
        if new.size == 0 or np.shares_memory(new, host):
            return self._like(host, new)
        self._kernel()
        return _from_host(new)

    def ravel(self, order="C"):
        return self.reshape(-1, order=order)

    # --- Copies -------------------------------------------------------------------------------------------------------

    def get(self, stream=None, order="C", out=None, blocking=True):
        with self.device:
            stream = get_current_stream() if stream is None else stream
            _must_not_capture(stream, _SYNCHRONOUS)
            if blocking:
                stream.synchronize()
        if out is None:
            return self._host().copy(order)
        out[...] = self._host()
        return out

    def set(self, arr, stream=None):
        arr = np.asarray(arr)
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self._shape:
            raise ValueError(f"Shape mismatch. Old shape: {self._shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        _must_not_capture(get_current_stream(self.data.device_id) if stream is None else stream, _SYNCHRONOUS)
        self._host()[...] = arr

    def copy(self, order="C"):
        if order == "K" or (order == "A" and not self.flags.fnc):
            order = order if order == "K" else "C"
        elif order == "A":
            order = "F"
        new = empty_like(self, order=order)
        if new._strides == self._strides and self.flags.forc:
            new.data.copy_from_device_async(self.data, self.nbytes)
        elif new.data.device_id != self.data.device_id:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        else:
            self._kernel()
            new._host()[...] = self._host()
        return new

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        if np.dtype(dtype) == self.dtype:
            return self.copy(order) if copy else self
        self._kernel()
        with np.errstate(all="ignore"):
            return _from_host(self._host().astype(dtype, order))

    def fill(self, value):
        if isinstance(value, np.ndarray) and value.shape != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        if value == 0 and self.flags.c_contiguous:
            self.data.memset_async(0, self.nbytes)
        else:
            self._kernel()
            self._host()[...] = value

    def _assign(self, value):
        if isinstance(value, np.ndarray):
            self.fill(value)
            return
        self._kernel()
        self._host()[...] = _operand(value)

    def item(self):
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return self._shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        if self.size > 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. Use a.any() or a.all()"
            )
        return bool(self.get())

    # --- NumPy's functions, and what they share with CuPy's -----------------------------------------------------------

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """Do what CuPy's function of that name does: with arrays of its own and numbers, not with NumPy's arrays."""
        if method != "__call__" or kwargs or ufunc.nout != 1:
            return NotImplemented
        return _apply(ufunc, *inputs)

    def take(self, indices, axis=None):
        return _apply(lambda array, where: array.take(where, axis), self, indices)

    # --- Work of CuPy's kernels ---------------------------------------------------------------------------------------

    def _kernel(self):
        """Checks what CuPy checks before a kernel: the device is the current one."""
        if self.data.device_id != runtime.getDevice():
            raise ValueError(
                f"Array device must be same as the current device: array device = {self.data.device_id} while current "
                f"= {runtime.getDevice()}"
            )
        stream = get_current_stream()
        if stream.is_capturing():
            raise NotImplementedError(_UNRECORDED)
        # An error of a stream that was destroyed shows as it does at a launch.
        runtime.memsetAsync(0, 0, 0, stream.ptr)


def _operand(value):
    if isinstance(value, ndarray):
        value._kernel()
        return value._host()
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def _apply(function, *operands):
    """A new array of what NumPy makes of the memory of the operands."""
    hosts = [_operand(operand) for operand in operands]
    with np.errstate(all="ignore"):
        return _from_host(np.asarray(function(*hosts)))


def exp(a):
    return _apply(np.exp, a)


def log(a):
    return _apply(np.log, a)


def sqrt(a):
    return _apply(np.sqrt, a)


def maximum(a, b):
    return _apply(np.maximum, a, b)


def where(condition, a, b):
    return _apply(np.where, condition, a, b)


def _define_operators():
    def infix(function):
        def method(self, other):
            self._kernel()
            with np.errstate(all="ignore"):
                return _from_host(np.asarray(function(self._host(), _operand(other))))

        return method

    def reflected(function):
        def method(self, other):
            self._kernel()
            with np.errstate(all="ignore"):
                return _from_host(np.asarray(function(_operand(other), self._host())))

        return method

    def in_place(function):
        def method(self, other):
            self._kernel()
            with np.errstate(all="ignore"):
                function(self._host(), _operand(other))
            return self

        return method

    def prefix(function):
        def method(self):
            self._kernel()
            return _from_host(np.asarray(function(self._host())))

        return method

    def reduction(name):
        def method(self, axis=None, keepdims=False):
            return _apply(lambda array: getattr(array, name)(axis=axis, keepdims=keepdims), self)

        return method

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
        dunder = f"__{name}__"
        setattr(ndarray, dunder, infix(getattr(operator, dunder)))
        setattr(ndarray, f"__r{name}__", reflected(getattr(operator, dunder)))
        setattr(ndarray, f"__i{name}__", in_place(getattr(operator, f"__i{name}__")))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(ndarray, f"__{name}__", infix(getattr(operator, name)))
    for name in ("neg", "abs", "invert"):
        setattr(ndarray, f"__{name}__", prefix(getattr(operator, name)))
    for name in ("sum", "max", "min", "mean", "any", "all", "argmax"):
        setattr(ndarray, name, reduction(name))


_define_operators()


# --- New arrays -------------------------------------------------------------------------------------------------------


def _from_host(host):
    """A copy on the current device, in the layout of `host`: C or Fortran order."""
    order = "F" if host.flags.f_contiguous and not host.flags.c_contiguous else "C"
    new = ndarray(host.shape, host.dtype, order=order)
    _must_not_capture(get_current_stream(), _SYNCHRONOUS)
    new._host()[...] = host
    return new


def _from_interface(given, interface):
    address = interface["data"][0]
    shape, dtype, strides = tuple(interface["shape"]), np.dtype(interface["typestr"]), interface.get("strides")
    strides = _contiguous_strides(shape, dtype.itemsize, "C") if strides is None else tuple(strides)
    reach = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + dtype.itemsize
    if 0 in shape:
        return ndarray(shape, dtype)
    mem = memory.UnownedMemory(address + low, high - low, given)
    return ndarray(shape, dtype, memory.MemoryPointer(mem, -low), strides)


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if subok or ndmin:
        raise NotImplementedError("the host's stand-in for CuPy has neither subok nor ndmin")
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        obj = _from_interface(obj, obj.__cuda_array_interface__)
    if isinstance(obj, ndarray):
        layout = {"K": True, None: True, "A": obj.flags.forc, "C": obj.flags.c_contiguous, "F": obj.flags.f_contiguous}
        same = (dtype is None or np.dtype(dtype) == obj.dtype) and layout[order]
        same = same and obj.data.device_id == runtime.getDevice()
        if same and not copy:
            return obj
        if copy is False:
            raise ValueError("Unable to avoid copy while creating an array as requested.")
        return obj.copy(order or "K") if dtype is None else obj.astype(dtype, order or "K")
    if copy is False:
        raise ValueError("Unable to avoid copy while creating an array as requested.")
    return _from_host(np.array(obj, dtype, order=order))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return array(a, dtype, copy, order or "K", blocking=blocking)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a, order=order)


def ascontiguousarray(a, dtype=None):
    return asarray(a, dtype, "C")


def asfortranarray(a, dtype=None):
    return asarray(a, dtype, "F")


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def zeros(shape, dtype=float, order="C"):
    new = ndarray(shape, dtype, order=order)
    new.data.memset_async(0, new.nbytes)
    return new


def full(shape, fill_value, dtype=None, order="C"):
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.array(fill_value).dtype
    new = ndarray(shape, dtype, order=order)
    new._assign(fill_value)
    return new


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def empty_like(a, dtype=None, order="K", subok=None, shape=None):
    dtype = a.dtype if dtype is None else np.dtype(dtype)
    model = np.empty_like(a._host(), dtype, order, shape=shape)
    return ndarray(model.shape, dtype, memory.alloc(model.nbytes), model.strides)


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    new = empty_like(a, dtype, order, subok, shape)
    new.data.memset_async(0, new.nbytes)
    return new


def arange(*args, dtype=None):
    return _from_host(np.arange(*args, dtype=dtype))


def broadcast_to(a, shape):
    host = a._host()
    return a._like(host, np.broadcast_to(host, shape))


def moveaxis(a, source, destination):
    host = a._host()
    return a._like(host, np.moveaxis(host, source, destination))


def get_array_module(*args):
    return __import__("cupy") if any(isinstance(a, ndarray) for a in args) else np


def get_default_memory_pool():
    return memory._pool

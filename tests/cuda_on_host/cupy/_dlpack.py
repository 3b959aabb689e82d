"""DLPack capsules of arrays."""

import ctypes

_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
# The destructor's object is on its way out: it is passed as an address.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))

_names = {False: ctypes.c_char_p(b"dltensor"), True: ctypes.c_char_p(b"dltensor_versioned")}
_codes = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_copied = 2


class _Tensor(ctypes.Structure):
    _fields_ = [
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
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_alive = {}  # address of a managed tensor -> what it needs


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address):
    _alive.pop(address, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _end_of_capsule(capsule):
    for name in _names.values():
        if _is_valid(capsule, name.value):  # not renamed: nobody took the tensor over
            _delete(_get_pointer(capsule, name.value))


def export(array, versioned, copied):
    if array.dtype.name == "bfloat16":
        code = 4
    elif array.dtype.kind in _codes and array.dtype.isnative:
        code = _codes[array.dtype.kind]
    else:
        raise BufferError("dtype is not supported for dlpack export")
    managed = _Versioned() if versioned else _Managed()
    numbers = (ctypes.c_int64 * max(2 * array.ndim, 1))()
    numbers[: array.ndim] = array.shape
    numbers[array.ndim : 2 * array.ndim] = [stride // array.itemsize for stride in array.strides]
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id = array.data.ptr, 2, array.data.device_id
    tensor.ndim, tensor.code, tensor.bits, tensor.lanes = array.ndim, code, 8 * array.itemsize, 1
    tensor.shape = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(ctypes.addressof(numbers) + 8 * array.ndim, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(_delete, ctypes.c_void_p).value
    if versioned:
        managed.major, managed.minor, managed.flags = 1, 0, _copied if copied else 0
    address = ctypes.addressof(managed)
    _alive[address] = (managed, numbers, array)
    return _python.PyCapsule_New(address, _names[versioned], ctypes.cast(_end_of_capsule, ctypes.c_void_p))

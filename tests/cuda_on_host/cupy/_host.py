"""The library of the CUDA runtime on the host, which ONEPASS_CUDA_ON_HOST names."""

import ctypes
import os

try:
    _path = os.environ["ONEPASS_CUDA_ON_HOST"]
except KeyError:
    raise ImportError("ONEPASS_CUDA_ON_HOST must name libcuda_on_host.so: this CuPy stands on it") from None

library = ctypes.CDLL(_path)

_handle, _size, _int, _unsigned = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_out = ctypes.POINTER

for _name, _arguments in {
    "cudaGetDeviceCount": [_out(_int)],
    "cudaGetDevice": [_out(_int)],
    "cudaSetDevice": [_int],
    "cudaDeviceGetAttribute": [_out(_int), _int, _int],
    "cudaDeviceSynchronize": [],
    "cudaDriverGetVersion": [_out(_int)],
    "cudaRuntimeGetVersion": [_out(_int)],
    "cudaGetLastError": [],
    "cudaStreamCreateWithFlags": [_out(_handle), _unsigned],
    "cudaStreamDestroy": [_handle],
    "cudaStreamSynchronize": [_handle],
    "cudaStreamQuery": [_handle],
    "cudaStreamWaitEvent": [_handle, _handle, _unsigned],
    "cudaStreamIsCapturing": [_handle, _out(_int)],
    "cudaStreamBeginCapture": [_handle, _int],
    "cudaStreamEndCapture": [_handle, _out(_handle)],
    "cudaGraphInstantiate": [_out(_handle), _handle, ctypes.c_ulonglong],
    "cudaGraphLaunch": [_handle, _handle],
    "cudaGraphDestroy": [_handle],
    "cudaGraphExecDestroy": [_handle],
    "cudaEventCreateWithFlags": [_out(_handle), _unsigned],
    "cudaEventRecord": [_handle, _handle],
    "cudaEventSynchronize": [_handle],
    "cudaEventQuery": [_handle],
    "cudaEventDestroy": [_handle],
    "cudaMemcpyAsync": [_handle, _handle, _size, _int, _handle],
    "cudaMemcpyPeerAsync": [_handle, _int, _handle, _int, _size, _handle],
    "cudaMemsetAsync": [_handle, _int, _size, _handle],
    "cudaMalloc": [_out(_handle), _size],
    "cudaFree": [_handle],
    "cudaHostAlloc": [_out(_handle), _size, _unsigned],
    "cudaFreeHost": [_handle],
    "cudaMemGetInfo": [_out(_size), _out(_size)],
}.items():
    getattr(library, _name).argtypes = _arguments

library.cudaGetErrorName.argtypes = library.cudaGetErrorString.argtypes = [_int]
library.cudaGetErrorName.restype = library.cudaGetErrorString.restype = ctypes.c_char_p


class PointerAttributes(ctypes.Structure):
    _fields_ = [("type", _int), ("device", _int), ("devicePointer", _handle), ("hostPointer", _handle)]


class LaunchInfo(ctypes.Structure):
    """One launch, as onepass_host_launch() tells it."""

    _fields_ = [
        *((name, ctypes.c_ulonglong * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_ulonglong) for name in ("shared_bytes", "parameter_bytes", "device", "stream", "captured")),
    ]


library.cudaPointerGetAttributes.argtypes = [_out(PointerAttributes), _handle]
library.onepass_host_fail.argtypes = [ctypes.c_char_p, _int, _int]
library.onepass_host_calls.argtypes = [ctypes.c_char_p]
library.onepass_host_calls.restype = ctypes.c_ulonglong
library.onepass_host_launches.argtypes = [_out(ctypes.c_ulonglong)]
library.onepass_host_launches.restype = ctypes.c_ulonglong
library.onepass_host_launch.argtypes = [ctypes.c_ulonglong, _out(LaunchInfo)]
library.onepass_host_launch.restype = ctypes.c_bool
library.onepass_host_runs.restype = ctypes.c_ulonglong
library.onepass_host_pretend.argtypes = [ctypes.c_bool]
library.onepass_host_set_devices.argtypes = library.onepass_host_set_driver.argtypes = [_int]
library.onepass_host_set_compute_capability.argtypes = [_int, _int]
library.onepass_host_order.argtypes = [_int, _int, ctypes.c_ulonglong]
library.onepass_host_poison.argtypes = [_handle]
library.onepass_host_allocated.restype = ctypes.c_ulonglong
for _name in ("fail", "set_devices", "set_driver", "set_compute_capability", "order", "poison", "reset", "verify"):
    getattr(library, "onepass_host_" + _name).restype = None

"""The runtime's functions, with CuPy's names, arguments and errors."""
# ruff: noqa: N802, N816

import ctypes

from .._host import PointerAttributes, library

streamCaptureModeGlobal = 0
streamCaptureModeThreadLocal = 1
streamCaptureModeRelaxed = 2
streamLegacy = 1
streamPerThread = 2
streamDefault = 0
streamNonBlocking = 1
eventBlockingSync = 1
eventDisableTiming = 2
memcpyHostToDevice = 1
memcpyDeviceToHost = 2
memcpyDeviceToDevice = 3
memoryTypeDevice = 2


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        name, text = library.cudaGetErrorName(status).decode(), library.cudaGetErrorString(status).decode()
        super().__init__(f"{name}: {text}")

    def __reduce__(self):
        return type(self), (self.status,)


def _call(name, *arguments):
    status = getattr(library, name)(*arguments)
    if status != 0:
        library.cudaGetLastError()
        raise CUDARuntimeError(status)


def _int(name, *arguments):
    value = ctypes.c_int()
    _call(name, ctypes.byref(value), *arguments)
    return value.value


def _handle(name, *arguments):
    """The handle that a function writes through its last argument but for those of `arguments`."""
    value = ctypes.c_void_p()
    _call(name, ctypes.byref(value), *arguments)
    return value.value or 0


def getDeviceCount():
    return _int("cudaGetDeviceCount")


def getDevice():
    return _int("cudaGetDevice")


def setDevice(device):
    _call("cudaSetDevice", device)


def deviceGetAttribute(attribute, device):
    return _int("cudaDeviceGetAttribute", attribute, device)


def deviceSynchronize():
    _call("cudaDeviceSynchronize")


def driverGetVersion():
    return _int("cudaDriverGetVersion")


def runtimeGetVersion():
    return _int("cudaRuntimeGetVersion")


def streamCreateWithFlags(flags):
    return _handle("cudaStreamCreateWithFlags", flags)


def streamDestroy(stream):
    _call("cudaStreamDestroy", stream)


def streamSynchronize(stream):
    _call("cudaStreamSynchronize", stream)


def streamWaitEvent(stream, event, flags=0):
    _call("cudaStreamWaitEvent", stream, event, flags)


def streamIsCapturing(stream):
    status = ctypes.c_int()
    _call("cudaStreamIsCapturing", stream, ctypes.byref(status))
    return status.value == 1


def streamBeginCapture(stream, mode=streamCaptureModeRelaxed):
    _call("cudaStreamBeginCapture", stream, mode)


def streamEndCapture(stream):
    graph = ctypes.c_void_p()
    _call("cudaStreamEndCapture", stream, ctypes.byref(graph))
    return graph.value


def graphInstantiate(graph):
    return _handle("cudaGraphInstantiate", graph, 0)


def graphLaunch(executable, stream):
    _call("cudaGraphLaunch", executable, stream)


def graphDestroy(graph):
    _call("cudaGraphDestroy", graph)


def graphExecDestroy(executable):
    _call("cudaGraphExecDestroy", executable)


def eventCreateWithFlags(flags):
    return _handle("cudaEventCreateWithFlags", flags)


def eventRecord(event, stream):
    _call("cudaEventRecord", event, stream)


def eventSynchronize(event):
    _call("cudaEventSynchronize", event)


def eventDestroy(event):
    _call("cudaEventDestroy", event)


def malloc(size):
    return _handle("cudaMalloc", size)


def free(pointer):
    _call("cudaFree", pointer)


def hostAlloc(size, flags):
    return _handle("cudaHostAlloc", size, flags)


def freeHost(pointer):
    _call("cudaFreeHost", pointer)


def memcpyAsync(to, source, size, kind, stream):
    _call("cudaMemcpyAsync", to, source, size, kind, stream)


def memcpyPeerAsync(to, to_device, source, source_device, size, stream):
    _call("cudaMemcpyPeerAsync", to, to_device, source, source_device, size, stream)


def memsetAsync(to, value, size, stream):
    _call("cudaMemsetAsync", to, value, size, stream)


def memGetInfo():
    free_bytes, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cudaMemGetInfo", ctypes.byref(free_bytes), ctypes.byref(total))
    return free_bytes.value, total.value


def pointerGetAttributes(pointer):
    attributes = PointerAttributes()
    _call("cudaPointerGetAttributes", ctypes.byref(attributes), pointer)
    return attributes

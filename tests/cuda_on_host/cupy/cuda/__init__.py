"""What tests use of cupy.cuda."""

from . import device, memory, runtime, stream
from .device import Device
from .memory import Memory, MemoryPointer, MemoryPool, UnownedMemory, alloc, alloc_pinned_memory
from .stream import Event, ExternalStream, Graph, Stream, get_current_stream

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "Graph",
    "Memory",
    "MemoryPointer",
    "MemoryPool",
    "Stream",
    "UnownedMemory",
    "alloc",
    "alloc_pinned_memory",
    "device",
    "get_current_stream",
    "is_available",
    "memory",
    "runtime",
    "stream",
]


def is_available():
    try:
        return runtime.getDeviceCount() > 0
    except runtime.CUDARuntimeError:
        return False

"""Memory, and the pool that arrays take theirs from.

CuPy's pool gives memory that came back to the next who asks. This one lets it rest, overwritten, until 64 MiB rest: a
kernel that still reads it reads NaN, one that writes to it is found out. Every array asks the runtime for its memory,
so that a failure can be ordered for any of them; nothing is tried twice.
"""

import collections
import ctypes
import sys
import threading

import numpy as np

from .._host import library
from . import runtime
from .device import Device
from .stream import get_current_stream


class OutOfMemoryError(MemoryError):
    def __init__(self, size, total, limit=0):
        limited = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{limited}).")


class BaseMemory:
    def __init__(self, ptr, size, device_id):
        self.ptr, self.size, self.device_id = ptr, size, device_id

    def __int__(self):
        return self.ptr

    @property
    def device(self):
        return Device(self.device_id)


class UnownedMemory(BaseMemory):
    """Memory that somebody else frees; it lives as long as its owner, which is held."""

    def __init__(self, ptr, size, owner, device_id=-1):
        super().__init__(ptr, size, runtime.pointerGetAttributes(ptr).device if device_id == -1 else device_id)
        self._owner = owner


class Memory(BaseMemory):
    """Memory straight from the runtime, on the current device."""

    def __init__(self, size):
        super().__init__(0, size, runtime.getDevice())
        if size > 0:
            self.ptr = runtime.malloc(size)

    def __del__(self):
        if getattr(self, "ptr", 0) and not sys.is_finalizing():
            runtime.free(self.ptr)


class PooledMemory(BaseMemory):
    def __init__(self, memory, pool):
        super().__init__(memory.ptr, memory.size, memory.device_id)
        self._pool = pool
        memory.ptr = 0  # one owner: in a cycle the collector finalizes both, in any order

    def __del__(self):
        if not sys.is_finalizing():
            memory = Memory.__new__(Memory)
            BaseMemory.__init__(memory, self.ptr, self.size, self.device_id)
            self._pool._take_back(memory)


class MemoryPointer:
    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset

    def __int__(self):
        return self.ptr

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def __repr__(self):
        return f"<MemoryPointer 0x{self.ptr:x} device={self.device_id} mem={self.mem!r}>"

    @property
    def device_id(self):
        return self.mem.device_id

    @property
    def device(self):
        return self.mem.device

    def memset_async(self, value, size, stream=None):
        if size > 0:
            runtime.memsetAsync(self.ptr, value, size, (stream or get_current_stream()).ptr)

    def copy_from_device_async(self, source, size, stream=None):
        if size == 0:
            return
        stream = (stream or get_current_stream()).ptr
        if source.device_id == self.device_id:
            runtime.memcpyAsync(self.ptr, source.ptr, size, runtime.memcpyDeviceToDevice, stream)
        else:
            runtime.memcpyPeerAsync(self.ptr, self.device_id, source.ptr, source.device_id, size, stream)


class MemoryPool:
    resting_limit = 64 << 20

    def __init__(self):
        self._lock = threading.RLock()
        self._used = self._resting_bytes = 0
        self._resting = collections.deque()

    def malloc(self, size):
        if size == 0:
            return MemoryPointer(Memory(0), 0)
        try:
            memory = Memory(size)
        except runtime.CUDARuntimeError as error:
            if error.status != 2:
                raise
            raise OutOfMemoryError(size, self.total_bytes()) from None
        with self._lock:
            self._used += size
        return MemoryPointer(PooledMemory(memory, self), 0)

    def _take_back(self, memory):
        library.onepass_host_poison(memory.ptr)
        with self._lock:
            self._used -= memory.size
            self._resting_bytes += memory.size
            self._resting.append(memory)
        self._free(self.resting_limit)

    def _free(self, limit):
        while True:
            with self._lock:
                if self._resting_bytes <= limit:
                    return
                memory = self._resting.popleft()
                self._resting_bytes -= memory.size
            if np.any(np.frombuffer((ctypes.c_ubyte * memory.size).from_address(memory.ptr), np.uint8) != 0xFF):
                raise RuntimeError(f"{memory.size} bytes on device {memory.device_id} were written to after their end")

    def free_all_blocks(self):
        self._free(0)

    def n_free_blocks(self):
        return len(self._resting)

    def used_bytes(self):
        return self._used

    def free_bytes(self):
        return self._resting_bytes

    def total_bytes(self):
        return self._used + self._resting_bytes


_pool = MemoryPool()


def alloc(size):
    return _pool.malloc(size)


class PinnedMemory:
    def __init__(self, size):
        self.size = size
        self.ptr = runtime.hostAlloc(size, 1)

    def __del__(self):
        if getattr(self, "ptr", 0) and not sys.is_finalizing():
            runtime.freeHost(self.ptr)


def alloc_pinned_memory(size):
    """Host memory with the buffer protocol, `.ptr` and `.mem`."""
    mem = PinnedMemory(max(size, 1))
    pointer = type("PinnedMemoryPointer", (ctypes.c_ubyte * size,), {}).from_address(mem.ptr)
    pointer.mem, pointer.ptr = mem, mem.ptr
    return pointer

"""Devices."""

import threading

from . import runtime

_local = threading.local()


class Device:
    """A device by its number; as a context manager, the current one of this thread."""

    def __init__(self, device=None):
        self.id = runtime.getDevice() if device is None else int(device)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return self.id

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def __enter__(self):
        before = runtime.getDevice()
        runtime.setDevice(self.id)
        _local.__dict__.setdefault("before", []).append(before)
        return self

    def __exit__(self, *_):
        runtime.setDevice(_local.before.pop())

    def use(self):
        runtime.setDevice(self.id)
        return self

    def synchronize(self):
        with self:
            runtime.deviceSynchronize()

    @property
    def compute_capability(self):
        return "".join(str(runtime.deviceGetAttribute(attribute, self.id)) for attribute in (75, 76))

    @property
    def mem_info(self):
        with self:
            return runtime.memGetInfo()

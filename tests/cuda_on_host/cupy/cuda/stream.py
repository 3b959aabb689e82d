"""Streams, events and graphs. The current stream is one for each device and thread."""

import threading

from . import runtime


class _Current(threading.local):
    def __init__(self):
        self.streams = {}  # device -> current stream
        self.entered = []  # (device, the stream before)


_current = _Current()


def get_current_stream(device_id=-1):
    device = runtime.getDevice() if device_id == -1 else device_id
    return _current.streams.get(device, Stream.null)


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        if interprocess:
            raise NotImplementedError("the host's stand-in for CuPy has no events of several processes")
        self.ptr = 0
        self.ptr = runtime.eventCreateWithFlags(block * runtime.eventBlockingSync + disable_timing * 2)

    def __del__(self):
        if self.ptr:
            runtime.eventDestroy(self.ptr)

    def record(self, stream=None):
        runtime.eventRecord(self.ptr, (get_current_stream() if stream is None else stream).ptr)

    def synchronize(self):
        runtime.eventSynchronize(self.ptr)


class Graph:
    """Recorded work, made by Stream.end_capture()."""

    def __init__(self, graph):
        self.graph, self.graphExec = graph, 0
        self.graphExec = runtime.graphInstantiate(graph)

    def __del__(self):
        if self.graphExec:
            runtime.graphExecDestroy(self.graphExec)
        runtime.graphDestroy(self.graph)

    def launch(self, stream=None):
        runtime.graphLaunch(self.graphExec, (get_current_stream() if stream is None else stream).ptr)


class _BaseStream:
    def __init__(self, ptr, device_id):
        self.ptr, self.device_id = ptr, device_id

    def __eq__(self, other):
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def __repr__(self):
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    def __cuda_stream__(self):
        return 0, self.ptr

    def _device(self):
        current = runtime.getDevice()
        if self.device_id not in (-1, current):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({current})"
            )
        return current

    def __enter__(self):
        device = self._device()
        _current.entered.append((device, get_current_stream(device)))
        _current.streams[device] = self
        return self

    def __exit__(self, *_):
        device, before = _current.entered.pop()
        _current.streams[device] = before

    def use(self):
        _current.streams[self._device()] = self
        return self

    def synchronize(self):
        runtime.streamSynchronize(self.ptr)

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def begin_capture(self, mode=None):
        if self.ptr in (0, 1):
            raise RuntimeError("cannot capture on the default (legacy) stream")
        runtime.streamBeginCapture(self.ptr, runtime.streamCaptureModeRelaxed if mode is None else mode)

    def end_capture(self):
        return Graph(runtime.streamEndCapture(self.ptr))

    def is_capturing(self):
        return runtime.streamIsCapturing(self.ptr)


class Stream(_BaseStream):
    def __init__(self, null=False, non_blocking=False):
        super().__init__(0, -1)
        if not null:
            self.device_id = runtime.getDevice()
            self.ptr = runtime.streamCreateWithFlags(
                runtime.streamNonBlocking if non_blocking else runtime.streamDefault
            )

    def __del__(self):
        if self.ptr:
            runtime.streamDestroy(self.ptr)


Stream.null = Stream(null=True)


class ExternalStream(_BaseStream):
    def __init__(self, ptr, device_id=-1):
        super().__init__(ptr, device_id)

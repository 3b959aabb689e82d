"""Arrays on the host and on CUDA devices, where Python code has to tell them apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from onepass import _cpu


def use_cuda() -> None:
    """Hand the CUDA kernels to the bindings, if this build has any. Touches no device and no driver."""
    try:
        from onepass import _cuda
    except ImportError:
        return
    if _cuda.__version__ != _cpu.__version__:
        raise ImportError(
            f"onepass._cuda is of version {_cuda.__version__}, and onepass._cpu of {_cpu.__version__}; "
            f"install onepass anew"
        )
    _cpu.use_backend(_cuda.backend)


def on_device(array: Any) -> bool:
    """Whether it is an array of CuPy's."""
    return not isinstance(array, np.ndarray) and _cpu.is_cupy_array(array)


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy's or CuPy's."""
    return isinstance(value, np.ndarray) or _cpu.is_cupy_array(value)


def to_host(array: Any) -> Any:
    """`array`, or a NumPy array like it, for one on a device; that waits for the current stream."""
    return _cpu.to_host(array) if on_device(array) else array


def like(array: Any, value: Any) -> Any:
    """A NumPy array where `array` is: as it is, or as a new CuPy array on its device."""
    if not on_device(array):
        return value
    copied = _cpu.state_like(array, 0.0, value.dtype)
    _cpu.overwrite(copied, value)
    return copied


def cuda_report() -> str:
    """What ``python -m onepass`` says of CUDA: devices, or why there are none, and the architectures built in."""
    architectures = _cpu.cuda_architectures()
    if architectures is None:
        return "not built"
    try:
        devices = _cpu.cuda_devices()
    except RuntimeError as error:
        found = str(error)
    else:
        found = ", ".join(
            f"{index}: {name} (sm_{major}{minor}, {memory / 1e9:.0f} GB)"
            for index, (name, (major, minor), memory) in enumerate(devices)
        )
    return f"{found or 'no device'}; built for {architectures}"

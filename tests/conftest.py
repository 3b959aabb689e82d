from __future__ import annotations

import pytest

import onepass
from onepass import _cpu


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test marked `cuda` runs where there is a device, and says elsewhere what is missing."""
    if item.get_closest_marker("cuda") is not None:
        import cuda_arrays  # imports CuPy, for which other tests have no use

        reason = cuda_arrays.why_not()
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _same_machine_after_each_test(request):
    """Whatever a test chose, the next one finds the machine as it is."""
    isa, serial_bytes = onepass.isa(), _cpu.serial_bytes()
    yield
    _cpu.set_serial_bytes(serial_bytes)
    _cpu.set_cache_sizes(0, 0)
    onepass.set_isa(isa)
    onepass.set_num_threads(None)
    if request.node.get_closest_marker("cuda") is not None:
        import cuda_arrays

        if cuda_arrays.ON_HOST:
            cuda_arrays.host_runtime().reset()
            cuda_arrays.host_runtime().verify()
            cuda_arrays.cp.get_default_memory_pool().free_all_blocks()  # finds out who wrote to what had been freed

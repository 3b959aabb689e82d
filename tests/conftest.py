from __future__ import annotations

import pytest

import onepass
from onepass import _cpu


@pytest.fixture(autouse=True)
def _same_machine_after_each_test():
    """Whatever a test chose, the next one finds the machine as it is."""
    isa, serial_bytes = onepass.isa(), _cpu.serial_bytes()
    yield
    _cpu.set_serial_bytes(serial_bytes)
    _cpu.set_cache_sizes(0, 0)
    onepass.set_isa(isa)
    onepass.set_num_threads(None)

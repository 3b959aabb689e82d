from __future__ import annotations

import pytest

import onepass


@pytest.fixture(autouse=True)
def _same_machine_after_each_test():
    """Whatever a test chose, the next one finds the instruction set and the thread count as they were."""
    isa = onepass.isa()
    yield
    onepass.set_isa(isa)
    onepass.set_num_threads(None)

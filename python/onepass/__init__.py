"""Every neural-network update rule in one pass over memory, in place, with the same bits on every instruction set."""

from __future__ import annotations

import os as _os

from onepass import _cpu, functional, schedules
from onepass.isa import available_isas, isa, set_isa
from onepass.optim import (
    NAG,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    AdaSqrt,
    AMSGrad,
    Momentum,
    Nadam,
    Optimizer,
    ParamGroup,
    RMSprop,
)
from onepass.threads import get_num_threads, set_num_threads

__version__ = _cpu.__version__

__all__ = [
    "NAG",
    "SGD",
    "AMSGrad",
    "AdaGrad",
    "AdaSqrt",
    "Adam",
    "AdamW",
    "Momentum",
    "Nadam",
    "Optimizer",
    "ParamGroup",
    "RMSprop",
    "__version__",
    "available_isas",
    "functional",
    "get_num_threads",
    "isa",
    "schedules",
    "set_isa",
    "set_num_threads",
]


def _read_environment() -> None:
    name = _os.environ.get("ONEPASS_ISA")
    if name is not None:
        try:
            _cpu.set_isa(name)
        except ValueError as error:
            raise ImportError(f"ONEPASS_ISA: {error}") from None
    count = _os.environ.get("ONEPASS_NUM_THREADS")
    if count is not None:
        try:
            set_num_threads(int(count))
        except ValueError:
            raise ImportError(f"ONEPASS_NUM_THREADS: expected an integer from 1 to 1024, got {count!r}") from None


_read_environment()

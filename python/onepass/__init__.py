"""Every neural-network update rule in one pass over memory, in place, with the same bits on every instruction set."""

from __future__ import annotations

from onepass import _cpu, functional, schedules
from onepass.isa import available_isas, isa, set_isa
from onepass.isa import read_environment as _read_isa
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
from onepass.threads import read_environment as _read_threads

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

_read_isa()
_read_threads()

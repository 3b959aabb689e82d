"""Every neural-network update rule in one pass over memory, in place, with the same bits on every instruction set."""

from __future__ import annotations

from onepass import _cpu, functional, schedules
from onepass.batchnorm import BatchNorm, empty_cache, get_cache_limit, set_cache_limit
from onepass.checkpoint import load, save
from onepass.devices import use_cuda as _use_cuda
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
    "BatchNorm",
    "Momentum",
    "Nadam",
    "Optimizer",
    "ParamGroup",
    "RMSprop",
    "__version__",
    "available_isas",
    "empty_cache",
    "functional",
    "get_cache_limit",
    "get_num_threads",
    "isa",
    "load",
    "save",
    "schedules",
    "set_cache_limit",
    "set_isa",
    "set_num_threads",
]

_use_cuda()
_read_isa()
_read_threads()

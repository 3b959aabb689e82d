"""What counts as a whole number."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether it is an integer: no truth value, and no span of time, which NumPy derives from its integers."""
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_, np.timedelta64))

"""How many threads a large step uses. However many, results are the same, bit for bit."""

from __future__ import annotations

import os

from onepass import _cpu
from onepass.integers import integer

_default = 0  # for _cpu: as many as there are CPUs to use


def get_num_threads() -> int:
    """The number of threads that a step of more than about 4 MB of memory traffic uses, the calling one included.

    By default that is the value of the environment variable ``ONEPASS_NUM_THREADS`` at import, or else the number of
    CPUs that the process may use: its affinity mask, asked anew at each step, capped by its cgroup's quota.
    """
    return _cpu.get_num_threads()


def set_num_threads(count: int | None) -> None:
    """Set the number of threads, for all optimizers and callers; ``None`` goes back to the default.

    Parameters
    ----------
    count : int or None
        From 1 to 1024. More threads than CPUs are allowed and seldom useful.

    Raises
    ------
    TypeError, ValueError
        If `count` is not such a number. Nothing has changed then.

    Examples
    --------
    >>> import onepass
    >>> onepass.set_num_threads(1)
    >>> onepass.get_num_threads()
    1
    >>> onepass.set_num_threads(None)
    """
    need = "an integer from 1 to 1024 or None"
    _cpu.set_num_threads(_default if count is None else integer(count, "count", 1, 1024, need))


def read_environment() -> None:
    """Take the default from ``ONEPASS_NUM_THREADS``; called once, at import."""
    global _default
    text = os.environ.get("ONEPASS_NUM_THREADS", "")
    if text:
        if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 1024):
            raise ImportError(f"ONEPASS_NUM_THREADS: expected an integer from 1 to 1024, got {text!r}")
        set_num_threads(int(text))
        _default = int(text)

"""How many threads a large step uses. However many, results are the same, bit for bit."""

from __future__ import annotations

from onepass import _cpu


def get_num_threads() -> int:
    """The number of threads that a step of more than about a megabyte uses, the calling one included.

    By default that is the number of CPUs that the process may use (its affinity mask and cgroup quota, asked anew at
    each step), or the value of the environment variable ``ONEPASS_NUM_THREADS`` at import.
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
    if count is None:
        _cpu.set_num_threads(0)
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: expected an integer from 1 to 1024 or None, got {count!r}")
    if not 1 <= count <= 1024:
        raise ValueError(f"count: expected an integer from 1 to 1024 or None, got {count!r}")
    _cpu.set_num_threads(count)

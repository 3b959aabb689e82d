"""Which instruction set the kernels run on. Whichever it is, results are the same, bit for bit."""

from __future__ import annotations

import os

from onepass import _cpu


def read_environment() -> None:
    """Use the instruction set that ``ONEPASS_ISA`` names, if it is set and not empty; called once, at import."""
    name = os.environ.get("ONEPASS_ISA", "")
    if name:
        try:
            _cpu.set_isa(name)
        except ValueError as error:
            raise ImportError(f"ONEPASS_ISA: {error}") from None


def isa() -> str:
    """The instruction set in use: ``"scalar"``, ``"avx2"`` or ``"avx512"``.

    It is the best that the CPU and the operating system offer, unless the environment variable ``ONEPASS_ISA`` named
    another at import or :func:`set_isa` did since.
    """
    return _cpu.isa()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this build holds and this machine can run, the slowest first.

    >>> import onepass
    >>> "scalar" in onepass.available_isas()
    True
    """
    return tuple(_cpu.available_isas())


def set_isa(name: str) -> None:
    """Use another instruction set from the next step on, in all threads.

    Parameters
    ----------
    name : str
        One of :func:`available_isas`.

    Raises
    ------
    TypeError, ValueError
        If `name` is not one of them; the message lists them. Nothing has changed then.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    try:
        _cpu.set_isa(name)
    except ValueError as error:
        raise ValueError(f"name: {error}") from None

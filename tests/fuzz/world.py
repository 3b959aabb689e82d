"""What scenes share: what they tell of themselves, the settings of the process, and arrays of any values and layout."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

import onepass
from fuzz.choices import Choices
from helpers import bits, guarded
from onepass import _cpu


class FindingError(AssertionError):
    """The library did what it must not do."""


def require(condition: bool, message: str) -> None:
    """`assert` that no option of the interpreter removes."""
    if not condition:
        raise FindingError(message)


class Story:
    """What an input turned out to be: lines for whoever replays it, and names of what it met for the statistics."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.met: Counter[str] = Counter()

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def meet(self, *names: str) -> None:
        self.met.update(names)


class Machine:
    """The settings of the process that no result may depend on. A scene may choose them if it has it for itself."""

    def __init__(self, *, owned: bool = True) -> None:
        self.owned = owned
        self.isas = onepass.available_isas()
        self.before = onepass.isa(), _cpu.serial_bytes()

    def choose(self, c: Choices, story: Story) -> str | None:
        """The instruction set that must run from here on, if somebody knows."""
        isa, threads, parts = c.pick(self.isas), c.pick((1, 2, 3, 5, 16)), c.chance(2)
        caches = c.pick(((0, 0), (0, 0), (0, 0), (1 << 16, 1 << 18)))
        if not self.owned:
            return None
        onepass.set_isa(isa)
        onepass.set_num_threads(threads)
        _cpu.set_serial_bytes(0 if parts else self.before[1])
        _cpu.set_cache_sizes(*caches)
        story.tell(f"on {isa}, {threads} threads, caches {caches}" + (", small tensors divided too" if parts else ""))
        story.meet(isa, f"{threads} threads")
        return isa

    def restore(self) -> None:
        if self.owned:
            onepass.set_isa(self.before[0])
            onepass.set_num_threads(None)
            _cpu.set_serial_bytes(self.before[1])
            _cpu.set_cache_sizes(0, 0)


# Values

SPECIAL = (
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-40,
    -1e-310,
    2.0**-126,
    -(2.0**-1022),
    3.4e38,
    -1.7e308,
    65504.0,
)
FINITE_SPECIAL = tuple(value for value in SPECIAL if math.isfinite(value))


def sprinkle(array: np.ndarray, rng: np.random.Generator, *, finite: bool = False) -> None:
    """Some elements become special values, or any bits at all."""
    count = min(array.size, int(rng.integers(1, 9)))
    places = rng.integers(0, max(array.size, 1), count)
    for place in places:
        where = np.unravel_index(place, array.shape)
        if finite or rng.integers(2):
            with np.errstate(all="ignore"):
                value = np.array(rng.choice(FINITE_SPECIAL if finite else SPECIAL)).astype(array.dtype)
        else:
            value = np.frombuffer(rng.bytes(array.itemsize), array.dtype)[0]
        if not finite or np.isfinite(np.float64(value)):
            array[where] = value


class Lying:
    """An array whose axes lie in some order in memory, with some steps: 0 repeats an element, 2 leaves gaps."""

    def __init__(self, shape: Any, dtype: Any, axes: Any, steps: Any, offset: int) -> None:
        big = [abs(step) * n if step else 1 for n, step in zip(shape, steps, strict=True)]
        self.memory, self.untouched = guarded(big, dtype, axes=axes, offset=offset)
        self.places = (..., *(slice(None, None, step or 1) for step in steps))
        self.view = self.memory[self.places]
        self.repeats = 0 in steps
        if self.repeats:
            strides = [0 if step == 0 else stride for step, stride in zip(steps, self.view.strides, strict=True)]
            self.view = np.lib.stride_tricks.as_strided(self.view, shape, strides)

    def keep(self) -> None:
        self.kept = self.memory.copy(order="K")

    def require_kept(self, *, but_zeros: bool, what: str) -> None:
        """Nothing was written, or zeros into the elements and nothing between them."""
        if but_zeros:
            self.kept[self.places] = 0
        require(bits(self.kept) == bits(self.memory), f"{what}: " + ("zeros" if but_zeros else "it was written"))
        require(self.untouched(), f"{what}: bytes beside its memory were written")

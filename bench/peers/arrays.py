"""Arrays that contenders work on together, and the checks that they arrive at the same numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import method
from method import Floats
from suite import CheckError, Step

PART = 1 << 20  # elements that checks can afford to make temporaries of

Array: TypeAlias = "npt.NDArray[Any]"
Storage: TypeAlias = "tuple[npt.DTypeLike, npt.DTypeLike, npt.DTypeLike]"
Shape: TypeAlias = "int | tuple[int, ...]"


@dataclass(frozen=True)
class Data:
    """Parameters, their gradients, and for each parameter a tuple of slots."""

    params: list[Array]
    grads: list[Array]
    slots: list[tuple[Array, ...]]

    @property
    def elements(self) -> int:
        """Of all parameters together."""
        return sum(param.size for param in self.params)

    @property
    def bytes(self) -> int:
        """What a step must move: gradients in, parameters and slots in and out."""
        return sum(grad.nbytes for grad in self.grads) + 2 * sum(array.nbytes for array in self.written())

    def written(self) -> Iterator[Array]:
        """Everything that a step may write."""
        yield from self.params
        for own in self.slots:
            yield from own

    def clear(self) -> None:
        """Set parameters and slots to zero."""
        for array in self.written():
            array.fill(0.0)

    def require_finite(self) -> None:
        """Raise if a NaN or an infinity is among what steps wrote."""
        if not all(np.isfinite(part).all() for array in self.written() for part in parts_of(array)):
            raise CheckError("a parameter or state is not finite after the timed steps")


def pieces_of(array: Array) -> Iterator[Array]:
    """Cut into views of a size that checks can afford to make temporaries of."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, PART):
        yield flat[start : start + PART]


def parts_of(array: Array) -> Iterator[Array]:
    """Cut into such pieces to look at: NumPy compares bfloat16 as float32."""
    for piece in pieces_of(array):
        yield piece if piece.itemsize >= 4 else piece.astype(np.float32)


def zeros(count: int, dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin at a cache line; every page of them has been touched."""
    dtype = np.dtype(dtype)
    return method.aligned(-(-count * dtype.itemsize // 4)).view(dtype)[:count]


def gradient_block(count: int) -> Floats:
    """Return numbers between 0.0005 and 0.0015, with which gradients of that size can be filled."""
    rng = np.random.default_rng(7)
    return (0.0005 + 0.001 * rng.random(min(count, PART))).astype(np.float32)


def make_data(shapes: Sequence[Shape], slots: int, storage: Storage = (np.float32,) * 3) -> Data:
    """Parameters 0, slots 0, gradients between 0.0005 and 0.0015; `storage`: the dtypes of the three."""
    param, grad, state = storage
    data = Data([], [], [])
    for shape in shapes:
        count = shape if isinstance(shape, int) else math.prod(shape)
        data.params.append(zeros(count, param).reshape(shape))
        data.grads.append(zeros(count, grad).reshape(shape))
        data.slots.append(tuple(zeros(count, state).reshape(shape) for _ in range(slots)))
    fill_gradients(data)
    return data


def fill_gradients(data: Data, check: int | None = None) -> bool:
    """Write what gradients shall be, and say whether they were something else.

    `check`: those of the steps by which formulas are checked, from 0. An element has another gradient in each, of
    another size, or every second moment were the square of the first; and another sign than its neighbour, but always
    its own, so that no parameter comes near 0.
    """
    block = gradient_block(max(grad.size for grad in data.grads))
    if check is not None:
        block = np.roll(block, 997 * check) * np.float32((1.0, 0.5, 2.0)[check])
        block[1::2] *= -1.0
    changed = False
    for grad in data.grads:
        for piece in pieces_of(grad):
            right = block[: piece.size].astype(grad.dtype, copy=False)
            if not np.array_equal(piece, right):
                piece[:] = right
                changed = True
    return changed


def kept_bytes(elements: int, slots: int) -> int:
    """Return what a contender touches in one step on float32 arrays: parameters, gradients and slots."""
    return 4 * elements * (2 + slots)


# --- Checks ----------------------------------------------------------------------------------------------------------


def require_same(data: Data, ours: Step, peers: Mapping[str, Step], tolerance: float = 1e-4) -> None:
    """Raise unless every peer's first three steps from parameters 0 arrive where ours do."""
    three_steps(data, ours)
    expected = [param.copy() for param in data.params]
    require_moved(expected)
    for name, step in peers.items():
        three_steps(data, step)
        require_close(f"{name} arrives at other parameters than ours", data.params, expected, tolerance)


CHECKED_STEPS = range(3)


def three_steps(data: Data, step: Step) -> None:
    """Step from parameters 0, each time with other gradients; the usual ones are back afterwards."""
    data.clear()
    for check in CHECKED_STEPS:
        fill_gradients(data, check)
        step()
    fill_gradients(data)


def require_moved(arrays: Sequence[Array]) -> None:
    """Raise unless every element is finite and not 0."""
    if not all(np.isfinite(part).all() and np.all(part != 0.0) for array in arrays for part in parts_of(array)):
        raise CheckError("ours left a parameter where it was, or made it NaN or infinite")


def require_close(message: str, got: Sequence[Array], expected: Sequence[Array], tolerance: float) -> None:
    """Raise unless every element is right but for a share of itself."""
    for array, right in zip(got, expected, strict=True):
        if not all(np.allclose(*pair, tolerance, 0.0) for pair in zip(parts_of(array), parts_of(right), strict=True)):
            raise CheckError(message)

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

__version__: str

class RuleInfo(TypedDict):
    name: str
    slots: tuple[str, ...]
    coefficients: tuple[str, ...]
    yardstick: bool

class Updater:
    def __init__(
        self,
        groups: Sequence[str],
        recipes: Sequence[Callable[[int], tuple[dict[str, float], float, float, float, float]]],
        group_of: Sequence[int],
        params: list[Any],
        slots: Sequence[tuple[npt.NDArray[Any], ...]],
        param_names: Sequence[str],
        grad_names: Sequence[str],
    ) -> None: ...
    def check(self, grads: Sequence[Any] | None) -> None: ...
    def step(self, grads: Sequence[Any]) -> None: ...
    @property
    def counts(self) -> list[int]: ...
    @counts.setter
    def counts(self, value: Sequence[int]) -> None: ...
    @property
    def last_isa(self) -> str: ...

def update(
    rule: str,
    params: Sequence[Any],
    grads: Sequence[Any],
    slots: Sequence[Sequence[Any]],
    coefficients: dict[str, float],
    scale: float,
    l1: float,
    l2: float,
    decay: float,
    names: Sequence[str],
    single: bool = False,
) -> None: ...
def as_ndarray(param: Any, name: str) -> npt.NDArray[np.floating[Any]]: ...
def state_like(param: npt.NDArray[Any], value: float) -> npt.NDArray[Any]: ...
def registry() -> list[RuleInfo]: ...
def dtypes() -> list[str]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...

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
        group_of: Sequence[int],
        params: list[Any],
        slots: Sequence[tuple[npt.NDArray[Any], ...]],
        param_names: Sequence[str],
        grad_names: Sequence[str],
    ) -> None: ...
    def check(self, grads: Sequence[Any] | None) -> None: ...
    def step(
        self,
        grads: Sequence[Any],
        recipes: list[Callable[[int], tuple[dict[str, float], float, float, float, float]]],
    ) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...
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

class Turn:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

def batch_norm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    residual: Any,
    out: Any,
    training: bool,
    momentum: float,
    unbiased: bool,
    eps: float,
    channel_axis: int,
    relu: bool,
    layer: tuple[int, str, list[Any], Any, Any] | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.float64], str]: ...
def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    weight: Any,
    bias: Any,
    y: Any,
    out: Any,
    weight_grad: Any,
    bias_grad: Any,
    training: bool,
    channel_axis: int,
    relu: bool,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None, str]: ...
def empty_cache() -> None: ...
def cache_limit() -> int: ...
def set_cache_limit(count: int) -> None: ...
def cached_bytes() -> int: ...
def as_ndarray(param: Any, name: str) -> npt.NDArray[np.floating[Any]]: ...
def state_like(param: npt.NDArray[Any], value: float) -> npt.NDArray[Any]: ...
def registry() -> list[RuleInfo]: ...
def dtypes() -> list[str]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def serial_bytes() -> int: ...
def set_serial_bytes(count: int) -> None: ...
def set_cache_sizes(level2: int, level3: int) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...

"""What one optimizer needs beyond parameters and gradients, in a process of its own; printed as JSON.

``python bench/peers/memory.py CONTENDER STORAGE ELEMENTS``. `bench/peers/sweeps.py` calls it. A few steps over tiny
arrays come first, so that libraries and threads are there, and count for nobody; then parameters and gradients, then
the optimizer and its steps. The peak is what Linux reports of this process (``VmHWM``) beyond what it had before the
optimizer was made, so the states count, whatever a step makes and frees, and what a compiler leaves.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import contenders
from arrays import Data, Storage, make_data, zeros
from contenders import ADAM, MAKERS, NUMPY_IN_PLACE, OPTAX, MissingError
from numpy_formulas import LR

import onepass
from onepass.optim.options import bfloat16
from suite import OURS, Step

FLOAT32, BFLOAT16 = np.dtype(np.float32), bfloat16()
STORAGES: dict[str, Storage] = {
    "float32": (FLOAT32, FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16, BFLOAT16),
    "bfloat16 split": (BFLOAT16, BFLOAT16, FLOAT32),
}
TINY = 1024
STEPS = 3


def _status(key: str) -> int:
    """Return a figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _forget_peak() -> None:
    """Let the peak begin at what is used now; where that is not granted, it is the one of the tiny steps at most."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _make(name: str, storage: str, data: Data, threads: int) -> tuple[Step, Callable[[], int]]:
    """Return a step, and what counts the bytes of the states."""
    if name != OURS:
        if name == NUMPY_IN_PLACE:
            data = replace(
                data, slots=[(zeros(param.size, FLOAT32), zeros(param.size, FLOAT32)) for param in data.params]
            )
        peer = MAKERS[name](ADAM, data, threads)
        return peer.step, peer.state_bytes
    options: dict[str, Any] = {"master": "split"} if storage.endswith("split") else {}
    optimizer = onepass.Adam(data.params, lr=LR, grads=data.grads, state_dtype=STORAGES[storage][2], **options)
    states = (array for state in optimizer.state for array in state.values())
    return optimizer.step, functools.partial(sum, [array.nbytes for array in states])


def measure(name: str, storage: str, elements: int, threads: int) -> dict[str, float]:
    """Return the bytes of the states and of the peak, both for each parameter."""
    for count in (TINY, elements):
        data = make_data([count], 0, STORAGES[storage])
        gc.collect()
        before = _status("VmRSS")
        _forget_peak()
        step, state_bytes = _make(name, storage, data, threads)
        for _ in range(STEPS):
            step()
        # Optax has parameters of its own; they are not counted beyond those that it does not use.
        peak = _status("VmHWM") - before - (data.params[0].nbytes if name == OPTAX else 0)
        result = {"state_bytes": state_bytes() / count, "peak_bytes": peak / count}
        del step, state_bytes, data
    contenders.forget()
    return result


def main() -> int:
    """Print the figures, or why there are none."""
    name, storage, elements = sys.argv[1:]
    result: dict[str, Any]
    if not Path("/proc/self/status").exists():
        result = {"missing": "not measured: only Linux tells the peak of a process"}
    else:
        try:
            result = measure(name, storage, int(elements), onepass.get_num_threads())
        except MissingError as error:
            result = {"missing": str(error)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

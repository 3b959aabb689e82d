"""The whole step and narrow storage, side by side with torch, the yardstick `traffic` and ourselves: one table.

``python bench/peers/whole_step.py`` takes some minutes on two quiet cores and 3 GB of memory. ``--quick`` only shows
that everything runs: its figures mean nothing, and no goal is judged by them.

Fair play
---------
* The whole step is what a training loop does with the gradients of a scaled loss: divide the scale out, clip by the
  norm, update (AdamW), average the parameters, copy them to bfloat16, zero the gradients. In torch these are six calls,
  the fastest that it has for lists of tensors. The limit is a quarter of the norm, so that everybody clips.
* Everybody gets fresh gradients before each timed call, because the call before left zeros.
* `traffic` has the streams and options of the case it is compared with, the norm's read among them, and shares its
  arrays. The bytes of a row are those of ours; what a store reads first, to fill a cache line, is not counted.
* torch has the same parameters and gradients as ours, and states and copies of its own. Storage is compared with
  storage: each contender has arrays of its own where dtypes differ, and shares parameters and gradients where not.
* All memory comes from NumPy, which asks for huge pages, cache-line aligned and with every page touched.
* Gradients are positive and not zero, so that the moments (to which `traffic` adds gradients) stay normal and finite.
* Before the timing everybody takes three steps from parameters 0 and must arrive where ours does, but for rounding:
  1e-4 of each number in float32 (2e-3 of moments of clipped gradients, for torch's norm in float32 has no more digits),
  three units in the last place (1/256) in bfloat16, a tenth if rounding is stochastic. The master of split parameters
  must be the float32 parameter, bit for bit. After it everything must be finite.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import arrays
import contenders
import optimizers
from arrays import Array, Data, Storage
from contenders import ADAM, ADAMW, FUSED
from numpy_formulas import LR
from optimizers import TRAFFIC

import method
import onepass
import suite
from method import Goal, Row
from onepass import _cpu
from onepass.optim.options import bfloat16, step_options
from suite import OURS, Bench, Case, CheckError, Step, load_torch

__all__ = ["ADAMW", "main"]

SIZE = "16M"
ISAS = ("avx512", "avx2")

FLOAT32, BFLOAT16 = np.dtype(np.float32), bfloat16()
ALL_FLOAT32 = (FLOAT32, FLOAT32, FLOAT32)
ALL_BFLOAT16 = (BFLOAT16, BFLOAT16, BFLOAT16)
STATES_FLOAT32 = (BFLOAT16, BFLOAT16, FLOAT32)

ROUNDING = 3 / 256  # of bfloat16, in three steps
CHANCE = 0.1
NORM_ERROR = 2e-3  # torch sums squares in float32: over 16M elements its norm is off by 3e-4

EMA_DECAY = 0.999
LOSS_SCALE = 1024.0
TORCH = "torch, six calls"


def storage_name(storage: Storage) -> str:
    """Join the names of the three dtypes."""
    return "-".join(np.dtype(dtype).name for dtype in storage)


# --- Contenders -------------------------------------------------------------------------------------------------------


def state_lists(optimizer: onepass.Optimizer, names: Sequence[str]) -> list[list[Array] | None]:
    """Return for each name the states of all parameters; None where they have no such state."""
    return [[state[name] for state in optimizer.state] if name in optimizer.state[0] else None for name in names]


def traffic_step(optimizer: onepass.Optimizer, data: Data, mirrors: list[Array] | None = None, **options: Any) -> Step:
    """Make a step of the yardstick over the streams of an Adam, with the same options."""
    streams = [data.params, None, *state_lists(optimizer, ("exp_avg", "exp_avg_sq")), None]
    ema, remainder, accumulator = state_lists(optimizer, ("ema", "remainder", "accumulator"))
    streams += [ema, mirrors, remainder, accumulator]
    recipe = optimizers.surrounded({"step": LR}, None if ema is None else EMA_DECAY)
    names = [f"stream {index}" for index in range(len(streams))]
    late, seed, stochastic = 2, 0, False  # not the first step, in which nobody reads the averages
    arguments = ("traffic2", data.grads, streams, recipe, late, step_options(options, "step()"), seed, stochastic)
    return functools.partial(_cpu.update, *arguments, (1, 1), names)


@dataclass(frozen=True)
class Averaged:
    """What the whole step writes beyond parameters and moments."""

    ema: Array
    mirror: Array


class Gradients:
    """Scaled gradients, which differ from step to step, and the limit to which they are clipped."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.block = np.float32(LOSS_SCALE) * arrays.gradient_block(array.size)
        self.max_norm = 0.25e-3 * float(np.sqrt(array.size))
        self.step = 0

    def refill(self) -> None:
        """Write the next step's."""
        self.step += 1
        method.fill_with(self.array, np.roll(self.block, 997 * self.step))


class TorchWholeStep:
    """The step as a sequence of torch's calls."""

    def __init__(self, torch: Any, data: Data, averaged: Averaged, max_norm: float) -> None:
        self.torch, self.max_norm = torch, max_norm
        self.optimizer = contenders.torch_optimizer(ADAMW, data, {"fused": True})
        self.params = self.optimizer.param_groups[0]["params"]
        self.grads = [param.grad for param in self.params]
        self.ema, self.mirror = ([contenders.as_tensor(torch, each)] for each in (averaged.ema, averaged.mirror))
        self.averages = False

    def step(self) -> None:
        """Unscale as a GradScaler does, clip, update, average as an AveragedModel does, copy, zero."""
        torch = self.torch
        with torch.no_grad():
            torch._foreach_mul_(self.grads, 1.0 / LOSS_SCALE)
            torch.nn.utils.clip_grad_norm_(self.params, self.max_norm)
            self.optimizer.step()
            if self.averages:
                torch._foreach_lerp_(self.ema, self.params, 1.0 - EMA_DECAY)
            else:
                torch._foreach_copy_(self.ema, self.params)
                self.averages = True
            torch._foreach_copy_(self.mirror, self.params)
            self.optimizer.zero_grad(set_to_none=False)


def our_adam(data: Data, **options: Any) -> onepass.Optimizer:
    """Make an Adam whose gradients are bound, with states of the dtype of `data`'s."""
    state_dtype = data.slots[0][0].dtype
    return onepass.Adam(data.params, lr=LR, grads=data.grads, state_dtype=state_dtype, **options)


def with_states(data: Data, optimizer: onepass.Optimizer) -> Data:
    """Return the data with everything that a step of this optimizer writes in the place of its slots."""
    return replace(data, slots=[tuple(state.values()) for state in optimizer.state])


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Let ours use another one."""
    before = onepass.isa()
    onepass.set_isa(name)
    try:
        yield
    finally:
        onepass.set_isa(before)


# --- Checks and rows --------------------------------------------------------------------------------------------------


def outcome(data: Data, averaged: Averaged, gradients: Gradients, step: Step) -> list[Array]:
    """Take three whole steps from parameters 0: copies of what they made."""
    data.clear()
    gradients.step = 0
    for _ in range(3):
        gradients.refill()
        step()
    if gradients.array.any():
        raise CheckError("a gradient is not zero after the step")
    if not np.array_equal(averaged.mirror.view(np.uint16), data.params[0].astype(BFLOAT16).view(np.uint16)):
        raise CheckError("the copy is not the rounded parameter")
    return [array.copy() for array in (*data.params, *data.slots[0], averaged.ema)]


def bytes_of(data: Data, *, norm: bool = False, zero_grads: bool = False) -> int:
    """Return what one step must move: gradients in (twice for a norm, and out as zeros), all else in and out."""
    return data.bytes + (norm + zero_grads) * sum(grad.nbytes for grad in data.grads)


def new_row(case: Case, data: Data, size: int, peer: str, goal: Goal, **fields: Any) -> Row:
    """Make a row of `case` without figures."""
    return Row(case.name, case.kind, case.threads, data.elements, OURS, peer, goal, bytes=size, **fields)


def compare(bench: Bench, row: Row, ours: Step, peers: Mapping[str, Step], traffic: Step | None = None) -> None:
    """Time ours, the fastest of the peers and the yardstick, and enter the comparison into `row`."""
    samples = suite.compare(bench.plan, row, ours, peers, others={} if traffic is None else {TRAFFIC: traffic})
    if traffic is not None:
        row.traffic_share = method.ratio(samples[TRAFFIC], samples[row.ours])


# --- Cases ------------------------------------------------------------------------------------------------------------


def run_whole(bench: Bench, case: Case) -> list[Row]:
    """Everything around AdamW, float32, against torch's calls and against the yardstick."""
    data = arrays.make_data([optimizers.elements_of(bench, SIZE)], 2)
    gradients = Gradients(data.grads[0])
    mirror = arrays.zeros(data.elements, BFLOAT16)
    optimizer = ADAMW.ours(data.params, lr=LR, ema_decay=EMA_DECAY, mirror=[mirror])
    options: dict[str, Any] = {
        "grad_scale": 1.0 / LOSS_SCALE,
        "max_grad_norm": gradients.max_norm,
        "zero_grads": True,
    }
    ours: Step = functools.partial(optimizer.step, data.grads, **options)
    exp_avg, exp_avg_sq, ema = (optimizer.state[0][name] for name in ("exp_avg", "exp_avg_sq", "ema"))
    own = replace(data, slots=[(exp_avg, exp_avg_sq)])
    averaged = Averaged(ema, mirror)
    expected = outcome(own, averaged, gradients, ours)
    arrays.require_moved(expected)
    if not optimizer.grad_norm or optimizer.grad_norm < 2.0 * gradients.max_norm:
        raise CheckError("the gradients are within the limit")

    size = bytes_of(own, norm=True, zero_grads=True) + 2 * ema.nbytes + mirror.nbytes
    row = new_row(case, data, size, TORCH, Goal(">=", 1.6))
    row.case = f"{case.name}/torch"
    torch, row.note = load_torch(case.threads)
    peers: dict[str, Step] = {}
    if torch is not None:
        theirs = Averaged(arrays.zeros(data.elements, FLOAT32), arrays.zeros(data.elements, BFLOAT16))
        peers = {TORCH: TorchWholeStep(torch, data, theirs, gradients.max_norm).step}
        got = outcome(data, theirs, gradients, peers[TORCH])
        for index, tolerance in enumerate((1e-4, NORM_ERROR, NORM_ERROR, 1e-4)):
            message = f"{TORCH}: another {('parameter', *ADAMW.states, 'average')[index]} than ours"
            arrays.require_close(message, got[index : index + 1], expected[index : index + 1], tolerance)
        if not torch_clips(torch, gradients):
            raise CheckError(f"{TORCH}: nothing is clipped")

    share = replace(row, case=f"{case.name}/traffic", peer=TRAFFIC, goal=Goal(">=", 0.9), note="")
    others = {TRAFFIC: traffic_step(optimizer, data, [mirror], **options)}
    samples = suite.compare(bench.plan, row, ours, peers, others=others, prepare=gradients.refill)
    row.traffic_share = method.ratio(samples[TRAFFIC], samples[OURS])
    share.take(samples, OURS, TRAFFIC)
    share.value = share.traffic_share = row.traffic_share
    replace(own, slots=[(exp_avg, exp_avg_sq, ema, mirror)]).require_finite()
    data.require_finite()
    return [row, share]


def torch_clips(torch: Any, gradients: Gradients) -> bool:
    """Whether torch's norm of the unscaled gradients exceeds the limit."""
    gradients.refill()
    norm = torch.linalg.vector_norm(torch.from_numpy(gradients.array)) / LOSS_SCALE
    return bool(norm > 2.0 * gradients.max_norm)


def run_rule(rule: str, isa: str, bench: Bench, case: Case) -> list[Row]:
    """One rule's kernel on narrow parameters and gradients against the yardstick, over the same arrays."""
    slots = len(optimizers.rules()[rule]["slots"])
    data = arrays.make_data([optimizers.elements_of(bench, SIZE)], slots, STATES_FLOAT32)
    traffic = f"traffic{slots}"
    row = new_row(case, data, data.bytes, traffic, Goal(">=", 0.9))
    if isa not in onepass.available_isas():
        return [replace(row, note=f"not measured: no {isa} here")]
    with instruction_set(isa):
        peers = {traffic: optimizers.kernel_step(traffic, data)}
        suite.compare(bench.plan, row, optimizers.kernel_step(rule, data), peers)
    data.require_finite()
    row.traffic_share = row.value
    return [row]


def run_storage(bench: Bench, case: Case) -> list[Row]:
    """Everything in bfloat16 against everything in float32."""
    count = optimizers.elements_of(bench, SIZE)
    data, wide = (arrays.make_data([count], 2, storage) for storage in (ALL_BFLOAT16, ALL_FLOAT32))
    ours, peer = our_adam(data), our_adam(wide)
    row = new_row(case, data, data.bytes, f"{OURS} float32", Goal(">=", 1.7))
    arrays.three_steps(data, ours.step)
    arrays.three_steps(wide, peer.step)
    arrays.require_moved(data.params)
    arrays.require_close("float32 arrives elsewhere than bfloat16", wide.params, data.params, ROUNDING)
    compare(bench, row, ours.step, {row.peer: peer.step}, traffic_step(ours, data))
    for each, optimizer in ((data, ours), (wide, peer)):
        with_states(each, optimizer).require_finite()
    return [row]


def run_torch(bench: Bench, case: Case) -> list[Row]:
    """Narrow parameters and gradients against torch's fused kernel, with states of the dtype that torch gives them."""
    torch, note = load_torch(case.threads)
    state = BFLOAT16 if torch is None else torch_state_dtype(torch)
    data = arrays.make_data([optimizers.elements_of(bench, SIZE)], 2, (BFLOAT16, BFLOAT16, state))
    optimizer = our_adam(data)
    row = new_row(case, data, data.bytes, "torch", Goal(">=", 1.8), note=note or f"states of {state}")
    peers: dict[str, Step] = {}
    if torch is not None:
        peers = {name: contenders.torch_optimizer(ADAM, data, how).step for name, how in FUSED.items()}
    arrays.require_same(data, optimizer.step, peers, ROUNDING)
    compare(bench, row, optimizer.step, peers, traffic_step(optimizer, data))
    with_states(data, optimizer).require_finite()
    data.require_finite()
    return [row]


def torch_state_dtype(torch: Any) -> np.dtype[Any]:
    """Return the dtype of the states that torch's fused Adam makes for a parameter of bfloat16."""
    param = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.Adam([param], fused=True)
    optimizer.step()
    known = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}
    return known[optimizer.state[param]["exp_avg"].dtype]


def run_stochastic(storage: Storage, bench: Bench, case: Case) -> list[Row]:
    """Show what rounding by chance costs; both contenders share parameters and gradients."""
    data = arrays.make_data([optimizers.elements_of(bench, SIZE)], 2, storage)
    ours, peer = (our_adam(data, rounding=rounding) for rounding in ("stochastic", "nearest"))
    row = new_row(case, data, data.bytes, "nearest", Goal("<=", 1.3), measure="ours / peer")
    row.ours = "stochastic"
    arrays.require_same(data, ours.step, {row.peer: peer.step}, CHANCE)
    samples = suite.compare(bench.plan, row, ours.step, {row.peer: peer.step})
    row.value = method.ratio(samples[row.ours], samples[row.peer])
    row.note = "stochastic's time over nearest's"
    for optimizer in (ours, peer):
        with_states(data, optimizer).require_finite()
    return [row]


def run_split(bench: Bench, case: Case) -> list[Row]:
    """Parameters in two halves against float32 ones that are copied; both contenders share the gradients."""
    count = optimizers.elements_of(bench, SIZE)
    data = arrays.make_data([count], 2, STATES_FLOAT32)
    wide = replace(arrays.make_data([count], 2, (FLOAT32, BFLOAT16, FLOAT32)), grads=data.grads)
    mirrors = [arrays.zeros(count, BFLOAT16)]
    ours, peer = our_adam(data, master="split"), our_adam(wide, mirror=mirrors)
    size = data.bytes + 2 * sum(state["remainder"].nbytes for state in ours.state)
    row = new_row(case, data, size, "float32 and mirror", Goal(">=", 1.1))
    arrays.three_steps(data, ours.step)
    arrays.three_steps(wide, peer.step)
    arrays.require_moved(data.params)
    if not np.array_equal(ours.master[0].view(np.uint32), wide.params[0].view(np.uint32)):
        raise CheckError("the master of split parameters is not the float32 parameter")
    compare(bench, row, ours.step, {row.peer: peer.step}, traffic_step(ours, data))
    wide.require_finite()
    for each, optimizer in ((data, ours), (wide, peer)):
        with_states(each, optimizer).require_finite()
    return [row]


def all_cases() -> list[Case]:
    """In an order that imports torch as late as possible."""
    cases = [
        Case(f"rules/{rule}/{isa}", "rules", functools.partial(run_rule, rule, isa))
        for isa in ISAS
        for rule in optimizers.rules()
    ]
    cases += [
        Case(f"stochastic/Adam/{storage_name(storage)}", "stochastic", functools.partial(run_stochastic, storage))
        for storage in (STATES_FLOAT32, ALL_BFLOAT16)
    ]
    rest: dict[str, tuple[str, Callable[[Bench, Case], list[Row]]]] = {
        "storage": (f"Adam/{storage_name(ALL_BFLOAT16)}", run_storage),
        "split": ("Adam", run_split),
        "whole": ("AdamW", run_whole),
        "torch": ("Adam/bfloat16", run_torch),
    }
    return cases + [Case(f"{kind}/{name}", kind, run) for kind, (name, run) in rest.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    return suite.main("whole_step", __doc__, all_cases(), arguments)


if __name__ == "__main__":
    sys.exit(main())

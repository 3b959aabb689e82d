"""The whole step and narrow storage, side by side with torch, the yardstick `traffic` and ourselves: one table.

``python bench/peers/whole_step.py`` takes some minutes on two quiet cores and 3 GB of memory. ``--quick`` only shows
that everything runs: its figures mean nothing, and no goal is judged by them.

Fair play
---------
* The whole step is what a training loop does with the gradients of a scaled loss: divide the scale out, clip by the
  norm, update (AdamW), average the parameters, copy them to bfloat16, zero the gradients. In torch these are six calls,
  the fastest that it has for lists of tensors. The limit is a quarter of the norm, so that everybody clips.
* Every other way to take that step has a row of its own (``peers``), each at its best: the same calls of torch with
  ``foreach``, or for one tensor after the other; five calls, because its fused kernel can divide gradients by a number,
  which does for scale and limit; one function that ``torch.compile`` fuses; one that XLA does, of Optax, to which
  parameters, states, average, copy and gradients are donated, so that it zeroes the gradients where they are; and NumPy
  with one thread and two temporary arrays. DeepSpeed's Adam for the CPU has nothing around the update.
* Everybody gets fresh gradients before each timed call, because the call before left zeros.
* `traffic` has the streams and options of the case it is compared with, the norm's read among them, and shares its
  arrays. The bytes of a row are those of ours; what a store reads first, to fill a cache line, is not counted.
* torch and NumPy have the same parameters and gradients as ours, and states and copies of their own; all that Optax
  has is its own. Storage is compared with
  storage: each contender has arrays of its own where dtypes differ, and shares parameters and gradients where not.
* All memory comes from NumPy, which asks for huge pages, cache-line aligned and with every page touched.
* Gradients are positive and not zero, so that the moments (to which `traffic` adds gradients) stay normal and finite.
* Before the timing everybody takes three steps from parameters 0 and must arrive where ours does, but for rounding:
  1e-4 of each number in float32 (2e-3 of moments of clipped gradients, for torch's norm in float32 has no more digits),
  three units in the last place (1/256) in bfloat16, a tenth if rounding is stochastic. The master of split parameters
  must be the float32 parameter, bit for bit. After it everything must be finite.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import arrays
import contenders
import optimizers
from arrays import Array, Data, Storage
from contenders import ADAM, ADAMW, COMPILED, DEEPSPEED, FUSED, NUMPY, OPTAX, UNFUSED, MissingError
from numpy_formulas import LR, WEIGHT_DECAY, NumpyAdamInPlace
from optimizers import TRAFFIC

import method
import onepass
import suite
from method import Contender, Goal, Row
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
GRAD_SCALE = "torch fused, grad_scale"


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
    """The step as a sequence of torch's calls. `how`: which implementation of each of them."""

    def __init__(
        self,
        torch: Any,
        data: Data,
        averaged: Averaged,
        max_norm: float,
        how: Mapping[str, bool] = FUSED["torch fused"],
    ) -> None:
        self.torch, self.max_norm = torch, max_norm
        self.foreach = how.get("foreach", True)
        self.optimizer = contenders.torch_optimizer(ADAMW, data, how)
        self.params = self.optimizer.param_groups[0]["params"]
        self.grads = [param.grad for param in self.params]
        self.ema, self.mirror = ([contenders.as_tensor(torch, each)] for each in (averaged.ema, averaged.mirror))
        self.averages = False

    def step(self) -> None:
        """Unscale as a GradScaler does, clip, update, average as an AveragedModel does, copy, zero."""
        with self.torch.no_grad():
            self.clip()
            self.optimizer.step()
            if self.averages:
                self.each("lerp", self.ema, self.params, 1.0 - EMA_DECAY)
            else:
                self.each("copy", self.ema, self.params)
                self.averages = True
            self.each("copy", self.mirror, self.params)
            self.optimizer.zero_grad(set_to_none=False)

    def clip(self) -> None:
        """Unscale the gradients, and limit their norm."""
        self.each("mul", self.grads, 1.0 / LOSS_SCALE)
        self.torch.nn.utils.clip_grad_norm_(self.params, self.max_norm, foreach=self.foreach)

    def each(self, name: str, tensors: list[Any], *arguments: Any) -> None:
        """Call one of torch's operations in place, for a list of tensors or for one after the other."""
        if self.foreach:
            getattr(self.torch, f"_foreach_{name}_")(tensors, *arguments)
            return
        for index, tensor in enumerate(tensors):
            own = [argument[index] if isinstance(argument, list) else argument for argument in arguments]
            getattr(tensor, f"{name}_")(*own)


class TorchGradScale(TorchWholeStep):
    """The same in five calls: the fused kernel divides by the scale, and by what the norm is too large."""

    def clip(self) -> None:
        """Tell the optimizer what to divide by, as a GradScaler does."""
        norm = self.torch.nn.utils.get_total_norm(self.grads)
        self.optimizer.grad_scale = (norm / self.max_norm).clamp_(min=LOSS_SCALE)
        self.optimizer.found_inf = self.torch.zeros(())


class TorchCompiled:
    """The step as one function that torch compiles: a loop for the norm, one for the rest, and one for the zeros."""

    def __init__(self, torch: Any, data: Data, averaged: Averaged, max_norm: float) -> None:
        dynamo = importlib.import_module("torch._dynamo")
        if hasattr(dynamo.config, "fail_on_recompile_limit_hit"):
            dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on without being compiled
        self.graphs = importlib.import_module("torch._dynamo.utils").counters["stats"]
        streams = (*data.params, *data.grads, *data.slots[0], averaged.ema, averaged.mirror)
        self.tensors = [contenders.as_tensor(torch, stream) for stream in streams]
        self.now = np.zeros(3, np.float32)  # what changes from step to step is a tensor: numbers would be compiled in
        self.rates = torch.from_numpy(self.now)

        def update(param: Any, grad: Any, m: Any, v: Any, ema: Any, mirror: Any, rates: Any) -> None:
            step_m, inv_bias2, new = rates.unbind()
            norm = torch.linalg.vector_norm(grad) / LOSS_SCALE
            g = grad * (torch.clamp(max_norm / (norm + 1e-6), max=1.0) / LOSS_SCALE)
            m.lerp_(g, 1.0 - 0.9)
            v.mul_(0.999).addcmul_(g, g, value=1.0 - 0.999)
            param.mul_(1.0 - LR * WEIGHT_DECAY).sub_(step_m * m / ((v * inv_bias2).sqrt() + 1e-8))
            ema.add_(new * (param - ema))
            mirror.copy_(param)
            grad.zero_()

        self.update = torch.compile(update, dynamic=False, isolate_recompiles=True)
        with contenders._reasons("torch.compile fails"):
            self.restart()
            self.step()
        self.compiled = self.graphs["unique_graphs"]
        self.restart()

    def restart(self) -> None:
        """Forget the number of steps."""
        self.t = 0

    def step(self) -> None:
        """Take one step."""
        self.t += 1
        self.now[:] = LR / (1.0 - 0.9**self.t), 1.0 / (1.0 - 0.999**self.t), new_share(self.t)
        self.update(*self.tensors, self.rates)

    def settled(self) -> bool:
        """Whether it has not been compiled again."""
        return bool(self.graphs["unique_graphs"] == self.compiled)


class OptaxGradients(Gradients):
    """Gradients in the memory of XLA, which may be another after each step; nobody reads it while they are written."""

    def __init__(self, size: int) -> None:
        super().__init__(np.zeros(size, np.float32))
        self.now: Any = None

    def refill(self) -> None:
        """Write the next step's."""
        self.look()
        super().refill()

    def look(self) -> None:
        """See what is there."""
        memory = (ctypes.c_float * self.now.size).from_address(self.now.unsafe_buffer_pointer())
        self.array = np.ctypeslib.as_array(memory)


class OptaxWholeStep:
    """The step as one function of Optax. Everything goes in and comes out again, in the same memory."""

    def __init__(self, elements: int, threads: int) -> None:
        jax, optax = contenders._load_jax(threads)
        self.jax, self.optax = jax, optax
        self.gradients = OptaxGradients(elements)
        adamw = optax.adamw(LR, weight_decay=WEIGHT_DECAY)
        self.optimizer = optax.chain(optax.clip_by_global_norm(self.gradients.max_norm), adamw)

        def update(param: Any, grad: Any, state: Any, ema: Any, mirror: Any, new: Any) -> tuple[Any, ...]:
            updates, state = self.optimizer.update(grad * (1.0 / LOSS_SCALE), state, param)
            param = optax.apply_updates(param, updates)
            ema = optax.incremental_update(param, ema, new)
            return param, jax.numpy.zeros_like(grad), state, ema, param.astype(mirror.dtype)

        # The old copy is only memory for the new one.
        self.update = jax.jit(update, donate_argnums=(0, 1, 2, 3, 4), keep_unused=True)
        with contenders._reasons("Optax"):
            self.restart()
            before = self.addresses()
            self.step()
        if self.addresses() != before:
            raise CheckError("Optax: what was donated was not used again")
        self.restart()

    def restart(self) -> None:
        """Begin with zeros."""
        self.now: Any = None  # gone before there are new ones
        dtypes = ("float32", "float32", "float32", "bfloat16")
        param, grad, ema, mirror = (self.jax.numpy.zeros(self.gradients.array.size, dtype) for dtype in dtypes)
        self.now = self.jax.block_until_ready((param, grad, self.optimizer.init(param), ema, mirror))
        self.gradients.now = grad
        self.t = 0

    def addresses(self) -> set[int]:
        """Where everything is. (XLA gives an output to any input of its size.)"""
        return {leaf.unsafe_buffer_pointer() for leaf in self.jax.tree.leaves(self.now) if leaf.ndim > 0}

    def step(self) -> None:
        """Take one step, and wait for it."""
        self.t += 1
        self.now = self.jax.block_until_ready(self.update(*self.now, np.float32(new_share(self.t))))
        self.gradients.now = self.now[1]

    def outcome(self) -> list[Array]:
        """Take three steps, of which each leaves its results for NumPy to see."""
        size = self.gradients.array.size
        param, m, v, ema = (np.zeros(size, np.float32) for _ in range(4))
        mirror = np.zeros(size, BFLOAT16)

        def step() -> None:
            self.step()
            new_param, _, state, new_ema, new_mirror = self.now
            moments = (self.optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
            for array, new in zip((param, m, v, ema), (new_param, *moments, new_ema), strict=True):
                array[:] = np.asarray(new)
            mirror.view(np.uint16)[:] = np.asarray(new_mirror).view(np.uint16)
            self.gradients.look()

        return outcome(Data([param], [], [(m, v)]), Averaged(ema, mirror), self.gradients, step)


class NumpyWholeStep:
    """The step in NumPy, in place; the sum of squares, too, has one thread, unlike BLAS's."""

    def __init__(self, data: Data, averaged: Averaged, max_norm: float) -> None:
        self.adamw = NumpyAdamInPlace(data, WEIGHT_DECAY)
        self.param, self.grad, self.averaged, self.max_norm = data.params[0], data.grads[0], averaged, max_norm

    def step(self) -> None:
        """Take one step."""
        scratch, ema = self.adamw.scratch[0], self.averaged.ema
        norm = float(np.sqrt(np.multiply(self.grad, self.grad, out=scratch).sum())) / LOSS_SCALE
        self.grad *= np.float32(min(1.0, self.max_norm / norm) / LOSS_SCALE)
        self.adamw.step()
        np.subtract(self.param, ema, out=scratch)
        scratch *= np.float32(new_share(self.adamw.t))
        ema += scratch
        self.averaged.mirror[:] = self.param
        self.grad.fill(0.0)


def new_share(t: int) -> float:
    """Return the share of the parameters in their average, which begins with them."""
    return 1.0 if t == 1 else 1.0 - EMA_DECAY


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


def new_row(case: Case, data: Data, size: int, peer: str, goal: Goal | None, **fields: Any) -> Row:
    """Make a row of `case` without figures."""
    return Row(case.name, case.kind, case.threads, data.elements, OURS, peer, goal, bytes=size, **fields)


def compare(bench: Bench, row: Row, ours: Step, peers: Mapping[str, Step], traffic: Step | None = None) -> None:
    """Time ours, the fastest of the peers and the yardstick, and enter the comparison into `row`."""
    samples = suite.compare(bench.plan, row, ours, peers, others={} if traffic is None else {TRAFFIC: traffic})
    if traffic is not None:
        row.traffic_share = method.ratio(samples[TRAFFIC], samples[row.ours])


# --- Cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """Ours, set up for the whole step; `own`: `data` with the moments of ours. `expected`: what its outcome is."""

    data: Data
    own: Data
    averaged: Averaged
    gradients: Gradients
    step: Step
    traffic: Step
    expected: list[Array]

    @property
    def bytes(self) -> int:
        """What one step must move."""
        around = 2 * self.averaged.ema.nbytes + self.averaged.mirror.nbytes
        return bytes_of(self.own, norm=True, zero_grads=True) + around

    def require_same(self, name: str, got: list[Array]) -> None:
        """Raise unless a peer's outcome is that of ours."""
        for index, tolerance in enumerate((1e-4, NORM_ERROR, NORM_ERROR, 1e-4)):
            message = f"{name}: another {('parameter', *ADAMW.states, 'average')[index]} than ours"
            arrays.require_close(message, got[index : index + 1], self.expected[index : index + 1], tolerance)

    def require_finite(self) -> None:
        """Raise if something of ours is not finite, or what peers share with it."""
        (moments,) = self.own.slots
        replace(self.own, slots=[(*moments, self.averaged.ema, self.averaged.mirror)]).require_finite()
        self.data.require_finite()


def make_whole(bench: Bench) -> Whole:
    """Set ours up, and see what it does."""
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
    traffic = traffic_step(optimizer, data, [mirror], **options)
    return Whole(data, own, averaged, gradients, ours, traffic, expected)


def run_whole(bench: Bench, case: Case) -> list[Row]:
    """Everything around AdamW, float32, against torch's calls and against the yardstick."""
    whole = make_whole(bench)
    data, gradients = whole.data, whole.gradients
    row = new_row(case, data, whole.bytes, TORCH, Goal(">=", 1.6))
    row.case = f"{case.name}/torch"
    torch, row.note = load_torch(case.threads)
    peers: dict[str, Step] = {}
    if torch is not None:
        theirs = new_averaged(data.elements)
        peers = {TORCH: TorchWholeStep(torch, data, theirs, gradients.max_norm).step}
        whole.require_same(TORCH, outcome(data, theirs, gradients, peers[TORCH]))
        if not torch_clips(torch, gradients):
            raise CheckError(f"{TORCH}: nothing is clipped")

    share = replace(row, case=f"{case.name}/traffic", peer=TRAFFIC, goal=Goal(">=", 0.9), note="")
    others = {TRAFFIC: whole.traffic}
    samples = suite.compare(bench.plan, row, whole.step, peers, others=others, prepare=gradients.refill)
    row.traffic_share = method.ratio(samples[TRAFFIC], samples[OURS])
    share.take(samples, OURS, TRAFFIC)
    share.value = share.traffic_share = row.traffic_share
    whole.require_finite()
    return [row, share]


def new_averaged(elements: int) -> Averaged:
    """Make a peer's average and copy."""
    return Averaged(arrays.zeros(elements, FLOAT32), arrays.zeros(elements, BFLOAT16))


@dataclass(frozen=True)
class WholePeer:
    """A peer that takes the whole step; `refill` writes the gradients of the next one, `outcome` is of three steps."""

    step: Step
    refill: Step
    outcome: Callable[[], list[Array]]
    settled: Callable[[], bool] = lambda: True


WholeMaker: TypeAlias = Callable[[Whole, Averaged, int], WholePeer]


def in_same_memory(whole: Whole, theirs: Averaged, step: Step, settled: Callable[[], bool] = lambda: True) -> WholePeer:
    """Make a peer that has parameters and gradients of ours, and the moments of `data`."""
    refill = whole.gradients.refill
    return WholePeer(step, refill, lambda: outcome(whole.data, theirs, whole.gradients, step), settled)


def torch_for(threads: int) -> Any:
    """Return torch."""
    torch, why = load_torch(threads)
    if torch is None:
        raise MissingError(why)
    return torch


def make_torch(
    kind: type[TorchWholeStep], how: Mapping[str, bool], whole: Whole, theirs: Averaged, threads: int
) -> WholePeer:
    """Make a sequence of torch's calls."""
    made = kind(torch_for(threads), whole.data, theirs, whole.gradients.max_norm, how)
    return in_same_memory(whole, theirs, made.step)


def make_compiled(whole: Whole, theirs: Averaged, threads: int) -> WholePeer:
    """Make the function that torch compiles."""
    # In this process: its workers would stay, beside everybody's threads.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    made = TorchCompiled(torch_for(threads), whole.data, theirs, whole.gradients.max_norm)
    return in_same_memory(whole, theirs, made.step, made.settled)


def make_deepspeed(whole: Whole, theirs: Averaged, threads: int) -> WholePeer:
    """Say why there is nothing to make."""
    raise MissingError("not measured: its Adam for the CPU does neither clip nor average nor copy")


def make_optax(whole: Whole, theirs: Averaged, threads: int) -> WholePeer:
    """Make Optax's, all of it in memory of its own."""
    made = OptaxWholeStep(whole.data.elements, threads)
    return WholePeer(made.step, made.gradients.refill, made.outcome)


def make_numpy(whole: Whole, theirs: Averaged, threads: int) -> WholePeer:
    """Make NumPy's."""
    return in_same_memory(whole, theirs, NumpyWholeStep(whole.data, theirs, whole.gradients.max_norm).step)


WHOLE_PEERS: Mapping[str, WholeMaker] = {
    **{name: functools.partial(make_torch, TorchWholeStep, how) for name, how in UNFUSED.items()},
    GRAD_SCALE: functools.partial(make_torch, TorchGradScale, FUSED["torch fused"]),
    COMPILED: make_compiled,
    DEEPSPEED: make_deepspeed,
    OPTAX: make_optax,
    NUMPY: make_numpy,
}


def run_whole_peers(bench: Bench, case: Case) -> list[Row]:
    """Everything around AdamW against every other way to do it: a row for each; NumPy, which is slow, apart."""
    whole = make_whole(bench)
    names = [name for name in WHOLE_PEERS if bench.peers.search(name)]
    rows = []
    for group in ([name for name in names if name != NUMPY], [name for name in names if name == NUMPY]):
        if group:
            rows += compare_whole(bench, case, whole, group)
            contenders.forget()
    return rows


def compare_whole(bench: Bench, case: Case, whole: Whole, names: Sequence[str]) -> list[Row]:
    """Time ours, these peers and the yardstick in turns, those that are there."""
    row = new_row(case, whole.data, whole.bytes, "", None)
    theirs = new_averaged(whole.data.elements)
    peers: dict[str, WholePeer] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            peer = WHOLE_PEERS[name](whole, theirs, case.threads)
        except MissingError as error:
            missing[name] = str(error)
            continue
        whole.require_same(name, peer.outcome())
        peers[name] = peer
    refill = whole.gradients.refill
    runs = [Contender(OURS, whole.step, refill), Contender(TRAFFIC, whole.traffic, refill)]
    runs += [Contender(name, peer.step, peer.refill) for name, peer in peers.items()]
    slow = replace(bench.plan, min_rounds=min(bench.plan.min_rounds, 5))
    samples = method.interleave(runs, slow if NUMPY in peers else bench.plan) if peers else {}
    for name, peer in peers.items():
        if not peer.settled():
            raise CheckError(f"{name} has compiled anew while it was timed")
        replace(whole.data, slots=[(theirs.ema, theirs.mirror)]).require_finite()
    whole.require_finite()

    rows = []
    for name in names:
        note = "NumPy uses one thread" if name == NUMPY else ""
        own = replace(row, case=f"whole/AdamW/{name}", peer=name, note=missing.get(name, note))
        if name in peers:
            own.take(samples, OURS, name)
            own.value = method.ratio(samples[name], samples[OURS])
            own.traffic_share = method.ratio(samples[TRAFFIC], samples[OURS])
        rows.append(own)
    return rows


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
    cases += [Case(f"{kind}/{name}", kind, run) for kind, (name, run) in rest.items()]
    return [*cases, Case("whole/AdamW/peers", "whole", run_whole_peers)]  # last, because of the compilers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases."""
    return suite.main("whole_step", __doc__, all_cases(), arguments)


if __name__ == "__main__":
    sys.exit(main())

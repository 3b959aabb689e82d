"""Trainings by onepass next to the same ones by the NumPy reference, compared bit for bit."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import onepass
from helpers import guarded
from onepass import _cpu, functional
from reference import narrow, whole_step
from reference.expressions import assert_same_bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ISAS = tuple(onepass.available_isas())
THREADS = (1, 2, 5)
MACHINES = tuple(itertools.product(ISAS, THREADS))
# Each instruction set, and each number of threads, once.
FEW_MACHINES = tuple((isa, THREADS[k % len(THREADS)]) for k, isa in enumerate(ISAS))

OPTIMIZERS: dict[str, tuple[type[onepass.Optimizer], dict[str, Any]]] = {
    "SGD": (onepass.SGD, {"lr": 0.05}),
    "Momentum": (onepass.Momentum, {"lr": 0.05, "dampening": 0.1}),
    "Momentum-outside": (onepass.Momentum, {"lr": 0.05, "lr_in_velocity": False}),
    "NAG": (onepass.NAG, {"lr": 0.05}),
    "NAG-outside": (onepass.NAG, {"lr": 0.05, "lr_in_velocity": False}),
    "AdaGrad": (onepass.AdaGrad, {"lr": 0.05, "lr_decay": 0.1}),
    "AdaSqrt": (onepass.AdaSqrt, {"lr": 0.05}),
    "RMSprop": (onepass.RMSprop, {"lr": 0.05}),
    "RMSprop-centered": (onepass.RMSprop, {"lr": 0.05, "centered": True, "eps": 0.0, "eps_root": 1e-7}),
    "RMSprop-momentum": (onepass.RMSprop, {"lr": 0.05, "momentum": 0.9}),
    "RMSprop-both": (onepass.RMSprop, {"lr": 0.05, "momentum": 0.9, "centered": True, "lr_in_velocity": False}),
    "Adam": (onepass.Adam, {"lr": 0.05}),
    "Adam-eps_hat": (onepass.Adam, {"lr": 0.05, "eps_hat": True, "eps": 1e-7, "weight_decay": 0.1, "l1": 0.01}),
    "Adam-uncorrected": (onepass.Adam, {"lr": 0.01, "bias_correction": False, "maximize": True}),
    "Adam-amsgrad": (onepass.Adam, {"lr": 0.05, "amsgrad": True}),
    "Adam-max_of_corrected": (onepass.Adam, {"lr": 0.05, "amsgrad": True, "max_of_corrected": True}),
    "AdamW": (onepass.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AMSGrad": (onepass.AMSGrad, {"lr": 0.01}),
    "Nadam": (onepass.Nadam, {"lr": 0.05}),
}
FUNCTIONS = {
    name: functional.amsgrad if options.get("amsgrad") else getattr(functional, cls.__name__.lower())
    for name, (cls, options) in OPTIMIZERS.items()
}
# One for each number of states, and with each kind of surroundings.
FEW = ("SGD", "AdaSqrt", "Adam-eps_hat", "AMSGrad", "RMSprop-both")


def make(name: str, params: Any, **options: Any) -> onepass.Optimizer:
    cls, hyper = OPTIMIZERS[name]
    return cls(params, **{**hyper, **options})


@dataclasses.dataclass(frozen=True)
class Kind:
    """A parameter with its gradients and mirror: shapes, dtypes, and how they lie in memory."""

    shape: tuple[int, ...]
    dtype: Any = "float32"
    grad: Any = None  # dtype; None: the parameter's
    axes: tuple[int, ...] | None = None  # of the parameter, from the slowest to the fastest
    layout: str = "same"  # of the gradient
    mirror: Any = None  # dtype
    mirror_axes: tuple[int, ...] | None = None  # None: the parameter's
    offset: int = 0  # bytes off a cache line

    def param(self, seed: int) -> tuple[np.ndarray, Callable[[], bool]]:
        return guarded(self.shape, self.dtype, axes=self.axes, offset=self.offset, seed=seed)

    def gradient(self, seed: int) -> np.ndarray:
        values = np.random.default_rng(seed).standard_normal(self.shape)
        values = values + np.copysign(0.01, values)
        dtype = np.dtype(self.grad or self.dtype)
        axes = range(len(self.shape)) if self.axes is None else self.axes
        if self.layout == "same":
            array = guarded(self.shape, dtype, axes=self.axes, offset=(self.offset + 3) % 64)[0]
        elif self.layout == "reversed":  # the fastest axis the slowest
            array = guarded(self.shape, dtype, axes=tuple(axes)[::-1])[0]
        elif self.layout == "backwards":
            array = np.empty(self.shape, dtype)[(..., *(slice(None, None, -1) for _ in self.shape))]
        else:
            assert self.layout == "gaps"
            array = np.empty([3 * n for n in self.shape], dtype)[(..., *(slice(None, None, 3) for _ in self.shape))]
        array[...] = values.astype(dtype)
        return array

    def new_mirror(self) -> np.ndarray | None:
        if self.mirror is None:
            return None
        axes = self.axes if self.mirror_axes is None else self.mirror_axes
        return guarded(self.shape, self.mirror, axes=axes, offset=(self.offset + 5) % 64, seed=99)[0]


class Call(NamedTuple):
    """Of `step`: which parameters have a gradient (None: all), by what gradients are multiplied, options."""

    present: Sequence[bool] | None = None
    factor: float = 1.0
    options: Mapping[str, Any] = {}

    def gradients(self, kinds: Sequence[Kind], number: int) -> list[np.ndarray | None]:
        grads: list[np.ndarray | None] = []
        for k, kind in enumerate(kinds):
            grad = None
            if self.present is None or self.present[k]:
                grad = kind.gradient(1000 * number + k)
                if self.factor != 1.0:
                    grad[...] = (grad.astype(np.float64) * self.factor).astype(grad.dtype)
            grads.append(grad)
        return grads


class Functional:
    """`functional` behind the face of an optimizer, of which it takes nothing but its new state arrays.

    Every second of these lies in another memory order than its parameter.
    """

    def __init__(self, name: str, params: Sequence[np.ndarray], **options: Any) -> None:
        self.params, self.options = list(params), dict(options)
        self.function = FUNCTIONS[name]
        self.probe = make(name, list(params), **options)
        taken = inspect.signature(self.function).parameters
        self.hyper = {key: value for key, value in self.probe.param_groups[0].items() if key in taken}
        self.hyper.pop("params")
        self.state = [
            {
                name: np.array(array, order="CF"[array.flags.c_contiguous]) if (k + j) % 2 else array
                for j, (name, array) in enumerate(state.items())
            }
            for k, state in enumerate(self.probe.state)
        ]
        self.param_groups, self.surround, self.rule = self.probe.param_groups, self.probe.surround, self.probe.rule
        self.slots = _slots(self.rule(self.param_groups[0]))
        self.calls, self.skipped, self.grad_norm = 0, 0, None
        self.accumulate = options.get("accumulate", 1)
        self.ema = None if "ema" not in self.state[0] else [state["ema"] for state in self.state]

    def step(self, grads, **step_options):
        plurals = [slot.removesuffix("y") + ("ies" if slot.endswith("y") else "s") for slot in self.slots]
        streams = {name: [state[slot] for state in self.state] for name, slot in zip(plurals, self.slots, strict=True)}
        for option, stream, slot in (
            ("ema_decay", "emas", "ema"),
            ("master", "remainders", "remainder"),
            ("accumulate", "accumulators", "accumulator"),
        ):
            if slot in self.state[0]:
                streams[stream] = [state[slot] for state in self.state]
                if option != "master":
                    streams[option] = self.options[option]
        streams.update({k: v for k, v in self.options.items() if k in ("max_unit_norm", "gradient_noise", "seed")})
        streams.update({k: v for k, v in self.options.items() if k == "rounding"})
        if self.options.get("mirror") is not None:
            streams["mirrors"] = self.options["mirror"]
        update, micro = divmod(self.calls, self.accumulate)
        if self.accumulate > 1:
            streams["micro_step"] = micro + 1
        report = self.function(self.params, grads, step=update + 1, **self.hyper, **streams, **step_options)
        measured = any(step_options.get(name) is not None for name in ("max_grad_norm", "clip_norm"))
        measured = measured or step_options.get("nonfinite", "propagate") != "propagate"
        assert (report is None) == (not measured)
        self.grad_norm = None if report is None else report.grad_norm
        if report is not None and report.skipped:
            self.skipped += 1
        else:
            self.calls += 1

    @property
    def accumulated(self):
        return self.calls % self.accumulate


def _slots(rule: str) -> tuple[str, ...]:
    return next(row["slots"] for row in _cpu.registry() if row["name"] == rule)


class Reference:
    """What a new optimizer will do, by the NumPy reference. Takes its hyper-parameters, and copies its arrays."""

    def __init__(self, opt, params, options):
        self.opt, self.functional = opt, isinstance(opt, Functional)
        self.groups = [group for group in opt.param_groups for _ in group["params"]]
        self.accumulate = options.get("accumulate", 1)
        self.storage = {key: options[key] for key in ("seed", "rounding") if key in options}
        mirrors = options.get("mirror") or [None] * len(params)
        self.tensors, self.updated = [], [False] * len(params)
        for param, state, mirror, group in zip(params, opt.state, mirrors, self.groups, strict=True):
            rule = opt.rule(group)
            self.tensors.append(
                whole_step.Tensor(
                    rule,
                    param.copy(order="K"),
                    slots={name: state[name].copy(order="K") for name in _slots(rule)},
                    ema=_copy(state.get("ema")),
                    mirror=_copy(mirror),
                    remainder=_copy(state.get("remainder")),
                    accumulator=_copy(state.get("accumulator")),
                )
            )
        self.calls = self.skipped = self.accumulated = 0
        self.grad_norms: list[float | None] = []
        self.grads: list[list[np.ndarray | None]] = []  # after each call

    def step(self, grads, **options):
        tensors = []
        for tensor, group, grad in zip(self.tensors, self.groups, grads, strict=True):
            updates = self.calls // self.accumulate if self.functional else tensor.updates
            coefficients, _, l1, l2, decay, *_ = self.opt.surround(group, updates + 1)
            ema_decay = group["ema_decay"]
            tensors.append(
                dataclasses.replace(
                    tensor,
                    grad=_copy(grad),
                    updates=updates,
                    coefficients=coefficients,
                    l1=l1,
                    l2=l2,
                    decay=decay,
                    maximize=group["maximize"],
                    gradient_noise=group["gradient_noise"],
                    max_unit_norm=group["max_unit_norm"],
                    ema_decay=ema_decay(updates + 1) if callable(ema_decay) else ema_decay,
                )
            )
        report = whole_step.step(
            tensors, accumulate=self.accumulate, accumulated=self.accumulated, **self.storage, **options
        )
        for k, (old, new) in enumerate(zip(tensors, report.tensors, strict=True)):
            self.updated[k] |= new.updates > old.updates
        self.tensors, self.accumulated = report.tensors, report.accumulated
        self.calls += not report.skipped
        self.skipped += report.skipped
        self.grad_norms.append(report.grad_norm)
        self.grads.append([tensor.grad for tensor in report.tensors])


def _copy(array):
    return None if array is None else array.copy(order="K")


class Training(NamedTuple):
    """Of onepass, with all that a test may want to look at."""

    opt: Any
    params: list[np.ndarray]
    mirrors: list[np.ndarray | None]
    untouched: list[Callable[[], bool]]


def begin(factory, kinds, options) -> Training:
    """A new optimizer with new arrays. `factory(params, **options)` makes it."""
    params, untouched = map(list, zip(*(kind.param(k) for k, kind in enumerate(kinds)), strict=True))
    mirrors = [kind.new_mirror() for kind in kinds]
    if any(mirror is not None for mirror in mirrors):
        options = {**options, "mirror": mirrors}
    return Training(factory(params, **options), params, mirrors, untouched)


def check(
    factory, kinds, options, calls, *, machines=MACHINES, what="", moves=True, after_call=None, serial_bytes=0
) -> Reference:
    """Trainings on all machines have the bits of the reference; `after_call(training, number)` may look or touch."""
    probe = begin(factory, kinds, options)
    reference = Reference(probe.opt, probe.params, {**options, "mirror": probe.mirrors})
    start = [param.copy(order="K") for param in probe.params]
    for number, call in enumerate(calls):
        reference.step(call.gradients(kinds, number), **call.options)
    for isa, threads in machines:
        onepass.set_isa(isa)
        onepass.set_num_threads(threads)
        _cpu.set_serial_bytes(serial_bytes)  # 0: so that the smallest arrays are divided among the threads too
        training = begin(factory, kinds, options)
        label = f"{what} {isa} {threads} threads"
        for number, call in enumerate(calls):
            grads = call.gradients(kinds, number)
            training.opt.step(grads, **call.options)
            here = f"{label}, call {number}"
            assert training.opt.grad_norm == reference.grad_norms[number] or (
                np.isnan(training.opt.grad_norm) and np.isnan(reference.grad_norms[number])
            ), f"{here}: grad_norm {training.opt.grad_norm} instead of {reference.grad_norms[number]}"
            for k, (grad, want) in enumerate(zip(grads, reference.grads[number], strict=True)):
                if grad is not None:
                    assert_same_bits(grad, want, f"{here}: grads[{k}]")
            if after_call is not None:
                after_call(training, number)
        assert training.opt.skipped == reference.skipped
        assert training.opt.accumulated == reference.accumulated
        if not isinstance(training.opt, Functional):
            assert training.opt.step_counts == tuple(tensor.updates for tensor in reference.tensors)
            assert training.opt._updater.last_isa == isa or not any(reference.updated)
        compare(training, reference, label)
        for k, kind in enumerate(kinds):
            assert training.untouched[k](), f"{label}: {kind} was written beside its memory"
    if moves:
        shares: dict[np.dtype, list[tuple[int, int]]] = {}
        for k, (before, tensor) in enumerate(zip(start, reference.tensors, strict=True)):
            assert np.isfinite(narrow.widen(tensor.param.reshape(-1), np.float64)).all(), f"{what}: params[{k}]"
            if reference.updated[k] and before.size:
                moved = np.count_nonzero(before != tensor.param)
                shares.setdefault(before.dtype, []).append((moved, before.size))
                assert moved >= 0.3 * before.size or before.size < 10, f"{what}: params[{k}] did not move"
        for dtype, counts in shares.items():
            moved, size = (sum(column) for column in zip(*counts, strict=True))
            # Few of the narrow numbers come to be others in a few small steps.
            assert moved >= (0.9 if dtype.itemsize > 2 else 0.3) * size, f"{what}: parameters did not move"
    return reference


def compare(training: Training, reference: Reference, what: str = "") -> None:
    """All arrays, bit for bit."""
    for k, tensor in enumerate(reference.tensors):
        here = f"{what}: params[{k}] of {tensor.param.dtype} {tensor.param.shape}"
        assert_same_bits(training.params[k], tensor.param, here)
        state = training.opt.state[k]
        for name, slot in tensor.slots.items():
            assert_same_bits(state[name], slot, f"{here}, {name}")
        for name in ("ema", "remainder"):
            assert (name in state) == (getattr(tensor, name) is not None)
            if name in state:
                assert_same_bits(state[name], getattr(tensor, name), f"{here}, {name}")
        if tensor.holds:
            assert_same_bits(state["accumulator"], tensor.accumulator, f"{here}, accumulator")
        if tensor.mirror is not None:
            assert_same_bits(training.mirrors[k], tensor.mirror, f"{here}, mirror")

"""Trainings by chance: an optimizer, its parameters in some structure and layout, and what happens to them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import onepass
from fuzz.choices import Choices
from fuzz.world import Lying, Story, sprinkle
from helpers import Producer
from onepass import _cpu, schedules
from training import OPTIMIZERS, Functional, Kind, Reference, Training, begin, make

SIZES = (3, *range(20), 31, 32, 33, 63, 64, 65, 127, 255, 300)
LARGE = (1023, 4095, 4096, 4097, 8200, 30_011)


def decay_of(t: int) -> float:
    return 1 - 1 / (t + 1)


def from_the_user(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for states, full of what was in it before, in an order that is not always the parameter's."""
    garbage = np.full(math.prod(shape) * dtype.itemsize, 0xA5, np.uint8).view(dtype)
    return garbage.reshape(shape, order="F" if len(name) % 2 else "C")


RATES = (
    0.05,
    0.0,
    1e-3,
    1,
    schedules.cosine(0.05, steps=3),
    schedules.linear_warmup(schedules.step(0.1, every=2, factor=0.5), steps=2),
    schedules.inverse_time(0.5, decay=0.5),
)
VALUES: dict[str, Sequence[Any]] = {
    "lr": RATES,
    "betas": ((0.9, 0.999), (0.0, 0.5), [0.5, 0.0], (0.99, 0.9)),
    "momentum": (0.9, 0.0, 0.5, 0.999),
    "dampening": (0.0, 0.25, 1.0),
    "rho": (0.9, 0.0, 0.99),
    "eps": (1e-8, 1e-3, 1.0, 1e-37),
    "eps_root": (0.0, 1e-7, 0.5),
    "initial_accumulator": (0.0, 0.1, 3),
    "lr_decay": (0.0, 0.5),
    "momentum_decay": (0.004, 0.0, math.inf),
    "weight_decay": (0.0, 0.01, 0.5, 3.0),
    "l1": (0.0, 0.003, 2.0),
    "decoupled_weight_decay": (False, True),
    "maximize": (False, True),
    "lr_in_velocity": (True, False),
    "centered": (False, True),
    "bias_correction": (True, False),
    "eps_hat": (False, True),
    "amsgrad": (False, True),
    "max_of_corrected": (False, True),
}
OF_GROUP = {
    "ema_decay": (None, 0.9, 0.0, 1e-60, decay_of),
    "gradient_noise": (None, (0.1, 0.5), (1e-90, 0.0), (0, 1), (2.0, 400)),
}
LIMITS = (0.3, 3.0, 1000.0, math.inf)


@dataclasses.dataclass(frozen=True)
class Tensor(Kind):
    """A parameter of a plan: finite or wild, an array or something that exports one."""

    seed: int = 0
    wild: bool = False
    exported: bool = False

    def param(self, seed: int) -> Any:
        array, untouched = super().param(self.seed + 7 * seed)
        if self.wild:
            sprinkle(array, np.random.default_rng(self.seed))
        return array, untouched


@dataclasses.dataclass(frozen=True)
class Part:
    """A group, or all parameters where there are no groups."""

    kind: str  # of structure
    members: range
    own: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    name: str
    options: dict[str, Any]
    tensors: tuple[Tensor, ...]
    parts: tuple[Part, ...]
    grouped: bool
    rows: tuple[tuple[str, str, str], ...]  # that the tensors can be stored as, whatever their gradients are

    def shaped(self, flat: Sequence[Any], *, turned: bool = False) -> Any:
        """In the structure of the parameters; `turned`: dicts in another order."""
        shaped = [_shaped(part, flat, turned) for part in self.parts]
        return shaped if self.grouped else shaped[0]

    def params(self, flat: Sequence[Any]) -> Any:
        """In the structure of the parameters, with the hyper-parameters that groups have of their own."""
        shaped = self.shaped(flat)
        if not self.grouped:
            return shaped
        return [{"params": inner, **part.own} for inner, part in zip(shaped, self.parts, strict=True)]

    def optimizer(self, flat: Sequence[np.ndarray], **options: Any) -> onepass.Optimizer:
        given = [Producer(a) if t.exported else a for a, t in zip(flat, self.tensors, strict=True)]
        if "mirror" in options:
            options["mirror"] = self.shaped(options["mirror"])
        return make(self.name, self.params(given), **options)

    def begin(self) -> Training:
        return begin(self.optimizer, self.tensors, self.options)

    def begin_functional(self) -> Training:
        return begin(functools.partial(Functional, self.name), self.tensors, self.options)

    def reference(self, training: Training) -> Reference:
        """What the training will do from here on."""
        opt = training.opt
        reference = Reference(opt, training.params, {**self.options, "mirror": training.mirrors})
        if isinstance(opt, onepass.Optimizer):
            reference.accumulated, reference.skipped = opt.accumulated, opt.skipped
            reference.storage["seed"] = opt._updater.seed
            reference.tensors = [
                dataclasses.replace(tensor, updates=count, holds=received > 0)
                for tensor, count, received in zip(
                    reference.tensors, opt.step_counts, opt._updater.received, strict=True
                )
            ]
        return reference

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        lines = [f"{self.name}({options})"]
        for part in self.parts:
            lines.append(f"  {part.kind} {part.own or ''}".rstrip())
            lines += [f"    {self.tensors[k]}" for k in part.members]
        return "\n".join(lines)


def _shaped(part: Part, flat: Sequence[Any], turned: bool) -> Any:
    if part.kind == "array":
        return flat[part.members[0]]
    if part.kind == "dict":
        pairs = [(f"layer{k}", flat[k]) for k in part.members]
        return dict(reversed(pairs) if turned else pairs)
    return (list if part.kind == "list" else tuple)(flat[k] for k in part.members)


def draw_shape(c: Choices, *, axis_needed: bool) -> tuple[int, ...]:
    how = c.integer(0, 15)
    if how < 6:
        return (c.pick(SIZES),)
    if how == 6:
        return (c.pick(LARGE[: 6 if c.chance(4) else 4]),)
    if how < 9:
        return (c.pick((1, 2, 3, 7)), c.integer(0, 300))
    shape = tuple(c.integer(0, 6) for _ in range(c.integer(0, 4)))
    return shape if shape or not axis_needed else (c.pick(SIZES),)


def draw_order(c: Choices, ndim: int) -> tuple[int, ...]:
    """The axes from the slowest to the fastest: often C order, else any."""
    rest = list(range(ndim))
    if not c.chance(2):
        return tuple(rest)
    return tuple(rest.pop(c.integer(0, len(rest) - 1)) for _ in range(ndim))


def draw_hyper(c: Choices, name: str, *, functional: bool) -> dict[str, Any]:
    """Values that the optimizer takes, some of its names."""
    cls, preset = OPTIMIZERS[name]
    taken = [key for key in inspect.signature(cls).parameters if key in VALUES]
    if functional:  # where it is another function
        taken = [key for key in taken if key not in ("amsgrad", "max_of_corrected", "centered")]
    drawn = {key: c.pick(VALUES[key]) for key in c.several(taken, one_in=3)}
    drawn.setdefault("lr", c.pick(RATES) if c.chance(4) else preset["lr"])
    merged = {**preset, **drawn}
    if preset.get("eps") == 0.0 and merged["eps_root"] == 0.0:  # one of them must be positive
        drawn["eps_root"] = 0.5
    if merged.get("max_of_corrected") and not (merged.get("amsgrad") or name == "AMSGrad"):
        drawn["max_of_corrected"] = False
    return drawn


def draw_options(c: Choices) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, values in {
        **OF_GROUP,
        "accumulate": (1, 2, 3),
        "seed": (0, 1, 2**64 - 1),
        "rounding": ("nearest", "stochastic"),
        "max_unit_norm": ((0.5, 0), (4.0, -1), [20.0, (0,)]),
    }.items():
        if c.chance(4):
            options[name] = c.pick(values)
    return options


def draw(c: Choices, story: Story, *, functional: bool = False, small: bool = False) -> Plan:
    name = c.pick(sorted(OPTIMIZERS))
    options = draw_hyper(c, name, functional=functional) | draw_options(c)
    rows = tuple(_cpu.storages())
    if c.chance(4):
        options["master"] = "split"
        rows = tuple(row for row in rows if row[0] == "bfloat16")
    state = c.pick((None, None, None, "bfloat16", "float32"))
    if state is not None:
        options["state_dtype"] = state
        rows = tuple(row for row in rows if row[2] == state)
    else:
        rows = tuple(row for row in rows if row[2] == ("float64" if row[0] == "float64" else "float32"))
    axis_needed = options.get("max_unit_norm") is not None
    mirrors = c.chance(3)
    if c.chance(8):
        options["state_alloc"] = from_the_user
    tensors = []
    for _ in range(c.pick((1, 2, 2, 3, 5))):
        shape = draw_shape(c, axis_needed=axis_needed)
        while small and math.prod(shape) > 500:
            shape = shape[1:] or (3,)
        dtype = c.pick([row[0] for row in rows])
        tensors.append(
            Tensor(
                shape,
                dtype,
                axes=draw_order(c, len(shape)),
                offset=c.pick((0, 0, 1, 4, 8, 60, 63)),
                mirror=c.pick(("bfloat16", "float16", None)) if mirrors else None,
                mirror_axes=draw_order(c, len(shape)),
                seed=c.seed(),
                wild=c.chance(8),
                exported=dtype != "bfloat16" and c.chance(5),
            )
        )
    tensors = [dataclasses.replace(t, exported=t.exported and t.offset % 8 == 0) for t in tensors]
    parts, grouped = draw_parts(c, len(tensors), name, functional=functional)
    plan = Plan(name, options, tuple(tensors), parts, grouped, rows)
    story.tell(str(plan))
    story.meet(name, "groups" if grouped else parts[0].kind, *(key for key in options if key not in VALUES))
    story.meet(
        *(t.dtype for t in tensors), *("mirror" for t in tensors if t.mirror), *("wild" for t in tensors if t.wild)
    )
    story.meet(*("exported" for t in tensors if t.exported), *("0-d" for t in tensors if t.shape == ()))
    story.meet(*("empty" for t in tensors if 0 in t.shape))
    return plan


def draw_parts(c: Choices, count: int, name: str, *, functional: bool) -> tuple[tuple[Part, ...], bool]:
    if functional or not c.chance(3):
        kind = c.pick(("list", "tuple", "dict") if count > 1 else ("array", "list", "tuple", "dict"))
        return (Part("list" if functional else kind, range(count), {}),), False
    parts = []
    for members in c.cuts(count, parts=3):
        kind = c.pick(("list", "tuple", "dict") if len(members) != 1 else ("array", "list", "tuple", "dict"))
        own = draw_hyper(c, name, functional=True) if c.chance(2) else {}
        own = {key: value for key, value in own.items() if key not in ("momentum", "initial_accumulator")}
        for key, values in OF_GROUP.items():
            if c.chance(6):
                own[key] = c.pick(values)
        parts.append(Part(kind, members, own))
    return tuple(parts), True


# Gradients and options of a step


def draw_gradient(c: Choices, plan: Plan, index: int, *, writable: bool) -> Lying:
    tensor = plan.tensors[index]
    ndim = len(tensor.shape)
    dtype = c.pick([row[1] for row in plan.rows if row[0] == tensor.dtype])
    if c.chance(3):
        axes = draw_order(c, ndim)
        steps = tuple(c.pick((1, 1, 2, 3, -1, -2, 1 if writable else 0)) for _ in range(ndim))
    else:
        axes, steps = tensor.axes or (), (1,) * ndim
    given = Lying(tensor.shape, dtype, axes, steps, c.pick((0, 0, 3, 4, 8, 61)))
    rng = np.random.default_rng(c.seed())
    values = rng.standard_normal(given.view.shape) * 10.0 ** c.pick((0, 0, 0, -3, 3, -20, 15))
    with np.errstate(over="ignore"):  # infinite in a narrow dtype
        given.view[...] = values.astype(given.view.dtype) if not c.chance(16) else 0
    if c.chance(10):
        sprinkle(given.view, rng, finite=c.chance(2))
    return given


def draw_step_options(c: Choices) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, values in {
        "grad_scale": (0.25, 1 / 3, 2.0, 1 + 1e-12),
        "nonfinite": ("skip", "raise", "propagate"),
        "zero_grads": (True, False),
    }.items():
        if c.chance(3):
            options[name] = c.pick(values)
    limit = c.pick((None, None, None, "max_grad_norm", "clip_norm", "clip_value"))
    if limit is not None:
        options[limit] = c.pick(LIMITS[: 3 if limit == "clip_value" else 4])
    return options

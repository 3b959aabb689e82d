"""What inputs become: calls of the library whose every bit the NumPy reference knows, and calls that must be refused.

A scene takes choices, a story to tell and the machine; it returns "compared" or "refused", or raises what it found.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import onepass
from fuzz import files, plans
from fuzz.choices import Choices
from fuzz.plans import Plan
from fuzz.world import FindingError, Lying, Machine, Story, require, sprinkle
from helpers import Snapshot, bits, guarded
from onepass import functional
from reference import batchnorm
from reference.expressions import assert_same_bits
from training import Functional, Reference, Training, compare

NAN, INF = math.nan, math.inf


def same_number(a: Any, b: Any) -> bool:
    """Equal, where NaN equals NaN, also in tuples."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_number, a, b))
    if isinstance(a, int) and isinstance(b, float):  # as which it is kept
        a = float(a)
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@contextlib.contextmanager
def must_refuse(
    *unchanged: Any,
    opt: onepass.Optimizer | None = None,
    names: str | tuple[str, ...] = "",
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError),
) -> Iterator[None]:
    """The body raises one of the `kinds` with a message that begins with `names`, and nothing changes."""
    snapshot = Snapshot(opt, *unchanged)
    try:
        yield
    except kinds as error:
        require(str(error).startswith(names), f"a message that does not begin with {names!r}: {error}")
        require(not isinstance(error, UnicodeError), f"no error of the argument: {error!r}")
        snapshot.assert_unchanged()
        return
    raise FindingError(f"it was not refused ({names})")


# Steps


def advance(
    plan: Plan,
    training: Training,
    reference: Reference,
    grads: list[Lying | None],
    options: dict[str, Any],
    *,
    isa: str | None = None,
    call: Callable[[], Any] | None = None,
    turned: bool = False,
) -> None:
    """One call on both sides, and a look at everything."""
    views = [None if given is None else given.view for given in grads]
    for given in grads:
        if given is not None:
            given.keep()
    opt = training.opt
    if call is None:
        mirrored = views if isinstance(opt, Functional) else plan.shaped(views, turned=turned)

        def call() -> None:
            opt.step(mirrored, **options)

    updates = [tensor.updates for tensor in reference.tensors]
    try:
        with np.errstate(all="ignore"):  # any bits may be a signaling NaN
            reference.step(views, **options)
    except FloatingPointError:
        owner = opt if isinstance(opt, onepass.Optimizer) else None
        with must_refuse(training.params, training.mirrors, views, opt=owner, kinds=(FloatingPointError,)):
            call()
        refused = True
    else:
        call()
        refused = False
        require(same_number(opt.grad_norm, reference.grad_norms[-1]), f"grad_norm: {opt.grad_norm!r}")
    for k, given in enumerate(grads):
        if given is not None:
            given.require_kept(but_zeros=not refused and options.get("zero_grads", False), what=f"grads[{k}]")
    require(opt.skipped == reference.skipped, f"skipped: {opt.skipped}")
    require(opt.accumulated == reference.accumulated, f"accumulated: {opt.accumulated}")
    if isinstance(opt, onepass.Optimizer):
        now = tuple(tensor.updates for tensor in reference.tensors)
        require(opt.step_counts == now, f"step_counts: {opt.step_counts} instead of {now}")
        if isa is not None and now != tuple(updates):
            require(opt._updater.last_isa == isa, f"{opt._updater.last_isa} ran instead of {isa}")
    compare(training, reference)
    require(all(untouched() for untouched in training.untouched), "bytes beside a parameter were written")


def some_gradients(c: Choices, plan: Plan, *, all_present: bool, writable: bool) -> list[Lying | None]:
    return [
        plans.draw_gradient(c, plan, k, writable=writable) if all_present or not c.chance(5) else None
        for k in range(len(plan.tensors))
    ]


def step(c: Choices, story: Story, machine: Machine) -> str:
    """An optimizer through some steps, with errors, changes and a resumption between them."""
    if c.chance(8):
        return bad_constructor(c, story)
    plan = plans.draw(c, story)
    training = plan.begin()
    reference = plan.reference(training)
    bound = None
    if c.chance(8):
        bound = some_gradients(c, plan, all_present=True, writable=True)
        training = training._replace(
            opt=plan.optimizer(
                training.params,
                grads=plan.shaped([given.view for given in bound]),
                **plan.options,
                **({"mirror": training.mirrors} if any(m is not None for m in training.mirrors) else {}),
            )
        )
        reference = plan.reference(training)
        story.meet("bound gradients")
    for _ in range(c.integer(1, 5)):
        isa = machine.choose(c, story)
        if c.chance(5):
            bad_step(c, story, plan, training)
        if c.chance(8):
            group = c.pick(training.opt.param_groups)
            group["lr"] = c.pick(plans.RATES)
            story.tell(f"lr = {group['lr']}")
        if bound is None and c.chance(8):
            training = resumed(plan, training)
            reference.opt, reference.groups = training.opt, plan.reference(training).groups
            story.tell("resumed from its state_dict")
            story.meet("resumed")
        if c.chance(8) and not any(tensor.mirror for tensor in plan.tensors):
            swap(training, story)
        options = plans.draw_step_options(c)
        story.meet(*options)
        if bound is None:
            grads = some_gradients(c, plan, all_present=False, writable=options.get("zero_grads", False))
            story.tell(
                f"step({[None if g is None else (g.view.dtype.name, g.view.strides) for g in grads]}, {options})"
            )
            advance(plan, training, reference, grads, options, isa=isa, turned=c.chance(2))
        else:
            for given in bound:
                given.view[...] = np.random.default_rng(c.seed()).standard_normal(given.view.shape)
            story.tell(f"step() of bound gradients, {options}")
            call = functools.partial(training.opt.step, **options)
            advance(plan, training, reference, list(bound), options, isa=isa, call=call)
    return "compared"


def resumed(plan: Plan, training: Training) -> Training:
    """With a new optimizer over the same parameters."""
    mirrors = {"mirror": training.mirrors} if any(m is not None for m in training.mirrors) else {}
    opt = plan.optimizer(training.params, **plan.options, **mirrors)
    opt.load_state_dict(training.opt.state_dict())
    return training._replace(opt=opt)


def swap(training: Training, story: Story) -> None:
    """Averages in the place of parameters and back: as if nothing had been."""
    opt = training.opt
    if all("ema" not in state for state in opt.state):
        with must_refuse(training.params, opt=opt, names="there are no averages", kinds=(RuntimeError,)):
            opt.swap_ema()
        return
    story.meet("swapped")
    snapshot = Snapshot(opt, training.params)
    opt.swap_ema()
    opt.swap_ema()
    snapshot.assert_unchanged()


OPTIONS_OUT_OF_RANGE: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("grad_scale", {"grad_scale": value}) for value in (0, -1.0, NAN, INF, "1", None, True, 10**400, 1j)),
    *(("max_grad_norm", {"max_grad_norm": value}) for value in (0.0, -1, NAN, "x", False, [1.0])),
    *(("clip_norm", {"clip_norm": value}) for value in (0, -INF, NAN, b"", {})),
    *(("clip_value", {"clip_value": value}) for value in (0, -2.5, NAN, INF, (1,))),
    *(("nonfinite", {"nonfinite": value}) for value in ("no", "", None, 0, ["skip"])),
    *(("zero_grads", {"zero_grads": value}) for value in (1, None, "True", 0.0)),
    ("clip_norm", {"max_grad_norm": 1.0, "clip_norm": 1.0}),
    ("clip_value", {"clip_norm": 1.0, "clip_value": 1.0}),
    ("momentum", {"momentum": 0.5}),
)
NO_ARRAYS = (3.0, "grad", b"", object(), (), {}, [1.0], {1.0}, range(3), np.float32(1), type)
WRONG_DTYPES = ("int32", "bool", "complex64", ">f4", "U3", "object", "longdouble", "M8[s]", "uint16")


def bad_step(c: Choices, story: Story, plan: Plan, training: Training) -> None:
    """One thing about the call is wrong."""
    opt, options = training.opt, plans.draw_step_options(c)
    options.pop("nonfinite", None)
    grads = some_gradients(c, plan, all_present=True, writable=True)
    views: list[Any] = [given.view for given in grads if given is not None]
    k = c.integer(0, len(views) - 1)
    shape, structure = plan.tensors[k].shape, None
    name: str | tuple[str, ...] = opt._structure.names("grads")[k]
    what = c.pick(("option", "shape", "dtype", "no array", "structure", "overlap", "read-only", "repeats", "schedule"))
    if what == "option":
        name, changed = c.pick(OPTIONS_OUT_OF_RANGE)
        options = {"zero_grads": options.get("zero_grads", False), **changed}
    elif what == "shape":
        other = c.pick([(*shape, 2), (*shape, 1), shape[1:] if shape else (5,), tuple(n + 1 for n in shape) or (1, 1)])
        views[k] = np.ones(other, views[k].dtype)
    elif what == "dtype":
        views[k] = np.zeros(shape, c.pick(WRONG_DTYPES))
    elif what == "no array":
        views[k] = c.pick(NO_ARRAYS)
        single = (plan.parts[0].kind == "array" and not plan.grouped) or any(
            k in part.members and part.kind == "array" for part in plan.parts
        )
        if single:  # whose place says nothing of what is wrong there
            name = "grads"
    elif what == "structure":
        name = "grads"
        structure = c.pick(
            [views * 2, (view for view in views), {"layer": views[0]}, [], {}, 7, [views, views, views, 0]]
        )
        if plan.grouped and not len(plan.parts) and structure == []:
            return
    elif what == "overlap":
        written = [a for a in training.params if a.size] + [a for s in opt.state for a in s.values() if a.size]
        name = ("grads", "params", "state", "mirror")  # any of those that share memory
        views[k] = next((a for a in written if a.shape == shape and a.dtype == views[k].dtype), None)
        if views[k] is None:
            return
    elif what == "read-only":
        views[k].flags.writeable = False
        options["zero_grads"] = True
        if 0 in shape:
            return
    elif what == "repeats":
        if not any(n > 1 for n in shape) or 0 in shape:
            return
        views[k] = Lying(shape, views[k].dtype, range(len(shape)), [0] * len(shape), 0).view
        options["zero_grads"] = True
    else:
        group = next(group for group in opt.param_groups if group["params"])
        if opt._storage.accumulate > 1:
            return
        rate, group["lr"] = group["lr"], lambda t: c.pick((NAN, -1.0, INF, "1", None, 1j, True, [0.1]))
        try:
            with must_refuse(training.params, training.mirrors, views, opt=opt, names="lr("):
                opt.step(plan.shaped(views), **options)
        finally:
            group["lr"] = rate
        story.meet("refused: schedule")
        return
    given = plan.shaped(views) if structure is None else structure
    story.tell(f"refused: {what}, {name}, {options}")
    story.meet(f"refused: {what}")
    with must_refuse(training.params, training.mirrors, views, opt=opt, names=name):
        opt.step(given, **options)


HYPER_OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "lr": (-1, NAN, INF, "1", None, True, int, [0.1], 1j),
    "weight_decay": (-0.5, NAN, INF, "x", None, False),
    "l1": (-1.0, INF, ()),
    "maximize": (1, None, "no"),
    "ema_decay": (1.0, -0.1, NAN, "x", True),
    "max_unit_norm": ((0, 0), (1.0,), 3.0, (1.0, 99), (1.0, "0"), (INF, 0), (1.0, ()), (1.0, (0, 0))),
    "gradient_noise": (0.1, (1.0,), (-1, 0), (NAN, 0), (0, INF)),
    "accumulate": (0, -1, 1.0, True, 2**31, "2"),
    "seed": (-1, 2**64, 1.0, None, True),
    "state_dtype": ("float16", "int8", ">f4", object, 3, "complex64", "no"),
    "rounding": ("up", 1, None, ""),
    "master": ("whole", 1, True),
    "mirror": ((), "x", 3),
    "nesterov": (True,),
    "grads": ((), "x", 3, {}),
}


def bad_constructor(c: Choices, story: Story) -> str:
    """Parameters or an option that no optimizer can have."""
    name = c.pick(sorted(plans.OPTIMIZERS))
    good = np.array([1.5, -2.0, 3.0], np.float32)
    bad: Any = good
    options: dict[str, Any] = {}
    what = c.pick(("hyper", "read-only", "gaps", "overlap", "dtype", "repeats", "no array", "mirror"))
    if what == "hyper":
        key = c.pick(sorted(HYPER_OUT_OF_RANGE))
        options = {key: c.pick(HYPER_OUT_OF_RANGE[key])}
        start = key
        if key == "max_unit_norm" and options[key] in ((1.0, 99), (1.0, (0, 0))):
            start = "params" if options[key] == (1.0, (0, 0)) else "max_unit_norm"
        params: Any = [good, bad.copy()]
    else:
        start = "params[1]"
        if what == "read-only":
            bad = np.ones(4)
            bad.flags.writeable = False
        elif what == "gaps":
            bad = np.ones((6, 4))[
                c.pick(((slice(None, None, 2),), (slice(None), slice(0, 3)), (slice(None, None, -1),)))
            ]
        elif what == "overlap":
            bad = good[1:]
            start = "params"
        elif what == "dtype":
            bad = np.zeros(3, c.pick(WRONG_DTYPES))
        elif what == "repeats":
            bad = np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,))
        elif what == "mirror":
            bad, start = good.copy(), "mirror[1]"
            options["mirror"] = [
                None,
                c.pick((np.zeros(3), np.zeros(4, np.float16), "x", np.zeros(6, np.float16)[::2])),
            ]
        else:
            bad = c.pick((*NO_ARRAYS, None))
        params = [good, bad]
    story.tell(f"refused: {name} of {params}, {options}")
    story.meet(f"refused: constructor, {what}")
    with must_refuse(params, names=start):
        plans.make(name, params, **options)
    return "refused"


# Functions


class Alone(Functional):
    """One array in the place of each list of one."""

    def __init__(self, name: str, params: Any, **options: Any) -> None:
        super().__init__(name, params, **options)
        function = self.function

        def alone(params: list[Any], grads: list[Any], **given: Any) -> Any:
            single = {
                key: value[0] if isinstance(value, list) and key != "betas" else value for key, value in given.items()
            }
            if isinstance(given.get("max_unit_norm"), list):
                single["max_unit_norm"] = given["max_unit_norm"]
            return function(params[0], grads[0], **single)

        self.function = alone


def functions(c: Choices, story: Story, machine: Machine) -> str:
    """`functional` through some steps; and if every parameter takes part in each, an optimizer beside it."""
    plan = plans.draw(c, story, functional=True)
    accumulate = plan.options.get("accumulate", 1)
    all_present = accumulate > 1 or c.chance(2)
    training = plan.begin_functional()
    if len(plan.tensors) == 1 and c.chance(2):
        options = {**plan.options, **({"mirror": training.mirrors} if training.mirrors[0] is not None else {})}
        training = training._replace(opt=Alone(plan.name, training.params, **options))
        story.meet("single array")
    reference = plan.reference(training)
    twin = plan.begin() if all_present else None
    for _ in range(c.integer(1, 4) * (accumulate if all_present else 1)):
        machine.choose(c, story)
        options = plans.draw_step_options(c)
        story.meet(*options)
        grads = some_gradients(c, plan, all_present=all_present, writable=options.get("zero_grads", False))
        story.tell(f"step({[None if g is None else (g.view.dtype.name, g.view.strides) for g in grads]}, {options})")
        given = None if twin is None else [g.view.copy() for g in grads if g is not None]
        advance(plan, training, reference, grads, options)
        if twin is not None:
            with contextlib.suppress(FloatingPointError):
                twin.opt.step(plan.shaped(given), **options)
            for k, (a, b) in enumerate(zip(twin.params, training.params, strict=True)):
                assert_same_bits(a, b, f"params[{k}] of the optimizer and of the function")
    return "compared"


# Batch normalization


def batch_norm(c: Choices, story: Story, machine: Machine) -> str:
    """Both passes, through the functions or the layer."""
    ndim = c.integer(2, 5)
    axis = c.integer(0, ndim - 1)
    big = c.chance(12)
    shape = tuple(
        c.pick((1, 2, 3, 5, 8, 17, 33)) if k == axis else c.pick((1, 2, 3, 4, 7, 0)) if not big else c.integer(1, 30)
        for k in range(ndim)
    )
    if c.chance(4):  # long runs, of several blocks at times
        shape = (*shape[:1], c.pick((1, 2, 3)), c.pick((256, 300, 4096, 4097)))
        axis = 1
    dtype = np.dtype(c.pick(("float32", "float64")))
    channels, axis_given = shape[axis], axis - len(shape) if c.chance(2) else axis
    rng = np.random.default_rng(c.seed())
    scale = c.pick((1.0, 1.0, 1e-3, 1e3, 1e-20, 1e15))
    center = c.pick((0.0, 0.0, 1000.0, -1e6))
    offsets = [c.pick((0, 0, 4, 8, 1, 60)) for _ in range(3)]
    wild = c.chance(8)
    finite = c.chance(2)

    def array(size: Any, k: int, of: Callable[..., np.ndarray]) -> np.ndarray:
        made, untouched = guarded(size, dtype, offset=offsets[k % 3])
        with np.errstate(all="ignore"):
            made[...] = of(size=size)
        if wild and made.size:
            sprinkle(made, rng, finite=finite)
        guards.append(untouched)
        return made

    guards: list[Callable[[], bool]] = []
    x = array(shape, 0, lambda size: rng.standard_normal(size) * scale + center)
    dy = array(shape, 1, rng.standard_normal)
    residual = array(shape, 2, rng.standard_normal) if c.chance(3) else None
    affine, training = not c.chance(3), not c.chance(3)
    weight, bias = (array((channels,), k, rng.standard_normal) if affine else None for k in (1, 2))
    keeps = not training or not c.chance(3)
    mean, var = (array((channels,), k, rng.random) if keeps else None for k in (0, 1))
    relu, unbiased = c.pick((None, "relu")), not c.chance(2)
    momentum, eps = c.pick((0.1, 0.0, 1.0, 0.75)), c.pick((1e-5, 1e-3, 1.0, 1e-300 if dtype == np.float64 else 1e-37))
    story.tell(
        f"batch norm of {shape} {dtype}, axis {axis_given}, {scale=}, {center=}, {offsets=}, {wild=}, {affine=}, "
        f"{training=}, {keeps=}, {relu=}, {unbiased=}, {momentum=}, {eps=}, residual {residual is not None}"
    )
    story.meet(dtype.name, "relu" if relu else "no activation", "training" if training else "frozen")
    machine.choose(c, story)
    options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "unbiased": unbiased}
    options |= {"channel_axis": axis_given, "activation": relu}
    unchanged = [a for a in (x, dy, residual, weight, bias, mean, var) if a is not None]

    if training and math.prod(shape) == channels:
        with must_refuse(*unchanged, names="x"):
            functional.batch_norm(x, weight, bias, mean, var, residual=residual, **options)
        return "refused"
    if c.chance(6):
        bad_batch_norm(c, story, unchanged, [x, weight, bias, mean, var], residual, options)

    want = batchnorm.forward(x, weight, bias, mean, var, residual=residual, **options)
    through = c.pick(("functions", "functions", "layer"))
    if through == "layer" and affine and keeps and channels:
        return layer(c, story, (x, dy, residual, weight, bias, mean, var), want, options, shape)
    before = [bits(a) for a in (x, dy, residual, weight, bias) if a is not None]
    out = array(shape, c.integer(0, 2), rng.standard_normal) if c.chance(2) else None
    y, got_mean, invstd = functional.batch_norm(x, weight, bias, mean, var, residual=residual, out=out, **options)
    require(out is None or y is out, "out: another array came back")
    assert_same_bits(y, want.y, "y")
    assert_same_bits(got_mean, want.mean, "mean")
    assert_same_bits(invstd, want.invstd, "invstd")
    if keeps:
        assert_same_bits(mean, want.running_mean, "running_mean")
        assert_same_bits(var, want.running_var, "running_var")
    back = {"training": training, "channel_axis": axis_given, "activation": relu}
    output = y if relu and residual is not None else None
    desired = batchnorm.backward(dy, x, got_mean, invstd, weight, bias, y=output, **back)
    out = array(shape, c.integer(0, 2), rng.standard_normal) if c.chance(2) else None
    got = functional.batch_norm_backward(dy, x, got_mean, invstd, weight, bias, y=output, out=out, **back)
    require(out is None or got.x is out, "out: another array came back")
    same_gradients(got, desired)
    require(before == [bits(a) for a in (x, dy, residual, weight, bias) if a is not None], "an input was written")
    require(all(untouched() for untouched in guards), "bytes beside an array were written")
    return "compared"


def same_gradients(got: Any, desired: Any) -> None:
    for name in ("x", "weight", "bias", "residual"):
        actual, wanted = getattr(got, name), getattr(desired, name)
        require((actual is None) == (wanted is None), f"d{name}: {actual!r}")
        if actual is not None:
            assert_same_bits(actual, wanted, f"d{name}")


def layer(c: Choices, story: Story, arrays: Any, want: Any, options: dict[str, Any], shape: Any) -> str:
    x, dy, residual, weight, bias, mean, var = arrays
    story.meet("layer")
    bn = onepass.BatchNorm(
        len(weight),
        options["eps"],
        options["momentum"],
        channel_axis=options["channel_axis"],
        activation=options["activation"],
        unbiased=options["unbiased"],
        dtype=x.dtype,
    ).train(options["training"])
    bn.load_state_dict(
        {
            "weight": weight,
            "bias": bias,
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": c.integer(0, 9),
        }
    )
    y = bn.forward(x, residual=residual)
    assert_same_bits(y, want.y, "y")
    assert_same_bits(bn.running_mean, want.running_mean, "running_mean")
    assert_same_bits(bn.running_var, want.running_var, "running_var")
    output = y if options["activation"] and residual is not None else None
    back = {key: options[key] for key in ("training", "channel_axis", "activation")}
    desired = batchnorm.backward(dy, x, want.mean, want.invstd, weight, bias, y=output, **back)
    assert_same_bits(bn.backward(dy), desired.x, "dx")
    assert_same_bits(bn.weight_grad, desired.weight, "dweight")
    assert_same_bits(bn.bias_grad, desired.bias, "dbias")
    if residual is None:
        require(bn.residual_grad is None, "residual_grad")
    else:
        assert_same_bits(bn.residual_grad, desired.residual, "residual_grad")
    return "compared"


def bad_batch_norm(
    c: Choices, story: Story, unchanged: list[np.ndarray], given: list[Any], residual: Any, options: dict[str, Any]
) -> None:
    """One argument is wrong."""
    x, channels = given[0], given[0].shape[options["channel_axis"]]
    other_shape, other_dtype = np.ones((*x.shape, 2), x.dtype), np.ones(x.shape, np.int32)
    ones = np.ones(channels, x.dtype)
    wrong: dict[str, tuple[Any, ...]] = {
        "eps": (0.0, -1, NAN, INF, "x", None, True),
        "momentum": (-0.1, 2, NAN, "x", None),
        "training": (1, None, "yes"),
        "unbiased": (0, None),
        "activation": ("gelu", "", b"relu", 1, True),
        "channel_axis": (x.ndim, -x.ndim - 1, 1.0, True, None, 2**70),
        "x": (np.ones(x.shape, np.float16), np.ones(x.shape, ">f8"), ones[:1], 7, None, [1.0]),
        "weight": (np.ones(channels + 1, x.dtype), ones.astype(np.int8), np.ones((1, channels), x.dtype), 3),
        "running": ([None, ones], [ones, None]),
        "residual": (other_shape, other_dtype, 3.0),
        "out": (other_shape, other_dtype, 3.0),
    }
    what = c.pick(sorted(wrong))
    value = c.pick(wrong[what])
    given, options = list(given), {**options, "residual": residual}
    if what in ("x", "weight"):
        given[("x", "weight").index(what)] = value
    elif what == "running":
        given[3:] = value
    else:
        options[what] = value
    story.meet(f"refused: {what}")
    story.tell(f"refused: {what}, {value!r}")
    with must_refuse(*unchanged, names=what):
        functional.batch_norm(*given, **options)


# State dicts


WORDS = ("", "SGD", "Adam", "nearest", "stochastic", "params", "step", "exp_avg", "lr", "état", "0")
ANY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 3.5, NAN, INF, -0.0, 1e-300, 10**30, 2**62, 2**64, 1j, b"x", *WORDS, (), [], {},
    [0], (0.5, 0.5), [0.1, 0.2, 0.3], {"step": 1}, {0: {}}, np.float64(0.5), np.int64(3), np.bool_(True), object, len,
    np.array(3), np.array(0.25), np.array("nearest"), np.array(True), np.array([]), np.array([1, 2]), np.array([0.5]),
    np.array([[True, False]]), np.array([None, {}], object), np.array(["a", "b"]), np.array(2**63, np.uint64),
)  # fmt: skip


def mutate(c: Choices, story: Story, root: dict[str, Any]) -> None:
    """Change one place of a state dict, wherever it is."""
    at: Any = root
    path = "state_dict"
    for _ in range(c.integer(0, 4)):
        inner = [key for key, value in pairs(at) if isinstance(value, (dict, list)) and value]
        if not inner:
            break
        key = c.pick(inner)
        at, path = at[key], f"{path}[{key!r}]"
    if not at:
        return
    key = c.pick([key for key, _ in pairs(at)])
    arrays = [key for key, value in pairs(at) if isinstance(value, np.ndarray) and value.ndim]
    how = c.pick(("value", "array", "delete", "add", "swap", "number", "value"))
    if how == "array" and arrays:
        key = c.pick(arrays)
    value = at[key]
    if how == "array" and arrays:
        at[key] = changed_array(c, value)
    elif how == "delete":
        del at[key]
    elif how == "add" and isinstance(at, list):
        at.append(c.pick(ANY_VALUES))
    elif how == "add":
        key = c.pick((*WORDS, 0, 99, None, (1,)))
        at[key] = c.pick(ANY_VALUES)
    elif how == "swap":
        other = c.pick([key for key, _ in pairs(at)])
        at[key], at[other] = at[other], at[key]
    elif how == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
        near = (value + 1, value * 0.5, -value, np.float64(value), np.int32(1), np.array(value), c.integer(0, 255))
        at[key] = c.pick(near)
    else:
        at[key] = c.pick(ANY_VALUES)
    story.tell(f"{path}[{key!r}]: {how}, {value!r} -> {dict(pairs(at)).get(key, 'nothing')!r}")


def pairs(at: Any) -> list[tuple[Any, Any]]:
    return list(at.items() if isinstance(at, dict) else enumerate(at))


def changed_array(c: Choices, value: np.ndarray) -> Any:
    """Other numbers, or what cannot be copied into the state."""
    other = value.copy()
    if value.size and value.dtype.kind in "fV":  # V: bfloat16
        sprinkle(other, np.random.default_rng(c.seed()))
    with np.errstate(invalid="ignore"):
        wide = other.astype(np.float64) if value.dtype.kind in "fVu" else np.ones(value.shape)
    return c.pick(
        (
            other,
            np.asfortranarray(other),
            np.repeat(other, 2, axis=-1)[..., ::2],
            np.ascontiguousarray(other[::-1])[::-1],
            other.view(np.recarray),
            other[..., None],
            other.ravel()[:-1],
            wide,
            wide.tolist(),
            [],
            np.ma.masked_array(other),
            other.astype(other.dtype.newbyteorder()) if other.dtype.kind in "fu" else wide,
        )
    )


def plain(value: Any) -> Any:
    """A saved value in the form in which the optimizer keeps it."""
    if (isinstance(value, np.ndarray) and value.ndim == 0) or isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    return value


def same_state(a: Any, b: Any, path: str = "state_dict") -> None:
    """Two state dicts say the same."""
    if isinstance(a, dict):
        require(isinstance(b, dict) and set(a) == set(b), f"{path}: other keys")
        for key in a:
            same_state(a[key], b[key], f"{path}[{key!r}]")
    elif path.endswith("['max_unit_norm']") and a is not None and b is not None:
        axes = [tuple(x[1]) if isinstance(x[1], (list, tuple)) else (x[1],) for x in (a, b)]
        require(a[0] == b[0] and axes[0] == axes[1], f"{path}: {b!r} instead of {a!r}")
    elif isinstance(a, list):
        require(len(a) == len(b), f"{path}: another length")
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            same_state(x, y, f"{path}[{k}]")
    elif isinstance(a, np.ndarray) and a.ndim:
        require(isinstance(b, np.ndarray) and bits(a) == bits(b), f"{path}: another array")
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype:
        require(bits(a) == bits(b), f"{path}: {b!r} instead of {a!r}")
    else:
        require(same_number(plain(a), plain(b)), f"{path}: {b!r} instead of {a!r}")


MESSAGE = re.compile(r"[A-Za-z_]\w*(\[[^\]]*\]| \([^)]*\))*(, \w+)*: |params: |.* both 0")


def must_load_or_refuse(
    load: Callable[[], Any],
    opt: Any,
    *arrays: Any,
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError),
    label: str = "",
) -> bool:
    """Whether it was loaded; if not, one error of those kinds that names what is wrong, and nothing has changed."""
    snapshot = Snapshot(opt if isinstance(opt, onepass.Optimizer) else None, *arrays)
    before = opt.state_dict()
    try:
        load()
    except kinds as error:
        snapshot.assert_unchanged()
        same_state(before, opt.state_dict())
        if not isinstance(error, OSError):
            told = str(error)
            named = told.startswith(label) and (label != "" or MESSAGE.match(told) is not None)
            require(named and "truth value" not in told, f"nothing is named in {error!r}")
        return False
    return True


def train_a_little(c: Choices, plan: Plan, training: Training) -> None:
    for _ in range(c.integer(0, 3)):
        grads = some_gradients(c, plan, all_present=False, writable=False)
        training.opt.step(plan.shaped([None if g is None else g.view for g in grads]))


def load_state_dict(c: Choices, story: Story, machine: Machine) -> str:
    """A state dict with one place changed: refused, or loaded as it says and then stepped."""
    if c.chance(4):
        return load_layer_state(c, story)
    plan = plans.draw(c, story, small=True)
    machine.choose(c, story)
    source, target = plan.begin(), plan.begin()
    train_a_little(c, plan, source)
    train_a_little(c, plan, target)
    saved = source.opt.state_dict()
    for _ in range(c.pick((0, 1, 1, 2))):
        mutate(c, story, saved)
    loaded = must_load_or_refuse(lambda: target.opt.load_state_dict(saved), target.opt, target.params, target.mirrors)
    story.meet("loaded" if loaded else "refused")
    if not loaded:
        return "refused"
    same_state(saved, target.opt.state_dict())
    go_on(c, plan, target, story)
    return "compared"


def go_on(c: Choices, plan: Plan, training: Training, story: Story) -> None:
    """A step from wherever the state is, by the reference; a state in which no step is possible says so."""
    opt = training.opt
    if opt._updater.swapped:
        with must_refuse(training.params, opt=opt, kinds=(RuntimeError,)):
            opt.step(plan.shaped([np.zeros_like(p) for p in training.params]))
        opt.swap_ema()
    reference = plan.reference(training)
    grads = some_gradients(c, plan, all_present=False, writable=False)
    advance(plan, training, reference, grads, {})


def load_layer_state(c: Choices, story: Story) -> str:
    dtype = c.pick((np.float32, np.float64))
    affine = not c.chance(3)
    source, target = (onepass.BatchNorm(3, affine=affine, dtype=dtype) for _ in range(2))
    rng = np.random.default_rng(c.seed())
    source.forward(rng.standard_normal((4, 3)).astype(dtype))
    saved = source.state_dict()
    mutate(c, story, saved)
    story.meet("layer")
    if not must_load_or_refuse(lambda: target.load_state_dict(saved), target):
        return "refused"
    same_state(saved, target.state_dict())
    return "compared"


SCENES: dict[str, Callable[[Choices, Story, Machine], str]] = {
    "step": step,
    "functional": functions,
    "batch_norm": batch_norm,
    "load_state_dict": load_state_dict,
    "load": files.load,
}

"""Promise: the same bits everywhere. On CUDA devices every step gives what the CPU gives, element for element."""

from __future__ import annotations

import functools
import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cuda_arrays
import onepass
from cuda_arrays import (
    DlpackOnly,
    InterfaceOnly,
    Pair,
    TorchLike,
    Twin,
    assert_same,
    assert_same_number,
    check,
    cp,
    on_device,
    on_host,
    require_two_devices,
)
from helpers import arrays_of, copied, numbers, update
from onepass import _cpu, functional
from reference.expressions import assert_same_bits
from test_bits import COEFFICIENTS
from test_bits import special_values as special_wide_values
from test_storage import DTYPES, OF_RULE, TABLE, in_dtypes, special
from test_whole_step import ALONE, EVERYTHING, KINDS, SCALAR, STEP_OF_EVERYTHING, WITHOUT_MIRRORS, decay_of, scenes
from training import BFLOAT16, FEW, FUNCTIONS, OPTIMIZERS, Call, Functional, Kind, make

pytestmark = pytest.mark.cuda

NAN, INF = math.nan, math.inf
LANES = 8  # of the widest vector: 16 bytes of a 16-bit type
TAILS = (*range(2 * LANES + 2), 31, 127, 128, 129)
BLOCK = 4096  # elements of a sum's block, and of a float32 vector kernel's
RULES = {row["name"]: row for row in _cpu.registry() if not row["yardstick"]}


# Every rule, storage and option


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("rule", OF_RULE)
def test_every_rule_in_every_storage(rule, row, rounding):
    """Guard bytes, odd offsets, all tails, other layouts, more than one block."""
    sizes = (*TAILS, BLOCK + 3) if rounding == "nearest" else (*range(0, 18, 3), 127, 129, BLOCK + 3)
    kinds = [Kind((n,), row[0], row[1], offset=(7 * k) % 64) for k, n in enumerate(sizes)]
    kinds.append(Kind((2 * BLOCK + 5,), row[0], row[1]))
    kinds.append(Kind((), row[0], row[1]))
    kinds.append(Kind((23, 31), row[0], row[1], axes=(1, 0), layout="reversed"))
    kinds.append(Kind((3, 5, 41), row[0], row[1], axes=(1, 2, 0), layout="gaps", offset=1))
    options = {**in_dtypes(row), "rounding": rounding, "seed": 11}
    name = OF_RULE[rule]
    check(functools.partial(make, name), kinds, options, [Call()] * 2, what=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    kinds = [Kind((n,), dtype) for n in (3, 100) for dtype in ("float32", "float64", "bfloat16", "float16")]
    check(functools.partial(make, name), kinds, {}, [Call(factor=1.0 + k) for k in range(5)], what=name)


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_option_alone(name, option):
    options, step_options = ALONE[option]
    kinds = KINDS if option == "mirror" else WITHOUT_MIRRORS
    if option != "max_unit_norm":
        kinds = (*kinds, SCALAR)
    calls = [Call(factor=1.0 + k, options=step_options) for k in range(4 if option == "accumulate" else 3)]
    check(functools.partial(make, name), kinds, options, calls, what=name)


RULE_OF_PAIR = dict(zip(itertools.product(TABLE, ALONE), itertools.cycle(OF_RULE.values()), strict=False))


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_an_option_alone_in_every_storage(row, option):
    """Each pair with a rule that others do not have."""
    name = RULE_OF_PAIR[row, option]
    options, step_options = ALONE[option]
    mirror = "float16" if option == "mirror" else None
    kinds = [Kind((n,), row[0], row[1], offset=n % 7, mirror=mirror) for n in (1, 7, 8, 9, 40, 129, BLOCK + 1)]
    kinds += [Kind((17, 5), row[0], row[1], axes=(1, 0), layout=way, mirror=mirror) for way in ("same", "reversed")]
    check(
        functools.partial(make, name), kinds, {**options, **in_dtypes(row)}, [Call(options=step_options)] * 2, what=name
    )


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_alone_through_functional(name, option):
    options, step_options = ALONE[option]
    kinds = (KINDS if option == "mirror" else WITHOUT_MIRRORS)[1:5]
    calls = [Call(factor=1.0 + k, options=step_options) for k in range(2)]
    check(functools.partial(Functional, name), kinds, options, calls, what=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_options_together(name):
    calls = [Call(options=STEP_OF_EVERYTHING)] * 4
    check(functools.partial(make, name), KINDS, EVERYTHING, calls, what=name)
    check(functools.partial(Functional, name), KINDS, EVERYTHING, calls, what=name)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("name", FEW)
def test_every_storage_with_all_that_rides_along(name, row, rounding):
    options = {"ema_decay": 0.75, "accumulate": 2, "max_unit_norm": (3.0, 0), "gradient_noise": (0.1, 0.5), "seed": 3}
    options.update(in_dtypes(row), rounding=rounding)
    kinds = [Kind((n,), row[0], row[1], mirror=("bfloat16", "float16")[n % 2], offset=n % 9) for n in (1, 16, 37, 1100)]
    kinds.append(Kind((41, 33), row[0], row[1], axes=(1, 0), layout="backwards", mirror="float16", mirror_axes=(0, 1)))
    kinds.append(Kind((5, 3, 20), row[0], row[1], axes=(0, 2, 1), layout="gaps", mirror="bfloat16"))
    step = {"grad_scale": 1 / 3, "max_grad_norm": 3.0, "nonfinite": "skip", "zero_grads": True}
    check(functools.partial(make, name), kinds, options, [Call(options=step)] * 4, what=name)


@hypothesis_settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenes())
def test_any_combination(scene):
    name, through, kinds, options, calls, _ = scene
    check(functools.partial(through, name), kinds, options, calls, moves=False)


def test_one_optimizer_of_many_dtypes():
    rows = [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", None), ("float64", None), ("float32", None)]
    rows += [("float32", "float16"), ("bfloat16", None)]
    kinds = [Kind((37 + k,), *row) for k, row in enumerate(rows * 3)]
    calls = [Call(), Call(options={"max_grad_norm": 2.0}), Call(options={"clip_norm": 2.0, "zero_grads": True})]
    check(functools.partial(make, "Adam"), kinds, {}, calls)
    check(functools.partial(make, "Adam"), kinds, {"ema_decay": 0.5, "rounding": "stochastic"}, calls)


# Where vectors begin, and blocks end


def offset_cases(row):
    """(offset of the parameter, of the gradient) in bytes: all at whole items within 16 bytes, and some at odd ones."""
    sizes = [np.dtype(DTYPES[name]).itemsize for name in row[:2]]
    every = list(itertools.product(range(0, 16, sizes[0]), range(0, 16, sizes[1])))
    odd = [(a, b) for a in range(16) for b in (0, 1, 3) if a % sizes[0] or b % sizes[1]]
    return every, odd


@pytest.mark.parametrize("row", [TABLE[0], TABLE[1], TABLE[5], TABLE[7], TABLE[8]], ids="-".join)
@pytest.mark.parametrize("whole", [False, True])
def test_every_offset(row, whole):
    """Parameter, gradient and states at every byte that 16-byte accesses can meet, of 31 elements each."""
    dtypes = [DTYPES[name] for name in row]
    aligned, odd = offset_cases(row)
    if not whole:
        odd = odd[::3]  # each is copied into order by launches of its own
    else:
        odd, aligned = odd[::7], aligned[::2]
    kinds = {}
    for at, grad_at in (*aligned, *odd):
        param = Kind((31,), dtypes[0], offset=at).param(at)[0]
        grad = Kind((31,), dtypes[1], offset=(grad_at - 3) % 64).gradient(grad_at)
        kinds[at, grad_at] = (param, grad)
    params, grads = (list(column) for column in zip(*kinds.values(), strict=True))
    slots = [
        [
            Kind((31,), dtypes[2], offset=(grad_at + shift) % 16 if (at, grad_at) in odd else at // 4 * 4).param(9)[0]
            for at, grad_at in kinds
        ]
        for shift in (0, 2)
    ]
    for v in slots[1]:
        v[...] = np.abs(v.astype(np.float64)).astype(v.dtype)
    twins = [[Twin(array) for array in stream] for stream in (params, grads, *slots)]
    names = RULES["adam"]["coefficients"]
    coefficients = {name: COEFFICIENTS[name] for name in names}
    if not whole:
        update("adam", params, grads, slots, coefficients, scale=0.7)
        arrays = [[twin.array for twin in stream] for stream in twins]
        update("adam", arrays[0], arrays[1], arrays[2:], coefficients, scale=0.7)
    else:
        options = {"step": 3, "rounding": "stochastic", "zero_grads": True, "max_grad_norm": 3.0}
        functional.adam(params, grads, *slots, **options)
        functional.adam(*([twin.array for twin in stream] for stream in twins), **options)
    for what, stream, hosts in zip(("param", "grad", "m", "v"), twins, (params, grads, *slots), strict=True):
        for case, twin, host in zip(kinds, stream, hosts, strict=True):
            assert_same_bits(twin.get(), host, f"{what} at {case}")
            assert twin.untouched(), f"{what} at {case} was written beside its elements"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_borders_of_blocks(dtype, whole):
    """One element more or less than 1, 2 and 3 blocks of each kind: vectors, groups of random numbers, sums."""
    per_vector = {"float32": 4, "bfloat16": 8, "float64": 2}[dtype]
    sizes = {k * block + d for block in (1024 * per_vector, BLOCK) for k in (1, 2, 3) for d in (-1, 0, 1)}
    sizes |= {127, 128, 129, 16 * BLOCK + 1}
    kinds = [Kind((n,), dtype, mirror="bfloat16" if whole else None) for n in sorted(sizes)]
    options = {"gradient_noise": (0.1, 0.5), "ema_decay": 0.5} if whole else {}
    check(functools.partial(make, "Adam"), kinds, options, [Call(options={"max_grad_norm": 3.0} if whole else {})])


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_long_sums(name):
    """More than 32 blocks' sums, of one tensor and of many, and more than 32 tensors' sums."""
    kinds = [Kind((33 * BLOCK + 5,)), Kind((70 * BLOCK,), "float32", "bfloat16"), *[Kind((k,)) for k in range(1, 70)]]
    kinds.append(Kind((33, BLOCK + 1), axes=(1, 0), layout="reversed"))
    for options in ({"max_grad_norm": 5.0}, {"clip_norm": 5.0}):
        check(functools.partial(make, name), kinds, {}, [Call(options=options)])


@pytest.mark.parametrize("tensors", [1, 3, 100])
def test_the_order_of_sums_shows(tensors):
    """Of blocks' sums and of tensors' sums: one square in each, and in another order they round to another norm."""
    rng = np.random.default_rng(5)
    blocks = {1: 99, 3: 40, 100: 1}[tensors]
    others = 0
    for _ in range(20):
        grads = [np.zeros((blocks, BLOCK if blocks > 1 else 1)) for _ in range(tensors)]
        for grad in grads:
            grad[:, 0] = rng.uniform(1, 2, blocks)
        a, b = (onepass.SGD(on([np.zeros(grad.shape) for grad in grads])) for on in (list, on_device))
        a.step(grads, max_grad_norm=INF)
        b.step(on_device(grads), max_grad_norm=INF)
        assert_same_number(b.grad_norm, a.grad_norm)
        squares = np.concatenate([grad[:, 0] ** 2 for grad in grads])
        others += a.grad_norm != math.sqrt(np.cumsum(squares)[-1])
    assert others > 5


def test_an_array_that_is_copied_in_several_pieces():
    """Elements in another order go through scratch memory, 2**21 at a time."""
    count = (1 << 21) + 4100
    kinds = [Kind((2, count // 2), layout="reversed", mirror="bfloat16")]
    options = {"rounding": "stochastic", "gradient_noise": (0.1, 0.5), "max_unit_norm": (3000.0, 1)}
    check(functools.partial(make, "SGD"), kinds, options, [Call(options={"max_grad_norm": 5.0})], moves=False)


# Numbers that are none


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("rule", OF_RULE)
def test_special_values_in_every_role(rule, row, rounding):
    name = OF_RULE[rule]
    param, grad = (x.ravel() for x in np.meshgrid(special(row[0]), special(row[1])))
    values = special(row[2])
    mirror_dtype = np.float16 if row[0] == "bfloat16" else BFLOAT16
    for skip in (0, 1):  # shifts which values meet a tail
        p, g = param[skip:].copy(), grad[skip:].copy()
        mirror = np.zeros(p.size, mirror_dtype)
        arrays = {"host": (p, g, mirror), "device": on_device((p, g, mirror))}
        opts = []
        for now, gradient, shown in arrays.values():
            opt = make(name, now, mirror=shown, rounding=rounding, seed=5, **in_dtypes(row))
            for k, slot in enumerate(opt.state[0]):
                start = np.resize(np.roll(values, 3 * k), param.size)[skip:]
                if now is p:
                    opt.state[0][slot][...] = start
                else:
                    opt.state[0][slot].set(start)
            opt.step(gradient)
            opts.append(opt)
        assert_same(arrays["device"], arrays["host"], "param, grad, mirror")
        assert_same(dict(opts[1].state[0]), dict(opts[0].state[0]))
        assert np.isnan(p.astype(np.float64)[np.isnan(g.astype(np.float64))]).all()


@pytest.mark.parametrize("surroundings", [{}, {"scale": -0.37, "l1": 1e-3, "l2": 0.013, "decay": 0.991}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_every_mixture_of_special_values(rule, dtype, surroundings):
    """NaN, infinities, zeros, huge, tiny and subnormal numbers, over parameter, gradient and all slots."""
    values = special_wide_values(dtype)
    grid = np.meshgrid(*[values if k < 3 else values[:8] for k in range(2 + len(RULES[rule]["slots"]))], indexing="ij")
    host = [axis.ravel() for axis in grid]
    device = on_device(host)
    coefficients = {name: COEFFICIENTS[name] for name in RULES[rule]["coefficients"]}
    for param, grad, *slots in (host, device):
        update(rule, [param], [grad], [[slot] for slot in slots], coefficients, **surroundings)
    assert_same(device, host, rule)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_that_decay_become_zero_and_not_subnormal(dtype):
    tiny = np.finfo(dtype).tiny
    param = cp.ones(1037, dtype)
    opt = onepass.Adam(param, betas=(0.5, 0.5))
    opt.state[0]["exp_avg"][...] = tiny * 16
    opt.state[0]["exp_avg_sq"][...] = tiny * 16
    for step in range(6):
        opt.step(cp.zeros(1037, dtype))
        moment = opt.state[0]["exp_avg"].get()
        assert ((moment == 0) | (moment >= tiny)).all()
        assert (moment != 0).all() == (step < 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_subnormal_operands_and_results(dtype):
    """Flushed on the way in and out, also where an intermediate result alone is subnormal, and in sums and averages."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    exponents = rng.integers(-12, 12, 4000)
    values = (rng.choice([-1.0, 1.0], 4000) * rng.uniform(1, 2, 4000)).astype(dtype) * info.tiny
    grad = np.ldexp(values, exponents).astype(dtype)
    start = np.ldexp(values[::-1], exponents // 2).astype(dtype)
    for name in ("SGD", "Momentum", "Adam", "AdaGrad", "RMSprop-both", "AMSGrad"):
        host = start.copy()
        device = on_device(host)
        opts = [make(name, param, lr=0.5, ema_decay=0.5, weight_decay=0.25) for param in (host, device)]
        for scale in (1.0, 0.125, 3.0):
            opts[0].step(grad, grad_scale=scale, max_grad_norm=1.0)
            opts[1].step(cp.asarray(grad), grad_scale=scale, max_grad_norm=1.0)
            assert_same_number(opts[1].grad_norm, opts[0].grad_norm)
        assert_same(device, host, name)
        assert_same(dict(opts[1].state[0]), dict(opts[0].state[0]), name)


@pytest.mark.parametrize("limit", ["max_grad_norm", "clip_norm", "clip_value"])
@pytest.mark.parametrize("value", [1.0, INF, 1e-300])
def test_clipping_what_is_not_finite(limit, value):
    if limit == "clip_value" and value == INF:
        value = 1e300
    for bad in (INF, -INF, NAN, 1e200):
        host = [np.zeros(100), np.zeros(5)]
        device = on_device(host)
        grads = [np.ones(100), np.full(5, 2.0)]
        grads[0][37] = bad
        opts = [onepass.SGD(params, lr=1.0) for params in (host, device)]
        opts[0].step(grads, **{limit: value})
        opts[1].step(on_device(grads), **{limit: value})
        assert_same_number(opts[1].grad_norm, opts[0].grad_norm, f"{bad}")
        assert_same(device, host, f"{bad}")


def test_skipping_and_raising_for_every_kind_of_bad_number():
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for bad, at in itertools.product((INF, -INF, NAN), (0, 37, BLOCK, 3 * BLOCK - 1)):
            device = on_device([numbers(5, DTYPES[dtype]), numbers(3 * BLOCK, DTYPES[dtype])])
            before = on_host(device)
            grads = [numbers(5, DTYPES[dtype], seed=1), numbers(3 * BLOCK, DTYPES[dtype], seed=2)]
            grads[1][at] = bad
            opt = onepass.SGD(device, lr=0.5)
            opt.step(on_device(grads), nonfinite="skip")
            with pytest.raises(FloatingPointError, match=r"^grads\[1\]: "):
                opt.step(on_device(grads), nonfinite="raise")
            assert (opt.skipped, opt.step_counts) == (1, (0, 0))
            assert not np.isfinite(float(opt.grad_norm))
            assert_same(device, before)


# Units, masters, averages


UNIT_AXES = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("axes", UNIT_AXES, ids=str)
@pytest.mark.parametrize("row", [TABLE[0], TABLE[4], TABLE[8]], ids="-".join)
def test_units_along_every_axis(axes, row):
    kinds = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        kinds.append(Kind((5, 7, 33), row[0], row[1], axes=order, mirror="float16", offset=len(kinds)))
        kinds.append(Kind((1, 3, 2), row[0], row[1], axes=order, layout="backwards"))
    kinds.append(Kind((2, 0, 3), row[0], row[1]))
    for options in ({}, {"ema_decay": 0.5, "rounding": "stochastic"}):
        options = {"max_unit_norm": (1.5, axes), **options}
        check(functools.partial(make, "Momentum"), kinds, options, [Call()] * 2, moves=False)


def test_long_units():
    kinds = [Kind((3, 20_001)), Kind((20_001, 3)), Kind((2, 33 * BLOCK + 1))]
    for axis in (0, 1):
        options = {"max_unit_norm": (2.0, axis), "ema_decay": 0.5}
        check(functools.partial(make, "SGD"), kinds, options, [Call()], moves=False)


@pytest.mark.parametrize("grad", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FEW)
def test_split_masters(name, grad):
    kinds = [Kind((n,), "bfloat16", grad, offset=n % 3) for n in (*range(10), 129, BLOCK + 1)]
    kinds.append(Kind((23, 31), "bfloat16", grad, axes=(1, 0), layout="reversed", mirror="float16"))
    for options in ({}, {"ema_decay": 0.5, "max_unit_norm": (3.0, 0)}, {"accumulate": 2, "gradient_noise": (0.1, 0)}):
        pair = check(functools.partial(make, name), kinds, {"master": "split", **options}, [Call()] * 2, moves=False)
        assert_same(pair.opt.master, pair.host.opt.master)
        if "ema_decay" in options:
            swap_and_back(pair)


def swap_and_back(pair):
    for _ in range(2):
        pair.host.opt.swap_ema()
        pair.opt.swap_ema()
        pair.compare("exchanged")


@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_averages_are_exchanged(row):
    kinds = [Kind((n,), *row[:2], mirror="bfloat16", offset=n % 5) for n in (0, 1, 17, BLOCK + 1)]
    kinds.append(Kind((23, 31), *row[:2], axes=(1, 0), mirror="float16", mirror_axes=(0, 1)))
    kinds.append(Kind((), *row[:2]))
    pair = Pair(functools.partial(make, "Adam"), kinds, {"ema_decay": decay_of, **in_dtypes(row)})
    swap_and_back(pair)  # nothing was stepped yet
    pair.step(Call(present=(True, True, True, False, True, False)))
    swap_and_back(pair)
    pair.step(Call())
    swap_and_back(pair)
    pair.host.opt.swap_ema()
    pair.opt.swap_ema()
    with pytest.raises(RuntimeError, match="exchanged"):
        pair.opt.step([None] * len(kinds))
    assert_same(pair.opt.ema, pair.host.opt.ema)


@pytest.mark.parametrize("name", FEW)
def test_sums_of_gradients_that_are_missing(name):
    """A parameter may have no gradient in any or in all calls of a round."""
    kinds = [Kind((n,), mirror="bfloat16") for n in (3, 17, 130, 5)]
    kinds.append(Kind((11, 13), axes=(1, 0), layout="reversed"))
    rounds = [(1, 1, 1, 0, 1), (0, 1, 0, 0, 1), (0, 0, 1, 0, 0), (0, 0, 0, 1, 1), (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)]
    for options in ({}, {"max_grad_norm": 1.0}, {"nonfinite": "skip", "grad_scale": 0.25, "zero_grads": True}):
        pair = Pair(functools.partial(make, name), kinds, {"accumulate": 3, "ema_decay": 0.5, "seed": 5})
        for present in rounds:
            pair.step(Call(present=tuple(map(bool, present)), options=options))
            pair.compare(str(present))
    assert pair.host.opt.step_counts == (2, 1, 1, 1, 2)


def test_a_sum_that_is_skipped_is_kept():
    kinds = [Kind((33,)), Kind((5,))]
    for bad in range(3):
        pair = Pair(functools.partial(make, "Adam"), kinds, {"accumulate": 3})
        for k in range(4):
            pair.step(Call(factor=NAN if k == bad else 1.0, options={"nonfinite": "skip"}))
            pair.compare(f"bad {bad}")
        assert pair.opt.skipped == 1
        assert pair.opt.step_counts == (1, 1)


# The optimizers' other faces


def test_weights_of_nesterov():
    for dtype, options in (("float32", {}), ("float64", {}), ("bfloat16", {"master": "split"}), ("bfloat16", {})):
        kinds = [Kind((n,), dtype, offset=n % 3) for n in (1, 5, 100)] + [Kind((5, 7), dtype, axes=(1, 0))]
        for outside in (False, True):
            factory = functools.partial(make, "NAG", lr_in_velocity=not outside)
            pair = check(factory, kinds, options, [Call()] * 2)
            assert_same(pair.opt.weights(), pair.host.opt.weights(), f"{dtype} {options}")


def test_groups_rates_and_structures():
    """Dicts, groups with rates of their own, rates that change, gradients that are bound, None among gradients."""

    def tree():
        return [
            {"params": {"w": numbers((17, 5)), "b": numbers(5, seed=1)}, "lr": lambda t: 0.5 / t, "weight_decay": 0.1},
            {"params": [numbers(100, seed=2), numbers((3, 4), np.float64, seed=3)], "maximize": True},
        ]  # fmt: skip

    def gradients(seed):
        return [
            {"w": numbers((17, 5), seed=seed), "b": None if seed % 2 else numbers(5, seed=seed)},
            [numbers(100, seed=seed + 1), numbers((3, 4), np.float64, seed=seed + 2)],
        ]

    host = tree()
    device = [{**group, "params": on_device(group["params"])} for group in tree()]
    opts = [onepass.AdamW(params, lr=0.01, ema_decay=0.9) for params in (host, device)]
    for k in range(4):
        grads = gradients(10 * k + k % 2)
        opts[0].step(copied(grads), max_grad_norm=3.0)
        opts[1].step(on_device(grads), max_grad_norm=3.0)
        for opt in opts:
            opt.param_groups[1]["lr"] = 0.1 / (k + 1)
    assert opts[1].step_counts == opts[0].step_counts == (4, 2, 4, 4)
    for a, b in zip(device, host, strict=True):
        assert_same(a["params"], b["params"])
    assert_same(opts[1].ema, opts[0].ema)
    for k in range(4):
        assert_same(dict(opts[1].state[k]), dict(opts[0].state[k]))


def test_bound_gradients_and_one_array():
    host, grad = numbers(1000), numbers(1000, seed=1)
    device, gradient = on_device([host, grad])
    a, b = onepass.Adam(host, grads=grad), onepass.Adam(device, grads=gradient)
    for _ in range(3):
        a.step()
        b.step(zero_grads=False)
    assert_same(device, host)
    assert b.ema is None
    assert_same(dict(b.state[0]), dict(a.state[0]))


@pytest.mark.parametrize(
    "step", [{}, {"max_grad_norm": 2.0}, {"clip_norm": 2.0, "nonfinite": "raise"}, {"zero_grads": True}]
)
def test_bound_gradients_of_many_arrays(step):
    """Whose launches may be kept: rates, counts, gradients, options and streams change between the steps."""
    shapes = [(3,), (100,), (7, 5), (), (0,), (BLOCK + 1,)] * 3
    host = [numbers(shape, np.float64 if k % 4 == 3 else np.float32, seed=k) for k, shape in enumerate(shapes)]
    grads = [numbers(array.shape, array.dtype, seed=50 + k) for k, array in enumerate(host)]
    device, given = on_device(host), [Twin(grad, offset=0) for grad in grads]
    gradients = [twin.array for twin in given]

    def groups(arrays):
        return [{"params": arrays[:5], "lr": lambda t: 0.1 / t}, {"params": arrays[5:], "weight_decay": 0.1}]

    options = {"ema_decay": 0.5} if "clip_norm" in step else {}
    a = onepass.AdamW(groups(host), grads=[grads[:5], grads[5:]], **options)
    b = onepass.AdamW(groups(device), grads=[gradients[:5], gradients[5:]], **options)
    stream = cp.cuda.Stream(non_blocking=True)
    for k in range(9):
        now = {} if k == 4 else {"grad_scale": 0.5, **step} if k == 6 else step
        for twin, grad in zip(given, grads, strict=True):
            grad *= np.asarray(-0.75, grad.dtype)
            twin.set(grad)
        if k == 5:
            for opt in (a, b):
                opt.param_groups[1]["lr"] = 0.25
        if k == 3:
            for opt, arrays in ((a, grads), (b, gradients)):  # apart from what is bound
                opt.step([[*arrays[:3], None, arrays[4]], [None, *arrays[6:]]], **now)
        a.step(**now)
        cp.cuda.Device().synchronize()
        if k % 3 == 2:
            with stream:
                b.step(**now)
            stream.synchronize()
        else:
            b.step(**now)
        assert_same_number(b.grad_norm, a.grad_norm, f"step {k}")
        assert_same(device, host, f"step {k}")
    assert_same(gradients, grads)
    assert b.step_counts == a.step_counts
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))


def test_an_optimizer_of_nothing_and_steps_of_nothing():
    device = on_device([numbers(5), np.empty((0, 3), np.float32)])
    before = on_host(device)
    opt = onepass.Adam(device, ema_decay=0.5)
    opt.step([None, None])
    opt.step([None, None], max_grad_norm=1.0, nonfinite="skip")
    assert_same(device, before)
    assert (opt.step_counts, opt.skipped) == ((0, 0), 0)
    opt.step([None, cp.empty((0, 3), np.float32)], max_grad_norm=1.0)
    assert float(opt.grad_norm) == 0.0
    assert opt.step_counts == (0, 1)
    assert_same(device, before)


@pytest.mark.parametrize("names", [("SGD", 1100), ("Adam", 1000)], ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_more_tensors_than_a_table_has(names, whole):
    name, count = names
    rng = np.random.default_rng(0)
    kinds = [Kind((int(n),)) for n in rng.integers(0, 9, count)]
    options = {"ema_decay": 0.5} if whole else {}
    step = {"clip_norm": 1.0} if whole else {}
    pair = Pair(functools.partial(make, name), kinds, options)
    pair.step(Call(options=step))
    pair.compare()


def test_a_thousand_tensors_take_no_more_than_four_launches():
    runtime = cuda_arrays.host_runtime()
    for name in ("SGD", "Adam"):
        params = [cp.zeros(k % 9 + 1, np.float32) for k in range(1000)]
        opt = make(name, params)
        with runtime.counted() as counts:
            opt.step([cp.ones(param.shape, np.float32) for param in params])
        assert counts["cudaLaunchKernel"] <= 4, name
        assert all(bool((param != 0).all()) for param in params)


def test_more_settings_than_a_table_has():
    """One for each group and count: more than six, in turns."""

    def groups():
        return [
            {"params": [numbers(20 + k, seed=k), numbers(5, np.float64, seed=k), numbers(7, BFLOAT16, seed=k)],
             "lr": 0.01 * (k + 1), "weight_decay": 0.01 * k}
            for k in range(9)
        ]  # fmt: skip

    host = groups()
    device = [{**group, "params": on_device(group["params"])} for group in groups()]
    opts = [onepass.Adam(params) for params in (host, device)]
    rng = np.random.default_rng(1)
    for k in range(5):
        grads = [
            [None if rng.random() < 0.3 else numbers(p.shape, p.dtype, seed=k) for p in group["params"]]
            for group in host
        ]
        opts[0].step(copied(grads))
        opts[1].step(on_device(grads))
    assert opts[1].step_counts == opts[0].step_counts
    assert len(set(opts[0].step_counts)) > 2
    for a, b in zip(device, host, strict=True):
        assert_same(a["params"], b["params"])


def test_states_where_the_user_wants_them():
    memory, taken = cp.full(1000, 7, np.float32), []

    def allocate(name, shape, dtype):
        taken.append(name)
        start = 101 * (len(taken) - 1) + 1
        return memory[start : start + math.prod(shape)].reshape(shape)

    host = [numbers(100), numbers((5, 20), seed=1)]
    device = on_device(host)
    a = onepass.AdaGrad(host, initial_accumulator=0.5, ema_decay=0.5)
    b = onepass.AdaGrad(device, initial_accumulator=0.5, ema_decay=0.5, state_alloc=allocate)
    assert [name[:2] for name in taken] == ["0.", "0.", "1.", "1."]
    for k in range(3):
        grads = [numbers(100, seed=k), numbers((5, 20), seed=k + 9)]
        a.step(copied(grads))
        b.step(on_device(grads))
    assert_same(device, host)
    for k in range(2):
        assert_same(dict(b.state[k]), dict(a.state[k]))
        for array in b.state[k].values():
            assert memory.data.ptr <= array.data.ptr < memory.data.ptr + memory.nbytes
    assert (memory.get()[[0, 101, 202, 303]] == 7).all()
    with pytest.raises(TypeError, match=r"state_alloc.*expected a CuPy array, got ndarray"):
        onepass.Adam(device, state_alloc=lambda _name, shape, dtype: np.zeros(shape, dtype))


# State dicts and checkpoints


ROUND_TRIPS = {
    "plain": {},
    "everything": {**EVERYTHING, "max_unit_norm": (3.0, 0)},
    "split": {"master": "split", "ema_decay": 0.5},
    "stochastic": {"rounding": "stochastic", "seed": 3, "gradient_noise": (0.1, 0.5)},
}


def kinds_for(options):
    dtype = "bfloat16" if "master" in options else "float32"
    return [
        Kind((33,), dtype, offset=3),
        Kind((7, 11), dtype, axes=(1, 0), mirror="float16"),
        Kind((1, 0, 2), dtype),
        Kind((300,), dtype if "master" in options else "float64"),
    ]


def begin_anew(pair, factory, options):
    """A pair of new optimizers whose parameters are those that `pair` has now; of other kinds of arrays."""
    new = Pair(factory, pair.kinds, options)
    for old, twin, host in zip(pair.host.params, new.params, new.host.params, strict=True):
        twin.set(old)
        host[...] = old
    new.calls = pair.calls
    return new


@pytest.mark.parametrize("options", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("name", ["AdamW", "RMSprop-both", "SGD"])
def test_state_dicts_go_between_host_and_device(name, options):
    factory = functools.partial(make, name)
    pair = Pair(factory, kinds_for(options), options)
    for _ in range(3):
        pair.step(Call(options={"nonfinite": "skip"}))
    pair.step(Call(factor=INF, options={"nonfinite": "skip"}))
    taken = pair.opt.state_dict()
    assert_same(taken["state"], pair.host.opt.state_dict()["state"])
    kept = on_host(taken)
    same = begin_anew(pair, factory, options)
    same.opt.load_state_dict(taken)
    same.host.opt.load_state_dict(kept)
    crossed = begin_anew(pair, factory, options)
    crossed.opt.load_state_dict(kept)
    crossed.host.opt.load_state_dict(pair.host.opt.state_dict())
    for later in (same, crossed):
        later.compare("loaded")
        for _ in range(3):
            later.step(Call(options={"nonfinite": "skip", "max_grad_norm": 3.0}))
        later.compare("stepped after loading")
    pair.step(Call())
    assert_same(taken, kept, "a snapshot stays what it is")


@pytest.mark.parametrize("options", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("direction", ["host-device", "device-host", "device-device"])
def test_checkpoints_go_between_host_and_device(tmp_path, options, direction):
    factory = functools.partial(make, "AdamW")
    pair = Pair(factory, kinds_for(options), options)
    for _ in range(3):
        pair.step(Call(options={"nonfinite": "skip"}))
    pair.step(Call(factor=INF, options={"nonfinite": "skip"}))
    source, target = direction.split("-")
    extra = {"loss": 0.5, "batch": pair.opt.state[0].get("exp_avg")}
    onepass.save(tmp_path / "c", pair.host.opt if source == "host" else pair.opt, **extra)
    new = Pair(factory, kinds_for(options), options)
    got = onepass.load(tmp_path / "c", new.host.opt if target == "host" else new.opt)
    assert got["loss"] == 0.5
    assert_same_bits(got["batch"], on_host(extra["batch"]))
    other = new.opt if target == "host" else new.host.opt
    onepass.save(tmp_path / "d", pair.host.opt)
    onepass.load(tmp_path / "d", other)
    new.calls = pair.calls
    new.compare("loaded")
    for a, b in zip(new.params, pair.params, strict=True):
        assert_same_bits(a.get(), b.get())
    for _ in range(3):
        for which in (pair, new):
            which.step(Call(options={"max_grad_norm": 3.0}))
    new.compare("stepped after loading")
    for a, b in zip(new.params, pair.params, strict=True):
        assert_same_bits(a.get(), b.get())


# What exports its memory


EXPORTERS = {"dlpack": DlpackOnly, "interface": InterfaceOnly, "torch-like": TorchLike}


@pytest.mark.parametrize("export", EXPORTERS.values(), ids=EXPORTERS)
@pytest.mark.parametrize("name", FEW)
def test_arrays_of_others(name, export):
    shapes = [((33,), None), ((7, 11), (1, 0)), ((), None), ((0, 2), None), ((2, 3, 5), (2, 0, 1))]
    host = [Kind(shape, axes=axes).param(k)[0] for k, (shape, axes) in enumerate(shapes)]
    device = on_device(host)
    options = {"ema_decay": 0.5, "accumulate": 2}
    a, b = make(name, host, **options), make(name, [export(array) for array in device], **options)
    for k in range(4):
        grads = [Kind(shape, axes=axes, layout="backwards").gradient(k) for shape, axes in shapes]
        a.step(grads, max_grad_norm=1.0)
        b.step([export(array) for array in on_device(grads)], max_grad_norm=1.0)
        assert_same_number(b.grad_norm, a.grad_norm)
    assert_same(device, host)
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))
    a.swap_ema()
    b.swap_ema()
    assert_same(device, host)


def test_bfloat16_of_others():
    host = numbers(100, BFLOAT16)
    device = on_device(host)
    shown, mirror = np.zeros(100, np.float16), cp.zeros(100, np.float16)
    a = make("Adam", host, mirror=shown, master="split")
    b = make("Adam", TorchLike(device), mirror=InterfaceOnly(mirror), master="split")
    for k in range(3):
        grad = numbers(100, BFLOAT16, seed=k)
        a.step(grad)
        b.step(DlpackOnly(on_device(grad)))
    assert_same(device, host)
    assert_same(b.master, a.master)
    assert_same(mirror, shown)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_single_arrays_and_exporters(name):
    options = OPTIMIZERS[name][1]
    probe = make(name, np.ones(3, np.float32))
    slots = list(probe.state[0])
    values = [np.abs(numbers(50, seed=k)) for k in range(2 + len(slots))]
    device = on_device(values)
    hyper = {key: value for key, value in options.items() if key not in ("amsgrad", "centered")}
    exported = [export(array) for export, array in zip(itertools.cycle(EXPORTERS.values()), device, strict=False)]
    for param, grad, *states in (values, exported):
        plurals = [slot.removesuffix("y") + ("ies" if slot.endswith("y") else "s") for slot in slots]
        given = dict(zip(plurals, states, strict=True))
        FUNCTIONS[name](param, grad, **given, step=3, **hyper)
    assert_same(device, values)


def test_reports_of_functions_stay_on_the_device():
    param, grad = cp.zeros(10, np.float32), cp.ones(10, np.float32)
    report = functional.sgd(param, grad, step=1, lr=0.5, max_grad_norm=1.0, nonfinite="skip")
    assert isinstance(report.grad_norm, cp.ndarray)
    assert isinstance(report.skipped, cp.ndarray)
    assert (report.grad_norm.shape, report.skipped.shape, report.skipped.dtype) == ((), (), np.dtype(bool))
    assert float(report.grad_norm) == math.sqrt(10)
    assert not bool(report.skipped)
    before = param.get()
    grad[3] = np.float32(NAN)
    report = functional.sgd(param, grad, step=1, lr=0.5, nonfinite="skip")
    assert bool(report.skipped)
    assert_same(param, before)


# Streams and devices


def test_the_norm_is_one_array_that_every_step_overwrites():
    opt = onepass.SGD(cp.zeros(10), lr=0.5)
    assert opt.grad_norm is None
    opt.step(cp.full(10, 3.0), max_grad_norm=INF)
    norm = opt.grad_norm
    assert float(norm) == math.sqrt(90)
    opt.step(cp.full(10, 4.0), max_grad_norm=INF)
    assert opt.grad_norm is norm
    assert float(norm) == math.sqrt(160)
    opt.step(cp.full(10, 4.0))
    assert opt.grad_norm is None


def test_work_goes_to_the_current_stream():
    runtime = cuda_arrays.host_runtime()
    host = [numbers((5, 7)), numbers(9, seed=1)]
    device = on_device(host)
    grads = [numbers((5, 7), seed=2), numbers(9, seed=3)]
    for stream in (cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(), cp.cuda.Stream.null):
        gradients = on_device(grads)
        with stream:
            opt = onepass.Adam(device, ema_decay=0.5, max_unit_norm=None)
            opt.step(gradients)
            runtime.reset()
            opt.step([gradients[0].T.T, None], max_grad_norm=1.0, zero_grads=True)
            opt.step(on_device([np.asfortranarray(grads[0]), grads[1]]), nonfinite="skip")
            opt.swap_ema()
            launches = runtime.launches()
        assert len(launches) >= 8
        assert {info.stream for info in launches} == {stream.ptr}


def test_a_step_neither_waits_nor_allocates():
    runtime = cuda_arrays.host_runtime()
    kinds = [Kind((33,), mirror="bfloat16"), Kind((7, 11), axes=(1, 0), layout="reversed"), Kind((3,), "float64")]
    for options in ({}, {"ema_decay": 0.5}, {"accumulate": 2}, {"max_unit_norm": (1.0, 0), "rounding": "stochastic"}):
        for step in ({}, {"max_grad_norm": 1.0, "zero_grads": True}, {"clip_norm": 1.0, "nonfinite": "skip"}):
            if "accumulate" in options and "nonfinite" in step:
                continue  # whether a sum was skipped is the host's to know
            opt = make("Adam", on_device([kind.param(1)[0] for kind in kinds]), **options)
            grads = on_device([kind.gradient(1) for kind in kinds])
            for _ in range(2):
                opt.step(grads, **step)
            with runtime.counted() as counts:
                for _ in range(4):
                    opt.step(grads, **step)
                _ = opt.grad_norm, opt.accumulated
            assert counts.pop("cudaLaunchKernel") >= 4
            assert not any(counts.values()), f"{options} {step}: {counts}"


@pytest.mark.parametrize("name", FEW)
def test_two_devices_in_one_optimizer(name):
    """Grouped by device; norms are of all."""
    require_two_devices()
    shapes = [(33,), (7, 11), (BLOCK + 3,), (), (4, 5), (100,)]
    where = [0, 1, 1, 0, 0, 1]
    host = [numbers(shape, seed=k) for k, shape in enumerate(shapes)]
    device = [on_device(array, d) for array, d in zip(host, where, strict=True)]
    options = {"ema_decay": 0.5, "gradient_noise": (0.1, 0.5)}
    a, b = make(name, host, **options), make(name, device, **options)
    for state, d in zip(b.state, where, strict=True):
        assert all(array.device.id == d for array in state.values())
    steps = [{"max_grad_norm": 2.0}, {"clip_norm": 1.0, "zero_grads": True}, {"nonfinite": "skip"}, {}]
    steps += [{"nonfinite": "skip", "max_grad_norm": 2.0}, {"nonfinite": "raise"}]
    for k, step in enumerate(steps):
        grads = [numbers(shape, seed=10 * k + i) for i, shape in enumerate(shapes)]
        if k == 4:
            grads[2][BLOCK] = np.inf
        gradients = [on_device(array, d) for array, d in zip(grads, where, strict=True)]
        with cp.cuda.Device(k % 2):
            a.step(grads, **step)
            b.step(gradients, **step)
        assert_same_number(b.grad_norm, a.grad_norm, f"call {k}")
        assert_same(gradients, grads)
    assert b.step_counts == a.step_counts == (5,) * 6
    assert b.skipped == 1
    assert_same(device, host)
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))
    b.swap_ema()
    a.swap_ema()
    assert_same(device, host)
    taken = b.state_dict()
    b.load_state_dict(taken)
    a.load_state_dict(on_host(taken))
    a.swap_ema()
    b.swap_ema()
    bad = [on_device(numbers(shape, seed=1), d) for shape, d in zip(shapes, where, strict=True)]
    with bad[5].device:
        bad[5].fill(np.nan)
    with pytest.raises(FloatingPointError, match=r"^grads\[5\]"):
        b.step(bad, nonfinite="raise")
    assert b.step_counts == (5,) * 6
    assert_same(device, host)


def test_the_second_device_alone(tmp_path):
    """While CuPy's current device is the first."""
    require_two_devices()
    host = [numbers((5, 7)), numbers(9, BFLOAT16, seed=1)]
    device = on_device(host, 1)
    options = {"ema_decay": 0.5, "rounding": "stochastic"}
    a, b = onepass.AdamW(host, **options), onepass.AdamW(device, **options)
    for k in range(3):
        grads = [numbers((5, 7), seed=k), numbers(9, BFLOAT16, seed=k + 5)]
        a.step(grads, max_grad_norm=1.0, nonfinite="skip")
        b.step(on_device(grads, 1), max_grad_norm=1.0, nonfinite="skip")
    assert b.step_counts == a.step_counts
    assert_same_number(b.grad_norm, a.grad_norm)
    assert_same(device, host)
    assert all(array.device.id == 1 for state in b.state for array in state.values())
    onepass.save(tmp_path / "c", b)
    onepass.load(tmp_path / "c", b)
    b.load_state_dict(b.state_dict())
    a.swap_ema()
    b.swap_ema()
    assert_same(device, host)


def test_a_training_in_steps_of_the_users_own_kernels():
    """Between CuPy's own work, on one stream."""
    target = numbers(500)
    host, device = np.zeros(500, np.float32), cp.zeros(500, np.float32)
    a, b = onepass.Adam(host, lr=0.1), onepass.Adam(device, lr=0.1)
    there = cp.asarray(target)
    for _ in range(20):
        a.step(np.float32(2) * (host - target), max_grad_norm=5.0)
        b.step(np.float32(2) * (device - there), max_grad_norm=5.0)
    assert_same(device, host)
    assert abs(float((device - there).max())) < 1


def test_two_threads_with_a_stream_each():
    def train(seed, results):
        with cp.cuda.Stream(non_blocking=True) as stream:
            host, device = numbers((30, 7), seed=seed), on_device(numbers((30, 7), seed=seed))
            a, b = onepass.Adam(host, ema_decay=0.5), onepass.Adam(device, ema_decay=0.5)
            for k in range(20):
                grad = numbers((30, 7), seed=100 * seed + k)
                a.step(grad.copy(), max_grad_norm=1.0, nonfinite="skip")
                b.step(on_device(grad), max_grad_norm=1.0, nonfinite="skip")
            stream.synchronize()
            assert_same(device, host)
            results.append(b.step_counts == a.step_counts)

    results: list[bool] = []
    threads = [threading.Thread(target=train, args=(seed, results)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 3


# The order of blocks and threads


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_any_order_of_blocks_and_threads(blocks, threads):
    runtime = cuda_arrays.host_runtime()
    kinds = [Kind((n,), mirror="bfloat16") for n in (5, 129, 3 * BLOCK + 1)]
    kinds += [Kind((41, 33), axes=(1, 0), layout="reversed"), Kind((3, 500), "float64"), Kind((70, 3), "float64")]
    options = {"ema_decay": 0.5, "max_unit_norm": (3.0, 0), "gradient_noise": (0.1, 0.5), "rounding": "stochastic"}
    step = {"max_grad_norm": 3.0, "nonfinite": "skip", "zero_grads": True}
    for seed in (1, 2) if 2 in (blocks, threads) else (0,):
        with runtime.order(blocks, threads, seed):
            check(functools.partial(make, "Adam"), kinds, options, [Call(options=step)] * 2)
            check(functools.partial(make, "SGD"), kinds, {"accumulate": 2}, [Call(options={"clip_norm": 1.0})] * 2)
            check(functools.partial(make, "AMSGrad"), kinds, {}, [Call()] * 2)


# Skips


def bad_or_good(shape, seed, bad):
    grad = numbers(shape, seed=seed)
    if bad:
        grad[..., -1] = np.float32((NAN, INF, -INF)[seed % 3])
    return grad


SCHEDULED = {
    "lr": lambda t: 0.1 / math.sqrt(t),
    "ema_decay": decay_of,
    "gradient_noise": (0.1, 0.55),
    "weight_decay": 0.01,
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_the_device_decides_what_is_skipped(name, scheduled):
    """Over hundreds of steps, of which the host does not know how many counted; schedules follow the counts."""
    rng = np.random.default_rng(7)
    host = [numbers(20), numbers((3, 4), np.float64, seed=1)]
    device = on_device(host)
    options = SCHEDULED if scheduled else {}
    a, b = make(name, host, **options), make(name, device, **options)
    pattern = [rng.random() < share for share in (0.1, 0.9, 0.5) for _ in range(70)]
    for k, bad in enumerate(pattern):
        grads = [bad_or_good(20, k, bad), numbers((3, 4), np.float64, seed=k)]
        gradients = on_device(grads)
        a.step(grads, nonfinite="skip", max_grad_norm=2.0)
        b.step(gradients, nonfinite="skip", max_grad_norm=2.0)
    assert b.skipped == a.skipped == sum(pattern) > 90
    assert b.step_counts == a.step_counts
    assert_same(device, host)
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))


@pytest.mark.parametrize("options", [{}, {"max_unit_norm": (1.0, 0)}, {"master": "split"}, {"accumulate": 2}], ids=str)
def test_a_skipped_step_leaves_what_lies_oddly(options):
    """Arrays that go through scratch memory, some of which are written and never read."""
    row = ("bfloat16", "float32") if "master" in options else ("float32", "bfloat16")
    kinds = [Kind((19, 21), *row, mirror="float16", mirror_axes=(1, 0), offset=n) for n in (0, 4, 1)]
    kinds += [Kind((n,), *row, mirror="bfloat16", offset=n) for n in (5, 9, 33)]
    kinds.append(Kind((40, 3), *row, axes=(1, 0), layout="backwards", mirror="bfloat16"))
    pair = Pair(functools.partial(make, "Adam"), kinds, {"ema_decay": 0.5, **options})
    for k, factor in enumerate((INF, 1.0, 1.0, NAN, NAN, 1.0)):
        pair.step(Call(factor=factor, options={"nonfinite": "skip", "zero_grads": k % 2 == 0}))
        pair.compare(f"call {k}")


def test_settings_that_change_while_skips_are_unknown():
    host, more = numbers(50), numbers(9, seed=1)
    params = [{"params": [host]}, {"params": [more], "lr": 0.3}]
    device = on_device([host, more])
    a = onepass.AdamW(params, lr=0.1)
    b = onepass.AdamW([{"params": [device[0]]}, {"params": [device[1]], "lr": 0.3}], lr=0.1)
    for k in range(100):
        bad = k % 5 == 2 or 30 <= k < 40
        grads = [[bad_or_good(50, k, bad)], [numbers(9, seed=k)]]
        step = {"nonfinite": "skip"} if k % 7 else {}
        if k % 7 == 0:
            grads[0][0] = numbers(50, seed=k)
        if k % 11 == 3:
            grads[1] = [None]
        gradients = on_device(grads)
        a.step(grads, **step)
        b.step(gradients, **step)
        for opt in (a, b):
            opt.lr = [0.1 / (k + 1), 0.2]
            if k == 50:
                opt.param_groups[0]["weight_decay"] = 0.5
        if k % 40 == 39:
            assert b.step_counts == a.step_counts
            assert b.skipped == a.skipped
    assert b.step_counts == a.step_counts
    assert b.skipped == a.skipped > 20
    assert_same(device, [host, more])


class Lagging:
    """Feedback of a device that is `lag` steps behind: what it told the host of later ones is taken back."""

    def __init__(self, monkeypatch, lag):
        self.runtime, self.lag, self.pinned, self.waits = cuda_arrays.host_runtime(), lag, None, 0
        allocate = cp.cuda.alloc_pinned_memory

        def keep(size):
            self.pinned = allocate(size)
            return self.pinned

        monkeypatch.setattr(cp.cuda, "alloc_pinned_memory", keep)
        _cpu.forget_feedback_words()

    def step(self, opt, grads, skipped, **options):
        """`skipped`: the true count before this step."""
        names = ("cudaDeviceSynchronize", "cudaStreamSynchronize")
        before, known = self.runtime.calls(*names), self.pinned is not None
        opt.step(grads, **options)
        said = np.frombuffer(self.pinned, np.uint64, 1)
        if not known:
            self.told = [np.uint64(skipped)]
        elif self.runtime.calls(*names) != before:  # the host has waited, and started to count anew
            self.waits += 1
            self.told = [np.uint64(skipped)]
        self.told.append(said[0])
        said[0] = self.told[max(0, len(self.told) - 1 - self.lag)]


@pytest.mark.parametrize("lag", [1, 7, 62, 63, 1000])
def test_skips_of_which_the_host_hears_late(monkeypatch, lag):
    """It sends coefficients for all counts that are possible, and waits when these are too many; rates change."""
    lagging = Lagging(monkeypatch, lag)
    host = [numbers(5), np.float64(numbers(3, seed=1))]
    device = on_device(host)
    options = {"ema_decay": decay_of, "gradient_noise": (0.1, 0.55)}
    a, b = onepass.AdamW(host, **options), onepass.AdamW(device, **options)
    rng = np.random.default_rng(lag)
    for k in range(160):
        rate = 0.1 / (1 + k % 3)
        for opt in (a, b):
            opt.lr = (lambda t, rate=rate: rate / math.sqrt(t)) if k % 2 else rate
        grads = [bad_or_good(5, k, rng.random() < 0.4), np.float64(numbers(3, seed=k))]
        gradients = on_device(grads)
        lagging.step(b, gradients, a.skipped, nonfinite="skip")
        a.step(grads, nonfinite="skip")
    assert b.skipped == a.skipped > 40
    assert b.step_counts == a.step_counts
    assert_same(device, host)
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))
    assert (lagging.waits > 0) == (lag > 63)
    assert lagging.waits <= 160 // 60


def test_parts_of_the_parameters_step_with_skips():
    """Some have a gradient now, others then: counts come apart and stay right."""
    host = [numbers(5 + k, seed=k) for k in range(4)]
    device = on_device(host)
    a, b = onepass.Adam(host, ema_decay=0.5), onepass.Adam(device, ema_decay=0.5)
    rng = np.random.default_rng(3)
    for k in range(60):
        present = rng.random(4) < 0.7 if k % 4 else np.ones(4, bool)
        bad = rng.random() < 0.3
        grads = [bad_or_good(5 + i, k + i, bad) if present[i] else None for i in range(4)]
        gradients = on_device(grads)
        a.step(grads, nonfinite="skip")
        b.step(gradients, nonfinite="skip")
        if k % 17 == 0:
            assert b.step_counts == a.step_counts
    assert b.step_counts == a.step_counts
    assert b.skipped == a.skipped
    assert_same(device, host)
    assert_same(b.ema, a.ema)


def test_a_swap_and_a_state_dict_after_skips():
    host = numbers(50)
    device = on_device(host)
    a, b = onepass.Adam(host, ema_decay=0.5), onepass.Adam(device, ema_decay=0.5)
    for k in range(10):
        grad = bad_or_good(50, k, k in (0, 3, 4))
        a.step(grad.copy(), nonfinite="skip")
        b.step(on_device(grad), nonfinite="skip")
        for opt in (a, b):
            opt.swap_ema()
        assert_same(device, host, f"{k}")
        for opt in (a, b):
            opt.swap_ema()
        if k == 5:
            taken = b.state_dict()
            assert_same(taken["state"][0]["exp_avg"], a.state_dict()["state"][0]["exp_avg"])
            assert (taken["state"][0]["step"], taken["skipped"]) == (3, 3)
            b.load_state_dict(taken)
    assert b.step_counts == a.step_counts == (7,)
    assert_same(device, host)


@hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("gbs"), st.booleans(), st.booleans()), min_size=1, max_size=90))
def test_any_history_of_skips(history):
    """Good, bad and unmeasured steps, of one or both parameters, with a look at the counts now and then."""
    host = [np.float64(numbers(3)), np.float64(numbers(2, seed=1))]
    device = on_device(host)
    a, b = (onepass.Adam(params, lr=lambda t: 1.0 / t, ema_decay=decay_of) for params in (host, device))
    for k, (kind, both, looks) in enumerate(history):
        grads = [np.float64(numbers(3, seed=k)), np.float64(numbers(2, seed=k)) if both else None]
        if kind == "b":
            grads[0][1] = NAN
        options = {"max_grad_norm": 3.0} if kind == "s" else {"nonfinite": "skip"}
        gradients = on_device(grads)
        a.step(grads, **options)
        b.step(gradients, **options)
        if looks and k % 5 == 0:
            assert b.step_counts == a.step_counts
    assert (b.step_counts, b.skipped) == (a.step_counts, a.skipped)
    assert_same(device, host)
    assert len(arrays_of(host)) == 2

"""Promise: the same bits everywhere. Every rule that is registered, by itself and through every optimizer class."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

import onepass
from helpers import update
from onepass import _cpu
from reference import expressions
from reference.expressions import assert_same_bits

RULES = {row["name"]: row for row in _cpu.registry()}
DTYPES = ("float32", "float64")  # for other ways of storing see test_storage.py
ISAS = onepass.available_isas()
THREADS = (1, 2, 5)
STEPS = 20
LANES = 16  # of the widest instruction set, in float32
# Every tail; a prime; one that the threads divide into several parts each, with tails of their own.
SIZES = (*range(2 * LANES + 2), 101, 30_011)
SURROUNDINGS = {
    "plain": {},
    "around": {"scale": -0.37, "l1": 1e-3, "l2": 0.013, "decay": 0.991},
}

COEFFICIENTS = {
    "step": 0.013,
    "mu": 0.9,
    "weight": 0.13,
    "step_v": 0.7,
    "step_g": 0.011,
    "rho": 0.97,
    "step_b": 0.03,
    "eps_root": 1e-9,
    "eps": 1e-8,
    "beta1": 0.9,
    "one_minus_beta1": 0.1,
    "beta2": 0.999,
    "one_minus_beta2": 0.001,
    "step_m": 0.02,
    "pre": 1.01,
    "inv_bias2": 1.7,
}


def coefficients(rule):
    return {name: COEFFICIENTS[name] for name in RULES[rule]["coefficients"]}


def moved(now, start):
    """Whether nearly all elements changed: a few may come back to where they were by chance."""
    return now.size == 0 or np.mean(now != start) > 0.95


class Guarded:
    """An array inside a buffer with guard bytes on both sides, starting at any byte."""

    GUARD = 192

    def __init__(self, values, misalignment):
        nbytes = values.nbytes
        raw = np.empty(nbytes + 2 * self.GUARD + 64, np.uint8)
        start = -raw.ctypes.data % 64 + self.GUARD // 2 + misalignment
        raw.fill(0xA5)
        self.raw, self.start, self.stop = raw, start, start + nbytes
        self.array = raw[self.start : self.stop].view(values.dtype).reshape(values.shape)
        self.array[...] = values

    def assert_intact(self):
        assert (self.raw[: self.start] == 0xA5).all(), "bytes before the array were written"
        assert (self.raw[self.stop :] == 0xA5).all(), "bytes behind the array were written"


@functools.cache
def start_values(rule, dtype, size):
    """Parameter, slots and the gradients of all steps; never zero, and averages of squares never negative."""
    rng = np.random.default_rng(size + 1)
    param = rng.standard_normal(size).astype(dtype)
    slots = {}
    for name in RULES[rule]["slots"]:
        value = rng.standard_normal(size) * 0.1
        slots[name] = (np.abs(value) if "sq" in name else value).astype(dtype)
    grads = [(rng.standard_normal(size) + np.copysign(0.01, rng.standard_normal(size))).astype(dtype) for _ in range(3)]
    return param, slots, grads


@functools.cache
def expected(rule, dtype, size, surroundings):
    param, slots, grads = start_values(rule, dtype, size)
    for step in range(STEPS):
        param, slots = expressions.update(
            rule, param, grads[step % len(grads)], slots, coefficients(rule), **SURROUNDINGS[surroundings]
        )
    return param, slots


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_expression(rule, dtype, isa, threads, surroundings):
    onepass.set_isa(isa)
    onepass.set_num_threads(threads)
    _cpu.set_serial_bytes(0)  # so that the smallest arrays are divided among the threads too
    itemsize = np.dtype(dtype).itemsize
    misalignments = itertools.cycle((0, itemsize, 3, 2 * itemsize + 1, 60))
    params, slots, grads = [], {name: [] for name in RULES[rule]["slots"]}, []
    for size in SIZES:
        param, slot, grad = start_values(rule, dtype, size)
        params.append(Guarded(param, next(misalignments)))
        for name, value in slot.items():
            slots[name].append(Guarded(value, next(misalignments)))
        grads.append([Guarded(g, next(misalignments)) for g in grad])
    around = {"scale": 1.0, "l1": 0.0, "l2": 0.0, "decay": 1.0, **SURROUNDINGS[surroundings]}
    for step in range(STEPS):
        update(
            rule,
            [p.array for p in params],
            [g[step % len(g)].array for g in grads],
            [[s.array for s in values] for values in slots.values()],
            coefficients(rule),
            **around,
        )
    for k, size in enumerate(SIZES):
        what = f"{rule} {dtype} {isa} {threads} threads, size {size}"
        start_param, start_slots, start_grads = start_values(rule, dtype, size)
        want_param, want_slots = expected(rule, dtype, size, surroundings)
        assert_same_bits(params[k].array, want_param, f"{what}: param")
        assert moved(params[k].array, start_param), f"{what}: parameters did not move"
        assert np.isfinite(params[k].array).all(), f"{what}: parameters are not finite"
        for name, values in slots.items():
            assert_same_bits(values[k].array, want_slots[name], f"{what}: {name}")
            if name != "max_exp_avg_sq":
                assert moved(values[k].array, start_slots[name]), f"{what}: {name} did not move"
        for step, grad in enumerate(grads[k]):
            assert_same_bits(grad.array, start_grads[step], f"{what}: gradient was written")
        for guarded in (params[k], *grads[k], *(values[k] for values in slots.values())):
            guarded.assert_intact()


OPTIMIZERS = {
    "SGD": lambda p, **kw: onepass.SGD(p, lr=0.01, **kw),
    "Momentum": lambda p, **kw: onepass.Momentum(p, lr=0.01, dampening=0.1, **kw),
    "Momentum-outside": lambda p, **kw: onepass.Momentum(p, lr=0.01, lr_in_velocity=False, **kw),
    "NAG": lambda p, **kw: onepass.NAG(p, lr=0.01, **kw),
    "NAG-outside": lambda p, **kw: onepass.NAG(p, lr=0.01, lr_in_velocity=False, **kw),
    "AdaGrad": lambda p, **kw: onepass.AdaGrad(p, lr_decay=0.1, initial_accumulator=0.1, **kw),
    "AdaSqrt": lambda p, **kw: onepass.AdaSqrt(p, **kw),
    "RMSprop": lambda p, **kw: onepass.RMSprop(p, **kw),
    "RMSprop-centered": lambda p, **kw: onepass.RMSprop(p, centered=True, eps=0, eps_root=1e-7, **kw),
    "RMSprop-momentum": lambda p, **kw: onepass.RMSprop(p, momentum=0.9, **kw),
    "RMSprop-both": lambda p, **kw: onepass.RMSprop(p, momentum=0.9, centered=True, lr_in_velocity=False, **kw),
    "Adam": lambda p, **kw: onepass.Adam(p, **kw),
    "Adam-eps_hat": lambda p, **kw: onepass.Adam(p, eps_hat=True, eps=1e-7, **kw),
    "Adam-uncorrected": lambda p, **kw: onepass.Adam(p, bias_correction=False, **kw),
    "Adam-amsgrad": lambda p, **kw: onepass.Adam(p, amsgrad=True, **kw),
    "Adam-max_of_corrected": lambda p, **kw: onepass.Adam(p, amsgrad=True, max_of_corrected=True, **kw),
    "AMSGrad": lambda p, **kw: onepass.AMSGrad(p, **kw),
    "Nadam": lambda p, **kw: onepass.Nadam(p, **kw),
}
OPTIONS = {
    "plain": {},
    "coupled": {"weight_decay": 0.02, "l1": 0.001, "maximize": True},
    "decoupled": {"weight_decay": 0.02, "decoupled_weight_decay": True},
}


def permuted(values):
    """The same values, in a memory order that is neither C nor Fortran."""
    return np.ascontiguousarray(values.transpose(1, 2, 0)).transpose(2, 0, 1)


def awkward_arrays(dtype, seed):
    """Name -> array of every shape and memory order that the contract names."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        value = rng.standard_normal(shape)
        return np.asarray(value + np.copysign(0.01, value), dtype=dtype)

    return {
        "0-d": draw(),
        "empty": draw(3, 0, 2),
        "vector": draw(1037),
        "matrix": draw(37, 29),
        "fortran": np.asfortranarray(draw(37, 29)),
        "permuted": permuted(draw(5, 7, 11)),
        "ones": draw(1, 23, 1),
        "large": draw(101, 203),
        "fortran-large": np.asfortranarray(draw(97, 131)),
    }


@functools.cache
def awkward_grads(dtype, seed):
    """Gradients for `awkward_arrays`, several in another memory order than their parameter."""
    arrays = awkward_arrays(dtype, seed)
    arrays["matrix"] = np.asfortranarray(arrays["matrix"])
    arrays["permuted"] = np.ascontiguousarray(arrays["permuted"])
    arrays["vector"] = np.repeat(arrays["vector"], 3)[::3][::-1]
    arrays["fortran-large"] = np.ascontiguousarray(arrays["fortran-large"])
    wide = np.zeros((101, 2 * 203), dtype)
    wide[:, ::2] = arrays["large"]
    arrays["large"] = wide[:, ::2]
    return arrays


@functools.cache
def expected_training(name, dtype, options):
    params = awkward_arrays(dtype, 0)
    probe = OPTIMIZERS[name](params, **OPTIONS[options])
    group = {key: value for key, value in probe.param_groups[0].items() if key != "params"}
    rule = probe.rule(group)
    slots = {key: {n: a.copy() for n, a in state.items()} for key, state in zip(params, probe.state, strict=True)}
    for t in range(1, STEPS + 1):
        grads = awkward_grads(dtype, t)
        coefs, scale, l1, l2, decay, *_ = probe.surround(group, t)
        for key in params:
            params[key], slots[key] = expressions.update(
                rule, params[key], grads[key], slots[key], coefs, scale, l1, l2, decay
            )
    return params, slots


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_expression(name, dtype, options):
    want_params, want_slots = expected_training(name, dtype, options)
    start = awkward_arrays(dtype, 0)
    for isa, threads in itertools.product(ISAS, (1, 2, 5)):
        onepass.set_isa(isa)
        onepass.set_num_threads(threads)
        _cpu.set_serial_bytes(0)
        params = awkward_arrays(dtype, 0)
        opt = OPTIMIZERS[name](params, **OPTIONS[options])
        for t in range(1, STEPS + 1):
            opt.step(awkward_grads(dtype, t))
        for index, key in enumerate(params):
            what = f"{name} {dtype} {isa} {threads} threads, {key}"
            assert_same_bits(params[key], want_params[key], f"{what}: param")
            assert moved(params[key], start[key]), f"{what}: parameters did not move"
            assert np.isfinite(params[key]).all(), f"{what}: parameters are not finite"
            assert opt.state[index].keys() == want_slots[key].keys()
            for slot, value in opt.state[index].items():
                assert_same_bits(value, want_slots[key][slot], f"{what}: {slot}")


SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, "huge", "-huge", "tiny", "-tiny", "subnormal", "-subnormal", 1.0, -1.5)


def special_values(dtype):
    info = np.finfo(dtype)
    named = {"huge": info.max / 2, "tiny": info.tiny, "subnormal": info.tiny / 8}
    named |= {f"-{name}": -value for name, value in named.items()}
    return np.array([named.get(value, value) for value in SPECIAL], dtype=dtype)


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [name for name, row in RULES.items() if not row["yardstick"]])
def test_special_values_in_every_role(rule, dtype, surroundings):
    """All special values, over parameter, gradient and all slots: NaN and infinities stay what they are."""
    names = RULES[rule]["slots"]
    grid = np.meshgrid(*[special_values(dtype)] * (2 + len(names)), indexing="ij")
    param, grad, *slots = (axis.ravel() for axis in grid)
    want_param, want_slots = expressions.update(
        rule, param, grad, dict(zip(names, slots, strict=True)), coefficients(rule), **SURROUNDINGS[surroundings]
    )
    around = {"scale": 1.0, "l1": 0.0, "l2": 0.0, "decay": 1.0, **SURROUNDINGS[surroundings]}
    assert np.isnan(want_param[np.isnan(grad)]).all(), "a NaN gradient must reach the parameter"
    assert not np.isfinite(want_param[np.isinf(param)]).any(), "an infinite parameter must not become finite"
    assert np.isfinite(want_param).any()
    for isa in ISAS:
        onepass.set_isa(isa)
        for skip in (0, 1):  # shifts which values meet the tail
            got_param = param[skip:].copy()
            got_slots = [slot[skip:].copy() for slot in slots]
            update(
                rule,
                [got_param],
                [grad[skip:]],
                [[slot] for slot in got_slots],
                coefficients(rule),
                **around,
            )
            assert_same_bits(got_param, want_param[skip:], f"{rule} {dtype} {isa}: param")
            for name, slot in zip(names, got_slots, strict=True):
                assert_same_bits(slot, want_slots[name][skip:], f"{rule} {dtype} {isa}: {name}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_that_decay_become_zero_and_not_subnormal(dtype, isa):
    """Zero gradients let moments decay for ever; they must end at zero, not in the subnormals that slow a step down."""
    onepass.set_isa(isa)
    tiny = np.finfo(dtype).tiny
    param = np.ones(1037, dtype)
    opt = onepass.Adam(param, betas=(0.5, 0.5))
    opt.state[0]["exp_avg"][...] = tiny * 16
    opt.state[0]["exp_avg_sq"][...] = tiny * 16
    for step in range(6):
        opt.step(np.zeros_like(param))
        moment = opt.state[0]["exp_avg"]
        assert ((moment == 0) | (moment >= tiny)).all()
        assert (moment != 0).all() == (step < 4), "16 halves into 1 in four steps, and then into nothing"


def test_neutral_surroundings_are_left_out():
    """A zero coefficient is skipped, not multiplied: 0 * inf is NaN."""
    param, grad = np.array([np.inf, 1.0], np.float32), np.ones(2, np.float32)
    onepass.SGD(param, lr=0.5, weight_decay=0.0, l1=0.0).step(grad)
    np.testing.assert_array_equal(param, np.array([np.inf, 0.5], np.float32))

"""Promise: whatever rides on a step has the bits of the NumPy expression, and an error leaves all as it was."""

from __future__ import annotations

import copy
import functools
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import onepass
from helpers import Snapshot, arrays_of, assert_moved, bits, copied, numbers, rules_of_registry
from onepass import _cpu, functional
from reference import narrow, philox
from reference.expressions import assert_same_bits
from training import (
    BFLOAT16,
    FEW,
    FEW_MACHINES,
    FUNCTIONS,
    MACHINES,
    OPTIMIZERS,
    Call,
    Functional,
    Kind,
    begin,
    check,
    make,
)

NAN, INF = math.nan, math.inf

# Shapes and memory orders that the contract names, in both compute types, gradients and mirrors in other orders too.
KINDS = (
    Kind((0,)),
    Kind((33,), offset=3, mirror="bfloat16"),
    Kind((17, 5), axes=(1, 0), layout="reversed", mirror="float16"),
    Kind((4099,), "float64", layout="gaps", mirror="bfloat16"),
    Kind((3, 7, 101), axes=(1, 2, 0), layout="backwards", offset=7, mirror="float16", mirror_axes=(0, 1, 2)),
    Kind((61, 37), "float64", axes=(1, 0), layout="reversed", mirror="float16", mirror_axes=(0, 1)),
    Kind((1, 29, 1), offset=60),
)
SCALAR = Kind(())  # has no axis for a norm
WITHOUT_MIRRORS = tuple(Kind(**{**vars(kind), "mirror": None}) for kind in KINDS)
EVERY_SIZE = tuple(Kind((n,), offset=n % 5) for n in range(34)) + tuple(Kind((n,)) for n in (4095, 4096, 4097, 8200))


def decay_of(t):
    return 1 - 1 / (t + 1)


# Constructor options, step options.
ALONE = {
    "grad_scale": ({}, {"grad_scale": 1 / 3}),
    "max_grad_norm": ({}, {"max_grad_norm": 7.0}),
    "clip_norm": ({}, {"clip_norm": 3.0}),
    "clip_value": ({}, {"clip_value": 0.7}),
    "nonfinite": ({}, {"nonfinite": "skip"}),
    "zero_grads": ({}, {"zero_grads": True}),
    "ema": ({"ema_decay": 0.9}, {}),
    "ema-of-t": ({"ema_decay": decay_of}, {}),
    "mirror": ({}, {}),
    "accumulate": ({"accumulate": 2}, {}),
    "max_unit_norm": ({"max_unit_norm": (5.0, 0)}, {}),
    "gradient_noise": ({"gradient_noise": (0.3, 0.55), "seed": 2**63 + 5}, {}),
}


def test_the_optimizers_reach_every_rule():
    reached = set()
    for name in OPTIMIZERS:
        opt = make(name, np.ones(1, np.float32))
        reached.add(opt.rule(opt.param_groups[0]))
    assert reached == rules_of_registry()


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_option_alone(name, option):
    options, step_options = ALONE[option]
    kinds = KINDS if option == "mirror" else WITHOUT_MIRRORS
    if option != "max_unit_norm":
        kinds = (*kinds, SCALAR)
    # Three, for clipped steps of SGD that are even in number can lead back to where they began.
    calls = [Call(factor=1.0 + k, options=step_options) for k in range(4 if option == "accumulate" else 3)]
    reference = check(functools.partial(make, name), kinds, options, calls, what=name)
    assert [norm is not None for norm in reference.grad_norms] == len(calls) * [
        option in ("max_grad_norm", "clip_norm", "nonfinite")
    ]
    assert all(updated for updated, kind in zip(reference.updated, kinds, strict=True) if kind.shape)


@pytest.mark.parametrize("option", ALONE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_alone_through_functional(name, option):
    options, step_options = ALONE[option]
    kinds = KINDS if option == "mirror" else WITHOUT_MIRRORS
    calls = [Call(factor=1.0 + k, options=step_options) for k in range(4 if option == "accumulate" else 3)]
    check(functools.partial(Functional, name), kinds, options, calls, what=name, machines=FEW_MACHINES)


EVERYTHING = {
    "ema_decay": 0.75,
    "accumulate": 2,
    "max_unit_norm": (3.0, 0),
    "gradient_noise": (0.1, 0.5),
    "seed": 7,
}
STEP_OF_EVERYTHING = {"grad_scale": 0.3, "max_grad_norm": 4.0, "nonfinite": "skip", "zero_grads": True}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_options_together(name):
    calls = [Call(options=STEP_OF_EVERYTHING)] * 6
    check(functools.partial(make, name), KINDS, EVERYTHING, calls, what=name)
    check(functools.partial(Functional, name), KINDS, EVERYTHING, calls, what=name)


@pytest.mark.parametrize("name", FEW)
def test_every_size(name):
    """All tails of all instruction sets, and the borders of a norm's blocks."""
    kinds = [Kind(**{**vars(kind), "mirror": "bfloat16"}) for kind in EVERY_SIZE]
    check(functools.partial(make, name), kinds, EVERYTHING, [Call(options=STEP_OF_EVERYTHING)] * 4, what=name)


@pytest.mark.parametrize("name", FEW)
def test_arrays_that_threads_divide_by_themselves(name):
    kinds = [Kind((30_011,), mirror="bfloat16"), Kind((211, 307), axes=(1, 0), layout="reversed", mirror="float16")]
    for serial_bytes in (0, _cpu.serial_bytes()):
        calls = [Call(options=STEP_OF_EVERYTHING)] * 2
        factory = functools.partial(make, name)
        check(factory, kinds, EVERYTHING, calls, what=name, machines=FEW_MACHINES, serial_bytes=serial_bytes)


# Any combination


def one_of(*values):
    return st.sampled_from(values)


AXES = {0: [()], 1: [(0,)], 2: [(0, 1), (1, 0)], 3: [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)]}
SHAPES = ((), (0,), (1,), (16,), (37,), (5, 0), (8, 1), (19, 21), (3, 4, 5), (40, 130), (2, 9, 300))


@st.composite
def kinds_of(draw, row, *, mirrors, axis_needed):
    shape = draw(st.sampled_from([shape for shape in SHAPES if shape or not axis_needed]))
    axes = st.sampled_from(AXES[len(shape)])
    return Kind(
        shape,
        row[0],
        row[1],
        axes=draw(axes),
        layout=draw(one_of("same", "same", "reversed", "backwards", "gaps")),
        mirror=draw(one_of("bfloat16", "float16", None)) if mirrors else None,
        mirror_axes=draw(axes),
        offset=draw(st.integers(0, 9)),
    )


@st.composite
def scenes(draw):
    options = {}
    row = draw(st.sampled_from(_cpu.storages()))
    if row[0] == "bfloat16" and draw(st.booleans()):
        options["master"] = "split"
    if row[2] == "bfloat16":
        options["state_dtype"] = draw(one_of("bfloat16", BFLOAT16))
    for name, values in {
        "ema_decay": (0.0, 0.9, 1e-60, decay_of),
        "accumulate": (1, 2, 3),
        "max_unit_norm": ((0.5, 0), (4.0, -1), (20.0, (0,))),
        "gradient_noise": ((0.1, 0.5), (1e-90, 0.0), (0, 1), (2.0, 400)),
        "seed": (0, 1, 2**64 - 1),
        "rounding": ("nearest", "stochastic"),
        "weight_decay": (0.01,),
        "l1": (0.003,),
        "maximize": (True,),
    }.items():
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(values))
    mirrors = draw(st.booleans())
    axis_needed = "max_unit_norm" in options
    kinds = draw(st.lists(kinds_of(row, mirrors=mirrors, axis_needed=axis_needed), min_size=1, max_size=4))
    through = draw(one_of(make, make, Functional))
    calls = []
    for _ in range(draw(st.integers(2, 5))):
        step_options = {}
        for name, values in {
            "grad_scale": (0.25, 1 / 3, 2.0, 1 + 1e-12),
            "nonfinite": ("skip", "raise", "propagate"),
            "zero_grads": (True, False),
        }.items():
            if draw(st.booleans()):
                step_options[name] = draw(st.sampled_from(values))
        limit = draw(one_of(None, "max_grad_norm", "clip_norm", "clip_value"))
        if limit is not None:
            step_options[limit] = draw(one_of(0.3, 3.0, 1000.0))
        present = None
        if through is make or options.get("accumulate", 1) == 1:
            present = tuple(draw(one_of(True, True, True, False)) for _ in kinds)
        factor = 1.0
        if step_options.get("nonfinite") == "skip":
            factor = draw(one_of(1.0, INF, NAN))
        calls.append(Call(present, factor, step_options))
    return draw(st.sampled_from(sorted(OPTIMIZERS))), through, kinds, options, calls, draw(st.sampled_from(MACHINES))


@hypothesis_settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenes())
def test_any_combination(scene):
    name, through, kinds, options, calls, machine = scene
    check(functools.partial(through, name), kinds, options, calls, machines=[machine], moves=False)


# One pass does what separate passes do


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_equals_separate_passes(name):
    """Plain steps of onepass, and all else by plain NumPy."""
    shapes = [(97,), (31, 40)]
    params = [numbers(shape, seed=k) for k, shape in enumerate(shapes)]
    mirrors = [np.zeros(shape, BFLOAT16) for shape in shapes]
    plain_params = copied(params)
    fused, plain = make(name, params, ema_decay=0.9, mirror=mirrors), make(name, plain_params)
    averages = None
    clips = 0
    for t in range(5):
        grads = [numbers(shape, seed=10 * t + k) * np.float32(10.0 ** (t - 2)) for k, shape in enumerate(shapes)]
        norm = 0.125 * math.sqrt(math.fsum(x * x for g in grads for x in g.ravel().tolist()))
        clip = min(1.0, 5.0 / norm)
        clips += clip < 1
        scaled = [np.float32(0.125 * clip) * g for g in grads]
        fused.step(grads, grad_scale=0.125, max_grad_norm=5.0, nonfinite="skip", zero_grads=True)
        plain.step(scaled)
        assert abs(fused.grad_norm - norm) <= 1e-14 * norm
        d, one_minus_d = np.float32(0.9), np.float32(1 - 0.9)
        if averages is None:
            averages = copied(plain_params)
        averages = [d * e + one_minus_d * p for e, p in zip(averages, plain_params, strict=True)] if t else averages
        for k in range(len(shapes)):
            assert_same_bits(params[k], plain_params[k])
            assert_same_bits(fused.ema[k], averages[k])
            assert_same_bits(mirrors[k], plain_params[k].astype(BFLOAT16))
            assert not grads[k].any()
    assert 0 < clips < 5
    assert_moved([numbers(shape, seed=k) for k, shape in enumerate(shapes)], params)


@pytest.mark.parametrize("name", FEW)
def test_other_options_equal_separate_passes(name):
    shape = (24, 50)
    params = [numbers(shape, seed=1) for _ in range(8)]
    by_norm, by_value, summed, limited, noisy, *twins = params
    plain = [make(name, twin) for twin in (*twins, numbers(shape, seed=1), numbers(shape, seed=1))]
    opts = [make(name, by_norm), make(name, by_value), make(name, summed, accumulate=3)]
    opts += [make(name, limited, max_unit_norm=(4.0, 0)), make(name, noisy, gradient_noise=(0.5, 0.55), seed=3)]
    for t in range(1, 4):
        g = numbers(shape, seed=10 + t)
        norm = math.sqrt(math.fsum(x * x for x in g.ravel().tolist()))
        opts[0].step(g, clip_norm=2.0)
        plain[0].step(np.float32(2.0 / norm) * g)
        opts[1].step(g, clip_value=0.5)
        plain[1].step(np.clip(g, -0.5, 0.5))
        three = [numbers(shape, seed=100 * t + k) for k in range(3)]
        for one in three:
            opts[2].step(one)
        plain[2].step(np.float32(1 / 3) * ((three[0] + three[1]) + three[2]))
        opts[3].step(g)
        plain[3].step(g)
        weights = plain[3].param_groups[0]["params"][0]
        norms = [math.sqrt(math.fsum(x * x for x in column)) for column in weights.T.tolist()]
        weights *= np.array([min(1.0, 4.0 / norm) for norm in norms]).astype(np.float32)
        opts[4].step(g)
        z = philox.normals(3, 0, t, 0, g.size).reshape(shape)
        plain[4].step(g + np.float32(math.sqrt(0.5 / (1 + t) ** 0.55)) * z)
        for opt, twin in zip(opts, plain, strict=True):
            assert_same_bits(opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])
            for slot, value in twin.state[0].items():
                assert_same_bits(opt.state[0][slot], value)
    assert (np.array(norms) > 4.0).any()
    assert_moved([numbers(shape, seed=1)] * 5, params[:5])


# Clipping at its limits


def sgd(values, **options):
    param = np.zeros(len(values), np.float64)
    return param, onepass.SGD(param, lr=1.0, **options), np.array(values, np.float64)


@pytest.mark.parametrize("limit", ["max_grad_norm", "clip_norm"])
def test_clipping_at_just_above_and_below_the_limit(limit):
    for norm, factor in (
        (5.0, 1.0),
        (math.nextafter(5.0, INF), 1.0),
        (math.nextafter(5.0, 0.0), math.nextafter(5.0, 0.0) / 5.0),
        (6.0, 1.0),
        (2.5, 0.5),
        (INF, 1.0),
        (1e-300, 1e-300 / 5),
    ):
        param, opt, grad = sgd([3.0, -4.0])
        opt.step(grad, **{limit: norm})
        assert opt.grad_norm == 5.0
        np.testing.assert_array_equal(-param, np.array([3.0, -4.0]) * factor)
        assert norm != math.nextafter(5.0, 0.0) or factor < 1.0


def test_the_norm_is_of_unscaled_gradients_and_of_all_groups():
    params = [np.zeros(2), np.zeros((1, 1)), np.zeros(3)]
    opt = onepass.SGD([{"params": params[:2]}, {"params": {"w": params[2]}, "lr": 0.25}], lr=1.0, maximize=True)
    grads = [[np.array([6.0, 0.0]), np.array([[8.0]])], {"w": None}]
    opt.step(grads, grad_scale=0.5, max_grad_norm=2.5)
    assert opt.grad_norm == 5.0
    assert params[0].tolist() == [1.5, 0.0]
    assert params[1].tolist() == [[2.0]]
    assert not params[2].any()
    grads = [[None, np.array([[24.0]])], {"w": np.array([0.0, 32.0, 0.0])}]
    opt.step(grads, grad_scale=0.25, max_grad_norm=5.0)
    assert opt.grad_norm == 10.0
    assert params[1].tolist() == [[5.0]]
    assert params[2].tolist() == [0.0, 1.0, 0.0]
    opt.step(grads, clip_norm=16.0)
    assert opt.grad_norm == 40.0
    assert params[1].tolist() == [[21.0]]
    assert params[2].tolist() == [0.0, 5.0, 0.0]
    opt.step(grads, clip_value=16.0)
    assert opt.grad_norm is None
    assert params[2].tolist() == [0.0, 9.0, 0.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_have_the_norm_zero(name):
    for limit in ("max_grad_norm", "clip_norm"):
        param = numbers(100)
        opt = make(name, param)
        opt.step(np.zeros(100, np.float32), **{limit: 1e-3})
        assert opt.grad_norm == 0.0
        assert np.isfinite(param).all()


@pytest.mark.parametrize("isa", onepass.available_isas())
def test_clipping_what_is_not_finite(isa):
    onepass.set_isa(isa)
    bad = np.ones(100)
    bad[37] = INF
    for limit in ("max_grad_norm", "clip_norm"):
        param, opt, grad = sgd(bad)
        opt.step(grad, **{limit: 1.0})
        assert opt.grad_norm == INF
        assert np.isnan(param[37]), "0 * inf"
        assert not np.delete(param, 37).any(), "1 / inf"
        param, opt, grad = sgd(bad)
        opt.step(grad, **{limit: INF})
        np.testing.assert_array_equal(param, -bad)
        for value in (1.0, INF):
            param, opt, grad = sgd(np.where(np.isinf(bad), NAN, bad))
            opt.step(grad, **{limit: value})
            assert math.isnan(opt.grad_norm)
            assert np.isnan(param).all(), "the norm is NaN, and so is all that it scales"
    param, opt, grad = sgd([NAN, INF, -INF, 0.25, -3.0, -0.0])
    opt.step(grad, clip_value=0.5)
    np.testing.assert_array_equal(-param, [NAN, 0.5, -0.5, 0.25, -0.5, 0.0])


def test_each_tensor_is_clipped_by_its_own_norm():
    params = [np.zeros(2), np.zeros(2), np.zeros(2)]
    grads = [np.array([3.0, 4.0]), np.array([0.3, 0.4]), np.array([NAN, 1.0])]
    onepass.SGD(params, lr=1.0).step(grads, clip_norm=2.5)
    assert params[0].tolist() == [-1.5, -2.0]
    assert params[1].tolist() == [-0.3, -0.4]
    assert np.isnan(params[2]).all()


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-130])
def test_gradients_that_arithmetic_takes_for_zero_have_no_norm(value):
    param = np.zeros(40, np.float32)
    opt = onepass.SGD(param, lr=1.0)
    opt.step(np.full(40, value, np.float32), max_grad_norm=1.0)
    assert opt.grad_norm == 0.0
    assert not param.any()


# What is not finite


class Whole(Snapshot):
    """All that an optimizer shows, too."""

    def _read(self):
        read = super()._read()
        if self.opt is not None:
            opt = self.opt
            read["options"] = repr((opt.skipped, opt.accumulated, opt.grad_norm, opt.state_dict()["seed"]))
            read["received"] = [entry.get("received") for entry in opt.state_dict()["state"].values()]
            read["swapped"] = opt.state_dict()["ema_swapped"]
        return read


def world(name="Adam", dtype=np.float32, *, steps=2, **options):
    """An optimizer in the middle of a training, its parameters, and good gradients."""
    shapes = {"fc1.weight": (7, 9), "fc1.bias": (9,), "fc2.weight": (9, 70), "fc2.bias": (70,)}
    params = {key: numbers(shape, dtype, seed=k) for k, (key, shape) in enumerate(shapes.items())}
    if options.get("mirror") is True:
        options["mirror"] = {key: np.zeros(shape, BFLOAT16) for key, shape in shapes.items()}
    opt = make(name, params, **options)
    grads = {key: numbers(shape, dtype, seed=10 + k) for k, (key, shape) in enumerate(shapes.items())}
    for _ in range(steps):
        opt.step(grads)
    return opt, params, grads


WORLDS = {
    "plain": {},
    "all": {"ema_decay": 0.9, "mirror": True, "gradient_noise": (0.1, 0.5)},
    "sum": {"accumulate": 2},
    "sum-begun": {"accumulate": 3, "ema_decay": 0.9},
}


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("options", WORLDS)
@pytest.mark.parametrize("isa", onepass.available_isas())
def test_what_is_not_finite_is_skipped_or_raised(isa, options, value):
    onepass.set_isa(isa)
    opt, params, grads = world(**copied(WORLDS[options]))
    for place in (0, 16, 629):
        bad = copied(grads)
        bad["fc2.weight"].ravel()[place] = value
        mirror = arrays_of(opt._storage.mirror)
        whole = Whole(opt, params, bad, mirror)
        message = re.escape("grads[2] ('fc2.weight'): ")
        with pytest.raises(FloatingPointError, match=f"^{message}.*inf or NaN"):
            opt.step(bad, nonfinite="raise", zero_grads=True, grad_scale=0.5)
        whole.assert_unchanged()
        quiet, others = Snapshot(opt, params, bad, mirror), Snapshot(opt, params, mirror)
        skipped, accumulated = opt.skipped, opt.accumulated
        opt.step(bad, nonfinite="skip")
        quiet.assert_unchanged()
        opt.step(bad, nonfinite="skip", zero_grads=True)
        others.assert_unchanged()
        assert (opt.skipped, opt.accumulated) == (skipped + 2, accumulated)
        assert not any(g.any() for g in bad.values())
        before = copied(params)
        opt.step(grads, nonfinite="raise")
        assert opt.skipped == skipped + 2
        if opt.accumulated == 0:
            assert_moved(before, params)


def test_the_first_that_is_not_finite_is_named():
    bad = np.array([NAN], np.float32)
    good = np.ones(1, np.float32)
    for params, grads, label in (
        (copied(good), copied(bad), "grads: "),
        ([copied(good) for _ in range(3)], [good, bad, bad], "grads[1]: "),
        ([{"params": [copied(good)]}, {"params": {"w": copied(good)}}], [[None], {"w": bad}], "grads[1][0] ('w'): "),
    ):
        opt = onepass.SGD(params)
        with pytest.raises(FloatingPointError, match="^" + re.escape(label)):
            opt.step(grads, nonfinite="raise")
        assert set(opt.step_counts) == {0}
    for single in (True, False):
        param = copied(good) if single else [copied(good), copied(good)]
        with pytest.raises(FloatingPointError, match="^grads: " if single else r"^grads\[1\]: "):
            functional.sgd(param, bad if single else [good, bad], step=1, nonfinite="raise")
        assert all(array.tolist() == [1.0] for array in arrays_of([param]))


def test_a_norm_that_overflows_is_no_element_that_is_not_finite():
    param, opt, grad = sgd([1e200, -1e200])
    opt.step(grad, nonfinite="raise")
    assert opt.grad_norm == INF
    assert param.tolist() == [-1e200, 1e200]
    param = np.zeros(2, np.float32)
    opt = onepass.SGD(param, lr=1.0)
    opt.step(np.full(2, 3e38, np.float32), nonfinite="raise", grad_scale=4.0)
    assert np.isfinite(opt.grad_norm), "measured in float64"
    assert np.isinf(param).all(), "what is read is finite; what the step makes of it is another matter"


def test_a_none_gradient_is_not_looked_at():
    opt, params, grads = world()
    before = copied(params)
    opt.step({**grads, "fc1.bias": None}, nonfinite="raise", max_grad_norm=1.0)
    np.testing.assert_array_equal(params["fc1.bias"], before["fc1.bias"])
    assert opt.step_counts == (3, 2, 3, 3)
    none = dict.fromkeys(grads)
    opt.step(none, nonfinite="raise", max_grad_norm=1.0)
    assert opt.grad_norm == 0.0
    assert opt.step_counts == (3, 2, 3, 3)


# Sums of gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_come_and_go(name):
    """Some parameters have gradients in a few calls of a sum only, one has none, and two calls are skipped."""
    kinds = [Kind((35,)), Kind((6, 7), layout="gaps"), Kind((5000,)), Kind((11,), "float64", layout="backwards")]
    skip = {"nonfinite": "skip", "grad_scale": 0.3}
    calls = [
        Call((True, True, False, False), options=skip),
        Call((True, False, True, False), NAN, skip),
        Call((True, False, True, False), options=skip),
        Call((False, False, True, False), INF, skip),
        Call((False, False, True, True), options={**skip, "max_grad_norm": 0.5, "zero_grads": True}),
        Call((False, True, True, False), options={"clip_value": 0.2}),
        Call((False,) * 4, options={"clip_norm": 0.5}),
        Call((False, False, False, False), options={"clip_norm": 0.5, "grad_scale": 3.0}),
        Call((True,) * 4),
    ]
    options = {"accumulate": 3, "ema_decay": 0.9, "gradient_noise": (0.1, 0.5)}
    reference = check(functools.partial(make, name), kinds, options, calls, what=name)
    assert (reference.skipped, reference.accumulated) == (2, 1)
    assert [tensor.updates for tensor in reference.tensors] == [1, 2, 2, 1]
    assert reference.grad_norms[0] is None
    assert reference.grad_norms[4] > 0.5, "the third of a sum"
    assert reference.grad_norms[7] > 0.0


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_sum_whose_last_gradient_is_not_finite(policy):
    """Nothing changes, also for a parameter that has its first gradient of the sum in that call."""
    opt, params, grads = world(accumulate=3, ema_decay=0.9, mirror=True, steps=3)
    for _ in range(2):
        opt.step({**grads, "fc2.weight": None})
    bad = copied(grads)
    bad["fc2.weight"][3, 3] = NAN
    snapshot = (Whole if policy == "raise" else Snapshot)(opt, params, bad, opt._storage.mirror)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=re.escape("grads[2] ('fc2.weight'): ")):
            opt.step(bad, nonfinite="raise", max_grad_norm=1.0)
    else:
        opt.step(bad, nonfinite="skip", max_grad_norm=1.0)
    snapshot.assert_unchanged()
    assert opt.accumulated == 2
    opt.step(grads, nonfinite=policy)
    assert opt.step_counts == (2, 2, 2, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_zeroing_gradients_that_are_not_there(threads):
    """A parameter takes part in the last call of a sum without a gradient of its own."""
    onepass.set_num_threads(threads)
    _cpu.set_serial_bytes(0)
    params = [numbers(40), numbers(40)]
    opt = onepass.SGD(params, accumulate=2)
    bad = [np.full(40, INF, np.float32), np.full(40, INF, np.float32)]
    for grads in ([numbers(40), numbers(40)], [None, bad[1]], [bad[0], None], [None, None]):
        opt.step(grads, nonfinite="skip", zero_grads=True)
        assert not any(grad.any() for grad in grads if grad is not None)
    assert (opt.skipped, opt.step_counts) == (2, (1, 1))
    assert_moved([numbers(40), numbers(40)], params)


def test_a_sum_that_overflows_is_not_finite():
    """Each gradient is finite; their sum in float32 is not, at the second call already."""
    params = [np.zeros(20, np.float32), np.zeros(20, np.float32)]
    opt = onepass.SGD(params, accumulate=3)
    huge = np.full(20, 3e38, np.float32)
    opt.step([None, huge], nonfinite="raise")
    whole = Whole(opt, params)
    with pytest.raises(FloatingPointError, match=r"^grads\[1\]: "):
        opt.step([huge, huge], nonfinite="raise")
    whole.assert_unchanged()
    opt.step([None, huge], nonfinite="skip")
    assert (opt.skipped, opt.accumulated) == (1, 1)
    opt.step([huge, None], nonfinite="raise")
    opt.step([None, None], nonfinite="raise", max_grad_norm=INF)
    assert opt.step_counts == (1, 1)


def test_a_sum_of_one_is_the_plain_step():
    for options in ({}, {"accumulate": 1}):
        params = [numbers(40, seed=1), numbers(40, seed=1)]
        onepass.Adam(params[0]).step(numbers(40), max_grad_norm=0.5)
        onepass.Adam(params[1], **options).step(numbers(40), max_grad_norm=0.5)
        assert_same_bits(params[1], params[0])


def test_nothing_moves_before_the_last_call():
    opt, params, grads = world(accumulate=3, ema_decay=0.9, steps=3)
    before = copied([params, [dict(state) for state in opt.state]])
    for call in (1, 2):
        opt.step(grads, max_grad_norm=1.0, zero_grads=False)
        assert opt.accumulated == call
        assert opt.grad_norm is None
        now = copied([params, [dict(state) for state in opt.state]])
        for state in (*before[1], *now[1]):
            state.pop("accumulator", None)
        assert [bits(x) for x in arrays_of(now)] == [bits(x) for x in arrays_of(before)]
        assert opt.step_counts == (1, 1, 1, 1)
    opt.step(grads, max_grad_norm=1.0)
    assert opt.accumulated == 0
    assert opt.grad_norm is not None
    assert_moved(before[0], params)


@pytest.mark.parametrize("isa", onepass.available_isas())
def test_gradients_of_a_sum_may_differ_in_dtype(isa):
    onepass.set_isa(isa)
    param, start = numbers(77), numbers(77)
    opt = onepass.SGD(param, lr=1.0, accumulate=3)
    grads = [numbers(77, dtype, seed=k) for k, dtype in enumerate((BFLOAT16, np.float32, np.float16))]
    for grad in grads:
        opt.step(grad)
    a, b, c = (grad.astype(np.float32) for grad in grads)
    assert_same_bits(param, start - np.float32(1 / 3) * ((a + b) + c))
    opt.step(grads[0])
    opt.step(None)
    opt.step(None)
    assert opt.step_counts == (2,)


def test_buffers_that_are_bound_can_be_zeroed():
    param, grad = numbers(50), numbers(50, seed=1)
    opt = onepass.SGD(param, grads=grad, lr=0.5, ema_decay=0.5)
    for _ in range(2):
        before = param.copy()
        grad[...] = numbers(50, seed=2)
        opt.step(zero_grads=True, grad_scale=0.5, max_grad_norm=1e6)
        assert not grad.any()
        assert_same_bits(param, before - np.float32(0.5) * (np.float32(0.5) * numbers(50, seed=2)))
    grad.flags.writeable = False
    whole = Whole(opt, param, grad)
    with pytest.raises(ValueError, match=r"^grads: "):
        opt.step(zero_grads=True)
    whole.assert_unchanged()
    opt.step()


def test_functional_sums_need_each_gradient():
    params, sums = [numbers(5), numbers(6)], [np.zeros(5, np.float32), np.zeros(6, np.float32)]
    before = copied([params, sums])
    for micro_step in (1, 2):
        with pytest.raises(TypeError, match=r"^grads\[1\]: None"):
            functional.sgd(params, [numbers(5), None], step=1, accumulators=sums, accumulate=2, micro_step=micro_step)
    assert [bits(x) for x in arrays_of([params, sums])] == [bits(x) for x in arrays_of(before)]


# Averages


@pytest.mark.parametrize("name", FEW)
def test_averages_of_parameters_without_gradients(name):
    kinds = [Kind((35,)), Kind((6, 7), "float64"), Kind((50,))]
    calls = [
        Call((True, False, False)),
        Call((True, True, False)),
        Call((False, True, False)),
        Call((True, True, False)),
    ]
    reference = check(functools.partial(make, name), kinds, {"ema_decay": decay_of}, calls, what=name)
    assert not (reference.tensors[0].ema == reference.tensors[0].param).all()
    assert_same_bits(reference.tensors[2].ema, reference.tensors[2].param)


def test_a_schedule_of_the_average_gets_the_parameters_own_count():
    seen = []

    def decay(t):
        seen.append(t)
        return 0.5

    params = [np.ones(2), np.ones(2)]
    opt = onepass.SGD(params, lr=1.0, ema_decay=decay)
    one = np.ones(2)
    opt.step([one, None])
    opt.step([one, one])
    opt.step([one, one])
    assert sorted(seen) == [1, 1, 2, 2, 3]
    assert params[0].tolist() == [-2.0, -2.0]
    assert opt.ema[0].tolist() == [-1.25, -1.25], "0, then -0.5, then -1.25"
    assert opt.ema[1].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("value", [1.0, -0.5, NAN, "x", None])
def test_a_schedule_of_the_average_that_fails(value):
    opt, params, grads = world(ema_decay=lambda t: 0.9 if t < 3 else value)
    whole = Whole(opt, params, grads)
    with pytest.raises((TypeError, ValueError), match=r"^ema_decay\(3\): "):
        opt.step(grads)
    whole.assert_unchanged()


def test_averages_have_the_structure_of_the_parameters():
    assert onepass.SGD(np.ones(3)).ema is None
    assert onepass.SGD(np.ones(3), ema_decay=0.9).ema.tolist() == [1.0] * 3
    params = {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), BFLOAT16)}
    opt = onepass.SGD(params, ema_decay=0.9)
    assert list(opt.ema) == ["a", "b"]
    assert opt.ema["b"] is opt.state[1]["ema"]
    assert opt.ema["b"].dtype == BFLOAT16
    assert onepass.SGD(params["b"], ema_decay=0.9, master="split").ema.dtype == np.float32
    opt = onepass.SGD([{"params": [np.ones(2)]}, {"params": [np.ones(3)], "ema_decay": 0.5}])
    assert opt.ema[0] == [None]
    assert opt.ema[1][0].shape == (3,)
    opt.step([[np.ones(2)], [np.ones(3)]])
    opt.swap_ema()


@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16", "float16", "split"])
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("isa", onepass.available_isas())
def test_averages_are_exchanged_there_and_back(isa, threads, storage):
    onepass.set_isa(isa)
    onepass.set_num_threads(threads)
    _cpu.set_serial_bytes(0)
    dtype = "bfloat16" if storage == "split" else storage
    more = {"master": "split"} if storage == "split" else {}
    kinds = [
        Kind((35,), dtype, offset=1, mirror="bfloat16"),
        Kind((71, 60), dtype, axes=(1, 0), mirror="float16", mirror_axes=(0, 1)),
        Kind((3, 0), dtype, mirror="float16"),
        Kind((2, 3), dtype),
    ]
    training = begin(functools.partial(make, "Adam"), kinds, {"ema_decay": 0.5, **more})
    opt, params, mirrors, _ = training
    for number in range(3):
        opt.step(Call().gradients(kinds, number))
    wide = np.float64 if storage == "float64" else np.float32

    def now():
        values = (
            opt.master if storage == "split" else [narrow.widen(p.reshape(-1), wide).reshape(p.shape) for p in params]
        )
        return [np.array(x) for x in values], [np.array(opt.ema[k], wide) for k in range(len(params))]

    before, averages = now()
    first = Whole(opt, params, mirrors)
    opt.swap_ema()
    swapped, others = now()
    for k, mirror in enumerate(mirrors):
        assert_same_bits(swapped[k], averages[k])
        assert_same_bits(others[k], before[k])
        assert swapped[k].size == 0 or (swapped[k] != before[k]).mean() > 0.5
        if mirror is not None:
            want = narrow.nearest(averages[k].reshape(-1), mirror.dtype).reshape(mirror.shape)
            assert_same_bits(np.ascontiguousarray(mirror), want)
    whole = Whole(opt, params, mirrors)
    with pytest.raises(RuntimeError, match="swap_ema"):
        opt.step(Call().gradients(kinds, 9))
    whole.assert_unchanged()
    opt.swap_ema()
    first.assert_unchanged()
    opt.step(Call().gradients(kinds, 10))
    assert opt.step_counts == (4,) * 4


def test_exchanging_without_averages():
    opt, params, grads = world()
    whole = Whole(opt, params, grads)
    with pytest.raises(RuntimeError, match="ema_decay"):
        opt.swap_ema()
    whole.assert_unchanged()


# Units


def in_groups(limits):
    """A factory of optimizers with a group for each parameter."""

    def factory(params, *, name="Adam", **options):
        groups = [{"params": param, "max_unit_norm": limit} for param, limit in zip(params, limits, strict=True)]
        return make(name, groups, **options)

    return factory


UNITS = (
    # shape, axes in memory, axis, the number of elements of a unit
    ((40, 30), (0, 1), 0, 40),
    ((40, 30), (1, 0), 0, 40),
    ((40, 30), (0, 1), 1, 30),
    ((40, 30), (1, 0), -1, 30),
    ((40, 30), (0, 1), (0, 1), 1200),
    ((300,), (0,), 0, 300),
    ((1, 70), (0, 1), 0, 1),
    ((70, 1), (0, 1), 0, 70),
    ((12, 5, 3, 3), (0, 1, 2, 3), (1, 2, 3), 45),  # OIHW
    ((12, 5, 3, 3), (0, 2, 3, 1), (1, 2, 3), 45),  # OIHW, channels last
    ((3, 3, 5, 12), (0, 1, 2, 3), (0, 1, 2), 45),  # HWIO
    ((5, 12, 3, 3), (0, 1, 2, 3), (0, 2, 3), 45),  # IOHW
    ((5, 12, 3, 3), (0, 2, 3, 1), (0, -2, -1), 45),
    ((7, 6, 20), (0, 1, 2), 1, 6),  # a stack of matrices
    ((7, 6, 20), (2, 1, 0), 1, 6),
    ((4, 5, 6, 7), (0, 1, 2, 3), (1, 3), 35),  # runs, units, depth and more of them outside
    ((9000, 2), (1, 0), 0, 9000),
    ((2, 9000), (1, 0), 0, 2),
    ((0, 3), (0, 1), 0, 0),
    ((3, 0), (0, 1), 0, 3),
)


@pytest.mark.parametrize("level2", [0, 1, 3000, 100_000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "split"])
def test_units_of_every_layout(dtype, level2):
    _cpu.set_cache_sizes(level2, 4 * level2)
    more = {"master": "split"} if dtype == "split" else {}
    dtype = "bfloat16" if dtype == "split" else dtype
    limits = [(0.9 * math.sqrt(n + 1), axis) for _, _, axis, n in UNITS]
    kinds = [
        Kind(shape, dtype, axes=axes, layout=("same", "reversed")[k % 2], mirror=("float16", None)[k % 2], offset=k)
        for k, (shape, axes, _, _) in enumerate(UNITS)
    ]
    reference = check(in_groups(limits), kinds, {"ema_decay": 0.5, **more}, [Call()] * 3, machines=FEW_MACHINES)
    check(in_groups(limits), kinds, more, [Call()] * 2, machines=[MACHINES[-1]])
    for tensor, limit, (_, _, _, n) in zip(reference.tensors, limits, UNITS, strict=True):
        if tensor.param.size == 0:
            continue
        axis = limit[1]
        norms = np.sqrt(
            np.sum(narrow.widen(tensor.param.reshape(-1), np.float64).reshape(tensor.param.shape) ** 2, axis)
        )
        slack = 1e-2 if dtype == "bfloat16" else 1e-6
        assert (norms <= limit[0] * (1 + slack)).all()
        if n > 1:
            assert (norms > limit[0] * 0.9).any(), "some unit is near the limit"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_units_with_stochastic_rounding(name):
    limits = [(4.0, 0), (6.0, 1), (2.0, (1, 2, 3)), (3.0, 0)]
    kinds = [
        Kind((40, 30), "bfloat16"),
        Kind((40, 70), "float16"),
        Kind((9, 4, 3, 3), "bfloat16"),
        Kind((50,), "float16"),
    ]
    kinds = [Kind(**{**vars(kind), "mirror": "float16"}) for kind in kinds]
    factory = functools.partial(in_groups(limits), name=name)
    options = {"rounding": "stochastic", "seed": 3, "ema_decay": 0.9}
    check(factory, kinds, options, [Call()] * 3, machines=FEW_MACHINES)


def test_units_within_the_limit_keep_their_bits():
    for shape, axis in (((30, 20), 0), ((30, 20), 1), ((600,), 0)):
        limited, free = numbers(shape), numbers(shape)
        onepass.SGD(limited, max_unit_norm=(1e6, axis)).step(numbers(shape, seed=1))
        onepass.SGD(free).step(numbers(shape, seed=1))
        assert_same_bits(limited, free)


def test_units_exactly_at_the_limit():
    for limit, want in ((5.0, [3.0, 4.0]), (math.nextafter(5.0, 6.0), [3.0, 4.0]), (2.5, [1.5, 2.0])):
        param = np.array([3.0, 4.0])
        onepass.SGD(param, max_unit_norm=(limit, 0)).step(np.zeros(2))
        assert param.tolist() == want


def test_units_that_are_not_finite():
    param = np.array([[1.0, NAN, INF, 3.0], [1.0, 1.0, 1.0, 4.0]])
    onepass.SGD(param, max_unit_norm=(2.5, 0)).step(np.zeros((2, 4)))
    np.testing.assert_array_equal(param, [[1.0, NAN, NAN, 1.5], [1.0, 1.0, 0.0, 2.0]])


@pytest.mark.parametrize(
    ("shape", "axis", "error"),
    [
        ((), 0, "axis 0.* 0 dimensions"),
        ((4,), 1, "axis 1"),
        ((4, 5), 2, "axis 2"),
        ((4, 5), -3, "axis -3"),
        ((4, 5), (0, 2), "axis 2"),
        ((4, 5), (0, 0), "twice"),
        ((4, 5), (1, -1), "twice"),
        ((2, 3, 4, 5), (0, 2), "scattered"),
        ((2, 3, 4, 5, 6), (0, 2, 4), "scattered"),
    ],
)
def test_units_that_a_parameter_cannot_have(shape, axis, error):
    param, other = numbers(shape), numbers((3, 3, 3, 3, 3))
    grads = [{"a": numbers((3, 3, 3, 3, 3))}, {"b": numbers(shape)}]

    def step_with_it():
        opt = onepass.Adam([{"params": {"a": other}}, {"params": {"b": param}, "max_unit_norm": (1.0, axis)}])
        opt.step(grads)

    before = bits(other), bits(param)
    with pytest.raises((TypeError, ValueError), match=error) as caught:
        step_with_it()
    assert "max_unit_norm" in str(caught.value)
    assert "'b'" in str(caught.value)
    assert (bits(other), bits(param)) == before
    opt = onepass.Adam([{"params": {"a": other}}, {"params": {"b": param}}], ema_decay=0.5)
    opt.step(grads)
    if error == "scattered":  # what only the memory of the parameter tells
        opt.param_groups[1]["max_unit_norm"] = (1.0, axis)
    whole = Whole(opt, other, param)
    with pytest.raises(ValueError, match=error):
        opt.step(grads) if error == "scattered" else opt.param_groups[1].update(max_unit_norm=(1.0, axis))
    whole.assert_unchanged()
    opt.param_groups[1]["max_unit_norm"] = None
    opt.step(grads)


# Noise


def test_noise_is_normal_of_the_documented_variance():
    count = 200_000
    params = [np.zeros(count, np.float32), np.zeros(count, np.float32)]
    opt = onepass.SGD(params, lr=1.0, gradient_noise=(0.5, 0.55), seed=9)
    samples = []
    for t in range(1, 4):
        before = copied(params)
        opt.step([np.zeros(count, np.float32)] * 2, clip_value=1e-3)
        sigma = math.sqrt(0.5 / (1 + t) ** 0.55)
        for old, new in zip(before, params, strict=True):
            z = (old.astype(np.float64) - new) / sigma
            assert abs(z.mean()) < 4.5 / math.sqrt(count)
            assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / count)
            assert abs(np.mean(z**3)) < 4.5 * math.sqrt(15 / count)
            assert abs(np.mean(z**4) - 3) < 4.5 * math.sqrt(96 / count)
            samples.append(z)
    for k, a in enumerate(samples):
        for b in samples[:k]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(count), "other steps and parameters, other numbers"


def test_noise_depends_on_seed_step_parameter_and_element_alone():
    count = 5000

    def noise(seed=1, skip=0, machine=MACHINES[0], index=0):
        onepass.set_isa(machine[0])
        onepass.set_num_threads(machine[1])
        _cpu.set_serial_bytes(0)
        params = [np.zeros(1, np.float32) for _ in range(index)] + [np.zeros(count, np.float32)]
        opt = onepass.SGD(params, lr=1.0, gradient_noise=(1.0, 0.0), seed=seed)
        zero = [np.zeros_like(p) for p in params]
        for _ in range(skip):
            opt.step(zero)
        params[-1][...] = 0
        opt.step(zero)
        return params[-1]

    start = noise()
    for machine in MACHINES:
        assert_same_bits(noise(machine=machine), start)
    for other in (noise(seed=2), noise(seed=1 + 2**32), noise(skip=1), noise(index=1)):
        assert np.mean(other == start) < 0.01


# What a state_dict holds


STORED = {
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16", "rounding": "stochastic", "state_dtype": "bfloat16"},
    "float16": {"dtype": "float16", "rounding": "stochastic"},
    "split": {"dtype": "bfloat16", "master": "split"},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_state_dict_bit_for_bit(name, stored):
    """Saved after each call, so also in the middle of a sum, and after one that was skipped."""
    options = dict(STORED[stored])
    dtype = options.pop("dtype")
    kinds = [
        Kind((35,), dtype, mirror="bfloat16"),
        Kind((9, 31), dtype, axes=(1, 0), layout="reversed", mirror="float16"),
    ]
    options = {**EVERYTHING, "accumulate": 3, **options}
    calls = [Call((True, k != 1), NAN if k == 2 else 1.0, STEP_OF_EVERYTHING) for k in range(8)]

    def snapshot(training):
        state = copy.deepcopy(training.opt.state_dict())
        return [p.copy(order="K") for p in training.params], state

    whole = begin(functools.partial(make, name), kinds, options)
    saved = []
    for number, call in enumerate(calls):
        saved.append(snapshot(whole))
        whole.opt.step(call.gradients(kinds, number), **call.options)
    assert whole.opt.step_counts == (2, 2)
    assert whole.opt.skipped == 1
    final = [bits(x) for x in (*whole.params, *whole.mirrors, *arrays_of([dict(s) for s in whole.opt.state]))]
    assert {state["accumulated"] for _, state in saved} == {0, 1, 2}
    for begun in range(len(calls)):
        params, state = saved[begun]
        other = begin(functools.partial(make, name), kinds, {**options, "seed": 12345})
        for param, value in zip(other.params, params, strict=True):
            param[...] = value
        other.opt.load_state_dict(state)
        for number in range(begun, len(calls)):
            other.opt.step(calls[number].gradients(kinds, number), **calls[number].options)
        assert other.opt.skipped == 1
        now = [bits(x) for x in (*other.params, *other.mirrors, *arrays_of([dict(s) for s in other.opt.state]))]
        if begun < 7:  # else no update wrote the mirrors
            assert now == final, f"{name}, {stored}, saved before call {begun}"


def test_exchanged_averages_are_part_of_a_state_dict():
    opt, params, grads = world(ema_decay=0.9)
    opt.swap_ema()
    state = opt.state_dict()
    assert state["ema_swapped"] is True
    twin, twin_params, _ = world(ema_decay=0.9, steps=0)
    for key, param in params.items():
        twin_params[key][...] = param
    twin.load_state_dict(state)
    with pytest.raises(RuntimeError, match="swap_ema"):
        twin.step(grads)
    for one in (opt, twin):
        one.swap_ema()
        one.step(grads)
    assert [bits(x) for x in twin_params.values()] == [bits(x) for x in params.values()]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"skipped": -1}, "skipped"),
        ({"skipped": "1"}, "skipped"),
        ({"accumulated": 3}, "accumulated"),
        ({"accumulated": -1}, "accumulated"),
        ({"accumulated": True}, "accumulated"),
        ({"ema_swapped": 1}, "ema_swapped"),
        ({"ema_swapped": None}, "ema_swapped"),
        ({"more": 1}, "more"),
        ("seed", "seed"),
        ("skipped", "skipped"),
        ("accumulated", "accumulated"),
        ("ema_swapped", "ema_swapped"),
    ],
)
def test_a_state_dict_that_cannot_be(change, name):
    opt, params, grads = world(accumulate=3, ema_decay=0.9, mirror=True, steps=4)
    state = opt.state_dict()
    if isinstance(change, str):
        del state[change]
    else:
        state.update(change)
    whole = Whole(opt, params, grads)
    with pytest.raises((TypeError, ValueError), match=name):
        opt.load_state_dict(state)
    whole.assert_unchanged()


def test_a_state_dict_whose_arrays_do_not_fit():
    opt, params, grads = world(accumulate=3, ema_decay=0.9, steps=4)
    for name, value in (
        ("ema", None),
        ("accumulator", np.zeros((7, 9), np.float64)),
        ("ema", np.zeros((9, 7), np.float32)),
        ("received", 2),
        ("received", -1),
        ("remainder", np.zeros((7, 9), np.uint16)),
    ):
        state = opt.state_dict()
        if value is None:
            del state["state"][0][name]
        else:
            state["state"][0][name] = value
        whole = Whole(opt, params, grads)
        with pytest.raises((TypeError, ValueError), match=rf"state\[0\].*{name}"):
            opt.load_state_dict(state)
        whole.assert_unchanged()
    plain = world()[0]
    whole = Whole(plain)
    with pytest.raises((TypeError, ValueError)):
        plain.load_state_dict(opt.state_dict())
    whole.assert_unchanged()


# Arguments that cannot be


NUMBERS_ABOVE_ZERO = ((0.0, ValueError), (-1.0, ValueError), (NAN, ValueError), ("1", TypeError), (True, TypeError))
STEP_ERRORS = [
    *[("grad_scale", value, error) for value, error in (*NUMBERS_ABOVE_ZERO, (INF, ValueError), (None, TypeError))],
    *[("max_grad_norm", value, error) for value, error in NUMBERS_ABOVE_ZERO],
    *[("clip_norm", value, error) for value, error in NUMBERS_ABOVE_ZERO],
    *[("clip_value", value, error) for value, error in (*NUMBERS_ABOVE_ZERO, (INF, ValueError))],
    ("grad_scale", 1e300, ValueError),
    ("nonfinite", "ignore", ValueError),
    ("nonfinite", None, TypeError),
    ("nonfinite", 1, TypeError),
    ("zero_grads", 1, TypeError),
    ("zero_grads", None, TypeError),
    ("clip", 1.0, TypeError),
]
CONSTRUCTOR_ERRORS = [
    ("ema_decay", 1.0, ValueError),
    ("ema_decay", -0.1, ValueError),
    ("ema_decay", NAN, ValueError),
    ("ema_decay", "0.9", TypeError),
    ("ema_decay", True, TypeError),
    ("accumulate", 0, ValueError),
    ("accumulate", -1, ValueError),
    ("accumulate", 2.0, TypeError),
    ("accumulate", True, TypeError),
    ("accumulate", 2**31, ValueError),
    ("max_unit_norm", 3.0, TypeError),
    ("max_unit_norm", (3.0,), TypeError),
    ("max_unit_norm", (0.0, 0), ValueError),
    ("max_unit_norm", (INF, 0), ValueError),
    ("max_unit_norm", (NAN, 0), ValueError),
    ("max_unit_norm", ("3", 0), TypeError),
    ("max_unit_norm", (3.0, 0.0), TypeError),
    ("max_unit_norm", (3.0, ()), TypeError),
    ("max_unit_norm", (3.0, (0, 1.0)), TypeError),
    ("max_unit_norm", (3.0, None), TypeError),
    ("max_unit_norm", (3.0, True), TypeError),
    ("gradient_noise", 0.1, TypeError),
    ("gradient_noise", (0.1,), TypeError),
    ("gradient_noise", (-0.1, 0.5), ValueError),
    ("gradient_noise", (0.1, -0.5), ValueError),
    ("gradient_noise", (NAN, 0.5), ValueError),
    ("gradient_noise", (0.1, INF), ValueError),
    ("gradient_noise", (0.1, "0.5"), TypeError),
    ("seed", -1, ValueError),
    ("seed", 2**64, ValueError),
    ("seed", 1.0, TypeError),
    ("seed", None, TypeError),
    ("seed", False, TypeError),
    ("state_dtype", np.float16, TypeError),
    ("state_dtype", np.int32, TypeError),
    ("state_dtype", "no dtype", TypeError),
    ("state_dtype", np.float64, TypeError),
    ("state_dtype", ">f4", TypeError),
    ("rounding", "up", ValueError),
    ("rounding", None, TypeError),
    ("master", "whole", ValueError),
    ("master", True, TypeError),
    ("master", "split", TypeError),  # of float32 parameters
    ("ema", 0.9, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), STEP_ERRORS)
def test_a_step_with_a_bad_option_changes_nothing(name, value, error):
    opt, params, grads = world(ema_decay=0.9, mirror=True, gradient_noise=(0.1, 0.5))
    whole = Whole(opt, params, grads, opt._storage.mirror)
    label = name if value not in (1e300,) else "grad_scale"
    with pytest.raises(error, match=label):
        opt.step(grads, **{name: value})
    whole.assert_unchanged()
    owned = [numbers(4), numbers(4)]
    before = [bits(x) for x in owned]
    with pytest.raises(error, match=label):
        functional.momentum(owned[0], numbers(4, seed=1), owned[1], step=1, **{name: value})
    assert [bits(x) for x in owned] == before


def test_one_kind_of_clipping_at_a_time():
    opt, params, grads = world()
    whole = Whole(opt, params, grads)
    limits = ("max_grad_norm", "clip_norm", "clip_value")
    for a, b in (limits[:2], limits[1:], limits[::2]):
        with pytest.raises(ValueError, match=f"{b}.*{a}|{a}.*{b}"):
            opt.step(grads, **{a: 1.0, b: 1.0})
        with pytest.raises(ValueError, match=f"{b}.*{a}|{a}.*{b}"):
            functional.sgd(params["fc1.bias"], grads["fc1.bias"], step=1, **{a: 1.0, b: 1.0})
        whole.assert_unchanged()
    opt.step(grads, **{limits[0]: 1.0, limits[1]: None, limits[2]: None})


@pytest.mark.parametrize(("name", "value", "error"), CONSTRUCTOR_ERRORS)
def test_an_optimizer_with_a_bad_option_is_not_made(name, value, error):
    params = [numbers(4), numbers((3, 5))]
    before = [bits(x) for x in params]
    with pytest.raises(error, match=name):
        onepass.Adam(params, **{name: value})
    assert [bits(x) for x in params] == before


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [row for row in CONSTRUCTOR_ERRORS if row[0] in ("ema_decay", "max_unit_norm", "gradient_noise")],
)
def test_a_group_with_a_bad_option(name, value, error):
    params = [numbers(4), numbers(5)]
    with pytest.raises(error, match=re.escape(f"params[1]['{name}']")):
        onepass.Adam([{"params": params[0]}, {"params": params[1], name: value}])
    opt = onepass.Adam(params, **{name: {"ema_decay": 0.5, "max_unit_norm": (1.0, 0)}.get(name, (0.1, 0.5))})
    whole = Whole(opt, params)
    with pytest.raises(error, match=name):
        opt.param_groups[0][name] = value
    whole.assert_unchanged()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        row
        for row in CONSTRUCTOR_ERRORS
        if row[0] in ("ema_decay", "max_unit_norm", "gradient_noise", "seed", "rounding")
    ],
)
def test_a_function_with_a_bad_option_changes_nothing(name, value, error):
    param, grad, average = numbers(4), numbers(4, seed=1), np.zeros(4, np.float32)
    before = bits(param), bits(average)
    more = {"emas": average} if name == "ema_decay" else {}
    with pytest.raises(error, match=name):
        functional.sgd(param, grad, step=1, **more, **{name: value})
    assert (bits(param), bits(average)) == before


def test_averages_cannot_come_or_go_later():
    for start, later in ((None, 0.5), (0.5, None)):
        param = numbers(4)
        opt = onepass.SGD(param, ema_decay=start)
        whole = Whole(opt, param)
        with pytest.raises(ValueError, match="ema_decay"):
            opt.param_groups[0]["ema_decay"] = later
        whole.assert_unchanged()
    opt = onepass.SGD(numbers(4), ema_decay=0.5)
    opt.param_groups[0].update(ema_decay=0.75, max_unit_norm=(3, 0), gradient_noise=(0, 1))
    assert opt.param_groups[0]["ema_decay"] == 0.75


def test_mirrors_that_cannot_be():
    params = {"a": numbers(4), "b": numbers((2, 3))}
    good = {"a": np.zeros(4, BFLOAT16), "b": np.zeros((2, 3), np.float16)}
    read_only = np.zeros((2, 3), BFLOAT16)
    read_only.flags.writeable = False
    for value, error in (
        (np.zeros((2, 3), np.float32), TypeError),
        (np.zeros((2, 3), np.uint16), TypeError),
        (np.zeros((3, 2), BFLOAT16), ValueError),
        (np.zeros((2, 6), BFLOAT16)[:, ::2], ValueError),
        (read_only, ValueError),
        ([0.0] * 6, TypeError),
        (params["b"].view(np.uint16).view(np.float16)[:, ::2], ValueError),
        (good["a"], ValueError),
    ):
        before = [bits(x) for x in arrays_of([params, good])]
        with pytest.raises(error, match=r"mirror\[1\] \('b'\)"):
            onepass.SGD(params, mirror={**good, "b": value})
        assert [bits(x) for x in arrays_of([params, good])] == before
    for value in (good["a"], [good["a"], good["b"]]):
        with pytest.raises(TypeError, match="mirror"):
            onepass.SGD(params, mirror=value)
    with pytest.raises(ValueError, match="mirror"):
        onepass.SGD(params, mirror={"a": good["a"]})
    opt = onepass.SGD(params, mirror={"a": None, "b": good["b"]}, lr=0.5)
    opt.step({"a": numbers(4), "b": numbers((2, 3))})
    np.testing.assert_array_equal(good["b"], params["b"].astype(np.float16))
    assert not good["a"].any()


def test_mirrors_share_no_memory():
    memory = np.zeros(64, np.uint8)
    param, mirror = memory[:40].view(np.float32), memory[36:56].view(np.float16)
    with pytest.raises(ValueError, match=r"mirror: overlaps params"):
        onepass.SGD(param, mirror=mirror)
    mirror = np.zeros(10, np.float16)
    opt = onepass.SGD(numbers(10, np.float16), mirror=mirror)
    with pytest.raises(ValueError, match=r"grads: overlaps mirror"):
        opt.step(mirror)
    assert not mirror.any()


def test_gradients_that_cannot_be_zeroed():
    opt, params, grads = world()
    grads["fc2.weight"].flags.writeable = False
    whole = Whole(opt, params, grads)
    with pytest.raises(ValueError, match=re.escape("grads[2] ('fc2.weight'): ")):
        opt.step(grads, zero_grads=True)
    whole.assert_unchanged()
    opt.step(grads)
    grads["fc2.weight"] = np.broadcast_to(np.float32(1.0), (9, 70))
    whole = Whole(opt, params, grads)
    with pytest.raises(ValueError, match=re.escape("grads[2] ('fc2.weight'): ")):
        opt.step(grads, zero_grads=True)
    whole.assert_unchanged()
    opt.step(grads)
    shared = numbers(9)
    grads["fc2.weight"] = numbers((9, 70))
    pair = {**grads, "fc1.bias": shared, "fc2.bias": np.concatenate([shared, numbers(61)])[:70]}
    opt.step(pair, zero_grads=True)
    memory = numbers(100)
    pair = {**grads, "fc1.bias": memory[:9], "fc2.bias": memory[5:75]}
    whole = Whole(opt, params, pair)
    with pytest.raises(ValueError, match=r"grads\[3\] \('fc2.bias'\): overlaps grads\[1\]"):
        opt.step(pair, zero_grads=True)
    whole.assert_unchanged()
    opt.step(pair)


def test_what_a_step_leaves_alone_is_not_zeroed_as_the_gradient_of_another_parameter():
    opt, params, grads = world()
    names = list(params)
    frozen = {**grads, names[0]: None}
    state = next(iter(opt.state[0].values()))
    for victim in (params[names[0]], state):
        for name in names[1:]:
            if grads[name].size > victim.size:
                continue
            evil = {**frozen, name: victim.reshape(-1)[: grads[name].size].reshape(grads[name].shape)}
            whole = Whole(opt, params, evil)
            with pytest.raises(
                ValueError, match=re.escape(f"('{name}')") + ".* overlaps|overlaps .*" + re.escape(f"('{name}')")
            ):
                opt.step(evil, zero_grads=True)
            whole.assert_unchanged()
            break
        else:
            raise AssertionError("no gradient is small enough")
    opt.step(frozen, zero_grads=True)
    p, q = numbers(4), numbers(4, seed=1)
    before = bits(q)
    with pytest.raises(ValueError, match=r"overlaps (params\[1\]|grads\[0\])"):
        functional.sgd([p, q], [q, None], step=1, zero_grads=True)
    assert bits(q) == before
    functional.sgd([p, q], [p * 2, None], step=1, zero_grads=True)
    assert bits(q) == before


def test_a_frozen_parameter_may_be_read_only_and_a_function_needs_no_state_of_it():
    params = [numbers(5), numbers(5, seed=1)]
    opt = onepass.Adam(params)
    params[1].flags.writeable = False
    before = bits(params[1])
    opt.step([numbers(5, seed=2), None], zero_grads=True)
    assert opt.step_counts == (1, 0)
    assert bits(params[1]) == before
    states = [[np.zeros(5, np.float32), None] for _ in range(2)]
    functional.adam(params, [numbers(5, seed=2), None], *states, step=1, zero_grads=True)
    assert bits(params[1]) == before
    for bad in ([None, params[1]], [params[0], None]):
        with pytest.raises(TypeError, match="got NoneType"):
            functional.sgd(bad, [numbers(5), numbers(5)], step=1, zero_grads=True)


def test_functional_options_that_need_each_other():
    p, g, x = numbers(4), numbers(4, seed=1), np.zeros(4, np.float32)
    before = bits(p)
    for options, error, name in (
        ({"ema_decay": 0.5}, ValueError, "emas"),
        ({"emas": x}, ValueError, "emas"),
        ({"accumulate": 2, "micro_step": 1}, ValueError, "accumulators"),
        ({"accumulators": x}, ValueError, "accumulators"),
        ({"accumulate": 2, "accumulators": x}, TypeError, "micro_step"),
        ({"micro_step": 1}, TypeError, "micro_step"),
        ({"accumulate": 2, "accumulators": x, "micro_step": 3}, ValueError, "micro_step"),
        ({"accumulate": 2, "accumulators": x, "micro_step": 0}, ValueError, "micro_step"),
        ({"accumulate": 2, "accumulators": x.astype(np.float64), "micro_step": 1}, TypeError, "accumulators"),
        ({"accumulate": 2, "accumulators": np.zeros(5, np.float32), "micro_step": 1}, ValueError, "accumulators"),
        ({"remainders": np.zeros(4, np.uint16)}, TypeError, "remainders"),
        ({"mirrors": x}, TypeError, "mirrors"),
        ({"mirrors": [np.zeros(4, BFLOAT16)]}, TypeError, "mirrors"),
        ({"mirrors": np.zeros(3, BFLOAT16)}, ValueError, "mirrors"),
        ({"emas": np.zeros(4, np.float64), "ema_decay": 0.5}, TypeError, "emas"),
        ({"emas": p, "ema_decay": 0.5}, ValueError, "emas"),
        ({"ema_decay": lambda t: 2.0, "emas": x}, ValueError, "ema_decay"),
        ({"max_unit_norm": (1.0, 1)}, ValueError, "max_unit_norm"),
        ({"master": "split"}, TypeError, "master"),
        ({"state_dtype": np.float32}, TypeError, "state_dtype"),
    ):
        with pytest.raises(error, match=name):
            functional.sgd(p, g, step=1, **options)
        assert bits(p) == before
        assert not x.any()
    with pytest.raises(TypeError, match=r"remainders"):
        functional.sgd(p.astype(BFLOAT16), g.astype(BFLOAT16), step=1, remainders=np.zeros(4, np.int16))
    with pytest.raises((TypeError, ValueError), match=r"mirrors"):
        functional.sgd([p, p.copy()], [g, g], step=1, mirrors=[np.zeros(4, BFLOAT16)])


def test_a_report_where_something_was_measured():
    p, g = np.zeros(2), np.array([3.0, 4.0])
    assert functional.sgd(p, g, step=1) is None
    assert functional.sgd(p, g, step=1, clip_value=1.0, grad_scale=2.0, zero_grads=False) is None
    assert functional.sgd(p, g, step=1, max_grad_norm=INF) == functional.StepReport(5.0, False)
    report = functional.sgd(p, np.array([INF, 0.0]), step=1, nonfinite="skip")
    assert report == functional.StepReport(INF, True)
    sums = np.zeros(2)
    report = functional.sgd(p, g, step=1, nonfinite="skip", accumulators=sums, accumulate=2, micro_step=1)
    assert report == functional.StepReport(None, False)
    assert sums.tolist() == [3.0, 4.0]


def test_attributes_of_an_optimizer_that_was_asked_for_nothing():
    opt, _, grads = world()
    assert (opt.grad_norm, opt.skipped, opt.ema, opt.master, opt.accumulated) == (None, 0, None, None, 0)
    opt.step(grads, max_grad_norm=INF)
    norm = math.sqrt(math.fsum(x * x for g in grads.values() for x in g.ravel().tolist()))
    assert abs(opt.grad_norm - norm) < 1e-12 * norm
    opt.step(grads)
    assert opt.grad_norm is None


# What a hostile caller found


@pytest.mark.parametrize("place", ["params", "slot", "emas", "remainders", "accumulators"])
def test_none_in_a_list_of_arrays(place):
    p, v, g = numbers(9), np.zeros(9, np.float32), numbers(9, seed=1)
    options = {}
    if place == "emas":
        options = {"emas": [None], "ema_decay": 0.5}
    elif place == "remainders":
        options = {"remainders": [None]}
    elif place == "accumulators":
        options = {"accumulators": [None], "accumulate": 2, "micro_step": 2}
    params, velocities = ([None], [v]) if place == "params" else ([p], [None] if place == "slot" else [v])
    before = p.copy()
    name = "velocities" if place == "slot" else place
    with pytest.raises(TypeError, match=rf"^{name}\[0\]: expected a NumPy array .*NoneType"):
        functional.momentum(params, [g], velocities, step=1, **options)
    assert_same_bits(p, before)
    assert not v.any()
    with pytest.raises(TypeError, match=r"^params: expected a NumPy array .*NoneType"):
        functional.sgd(None, g, step=1)


REPEATING = {
    "one number": lambda: np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (5000,), (0,)),
    "rows": lambda: np.lib.stride_tricks.as_strided(np.ones(40, np.float32), (30, 40), (0, 4)),
    "windows": lambda: np.lib.stride_tricks.as_strided(np.ones(41, np.float32), (40, 2), (4, 4)),
}


@pytest.mark.parametrize("case", REPEATING)
def test_a_gradient_that_repeats_memory_is_not_zeroed(case):
    grad = REPEATING[case]()
    param = numbers(grad.shape)
    opt, before = onepass.SGD(param, lr=1.0), param.copy()
    with pytest.raises(ValueError, match=r"^grads: strides .* may repeat elements"):
        opt.step(grad, zero_grads=True)
    assert_same_bits(param, before)
    assert (grad == 1).all()
    opt.step(grad)
    assert_same_bits(param, before - np.float32(1))


def test_gradients_that_interleave_are_not_zeroed():
    params, both = [numbers(10), numbers(10)], np.ones((10, 2), np.float32)
    opt = onepass.SGD(params, lr=1.0)
    with pytest.raises(ValueError, match=r"^grads\[1\]: overlaps grads\[0\] .*or interleave"):
        opt.step([both[:, 0], both[:, 1]], zero_grads=True)
    opt.step([both[:, 0], both[:, 1]])
    assert opt.step_counts == (1, 1)


def test_a_step_does_not_slip_in_between_an_exchange():
    """Reading the gradients may run code of others."""

    class Swaps(dict):
        def __getitem__(self, key):
            opt.swap_ema()
            return dict.__getitem__(self, key)

    params = {"w": numbers(5)}
    opt = onepass.SGD(params, lr=1.0, ema_decay=0.5)
    opt.step({"w": numbers(5, seed=1)})
    average = opt.ema["w"].copy()
    with pytest.raises(RuntimeError, match="exchanged"):
        opt.step(Swaps(w=numbers(5, seed=2)))
    assert opt.step_counts == (1,)
    assert_same_bits(params["w"], average)


@pytest.mark.parametrize("name", ["rounding", "accumulate"])
def test_a_state_of_other_options_is_refused(name):
    saved = onepass.SGD(numbers(5)).state_dict()
    saved[name] = {"rounding": "stochastic", "accumulate": 3}[name]
    with pytest.raises(ValueError, match=rf"^{name}: the state is of"):
        onepass.SGD(numbers(5)).load_state_dict(saved)


@pytest.mark.parametrize("value", [1e-40, 1e-60])
def test_a_clip_value_that_rounds_to_zero_clips_to_zero(value):
    param = numbers(40)
    before = param.copy()
    onepass.SGD(param, lr=1.0).step(numbers(40, seed=1), clip_value=value)
    np.testing.assert_array_equal(param, before)


def test_parameters_without_a_step_have_no_average():
    a, b = numbers(5), numbers(5)
    opt = onepass.SGD([a, b], ema_decay=0.5)
    a[...] = 5.0  # as a checkpoint does that is loaded after construction
    opt.step([None, numbers(5, seed=1)])
    opt.swap_ema()
    assert (a == 5).all()
    opt.swap_ema()
    assert (a == 5).all()


@pytest.mark.parametrize("split", [False, True])
def test_a_parameter_that_was_laid_out_anew(split):
    """torch gives a parameter another memory order, or other memory, and keeps the object."""
    torch = pytest.importorskip("torch", reason="torch is a test extra")
    dtype = torch.bfloat16 if split else torch.float32
    param = torch.arange(24, dtype=dtype).reshape(4, 6).clone()
    opt = onepass.SGD(param, lr=0.5, ema_decay=0.5, master="split" if split else None)
    opt.step(torch.ones(4, 6))
    param.data = (param.data + 1).t().contiguous().t()
    opt.step(torch.ones(4, 6))
    now, average = param.float().numpy().copy(), opt.ema.copy()
    if split:
        np.testing.assert_array_equal(opt.master, now)
    opt.swap_ema()
    np.testing.assert_array_equal(param.float().numpy(), average)
    np.testing.assert_array_equal(opt.ema, now)


@pytest.mark.parametrize("isa", onepass.available_isas())
def test_stochastic_rounding_reads_no_further_than_its_bits(isa):
    """Every tail behind every start, in blocks of the random numbers: the sanitizer looks on."""
    onepass.set_isa(isa)
    memory = np.ones(3000, BFLOAT16)
    for start in range(33):
        for size in (1023, 1024, 1537):
            onepass.SGD(memory[start : start + size], lr=0.1, rounding="stochastic").step(np.ones(size, BFLOAT16))
    assert np.isfinite(memory.astype(np.float32)).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_one_large_unit(threads):
    onepass.set_num_threads(threads)
    _cpu.set_serial_bytes(0)
    param = numbers((3, 20_001))
    opt = onepass.SGD(param, lr=0.0, max_unit_norm=(2.0, 1), ema_decay=0.5)
    opt.step(numbers(param.shape, seed=1))
    np.testing.assert_allclose(np.linalg.norm(param, axis=1), 2.0, rtol=1e-5)
    assert_same_bits(opt.ema, param)

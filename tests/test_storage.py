"""Promise: every combination of dtypes that can be stored is computed in float32 or float64, for every rule."""

from __future__ import annotations

import functools
import itertools
import math
import re

import numpy as np
import pytest

import onepass
from helpers import arrays_of, bits, guarded, numbers
from mlp import MLP
from onepass import _cpu, functional
from reference import expressions, narrow, whole_step
from reference.expressions import assert_same_bits
from training import (
    BFLOAT16,
    FEW,
    FEW_MACHINES,
    FUNCTIONS,
    ISAS,
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
FLOAT16 = np.dtype(np.float16)
TABLE = (
    ("float32", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float16", "float32"),
    ("float32", "float32", "bfloat16"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("float64", "float64", "float64"),
)
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": BFLOAT16, "float16": np.float16}
# Every tail, above the width of every instruction set, and what several threads divide. Starts at all odd offsets.
SIZES = (*range(34), 101, 257, 4099)
# One optimizer for each rule.
OF_RULE = {}
for _name in OPTIMIZERS:
    _opt = make(_name, np.ones(1, np.float32))
    OF_RULE.setdefault(_opt.rule(_opt.param_groups[0]), _name)


def test_the_table_is_that_of_the_documentation():
    assert tuple(_cpu.storages()) == TABLE
    for row in TABLE:
        assert ", ".join(row) in re.sub(r"\s+", " ", onepass.Optimizer.__doc__)


def in_dtypes(row):
    """Options of an optimizer with these dtypes."""
    return {"state_dtype": DTYPES[row[2]]} if row[2] == "bfloat16" else {}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("rule", OF_RULE)
def test_every_rule_in_every_storage(rule, row, rounding):
    """On every instruction set and thread count: guard bytes, odd offsets, all tails; parameters moved."""
    kinds = [Kind((n,), row[0], row[1], offset=(7 * k) % 64) for k, n in enumerate(SIZES)]
    kinds.append(Kind((23, 31), row[0], row[1], axes=(1, 0), layout="reversed"))
    kinds.append(Kind((3, 5, 41), row[0], row[1], axes=(1, 2, 0), layout="gaps", offset=1))
    options = {**in_dtypes(row), "rounding": rounding, "seed": 11}
    name = OF_RULE[rule]
    machines = MACHINES if rounding == "nearest" else FEW_MACHINES
    check(functools.partial(make, name), kinds, options, [Call()] * 2, machines=machines, what=name)


@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_in_every_storage(name, row):
    kinds = [Kind((n,), row[0], row[1], offset=(5 * k) % 64) for k, n in enumerate((0, 1, 17, 33, 301))]
    check(functools.partial(Functional, name), kinds, in_dtypes(row), [Call()] * 3, machines=FEW_MACHINES, what=name)


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
    check(functools.partial(make, name), kinds, options, [Call(options=step)] * 4, machines=FEW_MACHINES, what=name)


def test_one_optimizer_of_many_dtypes():
    kinds = [
        Kind((37,), "float32", "bfloat16"),
        Kind((37,), "bfloat16", "float32"),
        Kind((37,), "float16"),
        Kind((37,), "float64"),
        Kind((37,), "float32", "float16"),
        Kind((37,), "bfloat16"),
    ]
    reference = check(functools.partial(make, "Adam"), kinds, {}, [Call(options={"max_grad_norm": 2.0})] * 3)
    assert [str(tensor.slots["exp_avg"].dtype) for tensor in reference.tensors] == 3 * ["float32"] + [
        "float64",
        "float32",
        "float32",
    ]


# Numbers that are none


def special(dtype):
    """All sorts of numbers, and for narrow types their extremes."""
    dtype = np.dtype(dtype)
    if dtype in narrow.FORMATS:
        precision, _, infinity = narrow.FORMATS[dtype]
        magnitudes = [0, 1, 2, 2 ** (precision - 1) - 1, 2 ** (precision - 1), infinity - 1, infinity, infinity | 0x7F]
        magnitudes += [infinity // 2, infinity // 2 + 1, infinity // 2 + 2]
        magnitudes = np.array(magnitudes, np.uint16)
        return np.concatenate([magnitudes, magnitudes | np.uint16(0x8000)]).view(dtype)
    info = np.finfo(dtype)
    values = [0.0, info.tiny / 8, info.tiny, info.max / 2, INF, NAN, 1.0, 1.5, 65504.0, 65520.0, 6e-8, 1e-5, 70000.0]
    values += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 3.3961776e38]
    return np.array([sign * value for value in values for sign in (1, -1)], dtype)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("row", TABLE, ids="-".join)
@pytest.mark.parametrize("rule", OF_RULE)
def test_special_values_in_every_role(rule, row, rounding):
    name = OF_RULE[rule]
    param, grad = (x.ravel() for x in np.meshgrid(special(row[0]), special(row[1])))
    probe = make(name, param.copy(), **in_dtypes(row))
    values = special(row[2])
    start = {slot: np.resize(np.roll(values, 3 * k), param.size) for k, slot in enumerate(probe.state[0])}
    coefficients, _, l1, l2, decay, *_ = probe.surround(probe.param_groups[0], 1)
    mirror_dtype = np.float16 if row[0] == "bfloat16" else BFLOAT16
    wanted = []
    for skip in (0, 1, 5):  # shifts which values meet a tail
        tensor = whole_step.Tensor(
            rule,
            param[skip:],
            grad[skip:],
            {slot: value[skip:] for slot, value in start.items()},
            mirror=np.zeros(param.size - skip, mirror_dtype),
            coefficients=coefficients,
            l1=l1,
            l2=l2,
            decay=decay,
        )
        wanted.append(whole_step.step([tensor], rounding=rounding, seed=5).tensors[0])
    wide = narrow.widen(wanted[0].param, np.float64)
    assert np.isnan(wide[np.isnan(narrow.widen(grad, np.float64))]).all(), "a NaN gradient must reach the parameter"
    assert not np.isfinite(wide[~np.isfinite(narrow.widen(param, np.float64))]).any()
    assert np.isfinite(wide).any()
    for isa in ISAS:
        onepass.set_isa(isa)
        for skip, want in zip((0, 1, 5), wanted, strict=True):
            now, mirror = param[skip:].copy(), np.zeros(param.size - skip, mirror_dtype)
            opt = make(name, now, mirror=mirror, rounding=rounding, seed=5, **in_dtypes(row))
            for slot, value in start.items():
                opt.state[0][slot][...] = value[skip:]
            opt.step(grad[skip:].copy())
            assert_same_bits(now, want.param, f"{isa}: param")
            assert_same_bits(mirror, want.mirror, f"{isa}: mirror")
            for slot, value in want.slots.items():
                assert_same_bits(opt.state[0][slot], value, f"{isa}: {slot}")


def shown(values, mirror, dtype=np.float32, *, isa):
    """Numbers as a mirror of that dtype shows them."""
    onepass.set_isa(isa)
    param, out = np.array(values, dtype), np.zeros(len(values), mirror)
    onepass.SGD(param, lr=1.0, mirror=out).step(np.zeros(len(values), dtype))
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_stores_round_to_nearest_even(isa, dtype):
    for _ in range(2):
        halves = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2049.0, 2051.0, 65519.0, 65520.0, 1e30, 2.0**-25, 3 * 2.0**-25]
        halves += [2.0**-24, 2.0**-15 + 2.0**-26, NAN, INF]
        want = [1.0, 1 + 2.0**-9, 2048.0, 2052.0, 65504.0, INF, INF, 0.0, 2.0**-23, 2.0**-24, 2.0**-15, NAN, INF]
        for sign in (1, -1):
            values = 3 * [sign * x for x in halves]
            np.testing.assert_array_equal(
                shown(values, np.float16, dtype, isa=isa).astype(np.float64), 3 * [sign * x for x in want]
            )
        halves = [
            1 + 2.0**-8,
            1 + 3 * 2.0**-8,
            1 + 2.0**-8 + 2.0**-23,
            3.3895313892515355e38,
            3.39e38,
            3.4e38,
            NAN,
            INF,
        ]
        want = [1.0, 1 + 2.0**-6, 1 + 2.0**-7, 3.3895313892515355e38, 3.3895313892515355e38, INF, NAN, INF]
        for sign in (1, -1):
            values = 3 * [sign * x for x in halves]
            np.testing.assert_array_equal(
                shown(values, BFLOAT16, dtype, isa=isa).astype(np.float64), 3 * [sign * x for x in want]
            )


@pytest.mark.parametrize("isa", ISAS)
def test_a_mirror_of_float64_is_rounded_once(isa):
    """What is behind a tie in a float64 is lost in float32."""
    values = 9 * [1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40]
    assert shown(values, BFLOAT16, np.float64, isa=isa).astype(float).tolist() == 9 * [1 + 2.0**-7, 1 + 2.0**-7]
    values = 9 * [1 + 2.0**-11 + 2.0**-40, 2.0**-25 + 2.0**-70, 65520 - 2.0**-30]
    assert shown(values, np.float16, np.float64, isa=isa).astype(float).tolist() == 9 * [
        1 + 2.0**-10,
        2.0**-24,
        65504.0,
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [BFLOAT16, FLOAT16], ids=str)
def test_every_narrow_number_is_loaded_exactly(name, isa):
    """Each bit pattern, as a gradient of a float32 parameter of zeros, at a rate of -1 and back into a mirror."""
    onepass.set_isa(isa)
    patterns = np.arange(65536, dtype=np.uint16).view(name)
    for shift in (0, 1):
        grad = np.ascontiguousarray(patterns[shift:])
        param, mirror = np.zeros(grad.size, np.float32), np.zeros(grad.size, name)
        onepass.SGD(param, lr=1.0, maximize=True, mirror=mirror).step(grad)
        want = narrow.widen(grad, np.float32)
        want = np.where(np.abs(want) < np.finfo(np.float32).tiny, np.float32(0), want)
        want = np.float32(0) + want  # a zero of either sign is +0 here
        assert_same_bits(param, want)
        assert_same_bits(mirror, narrow.nearest(want, name))


@pytest.mark.parametrize("isa", ISAS)
def test_float16_that_overflows_is_seen_at_the_next_step(isa):
    """The parameter becomes inf; a gradient computed from it is not finite, and the step is skipped."""
    onepass.set_isa(isa)
    param = np.array([60000.0] * 20 + [1.0] * 20, np.float16)
    opt = onepass.SGD(param, lr=1.0)
    grad = np.array([-60000.0] * 20 + [-1.0] * 20, np.float16)
    opt.step(grad, nonfinite="raise")
    assert np.isposinf(param[:20]).all()
    assert (param[20:] == 2.0).all()
    before = bits(param)
    grad = (param * np.float16(0.5)).astype(np.float16)
    opt.step(grad, nonfinite="skip", max_grad_norm=1.0)
    assert (opt.skipped, opt.grad_norm) == (1, INF)
    assert bits(param) == before
    with pytest.raises(FloatingPointError, match=r"^grads: "):
        opt.step(grad, nonfinite="raise")
    assert bits(param) == before


def test_float16_gradients_are_measured_in_full():
    grad = np.full(100, 60000.0, np.float16)
    opt = onepass.SGD(np.zeros(100, np.float16), lr=2.0**-20)
    opt.step(grad, max_grad_norm=INF)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in grad))
    assert abs(opt.grad_norm - exact) <= 1e-14 * exact
    opt.step(np.full(100, 2.0**-24, np.float16), max_grad_norm=INF)
    assert opt.grad_norm == 10 * 2.0**-24, "a subnormal of float16 is an ordinary number"
    opt = onepass.SGD(np.zeros(100, BFLOAT16))
    opt.step(np.full(100, 1, np.uint16).view(BFLOAT16), max_grad_norm=INF)
    assert opt.grad_norm == 0.0, "a subnormal of bfloat16 is one of float32"


# Dtypes that do not go together


def in_table(text):
    return all(", ".join(row) in text for row in TABLE)


OTHER_DTYPES = (np.int32, np.complex64, np.bool_, np.longdouble, np.uint16, ">f4", ">f2", "float8_e4m3fn")


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("param", DTYPES)
def test_what_is_not_in_the_table_prints_it(param, grad, state):
    p, g = numbers(20, DTYPES[param]), numbers(20, DTYPES[grad], seed=1)
    m, v = np.zeros(20, DTYPES[state]), np.zeros(20, DTYPES[state])
    before = [bits(x) for x in (p, m, v)]
    if (param, grad, state) in TABLE:
        onepass.Adam(p, state_dtype=DTYPES[state]).step(g)
        functional.adam(p, g, m, v, step=1)
        assert before[0] != bits(p)
        return
    with pytest.raises(TypeError, match=r"exp_avgs|grads") as caught:
        functional.adam(p, g, m, v, step=1)
    assert in_table(str(caught.value))
    with pytest.raises(TypeError, match=r"state_dtype|grads") as caught:
        onepass.Adam(p, state_dtype=DTYPES[state]).step(g)
    assert in_table(str(caught.value))
    assert [bits(x) for x in (p, m, v)] == before
    opt = onepass.SGD(p)
    if not any((param, grad) == row[:2] for row in TABLE):
        with pytest.raises(TypeError, match="grads") as caught:
            opt.step(g)
        assert in_table(str(caught.value))
        assert bits(p) == before[0]
        assert opt.step_counts == (0,)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_dtypes_that_are_no_storage(dtype):
    if dtype == "float8_e4m3fn":
        dtype = pytest.importorskip("ml_dtypes").float8_e4m3fn
    other = np.zeros(8, dtype)
    for call in (
        lambda: onepass.Adam(other),
        lambda: onepass.Adam(numbers(8)).step(other),
        lambda: onepass.Adam(numbers(8), state_dtype=dtype),
        lambda: functional.momentum(numbers(8), numbers(8), other, step=1),
        lambda: onepass.Adam(numbers(8), mirror=other),
    ):
        with pytest.raises((TypeError, ValueError), match=r"params|grads|state_dtype|velocities|mirror"):
            call()
    assert not other.any()


def test_states_of_one_parameter_have_one_dtype():
    p, g = numbers(8), numbers(8, seed=1)
    for m, v in ((np.float32, BFLOAT16), (BFLOAT16, np.float32)):
        with pytest.raises(TypeError, match="exp_avg_sqs"):
            functional.adam(p, g, np.zeros(8, m), np.zeros(8, v), step=1)
    assert bits(p) == bits(numbers(8))


def test_state_dtype():
    for name in OPTIMIZERS:
        for dtype, wanted in (("float32", None), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", None)):
            param = numbers((3, 4), DTYPES[dtype])
            opt = make(name, param, state_dtype=wanted, ema_decay=0.9)
            for slot, array in opt.state[0].items():
                want = dtype if slot == "ema" else wanted or "float32"
                assert (array.dtype.name, array.shape) == (want, (3, 4))
    assert onepass.Adam(numbers(3, np.float64)).state[0]["exp_avg"].dtype == np.float64
    onepass.Adam(numbers(3, np.float64), state_dtype=np.float64)
    for given in (BFLOAT16, BFLOAT16.type, "bfloat16", np.float32, "float32", "f4", np.dtype("f4")):
        opt = onepass.Adam(numbers(3), state_dtype=given)
        assert opt.state[0]["exp_avg"].dtype == (np.float32 if "4" in str(given) or "32" in str(given) else BFLOAT16)
    params = [numbers(3), numbers(3, np.float16)]
    with pytest.raises(TypeError, match=r"(?s)state_dtype: bfloat16 .* params\[1\].*float16, float16, float32"):
        onepass.Adam(params, state_dtype="bfloat16")
    assert [bits(x) for x in params] == [bits(numbers(3)), bits(numbers(3, np.float16))]


# Arrays of others


@pytest.mark.parametrize("row", [row for row in TABLE if "16" in "".join(row[:2])], ids="-".join)
@pytest.mark.parametrize("name", FEW)
def test_torch_tensors_of_few_bits(name, row):
    torch = pytest.importorskip("torch")
    kind = Kind((23, 17), row[0], row[1])
    training = begin(functools.partial(make, name), [kind], {**in_dtypes(row), "seed": 2, "rounding": "stochastic"})

    def tensor(array):
        narrow_bits = array.dtype == BFLOAT16
        raw = np.ascontiguousarray(array).view(np.int16) if narrow_bits else np.ascontiguousarray(array)
        result = torch.from_numpy(raw.copy())
        return result.view(torch.bfloat16) if narrow_bits else result

    def array(given, dtype):
        return given.view(torch.int16).numpy().view(dtype) if dtype == "bfloat16" else given.numpy()

    weight, mirror = tensor(training.params[0]), torch.zeros(23, 17, dtype=torch.bfloat16)
    start = weight.clone()
    opt = make(name, [weight], mirror=[mirror], **in_dtypes(row), seed=2, rounding="stochastic")
    for number in range(3):
        grads = Call().gradients([kind], number)
        transposed = tensor(grads[0].T).t()
        training.opt.step(grads)
        opt.step([transposed], zero_grads=True)
        assert not transposed.any()
    assert_same_bits(
        array(weight, DTYPES[row[0]] if row[0] != "bfloat16" else "bfloat16").view(DTYPES[row[0]]), training.params[0]
    )
    shown_by = narrow.nearest(narrow.widen(training.params[0].reshape(-1), np.float32), BFLOAT16).reshape(23, 17)
    assert_same_bits(mirror.view(torch.int16).numpy().view(BFLOAT16), shown_by)
    assert (weight != start).float().mean() > 0.5
    assert torch.isfinite(weight).all()


def test_a_split_master_of_a_torch_tensor():
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(numbers((9, 8))).to(torch.bfloat16)
    plain = weight.to(torch.float32).numpy().copy()
    opt, twin = onepass.AdamW(weight, master="split"), onepass.AdamW(plain)
    for step in range(5):
        grad = numbers((9, 8), BFLOAT16, seed=step)
        opt.step(torch.from_numpy(grad.view(np.int16)).view(torch.bfloat16))
        twin.step(grad)
    assert_same_bits(opt.master, plain)
    assert torch.equal(weight, torch.from_numpy(plain).to(torch.bfloat16))


# bfloat16 that learns


def half_squared_distance(param, rate, steps, **options):
    """Gradient descent to a target so slowly that a step is less than half a unit in the last place."""
    opt = onepass.SGD(param, lr=rate, **options)
    target = np.float32(2.0)
    for _ in range(steps):
        grad = param.astype(np.float32) - target
        opt.step(grad)
    return float(np.mean(param.astype(np.float64))), opt


def test_bfloat16_stalls_and_how_it_does_not():
    start = np.full(4000, 1.0, BFLOAT16)
    steps, rate = 400, 2.0**-10
    want = 2.0 - (1 - rate) ** steps
    stalled, _ = half_squared_distance(start.copy(), rate, steps)
    assert stalled == 1.0, "1 / 1024 is a quarter of half a unit: nothing ever moves"
    stochastic, _ = half_squared_distance(start.copy(), rate, steps, rounding="stochastic", seed=4)
    assert abs(stochastic - want) < 0.01
    split, opt = half_squared_distance(start.copy(), rate, steps, master="split")
    assert abs(split - want) < 2.0**-7
    assert abs(float(opt.master[0]) - want) < 0.01
    exact, _ = half_squared_distance(start.astype(np.float32), rate, steps)
    assert abs(exact - want) < 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrow_training_that_stalls_for_every_rule(name):
    """To nearest most parameters stay where they are, by chance or with a remainder the mean goes where it should."""

    def run(dtype, **options):
        param = np.full(3000, 2.0, dtype)
        opt = make(name, param, **{"lr": 1e-4, "weight_decay": 0.0, "l1": 0.0, "maximize": False, **options})
        for _ in range(40):
            opt.step(np.full(3000, 0.5, np.float32))
        return 2.0 - float(np.mean((opt.master if options.get("master") else param).astype(np.float64)))

    exact = run(np.float32)
    assert 0.0005 < exact < 0.2
    assert run(BFLOAT16) in (0.0, *((2.0**-7 * k for k in range(1, 26)) if exact > 2.0**-7 else ()))
    assert abs(run(BFLOAT16, rounding="stochastic") - exact) < 0.1 * exact + 6e-4
    assert run(BFLOAT16, master="split") == exact


def pair(kinds, name, **options):
    """A split training, and the same in float32."""
    split = begin(functools.partial(make, name), kinds, {"master": "split", **options})
    params = [param.astype(np.float32, order="K") for param in split.params]
    mirrors = [np.zeros_like(param, BFLOAT16) for param in params]
    return split, make(name, params, mirror=mirrors, **options), params, mirrors


def assert_split(split, plain, params):
    master = split.opt.master
    for k, param in enumerate(params):
        assert_same_bits(master[k], param, f"master {k}")
        order = whole_step.MemoryOrder(param)
        high, low = narrow.split(order.flat(param))
        assert_same_bits(order.flat(split.params[k]), high, f"parameter {k}")
        assert_same_bits(order.flat(split.opt.state[k]["remainder"]), low, f"remainder {k}")
        for slot, value in plain.state[k].items():
            assert_same_bits(split.opt.state[k][slot], value, f"{slot} {k}")


@pytest.mark.parametrize("grad", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_split_master_trains_as_float32(name, grad):
    """Bit for bit, at the master level, with all that rides along, whatever `rounding` says."""
    kinds = [Kind((n,), "bfloat16", grad, offset=n % 7) for n in (0, 1, 15, 37, 1025)]
    kinds.append(Kind((19, 60), "bfloat16", grad, axes=(1, 0), layout="reversed"))
    for (isa, threads), options in zip(
        FEW_MACHINES,
        ({}, {"max_unit_norm": (2.0, 0), "rounding": "stochastic"}, {"gradient_noise": (0.1, 0.1)}),
        strict=False,
    ):
        onepass.set_isa(isa)
        onepass.set_num_threads(threads)
        _cpu.set_serial_bytes(0)
        split, plain, params, mirrors = pair(kinds, name, ema_decay=0.9, accumulate=2, **options)
        start = [param.copy() for param in params]
        for number in range(8):
            grads = Call().gradients(kinds, number)
            split.opt.step(grads, max_grad_norm=5.0)
            plain.step(grads, max_grad_norm=5.0)
            assert split.opt.grad_norm == plain.grad_norm
        assert_split(split, plain, params)
        for k, param in enumerate(params):
            assert param.size == 0 or np.mean(param != start[k]) > 0.95
            assert np.isfinite(param).all()
            assert (np.abs(split.params[k].astype(np.float32) - param) <= np.abs(param) * 2.0**-8).all()
            differ = np.count_nonzero(split.params[k] != mirrors[k])
            assert differ <= 0.01 * param.size, "only ties are not rounded to even"


@pytest.mark.parametrize("name", FEW)
def test_split_masters_by_the_reference(name):
    kinds = [Kind((n,), "bfloat16", mirror="float16", offset=n % 7) for n in (*range(34), 300)]
    kinds.append(Kind((19, 60), "bfloat16", "float32", axes=(1, 0), layout="reversed", mirror="bfloat16"))
    options = {"master": "split", "ema_decay": 0.9, "rounding": "stochastic", "max_unit_norm": (4.0, 0)}
    check(functools.partial(make, name), kinds, options, [Call()] * 3, what=name)
    check(functools.partial(Functional, name), kinds, options, [Call()] * 3, machines=FEW_MACHINES, what=name)


@pytest.mark.parametrize("isa", ISAS)
def test_split_masters_of_special_values(isa):
    """Ties, borders of binades, infinities, NaN: split and joined as the reference does, in every lane and tail."""
    onepass.set_isa(isa)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    high = np.array([0x3F80, 0x3F7F, 0x3F81, 0x0080, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x4000], np.uint32)
    high = np.concatenate([high, high | 0x8000])
    masters = (high[:, None] << 16 | low).ravel().view(np.float32)
    grad = np.zeros(masters.size, np.float32)
    for skip in (0, 1, 3):
        param = np.zeros(masters.size - skip, BFLOAT16)
        opt = onepass.SGD(param, lr=0.5, master="split", ema_decay=0.5, mirror=(mirror := np.zeros_like(param)))
        param[...], opt.state[0]["remainder"][...] = narrow.split(masters[skip:])
        opt.step(grad[skip:])
        want = masters[skip:]
        assert_same_bits(opt.master, want)
        assert_same_bits(opt.ema, want)
        want_high, want_low = narrow.split(want)
        assert_same_bits(param, want_high)
        assert_same_bits(opt.state[0]["remainder"], want_low)
        assert_same_bits(mirror, narrow.nearest(want, BFLOAT16))


@pytest.mark.parametrize("isa", ISAS)
def test_writing_into_a_split_parameter_by_hand(isa):
    """The master moves along; where a zero or an infinity was written it is that number."""
    onepass.set_isa(isa)
    count = 77
    param = numbers(count, BFLOAT16)
    opt = onepass.SGD(param, lr=2.0**-12, master="split")
    for step in range(3):
        opt.step(numbers(count, seed=step))
    remainder = opt.state[0]["remainder"]
    assert np.mean(remainder != 0) > 0.9
    before = opt.master
    param *= np.asarray(2, BFLOAT16)
    unit = 2.0 ** (np.floor(np.log2(np.abs(param.astype(np.float64)))) - 7)
    assert (np.abs(opt.master - param.astype(np.float64)) <= unit / 2).all()
    param[...] = np.resize(np.array([0.0, -0.0, INF, -INF, 3.0], BFLOAT16), count)
    remainder[...] = np.resize(np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF, 3, 0x1234], np.uint16), count)
    want = narrow.joined(param, remainder)
    assert (want[param == 0] == 0).all()
    assert_same_bits(opt.master, want)
    opt.step(np.zeros(count, np.float32))
    assert_same_bits(opt.master, want)
    assert_same_bits(param[param == 0].astype(np.float32), np.resize(np.float32([0.0, -0.0]), (param == 0).sum()))
    opt.step(np.ones(count, np.float32))
    assert_same_bits(opt.master, want - np.float32(2.0**-12))
    assert not np.array_equal(before, opt.master)


def test_the_master_is_an_array_of_its_own():
    params = {"a": numbers(7, BFLOAT16), "b": numbers((2, 3), BFLOAT16)}
    opt = onepass.Adam(params, master="split")
    assert list(opt.master) == ["a", "b"]
    for key, array in opt.master.items():
        np.testing.assert_array_equal(array, params[key].astype(np.float32))
        assert array.dtype == np.float32
        array[...] = 0
    for key, array in opt.master.items():
        np.testing.assert_array_equal(array, params[key].astype(np.float32))
    with pytest.raises(TypeError, match=r"master: .*params\[1\] \('b'\)"):
        onepass.Adam({"a": params["a"], "b": numbers(3)}, master="split")
    with pytest.raises(TypeError, match="master"):
        onepass.Adam(numbers(3, np.float16), master="split")
    assert opt.state[0]["remainder"].dtype == np.uint16
    with pytest.raises(ValueError, match=r"remainders"):
        functional.sgd(params["a"], numbers(7), step=1, remainders=np.zeros(8, np.uint16))


@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_two_bytes_beside_a_store_are_not_written(row):
    """Guard bytes between tensors that lie side by side in one buffer, each alone."""
    for isa, n in itertools.product(ISAS, (1, 7, 8, 9, 15, 16, 17, 31, 33)):
        onepass.set_isa(isa)
        parts = [guarded((n,), DTYPES[row[0]], offset=offset, seed=offset) for offset in (0, 1, 2, 63)]
        emas = [guarded((n,), DTYPES[row[0]], offset=5)[0] for _ in parts]
        start = [part.copy() for part, _ in parts]
        functional.sgd(
            [part for part, _ in parts],
            [guarded((n,), DTYPES[row[1]], offset=3)[0] for _ in parts],
            step=1,
            lr=0.5,
            emas=emas,
            ema_decay=0.5,
        )
        for (part, untouched), ema, before in zip(parts, emas, start, strict=True):
            assert untouched()
            assert (part != before).all()
            assert_same_bits(ema, part)


# A real training


@functools.cache
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = (data.data / 16.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order[:1300]], data.target[order[:1300]], x[order[1300:]], data.target[order[1300:]]


@functools.cache
def accuracy(storage, seed):
    """On digits that were not trained with."""
    x, y, test_x, test_y = digits()
    rng = np.random.default_rng(seed)
    net = MLP([64, 48, 10], rng)
    options = {"float32": {}, "nearest": {}, "stochastic": {"rounding": "stochastic", "seed": seed}}
    options["split"] = {"master": "split"}
    stored = net.params if storage == "float32" else {name: p.astype(BFLOAT16) for name, p in net.params.items()}
    opt = onepass.Adam(stored, lr=1e-3, **options[storage])
    for _ in range(30):
        order = rng.permutation(len(x))
        for begin_ in range(0, len(x), 65):
            batch = order[begin_ : begin_ + 65]
            if storage != "float32":  # the network computes in float32 with what the narrow parameters are
                net.params = {name: p.astype(np.float32) for name, p in stored.items()}
            opt.step(net.backward(x[batch], y[batch]))
    net.params = {name: np.asarray(p, np.float32) for name, p in (opt.master or stored).items()}
    loss, correct = net.evaluate(test_x, test_y)
    assert np.isfinite(loss)
    return correct


@pytest.mark.parametrize("storage", ["stochastic", "split"])
def test_digits_are_learned_as_well_as_in_float32(storage):
    seeds = (1, 2, 3)
    exact = np.mean([accuracy("float32", seed) for seed in seeds])
    assert exact > 0.95
    assert np.mean([accuracy(storage, seed) for seed in seeds]) > exact - 0.01


def test_the_reference_of_narrow_storage_is_the_expression():
    """With wide storage nothing is rounded, and the whole step is the rule's own expression."""
    for name in FEW:
        opt = make(name, numbers(50))
        around = opt.surround(opt.param_groups[0], 1)
        slots = {slot: array.copy() for slot, array in opt.state[0].items()}
        rule = opt.rule(opt.param_groups[0])
        want, _ = expressions.update(rule, numbers(50), numbers(50, seed=1), slots, *around[:5])
        opt.step(numbers(50, seed=1))
        assert_same_bits(arrays_of(opt.param_groups[0]["params"])[0], want)

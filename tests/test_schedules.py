"""Learning rates and hyper-parameters: schedules, groups, and changes between steps."""

import copy
import dataclasses
import functools
import itertools
import math
import pickle

import numpy as np
import pytest

import onepass
from onepass import schedules


def snapshot(opt):
    """All that a failed call must leave as it was: parameters, states, step counts, hyper-parameters."""
    params = [np.array(p) for group in opt.param_groups for p in group["params"]]
    states = [{name: array.copy() for name, array in state.items()} for state in opt.state]
    hyper = [{name: value for name, value in group.items() if name != "params"} for group in opt.param_groups]
    return params, states, opt.step_counts, hyper


def assert_unchanged(opt, before):
    params, states, counts, hyper = snapshot(opt)
    for now, then in zip(params, before[0], strict=True):
        np.testing.assert_array_equal(now, then)
    for now, then in zip(states, before[1], strict=True):
        assert now.keys() == then.keys()
        for name in now:
            np.testing.assert_array_equal(now[name], then[name])
    assert counts == before[2]
    assert hyper == before[3]


def gradients(params, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=p.shape).astype(p.dtype) for p in params]


def two_params(dtype=np.float64):
    return [np.linspace(-1.0, 1.0, 20).astype(dtype), np.linspace(2.0, 3.0, 33).reshape(3, 11).astype(dtype)]


# Values

VALUES = [
    (schedules.inverse_time(0.1, decay=1.0), {1: 0.05, 2: 0.1 / 3, 4: 0.02, 999: 1e-4}),
    (schedules.inverse_time(0.3, decay=0), {1: 0.3, 10**6: 0.3}),
    (schedules.exponential(0.8, rate=0.5), {1: 0.8, 2: 0.4, 3: 0.2, 11: 0.8 / 1024}),
    (schedules.exponential(0.8, rate=0.25, steps=2), {1: 0.8, 2: 0.4, 3: 0.2, 5: 0.05}),
    (schedules.exponential(0.8, rate=1.0), {1: 0.8, 77: 0.8}),
    (schedules.step(0.4, every=2, factor=0.5), {1: 0.4, 2: 0.4, 3: 0.2, 4: 0.2, 5: 0.1}),
    (schedules.step(0.4, every=3), {1: 0.4, 3: 0.4, 4: 0.04, 6: 0.04, 7: 0.004}),
    (schedules.step(0.4, every=1, factor=0.5), {1: 0.4, 2: 0.2, 3: 0.1}),
    (schedules.cosine(0.1, steps=10), {1: 0.1, 6: 0.05, 11: 0.0, 12: 0.0, 10**9: 0.0}),
    (schedules.cosine(0.1, steps=4), {2: 0.05 * (1 + math.sqrt(0.5)), 4: 0.05 * (1 - math.sqrt(0.5))}),
    (schedules.cosine(1.0, steps=10, final=0.2), {1: 1.0, 6: 0.6, 11: 0.2, 50: 0.2}),
    (schedules.cosine(1.0, steps=1, final=1), {1: 1.0, 2: 1.0}),
    (schedules.linear_warmup(0.4, steps=4), {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.4, 10**9: 0.4}),
    (schedules.linear_warmup(0.4, steps=1), {1: 0.4, 2: 0.4}),
    # composed: the factors multiply, and every part sees the same t
    (schedules.linear_warmup(schedules.step(0.1, every=100, factor=0.5), steps=10), {1: 0.01, 10: 0.1, 101: 0.05}),
    (schedules.linear_warmup(schedules.cosine(1.0, steps=10), steps=12), {6: 0.25, 11: 0.0, 1: 1 / 12}),
    (schedules.step(schedules.exponential(1.0, rate=0.5), every=2, factor=0.1), {2: 0.5, 3: 0.025, 4: 0.0125}),
    (schedules.inverse_time(lambda t: 10.0 * t, decay=1.0), {1: 5.0, 4: 8.0}),
    (schedules.cosine(schedules.linear_warmup(schedules.inverse_time(1.0, 1.0), 2), 4), {1: 0.25, 3: 0.125}),
]


@pytest.mark.parametrize(
    ("schedule", "expected"), VALUES, ids=lambda value: repr(value).split(" at 0x")[0] if callable(value) else ""
)
def test_values(schedule, expected):
    for t, lr in expected.items():
        value = schedule(t)
        assert type(value) is float
        assert value == pytest.approx(lr, rel=1e-14, abs=1e-17)


def test_shapes_of_the_descent():
    ts = range(1, 200)
    for schedule in (
        schedules.inverse_time(1.0, decay=0.1),
        schedules.exponential(1.0, rate=0.9, steps=7),
        schedules.step(1.0, every=7),
        schedules.cosine(1.0, steps=150),
    ):
        rates = [schedule(t) for t in ts]
        assert all(a >= b >= 0.0 for a, b in itertools.pairwise(rates))
        assert rates[0] > 0.9
        assert rates[-1] < 0.2
    rising = [schedules.linear_warmup(1.0, steps=150)(t) for t in ts]
    assert rising == sorted(rising)
    assert len(set(rising)) == 150


def test_order_of_composition_does_not_matter():
    a = schedules.linear_warmup(schedules.cosine(0.3, steps=20, final=0.1), steps=5)
    b = schedules.cosine(schedules.linear_warmup(0.3, steps=5), steps=20, final=0.1)
    assert [a(t) for t in range(1, 30)] == pytest.approx([b(t) for t in range(1, 30)], rel=1e-15)


def test_robbins_monro_conditions():
    """The sum of the rates diverges like log t and the sum of their squares converges."""
    schedule = schedules.inverse_time(1.0, decay=1.0)
    rates = np.array([schedule(t) for t in range(1, 20_001)])
    assert rates[10_000:].sum() == pytest.approx(math.log(2.0), rel=1e-3)
    assert (rates[10_000:] ** 2).sum() < 1e-4


@pytest.mark.parametrize("scalar", [np.float32, np.float64, np.float16])
def test_a_numpy_rate_is_computed_with_in_float64(scalar):
    """Coefficients are computed in float64 and rounded once."""
    rate = scalar(0.1)
    value = schedules.inverse_time(rate, decay=0.3)(3)
    assert isinstance(value, float), type(value)
    assert value == float(rate) * (1.0 / (1.0 + 0.3 * 3))


# Schedules as values

ALL = [
    schedules.inverse_time(0.1, decay=0.5),
    schedules.exponential(0.1, rate=0.5, steps=3),
    schedules.step(0.1, every=3, factor=0.5),
    schedules.cosine(0.1, steps=7, final=0.25),
    schedules.linear_warmup(0.1, steps=5),
    schedules.linear_warmup(schedules.cosine(1e-3, steps=100), steps=5),
]
by_repr = pytest.mark.parametrize("schedule", ALL, ids=repr)


@by_repr
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(schedule, protocol):
    again = pickle.loads(pickle.dumps(schedule, protocol))
    assert again == schedule
    assert [again(t) for t in range(1, 20)] == [schedule(t) for t in range(1, 20)]


@by_repr
def test_copies_and_hashes_are_equal(schedule):
    assert copy.deepcopy(schedule) == schedule
    assert hash(copy.copy(schedule)) == hash(schedule)
    assert {schedule: 1}[copy.deepcopy(schedule)] == 1


def test_equality_is_by_kind_and_value():
    assert schedules.cosine(0.1, steps=7) == schedules.cosine(0.1, steps=7, final=0)
    assert schedules.cosine(0.1, steps=7) != schedules.cosine(0.1, steps=8)
    assert schedules.cosine(0.1, steps=7) != schedules.cosine(0.2, steps=7)
    assert schedules.cosine(0.1, steps=7) != schedules.linear_warmup(0.1, steps=7)
    assert schedules.linear_warmup(0.1, steps=7) != 0.1
    for i, a in enumerate(ALL):
        for j, b in enumerate(ALL):
            assert (a == b) is (i == j)


@by_repr
def test_repr_reads_back(schedule):
    assert eval(repr(schedule), vars(schedules).copy()) == schedule


@by_repr
def test_immutable(schedule):
    for field in dataclasses.fields(schedule):
        with pytest.raises(AttributeError):
            setattr(schedule, field.name, 0.3)
    with pytest.raises(AttributeError):
        schedule.momentum = 0.3


def test_dataclass_replace():
    assert dataclasses.replace(schedules.cosine(0.1, steps=7), lr=0.2) == schedules.cosine(0.2, steps=7)


def test_the_base_is_no_schedule():
    with pytest.raises(TypeError, match="base"):
        schedules.Schedule(0.1)(1)


def test_public_names():
    assert sorted(schedules.__all__) == ["Schedule", "cosine", "exponential", "inverse_time", "linear_warmup", "step"]
    for name in schedules.__all__:
        assert issubclass(getattr(schedules, name), schedules.Schedule)


# Validation

WITH_LR = {
    "inverse_time": lambda lr: schedules.inverse_time(lr, decay=1.0),
    "exponential": lambda lr: schedules.exponential(lr, rate=0.5),
    "step": lambda lr: schedules.step(lr, every=3),
    "cosine": lambda lr: schedules.cosine(lr, steps=3),
    "linear_warmup": lambda lr: schedules.linear_warmup(lr, steps=3),
}
NOT_A_RATE = [
    (-0.1, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (None, TypeError),
    ("0.1", TypeError),
    (True, TypeError),
    (np.True_, TypeError),
    (1j, TypeError),
    ([0.1], TypeError),
    (np.array([0.1]), TypeError),
]


def label(value):
    """What a value is called in the name of a test."""
    if isinstance(value, type):
        return value.__name__
    return value if isinstance(value, str) else repr(value)[:20]


not_a_rate = pytest.mark.parametrize(("lr", "error"), NOT_A_RATE, ids=label)


@not_a_rate
@pytest.mark.parametrize("name", WITH_LR)
def test_schedule_of_what_is_no_rate(name, lr, error):
    with pytest.raises(error, match=r"^lr: expected a finite number >= 0 or a callable"):
        WITH_LR[name](lr)


BAD_ARGUMENTS = [
    (lambda v: schedules.inverse_time(0.1, decay=v), "decay", [-1, math.nan, math.inf], ["1", None, True, [1]]),
    (lambda v: schedules.exponential(0.1, rate=v), "rate", [0, -1, 1.0001, math.nan, math.inf], ["1", None, True]),
    (lambda v: schedules.exponential(0.1, rate=0.5, steps=v), "steps", [0, -3], [1.0, "1", None, True]),
    (lambda v: schedules.step(0.1, every=v), "every", [0, -3], [1.0, "1", None, True]),
    (lambda v: schedules.step(0.1, every=3, factor=v), "factor", [0, -1, 2, math.nan], ["1", None, True]),
    (lambda v: schedules.cosine(0.1, steps=v), "steps", [0, -3], [1.0, "1", None, True, math.inf]),
    (lambda v: schedules.cosine(0.1, steps=3, final=v), "final", [-0.1, 1.1, math.nan], ["1", None, False]),
    (lambda v: schedules.linear_warmup(0.1, steps=v), "steps", [0, -3], [1.0, "1", None, True]),
]


@pytest.mark.parametrize(
    ("make", "name", "value", "error"),
    [
        (make, name, value, error)
        for make, name, wrong_values, wrong_types in BAD_ARGUMENTS
        for error, values in ((ValueError, wrong_values), (TypeError, wrong_types))
        for value in values
    ],
    ids=label,
)
def test_schedule_argument_out_of_range(make, name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected ") as raised:
        make(value)
    assert repr(value) in str(raised.value)


# Schedules in an optimizer

OPTIMIZERS = {
    "SGD": onepass.SGD,
    "Momentum": onepass.Momentum,
    "NAG": onepass.NAG,
    "AdaGrad": onepass.AdaGrad,
    "AdaSqrt": onepass.AdaSqrt,
    "RMSprop": functools.partial(onepass.RMSprop, momentum=0.9, centered=True),
    "Adam": onepass.Adam,
    "AdamW": onepass.AdamW,
    "AMSGrad": onepass.AMSGrad,
    "Nadam": onepass.Nadam,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Recorder:
    """A schedule that remembers what it was asked."""

    def __init__(self, lr=0.1):
        self.lr, self.asked = lr, []

    def __call__(self, t):
        self.asked.append(t)
        return self.lr / t


@every_optimizer
def test_schedule_is_called_with_each_parameters_own_count(name):
    lr = Recorder()
    params = two_params()
    opt = OPTIMIZERS[name](params, lr=lr)
    g, h = gradients(params)
    opt.step([g, None])
    opt.step([g, None])
    assert lr.asked == [1, 2]
    opt.step([g, h])
    assert sorted(lr.asked) == [1, 1, 2, 3]
    opt.step([None, h])
    opt.step([None, h])
    assert lr.asked[-2:] == [2, 3]
    opt.step([g, h])
    assert lr.asked[-1:] == [4], "one call for parameters that share a count"
    opt.step([None, None])
    assert len(lr.asked) == 7
    assert opt.step_counts == (4, 4)
    assert all(type(t) is int for t in lr.asked)


@every_optimizer
def test_a_parameter_that_joins_late_sees_its_own_rates(name):
    """Bit for bit as if it had been alone in an optimizer of its own."""
    lr = schedules.linear_warmup(schedules.exponential(0.1, rate=0.7), steps=3)
    late, early = two_params()
    alone = [late.copy()]
    together, other = OPTIMIZERS[name]([early, late], lr=lr), OPTIMIZERS[name](alone, lr=lr)
    before = late.copy()
    for seed in range(6):
        g, h = gradients([early, late], seed)
        if seed < 3:
            together.step([g, None])
            np.testing.assert_array_equal(late, before)
        else:
            together.step([g, h])
            other.step([h])
    np.testing.assert_array_equal(late, alone[0])
    assert np.abs(late - before).min() > 0.0
    assert together.step_counts == (6, 3)


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_schedule_equals_the_rate_assigned_at_each_step(name, dtype):
    lr = schedules.cosine(0.1, steps=9)
    scheduled, assigned = two_params(dtype), two_params(dtype)
    a, b = OPTIMIZERS[name](scheduled, lr=lr), OPTIMIZERS[name](assigned)
    for t in range(1, 8):
        b.lr = lr(t)
        a.step(gradients(scheduled, t))
        b.step(gradients(assigned, t))
    for p, q, start in zip(scheduled, assigned, two_params(dtype), strict=True):
        np.testing.assert_array_equal(p, q)
        assert (p != start).all()


def test_rate_of_zero_leaves_the_parameters_but_gathers_moments():
    p = np.ones(9)
    opt = onepass.Adam(p, lr=lambda t: 0.0 if t < 3 else 0.1)
    opt.step(np.full(9, 2.0))
    opt.step(np.full(9, 2.0))
    np.testing.assert_array_equal(p, np.ones(9))
    assert (opt.state[0]["exp_avg"] > 0.1).all()
    opt.step(np.full(9, 2.0))
    np.testing.assert_allclose(p, 0.9, rtol=1e-7)


class ScheduleError(Exception):
    pass


def failing_at(t_fail, lr=0.1):
    def schedule(t):
        if t == t_fail:
            raise ScheduleError(f"no rate for step {t}")
        return lr

    return schedule


def stepped(name, lr):
    """An optimizer of two groups, of which the second has the schedule, after two steps."""
    params = two_params()
    opt = OPTIMIZERS[name]([{"params": params[0]}, {"params": params[1], "lr": lr}], lr=0.05)
    for seed in range(2):
        opt.step(gradients(params, seed))
    assert opt.step_counts == (2, 2)
    return opt, params


@every_optimizer
def test_schedule_that_raises_leaves_everything(name):
    opt, params = stepped(name, failing_at(3))
    before = snapshot(opt)
    with pytest.raises(ScheduleError, match="no rate for step 3"):
        opt.step(gradients(params, 2))
    assert_unchanged(opt, before)
    opt.param_groups[1]["lr"] = 0.1
    opt.step(gradients(params, 2))
    assert opt.step_counts == (3, 3)
    reference, others = stepped(name, 0.1)
    reference.step(gradients(others, 2))
    for p, q in zip(params, others, strict=True):
        np.testing.assert_array_equal(p, q)


NO_RATES = [
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-1e-9, ValueError),
    (None, TypeError),
    ("0.1", TypeError),
    (True, TypeError),
    (0.1j, TypeError),
    ((0.1,), TypeError),
    (np.array([0.1, 0.2]), TypeError),
]


@pytest.mark.parametrize(("value", "error"), NO_RATES, ids=label)
@every_optimizer
def test_schedule_that_returns_no_rate(name, value, error):
    opt, params = stepped(name, lambda t: 0.1 if t < 3 else value)
    before = snapshot(opt)
    with pytest.raises(error, match=r"^lr\(3\): expected a finite number >= 0, got "):
        opt.step(gradients(params, 2))
    assert_unchanged(opt, before)


def test_integer_that_float64_cannot_hold():
    huge = 10**400
    for make in (lambda: onepass.SGD(np.zeros(3), lr=huge), lambda: schedules.cosine(huge, steps=3)):
        with pytest.raises(ValueError, match=r"^lr: expected"):
            make()
    opt, params = stepped("Adam", lambda t: 0.1 if t < 3 else huge)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"^lr\(3\): expected"):
        opt.step(gradients(params, 2))
    assert_unchanged(opt, before)


def test_rate_that_float32_cannot_hold():
    params = two_params(np.float32)
    opt = onepass.SGD(params, lr=lambda t: 1e300)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="not finite in float32"):
        opt.step(gradients(params))
    assert_unchanged(opt, before)


@every_optimizer
def test_schedule_that_steps_its_own_optimizer(name):
    params = two_params()
    made = []

    def reentrant(t):
        made[0].step(gradients(params))
        return 0.1

    made.append(OPTIMIZERS[name](params, lr=reentrant))
    before = snapshot(made[0])
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        made[0].step(gradients(params))
    assert_unchanged(made[0], before)
    made[0].lr = 0.1
    made[0].step(gradients(params))
    assert all((p != then).any() for p, then in zip(params, before[0], strict=True))


@pytest.mark.parametrize("lr", [np.float32(0.25), np.float64(0.25), np.float16(0.25), 1, np.int64(1)])
def test_other_real_numbers_are_rates(lr):
    for given in (lr, lambda t: lr):
        p = np.zeros(5)
        onepass.SGD(p, lr=given).step(np.ones(5))
        np.testing.assert_array_equal(p, np.full(5, -float(lr)))


# Groups and changes between steps


def test_each_group_has_its_own_rate():
    a, b, c = np.zeros(9), np.zeros((3, 5)), np.zeros(4)
    opt = onepass.SGD(
        [
            {"params": a, "lr": 0.5},
            {"params": [b], "lr": schedules.step(0.25, every=1, factor=0.5)},
            {"params": {"c": c}},
        ],
        lr=0.125,
    )
    ones = [np.ones_like(a), [np.ones_like(b)], {"c": np.ones_like(c)}]
    opt.step(ones)
    np.testing.assert_array_equal(a, np.full(9, -0.5))
    np.testing.assert_array_equal(b, np.full((3, 5), -0.25))
    np.testing.assert_array_equal(c, np.full(4, -0.125))
    opt.step(ones)
    np.testing.assert_array_equal(b, np.full((3, 5), -0.375))
    assert opt.lr == [0.5, schedules.step(0.25, every=1, factor=0.5), 0.125]
    opt.lr = 1.0
    assert opt.lr == 1.0
    assert [group["lr"] for group in opt.param_groups] == [1.0, 1.0, 1.0]
    opt.step(ones)
    np.testing.assert_array_equal(c, np.full(4, -1.25))


@every_optimizer
def test_groups_step_as_optimizers_of_their_own(name):
    settings = [{"lr": 0.1, "weight_decay": 0.1}, {"lr": schedules.cosine(0.05, steps=9), "l1": 0.02, "maximize": True}]
    grouped, alone = two_params(), two_params()
    opt = OPTIMIZERS[name]([{"params": p, **own} for p, own in zip(grouped, settings, strict=True)])
    others = [OPTIMIZERS[name](p, **own) for p, own in zip(alone, settings, strict=True)]
    for seed in range(4):
        gs = gradients(grouped, seed)
        opt.step(gs)
        for other, g in zip(others, gs, strict=True):
            other.step(g)
    for p, q, start in zip(grouped, alone, two_params(), strict=True):
        np.testing.assert_array_equal(p, q)
        assert (p != start).all()


def test_lr_property_of_one_group():
    opt = onepass.SGD(np.zeros(3), lr=0.5)
    assert opt.lr == 0.5
    schedule = schedules.cosine(0.1, steps=3)
    opt.lr = schedule
    assert opt.lr is schedule
    assert opt.param_groups[0]["lr"] is schedule
    opt.param_groups[0]["lr"] = 0.25
    assert opt.lr == 0.25


@not_a_rate
def test_lr_property_refuses_what_is_no_rate(lr, error):
    opt = onepass.SGD([{"params": np.zeros(3), "lr": 0.5}, {"params": np.zeros(3), "lr": 0.25}])
    with pytest.raises(error, match=r"^lr: expected a finite number >= 0 or a callable"):
        opt.lr = [0.125, lr]
    assert opt.lr == [0.5, 0.25]


def test_lr_property_takes_a_list_with_one_for_each_group():
    opt = onepass.SGD([{"params": np.zeros(3), "lr": 0.5}, {"params": np.zeros(3), "lr": 0.25}])
    opt.lr = opt.lr
    assert opt.lr == [0.5, 0.25]
    opt.lr = [0.125, 1]
    assert [group["lr"] for group in opt.param_groups] == [0.125, 1.0]
    with pytest.raises(ValueError, match=r"^lr: 1 given for 2 groups"):
        opt.lr = [0.1]
    assert opt.lr == [0.125, 1.0]


@not_a_rate
@every_optimizer
def test_constructor_refuses_what_is_no_rate(name, lr, error):
    with pytest.raises(error, match=r"^lr: expected a finite number >= 0 or a callable"):
        OPTIMIZERS[name](np.zeros(3), lr=lr)
    with pytest.raises(error, match=r"^params\[1\]\['lr'\]: expected a finite number >= 0 or a callable"):
        OPTIMIZERS[name]([{"params": np.zeros(3)}, {"params": np.zeros(3), "lr": lr}])


RMS_PLAIN = functools.partial(onepass.RMSprop, momentum=0.0)
RMS_MOMENTUM = functools.partial(onepass.RMSprop, momentum=0.9)
AMS = functools.partial(onepass.Adam, amsgrad=True, max_of_corrected=True)
INSIDE = functools.partial(onepass.Adam, eps=0.0, eps_root=1e-8)

BAD_ASSIGNMENTS = [
    (onepass.SGD, {"momentum": 0.9}, KeyError, "'momentum' is not a hyper-parameter; there are lr, weight_decay"),
    (onepass.Adam, {"learning_rate": 0.1}, KeyError, "'learning_rate' is not a hyper-parameter"),
    (onepass.Adam, {"params": []}, ValueError, "params: the parameters of a group are fixed"),
    (onepass.Adam, {"lr": -1.0}, ValueError, "lr: expected"),
    (onepass.Adam, {"lr": "1"}, TypeError, "lr: expected"),
    (onepass.Adam, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number in \[0, 1\)"),
    (onepass.Adam, {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]: expected a number in \[0, 1\)"),
    (onepass.Adam, {"betas": (0.9, math.nan)}, ValueError, r"betas\[1\]"),
    (onepass.Adam, {"betas": (0.9, None)}, TypeError, r"betas\[1\]"),
    (onepass.Adam, {"betas": (0.9,)}, TypeError, r"betas: expected a pair"),
    (onepass.Adam, {"betas": 0.9}, TypeError, r"betas: expected a pair"),
    (onepass.Adam, {"eps": -1e-8}, ValueError, "eps: expected a finite number >= 0"),
    (onepass.Adam, {"eps": math.nan}, ValueError, "eps: expected"),
    (onepass.Adam, {"eps": 0.0}, ValueError, "eps: eps and eps_root are both 0"),
    (onepass.AdaSqrt, {"eps": 0.0}, ValueError, "^eps: "),
    (INSIDE, {"eps_root": 0.0}, ValueError, "both 0"),
    (onepass.Adam, {"eps_root": math.inf}, ValueError, "eps_root: expected"),
    (onepass.Adam, {"eps": 1e-310}, ValueError, "eps: 1e-310 is zero in float64"),
    (onepass.Adam, {"weight_decay": -1}, ValueError, "weight_decay: expected"),
    (onepass.Adam, {"l1": math.inf}, ValueError, "l1: expected"),
    (onepass.Adam, {"decoupled_weight_decay": 1}, TypeError, "decoupled_weight_decay: expected True or False"),
    (onepass.Adam, {"maximize": None}, TypeError, "maximize: expected True or False"),
    (onepass.Adam, {"bias_correction": "no"}, TypeError, "bias_correction: expected True or False"),
    (onepass.Adam, {"max_of_corrected": True}, ValueError, "max_of_corrected: needs amsgrad=True"),
    (onepass.Adam, {"amsgrad": True}, ValueError, "amsgrad: decides which states exist"),
    (AMS, {"amsgrad": False, "max_of_corrected": False}, ValueError, "amsgrad.* decides? which states exist"),
    (onepass.RMSprop, {"centered": True}, ValueError, "centered: decides which states exist"),
    (RMS_PLAIN, {"momentum": 0.5}, ValueError, "momentum: decides which states exist"),
    (RMS_MOMENTUM, {"momentum": 0.0}, ValueError, "momentum: decides which states exist"),
    (RMS_MOMENTUM, {"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\)"),
    (onepass.RMSprop, {"rho": 1.0}, ValueError, r"rho: expected a number in \[0, 1\)"),
    (onepass.Momentum, {"dampening": 1.5}, ValueError, r"dampening: expected a number in \[0, 1\]"),
    (onepass.Momentum, {"momentum": True}, TypeError, "momentum: expected"),
    (onepass.AdaGrad, {"initial_accumulator": 0.5}, ValueError, "initial_accumulator: is only read when"),
    (onepass.AdaGrad, {"lr_decay": -0.5}, ValueError, "lr_decay: expected a finite number >= 0"),
    (onepass.Nadam, {"momentum_decay": math.nan}, ValueError, "momentum_decay: expected a number >= 0 or inf"),
    (onepass.Nadam, {"momentum_decay": -1}, ValueError, "momentum_decay: expected a number >= 0 or inf"),
]
bad_assignments = pytest.mark.parametrize(
    ("make", "changes", "error", "message"), BAD_ASSIGNMENTS, ids=[f"{change}" for _, change, _, _ in BAD_ASSIGNMENTS]
)


@bad_assignments
def test_bad_assignment_changes_nothing(make, changes, error, message):
    params = two_params()
    opt = make(params)
    opt.step(gradients(params))
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        opt.param_groups[0].update(changes)
    assert_unchanged(opt, before)
    if len(changes) == 1:
        ((name, value),) = changes.items()
        with pytest.raises(error, match=message):
            opt.param_groups[0][name] = value
        assert_unchanged(opt, before)


@bad_assignments
def test_update_is_all_or_nothing(make, changes, error, message):
    """A good value before and after the bad one."""
    params = two_params()
    opt = make(params)
    before = snapshot(opt)
    with pytest.raises(error, match="|".join(changes)):
        opt.param_groups[0].update({"lr": 0.75, **changes, "maximize": changes.get("maximize", True)})
    assert_unchanged(opt, before)


def test_update_sets_what_single_assignments_could_not():
    opt = onepass.Adam(np.zeros(3))
    group = opt.param_groups[0]
    group.update(eps=0.0, eps_root=1e-6)
    assert (group["eps"], group["eps_root"]) == (0.0, 1e-6)
    group.update({"lr": 0.5}, betas=[0.5, 0.75])
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.75))
    group.update([("lr", 0.25)])
    group.update()
    assert opt.lr == 0.25


def test_eps_that_only_float32_loses():
    for dtype, fine in ((np.float64, True), (np.float32, False)):
        opt = onepass.Adam(np.zeros(3, dtype))
        if fine:
            opt.param_groups[0]["eps"] = 1e-40
            assert opt.param_groups[0]["eps"] == 1e-40
        else:
            with pytest.raises(ValueError, match="eps: 1e-40 is zero in float32"):
                opt.param_groups[0]["eps"] = 1e-40
            assert opt.param_groups[0]["eps"] == 1e-8


def test_param_group_is_a_mapping_of_fixed_keys():
    p = np.zeros(3)
    group = onepass.Adam(p).param_groups[0]
    assert isinstance(group, onepass.ParamGroup)
    assert list(group)[:3] == ["params", "lr", "betas"]
    assert len(group) == len(list(group)) == len(dict(group)) == 16
    assert group["params"] == (p,)
    assert "lr" in group
    assert "momentum" not in group
    assert group.get("momentum") is None
    with pytest.raises(KeyError):
        group["momentum"]
    for remove in (lambda: group.pop("lr"), group.popitem, group.clear, lambda: group.__delitem__("lr")):
        with pytest.raises(TypeError, match="cannot be deleted"):
            remove()
    assert len(group) == 16
    assert "lr=0.001" in repr(group)


def test_param_groups_cannot_be_replaced():
    opt = onepass.SGD(np.zeros(3))
    with pytest.raises(AttributeError):
        opt.param_groups = ()
    with pytest.raises(TypeError):
        opt.param_groups[0] = {}


CHANGES = [
    ("SGD", {"weight_decay": 0.3}),
    ("SGD", {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    ("SGD", {"l1": 0.3}),
    ("SGD", {"maximize": True}),
    ("Momentum", {"momentum": 0.3}),
    ("Momentum", {"dampening": 0.5}),
    ("Momentum", {"lr_in_velocity": False}),
    ("NAG", {"momentum": 0.3}),
    ("AdaGrad", {"lr_decay": 0.5}),
    ("AdaGrad", {"eps_root": 0.5}),
    ("AdaSqrt", {"eps": 0.5}),
    ("RMSprop", {"momentum": 0.3}),
    ("RMSprop", {"rho": 0.3}),
    ("Adam", {"betas": (0.5, 0.5)}),
    ("Adam", {"bias_correction": False}),
    ("Adam", {"eps": 1e-2, "eps_hat": True}),
    ("AdamW", {"weight_decay": 0.5}),
    ("AMSGrad", {"bias_correction": True}),
    ("Nadam", {"momentum_decay": 1.0}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGES, ids=str)
def test_assignment_takes_effect_at_the_next_step(name, changes):
    """The step after the change is the one of an optimizer made with it, from the same parameters and states."""
    changed, control = two_params(), two_params()
    opt, same = OPTIMIZERS[name](changed, lr=0.1), OPTIMIZERS[name](control, lr=0.1)
    for seed in range(3):
        opt.step(gradients(changed, seed))
        same.step(gradients(control, seed))
    saved = opt.state_dict()
    before = [p.copy() for p in changed]
    opt.param_groups[0].update(changes)
    opt.step(gradients(changed, 3))
    same.step(gradients(control, 3))
    for p, q in zip(changed, control, strict=True):
        assert (p != q).any(), "the change has no effect"

    fresh = (
        OPTIMIZERS[name](before, **{"lr": 0.1, **changes}) if name != "AdamW" else onepass.AdamW(before, 0.1, **changes)
    )
    saved["param_groups"][0].update(changes)
    fresh.load_state_dict(saved)
    fresh.step(gradients(before, 3))
    for p, q in zip(changed, before, strict=True):
        np.testing.assert_array_equal(p, q)

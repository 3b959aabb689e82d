"""The functional form: the bits of the optimizer classes, over arrays that the caller owns."""

import inspect
import itertools
import math

import numpy as np
import pytest

import onepass
from helpers import UPDATE_RULES
from onepass import functional, schedules

STEPS = 5
DTYPES = [np.float32, np.float64]
SHAPES = [(), (1,), (37,), (5, 9), (2, 3, 4)]

SURROUNDING = {"weight_decay": 0.05, "l1": 0.01}

# id: (function, its states by argument and by the name in the class, the class, the arguments of both)
FORMS = {
    "sgd": (functional.sgd, {}, onepass.SGD, {}),
    "momentum": (functional.momentum, {"velocities": "velocity"}, onepass.Momentum, {}),
    "momentum-options": (
        functional.momentum,
        {"velocities": "velocity"},
        onepass.Momentum,
        {"momentum": 0.5, "dampening": 0.25, "lr_in_velocity": False},
    ),
    "nag": (functional.nag, {"velocities": "velocity"}, onepass.NAG, {}),
    "nag-options": (
        functional.nag,
        {"velocities": "velocity"},
        onepass.NAG,
        {"momentum": 0.5, "lr_in_velocity": False},
    ),
    "adagrad": (functional.adagrad, {"square_avgs": "square_avg"}, onepass.AdaGrad, {}),
    "adagrad-options": (
        functional.adagrad,
        {"square_avgs": "square_avg"},
        onepass.AdaGrad,
        {"eps": 1e-3, "eps_root": 1e-4, "lr_decay": 0.1},
    ),
    "adasqrt": (functional.adasqrt, {"square_sums": "square_sum"}, onepass.AdaSqrt, {}),
    "adasqrt-options": (functional.adasqrt, {"square_sums": "square_sum"}, onepass.AdaSqrt, {"eps": 0.1}),
    "rmsprop": (functional.rmsprop, {"square_avgs": "square_avg"}, onepass.RMSprop, {}),
    "rmsprop-momentum": (
        functional.rmsprop,
        {"square_avgs": "square_avg", "velocities": "velocity"},
        onepass.RMSprop,
        {"momentum": 0.9},
    ),
    "rmsprop-centered": (
        functional.rmsprop,
        {"square_avgs": "square_avg", "grad_avgs": "grad_avg"},
        onepass.RMSprop,
        {"centered": True, "rho": 0.8, "eps": 0.0, "eps_root": 1e-4},
    ),
    "rmsprop-centered-momentum": (
        functional.rmsprop,
        {"square_avgs": "square_avg", "grad_avgs": "grad_avg", "velocities": "velocity"},
        onepass.RMSprop,
        {"centered": True, "momentum": 0.5, "lr_in_velocity": False, "eps": 1e-3},
    ),
    "adam": (functional.adam, {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}, onepass.Adam, {}),
    "adam-options": (
        functional.adam,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"},
        onepass.Adam,
        {"betas": (0.5, 0.75), "eps": 1e-3, "eps_root": 1e-4, "eps_hat": True},
    ),
    "adam-uncorrected": (
        functional.adam,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"},
        onepass.Adam,
        {"bias_correction": False},
    ),
    "adamw": (functional.adamw, {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}, onepass.AdamW, {}),
    "adamw-options": (
        functional.adamw,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"},
        onepass.AdamW,
        {"weight_decay": 0.5, "betas": (0.5, 0.75), "bias_correction": False},
    ),
    "amsgrad": (
        functional.amsgrad,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "max_exp_avg_sqs": "max_exp_avg_sq"},
        onepass.AMSGrad,
        {},
    ),
    "amsgrad-options": (
        functional.amsgrad,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "max_exp_avg_sqs": "max_exp_avg_sq"},
        onepass.AMSGrad,
        {"betas": (0.5, 0.75), "eps_root": 1e-4, "bias_correction": True},
    ),
    "nadam": (functional.nadam, {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}, onepass.Nadam, {}),
    "nadam-options": (
        functional.nadam,
        {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"},
        onepass.Nadam,
        {"betas": (0.5, 0.75), "momentum_decay": math.inf},
    ),
}
every_form = pytest.mark.parametrize("form", FORMS)
BASIC = ["sgd", "momentum", "nag", "adagrad", "adasqrt", "rmsprop", "adam", "adamw", "amsgrad", "nadam"]
every_function = pytest.mark.parametrize("form", BASIC)


def call(form, params, grads, states, **options):
    """The function of this form over `states`, a dict of the states by their argument's name."""
    function, _, _, defaults = FORMS[form]
    options = {**{name: value for name, value in defaults.items() if name != "centered"}, **options}
    function(params, grads, **states, **options)


def make_params(dtype, order="C"):
    rng = np.random.default_rng(2)
    return [np.array(rng.uniform(-2.0, 2.0, shape), dtype, order=order) for shape in SHAPES]


def make_grads(dtype, seed):
    rng = np.random.default_rng(100 + seed)
    return [np.array(rng.normal(size=shape) * 2.0, dtype) for shape in SHAPES]


def make_states(form, params, order="K"):
    return {name: [np.zeros_like(p, order=order) for p in params] for name in FORMS[form][1]}


def assert_equal_lists(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_all_moved(params, dtype):
    for p, start in zip(params, make_params(dtype), strict=True):
        assert np.isfinite(p).all()
        assert (p != start).all()


def test_the_functions_are_all_tested():
    assert {FORMS[form][0].__name__ for form in FORMS} == set(UPDATE_RULES) == set(BASIC)


@pytest.mark.parametrize("options", [{}, SURROUNDING, {"maximize": True}], ids=["plain", "decays", "maximize"])
@pytest.mark.parametrize("dtype", DTYPES)
@every_form
def test_bits_of_the_class(form, dtype, options):
    _, names, cls, defaults = FORMS[form]
    theirs, ours = make_params(dtype), make_params(dtype)
    opt = cls(theirs, lr=0.03, **{**defaults, **options})
    states = make_states(form, ours)
    for step in range(1, STEPS + 1):
        opt.step(make_grads(dtype, step))
        call(form, ours, make_grads(dtype, step), states, **{"step": step, "lr": 0.03, **options})
    assert_equal_lists(ours, theirs)
    assert_all_moved(ours, dtype)
    for name, key in names.items():
        assert_equal_lists(states[name], [state[key] for state in opt.state])
        assert all(np.any(array) for array in states[name])


@every_form
def test_decoupled_decay_bits(form):
    function, _, cls, defaults = FORMS[form]
    if function is functional.adamw:
        return  # always
    options = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    theirs, ours = make_params(np.float32), make_params(np.float32)
    opt, states = cls(theirs, lr=0.03, **defaults, **options), make_states(form, ours)
    for step in range(1, STEPS + 1):
        opt.step(make_grads(np.float32, step))
        call(form, ours, make_grads(np.float32, step), states, step=step, lr=0.03, **options)
    assert_equal_lists(ours, theirs)
    assert_all_moved(ours, np.float32)


@pytest.mark.parametrize("amsgrad", [{"max_of_corrected": True}, {"eps_hat": True}, {}], ids=repr)
def test_amsgrad_function_with_correction_is_adam_with_amsgrad(amsgrad):
    theirs, ours = make_params(np.float64), make_params(np.float64)
    opt = onepass.Adam(theirs, lr=0.03, betas=(0.5, 0.75), amsgrad=True, **amsgrad)
    states = make_states("amsgrad", ours)
    for step in range(1, STEPS + 1):
        opt.step(make_grads(np.float64, step))
        grads = make_grads(np.float64, step)
        call("amsgrad", ours, grads, states, step=step, lr=0.03, betas=(0.5, 0.75), bias_correction=True, **amsgrad)
    assert_equal_lists(ours, theirs)
    assert_all_moved(ours, np.float64)


def test_adagrad_starts_with_the_accumulator_of_the_caller():
    theirs, ours = make_params(np.float64), make_params(np.float64)
    opt = onepass.AdaGrad(theirs, initial_accumulator=0.5)
    sums = [np.full_like(p, 0.5) for p in ours]
    for step in range(1, STEPS + 1):
        opt.step(make_grads(np.float64, step))
        functional.adagrad(ours, make_grads(np.float64, step), sums, step=step)
    assert_equal_lists(ours, theirs)
    assert_all_moved(ours, np.float64)


@every_form
def test_defaults_are_those_of_the_class(form):
    function, _, cls, _ = FORMS[form]
    own = inspect.signature(function).parameters
    of_class = inspect.signature(cls).parameters
    shared = [name for name in own if name in of_class and name not in ("params", "grads")]
    assert "lr" in shared
    for name in shared:
        assert own[name].default == of_class[name].default, name
    missing = set(of_class) - set(own) - {"params", "grads"}
    assert missing <= {"amsgrad", "max_of_corrected", "centered", "initial_accumulator"}


@pytest.mark.parametrize("dtype", DTYPES)
@every_form
def test_one_array_instead_of_a_list(form, dtype):
    listed, single = (
        [np.linspace(-1, 1, 45, dtype=dtype).reshape(5, 9)],
        np.linspace(-1, 1, 45, dtype=dtype).reshape(5, 9),
    )
    start = single.copy()
    in_lists = make_states(form, listed)
    alone = {name: np.zeros_like(single) for name in in_lists}
    for step in (1, 2, 3):
        g = make_grads(dtype, step)[3]
        call(form, listed, [g], in_lists, step=step)
        call(form, single, g, alone, step=step)
    np.testing.assert_array_equal(single, listed[0])
    assert (single != start).all()
    for name, array in alone.items():
        np.testing.assert_array_equal(array, in_lists[name][0])


@every_form
def test_tuples_are_lists(form):
    ours, theirs = make_params(np.float32), make_params(np.float32)
    states, others = make_states(form, ours), make_states(form, theirs)
    grads = make_grads(np.float32, 1)
    call(form, ours, grads, states, step=1)
    call(form, tuple(theirs), tuple(grads), {name: tuple(arrays) for name, arrays in others.items()}, step=1)
    assert_equal_lists(ours, theirs)
    assert_all_moved(ours, np.float32)


@every_form
def test_none_leaves_a_parameter_and_its_states_alone(form):
    params, alone = make_params(np.float64), make_params(np.float64)
    states, of_alone = make_states(form, params), make_states(form, alone)
    for arrays in states.values():
        arrays[1][...] = 0.25
    grads = make_grads(np.float64, 1)
    call(form, params, [g if i != 1 else None for i, g in enumerate(grads)], states, step=1)
    call(form, alone, grads, of_alone, step=1)
    np.testing.assert_array_equal(params[1], make_params(np.float64)[1])
    for name, arrays in states.items():
        assert (arrays[1] == 0.25).all()
        assert_equal_lists(arrays[2:], of_alone[name][2:])
    assert_equal_lists(params[2:], alone[2:])
    assert (params[3] != make_params(np.float64)[3]).all()


@every_form
def test_all_none_and_no_arrays_do_nothing(form):
    params = make_params(np.float64)
    states = make_states(form, params)
    call(form, params, [None] * len(params), states, step=1)
    assert_equal_lists(params, make_params(np.float64))
    call(form, [], [], {name: [] for name in states}, step=1)


@pytest.mark.parametrize("dtype", DTYPES)
@every_form
def test_states_in_another_memory_order(form, dtype):
    """Row-major parameters with column-major states, gradients reversed: the bits of the plain case."""
    if not FORMS[form][1]:
        return
    shape = (33, 20)
    rng = np.random.default_rng(4)
    start = rng.normal(size=shape).astype(dtype)
    plain, mixed = start.copy(), start.copy()
    states = {name: np.zeros(shape, dtype) for name in FORMS[form][1]}
    others = {name: np.zeros(shape, dtype, order="F") for name in states}
    for step in range(1, 4):
        g = rng.normal(size=shape).astype(dtype)
        call(form, plain, g, states, step=step, lr=0.03)
        call(form, mixed, g[::-1].copy()[::-1], others, step=step, lr=0.03)
    np.testing.assert_array_equal(mixed, plain)
    assert (plain != start).all()
    for name, array in others.items():
        assert array.flags.f_contiguous
        np.testing.assert_array_equal(array, states[name])


def test_each_state_may_have_an_order_of_its_own():
    shape = (6, 7, 8)
    rng = np.random.default_rng(4)
    start = rng.normal(size=shape)
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]

    def in_order(array, axes):
        return np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))

    plain = [start.copy()] + [np.zeros(shape) for _ in range(3)]
    mixed = [in_order(array, axes) for array, axes in zip(plain, orders, strict=True)]
    assert len({array.strides for array in mixed}) == 4
    for step in (1, 2, 3):
        g = rng.normal(size=shape)
        for p, *states in (plain, mixed):
            functional.amsgrad(p, g, *states, step=step, lr=0.03)
    assert_equal_lists(mixed, plain)
    assert (plain[0] != start).all()


def test_mixed_dtypes_and_orders_in_one_call():
    params = [np.ones(5, np.float32), np.ones((4, 3)), np.asfortranarray(np.ones((4, 3), np.float32))]
    states = [[np.zeros_like(p) for p in params] for _ in range(2)]
    grads = [np.full_like(p, 0.5) for p in params]
    functional.adam(params, grads, *states, step=1, lr=0.1)
    for p, m in zip(params, states[0], strict=True):
        assert p.dtype == m.dtype
        np.testing.assert_allclose(p, 0.9, rtol=1e-6)


@pytest.mark.parametrize("step", [1, 3, 10**6])
def test_schedule_is_called_with_the_step(step):
    asked = []

    def lr(t):
        asked.append(t)
        return 0.5 / t

    p = np.zeros(5)
    functional.sgd(p, np.ones(5), step=np.int64(step), lr=lr)
    assert asked == [step]
    assert type(asked[0]) is int
    np.testing.assert_array_equal(p, np.full(5, -0.5 / step))
    scheduled, constant = np.zeros(5), np.zeros(5)
    schedule = schedules.inverse_time(0.5, decay=0.1)
    functional.sgd(scheduled, np.ones(5), step=step, lr=schedule)
    functional.sgd(constant, np.ones(5), step=step, lr=schedule(step))
    np.testing.assert_array_equal(scheduled, constant)


# Errors: exception, message, and nothing written


def expect(error, message, form, params, grads, states, **options):
    """The call fails as told and leaves every array as it was."""
    arrays = [a for a in itertools.chain(params, *states.values()) if isinstance(a, np.ndarray)]
    before = [a.copy() for a in arrays]
    with pytest.raises(error, match=message):
        call(form, params, grads, states, **{"step": 1, **options})
    for array, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, then)


def ready(form, dtype=np.float64):
    params = make_params(dtype)
    states = {name: [np.full_like(p, 0.5) for p in params] for name in FORMS[form][1]}
    return params, make_grads(dtype, 1), states


BAD_STEPS = [
    (0, ValueError),
    (-1, ValueError),
    (True, TypeError),
    (1.0, TypeError),
    ("1", TypeError),
    (None, TypeError),
    (np.float64(1), TypeError),
]


@pytest.mark.parametrize(("step", "error"), BAD_STEPS, ids=lambda value: getattr(value, "__name__", repr(value)))
@every_function
def test_bad_step(form, step, error):
    expect(error, r"^step: expected an integer from 1 to 2\*\*62, got ", form, *ready(form), step=step)


@every_function
def test_step_is_required_and_named(form):
    params, grads, states = ready(form)
    with pytest.raises(TypeError, match="step"):
        FORMS[form][0](params, grads, **states)
    with pytest.raises(TypeError, match="positional"):
        FORMS[form][0](params, grads, *states.values(), 1)
    assert_equal_lists(params, make_params(np.float64))


BAD_HYPER = [
    ("sgd", {"lr": -0.1}, ValueError, "^lr: expected"),
    ("sgd", {"lr": None}, TypeError, "^lr: expected"),
    ("sgd", {"lr": lambda t: -1.0}, ValueError, r"^lr\(1\): expected"),
    ("sgd", {"lr": lambda t: None}, TypeError, r"^lr\(1\): expected"),
    ("sgd", {"lr": lambda t: 1 / 0}, ZeroDivisionError, "division"),
    ("sgd", {"weight_decay": math.nan}, ValueError, "^weight_decay: expected"),
    ("sgd", {"l1": -1}, ValueError, "^l1: expected"),
    ("sgd", {"maximize": 1}, TypeError, "^maximize: expected True or False"),
    ("sgd", {"decoupled_weight_decay": "no"}, TypeError, "^decoupled_weight_decay: expected True or False"),
    ("momentum", {"momentum": 1.0}, ValueError, "^momentum: expected"),
    ("momentum", {"dampening": 2}, ValueError, "^dampening: expected"),
    ("nag", {"momentum": -0.5}, ValueError, "^momentum: expected"),
    ("adagrad", {"lr_decay": -0.5}, ValueError, "^lr_decay: expected"),
    ("adagrad", {"eps": 0.0}, ValueError, "^eps: eps and eps_root are both 0"),
    ("adasqrt", {"eps": -1.0}, ValueError, "^eps: expected"),
    ("adasqrt", {"eps": 0.0}, ValueError, "^eps: "),
    ("rmsprop", {"rho": 1.0}, ValueError, "^rho: expected"),
    ("rmsprop-momentum", {"momentum": 1.5}, ValueError, "^momentum: expected"),
    ("rmsprop-momentum", {"momentum": "0.5"}, TypeError, "^momentum: expected"),
    ("adam", {"betas": (0.9, 1.0)}, ValueError, r"^betas\[1\]: expected"),
    ("adam", {"betas": 0.9}, TypeError, "^betas: expected a pair"),
    ("adam", {"eps": 0}, ValueError, "^eps: eps and eps_root are both 0"),
    ("adam", {"eps": 1e-320}, ValueError, "^eps: .* is zero in float64"),
    ("adamw", {"weight_decay": -0.1}, ValueError, "^weight_decay: expected"),
    ("amsgrad", {"max_of_corrected": 1}, TypeError, "^max_of_corrected: expected True or False"),
    ("nadam", {"momentum_decay": -1}, ValueError, "^momentum_decay: expected"),
]


@pytest.mark.parametrize(
    ("form", "options", "error", "message"), BAD_HYPER, ids=[f"{form}-{next(iter(o))}" for form, o, _, _ in BAD_HYPER]
)
def test_bad_hyper_parameter(form, options, error, message):
    expect(error, message, form, *ready(form), **options)


@every_function
def test_unknown_argument(form):
    expect(TypeError, "nesterov", form, *ready(form), nesterov=True)


def test_eps_that_float32_loses():
    params, grads, states = ready("adam", np.float32)
    params[2], grads[2] = params[2].astype(np.float64), grads[2].astype(np.float64)
    for arrays in states.values():
        arrays[2] = arrays[2].astype(np.float64)
    expect(ValueError, "^eps: 1e-40 is zero in float32", "adam", params, grads, states, eps=1e-40)


def names_of(form):
    return ["grads", *FORMS[form][1]]


every_argument = pytest.mark.parametrize(("form", "name"), [(form, name) for form in BASIC for name in names_of(form)])


def replaced(form, name, change, dtype=np.float64):
    """The arguments of a call of which `change` has replaced the list called `name`."""
    params, grads, states = ready(form, dtype)
    given = {"params": params, "grads": grads, **states}
    given[name] = change(list(given[name]))
    return given["params"], given["grads"], {key: given[key] for key in states}


@every_argument
def test_wrong_length(form, name):
    for change, count in ((lambda arrays: arrays[:-1], 4), (lambda arrays: [*arrays, arrays[0]], 6), (lambda _: [], 0)):
        expect(ValueError, rf"^{name}: {count} given for 5 parameters", form, *replaced(form, name, change))


@every_argument
def test_list_where_params_is_one_array(form, name):
    p, g = np.ones(3), np.ones(3)
    given = {"params": p, "grads": g, **{key: np.zeros(3) for key in FORMS[form][1]}}
    given[name] = [given[name]]
    states = {key: given[key] for key in FORMS[form][1]}
    with pytest.raises(TypeError, match=rf"^{name}: expected one array, as params is, got list"):
        call(form, p, given["grads"], states, step=1)
    np.testing.assert_array_equal(p, np.ones(3))


@every_argument
def test_array_where_params_is_a_list(form, name):
    params, grads, states = ready(form)
    given = {"grads": grads, **states}
    given[name] = given[name][2]
    with pytest.raises(TypeError, match=rf"^{name}: expected a list or tuple of arrays, as params is, got ndarray"):
        call(form, params, given.pop("grads"), given, step=1)
    assert_equal_lists(params, make_params(np.float64))


@pytest.mark.parametrize("wrong", [None, {}, (x for x in ()), 3.0], ids=["None", "dict", "generator", "float"])
@every_argument
def test_no_list_where_params_is_one(form, name, wrong):
    if name in ("grad_avgs", "velocities") and form == "rmsprop" and wrong is None:
        return
    params, grads, states = ready(form)
    given = {"grads": grads, **states, name: wrong}
    with pytest.raises(TypeError, match=rf"^{name}: expected a list or tuple of arrays, as params is, got "):
        call(form, params, given.pop("grads"), given, step=1)
    assert_equal_lists(params, make_params(np.float64))


def put(index, make):
    def change(arrays):
        arrays[index] = make(arrays[index])
        return arrays

    return change


WRONG_ARRAYS = {
    "shape": (lambda a: np.ones((9, 5)), ValueError, r"shape \(9, 5\) does not match its parameter's \(5, 9\)"),
    "ndim": (lambda a: np.ones(45), ValueError, r"shape \(45,\) does not match its parameter's \(5, 9\)"),
    "broadcastable": (lambda a: np.ones((1, 9)), ValueError, r"shape \(1, 9\) does not match its parameter's \(5, 9\)"),
    "dtype": (lambda a: a.astype(np.float32), TypeError, "dtype float32 does not match its parameter's float64"),
    "integer": (lambda a: a.astype(np.int64), TypeError, "dtype int64 is not supported"),
    "longdouble": (lambda a: a.astype(np.longdouble), TypeError, "is not supported"),
    "object": (lambda a: a.astype(object), TypeError, "dtype object is not supported"),
    "byte order": (lambda a: a.astype(">f8"), TypeError, "foreign byte order"),
    "nested list": (lambda a: a.tolist(), TypeError, "expected a NumPy array or an object with __dlpack__, got list"),
    "text": (lambda a: "zeros", TypeError, "expected a NumPy array or an object with __dlpack__, got str"),
    "masked": (lambda a: np.ma.masked_array(a), TypeError, "masked array"),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
@every_argument
def test_wrong_array(form, name, wrong):
    make, error, message = WRONG_ARRAYS[wrong]
    expect(error, rf"^{name}\[3\]: .*{message}", form, *replaced(form, name, put(3, make)))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


UNWRITABLE = {
    "read-only": (read_only, "read-only"),
    "broadcast": (lambda a: np.broadcast_to(np.zeros(9), (5, 9)), "read-only|dense"),
    "stride 0": (lambda a: np.lib.stride_tricks.as_strided(np.zeros(9), (5, 9), (0, 8)), "dense"),
    "gaps": (lambda a: np.zeros((10, 9))[::2], "dense"),
    "reversed": (lambda a: np.zeros((5, 9))[::-1], "dense"),
    "overlapping rows": (lambda a: np.lib.stride_tricks.as_strided(np.zeros(13), (5, 9), (8, 8)), "dense"),
}


@pytest.mark.parametrize("wrong", UNWRITABLE)
@pytest.mark.parametrize(("form", "name"), [(form, name) for form in BASIC for name in ["params", *FORMS[form][1]]])
def test_array_that_cannot_be_written(form, name, wrong):
    make, message = UNWRITABLE[wrong]
    expect(ValueError, rf"^{name}\[3\]: .*({message})", form, *replaced(form, name, put(3, make)))


RAMP = np.linspace(0.5, 1.5, 90).reshape(10, 9)
READABLE = {
    "read-only": read_only(RAMP[:5]),
    "broadcast": np.broadcast_to(RAMP[0], (5, 9)),
    "gaps": RAMP[::2],
    "reversed": RAMP[4::-1],
    "column-major": np.asfortranarray(RAMP[:5]),
    "overlapping rows": np.lib.stride_tricks.as_strided(RAMP, (5, 9), (8, 8)),
}


@pytest.mark.parametrize("layout", READABLE)
def test_gradient_is_only_read(layout):
    g = READABLE[layout]
    assert g.shape == (5, 9)
    p, q, m, n = np.ones((5, 9)), np.ones((5, 9)), np.zeros((5, 9)), np.zeros((5, 9))
    before = g.copy()
    functional.momentum(p, g, m, step=1)
    functional.momentum(q, before, n, step=1)
    np.testing.assert_array_equal(p, q)
    np.testing.assert_array_equal(m, n)
    np.testing.assert_array_equal(g, before)
    assert (p != 1.0).all()


def test_the_functional_form_also_knows_none_for_one_array():
    p = np.ones(3)
    functional.sgd(p, None, step=1)
    np.testing.assert_array_equal(p, np.ones(3))


MOMENTA = {
    "needed": ({"momentum": 0.9}, ["square_avgs"], "^velocities: needed"),
    "not needed": ({"momentum": 0.0}, ["square_avgs", "velocities"], "^velocities: needed with momentum > 0, and only"),
    "needed, centered": ({"momentum": 0.9}, ["square_avgs", "grad_avgs"], "^velocities: needed"),
    "not needed, default": ({}, ["square_avgs", "grad_avgs", "velocities"], "^velocities: needed"),
}


@pytest.mark.parametrize("case", MOMENTA)
def test_rmsprop_velocities_go_with_momentum(case):
    options, names, message = MOMENTA[case]
    params = make_params(np.float64)
    states = {name: [np.zeros_like(p) for p in params] for name in names}
    expect(ValueError, message, "rmsprop", params, make_grads(np.float64, 1), states, **options)


def test_rmsprop_momentum_of_the_wrong_type_is_named():
    params = make_params(np.float64)
    states = {"square_avgs": [np.zeros_like(p) for p in params]}
    expect(TypeError, "^momentum: expected", "rmsprop", params, make_grads(np.float64, 1), states, momentum="0.5")


@every_function
def test_states_are_required(form):
    params, grads, states = ready(form)
    for name in states:
        fewer = {key: value for key, value in states.items() if key != name}
        expect(TypeError, name, form, params, grads, fewer)


@every_function
def test_nothing_is_written_before_the_last_array_is_checked(form):
    """The last array is wrong; the first four are valid and must not have been stepped."""
    for name in names_of(form):
        expect(ValueError, rf"^{name}\[4\]: shape", form, *replaced(form, name, put(4, lambda a: np.ones((4, 3, 2)))))


# Overlap


def test_overlapping_parameters():
    base = np.ones(20)
    params = [base[:12], base[8:]]
    expect(ValueError, r"^params\[1\]: overlaps params\[0\]", "sgd", params, [np.ones(12), np.ones(12)], {})
    expect(ValueError, r"^params\[1\]: overlaps params\[0\]", "sgd", [base, base], [np.ones(20)] * 2, {})


@pytest.mark.parametrize("form", [form for form in BASIC if form != "sgd"])
def test_state_that_overlaps_its_parameter(form):
    for name in FORMS[form][1]:
        params, grads, states = ready(form)
        states[name][3] = params[3]
        expect(ValueError, rf"^{name}\[3\]: overlaps params\[3\] in memory", form, params, grads, states)


@pytest.mark.parametrize("form", ["adam", "adamw", "amsgrad", "nadam"])
def test_states_that_overlap_each_other(form):
    params, grads, states = ready(form)
    states["exp_avg_sqs"][2] = states["exp_avgs"][2]
    expect(ValueError, r"^exp_avg_sqs\[2\]: overlaps exp_avgs\[2\] in memory", form, params, grads, states)
    params, grads, states = ready(form)
    both = np.ones(38)
    states["exp_avgs"][2], states["exp_avg_sqs"][2] = both[1:], both[:-1]
    expect(ValueError, r"^exp_avg_sqs\[2\]: overlaps exp_avgs\[2\] in memory", form, params, grads, states)


@every_function
def test_gradient_that_overlaps_what_is_written(form):
    params, grads, states = ready(form)
    grads[3] = params[3]
    expect(ValueError, r"^grads\[3\]: overlaps params\[3\] in memory", form, params, grads, states)
    params, grads, states = ready(form)
    grads[2] = params[3].reshape(-1)[:37]
    expect(ValueError, r"^grads\[2\]: overlaps params\[3\] in memory", form, params, grads, states)
    for name in states:
        params, grads, states = ready(form)
        grads[3] = states[name][3]
        expect(ValueError, rf"^grads\[3\]: overlaps {name}\[3\] in memory", form, params, grads, states)


def test_neighbours_in_one_buffer_do_not_overlap():
    buffer = np.ones(60)
    parts = [buffer[:20], buffer[20:40], buffer[40:]]
    functional.momentum([parts[0]], [parts[1]], [parts[2]], step=1, lr=0.5, momentum=0.5)
    np.testing.assert_array_equal(buffer, np.repeat([0.0, 1.0, 1.0], 20))


def test_one_gradient_may_serve_several_parameters():
    g = np.linspace(0.5, 1.5, 20)
    params = [np.zeros(20), np.ones(20)]
    functional.sgd(params, [g, g], step=1, lr=1.0)
    np.testing.assert_array_equal(params[0], -g)
    np.testing.assert_array_equal(params[1], 1.0 - g)

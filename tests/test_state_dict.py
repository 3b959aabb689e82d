"""Saving and resuming: exact, in place, and all or nothing."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest

import onepass
from onepass import schedules

DTYPES = [np.float32, np.float64]

OPTIMIZERS = {
    "SGD": onepass.SGD,
    "SGD-decays": functools.partial(onepass.SGD, weight_decay=0.1, l1=0.01, maximize=True),
    "Momentum": onepass.Momentum,
    "Momentum-options": functools.partial(onepass.Momentum, momentum=0.5, dampening=0.25, lr_in_velocity=False),
    "NAG": onepass.NAG,
    "AdaGrad": functools.partial(onepass.AdaGrad, initial_accumulator=0.1, lr_decay=0.1),
    "AdaSqrt": onepass.AdaSqrt,
    "RMSprop": onepass.RMSprop,
    "RMSprop-momentum": functools.partial(onepass.RMSprop, momentum=0.9),
    "RMSprop-centered": functools.partial(onepass.RMSprop, centered=True, eps=1e-3),
    "RMSprop-both": functools.partial(onepass.RMSprop, centered=True, momentum=0.9, lr_in_velocity=False, eps=1e-3),
    "Adam": onepass.Adam,
    "Adam-amsgrad": functools.partial(onepass.Adam, amsgrad=True, max_of_corrected=True, betas=(0.5, 0.75)),
    "AdamW": onepass.AdamW,
    "AMSGrad": onepass.AMSGrad,
    "Nadam": onepass.Nadam,
    "Nadam-inf": functools.partial(onepass.Nadam, momentum_decay=math.inf),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

ENTRIES = [
    "optimizer",
    "param_groups",
    "state",
    "seed",
    "skipped",
    "accumulated",
    "ema_swapped",
    "rounding",
    "accumulate",
]


def class_name(name):
    return name.partition("-")[0]


def make_params(dtype=np.float64):
    rng = np.random.default_rng(1)
    shapes = [(37,), (5, 9), (), (2, 3, 4)]
    params = [np.array(rng.uniform(-2.0, 2.0, shape), dtype) for shape in shapes]
    params[3] = np.asfortranarray(params[3])
    return params


def make_grads(params, t):
    """Of a function of the parameters, so that a wrong bit is not forgotten."""
    return [
        np.asarray(0.3 * p + np.random.default_rng((t, i)).normal(size=p.shape), p.dtype) for i, p in enumerate(params)
    ]


def with_gaps(grads, t):
    """Every parameter goes without a gradient at steps of its own."""
    return [None if (t + i) % (2 + i) == 0 else g for i, g in enumerate(grads)]


def run(opt, params, steps, gaps=False):
    for t in steps:
        grads = make_grads(params, t)
        opt.step(with_gaps(grads, t) if gaps else grads)


def snapshot(opt):
    """Everything that a failed call must leave: deep copies, and which array objects hold the states."""
    return {
        "params": [np.array(p) for group in opt.param_groups for p in group["params"]],
        "states": [{key: array.copy() for key, array in state.items()} for state in opt.state],
        "identities": [{key: (id(array), array.ctypes.data) for key, array in state.items()} for state in opt.state],
        "counts": opt.step_counts,
        "hyper": [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups],
    }


def assert_same_snapshot(now, then, but=()):
    assert now.keys() == then.keys()
    for key in now.keys() - set(but):
        if key == "params":
            for a, b in zip(now[key], then[key], strict=True):
                np.testing.assert_array_equal(a, b)
        elif key == "states":
            for a, b in zip(now[key], then[key], strict=True):
                assert list(a) == list(b)
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name])
        else:
            assert now[key] == then[key], key


def assert_same_state_dict(a, b):
    assert list(a) == list(b) == ENTRIES
    assert all(a[key] == b[key] for key in ENTRIES if key != "state")
    assert list(a["state"]) == list(b["state"])
    for index in a["state"]:
        assert list(a["state"][index]) == list(b["state"][index])
        for key, value in a["state"][index].items():
            np.testing.assert_array_equal(value, b["state"][index][key])
            assert type(value) is type(b["state"][index][key])
            assert np.asarray(value).dtype == np.asarray(b["state"][index][key]).dtype


LR = schedules.linear_warmup(schedules.cosine(0.05, steps=40), steps=4)


def trained(name, dtype=np.float64, steps=6, **options):
    params = make_params(dtype)
    opt = OPTIMIZERS[name](params, **{"lr": LR, **options})
    run(opt, params, range(steps), gaps=True)
    return opt, params


# Round trip


@pytest.mark.parametrize("gaps", [False, True], ids=["", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@every_optimizer
def test_resumed_training_is_uninterrupted_training(name, dtype, gaps):
    whole = make_params(dtype)
    straight = OPTIMIZERS[name](whole, lr=LR)
    run(straight, whole, range(12), gaps)

    first = make_params(dtype)
    before = OPTIMIZERS[name](first, lr=LR)
    run(before, first, range(7), gaps)
    saved = before.state_dict()
    second = [p.copy(order="K") for p in first]
    after = OPTIMIZERS[name](second, lr=0.7)  # the rest comes with the state
    after.load_state_dict(saved)
    assert after.lr == LR
    assert after.step_counts == before.step_counts
    run(after, second, range(7, 12), gaps)

    for p, q, start in zip(second, whole, make_params(dtype), strict=True):
        np.testing.assert_array_equal(p, q)
        assert np.isfinite(p).all()
        assert (p != start).all()
    assert_same_state_dict(after.state_dict(), straight.state_dict())
    if gaps:
        assert len(set(after.step_counts)) > 1
    else:
        assert after.step_counts == (12,) * 4


@every_optimizer
def test_without_the_state_training_is_another(name):
    """Or the test above would pass for a state_dict that holds nothing."""
    if class_name(name) == "SGD":
        return
    opt, params = trained(name)
    fresh_params = [p.copy(order="K") for p in params]
    fresh = OPTIMIZERS[name](fresh_params, lr=0.02)
    opt.lr = 0.02
    run(opt, params, range(6, 8))
    run(fresh, fresh_params, range(6, 8))
    for p, q in zip(params, fresh_params, strict=True):
        assert (p != q).any()


@every_optimizer
def test_load_of_its_own_state_is_the_identity(name):
    opt, _ = trained(name)
    before = snapshot(opt)
    opt.load_state_dict(opt.state_dict())
    assert_same_snapshot(snapshot(opt), before)


@every_optimizer
def test_contents(name):
    opt, params = trained(name)
    saved = opt.state_dict()
    assert list(saved) == ENTRIES
    assert saved["optimizer"] == class_name(name)
    (group,) = saved["param_groups"]
    assert group["params"] == [0, 1, 2, 3]
    assert {key: value for key, value in group.items() if key != "params"} == snapshot(opt)["hyper"][0]
    assert list(saved["state"]) == [0, 1, 2, 3]
    for index, param in enumerate(params):
        entry = saved["state"][index]
        assert list(entry) == ["step", *opt.state[index]]
        assert type(entry["step"]) is int
        assert entry["step"] == opt.step_counts[index] > 0
        for key, array in opt.state[index].items():
            assert entry[key].shape == array.shape == param.shape
            assert entry[key].dtype == array.dtype == param.dtype
            assert array.any()
            np.testing.assert_array_equal(entry[key], array)


STATE_NAMES = {
    "SGD": [],
    "Momentum": ["velocity"],
    "NAG": ["velocity"],
    "AdaGrad": ["square_avg"],
    "AdaSqrt": ["square_sum"],
    "RMSprop": ["square_avg"],
    "RMSprop-momentum": ["square_avg", "velocity"],
    "RMSprop-centered": ["square_avg", "grad_avg"],
    "RMSprop-both": ["square_avg", "grad_avg", "velocity"],
    "Adam": ["exp_avg", "exp_avg_sq"],
    "Adam-amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "AdamW": ["exp_avg", "exp_avg_sq"],
    "AMSGrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "Nadam": ["exp_avg", "exp_avg_sq"],
}


@pytest.mark.parametrize("name", STATE_NAMES)
def test_names_of_the_states(name):
    opt = OPTIMIZERS[name](make_params())
    assert [list(state) for state in opt.state] == [STATE_NAMES[name]] * 4


@every_optimizer
def test_state_dict_holds_copies(name):
    opt, params = trained(name)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    run(opt, params, range(6, 9))
    opt.lr = 0.5
    opt.param_groups[0]["weight_decay"] = 0.25
    assert_same_state_dict(saved, kept)
    for index, state in enumerate(opt.state):
        for key, array in state.items():
            assert not np.shares_memory(array, saved["state"][index][key])

    before = snapshot(opt)
    for entry in saved["state"].values():
        for key in entry:
            if key != "step":
                entry[key][...] = 7.0
    saved["param_groups"][0]["lr"] = 9.0
    saved["param_groups"][0]["params"].append(9)
    assert_same_snapshot(snapshot(opt), before)


@every_optimizer
def test_load_copies_into_the_arrays_that_are_there(name):
    opt, _ = trained(name)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = OPTIMIZERS[name](make_params())
    held = [dict(state) for state in other.state]
    group = other.param_groups[0]
    before = snapshot(other)
    other.load_state_dict(saved)
    after = snapshot(other)
    assert after["identities"] == before["identities"]
    assert_same_snapshot(after, before, but=("states", "counts", "hyper"))
    assert group["lr"] == LR
    for index, state in enumerate(held):
        for key, array in state.items():
            assert other.state[index][key] is array
            np.testing.assert_array_equal(array, opt.state[index][key])
            assert not np.shares_memory(array, saved["state"][index][key])
    run(other, [*other.param_groups[0]["params"]], range(2))
    assert_same_state_dict(saved, kept)


@every_optimizer
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle_and_deepcopy(name, protocol):
    opt, params = trained(name)
    saved = opt.state_dict()
    assert_same_state_dict(pickle.loads(pickle.dumps(saved, protocol)), saved)
    assert_same_state_dict(copy.deepcopy(saved), saved)
    resumed_params = [p.copy(order="K") for p in params]
    resumed = OPTIMIZERS[name](resumed_params)
    resumed.load_state_dict(pickle.loads(pickle.dumps(saved, protocol)))
    run(opt, params, range(6, 9))
    run(resumed, resumed_params, range(6, 9))
    for p, q in zip(params, resumed_params, strict=True):
        np.testing.assert_array_equal(p, q)


@every_optimizer
def test_step_counts_are_per_parameter(name):
    params = make_params()
    opt = OPTIMIZERS[name](params, lr=0.05)
    g = make_grads(params, 0)
    opt.step([g[0], None, None, g[3]])
    opt.step([g[0], g[1], None, None])
    opt.step([g[0], None, None, g[3]])
    assert opt.step_counts == (3, 1, 0, 2)
    saved = opt.state_dict()
    assert [saved["state"][index]["step"] for index in range(4)] == [3, 1, 0, 2]
    other = OPTIMIZERS[name](make_params())
    run(other, make_params(), range(2))
    other.load_state_dict(saved)
    assert other.step_counts == (3, 1, 0, 2)
    for array in other.state[2].values():
        assert not array.any() or class_name(name) == "AdaGrad"


def test_the_count_matters():
    """Bias correction at step 1 and at step 1001 of the same moments."""
    ends = []
    for step in (0, 1000):
        p = np.ones(9)
        opt = onepass.Adam(p, lr=0.1)
        saved = opt.state_dict()
        saved["state"][0]["step"] = np.int64(step)
        opt.load_state_dict(saved)
        assert opt.step_counts == (step,)
        opt.step(np.ones(9))
        ends.append(p)
    np.testing.assert_allclose(ends[0], 0.9, rtol=1e-7)
    assert (ends[1] < 0.9).all() or (ends[1] > 0.9).all()


def test_groups_and_names():
    def make():
        w, b, e = (np.linspace(0.5, 1.5, n) for n in (20, 7, 33))
        opt = onepass.Adam(
            [{"params": {"w": w, "b": b}, "weight_decay": 0.1}, {"params": e, "lr": LR, "betas": (0.5, 0.75)}], lr=0.02
        )
        return opt, (w, b, e)

    def step(opt, arrays, t):
        w, b, e = make_grads(arrays, t)
        opt.step([{"w": w, "b": b}, e])

    a, of_a = make()
    b, of_b = make()
    for t in range(3):
        step(a, of_a, t)
    saved = a.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]
    assert [group["lr"] for group in saved["param_groups"]] == [0.02, LR]
    b.load_state_dict(saved)
    for p, q in zip(of_a, of_b, strict=True):
        q[...] = p
    for t in range(3, 6):
        step(a, of_a, t)
        step(b, of_b, t)
    for p, q in zip(of_a, of_b, strict=True):
        np.testing.assert_array_equal(p, q)
    assert_same_state_dict(a.state_dict(), b.state_dict())


def test_memory_order_may_differ():
    """Saved beside a column-major parameter, loaded beside a row-major one."""
    rng = np.random.default_rng(5)
    column = np.asfortranarray(rng.normal(size=(6, 7)))
    row = np.ascontiguousarray(column)
    a, b = onepass.RMSprop(column, momentum=0.9), onepass.RMSprop(row, momentum=0.9)
    a.step(2.0 * column)
    row[...] = column
    b.load_state_dict(a.state_dict())
    assert a.state[0]["velocity"].flags.f_contiguous
    assert b.state[0]["velocity"].flags.c_contiguous
    for _ in range(3):
        a.step(2.0 * column)
        b.step(2.0 * row)
    np.testing.assert_array_equal(row, column)


def test_states_may_be_saved_to_an_npz_file(tmp_path):
    opt, _ = trained("Adam")
    saved = opt.state_dict()
    np.savez(
        tmp_path / "state.npz", **{f"{i}.{key}": v for i, entry in saved["state"].items() for key, v in entry.items()}
    )
    other = OPTIMIZERS["Adam"](make_params())
    with np.load(tmp_path / "state.npz") as file:
        saved["state"] = {i: {key: file[f"{i}.{key}"] for key in entry} for i, entry in saved["state"].items()}
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])
    other.load_state_dict(saved)
    assert_same_state_dict(other.state_dict(), opt.state_dict())


# Errors: the exception, the message, and nothing changed


def change(*path):
    """An edit of a state_dict: the last of `path` becomes the value at the place that the others name."""
    *keys, last, value = path

    def edit(saved):
        for key in keys:
            saved = saved[key]
        saved[last] = value(saved[last]) if callable(value) else value

    return edit


def remove(*path):
    *keys, last = path

    def edit(saved):
        for key in keys:
            saved = saved[key]
        del saved[last]

    return edit


def insert(*path):
    *keys, last, value = path

    def edit(saved):
        for key in keys:
            saved = saved[key]
        assert last not in saved
        saved[last] = value

    return edit


GROUP = ("param_groups", 0)
STATE = ("state", 3)
EXP = (*STATE, "exp_avg_sq")
LABEL = r"^state\[3\]\['exp_avg_sq'\]: "

BAD_STATES = {
    "optimizer": (change("optimizer", "AdamW"), ValueError, "^optimizer: the state is of 'AdamW', not of 'Adam'"),
    "optimizer None": (change("optimizer", None), ValueError, "^optimizer: the state is of None, not of 'Adam'"),
    "no optimizer": (remove("optimizer"), ValueError, "^state_dict: 'optimizer' is missing"),
    "no groups": (remove("param_groups"), ValueError, "^state_dict: 'param_groups' is missing"),
    "no state": (remove("state"), ValueError, "^state_dict: 'state' is missing"),
    "extra key": (insert("version", 3), ValueError, "^state_dict: 'version' is unknown"),
    "groups empty": (change("param_groups", []), ValueError, "^param_groups: expected a list of 1 group"),
    "groups more": (change("param_groups", lambda g: g * 2), ValueError, "^param_groups: expected a list of 1 group"),
    "groups no list": (change("param_groups", {}), ValueError, "^param_groups: expected a list of 1 group"),
    "group no dict": (change(*GROUP, 3), TypeError, r"^param_groups\[0\]: expected a dict, got int"),
    "group too few": (change(*GROUP, "params", [0, 1]), ValueError, r"^param_groups\[0\]\['params'\]: expected "),
    "group other": (change(*GROUP, "params", [1, 2, 3, 4]), ValueError, r"^param_groups\[0\]\['params'\]: expected "),
    "group order": (change(*GROUP, "params", [1, 0, 2, 3]), ValueError, r"^param_groups\[0\]\['params'\]: expected "),
    "group number": (
        change(*GROUP, "params", 4),
        (TypeError, ValueError),
        r"^param_groups\[0\]\['params'\]: expected ",
    ),
    "group None": (
        change(*GROUP, "params", None),
        (TypeError, ValueError),
        r"^param_groups\[0\]\['params'\]: expected ",
    ),
    "hyper missing": (remove(*GROUP, "betas"), ValueError, r"^param_groups\[0\]: 'betas' is missing"),
    "hyper no params": (remove(*GROUP, "params"), ValueError, r"^param_groups\[0\]: 'params' is missing"),
    "hyper unknown": (insert(*GROUP, "momentum", 0.9), ValueError, r"^param_groups\[0\]: 'momentum' is unknown"),
    "hyper lr": (change(*GROUP, "lr", -1.0), ValueError, r"^param_groups\[0\]\['lr'\]: expected"),
    "hyper lr nan": (change(*GROUP, "lr", math.nan), ValueError, r"^param_groups\[0\]\['lr'\]: expected"),
    "hyper lr type": (change(*GROUP, "lr", "0.1"), TypeError, r"^param_groups\[0\]\['lr'\]: expected"),
    "hyper betas": (change(*GROUP, "betas", (0.9, 1.0)), ValueError, r"^param_groups\[0\]\['betas'\]\[1\]: expected"),
    "hyper betas type": (change(*GROUP, "betas", 0.9), TypeError, r"^param_groups\[0\]\['betas'\]: expected a pair"),
    "hyper eps": (change(*GROUP, "eps", 0.0), ValueError, r"^param_groups\[0\]\['eps'\]: .* both 0"),
    "hyper eps lost": (
        change(*GROUP, "eps", 1e-320),
        ValueError,
        r"^param_groups\[0\]\['eps'\]: .* is zero in float64",
    ),
    "hyper flag": (
        change(*GROUP, "maximize", 1),
        TypeError,
        r"^param_groups\[0\]\['maximize'\]: expected True or False",
    ),
    "structural": (
        change(*GROUP, "amsgrad", True),
        ValueError,
        r"^param_groups\[0\]: needs the states of amsgrad, not of adam",
    ),
    "state no dict": (change("state", []), TypeError, "^state: expected a dict, got list"),
    "state missing": (remove("state", 2), ValueError, "^state: 2 is missing"),
    "state more": (insert("state", 4, {}), ValueError, "^state: 4 is unknown"),
    "state text keys": (
        change("state", lambda state: {str(key): value for key, value in state.items()}),
        ValueError,
        "^state: 0 is missing",
    ),
    "entry no dict": (change(*STATE, None), TypeError, r"^state\[3\]: expected a dict, got NoneType"),
    "entry missing": (remove(*EXP), ValueError, r"^state\[3\]: 'exp_avg_sq' is missing"),
    "entry no step": (remove(*STATE, "step"), ValueError, r"^state\[3\]: 'step' is missing"),
    "entry unknown": (insert(*STATE, "velocity", np.zeros(3)), ValueError, r"^state\[3\]: 'velocity' is unknown"),
    "step negative": (
        change(*STATE, "step", -1),
        ValueError,
        r"^state\[3\]\['step'\]: expected an integer from 0 to 2\*\*62, got -1",
    ),
    "step float": (change(*STATE, "step", 2.0), (TypeError, ValueError), r"^state\[3\]\['step'\]: expected an integer"),
    "step bool": (change(*STATE, "step", True), (TypeError, ValueError), r"^state\[3\]\['step'\]: expected an integer"),
    "step None": (change(*STATE, "step", None), (TypeError, ValueError), r"^state\[3\]\['step'\]: expected an integer"),
    "step text": (change(*STATE, "step", "6"), (TypeError, ValueError), r"^state\[3\]\['step'\]: expected an integer"),
    "step huge": (
        change(*STATE, "step", 2**63),
        (TypeError, ValueError),
        r"^state\[3\]\['step'\]: expected an integer",
    ),
    "array list": (change(*EXP, lambda a: a.tolist()), TypeError, LABEL + "expected a NumPy array, got list"),
    "array None": (change(*EXP, None), TypeError, LABEL + "expected a NumPy array, got NoneType"),
    "array shape": (change(*EXP, lambda a: a[:1]), ValueError, LABEL + r"shape \(1, 3, 4\) does not match \(2, 3, 4\)"),
    "array flat": (change(*EXP, lambda a: a.ravel()), ValueError, LABEL + r"shape \(24,\) does not match \(2, 3, 4\)"),
    "array transposed": (change(*EXP, lambda a: a.T), ValueError, LABEL + r"shape \(4, 3, 2\) does not match"),
    "array dtype": (change(*EXP, lambda a: a.astype("f4")), TypeError, LABEL + "dtype float32 does not match float64"),
    "array integer": (change(*EXP, lambda a: a.astype(int)), TypeError, LABEL + "dtype int64 does not match float64"),
    "array byte order": (
        change(*EXP, lambda a: a.astype(">f8")),
        TypeError,
        LABEL + "dtype >f8 does not match float64",
    ),
    "array masked": (change(*EXP, lambda a: np.ma.masked_array(a, a < 1e9)), TypeError, LABEL),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_state_dict_changes_nothing(case):
    edit, error, message = BAD_STATES[case]
    source, _ = trained("Adam", steps=6)
    target, params = trained("Adam", steps=3, lr=0.02, betas=(0.5, 0.75))
    before, saved = snapshot(target), source.state_dict()
    assert before["counts"] != source.step_counts
    edit(saved)
    with pytest.raises(error, match=message):
        target.load_state_dict(saved)
    assert_same_snapshot(snapshot(target), before)

    # It is also as able to go on as before.
    control, others = trained("Adam", steps=3, lr=0.02, betas=(0.5, 0.75))
    run(target, params, range(3, 5))
    run(control, others, range(3, 5))
    for p, q in zip(params, others, strict=True):
        np.testing.assert_array_equal(p, q)
    target.load_state_dict(source.state_dict())
    assert target.step_counts == source.step_counts


@pytest.mark.parametrize("wrong", [None, [], 3, "state", np.zeros(3)], ids=lambda value: type(value).__name__)
def test_no_state_dict(wrong):
    opt, _ = trained("Adam")
    before = snapshot(opt)
    with pytest.raises(TypeError, match=r"^state_dict: expected a dict, got "):
        opt.load_state_dict(wrong)
    assert_same_snapshot(snapshot(opt), before)


@every_optimizer
def test_state_of_another_optimizer(name):
    opt, _ = trained(name)
    before = snapshot(opt)
    for other in OPTIMIZERS:
        saved = trained(other, steps=4)[0].state_dict()
        if class_name(other) != class_name(name):
            with pytest.raises(ValueError, match=rf"^optimizer: .*'{class_name(other)}', not of '{class_name(name)}'"):
                opt.load_state_dict(saved)
        elif before["states"][0].keys() != (saved["state"][0].keys() - {"step"}):
            with pytest.raises(ValueError, match=r"^param_groups\[0\]: needs the states of "):
                opt.load_state_dict(saved)
        else:
            continue
        assert_same_snapshot(snapshot(opt), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p[:3], "param"),
        (lambda p: [*p, np.zeros(3)], "param"),
        (lambda p: [{"params": p[:2]}, {"params": p[2:]}], "^param_groups: expected a list of 2 groups"),
        (lambda p: [p[1], p[0], p[2], p[3]], r"^state\[0\]\['exp_avg'\]: shape"),
        (lambda p: [a.astype(np.float32) for a in p], r"^state\[0\]\['exp_avg'\]: dtype"),
    ],
    ids=["fewer", "more", "groups", "order", "dtype"],
)
def test_state_for_other_parameters(make, message):
    saved = trained("Adam")[0].state_dict()
    opt = onepass.Adam(make(make_params()))
    before = snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    assert_same_snapshot(snapshot(opt), before)


def test_one_bad_group_of_two():
    def make():
        return onepass.Momentum([{"params": np.ones(9), "lr": 0.1}, {"params": np.ones(20), "lr": 0.2}])

    opt, saved = make(), make().state_dict()
    saved["param_groups"][0].update(lr=0.7, momentum=0.5)
    saved["param_groups"][1]["momentum"] = 1.0
    saved["state"][0]["velocity"][...] = 3.0
    saved["state"][0]["step"] = 5
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"^param_groups\[1\]\['momentum'\]: expected"):
        opt.load_state_dict(saved)
    assert_same_snapshot(snapshot(opt), before)
    saved["param_groups"][1]["momentum"] = 0.0
    opt.load_state_dict(saved)
    assert opt.step_counts == (5, 0)
    assert opt.lr == [0.7, 0.2]
    assert (opt.state[0]["velocity"] == 3.0).all()


def test_load_in_the_middle_of_a_step():
    made = []

    def reload(t):
        made[0].load_state_dict(made[1])
        return 0.1

    p = np.ones(9)
    opt = onepass.Adam(p, lr=reload)
    made += [opt, opt.state_dict()]
    made[1]["state"][0]["step"] = 7
    made[1]["state"][0]["exp_avg"][...] = 3.0
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        opt.step(np.ones(9))
    assert_same_snapshot(snapshot(opt), before)


# The state arrays themselves


@every_optimizer
def test_writing_into_a_state_counts(name):
    """A state set to zero steps like a state that was zero."""
    opt, params = trained(name)
    copies = [p.copy(order="K") for p in params]
    control = OPTIMIZERS[name](copies)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        for key in entry:
            if key != "step":
                entry[key] = np.zeros_like(entry[key])
    control.load_state_dict(saved)
    untouched = [p.copy(order="K") for p in params]
    going_on = OPTIMIZERS[name](untouched)
    going_on.load_state_dict(opt.state_dict())
    for param, state in zip(params, opt.state, strict=True):
        for array in state.values():
            assert array.flags.writeable
            assert not np.shares_memory(array, param)
            array[...] = 0
    for o, ps in ((opt, params), (control, copies), (going_on, untouched)):
        run(o, ps, range(6, 8))
    for p, q, r in zip(params, copies, untouched, strict=True):
        np.testing.assert_array_equal(p, q)
        assert class_name(name) == "SGD" or (p != r).any()


def test_a_velocity_given_by_hand():
    p = np.zeros(20)
    opt = onepass.Momentum(p, lr=0.1, momentum=0.5)
    opt.state[0]["velocity"][...] = np.arange(20.0)
    opt.step(np.zeros(20))
    np.testing.assert_array_equal(p, -0.5 * np.arange(20.0))


@every_optimizer
def test_state_entries_cannot_be_replaced(name):
    opt, _ = trained(name)
    before = snapshot(opt)
    for index, state in enumerate(opt.state):
        for key in [*state, "momentum_buffer"]:
            with pytest.raises(TypeError, match="assignment"):
                opt.state[index][key] = np.zeros(3)
        for key in list(state):
            with pytest.raises(TypeError, match="deletion"):
                del opt.state[index][key]
    with pytest.raises(TypeError, match="assignment"):
        opt.state[0] = {}
    for attribute in ("state", "step_counts"):
        with pytest.raises(AttributeError):
            setattr(opt, attribute, ())
    assert_same_snapshot(snapshot(opt), before)


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_states_are_like_their_parameters(name, dtype):
    params = make_params(dtype)
    opt = OPTIMIZERS[name](params)
    first = 0.1 if class_name(name) == "AdaGrad" else 0.0
    for param, state in zip(params, opt.state, strict=True):
        for array in state.values():
            assert type(array) is np.ndarray
            assert (array.shape, array.dtype, array.strides) == (param.shape, param.dtype, param.strides)
            np.testing.assert_array_equal(array, np.full(param.shape, first, dtype))
    assert opt.step_counts == (0, 0, 0, 0)

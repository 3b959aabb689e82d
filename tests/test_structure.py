"""Promise: parameters in any structure, gradients that mirror it, each parameter at its own step count and rates."""

from __future__ import annotations

import collections
import types

import numpy as np
import pytest

import onepass
from helpers import (
    CASES,
    CLASSES,
    FEW,
    arrays_of,
    assert_equal_optimizers,
    assert_moved,
    assert_same_bits,
    copied,
    hyper_names,
    make,
    numbers,
    numbers_like,
)
from onepass import schedules

SHAPES = [(3, 5), (4,), (), (2, 3, 2), (0, 2)]
DTYPES = [np.float32, np.float64, np.float32, np.float64, np.float32]
NAMES = ["fc0.weight", "fc0.bias", "scale", "conv", "nothing"]
STEPS = 3

# From flat arrays to the structure of parameters, and to that of gradients
STRUCTURES = {
    "array": (lambda a: a[0], lambda a: a[0]),
    "list": (list, list),
    "tuple": (tuple, tuple),
    "list-for-tuple": (tuple, list),
    "list-of-one": (lambda a: a[:1], lambda a: tuple(a[:1])),
    "dict": (lambda a: dict(zip(NAMES, a, strict=True)), lambda a: dict(zip(NAMES, a, strict=True))),
    "dict-in-another-order": (
        lambda a: dict(zip(NAMES, a, strict=True)),
        lambda a: dict(reversed(list(zip(NAMES, a, strict=True)))),
    ),
    "mapping": (
        lambda a: types.MappingProxyType(dict(zip(NAMES, a, strict=True))),
        lambda a: collections.ChainMap(dict(zip(NAMES, a, strict=True))),
    ),
    "dict-of-odd-keys": (
        lambda a: dict(zip([0, (1, "b"), None, "a'b", 2.5], a, strict=True)),
        lambda a: collections.OrderedDict(zip([0, (1, "b"), None, "a'b", 2.5], a, strict=True)),
    ),
    "groups-of-lists": (
        lambda a: [{"params": a[:2]}, {"params": a[2:]}],
        lambda a: [a[:2], tuple(a[2:])],
    ),
    "groups-of-all-kinds": (
        lambda a: (
            {"params": a[0]},
            {"params": dict(zip(NAMES[1:3], a[1:3], strict=True))},
            {"params": []},
            {"params": a[3:]},
            {"params": {}},
        ),
        lambda a: (a[0], dict(zip(NAMES[2:0:-1], a[2:0:-1], strict=True)), (), a[3:], {}),
    ),
    "one-group": (lambda a: [{"params": a}], lambda a: [a]),
    "a-group-for-each": (lambda a: [{"params": x} for x in a], list),
}


def parameters():
    return [numbers(shape, dtype, seed=k) for k, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True))]


def gradients(step):
    return [
        numbers(shape, dtype, seed=100 * step + k) for k, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True))
    ]


def alone(case, arrays, steps=STEPS, **more):
    """What separate optimizers, one for each array, make of copies of them: the copies and the optimizers."""
    plain = copied(arrays)
    opts = [make(case, p, **more) for p in plain]
    for step in range(1, steps + 1):
        for opt, g in zip(opts, gradients(step), strict=False):
            opt.step(g)
    return plain, opts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_gives_what_separate_optimizers_give(case, structure):
    of_params, of_grads = STRUCTURES[structure]
    params = parameters()
    count = len(arrays_of(of_params(params)))
    plain, opts = alone(case, params[:count])
    opt = make(case, of_params(params))
    for step in range(1, STEPS + 1):
        before = copied(params[:count])
        assert opt.step(of_grads(gradients(step))) is None
        assert_moved([b for b in before if b.size], [p for p in params[:count] if p.size])
    assert_same_bits(params[:count], plain)
    assert opt.step_counts == (STEPS,) * count
    assert len(opt.state) == count
    for state, one in zip(opt.state, opts, strict=True):
        assert_same_bits(dict(state), dict(one.state[0]))


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bound_gradients_are_read_at_each_step(case, structure):
    of_params, of_grads = STRUCTURES[structure]
    params = parameters()
    count = len(arrays_of(of_params(params)))
    buffers = [np.zeros_like(g) for g in gradients(1)]
    opt = make(case, of_params(params), grads=of_grads(buffers))
    for step in range(1, STEPS + 1):
        for buffer, g in zip(buffers, gradients(step), strict=True):
            buffer[...] = g
        before = copied(params[:count])
        opt.step()
        assert_moved([b for b in before if b.size], [p for p in params[:count] if p.size])
    plain, _ = alone(case, parameters()[:count])
    assert_same_bits(params[:count], plain)


def test_given_gradients_come_before_bound_ones():
    params, buffer, given = [numbers(4)], [numbers(4, seed=1)], [numbers(4, seed=2)]
    opt = onepass.SGD(params, lr=0.5, grads=buffer)
    opt.step(given)
    assert_same_bits(params[0], numbers(4) - np.float32(0.5) * given[0])
    opt.step([None])
    assert opt.step_counts == (1,)
    opt.step()
    assert_same_bits(params[0], numbers(4) - np.float32(0.5) * given[0] - np.float32(0.5) * buffer[0])


def test_the_structures_are_read_once():
    first, second, stranger = numbers(4), numbers(4, seed=1), numbers(4, seed=2)
    params = {"a": first, "b": second}
    groups = [{"params": [stranger], "lr": 0.5}]
    buffers = [numbers(4, seed=3)]
    by_name, by_group = onepass.SGD(params), onepass.SGD(groups, grads=[buffers])
    params["a"] = stranger
    params["c"] = stranger
    groups[0]["params"].append(first)
    groups[0]["lr"] = 7.0
    buffers[0] = None
    assert len(by_name.step_counts) == 2
    assert by_group.lr == 0.5
    before = copied([first, second, stranger])
    by_name.step({"a": numbers(4, seed=4), "b": numbers(4, seed=5)})
    by_group.step()
    assert_moved(before, [first, second, stranger])


# None


def pattern(k, step):
    """Parameter k has a gradient at every (k + 1)-th step."""
    return step % (k + 1) == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in ("array", "list-of-one")])
def test_a_parameter_without_gradient_stays_where_it_is(case, structure):
    of_params, of_grads = STRUCTURES[structure]
    params, plain = parameters(), parameters()
    opt, opts = make(case, of_params(params)), [make(case, p) for p in plain]
    for step in range(1, 8):
        given = [g if pattern(k, step) else None for k, g in enumerate(gradients(step))]
        before = copied(params)
        states = [copied(dict(state)) for state in opt.state]
        opt.step(of_grads(given))
        for k, g in enumerate(given):
            if g is None:
                assert_same_bits(params[k], before[k])
                assert_same_bits(dict(opt.state[k]), states[k])
            else:
                opts[k].step(g)
                if g.size:
                    assert_moved(before[k], params[k])
    assert opt.step_counts == (7, 3, 2, 1, 1)
    assert_same_bits(params, plain)
    for state, one in zip(opt.state, opts, strict=True):
        assert_same_bits(dict(state), dict(one.state[0]))


@pytest.mark.parametrize("case", FEW)
def test_no_gradient_at_all(case):
    params = parameters()
    opt = make(case, params, lr=lambda t: pytest.fail("nobody needs a learning rate"))
    opt.step([None] * 5)
    assert_same_bits(params, parameters())
    assert opt.step_counts == (0,) * 5
    single = make(case, params[0])
    single.step(None)
    assert single.step_counts == (0,)


def test_bound_none_is_a_parameter_without_gradient():
    params = {"a": numbers(4), "b": numbers(4, seed=1)}
    opt = onepass.Adam(params, grads={"b": numbers(4, seed=2), "a": None})
    opt.step()
    assert opt.step_counts == (0, 1)
    assert_same_bits(params["a"], numbers(4))
    assert_moved(numbers(4, seed=1), params["b"])
    idle = onepass.Adam(params, grads={"a": None, "b": None})
    idle.step()
    assert idle.step_counts == (0, 0)


def test_a_parameter_without_gradient_is_not_looked_at():
    frozen = numbers(4)
    opt = onepass.Adam([frozen, numbers(4, seed=1)])
    frozen.flags.writeable = False
    opt.step([None, numbers(4, seed=2)])
    assert opt.step_counts == (0, 1)
    with pytest.raises(ValueError, match=r"^params\[0\]: is read-only"):
        opt.step([numbers(4, seed=2)] * 2)
    assert opt.step_counts == (0, 1)


def test_schedules_see_the_count_of_each_parameter():
    seen = []

    def lr(t):
        seen.append(t)
        return 1.0 / t

    params, plain = [np.ones(2), np.ones(2), np.ones(2)], np.ones(2)
    opt = onepass.SGD(params, lr=lr)
    one = np.ones(2)
    for given in ([one, one, one], [one, None, None], [one, one, None], [one, one, one]):
        opt.step(given)
    assert opt.step_counts == (4, 3, 2)
    assert seen == [1, 2, 3, 2, 4, 3, 2]  # once for each count and group, however many parameters share it
    for p, count in zip(params, opt.step_counts, strict=True):
        plain = np.ones(2)
        for t in range(1, count + 1):
            plain = plain - 1.0 / t * one
        assert_same_bits(p, plain)


# Groups


def other_values(cls):
    """Another allowed value than the default for each hyper-parameter that may differ between groups and over time."""
    values = {
        "lr": 0.25,
        "betas": (0.5, 0.75),
        "momentum": 0.5,
        "dampening": 0.5,
        "rho": 0.5,
        "eps": 0.125,
        "eps_root": 0.25,
        "initial_accumulator": 2.0,
        "lr_decay": 0.5,
        "momentum_decay": 1.0,
        "weight_decay": 0.25,
        "l1": 0.125,
        "decoupled_weight_decay": True,
        "maximize": True,
        "lr_in_velocity": False,
        "bias_correction": False,
        "eps_hat": True,
    }
    if cls is onepass.AMSGrad:
        values["bias_correction"] = True
    if cls is onepass.RMSprop:
        del values["momentum"]
    return {name: value for name, value in values.items() if name in hyper_names(cls)}


ONE_OTHER = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}")
    for cls in CLASSES
    for name, value in other_values(cls).items()
]

# Without these, some hyper-parameters change nothing.
NEEDED = {
    "decoupled_weight_decay": {"weight_decay": 0.25},
    "eps_hat": {"eps": 0.5},
    "lr_in_velocity": {},
}


@pytest.mark.parametrize(("cls", "name", "value"), ONE_OTHER)
def test_a_group_has_its_own_hyper_parameters(cls, name, value):
    common = NEEDED.get(name, {})
    if name == "lr_in_velocity" and cls is onepass.RMSprop:
        common = {"momentum": 0.5}
    params, plain = parameters(), parameters()
    opt = cls([{"params": params[:2]}, {"params": params[2:], name: value}], **common)
    default, other = cls(plain[:2], **common), cls(plain[2:], **{**common, name: value})
    assert opt.param_groups[1][name] == value != opt.param_groups[0][name]
    lr = [opt.param_groups[0]["lr"], opt.param_groups[1]["lr"]]
    for step in range(1, STEPS + 1):
        # At a constant rate it makes no difference where the rate stands.
        for group, rate in zip(opt.param_groups, lr, strict=True):
            group["lr"] = rate / step
        default.lr, other.lr = lr[0] / step, lr[1] / step
        g = gradients(step)
        opt.step([g[:2], g[2:]])
        default.step(g[:2])
        other.step(g[2:])
    assert_same_bits(params, plain)

    # And the value makes a difference.
    same = parameters()
    as_default = cls(same[2:], **common)
    for step in range(1, STEPS + 1):
        as_default.lr = lr[0] / step
        as_default.step(gradients(step)[2:])
    assert (same[3] != params[3]).any()


@pytest.mark.parametrize(("cls", "name", "value"), ONE_OTHER)
def test_a_hyper_parameter_set_later_counts_from_then_on(cls, name, value):
    common = NEEDED.get(name, {})
    param, plain = numbers(20), numbers(20)
    if name in cls._construction_only:
        with pytest.raises(ValueError, match=f"^{name}: is only read"):
            cls(param).param_groups[0][name] = value
        return
    opt, twin = cls(param, **common), cls(plain, **{**common, name: value})
    opt.step(numbers(20, seed=1))
    opt.param_groups[0][name] = value
    assert opt.param_groups[0][name] == value
    twin.load_state_dict({**opt.state_dict(), "param_groups": twin.state_dict()["param_groups"]})
    plain[...] = param
    for step in range(2, 4):
        opt.step(numbers(20, seed=step))
        twin.step(numbers(20, seed=step))
    assert_same_bits(param, plain)
    assert_equal_optimizers(opt, twin)


def test_groups_may_need_different_rules():
    params, plain = parameters(), parameters()
    opt = onepass.RMSprop(
        [
            {"params": params[0]},
            {"params": params[1], "centered": True},
            {"params": params[2:], "momentum": 0.5, "centered": True},
        ]
    )
    opts = [
        onepass.RMSprop(plain[0]),
        onepass.RMSprop(plain[1], centered=True),
        onepass.RMSprop(plain[2:], momentum=0.5, centered=True),
    ]
    for step in range(1, STEPS + 1):
        g = gradients(step)
        opt.step([g[0], g[1], g[2:]])
        for one, given in zip(opts, (g[0], g[1], g[2:]), strict=True):
            one.step(given)
    assert_same_bits(params, plain)
    assert [list(state) for state in opt.state] == [
        ["square_avg"],
        ["square_avg", "grad_avg"],
        *[["square_avg", "grad_avg", "velocity"]] * 3,
    ]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_learning_rate_for_each_layer_and_a_schedule(cls):
    params, plain = parameters(), parameters()
    rates = [0.5, schedules.inverse_time(0.5, decay=0.5), lambda t: 0.25 / t, 0.125, 0.0625]
    opt = cls([{"params": p, "lr": lr} for p, lr in zip(params, rates, strict=True)])
    opts = [cls(p, lr=lr) for p, lr in zip(plain, rates, strict=True)]
    assert opt.lr == rates
    for step in range(1, STEPS + 1):
        opt.step(gradients(step))
        for one, g in zip(opts, gradients(step), strict=True):
            one.step(g)
    assert_same_bits(params, plain)
    opt.lr = 0.75
    assert opt.lr == 0.75
    assert [group["lr"] for group in opt.param_groups] == [0.75] * 5
    opt.param_groups[2]["lr"] = 0.5
    assert opt.lr == [0.75, 0.75, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_param_groups_are_mappings(cls):
    params = parameters()
    opt = cls([{"params": params[:3]}, {"params": dict(zip("ab", params[3:], strict=True)), "lr": 0.5}], lr=0.25)
    first, second = opt.param_groups
    assert isinstance(first, onepass.ParamGroup)
    assert next(iter(first)) == "params"
    assert set(first) >= {"params", *hyper_names(cls)}
    assert len(first) == len(list(first)) == len(set(first))
    assert [id(p) for p in first["params"]] == [id(p) for p in params[:3]]
    assert [id(p) for p in second["params"]] == [id(p) for p in params[3:]]
    assert (first["lr"], second["lr"]) == (0.25, 0.5)
    assert "lr" in first
    assert "learning_rate" not in first
    assert first.get("learning_rate", 3) == 3
    assert dict(second)["maximize"] is False
    first.update(lr=0.125, maximize=True)
    assert (first["lr"], first["maximize"], second["lr"], second["maximize"]) == (0.125, True, 0.5, False)
    first["lr"] = 0.0625
    assert opt.lr == [0.0625, 0.5]
    assert repr(first).startswith("ParamGroup(3 parameters, lr=0.0625, ")
    assert repr(second).startswith("ParamGroup(2 parameters, lr=0.5, ")
    assert opt.param_groups is not None
    assert len(opt.param_groups) == 2
    with pytest.raises((AttributeError, TypeError)):
        opt.param_groups = []
    with pytest.raises(TypeError):
        opt.param_groups[0] = {}


def test_groups_can_be_compared():
    opt = onepass.SGD([{"params": numbers(3)}, {"params": numbers(3)}])
    first, second = opt.param_groups
    assert first == first
    assert first != second


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_values_are_stored_as_plain_types(cls):
    given = {
        "lr": np.float32(0.25),
        "betas": [np.float64(0.5), np.float32(0.75)],
        "maximize": np.True_,
        "weight_decay": 1,
        "momentum": np.float16(0.5),
        "eps": np.int64(1),
    }
    opt = cls(numbers(3), **{name: value for name, value in given.items() if name in hyper_names(cls)})
    for name, value in opt.param_groups[0].items():
        if name == "betas":
            assert [type(beta) for beta in value] == [float, float]
            assert value == (0.5, 0.75)
        elif name != "params":
            assert type(value) in (float, bool, type(None)), name
            assert name not in given or value == given[name]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_repr(cls):
    one = repr(cls(numbers(3), lr=0.25))
    assert one.startswith(f"{cls.__name__}(1 parameter")
    assert "{lr=0.25, " in one
    assert all(f"{name}=" in one for name in hyper_names(cls))
    assert "array" not in one
    two = repr(cls([{"params": parameters()[:2]}, {"params": parameters()[2:], "lr": 0.5}], lr=0.25))
    assert two.startswith(f"{cls.__name__}(5 parameters, ")
    assert "{lr=0.25, " in two
    assert "{lr=0.5, " in two


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_states_and_counts_cannot_be_replaced(cls):
    opt = cls(parameters())
    opt.step(gradients(1))
    with pytest.raises((AttributeError, TypeError)):
        opt.state = ()
    with pytest.raises((AttributeError, TypeError)):
        opt.step_counts = (0,) * 5
    with pytest.raises(TypeError):
        opt.state[0]["new"] = np.zeros(3)
    with pytest.raises(TypeError):
        opt.state[0] = {}
    assert opt.step_counts == (1,) * 5


# What comes back in the structure


WEIGHTS = {
    "array": lambda w: [w],
    "list": list,
    "tuple": list,
    "dict": lambda w: [w[name] for name in NAMES],
    "groups-of-lists": lambda w: [*w[0], *w[1]],
    "groups-of-all-kinds": lambda w: [w[0], w[1]["fc0.bias"], w[1]["scale"], *w[3]],
    "a-group-for-each": list,
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("structure", WEIGHTS)
def test_the_weights_of_nag_come_in_the_structure_of_the_parameters(structure, inside):
    of_params, of_grads = STRUCTURES[structure]
    params = parameters()
    opt = onepass.NAG(of_params(params), lr=0.25, momentum=0.5, lr_in_velocity=inside)
    assert_same_bits(WEIGHTS[structure](opt.weights()), arrays_of(of_params(params)))  # the velocity is 0
    for step in range(1, STEPS + 1):
        opt.step(of_grads(gradients(step)))
    weights = opt.weights()
    if structure.startswith("dict"):
        assert list(weights) == NAMES
    if structure == "groups-of-all-kinds":
        assert (weights[2], weights[4]) == ([], {})
    flat = WEIGHTS[structure](weights)
    assert len(flat) == len(opt.state)
    for w, p, state in zip(flat, params, opt.state, strict=False):
        assert type(w) is np.ndarray
        assert not np.shares_memory(w, p)
        assert_same_bits(w, np.asarray(p + p.dtype.type(0.5 if inside else 0.125) * state["velocity"]))
        if w.size:
            assert_moved(p, w)


# Dtypes


@pytest.mark.parametrize("case", CASES)
def test_float32_and_float64_parameters_in_one_optimizer(case):
    # As close as their precisions are, and no closer: each is computed in its own.
    single = numbers(40, seed=1)
    double = single.astype(np.float64)
    opt = make(case, [single, double])
    for step in range(1, 4):
        g = numbers(40, seed=10 + step)
        opt.step([g, g.astype(np.float64)])
    assert [{a.dtype for a in state.values()} for state in opt.state] in (
        [{np.dtype(np.float32)}, {np.dtype(np.float64)}],
        [set(), set()],
    )
    np.testing.assert_allclose(single, double, rtol=2e-4)
    assert (single != double).any()
    assert_moved(numbers(40, seed=1), single)


@pytest.mark.parametrize("case", FEW)
def test_an_optimizer_per_call_of_copied_arrays_is_its_own(case):
    # Nothing is shared between optimizers: not states, not defaults, not counts.
    first, second = parameters(), parameters()
    a, b = make(case, first), make(case, second)
    a.step([numbers_like(p, seed=5) for p in first])
    assert_same_bits(second, parameters())
    assert b.step_counts == (0,) * 5
    assert all((array == 0).all() for state in b.state for array in state.values())
    a.lr = 0.5
    assert b.lr != 0.5

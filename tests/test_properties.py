"""Promise: whatever the structure, layout, dtype, options and order of events, the bits are those of the plainest step.

The plainest step: one contiguous array at a time, each with an optimizer of its own, on scalar code and one thread.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import onepass
from helpers import CASES, assert_equal_optimizers, assert_same_bits, copied, guarded, make, numbers
from helpers import settings as machine

quick = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

STEPS = 3
SURROUNDINGS = {
    "lr": [0.5, 0.0625, 1e-3],
    "weight_decay": [0.0, 0.125, 0.01],
    "decoupled_weight_decay": [False, True],
    "l1": [0.0, 0.03125, 1e-3],
    "maximize": [False, True],
}


@dataclass(frozen=True)
class Layout:
    """A shape, a dtype, and how a parameter and its gradient of that shape lie in memory."""

    shape: tuple[int, ...]
    dtype: str
    seed: int
    axes: tuple[int, ...]  # of the parameter, from the slowest to the fastest
    offset: int
    grad_axes: tuple[int, ...]
    steps: tuple[int, ...]  # of the gradient along each axis: 0 repeats one element, 2 leaves gaps, -1 runs backwards
    gradients: tuple[bool, ...] = field(default=(True,) * STEPS)  # at which steps there is one

    def param(self):
        return guarded(self.shape, self.dtype, axes=self.axes, offset=self.offset, seed=self.seed)

    def gradient(self, step):
        """A view that lies as it shall, or None."""
        if not self.gradients[step]:
            return None
        big = [max(1, abs(s)) * n if s else 1 for n, s in zip(self.shape, self.steps, strict=True)]
        memory = numbers([big[a] for a in self.grad_axes], self.dtype, seed=1000 * (step + 1) + self.seed)
        view = memory.transpose(np.argsort(np.array(self.grad_axes, dtype=int)))
        view = view[(..., *[slice(None, None, s or 1) for s in self.steps])]
        return np.broadcast_to(view, self.shape)


@st.composite
def layouts(draw, *, with_none=True):
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    else:  # beyond the lanes and tails of every instruction set, and beyond a block that is gathered
        shape = (draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 300)))
    order = st.permutations(range(len(shape))).map(tuple)
    step = st.sampled_from([1, 1, 1, 2, 3, 0, -1, -2])
    return Layout(
        shape=shape,
        dtype=draw(st.sampled_from(["float32", "float64"])),
        seed=draw(st.integers(0, 500)),
        axes=draw(order),
        offset=draw(st.integers(0, 15)),
        grad_axes=draw(order),
        steps=tuple(draw(step) for _ in shape),
        gradients=tuple(draw(st.booleans()) if with_none else True for _ in range(STEPS)),
    )


@st.composite
def options(draw):
    """The name of a case and options that every optimizer takes."""
    case = draw(st.sampled_from(sorted(CASES)))
    more = {name: draw(st.sampled_from(values)) for name, values in SURROUNDINGS.items()}
    if CASES[case][0] is onepass.AdamW:
        del more["decoupled_weight_decay"]
    return case, {name: value for name, value in more.items() if name not in CASES[case][1]}


@st.composite
def partitions(draw, count):
    """Numbers 0 .. count - 1 in groups, in any order; some groups may be empty."""
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


KINDS = ("list", "tuple", "dict")


def mirror(kind, indices, arrays, *, turned=False):
    """The arrays of those indices as a list, a tuple or a dict; `turned`: the dict's keys in another order."""
    if kind == "dict":
        pairs = [(f"layer{i}", arrays[i]) for i in indices]
        return dict(reversed(pairs) if turned else pairs)
    return (list if kind == "list" else tuple)(arrays[i] for i in indices)


def plainest(case, more, tensors, *, steps=range(STEPS)):
    """The parameters after the steps, and their optimizers."""
    params, opts = [], []
    with machine(threads=1, isa="scalar"):
        for tensor in tensors:
            param = np.ascontiguousarray(tensor.param()[0]).reshape(tensor.shape).copy()
            opt = make(case, param, **more)
            for step in steps:
                gradient = tensor.gradient(step)
                if gradient is not None:
                    opt.step(np.ascontiguousarray(gradient).reshape(tensor.shape))
            params.append(param)
            opts.append(opt)
    return params, opts


def assert_went(case, more, params, tensors, expected, opts, opt, order):
    """`params`, stepped by `opt` in the order `order`, are as expected, and they went somewhere."""
    assert_same_bits(params, expected)
    assert opt.step_counts == tuple(sum(tensors[i].gradients) for i in order)
    for i, state in zip(order, opt.state, strict=True):
        assert_same_bits(dict(state), dict(opts[i].state[0]))
    for param, tensor in zip(params, tensors, strict=True):
        if param.size and any(tensor.gradients):
            assert (param != tensor.param()[0]).any()


@quick
@given(
    chosen=options(),
    tensors=st.lists(layouts(), min_size=1, max_size=5),
    kind=st.sampled_from(KINDS),
    isa=st.sampled_from(onepass.available_isas()),
    threads=st.integers(1, 3),
)
def test_any_layouts_and_structure(chosen, tensors, kind, isa, threads):
    case, more = chosen
    expected, opts = plainest(case, more, tensors)
    params, guards = zip(*[tensor.param() for tensor in tensors], strict=True)
    order = range(len(params))
    with machine(threads=threads, isa=isa):
        opt = make(case, mirror(kind, order, params), **more)
        for step in range(STEPS):
            gradients = [tensor.gradient(step) for tensor in tensors]
            opt.step(mirror(kind, order, gradients, turned=step == 1))
    assert_went(case, more, list(params), tensors, expected, opts, opt, order)
    assert all(untouched() for untouched in guards)


@quick
@given(data=st.data(), chosen=options(), tensors=st.lists(layouts(), min_size=1, max_size=6))
def test_any_partition_into_groups(data, chosen, tensors):
    case, more = chosen
    expected, opts = plainest(case, more, tensors)
    params = [tensor.param()[0] for tensor in tensors]
    parts = data.draw(partitions(len(params)))
    kinds = [data.draw(st.sampled_from(KINDS)) for _ in parts]
    # What all groups share may stand in the constructor's arguments or in each group, the constructor's then ignored.
    inside = data.draw(st.booleans())
    own = more if inside else {}
    opt = make(
        case,
        [{"params": mirror(kind, part, params), **own} for kind, part in zip(kinds, parts, strict=True)],
        **({**more, "lr": 123.0} if inside and "lr" in more else more),
    )
    for step in range(STEPS):
        gradients = [tensor.gradient(step) for tensor in tensors]
        opt.step([mirror(kind, part, gradients, turned=True) for kind, part in zip(kinds, parts, strict=True)])
    assert_went(case, more, params, tensors, expected, opts, opt, [i for part in parts for i in part])


@quick
@given(data=st.data(), tensors=st.lists(layouts(), min_size=2, max_size=5))
def test_groups_with_options_of_their_own(data, tensors):
    case, _ = data.draw(options())
    rest = {name for name in SURROUNDINGS if name not in CASES[case][1]} - (
        {"decoupled_weight_decay"} if CASES[case][0] is onepass.AdamW else set()
    )
    own = [{name: data.draw(st.sampled_from(SURROUNDINGS[name])) for name in sorted(rest)} for _ in tensors]
    params = [tensor.param()[0] for tensor in tensors]
    opt = make(case, [{"params": p, **more} for p, more in zip(params, own, strict=True)])
    for step in range(STEPS):
        opt.step([tensor.gradient(step) for tensor in tensors])
    for k, tensor in enumerate(tensors):
        expected, opts = plainest(case, own[k], [tensor])
        assert_same_bits([params[k]], expected)
        assert_same_bits(dict(opt.state[k]), dict(opts[0].state[0]))
        if params[k].size and any(tensor.gradients):
            assert (params[k] != tensor.param()[0]).any()


@quick
@given(
    chosen=options(),
    tensors=st.lists(layouts(), min_size=1, max_size=4),
    when=st.integers(0, STEPS),
    grouped=st.booleans(),
    drift=st.booleans(),
)
def test_a_state_dict_goes_on_where_it_was_taken(chosen, tensors, when, grouped, drift):
    case, more = chosen

    def build(params, **changed):
        given = [{"params": [p]} for p in params] if grouped else params
        return make(case, given, **{**more, **changed})

    def step(opt, k):
        gradients = [tensor.gradient(k) for tensor in tensors]
        opt.step([[g] for g in gradients] if grouped else gradients)

    params = [tensor.param()[0] for tensor in tensors]
    opt = build(params)
    for k in range(when):
        step(opt, k)
        if drift:
            opt.param_groups[-1]["lr"] = 0.25 / (k + 1)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other_params = copied(params)
    for k in range(when, STEPS):
        step(opt, k)

    # Into an optimizer that has been elsewhere, with other hyper-parameters: all of it is replaced.
    other = build([p.copy() for p in other_params], lr=0.375)
    for k in range(STEPS):
        step(other, k)
    fresh = build(other_params, lr=0.75)
    fresh.load_state_dict(saved)
    other.load_state_dict(saved)
    assert_equal_optimizers(fresh, other)
    assert fresh.state_dict()["param_groups"] == saved["param_groups"] == kept["param_groups"]
    for k in range(when, STEPS):
        step(fresh, k)
    assert_same_bits(other_params, params)
    assert_equal_optimizers(fresh, opt)
    for param, tensor in zip(params, tensors, strict=True):
        if param.size and any(tensor.gradients):
            assert (param != tensor.param()[0]).any()
    assert saved["state"].keys() == kept["state"].keys()
    for index, entry in saved["state"].items():  # the copy is nobody's memory
        assert entry.pop("step") == kept["state"][index].pop("step")
        assert_same_bits(entry, kept["state"][index])


@quick
@example(count=17, lanes_off=3, seed=0, case="Adam")
@given(
    count=st.integers(0, 2000),
    lanes_off=st.integers(0, 63),
    seed=st.integers(0, 99),
    case=st.sampled_from(sorted(CASES)),
)
def test_a_tensor_and_its_parts_give_the_same_bits(count, lanes_off, seed, case):
    # An element's arithmetic does not know where in its array, vector or block it stands.
    whole, parts = numbers(count, seed=seed), numbers(count, seed=seed)
    cut = min(count, lanes_off * max(1, count // 64))
    a, b = make(case, whole), make(case, [parts[:cut], parts[cut:]])
    for step in range(STEPS):
        gradient = numbers(count, seed=1000 + 100 * step + seed)
        before = whole.copy()
        a.step(gradient)
        b.step([gradient[:cut], gradient[cut:]])
        assert math.prod(before.shape) == 0 or (before != whole).all()
    assert_same_bits(whole, parts)
    for name, array in a.state[0].items():
        assert_same_bits(array, np.concatenate([b.state[0][name], b.state[1][name]]))


def test_the_layouts_cover_what_they_shall():
    tensor = Layout((2, 3, 4), "float32", 1, (1, 2, 0), 3, (2, 0, 1), (0, -2, 3))
    param, _ = tensor.param()
    assert param.strides == (4, 32, 8)
    assert param.ctypes.data % 64 == 3
    gradient = tensor.gradient(0)
    assert gradient.shape == (2, 3, 4)
    assert gradient.strides[0] == 0
    assert gradient.strides[1] < 0 < gradient.strides[2]
    assert np.isfinite(gradient).all()
    assert (gradient != 0).all()
    assert Layout((2,), "float64", 1, (0,), 0, (0,), (1,), (True, False, True)).gradient(1) is None

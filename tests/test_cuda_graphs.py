"""Promise: a step that is captured into a CUDA graph does at each launch what the host's next step would have done."""

from __future__ import annotations

import contextlib
import gc
import math

import numpy as np
import pytest

import cuda_arrays
import onepass
from cuda_arrays import Twin, assert_same, assert_same_number, cp, on_device, on_host, require_two_devices
from helpers import numbers
from reference.expressions import assert_same_bits
from training import BFLOAT16, FEW, OPTIMIZERS, Kind, make

pytestmark = pytest.mark.cuda

REPLAYS = 100
SCHEDULED = {
    "lr": lambda t: 0.05 / math.sqrt(t),
    "ema_decay": lambda t: 1 - 1 / (t + 1),
    "gradient_noise": (0.1, 0.55),
    "weight_decay": 0.01,
    "seed": 2**63 + 1,
}


@contextlib.contextmanager
def captured(stream=None):
    """A list into which the graph of what is enqueued in the block comes."""
    stream = cp.cuda.Stream(non_blocking=True) if stream is None else stream
    stream.synchronize()
    cp.cuda.Device().synchronize()
    graphs = []
    with stream:
        stream.begin_capture()
        try:
            yield graphs
        finally:
            graph = stream.end_capture()
        graphs.append(graph)


def launched(graph, times=1):
    stream = cp.cuda.Stream(non_blocking=True)
    for _ in range(times):
        graph.launch(stream)
    stream.synchronize()


def arrays():
    return [
        numbers(33),
        numbers((5, 7), np.float64, seed=1),
        numbers((3, 4), BFLOAT16, seed=2),
        np.ones((), np.float32),
    ]


class Loop:
    """One training by host steps, and one by launches of a graph, from the same arrays and gradients."""

    def __init__(self, name, options, step, steps, params=None, **more):
        self.host = arrays() if params is None else params
        self.device = on_device(self.host)
        self.grads = [numbers(array.shape, array.dtype, seed=9 + k) for k, array in enumerate(self.host)]
        self.gradients = [Twin(grad) for grad in self.grads]
        self.given = [twin.array for twin in self.gradients]
        self.opts = [make(name, params, **options, **more) for params in (self.host, self.device)]
        self.step = step
        self.opts[1].prepare_capture(steps)

    def set(self, grads):
        for twin, grad, new in zip(self.gradients, self.grads, grads, strict=True):
            grad[...] = new
            twin.set(new)

    def capture(self):
        with captured() as graphs:
            self.opts[1].step(self.given, **self.step)
        return graphs[0]

    def compare(self, what=""):
        a, b = self.opts
        assert_same(self.device, self.host, what)
        for x, y in zip(b.state, a.state, strict=True):
            assert_same(dict(x), dict(y), what)
        assert_same_number(b.grad_norm, a.grad_norm, what)
        assert (b.step_counts, b.skipped) == (a.step_counts, a.skipped), what


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_replays(name):
    """With schedules and noise; the gradients change between launches."""
    loop = Loop(name, SCHEDULED, {"max_grad_norm": 30.0}, REPLAYS)
    before = on_host(loop.device)
    graph = loop.capture()
    assert_same(loop.device, before, "a capture runs nothing")
    for k in range(REPLAYS):
        loop.opts[0].step(loop.grads, **loop.step)
        launched(graph)
        if k % 25 == 24:
            loop.set([numbers(grad.shape, grad.dtype, seed=k + i) for i, grad in enumerate(loop.grads)])
            loop.compare(f"after {k + 1}")
    assert loop.opts[1].step_counts == (REPLAYS,) * 4


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic"}, {"max_unit_norm": (1.0, 0)}], ids=str)
@pytest.mark.parametrize("step", [{}, {"clip_norm": 2.0}, {"zero_grads": True, "nonfinite": "skip"}, {"clip_value": 1}])
@pytest.mark.parametrize("name", FEW)
def test_options_in_a_graph(name, options, step):
    params = arrays()[:3] if "max_unit_norm" in options else None
    loop = Loop(name, {**SCHEDULED, **options}, step, 12, params)
    graph = loop.capture()
    for _ in range(12):
        loop.opts[0].step(loop.grads, **step)
        launched(graph)
    loop.compare()
    assert_same([twin.array for twin in loop.gradients], loop.grads)


@pytest.mark.parametrize("name", FEW)
def test_split_masters_mirrors_and_odd_layouts_in_a_graph(name):
    kinds = [Kind((33,), "bfloat16", offset=3), Kind((7, 11), "bfloat16", axes=(1, 0), mirror="float16")]
    host = [kind.param(k)[0] for k, kind in enumerate(kinds)]
    device = [Twin(array) for array in host]
    mirrors = [None, np.zeros((7, 11), np.float16)]
    shown = on_device(mirrors)
    grads = [kind.gradient(k) for k, kind in enumerate(kinds)]
    gradients = on_device(grads)
    a = make(name, host, master="split", mirror=mirrors, ema_decay=0.5)
    b = make(name, [twin.array for twin in device], master="split", mirror=shown, ema_decay=0.5)
    b.prepare_capture(10)
    with captured() as graphs:
        b.step(gradients, max_grad_norm=1.0)
    for _ in range(10):
        a.step(grads, max_grad_norm=1.0)
        launched(graphs[0])
    for k in range(2):
        assert_same_bits(device[k].get(), host[k])
        assert_same(dict(b.state[k]), dict(a.state[k]))
    assert_same(shown, mirrors)


def test_several_launches_without_waiting():
    loop = Loop("Adam", SCHEDULED, {"max_grad_norm": 1.0}, 50)
    graph = loop.capture()
    launched(graph, 50)
    for _ in range(50):
        loop.opts[0].step(loop.grads, **loop.step)
    loop.compare()


def test_skips_in_a_graph():
    """Each launch decides by itself, and a skipped one does not count."""
    for step in ({"nonfinite": "skip"}, {"nonfinite": "skip", "max_grad_norm": 5.0, "zero_grads": False}):
        loop = Loop("AdamW", SCHEDULED, step, 40)
        graph = loop.capture()
        bad = (0, 1, 7, 20, 21, 22, 39)
        for k in range(40):
            grads = [numbers(grad.shape, grad.dtype, seed=k + i) for i, grad in enumerate(loop.grads)]
            if k in bad:
                grads[k % 3].reshape(-1)[-1] = (np.nan, np.inf)[k % 2]
            loop.set(grads)
            loop.opts[0].step(loop.grads, **step)
            launched(graph)
            if k % 10 == 0:
                loop.compare(f"launch {k}")
        loop.compare()
        assert loop.opts[1].skipped == len(bad)
        assert loop.opts[1].step_counts == (40 - len(bad),) * 4


def test_steps_before_between_and_after_launches():
    """Plain steps take their turns with launches; prepared or not."""
    loop = Loop("Adam", SCHEDULED, {"max_grad_norm": 5.0}, 0)
    a, b = loop.opts

    def both(**step):
        a.step(loop.grads, **step)
        b.step(loop.given, **step)

    both()
    both(nonfinite="skip")
    b.prepare_capture(20)
    assert b.step_counts == a.step_counts == (2,) * 4
    both()
    graph = loop.capture()
    for _ in range(3):
        a.step(loop.grads, **loop.step)
        launched(graph)
        both(nonfinite="skip", max_grad_norm=1.0)
    loop.compare("between")
    b.prepare_capture(0)
    assert b.step_counts == a.step_counts == (9,) * 4
    both()
    both(max_grad_norm=1.0)
    loop.compare("after")


def test_no_launch_goes_beyond_what_was_prepared():
    loop = Loop("Adam", SCHEDULED, {"max_grad_norm": 1.0}, 3)
    graph = loop.capture()
    for _ in range(3):
        loop.opts[0].step(loop.grads, **loop.step)
    launched(graph, 3)
    loop.compare()
    launched(graph, 2)
    assert_same(loop.device, loop.host)
    for x, y in zip(loop.opts[1].state, loop.opts[0].state, strict=True):
        assert_same(dict(x), dict(y))
    for look in (
        lambda: loop.opts[1].step_counts,
        lambda: loop.opts[1].skipped,
        loop.opts[1].state_dict,
        lambda: loop.opts[1].prepare_capture(5),
    ):
        with pytest.raises(RuntimeError, match=r"2 captured steps ran beyond .*prepare_capture\(\).*changed nothing"):
            look()
    assert_same(loop.device, loop.host)
    assert loop.opts[1].step_counts == loop.opts[0].step_counts  # back at the host, and right
    loop.opts[1].prepare_capture(5)
    loop.opts[1].prepare_capture(0)


def test_left_out_steps_leave_what_lies_oddly():
    """Arrays that go through scratch memory, some of which are written and never read."""
    host = [numbers((7, 11)), numbers(33, seed=1)]
    device = on_device(host)
    shown = [Twin(np.asfortranarray(np.zeros((7, 11), np.float16))), Twin(np.zeros(33, BFLOAT16), offset=1)]
    grads = on_device([numbers((7, 11), seed=2), numbers(33, seed=3)])
    opt = onepass.Adam(device, mirror=[twin.array for twin in shown], ema_decay=0.5)
    opt.prepare_capture(2)
    with captured() as graphs:
        opt.step(grads)
    launched(graphs[0], 2)
    before = on_host(device), [twin.get() for twin in shown], on_host([dict(state) for state in opt.state])
    assert_same_bits(before[1][0], before[0][0].astype(np.float16))
    launched(graphs[0], 3)
    for twin, want in zip(shown, before[1], strict=True):
        assert_same_bits(twin.get(), want)
        assert twin.untouched()
    assert_same(device, before[0])
    assert_same([dict(state) for state in opt.state], before[2])


def test_preparing_again():
    loop = Loop("Adam", SCHEDULED, {}, 5)
    for again in (5, 7, 1):
        loop.opts[1].prepare_capture(again)
        graph = loop.capture()
        for _ in range(again):
            loop.opts[0].step(loop.grads)
        launched(graph, again)
        loop.compare()
        del graph
    assert loop.opts[1].step_counts == (13,) * 4


def test_two_graphs_of_two_halves():
    """Groups that are stepped apart count apart."""
    host = [numbers(10), numbers((3, 4), seed=1)]
    device = on_device(host)
    grads = [numbers(10, seed=2), numbers((3, 4), seed=3)]
    gradients = on_device(grads)

    def groups(params):
        return [{"params": [params[0]], "lr": lambda t: 0.1 / t}, {"params": [params[1]], "weight_decay": 0.1}]

    a, b = onepass.AdamW(groups(host), ema_decay=0.5), onepass.AdamW(groups(device), ema_decay=0.5)
    b.prepare_capture(30)
    halves = [([grads[0]], [None]), ([None], [grads[1]])]
    with captured() as first:
        b.step([[gradients[0]], [None]], max_grad_norm=1.0)
    with captured() as second:
        b.step([[None], [gradients[1]]], nonfinite="skip")
    with captured() as whole:
        b.step([[gradients[0]], [gradients[1]]])
    for k in (0, 0, 1, 2, 0, 1, 2, 2):
        launched((first, second, whole)[k][0])
        a.step(
            list(halves[k]) if k < 2 else [[grads[0]], [grads[1]]],
            **({"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {})[k],
        )
        assert_same(device, host)
    assert b.step_counts == a.step_counts == (6, 5)
    for x, y in zip(b.state, a.state, strict=True):
        assert_same(dict(x), dict(y))


def test_one_graph_of_many_steps():
    loop = Loop("Nadam", SCHEDULED, {"max_grad_norm": 1.0}, 12)
    with captured() as graphs:
        for _ in range(4):
            loop.opts[1].step(loop.given, **loop.step)
    launched(graphs[0], 3)
    for _ in range(12):
        loop.opts[0].step(loop.grads, **loop.step)
    loop.compare()


class TwoDevices:
    def __init__(self):
        require_two_devices()
        self.host = [numbers(33), numbers(100, seed=1)]
        self.device = [on_device(array, d) for d, array in enumerate(self.host)]
        self.grads = [numbers(33, seed=2), numbers(100, seed=3)]
        self.gradients = [on_device(array, d) for d, array in enumerate(self.grads)]
        self.opts = [onepass.Adam(params, lr=lambda t: 0.1 / t) for params in (self.host, self.device)]
        self.opts[1].prepare_capture(10)
        with cp.cuda.Device(1):
            self.stream = cp.cuda.Stream(non_blocking=True)

    @contextlib.contextmanager
    def current(self):
        """The second device's stream is the current one there."""
        with cp.cuda.Device(1):
            self.stream.use()
        try:
            yield
        finally:
            with cp.cuda.Device(1):
                cp.cuda.Stream.null.use()


@pytest.mark.parametrize("step", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_a_graph_over_two_devices(step):
    """The second device's stream is forked off the one that is captured, and joined to it."""
    two = TwoDevices()
    stream = cp.cuda.Stream(non_blocking=True)
    with two.current(), captured(stream) as graphs:
        begun = stream.record()
        with cp.cuda.Device(1):
            two.stream.wait_event(begun)
        two.opts[1].step(two.gradients, **step)
        with cp.cuda.Device(1):
            done = two.stream.record()
        stream.wait_event(done)
    for _ in range(10):
        two.opts[0].step(two.grads, **step)
        launched(graphs[0])
    assert_same(two.device, two.host)
    assert two.opts[1].step_counts == two.opts[0].step_counts


@pytest.mark.parametrize("step", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_a_capture_of_one_of_two_devices(step):
    """The other one's part would run at once, and be in no graph."""
    two = TwoDevices()
    before = on_host(two.device)
    with two.current(), captured(), pytest.raises(RuntimeError, match=r"captur.*device 1|device 1.*captur"):
        two.opts[1].step(two.gradients, **step)
    assert_same(two.device, before)
    assert two.opts[1].step_counts == (0, 0)


# What is refused


def test_a_capture_without_preparation():
    loop = Loop("Adam", {}, {}, 5)
    loop.opts[1].prepare_capture(0)
    before = on_host(loop.device)
    with captured(), pytest.raises(RuntimeError, match=r"captured.*prepare_capture\(\) before the capture"):
        loop.opts[1].step(loop.given)
    assert_same(loop.device, before)
    assert loop.opts[1].step_counts == (0,) * 4
    loop.opts[1].step(loop.given)
    loop.opts[0].step(loop.grads)
    loop.compare()


def test_what_a_capture_cannot_have():
    loop = Loop("Adam", {}, {}, 5)
    before = on_host(loop.device)
    with captured(), pytest.raises(ValueError, match=r"nonfinite: 'raise' waits for the device"):
        loop.opts[1].step(loop.given, nonfinite="raise")
    assert_same(loop.device, before)
    graph = loop.capture()
    launched(graph, 5)
    for _ in range(5):
        loop.opts[0].step(loop.grads)
    loop.compare()


def test_parts_of_a_cohort():
    loop = Loop("Adam", {}, {}, 5)
    before = on_host(loop.device)
    some = [loop.given[0], None, loop.given[2], None]
    with pytest.raises(ValueError, match=r"^grads: after prepare_capture\(\).*stepped together"):
        loop.opts[1].step(some)
    with captured(), pytest.raises(ValueError, match=r"^grads: .*stepped together"):
        loop.opts[1].step(some)
    assert_same(loop.device, before)
    loop.opts[1].step(loop.given)
    loop.opts[0].step(loop.grads)
    loop.compare()


def test_hyper_parameters_that_were_changed():
    loop = Loop("Adam", {}, {}, 5)
    a, b = loop.opts
    b.lr = 0.5
    before = on_host(loop.device)
    with pytest.raises(RuntimeError, match=r"param_groups: were changed after prepare_capture\(\)"):
        b.step(loop.given)
    with captured(), pytest.raises(RuntimeError, match=r"param_groups: were changed"):
        b.step(loop.given)
    assert_same(loop.device, before)
    assert b.step_counts == (0,) * 4
    a.lr = 0.5
    b.prepare_capture(5)
    graph = loop.capture()
    launched(graph, 5)
    for _ in range(5):
        a.step(loop.grads)
    loop.compare()
    b.param_groups[0]["weight_decay"] = 0.25
    b.prepare_capture(0)
    b.step(loop.given)
    a.param_groups[0]["weight_decay"] = 0.25
    a.step(loop.grads)
    loop.compare()


def test_preparations_that_are_refused():
    with pytest.raises(TypeError, match=r"^params: are on the host"):
        onepass.Adam(numbers(5)).prepare_capture(3)
    with pytest.raises(ValueError, match=r"^accumulate: "):
        onepass.Adam(cp.ones(5), accumulate=2).prepare_capture(3)
    opt = onepass.Adam(cp.ones(5))
    for steps, error in (
        (-1, ValueError),
        (2**24 + 1, ValueError),
        (1.5, TypeError),
        ("3", TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=r"^steps: "):
            opt.prepare_capture(steps)
    opt.prepare_capture(0)
    opt.prepare_capture(1)
    opt.prepare_capture(0)
    opt.step(cp.ones(5))
    assert opt.step_counts == (1,)


def test_a_schedule_that_fails_while_preparing():
    """Nothing has changed then."""

    def lr(t):
        if t > 3:
            raise KeyError("no more")
        return 0.1

    host = numbers(5)
    device = on_device(host)
    a, b = onepass.Adam(host, lr=lr), onepass.Adam(device, lr=lr)
    with pytest.raises(KeyError, match="no more"):
        b.prepare_capture(4)
    a.step(np.ones(5, np.float32))
    b.step(cp.ones(5, np.float32))
    assert b.step_counts == (1,)
    assert_same(device, host)
    b.prepare_capture(2)
    gradient = cp.ones(5, np.float32)
    with captured() as graphs:
        b.step(gradient)
    launched(graphs[0], 2)
    for _ in range(2):
        a.step(np.ones(5, np.float32))
    assert_same(device, host)


def test_a_loaded_state_ends_a_preparation():
    loop = Loop("Adam", {"lr": lambda t: 0.1 / t}, {}, 5)
    a, b = loop.opts
    graph = loop.capture()
    launched(graph, 2)
    for _ in range(2):
        a.step(loop.grads)
    taken = b.state_dict()
    assert [entry["step"] for entry in taken["state"].values()] == [2] * 4
    b.load_state_dict(taken)
    with captured(), pytest.raises(RuntimeError, match=r"prepare_capture\(\) before the capture"):
        b.step(loop.given)
    b.step(loop.given)
    a.step(loop.grads)
    loop.compare()


def test_swaps_between_launches():
    loop = Loop("Adam", {"ema_decay": 0.5}, {}, 8)
    graph = loop.capture()
    for _ in range(4):
        loop.opts[0].step(loop.grads)
        launched(graph)
        for opt in loop.opts:
            opt.swap_ema()
        loop_states = [on_host(dict(state)) for state in loop.opts[1].state]
        for state, want in zip(loop_states, loop.opts[0].state, strict=True):
            assert_same_bits(state["ema"], want["ema"])
        assert_same(loop.device, loop.host)
        for opt in loop.opts:
            opt.swap_ema()
    loop.compare()


def test_a_captured_step_neither_waits_nor_allocates():
    runtime = cuda_arrays.host_runtime()
    loop = Loop("Adam", SCHEDULED, {"max_grad_norm": 1.0, "nonfinite": "skip"}, 5)
    with captured() as graphs, runtime.counted() as counts:
        loop.opts[1].step(loop.given, **loop.step)
    assert counts.pop("cudaLaunchKernel") >= 3
    assert not any(counts.values()), counts
    launched(graphs[0])
    loop.opts[0].step(loop.grads, **loop.step)
    loop.compare()


@pytest.mark.parametrize("order", [(1, 1), (2, 2)])
def test_any_order_of_a_graphs_blocks_and_threads(order):
    runtime = cuda_arrays.host_runtime()
    with runtime.order(*order, 5):
        loop = Loop("RMSprop-both", SCHEDULED, {"max_grad_norm": 1.0, "nonfinite": "skip"}, 10)
        graph = loop.capture()
        for _ in range(10):
            loop.opts[0].step(loop.grads, **loop.step)
        launched(graph, 10)
        loop.compare()


def test_memory_of_captured_steps_outlives_larger_ones():
    """A step that needs more scratch memory leaves that of earlier captures alone."""
    loop = Loop("Adam", {}, {"max_grad_norm": 1.0}, 20)
    graph = loop.capture()
    odd = [Twin(grad, offset=1) for grad in loop.grads]  # copied into order, in much more memory
    loop.opts[1].step([twin.array for twin in odd], max_grad_norm=1.0)
    loop.opts[0].step(loop.grads, max_grad_norm=1.0)
    gc.collect()
    for _ in range(3):
        loop.opts[0].step(loop.grads, **loop.step)
        launched(graph)
    loop.compare()

"""Promise: threads and processes decide speed and never a bit; whoever comes at a bad time is told so."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time

import numpy as np
import pytest

import onepass
from helpers import CASES, Snapshot, assert_equal_optimizers, assert_moved, assert_same_bits, copied, make, numbers
from onepass import _cpu
from processes import PRELUDE, assert_ok, python, run_all

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork, and paths of a POSIX system")

LARGE = 1 << 19  # elements: 6 MB of traffic and more, so that threads are used and the interpreter lock is released


@pytest.fixture(autouse=True)
def _divide_every_step():
    """Smaller ones are divided among the threads too; conftest.py restores the limit."""
    _cpu.set_serial_bytes(0)


RULE_CASES = ("SGD", "Momentum", "AdaSqrt", "RMSprop-centered-momentum", "Adam", "AMSGrad")


# How many


def test_the_number_of_threads_is_what_was_set():
    default = onepass.get_num_threads()
    assert default >= 1
    for count in (1, 2, 5, 1024):
        onepass.set_num_threads(count)
        assert onepass.get_num_threads() == count
    onepass.set_num_threads(None)
    assert onepass.get_num_threads() == default


@pytest.mark.parametrize(
    ("count", "exception"),
    [
        *[(count, ValueError) for count in (0, -1, 1025, 2**31, 2**64, -(2**64))],
        *[(count, TypeError) for count in (True, False, 1.0, 2.5, float("nan"), "2", b"2", [2], (2,), np.array(2), 1j)],
    ],
    ids=repr,
)
def test_a_bad_number_of_threads(count, exception):
    onepass.set_num_threads(3)
    with pytest.raises(exception, match=r"^count: expected an integer from 1 to 1024 or None, got "):
        onepass.set_num_threads(count)
    assert onepass.get_num_threads() == 3


@pytest.mark.parametrize("count", [1, 3, 1024])
def test_the_environment_sets_the_number_of_threads(count):
    done = python("import onepass; print(onepass.get_num_threads())", ONEPASS_NUM_THREADS=str(count))
    assert_ok(done)
    assert done.stdout.split() == [str(count)]


@pytest.mark.parametrize("value", ["0", "-2", "1025", "two", " ", "1.5", "nan", "2 3", "99999999999999999999"])
def test_a_bad_number_of_threads_in_the_environment(value):
    code = """
try:
    import onepass
except ImportError as error:
    print(error)
"""
    done = python(code, ONEPASS_NUM_THREADS=value)
    assert_ok(done)
    assert done.stdout.strip() == f"ONEPASS_NUM_THREADS: expected an integer from 1 to 1024, got {value!r}"


def test_an_empty_environment_variable_is_none():
    code = "import os, onepass; assert 1 <= onepass.get_num_threads() <= os.cpu_count()"
    assert_ok(python(code, ONEPASS_NUM_THREADS=""))


def test_none_goes_back_to_what_the_environment_said():
    code = "import onepass as o; o.set_num_threads(2); o.set_num_threads(None); assert o.get_num_threads() == 7"
    assert_ok(python(code, ONEPASS_NUM_THREADS="7"))


def test_the_default_respects_the_affinity_of_the_process():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    code = """
import os, onepass
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert onepass.get_num_threads() == 1
"""
    assert_ok(python(code))


# The same bits


def tensors(case, **more):
    """Unequal sizes, empty ones between, three orders, two dtypes, one large and many small ones."""
    shapes = [(0,), (LARGE // 2 + 3,), (1,), (), (0, 5), (700, 301), (64,), (63, 2, 5), (17, 1001), (0,)]
    shapes += [(k,) for k in range(90)]
    params = [numbers(shape, seed=k) for k, shape in enumerate(shapes)]
    params[5] = np.asfortranarray(params[5])
    params[8] = params[8].astype(np.float64)
    grads = [numbers(p.shape, p.dtype, seed=500 + k) for k, p in enumerate(params)]
    grads[7] = grads[7].transpose(1, 2, 0).copy().transpose(2, 0, 1)
    grads[1] = np.repeat(grads[1], 2)[::2]
    grads[8] = grads[8][:, ::-1]
    return make(case, params, **more), params, grads


@pytest.mark.parametrize("case", RULE_CASES)
def test_any_number_of_threads_gives_the_same_bits(case):
    onepass.set_num_threads(1)
    reference, expected, grads = tensors(case)
    for _ in range(2):
        before = copied(expected)
        reference.step(grads)
        assert_moved([b for b in before if b.size], [e for e in expected if e.size])
    for threads in (2, 5):
        onepass.set_num_threads(threads)
        opt, params, grads = tensors(case)
        for _ in range(2):
            opt.step(grads)
        assert_same_bits(params, expected)
        assert_equal_optimizers(opt, reference)


@pytest.mark.parametrize("offset", [0, 1, 4, 36])
def test_threads_cut_a_tensor_that_starts_at_any_byte(offset):
    size = LARGE + 5
    memory = np.full(4 * size + 128, 0xA5, np.uint8)
    param = memory[64 + offset : 64 + offset + 4 * size].view(np.float32)
    param[...] = numbers(size, seed=1)
    plain, gradient = param.copy(), numbers(size, seed=2)
    onepass.set_num_threads(1)
    expected = make("Momentum", plain)
    expected.step(gradient)
    for threads in (2, 3, 7, 64, 1024):
        onepass.set_num_threads(threads)
        param[...] = numbers(size, seed=1)
        opt = make("Momentum", param)
        opt.step(gradient)
        assert_same_bits(param, plain)
        assert_equal_optimizers(opt, expected)
    assert (memory[: 64 + offset] == 0xA5).all()
    assert (memory[64 + offset + 4 * size :] == 0xA5).all()


def test_only_empty_tensors_and_more_threads_than_work():
    onepass.set_num_threads(8)
    opt = onepass.Adam([np.ones((0, 3)), np.ones(0, np.float32)])
    opt.step([np.ones((0, 3)), np.ones(0, np.float32)])
    assert opt.step_counts == (1, 1)


# Several Python threads


@pytest.mark.parametrize("size", [100, LARGE // 4])
def test_two_threads_step_two_optimizers_at_once(size):
    onepass.set_num_threads(2)
    steps = 40 if size > 1000 else 400
    cases = ("Adam", "Momentum", "RMSprop-centered")
    expected = [numbers(size, seed=k) for k in range(len(cases))]
    gradients = [numbers(size, seed=10 + k) for k in range(len(cases))]
    params = copied(expected)
    opts = [make(case, param) for case, param in zip(cases, params, strict=True)]
    twins = [make(case, param) for case, param in zip(cases, expected, strict=True)]
    for twin, gradient in zip(twins, gradients, strict=True):
        for _ in range(steps):
            twin.step(gradient)

    def train(opt, gradient):
        def body():
            for _ in range(steps):
                opt.step(gradient)

        return body

    run_all(*[train(opt, gradient) for opt, gradient in zip(opts, gradients, strict=True)])
    assert_same_bits(params, expected)
    for opt, twin in zip(opts, twins, strict=True):
        assert opt.step_counts == (steps,)
        assert_equal_optimizers(opt, twin)


def test_one_optimizer_stepped_from_several_threads_is_never_corrupted():
    onepass.set_num_threads(2)
    param = numbers(LARGE, seed=1)
    gradient = numbers(LARGE, seed=2)
    opt = make("Momentum", param)
    done, turned_away = [], []

    def try_once():
        try:
            opt.step(gradient)
            done.append(1)
        except RuntimeError as error:
            turned_away.append(str(error))

    def body():
        for _ in range(40):
            try_once()

    run_all(body, body, body)
    assert len(done) + len(turned_away) == 120
    assert opt.step_counts == (len(done),)
    assert {message.split(",")[0] for message in turned_away} <= {"this optimizer is in the middle of a step"}
    plain = numbers(LARGE, seed=1)
    twin = make("Momentum", plain)
    for _ in done:
        twin.step(gradient)
    assert_moved(numbers(LARGE, seed=1), param)
    assert_same_bits(param, plain)
    assert_equal_optimizers(opt, twin)


def test_a_step_in_the_middle_of_a_step_is_turned_away():
    # Not by chance as above: a schedule holds the first step while another thread tries a second one.
    param, gradient = numbers(9, seed=1), numbers(9, seed=2)
    entered, leave = threading.Event(), threading.Event()

    def lr(t):
        entered.set()
        assert leave.wait(30)
        return 0.5

    opt = onepass.SGD(param, lr=lr)
    state = opt.state_dict()
    thread = threading.Thread(target=opt.step, args=(gradient,))
    thread.start()
    assert entered.wait(30)
    snapshot = Snapshot(opt, param, gradient)
    for intrude in (lambda: opt.step(gradient), lambda: opt.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"^this optimizer is in the middle of a step, .*; nothing was done$"):
            intrude()
        snapshot.assert_unchanged()
    leave.set()
    thread.join(30)
    assert opt.step_counts == (1,)
    assert_same_bits(param, numbers(9, seed=1) - np.float32(0.5) * gradient)


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_that_steps_its_own_optimizer(case):
    params, grads = [numbers(9, seed=1), numbers(3, seed=2)], [numbers(9, seed=3), numbers(3, seed=4)]
    plain = copied(params)
    twin = make(case, plain)

    def lr(t):
        if t == 2:
            opt.step(nested)
        return 0.0625

    opt = make(case, [{"params": params[:1]}, {"params": params[1:], "lr": lr}])
    nested = [grads[:1], grads[1:]]
    opt.step(nested)
    twin.step(grads)
    snapshot = Snapshot(opt, params, grads)
    for step in (lambda: opt.step(nested), lambda: opt.step([[None], grads[1:]])):
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            step()
        snapshot.assert_unchanged()
    opt.param_groups[1]["lr"] = 0.0625
    opt.step(nested)
    twin.step(grads)
    assert_same_bits(params, plain)
    assert_equal_optimizers(opt, twin)


def test_a_schedule_may_step_another_optimizer_and_set_rates():
    inner_param, param = numbers(4, seed=1), numbers(4, seed=2)
    inner = onepass.SGD(inner_param, lr=0.5)

    def lr(t):
        inner.step(numbers(4, seed=3))
        inner.lr = 0.25
        return 0.5

    opt = onepass.SGD(param, lr=lr)
    opt.step(numbers(4, seed=3))
    half = np.float32(0.5) * numbers(4, seed=3)
    assert_same_bits([inner_param, param], [numbers(4, seed=1) - half, numbers(4, seed=2) - half])


def test_a_large_step_lets_other_threads_run():
    # Switching by time is turned off, so another thread counts only while a step has given up the interpreter lock.
    # One thread steps, so that the other finds a CPU.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("nothing holds other threads up in this interpreter")
    onepass.set_num_threads(1)
    param, gradient = numbers(LARGE * 4), numbers(LARGE * 4, seed=1)
    opt = onepass.Adam(param)
    count, stop = [0], threading.Event()

    def counting():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # gives the lock back at once

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=counting, daemon=True)
    thread.start()
    try:
        sys.setswitchinterval(1000)
        time.sleep(0.05)  # who waits by the old interval gets its turn now
        start = count[0]
        sum(range(1_000_000))  # holds the lock as long as a step takes
        held = count[0] - start
        for _ in range(2000):
            start = count[0]
            opt.step(gradient)
            released = count[0] - start
            if released:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join(30)
    assert held == 0
    assert released > 0


# Everything at once


BUSY = "in the middle of a step"
THREADS = 6


def at_once(rounds, *actions):
    """Threads that each make all calls, `rounds` times, in an order of their own; what those that failed have said."""
    refused = []

    def attempt(action):
        try:
            action()
        except RuntimeError as error:
            refused.append(str(error))

    def body(seed):
        rng = np.random.default_rng(seed)

        def run():
            for _ in range(rounds):
                for k in rng.permutation(len(actions)):
                    attempt(actions[k])

        return run

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run_all(*[body(seed) for seed in range(THREADS)])
    finally:
        sys.setswitchinterval(interval)
    return refused


def uniform(array):
    """The one number that all elements are; half of a step leaves two."""
    assert (array == array.flat[0]).all()
    return float(array.flat[0])


@pytest.mark.parametrize("size", [40, LARGE // 16], ids=["small", "large"])
def test_threads_that_do_everything_to_one_optimizer(size):
    onepass.set_num_threads(2)
    params = [np.ones(n, np.float32) for n in (size, 3, size // 2)]
    grads = [np.ones_like(p) for p in params]
    norm = float(np.sqrt(np.float64(sum(p.size for p in params))))
    opt = onepass.Momentum(params, momentum=0.5, lr=0.5, lr_in_velocity=False, ema_decay=0.5)
    states, norms, seen = [], [], []

    def snapshot():
        states.append(opt.state_dict())

    def load():
        if states:
            opt.load_state_dict(states[len(states) // 2])

    def ask():
        norms.append(opt.grad_norm)
        seen.append(opt.step_counts)
        assert opt.skipped == opt.accumulated == 0
        assert repr(opt).startswith("Momentum(3 parameters, {lr=")
        assert opt.lr in (0.5, 0.25, 0.125)
        assert len(opt.ema) == len(opt.state) == 3
        assert opt.master is None

    def set_rates():
        opt.lr = 0.25
        opt.param_groups[0].update(lr=0.125, maximize=True)
        opt.param_groups[0]["maximize"] = False

    refused = at_once(
        100 if size > 1000 else 200,
        lambda: opt.step(grads),
        lambda: opt.step(grads, max_grad_norm=1e9),
        lambda: opt.step(tuple(grads), nonfinite="skip", max_grad_norm=1e9),
        opt.swap_ema,
        opt.swap_ema,
        snapshot,
        load,
        ask,
        set_rates,
    )
    exchanged = "parameters and averages are exchanged; call swap_ema() before the next step"
    assert all(BUSY in message or message == exchanged for message in refused), set(refused)
    states.append(opt.state_dict())
    assert len(states) > THREADS
    for state in states:
        of_params = state["state"].values()
        assert len({entry["step"] for entry in of_params}) == 1
        for entry in of_params:
            uniform(entry["ema"])
    assert max(state["state"][0]["step"] for state in states) > 1
    assert all(len(set(counts)) == 1 for counts in seen)
    assert set(norms) <= {None, norm}
    for array in (*params, *opt.ema):
        uniform(array)
    # The gradients are all 1 or, maximized, all -1.
    for state in states:
        velocities = {uniform(entry["velocity"]) for entry in state["state"].values()}
        assert len(velocities) == 1
        assert abs(velocities.pop()) <= 2.0
    assert all(np.isfinite(p).all() for p in params)


def test_counts_and_states_of_one_optimizer_stay_together_among_threads():
    onepass.set_num_threads(2)
    params = [np.zeros(n, np.float32) for n in (40_000, 5)]
    grads = [np.ones_like(p) for p in params]
    opt = onepass.Momentum(params, momentum=0.5, lr=1.0)
    states = [opt.state_dict()]

    def load():
        opt.load_state_dict(states[len(states) // 3])

    at_once(150, lambda: opt.step(grads), lambda: opt.step(grads), lambda: states.append(opt.state_dict()), load)
    states.append(opt.state_dict())
    assert len({state["state"][0]["step"] for state in states}) > 1
    for state in states:
        for entry in state["state"].values():
            assert entry["step"] == state["state"][0]["step"]
            velocity = np.float32(2.0 - 2.0 ** (1 - entry["step"]) if entry["step"] else 0.0)
            assert (entry["velocity"] == velocity).all()


def test_threads_with_their_own_optimizers_share_gradients_and_change_settings():
    # The list of the gradients changes all the time, for others of the same numbers; at times it is too long.
    sizes = (LARGE // 8, 7, 1000)
    first = [numbers(size, seed=k) for k, size in enumerate(sizes)]
    second = copied(first)
    shared = list(first)
    isas = onepass.available_isas()
    stop, taken, refused = threading.Event(), [], []

    def disturb():
        rng = np.random.default_rng(1)
        while not stop.is_set():
            k = int(rng.integers(3))
            shared[k] = (first, second)[int(rng.integers(2))][k]
            shared[:] = (first, second)[int(rng.integers(2))]
            shared.append(first[0])
            shared.pop()
            onepass.set_num_threads(int(rng.integers(1, 5)))
            onepass.set_isa(isas[int(rng.integers(len(isas)))])
            onepass.get_num_threads()
            _cpu.set_serial_bytes(int(rng.integers(2)) << 22)
            onepass.set_cache_limit(int(rng.integers(2)) << 24)
            onepass.empty_cache()
            _cpu.set_cache_sizes(int(rng.integers(2)) << 16, 0)

    def trainer(case, seed):
        def body():
            params = [numbers(size, seed=seed + k) for k, size in enumerate(sizes)]
            opt, steps = make(case, params), 0
            layer = onepass.BatchNorm(8, activation="relu")
            for _ in range(40):
                try:
                    opt.step(shared)
                    steps += 1
                except ValueError as error:
                    refused.append(str(error))
                layer.backward(layer(BATCH))
            taken.append((case, seed, steps, params, opt, layer))

        return body

    def all_trainers():
        try:
            run_all(*[trainer(case, 10 * k) for k, case in enumerate(("Adam", "SGD", "Momentum", "RMSprop"))])
        finally:
            stop.set()

    try:
        run_all(all_trainers, disturb)
    finally:
        onepass.set_cache_limit(None)
    assert len(taken) == 4
    assert set(refused) <= {"grads: 4 given for 3 parameters"}
    assert sum(steps for _, _, steps, *_ in taken) > 20
    reference = onepass.BatchNorm(8, activation="relu")
    for _ in range(40):
        reference.backward(reference(BATCH))
    for case, seed, steps, params, opt, layer in taken:
        plain = [numbers(size, seed=seed + k) for k, size in enumerate(sizes)]
        twin = make(case, plain)
        for _ in range(steps):
            twin.step(first)
        assert_same_bits(params, plain)
        assert_equal_optimizers(opt, twin)
        assert_same_bits(layer.state_dict(), reference.state_dict())
        assert_same_bits(layer.gradients(), reference.gradients())


BATCH = numbers((16, 8, 12, 12), seed=77)


def test_threads_that_do_everything_to_one_layer():
    onepass.set_num_threads(2)
    values = numbers((32, 1, 20, 20), seed=5) * np.ones((1, 6, 1, 1), np.float32)  # the same in all channels
    layer = onepass.BatchNorm(6, momentum=0.5)
    states, counts = [layer.state_dict()], []

    def backward():
        layer.backward(values)

    def load():
        layer.load_state_dict(states[len(states) // 2])

    def ask():
        counts.append(layer.num_batches_tracked)
        assert repr(layer).startswith("BatchNorm(6, ")
        residual_grad = layer.residual_grad
        assert residual_grad is None or residual_grad is values
        layer.momentum = 0.5
        layer.train()

    refused = at_once(
        150,
        lambda: layer(values),
        lambda: layer(values, residual=values),
        lambda: layer(values, training=False),
        backward,
        backward,
        layer.reset_running_stats,
        lambda: states.append(layer.state_dict()),
        lambda: states.append(copy.deepcopy(layer).state_dict()),
        load,
        ask,
    )
    said = ("this layer is in the middle of a pass; nothing was done", "backward: ")
    assert all(message.startswith(said) for message in refused), set(refused)
    states.append(layer.state_dict())
    means = {0: 0.0}
    twin = onepass.BatchNorm(6, momentum=0.5)
    for batches in range(1, 1 + max(state["num_batches_tracked"] for state in states)):
        twin(values)
        means[batches] = uniform(twin.running_mean)
    assert len(means) > 1
    for state in states:
        assert uniform(state["running_mean"]) == means[state["num_batches_tracked"]]
        uniform(state["running_var"])
    assert max(counts) > 0


# Processes


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_forked_child_steps_with_threads(threads):
    code = f"""
onepass.set_num_threads({threads})
goal = expected(4)
opt, params, grads = make()
opt.step(grads)
opt.step(grads)

def go_on():
    assert onepass.get_num_threads() == {threads}
    opt.step(grads)
    opt.step(grads)
    assert result(params) == goal, "the inherited optimizer"
    assert expected(4) == goal, "a new one"

def twice():
    go_on()
    assert in_child(lambda: check(expected(4) == goal)) == 0, "a grandchild"

assert in_child(twice) == 0
opt.step(grads)
opt.step(grads)
assert result(params) == goal, "the parent"
assert in_child(lambda: check(result(params) == goal)) == 0
"""
    assert_ok(python(PRELUDE + code))


def test_a_child_forked_while_another_thread_steps():
    code = """
onepass.set_num_threads(3)
goal = expected(2)
busy, busy_params, busy_grads = make()
stop = threading.Event()

def train():
    while not stop.is_set():
        busy.step(busy_grads)

thread = threading.Thread(target=train)
thread.start()
opt, params, grads = make()
opt.step(grads)

def go_on():
    opt.step(grads)
    assert result(params) == goal
    assert expected(2) == goal

codes = [in_child(go_on) for _ in range(12)]
stop.set()
thread.join()
assert codes == [0] * 12, codes
opt.step(grads)
assert result(params) == goal
"""
    assert_ok(python(PRELUDE + code))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    code = f"""
import multiprocessing

def work(queue):
    onepass.set_num_threads(2)
    queue.put(expected(2) == expected(2) and hash_of(expected(2)))

def hash_of(parts):
    import hashlib
    return hashlib.sha256(b"".join(parts)).hexdigest()

if __name__ == "__main__":
    onepass.set_num_threads(2)
    goal = hash_of(expected(2))
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    children = [context.Process(target=work, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    found = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join(120)
    assert found == [goal, goal], found
    assert [child.exitcode for child in children] == [0, 0]
"""
    done = python(PRELUDE + code, script=tmp_path / "script.py")
    assert_ok(done)


def test_a_process_with_idle_workers_exits():
    code = """
onepass.set_num_threads(6)
goal = expected(3)
print("last words")
"""
    done = python(PRELUDE + code, timeout=300)
    assert_ok(done)
    assert done.stdout == "last words\n"
    assert done.stderr == ""


def test_a_process_with_an_optimizer_alive_to_the_end_exits():
    code = """
onepass.set_num_threads(3)
opt, params, grads = make()
opt.step(grads)
class Last:
    def __del__(self):
        opt.step(grads)
        print("stepped", opt.step_counts[0])
last = Last()
sys.modules["keep"] = (opt, params, grads)
"""
    done = python(PRELUDE + code, timeout=300)
    assert_ok(done)
    assert done.stdout == "stepped 2\n"


def test_a_process_exits_while_a_daemon_thread_steps():
    code = """
onepass.set_num_threads(2)
opt, params, grads = make()
started = threading.Event()

def train():
    while True:
        opt.step(grads)
        started.set()

threading.Thread(target=train, daemon=True).start()
assert started.wait(30)
print("last words", flush=True)
"""
    for _ in range(3):
        done = python(PRELUDE + code, timeout=300)
        assert_ok(done)
        assert done.stdout == "last words\n"


# The floating-point mode


def subnormals_live():
    tiny = np.float32(1e-40)
    vector = np.full(40, 1e-40, np.float32)
    double = np.full(40, 1e-310)
    return bool(tiny * np.float32(1) != 0 and (vector * np.float32(1) != 0).all() and (double * 1.0 != 0).all())


@pytest.mark.parametrize("isa", onepass.available_isas())
def test_a_step_leaves_the_floating_point_mode_as_it_was(isa):
    assert subnormals_live()
    onepass.set_isa(isa)
    for threads in (1, 3):
        onepass.set_num_threads(threads)
        for size in (10, LARGE):
            param = numbers(size)
            opt = onepass.Adam(param)
            opt.step(numbers(size, seed=1))
            assert_moved(numbers(size), param)
            assert subnormals_live()

            found = []

            def elsewhere(opt=opt, size=size, found=found):
                found.append(subnormals_live())
                opt.step(numbers(size, seed=1))
                found.append(subnormals_live())

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert found == [True, True]
    with pytest.raises(ValueError, match="shape"):
        opt.step(numbers(3))
    assert subnormals_live()


def test_subnormals_are_zero_inside_a_step_and_whole_outside():
    param = np.array([1e-40, 1.0, 0.0], np.float32)
    gradient = np.array([0.0, 1e-40, 1e-40], np.float32)
    velocity_before = gradient.copy()
    opt = onepass.Momentum(param, lr=1.0)
    opt.step(gradient)
    np.testing.assert_array_equal(param, np.array([0.0, 1.0, 0.0], np.float32))
    np.testing.assert_array_equal(opt.state[0]["velocity"], 0)
    assert_same_bits(gradient, velocity_before)
    assert (gradient[1:] != 0).all()


def test_what_a_step_does_raises_no_floating_point_error_of_numpy():
    with np.errstate(all="raise"):
        for size in (10, LARGE):
            param, gradient = numbers(size), numbers(size, seed=1)
            gradient[:5] = np.inf, np.nan, 1e38, 1e-40, -np.inf
            opt = onepass.Adam(param)
            opt.step(gradient)
            opt.step(gradient)
            assert np.isfinite(param[5:]).all()
            np.add(param[5:], param[5:])
            np.float32(1) + np.float32(2)

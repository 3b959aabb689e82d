"""What an optimizer holds, and lets go of; what it does while something else is going on."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import numpy.ma  # so that subclasses are asked whether they are masked
import pytest

import onepass
from helpers import UPDATE_RULES
from onepass import _cpu, functional


def test_an_optimizer_is_freed_without_the_garbage_collector():
    """Arrays do not trigger the collector: what it alone can free is, for large parameters, not freed."""
    gc.disable()
    try:
        opt = onepass.Adam([np.zeros(3), np.zeros(4)])
        opt.step([np.ones(3), np.ones(4)])
        alive = weakref.ref(opt)
        del opt
        assert alive() is None
    finally:
        gc.enable()


class Trainer:
    def __init__(self):
        self.weights = np.zeros(3)
        self.opt = onepass.SGD(self.weights, lr=self.rate)

    def rate(self, t):
        return 1.0 / t


def test_a_schedule_that_belongs_to_the_owner_of_the_optimizer_does_not_leak():
    trainer = Trainer()
    trainer.opt.step(np.ones(3))
    assert (trainer.weights == -1.0).all()
    alive = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert alive() is None


def test_a_snapshot_is_of_one_step():
    """A thread that takes state_dict() while another one steps gets one step's state, or is turned away."""
    size = 300_000
    opt = onepass.Momentum(np.zeros(size, np.float32), momentum=0.5, lr=1.0)
    grads, stop, taken = np.ones(size, np.float32), threading.Event(), []

    def snapshots():
        while not stop.is_set():
            with contextlib.suppress(RuntimeError):  # turned away
                taken.append(opt.state_dict()["state"][0])

    thread = threading.Thread(target=snapshots)
    thread.start()
    end = time.monotonic() + 1.0
    while time.monotonic() < end or not taken:
        with contextlib.suppress(RuntimeError):
            opt.step(grads)
    stop.set()
    thread.join()
    for state in taken:
        velocity = state["velocity"]
        assert (velocity == velocity[0]).all()
        assert velocity[0] == np.float32(2.0 - 2.0 ** (1 - state["step"]) if state["step"] else 0.0)


def test_loading_and_snapshots_are_refused_inside_a_step():
    def schedule(t):
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            opt.state_dict()
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            opt.load_state_dict(saved)
        return 0.5

    param = np.zeros(3)
    opt = onepass.SGD(param, lr=0.5)
    saved = opt.state_dict()
    opt.lr = schedule
    opt.step(np.ones(3))
    assert (param == -0.5).all()


class Answers(np.ndarray):
    """A subclass that runs code when asked what it is."""

    @property
    def __class__(self):
        Answers.asked = True
        return np.ndarray


def test_reading_a_subclass_runs_none_of_its_code():
    param = np.zeros(3).view(Answers)
    opt = onepass.SGD([param], lr=1.0)
    grads = [np.ones(3).view(Answers)]
    Answers.asked = False
    opt.step(grads)
    assert not Answers.asked
    assert (np.asarray(param) == -1.0).all()


class CopiesNothing(np.ndarray):
    def __array_function__(self, function, types, args, kwargs):
        return None


def test_a_state_dict_of_subclasses_is_copied_by_numpy_itself():
    opt, other = (onepass.Adam(np.zeros(3)) for _ in range(2))
    opt.step(np.ones(3))
    saved = opt.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].view(CopiesNothing)
    other.load_state_dict(saved)
    np.testing.assert_array_equal(other.state[0]["exp_avg"], opt.state[0]["exp_avg"])


def test_states_swapped_by_way_of_other_owners():
    opt = onepass.Adam(np.zeros(3))
    opt.step(np.full(3, 2.0))
    saved, state = opt.state_dict(), opt.state[0]
    first, second = state["exp_avg"].copy(), state["exp_avg_sq"].copy()
    saved["state"][0]["exp_avg"] = np.frombuffer(memoryview(state["exp_avg_sq"]).cast("B"))
    saved["state"][0]["exp_avg_sq"] = np.frombuffer(memoryview(state["exp_avg"]).cast("B"))
    opt.load_state_dict(saved)
    np.testing.assert_array_equal(state["exp_avg"], second)
    np.testing.assert_array_equal(state["exp_avg_sq"], first)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9999999, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("momentum_decay", [0.0, 1e-9, 0.004, 1.0, np.inf])
def test_nadam_far_into_training_takes_no_longer(betas, momentum_decay):
    """Its product of momenta is looked up, however large t and however many different t there are."""
    for t in [10**7, 2**40, *range(1, 200)]:
        hyper = {"betas": betas, "momentum_decay": momentum_decay, "eps": 1e-8, "eps_root": 0.0}
        coefficients = onepass.Nadam.recipe(hyper, 0.1, t)
        assert all(np.isfinite(value) for value in coefficients.values())
    assert coefficients["step_g"] > 0


def test_nadam_product_is_the_product():
    from onepass.optim.nadam import _mu, _mu_product

    for beta1, decay in [(0.9, 0.004), (0.9, 1.0), (0.99, np.inf), (0.5, 0.0)]:
        product = 1.0
        for t in range(1, 1500):
            product *= _mu(beta1, decay, t)
            if product < 2.0**-60:
                assert 1.0 - _mu_product(beta1, decay, t) == 1.0
            else:
                assert abs(_mu_product(beta1, decay, t) / product - 1.0) < 1e-13


def test_defaults_of_functions_are_those_of_their_classes():
    classes = {
        "sgd": onepass.SGD,
        "momentum": onepass.Momentum,
        "nag": onepass.NAG,
        "adagrad": onepass.AdaGrad,
        "adasqrt": onepass.AdaSqrt,
        "rmsprop": onepass.RMSprop,
        "adam": onepass.Adam,
        "adamw": onepass.AdamW,
        "amsgrad": onepass.AMSGrad,
        "nadam": onepass.Nadam,
    }
    assert set(classes) == set(UPDATE_RULES)
    for name, cls in classes.items():
        own = inspect.signature(getattr(functional, name)).parameters
        wanted = inspect.signature(cls).parameters
        shared = [key for key in own if key in wanted and key not in ("params", "grads")]
        assert "lr" in shared
        assert "weight_decay" in shared
        for key in shared:
            assert own[key].default == wanted[key].default, (name, key)


@pytest.mark.parametrize(("value", "what"), [(1e39, "infinite in float32"), (1e-40, "zero in float32")])
def test_an_accumulator_that_float32_does_not_hold(value, what):
    with pytest.raises(ValueError, match=f"^initial_accumulator: .* is {what}"):
        onepass.AdaGrad(np.zeros(3, np.float32), initial_accumulator=value)
    onepass.AdaGrad(np.zeros(3), initial_accumulator=value)


def test_torch_tensors_whose_memory_has_another_sign():
    torch = pytest.importorskip("torch", reason="torch is a test extra")
    grad = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    param = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"^grads: is_neg\(\) is true of it"):
        onepass.SGD(param, lr=1.0).step(grad)
    assert (param == 0).all()
    onepass.SGD(param, lr=1.0).step(grad.resolve_neg())
    assert (param == [2, 4]).all()


def test_a_rule_that_does_not_exist():
    class Broken(onepass.SGD):
        @classmethod
        def rule(cls, hyper):
            return "traffic0"

    with pytest.raises(TypeError, match=r"^Broken.rule\(\) gave 'traffic0'; the rules are sgd, "):
        Broken(np.zeros(3))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by way of Linux' /proc")
def test_workers_come_when_they_are_needed():
    code = """
import os, numpy as np, onepass
from onepass import _cpu
count = lambda: len(os.listdir("/proc/self/task"))
opt = onepass.SGD(np.zeros(1000), lr=0.1)
before = count()
onepass.set_num_threads(4)
opt.step(np.ones(1000))
assert count() == before, "a small step needs no workers"
_cpu.set_serial_bytes(0)
opt.step(np.ones(1000))
assert count() == before + 3
onepass.set_num_threads(2)
opt.step(np.ones(1000))
assert count() == before + 3, "workers are kept"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_gradient_around_many_parameters_is_compared_run_by_run():
    """Each row of the gradient lies between two parameters; each is looked up, not compared with all."""
    count = 300
    buffer = np.zeros((count, 2, count))
    params = [buffer[k, 0] for k in range(count)] + [np.zeros((count, count))]
    grads = [np.ones(count) for _ in range(count)] + [buffer[:, 1, :]]
    buffer[:, 1, :] = 1.0
    onepass.SGD(params, lr=0.5).step(grads)
    assert all((param == -0.5).all() for param in params)
    with pytest.raises(ValueError, match=r"^grads\[300\]: overlaps params\[0\] in memory"):
        onepass.SGD(params, lr=0.5).step([*grads[:-1], buffer[:, 0, :][:, ::-1]])
    assert _cpu.serial_bytes() > 0

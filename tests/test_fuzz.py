"""Promise: the fuzzer tells the same story for the same bytes, reaches every option, and finds a fault of one bit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import onepass
from fuzz import engines, fuzz
from fuzz.choices import Choices
from fuzz.scenes import SCENES
from helpers import Snapshot
from onepass import _cpu
from reference import expressions, narrow
from training import OPTIMIZERS

DRIVER = Path(fuzz.__file__)
RUNS = {"step": 80, "functional": 60, "batch_norm": 60, "load_state_dict": 150, "load": 120}


def play_many(scene, runs, seed=1):
    records = [engines.play(engines.input_of(seed, k, engines.prefix(scene))) for k in range(runs)]
    for record in records:
        assert record.error is None, engines.tell(record)
    return records


@pytest.mark.parametrize("scene", SCENES)
def test_a_round_of_a_fixed_seed_finds_nothing(scene):
    outcomes = Counter(record.outcome for record in play_many(scene, RUNS[scene]))
    assert outcomes["compared"] >= RUNS[scene] // 4, outcomes
    assert set(outcomes) <= {"compared", "refused"}


def test_the_rounds_have_every_scene():
    assert list(RUNS) == list(SCENES)


def test_the_stories_meet_every_optimizer_dtype_option_and_error():
    met = Counter()
    for record in play_many("step", 200, seed=2):
        met += record.met
    wanted = {*OPTIMIZERS, *_cpu.dtypes(), *_cpu.available_isas()}
    wanted |= {"ema_decay", "accumulate", "max_unit_norm", "gradient_noise"}
    wanted |= {"seed", "rounding", "state_dtype", "master", "state_alloc"}
    wanted |= {"grad_scale", "max_grad_norm", "clip_norm", "clip_value", "nonfinite", "zero_grads"}
    wanted |= {"array", "list", "tuple", "dict", "groups", "mirror", "wild", "exported", "0-d", "empty"}
    wanted |= {"bound gradients", "resumed", "swapped"}
    wanted |= {f"refused: {what}" for what in ("option", "shape", "dtype", "no array", "structure", "schedule")}
    assert wanted <= set(met), wanted - set(met)


def test_the_same_bytes_are_the_same_story():
    for scene in SCENES:
        data = engines.input_of(5, 0, engines.prefix(scene))
        first, second = engines.play(data), engines.play(data)
        assert first.scene == second.scene == scene
        assert first.lines == second.lines != []
        assert first.outcome == second.outcome
    assert engines.input_of(5, 0, b"") == engines.input_of(5, 0, b"") != engines.input_of(5, 1, b"")


def test_what_follows_the_last_byte_is_zero_and_the_plainest_choice():
    c = Choices(b"\x07")
    assert c.integer(0, 9) == 7
    assert (c.integer(3, 900), c.pick("abc"), c.chance(2), c.bytes(2)) == (3, "a", False, b"\0\0")
    record = engines.play(b"")
    assert record.error is None


# A fault of one bit


def flip_a_bit(array):
    """The lowest of the last element, if there is one."""
    if array.size:
        array[(-1,) * array.ndim] = np.nextafter(array[(-1,) * array.ndim], array.dtype.type(9), dtype=array.dtype)


def faulty_step(step):
    def wrong(self, *args, **options):
        step(self, *args, **options)
        for group in self.param_groups:
            for param in group["params"]:
                if isinstance(param, np.ndarray) and param.dtype == np.float32 and param.ndim == 2:
                    flip_a_bit(param)

    return wrong


def fault_in_a_step(monkeypatch):
    monkeypatch.setattr(onepass.Optimizer, "step", faulty_step(onepass.Optimizer.step))


def fault_in_a_rule_of_the_reference(monkeypatch):
    right = expressions.adam

    def wrong(g, s, c):
        u = right(g, s, c)
        flip_a_bit(u.value)
        return u

    monkeypatch.setattr(expressions, "adam", wrong)


def fault_in_batch_norm(monkeypatch):
    right = _cpu.batch_norm_forward

    def wrong(*args):
        y, *rest = right(*args)
        flip_a_bit(y)
        return (y, *rest)

    monkeypatch.setattr(_cpu, "batch_norm_forward", wrong)


def fault_in_loading_a_state(monkeypatch):
    right = onepass.Optimizer.load_state_dict

    def wrong(self, state_dict):
        right(self, state_dict)
        for state in self.state:
            for array in state.values():
                if array.dtype == np.float32:
                    flip_a_bit(array)

    monkeypatch.setattr(onepass.Optimizer, "load_state_dict", wrong)


def skip(opt, skipped):
    """As if it had skipped so many steps."""
    one = opt._updater
    one.restore(one.counts, one.received, one.accumulated, one.seed, skipped, one.swapped)


def fault_of_writing_before_checking(monkeypatch):
    right = onepass.Optimizer.load_state_dict

    def wrong(self, state_dict):
        skip(self, 7)
        right(self, state_dict)

    monkeypatch.setattr(onepass.Optimizer, "load_state_dict", wrong)


def fault_in_loading_a_file(monkeypatch):
    right = onepass.load

    def wrong(path, target):
        extra = right(path, target)
        things = target.values() if isinstance(target, dict) else [target]
        for thing in things:
            if isinstance(thing, onepass.Optimizer):
                skip(thing, thing.skipped + 1)
        return extra

    monkeypatch.setattr(onepass, "load", wrong)


FAULTS = {
    "step": fault_in_a_step,
    "functional": fault_in_a_rule_of_the_reference,
    "batch_norm": fault_in_batch_norm,
    "load_state_dict": fault_in_loading_a_state,
    "load_state_dict-half": fault_of_writing_before_checking,
    "load": fault_in_loading_a_file,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_kept_and_seen_again(name, monkeypatch, tmp_path, capsys):
    scene = name.partition("-")[0]
    with monkeypatch.context() as faulty:
        FAULTS[name](faulty)
        arguments = ["--engine", "random", "--seed", "1", "--runs", "300", "--scene", scene, "--folder", str(tmp_path)]
        assert fuzz.main(arguments) == 1
        printed = capsys.readouterr()
        assert "1 failed" in printed.out
        (path,) = tmp_path.iterdir()
        assert re.search(rf"--replay \S*{path.name}$", printed.err, re.MULTILINE)
        assert re.search(r"^\S*(FindingError|AssertionError)", printed.err, re.MULTILINE)
        assert "AttributeError" not in printed.err
        assert fuzz.main(["--replay", str(path)]) == 1
        assert capsys.readouterr().out.startswith(f"scene {scene}\n")
    assert fuzz.main(["--replay", str(path)]) == 0, "it is the fault that was found"
    assert len(path.read_bytes()) <= 4096


def test_a_failing_input_becomes_smaller():
    def fails_with_a_seven(data):
        error = ValueError("seven") if 7 in data else None
        return engines.Record("none", "failed", [], Counter(), error)

    data = bytes(range(1, 200)) * 3
    kind = fails_with_a_seven(data).kind
    small = engines.smaller(data, kind, fails_with_a_seven)
    assert small == bytes(6) + b"\x07"
    other = engines.smaller(data, ("TypeError", []), fails_with_a_seven)
    assert other == data, "another failure is not this one"


def test_the_command_line_says_what_it_did(tmp_path):
    command = [sys.executable, str(DRIVER), "--engine", "random", "--folder", str(tmp_path)]
    command += ["--runs", "25", "--seed", "3"]
    done = [subprocess.run(command, capture_output=True, text=True, check=False, timeout=120) for _ in range(2)]
    for each in done:
        assert each.returncode == 0, each.stdout + each.stderr
        assert re.search(r"^random: 25 executions in [\d.]+ s, \d+ a second$", each.stdout, re.MULTILINE)
        assert re.search(r"^  step: \d+ executions, .*\d+ compared", each.stdout, re.MULTILINE)
    counts = [re.findall(r"^  (.*)$", each.stdout, re.MULTILINE) for each in done]
    assert counts[0] == counts[1], "the same seed, the same inputs"
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_kills_the_process_is_left_behind(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(DRIVER.parents[1])!r})
from fuzz import engines, fuzz
engines.play = lambda data: os.kill(os.getpid(), 9)
fuzz.main(["--engine", "random", "--runs", "5", "--seed", "1", "--folder", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -9
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == engines.input_of(1, 0, b"")


@pytest.mark.skipif(not engines.has_atheris(), reason="no atheris")
def test_atheris_runs_the_same_scenes(tmp_path):
    command = [sys.executable, str(DRIVER), "--engine", "atheris", "--seconds", "5", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^atheris: \d{2,} executions", done.stdout, re.MULTILINE)
    assert re.search(r"^  \d+ inputs in ", done.stdout, re.MULTILINE)


# What it found


@pytest.mark.parametrize("isa", onepass.available_isas())
@pytest.mark.parametrize("dtype", _cpu.dtypes())
def test_the_first_gradient_of_a_sum_has_its_subnormals_flushed(dtype, isa):
    """As every later one has: also where nothing is calculated with it."""
    onepass.set_isa(isa)
    param = np.ones(37, narrow.BFLOAT16 if dtype == "bfloat16" else dtype)
    subnormal = np.float64(1e-310) if dtype == "float64" else np.float32(1e-40)
    grads = np.full((37, 2), subnormal).astype(param.dtype if dtype != "float16" else np.float32)
    for grad in (grads[:, 0], np.ascontiguousarray(grads[:, 0]), np.ones(37, grads.dtype)):
        opt = onepass.SGD(param if dtype != "float16" else np.ones(37, np.float32), accumulate=2)
        opt.step(grad)
        assert grad[0] != 0
        np.testing.assert_array_equal(opt.state[0]["accumulator"], np.where(grad == 1, 1, 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("isa", onepass.available_isas())
def test_a_mirror_of_a_signalling_nan_is_nan_after_loading(isa, dtype, tmp_path):
    onepass.set_isa(isa)
    patterns = np.array([0x7F800001, 0xFF800001, 0x7FBFFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    param = np.tile(np.append(patterns.view(np.float32), np.float32(1.5)), 7)
    mirror = np.zeros(param.shape, np.float16 if dtype == "float16" else narrow.BFLOAT16)
    opt = onepass.SGD(param, mirror=mirror)
    onepass.save(tmp_path / "run", opt)
    onepass.load(tmp_path / "run", opt)
    np.testing.assert_array_equal(np.isnan(mirror), np.isnan(param))


@pytest.mark.parametrize("isa", onepass.available_isas())
def test_a_mirror_has_no_subnormals_after_loading(isa, tmp_path):
    onepass.set_isa(isa)
    param = np.array([1e-40, -1e-39, 1.0, 2.0**-126] * 9, np.float32)
    mirror = np.ones(36, narrow.BFLOAT16)
    opt = onepass.SGD(param, mirror=mirror)
    onepass.save(tmp_path / "file", opt)
    onepass.load(tmp_path / "file", opt)
    want = narrow.nearest(param, narrow.BFLOAT16)
    assert np.count_nonzero(want) == 18
    expressions.assert_same_bits(mirror, want)


@pytest.mark.parametrize("value", [np.array(["SGD", "Adam"]), np.array([]), np.array([None, {}], object)], ids=str)
@pytest.mark.parametrize("name", ["optimizer", "rounding", "accumulate", "members"])
def test_an_array_in_the_place_of_a_word_or_number_is_named(name, value):
    opt = onepass.SGD(np.ones(3), lr=0.5)
    saved = opt.state_dict()
    if name == "members":
        saved["param_groups"][0]["params"] = [value]
        name = "param_groups[0]['params']"
    else:
        saved[name] = value
    snapshot = Snapshot(opt)
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(name)):
        opt.load_state_dict(saved)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("limit", [(1.0, 1), (1.0, (0, -1))])
def test_an_axis_that_a_parameter_lacks_cannot_be_loaded_or_set(limit):
    opt = onepass.SGD(np.ones(3), max_unit_norm=(1.0, 0))
    saved = opt.state_dict()
    saved["param_groups"][0]["max_unit_norm"] = limit
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match="max_unit_norm"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="max_unit_norm"):
        opt.param_groups[0]["max_unit_norm"] = limit
    snapshot.assert_unchanged()

"""Promise: a run that is saved and resumed is the run that was not stopped; bad files are refused, nothing changes."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import onepass
from helpers import Snapshot, arrays_of, assert_same_bits, numbers, settings
from onepass import schedules
from training import BFLOAT16, OPTIMIZERS, Kind, begin, make

ROWS = {
    "float32": ("float32", "float32", None),
    "bfloat16 states": ("float32", "float32", BFLOAT16),
    "bfloat16": ("bfloat16", "bfloat16", None),
    "bfloat16 all": ("bfloat16", "bfloat16", BFLOAT16),
    "float16": ("float16", "float16", None),
    "float64": ("float64", "float64", None),
}
OPTIONS = {
    "plain": {},
    "all that rides along": {
        "ema_decay": 0.75,
        "accumulate": 3,
        "max_unit_norm": (3.0, 0),
        "gradient_noise": (0.1, 0.5),
        "seed": 2**64 - 3,
        "rounding": "stochastic",
    },
    "split": {"master": "split", "ema_decay": lambda t: t / (t + 1), "accumulate": 2},
}


def kinds_of(row):
    param, grad, _ = ROWS[row]
    mirror = "float16" if param == "float32" else None
    return [
        Kind((37,), param, grad, mirror=mirror),
        Kind((0,), param, grad),
        Kind((41, 33), param, grad, axes=(1, 0), mirror=mirror),
        Kind((5, 3, 20), param, grad, axes=(0, 2, 1), layout="gaps"),
    ]


def rate():
    return schedules.linear_warmup(schedules.cosine(0.25, steps=9), steps=4)


def steps(training, kinds, first, last):
    for number in range(first, last):
        grads = [kind.gradient(100 * number + k) for k, kind in enumerate(kinds)]
        if number == 2:
            grads[0] = None
        if number == 4:
            grads[2][0, 0] = np.nan
        training.opt.step(grads, max_grad_norm=3.0, nonfinite="skip")


def everything(training):
    opt = training.opt
    return {
        "arrays": arrays_of([training.params, training.mirrors, [dict(state) for state in opt.state]]),
        "counts": (opt.step_counts, opt.skipped, opt.accumulated),
        "lr": opt.lr,
    }


def assert_same(a, b):
    x, y = everything(a), everything(b)
    assert_same_bits(x.pop("arrays"), y.pop("arrays"))
    assert x == y


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(name, row, options, tmp_path):
    if options == "split" and ROWS[row][0] != "bfloat16":
        row = "bfloat16"
    kinds = kinds_of(row)
    given = {**OPTIONS[options], "lr": rate()}
    if ROWS[row][2] is not None:
        given["state_dtype"] = ROWS[row][2]

    def new(options):
        training = begin(functools.partial(make, name), kinds, options)
        for param, mirror in zip(training.params, training.mirrors, strict=True):
            if mirror is not None:
                mirror[...] = param
        return training

    isas = onepass.available_isas()
    whole, first = new(given), new(given)
    with settings(threads=1, isa=isas[-1]):
        steps(whole, kinds, 0, 8)
    path = tmp_path / "run.safetensors"
    # In the middle of a sum of gradients, and on another machine at each stop. The resumed ones begin elsewhere.
    stops = (0, 1, 5, 8)
    running = first
    for k, (start, stop) in enumerate(itertools.pairwise(stops)):
        with settings(threads=1 + k % 2, isa=isas[k % len(isas)]):
            steps(running, kinds, start, stop)
            onepass.save(path, running.opt, stop=stop)
        resumed = new({**given, "lr": rate() if options == "plain" else 0.5, "seed": 5})
        for array in arrays_of([resumed.params, resumed.mirrors]):
            array[...] = 9.0
        assert onepass.load(path, resumed.opt) == {"stop": stop}
        assert_same(resumed, running)
        running = resumed
    assert_same(running, whole)
    assert running.opt.skipped == 1
    assert (whole.params[0] != kinds[0].param(0)[0]).mean() > 0.3


@pytest.mark.parametrize("row", ["float32", "float16"])
def test_mirrors_follow_the_parameters_that_were_loaded(row, tmp_path):
    kinds = [Kind((37,), row, "float32" if row == "float32" else "float16", mirror="bfloat16"), Kind((5, 4), row, row)]
    if row == "float16":
        kinds[0] = Kind((37,), row, row)
    saved, loaded = (begin(functools.partial(make, "AdamW"), kinds, {"ema_decay": 0.5}) for _ in range(2))
    for training in (saved, loaded):
        training.opt.step([kind.gradient(1) for kind in kinds])
    saved.opt.swap_ema()
    onepass.save(tmp_path / "a", saved.opt)
    onepass.load(tmp_path / "a", loaded.opt)
    assert_same(loaded, saved)
    loaded.opt.swap_ema()
    saved.opt.swap_ema()
    assert_same(loaded, saved)


# Targets and what lies beside them


def a_layer(seed):
    layer = onepass.BatchNorm(3)
    layer.weight[:] = numbers(3, seed=seed)
    for k in range(2):
        layer.forward(numbers((4, 3, 2), seed=seed + k))
    return layer


def an_optimizer(seed=0, cls=onepass.Adam, **options):
    params = {"w": numbers((3, 4), seed=seed), "b": numbers(5, seed=seed + 1)}
    opt = cls(params, lr=0.125, **options)
    opt.step({key: numbers(value.shape, seed=seed + 2) for key, value in params.items()})
    return opt, params


def test_layers_and_optimizers_in_one_file(tmp_path):
    path = tmp_path / "run"
    names = ("opt", "", "x.y", "extra")
    saved, loaded = (
        dict(zip(names, (an_optimizer(k)[0], a_layer(k), a_layer(k + 5), an_optimizer(k + 9)[0]), strict=True))
        for k in (1, 30)
    )
    saved["extra"].lr = schedules.cosine(0.1, steps=5)
    onepass.save(path, saved)
    assert onepass.load(path, dict(reversed(loaded.items()))) == {}
    for name in ("", "x.y"):
        assert loaded[name].num_batches_tracked == 2
        assert_same_bits(loaded[name].state_dict(), saved[name].state_dict())
    for name in ("opt", "extra"):
        assert_same_bits(loaded[name].state_dict(), saved[name].state_dict())
    assert loaded["extra"].lr == saved["extra"].lr
    assert_same_bits(loaded["opt"].param_groups[0]["params"], saved["opt"].param_groups[0]["params"])


def test_a_layer_alone(tmp_path):
    saved, loaded = a_layer(1), a_layer(9)
    onepass.save(tmp_path / "layer", saved, mode="train")
    assert onepass.load(tmp_path / "layer", loaded) == {"mode": "train"}
    assert_same_bits(loaded.state_dict(), saved.state_dict())


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_what_was_saved_beside_comes_back_as_it_was(tmp_path):
    loop = [1, (2.5, None, True), "text \N{SNOWMAN}", math.inf, -math.inf, math.nan, -0.0, 2**200, -(2**63)]
    extra = {
        "path": loop,
        "target": {"a": {"b": np.arange(3)}, "a.b": np.ones(2, np.float16)},
        "keys": {1: "a", (1, "x"): {}, None: [], True and 2.5: ()},
        "rng": np.random.default_rng(1).bit_generator.state,
        "arrays": [
            np.array(True),
            np.zeros((0, 3), np.int8),
            numbers((3, 4), BFLOAT16).T,
            np.arange(6, dtype=np.uint64)[::2],
            numbers(4, np.float64),
            np.arange(3, dtype=np.int16),
        ],
        "array": {"array": ["extra.x", "0"]},
        "params": {"dict": {}, "function": None},
    }
    opt, _ = an_optimizer()
    onepass.save(tmp_path / "run", opt, **extra)
    back = onepass.load(tmp_path / "run", opt)
    assert same(back, extra)
    assert all(array.flags.writeable and array.flags.owndata for array in arrays_of(back))
    onepass.save(tmp_path / "run", opt, x=np.float32(0.1), y=np.int8(3), z=np.ones(2, ">f4"), order=np.bool_(True))
    back = onepass.load(tmp_path / "run", opt)
    assert same(back, {"x": float(np.float32(0.1)), "y": 3, "z": np.ones(2, np.float32), "order": True})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"a\['b'\]\[1\]: object cannot be stored"),
        ({"a": lambda t: t}, "a: function cannot be stored"),
        ({"a": schedules.step(0.1, every=3)}, "a: step cannot be stored"),
        ({"a": {object: 1}}, "a: the key <class 'object'> cannot be stored"),
        ({"a": {1: 2, math.nan: 1}}, "a: the key nan cannot be stored"),
        ({"a": np.ones(2, complex)}, "a: dtype complex128 cannot be stored"),
        ({"a": np.array([object()])}, "a: dtype object cannot be stored"),
        ({"a": np.ma.masked_array([1.0])}, "a: a masked array cannot be stored"),
        ({"a": b"bytes"}, "a: bytes cannot be stored"),
        ({"a": {1, 2}}, "a: set cannot be stored"),
        ({"a": 1j}, "a: complex cannot be stored"),
        ({"a": np.datetime64(5, "ns")}, "a: datetime64 cannot be stored"),
        ({"a": np.timedelta64(5, "ns")}, "a: timedelta64 cannot be stored"),
        ({"a": np.array([(1, 2.5)], "i4,f8")[0]}, "a: void cannot be stored"),
        ({"a": np.array([(1, 2.5)], "i4,f8")}, "a: dtype .* cannot be stored"),
        ({"a": collections.namedtuple("Pair", "x y")(1, 2)}, "a: Pair cannot be stored"),
        ({"a": collections.OrderedDict(x=1)}, "a: OrderedDict cannot be stored"),
        ({"a": signal.SIGINT}, "a: Signals cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(extra, message, tmp_path):
    opt, _ = an_optimizer()
    path = tmp_path / "run"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=message):
        onepass.save(path, opt, **extra)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run"]
    opt.step({"w": numbers((3, 4)), "b": None})  # not left in the middle of anything


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": "\ud83d\ude00"}, "a: the text .* has surrogates"),
        ({"a": [{"\udcff": 1}]}, r"a\[0\]: the text .* has surrogates"),
        ({"a": 2**9000}, "a: an integer of more than 8192 bits"),
        ({"a": functools.reduce(lambda tree, _: [tree], range(150), 1)}, "a: is nested more than 100 levels deep"),
    ],
    ids=range(4),
)
def test_what_no_file_can_hold_is_named_and_nothing_is_written(extra, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        onepass.save(tmp_path / "run", an_optimizer()[0], **extra)
    with pytest.raises(ValueError, match=r"target: the text .* has surrogates"):
        onepass.save(tmp_path / "run", {"\ud83d": an_optimizer()[0]})
    assert os.listdir(tmp_path) == []


def test_a_header_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    opt, _ = an_optimizer()
    monkeypatch.setattr(onepass.checkpoint, "_LARGEST_HEADER", 100_000)
    onepass.save(tmp_path / "run", opt, losses=[0.5] * 10_000)
    with pytest.raises(ValueError, match=r"extra: .* makes a header of 0 MB.* put long lists of numbers into arrays"):
        onepass.save(tmp_path / "run", opt, losses=[0.5] * 30_000)
    onepass.save(tmp_path / "run", opt, losses=np.full(30_000, 0.5))


def test_what_contains_itself(tmp_path):
    loop = []
    loop.append({"again": loop})
    with pytest.raises(ValueError, match=r"a\[0\]\['again'\]: contains itself"):
        onepass.save(tmp_path / "run", an_optimizer()[0], a=loop)
    twice = [1]
    onepass.save(tmp_path / "run", an_optimizer()[0], a=[twice, twice])


@pytest.mark.parametrize(
    ("target", "exception", "message"),
    [
        (None, TypeError, "target: expected an optimizer, a BatchNorm or a dict"),
        ([an_optimizer()[0]], TypeError, "target: expected an optimizer, a BatchNorm or a dict"),
        ({}, ValueError, "target: it is empty"),
        ({1: an_optimizer()[0]}, TypeError, "target: expected names that are str, got 1"),
        ({"a": an_optimizer()[0].state_dict()}, TypeError, r"target\['a'\]: expected an optimizer or a BatchNorm"),
        (dict.fromkeys("ab", an_optimizer()[0]), ValueError, r"target\['b'\]: is target\['a'\] once more"),
    ],
)
def test_no_target(target, exception, message, tmp_path):
    for function in (onepass.save, onepass.load):
        with pytest.raises(exception, match=message):
            function(tmp_path / "run", target)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, 3, b"bytes"])
def test_no_path(path):
    for function in (onepass.save, onepass.load):
        with pytest.raises(TypeError, match=r"^path: expected a str or a path-like object of one, got "):
            function(path, an_optimizer()[0])


def test_a_path_that_no_file_can_have():
    for function in (onepass.save, onepass.load):
        with pytest.raises((OSError, ValueError)):
            function("/none/\udcff\ud83d", an_optimizer()[0])


def test_a_busy_target(tmp_path):
    opt, params = an_optimizer()
    target = {"layer": onepass.BatchNorm(2), "opt": opt}
    onepass.save(tmp_path / "run", target)
    found = []

    def schedule(t):
        for function in (onepass.save, onepass.load):
            with pytest.raises(RuntimeError, match="in the middle of a step") as caught:
                function(tmp_path / "run", target)
            found.append(caught)
        return 0.1

    opt.lr = schedule
    opt.step({key: numbers(value.shape) for key, value in params.items()})
    assert len(found) == 2
    target["layer"].forward(numbers((4, 2)))  # had been taken before the optimizer, and is free again
    opt.lr = 0.5
    onepass.load(tmp_path / "run", target)


# Schedules and other functions


def test_schedules_are_restored_from_the_file(tmp_path):
    rates = [
        0.5,
        schedules.inverse_time(0.5, decay=0.1),
        schedules.exponential(0.5, rate=0.9, steps=3),
        schedules.step(schedules.linear_warmup(0.3, steps=7), every=2, factor=0.25),
        schedules.cosine(schedules.cosine(0.1, steps=3), steps=5, final=0.125),
    ]
    for rate_saved in rates:
        opt, _ = an_optimizer()
        opt.lr = rate_saved
        onepass.save(tmp_path / "run", opt)
        for rate_before in rates:
            other, _ = an_optimizer(9)
            other.lr = rate_before
            onepass.load(tmp_path / "run", other)
            assert other.lr == rate_saved
            assert type(other.lr) is type(rate_saved)


class Own(schedules.step):
    pass


@pytest.mark.parametrize("own", [lambda t: 1 / t, Own(0.1, every=2), schedules.step(lambda t: 0.5, every=2)])
def test_functions_of_the_users_own_stay_those_of_the_target(own, tmp_path):
    opt, _ = an_optimizer()
    opt.lr = own
    onepass.save(tmp_path / "run", opt)
    other, _ = an_optimizer(5)
    before = Snapshot(other)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\]: was a function of the step count"):
        onepass.load(tmp_path / "run", other)
    before.assert_unchanged()
    other.lr = lambda t: 0.25
    kept = other.lr
    onepass.load(tmp_path / "run", other)
    assert other.lr is kept
    assert_same_bits(other.state_dict(), opt.state_dict())


# Other programs


def test_other_programs_read_the_file(tmp_path):
    opt, params = an_optimizer()
    onepass.save(tmp_path / "run.safetensors", opt, epoch=3)
    found = safetensors.numpy.load_file(tmp_path / "run.safetensors")
    assert sorted(found) == sorted(
        [
            "params.w",
            "params.b",
            *[f"state.{index}.{name}" for index in (0, 1) for name in ("exp_avg", "exp_avg_sq")],
        ]
    )
    assert_same_bits(found["params.w"], params["w"])
    assert_same_bits(found["state.1.exp_avg"], opt.state[1]["exp_avg"])
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    narrow = {"w": numbers((3, 4), BFLOAT16)}
    onepass.save(tmp_path / "run.safetensors", onepass.Adam(narrow))
    back = load_file(tmp_path / "run.safetensors")["params.w"]
    assert back.dtype == torch.bfloat16
    assert_same_bits(back.float().numpy(), narrow["w"].astype(np.float32))


def test_torch_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.ones(5)
    opt = onepass.Adam(w)
    opt.step(torch.ones(5))
    onepass.save(tmp_path / "run", opt)
    was = w.clone()
    w.zero_()
    onepass.load(tmp_path / "run", opt)
    assert torch.equal(w, was)


def test_loading_runs_no_code_and_unpickles_nothing(tmp_path):
    code = f"""
import sys, onepass
opt = onepass.Adam([__import__("numpy").ones(3)], lr=onepass.schedules.step(0.1, every=2))
onepass.save({str(tmp_path / "run")!r}, opt, a=[1], b=onepass.functional.__name__)
onepass.load({str(tmp_path / "run")!r}, opt)
events = []
watched = ("exec", "compile", "import", "pickle.find_class", "os.system", "subprocess.Popen", "code.__new__")
sys.addaudithook(lambda event, arguments: events.append(event) if event in watched else None)
onepass.load({str(tmp_path / "run")!r}, opt)
assert "pickle" not in str(events) and not events, events
exec("pass")
assert events, "the hook hears nothing"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


# The file is whole or not there

WRITER = """
import sys, numpy as np, onepass
params = {"a": np.zeros(400_001, np.float32), "b": np.zeros((7, 3), np.float64)}
opt = onepass.Adam(params, lr=1e-3)
for version in range(1, 100_000):
    for array in params.values():
        array.fill(version)
    opt.state[0]["exp_avg"].fill(-version)
    opt.state[0]["exp_avg_sq"].fill(2 * version)
    opt.lr = float(version)
    onepass.save(sys.argv[1], opt, version=version)
    print(version, flush=True)
"""


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    rng = random.Random(7)
    path = tmp_path / "run.safetensors"
    params = {"a": np.zeros(400_001, np.float32), "b": np.zeros((7, 3), np.float64)}
    opt = onepass.Adam(params)
    start = time.perf_counter()
    onepass.save(path, opt)
    took = time.perf_counter() - start
    versions, killed_while_writing = [], 0
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        written = [int(writer.stdout.readline())]
        time.sleep(rng.uniform(0.0, 3 * took))
        writer.send_signal(signal.SIGKILL)
        written += [int(line) for line in writer.stdout.read().splitlines()]
        writer.wait(60)
        writer.stdout.close()
        version = onepass.load(path, opt)["version"]
        versions.append(version)
        assert version in (written[-1], written[-1] + 1)  # the new one, of which it had no time to tell
        assert all((array == version).all() for array in params.values())
        assert (opt.state[0]["exp_avg"] == -version).all()
        assert (opt.state[0]["exp_avg_sq"] == 2 * version).all()
        assert opt.lr == version
        left = [name for name in os.listdir(tmp_path) if name != path.name]
        killed_while_writing += bool(left)
        for name in left:
            assert name.startswith((f".{path.name}.", ".tmp")), name
            (tmp_path / name).unlink()
    assert killed_while_writing >= 3, "the kills have not hit what they shall hit"
    assert len(set(versions)) > 1


def test_the_file_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def note_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    onepass.save(tmp_path / "run", an_optimizer()[0])
    assert events == ["file", "rename", "folder"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = f"""
import os, resource, signal, numpy as np, onepass
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
opt = onepass.Adam(np.ones(100_000, np.float32))
onepass.save({str(tmp_path / "run")!r}, opt, version=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    onepass.save({str(tmp_path / "run")!r}, opt, version=2)
except OSError as error:
    assert {str(tmp_path / "run")!r} in str(error), error
else:
    raise AssertionError("it fitted")
assert onepass.load({str(tmp_path / "run")!r}, opt) == {{"version": 1}}
opt.step(np.ones(100_000, np.float32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_is_not_there(tmp_path):
    opt, _ = an_optimizer()
    for function in (onepass.save, onepass.load):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none" / "run", opt)
    with pytest.raises(IsADirectoryError):
        onepass.load(tmp_path, opt)


def test_links_stay_links_and_files_have_the_usual_mode(tmp_path, monkeypatch):
    opt, _ = an_optimizer()
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "run").symlink_to(real / "file")
    onepass.save(tmp_path / "run", opt)
    onepass.save(tmp_path / "run", opt, second=True)
    assert (tmp_path / "run").is_symlink()
    assert os.listdir(real) == ["file"]
    assert onepass.load(tmp_path / "run", opt) == {"second": True}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((real / "file").stat().st_mode) == 0o666 & ~mask
    monkeypatch.chdir(tmp_path)
    onepass.save("here", opt)
    onepass.load("here", opt)
    (tmp_path / "here").chmod(0o640)
    onepass.save(tmp_path / "here", opt)
    assert stat.S_IMODE((tmp_path / "here").stat().st_mode) == 0o640


def test_names_of_the_longest_kind(tmp_path):
    opt, _ = an_optimizer()
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        onepass.save(tmp_path / name, opt)
        onepass.load(tmp_path / name, opt)
    assert len(os.listdir(tmp_path)) == 2


def test_what_is_no_file_is_not_replaced(tmp_path):
    opt, _ = an_optimizer()
    os.mkfifo(tmp_path / "pipe")
    for function in (onepass.save, onepass.load):
        with pytest.raises(OSError, match="no regular file"):
            function(tmp_path / "pipe", opt)
        for folder in (tmp_path, ""):
            with pytest.raises((IsADirectoryError, FileNotFoundError)):
                function(folder, opt)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    opened = os.open

    def open_no_folder(path, flags, *more, **options):
        if flags & os.O_DIRECTORY:
            raise PermissionError(13, "not to be read", path)
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", open_no_folder)
    opt, _ = an_optimizer()
    onepass.save(tmp_path / "run", opt, version=2)
    assert onepass.load(tmp_path / "run", opt) == {"version": 2}


def test_an_array_that_changes_while_it_is_saved(tmp_path, monkeypatch):
    opt, _ = an_optimizer()
    onepass.save(tmp_path / "run", opt, version=1)
    other = np.ones(1000)
    write = safetensors.serialize_file

    def late(*arguments):
        other[500] = 2.0
        write(*arguments)

    monkeypatch.setattr(safetensors, "serialize_file", late)
    with pytest.raises(RuntimeError, match=r"an array changed while it was saved.*'extra\.other'"):
        onepass.save(tmp_path / "run", opt, other=other)
    assert onepass.load(tmp_path / "run", opt) == {"version": 1}
    assert os.listdir(tmp_path) == ["run"]


def test_saves_and_loads_of_one_path_by_several_threads(tmp_path):
    path = tmp_path / "run"
    opts = [an_optimizer(seed)[0] for seed in range(3)]
    onepass.save(path, opts[0], number=0)
    want = [opt.state_dict() for opt in opts]
    problems = []

    def save(number):
        for _ in range(30):
            onepass.save(path, opts[number], number=number)

    def load():
        opt, _ = an_optimizer(77)
        for _ in range(60):
            number = onepass.load(path, opt)["number"]
            try:
                assert_same_bits(opt.state_dict(), want[number])
            except AssertionError as error:
                problems.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    threads += [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # it may come between open() and its `with`
def test_an_interrupted_load_is_whole_or_has_not_happened(tmp_path):
    params = [np.full(200_003, 1.0, np.float32), np.full((300, 301), 1.0, np.float64)]
    opt, layer = onepass.Adam(params, lr=0.5), onepass.BatchNorm(50_000)
    target = {"opt": opt, "layer": layer}
    arrays = [*params, *arrays_of([dict(state) for state in opt.state]), *arrays_of(layer._state())]
    paths = []
    for value in (1.0, 2.0):
        for array in arrays:
            array.fill(value)
        opt.lr = value
        paths.append(tmp_path / f"{value}")
        onepass.save(paths[-1], target)

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    rng = random.Random(3)
    before = signal.signal(signal.SIGALRM, stop)
    interrupted = 0
    try:
        for k in range(150):
            value = 1.0 + k % 2
            was = opt.lr
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 0.006))
                    onepass.load(paths[k % 2], target)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except StopError:
                interrupted += 1
            now = arrays[0][0]
            assert now in (was, value)
            assert all((array == now).all() for array in arrays)
            assert opt.lr == now
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20


# Memory order


def test_a_parameter_in_another_memory_order_is_refused_because_random_numbers_follow_it(tmp_path):
    values = numbers((3, 4, 5))

    def in_order(*axes):
        return [values.transpose(axes).copy().transpose(np.argsort(axes)), numbers((1, 6))]

    orders = list(itertools.permutations(range(3)))
    for saved in orders:
        opt = onepass.SGD(in_order(*saved), gradient_noise=(0.1, 0.5))
        opt.step([values * 2, numbers((1, 6))])
        onepass.save(tmp_path / "run", opt)
        for loaded in orders:
            params = in_order(*loaded)
            params[1] = params[1].T.copy().T  # of one row: the same in either order
            other = onepass.SGD(params, gradient_noise=(0.1, 0.5))
            if saved == loaded:
                onepass.load(tmp_path / "run", other)
                for one in (opt, other):
                    one.step([values, numbers((1, 6))])
                assert_same_bits(other.param_groups[0]["params"], opt.param_groups[0]["params"])
                onepass.save(tmp_path / "run", opt)
                continue
            before = Snapshot(other, params)
            with pytest.raises(ValueError, match=r"params\[0\]: lies in another memory order"):
                onepass.load(tmp_path / "run", other)
            before.assert_unchanged()


# Bad files


def rewritten(path, change):
    """The file with other contents, and their right checksum: `change(contents, tensors, metadata)`."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.numpy.load_file(path)
    contents = json.loads(metadata["contents"])
    contents = change(contents, tensors, metadata) or contents
    if "contents" in metadata:
        metadata["contents"] = json.dumps(contents)
        metadata["crc32"] = f"{zlib.crc32(metadata['contents'].encode()):08x}"
    safetensors.numpy.save_file(tensors, path, metadata)


def state_of(contents):
    return contents["targets"][""]["content"]["dict"]


def set_hyper(name, value):
    def change(contents, tensors, metadata):
        state_of(contents)["param_groups"][0]["dict"][name] = value

    return change


def set_metadata(name, value):
    def change(contents, tensors, metadata):
        metadata[name] = value

    return change


def resum(contents, tensors, name, array):
    """Another array under a name, with its right checksum."""
    tensors[name] = array
    head = zlib.crc32(f"{array.dtype.name} {array.shape}".encode())
    checksum = f"{zlib.crc32(array.tobytes(), head):08x}"

    def visit(tree):
        if isinstance(tree, dict):
            if tree.get("array", [None])[0] == name:
                tree["array"][1] = checksum
            for value in tree.values():
                visit(value)
        elif isinstance(tree, list):
            for value in tree:
                visit(value)

    visit(contents)


def with_array(name, array):
    return lambda contents, tensors, metadata: resum(contents, tensors, name, array)


def reorder(contents, tensors, metadata):
    params = state_of(contents)["params"]["dict"]
    params["w"] = params.pop("w")


def rename(contents, tensors, metadata):
    params = state_of(contents)["params"]["dict"]
    params["v"] = params.pop("b")


def forget_state(contents, tensors, metadata):
    del state_of(contents)["state"]["items"][0][1]["dict"]["exp_avg"]
    del tensors["state.0.exp_avg"]


def more_state(contents, tensors, metadata):
    state_of(contents)["state"]["items"][0][1]["dict"]["extra"] = 3


CHANGES = {
    "no checkpoint": (set_metadata("format", "other"), "it is no checkpoint of onepass"),
    "version 2": (set_metadata("format_version", "2"), "format version '2' is unknown; this onepass reads version 1"),
    "no version": (lambda c, t, m: m.pop("format_version") and None, "format version None is unknown"),
    "unknown metadata": (set_metadata("note", "hello"), "damaged: its metadata have other entries"),
    "tensor missing": (lambda c, t, m: t.pop("params.w") is None, r"damaged: the tensor 'params\.w' is missing"),
    "tensor too many": (lambda c, t, m: t.update(x=np.ones(2)), "damaged: the tensor 'x' belongs to nothing"),
    "tensor complex": (lambda c, t, m: t.update(x=np.ones(2, np.complex64)), "the tensor 'x' is of type C64"),
    "tensor other": (
        lambda c, t, m: t.update({"params.w": np.zeros((3, 4), np.float32)}),
        "does not have its checksum",
    ),
    "tensor transposed": (lambda c, t, m: t.update({"params.w": t["params.w"].reshape(4, 3)}), "not have its checksum"),
    "parameter shape": (with_array("params.w", np.ones((4, 3), np.float32)), r"params\[0\] \('w'\): shape \(4, 3\)"),
    "parameter dtype": (with_array("params.w", np.ones((3, 4))), r"params\[0\] \('w'\): dtype float64 does not match"),
    "state shape": (with_array("state.1.exp_avg", np.ones(6, np.float32)), r"state\[1\]\['exp_avg'\]: shape \(6,\)"),
    "state dtype": (
        with_array("state.1.exp_avg", np.ones(5, np.int8)),
        r"state\[1\]\['exp_avg'\]: dtype int8 does not",
    ),
    "state missing": (forget_state, r"state\[0\]: 'exp_avg' is missing"),
    "state too many": (more_state, r"state\[0\]: 'extra' is unknown"),
    "parameter renamed": (rename, r"params: 'b' is missing"),
    "parameters reordered": (reorder, "params: their names are in another order"),
    "lr nan": (
        set_hyper("lr", {"float": "nan"}),
        r"param_groups\[0\]\['lr'\]: expected a finite number >= 0 or a callable of the step count, got nan",
    ),
    "lr negative": (set_hyper("lr", -0.5), r"param_groups\[0\]\['lr'\]: expected a finite number >= 0"),
    "lr huge": (set_hyper("lr", 10**400), r"param_groups\[0\]\['lr'\]: expected a finite number >= 0"),
    "betas": (set_hyper("betas", {"tuple": [0.5, {"float": "nan"}]}), r"param_groups\[0\]\['betas'\]\[1\]: expected"),
    "eps": (set_hyper("eps", "1e-8"), r"param_groups\[0\]\['eps'\]: expected a finite number >= 0, got '1e-8'"),
    "unknown hyper-parameter": (set_hyper("beta3", 0.1), r"param_groups\[0\]: 'beta3' is unknown"),
    "unknown schedule": (set_hyper("lr", {"schedule": "system", "fields": {}}), "the schedule 'system' is unknown"),
    "the base of schedules": (
        set_hyper("lr", {"schedule": "Schedule", "fields": {"lr": 1.0}}),
        "is unknown; there are",
    ),
    "bad schedule": (
        set_hyper("lr", {"schedule": "step", "fields": {"lr": 1.0, "every": 0, "factor": 0.5}}),
        "every: expected an integer >= 1, got 0",
    ),
    "schedule incomplete": (set_hyper("lr", {"schedule": "step", "fields": {"lr": 1.0}}), "schedule step: 'every' is"),
    "unknown tag": (set_hyper("lr", {"python": "os.system"}), "damaged: its contents hold {'python'"),
    "two tags": (set_hyper("lr", {"float": "nan", "tuple": []}), "damaged: its contents hold"),
    "no tag": (set_hyper("lr", {}), "damaged: its contents hold {}"),
    "a bad float": (set_hyper("lr", {"float": "1"}), "damaged: its contents hold"),
    "an array that is none": (set_hyper("lr", {"array": [[], 3]}), r"damaged: the tensor \[\] is missing"),
    "an array twice": (set_hyper("lr", {"array": ["params.w", "0"]}), "damaged: the tensor 'params.w' is missing"),
    "another class": (
        lambda c, t, m: state_of(c).update(optimizer="SGD"),
        "optimizer: the state is of 'SGD', not of 'Adam'",
    ),
    "another kind": (lambda c, t, m: c["targets"][""].update(kind="batch_norm"), "it is of kind 'batch_norm'"),
    "extra is none": (lambda c, t, m: c.update(extra=3), "damaged: its contents hold the extra 3"),
    "function in extra": (lambda c, t, m: c.update(extra={"dict": {"a": {"function": None}}}), "damaged: its contents"),
    "nested": (
        lambda c, t, m: c.update(extra=functools.reduce(lambda tree, _: [tree], range(900), 1)),
        "damaged: its contents",
    ),
    "targets": (lambda c, t, m: c.update(targets=[]), r"damaged: its contents hold the targets \[\]"),
    "no targets": (lambda c, t, m: c.pop("targets") and None, "its contents: 'targets' is missing"),
    "several": (lambda c, t, m: c.update(several=True), "target: what was saved is a dict of ''"),
    "not a dict": (lambda c, t, m: [1], "its contents: expected a dict, got list"),
    "count negative": (
        lambda c, t, m: state_of(c)["state"]["items"][0][1]["dict"].update(step=-1),
        r"state\[0\]\['step'\]: expected an integer from 0",
    ),
    "count twice": (
        lambda c, t, m: state_of(c)["state"]["items"].append([1, 2]),
        "damaged: its contents hold the key 1",
    ),
    "seed": (lambda c, t, m: state_of(c).update(seed=2**64), "seed: expected an integer from 0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_file_is_refused_by_name_and_nothing_changes(change, tmp_path):
    path = tmp_path / "run"
    apply, message = CHANGES[change]
    onepass.save(path, an_optimizer(5)[0], note=[1])
    opt, params = an_optimizer(0)
    before = Snapshot(opt, params)
    rewritten(path, lambda contents, tensors, metadata: None)
    onepass.load(path, an_optimizer(1)[0])  # a file that is written again with nothing changed is good
    rewritten(path, apply)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        onepass.load(path, opt)
    assert str(caught.value).startswith(f"{path}: ")
    before.assert_unchanged()
    opt.step({key: numbers(value.shape) for key, value in params.items()})


def test_all_targets_are_checked_before_one_is_written(tmp_path):
    path = tmp_path / "run"
    onepass.save(path, {"a": an_optimizer(1)[0], "b": a_layer(2), "c": an_optimizer(3)[0]})
    (a, a_params), b, (c, c_params) = an_optimizer(11), a_layer(12), an_optimizer(13, eps=1e-7)
    before = [Snapshot(a, a_params), Snapshot(None, b._state()), Snapshot(c, c_params)]
    bad = {
        r"target: 'd' is missing": {"a": a, "b": b, "d": c},
        r"target: 'c' is unknown": {"a": a, "b": b},
        r"target\['c'\]: optimizer: the state is of 'Adam'": {"a": a, "b": b, "c": an_optimizer(1, onepass.AMSGrad)[0]},
        r"target\['b'\]: state_dict: 'weight' is unknown": {"a": a, "b": onepass.BatchNorm(3, affine=False), "c": c},
        r"target\['b'\]: weight: shape \(3,\) does not match \(4,\)": {"a": a, "b": onepass.BatchNorm(4), "c": c},
        r"target\['b'\]: it is of kind 'batch_norm', not 'optimizer'": {"a": a, "b": c, "c": b},
    }
    for message, target in bad.items():
        with pytest.raises(ValueError, match=message):
            onepass.load(path, target)
    with pytest.raises(ValueError, match="target: what was saved is a dict of 'a', 'b', 'c'"):
        onepass.load(path, a)
    for snapshot in before:
        snapshot.assert_unchanged()


def test_a_target_that_cannot_be_written(tmp_path):
    path = tmp_path / "run"
    onepass.save(path, an_optimizer(1)[0])
    opt, params = an_optimizer(2)
    before = Snapshot(opt, params)
    opt.state[1]["exp_avg"].flags.writeable = False
    with pytest.raises(ValueError, match=r"state\[1\]\['exp_avg'\]: the array .* read-only"):
        onepass.load(path, opt)
    opt.state[1]["exp_avg"].flags.writeable = True
    params["b"].flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[1\] \('b'\): is read-only"):
        onepass.load(path, opt)
    before.assert_unchanged()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "run"
    onepass.save(path, an_optimizer(1)[0], note="x")
    whole = path.read_bytes()
    opt, params = an_optimizer(2)
    before = Snapshot(opt, params)
    rng = random.Random(5)
    flips = [(at, 1 << rng.randrange(8)) for at in range(len(whole))]
    damaged = [whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :] for at, mask in flips]
    damaged += [whole[:size] for size in (*range(0, len(whole), 17), len(whole) - 1)]
    damaged += [whole + b"\0", whole + whole, whole[8:], b"\0" * len(whole), whole[::-1]]
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            onepass.load(path, opt)
        if number % 100 == 0:
            before.assert_unchanged()
    before.assert_unchanged()
    assert len(damaged) > 1500
    path.write_bytes(whole)
    onepass.load(path, opt)


@pytest.mark.parametrize("content", [b"", b"{}", pathlib.Path(__file__).read_bytes(), b"\x80\x04N."])
def test_a_file_of_something_else(content, tmp_path):
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        onepass.load(tmp_path / "run", an_optimizer()[0])


def test_a_file_of_another_program(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "run")
    with pytest.raises(ValueError, match="it is no checkpoint of onepass"):
        onepass.load(tmp_path / "run", an_optimizer()[0])

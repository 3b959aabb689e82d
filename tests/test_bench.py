"""The benchmarks: that they run, say what they must, and measure as they claim. No figure is judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from onepass import _cpu

pytest.importorskip("rich")

BENCH = Path(__file__).resolve().parents[1] / "bench"
CHOICES = {
    "optimizers": "traffic/(sgd|amsgrad)/16M/2|import|numpy|^fused/(SGD|Adam)/1M|unfused/Nadam|many|small|subnormal"
    "|peers/(RMSprop|Adam|AdaGrad|Lion)/",
    "batchnorm": "numpy|without|copy|fused|^forward/(NHWC/.*56x56|NC/)|^backward/NCHW|^backward-recycled/NHWC/128x512",
    "whole_step": "^rules/(sgd|adam)/|stochastic|storage|split|whole|torch",
    "sweeps": "size/Adam/(1024|65536)$|size/SGD/64$|tensors/.*/10x|subnormal/Adam/0.1|ViT|threads/.*/1$"
    "|memory/.*/(onepass|NumPy)$",
}
QUICKLY = "^(?!torch compiled)"  # that takes its time, whatever the size


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


method = load("method", BENCH / "method.py")
suite = load("suite", BENCH / "suite.py")
arrays = load("arrays", BENCH / "peers" / "arrays.py")
numpy_formulas = load("numpy_formulas", BENCH / "peers" / "numpy_formulas.py")
contenders = load("contenders", BENCH / "peers" / "contenders.py")
optimizers = load("bench_optimizers", BENCH / "peers" / "optimizers.py")
batchnorm = load("bench_batchnorm", BENCH / "peers" / "batchnorm.py")
whole_step = load("bench_whole_step", BENCH / "peers" / "whole_step.py")
sweeps = load("bench_sweeps", BENCH / "peers" / "sweeps.py")
SCRIPTS = {"optimizers": optimizers, "batchnorm": batchnorm, "whole_step": whole_step, "sweeps": sweeps}

scripts = pytest.mark.parametrize("name", SCRIPTS)


def run_script(name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / "peers" / f"{name}.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- The scripts ------------------------------------------------------------------------------------------------------


@scripts
def test_quick_run_reports_every_kind_and_all_fields(name: str, tmp_path: Path) -> None:
    out = tmp_path / "made"
    printed = run_script(name, "--quick", "--filter", CHOICES[name], "--peers", QUICKLY, "--out", str(out))
    results = json.loads((out / f"{name}.json").read_text())
    rows, environment = results["rows"], results["environment"]

    assert {row["kind"] for row in rows} == {case.kind for case in SCRIPTS[name].all_cases()}
    known = (
        "commit",
        "cpu",
        "cpus",
        "isa",
        "threads",
        "python",
        "numpy",
        "onepass",
        "compiler",
        "command",
        "date",
        "plan",
    )
    for key in (*known, *method.PEERS):
        assert environment[key], key
    assert environment["cpus"]["usable"] >= 1
    assert environment["last_level_cache"] > 0
    assert "--filter" in environment["command"]
    assert environment["quick"] is True

    markdown = (out / f"{name}.md").read_text()
    for row in rows:
        assert row["case"] in printed
        assert row["case"] in markdown
        assert not row["failed"], row["note"]
        assert row["goal"] is None
        assert {"goal", "met", "noisy", "traffic_share", "bytes_per_second", "threads", "elements"} < set(row)
        measured = row["value"] is not None
        assert measured or row["note"].startswith(("no peer", "not ")) or row["kind"] == "memory", row
        if measured:
            assert np.isfinite([row["value"][key] for key in ("value", "low", "high")]).all()
        if measured and "mean" not in row["case"]:
            assert row["ours_seconds"] > 0.0
            assert row["rounds"] >= 3
        if row["kind"] in ("traffic", "fused", "unfused", "many") and name == "optimizers":
            assert row["traffic_share"]["value"] > 0.0
            assert row["bytes_per_second"] > 0.0
        if measured and name == "whole_step":
            assert (row["traffic_share"] is None) == (row["kind"] == "stochastic")
            assert row["bytes_per_second"] > 0.0


def test_without_torch_rows_say_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('hidden by a test')\n")
    chosen = {
        "optimizers": "fused/SGD/1M|subnormal",
        "batchnorm": "(forward|backward|recycled)/NCHW/32x64x56|copy|fused",
        "whole_step": "whole|torch",
        "sweeps": "size/Adam/64$|subnormal/Adam/0.5|memory/.*/(torch fused|NumPy)$",
    }
    rows = {}
    for name, choice in chosen.items():
        run_script(name, "--quick", "--filter", choice, "--out", str(tmp_path), PYTHONPATH=str(tmp_path))
        rows |= {row["case"]: row for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]}
    without = ["fused/SGD/1M", "subnormal/Adam/16M/torch", "whole/AdamW/torch", "torch/Adam/bfloat16"]
    without += [f"{kind}/NCHW/32x64x56x56" for kind in ("forward", "backward", "backward-recycled")]
    without += [f"size/Adam/64/torch {name}" for name in ("fused", "for-loop", "foreach", "compiled")]
    without += [
        "subnormal/Adam/0.5/torch fused",
        "subnormal/Adam/0.5/torch fused, flush_denormal",
        "memory/Adam/float32/torch fused",
    ]
    for case in without:
        assert rows[case]["value"] is None
        assert rows[case]["note"] in ("no peer: ImportError: hidden by a test", batchnorm.NOT_GLIBC)
    assert rows["fused/SGD/1M"]["ours_seconds"] > 0.0
    assert rows["forward/NCHW/32x64x56x56"]["ours_seconds"] > 0.0
    assert rows["size/Adam/64/DeepSpeed"]["note"] == "no peer: DeepSpeed needs torch"
    assert rows["memory/Adam/float32/NumPy"]["extra"]["state_bytes"] == 8.0
    for case in ("size/Adam/64/NumPy", "subnormal/Adam/0.5/NumPy in place"):
        assert rows[case]["value"] is not None
    for case in ("subnormal/Adam/16M/onepass", "copy/32x64x56x56", "fused/32x64x56x56", "whole/AdamW/traffic"):
        assert rows[case]["value"] is not None


def test_list_names_every_rule_of_the_registry_once() -> None:
    names = run_script("optimizers", "--list").split()
    assert len(set(names)) == len(names)
    for row in _cpu.registry():
        assert (f"traffic/{row['name']}/64M/2" in names) != row["yardstick"]


def test_every_coefficient_of_the_registry_has_a_value() -> None:
    assert {name for row in _cpu.registry() for name in row["coefficients"]} <= set(optimizers.COEFFICIENTS)


@scripts
def test_a_filter_that_leaves_nothing_is_an_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SCRIPTS[name].main(["--filter", "no such case", "--out", str(tmp_path)]) == 1
    assert "no case is left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (1.0, 1.001, "peer arrives at other parameters"),
        (1.0, np.nan, "peer arrives at other parameters"),
        (0.0, 0.0, "left a parameter where it was"),
        (np.nan, np.nan, "NaN or infinite"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(ours: float, theirs: float, message: str) -> None:
    data = arrays.make_data([5, 3], 1)

    def step(by: float) -> None:
        for param in data.params:
            param += np.float32(by)

    with pytest.raises(suite.CheckError, match=message):
        arrays.require_same(data, lambda: step(ours), {"peer": lambda: step(theirs)})
    arrays.require_same(data, lambda: step(1.0), {"peer": lambda: step(1.00001)})


def test_a_failed_check_becomes_a_row() -> None:
    def fail(*_: object) -> None:
        raise suite.CheckError("why")

    (row,) = suite.run_case(suite.Bench(method.Plan()), suite.Case("name", "kind", fail))
    assert (row.failed, row.met, row.note) == (True, False, "why")
    assert "FAILED" in method.cells(row)


def test_a_state_that_is_not_finite_is_found() -> None:
    data = arrays.make_data([10], 2)
    data.require_finite()
    data.slots[0][1][9] = np.inf
    with pytest.raises(suite.CheckError, match="not finite"):
        data.require_finite()


# --- Contenders -------------------------------------------------------------------------------------------------------


def test_without_their_packages_peers_are_rows_with_a_reason(tmp_path: Path) -> None:
    for package in ("jax", "deepspeed"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('hidden by a test')\n")
    pytest.importorskip("torch")
    arguments = ("--quick", "--filter", "size/Adam/64$", "--peers", "Optax|DeepSpeed|NumPy$", "--out", str(tmp_path))
    run_script("sweeps", *arguments, PYTHONPATH=str(tmp_path))
    rows = {row["peer"]: row for row in json.loads((tmp_path / "sweeps.json").read_text())["rows"]}
    assert rows["Optax"]["note"] == "no peer: ImportError: hidden by a test"
    assert rows["DeepSpeed"]["note"] == "no peer: DeepSpeed: ImportError: hidden by a test"
    assert rows["Optax"]["value"] is rows["DeepSpeed"]["value"] is None
    assert rows["NumPy"]["value"]["value"] > 0.0


@pytest.mark.parametrize("name", contenders.PAIRS)
def test_everybody_takes_the_same_steps(name: str) -> None:
    pair = contenders.PAIRS[name]
    torch, _ = suite.load_torch(1)
    # The others start threads of their own, or compile for minutes; each run of the benchmarks checks them, too.
    apart = {contenders.COMPILED, contenders.DEEPSPEED, contenders.OPTAX}
    names = [
        peer for peer in contenders.names_for(pair) if peer not in apart and ("NumPy" in peer or torch is not None)
    ]
    made = contenders.contest(pair, [(16, 8), 128], names, 1, sets=2)
    if name == "NAG" and torch is not None:  # where torch adds the momentum to the gradients themselves
        assert made.missing == {"torch foreach": "not measured: it overwrites the gradients"}
        names.remove("torch foreach")
    assert list(made.peers) == names
    for data in made.data_sets:
        assert [param.shape for param in data.params] == [(16, 8), (128,)]
    different = {array.ctypes.data for data in made.data_sets for array in (*data.written(), *data.grads)}
    assert len(different) == 2 * 2 * (2 + len(made.data_sets[0].slots[0]))
    made.check()


def test_a_peer_of_another_formula_is_found() -> None:
    wrong = contenders.Pair(
        "Adam", contenders.ADAM.ours, "Adam", contenders.ADAM.states, numpy=lambda g, s, t: 1e-4 * np.sign(g)
    )
    with pytest.raises(suite.CheckError, match="NumPy arrives at other parameters than ours"):
        contenders.contest(wrong, [100], [contenders.NUMPY], 1)


def test_a_peer_with_other_states_is_found() -> None:
    if suite.load_torch(1)[0] is None:
        pytest.skip("needs torch")
    wrong = contenders.replace(contenders.ADAM, states=("exp_avg_sq", "exp_avg"))
    with pytest.raises(suite.CheckError, match="torch for-loop arrives at other states than ours"):
        contenders.contest(wrong, [100], ["torch for-loop"], 1)


def test_a_contest_ends_with_numbers() -> None:
    made = contenders.contest(contenders.ADAM, [100], [contenders.NUMPY], 1)
    made.check()
    made.ours[0].state[0]["exp_avg"][7] = np.nan
    with pytest.raises(suite.CheckError, match="not finite"):
        made.check()


@pytest.mark.parametrize("name", ["RMSprop-centered", "RMSprop-centered-momentum"])
def test_a_variance_of_nothing_is_kept_from_torch(name: str) -> None:
    """It takes the root of what rounding leaves, after 1,200 steps; a sample of 10 us a step has 2,000."""
    if suite.load_torch(1)[0] is None:
        pytest.skip("needs torch")
    made = contenders.contest(contenders.PAIRS[name], [64], ["torch for-loop"], 1)
    for contender in made.contenders:
        assert contender.rewind is not None
        contender.rewind()
        for _ in range(2500):
            contender.run()
        assert np.all(made.ours[0].state[0]["square_avg"] > 1.0)
    made.check()
    assert all(contender.rewind is None for contender in contenders.contest(contenders.ADAM, [64], [], 1).contenders)


def test_a_compiler_that_goes_on_is_found() -> None:
    made = contenders.contest(contenders.ADAM, [100], [contenders.NUMPY], 1)
    (peer,) = made.peers[contenders.NUMPY]
    made.peers[contenders.NUMPY] = [contenders.replace(peer, settled=lambda: False)]
    with pytest.raises(suite.CheckError, match="compiled anew"):
        made.check()


def test_subnormal_moments_are_as_many_as_asked_for() -> None:
    for fraction in sweeps.FRACTIONS:
        arrays_of = [method.aligned(10_000) for _ in range(4)]
        moments = sweeps.Moments(arrays_of[0], arrays_of[1], fraction)
        moments.refill(*arrays_of[2:])
        params, grads, m, v = arrays_of
        assert np.all(params == 1.0)
        for moment in (m, v):
            low = (moment != 0.0) & (moment < np.finfo(np.float32).tiny)
            assert np.count_nonzero(low) == round(fraction * moment.size)
            np.testing.assert_array_equal(low, grads == 0.0)


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 152, 86_567_656),
        ("GPT-2 124M", 148, 124_439_808),
        ("Llama-3-8B layer", 9, 218_112_000),
    ],
)
def test_lists_of_shapes_are_those_of_the_models(model: str, tensors: int, elements: int) -> None:
    parameters = sweeps.read_model(model)
    assert len({name for name, _ in parameters}) == len(parameters) == tensors
    assert sum(np.prod(shape) for _, shape in parameters) == elements
    assert len(list((BENCH / "models").iterdir())) == len(sweeps.MODELS)


def test_sweeps_have_every_point_once() -> None:
    names = [case.name for case in sweeps.all_cases()]
    assert len(set(names)) == len(names)
    for size in (64, 1 << 10, 1 << 20, 1 << 28):
        assert f"size/Adam/{size}" in names
    for name in ("tensors/Adam/1x1000", "tensors/Adam/10000x1000", "threads/Adam/16M/1", "subnormal/Adam/1"):
        assert name in names


def test_whatever_has_a_process_of_its_own_can_be_sent_there() -> None:
    """Quick runs have no array that is large enough to need one."""
    bench = suite.Bench(suite.QUICK, quick=True, peers=re.compile("torch"))
    cases = [sweeps.sendable(case) for case in sweeps.all_cases() if case.kind == "size"]
    assert f"size/Adam/{1 << 28}" in {case.name for case in cases}
    for case in cases:
        back, same = pickle.loads(pickle.dumps((case, bench)))
        assert (back.name, back.threads, same.peers) == (case.name, case.threads, bench.peers)
    assert pickle.loads(pickle.dumps(sweeps._size_alone)) is sweeps._size_alone


# --- The whole step ---------------------------------------------------------------------------------------------------


def test_every_rule_is_measured_on_both_instruction_sets() -> None:
    names = run_script("whole_step", "--list").split()
    assert len(set(names)) == len(names)
    for row in _cpu.registry():
        for isa in ("avx512", "avx2"):
            assert (f"rules/{row['name']}/{isa}" in names) != row["yardstick"]


def test_an_instruction_set_is_only_borrowed() -> None:
    before = _cpu.isa()
    with whole_step.instruction_set("scalar"):
        assert _cpu.isa() == "scalar"
    assert _cpu.isa() == before
    bench = suite.Bench(suite.QUICK, quick=True)
    (row,) = whole_step.run_rule("sgd", "avx4096", bench, suite.Case("name", "rules", whole_step.run_rule))
    assert (row.value, row.note) == (None, "not measured: no avx4096 here")


@pytest.mark.parametrize("storage", [whole_step.ALL_FLOAT32, whole_step.STATES_FLOAT32, whole_step.ALL_BFLOAT16])
def test_arrays_are_stored_and_counted_as_they_should(storage: Any) -> None:
    data = arrays.make_data([1000], 2, storage)
    assert (data.params[0].dtype, data.grads[0].dtype, data.slots[0][1].dtype) == storage
    for array in (data.params[0], data.grads[0], *data.slots[0]):
        assert array.size == 1000
        assert array.ctypes.data % 64 == 0
    param, grad, state = (dtype.itemsize for dtype in storage)
    assert data.bytes == 1000 * (2 * param + grad + 4 * state)
    assert whole_step.bytes_of(data, norm=True, zero_grads=True) == data.bytes + 2000 * grad


def test_gradients_differ_from_step_to_step_and_are_clipped() -> None:
    gradients = whole_step.Gradients(method.aligned(5000))
    gradients.refill()
    first = gradients.array.copy()
    gradients.refill()
    assert not np.array_equal(gradients.array, first)
    norm = np.linalg.norm(first.astype(np.float64)) / whole_step.LOSS_SCALE
    assert norm > 4.0 * gradients.max_norm


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own, grads, mirror: None, None),
        (lambda own, grads, mirror: grads.fill(1.0), "gradient is not zero"),
        (lambda own, grads, mirror: mirror.fill(2.0), "not the rounded parameter"),
    ],
)
def test_a_step_that_leaves_something_out_is_not_timed(spoil: Any, message: str | None) -> None:
    data = arrays.make_data([100], 2)
    gradients = whole_step.Gradients(data.grads[0])
    averaged = whole_step.Averaged(method.aligned(100), arrays.zeros(100, whole_step.BFLOAT16))

    def step() -> None:
        data.params[0] += np.float32(1e-3) * gradients.array
        averaged.mirror[:] = data.params[0]
        gradients.array.fill(0.0)
        spoil(data, gradients.array, averaged.mirror)

    if message is None:
        made = whole_step.outcome(data, averaged, gradients, step)
        assert made[0].all()
        return
    with pytest.raises(suite.CheckError, match=message):
        whole_step.outcome(data, averaged, gradients, step)


# --- Batch normalization ----------------------------------------------------------------------------------------------


def batch(layout: str = "NCHW", *rest: int, backward: bool = False) -> Any:
    return batchnorm.make_batch(suite.Bench(suite.QUICK), (6, 5, *rest), layout, backward)


@pytest.mark.parametrize(("layout", "rest"), [("NCHW", (4, 7)), ("NHWC", (4, 7)), ("NC", ())])
def test_contenders_of_batch_normalization_agree(layout: str, rest: tuple[int, ...]) -> None:
    shared = batch(layout, *rest, backward=True)
    assert shared.x.shape == ((6, *rest, 5) if layout == "NHWC" else (6, 5, *rest))
    peers = {"numpy": batchnorm.NumpyForward(shared).step, "in-place": batchnorm.NumpyForwardInPlace(shared).step}
    torch, _ = suite.load_torch(1)
    if torch is not None:
        peers["torch"] = batchnorm.torch_forward(torch, shared)
        tensor = batchnorm.as_tensor(torch, shared, shared.x)
        assert tensor.shape == (6, 5, *rest)
        assert tensor.data_ptr() == shared.x.ctypes.data
        backward = batchnorm.torch_backward(torch, shared)
        assert list(backward) == [batchnorm.TORCH_OUT, batchnorm.TORCH_RETURNING]
        batchnorm.require_same(shared, batchnorm.our_backward(shared), backward)
    batchnorm.require_same(shared, batchnorm.our_forward(shared, out=shared.out), peers)
    shared.require_finite()


@pytest.mark.parametrize(("index", "by"), [(0, 1e-3), (0, np.nan), (1, 1e-2), (2, 1e-3), (3, 1e-2), (4, 1e-3)])
def test_a_peer_that_normalizes_otherwise_is_not_timed(index: int, by: float) -> None:
    shared = batch("NCHW", 3)
    ours = batchnorm.our_forward(shared, out=shared.out)

    def peer() -> Any:
        result: Any = ours()
        (*result, shared.running_mean, shared.running_var)[index][-1] += np.float32(by)
        return result

    batchnorm.require_same(shared, ours, {"peer": ours})
    with pytest.raises(suite.CheckError, match=f"peer makes another array {index} than ours"):
        batchnorm.require_same(shared, ours, {"peer": peer})
    with pytest.raises(suite.CheckError, match="NaN or infinite"):
        batchnorm.require_same(shared, lambda: (shared.out, shared.weight, shared.bias), {})


def test_an_output_that_is_not_finite_is_found() -> None:
    shared = batch("NCHW", 3)
    shared.require_finite()
    shared.running_var[2] = np.inf
    with pytest.raises(suite.CheckError, match="not finite"):
        shared.require_finite()


def test_halves_are_done_together_and_errors_arrive() -> None:
    both = threading.Barrier(2, timeout=60.0)
    fail: set[int] = set()

    def work(half: int) -> None:
        both.wait()
        if half in fail:
            raise ValueError(f"half {half}")

    with batchnorm.Halves(work) as halves:
        halves()
        for half in (0, 1):
            fail = {half}
            with pytest.raises(ValueError, match=f"half {half}"):
                halves()
        fail = set()
        halves()
    assert not halves._thread.is_alive()


def test_split_gives_views_of_everything() -> None:
    array = np.arange(67.0, dtype=np.float32).reshape(1, 67)
    first, second = batchnorm.split(array)
    assert (first.size, second.size) == (32, 35)
    first += 1
    second += 1
    np.testing.assert_array_equal(array[0], np.arange(1.0, 68.0))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_a_process_keeps_its_memory_where_rows_say_so() -> None:
    code = (
        "import resource, numpy as np\n"
        "def call():\n"
        "    np.empty(24 << 20, np.float32).fill(1.0)\n"
        "call()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "call()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    counts = []
    for variables in (batchnorm.RECYCLED, {}):
        with suite.environment_variables(variables):
            counts.append(int(subprocess.check_output([sys.executable, "-c", code], text=True)))
    assert counts[0] < 10 < counts[1]


def test_environment_variables_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPASS_TEST_A", "before")
    monkeypatch.setenv("ONEPASS_TEST_C", "before")
    with suite.environment_variables({"ONEPASS_TEST_A": "in", "ONEPASS_TEST_B": "in", "ONEPASS_TEST_C": None}):
        assert os.environ["ONEPASS_TEST_A"] == os.environ["ONEPASS_TEST_B"] == "in"
        assert "ONEPASS_TEST_C" not in os.environ
    assert os.environ["ONEPASS_TEST_A"] == os.environ["ONEPASS_TEST_C"] == "before"
    assert "ONEPASS_TEST_B" not in os.environ


def made_up(case: str, kind: str, value: float | None, goal: Any = None) -> Any:
    row = method.Row(case, kind, 2, 1, "ours", "peer", goal)
    row.value = None if value is None else method.Estimate(value, 0.99 * value, 1.01 * value)
    return row


def test_means_are_over_all_shapes_of_a_kind() -> None:
    rows = [made_up(case.name, case.kind, 4.0) for case in batchnorm.all_cases() if case.kind == "backward"]
    rows[0].value = method.Estimate(128.0, 127.0, 129.0)
    first, second = batchnorm.means(rows)
    assert (first.case, second.case) == ("backward/NCHW/geometric mean", "backward/NHWC/geometric mean")
    assert first.value.value == pytest.approx(8.0)
    assert first.met is True
    assert second.goal is None
    rows[0].value = None
    assert batchnorm.means(rows)[0].value is None
    assert [row.case for row in batchnorm.means(rows[1:])] == [second.case]


# --- The method -------------------------------------------------------------------------------------------------------


class FakeTime:
    """Time that passes only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("sleep")

    def work(self, name: str, *costs: float) -> method.Contender:
        """A contender whose calls cost `costs` in turn."""
        calls = iter(range(10**6))

        def run() -> None:
            self.log.append(name)
            self.now += costs[next(calls) % len(costs)]

        return method.Contender(name, run)


def test_contenders_alternate_after_a_pause() -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=0.0, min_rounds=3, max_rounds=9, sample_seconds=0.5, pause=0.25)
    samples = method.interleave([fake.work("a", 1.0), fake.work("b", 2.0)], plan, fake.clock, fake.sleep)
    measured = fake.log[fake.log.index("sleep") :]
    assert measured == ["sleep", "a", "sleep", "b"] * 3
    assert fake.log[: -len(measured)].count("a") >= 1  # warm-up
    np.testing.assert_array_equal(samples["a"], [1.0] * 3)
    np.testing.assert_array_equal(samples["b"], [2.0] * 3)


def test_quick_contenders_are_called_until_a_sample_is_long_enough() -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=1.0, pause=0.0)
    samples = method.interleave([fake.work("a", 0.125)], plan, fake.clock, fake.sleep)
    per_sample = fake.log[fake.log.index("sleep") + 1 :].index("sleep")
    assert per_sample - 1 >= 8  # one of them is not timed
    np.testing.assert_array_equal(samples["a"], [0.125] * 2)


def test_prepare_runs_before_every_call_and_is_not_timed() -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=0.0, min_rounds=4, max_rounds=4, sample_seconds=100.0, pause=0.0)
    work = fake.work("a", 1.0)
    contender = method.Contender("a", work.run, prepare=fake.work("prepare", 7.0).run)
    samples = method.interleave([contender], plan, fake.clock, fake.sleep)
    steps = [entry for entry in fake.log if entry != "sleep"]
    assert steps == ["prepare", "a"] * (len(steps) // 2)
    np.testing.assert_array_equal(samples["a"], [1.0] * 4)


def test_rewind_runs_once_before_a_sample_and_its_warming_and_is_not_timed() -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=4.0, pause=0.0)
    rewind = fake.work("rewind", 100.0).run
    contender = method.Contender.over_sets("a", [fake.work("a", 1.0).run], rewind)
    samples = method.interleave([contender], plan, fake.clock, fake.sleep)
    rounds = " ".join(fake.log).split("sleep ")[1:]
    assert [each.split() for each in rounds] == [["rewind", *["a"] * 11]] * 3  # a walk, 5 warm, 5 timed
    np.testing.assert_array_equal(samples["a"], [1.0] * 3)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (5.0, 5), (100.0, 8)])
def test_rounds_follow_the_time_within_their_bounds(seconds: float, rounds: int) -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=seconds, min_rounds=3, max_rounds=8, sample_seconds=0.5, pause=0.0)
    assert method.interleave([fake.work("a", 1.0)], plan, fake.clock, fake.sleep)["a"].size == rounds


def test_names_must_differ() -> None:
    fake = FakeTime()
    with pytest.raises(ValueError, match="names repeat: a, a"):
        method.interleave([fake.work("a", 1.0), fake.work("a", 1.0)], method.Plan(), fake.clock, fake.sleep)


def test_each_call_takes_the_next_set_of_arrays_and_all_walk_alike() -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=8.0, pause=0.0)
    contenders = [
        method.Contender.over_sets(name, [fake.work(f"{name}{index}", cost).run for index in range(3)])
        for name, cost in (("a", 1.0), ("b", 4.0))
    ]
    samples = method.interleave(contenders, plan, fake.clock, fake.sleep)
    rounds = " ".join(fake.log).split("sleep ")[1:]
    a = "a2 " + "a0 a1 a2 " * 3  # the first is not timed; whole walks, until 8 seconds are over
    assert rounds[0] == rounds[2] == a
    assert rounds[1] == "b2 b0 b1 b2 "
    np.testing.assert_array_equal(samples["a"], [1.0] * 2)
    np.testing.assert_array_equal(samples["b"], [4.0] * 2)


def test_contenders_have_as_many_sets_of_arrays() -> None:
    plan = method.Plan()
    one, two = method.Contender("one", int), method.Contender.over_sets("two", [int, int])
    with pytest.raises(ValueError, match=r"numbers of sets of arrays differ: \{'one': 1, 'two': 2\}"):
        method.interleave([one, two], plan)
    with pytest.raises(ValueError, match="cannot have several sets"):
        method.interleave([method.Contender("two", int, int, [int])], plan)


@pytest.mark.parametrize("size", [1 << 20, 32 << 20, 512 << 20])
def test_sets_of_arrays_exceed_the_last_level_cache(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer = method.Cache(2, "Unified", 1 << 20, "0"), method.Cache(3, "Unified", size // 2, "0-3")
    monkeypatch.setattr(method, "caches", lambda: [inner, outer, method.Cache(3, "Unified", size // 2, "4-7")])
    assert method.last_level_cache() == size
    assert method.cache_sizes() == {"L2": 1 << 20, "L3": size // 2}
    for each in (100, 70_000, 1 << 18, 3_000_001, 1 << 26, 1 << 31):
        sets = method.sets_for(each)
        if sets is None:
            assert each * method.MOST_SETS < method.rotated_bytes()
        else:
            assert each * sets >= max(2 * size, 64 << 20)
            assert sets == 1 or each * (sets - 1) < method.rotated_bytes()
            assert method.buffers(each * sets) == method.ROTATED
    assert method.buffers(size) == method.WARM


def test_caches_are_those_of_this_machine() -> None:
    for cache in method.caches():
        assert cache.bytes >= 1 << 10
        assert 1 <= cache.level <= 4
    assert method.last_level_cache() >= max(method.cache_sizes().values(), default=0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        over, under = 3.0 * rng.lognormal(0.0, 0.1, (1, 31))[0], rng.lognormal(0.0, 0.1, (1, 31))[0]
        estimate = method.ratio(over, under)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 3.0 <= estimate.high
    assert 180 <= hits <= 200


def test_what_disturbs_a_whole_round_does_not_widen_the_interval() -> None:
    disturbed = np.random.default_rng(1).lognormal(0.0, 0.5, 31)
    together = method.ratio(2.0 * disturbed, disturbed)
    assert together == method.Estimate(2.0, 2.0, 2.0)
    assert not together.noisy
    assert method.ratio(2.0 * disturbed, disturbed[::-1]).noisy


def test_differences_and_medians() -> None:
    a, b = np.array([5.0, 5.0, 5.0]), np.array([1.0, 2.0, 3.0])
    assert method.difference(a, b).value == 3.0
    assert method.median(b) == method.Estimate(2.0, 1.0, 3.0)


def test_the_interval_of_a_geometric_mean_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        estimates = []
        for truth in (2.0, 4.0, 8.0):
            over, under = truth * rng.lognormal(0.0, 0.1, 31), rng.lognormal(0.0, 0.1, 31)
            estimates.append(method.ratio(over, under))
        mean = method.geometric_mean(estimates)
        assert mean.value == pytest.approx(np.prod([estimate.value for estimate in estimates]) ** (1 / 3))
        hits += mean.low <= 4.0 <= mean.high
    assert 180 <= hits <= 200


def test_a_goal_is_met_missed_or_left_open() -> None:
    quiet, noisy = method.Estimate(1.0, 0.95, 1.05), method.Estimate(1.0, 0.8, 1.2)
    expected: dict[tuple[str, float], tuple[bool | None, bool | None]] = {
        (">=", 0.7): (True, True),
        (">=", 1.0): (None, None),
        (">=", 1.02): (None, None),
        (">=", 1.1): (False, None),
        (">=", 1.3): (False, False),
        ("<=", 1.3): (True, True),
        ("<=", 1.0): (None, None),
        ("<=", 0.98): (None, None),
        ("<=", 0.9): (False, None),
        ("<=", 0.7): (False, False),
    }
    for (sense, bound), met in expected.items():
        goal = method.Goal(sense, bound)
        assert (goal.met(quiet), goal.met(noisy)) == met, goal


def test_arrays_begin_at_a_cache_line() -> None:
    for count in (1, 15, 16, 1000):
        array = method.aligned(count)
        assert array.shape == (count,)
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable
        assert not array.any()
    filled = method.aligned(10)
    method.fill_with(filled, np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(filled, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (2.0, "2 s"), (0.01234, "12.3 ms"), (2.5e-6, "2.5 us"), (3e-7, "0.3 us")]
)
def test_seconds_have_three_digits(seconds: float | None, text: str) -> None:
    assert method.format_seconds(seconds) == text


def test_results_are_of_a_clean_commit() -> None:
    files = sorted((BENCH / "results").glob("*.json"))
    assert files
    page = (BENCH.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    _, _, causes = page.partition("<!-- end of missed -->")
    for file in files:
        results = json.loads(file.read_text())
        if file.stem == "micro":  # in the form of google-benchmark
            commit = results["context"]["onepass_commit"]
            assert commit not in ("", "unknown"), file
            assert "dirty" not in commit, file
            assert results["benchmarks"], file
            assert not any(entry.get("error_occurred") for entry in results["benchmarks"]), file
            continue
        assert "dirty" not in results["environment"]["commit"], file
        if file.stem == "soak":
            assert results["clean"], file
            assert not results["wrong"], file
            continue
        assert not results["environment"]["quick"], file
        for row in results["rows"]:
            assert not row["failed"] or f"`{file.stem}/{row['case']}`" in causes, f"{row['case']}: no cause"

"""The benchmarks: that they run, say what they must, and measure as they claim. No figure is judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
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
    "optimizers": "traffic/(sgd|amsgrad)/16M/2|import|numpy|^fused/(SGD|Adam)/1M|unfused/Nadam|many|small|subnormal",
    "batchnorm": "numpy|without|copy|fused|^forward/(NHWC/.*56x56|NC/)|^backward/NCHW|^backward-recycled/NHWC/128x512",
    "whole_step": "^rules/(sgd|adam)/|stochastic|storage|split|whole|torch",
}


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
summary = load("bench_summary", BENCH / "summary.py")
optimizers = load("bench_optimizers", BENCH / "peers" / "optimizers.py")
batchnorm = load("bench_batchnorm", BENCH / "peers" / "batchnorm.py")
whole_step = load("bench_whole_step", BENCH / "peers" / "whole_step.py")
SCRIPTS = {"optimizers": optimizers, "batchnorm": batchnorm, "whole_step": whole_step}

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
    printed = run_script(name, "--quick", "--filter", CHOICES[name], "--out", str(out))
    results = json.loads((out / f"{name}.json").read_text())
    rows, environment = results["rows"], results["environment"]

    assert {row["kind"] for row in rows} == {case.kind for case in SCRIPTS[name].all_cases()}
    for key in ("commit", "cpu", "isa", "threads", "python", "numpy", "torch", "onepass", "command", "date", "plan"):
        assert environment[key], key
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
        assert measured or row["note"].startswith(("no peer", "not ")), row
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
    }
    rows = {}
    for name, choice in chosen.items():
        run_script(name, "--quick", "--filter", choice, "--out", str(tmp_path), PYTHONPATH=str(tmp_path))
        rows |= {row["case"]: row for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]}
    without = ["fused/SGD/1M", "subnormal/Adam/16M/torch", "whole/AdamW/torch", "torch/Adam/bfloat16"]
    without += [f"{kind}/NCHW/32x64x56x56" for kind in ("forward", "backward", "backward-recycled")]
    for case in without:
        assert rows[case]["value"] is None
        assert rows[case]["note"] in ("no peer: ImportError: hidden by a test", batchnorm.NOT_GLIBC)
    assert rows["fused/SGD/1M"]["ours_seconds"] > 0.0
    assert rows["forward/NCHW/32x64x56x56"]["ours_seconds"] > 0.0
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
    data = optimizers.make_data([5, 3], 1)

    def step(by: float) -> None:
        for param in data.params:
            param += np.float32(by)

    with pytest.raises(suite.CheckError, match=message):
        optimizers.require_same(data, lambda: step(ours), {"peer": lambda: step(theirs)})
    optimizers.require_same(data, lambda: step(1.0), {"peer": lambda: step(1.00001)})


def test_a_failed_check_becomes_a_row() -> None:
    def fail(*_: object) -> None:
        raise suite.CheckError("why")

    (row,) = suite.run_case(suite.Bench(method.Plan()), suite.Case("name", "kind", fail))
    assert (row.failed, row.met, row.note) == (True, False, "why")
    assert "FAILED" in method.cells(row)


def test_a_state_that_is_not_finite_is_found() -> None:
    data = optimizers.make_data([10], 2)
    data.require_finite()
    data.slots[0][1][9] = np.inf
    with pytest.raises(suite.CheckError, match="not finite"):
        data.require_finite()


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
    data = optimizers.make_data([1000], 2, storage)
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
    data = optimizers.make_data([100], 2)
    gradients = whole_step.Gradients(data.grads[0])
    averaged = whole_step.Averaged(method.aligned(100), optimizers.zeros(100, whole_step.BFLOAT16))

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
        with batchnorm.environment_variables(variables):
            counts.append(int(subprocess.check_output([sys.executable, "-c", code], text=True)))
    assert counts[0] < 10 < counts[1]


def test_environment_variables_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEPASS_TEST_A", "before")
    with batchnorm.environment_variables({"ONEPASS_TEST_A": "in", "ONEPASS_TEST_B": "in"}):
        assert os.environ["ONEPASS_TEST_A"] == os.environ["ONEPASS_TEST_B"] == "in"
    assert os.environ["ONEPASS_TEST_A"] == "before"
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


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (5.0, 5), (100.0, 8)])
def test_rounds_follow_the_time_within_their_bounds(seconds: float, rounds: int) -> None:
    fake = FakeTime()
    plan = method.Plan(seconds=seconds, min_rounds=3, max_rounds=8, sample_seconds=0.5, pause=0.0)
    assert method.interleave([fake.work("a", 1.0)], plan, fake.clock, fake.sleep)["a"].size == rounds


def test_names_must_differ() -> None:
    fake = FakeTime()
    with pytest.raises(ValueError, match="names repeat: a, a"):
        method.interleave([fake.work("a", 1.0), fake.work("a", 1.0)], method.Plan(), fake.clock, fake.sleep)


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
        (">=", 1.0): (True, None),
        (">=", 1.02): (None, None),
        (">=", 1.1): (False, None),
        (">=", 1.3): (False, False),
        ("<=", 1.3): (True, True),
        ("<=", 1.0): (True, None),
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


def test_readme_shows_the_figures_of_the_last_runs() -> None:
    command = [sys.executable, str(BENCH / "summary.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tables_are_made_of_whatever_was_measured(tmp_path: Path) -> None:
    text = summary.README.read_text(encoding="utf-8")
    assert "Not measured yet; `python bench/peers/batchnorm.py`" in summary.page(text, tmp_path)
    rows = [made_up(case.name, case.kind, 2.5) for case in batchnorm.all_cases()]
    rows += [made_up("numpy/32x64x56x56/formula", "numpy", 31.25), *batchnorm.means(rows)]
    rows[-1].value = None
    environment = {"cpu": "a cpu", "isa": "an isa", "threads": 2, "torch": "1", "numpy": "2"}
    method.write_results(rows, environment, tmp_path, "batchnorm")
    page = summary.page(text, tmp_path)
    assert "Not measured yet; `python bench/peers/optimizers.py`" in page
    assert "| forward, NHWC, against torch channels_last | 2.50x, 2.50x, 2.50x, 2.50x, 2.50x | 1.6x |" in page
    assert "| forward, the formula in NumPy | 31.2x | 15x |" in page
    assert "geometric mean 2.50x | 1.8x, mean 4x |" in page
    assert "geometric mean not measured | |" in page
    assert "Not measured yet; `python bench/peers/whole_step.py`" in page
    assert summary.page(page) == summary.page(text)
    assert tuple(batchnorm._name(shape) for shape in batchnorm.SHAPES) == summary.SHAPES


def test_the_table_of_the_whole_step(tmp_path: Path) -> None:
    names = {case.name for case in whole_step.all_cases()} - {"whole/AdamW"} | {
        "whole/AdamW/torch",
        "whole/AdamW/traffic",
    }
    rows = [made_up(name, "kind", None if name == "rules/sgd/avx512" or "avx2" in name else 2.5) for name in names]
    method.write_results(rows, {"cpu": "a cpu", "isa": "an isa", "threads": 2, "torch": "1"}, tmp_path, "whole_step")
    page = summary.page(summary.README.read_text(encoding="utf-8"), tmp_path)
    assert "Measured on a cpu (an isa, 2 threads), 16M elements, against torch 1; `~`: noisy." in page
    assert "against torch's six calls | 2.50x | 1.6x |" in page
    assert "| the same: share of the yardstick's speed | 2.50 | 0.9 |" in page
    assert "speed | AVX-512 2.50 to 2.50; AVX2 not measured | 0.9 |" in page
    assert "rounding to nearest | 2.50x, 2.50x | 1.3x |" in page
    assert tuple(summary.ISAS.values()) == whole_step.ISAS


def test_results_are_of_a_clean_commit() -> None:
    files = sorted((BENCH / "results").glob("*.json"))
    assert files
    for file in files:
        results = json.loads(file.read_text())
        assert "dirty" not in results["environment"]["commit"], file
        if file.stem == "soak":
            assert results["clean"], file
            assert not results["wrong"], file
            continue
        assert not results["environment"]["quick"], file
        assert not any(row["failed"] for row in results["rows"]), file

"""The benchmarks: that they run, say what they must, and measure as they claim. No figure is judged here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from onepass import _cpu

pytest.importorskip("rich")

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPT = BENCH / "peers" / "optimizers.py"
CHOICE = "traffic/(sgd|amsgrad)/16M/2|import|numpy|^fused/(SGD|Adam)/1M|unfused/Nadam|many|small|subnormal"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


method = load("method", BENCH / "method.py")
optimizers = load("bench_optimizers", SCRIPT)


def run_script(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- The script -------------------------------------------------------------------------------------------------------


def test_quick_run_reports_every_kind_and_all_fields(tmp_path: Path) -> None:
    out = tmp_path / "made"
    printed = run_script("--quick", "--filter", CHOICE, "--out", str(out))
    results = json.loads((out / "optimizers.json").read_text())
    rows, environment = results["rows"], results["environment"]

    assert {row["kind"] for row in rows} == {case.kind for case in optimizers.all_cases()}
    for key in ("commit", "cpu", "isa", "threads", "python", "numpy", "torch", "onepass", "command", "date", "plan"):
        assert environment[key], key
    assert "--filter" in environment["command"]
    assert environment["quick"] is True

    markdown = (out / "optimizers.md").read_text()
    for row in rows:
        assert row["case"] in printed
        assert row["case"] in markdown
        assert not row["failed"], row["note"]
        assert {"goal", "met", "noisy", "traffic_share", "bytes_per_second", "threads", "elements"} < set(row)
        measured = row["value"] is not None
        assert measured or row["note"].startswith("no peer"), row
        if measured:
            assert np.isfinite([row["value"][key] for key in ("value", "low", "high")]).all()
            assert row["ours_seconds"] > 0.0
            assert row["rounds"] >= 3
        if row["kind"] in ("traffic", "fused", "unfused", "many"):
            assert row["traffic_share"]["value"] > 0.0
            assert row["bytes_per_second"] > 0.0


def test_without_torch_rows_say_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('hidden by a test')\n")
    run_script("--quick", "--filter", "fused/SGD/1M|subnormal", "--out", str(tmp_path), PYTHONPATH=str(tmp_path))
    rows = {row["case"]: row for row in json.loads((tmp_path / "optimizers.json").read_text())["rows"]}
    for name in ("fused/SGD/1M", "subnormal/Adam/16M/torch"):
        assert rows[name]["value"] is None
        assert rows[name]["note"] == "no peer: ImportError: hidden by a test"
    assert rows["fused/SGD/1M"]["ours_seconds"] > 0.0
    assert rows["subnormal/Adam/16M/onepass"]["value"] is not None


def test_list_names_every_rule_of_the_registry_once() -> None:
    names = run_script("--list").split()
    assert len(set(names)) == len(names)
    for row in _cpu.registry():
        assert (f"traffic/{row['name']}/64M/2" in names) != row["yardstick"]


def test_every_coefficient_of_the_registry_has_a_value() -> None:
    assert {name for row in _cpu.registry() for name in row["coefficients"]} <= set(optimizers.COEFFICIENTS)


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizers.main(["--filter", "no such case", "--out", str(tmp_path)]) == 1
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

    with pytest.raises(optimizers.CheckError, match=message):
        optimizers.require_same(data, lambda: step(ours), {"peer": lambda: step(theirs)})
    optimizers.require_same(data, lambda: step(1.0), {"peer": lambda: step(1.00001)})


def test_a_failed_check_becomes_a_row() -> None:
    def fail(*_: object) -> None:
        raise optimizers.CheckError("why")

    (row,) = optimizers.run_case(optimizers.Bench(method.Plan()), optimizers.Case("name", "kind", fail))
    assert (row.failed, row.met, row.note) == (True, False, "why")
    assert "FAILED" in method.cells(row)


def test_a_state_that_is_not_finite_is_found() -> None:
    data = optimizers.make_data([10], 2)
    data.require_finite()
    data.slots[0][1][9] = np.inf
    with pytest.raises(optimizers.CheckError, match="not finite"):
        data.require_finite()


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


def test_readme_shows_the_figures_of_the_last_run():
    command = [sys.executable, str(BENCH / "summary.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_results_are_of_a_clean_commit():
    results = json.loads((BENCH / "results" / "optimizers.json").read_text())
    assert not results["environment"]["quick"]
    assert "dirty" not in results["environment"]["commit"]
    assert not any(row["failed"] for row in results["rows"])

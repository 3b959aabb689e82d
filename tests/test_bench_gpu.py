"""The benchmark of CUDA devices: that it runs, judges and writes as it claims. No figure is judged here.

Its cases run at tiny sizes wherever CUDA kernels do, on the host too, with a timer that tells what it was told to tell.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_arrays

pytest.importorskip("rich")

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> Any:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


gpu = load("gpu")
cases = load("gpu_cases")
method = cases.method


# --- The timer --------------------------------------------------------------------------------------------------------


class FakeDevice:
    """Stands for CuPy's events, and for work that takes a device some time. The host is quick."""

    def __init__(self) -> None:
        self.now, self.log, self.cuda, self.nbytes, self.data = 0.0, [], self, 8, self

    def Event(self) -> Any:  # noqa: N802
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now
                device.log.append("event")

            def synchronize(self) -> None:
                device.log.append("wait")

        return Event()

    def get_elapsed_time(self, start: Any, end: Any) -> float:
        return 1e3 * (end.at - start.at)

    def get_current_stream(self) -> Any:
        return self

    def synchronize(self) -> None:
        pass

    def memset_async(self, value: int, size: int) -> None:
        self.work("hold", 1e-4)

    def work(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log.append(name)


def test_events_enclose_the_calls_and_nothing_else() -> None:
    device = FakeDevice()
    timer = cases.EventTimer(device, device)
    assert timer.fill_seconds == pytest.approx(1e-4)
    del device.log[:]
    assert timer.seconds(lambda: device.work("a", 0.5), 3, 2.5e-4) == pytest.approx(1.5)
    assert device.log == ["hold"] * 4 + ["event", "a", "a", "a", "event", "wait"]


def test_contenders_alternate_and_the_device_is_busy_while_the_host_enqueues() -> None:
    device = FakeDevice()
    timer = cases.EventTimer(device, device)
    plan = method.Plan(seconds=0.0, min_rounds=3, max_rounds=9, sample_seconds=0.5, pause=0.0)
    contenders = [method.Contender(name, lambda n=name, s=s: device.work(n, s)) for name, s in (("a", 0.5), ("b", 2.0))]
    samples = timer.interleave(contenders, plan)
    np.testing.assert_allclose(samples["a"], [0.5] * 3)
    np.testing.assert_allclose(samples["b"], [2.0] * 3)
    text = "".join({"event": "(", "wait": ")", "hold": "-"}.get(entry, entry) for entry in device.log)
    assert re.search(r"(?:-+\(a\(\)-+\(b\(\)){3}$", text), text
    assert text.count("a") >= 3 + 4  # warm-up


def test_calls_fill_a_sample_and_prepare_is_not_timed() -> None:
    device = FakeDevice()
    timer = cases.EventTimer(device, device)
    plan = method.Plan(seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=1.0, pause=0.0)
    quick = method.Contender("quick", lambda: device.work("quick", 0.125))
    prepared = method.Contender("prepared", lambda: device.work("run", 0.25), lambda: device.work("prepare", 9.0))
    samples = timer.interleave([quick, prepared], plan)
    np.testing.assert_allclose(samples["quick"], [0.125] * 2)
    np.testing.assert_allclose(samples["prepared"], [0.25] * 2)
    last = device.log[len(device.log) - 1 - device.log[::-1].index("prepare") :]
    assert last[0] == "prepare"
    assert [entry for entry in last if entry != "hold"] == ["prepare", "event", "run", "event", "wait"]
    assert device.log[: -len(last)][-10:].count("quick") == 8
    with pytest.raises(ValueError, match="names repeat: quick, quick"):
        timer.interleave([quick, quick], plan)


def test_host_time_is_that_of_single_calls() -> None:
    samples = cases.WallTimer().host_seconds({"a": lambda: time.sleep(0.002), "b": lambda: None}, 20)
    assert samples["a"].size == samples["b"].size == 20
    assert np.median(samples["a"]) >= 0.002 > np.median(samples["b"])


# --- The cases, at tiny sizes, with a timer of our choice -------------------------------------------------------------


class ToldTimer:
    """Calls each contender twice and tells the seconds that it was told."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, []

    def _tell(self, name: str) -> Any:
        self.asked.append(name)
        value = self.seconds.get(name.partition(" ")[0], 1.0)
        return value * np.linspace(0.99, 1.01, 5)

    def interleave(self, contenders: Any, plan: Any) -> Any:
        for contender in contenders:
            for _ in range(2):
                if contender.prepare is not None:
                    contender.prepare()
                contender.run()
        return {contender.name: self._tell(contender.name) for contender in contenders}

    def host_seconds(self, steps: Any, calls: int) -> Any:
        for step in steps.values():
            step()
        return {name: self._tell(name) for name in steps}


@pytest.fixture
def machine() -> Any:
    """A tiny one, without torch, on whatever runs CUDA kernels here."""
    why = cuda_arrays.why_not()
    if why:
        pytest.skip(why)
    copy = cases.Copy(cuda_arrays.cp, 4096)
    return cases.Machine(
        cuda_arrays.cp, ToldTimer(), copy, None, "no peer: hidden by a test", cases.QUICK, 1 << 17, 10_000
    )


def one_of_each_kind() -> list[Any]:
    chosen = {case.kind + case.name.split("/")[1]: case for case in cases.all_cases() if "float32" in case.name}
    return list((chosen | {case.kind: case for case in cases.all_cases()}).values())


def test_cases_have_names_of_their_own_and_kinds_that_the_goals_know() -> None:
    all_cases = cases.all_cases()
    names = [case.name for case in all_cases]
    assert len(set(names)) == len(names)
    kinds = {case.kind for case in all_cases} | {"host", "launches", "batchnorm-mean"}
    assert {wanted.kind for wanted in gpu.GOALS} | {"copy"} == kinds
    rules = {name.partition("/")[2] for name in names if name.startswith("rules/")}
    assert rules == {row["name"] for row in cases._cpu.registry() if not row["yardstick"]}
    fused = {case.name.split("/")[1] for case in all_cases if case.kind == "fused"}
    assert {"SGD", "Adam", "AdamW", "AMSGrad", "AdaGrad"} < fused
    assert sum(case.kind == "batchnorm" for case in all_cases) == 2 * 2 * 2 * 6


@pytest.mark.cuda
@pytest.mark.parametrize("case", one_of_each_kind(), ids=lambda case: case.name)
def test_a_case_runs_ours_and_says_what_it_lacks(case: Any, machine: Any) -> None:
    rows = cases.run_case(machine, case)
    for row in rows:
        assert not row.failed, row.note
        assert (row.value is not None) or "no peer: hidden" in row.note, row
        if row.kind not in ("launches", "graph", "host", "batchnorm-mean"):
            assert row.bytes
        assert json.loads(json.dumps(row.record(), allow_nan=False))["case"] == row.case
    if case.kind == "many":
        assert {row.case.rpartition("/")[2] for row in rows} == {"launches", "device", "host"}


def tensor_on_host(torch: Any, array: Any) -> Any:
    """A tensor over the memory of a device, where that is the host's."""
    if array.dtype == cases.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)._host()).view(torch.bfloat16)
    return torch.from_numpy(array._host())


TORCH_CASES = (
    *("fused/Adam/64M", "fused/AdaGrad/64M", "fused/AdamW/64M", "unfused/RMSprop-centered/64M", "unfused/Nadam/64M"),
    *("fused-bfloat16/Adam/64M", "whole/AdamW/64M", "many/Adam/1000x1000"),
    *(
        f"batchnorm/{passes}/{layout}/{dtype}/128x512x28x28"
        for passes in ("forward", "backward")
        for layout in cases.LAYOUTS
        for dtype in ("float32", "bfloat16")
    ),
)


@pytest.mark.cuda
@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch_arrives_where_ours_does(name: str, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda_arrays.ON_HOST:
        pytest.skip("torch works on the host here")
    machine.torch = pytest.importorskip("torch")
    monkeypatch.setattr(cases, "as_tensor", tensor_on_host)
    case = next(case for case in cases.all_cases() if case.name == name)
    rows = [row for row in cases.run_case(machine, case) if row.kind == case.kind]
    for row in rows:
        assert not row.failed, row.note
        assert row.value is not None, row.note
        if row.kind == "batchnorm":
            assert "cuDNN cannot: " in row.note
            assert row.note.endswith("; against torch's own")
        elif row.kind == "unfused":
            assert re.search(r"torch foreach \S+ m?s, torch for-loop", row.note), row.note
        else:
            assert row.peer in ("torch fused", "torch, six calls"), row


@pytest.mark.cuda
def test_without_a_fused_kernel_torch_has_others(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda_arrays.ON_HOST:
        pytest.skip("torch works on the host here")
    machine.torch = pytest.importorskip("torch")
    monkeypatch.setattr(cases, "as_tensor", tensor_on_host)
    arguments = (cases.optimizers.UNFUSED_PAIRS[0], cases.MIDDLE, None, cases.FUSED, (cases.FLOAT32,) * 3)
    (row,) = cases.run_torch(*arguments, machine, cases.Case("name", "fused", None))
    assert "torch fused cannot: TypeError" in row.note
    assert row.peer in cases.UNFUSED
    assert row.value is not None


@pytest.mark.cuda
@pytest.mark.parametrize("index", range(5))
def test_a_batch_norm_that_computes_something_else_is_not_timed(
    index: int, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cuda_arrays.ON_HOST:
        pytest.skip("torch works on the host here")
    machine.torch = pytest.importorskip("torch")
    monkeypatch.setattr(cases, "as_tensor", tensor_on_host)
    real = cases._first_result

    def spoilt(passes: Any, backward: bool) -> Any:
        result = real(passes, backward)
        if len(result) > 3:
            result[index].view(-1)[-1] += 0.05
        return result

    monkeypatch.setattr(cases, "_first_result", spoilt)
    case = next(case for case in cases.all_cases() if case.name.startswith("batchnorm/forward/NCHW/float32"))
    (row,) = cases.run_case(machine, case)
    assert (row.failed, row.note) == (True, f"torch's own makes another array {index} than ours")


def test_kernels_have_short_names() -> None:
    name = "void onepass::cuda::(anonymous namespace)::update_kernel<onepass::Adam, 4>(onepass::Table)"
    assert cases.short_name(name) == "onepass::cuda::update_kernel"
    assert cases.short_name("Memset (Device)") == "Memset"


@pytest.mark.cuda
def test_launches_are_counted(machine: Any) -> None:
    data = cases.many_data(machine)
    optimizer = cases.onepass.Adam(data.params, grads=data.grads)
    optimizer.step()
    count, note = cases.count_launches(machine, optimizer)
    assert 1 <= count <= 4, note
    if cuda_arrays.ON_HOST:
        step = cases.optimizers.kernel_step("adam", cases.make_data(machine, [1000], 2))
        assert len(cases.launches_on_host(step)) == 1  # not the host's kernels on the device's memory


@pytest.mark.cuda
def test_a_share_of_the_copys_rate_counts_the_bytes_of_both(machine: Any) -> None:
    machine.timer = ToldTimer(onepass=4.0, copy=1.0)
    row = cases.new_row(cases.Case("name", "rules", None), 1, "copy", method.Goal(">=", 0.92), bytes=8 * 4096)
    cases.against_copy(machine, row, lambda: None)
    assert row.value.value == pytest.approx(1.0)  # four times the bytes of the copy, in four times its time
    assert row.met
    row.bytes = 7 * 4096
    cases.against_copy(machine, row, lambda: None)
    assert row.value.value == pytest.approx(7 / 8)
    assert row.met is False


@pytest.mark.cuda
def test_comparisons_are_with_the_fastest_or_with_the_one_that_is_meant(machine: Any) -> None:
    machine.timer = ToldTimer(onepass=2.0, slow=8.0, quick=3.0)
    row = cases.new_row(cases.Case("name", "fused", None), 1, "torch", method.Goal(">=", 2.0))
    peers = {"slow": lambda: None, "quick": lambda: None}
    cases.compare(machine, row, lambda: None, peers)
    assert (row.peer, row.value.value, row.met) == ("quick", pytest.approx(1.5), False)
    assert "slow 8 s, quick 3 s" in row.note
    cases.compare(machine, row, lambda: None, peers, against="slow")
    assert (row.peer, row.value.value, row.met) == ("slow", pytest.approx(4.0), True)
    cases.compare(machine, row, lambda: None, {}, against="slow")


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (1.0, 1.001, "peer arrives at other parameters than ours \\(by 0.001 of itself"),
        (1.0, np.nan, "peer arrives at other parameters"),
        (0.0, 0.0, "left a parameter where it was"),
        (np.nan, np.nan, "NaN or infinite"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(
    ours: float, theirs: float, message: str, machine: Any
) -> None:
    data = cases.make_data(machine, [5, 3])

    def step(by: float) -> None:
        for param in data.params:
            param[...] = param + np.float32(by)

    def fails() -> None:
        raise RuntimeError("not there\nsecond line")

    with pytest.raises(cases.CheckError, match=message):
        cases.require_same(data, lambda: step(ours), {"peer": lambda: step(theirs)})
    peers = {"peer": lambda: step(1.00001), "other": fails}
    assert cases.require_same(data, lambda: step(1.0), peers) == "other cannot: RuntimeError: not there"
    assert list(peers) == ["peer"]


@pytest.mark.cuda
def test_numbers_repeat_and_pieces_cover_both_ends(machine: Any) -> None:
    block = np.arange(1, 8, dtype=np.float32)
    array = cases.repeated(cuda_arrays.cp, block, 17, cases.BFLOAT16)
    np.testing.assert_array_equal(cases.pieces(array)[0], [*range(1, 8), *range(1, 8), 1, 2, 3])
    large = cases.repeated(cuda_arrays.cp, np.arange(1000, dtype=np.float32), 3_000_000, cases.FLOAT32)
    parts = cases.pieces(large)
    assert [part.size for part in parts] == [cases.PIECE] * cases.PIECES
    assert (parts[0][0], parts[-1][-1]) == (0.0, 999.0)
    large[-1] = np.nan
    with pytest.raises(cases.CheckError, match="not finite"):
        cases.require_finite([large])


@pytest.mark.cuda
def test_whatever_goes_wrong_in_a_case_is_a_row(machine: Any) -> None:
    def check(*_: Any) -> Any:
        raise cases.CheckError("another result")

    def fault(*_: Any) -> Any:
        raise KeyError("oops")

    for run, note in ((check, "another result"), (fault, "KeyError: 'oops'")):
        (row,) = cases.run_case(machine, cases.Case("name", "kind", run))
        assert (row.failed, row.met, row.note) == (True, False, note)


@pytest.mark.cuda
def test_every_kernel_of_the_small_run(machine: Any) -> None:
    assert cases.small_run(cuda_arrays.cp) > 100


def test_a_quick_run_has_no_goals_and_a_run_without_a_device_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = cases.Lines(tmp_path / "lines")
    for quick in (False, True):
        lines.add([cases.Row("name", "rules", 0, 1, "ours", "copy", method.Goal(">=", 0.9))], quick)
    goals = [json.loads(line)["row"]["goal"] for line in (tmp_path / "lines").read_text().splitlines()]
    assert goals == [{"sense": ">=", "bound": 0.9}, None]
    lines.add([measured("name", "rules", np.nan)], quick=False)
    last = json.loads((tmp_path / "lines").read_text().splitlines()[-1])["row"]
    assert (last["failed"], last["note"], lines.rows[-1].failed) == (True, "a figure is not finite", True)
    monkeypatch.setattr(cases._cpu, "cuda_devices", list)
    assert cases.main([]) == 1
    assert "there is no CUDA device" in capsys.readouterr().err
    assert cases.main(["--list", "--only", "^rules/sgd$"]) == 0
    assert capsys.readouterr().out.split() == ["rules/sgd"]


def measured(case: str, kind: str, value: float, goal: Any = None, measure: str = "peer / ours") -> Any:
    row = method.Row(case, kind, 0, 1, "onepass", "peer", goal, measure)
    row.value = method.Estimate(value, 0.99 * value, 1.01 * value)
    return row


def test_means_are_over_all_shapes() -> None:
    rows = [measured(case.name, case.kind, 2.0) for case in cases.all_cases() if case.kind == "batchnorm"]
    rows[0].value = method.Estimate(128.0, 127.0, 129.0)
    means = {row.case: row for row in cases.means(rows)}
    assert len(means) == 9
    assert means["batchnorm/forward/NCHW/bfloat16/geometric mean"].value.value == pytest.approx(4.0)
    assert means["batchnorm/backward/NHWC/float32/geometric mean"].goal is None
    whole = means["batchnorm/geometric mean"]
    assert whole.met
    assert whole.value.value == pytest.approx(2.0 * 64 ** (1 / 48))
    rows[0].failed = True
    assert len(cases.means(rows)) == 7


# --- The tables -------------------------------------------------------------------------------------------------------


def records() -> list[Any]:
    rows = [
        measured("rules/a", "rules", 0.95, method.Goal(">=", 0.92), "share of the copy's rate"),
        measured("rules/b", "rules", 0.97, method.Goal(">=", 0.92), "share of the copy's rate"),
        measured("fused/a", "fused", 1.2, method.Goal(">=", 1.0)),
        measured("fused/b", "fused", 0.9, method.Goal(">=", 1.0)),
        measured("fused/c", "fused", 0.1),  # without a goal
        measured("unfused/a", "unfused", 2.49, method.Goal(">=", 2.5)),
        measured("many/x/launches", "launches", 3.0, method.Goal("<=", 4.0), "launches"),
        measured("many/x/host", "host", 55e-6, method.Goal("<=", 60e-6), "ours"),
        method.Row(
            "whole/a", "whole", 0, 0, "onepass", "", method.Goal(">=", 1.8), note="no peer: torch | is not here"
        ),
        method.Row("storage/a", "storage", 0, 0, "onepass", "", note="another result", failed=True),
        measured("graph/a", "graph", 3.0),
    ]
    return [json.loads(json.dumps(row.record(), allow_nan=False)) for row in rows]


def test_goals_are_judged_by_all_cases_of_a_kind() -> None:
    table = {entry["kind"]: entry for entry in gpu.goals(records())}
    judged = {kind: (entry["met"], entry["figure"]) for kind, entry in table.items() if entry["cases"]}
    assert judged == {
        "rules": (True, "0.950 to 0.970; least: rules/a"),
        "fused": (False, "0.90x to 1.20x; least: fused/b"),
        "unfused": (None, "2.49x"),  # its interval reaches the goal
        "launches": (True, "3"),
        "host": (True, "55 us"),
        "whole": (None, "not measured"),
        "storage": (None, "not measured"),
        "graph": (None, "3.00x"),
    }
    assert table["fused"]["missed"] == ["fused/b"]
    lines = gpu.goal_table(gpu.goals(records())).splitlines()
    ends = {line.split(" | ")[0].strip("| "): line.rpartition(" | ")[2].strip("| ") for line in lines[2:]}
    said = {wanted.kind: ends[wanted.what] for wanted in gpu.GOALS}
    assert {kind: said[kind] for kind in judged} == {
        "rules": "yes",
        "fused": "NO",
        "unfused": "open",
        "launches": "yes",
        "host": "yes",
        "whole": "",
        "storage": "FAILED",
        "graph": "",
    }


def test_files_hold_what_there_is(tmp_path: Path) -> None:
    results = gpu.Results({"commit": "abc", "quick": False, "device": "a device"})
    results.stages.append(gpu.Stage("build", True, "built", 1.0))
    results.write(tmp_path)
    assert not results.failed
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []
    results.rows = records()
    results.stages.append(gpu.Stage("tests", False, "1 failed", 2.0, ["why | not"]))
    results.write(tmp_path)
    assert results.failed
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["environment"]["device"] == "a device"
    assert [stage["passed"] for stage in written["stages"]] == [True, False]
    assert len(written["goals"]) == len(gpu.GOALS)
    markdown = (tmp_path / "gpu.md").read_text()
    assert "Measured on a device." in markdown
    assert "| tests | FAILED | 1 failed | 2 s |" in markdown
    assert "torch \\| is not here" in markdown
    assert "why | not" in markdown
    for row in records():
        (line,) = (line for line in markdown.splitlines() if line.startswith(f"| {row['case']} |"))
        assert len(re.findall(r"(?<!\\)\|", line)) == 12
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


# --- The stages -------------------------------------------------------------------------------------------------------


def options(out: Path, *arguments: str) -> Any:
    return gpu.parse_arguments(["--out", str(out), *arguments])


FAKE_CASES = """
import json, os, pathlib, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
skip = pathlib.Path(arguments["--skip"]).read_text().split()
row = json.loads({row!r})
with open(arguments["--lines"], "a", buffering=1) as lines:
    def write(**entry):
        lines.write(json.dumps(entry) + "\\n")
    write(environment=dict(device="a device", commit="never", ran=len(skip)))
    for case in ("rules/a", "rules/dies", "rules/b", "rules/hangs", "rules/c"):
        if case in skip:
            continue
        write(begin=case)
        if case == "rules/dies":
            lines.write('{{"row": ')
            lines.flush()
            print("about to die")
            os._exit(41)
        if case == "rules/hangs" and {hangs}:
            time.sleep(60)
        write(row=dict(row, case=case))
        write(end=case, seconds=1)
    write(clocks="slow")
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_a_case_that_ends_the_process_costs_itself_alone(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cases.py"
    script.write_text(FAKE_CASES.format(row=json.dumps(records()[0]), hangs=hangs))
    monkeypatch.setattr(gpu, "CASES", script)
    results = gpu.Results({"commit": "abc"})
    stage = gpu.measure(options(tmp_path, "--measure-seconds", "6" if hangs else "60"), results)
    failed = {row["case"]: row["note"] for row in results.rows if row["failed"]}
    assert failed["rules/dies"] == "the process ended with status 41 in this case"
    names = [row["case"] for row in results.rows]
    if hangs:
        assert names == ["rules/a", "rules/dies", "rules/b", "rules/hangs"]
        assert failed["rules/hangs"] == "stopped at the limit in this case"
    else:
        assert names == ["rules/a", "rules/dies", "rules/b", "rules/hangs", "rules/c"]
        assert results.environment["clocks at the end"] == "slow"
    assert stage.passed is False
    assert "about to die" in stage.details
    assert results.environment["device"] == "a device"
    assert results.environment["commit"] == "abc"  # this process knows better
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["case"] == "rules/a"
    failed_rows = [row for row in results.rows if row["failed"]]
    assert failed_rows[0].keys() == records()[0].keys()
    gpu.row_table(failed_rows)


def test_a_command_is_stopped_at_its_limit_with_what_it_started() -> None:
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    done = gpu.run([sys.executable, "-c", code], 2.0, stop=signal.SIGTERM)
    assert time.monotonic() - start < 20.0
    assert (done.status, done.output) == (None, "begun\n")
    done = gpu.run([sys.executable, "-c", "raise SystemExit(7)"], 60.0)
    assert done.status == 7


REPORT = (
    '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="16"/>'
    '<testsuite name="more" errors="0" failures="0" skipped="0" tests="4"/></testsuites>'
)


@pytest.mark.parametrize(
    ("status", "report", "passed", "summary"),
    [
        (0, REPORT.replace('"1"', '"0"').replace('"2"', '"0"'), True, "17 passed, 0 failed, 0 errors, 3 skipped"),
        (1, REPORT, False, "14 passed, 2 failed, 1 errors, 3 skipped"),
        (0, '<testsuite skipped="5" tests="5" errors="0" failures="0"/>', False, "0 passed, 0 failed, 0 errors, 5"),
        (4, "", False, "no report"),
        (None, REPORT, False, "stopped after 240 s: 14 passed"),
    ],
)
def test_tests_are_counted(
    status: Any, report: str, passed: bool, summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Any, seconds: float, **_: Any) -> Any:
        (path,) = (part.partition("=")[2] for part in command if part.startswith("--junitxml="))
        Path(path).write_text(report)
        return gpu.Done(status, "the end\n")

    monkeypatch.setattr(gpu, "run", run)
    stage = gpu.tests(options(tmp_path), gpu.Results({}))
    assert stage.passed is passed
    assert stage.summary.startswith(summary)
    assert stage.details == ([] if passed else ["the end"])


@pytest.mark.parametrize(
    ("status", "printed", "passed", "summary"),
    [
        (0, "========= COMPUTE-SANITIZER\n118 steps\n========= ERROR SUMMARY: 0 errors\n", True, "0 errors, 118 steps"),
        (9, "========= Invalid write\n========= ERROR SUMMARY: 3 errors\n", False, "ERROR SUMMARY: 3 errors"),
        (9, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", False, "1 hazard displayed"),
        (255, "========= Error: Device not supported\n", False, "status 255"),
        (None, "", False, "stopped at its limit"),
    ],
)
def test_what_a_sanitizer_finds_is_a_failure(
    status: Any, printed: str, passed: bool, summary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: Any, seconds: float) -> Any:
        commands.append(command)
        return gpu.Done(status, printed)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "_tool", lambda name, *_: f"/somewhere/{name}")
    stage = gpu.sanitizer(options(tmp_path), gpu.Results({}))
    assert [command[2] for command in commands] == ["memcheck", "racecheck"]
    assert all("--small-run" in command for command in commands)
    assert stage.passed is passed
    assert summary in stage.summary
    assert bool(stage.details) is not passed
    monkeypatch.setattr(gpu, "_tool", lambda *_: None)
    assert gpu.sanitizer(options(tmp_path), gpu.Results({})).passed is None


def test_it_builds_only_if_needed_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    has: list[str | None] = ["90"]
    monkeypatch.setattr(gpu, "architectures", lambda: has[0])
    monkeypatch.setattr(gpu, "_tool", lambda *_: None)
    assert gpu.build(options(tmp_path), gpu.Results({})).passed
    has[0] = None
    stage = gpu.build(options(tmp_path), gpu.Results({}))
    assert stage.passed is False
    assert "no nvcc" in stage.summary
    monkeypatch.setattr(gpu, "_tool", lambda *_: "/cuda/bin/nvcc")

    def run(command: Any, seconds: float, environment: Any) -> Any:
        built.append(command)
        assert environment["PATH"].startswith("/cuda/bin")
        has[0] = "90"
        return gpu.Done(len(built) - 1, "said\n")

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.build(options(tmp_path), gpu.Results({})).summary == "built and installed, with CUDA kernels for 90"
    assert {"--no-build-isolation", "--no-deps"} < set(built[0])
    stage = gpu.build(options(tmp_path, "--rebuild"), gpu.Results({}))
    assert (stage.passed, stage.summary, stage.details) == (False, "pip returned 1", ["said"])


def test_stages_are_chosen_and_a_build_that_fails_is_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    passes = {"build": True, "tests": True, "sanitizer": None, "measure": True}

    def stage(name: str) -> Any:
        def run(*_: Any) -> Any:
            ran.append(name)
            return gpu.Stage(name, passes[name], f"{name} said")

        return run

    for name in gpu.STAGES:
        monkeypatch.setattr(gpu, name, stage(name))
    assert gpu.main(["--out", str(tmp_path), "--no-tests"]) == 0
    assert ran == ["build", "sanitizer", "measure"]
    assert "measure: measure said" in capsys.readouterr().out
    passes["build"], ran[:] = False, []
    assert gpu.main(["--out", str(tmp_path), "--stages", "measure,build"]) == 1
    assert ran == ["build"]
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"][0]["summary"] == "build said"
    for arguments in (["--stages", "builds"], ["--only", "("], ["--measure-seconds", "nan"]):
        with pytest.raises(SystemExit):
            gpu.parse_arguments(arguments)
    assert "there is no 'builds'; there are build, tests, sanitizer, measure" in capsys.readouterr().err


def test_the_commit_is_asked_for_and_told_only_where_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_git", lambda *arguments: None)
    assert gpu.commit("abc") == "abc"
    assert gpu.commit(None) == "unknown"
    monkeypatch.setattr(gpu, "_git", lambda *arguments: "def" if "rev-parse" in arguments else " M file")
    assert gpu.commit("abc") == "def-dirty"


@pytest.mark.cuda
def test_one_command(tmp_path: Path, machine: Any) -> None:
    if not cuda_arrays.ON_HOST:
        pytest.skip("on a device the command itself is what one runs")
    only = "^(copy/|rules/(sgd|adam)$|many/|whole/)"
    command = [sys.executable, str(BENCH / "gpu.py"), "--quick", "--no-tests", "--only", only, "--out", str(tmp_path)]
    done = gpu.run(command, 300.0)
    assert done.status == 0, done.output
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["case"]: row for row in written["rows"]}
    assert len(rows) == 7
    assert written["environment"]["quick"] is True
    assert rows["rules/sgd"]["value"]["value"] > 0.0
    assert rows["rules/sgd"]["goal"] is None
    assert written["stages"][-1]["summary"] == "5 of 7 rows measured"
    assert all(entry["met"] is None for entry in written["goals"])

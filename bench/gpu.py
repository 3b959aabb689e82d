"""Everything that a CUDA device can prove, by one command: build if needed, tests, compute-sanitizer, figures.

``python bench/gpu.py --out bench/results`` writes ``gpu.json`` and ``gpu.md`` there, again after each stage and each
case, so that a run that is stopped leaves what it had:

* ``build``: nothing, if the onepass that Python finds has CUDA kernels; else ``pip install --no-build-isolation
  --no-deps .``, which needs no network where scikit-build-core, pybind11, CMake and ninja are installed, and nvcc.
* ``tests``: ``pytest -m cuda``, in several processes where pytest-xdist is installed.
* ``sanitizer``: memcheck and racecheck over a small run of every kernel, where compute-sanitizer is installed. What
  they find is a failure.
* ``measure``: the cases of ``gpu_cases.py``, in a process of its own; how is said there. If the device stops working in
  one of them, that case has failed, and the rest runs in a new process.

A goal that is missed is a row in the tables, not an error; the command fails if a test does, if a tool finds something,
or if a contender computes something else than ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "bench" / "gpu_cases.py"
NAME = "gpu"
STAGES = ("build", "tests", "sanitizer", "measure")
TOOLS = ("memcheck", "racecheck")
FINDINGS = 9  # the exit status of compute-sanitizer when it has found something
MOST_RESTARTS = 5
TAIL = 30  # lines of an output that is worth keeping

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """A row of the table of goals, made of all cases of one kind."""

    kind: str
    what: str
    goal: str


GOALS = (
    Wanted("rules", "every rule, float32, 256M elements: share of the copy's rate", ">= 0.92"),
    Wanted("fused", "SGD, Adam, AdamW, AMSGrad, AdaGrad, 64M elements, against torch fused", ">= 1x"),
    Wanted("unfused", "RMSprop (all forms), Nadam, 64M elements, against torch's fastest", ">= 2.5x"),
    Wanted("expressions", "the same rule written in CuPy expressions, 64M and 1M elements", ">= 6x"),
    Wanted("launches", "1000 tensors of 1000, Adam: launches of a step", "<= 4"),
    Wanted("many", "the same: time of the device, against torch fused", ">= 2x"),
    Wanted("host", "the same: time of the host for a step, buffers bound", "<= 60 us"),
    Wanted("whole", "clip, unscale, AdamW, EMA, bfloat16 mirror, zeroed gradients, against torch's calls", ">= 1.8x"),
    Wanted("storage", "Adam, everything in bfloat16, against everything in float32", ">= 1.8x"),
    Wanted("batchnorm", "batch norm, each pass, layout, dtype and shape, against cuDNN through torch", ">= 1x"),
    Wanted("batchnorm-mean", "batch norm, geometric mean of these", ">= 1.3x"),
    Wanted("on-chip", "batch norm forward, channel fits on chip: share of the copy's rate", ">= 0.75"),
    Wanted("norms", "a step that measures the norm of its gradients: share of the copy's rate", ""),
    Wanted("graph", "1000 tensors of 1000, Adam: a captured step, replayed, against step()", ""),
    Wanted("fused-bfloat16", "Adam, everything in bfloat16, 64M elements, against torch fused", ""),
)


# --- Results ----------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one stage has come to. `passed` is None where there was nothing to pass."""

    name: str
    passed: bool | None
    summary: str
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)


@dataclass
class Results:
    """All that is written."""

    environment: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a stage or a check has failed."""
        return any(stage.passed is False for stage in self.stages) or any(row["failed"] for row in self.rows)

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "environment": self.environment,
            "stages": [asdict(stage) for stage in self.stages],
            "goals": goals(self.rows),
            "rows": self.rows,
        }

    def markdown(self) -> str:
        """Return the tables."""
        facts = "\n".join(f"* {key}: {value}" for key, value in self.environment.items())
        details = "".join(
            f"\n## {stage.name}\n\n```\n{chr(10).join(stage.details)}\n```\n" for stage in self.stages if stage.details
        )
        return (
            f"# {NAME}\n\nMeasured on {self.environment.get('device', 'no device')}.\n\n{stage_table(self.stages)}\n\n"
            f"{goal_table(goals(self.rows))}\n\n{row_table(self.rows)}\n\n{facts}\n{details}"
        )

    def write(self, folder: Path) -> None:
        """Write both files; a reader meets the old ones or the new ones."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            (".json", json.dumps(self.record(), indent=2, allow_nan=False) + "\n"),
            (".md", self.markdown()),
        ):
            file = folder / f"{NAME}{suffix}"
            unfinished = file.with_suffix(f"{suffix}.new")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)


def seconds_text(seconds: float | None) -> str:
    """Return three digits and a unit, or nothing."""
    if seconds is None:
        return ""
    factor, unit = (1.0, "s") if abs(seconds) >= 1.0 else (1e3, "ms") if abs(seconds) >= 1e-3 else (1e6, "us")
    return f"{seconds * factor:.3g} {unit}"


def figure(row: Row, value: float) -> str:
    """Write a value of a row in the row's own unit."""
    measure = row["measure"]
    if measure == "launches":
        return f"{value:.0f}"
    if measure.startswith("share"):
        return f"{value:.3f}"
    return seconds_text(value) if measure == "ours" else f"{value:.2f}x"


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Judge each row of the table of goals by its cases: met if all are, missed if one is."""
    table = []
    for wanted in GOALS:
        cases = [row for row in rows if row["kind"] == wanted.kind]
        with_goal = [row for row in cases if row["goal"] is not None or row["failed"]]
        judged = with_goal or cases
        measured = sorted((row for row in judged if row["value"] is not None), key=lambda row: row["value"]["value"])
        entry: dict[str, Any] = {**asdict(wanted), "cases": len(judged), "measured": len(measured)}
        entry |= {"judged": bool(with_goal), "failed": any(row["failed"] for row in judged), "met": None}
        entry["figure"] = "not measured"
        if measured:
            least, most = measured[0], measured[-1]
            entry["figure"] = figure(least, least["value"]["value"])
            if least is not most:
                entry["figure"] += f" to {figure(most, most['value']['value'])}; least: {least['case']}"
            entry["missed"] = [row["case"] for row in judged if row["met"] is False]
            if with_goal:
                entry["met"] = False if entry["missed"] else all(row["met"] for row in judged) or None
        table.append(entry)
    return table


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, tuple("---" for _ in header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def stage_table(stages: Sequence[Stage]) -> str:
    """Say what each stage came to."""
    said = {True: "passed", False: "FAILED", None: ""}
    lines = [(stage.name, said[stage.passed], stage.summary, f"{stage.seconds:.0f} s") for stage in stages]
    return _markdown(("stage", "", "what", "time"), lines)


def goal_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Compare with the goals."""
    lines = []
    for entry in entries:
        said = ""
        if entry["judged"] and (entry["measured"] or entry["failed"]):
            said = "FAILED" if entry["failed"] else {True: "yes", False: "NO", None: "open"}[entry["met"]]
        figures = entry["figure"]
        if 0 < entry["measured"] < entry["cases"]:
            figures += f"; {entry['cases'] - entry['measured']} of {entry['cases']} not measured"
        lines.append((entry["what"], figures, entry["goal"], said))
    return _markdown(("case", "figure", "goal", "met"), lines)


def row_table(rows: Sequence[Row]) -> str:
    """List every case."""
    header = ("case", "ours", "peer", "figure", "95 %", "goal", "met", "GB/s", "of the copy", "rounds", "note")
    lines = []
    for row in rows:
        value, share, goal, speed = row["value"], row["traffic_share"], row["goal"], row["bytes_per_second"]
        met = "FAILED" if row["failed"] else ""
        if goal is not None and value is not None and not row["failed"]:
            met = {True: "yes", False: "NO", None: "open"}[row["met"]]
        lines.append(
            (
                row["case"],
                seconds_text(row["ours_seconds"]),
                f"{row['peer']} {seconds_text(row['peer_seconds'])}".strip(),
                "" if value is None else figure(row, value["value"]),
                "" if value is None else f"{figure(row, value['low'])} .. {figure(row, value['high'])}",
                "" if goal is None else f"{goal['sense']} {figure(row, goal['bound'])}",
                met,
                "" if speed is None else f"{speed / 1e9:.0f}",
                "" if share is None else f"{share['value']:.3f}",
                str(row["rounds"] or ""),
                "; ".join(filter(None, ("noisy" if row["noisy"] else "", row["note"]))),
            )
        )
    return _markdown(header, lines)


# --- Processes --------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """A process that has ended. `status` is None if it was stopped at its limit."""

    status: int | None
    output: str

    def tail(self) -> list[str]:
        """Return the end of what it printed."""
        return self.output.rstrip().splitlines()[-TAIL:]


def run(
    command: Sequence[str],
    seconds: float,
    *,
    while_running: Callable[[], object] = lambda: None,
    stop: signal.Signals = signal.SIGINT,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run a command in the root of the repository; stop it, and what it has started, after so many seconds."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        status: int | None = None
        deadline = time.monotonic() + seconds
        try:
            while True:
                try:
                    status = process.wait(max(min(deadline - time.monotonic(), 2.0), 0.01))
                    break
                except subprocess.TimeoutExpired:
                    while_running()
                    if time.monotonic() >= deadline:
                        break
        finally:
            if process.poll() is None:
                _end(process, stop)
        output.seek(0)
        return Done(status, output.read())


def _end(process: subprocess.Popen[bytes], stop: signal.Signals) -> None:
    """Ask a group of processes to end, and see to it."""
    for how, patience in ((stop, 15.0), (signal.SIGKILL, 15.0)):
        try:
            os.killpg(process.pid, how)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def _tool(name: str, *places: str) -> str | None:
    """Find a program of the CUDA toolkit, which need not be on the PATH."""
    found = shutil.which(name)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return found or next((path for place in places if (path := shutil.which(f"{home}/{place}/{name}"))), None)


# --- The stages -------------------------------------------------------------------------------------------------------


def architectures() -> str | None:
    """Return what the CUDA kernels of the onepass that Python finds were built for; None without any."""
    done = run([sys.executable, "-c", "from onepass import _cpu; print(_cpu.cuda_architectures())"], 120)
    said = done.output.strip().splitlines()[-1:] if done.status == 0 else []
    return said[0] if said and said[0] != "None" else None


def build(options: argparse.Namespace, results: Results) -> Stage:
    """Install onepass with CUDA kernels unless it is there."""
    found = None if options.rebuild else architectures()
    if found:
        return Stage("build", True, f"onepass was there, with CUDA kernels for {found}")
    nvcc = _tool("nvcc", "bin")
    if nvcc is None:
        return Stage("build", False, "onepass has no CUDA kernels, and there is no nvcc on the PATH or in CUDA_HOME")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 2),
        "PATH": f"{Path(nvcc).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    done = run(command, options.build_seconds, environment=environment)
    found = architectures() if done.status == 0 else None
    if found:
        return Stage("build", True, f"built and installed, with CUDA kernels for {found}")
    why = "pip was stopped at its limit" if done.status is None else f"pip returned {done.status}"
    if done.status == 0:
        why = "pip installed onepass, but it has no CUDA kernels or cannot be imported"
    return Stage("build", False, why, details=done.tail())


def tests(options: argparse.Namespace, results: Results) -> Stage:
    """Run the tests that need a device."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:
            processes = max(min((os.cpu_count() or 2) // 2, 8), 1)
            command += ["-p", "xdist", "--numprocesses", str(processes), "--dist", "worksteal"]
        # Warnings are errors, and other people's plugins have theirs.
        done = run(command, options.tests_seconds, environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
        counts = count_tests(report)
    said = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no report"
    if done.status is None:
        return Stage("tests", False, f"stopped after {options.tests_seconds:.0f} s: {said}", details=done.tail())
    passed = done.status == 0 and counts.get("passed", 0) > 0
    return Stage("tests", passed, said, details=[] if passed else done.tail())


def count_tests(report: Path) -> dict[str, int]:
    """Count the tests in a report of pytest's by what became of them."""
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        total, failed, errors, skipped = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
        for name, count in (("failed", failed), ("errors", errors), ("skipped", skipped)):
            counts[name] += count
        counts["passed"] += total - failed - errors - skipped
    return counts


def sanitizer(options: argparse.Namespace, results: Results) -> Stage:
    """Run every kernel under memcheck and racecheck."""
    program = _tool("compute-sanitizer", "bin", "compute-sanitizer")
    if program is None:
        return Stage("sanitizer", None, "compute-sanitizer is not installed")
    said, details = [], []
    passed = True
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FINDINGS), "--report-api-errors", "no"]
        begun = time.monotonic()
        done = run([*command, sys.executable, str(CASES), "--small-run"], options.sanitizer_seconds)
        summary = sanitizer_summary(done)
        said.append(f"{tool}: {summary} in {time.monotonic() - begun:.0f} s")
        if done.status != 0:
            passed = False
            details += [f"{tool}:", *done.output.splitlines()[:TAIL], "...", *done.tail()]
    return Stage("sanitizer", passed, "; ".join(said), details=details)


def sanitizer_summary(done: Done) -> str:
    """Return what a tool says of its findings."""
    summaries = re.findall(r"^=+ ((?:\w+ )?SUMMARY: .*)$", done.output, re.MULTILINE)
    steps = re.findall(r"^(\d+ steps)$", done.output, re.MULTILINE)
    if done.status is None:
        return "stopped at its limit"
    what = summaries[-1] if summaries else f"status {done.status}"
    return ", ".join([what, *steps[-1:]])


def measure(options: argparse.Namespace, results: Results) -> Stage:
    """Measure the cases; each process goes on where the one before has ended."""
    begun = time.monotonic()
    results.rows = []
    with tempfile.TemporaryDirectory() as folder:
        lines, skip = Path(folder) / "lines", Path(folder) / "skip"
        finished: list[str] = []
        details: list[str] = []
        for _ in range(MOST_RESTARTS):
            lines.unlink(missing_ok=True)
            skip.write_text("\n".join(finished), encoding="utf-8")
            left = options.measure_seconds - (time.monotonic() - begun)
            command = [sys.executable, str(CASES), "--lines", str(lines), "--skip", str(skip)]
            command += ["--only", options.only, "--seconds", str(max(left - 20.0, 1.0))]
            before = list(results.rows)

            def look(before: list[Row] = before) -> Progress:
                progress = read_lines(lines)
                results.rows = [*before, *progress.rows]
                results.environment.update(
                    {key: value for key, value in progress.environment.items() if key not in results.environment}
                )
                results.write(options.out)
                return progress

            quick = ["--quick"] if options.quick else []
            done = run([*command, *quick], max(left, 5.0), while_running=look, stop=signal.SIGTERM)
            progress = look()
            finished += progress.finished
            if done.status == 0:
                break
            details += done.tail()
            if progress.unfinished is None:
                break
            why = "stopped at the limit" if done.status is None else f"the process ended with status {done.status}"
            results.rows = [*results.rows, failed_row(progress.unfinished, f"{why} in this case")]
            finished.append(progress.unfinished)
            if done.status is None:
                break
    rows = results.rows
    measured = sum(row["value"] is not None for row in rows)
    failed = [row["case"] for row in rows if row["failed"]]
    summary = f"{measured} of {len(rows)} rows measured"
    if failed:
        summary += f"; failed: {', '.join(failed)}"
    return Stage("measure", measured > 0 and not failed, summary, details=details)


@dataclass
class Progress:
    """What a process that measures has written so far."""

    environment: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    unfinished: str | None = None


def read_lines(file: Path) -> Progress:
    """Read what was written, whether or not the last line is whole."""
    progress = Progress()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return progress
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "environment" in entry:
            progress.environment.update(entry["environment"])
        if "clocks" in entry:
            progress.environment["clocks at the end"] = entry["clocks"]
        if "begin" in entry:
            progress.unfinished = entry["begin"]
        if "row" in entry:
            progress.rows.append(entry["row"])
        if "end" in entry:
            progress.finished.append(entry["end"])
            progress.unfinished = None
    return progress


def failed_row(case: str, note: str) -> Row:
    """Make the row of a case that took its process with it."""
    nothing = dict.fromkeys(
        ("goal", "ours_seconds", "peer_seconds", "value", "traffic_share", "bytes", "bytes_per_second", "ours_estimate")
    )
    return {
        "case": case,
        "kind": case.partition("/")[0],
        "threads": 0,
        "elements": 0,
        "ours": "onepass",
        "peer": "",
        "measure": "peer / ours",
        "rounds": 0,
        "note": note,
        "failed": True,
        "buffers": "",
        "tensors": 1,
        "all_seconds": {},
        "extra": {},
        "samples": {},
        "met": False,
        "noisy": False,
        **nothing,
    }


# --- The command line -------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit(given: str | None) -> str:
    """Return the commit that is measured; `given` where there is no repository to ask."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return given or "unknown"
    return head + ("-dirty" if _git("status", "--porcelain", "--", ".", ":!bench/results") else "")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: only shows that it runs")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure only cases in which REGEX is found")
    parser.add_argument("--no-tests", action="store_true", help="leave out the stage `tests`")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of the stages (default: %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="build even if there are CUDA kernels")
    parser.add_argument("--commit", help="what is measured, where there is no git repository to ask")
    for stage, seconds in (("build", 900.0), ("tests", 240.0), ("sanitizer", 120.0), ("measure", 300.0)):
        parser.add_argument(f"--{stage}-seconds", type=float, default=seconds, help="stop it then (%(default)s)")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.stages = options.stages.split(",")
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages: there is no {unknown[0]!r}; there are {', '.join(STAGES)}")
    if options.no_tests:
        options.stages = [name for name in options.stages if name != "tests"]
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only: {error}")
    if any(math.isnan(getattr(options, f"{name}_seconds")) for name in STAGES):
        parser.error("seconds must be numbers")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if one of them, or a check, has failed."""
    options = parse_arguments(arguments)
    results = Results(
        {
            "commit": commit(options.commit),
            "quick": options.quick,
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )
    stages: dict[str, Callable[[argparse.Namespace, Results], Stage]] = {
        "build": build,
        "tests": tests,
        "sanitizer": sanitizer,
        "measure": measure,
    }
    for name in STAGES:
        if name not in options.stages:
            continue
        begun = time.monotonic()
        stage = stages[name](options, results)
        stage.seconds = round(time.monotonic() - begun, 1)
        results.stages.append(stage)
        results.write(options.out)
        print(
            f"{name}: {'FAILED: ' if stage.passed is False else ''}{stage.summary} ({stage.seconds:.0f} s)", flush=True
        )
        print(*stage.details, sep="\n", end="\n" if stage.details else "", flush=True)
        if name == "build" and not stage.passed:
            break
    print(goal_table(goals(results.rows)))
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())

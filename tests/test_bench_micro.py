"""The C++ benchmarks: that they cover the registry, run, check what they computed, and write what they must."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builds
import onepass
from builds import ROOT
from onepass import _cpu

SOURCES = ROOT / "bench" / "micro"
SIZES = ("1K", "32K", "1M", "16M")
BATCHES = ("NC/4096x1024", *(f"{layout}/{s}" for s in ("32x64x56x56", "128x512x14x14") for layout in ("NCHW", "NHWC")))
STORAGES = ["-".join(storage) for storage in _cpu.storages()]
RULES = [row["name"] for row in _cpu.registry()]
SLOTS = {row["name"]: len(row["slots"]) for row in _cpu.registry()}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="programs are built with the commands of a build on Linux"
)


# --- Building ---------------------------------------------------------------------------------------------------------


class Commands:
    """How the library was compiled: the same compiler and flags make a program of other sources."""

    def __init__(self, build: Path) -> None:
        self.library = build / "libonepass_cpu.a"
        entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
        self.commands = {}
        for entry in entries:
            command = shlex.split(entry["command"])
            isa = next((word.partition("=")[2] for word in command if word.startswith("-DONEPASS_ISA=")), "")
            self.commands[Path(entry["file"]).name, isa] = command

    @property
    def isas(self) -> list[str]:
        """For which instruction sets there are kernels."""
        return [isa for name, isa in self.commands if name == "kernels.cpp"]

    def compile(self, source: Path, output: Path, isa: str = "") -> Path:
        """Compile as the kernels of an instruction set, or what is in no set, are compiled."""
        command = list(self.commands["kernels.cpp" if isa else "dispatch.cpp", isa])
        command[command.index("-o") + 1] = str(output)
        command[command.index("-c") + 1] = str(source)
        builds.tool(*command)
        return output

    def link(self, program: Path, *objects: Path, libraries: tuple[str, ...] = ()) -> Path:
        """Link with the library."""
        compiler = self.commands["dispatch.cpp", ""][0]
        builds.tool(compiler, *objects, self.library, *libraries, "-pthread", "-o", program)
        return program


@pytest.fixture(scope="module")
def commands() -> Commands:
    build = builds.folder_of_package()
    if build is None or not (build / "libonepass_cpu.a").exists() or not (build / "compile_commands.json").exists():
        pytest.skip("ONEPASS_BUILD names no folder with a built library; `make test` sets it")
    return Commands(build)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Have `make` build the program `name`, in one of the processes among which the tests are divided."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    program = folder / name / name
    program.parent.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            make(program)
    return program


@pytest.fixture(scope="module")
def micro(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("#include <benchmark/benchmark.h>\nBENCHMARK_MAIN();\n")
    compiler = commands.commands["dispatch.cpp", ""][0]
    probing: list[str | Path] = [compiler, probe, "-lbenchmark", "-pthread", "-o", probe.with_suffix("")]
    if subprocess.run(probing, capture_output=True, check=False, env=builds.environment()).returncode != 0:
        pytest.skip("no google-benchmark (Debian, Ubuntu: libbenchmark-dev)")

    def make(program: Path) -> None:
        compiled = commands.compile(SOURCES / "micro.cpp", program.with_suffix(".o"))
        commands.link(program, compiled, libraries=("-lbenchmark",))

    return once(tmp_path_factory, "micro", make)


@pytest.fixture(scope="module")
def roofline(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(program: Path) -> None:
        kernels = [
            commands.compile(SOURCES / "roofline_kernels.cpp", program.with_suffix(f".{isa}.o"), isa)
            for isa in commands.isas
        ]
        commands.link(program, commands.compile(SOURCES / "roofline.cpp", program.with_suffix(".o")), *kernels)

    return once(tmp_path_factory, "roofline", make)


def run(*command: str | Path, expected: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in builds.environment().items() if not name.startswith("ONEPASS_")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**inherited, **environment}
    )
    assert done.returncode == expected, done.stdout[-4000:] + done.stderr[-4000:]
    return done


# --- google-benchmark -------------------------------------------------------------------------------------------------


def names_of(places: list[str]) -> set[str]:
    """Every benchmark there has to be; `places`: instruction set, then threads, with room for a size between them."""
    sized = [place.format(f"/{size}") for size in SIZES for place in places]
    batches = ["/".join(parts) for parts in itertools.product(("forward", "backward"), BATCHES, _cpu.compute_dtypes())]
    groups = [
        (f"update/{rule}/{storage}" for rule in RULES for storage in STORAGES),
        (f"norm/{dtype}" for dtype in _cpu.dtypes()),
    ]
    names = {name + place for group in groups for name in group for place in sized}
    return names | {f"batchnorm/{batch}{place.format('')}" for batch in batches for place in places}


def test_every_kernel_is_listed(micro: Path) -> None:
    listed = run(micro, "--benchmark_list_tests").stdout.splitlines()
    names = [line.removesuffix("/manual_time") for line in listed]
    assert len(set(names)) == len(names)
    cpus = len(os.sched_getaffinity(0))
    counts = {int(name.rpartition(":")[2]) for name in names}
    most = max(counts)
    assert most <= cpus  # fewer where a quota says so
    assert counts == {most, *(1 << k for k in range(most.bit_length()))}
    places = [f"/{isa}{{}}/threads:{count}" for isa in onepass.available_isas() for count in sorted(counts)]
    assert set(names) == names_of(places)


def test_every_rule_runs_in_every_storage(micro: Path, tmp_path: Path) -> None:
    out = tmp_path / "micro.json"
    filters = "^update/.*/1K/|^norm/.*/32K/threads:1/|^batchnorm/.*/NC/.*/threads:1/"
    arguments = (f"--benchmark_filter={filters}", "--benchmark_min_time=0.00001", f"--benchmark_out={out}")
    printed = run(micro, *arguments, "--benchmark_out_format=json", ONEPASS_COMMIT="0123abc")
    assert "update/adam/float32-float32-float32/scalar/1K/threads:1" in printed.stdout
    results = json.loads(out.read_text())

    isas = onepass.available_isas()
    context = results["context"]
    assert context["onepass_commit"] == "0123abc"
    assert context["isa"].split() == list(isas)
    assert context["command"] == " ".join(map(str, printed.args))
    assert re.fullmatch(r"(g|clang)\+\+ \d+\.\d+.*", context["compiler"])
    assert context["cpu"]
    assert int(context["onepass_benchmarks"]) == len(run(micro, "--benchmark_list_tests").stdout.splitlines())

    counted = {"update": 0, "norm": 0, "batchnorm": 0}
    for row in results["benchmarks"]:
        assert not row.get("error_occurred"), row
        kind, *parts = row["name"].split("/")
        counted[kind] += 1
        counters = ["bytes_per_second", "elements_per_second" if kind == "batchnorm" else "parameters_per_second"]
        counters += ["share_of_traffic"] * (kind == "update")
        for counter in (*counters, "real_time"):
            assert math.isfinite(row[counter]), row
            assert row[counter] > 0.0, row
        assert row["threads_used"] == 1, row  # 1K is too little to be divided
        if kind == "update" and parts[1] == "float32-float32-float32":
            moved = 4 * (3 + 2 * SLOTS[parts[0]])
            assert row["bytes_per_second"] == pytest.approx(moved * row["parameters_per_second"], rel=1e-5)
    threads = len(context["threads"].split())
    assert counted == {
        "update": len(RULES) * len(STORAGES) * len(isas) * threads,
        "norm": len(_cpu.dtypes()) * len(isas),
        "batchnorm": 2 * len(_cpu.compute_dtypes()) * len(isas),
    }


def test_what_is_divided_has_its_threads(micro: Path) -> None:
    arguments = ("--benchmark_filter=/float32.*/scalar/1M/", "--benchmark_min_time=0.00001", "--benchmark_format=json")
    rows = json.loads(run(micro, *arguments).stdout)["benchmarks"]
    assert any(row["name"].startswith("norm/") for row in rows)
    for row in rows:
        threads = re.search(r"/threads:(\d+)", row["name"])
        assert threads
        assert row["threads_used"] == int(threads[1]), row["name"]


def test_arguments_are_those_of_google_benchmark(micro: Path) -> None:
    assert "Failed to match any benchmarks" in run(micro, "--benchmark_filter=no_such_rule").stderr
    assert "unrecognized" in run(micro, "--no-such-flag", expected=1).stderr
    listed = run(micro, "--benchmark_list_tests", "--benchmark_filter=adam.*avx2|adam.*scalar").stdout.splitlines()
    assert listed
    assert all(re.search(r"^update/adam/.*/(avx2|scalar)/", name) for name in listed)


def test_cmake_says_what_to_install(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "cmake is part of the test extra"
    without = ("-DONEPASS_BENCH=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_benchmark=ON")
    done = run(cmake, "-S", ROOT, "-B", tmp_path, *without, expected=1)
    for word in ("google-benchmark", "libbenchmark-dev", "google-benchmark-devel", "conda"):
        assert word in done.stderr


# --- The roofline -----------------------------------------------------------------------------------------------------


def run_roofline(*arguments: str | Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "bench" / "roofline.py", *arguments, expected=expected)


def test_roofline_has_every_level_and_rule(roofline: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    out = tmp_path / "made" / "roofline.json"
    printed = run_roofline("--quick", "--program", roofline, "--out", out).stdout
    results = json.loads(out.read_text())
    environment = results["environment"]
    for key in ("commit", "cpu", "isa", "threads", "levels", "onepass", "command", "date", "plan"):
        assert environment[key], key
    assert environment["quick"] is True
    rows: dict[str, dict[str, Any]] = {row["case"]: row for row in results["rows"]}
    assert len(rows) == len(results["rows"])

    isas = onepass.available_isas()
    assert environment["isa"] == isas[-1]
    for threads in {1, environment["threads"]}:
        expected = {f"peak/{kind}/{isa}/{threads}" for kind in ("float32", "divide") for isa in isas}
        # A last cache may be too small for its share of many threads.
        levels = [level for level in ("L1", "L2", "L3", "DRAM") if f"bandwidth/{level}/{threads}" in rows]
        assert levels[-1] == "DRAM"
        assert set(levels) >= {"L1", "L2", "DRAM"}
        for level in levels:
            expected |= {f"rule/{rule}/{level}/{threads}" for rule in RULES} | {f"bandwidth/{level}/{threads}"}
        here = {name for name, row in rows.items() if row["threads"] == threads and row["kind"] != "triad"}
        assert here == expected
    assert any(row["kind"] == "triad" for row in rows.values())

    for name, row in rows.items():
        extra = row["extra"]
        rate = extra["flops_per_second" if row["kind"] == "peak" else "bytes_per_second"]
        assert math.isfinite(rate), name
        assert 0.0 < extra["low"] <= rate <= extra["high"], name
        assert row["ours_seconds"] > 0.0
        assert row["rounds"] >= 3
        if row["kind"] == "peak":
            assert rate == pytest.approx(2 * row["elements"] / row["ours_seconds"])
            continue
        assert rate == pytest.approx(row["bytes"] / row["ours_seconds"])
        if row["kind"] == "rule":
            rule = name.split("/")[1]
            assert row["bytes"] == 4 * (3 + 2 * SLOTS[rule]) * row["elements"]
            assert extra["working_set"] == 4 * (2 + SLOTS[rule]) * row["elements"]
            assert extra["parameters_per_second"] == pytest.approx(row["elements"] / row["ours_seconds"])
            assert row["traffic_share"]["value"] > 0.0
        else:
            assert (row["bytes"], extra["working_set"]) == (12 * row["elements"], 8 * row["elements"])
        if row["kind"] == "bandwidth":
            # At the place of the rules: a working set in whole cache lines of each array and thread.
            assert row["note"] in rows
            level, threads = name.split("/")[1:]
            for rule in RULES:
                here = rows[f"rule/{rule}/{level}/{threads}"]["extra"]["working_set"]
                assert abs(here - extra["working_set"]) <= 64 * (2 + SLOTS[rule]) * row["threads"]
    assert rows["rule/traffic2/L1/1"]["traffic_share"]["value"] == 1.0
    assert "rule/adam/L1/1" in printed
    assert "| rule/adam/L1/1 |" in out.with_suffix(".md").read_text()


def test_roofline_says_what_is_wrong(roofline: Path, tmp_path: Path) -> None:
    assert "--no-such-flag" in run(roofline, "--no-such-flag", expected=2).stderr
    pytest.importorskip("rich")
    missing = run_roofline("--program", tmp_path / "nothing", expected=1).stderr
    assert "make bench-roofline" in missing


QUESTIONS = {
    "channel_groups": (
        ["(256, 64)", "(128, 512)"],
        ["onepass", "plain stores", "groups of 32", "groups of 256, fetched", "map alone"],
        "two passes",
    ),
    "step_order": (
        ["Adam over 65544 elements"],
        ["onepass", "1 KiB ahead", "bursts of 16 KiB", "bursts of 4 KiB, past caches", "4160 B apart"],
        "loop",
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_for_every_contender(question: str, commands: Commands, tmp_path: Path) -> None:
    if "avx2" not in onepass.available_isas():
        pytest.skip("needs AVX2")
    titles, names, base = QUESTIONS[question]
    objects = commands.compile(SOURCES / f"{question}.cpp", tmp_path / f"{question}.o", "avx2")
    program = commands.link(tmp_path / question, objects)
    lines = run(program, "--quick").stdout.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == titles
    for name in names:
        (*_, seconds, ratio) = next(line for line in reversed(lines) if line.strip().startswith(f"{name}  ")).split()
        assert float(seconds) >= 0.0
        assert float(ratio) > 0.0
    ratios = {line.split()[-1] for line in lines if line.strip().startswith(f"{base}  ")}
    assert ratios == {"1.00"}
    run(program, "--slow", expected=2)

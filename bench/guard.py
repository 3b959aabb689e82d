"""Instructions per parameter of every kernel, compared with the table in ``bench/instructions.json``.

``make bench-guard`` runs it. Valgrind's callgrind counts what ``guard.cpp`` executes over fixed arrays: the same number
in each run and on each machine, however busy, so that 3 % more are a change of the code or of what the compiler made of
it, and nothing else. Valgrind knows no AVX-512: the table has scalar code and AVX2. Counts say nothing of time where
memory decides; they find what the compiler suddenly does not unroll, keeps on the stack, or asks anew for each element.

Other compilers make other instructions, so each has a column of its own. ``--update`` writes that of the library's, and
counts anew what the rules read, write and compute (``bench/counts.json``). With ``--strict`` 3 % fewer fail as well: a
table that nobody tightens lets the next regression pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "instructions.json"
COUNTS = ROOT / "bench" / "counts.json"
ISAS = ("scalar", "avx2")
TOLERANCE = 0.03
UPDATE = "make bench-guard ARGS=--update"

#: Instructions of each case, by instruction set.
Column = dict[str, dict[str, float]]


class GuardError(Exception):
    """Nothing could be counted."""


# --- Counting ---------------------------------------------------------------------------------------------------------


def compiler_of(library: Path) -> str:
    """What the kernels were compiled with, as they say themselves: a column of the table."""
    content = library.read_bytes()
    for name, pattern in (("clang++", rb"clang version (\d+)\."), ("g++", rb"GCC: \([^)]*\) (\d+)\.")):
        versions = sorted(set(re.findall(pattern, content)))
        if len(versions) == 1:
            machine = platform.machine()
            return f"{name} {versions[0].decode()}" + ("" if machine in ("x86_64", "AMD64") else f" {machine}")
    raise GuardError(f"{library}: does not say which compiler made it, or there were several")


def instructions(dump: str) -> dict[str, float]:
    """The instructions of each case in callgrind's output: per element, or per call.

    Examples
    --------
    >>> trigger = "desc: Trigger: Client Request: "
    >>> dump = f"{trigger}sum 10\\ntotals: 130\\n{trigger}sum 20\\ntotals: 150\\n{trigger}call / 4\\ntotals: 80\\n"
    >>> instructions(dump)
    {'sum': 2.0, 'call': 20.0}
    """
    found: dict[str, list[tuple[int, int]]] = {}
    divided: dict[str, float] = {}
    title = None
    for line in dump.splitlines():
        if line.startswith("desc: Trigger: "):
            title = line.removeprefix("desc: Trigger: Client Request: ") if "Client Request: " in line else None
        elif line.startswith("totals: ") and title is not None:
            total = int(line.split()[1])
            case, *rest = title.split(" ")
            if rest[0] == "/":
                divided[case] = total / int(rest[1])
            else:
                found.setdefault(case, []).append((int(rest[0]), total))
    slopes = {}
    for case, measured in found.items():
        (few, less), (many, more) = measured
        slopes[case] = (more - less) / (many - few)
    return {case: round(count, 3) for case, count in (slopes | divided).items()}


def _valgrind() -> str:
    found = shutil.which("valgrind")
    if found is None or not any((Path(p) / "valgrind" / "callgrind.h").exists() for p in _include_paths()):
        raise GuardError("Valgrind and its header valgrind/callgrind.h are needed: package 'valgrind' on Debian")
    return found


def _include_paths() -> Iterator[str]:
    yield from ("/usr/include", "/usr/local/include")
    yield from filter(None, os.environ.get("CPLUS_INCLUDE_PATH", "").split(os.pathsep))


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuardError(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def build(library: Path, folder: Path, cxx: Sequence[str]) -> Path:
    """The program that is counted, linked to the kernels as the package has them."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "guard"
    source = ROOT / "bench" / "guard.cpp"
    _run(*cxx, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", source, library, "-pthread", "-o", program)
    return program


def count(program: Path, isas: Sequence[str]) -> Column:
    """One run of Valgrind for each of these instruction sets that it has on this machine, side by side."""
    valgrind = _valgrind()
    here = _run(valgrind, "--tool=none", "--quiet", program, "--list").split()

    def run(isa: str) -> dict[str, float]:
        dump = program.with_name(f"callgrind.{isa}")
        dump.unlink(missing_ok=True)
        options = ("--tool=callgrind", "--instr-atstart=no", "--combine-dumps=yes", f"--callgrind-out-file={dump}")
        _run(valgrind, "--quiet", *options, program, isa)
        return instructions(dump.read_text())

    counted = [isa for isa in isas if isa in here]
    with ThreadPoolExecutor() as pool:
        return dict(zip(counted, pool.map(run, counted), strict=True))


def count_rules(folder: Path) -> Any:
    """What each rule reads, writes and computes for a parameter, counted by tests/cpp/counting."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        raise GuardError("cmake is needed to build tests/cpp/counting")
    build_folder = folder / "counting"
    _run(cmake, "-S", ROOT / "tests" / "cpp" / "counting", "-B", build_folder, "-DCMAKE_BUILD_TYPE=Release")
    _run(cmake, "--build", build_folder, "--parallel", "2", "--target", "counting")
    return json.loads(_run(build_folder / "counting", "--json"))


# --- Comparing --------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What differs from the table. Cases are named with their instruction set."""

    worse: list[tuple[str, float, float]] = field(default_factory=list)  # case, table, now
    better: list[tuple[str, float, float]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # counted, and not in the table
    gone: list[str] = field(default_factory=list)  # in the table, and not counted
    same: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.worse or self.new or self.gone)

    @property
    def failed_strictly(self) -> bool:
        return self.failed or bool(self.better)


def compare(table: Mapping[str, Mapping[str, float]], counted: Mapping[str, Mapping[str, float]]) -> Comparison:
    """Compare the instruction sets that were counted."""
    result = Comparison()
    for isa, now in counted.items():
        before = table.get(isa, {})
        result.new += [f"{isa} {case}" for case in now if case not in before]
        result.gone += [f"{isa} {case}" for case in before if case not in now]
        for case in now.keys() & before.keys():
            row = (f"{isa} {case}", before[case], now[case])
            if now[case] > before[case] * (1 + TOLERANCE):
                result.worse.append(row)
            elif now[case] < before[case] * (1 - TOLERANCE):
                result.better.append(row)
            else:
                result.same += 1
    result.worse.sort(key=lambda row: row[1] / row[2])
    result.better.sort(key=lambda row: row[2] / row[1])
    return result


def report(result: Comparison) -> str:
    """All that differs, the largest change first."""
    lines = []
    for title, rows in (
        (f"More instructions than the table allows (+{TOLERANCE:.0%}):", result.worse),
        (f"Fewer instructions than in the table (-{TOLERANCE:.0%}); to keep it so: {UPDATE}", result.better),
    ):
        if rows:
            width = max(len(case) for case, _, _ in rows)
            lines += [title, f"  {'case':{width}} {'table':>10} {'now':>10} {'change':>8}"]
            lines += [f"  {case:{width}} {was:10.3f} {now:10.3f} {now / was - 1:+8.1%}" for case, was, now in rows]
    for title, cases in (("Not in the table:", result.new), ("In the table, and no longer there:", result.gone)):
        if cases:
            lines += [f"{title} ({UPDATE})", *(f"  {case}" for case in cases)]
    lines.append(f"{result.same} counts within {TOLERANCE:.0%} of the table")
    return "\n".join(lines)


# --- The table --------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, Column]:
    """The columns by compiler."""
    if not path.exists():
        return {}
    columns: dict[str, Column] = json.loads(path.read_text())["compilers"]
    return columns


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def write_table(path: Path, compiler: str, counted: Column) -> None:
    """Replace what was counted, and leave the rest of the table as it is."""
    columns = read_table(path)
    columns[compiler] = columns.get(compiler, {}) | {isa: dict(sorted(cases.items())) for isa, cases in counted.items()}
    _write(path, {"compilers": dict(sorted(columns.items()))})


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and compare or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="libonepass_cpu.a, as the package was built")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "guard", help="folder for what is built")
    parser.add_argument(
        "--cxx", default=os.environ.get("CXX", "c++"), help="compiler of the program around the kernels"
    )
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--update", action="store_true", help="write the table, and bench/counts.json")
    parser.add_argument("--strict", action="store_true", help="fail where the table is too loose or has nothing, too")
    options = parser.parse_args(arguments)
    try:
        compiler = compiler_of(options.library)
        counted = count(build(options.library, options.build, options.cxx.split()), ISAS)
        if options.update:
            write_table(options.table, compiler, counted)
            _write(COUNTS, count_rules(options.build))
            return 0
    except GuardError as error:
        print(error, file=sys.stderr)
        return 2
    column = read_table(options.table).get(compiler)
    if column is None:
        print(f"{options.table} has no counts of {compiler}: nothing was compared. {UPDATE} adds them")
        return int(options.strict)
    missing = [isa for isa in column if isa not in counted]
    if missing:
        print(f"not counted: {', '.join(missing)}, which Valgrind does not have on this machine, or this build has not")
    result = compare(column, counted)
    print(f"{compiler}:\n{report(result)}")
    return int(result.failed or (options.strict and (bool(missing) or result.failed_strictly)))


if __name__ == "__main__":
    sys.exit(main())

"""The guard of instructions says what changed, and fails when it should."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import builds
from onepass import _cpu


def _load() -> Any:
    sys.path.insert(0, str(builds.ROOT / "bench"))
    try:
        return importlib.import_module("guard")
    finally:
        sys.path.pop(0)


guard = _load()

TRIGGER = "desc: Trigger: Client Request: "
TABLE = {"scalar": {"sum/float32": 2.0, "call/sum": 100.0}, "avx2": {"sum/float32": 0.5}}


def test_every_rule_and_storage_is_in_the_table() -> None:
    columns = guard.read_table(guard.TABLE)
    assert columns
    names = {f"{row['name']}/{'-'.join(storage)}" for row in _cpu.registry() for storage in _cpu.storages()}
    for compiler, column in columns.items():
        assert re.fullmatch(r"(g|clang)\+\+ \d+( \w+)?", compiler)
        for isa in guard.ISAS:
            cases = set(column[isa])
            assert names <= cases
            assert {case.partition("/whole")[0] for case in cases if case.partition("/")[0] in _rules()} == names
            for rule in _rules(yardsticks=False):
                assert any(case.startswith(f"{rule}/") and case.endswith("/whole") for case in cases), rule
            assert all(count > 0 for count in column[isa].values())


def _rules(yardsticks: bool = True) -> set[str]:
    return {row["name"] for row in _cpu.registry() if yardsticks or not row["yardstick"]}


def test_a_change_of_more_than_three_percent_is_found() -> None:
    assert guard.compare(TABLE, TABLE).same == 3
    assert not guard.compare(TABLE, TABLE).failed
    counted = {"scalar": {"sum/float32": 2.06, "call/sum": 103.1}, "avx2": {"sum/float32": 0.48}}
    result = guard.compare(TABLE, counted)
    assert result.worse == [("scalar call/sum", 100.0, 103.1)]
    assert result.better == [("avx2 sum/float32", 0.5, 0.48)]
    assert (result.same, result.failed) == (1, True)
    text = guard.report(result)
    assert re.search(r"scalar call/sum +100\.000 +103\.100 +\+3\.1%", text)
    assert "Fewer instructions than in the table (-3%); to keep it so: make bench-guard ARGS=--update" in text
    del counted["scalar"]["call/sum"]
    result = guard.compare({"scalar": {"sum/float32": 2.0}, "avx2": TABLE["avx2"]}, counted)
    assert (result.failed, result.failed_strictly) == (False, True)


@pytest.mark.parametrize(("before", "now", "word"), [(1, 2, "Not in the table"), (2, 1, "no longer there")])
def test_new_cases_and_lost_ones_fail(before: int, now: int, word: str) -> None:
    cases = {"adam/float32": 6.0, "nadam/float32": 6.0}
    first, second = ({"avx2": dict(list(cases.items())[:count])} for count in (before, now))
    result = guard.compare(first, second)
    assert result.failed
    assert word in guard.report(result)
    assert "  avx2 nadam/float32" in guard.report(result)


def test_the_largest_change_comes_first() -> None:
    counted = {"avx2": {"a": 1.1, "b": 3.0, "c": 1.5}}
    result = guard.compare({"avx2": dict.fromkeys("abc", 1.0)}, counted)
    assert [case for case, _, _ in result.worse] == ["avx2 b", "avx2 c", "avx2 a"]


def test_instructions_are_differences() -> None:
    dump = "".join(
        f"{TRIGGER}{title}\ntotals: {total}\n" for title, total in (("a 8", 70), ("a 24", 110), ("b / 4", 6))
    )
    dump += "desc: Trigger: Program termination\ntotals: 12345\n"
    assert guard.instructions(dump) == {"a": 2.5, "b": 1.5}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"..GCC: (Debian 12.2.0-14) 12.2.0\0..GCC: (Debian 12.2.0-14) 12.2.0\0", "g++ 12"),
        (b"..Debian clang version 14.0.6\0..", "clang++ 14"),
        (b"..GCC: (GNU) 13.1.0\0..GCC: (GNU) 12.1.0\0..", None),
        (b"nothing", None),
    ],
)
def test_the_compiler_is_read_from_the_kernels(
    content: bytes, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib.a"
    library.write_bytes(content)
    monkeypatch.setattr(guard.platform, "machine", lambda: "x86_64")
    if name is None:
        with pytest.raises(guard.GuardError, match=r"lib\.a: does not say which compiler"):
            guard.compiler_of(library)
    else:
        assert guard.compiler_of(library) == name
        monkeypatch.setattr(guard.platform, "machine", lambda: "aarch64")
        assert guard.compiler_of(library) == f"{name} aarch64"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A guard that counts what it is told, in the place of Valgrind."""
    library = tmp_path / "lib.a"
    library.write_bytes(b"GCC: (GNU) 99.1.0\0")
    told: dict[str, Any] = {"counts": copy.deepcopy(TABLE), "table": tmp_path / "table.json", "library": library}
    monkeypatch.setattr(guard, "build", lambda *_: tmp_path)
    monkeypatch.setattr(guard, "count", lambda *_: told["counts"])
    monkeypatch.setattr(guard, "count_rules", lambda _: {"sgd": {}})
    monkeypatch.setattr(guard, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(guard.platform, "machine", lambda: "x86_64")
    return told


def run(told: dict[str, Any], *arguments: str) -> int:
    return guard.main(["--library", str(told["library"]), "--table", str(told["table"]), *arguments])


def test_the_way_of_a_table(counted: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(counted) == 0
    assert "no counts of g++ 99: nothing was compared. make bench-guard ARGS=--update adds them" in (
        capsys.readouterr().out
    )
    assert run(counted, "--strict") == 1
    other = {"clang++ 1": {"scalar": {"sum/float32": 3.0}}}
    counted["table"].write_text(json.dumps({"compilers": other}))
    assert run(counted, "--update") == 0
    assert guard.read_table(counted["table"]) == {**other, "g++ 99": TABLE}
    assert json.loads(guard.COUNTS.read_text()) == {"sgd": {}}
    assert run(counted, "--strict") == 0

    counted["counts"]["avx2"]["sum/float32"] = 0.6
    capsys.readouterr()
    assert run(counted) == 1
    assert re.search(r"avx2 sum/float32 +0\.500 +0\.600 +\+20\.0%", capsys.readouterr().out)
    counted["counts"]["avx2"]["sum/float32"] = 0.4
    for strict in ([], ["--strict"]):
        assert run(counted, *strict) == len(strict)
        assert "to keep it so: make bench-guard ARGS=--update" in capsys.readouterr().out
    counted["counts"]["avx2"]["sum/float32"] = 0.49
    assert run(counted, "--strict") == 0
    del counted["counts"]["avx2"]  # of a machine that has none
    assert run(counted) == 0
    assert "not counted: avx2" in capsys.readouterr().out
    assert run(counted, "--strict") == 1
    assert run(counted, "--update") == 0
    assert guard.read_table(counted["table"])["g++ 99"] == TABLE


def test_what_is_missing_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(guard.shutil, "which", lambda *_, **__: None)
    with pytest.raises(guard.GuardError, match="package 'valgrind'"):
        guard.count(tmp_path, guard.ISAS)
    library = tmp_path / "lib.a"
    library.write_bytes(b"GCC: (GNU) 99.1.0\0")
    monkeypatch.setattr(guard, "build", lambda *_: tmp_path)
    assert guard.main(["--library", str(library)]) == 2
    assert "package 'valgrind'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="counts with Valgrind")
def test_counts_are_the_same_in_each_run(tmp_path: Path) -> None:
    folder = builds.folder_of_package()
    if folder is None:
        pytest.skip("counts in the kernels of the package, whose folder ONEPASS_BUILD names")
    (library,) = folder.rglob("libonepass_cpu.a")
    program = guard.build(library, tmp_path, [shutil.which("c++") or "g++"])
    first = guard.count(program, ["scalar"])
    assert first == guard.count(program, ["scalar"])
    assert {case.partition("/")[0] for case in first["scalar"]} >= _rules()

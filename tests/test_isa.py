"""Promise: the choice of an instruction set is known, can be forced, and is safe on machines that have less."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import builds
import onepass
from builds import tool
from onepass import _cpu

ISAS = onepass.available_isas()
RULES = {row["name"]: row for row in _cpu.registry()}
CLASSES = [value for value in vars(onepass).values() if inspect.isclass(value) and issubclass(value, onepass.Optimizer)]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 40, 300_000])
def test_the_forced_isa_really_runs(isa, size):
    """The kernel itself says what it was compiled for, by a constant that only its own SIMD header defines."""
    onepass.set_isa(isa)
    assert onepass.isa() == isa
    for other in ISAS:
        opt = onepass.Adam(np.ones(size, np.float32))
        onepass.set_isa(other)
        opt.step(np.ones(size, np.float32))
        assert opt._updater.last_isa == other


def test_best_isa_is_the_default():
    # An empty variable is as good as none.
    result = run_python("import onepass; print(onepass.isa(), *onepass.available_isas())", ONEPASS_ISA="")
    isa, *available = result.stdout.split()
    assert available[0] == "scalar"
    assert isa == available[-1]
    assert tuple(available) == ISAS


@pytest.mark.parametrize("isa", ISAS)
def test_environment_chooses(isa):
    result = run_python("import onepass; print(onepass.isa())", ONEPASS_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


@pytest.mark.parametrize("name", ["avx1024", "AVX2", " ", "native"])
def test_unknown_isa_in_environment_is_an_error(name):
    result = run_python("import onepass", ONEPASS_ISA=name)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: ONEPASS_ISA: '{name}' is not the name of an instruction set; available here:")
    assert all(f"'{isa}'" in last for isa in ISAS)


def test_set_isa_refuses_and_changes_nothing():
    before = onepass.isa()
    with pytest.raises(ValueError, match="name: 'sse9' is not the name of an instruction set; available here: 'scal"):
        onepass.set_isa("sse9")
    with pytest.raises(TypeError, match="name: expected a string, got None"):
        onepass.set_isa(None)
    assert onepass.isa() == before


def test_command_line_reports():
    result = subprocess.run([sys.executable, "-m", "onepass"], capture_output=True, text=True, check=True)
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith("available"))
    assert rows["onepass"] == onepass.__version__
    assert rows["isa"] in ISAS
    assert int(rows["threads"]) >= 1


# The registry and the Python classes


def test_every_rule_has_a_class_and_every_class_a_rule():
    used = set()
    for cls in CLASSES:
        if cls is onepass.Optimizer:
            continue
        flags = [{}]
        if "centered" in inspect.signature(cls).parameters:
            flags = [{"centered": c, "momentum": m} for c in (False, True) for m in (0.0, 0.9)]
        if "amsgrad" in inspect.signature(cls).parameters:
            flags = [{"amsgrad": a} for a in (False, True)]
        for options in flags:
            opt = cls(np.ones(3), **options)
            hyper = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
            rule = RULES[cls.rule(hyper)]
            used.add(rule["name"])
            assert tuple(opt.state[0]) == rule["slots"]
            for t in (1, 2, 1000):
                assert set(cls.recipe(hyper, 0.1, t)) == set(rule["coefficients"])
    assert used == {name for name, row in RULES.items() if not row["yardstick"]}


def test_registry_lists_names_once():
    assert len(RULES) == len(_cpu.registry())
    for row in RULES.values():
        assert len(set(row["slots"])) == len(row["slots"]) <= 3
        assert len(set(row["coefficients"])) == len(row["coefficients"])
    for isa in ISAS:
        onepass.set_isa(isa)
        assert {row["name"]: row for row in _cpu.registry()} == RULES


# The compiled objects


@pytest.fixture(scope="module")
def consumer(tmp_path_factory):
    return builds.consumer(tmp_path_factory)


@pytest.fixture(scope="module")
def consumer_elsewhere(tmp_path_factory):
    """The same, as on a machine that is not x86: only the name of the processor is another."""
    options = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=riscv64")
    return builds.consumer(tmp_path_factory, "elsewhere", *options)


@pytest.fixture(scope="module")
def package(request):
    """The build whose objects are read: the installed package's, else the consumer's, which has the same units."""
    return builds.folder_of_package() or request.getfixturevalue("consumer")


# What a kernel unit exports, without the name of its instruction set.
TABLES = {
    "kernels.cpp.o": "onepass::kernels_",
    "step_kernels.cpp.o": "onepass::step_kernels_",
    "batchnorm_kernels.cpp.o": "onepass::batchnorm::kernels_",
}


def kernel_objects(build):
    """(instruction set, object) of every kernel unit."""
    found = [
        (re.search(r"onepass_kernels_(\w+)\.dir", str(path)).group(1), path)
        for path in sorted(build.rglob("*kernels.cpp.o"))
    ]
    isas = {isa for isa, _ in found}
    assert isas >= set(ISAS)
    assert {(isa, path.name) for isa, path in found} == {(isa, name) for isa in isas for name in TABLES}
    return found


def test_cpp_consumer_runs(consumer):
    programs = [path for path in consumer.iterdir() if path.is_file() and os.access(path, os.X_OK)]
    assert len(programs) == 1
    assert tool(str(programs[0])).strip()


def test_other_processors_get_the_scalar_build(consumer_elsewhere):
    assert {path.parents[2].name for path in consumer_elsewhere.rglob("*kernels.cpp.o")} == {
        "onepass_kernels_scalar.dir"
    }
    printed = tool(str(consumer_elsewhere / "example"))
    assert "scalar" in printed
    assert "avx" not in printed


def test_kernel_units_export_their_table_and_nothing_else(package):
    """Any other symbol could be merged with another unit's, and AVX code would reach a machine without AVX."""
    for isa, path in kernel_objects(package):
        symbols = tool("nm", "--defined-only", "--extern-only", "--demangle", str(path)).split("\n")
        names = [line.split(maxsplit=2)[2] for line in symbols if line]
        assert names == [TABLES[path.name] + isa], (isa, path.name)
        sections = tool("objdump", "--section-headers", str(path))
        assert ".init_array" not in sections, f"{isa}: runs code before main"


def test_kernel_units_hold_the_code_they_are_named_for(package):
    expected = {"scalar": (False, False), "avx2": (True, False), "avx512": (True, True)}
    for isa, path in kernel_objects(package):
        text = tool("objdump", "--disassemble", str(path))
        ymm, zmm = "%ymm" in text, "%zmm" in text
        if isa != "avx512":
            assert (ymm, zmm) == expected[isa], (isa, path.name)
        else:
            assert zmm, path.name
        assert not re.search(r"\bvf(n?m)(add|sub)", text), f"{isa}: a fused multiply-add rounds only once"
        assert not re.search(r"\bv?(rcp|rsqrt)\w*\s", text), f"{isa}: approximate arithmetic"


def test_baseline_units_hold_no_avx(package):
    """Dispatch itself, and all that runs before it, must run anywhere."""
    objects = [path for path in package.rglob("*.o") if "kernels_" not in str(path)]
    assert {"onepass_cpu.dir", *["_cpu.dir"] * (builds.folder_of_package() is not None)} <= {
        part for path in objects for part in path.parts
    }
    for path in objects:
        assert not re.search(r"%[yz]mm", tool("objdump", "--disassemble", str(path))), path.name

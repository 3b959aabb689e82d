"""What is known of CUDA kernels without a device: their index arithmetic, the compiler's reports, the module's file.

The reports are PTX, which is what the compiler of device code was given, and the machine code of each architecture,
which says how much stack each kernel takes. `make test` has kept both when it built the package, and names the folder.
Else they are made here, in some minutes.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from builds import ROOT, cmake_build, folder_of_package, tool
from onepass import _cpu

REGISTRY = [row for row in _cpu.registry() if not row["yardstick"]]
UPDATE_PARTS = 4
ITEMSIZE = {"Float32": 4, "Float64": 8, "BFloat16": 2, "Float16": 2}


# --- The index arithmetic ---------------------------------------------------------------------------------------------


def test_each_element_is_visited_once(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program, headers = tmp_path / "cuda_partition", tmp_path / "headers"
    source = ROOT / "tests" / "cpp" / "cuda_partition.cpp"
    tool(compiler, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", source, "-MD", "-MF", headers, "-o", program)
    assert "partition.h" in headers.read_text()
    assert "cuda_runtime" not in headers.read_text()
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (run.stdout.splitlines()[-1:], run.returncode) == (["0 failures"], 0), run.stdout[-2000:]


# --- The compiler's reports -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvcc():
    """The command, where there is one that is new enough."""
    command = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if command is None:
        pytest.skip("needs nvcc (CUDA 12.4 or newer): there is none on the PATH, nor in CUDACXX")
    release = re.search(r"release (\d+)\.(\d+)", tool(command, "--version"))
    if tuple(map(int, release.groups())) < (12, 4):
        pytest.skip(f"needs nvcc of CUDA 12.4 or newer: {command} is of {release.group(0)}")
    return command


@pytest.fixture(scope="module")
def kept(tmp_path_factory, nvcc):
    """What nvcc made of each unit on its way: a folder for each target."""
    build = folder_of_package()
    if build is None:
        options = [
            "-DONEPASS_PYTHON=ON",
            "-DONEPASS_CUDA=ON",
            "-DONEPASS_CUDA_KEEP=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
        ]
        options += [f"-DPython_EXECUTABLE={sys.executable}"]
        if importlib.util.find_spec("pybind11"):
            options += [f"-Dpybind11_DIR={tool(sys.executable, '-m', 'pybind11', '--cmakedir').strip()}"]
        targets = ["onepass_cuda_support", "onepass_cuda_batchnorm"]
        targets += [f"onepass_cuda_update_{part}" for part in range(UPDATE_PARTS)]
        build = cmake_build(tmp_path_factory, "cuda", ROOT, *options, targets=targets)
    folder = build / "kept"
    assert {path.name for path in folder.iterdir()} == {
        "support",
        "batchnorm",
        *(f"update_{part}" for part in range(UPDATE_PARTS)),
    }, f"{folder}: was it built with ONEPASS_CUDA_KEEP?"
    return folder


def ptx_of(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.ptx"))
    assert found, f"no PTX in {folder}"
    return found


INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][a-z0-9_]*(?:\.[a-z0-9_:]+)*)\s", re.MULTILINE)
FLOATING = re.compile(r"\.(e\dm\d|t?f\d|bf\d)")

# Instructions with floating-point operands that round as IEEE 754 says, once, with subnormals of float as zeros, and
# which the assembler may not contract: it is free to fuse a multiplication with an addition where these lack `.rn`.
EXACT = re.compile(
    r"""(add|sub|mul|div|rcp|sqrt)\.rn\.(ftz\.f32|f64)
      | (abs|neg|min|max)\.(ftz\.f32|f64)
      | setp\.[a-z]+(\.(and|or|xor))?\.(ftz\.f32|f64)
      | (copysign|selp|mov)\.(f32|f64)
      | (ld|st)\.[a-z0-9.:]+
      | cvt\.ftz\.f64\.f32 | cvt\.f32\.f16 | cvt\.rn\.ftz\.f32\.f64
      | cvt\.rn\.(f32|f64)\.[us](16|32|64) | cvt\.rzi\.(ftz\.)?[us](32|64)\.(f32|f64)
      | cvt\.rn\.bf16(x2)?\.f32""",
    re.VERBOSE,
)


def inexact(ptx: str) -> collections.Counter[str]:
    """Instructions that may give other bits than the formulas as written, and calls of what cannot be seen here."""
    counts = collections.Counter(INSTRUCTION.findall(ptx))
    return collections.Counter(
        {
            name: count
            for name, count in counts.items()
            if (FLOATING.search(name) and not EXACT.fullmatch(name)) or re.match(r"call|.*\.approx|.*\.local", name)
        }
    )


def test_arithmetic_is_exact_in_every_kernel(kept):
    seen = 0
    for path in kept.glob("*/*.ptx"):
        text = path.read_text()
        assert not inexact(text), path
        assert "__local_depot" not in text, f"{path}: a stack frame"
        seen += text.count(".entry ")
    assert seen > 2 * len(REGISTRY)


# A kernel that has each kind of arithmetic, and stores in order to be there at all.
SAMPLE = """
extern "C" __global__ void sample(float* x, double* y) {
  float a[64];
  for (int k = 0; k < 64; ++k) a[k] = x[k * 1024 + threadIdx.x];
  for (int k = 0; k < 64; ++k) x[k * 1024 + threadIdx.x] = a[63 - k] * x[k] + __builtin_sqrtf(a[k]) / a[k ^ 1];
  y[0] = y[1] * y[2] + y[3] / __builtin_sqrt(y[4]);
}
"""
FLAGS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=true")


def compiled(nvcc: str, folder: Path, *flags: str) -> Path:
    source, target = folder / "sample.cu", folder / "sample"
    source.write_text(SAMPLE)
    tool(nvcc, *FLAGS, *flags, source, "-o", target)
    return target


@pytest.mark.parametrize(
    ("flag", "found"),
    [
        ("--fmad=false", set()),
        ("--fmad=true", {"fma.rn.ftz.f32", "fma.rn.f64"}),
        ("--prec-div=false", {"div.full.ftz.f32"}),
        ("--prec-sqrt=false", {"sqrt.approx.ftz.f32"}),
        ("--ftz=false", {"mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32"}),
        ("--use_fast_math", {"fma.rn.ftz.f32", "div.approx.ftz.f32", "sqrt.approx.ftz.f32"}),
    ],
)
def test_the_check_of_arithmetic_finds_what_flags_do(nvcc, tmp_path, flag, found):
    given = [] if flag == "--use_fast_math" else FLAGS  # that one stands behind the others
    source = tmp_path / "sample.cu"
    source.write_text(SAMPLE)
    flags = [name for name in given if name.split("=")[0] != flag.split("=")[0]]
    tool(nvcc, *flags, flag, "-arch=compute_80", "-ptx", source, "-o", tmp_path / "sample.ptx")
    assert found <= set(inexact((tmp_path / "sample.ptx").read_text())), flag
    assert bool(found) == bool(inexact((tmp_path / "sample.ptx").read_text()))


def stacks(path: Path) -> dict[str, int]:
    """Bytes of stack of each kernel in a file of machine code. Registers are spilled to the stack and nowhere else."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02", path
    (start,) = struct.unpack_from("<Q", data, 40)
    count, names = struct.unpack_from("<HH", data, 60)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * k) for k in range(count)]

    def text(table: bytes, at: int) -> str:
        return table[at : table.index(b"\0", at)].decode()

    def content(header: tuple[int, ...]) -> bytes:
        return data[header[4] : header[4] + header[5]]

    sections = {text(content(headers[names]), header[0]): header for header in headers}
    symbols = content(sections[".symtab"])
    strings = content(headers[sections[".symtab"][6]])
    if ".nv.info" not in sections:  # no kernels
        return {}
    info = content(sections[".nv.info"])
    # Attributes: a format, a kind, and a number or, in format 4, the size of what follows.
    frame_size, frames, at = 0x11, {}, 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind != 4:
            continue
        if attribute == frame_size:
            symbol, frame = struct.unpack_from("<II", info, at)
            frames[text(strings, struct.unpack_from("<I", symbols, 24 * symbol)[0])] = frame
        at += size
    return {name: frame for name, frame in frames.items() if name.startswith("_Z") or name == "sample"}


# Bytes that a kernel of a target may have on its stack. The widest vectors of batch normalization's resident kernels do
# not fit into the registers that a thread has in blocks of 16 warps.
MOST_STACK = {"batchnorm": 256}


def test_no_kernel_spills_or_has_a_stack_frame(kept):
    """On every architecture that is built."""
    kernels, too_large = {}, {}
    for ptx in kept.glob("*/*.ptx"):
        unit = ptx.name.split(".")[0]
        for path in ptx.parent.glob(f"{unit}.*cubin"):
            found = stacks(path)
            assert len(found) == ptx.read_text().count(".entry "), path
            kernels[path] = len(found)
            most = MOST_STACK.get(path.parent.name, 0)
            too_large |= {(path.name, demangled([name])[0]): size for name, size in found.items() if size > most}
    assert not too_large
    units = {(path.parent.name, path.name.split(".")[0]) for path in kernels}
    assert units == {(path.parent.name, path.name.split(".")[0]) for path in kept.glob("*/*.fatbin")}
    assert sum(kernels.values()) >= 2 * 9 * len(REGISTRY)


def test_the_check_of_stacks_finds_spills(nvcc, tmp_path):
    assert stacks(compiled(nvcc, tmp_path, "-arch=sm_80", "-cubin")) == {"sample": 0}
    assert stacks(compiled(nvcc, tmp_path, "-arch=sm_80", "-cubin", "-maxrregcount=24"))["sample"] > 0


class Kernel(NamedTuple):
    rule: str
    param: str
    grad: str
    state: str
    whole: bool
    loads: int  # of 16 bytes
    stores: int

    def pieces(self, dtype: str) -> int:
        """16-byte pieces of a vector, which has as many elements as 16 bytes have of the narrowest array."""
        lanes = 16 // min(ITEMSIZE[name] for name in (self.param, self.grad, self.state))
        return lanes * ITEMSIZE[dtype] // 16

    @property
    def compute(self) -> str:
        return "Float64" if self.param == "Float64" else "Float32"


def demangled(names: list[str]) -> list[str]:
    command = shutil.which("c++filt")
    assert command, "c++filt is in the package of the linker that nvcc needs"
    done = subprocess.run([command], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def update_kernels(folder: Path) -> Iterator[Kernel]:
    """Of the first architecture: PTX is the same for all but for its target."""
    _, *entries = re.split(r"\.entry\s+", ptx_of(folder)[0].read_text())
    for entry, name in zip(entries, demangled([entry.split("(", 1)[0] for entry in entries]), strict=True):
        short = re.sub(r"onepass::|cuda::|\(anonymous namespace\)::", "", name)
        match = re.match(r"void for_elements<Update<(.*), Storage<(\w+), (\w+), (\w+)>, (\w+)>, Table", short)
        assert match, name
        *storage, whole = match.groups()
        wide = re.findall(r"\b(ld|st)\.global(?:\.[a-z:0-9]+)*\.v(?:4\.[bfus]32|2\.[bfus]64)\b", entry)
        yield Kernel(*storage, whole == "true", wide.count("ld"), wide.count("st"))


@pytest.fixture(scope="module")
def updates(kept):
    return [kernel for part in range(UPDATE_PARTS) for kernel in update_kernels(kept / f"update_{part}")]


def test_every_rule_has_its_update_kernels(updates):
    rules = {kernel.rule for kernel in updates}
    storages = {(kernel.param, kernel.grad, kernel.state) for kernel in updates}
    assert len(rules) == len(REGISTRY)
    assert len(storages) >= 9
    assert {kernel[:5] for kernel in updates} == {
        (rule, *storage, whole) for rule in rules for storage in storages for whole in (False, True)
    }


def test_every_stream_is_accessed_by_16_bytes_at_a_time(updates):
    """The loop over vectors of a plain update loads and stores each array in pieces of 16 bytes, and each piece once.

    How many arrays a rule has is found from its loads; over all rules, these must be the numbers of the registry.
    """
    expected = sorted(len(row["slots"]) for row in REGISTRY)
    slots = collections.defaultdict(list)
    for kernel in updates:
        if kernel.whole:
            continue
        of_slots = kernel.loads - kernel.pieces(kernel.param) - kernel.pieces(kernel.grad)
        number, rest = divmod(of_slots, kernel.pieces(kernel.state))
        assert rest == 0, kernel
        assert kernel.stores == kernel.pieces(kernel.param) + number * kernel.pieces(kernel.state), kernel
        slots[kernel.param, kernel.grad, kernel.state].append(number)
    for storage, found in slots.items():
        assert sorted(found) == expected, storage


def test_what_rides_along_is_accessed_by_16_bytes_at_a_time(updates):
    """Of a whole step: as above, and sums of gradients, averages, split numbers, mirrors and zeroed gradients."""
    plain = {(kernel.rule, kernel.param, kernel.grad, kernel.state): kernel for kernel in updates if not kernel.whole}
    for kernel in updates:
        if not kernel.whole:
            continue
        pieces = kernel.pieces
        split = 2 * pieces("BFloat16") if kernel.param == "BFloat16" else 0
        # An average has the parameter's dtype, that of a split one the compute type.
        average = pieces(kernel.param) + (pieces(kernel.compute) if split else 0)
        mirrors = pieces("BFloat16") + pieces("Float16")
        zeros = 2 * pieces(kernel.grad)  # in a step that is skipped, and in one that is not
        alone = plain[kernel.rule, kernel.param, kernel.grad, kernel.state]
        assert kernel.loads == alone.loads + split + pieces(kernel.compute) + average, kernel
        assert kernel.stores == alone.stores + split + average + mirrors + zeros, kernel


# --- The module -------------------------------------------------------------------------------------------------------

BUILT = _cpu.cuda_architectures()
built_by_nvcc = pytest.mark.skipif(
    BUILT in (None, "the host"),
    reason="this build has no CUDA kernels" if BUILT is None else "this build's kernels are the host's",
)


def module_file() -> Path:
    spec = importlib.util.find_spec("onepass._cuda")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@built_by_nvcc
def test_import_touches_no_driver():
    """Not even where there is one: a process may choose its devices, or fork, after the import."""
    printed = run_python("-c", "import onepass._cuda; print(*open('/proc/self/maps'))")
    assert "_cuda." in printed
    assert "libcuda" not in printed


@built_by_nvcc
def test_module_needs_no_library_of_cuda():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", "--wide", module_file()))
    assert any(name.startswith("libstdc++") for name in needed)
    assert not [name for name in needed if re.search("cuda|nv", name)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", tool("readelf", "--dynamic", "--wide", module_file()))


@built_by_nvcc
def test_module_exports_its_initialization_alone():
    """Another library's copy of the runtime, or a module of another version, finds nothing here to be mixed up with."""
    lines = tool("nm", "--dynamic", "--defined-only", "--demangle", module_file()).splitlines()
    names = {line.split(maxsplit=2)[2] for line in lines}
    assert "PyInit__cuda" in names
    # Templates of the C++ library are weak in every module.
    assert not [name for name in names - {"PyInit__cuda"} if not re.match(r"[a-z ]*\bstd::|.* std::|__gnu_cxx::", name)]


def fat_binaries(data: bytes) -> Iterator[set[tuple[str, int]]]:
    """Of each container of device code: (kind, architecture) of what it holds."""
    magic, at = struct.pack("<IH", 0xBA55ED50, 1), 0
    while (at := data.find(magic, at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        at, end, found = at + header, at + header + size, set()
        while at < end:
            kind, own_header, own_size = struct.unpack_from("<HxxIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            found.add(({1: "virtual", 2: "real"}[kind], architecture))
            at += own_header + own_size
        yield found


@built_by_nvcc
def test_module_holds_the_architectures_that_it_names():
    named = set()
    for name in BUILT.split():
        number, _, kind = name.partition("-")
        assert re.fullmatch(r"\d+[af]?", number), BUILT
        kinds = [kind] if kind else ["real", "virtual"]
        named |= {(kind, int(number.rstrip("af"))) for kind in kinds}
    containers = list(fat_binaries(module_file().read_bytes()))
    assert len(containers) >= UPDATE_PARTS + 2
    for container in containers:
        assert container == named


def devices() -> int | str:
    """How many there are, or why CUDA cannot be used."""
    try:
        return len(_cpu.cuda_devices())
    except RuntimeError as error:
        return str(error)


def test_command_line_says_what_it_finds():
    row = dict(line.split(maxsplit=1) for line in run_python("-m", "onepass").splitlines())["cuda"]
    if BUILT is None:
        assert row == "not built"
        return
    found, built = row.split("; built for ")
    assert built == BUILT
    there = devices()
    if isinstance(there, str):
        assert found == there
        assert "driver" in found or "device" in found
    else:
        assert found.count("sm_") == there
        assert there > 0 or found == "no device"


# An array on a device, where CuPy cannot be imported; or where the module is missing, too.
ARRAY = """
import sys
sys.modules[{missing!r}] = None
import onepass
class Array:
    __cuda_array_interface__ = {{"shape": (4,), "typestr": "<f4", "data": (1 << 46, False), "version": 3}}
try:
    onepass.SGD([Array()])
except TypeError as error:
    print(error)
"""


@pytest.mark.parametrize("missing", ["cupy", "onepass._cuda"])
def test_a_missing_part_is_named(missing):
    printed = run_python("-c", ARRAY.format(missing=missing))
    assert printed.startswith("params[0]: is on a CUDA device, and ")
    if missing == "cupy" and BUILT is not None:
        assert "CuPy" in printed
        assert "install cupy-cuda12x or cupy-cuda13x" in printed
    else:
        assert "has no CUDA kernels; build it where nvcc is found" in printed
        assert "CUDA 12.4 or newer" in printed

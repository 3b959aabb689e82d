"""Builds that tests read: the one of the package where its folder is known, others made once in a run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def folder_of_package() -> Path | None:
    """Where the installed package was built, if ONEPASS_BUILD says so (`make test` does)."""
    folder = os.environ.get("ONEPASS_BUILD")
    return Path(folder) if folder else None


def environment() -> dict[str, str]:
    """This one without sanitizers preloaded: compilers do not run under them."""
    return {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}


def tool(*command: str | Path) -> str:
    """What a command prints; an error of the test if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def cmake_build(
    tmp_path_factory: pytest.TempPathFactory, name: str, source: Path, *options: str, targets: Sequence[str] = ()
) -> Path:
    """Configures and builds `source`, and returns the folder. Whoever needs it first builds it, others wait."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake, "cmake is part of the test extra"
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all processes among which the tests of this run are divided
        folder = folder.parent
    build, done = folder / name, folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            tool(cmake, "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
            tool(cmake, "--build", build, "--parallel", "2", *(["--target", *targets] if targets else []))
            done.touch()
    return build


def left_out() -> tuple[str, ...]:
    """The instruction sets for which a consumer's library has no kernels."""
    return ("avx512",) if folder_of_package() is not None else ()


def consumer(tmp_path_factory: pytest.TempPathFactory, name: str = "consumer", *options: str) -> Path:
    """examples/cpp, built as a C++ user builds it: the library with no Python in sight.

    The package's own kernels are tested as they are, where its folder is known. So these need be neither the best then,
    nor all of them.
    """
    if folder_of_package() is not None:
        options = (*options, "-DONEPASS_KERNEL_OPTIMIZATION=-O1", f"-DONEPASS_LEFT_OUT={';'.join(left_out())}")
    return cmake_build(tmp_path_factory, name, ROOT / "examples" / "cpp", *options)

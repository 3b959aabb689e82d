"""How batch normalization divides its work on a CUDA device: plain arithmetic, which needs none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_each_element_is_visited_once_and_plans_keep_to_the_device(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "batchnorm_plan"
    source = ROOT / "tests" / "cpp" / "batchnorm_plan.cpp"
    subprocess.run([compiler, "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (run.stdout.splitlines()[-1], run.returncode) == ("0 failures", 0), run.stdout[-2000:]

"""Promise: the soak runs, and says so when memory grows by an array a step or when a result is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("soak", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules["soak"] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def silent(_text):
    pass


def test_a_short_soak_is_clean_and_writes_what_it_did(tmp_path):
    command = [sys.executable, str(SCRIPT), "--minutes", "0.2", "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("clean\n")
    results = json.loads((tmp_path / "soak.json").read_text())
    counts = results["counts"]
    assert all(counts[name] > 0 for name in ("steps", "compared", "optimizers", "layers", "checkpoints", "resized"))
    assert results["clean"] is True
    assert results["growth"] <= results["bound"]
    assert len(results["samples"]) >= 8
    assert all(sample["resident"] > 1_000_000 for sample in results["samples"])
    assert results["environment"]["onepass"]
    assert "clean" in (tmp_path / "soak.md").read_text()


def test_a_leak_of_an_array_in_each_step_is_reported(soak):
    kept = []
    done = soak.run(0.2, seed=2, on_step=lambda: kept.append(np.ones(2000)), tell=silent)
    (wrong,) = soak.verdict(done)
    assert wrong.startswith("memory grew by ")
    assert len(kept) > 2000


def test_a_wrong_result_ends_the_run_and_is_reported(soak, monkeypatch):
    compare = soak.scenes.compare

    def compare_after_a_fault(training, reference):
        for param in training.params:
            if param.dtype == np.float32 and param.size > 3 and np.isfinite(param).all():
                param[(0,) * param.ndim] += 1
        compare(training, reference)

    monkeypatch.setattr(soak.scenes, "compare", compare_after_a_fault)
    done = soak.run(1.0, seed=3, tell=silent)
    wrong = soak.verdict(done)
    assert "elements differ" in wrong[0]
    assert "of seed 3" in wrong[0]


def samples(soak, *mebibytes):
    return [soak.Sample(k / 60.0, int(size * soak.MIB), 0) for k, size in enumerate(mebibytes)]


def test_growth_is_of_the_floor_after_the_warm_up(soak):
    noisy = [60, 50, 70, 51, 65, 52, 66, 50, 70, 51, 80, 50]
    assert soak.growth(samples(soak, 10, 20, *noisy), 2.0) == 0
    assert soak.growth(samples(soak, 10, 20, *(x + 2 * k for k, x in enumerate(noisy))), 2.0) > 15 * soak.MIB
    assert soak.growth(samples(soak, *range(40)), 1000.0) is None
    short = soak.Soak(1.0, 0)
    assert soak.verdict(short) == [
        "it was too short to say whether memory grows",
        "nothing was compared with the reference",
    ]

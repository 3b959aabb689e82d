"""What tests of threads and processes share: fresh interpreters, forked children, bodies that run at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


def run_all(*bodies):
    """Run the bodies at once, each in its thread; raise what one of them raised."""
    barrier = threading.Barrier(len(bodies))
    errors = []

    def run(body):
        try:
            barrier.wait()
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def python(code, *, script: Path | None = None, timeout=300, **environment):
    """Run code in a fresh interpreter; from a file, `script`, if its children shall be able to import it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONEPASS_")}
    if script is not None:
        script.write_text(code)
    return subprocess.run(
        [sys.executable, *(["-c", code] if script is None else [str(script)])],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_ok(done):
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


# What begins a program for `python`.
PRELUDE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")  # Python's own, of a fork beside threads
import numpy as np
import onepass

SIZE = 1 << 19

def make():
    sizes = {SIZE: np.float32, 5: np.float64, 60_000: np.float32}
    params = [np.linspace(1, 2, size, dtype=dtype) for size, dtype in sizes.items()]
    grads = [np.linspace(1, 3, p.size, dtype=p.dtype) for p in params]
    return onepass.Adam(params, lr=0.1), params, grads

def result(params):
    assert all(np.isfinite(p).all() for p in params)
    return [p.tobytes() for p in params]

def expected(steps):
    opt, params, grads = make()
    before = result(params)
    for _ in range(steps):
        opt.step(grads)
    assert before != result(params) or steps == 0
    return result(params)

def tasks():
    # The threads of this process. A sanitizer starts one of its own with the first that the program starts.
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    return set(os.listdir("/proc/self/task"))

def in_child(body):
    # The exit code of a forked child that runs `body`; a child that hangs is killed by its alarm.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)
            body()
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

def check(condition):
    assert condition
"""

"""Train at random for minutes, from several threads and processes, and see that memory stays flat and results right.

    python bench/soak.py --minutes 10

Workers make random optimizers and batch norm layers (the fuzzer's), step them, save and load them, and drop them, while
another thread resizes the thread pool, changes the instruction set and empties caches. At random times a worker gives
the state of its training to the NumPy reference and compares the next step with it, bit for bit. A part of the work is
done by forked children.

Every few seconds all workers let go of everything, and the memory of the process is read. It grows at first: allocators
and caches fill up. From a quarter of the time on (at the least a few rounds, at the most two minutes) it shall not.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import method
import onepass
from onepass import _cpu

sys.path.append(str(method.ROOT / "tests"))
choices: Any = importlib.import_module("fuzz.choices")
plans: Any = importlib.import_module("fuzz.plans")
scenes: Any = importlib.import_module("fuzz.scenes")
world: Any = importlib.import_module("fuzz.world")

MIB = 2**20
BOUND = 8 * MIB  # of growth after the warm-up; ten minutes make a million steps
WORKERS = 3
THREADS = (1, 2, 3, 5, 8)
CHILD_SECONDS = 120
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h


@dataclass
class Counts:
    """What has been done."""

    steps: int = 0
    compared: int = 0
    refused: int = 0
    optimizers: int = 0
    layers: int = 0
    checkpoints: int = 0
    forks: int = 0
    resized: int = 0

    def add(self, other: Counts) -> None:
        """Take over what another has counted."""
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Sample:
    """Memory in bytes when nothing is in use, `minutes` after the start."""

    minutes: float
    resident: int
    steps: int


@dataclass
class Soak:
    """A run: what is shared by its threads."""

    seconds: float
    seed: int
    on_step: Callable[[], object] = lambda: None
    counts: Counts = field(default_factory=Counts)
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gate: threading.Condition = field(default_factory=threading.Condition)
    paused: bool = False
    over: bool = False
    parked: int = 0
    serial_bytes: int = field(default_factory=_cpu.serial_bytes)

    @property
    def interval(self) -> float:
        """Seconds between two looks at the memory."""
        return min(10.0, max(0.4, self.seconds / 40.0))

    @property
    def warm(self) -> float:
        """Seconds after which memory shall not grow."""
        return min(120.0, self.seconds / 4.0)

    def rest(self, counts: Counts) -> bool:
        """Let go of everything as long as memory is looked at. False when the run is over."""
        with self.gate:
            self.counts.add(counts)
            self.parked += 1
            self.gate.notify_all()
            while self.paused and not self.over:
                self.gate.wait()
            self.parked -= 1
            return not self.over

    def fail(self, what: str) -> None:
        """Note what went wrong; the run ends."""
        with self.gate:
            self.failures.append(what)
            self.over = True
            self.gate.notify_all()


# --- Work -------------------------------------------------------------------------------------------------------------


def random_choices(rng: random.Random) -> Any:
    """Make what the fuzzer's scenes draw from."""
    return choices.Choices(rng.randbytes(rng.choice((64, 512, 4096))))


def train(soak: Soak, rng: random.Random, counts: Counts) -> None:
    """Step a new optimizer for a while, and compare some of the steps with the reference."""
    c, story = random_choices(rng), world.Story()
    plan = plans.draw(c, story)
    training = plan.begin()
    counts.optimizers += 1
    for _ in range(rng.randint(1, 60)):
        options = plans.draw_step_options(c)
        options.pop("nonfinite", None)
        grads = scenes.some_gradients(c, plan, all_present=False, writable=options.get("zero_grads", False))
        if rng.random() < 0.1:
            scenes.advance(plan, training, plan.reference(training), grads, options)
            counts.compared += 1
        else:
            shaped = plan.shaped([None if given is None else given.view for given in grads])
            for _ in range(rng.randint(1, 40)):
                training.opt.step(shaped, **options)
                counts.steps += 1
                soak.on_step()
        counts.steps += 1
        soak.on_step()
        if soak.paused:
            break
    if rng.random() < 0.3:
        checkpoint(plan, training, counts)


def checkpoint(plan: Any, training: Any, counts: Counts) -> None:
    """Save, load into a new optimizer, and go on with both: the same bits."""
    other = plan.begin()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.safetensors"
        onepass.save(path, training.opt, note="soak")
        if onepass.load(path, other.opt) != {"note": "soak"}:
            raise AssertionError("extra: came back different")
    scenes.same_state(training.opt.state_dict(), other.opt.state_dict())
    grads = plan.shaped([np.zeros_like(param) for param in training.params])
    for each in (training, other):
        each.opt.step(grads)
    for mine, its in zip(training.params, other.params, strict=True):
        if world.bits(mine) != world.bits(its):
            raise AssertionError("a loaded optimizer goes elsewhere")
    counts.checkpoints += 1


def normalize(soak: Soak, rng: random.Random, counts: Counts) -> None:
    """Train a layer with outputs that the buffer pool keeps, and compare another one with the reference."""
    layer = onepass.BatchNorm(rng.choice((3, 16, 64)), activation=rng.choice((None, "relu")))
    counts.layers += 1
    generator = np.random.default_rng(rng.randrange(2**32))
    for _ in range(rng.randint(1, 30)):
        shape = (rng.choice((4, 32)), layer.num_features, rng.choice((1, 7, 28)), rng.choice((1, 28)))
        x = generator.standard_normal(shape, np.float32)
        dy = layer.forward(x)
        layer.backward(dy)
        counts.steps += 1
        soak.on_step()
        if soak.paused:
            break
    scene(rng, counts, "batch_norm")


def scene(rng: random.Random, counts: Counts, name: str) -> None:
    """Play one of the fuzzer's scenes, on whatever the machine is set to."""
    outcome = scenes.SCENES[name](random_choices(rng), world.Story(), world.Machine(owned=False))
    counts.compared += outcome == "compared"
    counts.refused += outcome == "refused"


def any_scene(_: Soak, rng: random.Random, counts: Counts) -> None:
    """Play any of them."""
    scene(rng, counts, rng.choice(sorted(scenes.SCENES)))


def fork(soak: Soak, rng: random.Random, counts: Counts) -> None:
    """Work in a child that has none of the other threads."""
    seed = rng.randrange(2**32)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(CHILD_SECONDS)
            inner = random.Random(seed)
            for _ in range(3):
                scene(inner, Counts(), "step")
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise AssertionError(f"a forked child ended with {os.waitstatus_to_exitcode(status)}")
    counts.forks += 1


WORK: tuple[tuple[Callable[[Soak, random.Random, Counts], None], int], ...] = (
    (train, 60),
    (normalize, 15),
    (any_scene, 20),
    (fork, 2),
)


def worker(soak: Soak, number: int) -> None:
    """Do random work until the run is over."""
    rng = random.Random(f"{soak.seed} {number}")
    works = [work for work, weight in WORK for _ in range(weight)]
    try:
        while True:
            counts = Counts()
            rng.choice(works)(soak, rng, counts)
            if not soak.rest(counts):
                return
    except BaseException:
        soak.fail(f"worker {number} of seed {soak.seed}:\n{traceback.format_exc()}")


def disturber(soak: Soak) -> None:
    """Change all that no result may depend on, all the time."""
    rng = random.Random(f"{soak.seed} disturber")
    isas = onepass.available_isas()
    try:
        while not soak.over:
            onepass.set_num_threads(rng.choice(THREADS))
            onepass.set_isa(rng.choice(isas))
            _cpu.set_serial_bytes(rng.choice((0, soak.serial_bytes)))
            if rng.random() < 0.1:
                onepass.empty_cache()
            if rng.random() < 0.05:
                onepass.set_cache_limit(rng.choice((0, MIB, None)))
            soak.counts.resized += 1
            time.sleep(rng.uniform(0.0, 0.05))
    except BaseException:
        soak.fail(f"disturber of seed {soak.seed}:\n{traceback.format_exc()}")


# --- Memory -----------------------------------------------------------------------------------------------------------


def give_back_at_once() -> None:
    """Let the C library return large blocks to the system when they are freed, and keep few heaps.

    Left alone it raises the size from which it does so with each block that it sees, and keeps the tops of its heaps:
    70 MiB at one time and none at another, in which a leak would hide. This way it varies by 1 MiB.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        mallopt(M_ARENA_MAX, 2)


def resident() -> int:
    """Bytes of this process that are in memory, when all that is free has been given back."""
    onepass.empty_cache()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have none
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(samples: Sequence[Sample], warm: float) -> int | None:
    """By how many bytes memory has grown since it was warm: from the least of the first samples to that of the last.

    What allocators hold beyond what is in use goes up and down by some MiB; a leak raises the least of it. None if
    there are too few samples to say.
    """
    flat = [sample.resident for sample in samples if sample.minutes * 60.0 >= warm]
    few = max(1, len(flat) // 4)
    if len(flat) < 8:
        return None
    return min(flat[-few:]) - min(flat[:few])


def look(soak: Soak, start: float) -> None:
    """Wait until all workers have let go of what they had, and read the memory."""
    with soak.gate:
        soak.paused = True
        while soak.parked < WORKERS and not soak.over:
            soak.gate.wait(1.0)
        if not soak.over:
            minutes = (time.monotonic() - start) / 60.0
            soak.samples.append(Sample(minutes, resident(), soak.counts.steps))
        soak.paused = False
        soak.gate.notify_all()


# --- The run ----------------------------------------------------------------------------------------------------------


def line(soak: Soak) -> str:
    """Say how it goes."""
    last, counts, grown = soak.samples[-1], soak.counts, growth(soak.samples, soak.warm)
    since = "warming up" if grown is None else f"{grown / MIB:+.1f} MiB since warm"
    return (
        f"{last.minutes:6.2f} min  {counts.steps:9,} steps  {counts.compared:7,} compared  "
        f"{last.resident / MIB:7.1f} MiB resident  {since}"
    )


def run(
    minutes: float,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda text: print(text, flush=True),
) -> Soak:
    """Work for so long; `on_step` is called after each step of the trainings."""
    soak = Soak(minutes * 60.0, seed, on_step)
    isa, limit = onepass.isa(), onepass.get_cache_limit()
    give_back_at_once()
    threads = [threading.Thread(target=worker, args=(soak, number)) for number in range(WORKERS)]
    threads.append(threading.Thread(target=disturber, args=(soak,)))
    start = time.monotonic()
    told = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # with threads: that is what is tried
        for thread in threads:
            thread.start()
        try:
            while not soak.over and time.monotonic() - start < soak.seconds:
                time.sleep(soak.interval)
                look(soak, start)
                if soak.samples and (time.monotonic() - told > 20.0 or len(soak.samples) == 1):
                    told = time.monotonic()
                    tell(line(soak))
        finally:
            with soak.gate:
                soak.over = True
                soak.gate.notify_all()
            for thread in threads:
                thread.join()
            onepass.set_isa(isa)
            onepass.set_num_threads(None)
            _cpu.set_serial_bytes(soak.serial_bytes)
            onepass.set_cache_limit(limit)
    if soak.samples:
        tell(line(soak))
    return soak


def verdict(soak: Soak) -> list[str]:
    """Return what is wrong; nothing if all is well."""
    grown, wrong = growth(soak.samples, soak.warm), list(soak.failures)
    if grown is None and not wrong:
        wrong.append("it was too short to say whether memory grows")
    elif grown is not None and grown > BOUND:
        wrong.append(f"memory grew by {grown / MIB:.1f} MiB after the warm-up; at most {BOUND / MIB:.0f} are allowed")
    if not soak.counts.compared:
        wrong.append("nothing was compared with the reference")
    return wrong


def write(soak: Soak, wrong: Sequence[str], folder: Path) -> None:
    """Write soak.json and soak.md."""
    folder.mkdir(parents=True, exist_ok=True)
    grown = growth(soak.samples, soak.warm)
    environment = {**method.environment(method.Plan()), "seed": soak.seed}
    del environment["plan"]
    results = {
        "environment": environment,
        "clean": not wrong,
        "wrong": list(wrong),
        "growth": grown,
        "bound": BOUND,
        "counts": dataclasses.asdict(soak.counts),
        "samples": [dataclasses.asdict(sample) for sample in soak.samples],
    }
    (folder / "soak.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    said = "clean" if not wrong else "NOT CLEAN: " + "; ".join(wrong)
    rows = [f"| {name} | {value:,} |" for name, value in dataclasses.asdict(soak.counts).items()]
    every = max(1, len(soak.samples) // 20)
    memory = [f"| {s.minutes:.1f} | {s.steps:,} | {s.resident / MIB:.1f} |" for s in soak.samples[::every]]
    text = [
        "# soak",
        "",
        f"{said}; {'?' if grown is None else f'{grown / MIB:+.1f}'} MiB after the warm-up, at most {BOUND / MIB:.0f}.",
        "",
        "| what | count |",
        "| --- | --- |",
        *rows,
        "",
        "| minutes | steps | MiB resident |",
        "| --- | --- | --- |",
        *memory,
        "",
        *(f"* {key}: {value}" for key, value in environment.items()),
    ]
    (folder / "soak.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if memory grew or a result was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the work; when it is done is up to the machine")
    parser.add_argument("--out", type=Path, help="folder for soak.json and soak.md; without it none are written")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    soak = run(options.minutes, seed)
    wrong = verdict(soak)
    counts = ", ".join(f"{value:,} {name}" for name, value in dataclasses.asdict(soak.counts).items())
    print(f"{counts}; seed {seed}")
    print(*(f"WRONG: {what}" for what in wrong) if wrong else ["clean"], sep="\n")
    if options.out is not None:
        write(soak, wrong, options.out)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

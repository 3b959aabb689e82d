"""Who makes the bytes, and what happens when they make something fail."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import hashlib
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.choices import Choices

FOLDER = Path(__file__).resolve().parents[2] / "build" / "fuzz"
LENGTHS = (16, 64, 256, 256, 1024, 4096)
SEEDS = 60
HANGS = 120.0  # seconds for one input


@dataclasses.dataclass
class Record:
    """What came of an input."""

    scene: str
    outcome: str
    lines: list[str]
    met: Counter[str]
    error: BaseException | None = None

    @property
    def kind(self) -> Any:
        """Two failures of the same kind count as the same: the exception, and the line of ours that raised it."""
        if self.error is None:
            return None
        frames = traceback.extract_tb(self.error.__traceback__)
        return type(self.error).__name__, [(frame.filename, frame.lineno) for frame in frames]


def play(data: bytes) -> Record:
    """Run the scene that the bytes tell."""
    from fuzz.scenes import SCENES
    from fuzz.world import Machine, Story

    choices, story, machine = Choices(data), Story(), Machine()
    name = choices.pick(sorted(SCENES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = SCENES[name](choices, story, machine)
    except Exception as error:
        return Record(name, "failed", story.lines, story.met, error)
    finally:
        machine.restore()
    return Record(name, outcome, story.lines, story.met)


def prefix(scene: str | None) -> bytes:
    """Bytes that choose a scene."""
    from fuzz.scenes import SCENES

    if scene is None:
        return b""
    if scene not in SCENES:
        raise SystemExit(f"--scene: there are {', '.join(sorted(SCENES))}")
    return bytes([sorted(SCENES).index(scene)])


class Statistics:
    def __init__(self) -> None:
        self.start = time.monotonic()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.met: Counter[str] = Counter()

    @property
    def executions(self) -> int:
        return sum(self.outcomes.values())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def add(self, record: Record) -> None:
        self.outcomes[record.scene, record.outcome] += 1
        self.met.update(f"{record.scene}: {name}" for name in set(record.met))

    def report(self, engine: str) -> str:
        rate = self.executions / max(self.seconds, 1e-9)
        lines = [f"{engine}: {self.executions} executions in {self.seconds:.1f} s, {rate:.0f} a second"]
        for scene in sorted({scene for scene, _ in self.outcomes}):
            counts = {outcome: count for (name, outcome), count in sorted(self.outcomes.items()) if name == scene}
            each = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
            lines.append(f"  {scene}: {sum(counts.values())} executions, {each}")
        return "\n".join(lines)


def smaller(data: bytes, kind: Any, play: Callable[[bytes], Record], *, seconds: float = 10.0) -> bytes:
    """Shorter, and with more zeros, as long as it fails in the same way."""
    deadline = time.monotonic() + seconds

    def fails(candidate: bytes) -> bool:
        return time.monotonic() < deadline and play(candidate).kind == kind

    length = len(data)
    while length > 1:  # the shortest prefix, by halves
        half = data[: len(data) - length // 2]
        if len(half) < len(data) and fails(half):
            data = half
            length = len(data)
        else:
            length //= 2
    width = max(1, len(data) // 4)
    while width:
        for at in range(0, len(data), width):
            zeroed = data[:at] + bytes(min(width, len(data) - at)) + data[at + width :]
            if zeroed != data and fails(zeroed):
                data = zeroed
        width //= 2
    stripped = data.rstrip(b"\0")
    return stripped if stripped != data and fails(stripped) else data


def tell(record: Record) -> str:
    lines = [f"scene {record.scene}", *record.lines]
    if record.error is not None:
        lines += ["", "".join(traceback.format_exception(record.error))]
    return "\n".join(lines)


def keep(data: bytes, record: Record, folder: Path) -> Path:
    """Write a failing input, made smaller, and say how to see it again."""
    data = smaller(data, record.kind, play)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"crash-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(tell(play(data)), file=sys.stderr)
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else path
    print(f"\nTo see it again:\n  python tests/fuzz/fuzz.py --replay {shown}", file=sys.stderr, flush=True)
    return path


class Current:
    """The input that runs now lies in a file, where it is found if the process dies of it."""

    def __init__(self, folder: Path, engine: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"running-{engine}-{os.getpid()}"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def write(self, data: bytes) -> None:
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, data, 0)
        faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)

    def remove(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        os.close(self.file)
        self.path.unlink(missing_ok=True)


def input_of(seed: int, number: int, start: bytes) -> bytes:
    """The same on every machine and in every run."""
    rng = random.Random(f"onepass {seed} {number}")
    return start + rng.randbytes(rng.choice(LENGTHS))


def random_engine(
    *,
    seed: int,
    seconds: float | None,
    runs: int | None,
    scene: str | None,
    folder: Path,
) -> tuple[Statistics, Path | None]:
    """Independent inputs from a seed, until time or runs are over or one fails."""
    statistics, start = Statistics(), prefix(scene)
    current = Current(folder, "random")
    number = 0
    try:
        while (runs is None or number < runs) and (seconds is None or statistics.seconds < seconds):
            data = input_of(seed, number, start)
            number += 1
            current.write(data)
            record = play(data)
            statistics.add(record)
            if record.error is not None:
                return statistics, keep(data, record, folder)
    finally:
        current.remove()
    return statistics, None


def atheris_engine(
    *, seed: int, seconds: float | None, runs: int | None, scene: str | None, folder: Path
) -> tuple[Statistics, Path | None]:
    """libFuzzer, guided by what the inputs reach in the Python code of onepass and of the scenes.

    It ends the process itself, so what remains to be said is said from its callback.
    """
    import atheris

    with atheris.instrument_imports(include=["onepass", "fuzz.scenes", "fuzz.plans"]):
        import fuzz.scenes
        import onepass  # noqa: F401 - instrumented now

    start = prefix(scene)
    corpus = folder / "corpus" / (scene or "all")
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(SEEDS):  # libFuzzer alone would be long in finding that longer inputs say more
        first = prefix(sorted(fuzz.scenes.SCENES)[number % len(fuzz.scenes.SCENES)]) if scene is None else b""
        (corpus / f"seed-{number}").write_bytes(input_of(0, number, first))
    current, statistics = Current(folder, "atheris"), Statistics()

    def finish(code: int) -> None:
        current.remove()
        print(statistics.report("atheris"), flush=True)
        print(f"  {len(list(corpus.iterdir()))} inputs in {corpus}", flush=True)
        os._exit(code)  # libFuzzer knows no other way out that tells the caller of failures found by us

    def once(tail: bytes) -> None:
        if (seconds is not None and statistics.seconds > seconds) or statistics.executions == runs:
            finish(0)
        data = start + tail
        current.write(data)
        record = play(data)
        statistics.add(record)
        if record.error is not None:
            keep(data, record, folder)
            finish(1)

    atheris.Setup([sys.argv[0], f"-seed={seed}", "-max_len=4096", "-len_control=0", "-verbosity=0", str(corpus)], once)
    atheris.Fuzz()
    raise AssertionError("libFuzzer came back")


def has_atheris() -> bool:
    with contextlib.suppress(ImportError):
        import atheris  # noqa: F401

        return True
    return False


ENGINES = {"random": random_engine, "atheris": atheris_engine}

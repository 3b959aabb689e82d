"""The files of bench/results, read back; what bench/report.py and bench/plots.py share."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from method import NOISY, ROTATED, Estimate, Goal, format_seconds

Row: TypeAlias = Mapping[str, Any]

OURS = "onepass"
COMPARED = ("optimizers", "batchnorm", "whole_step", "sweeps", "gpu")  # files of rows in which ours meets somebody
FILES = (*COMPARED, "roofline", "micro")
COUNTED = ("counts", "instructions")  # lie in the folder above: they are counted, not timed
YARDSTICK = re.compile(r"traffic|copy")
ITSELF = re.compile(r"onepass|nearest$|float32 and mirror$")
STORAGE = "float32-float32-float32"

# In this order contenders stand in tables and legends.
CONTENDERS = (
    OURS,
    "torch fused",
    "torch fused, flush_denormal",
    "torch compiled",
    "torch foreach",
    "torch for-loop",
    "torch",
    "DeepSpeed",
    "Optax",
    "NumPy in place",
    "NumPy",
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]+", " ", name.lower()).strip()


def contender(name: str) -> str:
    """Return which of the known contenders a row's name is, or the name itself."""
    plain = _plain(name)
    return max((known for known in CONTENDERS if plain.startswith(_plain(known))), key=len, default=name)


def shown(name: str) -> str:
    """Write a contender as tables and legends do: NumPy has one thread where others have more."""
    return f"{name} (1 thread)" if contender(name).startswith("NumPy") else name


def rank(name: str) -> tuple[int, str]:
    """Sort contenders as CONTENDERS does, and unknown ones behind them."""
    known = contender(name)
    return (CONTENDERS.index(known) if known in CONTENDERS else len(CONTENDERS), name)


@dataclass(frozen=True)
class Results:
    """What was read: for each file that is there what it holds, and its bytes."""

    contents: Mapping[str, Any]
    sources: Mapping[str, bytes]

    def rows(self, name: str, kind: str | None = None) -> list[Row]:
        """Return the rows of a file, or those of one kind; none if the file is not there."""
        rows: Sequence[Row] = self.contents.get(name, {}).get("rows", [])
        return [row for row in rows if kind is None or row["kind"] == kind]

    def environment(self, name: str) -> Mapping[str, Any]:
        """Return where a file was measured. google-benchmark calls it `context`."""
        content = self.contents.get(name, {})
        environment: Mapping[str, Any] = content.get("environment") or content.get("context") or {}
        return environment

    def digest(self, names: Iterable[str]) -> str:
        """Tell one state of these files from any other."""
        digest = hashlib.sha256()
        for name in names:
            source = self.sources.get(name, b"")
            digest.update(f"{name} {len(source)}\n".encode())
            digest.update(source)
        return digest.hexdigest()


def load(folder: Path) -> Results:
    """Read what there is in `folder`, and what was counted beside it."""
    sources = {}
    for name in (*FILES, *COUNTED):
        for place in (folder, folder.parent) if name in COUNTED else (folder,):
            file = place / f"{name}.json"
            if file.exists():
                sources[name] = file.read_bytes()
                break
    contents = {name: json.loads(source) for name, source in sources.items()}
    for content in contents.values():
        for row in content.get("rows", []):
            row["met"] = is_met(row)
    return Results(contents, sources)


def is_met(row: Row) -> bool | None:
    """Judge a row by its interval and goal, so that old records, too, are judged as new ones are."""
    if row["failed"]:
        return False
    if row["goal"] is None or row["value"] is None:
        return None
    return Goal(**row["goal"]).met(Estimate(**row["value"]))


# --- One row ----------------------------------------------------------------------------------------------------------


def extra(row: Row, name: str) -> float | None:
    """Return a figure of a kind of row."""
    value: float | None = (row.get("extra") or {}).get(name)
    return value


def slowdown(row: Row, whose: str) -> dict[str, float] | None:
    """Return how many times longer a step takes with subnormal moments; `whose` is ``"ours"`` or ``"peer"``."""
    value = extra(row, f"{whose}_slowdown")
    if value is None:
        return None
    ends = {end: extra(row, f"{whose}_slowdown_{end}") for end in ("low", "high")}
    return {"value": value, **{end: value if known is None else known for end, known in ends.items()}}


def our_slowdown(rows: Iterable[Row]) -> dict[str, float] | None:
    """Return the middle one of those of ours in a case that has one row for each peer."""
    found = sorted((one for row in rows if (one := slowdown(row, "ours"))), key=lambda one: one["value"])
    return found[len(found) // 2] if found else None


def buffers(row: Row) -> str:
    """Return ``"warm"`` or ``"rotated"``; nothing where the row does not say."""
    return str(row.get("buffers") or "")


def cold_first(rows: Iterable[Row], key: Any) -> list[Row]:
    """Return of the rows with the same key those with rotated arrays, or all of them where there are none."""
    groups = grouped(rows, key)
    return [row for group in groups.values() for row in ([row for row in group if buffers(row) == ROTATED] or group)]


def is_share(row: Row) -> bool:
    """Whether the value is a share of the speed of a yardstick, which is no peer."""
    return YARDSTICK.match(row["peer"]) is not None and row["measure"] == "peer / ours"


def is_against_peer(row: Row) -> bool:
    """Whether the row compares ours with somebody else who does the same work."""
    named = row["measure"] == "peer / ours" and row["peer"] and row["ours"] not in ("", row["peer"])
    return bool(named) and not YARDSTICK.match(row["peer"]) and not ITSELF.match(row["peer"])


def in_unit(row: Row, value: float, digits: int | None = None) -> str:
    """Write a value of a row in the row's own unit."""
    measure = row["measure"]
    if measure == "launches":
        return f"{value:.0f}"
    if "/" not in measure and not measure.startswith("share"):
        return format_seconds(value)
    text = f"{value:.{(2 if abs(value) < 10 else 1) if digits is None else digits}f}"
    return text if is_share(row) or measure.startswith("share") else f"{text}x"


def figure(row: Row) -> str:
    """Write a row's figure; `~` says that its interval is wide."""
    if row["failed"]:
        return "FAILED"
    if row["value"] is None:
        return "not measured"
    return in_unit(row, row["value"]["value"]) + ("~" if row["noisy"] else "")


def interval(row: Row) -> str:
    """Write a row's interval."""
    return " .. ".join(in_unit(row, row["value"][end], 2) for end in ("low", "high"))


def goal(row: Row) -> str:
    """Write a row's goal as it is compared with: ``>= 1.3x``."""
    if row["goal"] is None:
        return ""
    sense, bound = row["goal"]["sense"], row["goal"]["bound"]
    measure = row["measure"]
    if "/" not in measure and measure != "launches" and not measure.startswith("share"):
        return f"{sense} {format_seconds(bound)}"
    plain = is_share(row) or measure == "launches" or measure.startswith("share")
    return f"{sense} {bound:g}" + ("" if plain else "x")


def wide(estimate: Mapping[str, float] | None) -> bool:
    """Whether an interval is too wide for its figure to be quoted."""
    return estimate is not None and estimate["high"] - estimate["low"] > NOISY * abs(estimate["value"])


def our_seconds(rows: Iterable[Row]) -> float | None:
    """Return what ours took in a case that has one row for each peer; it may have been timed once for each."""
    seconds = [row["ours_seconds"] for row in rows if row["ours_seconds"] is not None]
    return median(seconds) if seconds else None


# --- Many rows --------------------------------------------------------------------------------------------------------


def part(row: Row, index: int) -> str:
    """Return one word of a case: ``size/Adam/1024/torch fused``."""
    words: list[str] = row["case"].split("/")
    return words[index] if index < len(words) else ""


def model(row: Row) -> str:
    """Return the name of a model, which may have a slash in it: ``model/ViT-B/16/torch fused``."""
    case: str = row["case"]
    return case.removeprefix("model/").removesuffix(f"/{row['peer']}")


def grouped(rows: Iterable[Row], *keys: Any) -> dict[Any, list[Row]]:
    """Return the rows by what `keys` say of them, in the order in which they come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(key(row) for key in keys)
        groups.setdefault(key[0] if len(keys) == 1 else key, []).append(row)
    return groups


def count(number: int) -> str:
    """Write a number of elements: 1024 is 1K."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{name}"
    return f"{number / 1e6:.1f} million" if number >= 10**7 else str(number)

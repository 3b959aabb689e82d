"""Bytes read as choices. Whoever makes the bytes, libFuzzer or a seeded generator, the same ones tell the same story.

The bytes are read from the front, and behind their end all are zero. Zero is the plainest choice: a shorter input is a
simpler one, and a file that one engine left replays by the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


class Choices:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        chunk = self.data[self.at : self.at + count]
        self.at += count
        return chunk.ljust(count, b"\0")

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        span = high - low
        if span == 0:
            return low
        return low + int.from_bytes(self.bytes((span.bit_length() + 7) // 8), "little") % (span + 1)

    def chance(self, one_in: int) -> bool:
        return self.integer(0, one_in - 1) == one_in - 1

    def pick(self, among: Sequence[Any]) -> Any:
        return among[self.integer(0, len(among) - 1)]

    def cuts(self, count: int, *, parts: int) -> list[range]:
        """0 .. count - 1 in at most so many runs, some of which may be empty."""
        inner = sorted(self.integer(0, count) for _ in range(self.integer(0, parts - 1)))
        ends = [0, *inner, count]
        return [range(a, b) for a, b in itertools.pairwise(ends)]

    def several(self, among: Sequence[Any], *, one_in: int) -> list[Any]:
        return [item for item in among if self.chance(one_in)]

    def seed(self) -> int:
        return self.integer(0, 0xFFFF)

"""A reader of FlatBuffers that takes nothing for granted: whatever lies outside of the buffer raises ValueError."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from exporters.session import Array


class Table:
    """One table of the buffer. Whatever lies outside raises ValueError."""

    def __init__(self, data: bytes | bytearray, position: int) -> None:
        self.data, self.position = data, position
        self.slots = position - self._read("i", position)
        self.size = self._read("H", self.slots)

    def _read(self, kind: str, position: int) -> Any:
        if not 0 <= position <= len(self.data) - struct.calcsize(f"<{kind}"):
            raise ValueError(f"byte {position} is asked for, and it has {len(self.data)}")
        return struct.unpack_from(f"<{kind}", self.data, position)[0]

    def _field(self, slot: int) -> int:
        at = 4 + 2 * slot
        offset = self._read("H", self.slots + at) if at < self.size else 0
        return self.position + offset if offset else 0

    def _target(self, slot: int) -> int:
        field = self._field(slot)
        return field + self._read("I", field) if field else 0

    def number(self, slot: int, kind: str, default: int = 0) -> Any:
        """A scalar of struct's `kind`."""
        field = self._field(slot)
        return self._read(kind, field) if field else default

    def vector(self, slot: int) -> tuple[int, int]:
        """Where a vector's (or a text's) first element lies, and how many there are; (0, 0) where it has none."""
        target = self._target(slot)
        return (target + 4, self._read("I", target)) if target else (0, 0)

    def array(self, slot: int, dtype: str) -> Array:
        """A vector of numbers, as it lies in the buffer."""
        start, count = self.vector(slot)
        return np.frombuffer(self.data, dtype, count, start) if count else np.zeros(0, dtype)

    def text(self, slot: int) -> str:
        return self.array(slot, "u1").tobytes().decode()

    def table(self, slot: int) -> Table | None:
        target = self._target(slot)
        return Table(self.data, target) if target else None

    def tables(self, slot: int) -> Iterator[Table]:
        """The tables of a vector of them."""
        start, count = self.vector(slot)
        for field in range(start, start + 4 * count, 4):
            yield Table(self.data, field + self._read("I", field))

    def texts(self, slot: int) -> Iterator[str]:
        """The texts of a vector of them."""
        start, count = self.vector(slot)
        for field in range(start, start + 4 * count, 4):
            at = field + self._read("I", field)
            yield np.frombuffer(self.data, "u1", self._read("I", at), at + 4).tobytes().decode()

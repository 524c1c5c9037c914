"""Weights as a file holds them, for formats whose files can be read where nothing runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from exporters.arrays import Array


@dataclass(frozen=True)
class Weight:
    """A weight's values as they are computed with (FP32), and how far each may be from what it was stored from.

    `within` is broadcast to the values: half a step of what they are stored in, at each value.
    """

    values: Array
    within: Array


def short(name: str) -> str:
    """A parameter's name in letters and digits alone, since files write ".", "/" or "_" between modules."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name)

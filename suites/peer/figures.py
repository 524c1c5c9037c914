"""Figures of the comparison: ratios ours / theirs with a 95 % interval, and the lines that are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from exporters.session import Array
from suites.support.compare import SCORE_FLOOR

RESAMPLES = 4000


@dataclass(frozen=True)
class Figure:
    """One line of the result: `ratio` is ours / theirs (for parity a difference), low and high its 95 % interval."""

    name: str
    ratio: float
    low: float
    high: float

    def line(self) -> str:
        return f"peer {self.name} {self.ratio:.4g} {self.low:.4g} {self.high:.4g}"


@dataclass
class Figures:
    """The figures of a run in the order in which they were measured, and what was seen on the way."""

    found: list[Figure] = field(default_factory=list[Figure])
    notes: list[str] = field(default_factory=list[str])
    medians: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])  # seconds

    def add(self, name: str, ratio: float, low: float, high: float) -> Figure:
        made = Figure(name, ratio, low, high)
        self.found.append(made)
        return made

    def compare(self, name: str, ours: Sequence[float], theirs: Sequence[float]) -> Figure:
        """The figure of paired repeats in seconds; the medians are kept as a note."""
        a, b = float(np.median(ours)), float(np.median(theirs))
        self.medians[name] = a, b
        self.notes.append(f"{name}: {a:.3f} s against {b:.3f} s, medians of {len(ours)} repeats")
        return self.add(name, *interval(np.asarray(ours) / np.asarray(theirs)))


def interval(ratios: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Median of the repeats' ratios, and its 95 % interval by a percentile bootstrap over the repeats.

    The two sides of one repeat are measured one after the other, so what slows the machine down for a while slows both.
    """
    values = np.asarray(ratios, float)
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[chosen], 1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def alternate(repeats: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Measures both sides `repeats` times in the order ABBA, after one of each that does not count (bytecode)."""
    ours()
    theirs()
    a: list[float] = []
    b: list[float] = []
    for number in range(repeats):
        for side, samples in ((ours, a), (theirs, b)) if number % 2 == 0 else ((theirs, b), (ours, a)):
            samples.append(side())
    return a, b


@dataclass(frozen=True)
class Difference:
    """Largest differences of one output: boxes in pixels, boxes of the `firing` anchors alone, scores."""

    boxes: float
    fired: float
    scores: float
    firing: int

    def line(self) -> str:
        return f"boxes {self.boxes:.2g} px, {self.firing} that fire {self.fired:.2g} px, scores {self.scores:.2g}"


def difference(ours: Array, theirs: Array) -> Difference:
    """Of (B, 4 + nc, A): an anchor fires where one of the peer's scores reaches the floor."""
    assert ours.shape == theirs.shape
    apart = np.abs(ours.astype(np.float64) - theirs)
    boxes, fires = apart[:, :4].max(1), theirs[:, 4:].max(1) >= SCORE_FLOOR
    fired, scores = float(boxes[fires].max(initial=0.0)), float(apart[:, 4:].max())
    return Difference(float(boxes.max()), fired, scores, int(fires.sum()))

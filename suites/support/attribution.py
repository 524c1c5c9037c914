"""Attribution: the first place inside a graph that leaves its tolerance, for the line of a comparison that failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exporters.pool import RemoteSession
from exporters.session import Array, Feeds
from exporters.spec import CALIBRATED, Precision

AT_ONCE = 16  # modules whose outputs are held at a time, of a few images; of a large batch a quarter
# Largest difference of a module's output, as a share of its range. FP32: sums of some 10^3 terms differ by 6e-5. FP16
# and TF32 round to 2^-11 of an element, some sixty times on the way, with peaks of five deviations; BF16 eight times as
# coarsely. In 8 bits a calibrator may cut the largest values off, so that the noise is what counts, as a share of the
# spread: 41 dB below it a layer, of sixty layers 23 dB, half of that again for what is cut off, and a margin of 6 dB.
ALLOWED: Mapping[Precision, float] = {
    Precision.FP32: 1e-4,
    Precision.TF32: 5e-3,
    Precision.FP16: 5e-3,
    Precision.BF16: 4e-2,
    Precision.FP8: 0.2,
    Precision.INT8: 0.2,
}


@dataclass(frozen=True)
class Found:
    """What was looked at inside, in the graph's order, and the first node beyond: None where all were within."""

    looked_at: int
    node: str
    observed: float
    allowed: float
    of: str  # what these are shares of

    @property
    def line(self) -> str:
        if not self.looked_at:
            return ""
        if not self.node:
            return (
                f"the outputs of all {self.looked_at} modules that can be told apart inside are within "
                f"{self.allowed:g} of their {self.of}, so that it happens behind them"
            )
        return (
            f"inside, {self.looked_at - 1} modules in front are within their tolerance, and the first beyond is "
            f"{self.node}: {self.observed:.2g} of its {self.of} against {self.allowed:g}"
        )


def first_beyond(
    reference: RemoteSession, session: RemoteSession, feeds: Feeds, cast: Feeds, precision: Precision, row: int = 0
) -> Found:
    """Compares the output of each module that an artifact's graph and the reference both name, in the graph's order.

    Modules are searched from the front, not by halving: behind the first one all others may be within again.

    Args:
        feeds: for the reference.
        cast: the same in the types of the artifact's inputs.
        row: of a batch, that is compared.
    """
    theirs, ours = session.modules(), reference.modules()
    shared = [m for m in theirs if m in ours]
    allowed, looked_at = ALLOWED[precision], 0
    share, of = (_noise, "spread") if precision in CALIBRATED else (_largest, "range")
    at_once = AT_ONCE if len(next(iter(feeds.values()))) <= 4 else AT_ONCE // 4
    for start in range(0, len(shared), at_once):
        some = shared[start : start + at_once]
        expected, observed = reference.run_inside(feeds, some, row), session.run_inside(cast, some, row)
        for module in some:
            if module not in expected or module not in observed or expected[module].shape != observed[module].shape:
                continue  # joined with another, or filled up
            looked_at += 1
            want, got = np.asarray(expected[module], np.float64), np.asarray(observed[module], np.float64)
            found = share(want, got) if want.size else 0.0
            if not found <= allowed:
                return Found(looked_at, theirs[module], found, allowed, of)
    return Found(looked_at, "", 0.0, allowed, of)


def _largest(want: Array, got: Array) -> float:
    """Largest difference over the expected range; not finite where one is not."""
    return float(np.max(np.abs(got - want)) / (np.ptp(want) or 1.0))


def _noise(want: Array, got: Array) -> float:
    """Root of the mean squared difference over the expected standard deviation."""
    return float(np.sqrt(np.mean((got - want) ** 2)) / (np.std(want) or 1.0))

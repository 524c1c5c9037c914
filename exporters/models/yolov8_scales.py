"""YOLOv8's scales as numbers, without torch: channels, repeats and strides (yolov8 architecture, published table)."""

from __future__ import annotations

import math
from dataclasses import dataclass

STRIDES = (8, 16, 32)
CLASSIFY_LARGEST = 1024  # classifiers have this limit of channels in every scale
# Epsilon of batch normalizations: the peer sets it for every task but this one, which has torch's default.
BN_EPS = {"detect": 1e-3, "segment": 1e-3, "pose": 1e-3, "obb": 1e-3, "classify": 1e-5}


@dataclass(frozen=True)
class Scale:
    """Depth and width multipliers, and the largest channel count before scaling."""

    name: str
    depth: float
    width: float
    largest: int

    def channels(self, c: int) -> int:
        """Scaled channel count: a multiple of 8."""
        return math.ceil(min(c, self.largest) * self.width / 8) * 8

    def repeats(self, n: int) -> int:
        """Scaled number of bottlenecks, at least 1."""
        return max(round(n * self.depth), 1)


SCALES = {
    s.name: s
    for s in (
        Scale("p", 0.33, 0.125, 896),  # ours, below the published ones: reference checkpoints have it
        Scale("n", 0.33, 0.25, 1024),
        Scale("s", 0.33, 0.50, 1024),
        Scale("m", 0.67, 0.75, 768),
        Scale("l", 1.00, 1.00, 512),
        Scale("x", 1.00, 1.25, 512),
    )
}
